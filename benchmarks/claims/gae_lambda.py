"""Claim 1: GAE's λ trades bias against variance. On a chain whose true advantages are known, and on CartPole.

Run      python benchmarks/claims/gae_lambda.py                    (half a minute on one core)
         python benchmarks/claims/gae_lambda.py --draw             (table and figure from the kept results)
Writes   benchmarks/results/claims_gae_lambda.jsonl, docs/figures/claims_gae_lambda.png

The chain: nine states in a row, begun in the middle, +1 beyond the right end, 0 beyond the left one, and 0.1 times a
normal deviate of reward on every step. The policy goes right with 0.6, the ground is slippery (one step in ten goes the
other way), γ = 0.99. V and A follow from linear equations. The critic is V plus an error, drawn once for a seed:
N(0, σ) in each state, σ = 0, 0.1 or 0.3. Advantages come from ppo_cartpole.py's own compute_gae, on 400 chains of 300
steps, of which the first 150 count. Bias and standard deviation are those of Â given state and action, root mean
square over how often the policy meets the pair; what is common to both actions of a state is a baseline, leaves the
gradient alone and is no bias here. "Error" is that of a mean over 25 samples: √(bias² + deviation² / 25).

CartPole: from the kept results of ppo_details.py, ten seeds of 100,000 steps with the defaults (λ = 0.9) and λ = 0,
0.5 and 1; the area under the learning curve.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from cartpole import RESULTS, machine  # noqa: E402

import ppo_cartpole as ppo  # noqa: E402

FILE = RESULTS / "claims_gae_lambda.jsonl"
LAMBDAS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 1.0)
SIGMAS = (0.0, 0.1, 0.3)
CARTPOLE = {
    0.0: "λ = 0: one-step advantages",
    0.5: "λ = 0.5",
    0.9: "defaults",
    1.0: "λ = 1: Monte Carlo advantages",
}
STATES, RIGHT, SLIP, NOISE, GAMMA = 9, 0.6, 0.1, 0.1, 0.99
CHAINS, STEPS, COUNTED = 400, 300, 150


def true_values():
    """V (S,) and A (S, 2) of the policy, by Bellman's equations. Action 1 is right."""
    moves = np.zeros((STATES, 2, STATES + 2))  # next state, the two ends included: 0 … S + 1
    for s in range(STATES):
        for action, towards in ((0, s), (1, s + 2)):
            moves[s, action, towards] += 1 - SLIP
            moves[s, action, 2 * s + 2 - towards] += SLIP
    reward = moves[:, :, -1]  # +1 on arriving at the right end
    policy = np.array([1 - RIGHT, RIGHT])
    inside = np.einsum("a,sat->st", policy, moves)[:, 1:-1]
    value = np.linalg.solve(np.eye(STATES) - GAMMA * inside, reward @ policy)
    return value, reward + GAMMA * moves[:, :, 1:-1] @ value - value[:, None]


