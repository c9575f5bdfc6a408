# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium==1.4.0",
#     "numpy==2.4.6",
#     "tensorboard==2.21.0",
#     "tyro==1.0.17",
#     "tqdm==4.70.1",
#     "matplotlib==3.11.2",
#     "pygame-ce==2.5.8",
#     "moviepy==2.2.1",
# ]
# ///
"""PPO on CartPole-v1: the whole algorithm in one file.

Teaches  the 13 core details of PPO, tagged [D1]..[D13] on the line where each happens (docs/details.md)
Run      python ppo_cartpole.py
Expect   All of 10 seeds solve it (the last 100 episodes average 475) in 1.1 to 1.6 s and 79k to 104k steps. The whole
         run of 200k steps takes 3 to 4 s, and greedy play then scores 500 (one thread of an AMD EPYC; RESULTS.md).
         An older AMD EPYC, without AVX-512, takes 10 to 15 s.
Departs  from the paper by what its authors' code added: [D2] to [D4], [D7], [D9], [D11] and the ½ in the value loss;
         from the textbook's settings, for speed: 64 environments of 32 steps, not 4 of 128; learning rate 8e-3, not
         2.5e-4; γ 0.98, not 0.99; λ 0.9, not 0.95; the clip range is annealed; no value clipping, no entropy bonus.
         The textbook's settings solve it in 13 to 21 s:  --num-envs 4 --num-steps 128 --learning-rate 2.5e-4
         --gamma 0.99 --gae-lambda 0.95 --no-anneal-clip --clip-vloss --ent-coef 0.01 --total-timesteps 500000

    δₜ = rₜ + γ V(sₜ₊₁) − V(sₜ)                                       PPO Eq. 12
    Âₜ = δₜ + γλ Âₜ₊₁                                                 GAE Eq. 16
    L  = E[ min(ρₜ Âₜ, clip(ρₜ, 1−ε, 1+ε) Âₜ) ],  ρₜ = π(aₜ|sₜ)/π_old(aₜ|sₜ)      PPO Eq. 7
    maximise  L − c₁ ½ (V(sₜ) − Rₜ)² + c₂ H[π(·|sₜ)]                   PPO Eq. 9, the ½ as in its code

Shapes   T steps, N environments. Rollout (T, N), flattened b_* (M,) with M ≤ T·N.
"""

import os
import shutil
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from io import TextIOWrapper
from math import sqrt
from pathlib import Path
from typing import Annotated, get_args

import gymnasium as gym
import numpy as np
import torch
from torch import nn

# a field's type says between which bounds its value must lie
PositiveInt = Annotated[int, "must be above 0", lambda x: x > 0]
PositiveFloat = Annotated[float, "must be above 0", lambda x: x > 0]
NonNegativeInt = Annotated[int, "must not be negative", lambda x: x >= 0]
NonNegativeFloat = Annotated[float, "must not be negative", lambda x: x >= 0]
UnitFloat = Annotated[float, "must lie between 0 and 1", lambda x: 0 <= x <= 1]
PositiveFloatOrNone = Annotated[float | None, "must be above 0", lambda x: x is None or x > 0]
PathOrNone = Annotated[str | None, "needs a path", lambda x: x != ""]
Seed = Annotated[int, "must be below 2**30 and not negative", lambda x: 0 <= x < 2**30]


