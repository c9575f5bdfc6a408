"""Runs of ppo_cartpole as a person meets them: files, resuming, evaluation, flags, messages, exit statuses."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter


def weights(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)["agent"]


def assert_same_weights(one, other):
    assert one.keys() == other.keys() and len(one) == 12
    for name in one:
        assert torch.equal(one[name], other[name]), name


def without_clock(metrics):
    return [{key: value for key, value in row.items() if key not in ("seconds", "charts/SPS")} for row in metrics]


@pytest.fixture
def command(cartpole, monkeypatch, capsys):
    """Run the script's command line in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ppo_cartpole.py", *map(str, arguments)])
        status = 0
        try:
            cartpole.main()
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


QUICK = ["--total-timesteps", "2000", "--num-envs", "8", "--num-steps", "32", "--eval-episodes", "4"]


# ---- Same seed, same weights ----


def test_same_seed_same_weights(cartpole, small):
    runs = [cartpole.train(small(name, seed=seed)) for name, seed in (("a", 7), ("b", 7), ("c", 8))]
    one, same, other = (weights(small(name).run_dir) for name in "abc")
    assert_same_weights(one, same)
    assert without_clock(runs[0]) == without_clock(runs[1]) != without_clock(runs[2])
    assert not torch.equal(one["actor.0.weight"], other["actor.0.weight"])


def test_runs_share_no_environment(cartpole, small, monkeypatch):
    """Eight Acrobots, seeds 1 to 3, in training and in evaluation: no two begin in the same state."""
    states = []

    def make_envs(*arguments, make=cartpole.make_envs, **options):
        envs = make(*arguments, **options)
        reset = envs.reset
        envs.reset = lambda **seed: (result := reset(**seed), states.extend(map(tuple, result[0].tolist())))[0]
        return envs

    monkeypatch.setattr(cartpole, "make_envs", make_envs)
    sizes = {"env_id": "Acrobot-v1", "num_envs": 8, "num_steps": 8, "total_timesteps": 1, "eval_episodes": 8}
    for seed in (1, 2, 3):
        cartpole.train(small(f"seed{seed}", seed=seed, **sizes))
    assert len(states) == 3 * (8 + 8) == len(set(states))


def test_training_changes_the_weights(cartpole, small):
    cartpole.train(small())
    torch.manual_seed(1)
    fresh = cartpole.Agent(cartpole.make_envs(small(), 1), small()).state_dict()
    trained = weights(small().run_dir)
    assert all(not torch.equal(fresh[name], trained[name]) for name in fresh)


# ---- Checkpoint and resume ----


