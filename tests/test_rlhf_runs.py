"""Runs of rlhf_gpt2_ppo as a person meets them: data, judge, files, resuming, flags, messages, exit statuses."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from contract import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Tokenizer

SHARED = ROOT.parent / "shared" / "data"  # real material, of which nothing is part of the project


@pytest.fixture
def command(rlhf, monkeypatch, capsys):
    """Run the script's command line in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlhf_gpt2_ppo.py", *map(str, arguments)])
        status = 0
        try:
            rlhf.main()
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def flags(args, *names):
    """The command line that gives these settings, less `names`."""
    words = []
    for name, value in vars(args).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value not in (None, ()) and name not in names:
            words += [f"--{flag}", str(value)]
    return words


def weights(run_dir):
    """Every weight of every model that a run wrote."""
    found = {}
    for path in sorted(Path(run_dir).glob("*/model.safetensors")):
        kind = AutoModelForCausalLM if path.parent.name in ("sft", "policy") else AutoModelForSequenceClassification
        model = kind.from_pretrained(path.parent, dtype=torch.float32)
        found |= {f"{path.parent.name}.{name}": weight for name, weight in model.state_dict().items()}
    return found


def assert_same_weights(one, other):
    assert one.keys() == other.keys() and len(one) > 20
    for name in one:
        assert torch.equal(one[name], other[name]), name


def without_clock(metrics):
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in metrics]


# ---- The grammar ----


def test_the_grammar_knows_its_sentiment(rlhf):
    rng = random.Random(0)
    reviews = [(rlhf.write_review(rng, label), label) for label in (True, False) * 300]
    assert all((rlhf.true_sentiment(text) > 0) == label and rlhf.true_sentiment(text) != 0 for text, label in reviews)
    assert len({text for text, _ in reviews}) > 550
    assert all(re.match(r"The \w+ of this \w+ was ", text) for text, _ in reviews)  # five words that give nothing away


@pytest.mark.parametrize(
    ("text", "sentiment"),
    [
        ("The plot of this drama was superb.", 1),
        ("The plot was superb and tender. I hated the music.", 0),
        ("The plot was not superb.", -1),
        ("The plot was not dull. I saw it alone.", 0.5),
        ("The plot was superb but dull. I loved the cast.", 0.5),
        ("superb superb superb superb.", 0),  # what the grammar could not have said
        ("The plot was superb superb.", 0),
        ("The plot was superb. I loved the", 0.5),  # cut off: the rest counts as a sentence without sentiment
        ("", 0),
    ],
)
def test_true_sentiment(rlhf, text, sentiment):
    assert rlhf.true_sentiment(text) == sentiment


def test_distinct_2(rlhf):
    assert rlhf.distinct_2(["a b c", "a b d"]) == 3 / 4
    assert rlhf.distinct_2(["a a a a"]) == 1 / 3
    assert rlhf.distinct_2([""]) == 0


# ---- Data sets ----


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


LABELLED = [
    {"text": f"this film about number {i} was {'very good' if i % 2 else 'quite bad'}", "label": i % 2}
    for i in range(60)
]


def test_labelled_texts(rlhf, tmp_path):
    """A text is split after prompt_words words; each pair is a positive and a negative one."""
    args = rlhf.Args(
        dataset=write_rows(tmp_path / "d.jsonl", [*LABELLED, {"text": "short", "label": 1}]), prompt_words=3
    )
    rows = rlhf.load_rows(args)
    assert len(rows) == 61
    texts, pairs = rlhf.texts_and_pairs(rows, args)
    assert len(texts) == 60 and len(pairs) == 30
    assert {prompt for prompt, _ in texts} == {"this film about"}
    assert all("good" in chosen and "bad" in rejected for (_, chosen), (_, rejected) in pairs)
    assert all((prompt + response) in {row["text"] for row in LABELLED} for prompt, response in texts)


def test_other_columns(rlhf, tmp_path):
    rows = [{"review": row["text"], "stars": row["label"]} for row in LABELLED]
    args = rlhf.Args(dataset=write_rows(tmp_path / "d.json", rows), text_column="review", label_column="stars")
    assert len(rlhf.texts_and_pairs(rlhf.load_rows(args), args)[1]) == 30


def test_sorted_data_are_shuffled(rlhf, tmp_path):
    """IMDB's first half is all negative: the first rows alone would be of one class."""
    rows = sorted(LABELLED, key=lambda row: row["label"])
    args = rlhf.Args(dataset=write_rows(tmp_path / "d.jsonl", rows), num_texts=20)
    labels = [row["label"] for row in rlhf.load_rows(args)]
    assert len(labels) == 20 and 3 < sum(labels) < 17