@dataclass(frozen=True)
class Args:
    env_id: str = "CartPole-v1"  # any Gymnasium id with discrete actions and a flat observation
    seed: Seed = 1  # of the networks, the actions, the minibatches and the environments
    total_timesteps: PositiveInt = 200_000  # environment steps; the steps that only reset are not counted
    num_envs: PositiveInt = 64  # environments that step together, N
    num_steps: PositiveInt = 32  # steps of each environment per rollout, T
    num_minibatches: PositiveInt = 4  # gradient steps per epoch
    update_epochs: PositiveInt = 4  # passes over each rollout
    learning_rate: PositiveFloat = 8e-3  # Adam's, at the start
    anneal_lr: bool = True  # let the learning rate fall to 0 over the run
    gamma: UnitFloat = 0.98  # discount, per environment step
    gae_lambda: UnitFloat = 0.9  # GAE's λ: 0 trusts the critic, 1 trusts the sampled rewards
    norm_adv: bool = True  # shift and scale the advantages of each minibatch to mean 0, standard deviation 1
    clip_coef: PositiveFloat = 0.2  # ε at the start: the ratio's range is 1 − ε to 1 + ε
    anneal_clip: bool = True  # let clip_coef fall to 0 over the run
    clip_vloss: bool = False  # clip the value loss too
    ent_coef: NonNegativeFloat = 0.0  # weight of the entropy bonus, c₂
    vf_coef: NonNegativeFloat = 0.5  # weight of the value loss, c₁
    max_grad_norm: PositiveFloat = 0.5  # gradients are scaled down to this global norm
    target_kl: PositiveFloatOrNone = None  # stop a rollout's updates when a minibatch's KL is above this, in nats
    hidden_size: PositiveInt = 64  # width of both hidden layers of both networks
    eval_episodes: NonNegativeInt = 100  # greedy episodes at the end; 0 for none
    eval_max_steps: PositiveInt = 10_000  # cut such an episode after so many steps, in case it never ends
    # for some runs only: machine, files, film, tracking
    device: str = "cpu"  # cpu, cuda, cuda:1 …, or mps, which is untried
    torch_threads: PositiveInt = 1  # CPU threads; 2 are a fifth faster on an idle machine, much slower on a busy one
    torch_deterministic: bool = True  # refuse operations whose result varies from run to run
    run_dir: PathOrNone = None  # where logs, weights and plot go; default runs/<env>__<script>__<seed>__<time>
    evaluate: PathOrNone = None  # a model.pt of an earlier run: play eval_episodes with it, do not train
    capture_video: bool = False  # film one greedy episode of the trained agent, an MP4
    track: bool = False  # log to Weights & Biases too (pip install wandb)
    wandb_project: str = "ppo-cartpole"  # the project there

    def __post_init__(self):
        check_bounds(self)
        check_settings(self)


# ---- Equations ----


def compute_gae(rewards, values, next_values, terminated, done, gamma, gae_lambda):
    """Generalized advantage estimation [D5]: Âₜ = δₜ + γλ (1 − doneₜ) Âₜ₊₁ (GAE Eq. 16, PPO Eq. 11–12).

    All (T, N), the last two bool or 0 and 1; returns (T, N). next_values[t] is V of the observation that step t
    returned, the final one where an episode ended: a truncated episode would have gone on, so its V counts; a
    terminated one has no future. done = terminated | truncated: advantages never flow from one episode into another.
    """
    terminated, done = terminated.bool(), done.bool()
    deltas = rewards + gamma * torch.where(terminated, 0.0, next_values) - values
    advantages = torch.zeros_like(rewards)
    last = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        last = deltas[t] + gamma * gae_lambda * torch.where(done[t], 0.0, last)
        advantages[t] = last
    return advantages


def clipped_policy_loss(logprob, old_logprob, advantage, clip_coef):
    """−E[min(ρ Â, clip(ρ, 1−ε, 1+ε) Â)] [D8] (PPO Eq. 7). All (M,); returns a scalar to minimise."""
    ratio = (logprob - old_logprob).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage).mean()


def clipped_value_loss(value, old_value, returns, clip_coef):
    """½ E[max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²)] [D9] (Engstrom et al. 2020 §3). All (M,).

    clip_coef=None is the plain ½ E[(V − R)²]. A scalar to minimise.
    """
    loss = (value - returns) ** 2
    if clip_coef is not None:
        clipped = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
        loss = torch.max(loss, (clipped - returns) ** 2)
    return 0.5 * loss.mean()


def approx_kl(logprob, old_logprob):
    """KL(old‖new) in nats from samples of the old policy: E[(ρ − 1) − ln ρ], Schulman's k3. All (M,)."""
    log_ratio = logprob - old_logprob
    return (log_ratio.expm1() - log_ratio).mean()


