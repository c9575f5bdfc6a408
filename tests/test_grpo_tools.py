"""[G41] A calculator in the loop: what it writes, where, and that none of it is learned."""

import re

import pytest
import torch
from commands import flags
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CALL, END = "<calc>", "</calc>"
WORDS = ["<pad>", "<eos>", CALL, END, *"0123456789+-*/()#?\n"]


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    """Directory of a random Qwen3 whose tokenizer has one token for each end of a call."""
    directory = str(tmp_path_factory.mktemp("caller"))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?calc>|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="?")
    fast.save_pretrained(directory)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(WORDS)}
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**sizes, eos_token_id=1, pad_token_id=0)).save_pretrained(directory)
    return directory


def ids(text):
    found = []
    while text:
        word = next(word for word in (CALL, END, "<eos>", text[0]) if text.startswith(word))
        found.append(WORDS.index(word))
        text = text[len(word) :]
    return found


def text_of(tokens):
    return "".join(WORDS[token] for token in tokens)


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("12*34", "408"),
        ("3-10", "-7"),
        ("7/2", "3.5"),
        ("1/8", "0.125"),
        ("1/3", "1/3"),
        ("(1+2)*3", "9"),
        ("3.5*4", "14"),
        ("-7+3", "-4"),
        ("2*-3", "-6"),
        ("1,000+1.5", "1001.5"),
        ("1.5.2*2", ""),
        ("1/0", ""),
        ("2**99", ""),
        ("", ""),
        ("__import__('os')", ""),
        ("9" * 40 + "*9", ""),
    ],
)
def test_what_the_calculator_answers(grpo, expression, answer):
    assert grpo.calculate(expression) == answer


# what the policy would write, token after token; . stands for what it would have written over the tool's answer
SCRIPTS = {
    "<calc>12*34</calc>...#408<eos>": ("<calc>12*34</calc>408#408<eos>", "1" * 7 + "000" + "11111"),
    "<calc>1+1</calc>.+<calc>2*4</calc>.#8<eos>": (
        "<calc>1+1</calc>2+<calc>2*4</calc>8#8<eos>",
        "11111" + "0" + "1" + "11111" + "0" + "111",
    ),
    "<calc>1/0</calc>#0<eos>": ("<calc>1/0</calc>#0<eos>", "1" * 8),  # no answer
    "1+1</calc>2<eos>": ("1+1</calc>2<eos>", "1" * 6),  # no call
}


@pytest.mark.parametrize("fast", [True, False])
def test_where_the_answer_is_written(grpo, tiny_grpo, caller, monkeypatch, fast):
    """Behind the end of the call, in place of what was sampled there. Its tokens have mask and log-probability 0. The
    EOS is in the mask, and the rows do not disturb each other."""
    args = tiny_grpo(model=caller, tools="calculator", fast=fast, max_tokens=24)
    model, _, eos_ids = grpo.load_model(args, caller)
    assert model.plain_because == ("" if fast else "--no-fast")
    scripts = [ids(script.replace(".", "9")) for script in SCRIPTS]

    def scripted(logits, noise, temperature):
        """The noise says which row this is and which token: row + t / 100."""
        places = [(int(x), round((x - int(x)) * 100)) for x in noise.tolist()]
        token = torch.tensor([scripts[row][t] if t < len(scripts[row]) else 5 for row, t in places])
        return token, torch.full((len(token),), -1.0)

    monkeypatch.setattr(grpo, "sample_token", scripted)
    noise = torch.arange(len(scripts))[:, None] + torch.arange(24) / 100
    tokens, logprobs, mask = grpo.sample(args, model, [[4, 5]], noise.double(), 1.0, eos_ids, 0)
    for row, (text, expected) in enumerate(SCRIPTS.values()):
        assert text_of(tokens[row, : len(expected)].tolist()) == text
        assert "".join(map(str, mask[row].tolist())) == expected.ljust(24, "0")
        assert logprobs[row].tolist() == [-float(x) for x in expected.ljust(24, "0")]


