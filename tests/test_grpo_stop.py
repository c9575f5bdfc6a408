"""--stop: texts that end a completion as EOS does, in both samplers and in what is learned from."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

pytestmark = pytest.mark.slow

# Tokens in which stop texts begin in the middle of a token, span several, or are a part of a letter
WORDS = ["a", "b", "</", "an", "s", ">", "x>b", "b</a", "ns>a", "\n", "a\nb", ".", "Ġ", "Ġb", "é", *"ÃÂ©ã"]
NEVER = 10**6  # an EOS that the model cannot write


@pytest.fixture(scope="module")
def byte_lm(tmp_path_factory):
    """A model whose tokens are bytes and pieces of text, as those of most models are."""
    directory = tmp_path_factory.mktemp("byte_lm")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<pad>", "<eos>", "<end>", *dict.fromkeys([*letters, *(w.replace("\n", "Ċ") for w in WORDS)])]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    own = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "additional_special_tokens": ["<end>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, **special, clean_up_tokenization_spaces=False)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer) + 5}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, max_position_embeddings=256, eos_token_id=1))
    with torch.no_grad():  # the pieces of WORDS are likely
        model.lm_head.weight.mul_(0.1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def noise_of(rows, length, seed=0):
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))


def first_end(tokenizer, tokens, stops):
    """By definition: tokens up to the first one with which the decoded text has a stop text; all of them if none."""
    for length in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
        if any(stop in text for stop in stops):
            return length
    return len(tokens)


STOPS = [("</an", "sx>"), (">",), ("\n",), (".", "an"), ("b ",), (" b",), ("é",), ("x>", "a\nb", "<")]


@pytest.mark.parametrize(
    "stops", STOPS, ids=["tag", "bracket", "newline", "point", "space-after", "space-before", "letter", "several"]
)
@pytest.mark.parametrize("sampler", ["plain", "fast", "fixed"])
def test_a_completion_ends_with_its_first_stop_text(grpo, tiny_grpo, byte_lm, monkeypatch, stops, sampler):
    """In each sampler, against the definition, on what is sampled without --stop. Tokens and log-probabilities before
    the end are the same, and nothing stands after it."""
    args = tiny_grpo(model=byte_lm, stop=stops, fast=sampler != "plain")
    model, tokenizer, eos_ids = grpo.load_model(args, byte_lm)
    likely = torch.zeros(model.config.vocab_size)
    likely[tokenizer.convert_tokens_to_ids([word.replace("\n", "Ċ") for word in WORDS])] = 9.0
    sample_token = grpo.sample_token
    monkeypatch.setattr(grpo, "sample_token", lambda logits, *more: sample_token(logits + likely, *more))
    prompts, noise, EOS = [[7, 8], [9, 10, 11]], noise_of(128, 24), eos_ids
    assert EOS == [1]

    def run():
        if sampler == "fixed":
            return grpo.generate(model, prompts, noise, 1.0, EOS, 0, is_fixed=True)
        return grpo.sample(args, model, prompts, noise, 1.0, EOS, 0)

    tokens, logprobs, mask = run()
    model.stops = None
    all_tokens, all_logprobs, all_mask = run()
    ends = []
    for i, row in enumerate(all_tokens.tolist()):
        whole = int(all_mask[i].sum())
        ends.append(first_end(tokenizer, row[:whole], stops))
        assert mask[i].tolist() == [1] * ends[-1] + [0] * (24 - ends[-1]), tokenizer.decode(row)
        assert tokens[i, : ends[-1]].tolist() == row[: ends[-1]] and not tokens[i, ends[-1] :].any()
    torch.testing.assert_close(logprobs, all_logprobs * mask, rtol=1e-4, atol=1e-5)
    assert sum(end < 24 for end in ends) > 8 and len(set(ends)) > 3


def test_the_first_token_may_be_the_end(grpo, tiny_grpo, byte_lm):
    args = tiny_grpo(model=byte_lm, stop=("n",))
    model, tokenizer, _ = grpo.load_model(args, byte_lm)
    token = tokenizer.convert_tokens_to_ids("ns>a")
    going = torch.ones(3, dtype=torch.bool)
    tokens = torch.tensor([[token, 0], [5, 0], [token, 0]])
    assert grpo.without_stopped(model, going, tokens, 0).tolist() == [False, True, False]
    going = torch.tensor([True, False])
    assert grpo.without_stopped(model, going, tokens, 0, torch.tensor([1, 2])).tolist() == [True, False]


@pytest.mark.parametrize("fast", [True, False])
def test_sampling_stops_when_all_have_ended(grpo, tiny_grpo, byte_lm, monkeypatch, fast):
    """Every token ends: one pass through the model is enough. Only a row whose last token may end it is decoded."""
    args = tiny_grpo(model=byte_lm, stop=("</ans>",), fast=fast)
    model, tokenizer, _ = grpo.load_model(args, byte_lm)
    may_end = tokenizer.batch_decode([[i] for i in model.stops.can_end.nonzero()[:, 0].tolist()])
    assert {">", "x>b"} <= {*may_end} and len(may_end) < 200 and all(">" in x or "\ufffd" in x for x in may_end)
    model.stops = grpo.Watch(tokenizer, torch.ones(model.config.vocab_size, dtype=torch.bool), ("",))
    calls, forward = [], type(model.model).forward
    monkeypatch.setattr(type(model.model), "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    _, _, mask = grpo.sample(args, model, [[7, 8]], noise_of(4, 24), 1.0, [NEVER], 0)
    assert len(calls) == 1 and mask.sum(-1).tolist() == [1] * 4


def test_a_run_with_stop_texts(grpo, tiny_grpo, monkeypatch):
    """In train and evaluation: rewards read the stop text, the completion is not truncated, and the loss is over the
    tokens up to it."""
    rated, learned, rate_group, reduce_loss = [], [], grpo.rate_group, grpo.reduce_loss
    given = {
        "stop": ("4", "7", "1", "+"),
        "max_tokens": 12,
        "steps": 2,
        "prompts_per_step": 6,
        "truncated": "penalise",
        "temperature": 1.5,
    }

    def watched(args, group, *others):
        rated.append((group, rate_group(args, group, *others)))
        return rated[-1][1]

    monkeypatch.setattr(grpo, "rate_group", watched)
    monkeypatch.setattr(
        grpo, "reduce_loss", lambda loss, mask, *more: learned.append(mask) or reduce_loss(loss, mask, *more)
    )
    args = tiny_grpo(**given)
    row = grpo.train(args)[-1]
    tokenizer, ended = AutoTokenizer.from_pretrained(args.model), []
    for group, rating in rated:
        for tokens, mask, text, cut in zip(group.tokens.tolist(), group.mask, group.texts, rating.is_truncated):
            length = int(mask.sum())
            assert first_end(tokenizer, tokens[:length], given["stop"]) == length
            has_stop, has_eos = any(stop in text for stop in given["stop"]), tokenizer.eos_token_id in tokens[:length]
            assert text == tokenizer.decode(tokens[:length], skip_special_tokens=True)
            assert bool(cut) == (not has_stop and not has_eos) and (has_stop or has_eos or length == 12)
            ended.append(has_stop and not has_eos)
        penalties = -rating.is_truncated.float()
        assert torch.equal(rating.parts["truncation"], penalties)
    assert sum(ended) >= 3 and row["completion/eos_rate"] > 0
    taught = [tuple(mask) for masks in learned for mask in masks.tolist()]
    assert len(taught) > 3 and {*taught} <= {tuple(mask) for group, _ in rated for mask in group.mask.tolist()}


def test_a_special_token_as_a_stop_text_ends_as_eos_does(grpo, tiny_grpo, byte_lm):
    """Decoding drops it, so it could never be found in the text."""
    _, tokenizer, eos_ids = grpo.load_model(tiny_grpo(model=byte_lm, stop=("<end>", ">")), byte_lm)
    assert eos_ids == sorted([1, tokenizer.convert_tokens_to_ids("<end>")]) and len(eos_ids) == 2
    with pytest.raises(grpo.InputError, match=re.escape(r"--stop 'a<end>' holds the special token <end>, which must")):
        grpo.load_model(tiny_grpo(model=byte_lm, stop=("a<end>",)), byte_lm)


def test_stop_texts_on_the_command_line(grpo, monkeypatch):
    monkeypatch.setattr("sys.argv", ["grpo_llm.py", "--model", "m", "--stop", "</answer>", "\n\n"])
    assert grpo.parse_args().stop == ("</answer>", "\n\n") and grpo.Args().stop == ()
    for words, message in (
        (["--stop", ""], "stop must not be empty"),
        (["--stop", "x"], "is for a model; the small one has no chat form"),
    ):
        with pytest.raises(ValueError, match=message):
            grpo.Args(**({"model": "m"} if "" in words else {}), stop=tuple(words[1:]))


def test_stop_texts_are_kept_by_a_resumed_run(grpo, tiny_grpo):
    args = tiny_grpo(stop=("4",), checkpoint_every=1)
    grpo.train(args)
    assert grpo.resumed_args(args.run_dir).stop == ("4",)
    with pytest.raises(grpo.InputError, match="keeps the run's own stop"):
        grpo.load_checkpoint(replace(grpo.resumed_args(args.run_dir), stop=()))


def test_a_stop_text_and_an_own_reward(grpo, tiny_grpo, tmp_path):
    """What the function reads ends with the first token that has the stop text."""
    (tmp_path / "r.py").write_text(
        "SEEN = []\n\n\ndef reward(completion):\n    SEEN.append(completion)\n    return 1\n"
    )
    (tmp_path / "d.jsonl").write_text("".join(f"{json.dumps({'prompt': f'{i}+1'})}\n" for i in range(20)))
    args = tiny_grpo(task="jsonl", data=str(tmp_path / "d.jsonl"), reward=str(tmp_path / "r.py"), stop=("4",), steps=1)
    grpo.train(args)
    seen = grpo.own_functions(args.reward)["reward"].__globals__["SEEN"]
    assert any(text.endswith("4") for text in seen) and not any("4" in text[:-1] for text in seen) and len(seen) > 20
    assert Path(args.run_dir).exists()


def test_the_verifier_judges_what_stands_before_a_stop_text(grpo, tiny_grpo, monkeypatch):
    """A plain word is right although the stop text, and the rest of its token, stand behind it; and in evaluations."""
    args = tiny_grpo(stop=("</answer>", "\nQ:"), eval_samples=4, eval_k=4)
    problem = grpo.Problem("capital of France?", "Paris")
    completions = ["Paris</answer>", "Paris</answer> b", "Paris\nQ: and of", "Rome</answer>"]
    assert [grpo.reward_parts(args, problem, text, 3, False)["verifier"] for text in completions] == [
        1.0,
        1.0,
        1.0,
        0.0,
    ]

    def sample_groups(args, model, tokenizer, eos_ids, chosen, group_size, temperature, names):
        return [grpo.Group(p, [], None, None, None, completions[:group_size]) for p in chosen]

    monkeypatch.setattr(grpo, "sample_groups", sample_groups)
    (row,) = grpo.scores_of(args, torch.nn.Module(), None, None, [problem], [0])
    assert (row["greedy"], row["pass@1"], row["maj@4"]) == (1.0, 0.75, 1.0)


def test_stop_texts_where_there_is_no_eos(grpo, tiny_grpo, byte_lm, tmp_path):
    """A base model may have no EOS at all; a special token as a stop text ends it all the same."""
    model, tokenizer, _ = grpo.load_model(tiny_grpo(model=byte_lm, stop=(">",)), byte_lm)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token = None
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    name = str(tmp_path / "m")
    with pytest.raises(grpo.InputError, match="nothing could end"):
        grpo.load_model(tiny_grpo(model=name), name)
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert grpo.load_model(tiny_grpo(model=name, stop=("<end>",)), name)[2] == [end]
    for fast in (True, False):
        args = tiny_grpo(model=name, stop=(">",), fast=fast)
        model, _, eos_ids = grpo.load_model(args, name)
        tokens, _, mask = grpo.sample(args, model, [[7, 8]], noise_of(6, 24), 1.0, eos_ids, 0)
        assert eos_ids == [] and 0 < min(mask.sum(-1)) < 24
        for row, length in zip(tokens.tolist(), mask.sum(-1).tolist()):
            assert first_end(tokenizer, row, (">",)) == length


def test_a_run_with_stop_texts_and_a_system_turn_is_evaluated(grpo, tiny_grpo, monkeypatch, capsys):
    args = tiny_grpo(stop=("4", "+"), steps=1)
    grpo.train(args)
    for words in ([args.run_dir], [args.model, args.run_dir, "--stop", "4"]):
        monkeypatch.setattr("sys.argv", ["grpo_llm.py", "--evaluate", *words])
        grpo.main()
        assert "4 problems, 2 samples" in capsys.readouterr().out