def action_logprob_and_entropy(logits, actions):
    """(ln π(a|s), H[π(·|s)]), both (…,) in nats, from logits (…, A) and the actions (…,) taken."""
    logprobs = logits.log_softmax(-1)
    logprob = logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return logprob, -(logprobs.exp() * logprobs).sum(-1)


# ---- Networks ----


def init_layer(layer, gain):
    """[D2] orthogonal weights, zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs, hidden, outputs, last_gain):
    return nn.Sequential(
        init_layer(nn.Linear(inputs, hidden), sqrt(2)),
        nn.Tanh(),
        init_layer(nn.Linear(hidden, hidden), sqrt(2)),
        nn.Tanh(),
        init_layer(nn.Linear(hidden, outputs), last_gain),
    )


class Agent(nn.Module):
    """[D13] Two networks that share nothing: actor (…, D) → logits (…, A), critic (…, D) → value (…, 1)."""

    def __init__(self, envs, args):
        super().__init__()
        inputs = envs.single_observation_space.shape[0]
        self.actor = mlp(inputs, args.hidden_size, int(envs.single_action_space.n), 0.01)  # nearly uniform at first
        self.critic = mlp(inputs, args.hidden_size, 1, 1.0)


# ---- Training ----


def train(args: Args) -> list[dict]:
    """Train, save the weights, evaluate. Returns the metrics of each iteration, oldest first."""
    from tqdm import tqdm

    # 1. Environments [D1], networks, optimizer, log
    set_up_torch(args)
    envs = make_envs(args, args.num_envs)
    agent = Agent(envs, args).to(args.device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)  # [D3] not 1e-8
    run_dir, writer = start_run(args)

    # 2. Storage: step t of the rollout is row t. obs has one more row, for what the last step returned
    T, N = args.num_steps, args.num_envs
    obs = torch.zeros(T + 1, N, *envs.single_observation_space.shape, device=args.device)
    actions = torch.zeros(T, N, dtype=torch.long, device=args.device)
    rewards = torch.zeros(T, N, device=args.device)
    terminated, done, is_transition = (torch.zeros(T, N, dtype=torch.bool, device=args.device) for _ in range(3))

    # 3. Begin
    global_step, metrics = 0, []
    last_100 = deque(maxlen=100)  # returns of the last 100 episodes, undiscounted
    episode_return, episode_length = np.zeros(N), np.zeros(N, dtype=np.int64)  # of the unfinished episodes
    was_done = np.zeros(N, dtype=bool)  # the episode ended in the step before, so the next step only resets
    next_obs, _ = envs.reset(seed=env_seed(args.seed))
    check_finite(args, episode_length, observation=next_obs)
    obs[T] = torch.as_tensor(next_obs)
    start_time = time.perf_counter()
    bar = tqdm(total=args.total_timesteps, unit="step", unit_scale=True)

    while global_step < args.total_timesteps:
        # 4. Learning rate [D4] and clip range fall linearly to 0
        remaining = 1 - global_step / args.total_timesteps
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)
        optimizer.param_groups[0]["lr"] = learning_rate

        # 5. Rollout: T steps of N environments under the current policy [D1]
        finished = []  # (return, length) of each episode that ends in this rollout
        obs[0] = obs[T]
        for t in range(T):
            with torch.inference_mode():
                action = torch.multinomial(agent.actor(obs[t]).softmax(-1), 1).squeeze(-1)
            next_obs, reward, is_terminated, is_truncated, _ = envs.step(action.cpu().numpy())
            is_done = is_terminated | is_truncated
            obs[t + 1] = torch.as_tensor(next_obs)  # the final observation where an episode ended
            actions[t] = action
            rewards[t] = torch.as_tensor(reward)
            terminated[t] = torch.as_tensor(is_terminated)
            done[t] = torch.as_tensor(is_done)
            is_transition[t] = torch.as_tensor(~was_done)  # a step that only resets ignores its action
            episode_return += reward * ~was_done
            episode_length += ~was_done
            check_finite(args, episode_length, reward=reward, observation=next_obs)
            for i in np.flatnonzero(is_done):
                finished.append((float(episode_return[i]), int(episode_length[i])))
                episode_return[i] = episode_length[i] = 0
            was_done = is_done
        global_step += int(is_transition.sum())
        last_100.extend(episode[0] for episode in finished)

        # 6. Old log-probabilities, values, advantages, returns
        with torch.no_grad():
            old_logprobs, _ = action_logprob_and_entropy(agent.actor(obs[:T]), actions)
            values = agent.critic(obs).squeeze(-1)  # (T + 1, N)
        advantages = compute_gae(rewards, values[:T], values[1:], terminated, done, args.gamma, args.gae_lambda)
        returns = advantages + values[:T]

        # 7. Flatten to the M transitions; the rows of steps that only reset are left out
        rows = (obs[:T], actions, old_logprobs, values[:T], advantages, returns)
        b_obs, b_actions, b_logprobs, b_values, b_advantages, b_returns = (row[is_transition] for row in rows)

        # 8. Update [D6]: each epoch uses each transition once, in minibatches whose sizes differ by one at most
        losses = []
        # one flat loop over the minibatches of all epochs, so that the break below ends all of them
        epochs = [torch.randperm(len(b_obs)).tensor_split(args.num_minibatches) for _ in range(args.update_epochs)]
        for mb in (indices for epoch in epochs for indices in epoch):
            mb_obs = b_obs[mb]
            logprob, entropy = action_logprob_and_entropy(agent.actor(mb_obs), b_actions[mb])
            value = agent.critic(mb_obs).squeeze(-1)
            advantage = b_advantages[mb]
            if args.norm_adv:  # [D7]
                advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
            policy_loss = clipped_policy_loss(logprob, b_logprobs[mb], advantage, clip_coef)
            value_loss = clipped_value_loss(value, b_values[mb], b_returns[mb], clip_coef if args.clip_vloss else None)
            loss = policy_loss - args.ent_coef * entropy.mean() + args.vf_coef * value_loss  # [D10]

            with torch.no_grad():  # [D12] what to look at when it does not learn
                kl = approx_kl(logprob, b_logprobs[mb])
                clipfrac = ((logprob - b_logprobs[mb]).expm1().abs() > clip_coef).float().mean()
                losses.append(torch.stack([policy_loss, value_loss, entropy.mean(), kl, clipfrac]))
            if args.target_kl is not None and kl > args.target_kl:
                break  # before this step is taken; the next iteration begins with a new rollout

            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)  # [D11]
            optimizer.step()

        with torch.inference_mode():
            if not agent.actor(obs[T]).isfinite().all():
                raise InputError(
                    f"the policy is no longer finite at step {global_step}: lower --learning-rate, or scale the "
                    f"rewards (the largest is {float(rewards.abs().max()):g})"
                )

        # 9. Metrics: the losses are means over every minibatch
        seconds = time.perf_counter() - start_time
        names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")
        row = {f"losses/{name}": mean for name, mean in zip(names, torch.stack(losses).mean(0).tolist(), strict=True)}
        row["losses/explained_variance"] = float(1 - (b_returns - b_values).var() / b_returns.var())
        row["charts/learning_rate"] = learning_rate
        row["charts/SPS"] = global_step / seconds
        if finished:
            row["charts/episodic_return"], row["charts/episodic_length"] = np.mean(finished, axis=0).tolist()
        if len(last_100) == 100:
            row["charts/return_100"] = float(np.mean(last_100))
        for name, number in row.items():
            writer.add_scalar(name, number, global_step)
        metrics.append({"global_step": global_step, "seconds": seconds, **row})
        bar.update(min(global_step, args.total_timesteps) - bar.n)
        bar.set_postfix(last_100=f"{np.mean(last_100):.1f}" if last_100 else "-", refresh=False)
    bar.close()
    envs.close()

    # 10. Weights, summary, greedy evaluation
    save(run_dir / "model.pt", {"args": asdict(args), "agent": agent.state_dict()})
    print_summary(args, metrics, envs.spec.reward_threshold, run_dir)
    if args.eval_episodes:
        metrics[-1]["charts/eval_return"] = float(evaluate(agent, args, run_dir).mean())
        writer.add_scalar("charts/eval_return", metrics[-1]["charts/eval_return"], global_step)
    writer.close()
    print(f"logs        tensorboard --logdir {run_dir.parent}")
    print(f"next        python {Path(__file__).name} --evaluate {run_dir / 'model.pt'}")
    return metrics


# ---- Evaluation ----


def play(agent, args, episodes, video_dir=None):
    """Returns of greedy episodes, the first of each environment: more would favour the short ones."""
    envs = make_envs(args, episodes, render_mode="rgb_array" if video_dir else None)
    if video_dir:
        envs = gym.wrappers.vector.RecordVideo(envs, str(video_dir), episode_trigger=lambda episode: episode == 0)
    obs, _ = envs.reset(seed=env_seed(args.seed, evaluation=True))
    returns, running, steps = np.zeros(episodes), np.ones(episodes, dtype=bool), 0
    while running.any() and steps < args.eval_max_steps:
        check_finite(args, [steps] * episodes, observation=obs)
        with torch.inference_mode():
            actions = agent.actor(torch.as_tensor(obs, dtype=torch.float32, device=args.device)).argmax(-1)
        obs, rewards, terminated, truncated, _ = envs.step(actions.cpu().numpy())
        steps += 1
        check_finite(args, [steps] * episodes, reward=rewards)
        returns += rewards * running
        running &= ~(terminated | truncated)
    envs.close()
    if running.any():
        print(f"evaluation  {running.sum()} of {episodes} episodes were cut after {steps} steps, --eval-max-steps")
    return returns


def evaluate(agent, args, run_dir):
    """Play eval_episodes greedy episodes and print the result. With --capture-video, film one more."""
    returns = play(agent, args, args.eval_episodes)
    print(f"evaluation  {len(returns)} greedy episodes: mean return {returns.mean():.1f}, lowest {returns.min():.1f}")
    if args.capture_video:
        shutil.rmtree(run_dir / "video", ignore_errors=True)  # the film of an earlier evaluation
        play(agent, args, 1, run_dir / "video")
        print(f"video       {run_dir / 'video'}")
    return returns


# ==== Machinery: files, logs, flags. A first reader can stop here ====


class InputError(ValueError):
    """A mistake that the user can fix. main() prints its message, one sentence, and exits with status 2."""


def check_bounds(args):
    """Raise ValueError for the first field that lies outside the bounds in its type. NaN lies outside all."""
    for field in fields(args):
        _, *bounds = get_args(field.type) if hasattr(field.type, "__metadata__") else (None,)
        if bounds and not bounds[1](getattr(args, field.name)):
            raise ValueError(f"{field.name} {bounds[0]}, got {getattr(args, field.name)}")


def check_settings(args):
    """Raise ValueError for fields that do not go together."""
    if args.eval_episodes == 0 and (args.evaluate or args.capture_video):
        raise ValueError("evaluate and capture_video need eval_episodes above 0, got 0")
    if args.evaluate and (args.run_dir or args.track):
        raise ValueError("evaluate only plays: run_dir and track exclude it")
    fewest = args.num_envs * (args.num_steps // 2)  # transitions, if every second row is an autoreset
    if fewest < args.num_minibatches:
        raise ValueError(
            f"num_minibatches {args.num_minibatches} must not exceed the {fewest} transitions that "
            f"num_envs {args.num_envs} × num_steps {args.num_steps} is sure to hold"
        )


def make_envs(args, num_envs, render_mode=None):
    """num_envs copies that step together: the environment's own vector form if it has one, else a SyncVectorEnv."""
    env_id = args.env_id
    try:
        mode = {"render_mode": render_mode} if render_mode else {}  # some classes do not accept the argument
        envs = gym.make_vec(env_id, num_envs=num_envs, **mode)
    except (gym.error.Error, ImportError) as error:
        raise InputError(f"--env-id {env_id}: {error}") from error
    actions, observations = envs.single_action_space, envs.single_observation_space
    if not isinstance(actions, gym.spaces.Discrete) or actions.start != 0:
        raise InputError(
            f"--env-id {env_id} has the action space {actions}; this script's policy is a softmax over actions "
            "0, 1, 2, …, so it needs Discrete(n): a continuous action would need a Gaussian policy instead"
        )
    if not isinstance(observations, gym.spaces.Box) or len(observations.shape) != 1:
        raise InputError(
            f"--env-id {env_id} has the observation space {observations}; this script's networks take one flat "
            "vector, a Box of one dimension"
        )
    if (mode := envs.metadata.get("autoreset_mode")) is not gym.vector.AutoresetMode.NEXT_STEP:
        raise InputError(f"--env-id {env_id} has the autoreset mode {mode}; this script needs NEXT_STEP")
    return envs


