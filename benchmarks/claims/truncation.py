"""Claim 3: truncation treated as termination, what it costs. On CartPole with short time limits, and where it decides.

Run      python benchmarks/claims/truncation.py                    (about five minutes on one core)
         python benchmarks/claims/truncation.py --draw             (table and figure from the kept results)
Writes   benchmarks/results/claims_truncation.jsonl (a stopped series goes on with the next seed),
         docs/figures/claims_truncation.png

ppo_cartpole.py with its defaults, and the same with one word changed: the bootstrap is cut at a time limit too.

* CartPole, 100,000 steps under a limit of 25, 50, 100 or 500 steps; judged by greedy episodes of up to 500 steps. The
  critic's value of the first observation is noted too, and of an upright pole 0.3 m aside of the centre, where nothing
  is wrong yet (the track ends at 2.4): a pole that stays up is worth 1/(1 − γ) = 50, limit or no limit.
* StayOrLeave, made for the purpose: staying pays 0.1 a step for ever, leaving pays 1 and ends it. At γ = 0.98 staying
  is worth 5. The limit is 8 steps: whoever takes it for death sees at most 0.8 in staying, and plans to leave before.
  60,000 steps; judged by the return that the policy expects of 500 steps without a limit, 50 at best.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(Path(__file__).resolve().parent)]
from cartpole import RESULTS, machine  # noqa: E402
from ppo_details import variant  # noqa: E402

FILE = RESULTS / "claims_truncation.jsonl"
LIMITS = (25, 50, 100, 500)
WRONG = ("torch.where(terminated, 0.0, next_values)", "torch.where(done, 0.0, next_values)")
NAMES = {"right": [], "wrong": [WRONG]}


class StayOrLeave(gym.Env):
    """One state. Action 0 stays, +0.1; action 1 leaves, +1 and terminated."""

    observation_space = gym.spaces.Box(0.0, 1.0, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, dtype=np.float32), {}

    def step(self, action):
        return np.ones(1, dtype=np.float32), 1.0 if action else 0.1, bool(action), False, {}


def register():
    cartpole = "gymnasium.envs.classic_control.cartpole:CartPole"
    for limit in LIMITS:
        options = {"vector_entry_point": f"{cartpole}VectorEnv", "max_episode_steps": limit}
        gym.register(f"CartPole{limit}-v0", f"{cartpole}Env", **options)
    gym.register("StayOrLeave-v0", StayOrLeave, max_episode_steps=8)


def trained(replacements, seed, env_id, steps, folder):
    """(script, agent, args) after a run."""
    script = variant(replacements, folder)
    files = {"eval_episodes": 0, "run_dir": f"{folder}/run"}
    args = script.Args(env_id=env_id, seed=seed, total_timesteps=steps, **files)
    script.train(args)
    agent = script.Agent(script.make_envs(args, 1), args)
    agent.load_state_dict(torch.load(f"{folder}/run/model.pt", weights_only=True)["agent"])
    return script, agent, args


def measure(seed):
    for name, replacements in NAMES.items():
        for limit in LIMITS:
            with tempfile.TemporaryDirectory() as folder:
                script, agent, args = trained(replacements, seed, f"CartPole{limit}-v0", 100_000, folder)
                long = script.replace(args, env_id="CartPole500-v0")
                returns = script.play(agent, long, 100)
                first, _ = script.make_envs(args, 100).reset(seed=seed)
                with torch.inference_mode():
                    value = float(agent.critic(torch.as_tensor(first, dtype=torch.float32)).mean())
                    aside = float(agent.critic(torch.tensor([[0.3, 0.0, 0.0, 0.0]])))
            row = {"env": "CartPole", "limit": limit, "variant": name, "seed": seed}
            row |= {"return": round(float(returns.mean()), 2), "value": round(value, 2), "value_aside": round(aside, 2)}
            yield row
        with tempfile.TemporaryDirectory() as folder:
            script, agent, args = trained(replacements, seed, "StayOrLeave-v0", 60_000, folder)
            with torch.inference_mode():
                stay = float(agent.actor(torch.ones(1, 1)).softmax(-1)[0, 0])
                value = float(agent.critic(torch.ones(1, 1)))
        expected = sum(stay**t * (0.1 * stay + 1 - stay) for t in range(500))
        row = {"env": "StayOrLeave", "variant": name, "seed": seed, "stay": round(stay, 5), "value": round(value, 3)}
        yield {**row, "return": round(expected, 2)}


def draw():
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()][1:]
    cartpole = [row for row in rows if row["env"] == "CartPole"]
    left, right = Figure(figsize=(9, 4.4), layout="constrained").subplots(1, 2)
    rng = np.random.default_rng(0)
    print("| limit | bootstrap | return of 500-step episodes: median (quartiles) | V at the start | V 0.3 m aside |")
    print("|---|---|---|---|---|")
    for i, limit in enumerate(LIMITS):
        pair = []
        for j, (name, color) in enumerate((("right", "C0"), ("wrong", "C3"))):
            mine = [row for row in cartpole if (row["limit"], row["variant"]) == (limit, name)]
            returns = np.array([row["return"] for row in mine])
            value, aside = (np.median([row[key] for row in mine]) for key in ("value", "value_aside"))
            pair.append(returns)
            low, middle, high = np.quantile(returns, (0.25, 0.5, 0.75))
            text = "as it is" if name == "right" else "cut"
            cells = [f"{limit}", text, f"{middle:.0f} ({low:.0f} to {high:.0f})", f"{value:.1f}", f"{aside:.1f}"]
            print(f"| {' | '.join(cells)} |")
            words = {"right": "V of the last state, as is right", "wrong": "0, as if it were the end"}
            label = words[name] if i == 0 else None
            left.plot(np.full(len(returns), i + 0.25 * j - 0.12), returns, ".", color=color, alpha=0.6, label=label)
            left.plot([i + 0.25 * j - 0.12], [middle], "_", color="k", markersize=14)
        ours, theirs = (rng.choice(x, (10_000, len(x))).mean(1) for x in pair)
        low, high = np.quantile(theirs - ours, (0.025, 0.975))
        difference = pair[1].mean() - pair[0].mean()
        print(f"| {limit} | difference of the means (95%) | {difference:+.0f} ({low:+.0f} to {high:+.0f}) | | |")
    left.set_xticks(range(len(LIMITS)), [f"{limit}" for limit in LIMITS])
    left.set(title="CartPole", xlabel="time limit in training", ylabel="return of greedy 500-step episodes")
    left.plot([], [], "_", color="k", markersize=14, label="median")
    labels = dict(title="value after the limit; one dot for each seed", loc="outside lower center", ncols=3)
    left.figure.legend(*left.get_legend_handles_labels(), fontsize=8, title_fontsize=8, **labels)
    for j, (name, color) in enumerate((("right", "C0"), ("wrong", "C3"))):
        mine = [row for row in rows if row["env"] == "StayOrLeave" and row["variant"] == name]
        returns, stays, values = ([row[key] for row in mine] for key in ("return", "stay", "value"))
        low, middle, high = np.quantile(returns, (0.25, 0.5, 0.75))
        print(f"StayOrLeave, {name}: return of 500 steps {middle:.1f} ({low:.1f} to {high:.1f}), ", end="")
        print(f"π(stay) {np.median(stays):.4f} ({min(stays):.4f} to {max(stays):.4f}), V {np.median(values):.2f}")
        right.plot(np.full(len(returns), j), returns, ".", color=color, alpha=0.6, markersize=10)
    right.set_xticks([0, 1], ["V of the last state", "0"])
    right.axhline(50, color="0.4", ls="--", lw=1)
    right.text(1.45, 49.5, "best: 50", ha="right", va="top", color="0.4", fontsize=9)
    right.set(title="StayOrLeave, limit 8", ylabel="expected return of 500 steps", ylim=(0, 52), xlim=(-0.5, 1.5))
    left.figure.savefig(ROOT / "docs" / "figures" / "claims_truncation.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--draw", action="store_true", help="table and figure from the kept results, no runs")
    options = parser.parse_args()
    if not options.draw:
        register()
        if not FILE.exists():
            FILE.write_text(json.dumps({"machine": machine(), "date": time.strftime("%Y-%m-%d")}) + "\n")
        done = {json.loads(line).get("seed") for line in FILE.read_text(encoding="utf-8").splitlines()}
        for seed in sorted(set(range(1, options.seeds + 1)) - done):
            lines = "".join(f"{json.dumps(row)}\n" for row in measure(seed))
            with FILE.open("a", encoding="utf-8") as file:
                file.write(lines)
    draw()
