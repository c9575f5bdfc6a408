"""Runs of grpo_llm as a person meets them: flags, data, files, resuming, messages, exit statuses."""

import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from commands import flags
from contract import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"  # real material, of which nothing is in the project


def weights(run_dir):
    return AutoModelForCausalLM.from_pretrained(Path(run_dir) / "policy").state_dict()


def assert_same_weights(one, other):
    assert one.keys() == other.keys() and len(one) > 20
    for name in one:
        assert torch.equal(one[name], other[name]), name


def without_clock(metrics):
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in metrics]


# ---- The default run, shortened ----

SHORT = [
    *("--warm-start-steps", 4, "--steps", 2, "--num-problems", 300, "--eval-problems", 4, "--eval-samples", 2),
    *("--eval-k", 2, "--prompts-per-step", 2, "--group-size", 4, "--max-tokens", 8),
]


@pytest.mark.picture
@pytest.mark.parametrize(("task", "process"), [("arithmetic", True), ("countdown", False)])
def test_default_command_line(command, grpo, tmp_path, monkeypatch, task, process):
    """Without a model: it makes its own, warms it up, learns; all files are where it says they are."""
    monkeypatch.chdir(tmp_path)
    words = ["--supervision", "process"] if process else ["--task", "countdown", "--max-term", 20]
    status, out, error = command(*SHORT, *words)
    assert status == 0, error
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"{task}__grpo_llm__1__\d{{8}}-\d{{6}}-\d{{6}}", run_dir.name)
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    for text in ("4 held-out problems   before    after", "greedy", "pass@1", "pass@2", "maj@2", "reward  tokens"):
        assert text in out
    paths = re.findall(r"runs/[\w./-]+", out)
    assert len(paths) >= 3 and all((tmp_path / path).exists() for path in paths)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for following in re.findall(r"^(?:next| {4}) +python grpo_llm.py (.+)$", out, re.MULTILINE):
        status, answer, error = command(*shlex.split(following))
        assert status == 0 and ("right is    " in answer or "model B     runs/" in answer), error
    assert "model B     runs/" in answer and len(list((tmp_path / "runs").iterdir())) == 1


def test_help(command):
    status, out, _ = command("--help")
    assert status == 0 and "groups of answers instead of a critic" in out
    for flag in ("--group-size", "--clip-high", "--scale", "--reduction", "--resume"):
        assert flag in out
    text = re.sub(r"[\s│]+", " ", out)
    assert "completions of each prompt" in text
    assert not re.findall(r"--[\w-]+ (?:INT|FLOAT|STR|\{[^}]*\}) \(default", text), "a flag without a line of help"


def test_warm_start_lowers_the_loss(grpo, tmp_path):
    """Supervised on worked solutions up to their EOS; some steps make them likelier."""
    args, _ = grpo.chosen(grpo.Args(terms=2, max_term=9, num_problems=80, eval_problems=8, warm_start_steps=25))
    problems, held_out = grpo.load_problems(args)
    tokenizer = grpo.new_tokenizer()
    torch.manual_seed(0)
    model = grpo.new_model(tokenizer)
    assert 300_000 < sum(p.numel() for p in model.parameters()) < 600_000

    def loss():
        total = count = 0
        for problem in held_out:
            prompt = tokenizer(f"{problem.prompt}\n")["input_ids"]
            solution = [*tokenizer(problem.solution)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + solution])).logits[0, len(prompt) - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(solution), reduction="sum"))
            count += len(solution)
        return total / count

    before = loss()
    grpo.warm_start(args, model, tokenizer, problems, held_out)
    assert before > 2.5 and loss() < 0.6 * before


# ---- Files ----


def test_the_saved_policy(grpo, tiny_grpo):
    """An ordinary transformers directory: what it loads to has the logits of the policy that was trained."""
    args = tiny_grpo()
    grpo.train(args)
    saved = torch.load(Path(args.run_dir) / "checkpoint.pt", weights_only=True)["policy"]
    trained = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(Path(args.run_dir) / "policy")
    inputs = tokenizer("12+34\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = trained(inputs).logits
        trained.load_state_dict(saved, strict=False)
        after = trained(inputs).logits
        loaded = AutoModelForCausalLM.from_pretrained(Path(args.run_dir) / "policy")(inputs).logits
    assert torch.equal(loaded, after) and not torch.equal(before, after)
    assert tokenizer.decode(inputs[0]) == "12+34\n" and tokenizer.pad_token != tokenizer.eos_token
    assert not list(Path(args.run_dir).glob("*.tmp"))


def test_same_seed_same_weights(grpo, tiny_grpo):
    ends = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        grpo.train(tiny_grpo(name, seed=seed))
        ends.append(weights(tiny_grpo(name).run_dir))
    assert_same_weights(ends[0], ends[1])
    assert not torch.equal(ends[0]["lm_head.weight"], ends[2]["lm_head.weight"])


def test_tensorboard_scalars(grpo, tiny_grpo):
    """The names that docs/metrics.md explains, with the values that train returned."""
    args = tiny_grpo(beta=0.1, format_weight=0.1, truncated="penalise")
    metrics = grpo.train(args)
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").split("## `grpo_llm.py`")[1]
    explained = set(re.findall(r"^\| `(\w+/[\w@]+)`", text, re.MULTILINE))
    events = EventAccumulator(args.run_dir)
    events.Reload()
    found = set(events.Tags()["scalars"])
    for tag in found:
        returned = [row[tag] for row in metrics if tag in row]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(returned, rel=1e-5, abs=1e-7)
    assert found - {"eval/pass@2", "eval/maj@2"} <= explained and len(found) > 25
    others = {"eval/pass@8", "eval/maj@8", "eval/reward", "reward/model", "reward_model/loss", "sft/loss"}
    others |= {"policy/sampler_weight", "tools/calls", "reward/overlong"}
    assert explained - found == others


def test_peak_memory_is_in_bytes_on_every_system(grpo, tiny_grpo, monkeypatch):
    """ru_maxrss counts kilobytes on Linux and bytes on macOS; Windows has no module `resource`, and no such metric."""
    process = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=3_000_000))
    monkeypatch.setitem(sys.modules, "resource", process)
    for platform, size in (("linux", 3_000_000 * 1024), ("darwin", 3_000_000)):
        with monkeypatch.context() as patch:
            patch.setattr(grpo.sys, "platform", platform)
            assert grpo.peak_memory("cpu") == size
    monkeypatch.setitem(sys.modules, "resource", None)
    assert grpo.peak_memory("cpu") is None
    rows = grpo.train(tiny_grpo(steps=1))
    assert "memory/peak_gb" not in rows[1] and "time/step_seconds" in rows[1]