def env_seed(seed, evaluation=False):
    """The seed of the first environment. Gymnasium gives environment i the seed of the first plus i.

    Hashed, so that two runs share no environment. With the run's own seed, environments 1 to 7 of seed 1 would be
    environments 0 to 6 of seed 2, and a comparison over seeds would count the same episodes twice.
    """
    return int(np.random.SeedSequence([seed, 0, int(evaluation)]).generate_state(1)[0] % 2**30)


def check_finite(args, steps, **returned):
    """Refuse NaN and infinity in what the environments returned. steps (N,) counts the steps of their episodes."""
    for what, numbers in returned.items():
        finite = np.isfinite(numbers)
        if finite.all():
            continue
        i = int(np.argwhere(~finite)[0, 0])  # the first environment that returned one
        bad = np.extract(~finite[i], numbers[i])[0]
        where = f"environment {i} returned {bad} in its {what}, in step {steps[i]} of its episode"
        raise InputError(f"--env-id {args.env_id}: {where}")


def check_video(args):
    """Refuse --capture-video before training if it cannot work after training."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # draw frames without a screen
    try:
        import moviepy  # noqa: F401

        envs = make_envs(args, 1, render_mode="rgb_array")
        envs.reset(seed=0)
        if envs.render()[0] is None:
            raise ValueError("its render() returned nothing")
    except ImportError as error:
        raise InputError("--capture-video needs moviepy: pip install moviepy") from error
    except Exception as error:  # an environment that cannot draw may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"--capture-video: {args.env_id} cannot draw itself: {reason}") from error


def check_device(device):
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise InputError(f"--device {device} is not available: {reason}") from error


def set_up_torch(args):
    check_device(args.device)
    torch.set_num_threads(args.torch_threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA need it
    # mps lacks a deterministic form of some operations: there it warns instead of refusing
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=args.device.startswith("mps"))
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that writes every tensor twice
    torch.manual_seed(args.seed)


def start_run(args):
    """Refuse what could not work after training. Make the run directory; return it and TensorBoard's writer in it."""
    from torch.utils.tensorboard import SummaryWriter

    if args.capture_video:
        check_video(args)
    run_dir = Path(args.run_dir or new_run_dir(args))
    make_run_dir(run_dir)
    if args.track:
        start_wandb(args, run_dir)
    return run_dir, SummaryWriter(run_dir)