@pytest.mark.slow
@pytest.mark.parametrize(("from_file", "count"), [(True, 6000), (False, 60_000)])
def test_neither_rows_nor_held_out_ones_are_a_slice_of_sorted_data(rlhf, tmp_path, from_file, count):
    """Of 60,000 rows in order: those read from a file, and the tenth held out of all, have a share of each quarter."""
    path = write_rows(tmp_path / "d.jsonl", [{"text": str(i), "label": 0} for i in range(60_000)])
    rows = rlhf.load_rows(rlhf.Args(dataset=path if from_file else str(tmp_path), num_texts=count))
    quarters = [int(row["text"]) // 15_000 for row in rows[:6000]]
    assert len(rows) == count and all(abs(quarters.count(i) - 1500) < 200 for i in range(4))


def test_the_grammars_held_out_tenth_has_both_labels(rlhf):
    assert sum(row["label"] for row in rlhf.load_rows(rlhf.Args(num_texts=200))[:20]) == 10


DIALOGUE = "\n\nHuman: Is it {0}?\n\nAssistant: Yes.\n\nHuman: Sure?\n\nAssistant:"


def test_hh_rlhf_pairs(rlhf, tmp_path):
    """The prompt goes up to the last "Assistant:"; or it has a column of its own."""
    rows = [{"chosen": DIALOGUE.format(i) + " I am.", "rejected": DIALOGUE.format(i) + " No idea!"} for i in range(10)]
    args = rlhf.Args(dataset=write_rows(tmp_path / "d.jsonl", rows))
    texts, pairs = rlhf.texts_and_pairs(sorted(rlhf.load_rows(args), key=str), args)
    assert texts[3] == (DIALOGUE.format(3), " I am.")
    assert pairs[3] == ((DIALOGUE.format(3), " I am."), (DIALOGUE.format(3), " No idea!"))
    rows = [{"prompt": "Hello", "chosen": " you", "rejected": " there"}] * 10
    args = rlhf.Args(dataset=write_rows(tmp_path / "p.jsonl", rows))
    assert rlhf.texts_and_pairs(rlhf.load_rows(args), args)[1] == [(("Hello", " you"), ("Hello", " there"))] * 10


def test_a_run_on_pairs(rlhf, tiny, tmp_path):
    rows = [{"prompt": f"The plot {i}", "chosen": " was superb.", "rejected": " was dull."} for i in range(40)]
    metrics = rlhf.train(tiny(dataset=write_rows(tmp_path / "d.jsonl", rows)))
    assert "objective/gold" not in metrics[-1] and metrics[-1]["objective/kl"] != 0
    assert [row["reward/held_out_accuracy"] for row in metrics if "reward/held_out_accuracy" in row] == [1.0]


PAIRED = [{"prompt": f"The plot {i}", "chosen": " was superb.", "rejected": " was dull."} for i in range(20)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the file is empty"),
        (LABELLED[:9], "has 9 rows; at least 10 are needed"),
        ([{"sentence": "a b", "label": 1}] * 20, "has the columns sentence, label; needed are text and label"),
        ([{"chosen": "a b"}] * 20, "has the columns chosen; needed are"),
        ([row for row in LABELLED if row["label"]], "27 positive and 0 negative"),
        ([*LABELLED, {"text": "a b c d e f g", "label": 2}], "row 61: labels must be 0 and 1, found 2"),
        ([*LABELLED, {"text": "a b c d e f g"}], "row 61: labels must be 0 and 1, found None"),
        ([*LABELLED, {"text": None, "label": 1}], "row 61: text must hold texts, found None"),
        ([*LABELLED[:30], {"text": " ", "label": 1}, *LABELLED], "row 31: text must hold texts, found ' '"),
        ([*PAIRED, {"prompt": "a", "chosen": "b", "rejected": ""}], "row 21: rejected must hold texts, found ''"),
        ([*PAIRED, {"prompt": None, "chosen": "b", "rejected": "c"}], "row 21: prompt must hold texts, found None"),
        ([{"chosen": "a b", "rejected": "a c"}] * 20, "neither a column prompt nor 'Assistant:'"),
    ],
)
def test_bad_data_sets(command, tmp_path, rows, message):
    path = write_rows(tmp_path / "d.jsonl", rows)
    status, _, error = command("--dataset", path, "--run-dir", tmp_path / "run")
    assert status == 2 and message in error and path in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_unreadable_data_set(command, tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"\x00\xff no json")
    for name in (tmp_path / "d.jsonl", tmp_path / "nothing" / "here"):
        status, _, error = command("--dataset", name, "--run-dir", tmp_path / "run")
        assert status == 2 and f"--dataset {name} cannot be read" in error and "Traceback" not in error