@pytest.mark.parametrize("interrupted_in", [2, 3])
def test_an_interrupted_run_ends_with_the_same_bits(cartpole, small, monkeypatch, interrupted_in):
    """Stopped in mid-iteration, resumed from the last checkpoint: weights, optimizer and metrics of an unbroken run."""
    options = {"total_timesteps": 700, "checkpoint_every": 2}
    whole = cartpole.train(small("whole", **options))
    assert len(whole) == 6
    calls = []

    def compute_gae(*arguments, function=cartpole.compute_gae):
        calls.append(1)
        if len(calls) == interrupted_in + 1:
            raise KeyboardInterrupt
        return function(*arguments)

    def add_scalar(writer, *point, function=SummaryWriter.add_scalar):
        function(writer, *point)
        writer.flush()  # so that what was logged after the checkpoint is in the file when the run breaks off

    with monkeypatch.context() as patch:
        patch.setattr(cartpole, "compute_gae", compute_gae)
        patch.setattr(SummaryWriter, "add_scalar", add_scalar)
        with pytest.raises(KeyboardInterrupt):
            cartpole.train(small("broken", **options))
    torch.rand(100)  # whatever else the process drew in between
    broken = small("broken").run_dir
    resumed = cartpole.train(cartpole.resumed_args(broken))
    assert without_clock(resumed) == without_clock(whole)
    one, other = (torch.load(Path(d) / "checkpoint.pt", weights_only=True) for d in (small("whole").run_dir, broken))
    assert_same_weights(one["agent"], other["agent"])
    for state, same in zip(one["optimizer"]["state"].values(), other["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(state[key], same[key]) for key in state)
    assert torch.equal(one["next_obs"], other["next_obs"]) and one["last_100"] == other["last_100"]
    clock = [row["seconds"] for row in resumed]
    assert clock == sorted(clock)
    events = EventAccumulator(broken)
    events.Reload()
    logged = [event.step for event in events.Scalars("losses/entropy")]
    assert logged == [row["global_step"] for row in whole]  # what came after the checkpoint is purged, not repeated


@pytest.mark.processes
def test_killed_at_any_moment_it_goes_on(cartpole, tmp_path):
    """SIGKILL to a real process, then --resume: the same weights as a run that was left alone."""
    sizes = {"total_timesteps": 60_000, "num_envs": 8, "num_steps": 32, "eval_episodes": 0, "checkpoint_every": 1}
    flags = [text for name, value in sizes.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, cartpole.__file__]
    process = subprocess.Popen(
        [*start, *flags, "--run-dir", tmp_path / "killed"], env=environment, stderr=subprocess.PIPE
    )
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    assert 0 < torch.load(checkpoint, weights_only=True)["global_step"] < 60_000
    resumed = subprocess.run([*start, "--resume", tmp_path / "killed"], env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    cartpole.train(cartpole.Args(**sizes, run_dir=str(tmp_path / "whole")))
    assert_same_weights(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_checkpoints_come_when_asked(cartpole, small, monkeypatch):
    saved = []
    monkeypatch.setattr(cartpole, "save", lambda path, content: saved.append(len(content["metrics"])))
    cartpole.train(small("two", total_timesteps=500, checkpoint_every=2))
    cartpole.train(small("none", total_timesteps=500, checkpoint_every=0))
    assert saved == [2, 4, 5, 5], saved  # every second iteration and the last; the last alone


def test_other_environments_resume_with_new_episodes(cartpole, small, monkeypatch):
    """SyncVectorEnv's episodes cannot be saved: the networks and the count go on, the episodes begin anew."""
    options = {"env_id": "ShortCartPoleSync-v1", "total_timesteps": 700, "checkpoint_every": 2}
    with monkeypatch.context() as patch:
        function, calls = cartpole.compute_gae, []

        def compute_gae(*arguments):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return function(*arguments)

        patch.setattr(cartpole, "compute_gae", compute_gae)
        with pytest.raises(KeyboardInterrupt):
            cartpole.train(small(**options))
    before = torch.load(Path(small().run_dir) / "checkpoint.pt", weights_only=True)
    assert before["envs"] is None and len(before["metrics"]) == 2
    metrics = cartpole.train(cartpole.resumed_args(small().run_dir))
    assert metrics[:2] == before["metrics"]
    assert metrics[-1]["global_step"] >= 700 > metrics[-2]["global_step"]
    assert max(row["charts/episodic_return"] for row in metrics) <= 12  # no episode spans the gap


def test_a_finished_run_can_be_resumed_for_its_summary(cartpole, small, capsys):
    metrics = cartpole.train(small())
    assert cartpole.train(cartpole.resumed_args(small().run_dir)) == metrics
    assert "not solved" in capsys.readouterr().out


def test_resume_keeps_the_settings(cartpole, small, command):
    cartpole.train(small(learning_rate=0.004))
    for rate in (0.1, 0.008):  # another value, and the one that is the script's default
        status, _, error = command("--resume", small().run_dir, "--learning-rate", rate)
        assert status == 2
        assert "learning_rate 0.004" in error and str(rate) in error and "Traceback" not in error
    status, out, _ = command("--resume", small().run_dir, "--eval-episodes", 3, "--save-model")
    assert status == 0 and "3 greedy episodes" in out and (Path(small().run_dir) / "model.pt").exists()


def test_a_taken_run_dir_is_refused(cartpole, small, command):
    cartpole.train(small())
    before = sorted(Path(small().run_dir).iterdir())
    status, _, error = command(*QUICK, "--run-dir", small().run_dir)
    assert status == 2 and f"--resume {small().run_dir} goes on with it" in error
    assert sorted(Path(small().run_dir).iterdir()) == before


def test_ctrl_c_says_how_to_go_on(cartpole, command, tmp_path, monkeypatch):
    def compute_gae(*arguments, function=cartpole.compute_gae, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return function(*arguments)

    monkeypatch.setattr(cartpole, "compute_gae", compute_gae)
    status, _, error = command(*QUICK, "--run-dir", tmp_path / "run", "--checkpoint-every", 1)
    assert status == 130
    assert f"--resume {tmp_path / 'run'}" in error and "Traceback" not in error


# ---- What a run leaves behind ----


def test_tensorboard_scalars(cartpole, small):
    """[D12] The customary names, one point an iteration, the values that train returned."""
    metrics = cartpole.train(small(total_timesteps=2000, eval_episodes=4))
    events = EventAccumulator(small().run_dir)
    events.Reload()
    customary = {
        "charts/episodic_return", "charts/episodic_length", "charts/return_100", "charts/SPS", "charts/learning_rate",
        "losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac",
        "losses/explained_variance", "charts/eval_return",
    }  # fmt: skip
    assert set(events.Tags()["scalars"]) == customary
    for name in customary:
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        returned = [(row["global_step"], row[name]) for row in metrics if name in row]
        assert len(logged) > 0
        assert [step for step, _ in logged] == [step for step, _ in returned]
        assert [value for _, value in logged] == pytest.approx([value for _, value in returned], rel=1e-5, abs=1e-7)


def test_default_command_line(command, tmp_path, monkeypatch):
    """A short run by the command line: run directory under runs/, summary, plot, model, all where it says they are."""
    monkeypatch.chdir(tmp_path)
    status, out, _ = command(*QUICK, "--save-model")
    assert status == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"CartPole-v1__ppo_cartpole__1__\d{8}-\d{6}-\d{6}", run_dir.name)
    assert (run_dir / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "not solved" in out and "4 greedy episodes" in out and "tensorboard --logdir runs" in out
    for path in re.findall(r"runs/\S+", out):
        assert (tmp_path / path).exists(), path
    assert not list(run_dir.glob("*.tmp"))
    for name in ("model.pt", "checkpoint.pt"):
        status, out, _ = command("--evaluate", run_dir / name, "--eval-episodes", 7)
        assert status == 0 and "7 greedy episodes" in out


def test_evaluation_of_a_saved_model_plays_that_model(cartpole, small, command, monkeypatch):
    """The saved weights, environment and width: a saved network that hardly prefers action 1 takes it every time."""
    actions, made = [], []

    def make_envs(args, *arguments, make=cartpole.make_envs, **options):
        envs = make(args, *arguments, **options)
        step = envs.step
        envs.step = lambda action: (actions.append(action.copy()), step(action))[1]
        made.append(args.env_id)
        return envs

    cartpole.train(small(hidden_size=16, save_model=True))
    run_dir = Path(small().run_dir)
    assert_same_weights(torch.load(run_dir / "model.pt", weights_only=True)["agent"], weights(run_dir))
    for name in ("model.pt", "checkpoint.pt"):
        saved = torch.load(run_dir / name, weights_only=True)
        saved["agent"]["actor.4.weight"].zero_()
        saved["agent"]["actor.4.bias"] = torch.tensor([0.0, 0.1])
        torch.save(saved, run_dir / name)
        monkeypatch.setattr(cartpole, "make_envs", make_envs)
        status, out, _ = command("--evaluate", run_dir / name, "--eval-episodes", 5)
        assert status == 0 and "5 greedy episodes" in out
        assert set(made) == {"ShortCartPole-v1"}
        assert len(actions) >= 8 and all((action == 1).all() for action in actions)
        actions.clear()
    status, _, error = command("--evaluate", run_dir / "model.pt", "--hidden-size", 8)
    assert status == 2 and "does not fit" in error


def test_evaluation_is_repeatable(cartpole, small):
    agent = cartpole.Agent(cartpole.make_envs(small(), 1), small())
    first, again = (cartpole.play(agent, small(seed=4), 30) for _ in range(2))
    assert first.tolist() == again.tolist() and len(set(first)) > 1


def test_summary_of_a_solved_run(cartpole, small, capsys, monkeypatch):
    """The first iteration whose last 100 episodes reached Gymnasium's threshold, and the mean of the evaluation."""
    import gymnasium

    monkeypatch.setattr(gymnasium.spec("ShortCartPole-v1"), "reward_threshold", 10.0)
    monkeypatch.setattr(cartpole, "play", lambda agent, args, episodes: np.arange(episodes))
    metrics = cartpole.train(small(total_timesteps=3000, eval_episodes=6))
    first = next(row for row in metrics if row.get("charts/return_100", 0) >= 10)
    assert first is not metrics[-1]
    out = capsys.readouterr().out
    assert f"reached 10 after {first['global_step']:,} steps" in out
    assert "6 greedy episodes: mean return 2.5, lowest 0.0" in out and metrics[-1]["charts/eval_return"] == 2.5
    for row in metrics:
        assert row["charts/SPS"] == pytest.approx(row["global_step"] / row["seconds"])


def test_train_sets_threads_and_determinism(cartpole, small):
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(2)
    cartpole.train(small())
    assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled()


def test_video(cartpole, small):
    cartpole.train(small(eval_episodes=1, capture_video=True))
    (video,) = (Path(small().run_dir) / "video").glob("*.mp4")
    import imageio.v3 as imageio

    frames = imageio.imread(video)
    assert 8 <= len(frames) <= 14 and frames.shape[1:] == (400, 600, 3)
    assert (frames[0] != frames[-1]).any()


class Odd(gym.Env):
    """An environment that takes no render_mode, cannot draw, and is odd from step 3 of its episodes on."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (2,), np.float64), gym.spaces.Discrete(2)

    def __init__(self, reward=1.0, seen=0.0, length=5):
        self.reward, self.seen, self.length, self.steps = reward, seen, length, 0

    def observe(self):
        return np.array([1.0, self.seen if self.steps >= 3 else 0.0])

    def reset(self, seed=None, options=None):
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        return self.observe(), self.reward if self.steps >= 3 else 1.0, self.steps == self.length, False, {}


class Drawn(Odd):
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode=None):
        super().__init__(length=0)
        self.render_mode = render_mode

    def render(self):
        return np.full((16, 16, 3), 20 * (self.steps % 10), dtype=np.uint8)


class Blank(Drawn):
    def render(self):
        return None


for name, maker, options in (
    ("Blank-v0", Blank, {}),
    ("Odd-v0", Odd, {}),
    ("NanReward-v0", Odd, {"reward": float("nan")}),
    ("InfObservation-v0", Odd, {"seen": float("inf")}),
    ("Endless-v0", Odd, {"length": 0}),
    ("Drawn-v0", Drawn, {}),
):
    if name not in gym.registry:
        gym.register(name, maker, kwargs=options)


def test_an_environment_without_render_mode_and_with_float64(cartpole, small):
    metrics = cartpole.train(small(env_id="Odd-v0", eval_episodes=2))
    assert metrics[-1]["charts/eval_return"] == 5 == metrics[-1]["charts/episodic_return"]


@pytest.mark.parametrize(
    ("env_id", "expected"),
    [
        ("NanReward-v0", "environment 0 returned nan in its reward, in step 3 of its episode"),
        ("InfObservation-v0", "environment 0 returned inf in its observation, in step 3 of its episode"),
    ],
)
def test_numbers_that_are_none_are_named(cartpole, small, env_id, expected):
    """In training, and in the evaluation of a network that was trained elsewhere."""
    args = small(env_id=env_id)
    with pytest.raises(cartpole.InputError, match=f"--env-id {env_id}: {expected}"):
        cartpole.train(args)
    with pytest.raises(cartpole.InputError, match=expected):
        cartpole.play(cartpole.Agent(cartpole.make_envs(args, 1), args), args, 2)


def test_the_second_environment_is_the_one_that_is_named(cartpole, small):
    observations = np.array([[0.0, 1.0], [2.0, np.nan]])
    with pytest.raises(cartpole.InputError, match="environment 1 returned nan in its observation, in step 8 "):
        cartpole.check_finite(small(), "observation", observations, [7, 8])
    cartpole.check_finite(small(), "observation", np.ones((2, 3), np.uint8), [7, 8])


def test_an_evaluation_that_never_ends_is_cut_and_says_so(cartpole, small, capsys):
    metrics = cartpole.train(small(env_id="Endless-v0", eval_episodes=3, eval_max_steps=40))
    assert metrics[-1]["charts/eval_return"] == 40
    assert "3 of 3 episodes were cut after 40 steps, --eval-max-steps" in capsys.readouterr().out


def test_a_film_that_never_ends_is_cut(cartpole, small):
    """The second film takes the place of the first, and nothing lies beside it."""
    import imageio.v3 as imageio

    args = small(env_id="Drawn-v0", eval_episodes=1, eval_max_steps=20, capture_video=True)
    cartpole.train(args)
    cartpole.evaluate(cartpole.Agent(cartpole.make_envs(args, 1), args), args, Path(args.run_dir))
    (video,) = (Path(args.run_dir) / "video").glob("*.mp4")
    assert 19 <= len(imageio.imread(video)) <= 21
    assert not list(Path(args.run_dir).glob("*.tmp"))


def test_a_film_of_what_cannot_draw_is_refused_before_training(cartpole, small, command, tmp_path, monkeypatch):
    flags = [*QUICK, "--capture-video", "--run-dir", tmp_path / "run"]
    for env_id in ("Odd-v0", "Blank-v0"):
        status, _, error = command(*flags, "--env-id", env_id)
        assert status == 2 and f"{env_id} cannot draw itself" in error and "Traceback" not in error
    monkeypatch.setitem(sys.modules, "moviepy", None)
    status, _, error = command(*flags)
    assert status == 2 and "pip install moviepy" in error
    assert not (tmp_path / "run").exists()


def test_track(cartpole, small, monkeypatch):
    """--track hands the run to wandb, with its settings, and wandb is imported only then."""
    calls = []
    fake = type(sys)("wandb")
    fake.init = lambda **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    cartpole.train(small("quiet"))
    assert calls == []
    cartpole.train(small("tracked", track=True, wandb_project="mine"))
    assert calls[0]["project"] == "mine" and calls[0]["sync_tensorboard"] is True
    assert calls[0]["config"]["total_timesteps"] == 300 and calls[0]["id"] == "tracked"


def test_import_is_inert(cartpole, tmp_path):
    """Importing makes no file, draws no random number, starts no threads setting, and stays off the slow libraries."""
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(cartpole.__file__).parent)!r})
import torch, random, numpy
torch.manual_seed(0); random.seed(0); numpy.random.seed(0)
before = (torch.get_rng_state().sum(), random.getstate(), str(numpy.random.get_state()), torch.get_num_threads(),
          torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
import {Path(cartpole.__file__).stem} as script
after = (torch.get_rng_state().sum(), random.getstate(), str(numpy.random.get_state()), torch.get_num_threads(),
         torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
assert before == after
assert not os.listdir(".")
slow = [name for name in ("tensorboard", "matplotlib", "tyro", "wandb", "moviepy", "pygame") if name in sys.modules]
assert not slow, slow
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ---- Flags and messages ----


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--env-id Pendulum-v1", ["Pendulum-v1", "Box", "Discrete", "Gaussian"]),
        ("--env-id FrozenLake-v1", ["FrozenLake-v1", "Discrete(16)", "flat"]),
        ("--env-id NoSuchThing-v0", ["NoSuchThing"]),
        ("--env-id nowhere:Thing-v0", ["nowhere"]),
        ("--num-envs 0", ["num_envs", "0"]),
        ("--gamma 1.5", ["gamma", "1.5", "between 0 and 1"]),
        ("--gae-lambda -0.1", ["gae_lambda", "-0.1"]),
        ("--learning-rate nan", ["learning_rate", "nan"]),
        ("--target-kl 0", ["target_kl"]),
        ("--seed -1", ["seed", "-1"]),
        ("--num-envs 2 --num-steps 2 --num-minibatches 8", ["num_minibatches 8", "the 2 transitions"]),
        ("--total-timesteps many", ["--total-timesteps", "many"]),
        ("--no-such-flag 1", ["--no-such-flag"]),
        ("--device nowhere", ["--device nowhere"]),
        ("--evaluate missing.pt", ["missing.pt"]),
        ("--resume missing", ["missing"]),
        ("--resume a --evaluate b", ["exclude"]),
        ("--evaluate a --save-model", ["save_model"]),
        ("--seed 99999999999999999999", ["seed must be below"]),
        ("--resume a --run-dir b", ["run_dir b"]),
        ("--capture-video --eval-episodes 0", ["eval_episodes"]),
    ],
)
def test_bad_flags(command, tmp_path, monkeypatch, flags, expected):
    """One clear sentence, exit status 2, no traceback, nothing left behind."""
    monkeypatch.chdir(tmp_path)
    status, _, error = command(*flags.split())
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", error).split())
    assert status == 2
    for word in expected:
        assert word in words, (word, words)
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint(cartpole, command, tmp_path, content):
    """Empty, foreign, or a pickle that would run code: refused in one sentence, and the code does not run."""
    path = tmp_path / "checkpoint.pt"
    if content is None:
        torch.save({"args": {}, "agent": Bomb(tmp_path / "exploded")}, path)
    else:
        path.write_bytes(content)
    for flags in (("--evaluate", path), ("--resume", tmp_path)):
        status, _, error = command(*flags)
        assert status == 2 and str(path) in error and "Traceback" not in error
    assert not (tmp_path / "exploded").exists()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_wandb_missing(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, _, error = command(*QUICK, "--track", "--run-dir", tmp_path / "run")
    assert status == 2 and "pip install wandb" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", ["", "--num-minibatches 1 --update-epochs 1"])
def test_a_diverging_run_says_so(command, tmp_path, flags):
    run_dir = tmp_path / "run"
    status, _, error = command(*QUICK, "--run-dir", run_dir, "--learning-rate", 1e38, *flags.split())
    assert status == 2 and "lower --learning-rate" in error and "Traceback" not in error


def test_a_run_dir_that_cannot_be_written(command, tmp_path):
    (tmp_path / "file").write_text("in the way")
    status, _, error = command(*QUICK, "--run-dir", tmp_path / "file" / "run")
    assert status == 2 and str(tmp_path / "file") in error and "Traceback" not in error


def test_a_model_is_no_checkpoint(cartpole, small, command, tmp_path):
    cartpole.train(small(save_model=True))
    (tmp_path / "other").mkdir()
    (Path(small().run_dir) / "model.pt").rename(tmp_path / "other" / "checkpoint.pt")
    status, _, error = command("--resume", tmp_path / "other")
    assert status == 2 and "no checkpoint" in error and "Traceback" not in error


def test_help_explains_every_flag(cartpole, command):
    """The comment on each field's line is its help."""
    status, out, _ = command("--help")
    assert status == 0
    words = re.sub(r"[│\s]+", " ", out)
    source = Path(cartpole.__file__).read_text(encoding="utf-8")
    for field in fields(cartpole.Args):
        assert f"--{field.name.replace('_', '-')}" in out, field.name
        comment = re.search(rf"^    {field.name}: .*?  # (.+)$", source, re.MULTILINE).group(1)
        assert comment.split(";")[0][:30] in words, comment
    assert len(fields(cartpole.Args)) > 25


def test_args_are_frozen(cartpole):
    with pytest.raises(AttributeError):
        cartpole.Args().seed = 2
    assert replace(cartpole.Args(), seed=2).seed == 2
