"""--track in each script: Weights & Biases sees every scalar, and what it refuses leaves nothing behind."""

import sys
from types import SimpleNamespace

import pytest
from torch.utils.tensorboard import writer as tensorboard

pytestmark = pytest.mark.slow


class UsageError(Exception):
    """Like wandb's own, which no base class of Python's joins to anything."""


@pytest.fixture
def wandb(monkeypatch):
    """A module that does what wandb's init(sync_tensorboard=True) does: only writers made after it are watched."""
    seen = SimpleNamespace(settings=[], scalars={}, refusal=None)

    class Watched(tensorboard.EventFileWriter):
        def add_event(self, event):
            for value in event.summary.value:
                seen.scalars.setdefault(value.tag, []).append(value.simple_value)
            super().add_event(event)

    def init(**options):
        seen.settings.append(options)
        if seen.refusal is not None:
            raise UsageError(seen.refusal)
        if options["sync_tensorboard"]:
            monkeypatch.setattr(tensorboard, "EventFileWriter", Watched)

    fake = type(sys)("wandb")
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return seen


RUNS = ("cartpole", "atari", "rlhf", "grpo")


@pytest.fixture
def run(request, tmp_path):
    """(script, settings of a short run of it)."""
    script = request.getfixturevalue(request.param)
    if request.param == "cartpole":
        args = request.getfixturevalue("small")(eval_episodes=2)
    elif request.param == "atari":
        sizes = {"total_timesteps": 64, "num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 1}
        args = script.Args(**sizes, eval_episodes=0, torch_threads=1, run_dir=str(tmp_path / "run"))
    else:
        args = request.getfixturevalue({"rlhf": "tiny", "grpo": "tiny_grpo"}[request.param])()
    return script, args


def words(script, args):
    """The command line of these settings."""
    found = ["--track"]
    for name, value in vars(args).items():
        flag = f"--{'' if value is not False else 'no-'}{name.replace('_', '-')}"
        if value != getattr(script.Args(), name):
            found += [flag] if isinstance(value, bool) else [flag, str(value)]
    return found


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_every_scalar_arrives(run, wandb, tmp_path):
    script, args = run
    metrics = script.train(script.replace(args, track=True, wandb_project="mine"))
    (settings,) = wandb.settings
    assert settings["project"] == "mine" and settings["id"] == "run" and settings["config"]["seed"] == args.seed
    points = {}  # stage 3's evaluations stand under tags of their own
    for row in metrics:
        for name in (name for name in row if "/" in name):
            points.setdefault(f"eval/{name}" if row.get("stage") == "eval" else name, []).append(row[name])
    texts = {"samples/text_summary"}  # grpo_llm.py's answers
    assert points.keys() == wandb.scalars.keys() - texts and len(points) >= 7
    for name, numbers in points.items():
        assert wandb.scalars[name] == pytest.approx(numbers, rel=1e-5), name


@pytest.mark.parametrize("run", RUNS, indirect=True)
@pytest.mark.parametrize("refusal", ["No API key configured.\nUse wandb login.", "Run ID cannot contain :", ""])
def test_what_it_refuses_leaves_nothing_behind(run, wandb, monkeypatch, capsys, tmp_path, refusal):
    """No API key, a run name that it does not take, an exception without a word: one sentence, exit status 2."""
    script, args = run
    wandb.refusal = refusal
    assert_refused(script, words(script, args), refusal or "UsageError", monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


def test_the_warm_start_comes_after(grpo, wandb, monkeypatch, capsys, tmp_path):
    """Without --model grpo_llm.py writes its own into the run directory: not before W&B has begun."""
    wandb.refusal = "No API key configured."
    monkeypatch.setattr(grpo, "warm_start", lambda *_: None)
    args = grpo.Args(num_problems=300, eval_problems=4, run_dir=str(tmp_path / "run"))
    assert_refused(grpo, words(grpo, args), "No API key", monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


def assert_refused(script, arguments, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        script.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in error
    message = f"error: --track: Weights & Biases does not begin: {reason.splitlines()[0]}"
    assert message in error.splitlines()[-1]
