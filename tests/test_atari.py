"""ppo_atari.py against the real emulator: preprocessing, what is a transition, what is logged, several processes."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from contract import ROOT, load_script


@pytest.fixture
def small(atari, tmp_path):
    """Args of a short run of four games, less what the test changes."""

    def make(name="run", **changes):
        defaults = {
            "env_id": "ALE/Breakout-v5",
            "total_timesteps": 500,
            "num_envs": 4,
            "num_steps": 64,
            "num_minibatches": 2,
            "update_epochs": 1,
            "eval_episodes": 0,
            "checkpoint_every": 0,
            "torch_threads": 1,
            "run_dir": str(tmp_path / name),
        }
        return atari.Args(**{**defaults, **changes})

    return make


def act(envs, seed=0, steps=50, action=None):
    """Steps of random actions (or always the same): a list of (obs, reward, terminated, truncated, info)."""
    generator = np.random.default_rng(seed)
    size, actions = envs.num_envs, int(envs.single_action_space.n)
    draw = lambda: generator.integers(actions, size=size) if action is None else np.full(size, action)  # noqa: E731
    return [envs.step(draw()) for _ in range(steps)]


# ---- Preprocessing ----


@pytest.mark.slow
def test_no_op_starts(atari, small):
    """[D14] Games begin after 1 to 30 frames of nothing, a number that differs; without it all begin alike."""
    envs = atari.make_envs(small(env_id="ALE/Pong-v5"), 12)
    frames = envs.reset(seed=0)[1]["episode_frame_number"]
    assert len(set(frames.tolist())) > 5 and frames.min() >= 1 and frames.max() <= 33
    still = atari.make_envs(small(env_id="ALE/Pong-v5"), 12, noop_max=0).reset(seed=0)[1]["episode_frame_number"]
    assert len(set(still.tolist())) == 1


def test_four_frames_a_step_and_the_maximum_of_the_last_two(atari, small):
    """[D15] Pixel by pixel against ALE itself, stepped a frame at a time with the same action."""
    start = {"noop_max": 0, "use_fire_reset": False, "img_height": 210, "img_width": 160}
    envs = atari.make_envs(small(env_id="ALE/Pong-v5"), 1, **start)
    single = gym.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0, obs_type="grayscale")
    envs.reset(seed=3)
    single.reset(seed=3)
    differing_frames = 0
    for step in range(60):
        action = step % 6
        frames = [single.step(action)[0] for _ in range(4)]
        obs, _, _, _, info = envs.step(np.array([action]))
        assert np.array_equal(obs[0, -1], np.maximum(frames[2], frames[3]))
        assert info["episode_frame_number"][0] == single.unwrapped.ale.getEpisodeFrameNumber()
        differing_frames += not np.array_equal(frames[2], frames[3])
    assert differing_frames > 10


def test_observations(atari, small):
    """[D18], [D20] (4, 84, 84) grey bytes; the three older frames are the last observation's three newer ones."""
    envs = atari.make_envs(small(), 3)
    obs, _ = envs.reset(seed=0)
    assert obs.shape == (3, 4, 84, 84) and obs.dtype == np.uint8
    moved = 0
    for next_obs, *_ in act(envs, steps=30):
        assert np.array_equal(next_obs[:, :3], obs[:, 1:])
        moved += not np.array_equal(next_obs[:, 3], obs[:, 3])
        obs = next_obs
    assert moved > 20


@pytest.mark.slow
def test_a_lost_life_is_terminal_and_the_game_goes_on(atari, small):
    """[D16] terminated with lives left; the next step is real. Only a game's end is followed by an autoreset."""
    envs = atari.make_envs(small(), 8)
    _, info = envs.reset(seed=0)
    frame, was_over = info["episode_frame_number"], np.zeros(8, dtype=bool)
    lost_lives = games = 0
    for _, _, terminated, truncated, info in act(envs, steps=300):
        is_autoreset = info["episode_frame_number"] < frame  # the emulator's own count says which step was a reset
        assert np.array_equal(is_autoreset, was_over)
        was_over = atari.is_game_over(terminated, truncated, info)
        lost_lives += int((terminated & ~was_over).sum())
        games += int(was_over.sum())
        frame = info["episode_frame_number"]
    assert lost_lives > 3 * games > 0
    whole = atari.make_envs(small(episodic_life=False), 8)
    whole.reset(seed=0)
    steps = act(whole, steps=100)
    assert min(info["lives"].min() for *_, info in steps) < 5  # lives are lost here too
    assert not np.any([terminated & (info["lives"] > 0) for _, _, terminated, _, info in steps])