def test_which_rows_a_missing_label_was_looked_for_in(rlhf, tiny, command, tmp_path):
    """One label alone: the nine tenths are named. Two of 60 are positive: the held-out tenth is, which has none."""
    words = "of this film nobody ever spoke"
    for count, rows, message in (
        (0, 54, "0 positive and 54 negative texts of more than 5 words among the 54 rows of its nine tenths to learn"),
        (2, 6, "0 positive and 6 negative texts of more than 5 words among the 6 rows of its tenth that is held out"),
    ):
        path = write_rows(tmp_path / "d.jsonl", [{"text": f"{words} {i}", "label": int(i < count)} for i in range(60)])
        status, _, error = command("--dataset", path, "--run-dir", tmp_path / "run")
        assert status == 2 and message in error and error.count("\n") == 1, rows


def test_texts_of_few_words_are_left_out_and_said(rlhf, tiny, tmp_path, capsys):
    """A text of as many words as the prompt has no response; its words are not cut to make one."""
    short = [
        {"text": text, "label": i % 2} for i, text in enumerate(["this is bad", "a b c d e", "a b c d e \n", "good"])
    ]
    args = tiny(dataset=write_rows(tmp_path / "d.jsonl", LABELLED + short), stage="sft")
    texts, _ = rlhf.texts_and_pairs(rlhf.load_rows(args), args)
    assert len(texts) == 60 and {len(prompt.split()) for prompt, _ in texts} == {5}
    assert all(response.strip() for _, response in texts)
    capsys.readouterr()
    rlhf.train(args)
    assert "4 of 64 texts have no more than 5 words: left out" in capsys.readouterr().out


def test_what_is_cut_at_max_length_is_said(rlhf, tiny, tmp_path, capsys):
    """Pairs of a long prompt lose their responses, so nothing tells chosen from rejected: the run says how many."""
    long = [{"prompt": "word " * 60, "chosen": " was superb.", "rejected": " was dull."}] * 3
    dataset = write_rows(tmp_path / "d.jsonl", [*PAIRED, *long])
    args = tiny(dataset=dataset, stage="sft", sft_steps=1, max_length=60, response_length=8)
    rlhf.train(args)
    out = capsys.readouterr().out
    assert "3 of 23 responses are cut at --max-length 60, 3 of them whole\n" in out
    assert "3 prompts are longer than 56 tokens: stage 3 leaves them out\n" in out
    capsys.readouterr()
    rlhf.train(tiny("other", dataset=write_rows(tmp_path / "short.jsonl", PAIRED), stage="sft", sft_steps=1))
    assert "data  " not in capsys.readouterr().out


def lines_of(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


BROKEN = lines_of(LABELLED)[:-20]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BROKEN, "cannot be read: line 60 is not JSON: "),
        (b"\n\n" + BROKEN, "cannot be read: line 62 is not JSON: "),
        (lines_of(LABELLED).decode().encode("utf-16"), "cannot be read: line 1 is not JSON: "),
        (json.dumps(LABELLED)[:-20].encode(), "cannot be read: "),
    ],
)
def test_a_line_that_is_not_json_has_its_own_number(command, tmp_path, content, message):
    (tmp_path / "d.jsonl").write_bytes(content)
    status, out, error = command("--dataset", tmp_path / "d.jsonl", "--run-dir", tmp_path / "run")
    assert status == 2 and message in error and error.count("\n") == 1 and not out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_libraries_add_nothing_to_an_error(tmp_path):
    """In a process of its own, where no library has been told yet to be quiet."""
    (tmp_path / "d.jsonl").write_bytes(BROKEN)
    line = [sys.executable, str(ROOT / "rlhf_gpt2_ppo.py"), "--dataset", "d.jsonl", "--run-dir", "run"]
    run = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert run.returncode == 2 and "line 60 is not JSON: " in run.stderr
    assert run.stderr.count("\n") == 1 and not run.stdout and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_data_of_other_editors(rlhf, tmp_path, name):
    """A byte-order mark and CRLF are read; so is one JSON array."""
    text = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in LABELLED)
    content = {"d.jsonl": lines_of(LABELLED), "d.json": json.dumps(LABELLED).encode(), "d.csv": text.encode()}[name]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    rows = rlhf.load_rows(rlhf.Args(dataset=str(tmp_path / name)))
    assert {(row["text"], row["label"]) for row in rows} == {tuple(row.values()) for row in LABELLED}


