"""grpo_llm.py's --sample-to and --sft-data: what is kept of the samples, and supervised steps on a file."""

import itertools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from check import check, check_every_kind, value_and_gradient
from hypothesis import given
from hypothesis import strategies as st
from test_grpo_full_size import two_processes
from test_grpo_runs import assert_same_weights, without_clock
from transformers import AutoModelForCausalLM, AutoTokenizer

import gae_reference

pytestmark = pytest.mark.slow

SUMS = [("1+2", "1+2=3\n#3"), ("4+5", "4+5=9\n#9"), ("9+9", "9+9=18\n#18"), ("0+7", "0+7=7\n#7"), ("6+2", "#8")]
CHAT = "{% for m in messages %}({{ m['content'] }}){% endfor %}{% if add_generation_prompt %}:{% endif %}"
IMITATION = "supervised_loss: −Σ ln π / tokens, over the tokens of the completions"
NAN = float("nan")


@pytest.fixture
def write(tmp_path):
    """write(rows): the path of a file with a line for each; a text is a line as it stands."""

    def to_file(rows, name="sft.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(tmp_path / name)

    return to_file


@pytest.fixture
def tuning(tiny_grpo, write):
    """Args of a few supervised steps on SUMS, less what the test changes."""

    def make(name="run", rows=None, **changes):
        rows = [{"prompt": prompt, "completion": text} for prompt, text in SUMS] if rows is None else rows
        defaults = {"sft_data": write(rows), "length_weight": 0.0, "learning_rate": 1e-3, "steps": 3}
        return tiny_grpo(name, **{**defaults, **changes})

    return make


@pytest.fixture
def tiny_chat(tiny_lm, tmp_path):
    """The directory of the tiny model with a chat template."""
    AutoModelForCausalLM.from_pretrained(tiny_lm).save_pretrained(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "chat")
    return str(tmp_path / "chat")


@pytest.fixture
def settings(grpo, monkeypatch):
    """settings(words): the Args of a command line, with what a run that it names adds."""

    def parse(*words):
        monkeypatch.setattr(sys, "argv", ["grpo_llm.py", *map(str, words)])
        return grpo.parse_args()

    return parse


@pytest.fixture(scope="module")
def small_run(grpo, tmp_path_factory):
    """The directory of a short run of the small model."""
    run_dir = str(tmp_path_factory.mktemp("small") / "zero")
    sizes = {"terms": 2, "num_problems": 60, "steps": 2, "warm_start_steps": 75, "max_tokens": 12, "eval_every": 0}
    sizes |= {"prompts_per_step": 8, "group_size": 4, "eval_problems": 8, "eval_samples": 4, "eval_k": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "draw_curves", lambda metrics, path: None)
        grpo.train(grpo.Args(**sizes, run_dir=run_dir))
    return run_dir


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# ---- The loss ----


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_every_token_counts_the_same(grpo):
    """Completions of 1 and 3 tokens: (1 + 2 + 3 + 6) / 4 = 3, and not the mean of 1 and 11/3. What is off the mask
    never counts."""
    logprob = tensor([-1.0, NAN, NAN], [-2.0, -3.0, -6.0])

    def loss(mask):
        return grpo.supervised_loss(logprob, mask, 4)

    check_every_kind(loss, [[[1, 0, 0], [1, 1, 1]]], 3.0, IMITATION, "ln π −1 and −2, −3, −6")
    value, slope = value_and_gradient(grpo.supervised_loss, logprob, tensor([1, 0, 0], [1, 1, 1]), 4)
    check(value, 3.0, IMITATION, "two completions")
    check(slope, [[-0.25, 0, 0], [-0.25] * 3], f"gradient of {IMITATION}", "two completions")


def test_a_model_that_knows_nothing_has_the_logarithm_of_its_vocabulary(grpo):
    logprob = torch.full((2, 3), -math.log(26), dtype=torch.float64)
    check(grpo.supervised_loss(logprob, torch.ones(2, 3), 6), math.log(26), IMITATION, "26 tokens, all as likely")


@given(st.lists(st.lists(st.floats(-30, 0), min_size=1, max_size=6), min_size=1, max_size=5), st.data())
def test_supervised_loss_equals_the_reference(grpo, rows, data):
    """Value and gradient, in one piece and as the sum over any two micro-batches."""
    width = max(map(len, rows))
    logprob = tensor(*(row + [NAN] * (width - len(row)) for row in rows))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    total, cut = int(mask.sum()), data.draw(st.integers(0, len(rows)))
    value, slope = value_and_gradient(grpo.supervised_loss, logprob, mask, total)
    check(value, gae_reference.supervised_loss(rows), IMITATION, rows)
    check(slope, -mask.double() / total, f"gradient of {IMITATION}", rows)
    halves = [grpo.supervised_loss(logprob[part], mask[part], total) for part in (slice(cut), slice(cut, None))]
    check(sum(halves), value.item(), IMITATION, f"{rows} in two micro-batches")


def test_one_completion_is_the_logarithm_of_its_perplexity():
    probabilities = [0.5, 0.25, 0.125]
    perplexity = math.prod(probabilities) ** (-1 / 3)
    found = gae_reference.supervised_loss([[math.log(p) for p in probabilities]])
    assert found == pytest.approx(math.log(perplexity), rel=1e-12) == pytest.approx(2 * math.log(2))


def loss_of_transformers(model, pairs):
    """Its own loss of (prompt, completion) token lists: labels of −100 on the prompt, a sum over all tokens."""
    total = 0.0
    for prompt, completion in pairs:
        ids, labels = torch.tensor([prompt + completion]), torch.tensor([[-100] * len(prompt) + completion])
        logits = model(ids).logits[:, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits[0], labels[0, 1:], reduction="sum")
    return total / sum(len(completion) for _, completion in pairs)


@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 10_000])
@pytest.mark.parametrize("fast", [True, False])
def test_the_gradient_of_a_file_is_that_of_its_definition(grpo, tuning, micro_batch_tokens, fast):
    """[G31] From the lines of the file on: no token of a prompt, EOS, each token once, whatever the micro-batches."""
    args = tuning(fast=fast, micro_batch_tokens=micro_batch_tokens, max_tokens=16)
    model, tokenizer, eos_ids = grpo.load_model(args, args.model)
    examples = grpo.examples_of(args, model, tokenizer, eos_ids, grpo.read_completions(args), [])
    optimizer = grpo.new_optimizer(args, model)
    loss, count = grpo.supervised_gradient(args, model, optimizer, examples)
    found = torch.cat([x.grad.flatten() for x in model.parameters()])
    plain = AutoModelForCausalLM.from_pretrained(args.model, attention_dropout=0.0)
    pairs = []
    for prompt, text in SUMS:
        pairs.append([tokenizer(f"{prompt}\n")["input_ids"], tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
    expected = loss_of_transformers(plain, pairs)
    expected.backward()
    slope = torch.cat([x.grad.flatten() for x in plain.parameters()])
    assert count == sum(len(completion) for _, completion in pairs)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert (found - slope).norm() < 1e-4 * slope.norm() and slope.norm() > 0.1


def test_trl_reads_the_file_as_we_do(grpo, tuning, tmp_path):
    """Its SFTTrainer takes the same tokens from the lines that --sample-to writes, and has the same loss."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": f"{prompt}\n", "completion": text} for prompt, text in SUMS]
    args = tuning(rows=rows)
    model, tokenizer, eos_ids = grpo.load_model(args, args.model)
    examples = grpo.examples_of(args, model, tokenizer, eos_ids, grpo.read_completions(args), [])
    loss, _ = grpo.supervised_gradient(args, model, grpo.new_optimizer(args, model), examples)
    config = SFTConfig(str(tmp_path / "trl"), per_device_train_batch_size=5, use_cpu=True, report_to=[], bf16=False)
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    for example, theirs in zip(examples, trainer.train_dataset, strict=True):
        assert theirs["input_ids"] == example.prompt + example.completion
        assert theirs["labels"] == [-100] * len(example.prompt) + example.completion
    (batch,) = trainer.get_train_dataloader()
    assert float(trainer.compute_loss(trainer.model, batch).detach()) == pytest.approx(loss, rel=1e-4)


# ---- Lines of a file ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "1+1"}', "--sft-data needs rows with prompt and completion, found prompt"),
        ("[1]", "--sft-data needs rows with prompt and completion, found [1]"),
        ('{"prompt": " ", "completion": "2"}', "prompt must be a text or a list of messages, found ' '"),
        ('{"prompt": 3, "completion": "2"}', "prompt must be a text or a list of messages, found 3"),
        ('{"prompt": [], "completion": "2"}', "each message needs role and content"),
        ('{"prompt": [{"role": "assistant", "content": "x"}], "completion": "2"}', "must not be the assistant's"),
        ('{"prompt": "1+1", "completion": ""}', "completion must be a text or one message of the assistant, found ''"),
        ('{"prompt": "1+1", "completion": 2}', "completion must be a text or one message of the assistant, found 2"),
        ('{"prompt": "1+1", "completion": [{"role": "user", "content": "2"}]}', "one message of the assistant"),
        ('{"prompt": "1+1", "completion": "2', "line 2 cannot be read"),
    ],
)
def test_a_bad_line_is_named(grpo, tuning, line, message):
    args = tuning(rows=['{"prompt": "1+1", "completion": "2"}', line])
    with pytest.raises(grpo.InputError, match=re.escape(message)) as error:
        grpo.train(args)
    assert "line 2" in str(error.value) and not Path(args.run_dir).exists()


def test_a_file_without_lines_is_refused(grpo, tuning):
    with pytest.raises(grpo.InputError, match="has no rows"):
        grpo.train(tuning(rows=[]))


@pytest.mark.parametrize(
    ("text", "message"),
    [("12<eos>3", "the completion has an EOS token before its end"), ("1 apple", "does not know a part of the")],
)
def test_what_could_never_be_sampled_is_refused(grpo, tuning, text, message):
    args = tuning(rows=[{"prompt": "1+1", "completion": text}])
    with pytest.raises(grpo.InputError, match=rf"sft.jsonl, line 1: .*{message}"):
        grpo.train(args)


@pytest.fixture
def examples(grpo, tuning):
    """examples(rows, held_out=…, **changes): the prompts and completions that are learned from, as texts."""

    def read(rows, held_out=(), **changes):
        args = tuning(rows=rows, **changes)
        model, tokenizer, eos_ids = grpo.load_model(args, args.model)
        held_out = [grpo.Problem(prompt, "0") for prompt in held_out]
        found = grpo.examples_of(args, model, tokenizer, eos_ids, grpo.read_completions(args), held_out)
        return [tuple(map(tokenizer.decode, example)) for example in found]

    return read


def test_the_prompt_of_a_line_is_complete(examples):
    """No instruction is added. A newline at its end, as --sample-to writes it, stands there once."""
    rows = [{"prompt": "1+1", "completion": "2"}, {"prompt": "1+1\n", "completion": "2<eos>"}]
    assert examples(rows, instruction="({})") == [("1+1\n", "2<eos>")] * 2


def test_messages_of_a_line_go_through_the_chat_template(examples, tiny_chat):
    """--system's turn comes first, where the line has none of its own."""
    user, own = {"role": "user", "content": "1+1"}, {"role": "system", "content": "7"}
    rows = [{"prompt": [user], "completion": [{"role": "assistant", "content": "2"}]}]
    rows += [{"prompt": [own, user], "completion": "2"}, {"prompt": "3", "completion": "4"}]
    found = [("(1+1):", "2<eos>"), ("(7)(1+1):", "2<eos>"), ("(3):", "4<eos>")]
    assert examples(rows, model=tiny_chat, instruction="-{}") == found
    found = [("(5)(1+1):", "2<eos>"), ("(7)(1+1):", "2<eos>"), ("(5)(3):", "4<eos>")]
    assert examples(rows, model=tiny_chat, system="5") == found


def test_what_is_left_out_is_said(examples, capsys):
    """Held-out prompts and what exceeds the context; a long completion is learned, and said too."""
    rows = [{"prompt": "1+1", "completion": "2"}, {"prompt": "1+2", "completion": "3"}]
    rows += [{"prompt": "1+3", "completion": "4" * 300}, {"prompt": "1+4", "completion": "5" * 30}]
    assert [prompt for prompt, _ in examples(rows, held_out=["1+2"])] == ["1+1\n", "1+4\n"]
    out = capsys.readouterr().out
    assert "sft-data    4 lines; 3 steps of 3 are 4.5 epochs" in out
    assert "1 are left out because their prompts are held out" in out
    assert "1 are left out because they exceed the model's context of 256 tokens" in out
    assert "1 are longer than --max-tokens 10" in out


def test_a_file_of_held_out_prompts_teaches_nothing(grpo, examples):
    with pytest.raises(grpo.InputError, match="no line to learn from"):
        examples([{"prompt": "1+2", "completion": "3"}], held_out=["1+2"])


# ---- Supervised steps ----


def test_supervised_steps_learn_the_file(grpo, tuning, capsys):
    args = tuning(steps=60, learning_rate=1e-2, prompts_per_step=5, warmup_steps=5, max_tokens=16)
    metrics = grpo.train(args)
    first, last = metrics[1], metrics[-1]
    assert first["sft/loss"] > 2 and last["sft/loss"] < 0.2 and len(metrics) == 61
    assert "eval/greedy" in metrics[0] and "eval/greedy" in last and "reward/mean" not in last
    assert last["policy/learning_rate"] < first["policy/learning_rate"] * 2
    out = capsys.readouterr().out
    assert "60 supervised steps" in out and "samples.jsonl" not in out
    model, tokenizer, eos_ids = grpo.load_model(args, f"{args.run_dir}/policy")
    problems = [grpo.Problem(prompt, "0") for prompt, _ in SUMS]
    names = [("test", i) for i in range(len(SUMS))]
    groups = grpo.sample_groups(args, model, tokenizer, eos_ids, problems, 1, 0.0, names)
    assert [group.texts[0] for group in groups] == [text for _, text in SUMS]


def test_each_epoch_has_every_line_in_an_order_of_its_own(grpo, tuning, monkeypatch):
    seen, gradient = [], grpo.supervised_gradient
    monkeypatch.setattr(
        grpo, "supervised_gradient", lambda *given: seen.append([x.prompt for x in given[3]]) or gradient(*given)
    )
    grpo.train(tuning(steps=5, prompts_per_step=4))  # 20 lines are four epochs of five
    stream = [tuple(prompt) for batch in seen for prompt in batch]
    epochs = [stream[i : i + 5] for i in range(0, 20, 5)]
    assert all(set(epoch) == set(epochs[0]) and len(set(epoch)) == 5 for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_the_temperature_does_not_change_the_loss(grpo, tuning):
    """It belongs to the sampling, and so to the evaluations."""
    one, other = (grpo.train(tuning(f"{t}", temperature=t, steps=2)) for t in (1.0, 2.0))
    assert [row["sft/loss"] for row in one[1:]] == [row["sft/loss"] for row in other[1:]]


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "optimizer": "adamw8bit"}, {"lora_rank": 2}])
def test_interrupted_supervised_steps_end_with_the_same_bits(grpo, tuning, monkeypatch, options):
    """Stopped in the fourth step, resumed from the second."""
    options = {"steps": 5, "checkpoint_every": 2, "eval_every": 2, "learning_rate": 1e-2, **options}
    whole = grpo.train(tuning("whole", **options))
    original, count = grpo.learning_rate_of, itertools.count()

    def breaks(*arguments):
        if next(count) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "learning_rate_of", breaks)
        with pytest.raises(KeyboardInterrupt):
            grpo.train(tuning("broken", **options))
    torch.rand(100)
    resumed = grpo.train(grpo.resumed_args(tuning("broken").run_dir))
    assert without_clock(resumed) == without_clock(whole) and len(whole) == 6
    ends = [torch.load(Path(tuning(n).run_dir) / "checkpoint.pt", weights_only=True) for n in ("whole", "broken")]
    assert_same_weights(ends[0]["policy"], ends[1]["policy"])
    assert str(ends[0]["optimizer"]) == str(ends[1]["optimizer"])


