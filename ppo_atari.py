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
#     "ale-py==0.12.1",
#     "moviepy==2.2.1",
# ]
# ///
"""PPO on Atari: CartPole's script when observations are pixels.

Teaches  the 9 Atari details, tagged [D14]..[D22] where each happens, on top of the 13 of ppo_cartpole.py
         (docs/details.md). `diff -b ppo_cartpole.py ppo_atari.py` shows what pixels change
Run      python ppo_atari.py
         torchrun --nproc-per-node=2 ppo_atari.py
Expect   1,140 steps a second on 2 cores of an AMD EPYC, 2.1 to 2.8 times CleanRL's (benchmarks/RESULTS.md). With
         --total-timesteps 3000000 --learning-rate 5e-4 the last 100 games of Pong average +18 after 1.2M steps
Departs  from the customary wrappers in one thing: after a lost life nobody presses FIRE for the policy, because
         ale-py's vector environment presses it only at the start of a game. The policy learns to press it

    δₜ = rₜ + γ V(sₜ₊₁) − V(sₜ)                                       PPO Eq. 12
    Âₜ = δₜ + γλ Âₜ₊₁                                                 GAE Eq. 16
    L  = E[ min(ρₜ Âₜ, clip(ρₜ, 1−ε, 1+ε) Âₜ) ],  ρₜ = π(aₜ|sₜ)/π_old(aₜ|sₜ)      PPO Eq. 7
    maximise  L − c₁ ½ (V(sₜ) − Rₜ)² + c₂ H[π(·|sₜ)]                   PPO Eq. 9, the ½ as in its code

Shapes   T steps, N environments. Rollout (T, N), flattened b_* (M,) with M ≤ T·N.
         An observation is (4, 84, 84) uint8, four grey frames, the newest last; stored as (84, 84, 4).
"""

import os
import shutil
import sys
import time
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from io import TextIOWrapper
from math import sqrt
from pathlib import Path
from typing import Annotated, get_args

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
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
    env_id: str = "ALE/Pong-v5"  # any game of ale-py, which brings the ROMs with it
    seed: Seed = 1  # of the network, the actions, the minibatches and the games
    total_timesteps: PositiveInt = 10_000_000  # steps of 4 frames, over all processes; resetting steps are not counted
    num_envs: PositiveInt = 8  # games that step together, N, over all processes
    num_steps: PositiveInt = 128  # steps of each game per rollout, T
    num_minibatches: PositiveInt = 4  # gradient steps per epoch
    update_epochs: PositiveInt = 4  # passes over each rollout
    learning_rate: PositiveFloat = 2.5e-4  # Adam's, at the start
    anneal_lr: bool = True  # let the learning rate fall to 0 over the run
    gamma: UnitFloat = 0.99  # discount, per step of 4 frames
    gae_lambda: UnitFloat = 0.95  # GAE's λ: 0 trusts the critic, 1 trusts the sampled rewards
    norm_adv: bool = True  # shift and scale the advantages of each minibatch to mean 0, standard deviation 1
    clip_coef: PositiveFloat = 0.1  # ε at the start: the ratio's range is 1 − ε to 1 + ε
    anneal_clip: bool = False  # let clip_coef fall to 0 over the run
    clip_vloss: bool = True  # clip the value loss too
    ent_coef: NonNegativeFloat = 0.01  # weight of the entropy bonus, c₂
    vf_coef: NonNegativeFloat = 0.5  # weight of the value loss, c₁
    max_grad_norm: PositiveFloat = 0.5  # gradients are scaled down to this global norm
    target_kl: PositiveFloatOrNone = None  # stop a rollout's updates when a minibatch's KL is above this, in nats
    sticky: UnitFloat = 0.0  # chance that the emulator repeats the last action; NoFrameskip-v4 has 0, ALE/*-v5 has 0.25
    episodic_life: bool = True  # a lost life ends the episode for the learner, but the game continues
    eval_episodes: NonNegativeInt = 10  # games at the end, actions sampled from the policy; 0 for none
    # for some runs only: machine, files, film, tracking
    bf16: bool = True  # convolutions in bfloat16 if that is faster here (1.65 times on a Zen 5); the rest in float32
    keep_memory: bool = True  # let glibc's malloc keep freed memory, so no page is zeroed twice; 0.95 to 1.04 the speed
    device: str = "cpu"  # cpu, cuda, cuda:1 …, or mps, which is untried; under torchrun, cuda gives each process a GPU
    torch_threads: NonNegativeInt = 0  # CPU threads of torch; 0 for one per core. On a busy machine 1 is faster
    torch_deterministic: bool = True  # refuse operations whose result varies from run to run
    run_dir: PathOrNone = None  # where logs, checkpoint and plot go; default runs/<env>__<script>__<seed>__<time>
    checkpoint_every: NonNegativeInt = 20  # iterations between two checkpoints; 0 for only one, at the end
    resume: PathOrNone = None  # the directory of a run that was stopped: continue from its checkpoint
    evaluate: PathOrNone = None  # a saved model or checkpoint: play eval_episodes with it, do not train
    save_model: bool = False  # also write the weights alone to model.pt at the end
    capture_video: bool = False  # film one game of the trained agent, an MP4
    track: bool = False  # log to Weights & Biases too (pip install wandb)
    wandb_project: str = "ppo-atari"  # the project there

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