# ---- Real sentences, GPT-2's own BPE ----

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}: real sentences and GPT-2's BPE lie there")


@pytest.mark.slow
@needs_shared
def test_real_sentences_by_gpt2s_own_bpe(rlhf, tiny, tmp_path):
    """A GPT-2 checkpoint with 50,257 tokens and no padding token, real sentences, all three stages, both loaders."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = GPT2Tokenizer.from_pretrained(SHARED / "gpt2_bpe")
    assert tokenizer.tokenize("It was gripping") == ["It", "Ġwas", "Ġgripping"]
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    rows = []
    for label, name in ((1, "rt-polarity.pos"), (0, "rt-polarity.neg")):
        lines = (SHARED / "sentence_polarity" / name).read_text(encoding="utf-8").splitlines()
        rows += [{"text": line, "label": label} for line in lines[:200]]
    dataset = write_rows(tmp_path / "sentences.jsonl", rows)
    few = {"sft_steps": 1, "reward_steps": 1, "ppo_iterations": 1, "num_epochs": 1, "batch_size": 4, "eval_prompts": 4}
    metrics = rlhf.train(tiny(model=str(tmp_path / "gpt2"), dataset=dataset, num_texts=100, **few))
    assert metrics[-1]["stage"] == "eval" and metrics[-1]["response/length"] > 0
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "policy")
    assert len(saved) == policy.config.vocab_size == 50_258
    assert saved.pad_token == "<|pad|>" and saved.eos_token == "<|endoftext|>"
    assert saved("It was gripping")["input_ids"] == tokenizer("It was gripping")["input_ids"]


# ---- The judge ----


PAIRS = [("The plot was superb.", "The plot was dull."), ("I loved the cast.", "I hated it, every minute.")]


def test_the_judge_has_no_favourite_order(rlhf, tiny, tiny_gpt2):
    """Margins change their sign with the order of a pair, and are 0 for two equal texts, whatever the judge likes."""
    judge, tokenizer = rlhf.load_judge(tiny(judge=tiny_gpt2))
    judge.config.n_positions = 2000
    judge.transformer.wpe.weight.data = judge.transformer.wpe.weight.data.repeat(32, 1)  # a judge's context is longer
    margins = rlhf.judge_margins(judge, tokenizer, PAIRS, ["Prefer praise."], 3)
    swapped = rlhf.judge_margins(judge, tokenizer, [pair[::-1] for pair in PAIRS], ["Prefer praise."], 3)
    assert (margins.abs() > 1e-4).all()
    torch.testing.assert_close(margins, -swapped, rtol=1e-3, atol=1e-5)
    same = rlhf.judge_margins(judge, tokenizer, [("a b", "a b")], ["Prefer praise."], 1)
    assert abs(float(same)) < 1e-5
    other = rlhf.judge_margins(judge, tokenizer, PAIRS, ["Prefer blame, and be short."], 3)
    assert (margins - other).abs().max() > 1e-4, "the principles are read"


class FixedJudge:
    """Says "A" with logit 2 for a text in front that holds "superb", and has a liking of 5 for the letter A."""

    device = "cpu"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, tokens, attention_mask, position_ids, logits_to_keep):
        letters = [self.tokenizer(f" {letter}")["input_ids"][-1] for letter in "AB"]
        logits = torch.zeros(len(tokens), 1, len(self.tokenizer))
        for i, (row, kept) in enumerate(zip(tokens, attention_mask.bool())):
            text = self.tokenizer.decode(row[kept])
            first = text[text.index("A: ") : text.index("B: ")]
            logits[i, 0, letters[0]] = 5.0 + (2.0 if "superb" in first else -2.0)
        return type("Output", (), {"logits": logits})


def test_preferences_of_a_judge(rlhf, tiny, tiny_gpt2, monkeypatch):
    """The text that the judge prefers goes in front; agreement is with the data's order; asked once, then read."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    monkeypatch.setattr(rlhf, "load_judge", lambda args: (FixedJudge(tokenizer), tokenizer))
    pairs = [(("The plot", " was superb."), ("The plot", " was dull.")), (("It", " was dull."), ("It", " was superb."))]
    labelled, agreement = rlhf.label_by_judge(tiny(judge="j", judge_pairs=2), pairs)
    assert [chosen[1] for chosen, _ in labelled] == [" was superb."] * 2 and agreement == 0.5
    args = tiny(preferences="ai", judge="j", judge_pairs=20)
    rlhf.train(args)
    kept = json.loads((Path(args.run_dir) / "preferences.json").read_text())
    assert len(kept[0]) == 20 and 0 < kept[1] < 1
    assert all("superb" in "".join(c) or "superb" not in "".join(r) for c, r in kept[0])