def test_an_adapter_imitates_too(grpo, tuning, tiny_lm):
    """The model's own weights stay as they are; RL goes on from the adapter that was saved."""
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    args = tuning(lora_rank=4, steps=20, learning_rate=1e-2)
    metrics = grpo.train(args)
    assert metrics[-1]["sft/loss"] < 0.8 * metrics[1]["sft/loss"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        x.name for x in Path(args.run_dir, "policy").iterdir()
    }
    again = grpo.replace(args, model=f"{args.run_dir}/policy", sft_data=None, run_dir=f"{args.run_dir}2", steps=1)
    assert grpo.train(again)[-1]["step"] == 1


@pytest.mark.processes
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_imitate_as_one(grpo, tuning, shard):
    """Each takes half of the lines of a step; the loss counts the tokens of both."""
    options = {"prompts_per_step": 4, "learning_rate": 1e-3, "optimizer": "adamw8bit"}
    both = tuning("both", shard=shard, **options)
    two_processes(grpo, both)
    one = grpo.train(tuning("alone", **options))
    two = lines_of(Path(both.run_dir) / "metrics.jsonl")
    assert len(one) == len(two) == 4
    for row, other in zip(one, two, strict=True):
        for name in set(row) & {"sft/loss", "policy/grad_norm", "eval/greedy", "eval/pass@1"}:
            assert other[name] == pytest.approx(row[name], rel=1e-3, abs=1e-5), name