@pytest.mark.parametrize("keep", [True, False])
def test_what_a_run_on_a_cpu_keeps_in_memory(grpo, tiny_grpo, monkeypatch, keep):
    """Freed memory, unless --no-keep-memory; of oneDNN's products 64, or as many as the user says."""
    kept = []
    monkeypatch.setattr(grpo, "keep_freed_memory", lambda: kept.append(1))
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    grpo.train(tiny_grpo(steps=1, keep_memory=keep))
    assert len(kept) == (keep and sys.platform == "linux")
    assert (os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]) == ("64", "7")


# ---- Resuming ----

RESUMED = {
    "plain": {"num_epochs": 2, "num_minibatches": 2, "temperature": 0.9},
    "reference": {"beta": 0.1, "reference_every": 1, "dynamic_sampling": 2},
    "bfloat16": {"dtype": "bfloat16", "optimizer": "adamw8bit", "beta": 0.1, "learning_rate": 1e-3},
    "old sampler": {"staleness": 2, "sampler_correction": "token", "dynamic_sampling": 1},
    "lora": {"lora_rank": 4, "beta": 0.1},
    "lora, quantized": {"lora_rank": 4, "beta": 0.1, "quantize": "int8"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESUMED)
def test_an_interrupted_run_ends_with_the_same_bits(grpo, tiny_grpo, monkeypatch, kind):
    """Stopped in the fourth step, resumed from the second: weights, optimizer, metrics, log of an unbroken run."""
    if "lora" in kind:
        pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    options = {"steps": 5, "checkpoint_every": 2, "eval_every": 2, **RESUMED[kind]}
    whole = grpo.train(tiny_grpo("whole", **options))
    original, count = grpo.learning_rate_of, itertools.count()

    def breaks(*arguments):
        if next(count) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "learning_rate_of", breaks)
        with pytest.raises(KeyboardInterrupt):
            grpo.train(tiny_grpo("broken", **options))
    torch.rand(100)  # whatever else the process drew in between
    resumed = grpo.train(grpo.resumed_args(tiny_grpo("broken").run_dir))
    assert without_clock(resumed) == without_clock(whole) and len(whole) == 6
    ends = [torch.load(Path(tiny_grpo(n).run_dir) / "checkpoint.pt", weights_only=True) for n in ("whole", "broken")]
    for name in ("step", "cursor"):
        assert ends[0][name] == ends[1][name]
    assert_same_weights(ends[0]["policy"], ends[1]["policy"])
    assert any("lora_" in name for name in ends[0]["policy"]) == ("lora" in kind)
    if kind == "reference":
        assert_same_weights(ends[0]["reference"], ends[1]["reference"])
    moments = [str(end["optimizer"]) for end in ends]
    assert moments[0] == moments[1]
    events = EventAccumulator(tiny_grpo("broken").run_dir)
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_an_interrupted_reward_model_ends_with_the_same_bits(grpo, tiny_grpo, monkeypatch, tmp_path):
    """R_φ, its optimizer, pairs and replay come back too."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    tokenizer = grpo.new_tokenizer()
    torch.manual_seed(3)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 1, "n_positions": 64}
    config = GPT2Config(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **sizes)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    monkeypatch.setattr(grpo, "is_right", lambda problem, text: len(text) % 2 == 0)
    options = {"reward_model": str(tmp_path / "reward"), "reward_model_steps": 2, "reference_every": 1}
    options |= {"steps": 4, "checkpoint_every": 1, "reward_model_learning_rate": 1e-2}
    grpo.train(tiny_grpo("whole", **options))
    original, count = grpo.RewardModel.learn, itertools.count()

    def breaks(*arguments):
        if next(count) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(grpo.RewardModel, "learn", breaks)
        with pytest.raises(KeyboardInterrupt):
            grpo.train(tiny_grpo("broken", **options))
    grpo.train(grpo.resumed_args(tiny_grpo("broken").run_dir))
    one, two = (
        torch.load(Path(tiny_grpo(n).run_dir) / "checkpoint.pt", weights_only=True) for n in ("whole", "broken")
    )
    assert one["replay"] == two["replay"] and len(one["replay"]) > 5
    assert str(one["reward_optimizer"]) == str(two["reward_optimizer"])
    assert all(torch.equal(weight, two["reward_model"][name]) for name, weight in one["reward_model"].items())
    assert_same_weights(one["policy"], two["policy"])


@pytest.mark.processes
def test_killed_at_any_moment_it_goes_on(grpo, tiny_grpo, tmp_path):
    """SIGKILL to a real process, then --resume: the same weights as a run that was left alone."""
    args, whole = (tiny_grpo(name, steps=60, checkpoint_every=1) for name in ("killed", "whole"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, grpo.__file__, *flags(grpo, args)]
    process = subprocess.Popen(start, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    checkpoint = Path(args.run_dir) / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"the run was over before it could be killed: {error.decode()}"
    assert 0 < torch.load(checkpoint, weights_only=True)["step"] < 60
    resumed = grpo.train(grpo.resumed_args(args.run_dir))
    assert without_clock(resumed) == without_clock(grpo.train(whole))
    assert_same_weights(weights(args.run_dir), weights(whole.run_dir))


def test_resume_keeps_the_settings(grpo, tiny_grpo, command):
    args = tiny_grpo(beta=0.1)
    grpo.train(args)
    status, _, error = command("--resume", args.run_dir, "--beta", 0.5)
    assert status == 2 and "beta 0.1" in error and "0.5 needs a separate run" in error and "Traceback" not in error
    status, out, error = command("--resume", args.run_dir, "--torch-threads", 1, "--micro-batch-tokens", 99)
    assert status == 0 and "held-out problems" in out, error


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (["--plan", 256], "--plan was removed: python benchmarks/memory_plan.py --plan took its place"),
        (["--gpu-memory=8"], "--gpu-memory was removed: python benchmarks/memory_plan.py --gpu-memory took its place"),
        (["--row_tokens", 256], "--row_tokens was removed: the row length is chosen from the lengths now"),
    ],
)
def test_a_removed_flag_names_what_took_its_place(command, words, instead):
    status, out, error = command(*words)
    assert (status, out, error) == (2, "", f"error: {instead}\n")


def test_a_run_saved_with_removed_flags_is_resumed(grpo, tiny_grpo, command):
    """They are ignored, and one line says so."""
    args = tiny_grpo()
    grpo.train(args)
    path = Path(args.run_dir) / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["args"] |= {"row_tokens": 256, "plan": 0, "gpu_memory": 0.0}
    torch.save(saved, path)
    status, out, error = command("--resume", args.run_dir)
    assert status == 0, error
    lines = [line for line in out.splitlines() if "no longer exist" in line]
    assert lines == ["resume      settings that no longer exist are ignored: plan, gpu_memory, row_tokens"]


def test_a_taken_run_dir_is_refused(grpo, tiny_grpo, command):
    grpo.train(tiny_grpo())
    before = (Path(tiny_grpo().run_dir) / "checkpoint.pt").read_bytes()
    status, _, error = command(*flags(grpo, tiny_grpo()))
    assert status == 2 and f"--resume {tiny_grpo().run_dir} resumes it" in error
    assert (Path(tiny_grpo().run_dir) / "checkpoint.pt").read_bytes() == before
    Path(tiny_grpo("other").run_dir).mkdir()
    status, _, error = command(*flags(grpo, tiny_grpo("other")))
    assert status == 2 and "exists: choose another" in error


def test_damaged_and_foreign_checkpoints(grpo, tiny_grpo, command, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    grpo.train(tiny_grpo())
    path = Path(tiny_grpo().run_dir) / "checkpoint.pt"
    whole = torch.load(path, weights_only=True)
    lacking = {key: value for key, value in whole.items() if key != "optimizer"}
    older = {**whole, "args": {**whole["args"], "no_such_setting": 1}}
    for content, message in ((lacking, "it lacks optimizer"), (older, "or is damaged"), (Evil(), "or is damaged")):
        torch.save(content, path)
        status, _, error = command("--resume", tiny_grpo().run_dir)
        assert status == 2 and message in error and "Traceback" not in error
    for junk in (b"junk", b""):
        path.write_bytes(junk)
        status, _, error = command("--resume", tiny_grpo().run_dir)
        assert status == 2 and "is no checkpoint of this script, or is damaged" in error
    assert not (tmp_path / "evil").exists()


def test_ctrl_c_says_how_to_go_on(grpo, tiny_grpo, command, monkeypatch):
    def breaks(function, at):
        original, count = getattr(grpo, function), itertools.count()

        def broken(*arguments):
            if next(count) == at:
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(grpo, function, broken)

    breaks("learning_rate_of", 1)
    args = tiny_grpo(checkpoint_every=1)
    status, _, error = command(*flags(grpo, args))
    assert status == 130 and f"interrupted: continue with --resume {args.run_dir}" in error and "Traceback" not in error
    breaks("load_problems", 0)
    status, _, error = command(*flags(grpo, tiny_grpo("early")))
    assert status == 130 and error.strip().endswith("interrupted") and not Path(tiny_grpo("early").run_dir).exists()


# ---- Data ----


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("task", ["jsonl", "gsm8k"])
def test_a_run_on_a_file(grpo, tiny_grpo, tmp_path, task):
    if task == "jsonl":
        rows = [{"prompt": f"{i}+1", "answer": i + 1, "other": None} for i in range(20)]
    else:
        rows = [{"question": f"{i}+1", "answer": f"<<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(20)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    supervision = {"supervision": "process", "length_weight": 0.0} if task == "gsm8k" else {}
    args = tiny_grpo(task=task, data=data, num_problems=15, **supervision)
    learned, held_out = grpo.load_problems(args)
    assert len(learned) == 11 and len(held_out) == 4
    assert all(eval(problem.prompt) == int(problem.answer) for problem in learned + held_out)
    metrics = grpo.train(args)
    assert metrics[-1]["step"] == 2 and metrics[-1]["completion/length"] > 1


@pytest.mark.parametrize(("task", "question"), [("jsonl", "prompt"), ("gsm8k", "question")])
def test_a_sorted_file_is_shuffled_before_problems_are_held_out(grpo, tiny_grpo, tmp_path, task, question):
    """Of 400 rows in order, both parts have problems from each quarter, even where --num-problems reads 200 of them."""
    data = write_rows(tmp_path / "d.jsonl", [{question: f"{i}+0", "answer": f"#### {i}"} for i in range(400)])
    parts = [
        grpo.load_problems(tiny_grpo(task=task, data=data, num_problems=count, eval_problems=40, seed=seed))
        for count, seed in ((400, 1), (200, 1), (400, 1), (400, 2))
    ]
    for (learned, held_out), count in zip(parts, (400, 200)):
        assert len(held_out) == 40 and len(learned) == count - 40
        for part in (learned, held_out):
            quarters = [int(problem.prompt.removesuffix("+0")) // 100 for problem in part]
            assert min(quarters.count(i) for i in range(4)) >= len(part) / 10
    first, _, again, other = (held_out for _, held_out in parts)
    assert first == again and len(set(first) & set(other)) < 20


def test_a_problem_stands_in_the_data_twice(grpo, tiny_grpo, tmp_path):
    """It is not both learned from and held out."""
    rows = [{"prompt": f"{i % 10}+1", "answer": i % 10 + 1} for i in range(40)]
    args = tiny_grpo(task="jsonl", data=write_rows(tmp_path / "d.jsonl", rows))
    learned, held_out = grpo.load_problems(args)
    assert len(learned) == 6 and len(held_out) == 4 and not set(learned) & set(held_out)


@pytest.mark.skipif(not GSM8K.exists(), reason=f"no {GSM8K}: GSM8K's training problems lie there")
def test_gsm8k_as_published(grpo):
    args = grpo.Args(task="gsm8k", model="m", data=str(GSM8K), num_problems=1000, eval_problems=100)
    learned, held_out = grpo.load_problems(args)
    assert len(learned) + len(held_out) >= 990 and len(held_out) == 100
    assert all(grpo.as_number(p.answer) is not None and p.values[-1] == p.answer for p in learned)


ROWS = [{"prompt": f"{i}+1", "answer": str(i + 1)} for i in range(100)]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS)


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("jsonl", "", "d.jsonl has no rows"),
        (
            "jsonl",
            '{"prompt": "1", "answer": 1}\n' * 50,
            "too few problems: of 1 with different prompts 0 are held out",
        ),
        ("jsonl", '{"question": "1", "answer": 1}\n', "task jsonl needs rows with prompt and answer, found question"),
        ("gsm8k", '{"question": "1", "answer": 1}\n', "line 1: task gsm8k needs #### before the answer, found '1'"),
        ("gsm8k", '{"question": "1", "answer": "1 ####"}\n', "line 1: task gsm8k needs #### before the answer"),
        ("gsm8k", '{"question": [{}], "answer": "#### 1"}\n', "line 1: question must be a text, found [{}]"),
        ("jsonl", LINES + "[1]\n", "line 101: task jsonl needs rows with prompt and answer, found [1]"),
        ("jsonl", LINES + '{"prompt": "2", "answer": "..."}', "line 101: nothing could match the answer '...'"),
        ("jsonl", "{1}\n", "is no file of JSON lines"),
        ("jsonl", b"\xff\xfe\x00", "is no file of JSON lines in UTF-8"),
        ("jsonl", None, "No such file"),
        ("jsonl", LINES[:-5], "line 100 cannot be read: Unterminated string"),
        ("jsonl", "\n\r\n" + LINES[:-5], "line 102 cannot be read: Unterminated string"),
        ("jsonl", LINES + '{"prompt": "\\ud83d", "answer": "1"}', "line 101 cannot be read: 'utf-8' codec"),
        ("jsonl", json.dumps(ROWS), "is no file of JSON lines but a JSON array"),
        ("jsonl", "\ufeff\n" + json.dumps(ROWS, indent=1), "is no file of JSON lines but a JSON array"),
    ],
)
def test_bad_data(grpo, tiny_grpo, command, tmp_path, task, text, message):
    path = tmp_path / "d.jsonl"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    status, out, error = command(*flags(grpo, tiny_grpo(task=task, data=str(path))))
    assert status == 2 and message in error and "Traceback" not in error and error.count("\n") == 1
    assert len(error) < 250 and out == "" and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "?", "answer": None}, "answer must be a text or a number, found None"),
        ({"prompt": "?", "answer": " "}, "answer must be a text or a number, found ' '"),
        ({"prompt": "?", "answer": ["4"]}, "answer must be a text or a number, found ['4']"),
        ({"prompt": "?", "answer": float("nan")}, "answer must be a text or a number, found nan"),
        ({"prompt": "", "answer": "4"}, "prompt must be a text or a list of messages, found ''"),
        ({"prompt": None, "answer": "4"}, "prompt must be a text or a list of messages, found None"),
        ({"prompt": [], "answer": "4"}, "each message needs role and content, found []"),
        ({"prompt": ["?"], "answer": "4"}, "each message needs role and content, found ['?']"),
        ({"prompt": [{"role": "user", "content": None}], "answer": "4"}, "each message needs role and content"),
        ({"prompt": [{"role": "user", "content": ""}], "answer": "4"}, "each message needs role and content"),
        (
            {"prompt": [{"role": "assistant", "content": "4"}], "answer": "4"},
            "the last message must not be the assistant's",
        ),
        ({"prompt": [{"role": "user", "content": "?"}], "answer": "4"}, "--instruction is for prompts that are texts"),
    ],
)
def test_a_row_without_a_prompt_or_an_answer(grpo, tiny_grpo, command, tmp_path, row, message):
    path = tmp_path / "d.jsonl"
    path.write_text(f"\n{LINES}{json.dumps(row)}\n", encoding="utf-8")
    status, _, error = command(*flags(grpo, tiny_grpo(task="jsonl", data=str(path))))
    assert status == 2 and f"{path}, line 102: {message}" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["\ufeff" + LINES, LINES.replace("\n", "\r\n"), LINES.replace("+", "\u2028")])
def test_a_byte_order_mark_and_other_ends_of_lines_are_read(grpo, tiny_grpo, tmp_path, text):
    (tmp_path / "d.jsonl").write_bytes(text.encode())
    learned, held_out = grpo.load_problems(tiny_grpo(task="jsonl", data=str(tmp_path / "d.jsonl"), num_problems=200))
    assert {(x.prompt.replace("\u2028", "+"), x.answer) for x in learned + held_out} == {
        tuple(row.values()) for row in ROWS
    }


def test_what_is_not_learned_from_is_said(grpo, tiny_grpo, tmp_path, capsys):
    """Rows beyond --num-problems, prompts that stand there twice, and those with two answers."""
    data = write_rows(tmp_path / "d.jsonl", [*ROWS, *ROWS[:5], {"prompt": "7+1", "answer": "9"}])
    grpo.load_problems(tiny_grpo(task="jsonl", data=data, num_problems=1000))
    assert capsys.readouterr().out.splitlines() == [
        "problems    96 to learn from, 4 held out",
        "            6 are left out because another has the same prompt",
        "            1 of these have another answer than it",
    ]
    grpo.load_problems(tiny_grpo(task="jsonl", data=write_rows(tmp_path / "d.jsonl", ROWS), num_problems=70))
    assert "66 to learn from" in (out := capsys.readouterr().out) and "30 are left out by --num-problems 70\n" in out


# ---- Prompts that are chats ----

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "({{ m['content'] }}){% endfor %}="
)


@pytest.fixture
def tiny_chat(grpo, tiny_lm, tmp_path):
    """The tiny model with a chat template."""

    def make(template):
        shutil.copytree(tiny_lm, tmp_path / "chat")
        tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "chat")
        return str(tmp_path / "chat")

    return make


def chats(*roles):
    return [
        {"prompt": [{"role": role, "content": f"{i}{j}"} for j, role in enumerate(roles)], "answer": i}
        for i in range(20)
    ]


def test_messages_go_to_the_chat_template(grpo, tiny_grpo, tiny_chat, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "d.jsonl", chats("user", "assistant", "user"))
    args = tiny_grpo(task="jsonl", data=data, model=tiny_chat(CHAT), instruction=None)
    shown, generate = [], grpo.generate
    monkeypatch.setattr(grpo, "why_plain", lambda *_: "")  # it samples as well, from prompts of its own
    monkeypatch.setattr(
        grpo, "generate", lambda model, prompts, *more: shown.extend(prompts) or generate(model, prompts, *more)
    )
    metrics = grpo.train(args)
    texts = set(AutoTokenizer.from_pretrained(args.model).batch_decode(shown))
    assert len(texts) >= 8 and texts <= {f"({i}0)({i}1)({i}2)=" for i in range(20)}
    assert metrics[-1]["step"] == 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHAT, "refuses the prompt 'system: "),
        (None, "has no chat template for prompts that are lists of messages"),
    ],
)
def test_messages_that_a_model_does_not_take(grpo, tiny_grpo, tiny_chat, command, tmp_path, template, message):
    args = tiny_grpo(
        task="jsonl",
        data=write_rows(tmp_path / "d.jsonl", chats("system", "user")),
        model=tiny_chat(template),
        instruction=None,
    )
    status, _, error = command(*flags(grpo, args))
    assert status == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()
    assert ("no system role" in error) == (template is not None)


# ---- Prompts beyond the context ----


def lm_with_context(kind, context, tokenizer, directory):
    """A tiny model of learned (gpt2) or rotary positions (qwen3), saved."""
    from transformers import GPT2Config, Qwen3Config

    if kind == "gpt2":
        config = GPT2Config(n_positions=context, n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(tokenizer)}
        config = Qwen3Config(**sizes, max_position_embeddings=context)
    config.eos_token_id = config.bos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_prompts_beyond_the_context_are_left_out(grpo, tiny_grpo, tmp_path, capsys, monkeypatch, kind):
    """Three prompts of twenty leave no room for 10 tokens in 30: it is said, and nobody learns or is tested on them."""
    model = lm_with_context(kind, 30, grpo.new_tokenizer(), tmp_path / "lm")
    rows = [{"prompt": f"{'1+' * (10 if i < 3 else 1)}{i:02}", "answer": i} for i in range(20)]  # and a newline
    data = write_rows(tmp_path / "d.jsonl", rows)
    shown, generate = [], grpo.generate
    monkeypatch.setattr(grpo, "why_plain", lambda *_: "")  # it samples as well, from prompts of its own
    monkeypatch.setattr(
        grpo, "generate", lambda model, prompts, *more: shown.extend(prompts) or generate(model, prompts, *more)
    )
    args = tiny_grpo(task="jsonl", data=data, model=model, eval_problems=10, steps=4)
    _, held_out = grpo.load_problems(args)
    assert any(len(x.prompt) > 20 for x in held_out), "of the held-out problems too"
    grpo.train(args)
    assert {len(prompt) for prompt in shown} == {5}
    out = capsys.readouterr().out
    assert (
        "3 of 20 prompts, up to 23 tokens long, and --max-tokens 10 exceed the model's context of 30: they are left"
        in out
    )


def test_a_prompt_that_just_fits_is_kept(grpo, tiny_grpo, tmp_path, capsys):
    tokenizer = grpo.new_tokenizer()
    problems = [grpo.Problem("1" * n, "1") for n in (3, 4, 18, 19, 20)]
    for kind in ("gpt2", "qwen3"):
        model = AutoModelForCausalLM.from_pretrained(lm_with_context(kind, 30, tokenizer, tmp_path / kind))
        learned, held_out = grpo.those_that_fit(tiny_grpo(), model, tokenizer, problems[1:], problems[:1])
        assert (learned, held_out) == (problems[1:4], problems[:1])
    assert capsys.readouterr().out.count("1 of 5 prompts") == 2


@pytest.mark.parametrize("max_tokens", [27, 30, 500])
def test_no_prompt_fits(grpo, tiny_grpo, command, tmp_path, max_tokens):
    model = lm_with_context("qwen3", 30, grpo.new_tokenizer(), tmp_path / "lm")
    status, _, error = command(*flags(grpo, tiny_grpo(model=model, max_tokens=max_tokens)))
    assert status == 2 and f"and --max-tokens {max_tokens} exceed the model's context of 30: too few are left" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"max_seq_len": 32}, 32),
        ({"max_position_embeddings": -1}, math.inf),
        ({"max_position_embeddings": None}, math.inf),
        ({}, math.inf),
    ],
)
def test_names_of_the_context(grpo, config, context):
    text = SimpleNamespace(**config)
    assert grpo.context_of(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))) == context


def test_worked_solutions_that_cannot_end_are_said(grpo, tiny_grpo, tmp_path, capsys):
    """A solution of 2 terms, 5+9=14 and #14, has up to 10 tokens, and EOS."""
    changes = {"model": None, "warm_start_steps": 2, "max_tokens": 10, "num_problems": 400}
    args = tiny_grpo(**changes)
    learned, _ = grpo.load_problems(args)
    count = sum(len(f"{problem.solution}") + 1 > 10 for problem in learned)
    grpo.train(args)
    assert 0 < count < len(learned)
    assert f"{count} of {len(learned)} worked solutions do not end within --max-tokens 10\n" in capsys.readouterr().out


