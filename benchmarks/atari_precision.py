"""Does bfloat16 learn as well as float32? Breakout, several seeds, the same steps with either.

Run      python benchmarks/atari_precision.py            (about 35 minutes on one core; --draw only draws again)
Writes   benchmarks/results/atari_precision.jsonl (raw, a line a rollout in which a game ended)
         docs/figures/atari_precision.png
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))
from cartpole import RESULTS, machine  # noqa: E402

import ppo_atari as atari  # noqa: E402

FILE = RESULTS / "atari_precision.jsonl"
COLORS = {"bfloat16": "tab:orange", "float32": "tab:blue"}


def measure(options):
    with FILE.open("w", encoding="utf-8") as file:
        head = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "steps": options.steps}
        file.write(json.dumps(head) + "\n")
        for seed in range(1, options.seeds + 1):
            for precision in COLORS:
                with tempfile.TemporaryDirectory() as folder:
                    args = atari.Args(
                        env_id="ALE/Breakout-v5",
                        seed=seed,
                        total_timesteps=options.steps,
                        learning_rate=5e-4,
                        bf16=precision == "bfloat16",
                        torch_threads=1,
                        eval_episodes=0,
                        run_dir=f"{folder}/run",
                    )
                    metrics = atari.train(args)
                for row in metrics:
                    if "charts/episodic_return" in row:
                        line = {"precision": precision, "seed": seed, "step": row["global_step"]}
                        line |= {"score": row["charts/episodic_return"], "seconds": row["seconds"]}
                        file.write(json.dumps(line) + "\n")
                file.flush()


def draw_and_print():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    steps, rows = lines[0]["steps"], lines[1:]
    width = steps // 10
    figure, axes = plt.subplots(figsize=(7, 4))
    print("mean score of the games that ended in the last fifth of the steps, seed by seed")
    for precision, color in COLORS.items():
        last = []
        for seed in sorted({row["seed"] for row in rows}):
            mine = [row for row in rows if row["precision"] == precision and row["seed"] == seed]
            bins = [[row["score"] for row in mine if i * width <= row["step"] < (i + 1) * width] for i in range(10)]
            at = [(i + 0.5) * width for i, scores in enumerate(bins) if scores]
            label = precision if seed == 1 else None
            axes.plot(at, [mean(scores) for scores in bins if scores], ".-", color=color, label=label)
            last.append(mean(row["score"] for row in mine if row["step"] >= 0.8 * steps))
        print(f"{precision:8}  {', '.join(f'{score:.1f}' for score in last)}; mean {mean(last):.2f}")
    axes.set(xlabel="steps of the agent", ylabel=f"mean score, in {width:,} steps each")
    axes.set(title="Breakout: one line for each seed")
    axes.set_xticks(range(0, steps + 1, 2 * width), [f"{step:,}" for step in range(0, steps + 1, 2 * width)])
    axes.legend()
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / "atari_precision.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--draw", action="store_true", help="draw and print from the kept results, no runs")
    options = parser.parse_args()
    if not options.draw:
        measure(options)
    draw_and_print()
