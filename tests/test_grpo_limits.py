"""When memory or time runs out: grpo_llm repeats a step in halves, and ends early with everything saved."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from commands import two_processes
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


def trained(run_dir):
    return AutoModelForCausalLM.from_pretrained(Path(run_dir) / "policy").state_dict()


def assert_close(one, other):
    assert one.keys() == other.keys() and len(one) > 20
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=2e-5)


def small_memory(grpo, monkeypatch, rows=None, tokens=None, during=None):
    """Let sampling fail above so many rows, and learning (or scoring without gradient) above so many tokens."""
    sample, micro_batch_logprobs, load_model = grpo.sample, grpo.micro_batch_logprobs, grpo.load_model
    loaded, scored = [], []

    def load(*arguments, **more):  # the comparison of the two paths has room enough
        loaded.clear()
        model = load_model(*arguments, **more)
        loaded.append(model)
        return model

    def sample_or_fail(args, model, prompts, noise, *rest):
        if rows and loaded and len(noise) > rows:
            raise torch.OutOfMemoryError("tried to allocate 5 GB")
        return sample(args, model, prompts, noise, *rest)

    def logprobs_or_fail(args, model, prompts, all_tokens, mask, plan):
        is_second = bool(scored) or during is None  # the first micro-batch has left its gradient already
        scored.append(plan)
        lengths = grpo.lengths_of(mask)
        size = sum(len(prompts[i // (len(mask) // len(prompts))]) + lengths[i] for row in plan for i in row)
        if tokens and loaded and is_second and torch.is_grad_enabled() is (during != "scoring") and size > tokens:
            raise torch.OutOfMemoryError("tried to allocate 5 GB")
        return micro_batch_logprobs(args, model, prompts, all_tokens, mask, plan)

    monkeypatch.setattr(grpo, "load_model", load)
    monkeypatch.setattr(grpo, "sample", sample_or_fail)
    monkeypatch.setattr(grpo, "micro_batch_logprobs", logprobs_or_fail)


def test_sampling_in_halves(grpo, tiny_grpo, monkeypatch, capsys):
    """16 rows at once do not fit, 3 do, fewer than a group. The weights are those of a run with room enough."""
    wanted = grpo.train(tiny_grpo("wanted"))
    small_memory(grpo, monkeypatch, rows=3)
    capsys.readouterr()
    metrics = grpo.train(tiny_grpo("small", generate_rows=16))
    out = capsys.readouterr().out
    assert re.findall(r"memory      it ran out: --generate-rows (\d+)", out) == ["8", "4", "2"]
    assert metrics[-1]["reward/mean"] == pytest.approx(wanted[-1]["reward/mean"])
    assert metrics[0] == pytest.approx(wanted[0])
    assert_close(*(trained(tiny_grpo(name).run_dir) for name in ("wanted", "small")))


@pytest.mark.parametrize(
    ("during", "changes"),
    [(None, {}), ("learning", {"num_minibatches": 3, "num_epochs": 2}), ("scoring", {"beta": 0.1, "num_epochs": 2})],
)
def test_learning_in_halves(grpo, tiny_grpo, monkeypatch, capsys, during, changes):
    """Whatever the failed attempt has left of gradients and statistics is gone: weights and metrics are the same."""
    changes |= {"fast": False, "micro_batch_tokens": 64}
    wanted = grpo.train(tiny_grpo("wanted", **changes))
    small_memory(grpo, monkeypatch, tokens=30, during=during)
    capsys.readouterr()
    metrics = grpo.train(tiny_grpo("small", **changes))
    found = re.findall(r"memory      it ran out: --micro-batch-tokens (\d+)", capsys.readouterr().out)
    assert found in (["32"], ["32", "16"])
    for row, other in zip(metrics, wanted):
        row, other = ({k: v for k, v in x.items() if not k.startswith(("time", "memory"))} for x in (row, other))
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert_close(*(trained(tiny_grpo(name).run_dir) for name in ("wanted", "small")))


def test_the_halves_are_kept(grpo, tiny_grpo, monkeypatch, capsys):
    """The checkpoint holds them, and a resumed run neither fails nor says anything."""
    small_memory(grpo, monkeypatch, rows=3, tokens=30)
    args = tiny_grpo(generate_rows=8, micro_batch_tokens=64, fast=False, max_hours=1e-9, steps=2)
    grpo.train(args)
    saved = grpo.load(Path(args.run_dir) / "checkpoint.pt")
    assert saved["step"] == 1 and (saved["args"].generate_rows, saved["args"].micro_batch_tokens) in [(2, 32), (2, 16)]
    capsys.readouterr()
    grpo.train(grpo.resumed_args(args.run_dir))
    assert "ran out" not in capsys.readouterr().out


def test_where_halves_do_not_help(grpo, tiny_grpo, monkeypatch):
    """One sentence that says what would; and no other error is taken for missing memory."""
    small_memory(grpo, monkeypatch, tokens=1)
    with pytest.raises(grpo.InputError, match="out of memory, even with --micro-batch-tokens 8: lower --max-tokens"):
        grpo.train(tiny_grpo("a", micro_batch_tokens=64))
    monkeypatch.undo()
    failures = []

    def sample_groups(*_):
        failures.append(1)
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(grpo, "sample_groups", sample_groups)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        grpo.train(tiny_grpo("b"))
    assert len(failures) == 1


@pytest.mark.parametrize(
    "message", ["CUBLAS_STATUS_ALLOC_FAILED when", "[enforce fail] DefaultCPUAllocator: not enough"]
)
def test_words_that_say_that_memory_ran_out(grpo, tiny_grpo, message, capsys):
    calls = []

    def function(args, model):
        calls.append(args.generate_rows)
        if len(calls) == 1:
            raise RuntimeError(message)
        return "done"

    args, result = grpo.retry_with_less(tiny_grpo(generate_rows=7), "generate_rows", function, None)
    assert (args.generate_rows, result, calls) == (3, "done", [7, 3])


def test_max_hours(grpo, tiny_grpo, capsys):
    """The step that is running is finished; evaluated, saved; the run can be resumed and ends as one never stopped."""
    wanted = grpo.train(tiny_grpo("wanted", steps=3))
    args = tiny_grpo(steps=3, max_hours=1e-9)
    metrics = grpo.train(args)
    assert [row["step"] for row in metrics] == [0, 1] and "eval/greedy" in metrics[-1]
    out = capsys.readouterr().out
    assert f"early, after 1 of 3 steps: python grpo_llm.py --resume {args.run_dir} continues" in out
    assert "in 1 steps of GRPO" in out and (Path(args.run_dir) / "policy").is_dir()
    resumed = grpo.train(replace(grpo.resumed_args(args.run_dir), max_hours=None))
    assert [row["step"] for row in resumed] == [0, 1, 2, 3]
    assert resumed[-1]["reward/mean"] == wanted[-1]["reward/mean"]
    assert_close(*(trained(tiny_grpo(name).run_dir) for name in ("wanted", "run")))


@pytest.mark.processes
def test_two_processes_repeat_together(grpo, tiny_grpo):
    """Memory runs out in the second process only. Both halve and repeat, none waits for ever; the weights are those of
    two processes with room enough."""
    failing = """