def test_memory_that_runs_out_changes_no_supervised_step(grpo, tuning, monkeypatch):
    """The micro-batch is halved, and the rest of the run keeps the smaller one."""
    expected = grpo.train(tuning("whole", micro_batch_tokens=400))
    seen, logprobs = [], grpo.micro_batch_logprobs

    def fails(args, *given):
        seen.append(args.micro_batch_tokens)
        if args.micro_batch_tokens > 100:
            raise torch.OutOfMemoryError
        return logprobs(args, *given)

    monkeypatch.setattr(grpo, "why_plain", lambda *_: "")  # it scores as well
    monkeypatch.setattr(grpo, "micro_batch_logprobs", fails)
    found = grpo.train(tuning("halved", micro_batch_tokens=400))
    assert seen[:3] == [400, 200, 100] and set(seen[3:]) == {100}
    losses = ([row["sft/loss"] for row in rows[1:]] for rows in (found, expected))
    assert next(losses) == pytest.approx(next(losses), rel=1e-5)


# ---- Samples to keep ----

RIGHT, UNREADABLE, WRONG = "1+2=3\n#3", "3", "1+2=4\n#4"


@pytest.fixture
def sampled(grpo, monkeypatch):
    """sampled(texts): whatever is sampled gets these texts; a text that ends with … is cut off."""

    def as_group(texts):
        def sample_groups(args, model, tokenizer, eos_ids, problems, group_size, temperature, names):
            tokens = torch.tensor([[0 if text.endswith("…") else eos_ids[0]] for text in texts])
            shown = [text.rstrip("…") for text in texts]
            rest = torch.zeros(len(texts), 1), torch.ones(len(texts), 1)
            return [grpo.Group(problem, [0], tokens, *rest, shown) for problem in problems]

        monkeypatch.setattr(grpo, "sample_groups", sample_groups)
        monkeypatch.setattr(grpo, "load_problems", lambda args: ([grpo.Problem("1+2", "3")], []))

    return as_group