@pytest.mark.slow
def test_fire_on_reset(atari, small):
    """[D17] Breakout waits for FIRE. With the button pressed for us the ball is lost even if we do nothing.

    One ball: at a lost life nobody presses it for us, hence 4 lives for ever (the docstring's "Departs").
    """
    lives = {}
    for fire in (True, False):
        envs = atari.make_envs(small(), 2, use_fire_reset=fire)
        envs.reset(seed=0)
        lives[fire] = act(envs, steps=400, action=0)[-1][4]["lives"].tolist()
    assert lives == {True: [4, 4], False: [5, 5]}


@pytest.mark.slow
def test_sticky_actions(atari, small):
    """0 by default: same seed and actions, same game. gym.make's own default is 0.25, a trap."""
    assert gym.spec("ALE/Pong-v5").kwargs["repeat_action_probability"] == 0.25
    ends = []
    for sticky in (0.0, 0.0, 0.25):
        envs = atari.make_envs(small(sticky=sticky), 4)
        envs.reset(seed=0)
        ends.append(act(envs, steps=100)[-1][0])
    assert np.array_equal(ends[0], ends[1]) and not np.array_equal(ends[0], ends[2])
    assert atari.Args().sticky == 0


# ---- Network ----


def test_network(atari, small):
    """[D21] One trunk for both heads, Nature's sizes; [D22] it sees pixels between 0 and 1."""
    args = small(bf16=False)
    agent = atari.Agent(atari.make_envs(args, 1), args)
    seen = []
    agent.trunk.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    obs = torch.randint(0, 256, (5, 84, 84, 4), dtype=torch.uint8)
    obs[0, 0, 0, :2] = torch.tensor([0, 255])
    logits, values = agent(obs)
    assert logits.shape == (5, 4) and values.shape == (5,)
    assert float(seen[0].detach().min()) == 0 and float(seen[0].detach().max()) == 1
    assert torch.allclose(seen[0], obs.permute(0, 3, 1, 2) / 255)  # frames are channels, rows rows
    assert sum(p.numel() for p in agent.trunk.parameters()) == 1_684_128
    values.sum().backward()
    assert all(p.grad is not None for p in agent.trunk.parameters()) and agent.actor.weight.grad is None
    assert (logits.softmax(-1) - 0.25).abs().max() < 0.01  # nearly uniform at first


def test_bfloat16_is_close_and_its_heads_are_float32(atari, small):
    """Same weights, both precisions: what they predict differs by less than a hundredth."""
    envs = atari.make_envs(small(), 4)
    obs = torch.from_numpy(envs.reset(seed=0)[0]).permute(0, 2, 3, 1)
    torch.manual_seed(0)
    exact = atari.Agent(envs, small(bf16=False))
    half = atari.Agent(envs, small(bf16=True))
    half.load_state_dict(exact.state_dict())
    for precise, rough in zip(exact(obs), half(obs), strict=True):
        assert rough.dtype == torch.float32
        assert 0 < (precise - rough).abs().max() < 0.01 + 0.02 * precise.abs().max()


# ---- Loop ----