import os, torch, grpo_llm as g
sample_groups, minibatch_gradient, calls = g.sample_groups, g.minibatch_gradient, []
def fails(name):
    calls.append(name)
    return os.environ["RANK"] == "1" and calls.count(name) == 3
def sample_or_fail(*rest):
    if fails("sample"):
        raise torch.OutOfMemoryError("tried to allocate 5 GB")
    return sample_groups(*rest)
def learn_or_fail(*rest):
    found = minibatch_gradient(*rest)  # it fails at the end: all of the gradient is there already
    if fails("learn"):
        raise torch.OutOfMemoryError("tried to allocate 5 GB")
    return found
g.sample_groups, g.minibatch_gradient = sample_or_fail, learn_or_fail
"""
    options = {"prompts_per_step": 4, "num_minibatches": 2, "num_epochs": 2, "generate_rows": 8}
    outputs = {}
    for name, patch in (("room", "import grpo_llm as g"), ("none", failing)):
        args = tiny_grpo(name, **options)
        given = {key: x for key, x in asdict(args).items() if x != getattr(grpo.Args(), key)}
        code = f"{patch}\ng.parse_args = lambda: g.Args(**{given!r})\ng.main()"
        outputs[name] = two_processes("-c", code)[0][0]
    assert "ran out" not in outputs["room"]
    said = re.findall(r"ran out: (--[a-z-]+ \d+)", outputs["none"])
    assert sorted(said) == ["--generate-rows 4", "--micro-batch-tokens 1024"]
    saved = grpo.load(Path(tiny_grpo("none").run_dir) / "checkpoint.pt")["args"]
    assert (saved.generate_rows, saved.micro_batch_tokens) == (4, 1024)
    assert_close(*(trained(tiny_grpo(name).run_dir) for name in ("room", "none")))


@contextmanager
def begin(tiny_grpo, grpo, **changes):
    """A run in a process of its own, after its first step has begun: the bar is there. Its errors go to a file."""
    args = tiny_grpo(steps=100_000, **changes)
    given = {name: x for name, x in asdict(args).items() if x != getattr(grpo.Args(), name)}
    code = f"import grpo_llm as g; g.parse_args = lambda: g.Args(**{given!r}); g.main()"
    errors = Path(args.run_dir).with_suffix(".stderr")
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(grpo.__file__).parent,  # a planted bug stands elsewhere
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},  # the test reads its lines as they come
        stdout=subprocess.PIPE,
        stderr=errors.open("w"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores Ctrl-C
    )
    deadline = time.monotonic() + 100
    try:
        while "grpo:" not in errors.read_text():
            assert run.poll() is None and time.monotonic() < deadline, errors.read_text()
            time.sleep(0.05)
        yield args, run, errors
    finally:
        run.kill()


@pytest.mark.processes
def test_ctrl_c_once(grpo, tiny_grpo):
    with begin(tiny_grpo, grpo) as (args, run, errors):
        run.send_signal(signal.SIGINT)
        out, _ = run.communicate(timeout=60)
    assert run.returncode == 0, errors.read_text()
    assert "ending      after this step" in out and "of 100000 steps: python grpo_llm.py --resume" in out
    rows = [json.loads(line) for line in (Path(args.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert (
        "eval/greedy" in rows[-1] and rows[-1]["step"] == grpo.load(Path(args.run_dir) / "checkpoint.pt")["step"] >= 1
    )


@pytest.mark.processes
def test_ctrl_c_twice(grpo, tiny_grpo):
    """The second one stops at once, in the middle of a step that would take for ever."""
    with begin(tiny_grpo, grpo, group_size=10_000, max_tokens=200, generate_rows=40_000) as (args, run, errors):
        run.send_signal(signal.SIGINT)
        assert any("ending      after this step" in line for line in run.stdout)  # two at once would count as one
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=60)
    assert run.returncode == 130 and "interrupted" in errors.read_text()
    assert not (Path(args.run_dir) / "policy").exists()
