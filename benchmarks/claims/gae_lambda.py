"""Claim 1: GAE's λ trades bias against variance. On a chain whose true advantages are known, and on CartPole.

Run      python benchmarks/claims/gae_lambda.py                    (about five minutes on one core)
         python benchmarks/claims/gae_lambda.py --draw             (table and figure from the kept results)
Writes   benchmarks/results/claims_gae_lambda.jsonl, docs/figures/claims_gae_lambda.png

The chain: nine states in a row, begun in the middle, +1 beyond the right end, 0 beyond the left one, and 0.1 times a
normal deviate of reward on every step. The policy goes right with 0.6, the ground is slippery (one step in ten goes the
other way), γ = 0.99. V and A follow from linear equations. The critic is V plus an error, drawn once for a seed:
N(0, σ) in each state, σ = 0, 0.1 or 0.3. Advantages come from ppo_cartpole.py's own compute_gae, on 400 chains of 300
steps, of which the first 150 count. Bias and standard deviation are those of Â given state and action, root mean
square over how often the policy meets the pair.

CartPole: ppo_cartpole.py with its defaults but for λ, 100,000 steps; the area under the learning curve as in
ppo_details.py.
"""

import argparse
import json
import sys
import tempfile
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
                for a in (0, 1):
                    own = advantage[(states == s) & (actions == a)]
                    spread = own.var(ddof=1)
                    error = (own.mean() - true[s, a]) ** 2 - spread / len(own)  # the mean's own noise taken out
                    bias += error * len(own) / advantage.size
                    variance += spread * len(own) / advantage.size
            row = {"seed": seed, "sigma": sigma, "lambda": lam, "bias2": bias, "variance": variance}
            yield {name: round(number, 6) for name, number in row.items()}


def measure_cartpole(seed):
    for lam in LAMBDAS:
        with tempfile.TemporaryDirectory() as folder:
            files = {"eval_episodes": 0, "checkpoint_every": 0, "run_dir": f"{folder}/run"}
            metrics = ppo.train(ppo.Args(seed=seed, total_timesteps=100_000, gae_lambda=lam, **files))
        before, area, last = 0, 0.0, 0.0
        for row in metrics:
            last = row.get("charts/episodic_return", last)
            area += last * (row["global_step"] - before)
            before = row["global_step"]
        yield {"seed": seed, "env": "CartPole-v1", "lambda": lam, "area": round(area / before, 2)}


def draw():
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()][1:]
    chain, cartpole = [r for r in rows if "sigma" in r], [r for r in rows if "env" in r]
    axes = Figure(figsize=(11, 3.8), layout="constrained").subplots(1, 3)
    place = {lam: i for i, lam in enumerate(LAMBDAS)}
    for ax in axes:
        ax.set_xticks(range(len(LAMBDAS)), [f"{lam:g}" for lam in LAMBDAS])
        ax.set_xlabel("λ")
    print("| critic's error σ | λ | bias, root mean square | standard deviation | whole error: median (quartiles) |")
    print("|---|---|---|---|---|")
    for i, sigma in enumerate(SIGMAS):
        errors = []
        for lam in LAMBDAS:
            mine = [r for r in chain if (r["sigma"], r["lambda"]) == (sigma, lam)]
            bias = np.sqrt(np.maximum([r["bias2"] for r in mine], 0))
            deviation = np.sqrt([r["variance"] for r in mine])
            whole = np.sqrt([max(r["bias2"] + r["variance"], 0) for r in mine])
            errors.append((np.median(bias), np.median(deviation), *np.quantile(whole, (0.5, 0.25, 0.75))))
            bias, deviation, middle, low, high = errors[-1]
            print(f"| {sigma} | {lam:g} | {bias:.3f} | {deviation:.3f} | {middle:.3f} ({low:.3f} to {high:.3f}) |")
        errors = np.array(errors)
        axes[0].plot(errors[:, 0], f"C{i}-", label=f"bias, σ = {sigma:g}")
        axes[0].plot(errors[:, 1], f"C{i}--", label=f"deviation, σ = {sigma:g}")
        axes[1].plot(errors[:, 2], f"C{i}o-", label=f"σ = {sigma:g}")
        axes[1].fill_between(range(len(LAMBDAS)), errors[:, 3], errors[:, 4], color=f"C{i}", alpha=0.2)
    axes[0].set(title="chain: bias falls, deviation rises")
    axes[1].set(title="chain: the whole error of Â", ylim=0)
    axes[0].legend(fontsize=7)
    axes[1].legend(fontsize=8)
    print("\n| λ | CartPole, area under the curve: median (quartiles) |\n|---|---|")
    medians = []
    for lam in LAMBDAS:
        areas = [r["area"] for r in cartpole if r["lambda"] == lam]
        low, middle, high = np.quantile(areas, (0.25, 0.5, 0.75))
        print(f"| {lam:g} | {middle:.0f} ({low:.0f} to {high:.0f}) |")
        medians.append(middle)
        axes[2].plot([place[lam]] * len(areas), areas, "C0.", alpha=0.5)
    axes[2].plot(medians, "k-")
    axes[2].set(title="CartPole: mean return over the run, a dot a seed")
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
                for row in (*measure_chain(seed), *measure_cartpole(seed)):
                    file.write(json.dumps(row) + "\n")
                    file.flush()
    draw()