# ---- Rewards that are no numbers ----


@pytest.mark.parametrize("value", [float("nan"), None, float("inf"), 1e300, "1", [1.0], torch.zeros(2)])
def test_a_reward_that_is_no_number(grpo, tiny_grpo, command, tmp_path, monkeypatch, value):
    """The second step's: it is named with the step, the problem and the completion; exit status 2."""
    calls, reward_parts = [], grpo.reward_parts

    def with_own(*arguments):
        calls.append(arguments)
        return reward_parts(*arguments) | {"my own": value if len(calls) == 14 else 1}

    monkeypatch.setattr(grpo, "reward_parts", with_own)
    status, _, error = command(*flags(grpo, tiny_grpo()))
    assert status == 2 and "Traceback" not in error and len(calls) == 16
    line = error.splitlines()[-1]
    assert f"reward my own is {value!r} in step 1, where a finite number is needed" in line
    assert f"problem {calls[13][1].prompt!r}" in line and f"completion {calls[13][2]!r}" in line


@pytest.mark.parametrize("value", [True, 2, 0.5, torch.tensor(0.25), numpy.float32(0.5), numpy.bool_(True)])
def test_rewards_that_are_numbers(grpo, value):
    assert grpo.is_finite_number(value)


def test_long_texts_are_cut_in_messages(grpo):
    assert grpo.shortened("a" * 1000) == f"'{'a' * 59}…" and grpo.shortened("a") == "'a'"