@pytest.fixture
def watch(atari, monkeypatch):
    """Train and keep the emulator's steps, the arguments of the equations, losses, optimizer steps."""

    def run(args):
        seen = SimpleNamespace(steps=[], gae=[], policy=[], value=[], kl=[], entropy=[], losses=[], optimizer=[])
        seen.args = args

        def make_envs(*arguments, make=atari.make_envs, **options):
            envs = make(*arguments, **options)
            step = envs.step

            def watched_step(actions):
                result = step(actions)
                names = ("actions", "next_obs", "reward", "terminated", "truncated", "frame", "lives")
                values = (actions, *result[:4], result[4]["episode_frame_number"], result[4]["lives"])
                seen.steps.append({name: np.array(value) for name, value in zip(names, values)})
                return result

            envs.step = watched_step
            return envs

        def keep(name, into):
            function = getattr(atari, name)

            def watched(*arguments):
                result = function(*arguments)
                kept = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
                numbers = tuple(x.detach() for x in result) if isinstance(result, tuple) else result.detach()
                into.append(SimpleNamespace(arguments=kept, result=numbers))
                return result

            return watched

        class Adam(torch.optim.Adam):
            def __init__(self, parameters, **options):
                super().__init__(parameters, **options)
                seen.adam = options

            def step(self):
                gradients = [p.grad for group in self.param_groups for p in group["params"]]
                norm = torch.stack([g.norm() for g in gradients]).norm().item()
                seen.optimizer.append(SimpleNamespace(lr=self.param_groups[0]["lr"], norm=norm))
                super().step()

        def backward(loss, function=torch.Tensor.backward):
            seen.losses.append(loss.item())
            function(loss)

        with monkeypatch.context() as patch:
            patch.setattr(atari, "make_envs", make_envs)
            patch.setattr(torch.optim, "Adam", Adam)
            patch.setattr(torch.Tensor, "backward", backward)
            for name, into in (
                ("compute_gae", seen.gae),
                ("clipped_policy_loss", seen.policy),
                ("clipped_value_loss", seen.value),
                ("approx_kl", seen.kl),
                ("action_logprob_and_entropy", seen.entropy),
            ):
                patch.setattr(atari, name, keep(name, into))
            seen.metrics = atari.train(args)
        seen.record = {name: np.array([step[name] for step in seen.steps]) for name in seen.steps[0]}
        frame = seen.record["frame"]
        seen.is_transition = np.concatenate([np.ones_like(frame[:1], dtype=bool), frame[1:] > frame[:-1]])
        return seen

    return run