def new_run_dir(args):
    name = args.env_id.replace("/", "-").replace(":", "-")
    return f"runs/{name}__{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"


def make_run_dir(run_dir):
    """Make the run's own directory. If two runs start at once with one name, the second is refused."""
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError as error:
        raise InputError(f"--run-dir {run_dir} exists: choose another") from error


def start_wandb(args, run_dir):
    try:
        import wandb
    except ImportError as error:
        with suppress(OSError):
            run_dir.rmdir()  # still empty
        raise InputError("--track needs Weights & Biases: pip install wandb") from error
    options = {"project": args.wandb_project, "id": run_dir.name, "resume": "allow", "config": asdict(args)}
    try:
        wandb.init(**options, sync_tensorboard=True)  # it watches the writers of TensorBoard that are made from now on
    except Exception as error:  # no API key, no connection, a name that it does not take: it has many exceptions
        with suppress(OSError):
            run_dir.rmdir()  # still empty
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--track: Weights & Biases does not begin: {reason}") from error


def save(path, content):
    """Write under a temporary name, then rename: whatever happens, no file of this name is half written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # on a full disk torch raises a RuntimeError
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"{path} could not be written, with {free / 1e6:.1f} MB free: {reason}") from error


def evaluate_saved(args):
    """--evaluate FILE: play with the weights in FILE, in the environment in which they were trained."""
    path = Path(args.evaluate)
    if not path.is_file():
        raise InputError(f"--evaluate {path} is not a file: it takes the model.pt in a run directory")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)  # plain data only: no code in the file can run
        weights, trained = saved["agent"], {name: saved["args"][name] for name in ("env_id", "hidden_size")}
        settings = replace(args, **trained)
    except Exception as error:
        raise InputError(f"{path} is not a model of this script, or it is damaged") from error
    for name, value in trained.items():
        if getattr(args, name) not in (value, getattr(Args, name)):
            raise InputError(f"{path} does not fit {name} {getattr(args, name)}: it was trained with {value}")
    set_up_torch(settings)
    if args.capture_video:
        check_video(settings)
    agent = Agent(make_envs(settings, 1), settings).to(args.device)
    try:
        agent.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit --env-id {settings.env_id}: its networks have other sizes") from error
    return evaluate(agent, settings, path.parent)


def draw_learning_curve(metrics, threshold, path):
    """PNG of the return against environment steps: of each rollout's episodes, and of the last 100."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    for name, label, color in (("episodic_return", "of each rollout", "0.7"), ("return_100", "of the last 100", "C0")):
        points = [(row["global_step"], row[f"charts/{name}"]) for row in metrics if f"charts/{name}" in row]
        axes.plot(*np.reshape(points, (-1, 2)).T, color=color, label=label)
    if threshold is not None:
        axes.axhline(threshold, color="C2", linestyle="--", label=f"solved: {threshold:g}")
    axes.set(xlabel="environment steps", ylabel="mean return of episodes")
    axes.legend()
    axes.figure.savefig(path, dpi=120)