# ---- Environment ----


def make_envs(args, num_envs, **changes):
    """num_envs games in ale-py's C++ vector environment. NEXT_STEP autoreset: the step after a game's end resets it."""
    import ale_py

    gym.register_envs(ale_py)
    settings = {
        "noop_max": 30,  # [D14] up to 30 no-ops at the start of a game, so that games differ
        "maxpool": True,  # [D15] the maximum of the last two frames, because some sprites flicker
        "frameskip": 4,  # [D15] the action is repeated for four frames
        "repeat_action_probability": args.sticky,  # gym.make's default for v5 is 0.25, the default of the class is 0
        "episodic_life": False,  # True would restart the *game* at every lost life
        "life_loss_info": args.episodic_life,  # [D16] terminated at a lost life, but the game continues
        "use_fire_reset": True,  # [D17] FIRE is pressed at the start of a game that waits for it
        "img_height": 84,  # [D18]
        "img_width": 84,
        "grayscale": True,
        "reward_clipping": False,  # [D19] train() clips, because it also logs the true score
        "stack_num": 4,  # [D20]
    }
    if not args.env_id.startswith("ALE/"):
        raise InputError(
            f"--env-id {args.env_id} is no Atari game of ale-py: its games are ALE/Pong-v5, ALE/Breakout-v5, …"
        )
    try:
        return gym.make_vec(args.env_id, num_envs=num_envs, **{**settings, **changes})
    except gym.error.Error as error:
        raise InputError(f"--env-id {args.env_id}: {error}") from error
    except OSError as error:  # ALE_ROMS_DIR names another directory, or the package is damaged
        raise InputError(f"--env-id {args.env_id}: its ROM is not available: {error}") from error


def is_game_over(terminated, truncated, info):
    """(N,) bool. With life_loss_info a lost life terminates too, but if lives are left the game continues."""
    return truncated | (terminated & (info["lives"] == 0))


# ---- Networks ----