@pytest.mark.parametrize("fast", [True, False])
def test_the_answer_is_read_and_not_scored(grpo, tiny_grpo, caller, fast):
    """The log-probabilities are those of one forward pass over everything, and the tool's tokens get no gradient: the
    gradient is that of the sum over the others."""
    args = tiny_grpo(model=caller, tools="calculator", fast=fast, max_tokens=24)
    model, _, _ = grpo.load_model(args, caller)
    prompts, written = (
        [ids("12*34"), ids("5")],
        [ids("<calc>12*34</calc>408#408<eos>"), ids("<calc>2-9</calc>-7#<eos>")],
    )
    masks = ["1" * 7 + "000" + "11111", "11111" + "00" + "11"]
    tokens, mask = torch.zeros(2, 24, dtype=torch.long), torch.zeros(2, 24, dtype=torch.long)
    for row, (own, kept) in enumerate(zip(written, masks)):
        tokens[row, : len(own)] = torch.tensor(own)
        mask[row, : len(own)] = torch.tensor([int(x) for x in kept])
    found = grpo.policy_logprobs(args, model, prompts, tokens, mask)
    plain = AutoModelForCausalLM.from_pretrained(caller)
    total = 0.0
    for row, (prompt, own) in enumerate(zip(prompts, written)):
        whole = torch.tensor([prompt + own])
        logits = plain(whole).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(own)[:, None])[:, 0] * mask[row, : len(own)]
        torch.testing.assert_close(found[row, : len(own)], expected, rtol=0, atol=1e-4)
        total = total + expected.sum()
    assert (found[mask == 0] == 0).all() and (found[mask == 1] < 0).all()
    found.sum().backward()
    total.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)
    changed = tokens.clone()
    changed[0, 7] = ids("9")[0]  # another answer of the tool
    with torch.no_grad():
        after = grpo.policy_logprobs(args, model, prompts, changed, mask)
    assert torch.equal(after[0, :7], found[0, :7].detach()) and not torch.equal(
        after[0, 10:15], found[0, 10:15].detach()
    )


def test_a_run_with_the_tool(grpo, tiny_grpo, caller, monkeypatch, capsys):
    """Here any digit calls it and it answers 7#: each answer has tokens that the policy did not write, the ratio stays
    1, they count in the length of the completion, and the loss has the mask without them."""
    model, _, _ = grpo.load_model(tiny_grpo(model=caller, tools="calculator"), caller)
    monkeypatch.setattr(grpo, "CALL", r"(\d)")
    kept = []
    reduce_loss = grpo.reduce_loss
    monkeypatch.setattr(
        grpo, "reduce_loss", lambda loss, mask, *rest: kept.append(mask) or reduce_loss(loss, mask, *rest)
    )
    monkeypatch.setattr(grpo, "calculate", lambda text: "7#")
    tool = model.tool._replace(can_end=torch.ones_like(model.tool.can_end))
    monkeypatch.setattr(grpo, "find_tool", lambda *_: tool)
    groups, rate_group = [], grpo.rate_group
    monkeypatch.setattr(
        grpo, "rate_group", lambda args, group, *rest: groups.append(group) or rate_group(args, group, *rest)
    )
    metrics = grpo.train(tiny_grpo(model=caller, tools="calculator", steps=2, num_epochs=1, operators="+"))
    mask = torch.cat(kept)
    gaps = [row for row in mask.tolist() if 1 in row and 0 in row[: len(row) - row[::-1].index(1)]]
    assert len(gaps) > 5, "tokens of the tool stand between those of the policy"
    for row in mask.tolist():  # two at a time: the 7 in the tool's answer is no call
        assert set(re.findall("0+", "".join(map(str, row)).rstrip("0"))) <= {"00"}
    for group in groups:  # the text goes to the end, what the tool wrote included
        for text, row, length in zip(group.texts, group.tokens.tolist(), grpo.lengths_of(group.mask)):
            assert text == text_of(x for x in row[:length] if WORDS[x] not in ("<pad>", "<eos>", "?"))
    assert all(row["policy/ratio_max"] == 1 and row["policy/sampler_gap"] < 1e-4 for row in metrics[1:])
    longest = max(row["completion/length"] for row in metrics[1:])
    assert longest > float(mask.sum(-1).float().mean())
    assert "plain, not fast" not in capsys.readouterr().out


def test_without_the_flag_a_call_is_text(grpo, tiny_grpo, caller):
    model, _, _ = grpo.load_model(tiny_grpo(model=caller), caller)
    assert model.tool is None
    token, logprob = torch.tensor([3]), torch.tensor([-1.0])
    calls = grpo.ToolCalls(model, torch.tensor([1]))
    calls.read(torch.tensor([ids("<calc>1+1</calc>")]), 4, torch.tensor([True]))
    assert [x.item() for x in calls.write(token, logprob)] == [3, -1.0, 1]