def test_critique_and_revision(rlhf, tiny, monkeypatch):
    """The critique is asked for first, is part of the second question, and the prompt is kept."""
    asked = []

    def judge_answers(judge, tokenizer, requests, batch_size):
        asked.append(requests)
        return ["Too harsh." if "Critique" not in request else "The plot was a joy." for request in requests]

    monkeypatch.setattr(rlhf, "load_judge", lambda args: (None, None))
    monkeypatch.setattr(rlhf, "judge_answers", judge_answers)
    args = tiny(sft_data="critique", judge="j", judge_pairs=2)
    texts, critiques = rlhf.revise_by_judge(args, [("The plot", " was dull."), ("The cast", " was dull."), ("x", " y")])
    assert texts == [("The plot", " was a joy."), ("The cast", " The plot was a joy.")] and len(critiques) == 2
    assert "The plot was dull." in asked[0][0] and rlhf.PRINCIPLES[0] in asked[0][0] and "Too harsh." in asked[1][0]


def test_an_instruct_model_judges_and_revises(rlhf, tiny, tiny_gpt2, tmp_path, capsys):
    """End to end with a model from disk as the judge, its chat form applied; an untrained one agrees by chance."""
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    model.resize_token_embeddings(model.config.vocab_size)
    model.transformer.wpe.weight.data = model.transformer.wpe.weight.data.repeat(32, 1)
    model.config.n_positions = 2048
    model.save_pretrained(tmp_path / "judge")
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m['content'] }}<judge>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "judge")
    (tmp_path / "principles.txt").write_text("Be kind.\n\nBe brief.\n", encoding="utf-8")
    ids = rlhf.chat_ids(AutoTokenizer.from_pretrained(tmp_path / "judge"), "Which?", "The better")
    assert tokenizer.decode(ids) == "<user>Which?<judge>The better"
    options = {"judge": str(tmp_path / "judge"), "judge_pairs": 12, "constitution": str(tmp_path / "principles.txt")}
    rlhf.train(tiny(preferences="ai", sft_data="critique", **options))
    out = capsys.readouterr().out
    assert re.search(r"agrees with the data on \d+\.\d% of 12 pairs", out) and re.search(r"revised \d+ texts", out)
    assert rlhf.read_constitution(tiny(**options)) == ["Be kind.", "Be brief."]


# ---- Stages, files, resuming ----


def test_stages_alone_make_what_all_together_make(rlhf, tiny, tmp_path):
    whole = rlhf.train(tiny("whole"))
    rlhf.train(tiny("one", stage="sft"))
    rlhf.train(tiny("two", stage="reward", model=str(tmp_path / "one" / "sft")))
    dirs = {"model": str(tmp_path / "one" / "sft"), "reward_model": (str(tmp_path / "two" / "reward"),)}
    last = rlhf.train(tiny("three", stage="ppo", **dirs))
    parts = weights(tmp_path / "one") | weights(tmp_path / "two") | weights(tmp_path / "three")
    assert_same_weights(parts, weights(tmp_path / "whole"))
    assert without_clock(last) == without_clock(whole)[-len(last) :] and len(last) == 4