def init_layer(layer, gain):
    """[D2] orthogonal weights, zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ChannelsLastFlatten(nn.Module):
    """(B, C, H, W), channels last in memory → (B, H·W·C), a view. nn.Flatten would copy, forward and backward."""

    def forward(self, features):
        return features.permute(0, 2, 3, 1).flatten(1)


class Agent(nn.Module):
    """[D21] One convolutional network under both heads: (B, 84, 84, 4) uint8 → logits (B, A), values (B,).

    The layers are those of Mnih et al. 2015.
    """

    def __init__(self, envs, args):
        super().__init__()
        self.dtype = torch.bfloat16 if args.bf16 else torch.float32
        self.trunk = nn.Sequential(
            init_layer(nn.Conv2d(4, 32, 8, stride=4), sqrt(2)),
            nn.ReLU(inplace=True),
            init_layer(nn.Conv2d(32, 64, 4, stride=2), sqrt(2)),
            nn.ReLU(inplace=True),
            init_layer(nn.Conv2d(64, 64, 3, stride=1), sqrt(2)),
            nn.ReLU(inplace=True),
            ChannelsLastFlatten(),
            init_layer(nn.Linear(7 * 7 * 64, 512), sqrt(2)),
            nn.ReLU(inplace=True),
        )
        self.actor = init_layer(nn.Linear(512, int(envs.single_action_space.n)), 0.01)  # nearly uniform at first
        self.critic = init_layer(nn.Linear(512, 1), 1.0)
        self.to(memory_format=torch.channels_last)

    def forward(self, obs):
        pixels = obs.to(self.dtype).div_(255).permute(0, 3, 1, 2)  # [D22]; the permuted view is channels_last
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            features = self.trunk(pixels)
        with torch.autocast(obs.device.type, enabled=False):  # logits in bfloat16 would add noise to the ratios
            features = features.float()
            return self.actor(features), self.critic(features).squeeze(-1)


# ---- Training ----


def train(args: Args) -> list[dict]:
    """Train, evaluate, write logs, plot and checkpoint. Returns the metrics of each iteration, oldest first."""
    from tqdm import tqdm

    # 1. Processes, environments [D1], network (the same in every process), optimizer, log
    saved = load_checkpoint(args) if args.resume else None
    rank, world_size, device = set_up_process(args)
    args = without_slow_bf16(args, device, world_size)
    T, N = args.num_steps, args.num_envs // world_size  # N games in this process
    envs = make_envs(args, N)
    agent = Agent(envs, args).to(device)
    parameters = list(agent.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)  # [D3] not torch's 1e-8
    run_dir, writer = start_run(args, saved, rank)

    # 2. Storage: step t of the rollout is row t. obs and values have one more row, for what the last step returned
    obs = torch.zeros(T + 1, N, 84, 84, 4, dtype=torch.uint8, device=device)  # channels last: faster convolutions
    values = torch.zeros(T + 1, N, device=device)
    actions = torch.zeros(T, N, dtype=torch.long, device=device)
    old_logprobs, rewards = torch.zeros(T, N, device=device), torch.zeros(T, N, device=device)
    terminated, done, is_transition = (torch.zeros(T, N, dtype=torch.bool, device=device) for _ in range(3))

    # 3. Begin, or continue from the checkpoint. The emulators cannot be saved, so a resumed run starts new games
    global_step, seconds, metrics = 0, 0.0, []
    last_100 = deque(maxlen=100)  # true scores of the last 100 games
    episode_return, episode_length = np.zeros(N), np.zeros(N, dtype=np.int64)  # of the unfinished games
    was_over = np.zeros(N, dtype=bool)  # the game ended in the step before, so the next step only resets
    if saved:
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        global_step, seconds, metrics = saved["global_step"], saved["seconds"], saved["metrics"]
        last_100.extend(saved["last_100"])
    torch.manual_seed(args.seed + global_step + 1_000_003 * rank)
    next_obs, _ = envs.reset(seed=env_seed(args.seed, global_step) + rank * N)
    obs[T] = torch.as_tensor(next_obs).permute(0, 2, 3, 1)
    start_time = time.perf_counter() - seconds
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", unit_scale=True, disable=rank > 0)

    while global_step < args.total_timesteps:
        # 4. Learning rate [D4] and clip range fall linearly to 0
        remaining = 1 - global_step / args.total_timesteps
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)
        optimizer.param_groups[0]["lr"] = learning_rate

        # 5. Rollout: T steps of N environments under the current policy [D1]
        finished = []  # (true score, length) of each game that ends in this rollout
        obs[0] = obs[T]
        # no_grad, not inference_mode, so that this autocast keeps its casts: each weight is cast once for all steps
        with torch.no_grad(), torch.autocast(obs.device.type, torch.bfloat16, enabled=args.bf16):
            for t in range(T):
                logits, values[t] = agent(obs[t])
                action = torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
                old_logprobs[t], _ = action_logprob_and_entropy(logits, action)
                next_obs, reward, is_terminated, is_truncated, info = envs.step(action.cpu().numpy())
                obs[t + 1] = torch.as_tensor(next_obs).permute(0, 2, 3, 1)  # the final one where a game ended
                actions[t] = action
                rewards[t] = torch.as_tensor(np.sign(reward))  # [D19] −1, 0 or 1 in every game
                terminated[t] = torch.as_tensor(is_terminated)
                done[t] = torch.as_tensor(is_terminated | is_truncated)
                is_transition[t] = torch.as_tensor(~was_over)  # a step that only resets ignores its action
                episode_return += reward * ~was_over
                episode_length += ~was_over
                was_over = is_game_over(is_terminated, is_truncated, info)
                for i in np.flatnonzero(was_over):
                    finished.append((float(episode_return[i]), int(episode_length[i])))
                    episode_return[i] = episode_length[i] = 0
            values[T] = agent(obs[T])[1]
        transitions = is_transition.sum()
        if world_size > 1:
            finished = sum_and_gather(transitions, finished)
        global_step += int(transitions)
        last_100.extend(game[0] for game in finished)

        # 6. Advantages and returns: V of the next observation is the value in the next row
        advantages = compute_gae(rewards, values[:T], values[1:], terminated, done, args.gamma, args.gae_lambda)
        returns = advantages + values[:T]

        # 7. Flatten to the M transitions; the rows of steps that only reset are left out
        rows = (obs[:T], actions, old_logprobs, values[:T], advantages, returns)
        b_obs, b_actions, b_logprobs, b_values, b_advantages, b_returns = (row[is_transition] for row in rows)

        # 8. Update [D6]: each epoch uses each transition once, in minibatches whose sizes differ by one at most
        losses = []
        # one flat loop over the minibatches of all epochs, so that the break below ends all of them
        epochs = [
            torch.randperm(len(b_obs)).to(device).tensor_split(args.num_minibatches) for _ in range(args.update_epochs)
        ]
        for mb in (indices for epoch in epochs for indices in epoch):
            logits, value = agent(b_obs.index_select(0, mb))  # on a CPU faster than b_obs[mb]
            logprob, entropy = action_logprob_and_entropy(logits, b_actions[mb])
            advantage = b_advantages[mb]
            if args.norm_adv:  # [D7]
                advantage = normalise(advantage, world_size)
            policy_loss = clipped_policy_loss(logprob, b_logprobs[mb], advantage, clip_coef)
            value_loss = clipped_value_loss(value, b_values[mb], b_returns[mb], clip_coef if args.clip_vloss else None)
            loss = policy_loss - args.ent_coef * entropy.mean() + args.vf_coef * value_loss  # [D10]

            with torch.no_grad():  # [D12] what to look at when it does not learn
                kl = approx_kl(logprob, b_logprobs[mb])
                clipfrac = ((logprob - b_logprobs[mb]).expm1().abs() > clip_coef).float().mean()
                losses.append(torch.stack([policy_loss, value_loss, entropy.mean(), kl, clipfrac]))
            if args.target_kl is not None:
                if world_size > 1:
                    dist.all_reduce(kl)
                if kl / world_size > args.target_kl:
                    break  # before this step is taken; the next iteration begins with a new rollout

            optimizer.zero_grad()
            loss.backward()
            if world_size > 1:
                average_gradients(parameters, len(mb))
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)  # [D11]
            optimizer.step()

        with torch.inference_mode():
            if not agent(obs[T])[0].isfinite().all():
                raise InputError(f"the policy is no longer finite at step {global_step}: lower --learning-rate")

        # 9. Metrics: the losses are means over every minibatch of the first process
        if rank > 0:
            continue
        seconds = time.perf_counter() - start_time
        names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")
        row = {f"losses/{name}": mean for name, mean in zip(names, torch.stack(losses).mean(0).tolist())}
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

        # 10. Checkpoint, after an iteration is complete
        is_last = global_step >= args.total_timesteps
        if is_last or (args.checkpoint_every and len(metrics) % args.checkpoint_every == 0):
            writer.flush()
            content = {
                "args": asdict(args),
                "agent": agent.state_dict(),
                "optimizer": optimizer.state_dict(),
                "last_100": list(last_100),
                "global_step": global_step,
                "seconds": seconds,
                "metrics": metrics,
            }
            save(run_dir / "checkpoint.pt", content)
    bar.close()
    envs.close()
    if world_size > 1:
        dist.destroy_process_group()
    if rank > 0:
        return metrics

    # 11. Summary, files, evaluation
    print(f"\n{args.env_id}: {global_step:,} steps in {seconds:.1f} s, {global_step / seconds:,.0f} steps a second")
    if last_100:
        print(f"score       mean of the last {len(last_100)} games of training: {np.mean(last_100):.1f}")
    draw_learning_curve(metrics, None, run_dir / "learning_curve.png")
    print(f"curve       {run_dir / 'learning_curve.png'}")
    if args.save_model:
        save(run_dir / "model.pt", {"args": asdict(args), "agent": agent.state_dict()})
        print(f"model       {run_dir / 'model.pt'}")
    if args.eval_episodes:
        metrics[-1]["charts/eval_return"] = float(evaluate(agent, args, run_dir).mean())
        writer.add_scalar("charts/eval_return", metrics[-1]["charts/eval_return"], global_step)
    writer.close()
    print(f"logs        tensorboard --logdir {run_dir.parent}")
    print(f"next        python ppo_atari.py --evaluate {run_dir / 'checkpoint.pt'} --capture-video")
    return metrics


# ---- Evaluation ----


def play(agent, args, episodes, video_dir=None):
    """True scores of whole games, the first of each environment. Actions are sampled from the policy.

    A second emulator makes the film, in colour. It gets the same seed and actions, so it plays the same game.
    """
    envs, seed = make_envs(args, episodes), env_seed(args.seed, evaluation=True)
    obs, _ = envs.reset(seed=seed)
    if video_dir:
        camera = make_envs(args, episodes, grayscale=False, img_height=210, img_width=160, stack_num=1)
        frames = [camera.reset(seed=seed)[0][0, 0]]
    returns, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    torch.manual_seed(seed)
    while running.any():
        with torch.inference_mode():
            logits, _ = agent(torch.as_tensor(obs, device=args.device).permute(0, 2, 3, 1))
            actions = torch.multinomial(logits.softmax(-1), 1).squeeze(-1).cpu().numpy()
        obs, rewards, terminated, truncated, info = envs.step(actions)
        returns += rewards * running
        running &= ~is_game_over(terminated, truncated, info)
        if video_dir:
            frames.append(camera.step(actions)[0][0, 0])
    envs.close()
    if video_dir:
        from moviepy import ImageSequenceClip

        video_dir.mkdir()
        large = [frame.repeat(3, axis=0).repeat(3, axis=1) for frame in frames]
        ImageSequenceClip(large, fps=15).write_videofile(str(video_dir / "game.mp4"), logger=None)  # 60 frames / 4
    return returns


def evaluate(agent, args, run_dir):
    """Play eval_episodes games and print the result. With --capture-video, film one more."""
    returns = play(agent, args, args.eval_episodes)
    print(f"evaluation  {len(returns)} games: mean return {returns.mean():.1f}, lowest {returns.min():.1f}")
    if args.capture_video:
        with written_aside(run_dir / "video") as video_dir:
            play(agent, args, 1, video_dir)
        print(f"video       {run_dir / 'video'}")
    return returns


# ==== Machinery: processes, files, logs, flags. A first reader can stop here ====


# ---- Several processes (torchrun) ----


def set_up_process(args):
    """Device, process group, threads, seed. Returns this process's rank, the number of processes, and its device."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.num_envs % world_size:
        raise InputError(f"--num-envs {args.num_envs} cannot be split evenly over {world_size} processes")
    device = args.device
    if world_size > 1 and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(device)
    if world_size > 1:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)  # else NCCL would gather the finished games on GPU 0 in every process
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    torch.set_num_threads(args.torch_threads or max(1, os.cpu_count() // world_size))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA need it
    # mps lacks a deterministic form of some operations: there it warns instead of refusing
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=device.startswith("mps"))
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that writes every tensor twice
    torch.manual_seed(args.seed)
    if args.keep_memory and sys.platform == "linux":
        keep_freed_memory()
    return rank, world_size, device


def without_slow_bf16(args, device, world_size=1):
    """Args with bf16 off if float32 is faster here: a CPU without instructions for bfloat16 is 15 times slower in it.

    Measured on one convolution, forward and backward, in the first process; all processes take its decision.
    """
    if args.bf16 and device.startswith("mps"):
        print("bf16        off: it is untried on mps")
        return replace(args, bf16=False)
    if not args.bf16 or device != "cpu":
        return args
    seconds = []
    with torch.random.fork_rng(devices=[]):  # the measurement leaves the run's random numbers alone
        layer = nn.Conv2d(32, 64, 4, stride=2)
    pixels = torch.ones(16, 32, 20, 20)
    for bf16 in (True, True, False, False):  # the first of each pair is a warm-up
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            layer(pixels).float().sum().backward()
        seconds.append(time.perf_counter() - start)
    times_slower = torch.tensor(seconds[1] / seconds[3])
    if world_size > 1:
        dist.broadcast(times_slower, 0)
    if times_slower <= 1:
        return args
    if world_size == 1 or dist.get_rank() == 0:
        print(f"bf16        off: float32 is {float(times_slower):.1f} times faster on this CPU")
    return replace(args, bf16=False)


def sum_and_gather(transitions, finished):
    """Add up the number of transitions in place; return the finished games of all processes."""
    dist.all_reduce(transitions)
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, finished)
    return [game for games in everywhere for game in games]


