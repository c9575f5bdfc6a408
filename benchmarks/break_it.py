"""Experiments of docs/2_atari.md: what happens, in numbers.

Run      python benchmarks/break_it.py breakout                (about 20 minutes on one core)
         python benchmarks/break_it.py breakout NAME …         (some of them; the others' kept lines stay)
         python benchmarks/break_it.py breakout --show         (the table from the kept results)
Writes   benchmarks/results/break_it_breakout.jsonl (a line a run); the first run also runs/break_it/defaults, with a
         film for atari_curve.py

One seed, 120,000 steps at a fixed learning rate of 5e-4, then 40 games; the collapse 30,000 steps and no games. A new
network's games are played too, and, by the first run's agent, games with sticky actions. Kept are the defaults, the new
network and the sticky actions; the other two were not run to their end.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

from cartpole import RESULTS, ROOT, machine

sys.path.insert(0, str(ROOT))
SHARED = {"env_id": "ALE/Breakout-v5", "torch_threads": 1, "eval_episodes": 0, "checkpoint_every": 0}
SHARED |= {"total_timesteps": 120_000, "learning_rate": 5e-4, "anneal_lr": False}
EXPERIMENTS = {
    "breakout": {
        "defaults": {},
        "lives do not matter": {"episodic_life": False},
        "collapse": {"clip_coef": 1000.0, "learning_rate": 2e-3, "total_timesteps": 30_000},
        "new network": None,
        "sticky actions": None,
    },
}


def summary(metrics):
    """What a person would see in TensorBoard: largest KL, last entropy, the last fifth's clip fraction and return."""
    late = [row for row in metrics if row["global_step"] > 0.8 * metrics[-1]["global_step"]]
    returns = [row["charts/episodic_return"] for row in late if "charts/episodic_return" in row]
    return {
        "steps": metrics[-1]["global_step"],
        "seconds": round(metrics[-1]["seconds"], 1),
        "return": round(mean(returns), 2) if returns else None,
        "largest_kl": round(max(row["losses/approx_kl"] for row in metrics), 4),
        "clipfrac": round(mean(row["losses/clipfrac"] for row in late), 4),
        "entropy": round(metrics[-1]["losses/entropy"], 4),
        "value_loss": round(mean(row["losses/value_loss"] for row in late), 4),
    }


def run_breakout(name):
    import ppo_atari as atari

    defaults = ROOT / "runs" / "break_it" / "defaults"
    flags = EXPERIMENTS["breakout"][name]
    args = atari.Args(**{**SHARED, **(flags or {}), "sticky": 0.25 if name == "sticky actions" else 0.0})
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        run_dir = defaults if name in ("defaults", "sticky actions") else Path(folder) / "run"
        if flags is not None:
            result = summary(atari.train(atari.replace(args, run_dir=str(run_dir))))
            if name == "collapse":  # an agent that never presses FIRE would play its games for 27,000 steps each
                return result
        agent = atari.Agent(atari.make_envs(args, 1), args)
        if name != "new network":
            agent.load_state_dict(atari.load(run_dir / "checkpoint.pt")["agent"])
    games = atari.play(agent, args, 40)
    if name == "defaults":
        atari.play(agent, args, 1, video_dir=defaults / "video")
    return {**result, "games": games.tolist()}


def show(stage, rows):
    keys = ("return", "largest_kl", "clipfrac", "entropy", "value_loss")
    keys = [key for key in keys if any(key in row for row in rows)]
    head = ["run", *keys, *(["games: mean (standard deviation)"] if any("games" in row for row in rows) else [])]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name in EXPERIMENTS[stage]:
        mine = [row for row in rows if row["name"] == name]
        cells = []
        for key in keys:
            numbers = [row[key] for row in mine if row.get(key) is not None]
            spread = f" ({min(numbers):.3g} to {max(numbers):.3g})" if len(numbers) > 1 else ""
            cells.append(f"{median(numbers):.3g}{spread}" if numbers else "")
        games = [score for row in mine for score in row.get("games", [])]
        if games:
            deviation = (sum((x - mean(games)) ** 2 for x in games) / (len(games) - 1)) ** 0.5
            cells.append(f"{mean(games):.2f} ({deviation:.2f})")
        if mine:
            print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(EXPERIMENTS))
    parser.add_argument("names", nargs="*", help="which of them; default all")
    parser.add_argument("--show", action="store_true", help="the table from the kept results, no runs")
    options = parser.parse_args()
    file = RESULTS / f"break_it_{options.stage}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][1:] if file.exists() else []
    if not options.show:
        head = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
        for name in options.names or EXPERIMENTS[options.stage]:
            rows = [row for row in rows if row["name"] != name]
            rows.append({"name": name, "seed": 1, **run_breakout(name)})
            text = "\n".join(json.dumps(line) for line in (head, *rows))
            file.write_text(text + "\n", encoding="utf-8")
    show(options.stage, rows)
