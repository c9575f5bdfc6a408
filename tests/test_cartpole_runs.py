"""Runs of ppo_cartpole as a person meets them: files, evaluation, flags, messages, exit statuses."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def weights(run_dir):
    return torch.load(Path(run_dir) / "model.pt", weights_only=True)["agent"]


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


# ---- What a run leaves behind ----


def test_a_taken_run_dir_is_refused(cartpole, small, command):
    cartpole.train(small())
    before = sorted(Path(small().run_dir).iterdir())
    status, _, error = command(*QUICK, "--run-dir", small().run_dir)
    assert status == 2 and f"--run-dir {small().run_dir} exists: choose another" in error
    assert sorted(Path(small().run_dir).iterdir()) == before


def test_ctrl_c_ends_without_a_traceback(cartpole, command, tmp_path, monkeypatch):
    def compute_gae(*arguments, function=cartpole.compute_gae, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return function(*arguments)

    monkeypatch.setattr(cartpole, "compute_gae", compute_gae)
    status, _, error = command(*QUICK, "--run-dir", tmp_path / "run")
    assert status == 130
    assert "interrupted" in error and "Traceback" not in error


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


@pytest.mark.picture
def test_default_command_line(command, tmp_path, monkeypatch):
    """A short run by the command line: run directory under runs/, summary, plot, model, all where it says they are."""
    monkeypatch.chdir(tmp_path)
    status, out, _ = command(*QUICK)
    assert status == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"CartPole-v1__ppo_cartpole__1__\d{8}-\d{6}-\d{6}", run_dir.name)
    assert (run_dir / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "not solved" in out and "4 greedy episodes" in out and "tensorboard --logdir runs" in out
    for path in re.findall(r"runs/\S+", out):
        assert (tmp_path / path).exists(), path
    assert not list(run_dir.glob("*.tmp"))


@pytest.mark.parametrize("env_id", ["ShortCartPole-v1", "Odd-v0"])
def test_the_command_that_the_summary_gives_works(cartpole, small, command, capsys, env_id):
    """Word by word, for an environment that is not the default and for one that cannot draw."""
    cartpole.train(small(env_id=env_id, hidden_size=16))
    (line,) = re.findall(r"^next +(.+)$", capsys.readouterr().out, re.MULTILINE)
    python, script, *arguments = shlex.split(line)
    assert (python, script) == ("python", "ppo_cartpole.py")
    status, out, _ = command(*arguments)
    assert status == 0 and "100 greedy episodes" in out


def test_evaluation_of_a_saved_model_plays_that_model(cartpole, small, command, monkeypatch):
    """The saved weights, environment and width: a saved network that hardly prefers action 1 takes it every time."""
    actions, made = [], []

    def make_envs(args, *arguments, make=cartpole.make_envs, **options):
        envs = make(args, *arguments, **options)
        step = envs.step
        envs.step = lambda action: (actions.append(action.copy()), step(action))[1]
        made.append(args.env_id)
        return envs

    cartpole.train(small(hidden_size=16))
    path = Path(small().run_dir) / "model.pt"
    saved = torch.load(path, weights_only=True)
    saved["agent"]["actor.4.weight"].zero_()
    saved["agent"]["actor.4.bias"] = torch.tensor([0.0, 0.1])
    torch.save(saved, path)
    monkeypatch.setattr(cartpole, "make_envs", make_envs)
    status, out, _ = command("--evaluate", path, "--eval-episodes", 5)
    assert status == 0 and "5 greedy episodes" in out
    assert set(made) == {"ShortCartPole-v1"}
    assert len(actions) >= 8 and all((action == 1).all() for action in actions)


def test_a_model_that_does_not_fit_is_refused(cartpole, small, command):
    """Another width or environment than the saved one by flag, or weights of other sizes than the file says."""
    cartpole.train(small(hidden_size=16))
    path = Path(small().run_dir) / "model.pt"
    for flags, expected in (
        (("--hidden-size", 8), "does not fit hidden_size 8: it was trained with 16"),
        (("--env-id", "Acrobot-v1"), "does not fit env_id Acrobot-v1: it was trained with ShortCartPole-v1"),
    ):
        status, _, error = command("--evaluate", path, *flags)
        assert status == 2 and f"{path} {expected}" in error
    saved = torch.load(path, weights_only=True)
    saved["args"]["hidden_size"] = 8
    torch.save(saved, path)
    status, _, error = command("--evaluate", path)
    assert status == 2 and f"{path} does not fit --env-id ShortCartPole-v1" in error and "Traceback" not in error


def test_a_saved_model_is_the_trained_one(cartpole, small, monkeypatch):
    played = []

    def play(agent, *arguments):
        played.append({name: weight.clone() for name, weight in agent.state_dict().items()})
        return np.zeros(1)

    monkeypatch.setattr(cartpole, "play", play)
    cartpole.train(small(eval_episodes=1))
    cartpole.evaluate_saved(cartpole.Args(evaluate=f"{small().run_dir}/model.pt"))
    assert len(played) == 2
    for agent in played:
        assert_same_weights(agent, weights(small().run_dir))


def test_evaluation_is_repeatable(cartpole, small):
    agent = cartpole.Agent(cartpole.make_envs(small(), 1), small())
    agent.actor[-1].bias.data.copy_(torch.tensor([0.0, 1.0]))  # pushes to the right until the pole falls
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
        cartpole.check_finite(small(), [7, 8], observation=observations)
    cartpole.check_finite(small(), [7, 8], observation=np.ones((2, 3), np.uint8))


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
        ("--num-envs 0", ["num_envs must be above 0, got 0"]),
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
        ("--evaluate a --run-dir b", ["exclude"]),
        ("--evaluate a --track", ["exclude"]),
        ("--resume runs/RUN", ["--resume no longer exists", "start it again"]),
        ("--checkpoint-every 10", ["--checkpoint-every no longer exists", "model.pt"]),
        ("--checkpoint_every=10", ["--checkpoint-every no longer exists", "model.pt"]),
        ("--save-model", ["--save-model no longer exists", "model.pt"]),
        ("--seed 99999999999999999999", ["seed must be below"]),
        ("--vf-coef -1", ["vf_coef must not be negative, got -1.0"]),
        ("--target-kl nan", ["target_kl must be above 0, got nan"]),
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


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_damaged_model(command, tmp_path, content):
    """Empty, foreign, or a pickle that would run code: refused in one sentence, and the code does not run."""
    path = tmp_path / "model.pt"
    if content is None:
        torch.save({"args": {}, "agent": Bomb(tmp_path / "exploded")}, path)
    else:
        path.write_bytes(content)
    status, _, error = command("--evaluate", path)
    assert status == 2 and f"{path} is not a model of this script" in error and "Traceback" not in error
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


@pytest.mark.slow
def test_help_on_a_terminal_that_lacks_letters(cartpole):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = subprocess.run([sys.executable, cartpole.__file__, "--help"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and run.stderr == "" and "GAE's ?" in run.stdout


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