@pytest.mark.slow
def test_transitions_rewards_and_scores(watch, small):
    """[D19] Signs are learned from, true points are logged; life ends cut advantages; autoreset rows are left out."""
    seen = watch(small(env_id="ALE/MsPacman-v5", total_timesteps=3500, num_envs=4, num_steps=128))
    points = seen.record["reward"]
    assert points.max() >= 10
    counted = 0
    for index, (gae, row) in enumerate(zip(seen.gae, seen.metrics, strict=True)):
        rows = slice(128 * index, 128 * (index + 1))
        rewards, values, next_values, terminated, done, *_ = gae.arguments
        assert torch.equal(rewards, torch.from_numpy(np.sign(points[rows])).float())
        assert torch.equal(terminated, torch.from_numpy(seen.record["terminated"][rows]))
        assert torch.equal(done, terminated | torch.from_numpy(seen.record["truncated"][rows]))
        assert torch.equal(values[1:], next_values[:-1])
        counted += int(seen.is_transition[rows].sum())
        assert row["global_step"] == counted
        batch = sum(len(call.arguments[2]) for call in seen.policy[2 * index : 2 * index + 2])
        assert batch == seen.is_transition[rows].sum()
    assert 0 < (~seen.is_transition).sum() < 50
    lives_lost = seen.record["terminated"] & (seen.record["lives"] > 0)
    assert lives_lost.any()
    scores, score = [], np.zeros(4)
    for t in range(len(points)):
        score[~seen.is_transition[t]] = 0
        score += points[t]
        over = seen.record["terminated"][t] & (seen.record["lives"][t] == 0)
        scores += [(t // 128, score[i]) for i in np.flatnonzero(over)]
    assert len(scores) >= 3
    for index, row in enumerate(seen.metrics):
        here = [score for when, score in scores if when == index]
        assert row.get("charts/episodic_return") == (pytest.approx(np.mean(here)) if here else None)


@pytest.mark.parametrize("slow", [torch.bfloat16, torch.float32])
def test_bfloat16_where_it_is_faster(atari, small, slow, monkeypatch, capsys):
    """A CPU that has no instructions for one of the two types is slow in it: the other one is taken, and it is said."""
    real = torch.nn.Conv2d.forward

    def forward(layer, x):
        result = real(layer, x)
        if result.dtype is slow:
            time.sleep(0.5)  # far more than the other type takes, whatever this machine is
        return result

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    torch.manual_seed(1)
    chosen = atari.without_slow_bf16(small(), "cpu")
    assert chosen.bf16 is (slow is torch.float32)
    assert chosen == small(bf16=chosen.bf16)
    assert ("bf16        off: float32 is" in capsys.readouterr().out) is (slow is torch.bfloat16)
    number = torch.rand(())
    torch.manual_seed(1)
    assert number == torch.rand(())  # the run's random numbers are not used up
    assert atari.without_slow_bf16(small(bf16=False), "cpu").bf16 is False


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 0.02)])
def test_first_update_identities(watch, small, bf16, tolerance):
    """Ratio 1, KL 0 before the first step: the rollout and the update see the same network in the same precision."""
    seen = watch(small(total_timesteps=1, num_minibatches=1, bf16=bf16))
    logprob, old_logprob, advantage, _ = seen.policy[0].arguments
    assert len(logprob) > 200
    assert ((logprob - old_logprob).exp() - 1).abs().max() < tolerance
    assert abs(seen.metrics[0]["losses/approx_kl"]) < tolerance**2
    assert seen.metrics[0]["losses/clipfrac"] == 0
    assert abs(float(advantage.mean())) < 1e-5 and float(advantage.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert seen.metrics[0]["losses/entropy"] == pytest.approx(np.log(4), abs=1e-2)


@pytest.mark.slow
def test_every_value_is_that_of_the_observation_in_its_row(watch, atari, small):
    """Across rollouts too: a network that does not move, asked again about every observation that the emulator gave."""
    seen = watch(small(num_steps=40, total_timesteps=450, bf16=False, learning_rate=1e-12))
    saved = torch.load(Path(seen.args.run_dir) / "checkpoint.pt", weights_only=True)
    agent = atari.Agent(atari.make_envs(seen.args, 1), seen.args)
    agent.load_state_dict(saved["agent"])
    assert len(seen.gae) == 3
    with torch.no_grad():
        own = torch.stack([agent(torch.from_numpy(obs).permute(0, 2, 3, 1))[1] for obs in seen.record["next_obs"]])
    values, next_values = (torch.cat([call.arguments[i] for call in seen.gae]) for i in (1, 2))
    torch.testing.assert_close(next_values, own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values[1:], own[:-1], rtol=1e-4, atol=1e-5)
    assert own.std() > 1e-3
    counts = np.bincount(seen.record["actions"].ravel(), minlength=4)
    assert counts.min() > counts.sum() / 6  # drawn from a policy that is nearly uniform


def test_update(watch, small):
    """The loop is a copy of CartPole's, whose facts are held here in one: [D3], [D4], [D6], [D10] to [D12]."""
    shares = {"ent_coef": 0.3, "vf_coef": 0.7, "clip_coef": 0.3, "anneal_clip": True, "learning_rate": 1e-3}
    seen = watch(small(bf16=False, num_minibatches=3, update_epochs=2, max_grad_norm=0.05, **shares))
    assert len(seen.metrics) == 2 and len(seen.losses) == len(seen.optimizer) == 12
    entropies = [call.result[1].mean() for call in seen.entropy if len(call.arguments[1]) > 4]
    for loss, policy, value, entropy in zip(seen.losses, seen.policy, seen.value, entropies, strict=True):
        assert loss == pytest.approx(float(policy.result - 0.3 * entropy + 0.7 * value.result), rel=1e-5)
    assert seen.adam["eps"] == 1e-5
    assert [step.norm for step in seen.optimizer] == pytest.approx([0.05] * 12, rel=1e-3)
    done_before = 0
    for index, (gae, row) in enumerate(zip(seen.gae, seen.metrics, strict=True)):
        here, share = slice(6 * index, 6 * index + 6), 1 - done_before / 500
        assert [step.lr for step in seen.optimizer[here]] == pytest.approx([1e-3 * share] * 6)
        for loss in (seen.policy, seen.value):
            assert [call.arguments[3] for call in loss[here]] == pytest.approx([0.3 * share] * 6)
        chosen = torch.from_numpy(seen.is_transition[64 * index : 64 * (index + 1)])
        expected = (gae.result + gae.arguments[1])[chosen].sort().values
        epochs = [torch.cat([call.arguments[2] for call in seen.value[i : i + 3]]) for i in (6 * index, 6 * index + 3)]
        for epoch in epochs:
            torch.testing.assert_close(epoch.sort().values, expected)
        assert not torch.equal(*epochs)
        for name, calls in (("policy_loss", seen.policy), ("value_loss", seen.value), ("approx_kl", seen.kl)):
            mean = np.mean([float(call.result) for call in calls[here]])
            assert row[f"losses/{name}"] == pytest.approx(mean, rel=1e-4, abs=1e-7)
        done_before = row["global_step"]


def test_gradients_do_not_pile_up(watch, small):
    """Each step's gradient is its own minibatch's: with a frozen network all are of one size."""
    frozen = {"learning_rate": 1e-12, "num_minibatches": 1, "update_epochs": 3, "max_grad_norm": 1e6}
    norms = [step.norm for step in watch(small(bf16=False, total_timesteps=1, **frozen)).optimizer]
    assert len(norms) == 3 and norms == pytest.approx([norms[0]] * 3, rel=1e-3)


def test_target_kl_stops_the_epochs(watch, small):
    """Per minibatch, before the step is taken, all epochs that are left with it."""
    seen = watch(small(bf16=False, total_timesteps=1, update_epochs=20, learning_rate=2e-3, target_kl=0.001))
    kls = [call.result.item() for call in seen.kl]
    assert kls[-1] > 0.001 >= max(kls[:-1])
    assert 1 <= len(seen.optimizer) == len(kls) - 1 < 40


@pytest.mark.slow
def test_runs_share_no_game(atari, small, monkeypatch):
    """The seeds of the emulators, game i's being i more than the first's: of two runs' training and evaluation."""
    seeds = []

    def make_envs(*arguments, make=atari.make_envs, **options):
        envs = make(*arguments, **options)
        reset = envs.reset
        envs.reset = lambda seed: (seeds.extend(range(seed, seed + envs.num_envs)), reset(seed=seed))[1]
        return envs

    monkeypatch.setattr(atari, "make_envs", make_envs)
    for seed in (1, 2):
        args = small(f"seed{seed}", seed=seed, total_timesteps=1)
        atari.train(args)
        with monkeypatch.context() as patch:
            patch.setattr(atari, "is_game_over", lambda terminated, *_: np.ones(len(terminated), dtype=bool))
            atari.play(atari.Agent(make_envs(args, 1), args), args, 4)
    assert len(seeds) == 2 * (4 + 4) == len(set(seeds))


@pytest.mark.slow
def test_same_seed_same_weights(atari, small):
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):  # two rollouts each
        atari.train(small(name, seed=seed, num_steps=32, total_timesteps=250))
        states.append(torch.load(Path(small(name).run_dir) / "checkpoint.pt", weights_only=True)["agent"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["actor.weight"], states[2]["actor.weight"])


@pytest.mark.slow
def test_resume_evaluate_video(atari, small, monkeypatch, capsys, tmp_path):
    """Interrupted, resumed with new games, judged by whole games, filmed."""
    calls = []

    def compute_gae(*arguments, function=atari.compute_gae):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return function(*arguments)

    options = {"total_timesteps": 500, "num_steps": 32, "checkpoint_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(atari, "compute_gae", compute_gae)
        with pytest.raises(KeyboardInterrupt):
            atari.train(small(**options))
    checkpoint, optimizers = f"{small().run_dir}/checkpoint.pt", []

    class Adam(torch.optim.Adam):
        def load_state_dict(self, state):
            super().load_state_dict(state)
            optimizers.append(self)

    saved = torch.load(checkpoint, weights_only=True)
    begun = {}

    def first_gae(*arguments, function=atari.compute_gae):
        if not begun:
            optimizer = optimizers[0]
            begun["weights"] = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
            begun["steps"] = int(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"])
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "Adam", Adam)
        patch.setattr(atari, "compute_gae", first_gae)
        metrics = atari.train(atari.resumed_args(small().run_dir))
    assert [row["global_step"] for row in metrics] == [128, 256, 384, 512]
    assert begun["steps"] == 4  # two rollouts of two minibatches
    for weight, kept in zip(begun["weights"], saved["agent"].values(), strict=True):
        assert torch.equal(weight, kept)
    judged = small(**options, run_dir=None, evaluate=checkpoint, eval_episodes=1, capture_video=True)
    returns = atari.evaluate_saved(judged)
    assert returns.shape == (1,) and 0 <= returns[0] < 100
    import imageio.v3 as imageio

    frames = imageio.imread(tmp_path / "run" / "video" / "game.mp4")
    assert len(frames) > 80 and frames.shape[1:] == (630, 480, 3)
    assert len(np.unique(frames[50].reshape(-1, 3), axis=0)) > 3  # in colour
    assert "1 games" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluation_counts_whole_first_games(atari, small, monkeypatch):
    """Actions drawn, true points, each environment's first game to its end and no second one."""
    steps = []

    def make_envs(*arguments, make=atari.make_envs, **options):
        envs = make(*arguments, **options)
        step = envs.step

        def watched_step(actions):
            result = step(actions)
            steps.append((actions, result[1], result[2] & (result[4]["lives"] == 0)))
            return result

        envs.step = watched_step
        return envs

    args = small(env_id="ALE/MsPacman-v5")
    agent = atari.Agent(make_envs(args, 1), args)
    monkeypatch.setattr(atari, "make_envs", make_envs)
    returns = atari.play(agent, args, 10)
    actions, points, over = (np.array(column) for column in zip(*steps))
    ends = over.argmax(axis=0)
    assert over.any(axis=0).all() and ends.min() + 50 < ends.max() == len(steps) - 1
    assert returns.tolist() == [points[: end + 1, i].sum() for i, end in enumerate(ends)]
    assert not np.array_equal(returns, points.sum(axis=0))  # a second game would have been counted
    assert len(np.unique(actions)) == 9


@pytest.mark.slow
def test_a_saved_model_is_the_trained_one_and_is_what_plays(atari, small, monkeypatch):
    played = []

    def play(agent, *arguments, **options):
        played.append({name: weight.clone() for name, weight in agent.state_dict().items()})
        return np.zeros(1)

    monkeypatch.setattr(atari, "play", play)
    args = small(total_timesteps=1, save_model=True, eval_episodes=1)
    atari.train(args)
    atari.evaluate_saved(atari.replace(args, run_dir=None, save_model=False, evaluate=f"{args.run_dir}/model.pt"))
    trained = torch.load(Path(args.run_dir) / "checkpoint.pt", weights_only=True)["agent"]
    assert len(played) == 2
    for weights in played:
        assert all(torch.equal(weights[name], weight) for name, weight in trained.items())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--env-id CartPole-v1", "no Atari game"),
        ("--env-id ALE/NoSuchGame-v5", "NoSuchGame"),
        ("--device cuda:7", "--device cuda:7"),
        ("--sticky 2", "sticky"),
        ("--resume nowhere", "nowhere"),
    ],
)
def test_bad_flags(atari, tmp_path, monkeypatch, capsys, flags, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ppo_atari.py", *flags.split()])
    with pytest.raises(SystemExit) as error:
        atari.main()
    assert error.value.code == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_rom(atari, small, monkeypatch, tmp_path):
    monkeypatch.setenv("ALE_ROMS_DIR", str(tmp_path))
    with pytest.raises(atari.InputError, match=r"--env-id ALE/Breakout-v5: its ROM is not available: .*breakout.bin"):
        atari.make_envs(small(), 1)


def test_the_speed_benchmark_goes_on_where_a_program_fails(monkeypatch, tmp_path, capsys):
    benchmark = load_script(ROOT / "benchmarks" / "atari.py")
    words = {"programs": ["ours", "cleanrl", "cleanrl-envpool"], "rounds": 2, "iterations": 3, "device": "cpu"}
    options = SimpleNamespace(**words, results=None, cleanrl="cleanrl", cleanrl_python="python", envpool_python=None)

    def run_peer(program, *_):
        if program == "cleanrl-envpool":
            raise RuntimeError("no module named envpool")
        return {"sps": 250.0}

    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "run_apart", lambda *_: {"sps": 1000.0})
    monkeypatch.setattr(benchmark, "run_peer", run_peer)
    benchmark.measure(options)
    benchmark.print_table(options)
    printed = capsys.readouterr().out
    assert printed.count("failed      cleanrl-envpool, left out from here on: no module named envpool") == 1
    assert "| cleanrl | 250 (250 to 250) | 4.00× |" in printed
    assert len((tmp_path / "atari_speed.jsonl").read_text(encoding="utf-8").splitlines()) == 1 + 2 * 2