@pytest.mark.slow
def test_same_seed_same_weights(rlhf, tiny, tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        rlhf.train(tiny(name, seed=seed))
    one, same, other = (weights(tmp_path / name) for name in "abc")
    assert_same_weights(one, same)
    assert not torch.equal(one["policy.transformer.wte.weight"], other["policy.transformer.wte.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "calls"),
    [("sft_backward", 3), ("preference_loss", 5), ("compute_gae", 3)],
)
def test_an_interrupted_run_ends_with_the_same_bits(rlhf, tiny, tmp_path, monkeypatch, function, calls):
    """Stopped inside each stage, one of them in the second reward model: weights and metrics of an unbroken run."""
    options = {"sft_steps": 4, "ppo_iterations": 4, "ensemble": 2, "checkpoint_every": 2, "adaptive_kl": True}
    whole = rlhf.train(tiny("whole", **options))
    count = []

    original = getattr(rlhf, function)

    def breaks(*arguments, **options):
        count.append(1)
        if len(count) > calls:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(rlhf, function, breaks)
        with pytest.raises(KeyboardInterrupt):
            rlhf.train(tiny("broken", **options))
    torch.rand(100)  # whatever else the process drew in between
    resumed = rlhf.train(rlhf.resumed_args(tmp_path / "broken"))
    assert without_clock(resumed) == without_clock(whole)
    assert_same_weights(weights(tmp_path / "broken"), weights(tmp_path / "whole"))
    assert not list((tmp_path / "broken").glob("*.tmp"))
    for stage, tag, steps in (("sft", "sft/loss", 4), ("reward2", "reward2/loss", 3), ("ppo", "val/loss", 4)):
        events = EventAccumulator(str(tmp_path / "broken" / "logs" / stage))
        events.Reload()
        assert {event.step for event in events.Scalars(tag)} == set(range(1, steps + 1))


@pytest.mark.processes
def test_killed_at_any_moment_it_goes_on(rlhf, tiny, tmp_path):
    """SIGKILL to a real process in stage 3, then --resume: the same weights as a run that was left alone."""
    options = {"ppo_iterations": 40, "checkpoint_every": 1, "eval_prompts": 2}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, rlhf.__file__]
    args = tiny("killed", **options)
    process = subprocess.Popen([*start, *flags(args)], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    log = tmp_path / "killed" / "logs" / "ppo"
    deadline = time.monotonic() + 120
    while not log.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"the run was over before it could be killed: {error.decode()}"
    saved = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert saved["stage"] in ("reward", "ppo") and saved["step"] < 40
    resumed = subprocess.run([*start, "--resume", tmp_path / "killed"], env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    rlhf.train(tiny("whole", **options))
    assert_same_weights(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_every_directory_loads_in_transformers(rlhf, tiny, tmp_path):
    """As any checkpoint does: the policy writes, the reward model scores; their tokenizer lies beside them."""
    rlhf.train(tiny())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "policy")
    inputs = tokenizer("The plot of this drama", return_tensors="pt")
    for name in ("sft", "policy"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name)
        text = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert text.shape[1] > inputs["input_ids"].shape[1]
    for name in ("reward", "value"):
        options = {"output_loading_info": True}
        model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / name, **options)
        assert not info["missing_keys"] and model(**inputs).logits.shape == (1, 1)


def test_stage_3_leaves_the_others_files_alone(rlhf, tiny, tmp_path):
    rlhf.train(tiny("one"))
    files = [path for name in ("sft", "reward") for path in (tmp_path / "one" / name).iterdir()]
    before = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    dirs = {"model": str(tmp_path / "one" / "sft"), "reward_model": (str(tmp_path / "one" / "reward"),)}
    rlhf.train(tiny("two", stage="ppo", gold_model=str(tmp_path / "one" / "reward"), **dirs))
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in files] == before and len(files) >= 6


def test_tensorboard_scalars(rlhf, tiny, tmp_path):
    """The names that docs/metrics.md explains, with the values that train returned."""
    metrics = rlhf.train(tiny())
    explained = set(
        re.findall(r"^\| `(\w+/\w+)`", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    found, evaluated = set(), set()
    for stage in ("sft", "reward", "ppo"):
        events = EventAccumulator(str(tmp_path / "run" / "logs" / stage))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            name = tag.removeprefix("eval/")  # the policies before and after are no points of the rollouts' curves
            found.add(name)
            logged = [(event.step, event.value) for event in events.Scalars(tag)]
            rows = [row for row in metrics if row["stage"] == (stage if name == tag else "eval") and name in row]
            assert [step for step, _ in logged] == [row["step"] for row in rows] != []
            assert [value for _, value in logged] == pytest.approx([row[name] for row in rows], rel=1e-5, abs=1e-7)
        evaluated = {tag for tag in events.Tags()["scalars"] if tag.startswith("eval/")}
    assert evaluated >= {"eval/objective/kl", "eval/objective/gold", "eval/response/distinct_2"}
    names = "objective/scores objective/kl objective/rlhf_reward objective/gold policy/clipfrac policy/approx_kl "
    names += "policy/entropy val/ratio val/loss time/tokens_per_second response/eos_rate"
    assert set(names.split()) <= found <= explained


@pytest.mark.picture
def test_default_command_line(command, tiny, tmp_path, monkeypatch):
    """A short run by the command line: run directory under runs/, table, texts, picture, all where it says they are."""
    monkeypatch.chdir(tmp_path)
    status, out, error = command(*flags(tiny(), "run_dir"))
    assert status == 0, error
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"grammar__rlhf_gpt2_ppo__1__\d{8}-\d{6}-\d{6}", run_dir.name)
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    for text in ("truly positive", "before  ", "after   ", "perplexity", "held out accuracy", "ppo update", "next  "):
        assert text in out
    for path in re.findall(r"runs/\S+", out):
        assert (tmp_path / path).exists(), path
    following = out[out.index("next        python rlhf_gpt2_ppo.py ") + 36 :].splitlines()[0].split()
    status, out, error = command(*following, *flags(tiny(), "model", "run_dir", "stage"), "--run-dir", "following")
    assert status == 0 and "truly positive" in out, error


def test_each_stage_names_the_next_command(command, tiny, tmp_path, monkeypatch):
    """sft, then what it says, then what that says: three commands, with the data's flags, end in before and after."""
    monkeypatch.chdir(tmp_path)
    words = ["--stage", "sft", *flags(tiny(), "run_dir", "stage")]
    for stage in ("reward", "ppo"):
        status, out, error = command(*words, "--run-dir", f"before_{stage}")
        following = re.search(r"^next +python rlhf_gpt2_ppo.py (.+)$", out, re.MULTILINE).group(1).split()
        assert status == 0 and following[:2] == ["--stage", stage] and "--num-texts" in following, error
        data = ("num_texts", "max_length")  # which the command says itself
        words = [*following, *flags(tiny(), "run_dir", "stage", "model", *data)]
    status, out, error = command(*words, "--run-dir", "last")
    assert status == 0 and "truly positive" in out and "next " not in out, error


def test_a_taken_run_dir_is_refused(rlhf, tiny, command):
    rlhf.train(tiny(stage="sft"))
    status, _, error = command(*flags(tiny()))
    assert status == 2 and f"--resume {tiny().run_dir} resumes it" in error


def test_resume_keeps_the_settings(rlhf, tiny, command):
    rlhf.train(tiny(stage="sft"))
    status, _, error = command("--resume", tiny().run_dir, "--kl-coef", 0.5)
    assert status == 2 and "kl_coef 0.2" in error and "0.5" in error and "Traceback" not in error
    status, out, error = command("--resume", tiny().run_dir, "--torch-threads", 1)
    assert status == 0 and "perplexity" in out, error


def test_ctrl_c_says_how_to_go_on(rlhf, tiny, command, monkeypatch):
    def compute_gae(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(rlhf, "compute_gae", compute_gae)
    status, _, error = command(*flags(tiny()))
    assert status == 130 and f"--resume {tiny().run_dir}" in error and "Traceback" not in error


# ---- Errors ----


@pytest.mark.parametrize(
    ("stage", "function"), [("sft", "sft_loss"), ("reward", "preference_loss"), ("ppo", "clipped_policy_loss")]
)
def test_a_loss_that_is_nan(rlhf, tiny, command, monkeypatch, stage, function):
    """It stops before the step is taken, says where, and the checkpoint before it stays."""
    count = []

    original = getattr(rlhf, function)

    def breaks(*arguments):
        count.append(1)
        return original(*arguments) * (float("nan") if len(count) == 3 else 1.0)

    monkeypatch.setattr(rlhf, function, breaks)
    args = tiny(checkpoint_every=1, num_epochs=1, num_minibatches=1, sft_steps=4, reward_steps=4, ppo_iterations=4)
    status, _, error = command(*flags(args))
    assert status == 2 and f"the loss is not finite in step 2 of stage {stage}" in error
    assert f"{args.run_dir}/checkpoint.pt holds the last good state" in error and "Traceback" not in error
    saved = torch.load(Path(args.run_dir) / "checkpoint.pt", weights_only=True)
    assert saved["stage"] == stage and saved["step"] == 2
    assert all(weight.isfinite().all() for module in saved["modules"].values() for weight in module.values())


def altered(tiny_gpt2, directory, change):
    """The tiny model, saved elsewhere after a change to (model, tokenizer)."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_gpt2), AutoTokenizer.from_pretrained(tiny_gpt2)
    change(model, tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_no_eos_token(tiny, tiny_gpt2, command, tmp_path):
    def change(model, tokenizer):
        tokenizer.eos_token = None

    name = altered(tiny_gpt2, tmp_path / "m", change)
    status, _, error = command(*flags(tiny(model=name)))
    assert status == 2 and f"{name}: its tokenizer has no EOS token" in error


def test_a_reward_model_of_another_vocabulary(rlhf, tiny, command, tmp_path):
    rlhf.train(tiny("one"))
    other = AutoTokenizer.from_pretrained(tmp_path / "one" / "reward")
    other.add_tokens(["<|other|>"])
    other.save_pretrained(tmp_path / "one" / "reward")
    dirs = ["--model", tmp_path / "one" / "sft", "--reward-model", tmp_path / "one" / "reward"]
    status, _, error = command("--stage", "ppo", *dirs, *flags(tiny("a"), "model", "stage"))
    assert status == 2 and "reward has another vocabulary than the policy" in error
    status, _, error = command(
        "--stage", "ppo", *dirs[:3], tmp_path / "one" / "sft", *flags(tiny("b"), "model", "stage")
    )
    assert status == 2 and "is not a reward model" in error


def test_a_prompt_longer_than_the_context(tiny, command, tmp_path):
    rows = [{"prompt": "superb " * 80, "chosen": " a", "rejected": " b"} for _ in range(20)]
    options = {"dataset": write_rows(tmp_path / "d.jsonl", rows), "max_length": 64}
    status, _, error = command(*flags(tiny(**options)))
    assert status == 2 and "every prompt is longer than 56 tokens" in error and "context of 64" in error
    status, _, error = command(*flags(tiny(max_length=65)))
    assert status == 2 and "--max-length 65" in error and "context of 64" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "0"], "batch_size must be above 0, got 0"),
        (["--kl-coef", "-1"], "kl_coef must not be negative, got -1"),
        (["--gae-lambda", "2"], "gae_lambda must lie between 0 and 1, got 2"),
        (["--batch-size", "2", "--num-minibatches", "3"], "num_minibatches 3 must not exceed batch_size 2"),
        (["--stage", "ppo"], "stage ppo starts from a model"),
        (["--stage", "ppo", "--model", "x"], "stage ppo needs reward_model"),
        (["--reward-model", "x"], "are for stage ppo"),
        (["--preferences", "ai"], "need judge"),
        (["--adaptive-kl", "--kl-coef", "0"], "adaptive_kl multiplies kl_coef"),
        (["--ask", "I"], "has no policy: --ask needs a run whose stage 3 has ended"),
        (["--no-such-flag"], "no-such-flag"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all cannot be loaded"),
        (["--resume", "/nowhere"], "is not a file"),
        (["--device", "cuda:99"], "--device cuda:99 is not available"),
        (
            ["--constitution", "/nowhere", "--judge", "x", "--preferences", "ai"],
            "--constitution /nowhere cannot be read",
        ),
    ],
)
def test_bad_flags(command, tmp_path, words, message):
    run_dir = [] if "--resume" in words else ["--run-dir", tmp_path / "run"]
    status, out, error = command(*words, *run_dir, "--num-texts", 40)
    assert status == 2 and message.replace(" ", "") in re.sub(r"[\s│]", "", out + error)
    assert "Traceback" not in error and not (tmp_path / "run").exists()


def test_the_policies_of_a_run_are_asked(rlhf, tiny, command):
    """Four continuations of stage 1's policy and of stage 3's, each with the reward model's score of the whole text."""
    args = tiny("a run")
    rlhf.train(args)
    asked, ask = [], rlhf.ask_policies
    rlhf.ask_policies = lambda args: asked.extend(ask(args))
    try:
        status, out, error = command("--ask", "The plot of this drama ", "--run-dir", args.run_dir)
    finally:
        rlhf.ask_policies = ask
    assert status == 0 and out.index("before stage 3") < out.index("after stage 3"), error
    assert [kind for kind, *_ in asked] == ["before"] * 4 + ["after"] * 4
    assert [text for kind, text, *_ in asked if kind == "before"] != [
        text for kind, text, *_ in asked if kind == "after"
    ]
    assert all(f"score {score:+.2f}, {'not ' * (not truth)}truly positive" in out for _, _, score, truth in asked)
    assert all(truth == (rlhf.true_sentiment(f"The plot of this drama{text}") > 0) for _, text, _, truth in asked)


def test_a_damaged_checkpoint(rlhf, tiny, command):
    rlhf.train(tiny(stage="sft"))
    (Path(tiny().run_dir) / "checkpoint.pt").write_bytes(b"junk")
    status, _, error = command("--resume", tiny().run_dir)
    assert status == 2 and "is no checkpoint of this script, or is damaged" in error


@pytest.mark.slow
def test_importing_the_script_is_quick(rlhf):
    """The equations need neither transformers nor datasets: nothing of them is imported until a run begins."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import rlhf_gpt2_ppo; print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "False", result.stderr
