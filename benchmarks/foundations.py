"""Why variance hurts: add 10 to every return on the grid of docs/0_foundations.md, whose own code this runs.

Run      python benchmarks/foundations.py            (20 seconds; --draw only draws the kept results again)
Writes   runs/foundations/foundations.json (raw) and foundations_variance.png; with --keep
         benchmarks/results/foundations.json and docs/figures/foundations_variance.png
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
FIGURE = ROOT / "docs" / "figures" / "foundations_variance.png"
CASES = {  # name: (what is added to every return, baseline)
    "b = 0": (0, 0.0),
    "b = V(s)": (0, "value"),
    "return + 10,\nb = 0": (10, 0.0),
    "return + 10,\nb = V(s)": (10, "value"),
}


def code_of(page):
    """The page's Python blocks, run in order: its names."""
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            exec(block, names)
    return names


def measure():
    """{"gradients": 2,000 estimates for each case, "curves": the return of 400 episodes for each of ten seeds}"""
    page = code_of(ROOT / "docs" / "0_foundations.md")
    returns_of = page["returns_of"]
    rng = np.random.default_rng(0)
    theta = np.zeros((len(page["CELLS"]), 4))
    cell = page["CELLS"].index((0, 2))  # left of G: going right is best by far
    episodes = [page["play"](theta, rng) for _ in range(12_000)]
    returns = [returns_of(rewards) for _, _, rewards in episodes]
    value = np.mean([G for (states, *_), Gs in zip(episodes, returns) for s, G in zip(states, Gs) if s == cell])
    gradients, curves = {}, {}
    for name, (added, baseline) in CASES.items():
        b = value + added if baseline == "value" else baseline
        estimates = []  # d/dθ[cell, right], one for each episode that comes there
        for (states, actions, _), Gs in zip(episodes, returns):
            terms = [(G + added - b) * ((a == 1) - 0.25) for s, a, G in zip(states, actions, Gs) if s == cell]
            if terms:
                estimates.append(float(sum(terms)))
        gradients[name] = np.round(estimates[:2000], 4).tolist()
        page["returns_of"] = lambda rewards, gamma, added=added: [G + added for G in returns_of(rewards, gamma)]
        learned = [page["reinforce"](400, np.random.default_rng(seed), baseline)[2] for seed in range(10)]
        curves[name] = np.round(learned, 2).tolist()
    return {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "gradients": gradients, "curves": curves}


def draw(results, path):
    left, right = Figure(figsize=(10, 4), layout="constrained").subplots(1, 2, width_ratios=(5, 6))
    for i, (name, values) in enumerate(results["gradients"].items()):
        error, deviation = np.std(values) / np.sqrt(len(values)), np.std(values)
        one_line = name.replace("\n", " ")
        print(f"{one_line:22} gradient: mean {np.mean(values):.3f} ± {error:.3f}, deviation {deviation:.2f}")
        low, high = np.quantile(values, (0.05, 0.95))
        left.plot([i, i], [low, high], color=f"C{i}", lw=12, alpha=0.35, solid_capstyle="butt")
        left.plot([i], [np.mean(values)], "k_", markersize=18)
        left.text(i, high + 0.4, f"{deviation:.2f}", ha="center", fontsize=10)
    left.set_xticks(range(len(CASES)), list(results["gradients"]))
    left.set(title="one number of the gradient, from one episode", xlim=(-0.6, 3.6), ylim=(-16, 10.5))
    left.plot([], [], "k_", markersize=14, label="mean of 2,000 episodes")
    left.plot([], [], color="0.5", lw=8, alpha=0.5, label="90% of them")
    left.legend(loc="lower left", title="the number above: standard deviation")
    for i, (name, curves) in enumerate(results["curves"].items()):
        last = np.array(curves)[:, -100:].mean(1)
        one_line = name.replace("\n", " ")
        print(
            f"{one_line:22} mean return of the last 100 episodes above 0.7 in {(last > 0.7).sum()} seeds of {len(last)}"
        )
        if i == 1:  # on this small grid it is the same as b = 0
            continue
        for curve in curves:
            right.plot(np.convolve(curve, np.ones(20) / 20, "valid"), color=f"C{i}", lw=0.9, alpha=0.8)
        right.plot([], [], color=f"C{i}", label=f"{one_line}: {(last > 0.7).sum()} seeds of {len(last)} learn")
    right.set(title="learning: one line for each seed", xlabel="episode", ylabel="return (of 20 episodes)")
    right.set_ylim(-1.9, 2.3)
    right.set_yticks([-1, 0, 1])
    right.axhline(0.9, color="0.4", ls="--", lw=1)
    right.text(380, 0.93, "best path: 0.9", ha="right", va="bottom", color="0.4", fontsize=9)
    right.legend(loc="upper left")
    left.figure.savefig(path, dpi=120)
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw from the kept results, no runs")
    parser.add_argument("--keep", action="store_true", help="write over the kept results and the page's figure")
    options = parser.parse_args()
    file, figure = FILE, FIGURE
    if not options.keep and not options.draw:
        file, figure = (ROOT / "runs" / "foundations" / path.name for path in (FILE, FIGURE))
        file.parent.mkdir(parents=True, exist_ok=True)
    if not options.draw:
        file.write_text(json.dumps(measure()), encoding="utf-8")
    draw(json.loads(file.read_text(encoding="utf-8")), figure)


if __name__ == "__main__":
    main()