@pytest.mark.parametrize(
    ("found", "message"), [(None, "it gave None and ["), ({"a": 1.0}, "it gave ['a'] and ['verifier', 'length']")]
)
def test_completions_with_different_rewards(grpo, tiny_grpo, command, monkeypatch, found, message):
    calls, reward_parts = [], grpo.reward_parts

    def some(*arguments):
        calls.append(arguments)
        return found if len(calls) == 3 else reward_parts(*arguments)

    monkeypatch.setattr(grpo, "reward_parts", some)
    status, _, error = command(*flags(grpo, tiny_grpo()))
    assert status == 2 and message in error and "in step 0" in error and "Traceback" not in error


def test_a_learned_reward_that_is_no_number(grpo, tiny_grpo, command, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "load_reward_model", lambda args: ("model", "tokenizer"))
    monkeypatch.setattr(grpo, "score_texts", lambda *arguments: torch.tensor([0.0, float("nan"), 0.0, 0.0]))
    status, _, error = command(*flags(grpo, tiny_grpo(reward_model="rm")))
    assert status == 2 and "reward model is nan in step 0" in error and "Traceback" not in error


# ---- Errors ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "steps must be above 0, got 0"),
        (["--temperature", "0"], "temperature must be above 0, got 0.0"),
        (["--beta", "-1"], "beta must not be negative, got -1.0"),
        (["--beta", "nan"], "beta must not be negative, got nan"),
        (["--group-size", "1"], "group_size must be 2 or more, or every advantage is 0, got 1"),
        (["--num-minibatches", "4", "--prompts-per-step", "3"], "num_minibatches 4 must not exceed prompts_per_step 3"),
        (["--eval-k", "17", "--eval-samples", "16"], "eval_k 17 must not exceed eval_samples 16"),
        (["--operators", "*"], "invalid choice"),
        (["--dtype", "bfloat16", "--optimizer", "adamw"], "dtype bfloat16 needs optimizer adamw8bit"),
        (["--task", "gsm8k"], "task gsm8k asks in words: it needs model"),
        (["--task", "jsonl", "--model", "m"], "task jsonl needs data"),
        (["--reference-every", "3"], "refreshes the reference or trains the reward model: it needs beta or"),
        (["--reward-model-steps", "3"], "reward_model_steps 3 trains the reward model: it needs reward_model"),
        (["--quantize", "int8"], "quantize int8 freezes the weights, so that others must learn: it needs lora_rank"),
        (["--lora-rank", "4", "--beta", "1", "--reference-every", "3"], "lora_rank 4 keeps the model"),
        (
            ["--supervision", "process", "--algorithm", "rloo"],
            "supervision process is GRPO's own: it does not go with algorithm rloo",
        ),
        (["--supervision", "process", "--scale", "none"], "GRPO's own: it does not go with scale none"),
        (["--algorithm", "rloo", "--scale", "batch"], "algorithm rloo makes advantages of rewards in its own way"),
        (["--algorithm", "reinforce++", "--scale", "none"], "in its own way: it does not go with scale none"),
        (
            ["--policy-loss", "sapo", "--clip-high", "9"],
            "policy_loss sapo has no clip range and no ratio of a sequence: it does not go with clip_high 9.0",
        ),
        (
            ["--policy-loss", "cispo", "--clip-low", "0.1"],
            "has no lower clip and no ratio of a sequence: it does not go with clip_low 0.1",
        ),
        (
            ["--sampler-cap", "3"],
            "sampler_cap 3.0 changes the weights of sampler_correction: it needs sampler_correction",
        ),
        (["--decouple-rewards", "--scale", "batch"], "their sum over the batch: it does not go with scale batch"),
        (
            ["--policy-loss", "cispo", "--importance", "sequence"],
            "no ratio of a sequence: it does not go with importance sequence",
        ),
        (
            ["--sampler-correction", "token", "--old-logprobs", "sampler"],
            "makes the weights π_old/π of the sampler 1 everywhere: it does not go with sampler_correction token",
        ),
        (["--sampler-mask"], "sampler_mask changes the weights of sampler_correction"),
        (["--unbiased-kl"], "unbiased_kl changes the KL in the loss: it needs beta"),
        (
            ["--unbiased-kl", "--beta", "1", "--algorithm", "reinforce++"],
            "which is in the reward here: it does not go with algorithm reinforce++",
        ),
        (["--overlong-buffer", "41"], "overlong_buffer 41 must not exceed max_tokens 40"),
        (["--off-policy-limit", "0"], "off_policy_limit must be above 0, got 0.0"),
        (["--no-scale-by-std"], "--no-scale-by-std was removed: --scale none took its place"),
        (
            ["--supervision", "process", "--length-weight", "1"],
            "not for a whole completion: it does not go with length_weight 1.0",
        ),
        (
            ["--supervision", "process", "--task", "countdown"],
            "the values of a solution's steps: it does not go with task countdown",
        ),
        (["--data", "d.jsonl"], "data d.jsonl is read for task gsm8k and jsonl: it does not go with task arithmetic"),
        (["--instruction", "Add."], "instruction needs {} in the place of the problem, got 'Add.'"),
        (["--model", ""], "model must not be empty, got ''"),
        (["--format-pattern", "("], "format_pattern '(' is no regular expression"),
        (["--reduction", "mean"], "invalid choice"),
        (["--no-such-flag"], "no-such-flag"),
        (["--model", "/nowhere/at/all"], "there is no directory /nowhere/at/all"),
        (["--device", "cuda:99"], "--device cuda:99 is not available"),
        (["--resume", "/nowhere"], "/nowhere/checkpoint.pt is not a file"),
        (["--num-problems", "20", "--prompts-per-step", "32"], "are left, and a step takes 32"),
    ],
)
def test_bad_flags(command, tmp_path, words, message):
    run_dir = [] if "--resume" in words else ["--run-dir", tmp_path / "run"]
    status, out, error = command(*words, *run_dir)
    assert status == 2 and message.replace(" ", "") in re.sub(r"[\s│]", "", out + error)
    assert "Traceback" not in error and not (tmp_path / "run").exists()