def estimates(seed, value, sigma):
    """States and actions (COUNTED, CHAINS) and for each λ the advantages of the same steps."""
    rng = np.random.default_rng(seed)
    critic = np.concatenate([[0], value + sigma * rng.standard_normal(STATES), [0]])
    state = np.full(CHAINS, (STATES + 1) // 2)
    rows = {name: np.zeros((STEPS, CHAINS)) for name in ("state", "action", "next", "reward", "terminated")}
    for t in range(STEPS):
        action = (rng.random(CHAINS) < RIGHT).astype(int)
        right = action ^ (rng.random(CHAINS) < SLIP)
        after = state + 2 * right - 1
        terminated = (after == 0) | (after == STATES + 1)
        reward = (after == STATES + 1) + NOISE * rng.standard_normal(CHAINS)
        for name, row in zip(rows, (state, action, after, reward, terminated)):
            rows[name][t] = row
        state = np.where(terminated, (STATES + 1) // 2, after)
    states, after = rows["state"].astype(int), rows["next"].astype(int)
    done = torch.from_numpy(rows["terminated"] > 0)
    tensors = [torch.from_numpy(x) for x in (rows["reward"], critic[states], critic[after])]
    advantages = {lam: ppo.compute_gae(*tensors, done, done, GAMMA, lam)[:COUNTED].numpy() for lam in LAMBDAS}
    return states[:COUNTED] - 1, rows["action"][:COUNTED].astype(int), advantages


def measure_chain(seed):
    value, true = true_values()
    for sigma in SIGMAS:
        states, actions, advantages = estimates(seed, value, sigma)
        for lam, advantage in advantages.items():
            bias = variance = 0.0
            for s in range(STATES):
                own = [advantage[(states == s) & (actions == a)] for a in (0, 1)]
                means, spreads, counts = zip(*((x.mean(), x.var(ddof=1), len(x)) for x in own))
                gap = means[1] - means[0] - (true[s, 1] - true[s, 0])  # what is common to both actions is a baseline
                gap2 = gap**2 - spreads[0] / counts[0] - spreads[1] / counts[1]  # the means' own noise taken out
                bias += gap2 * RIGHT * (1 - RIGHT) * sum(counts) / advantage.size  # centred under the policy
                variance += (spreads[0] * counts[0] + spreads[1] * counts[1]) / advantage.size
            row = {"seed": seed, "sigma": sigma, "lambda": lam, "bias2": bias, "variance": variance}
            yield {name: round(number, 6) for name, number in row.items()}


def draw():
    from matplotlib.figure import Figure

    def read(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][1:]

    chain = read(FILE)
    cartpole = [row for row in read(RESULTS / "claims_ppo_details.jsonl") if row["env"] == "CartPole-v1"]
    axes = Figure(figsize=(11, 3.8), layout="constrained").subplots(1, 3)
    for ax, lambdas in zip(axes, (LAMBDAS, LAMBDAS, CARTPOLE)):
        ax.set_xticks(range(len(lambdas)), [f"{lam:g}" for lam in lambdas])
        ax.set_xlabel("λ")
    print("| critic's error σ | λ | bias, root mean square | standard deviation | error of 25: median (quartiles) |")
    print("|---|---|---|---|---|")
    for i, sigma in enumerate(SIGMAS):
        errors = []
        for lam in LAMBDAS:
            mine = [r for r in chain if (r["sigma"], r["lambda"]) == (sigma, lam)]
            bias = np.sqrt(np.maximum([r["bias2"] for r in mine], 0))
            deviation = np.sqrt([r["variance"] for r in mine])
            whole = np.sqrt([max(r["bias2"] + r["variance"] / 25, 0) for r in mine])
            errors.append((np.median(bias), np.median(deviation), *np.quantile(whole, (0.5, 0.25, 0.75))))
            bias, deviation, middle, low, high = errors[-1]
            print(f"| {sigma} | {lam:g} | {bias:.3f} | {deviation:.3f} | {middle:.3f} ({low:.3f} to {high:.3f}) |")
        errors = np.array(errors)
        axes[0].plot(errors[:, 0], f"C{i}-", label=f"bias, σ = {sigma:g}")
        axes[0].plot(errors[:, 1], f"C{i}--", label=f"deviation, σ = {sigma:g}")
        axes[1].plot(errors[:, 2], f"C{i}o-", label=f"σ = {sigma:g}")
        axes[1].fill_between(range(len(LAMBDAS)), errors[:, 3], errors[:, 4], color=f"C{i}", alpha=0.2)
    axes[0].set(title="chain: bias falls, deviation rises")
    axes[1].set(title="chain: error of a mean of 25, quartiles shaded", ylim=0)
    axes[0].legend(fontsize=8, title="σ: the critic's error", title_fontsize=8)
    axes[1].legend(fontsize=8)
    print("\n| λ | CartPole, area under the curve: median (quartiles) |\n|---|---|")
    for place, (lam, name) in enumerate(CARTPOLE.items()):
        areas = [row["area"] for row in cartpole if row["variant"] == name]
        low, middle, high = np.quantile(areas, (0.25, 0.5, 0.75))
        print(f"| {lam:g} | {middle:.0f} ({low:.0f} to {high:.0f}) |")
        axes[2].plot([place] * len(areas), areas, "C0.", alpha=0.5, label=None if place else "one seed")
        axes[2].plot([place - 0.2, place + 0.2], [middle, middle], "k-", label=None if place else "median")
    axes[2].set(title="CartPole: mean return over the run", xlim=(-0.5, len(CARTPOLE) - 0.5))
    axes[2].legend(fontsize=8, loc="lower right")
    axes[0].figure.savefig(ROOT / "docs" / "figures" / "claims_gae_lambda.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--draw", action="store_true", help="table and figure from the kept results, no runs")
    options = parser.parse_args()
    if not options.draw:
        with FILE.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"machine": machine(), "date": time.strftime("%Y-%m-%d")}) + "\n")
            for seed in range(1, options.seeds + 1):
                for row in measure_chain(seed):
                    file.write(json.dumps(row) + "\n")
                    file.flush()
    draw()
