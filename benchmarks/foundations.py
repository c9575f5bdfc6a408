"""Why variance hurts: three baselines on the grid of docs/0_foundations.md, whose own code this runs.

Run      python benchmarks/foundations.py            (15 seconds; --draw only draws again)
Writes   benchmarks/results/foundations.json (raw), docs/figures/foundations_variance.png
"""

import argparse
import contextlib
import io
import json
import re
import sys
import time

import numpy as np
from cartpole import RESULTS, ROOT, machine
from matplotlib.figure import Figure

sys.path.insert(0, str(ROOT))  # the page imports gae_reference
FILE = RESULTS / "foundations.json"
BASELINES = {"V(s)": "value", "0": 0.0, "−3": -3.0}


def code_of(page):
    """The page's Python blocks, run in order: its names."""
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            exec(block, names)
    return names


def measure():
    page = code_of(ROOT / "docs" / "0_foundations.md")
    rng = np.random.default_rng(0)
    theta = np.zeros((len(page["CELLS"]), 4))
    cell = page["CELLS"].index((0, 2))  # left of G: going right is best by far
    episodes = [page["play"](theta, rng) for _ in range(12_000)]
    returns = [page["returns_of"](rewards) for _, _, rewards in episodes]
    value = np.mean([G for (states, *_), Gs in zip(episodes, returns) for s, G in zip(states, Gs) if s == cell])
    gradients = {}
    for name, baseline in BASELINES.items():
        b = value if baseline == "value" else baseline
        estimates = []  # d/dθ[cell, right], one for each episode that comes there
        for (states, actions, _), Gs in zip(episodes, returns):
            terms = [(G - b) * ((a == 1) - 0.25) for s, a, G in zip(states, actions, Gs) if s == cell]
            if terms:
                estimates.append(float(sum(terms)))
        gradients[name] = estimates[:2000]
    curves = {
        name: [page["reinforce"](400, np.random.default_rng(seed), baseline)[2] for seed in range(10)]
        for name, baseline in BASELINES.items()
    }
    head = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    rounded = {name: np.round(values, 4).tolist() for name, values in gradients.items()}
    curves = {name: np.round(values, 2).tolist() for name, values in curves.items()}
    FILE.write_text(json.dumps({**head, "gradients": rounded, "curves": curves}), encoding="utf-8")


def draw():
    results = json.loads(FILE.read_text(encoding="utf-8"))
    left, right = Figure(figsize=(9, 3.6), layout="constrained").subplots(1, 2)
    for i, (name, values) in enumerate(results["gradients"].items()):
        error = np.std(values) / np.sqrt(len(values))
        print(f"b = {name:5} gradient: mean {np.mean(values):.3f} ± {error:.3f}, deviation {np.std(values):.2f}")
        left.violinplot([values], positions=[i], showextrema=False)
        left.plot([i], [np.mean(values)], "k_", markersize=14)
    left.set_xticks(range(len(BASELINES)), [f"b = {name}" for name in BASELINES])
    left.set(title="one cell's gradient, an episode each", ylim=(-12, 12))
    for i, (name, curves) in enumerate(results["curves"].items()):
        smooth = np.array([np.convolve(curve, np.ones(20) / 20, "valid") for curve in curves])
        print(f"b = {name:5} mean return of the last 100 episodes: {np.array(curves)[:, -100:].mean():.2f}")
        right.plot(smooth.mean(0), color=f"C{i}", label=f"b = {name}")
        right.fill_between(range(smooth.shape[1]), smooth.min(0), smooth.max(0), color=f"C{i}", alpha=0.15)
    right.set(title="return, 10 seeds: mean, lowest to highest", xlabel="episode")
    right.legend()
    left.figure.savefig(ROOT / "docs" / "figures" / "foundations_variance.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw from the kept results, no runs")
    if not parser.parse_args().draw:
        measure()
    draw()