def test_resume_and_run_dir_exclude_each_other(grpo):
    with pytest.raises(ValueError, match="resume a continues in its own directory: it does not go with run_dir b"):
        grpo.Args(resume="a", run_dir="b")


def test_a_gradient_that_is_not_finite(grpo, tiny_grpo, command, monkeypatch):
    """It stops before the step is taken, says where, and the checkpoint before it stays."""
    original, count = grpo.reduce_loss, itertools.count()

    def breaks(*arguments):
        return original(*arguments) * (float("nan") if next(count) == 2 else 1.0)

    monkeypatch.setattr(grpo, "reduce_loss", breaks)
    args = tiny_grpo(steps=4, checkpoint_every=1, micro_batch_tokens=10_000)
    status, _, error = command(*flags(grpo, args))
    assert status == 2 and "the gradient is not finite in step 2: lower --learning-rate" in error
    assert f"{args.run_dir}/checkpoint.pt holds the last good state" in error and "Traceback" not in error
    saved = torch.load(Path(args.run_dir) / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 2 and all(weight.isfinite().all() for weight in saved["policy"].values())


def test_nothing_to_learn_from(grpo, tiny_grpo, command):
    """Dynamic sampling that finds no group with variance takes no step, and the run goes on."""
    args = tiny_grpo(dynamic_sampling=1, length_weight=0.0, max_tokens=1)
    status, _, error = command(*flags(grpo, args))
    assert status == 0, error
    rows = [json.loads(line) for line in (Path(args.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [row["groups/zero_variance"] for row in rows[1:]] == [1.0] * args.steps
    assert all(row["policy/grad_norm"] == 0 and "policy/ratio_mean" not in row for row in rows[1:])
    one, other = (AutoModelForCausalLM.from_pretrained(name) for name in (args.model, f"{args.run_dir}/policy"))
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters()))


def test_a_model_without_eos(grpo, tiny_grpo, tiny_lm, command, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_lm), AutoTokenizer.from_pretrained(tiny_lm)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token = None
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    status, _, error = command(*flags(grpo, tiny_grpo(model=str(tmp_path / "m"))))
    assert status == 2 and "neither its generation config nor its tokenizer has an EOS token" in error
    assert not Path(tiny_grpo().run_dir).exists()


def test_reward_models_that_are_none(grpo, tiny_grpo, tiny_lm, command, tmp_path):
    """A language model has no trained head; a classifier of two classes is no reward model."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=26, n_embd=16, n_layer=1, n_head=1, num_labels=2, pad_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "two")
    grpo.new_tokenizer().save_pretrained(tmp_path / "two")
    for name in (tiny_lm, str(tmp_path / "two")):
        status, _, error = command(*flags(grpo, tiny_grpo(reward_model=name)))
        assert status == 2 and f"{name} is no reward model" in error and "Traceback" not in error


def test_out_of_memory(grpo, tiny_grpo, command, monkeypatch):
    def train(args):
        raise torch.OutOfMemoryError("tried to allocate 5 GB")

    monkeypatch.setattr(grpo, "train", train)
    status, _, error = command(*flags(grpo, tiny_grpo()))
    assert status == 2 and "--generate-rows" in error and "--micro-batch-tokens" in error and "5 GB" in error


def test_missing_packages(grpo, tiny_grpo, command, monkeypatch):
    for name in ("peft", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    status, _, error = command(*flags(grpo, tiny_grpo(lora_rank=4)))
    assert status == 2 and "--lora-rank needs peft (pip install peft)" in error
    status, _, error = command(*flags(grpo, tiny_grpo(track=True)))
    assert status == 2 and "--track needs Weights & Biases: pip install wandb" in error and "Traceback" not in error


@pytest.mark.slow
def test_importing_the_script_is_quick(grpo):
    """The equations need neither transformers nor datasets: nothing of them is imported until a run begins."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import grpo_llm; print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "False", result.stderr