def keeping(tiny_grpo, tmp_path, **changes):
    defaults = {"run_dir": None, "sample_to": str(tmp_path / "kept.jsonl"), "length_weight": 0.0, "steps": 1}
    return tiny_grpo(**{**defaults, "prompts_per_step": 1, **changes})


def test_only_right_readable_whole_samples_are_kept(grpo, tiny_grpo, sampled, tmp_path, capsys):
    """[G32] Each is counted; equal ones are written once."""
    sampled([RIGHT, RIGHT, UNREADABLE, WRONG, f"{RIGHT}…", "2+1=3\n#3"])
    args = keeping(tiny_grpo, tmp_path)
    counts = grpo.keep_samples(args)
    assert counts == {"sampled": 6, "right": 5, "readable": 5, "ended": 5, "kept": 3, "written": 2}
    assert lines_of(args.sample_to) == [{"prompt": "1+2\n", "completion": x} for x in (RIGHT, "2+1=3\n#3")]
    out = capsys.readouterr().out
    assert "6 completions: 5 are right, 5 match --format-pattern, 5 ended" in out
    assert "kept        3 are all three, 1 of them equal to another one" in out and "2 lines for 1 prompts" in out


def test_what_is_readable_is_the_patterns_choice(grpo, tiny_grpo, sampled, tmp_path):
    sampled([RIGHT, UNREADABLE, WRONG])
    args = keeping(tiny_grpo, tmp_path, format_pattern=r"\d+")
    grpo.keep_samples(args)
    assert [row["completion"] for row in lines_of(args.sample_to)] == [UNREADABLE]