def normalise(advantage, world_size):
    """[D7] Mean 0, standard deviation 1 over the whole minibatch, the parts of all processes together. (M,) → (M,)."""
    count, total = torch.tensor(float(len(advantage)), device=advantage.device), advantage.sum()
    if world_size > 1:
        sums = torch.stack([count, total])
        dist.all_reduce(sums)
        count, total = sums
    centred = advantage - total / count
    squares = centred.square().sum()
    if world_size > 1:
        dist.all_reduce(squares)
    return centred / ((squares / count).sqrt() + 1e-8)


def average_gradients(parameters, count):
    """Replace each gradient by that of the mean over the whole minibatch. This process holds `count` rows of it."""
    parts = torch.cat([torch.tensor([1.0], device=parameters[0].device), *(p.grad.flatten() for p in parameters)])
    parts *= count
    dist.all_reduce(parts)
    flat = parts[1:] / parts[0]
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad.copy_(gradient.view_as(parameter))


# ---- Settings, devices, memory ----


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
    if args.evaluate and (args.resume or args.run_dir or args.save_model or args.track):
        raise ValueError("evaluate only plays: resume, run_dir, save_model and track exclude it")
    if args.resume and args.run_dir:
        raise ValueError(f"resume {args.resume} continues in its own directory, not in run_dir {args.run_dir}")
    fewest = args.num_envs * (args.num_steps // 2)  # transitions, if every second row is an autoreset
    if fewest < args.num_minibatches:
        raise ValueError(
            f"num_minibatches {args.num_minibatches} must not exceed the {fewest} transitions that "
            f"num_envs {args.num_envs} × num_steps {args.num_steps} is sure to hold"
        )


def env_seed(seed, global_step=0, evaluation=False):
    """The seed of the first environment. Gymnasium gives environment i the seed of the first plus i.

    Hashed, so that two runs share no environment. With the run's own seed, environments 1 to 7 of seed 1 would be
    environments 0 to 6 of seed 2, and a comparison over seeds would count the same episodes twice.
    """
    hashed = np.random.SeedSequence([seed, global_step, int(evaluation)]).generate_state(1)[0]
    return int(hashed % 2**30)  # ale-py accepts 31 bits


def check_device(device):
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise InputError(f"--device {device} is not available: {reason}") from error


def keep_freed_memory():
    """By default glibc returns large freed blocks to the system, and each minibatch waits for new, zeroed pages."""
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: keep the free end of the heap, however large


def check_video(args):
    """Refuse --capture-video before training if it cannot work after training."""
    try:
        import moviepy  # noqa: F401
    except ImportError as error:
        raise InputError("--capture-video needs moviepy: pip install moviepy") from error


# ---- Files and logs ----

# what a resumed run may change; with any other change it would be another run
CHANGEABLE = "resume device torch_threads checkpoint_every eval_episodes save_model capture_video track wandb_project"


def load_checkpoint(args):
    """The checkpoint of --resume. Raises InputError if a setting differs that must stay as it was."""
    saved = load(Path(args.resume) / "checkpoint.pt", "agent", "optimizer", "metrics")
    settings = replace(saved["args"], run_dir=None)
    for name in {field.name for field in fields(Args)} - set(CHANGEABLE.split()):
        given, before = getattr(args, name), getattr(settings, name)
        if given != before:
            raise InputError(f"--resume keeps the run's own {name} {before}; {given} needs a separate run")
    return saved


def start_run(args, saved, rank):
    """The run directory and TensorBoard's writer in it. Only the first process writes; the others get no writer."""
    from torch.utils.tensorboard import SummaryWriter

    if args.capture_video:
        check_video(args)
    run_dir = Path(args.resume or args.run_dir or new_run_dir(args))
    if rank > 0:
        return run_dir, None
    if not saved:
        make_run_dir(run_dir)
    if args.track:
        start_wandb(args, run_dir)
    return run_dir, SummaryWriter(run_dir, purge_step=saved["global_step"] + 1 if saved else None)


def new_run_dir(args):
    name = args.env_id.replace("/", "-").replace(":", "-")
    return f"runs/{name}__{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"


def make_run_dir(run_dir):
    """Make the run's own directory. Of two runs that start at once with one name, the second is refused."""
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError as error:
        can_resume = (run_dir / "checkpoint.pt").exists()
        hint = f"--resume {run_dir} resumes it" if can_resume else "choose another"
        raise InputError(f"--run-dir {run_dir} exists: {hint}") from error


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


@contextmanager
def written_aside(path):
    """A temporary path to write to, renamed at the end: whatever happens, the old file or the new one is whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException as error:
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        if isinstance(error, Exception):  # on a full disk torch raises a RuntimeError, and other writers their own
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise OSError(f"{path} could not be written, with {free / 1e6:.1f} MB free: {reason}") from error
        raise


def save(path, content):
    with written_aside(path) as temporary:
        torch.save(content, temporary)


def load(path, *keys):
    """The dict that save() wrote, which must have `keys`. Plain data only, so no code in the file can run."""
    if not path.is_file():
        raise InputError(f"{path} is not a file: --resume takes a run directory, --evaluate a file in one")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["args"] = Args(**content["args"])
        missing = set(keys) - content.keys()
    except Exception as error:
        raise InputError(f"{path} is not a checkpoint or model of this script, or it is damaged") from error
    if missing:
        raise InputError(f"{path} is not a checkpoint of this script: it lacks {', '.join(sorted(missing))}")
    return content


def resumed_args(run_dir):
    """The settings with which train() resumes the run in run_dir."""
    return replace(load(Path(run_dir) / "checkpoint.pt")["args"], resume=str(run_dir), run_dir=None)


def evaluate_saved(args):
    """--evaluate PATH: play with a model or checkpoint that an earlier run wrote."""
    check_device(args.device)
    if args.capture_video:
        check_video(args)
    saved = load(Path(args.evaluate), "agent")
    args = without_slow_bf16(args, args.device)
    agent = Agent(make_envs(args, 1), args).to(args.device)
    try:
        agent.load_state_dict(saved["agent"])
    except RuntimeError as error:
        raise InputError(f"{args.evaluate} does not fit --env-id {args.env_id} and these settings") from error
    return evaluate(agent, args, Path(args.evaluate).parent)


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
    with written_aside(path) as temporary:
        axes.figure.savefig(temporary, dpi=120, format="png")


# ---- Command line ----


def parse_args():
    """The command line. With --resume or --evaluate the saved run's settings are the defaults of the other flags."""
    import tyro

    args = tyro.cli(Args, description=__doc__.splitlines()[0])
    if args.resume:
        return tyro.cli(Args, default=resumed_args(args.resume))
    if args.evaluate:
        saved = load(Path(args.evaluate))["args"]
        off = {"resume": None, "run_dir": None, "save_model": False, "track": False, "capture_video": False}
        return tyro.cli(Args, default=replace(saved, **off, eval_episodes=Args.eval_episodes))
    return args if args.run_dir else replace(args, run_dir=new_run_dir(args))


def guard_output():
    """Print "?" for letters that the terminal lacks. Run to the end when the reader has left (`| head`)."""

    def guarded(stream, method):
        def call(*arguments):
            try:
                return method(*arguments)
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what else is printed goes nowhere

        return call

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
            stream.write, stream.flush = guarded(stream, stream.write), guarded(stream, stream.flush)


def main():
    """Parse, run. A mistake that the user can fix ends in one sentence and exit status 2."""
    guard_output()
    run_dir = None
    try:
        args = parse_args()
        run_dir = args.resume or args.run_dir
        evaluate_saved(args) if args.evaluate else train(args)
    except (InputError, gym.error.DependencyNotInstalled, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        can_resume = run_dir and (Path(run_dir) / "checkpoint.pt").exists()
        print(f"\ninterrupted{f': --resume {run_dir} continues it' if can_resume else ''}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