@pytest.mark.slow
def test_the_small_model_learns_to_call(grpo, monkeypatch, tmp_path, capsys, command):
    """Worked sums are calls. In the warm start the sum behind a call has no loss: it is the calculator's."""
    args = grpo.Args(tools="calculator", terms=3, num_problems=200)
    problem = grpo.load_problems(args)[0][0]
    assert problem.solution == f"<calc>{problem.prompt}</calc>{problem.answer}\n#{problem.answer}"
    tokenizer = grpo.new_tokenizer(has_calls=True)
    kept = grpo.chosen_tokens(tokenizer, "<calc>9+8</calc>17\n#17")
    assert kept == [1] * 5 + [0, 0] + [1] * 4
    masks, original = [], grpo.supervised_loss
    monkeypatch.setattr(grpo, "supervised_loss", lambda x, mask, *rest: masks.append(mask) or original(x, mask, *rest))
    words = [
        "--tools",
        "calculator",
        "--terms",
        "2",
        "--warm-start-steps",
        "400",
        "--warm-start",
        "0.9",
        "--steps",
        "1",
    ]
    words += ["--eval-problems", "32", "--eval-samples", "2", "--eval-k", "1", "--num-problems", "2000"]
    status, out, error = command(*words, "--run-dir", tmp_path / "run")
    assert status == 0, error
    first = masks[0].tolist()
    assert all(re.search("10{1,2}1", "".join(map(str, row))) for row in first) and len(first) == 32
    assert float(re.search(r"greedy +(\d\.\d+)", out)[1]) > 0.3 and "<calc>" in out
    status, out, _ = command("--ask", "3+4", "--model", tmp_path / "run")
    assert status == 0 and "<calc>3+4</calc>7" in out
    status, _, error = command("--sample-to", tmp_path / "kept.jsonl", "--model", tmp_path / "run")
    assert status == 2 and "would imitate what the calculator wrote" in error
    words = [
        "--model",
        tmp_path / "run",
        "--instruction",
        "{}",
        "--steps",
        "1",
        "--terms",
        "2",
        *words[words.index("--eval-problems") :],
    ]
    status, out, error = command(*words, "--run-dir", tmp_path / "further")
    assert status == 0 and "was trained with --tools calculator, and this run has --tools none" in out, error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--supervision", "process"], "supervision process pays for the steps that the policy writes"),
        (["--task", "countdown"], "tools calculator is for a model, or for sums"),
        (["--sft-data", "x", "--model", "m"], "sft_data x imitates every token of a completion"),
        (["--stop", "</calc>", "--model", "m"], "stop '</calc>' would end an answer within a call or its result"),
        (["--stop", "8", "--model", "m"], "stop '8' would end an answer within a call or its result"),
    ],
)
def test_where_a_tool_makes_no_sense(command, words, message):
    status, out, error = command("--tools", "calculator", *words)
    assert status == 2 and message.replace(" ", "") in re.sub(r"[\s│]", "", out + error) and "Traceback" not in error


class Decoder:
    """A tokenizer with pieces of its own to read, and another's to write."""

    def __init__(self, pieces, tokenizer):
        self.pieces, self.tokenizer = pieces, tokenizer

    def batch_decode(self, rows, **options):
        return ["".join(self.pieces[token] for token in row) for row in rows]

    def __call__(self, text, **options):
        return self.tokenizer(text, **options)


def test_a_token_may_go_on_behind_the_call(grpo, tiny_grpo, caller):
    """As >= does, a token of many tokenizers: the result stands behind it. The same call is answered once."""
    model, tokenizer, _ = grpo.load_model(tiny_grpo(model=caller, tools="calculator"), caller)
    calls = grpo.ToolCalls(model, torch.tensor([1]))
    pieces = Decoder({2: "<calc>1+1", 3: "</calc>=", 4: "7"}, tokenizer)
    calls.tool = calls.tool._replace(tokenizer=pieces, can_end=torch.ones_like(calls.tool.can_end))
    tokens, going = torch.tensor([[2, 3, 4]]), torch.tensor([True])
    for t, expected in enumerate(([], ["2"], [])):
        calls.waiting = {}
        calls.read(tokens, t, going)
        assert [text_of(answer) for answer in calls.waiting.values()] == expected


def test_a_tokenizer_that_cannot_write_a_call(grpo, tiny_grpo, command):
    status, _, error = command(*flags(grpo, tiny_grpo(tools="calculator")))
    assert status == 2 and "cannot write <calc>1</calc>" in error and "Traceback" not in error


def test_an_answer_that_is_cut_in_a_result_has_all_its_tokens(grpo, tiny_grpo, caller):
    args = tiny_grpo(model=caller, tools="calculator", max_tokens=9, length_weight=0.0, overlong_buffer=4)
    _, tokenizer, eos_ids = grpo.load_model(args, caller)
    tokens = torch.tensor([ids("<calc>12*34</calc>40"), [*ids("#3"), 1, *[0] * 6]])
    mask = torch.tensor([[1] * 7 + [0] * 2, [1] * 3 + [0] * 6])
    texts = ["<calc>12*34</calc>", "#3"]
    group = grpo.Group(grpo.Problem("1+2", "3"), [4], tokens, torch.zeros(2, 9), mask, texts)
    rating = grpo.rate_group(args, group, tokenizer, eos_ids, None, 0)
    assert rating.is_truncated.tolist() == [True, False]
    assert rating.parts["overlong"].tolist() == [-1, 0]
    row = grpo.describe(args, [(group, rating)])
    assert (row["completion/length"], row["tools/calls"]) == (6, 0.5)
