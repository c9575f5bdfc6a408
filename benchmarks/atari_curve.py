"""Keeps the learning curve of a run of ppo_atari.py and draws it; of a film, if there is one, four frames.

Run      python ppo_atari.py --total-timesteps 3000000 --learning-rate 5e-4 --torch-threads 1 --run-dir runs/pong
         python benchmarks/atari_curve.py pong --run-dir runs/pong      (raw results, then the figure)
         python benchmarks/atari_curve.py pong                          (redraws from the kept results)
Writes   benchmarks/results/NAME_curve.jsonl, docs/figures/NAME_curve.png;
         of the run's video/game.mp4 (--capture-video) docs/figures/NAME_frames.png
"""

import argparse
import json
import time
from pathlib import Path

import torch
from cartpole import RESULTS, ROOT, machine
from matplotlib.figure import Figure

KEPT = ("global_step", "seconds", "charts/episodic_return", "charts/return_100", "losses/approx_kl", "losses/entropy")


def keep(run_dir, path):
    """A line that names the machine and the settings, then one for each iteration."""
    saved = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    with path.open("w", encoding="utf-8") as file:
        settings = {name: value for name, value in saved["args"].items() if not name.endswith("dir")}
        file.write(json.dumps({"machine": machine(), "date": time.strftime("%Y-%m-%d"), "args": settings}) + "\n")
        for row in saved["metrics"]:
            file.write(json.dumps({name: round(row[name], 4) for name in KEPT if name in row}) + "\n")


def draw(path, figure):
    head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    unit, word = (1e6, "million") if rows[-1]["global_step"] >= 1e6 else (1e3, "thousand")
    labels = {"episodic_return": "games that end in one rollout", "return_100": "last 100 games"}
    for (name, label), color in zip(labels.items(), ("0.8", "C0")):
        points = [(row["global_step"] / unit, row[f"charts/{name}"]) for row in rows if f"charts/{name}" in row]
        axes.plot(*zip(*points), color=color, label=label)
    axes.set(xlabel=f"{word} steps of the agent, 4 frames each", ylabel="mean score", title=head["args"]["env_id"])
    axes.legend(loc="lower right" if "Pong" in head["args"]["env_id"] else "upper left")
    if "Pong" in head["args"]["env_id"]:
        axes.axhline(18, color="0.4", ls="--", lw=1)
        axes.text(0, 17.6, "18 points", va="top", color="0.4")
    axes.figure.savefig(figure, dpi=120)
    best = max(rows, key=lambda row: row.get("charts/return_100", -1e9))
    print(f"{figure.relative_to(ROOT)}: best mean of 100 games {best['charts/return_100']:.2f} at step", end=" ")
    print(f"{best['global_step']:,}, {best['seconds'] / 60:.0f} minutes; last step {rows[-1]['global_step']:,}")


def draw_frames(film, figure):
    """Four frames of one second, a third of the way into the game: pixels as they are."""
    import imageio.v3 as imageio

    frames = imageio.imread(film)
    first = len(frames) // 3
    axes = Figure(figsize=(9, 3.2), layout="constrained").subplots(1, 4)
    for ax, index in zip(axes, range(first, first + 20, 5)):
        ax.imshow(frames[index])
        ax.set(title=f"step {index} of {len(frames)}", xticks=[], yticks=[])
    axes[0].figure.savefig(figure, dpi=100)
    print(f"{figure.relative_to(ROOT)}: four of {len(frames)} frames")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the results: pong, breakout, …")
    parser.add_argument("--run-dir", type=Path, help="take the curve from this run's checkpoint")
    options = parser.parse_args()
    results = RESULTS / f"{options.name}_curve.jsonl"
    if options.run_dir:
        keep(options.run_dir, results)
    draw(results, ROOT / "docs" / "figures" / f"{options.name}_curve.png")
    if options.run_dir and (film := options.run_dir / "video" / "game.mp4").exists():
        draw_frames(film, ROOT / "docs" / "figures" / f"{options.name}_frames.png")