def test_a_stop_text_ends_a_sample(grpo, tiny_grpo, sampled, tmp_path):
    sampled([f"{RIGHT}\n…", f"{RIGHT}…"])
    args = keeping(tiny_grpo, tmp_path, stop=("#3\n",))
    assert grpo.keep_samples(args)["ended"] == 1
    assert [row["completion"] for row in lines_of(args.sample_to)] == [f"{RIGHT}\n"]


def test_nothing_kept_is_no_file(grpo, tiny_grpo, sampled, tmp_path):
    sampled([UNREADABLE, WRONG])
    args = keeping(tiny_grpo, tmp_path)
    with pytest.raises(
        grpo.InputError, match="of 2 completions 1 are right, 1 match --format-pattern, 2 ended, and none"
    ):
        grpo.keep_samples(args)
    assert not list(tmp_path.glob("kept*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_to": "/nowhere/at/all.jsonl"}, "lies in no directory"),
        ({"sample_to": __file__}, "exists: choose another"),
        ({"reward": __file__}, "keeps what the verifier judges right: it does not go with reward"),
    ],
)
def test_samples_that_cannot_be_kept(grpo, tiny_grpo, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        grpo.keep_samples(keeping(tiny_grpo, tmp_path, **changes))


def test_a_kept_line_is_read_as_the_model_read_it(grpo, tiny_grpo, tiny_chat, tmp_path, monkeypatch):
    """Instruction and system turn stand in the file: the prompt's tokens are those of the sampling."""
    groups, original = [], grpo.sample_groups

    def sample_groups(*given):
        groups.extend(original(*given))
        return groups[-2:]

    monkeypatch.setattr(grpo, "sample_groups", sample_groups)
    monkeypatch.setattr(grpo, "is_right", lambda problem, text: True)
    for name, changes in {"plain": {"instruction": "{}="}, "chat": {"model": tiny_chat, "system": "8"}}.items():
        path = str(tmp_path / f"{name}.jsonl")
        args = keeping(
            tiny_grpo,
            tmp_path,
            sample_to=path,
            steps=4,
            format_pattern=r"(?s).*\S.*",
            group_size=8,
            prompts_per_step=2,
            **changes,
        )
        groups.clear()
        grpo.keep_samples(args)
        model, tokenizer, eos_ids = grpo.load_model(args, args.model)
        tuned = grpo.replace(args, sft_data=path, sample_to=None)
        examples = grpo.examples_of(tuned, model, tokenizer, eos_ids, grpo.read_completions(tuned), [])
        assert {tuple(x.prompt) for x in examples} <= {tuple(group.prompt) for group in groups} and examples
        if name == "chat":
            assert [x["role"] for x in lines_of(path)[0]["prompt"]] == ["system", "user"]


# ---- The recipe; settings ----


def test_the_recipe_from_end_to_end(grpo, small_run, settings, tmp_path, capsys):
    """RL, keep, imitate from the start, RL again: the small model's own settings, wherever it was trained before."""
    kept, sft, last = (str(tmp_path / name) for name in ("kept.jsonl", "sft", "r1"))
    args = settings("--sample-to", kept, "--model", small_run, "--steps", 6)
    assert (args.terms, args.prompts_per_step, args.group_size, args.max_tokens) == (2, 8, 4, 12)
    counts = grpo.keep_samples(args)
    assert counts["sampled"] == 6 * 8 * 4 and 0 < counts["written"] <= counts["kept"] <= counts["right"]
    assert all(re.fullmatch(r"\d\+\d\n", row["prompt"]) for row in lines_of(kept))
    sizes = "--terms 2 --num-problems 60 --eval-problems 8 --eval-samples 4 --eval-k 2 --steps 2 --prompts-per-step 8"
    words = [*sizes.split(), "--max-tokens", 12, "--instruction", "{}"]
    found = settings("--model", f"{small_run}/start", "--sft-data", kept, "--run-dir", sft, *words)
    capsys.readouterr()
    tuned = grpo.train(found)
    assert "found for the small model" in capsys.readouterr().out and "sft/loss" in tuned[-1]
    assert torch.load(f"{sft}/checkpoint.pt", weights_only=True)["args"]["learning_rate"] == 1e-3
    again = grpo.train(settings("--model", sft, "--run-dir", last, *words))
    assert {k: again[0][k] for k in again[0]} == {k: tuned[-1][k] if k != "step" else 0 for k in again[0]}
    assert torch.load(f"{last}/checkpoint.pt", weights_only=True)["args"]["learning_rate"] == 3e-4
    tables = grpo.compare_models(settings("--evaluate", f"{small_run}/start", sft, last))
    means = [sum(row["pass@1"] for row in rows) / len(rows) for rows in tables]
    assert means[1:] == [again[0]["eval/pass@1"], again[-1]["eval/pass@1"]]


def test_the_small_model_is_known_however_often_it_was_trained(grpo, small_run, settings, tmp_path):
    words = "--terms 2 --num-problems 60 --eval-problems 8 --eval-samples 4 --eval-k 2 --steps 1 --prompts-per-step 8"
    words = [*words.split(), "--run-dir", tmp_path / "again"]
    grpo.train(settings("--model", f"{small_run}/start", "--instruction", "{}", *words))
    with pytest.raises(grpo.InputError, match="is the small model of a run, which reads no words"):
        settings("--model", tmp_path / "again")
    assert grpo.is_small(str(tmp_path / "again")) and not grpo.is_small(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "trains a model that is there"),
        ({"beta": 0.1, "num_epochs": 2}, "does not go with num_epochs 2, beta 0.1"),
        ({"algorithm": "rft"}, "does not go with algorithm rft"),
        ({"format_weight": 1.0}, "does not go with format_weight 1.0"),
        ({"sft_data": ""}, "sft_data must not be empty"),
        ({"sample_to": "x", "run_dir": None}, "sample_to x trains nothing: it does not go with sft_data"),
    ],
)
def test_supervised_settings_that_do_not_fit(tuning, changes, message):
    with pytest.raises(ValueError, match=message):
        tuning(**changes)


def test_supervised_steps_are_ten_times_as_large(grpo, tiny_grpo):
    """Full fine-tuning and LoRA alike; the reason says so."""
    for lora_rank in (0, 4):
        changes = {"learning_rate": None, "lora_rank": lora_rank, "length_weight": 0.0}
        rates = []
        for sft_data in (None, "file"):
            args, why = grpo.chosen(tiny_grpo(sft_data=sft_data, **changes), size=135_000_000)
            rates.append(args.learning_rate)
        assert rates[1] == pytest.approx(10 * rates[0]) and "for supervised steps" in why["learning_rate"]
