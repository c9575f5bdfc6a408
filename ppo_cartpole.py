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
Expect   10 seeds of 10 solve it (mean return of the last 100 episodes at 475) in 1.1 to 1.6 s and 79k to 104k steps;
         200k steps take 3 to 4 s and end with greedy play at 500 (one thread of an AMD EPYC; benchmarks/RESULTS.md)
Departs  from the paper by what its authors' code added: [D2] to [D4], [D7], [D9], [D11] and the ½ before c₁'s square;
         from the textbook's settings, for speed: 64 environments of 32 steps for 4 of 128, learning rate 8e-3 for
         2.5e-4, γ 0.98 for 0.99, λ 0.9 for 0.95, clip range annealed, no value clipping, no entropy bonus. With the
         textbook's it is solved in 13 to 21 s:  --num-envs 4 --num-steps 128 --learning-rate 2.5e-4 --gamma 0.99
         --gae-lambda 0.95 --no-anneal-clip --clip-vloss --ent-coef 0.01 --total-timesteps 500000

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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from io import TextIOWrapper
from math import sqrt
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from torch import nn


@dataclass(frozen=True)
class Args:
    env_id: str = "CartPole-v1"  # any Gymnasium id with discrete actions and a flat observation
    seed: int = 1  # of the networks, the actions, the minibatches and the environments
    total_timesteps: int = 200_000  # environment steps; an autoreset is none
    num_envs: int = 64  # environments that step together, N
    num_steps: int = 32  # steps of each environment per rollout, T
    num_minibatches: int = 4  # gradient steps per epoch
    update_epochs: int = 4  # passes over each rollout
    learning_rate: float = 8e-3  # Adam's, at the start
    anneal_lr: bool = True  # learning rate falls to 0 over the run
    gamma: float = 0.98  # discount, per environment step
    gae_lambda: float = 0.9  # GAE's λ: 0 trusts the critic, 1 the sampled rewards
    norm_adv: bool = True  # advantages to mean 0, standard deviation 1, in each minibatch
    clip_coef: float = 0.2  # ε, the half-width of the range of the ratio, at the start
    anneal_clip: bool = True  # clip_coef falls to 0 over the run
    clip_vloss: bool = False  # clip the value loss too
    ent_coef: float = 0.0  # weight of the entropy bonus, c₂
    vf_coef: float = 0.5  # weight of the value loss, c₁
    max_grad_norm: float = 0.5  # global norm that gradients are cut to
    target_kl: float | None = None  # leave a rollout's updates once a minibatch's KL exceeds this, in nats
    hidden_size: int = 64  # width of both hidden layers of both networks
    eval_episodes: int = 100  # greedy episodes at the end; 0 for none
    eval_max_steps: int = 10_000  # steps after which such an episode is cut, for environments that never end
    device: str = "cpu"  # cpu, cuda, cuda:1 …
    torch_threads: int = 1  # CPU threads of torch; two gain a fifth on an idle machine, lose much on a busy one
    torch_deterministic: bool = True  # refuse operations whose result varies from run to run
    run_dir: str | None = None  # where logs, checkpoint and plot go; default runs/<env>__<script>__<seed>__<time>
    checkpoint_every: int = 10  # iterations between two checkpoints; 0 for only one, at the end
    resume: str | None = None  # directory of a run that was stopped: go on from its checkpoint, on CartPole bit for bit
    evaluate: str | None = None  # saved model or checkpoint: play eval_episodes with it, no training
    save_model: bool = False  # write the weights alone to model.pt at the end
    capture_video: bool = False  # film one greedy episode of the trained agent, an MP4
    track: bool = False  # log to Weights & Biases too (pip install wandb)
    wandb_project: str = "ppo-cartpole"  # its project there

    def __post_init__(self):
        positive = "total_timesteps num_envs num_steps num_minibatches update_epochs learning_rate clip_coef"
        for name in (*positive.split(), "max_grad_norm", "hidden_size", "torch_threads", "eval_max_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("seed", "eval_episodes", "checkpoint_every", "ent_coef", "vf_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.seed >= 2**30:
            raise ValueError(f"seed must be below 2**30, got {self.seed}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.eval_episodes == 0 and (self.evaluate or self.capture_video):
            raise ValueError("evaluate and capture_video need eval_episodes above 0, got 0")
        if "" in (self.resume, self.evaluate, self.run_dir):
            raise ValueError("resume, evaluate and run_dir need a path, got an empty one")
        if self.evaluate and (self.resume or self.run_dir or self.save_model or self.track):
            raise ValueError("evaluate only plays: resume, run_dir, save_model and track exclude it")
        if self.resume and self.run_dir:
            raise ValueError(f"resume {self.resume} goes on in its own directory, not in run_dir {self.run_dir}")
        if self.target_kl is not None and not self.target_kl > 0:
            raise ValueError(f"target_kl must be above 0, got {self.target_kl}")
        fewest = self.num_envs * (self.num_steps // 2)  # where every second row is an autoreset
        if fewest < self.num_minibatches:
            raise ValueError(
                f"num_minibatches {self.num_minibatches} must not exceed the {fewest} transitions that "
                f"num_envs {self.num_envs} × num_steps {self.num_steps} is sure to hold"
            )


class InputError(ValueError):
    """A mistake that the user can mend: main() prints its one sentence and exits with status 2."""


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


def make_envs(args, num_envs, render_mode=None):
    """num_envs copies that step together: the environment's own vector form where it has one, else SyncVectorEnv."""
    env_id = args.env_id
    try:
        mode = {"render_mode": render_mode} if render_mode else {}  # some classes take none
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
        raise InputError(f"--env-id {env_id} resets by {mode}; this script needs NEXT_STEP")
    return envs


def check_video(args):
    """--capture-video is refused before training where it could not work after it."""
    try:
        import moviepy  # noqa: F401
    except ImportError as error:
        raise InputError("--capture-video needs moviepy: pip install moviepy") from error
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # frames are drawn without a screen
    reason = "its render() returned nothing"
    try:
        envs = make_envs(args, 1, render_mode="rgb_array")
        envs.reset(seed=0)
        is_drawn = envs.render()[0] is not None
        envs.close()
    except Exception as error:  # whatever an environment raises that cannot draw
        is_drawn, reason = False, (str(error) or type(error).__name__).splitlines()[0]
    if not is_drawn:
        raise InputError(f"--capture-video: {args.env_id} cannot draw itself: {reason}")


def check_finite(args, what, numbers, steps):
    """numbers (N, …) as the environments returned them, in the step of its episode that steps (N,) counts."""
    if np.isfinite(numbers).all():
        return
    i = int(np.argmin(np.isfinite(numbers).reshape(len(numbers), -1).all(1)))
    bad = numbers[i][~np.isfinite(numbers[i])] if np.ndim(numbers) > 1 else numbers[i : i + 1]
    raise InputError(
        f"--env-id {args.env_id}: environment {i} returned {bad[0]} in its {what}, in step {steps[i]} of its episode"
    )


def env_seed(seed, global_step=0, evaluation=False):
    """The seed of the first environment; environment i is given i more, by Gymnasium.

    Hashed, so that runs share no environment. Given the run's own seed, environments 1 to 7 of seed 1 would be
    environments 0 to 6 of seed 2, and a comparison over seeds would count the same episodes twice.
    """
    hashed = np.random.SeedSequence([seed, global_step, int(evaluation)]).generate_state(1)[0]
    return int(hashed % 2**30)  # ale-py takes 31 bits


def env_state(envs):
    """What CartPole's vector environment holds between two steps, as plain data; None for any other."""
    env = envs.unwrapped
    if not isinstance(env, CartPoleVectorEnv):
        return None
    arrays = {name: torch.tensor(getattr(env, name)) for name in ("state", "steps", "prev_done")}
    return {"arrays": arrays, "generator": env.np_random.bit_generator.state}


def restore_envs(envs, state):
    """The inverse of env_state."""
    for name, array in state["arrays"].items():
        setattr(envs.unwrapped, name, array.numpy())
    envs.unwrapped.np_random.bit_generator.state = state["generator"]


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


def check_device(device):
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} is not to be had here: {str(error).splitlines()[0]}") from error


# ---- Files, evaluation ----


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
    """The dict that save() wrote, `keys` among its own; tensors and plain data only: a foreign file can run no code."""
    if not path.is_file():
        raise InputError(f"{path} is not a file: --resume takes a run directory, --evaluate a file in one")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["args"] = Args(**content["args"])
        missing = set(keys) - content.keys()
    except Exception as error:
        raise InputError(f"{path} is no checkpoint or model of this script, or is damaged") from error
    if missing:
        raise InputError(f"{path} is no checkpoint of this script: it lacks {', '.join(sorted(missing))}")
    return content


def play(agent, args, episodes, video_dir=None):
    """Returns of greedy episodes: the first of each environment, or short episodes would be over-represented."""
    envs = make_envs(args, episodes, render_mode="rgb_array" if video_dir else None)
    if video_dir:
        envs = gym.wrappers.vector.RecordVideo(envs, str(video_dir), episode_trigger=lambda episode: episode == 0)
    obs, _ = envs.reset(seed=env_seed(args.seed, evaluation=True))
    returns, running, steps = np.zeros(episodes), np.ones(episodes, dtype=bool), 0
    while running.any() and steps < args.eval_max_steps:
        check_finite(args, "observation", obs, [steps] * episodes)
        with torch.inference_mode():
            actions = agent.actor(torch.as_tensor(obs, dtype=torch.float32, device=args.device)).argmax(-1)
        obs, rewards, terminated, truncated, _ = envs.step(actions.cpu().numpy())
        steps += 1
        check_finite(args, "reward", rewards, [steps] * episodes)
        returns += rewards * running
        running &= ~(terminated | truncated)
    envs.close()
    if running.any():
        print(f"evaluation  {running.sum()} of {episodes} episodes were cut after {steps} steps, --eval-max-steps")
    return returns


def evaluate(agent, args, run_dir):
    """Play eval_episodes greedy episodes and print what came of it; film one more on --capture-video."""
    returns = play(agent, args, args.eval_episodes)
    print(f"evaluation  {len(returns)} greedy episodes: mean return {returns.mean():.1f}, lowest {returns.min():.1f}")
    if args.capture_video:
        with written_aside(run_dir / "video") as video_dir:
            play(agent, args, 1, video_dir)
        print(f"video       {run_dir / 'video'}")
    return returns


def evaluate_saved(args):
    """--evaluate PATH: the same for a model or checkpoint that an earlier run wrote."""
    check_device(args.device)
    if args.capture_video:
        check_video(args)
    saved = load(Path(args.evaluate), "agent")
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


# ---- Training ----

# what a resumed run may do otherwise than before; everything else would make it another run
CHANGEABLE = (
    "resume device torch_threads checkpoint_every eval_episodes eval_max_steps save_model capture_video track "
    "wandb_project"
)


def make_run_dir(run_dir):
    """Make the run's own directory. Of two runs that start at once with one name, the second is refused."""
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError as error:
        can_resume = (run_dir / "checkpoint.pt").exists()
        hint = f"--resume {run_dir} goes on with it" if can_resume else "choose another"
        raise InputError(f"--run-dir {run_dir} exists: {hint}") from error


def new_run_dir(args):
    name = args.env_id.replace("/", "-").replace(":", "-")
    return f"runs/{name}__{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"


def resumed_args(run_dir):
    """The settings with which train() goes on with the run in run_dir."""
    return replace(load(Path(run_dir) / "checkpoint.pt")["args"], resume=str(run_dir), run_dir=None)


def train(args: Args) -> list[dict]:
    """Train, evaluate, write logs, plot and checkpoint. Returns the metrics of each iteration, oldest first."""
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    # 1. Settings, seeds
    saved = load(Path(args.resume) / "checkpoint.pt", "agent", "optimizer", "metrics") if args.resume else None
    if saved:
        settings = replace(saved["args"], run_dir=None)
        for name in {field.name for field in fields(Args)} - set(CHANGEABLE.split()):
            given, before = getattr(args, name), getattr(settings, name)
            if given != before:
                raise InputError(f"--resume keeps the run's own {name} {before}; {given} needs a run of its own")
    check_device(args.device)
    torch.set_num_threads(args.torch_threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's matrix products are refused here:
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that writes every tensor twice
    torch.manual_seed(args.seed)

    # 2. Environments [D1], networks, optimizer
    if args.capture_video:
        check_video(args)
    envs = make_envs(args, args.num_envs)
    threshold = envs.spec.reward_threshold  # mean return at which Gymnasium calls this environment solved, or None
    agent = Agent(envs, args).to(args.device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)  # [D3] not 1e-8

    # 3. Run directory, logs
    run_dir = Path(args.resume or args.run_dir or new_run_dir(args))
    if not saved:
        make_run_dir(run_dir)
    if args.track:
        start_wandb(args, run_dir)
    writer = SummaryWriter(run_dir, purge_step=saved["global_step"] + 1 if saved else None)

    # 4. Storage: step t of the rollout is row t; obs has one row more, what the last step returned
    T, N = args.num_steps, args.num_envs
    obs = torch.zeros(T + 1, N, *envs.single_observation_space.shape, device=args.device)
    actions = torch.zeros(T, N, dtype=torch.long, device=args.device)
    rewards = torch.zeros(T, N, device=args.device)
    terminated, done, is_transition = (torch.zeros(T, N, dtype=torch.bool, device=args.device) for _ in range(3))

    # 5. Begin, or go on from the checkpoint
    global_step, seconds, metrics = 0, 0.0, []
    last_100 = deque(maxlen=100)  # returns of the last 100 episodes, undiscounted
    episode_return, episode_length = np.zeros(N), np.zeros(N, dtype=np.int64)  # of the episodes under way
    was_done = np.zeros(N, dtype=bool)  # the episode ended in the step before: the coming step is an autoreset
    next_obs, _ = envs.reset(seed=env_seed(args.seed))
    if saved:
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        global_step, seconds, metrics = saved["global_step"], saved["seconds"], saved["metrics"]
        last_100.extend(saved["last_100"])
        if saved["envs"] is None:
            print("The episodes under way could not be saved with this environment: new ones begin.")
            next_obs, _ = envs.reset(seed=env_seed(args.seed, global_step))
        else:
            restore_envs(envs, saved["envs"])
            next_obs, was_done = saved["next_obs"].numpy(), saved["was_done"].numpy()
            episode_return, episode_length = saved["episode_return"].numpy(), saved["episode_length"].numpy()
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] is not None and args.device.startswith("cuda"):
            torch.cuda.set_rng_state(saved["cuda_rng"], args.device)
    check_finite(args, "observation", next_obs, episode_length)
    obs[T] = torch.as_tensor(next_obs)
    start_time = time.perf_counter() - seconds
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", unit_scale=True)

    while global_step < args.total_timesteps:
        # 6. Learning rate [D4] and clip range fall linearly to 0
        remaining = 1 - global_step / args.total_timesteps
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)
        optimizer.param_groups[0]["lr"] = learning_rate

        # 7. Rollout: T steps of N environments under the current policy [D1]
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
            is_transition[t] = torch.as_tensor(~was_done)  # the step after done ignores its action: no transition
            episode_return += reward * ~was_done
            episode_length += ~was_done
            check_finite(args, "reward", reward, episode_length)
            check_finite(args, "observation", next_obs, episode_length)
            for i in np.flatnonzero(is_done):
                finished.append((float(episode_return[i]), int(episode_length[i])))
                episode_return[i] = episode_length[i] = 0
            was_done = is_done
        global_step += int(is_transition.sum())
        last_100.extend(episode[0] for episode in finished)

        # 8. What the policy of the rollout thought of it: old log-probabilities, values, advantages, returns
        with torch.no_grad():
            old_logprobs, _ = action_logprob_and_entropy(agent.actor(obs[:T]), actions)
            values = agent.critic(obs).squeeze(-1)  # (T + 1, N)
        advantages = compute_gae(rewards, values[:T], values[1:], terminated, done, args.gamma, args.gae_lambda)
        returns = advantages + values[:T]

        # 9. Flatten to the M transitions: the rows of the autoresets stay out
        rows = (obs[:T], actions, old_logprobs, values[:T], advantages, returns)
        b_obs, b_actions, b_logprobs, b_values, b_advantages, b_returns = (row[is_transition] for row in rows)

        # 10. Update: epochs of minibatches [D6], each of the M transitions once an epoch, sizes equal to within one
        losses = []
        # one flat loop over all epochs' minibatches, so that the break below ends them all
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
                break  # before this step is taken; the next rollout starts afresh

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

        # 11. Metrics: the losses are means over every minibatch
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

        # 12. Checkpoint: between two iterations nothing is half done
        is_last = global_step >= args.total_timesteps
        if is_last or (args.checkpoint_every and len(metrics) % args.checkpoint_every == 0):
            writer.flush()
            content = {
                "args": asdict(args),
                "agent": agent.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(args.device) if args.device.startswith("cuda") else None,
                "envs": env_state(envs),
                "next_obs": obs[T].cpu(),
                "was_done": torch.from_numpy(was_done),
                "episode_return": torch.from_numpy(episode_return),
                "episode_length": torch.from_numpy(episode_length),
                "last_100": list(last_100),
                "global_step": global_step,
                "seconds": seconds,
                "metrics": metrics,
            }
            save(run_dir / "checkpoint.pt", content)
    bar.close()
    envs.close()

    # 13. Greedy evaluation, files, summary
    print(f"\n{args.env_id}: {global_step:,} steps in {seconds:.1f} s, {global_step / seconds:,.0f} steps a second")
    solved = [row for row in metrics if threshold is not None and row.get("charts/return_100", -np.inf) >= threshold]
    if solved:
        first = f"after {solved[0]['global_step']:,} steps, {solved[0]['seconds']:.1f} s"
        print(f"solved      mean return of the last 100 episodes reached {threshold:g} {first}")
    elif threshold is not None:
        print(f"not solved  the mean return of the last 100 episodes never reached {threshold:g}")
    draw_learning_curve(metrics, threshold, run_dir / "learning_curve.png")
    print(f"curve       {run_dir / 'learning_curve.png'}")
    if args.save_model:
        save(run_dir / "model.pt", {"args": asdict(args), "agent": agent.state_dict()})
        print(f"model       {run_dir / 'model.pt'}")
    if args.eval_episodes:
        metrics[-1]["charts/eval_return"] = float(evaluate(agent, args, run_dir).mean())
        writer.add_scalar("charts/eval_return", metrics[-1]["charts/eval_return"], global_step)
    writer.close()
    print(f"logs        tensorboard --logdir {run_dir.parent}")
    print(f"next        python ppo_cartpole.py --evaluate {run_dir / 'checkpoint.pt'} --capture-video")
    return metrics


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
    """Print "?" for what the terminal's encoding lacks; go on to the end when the reader has left (`| head`)."""

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
    """Parse, run. What the user can mend ends in one sentence and exit status 2."""
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
        print(f"\ninterrupted{f': go on with --resume {run_dir}' if can_resume else ''}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