def print_summary(args, metrics, threshold, run_dir):
    """threshold: the mean return at which Gymnasium calls the environment solved, or None."""
    draw_learning_curve(metrics, threshold, run_dir / "learning_curve.png")
    steps, seconds = metrics[-1]["global_step"], metrics[-1]["seconds"]
    print(f"\n{args.env_id}: {steps:,} steps in {seconds:.1f} s, {steps / seconds:,.0f} steps a second")
    solved = [row for row in metrics if threshold is not None and row.get("charts/return_100", -np.inf) >= threshold]
    if solved:
        first = f"after {solved[0]['global_step']:,} steps, {solved[0]['seconds']:.1f} s"
        print(f"solved      mean return of the last 100 episodes reached {threshold:g} {first}")
    elif threshold is not None:
        print(f"not solved  the mean return of the last 100 episodes never reached {threshold:g}")
    print(f"curve       {run_dir / 'learning_curve.png'}")


REMOVED = {
    "--resume": "a run takes seconds, so start it again",
    "--checkpoint-every": "the weights are saved once, at the end, as model.pt in the run directory",
    "--save-model": "the weights are always saved, at the end, as model.pt in the run directory",
}


def main():
    """Parse, run. A mistake that the user can fix ends in one sentence and exit status 2."""
    import tyro

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # print "?" for letters that the terminal lacks
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        for flag in REMOVED.keys() & {word.split("=")[0].replace("_", "-") for word in sys.argv[1:]}:
            raise InputError(f"{flag} no longer exists: {REMOVED[flag]}")
        args = tyro.cli(Args, description=__doc__.splitlines()[0])
        evaluate_saved(args) if args.evaluate else train(args)
    except BrokenPipeError:  # the reader of the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, gym.error.DependencyNotInstalled, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
