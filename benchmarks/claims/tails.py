"""Beside claim 10: what the tail of a reward's error decides. No model, only random numbers.

Run      python benchmarks/claims/tails.py                         (half a minute on one core)
         python benchmarks/claims/tails.py --plot                  (table and figure from the kept results)
Writes   benchmarks/results/claims_tails.jsonl (a line a point), docs/figures/claims_tails.png

A response has a true value V, drawn from N(0, 1), and a reward U = V + error. The error is independent of V: Gaussian
(a light tail) or Student's with 2 degrees of freedom (a heavy tail), with the same quartiles. Two ways to raise U:

* best of n: draw n responses, keep the one with the highest U. Its KL is ln n − (n − 1)/n.
* a budget of KL: give the responses with U above t together the probability p, and the others the rest, such that
  KL = p ln(p/q) + (1 − p) ln((1 − p)/(1 − q)) is 0.1 nats, where q is the share of U above t.

Gao et al. 2023 use the first to measure overoptimisation. The second is Kwa et al. 2024 (§3): with a heavy tail, E[U]
grows with t without bound while E[V] goes back to 0. Five seeds of 4 million responses each.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]
from cartpole import RESULTS, machine  # noqa: E402

FILE = RESULTS / "claims_tails.jsonl"
COUNT, SEEDS, BUDGET = 4_000_000, 5, 0.1
BEST_OF = [2**k for k in range(17)]
SHARES = [2.0**-k for k in range(1, 18)]  # of the responses above t
QUARTILE = {"Gaussian": 0.6744898, "Student, 2 degrees": 0.8164966}  # upper quartile of each error, as it is drawn


def responses(seed, error):
    """(V, U) of COUNT responses, sorted by U."""
    rng = np.random.default_rng(seed)
    value = rng.standard_normal(COUNT)
    noise = rng.standard_normal(COUNT) if error == "Gaussian" else rng.standard_t(2, COUNT)
    reward = value + noise * QUARTILE["Gaussian"] / QUARTILE[error]
    order = reward.argsort()
    return value[order], reward[order]


def best_of_n(value, reward, n):
    """(KL, E[V], E[U]) of the best of n. The r-th of N is the best with probability (r/N)ⁿ − ((r − 1)/N)ⁿ."""
    edges = (np.arange(COUNT + 1) / COUNT) ** n
    weights = np.diff(edges)
    return np.log(n) - (n - 1) / n, float(weights @ value), float(weights @ reward)


def binary_kl(p, q):
    rest = 0.0 if p == 1 else (1 - p) * np.log((1 - p) / (1 - q))
    return p * np.log(p / q) + rest


def above_threshold(value, reward, q):
    """(t, E[V], E[U]) if the share q with the highest U gets the probability that costs BUDGET nats."""
    low, high = q, 1.0
    for _ in range(60):  # by bisection: the KL grows with p
        middle = (low + high) / 2
        low, high = (middle, high) if binary_kl(middle, q) < BUDGET else (low, middle)
    first = round(COUNT * (1 - q))
    means = [low * x[first:].mean() + (1 - low) * x[:first].mean() for x in (value, reward)]
    return float(reward[first]), float(means[0]), float(means[1])


def measure():
    rows = [{"machine": machine(), "numpy": np.__version__, "responses": COUNT, "budget": BUDGET}]
    for error in QUARTILE:
        for seed in range(1, SEEDS + 1):
            value, reward = responses(seed, error)
            for n in BEST_OF:
                kl, v, u = best_of_n(value, reward, n)
                rows.append({"error": error, "seed": seed, "best_of": n, "kl": kl, "value": v, "reward": u})
            for q in SHARES:
                t, v, u = above_threshold(value, reward, q)
                rows.append({"error": error, "seed": seed, "share": q, "threshold": t, "value": v, "reward": u})
    FILE.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def draw():
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()][1:]
    left, right = Figure(figsize=(11, 4), layout="constrained").subplots(1, 2)
    for color, error in zip(("C0", "C3"), QUARTILE):
        for panel, key, x in ((left, "best_of", "kl"), (right, "share", "threshold")):
            own = [row for row in rows if row["error"] == error and key in row]
            points = list(dict.fromkeys(row[key] for row in own))
            series = [[[row[name] for row in own if row[key] == point] for point in points] for name in (x, "value")]
            series.append([[row["reward"] for row in own if row[key] == point] for point in points])
            xs, values, rewards = (np.median(each, axis=1) for each in series)
            panel.plot(xs, values, color=color, label=f"{error}: true value")
            panel.fill_between(xs, *np.quantile(series[1], (0, 1), axis=1), color=color, alpha=0.2, lw=0)
            panel.plot(xs, rewards, "--", color=color, label=f"{error}: reward")
            for i in range(0, len(points), 4):
                low, high = min(series[1][i]), max(series[1][i])
                print(f"{error}, {key} {points[i]:g}: {x} {xs[i]:.2f}, V {low:.3f} to {high:.3f}, U {rewards[i]:.2f}")
    left.set(title="best of n", xlabel="KL, nats")
    right.set(title=f"responses with a reward above t made likelier, for {BUDGET} nats", xscale="log")
    right.set(xlabel="threshold t", xlim=(1, 300))
    right.set_xticks([1, 3, 10, 30, 100, 300], ["1", "3", "10", "30", "100", "300"])
    for panel, ticks in ((left, [0, 1, 3, 10, 30, 100, 300]), (right, [0, 0.1, 0.3, 1, 3, 10])):
        panel.set_yscale("symlog", linthresh=ticks[1])
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.set_ylim(bottom=-0.3 * ticks[1])
        panel.grid(axis="y", alpha=0.3)
    left.legend(fontsize=9)
    left.figure.savefig(ROOT / "docs" / "figures" / "claims_tails.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="table and figure from the kept results, no drawing")
    options = parser.parse_args()
    if not options.plot:
        measure()
    draw()