def test_processes_must_divide_the_environments(atari, small, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(atari.InputError, match="4 cannot be split evenly over 3"):
        atari.train(small())


# ---- Several processes ----

WORKER = """
import sys, torch, torch.distributed as dist
from pathlib import Path
sys.path.insert(0, str(Path({script!r}).parent))
import {module} as atari
torch.set_num_threads(1)

def gradient(rows, world_size):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1).double()
    x, advantage, old = data[rows, :3], data[rows, 3], data[rows, 4]
    logprob = net(x).squeeze(-1)
    loss = atari.clipped_policy_loss(logprob, old, atari.normalise(advantage, world_size), 0.2)
    loss.backward()
    if world_size > 1:
        atari.average_gradients(list(net.parameters()), len(x))
    return torch.cat([p.grad.flatten() for p in net.parameters()])

data = torch.randn(11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
dist.init_process_group("gloo")
whole = gradient(slice(0, 11), 1)
half = gradient(slice(0, 7) if dist.get_rank() == 0 else slice(7, 11), 2)
assert whole.abs().max() > 0.01
assert torch.allclose(whole, half, rtol=1e-6, atol=1e-9), (whole, half)
print("equal")
dist.barrier()
dist.destroy_process_group()
"""


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


@pytest.mark.processes
def test_two_processes_have_the_gradient_of_one(atari, tmp_path):
    """A minibatch split unevenly, 7 rows and 4: normalised and averaged as if it were in one process."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(script=atari.__file__, module=Path(atari.__file__).stem))
    run = torchrun(worker)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("equal") == 2


WHOLE = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, str(Path({script!r}).parent))
import {module} as atari
rank, clip = int(os.environ.get("RANK", 0)), torch.nn.utils.clip_grad_norm_
torch.multinomial = lambda probabilities, count: probabilities.argmax(-1, keepdim=True)  # the same in any process

def watched(parameters, norm):
    gradients = [p.grad.clone() for p in parameters]
    if rank == 0:
        torch.save(gradients, {out!r} + "/" + os.environ.get("WORLD_SIZE", "1") + ".pt")
    return clip(parameters, norm)

torch.nn.utils.clip_grad_norm_ = watched
sizes = dict(num_envs=4, num_steps=64, num_minibatches=1, update_epochs=1, total_timesteps=1, eval_episodes=0)
folder = {out!r} + "/run" + os.environ.get("WORLD_SIZE", "1")
atari.train(atari.Args(env_id="ALE/Breakout-v5", bf16=False, torch_threads=1, run_dir=folder, **sizes))
"""


@pytest.mark.processes
def test_two_processes_of_two_games_have_the_gradient_of_one_of_four(atari, tmp_path):
    """The whole of train(), from the emulators' seeds to the optimizer: the gradient of a rollout's one minibatch."""
    worker = tmp_path / "worker.py"
    worker.write_text(WHOLE.format(script=atari.__file__, module=Path(atari.__file__).stem, out=str(tmp_path)))
    run = subprocess.run([sys.executable, worker], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    run = torchrun(worker)
    assert run.returncode == 0, run.stderr
    one, two = (torch.load(tmp_path / f"{processes}.pt", weights_only=True) for processes in (1, 2))
    size = max(float(gradient.abs().max()) for gradient in one)
    assert size > 1e-3
    for mine, theirs in zip(one, two, strict=True):
        assert float((mine - theirs).abs().max()) < 1e-5 * size


@pytest.mark.processes
def test_two_processes_train_one_agent(atari, tmp_path):
    """torchrun: one run directory, one log, the steps of both counted."""
    sizes = {"num-envs": 4, "num-steps": 64, "num-minibatches": 2, "update-epochs": 1, "total-timesteps": 500}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", value)]
    flags += ["--env-id", "ALE/Breakout-v5", "--eval-episodes", 0, "--torch-threads", 1, "--run-dir"]
    run = torchrun(atari.__file__, *flags, tmp_path / "run")
    assert run.returncode == 0, run.stderr
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert len(saved["metrics"]) == 2 and 500 <= saved["global_step"] <= 512
    assert len(list((tmp_path / "run").glob("events*"))) == 1
    assert run.stdout.count("ALE/Breakout-v5:") == 1
