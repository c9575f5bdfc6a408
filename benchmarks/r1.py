"""DeepSeek-R1's recipe at the smallest size: RL, keep right and readable samples, imitate them, RL again.

Run      python benchmarks/r1.py                     (five seeds, about half an hour on one core)
         python benchmarks/r1.py --seeds 1           (some seeds; the others' kept lines stay)
         python benchmarks/r1.py --show              (tables and figure from the kept results)
Writes   benchmarks/results/r1.jsonl (a line a seed), docs/figures/r1.png

The recipe: sums of five one-digit numbers, the script's defaults. `zero` is 50 steps of GRPO from the warm-started
model, `sft` imitates in 100 supervised steps what was kept of 6,400 samples of `zero`, again from the warm-started
model, `r1` is 50 steps of GRPO from there. Beside it `alone`, GRPO in one run from the warm-started model with the
same 32,000 samples.

Readability: the same from a model that mixes two notations, 3+4=7 and 3,4:7, a line in the one, a line in the other.
It is the warm-started model after 50 supervised steps on worked solutions in which a coin chose each line's notation.
Readable is a completion of the first notation alone. `language` is GRPO with a reward for that.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from cartpole import RESULTS, ROOT, machine

sys.path.insert(0, str(ROOT))
import grpo_llm

READABLE = r"(\d+\+\d+=\d+\n)+#\d+"  # lines such as 3+4=7, and the answer
# (stage, flags): the names in braces are directories of earlier stages. They run in this order
RECIPE = [
    ("zero", "--steps 50"),
    ("kept", "--model {zero} --steps 25"),
    ("sft", "--model {zero}/start --sft-data {kept} --steps 100"),
    ("r1", "--model {sft} --steps 50"),
    ("alone", "--model {zero}/start --steps 125"),
]
READABILITY = [
    ("mixed", "--model {zero}/start --sft-data {solutions} --steps 50"),
    ("mixed zero", "--model {mixed} --steps 50"),
    ("mixed language", "--model {mixed} --steps 50 --format-weight 0.5 --format-pattern {pattern}"),
    ("mixed kept", "--model {mixed zero} --steps 25 --format-pattern {pattern}"),
    ("mixed sft", "--model {mixed} --sft-data {mixed kept} --steps 100"),
    ("mixed r1", "--model {mixed sft} --steps 50"),
]


def write_solutions(path, seed):
    """Worked solutions of training problems. A coin chooses for each line which notation it has."""
    problems, _ = grpo_llm.load_problems(grpo_llm.Args(seed=seed))
    rng, rows = random.Random(seed), []
    for problem in problems[:3200]:
        *lines, answer = problem.solution.splitlines()
        lines = [line.replace("+", ",").replace("=", ":") if rng.random() < 0.5 else line for line in lines]
        rows.append({"prompt": problem.prompt, "completion": "\n".join([*lines, answer])})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def readable_share(directory, seed):
    """The share of readable completions among 8 samples of each held-out problem."""
    args, _ = grpo_llm.chosen(grpo_llm.Args(seed=seed))
    _, held_out = grpo_llm.load_problems(args)
    policy = grpo_llm.load_model(args, str(directory))
    names = [("readable", i) for i in range(len(held_out))]
    groups = grpo_llm.sample_groups(args, *policy, held_out, 8, 1.0, names)
    texts = [text for group in groups for text in group.texts]
    return sum(bool(re.fullmatch(READABLE, text)) for text in texts) / len(texts)


def run(stage, flags, paths, seed):
    """One command of the script. Returns what it measured: the counts of the samples, or the evaluation at its end."""
    words = [word.format(**paths) for word in re.findall(r"\S*\{[^}]*\}\S*|\S+", flags)]
    command = [sys.executable, str(ROOT / "grpo_llm.py"), *words]
    if stage.endswith("kept"):
        command += ["--sample-to", str(paths[stage])]
    else:
        command += ["--run-dir", str(paths[stage]), "--seed", str(seed), "--eval-every", "0", "--eval-samples", "8"]
        command += ["--instruction", "{}"] if "--model" in words else []
    result = subprocess.run(command, capture_output=True, text=True)
    if stage.endswith("kept"):
        numbers = re.search(r"([\d,]+) completions:? ([\d,]+) are right, ([\d,]+) match", result.stdout + result.stderr)
        lines = paths[stage].read_text(encoding="utf-8").splitlines() if paths[stage].exists() else []
        counts = [int(number.replace(",", "")) for number in numbers.groups()]
        return dict(zip(("sampled", "right", "readable", "written"), (*counts, len(lines))))
    if result.returncode:
        sys.exit(f"{stage}: {result.stderr[-2000:]}")
    rows = [json.loads(line) for line in (paths[stage] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = scores_of(rows[-1]) | {"readable": round(readable_share(paths[stage] / "policy", seed), 4)}
    found["seconds"] = round(sum(row.get("time/step_seconds", 0.0) for row in rows), 1)
    found["right"] = [round(row["reward/verifier"], 3) for row in rows if "reward/verifier" in row]
    return {"before": scores_of(rows[0]), **found}


def scores_of(row):
    return {name: round(row[f"eval/{name}"], 4) for name in ("greedy", "pass@1", "pass@8")}


def run_seed(seed, work):
    """All stages for one seed; a stage without samples to imitate, and what follows from it, is left out."""
    stages = RECIPE + READABILITY
    paths = {stage: work / stage.replace(" ", "_") for stage, _ in stages}
    paths |= {"solutions": work / "solutions.jsonl", "pattern": READABLE}
    write_solutions(paths["solutions"], seed)
    row = {"seed": seed}
    for stage, flags in stages:
        needed = [name for name in re.findall(r"\{([^}]*)\}", flags) if name in paths and name not in ("solutions",)]
        if all(isinstance(paths[name], str) or paths[name].exists() for name in needed):
            row[stage] = run(stage, flags, paths, seed)
            print(seed, stage, {name: x for name, x in row[stage].items() if name != "right" or isinstance(x, int)})
            sys.stdout.flush()
    return row


def spread(numbers):
    low, *_, high = sorted(numbers)
    return f"{sorted(numbers)[len(numbers) // 2]:.2f} ({low:.2f} to {high:.2f})"


def columns_of(rows, prefix=""):
    """{stage: its rows of scores}, the model that the stages begin from first."""
    names = [stage for stage, _ in (READABILITY if prefix else RECIPE) if not stage.endswith("kept")]
    found = {"start": [row["zero"]["before"] for row in rows]} if not prefix else {}
    return found | {name: [row[name] for row in rows if name in row] for name in names}


def table(rows):
    for prefix in ("", "mixed"):
        print("\n| stage | seeds | greedy | pass@1 | pass@8 | readable |\n|---|---|---|---|---|---|")
        for stage, found in columns_of(rows, prefix).items():
            names = "greedy", "pass@1", "pass@8", "readable"
            cells = [spread([x[name] for x in found]) if name in found[0] else "" for name in names]
            print(f"| {stage} | {len(found)} | {' | '.join(cells)} |")
    print("\n| kept | sampled | right | readable | written |\n|---|---|---|---|---|")
    for stage in ("kept", "mixed kept"):
        for row in rows:
            print(f"| {stage}, seed {row['seed']} | {' | '.join(f'{x:,}' for x in row[stage].values())} |")


def draw(rows):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    shown = [("", "pass@1", "the recipe: right samples (pass@1)"), ("mixed", "pass@1", "two notations: pass@1")]
    shown.append(("mixed", "readable", "two notations: readable samples"))
    for axes, (prefix, name, title) in zip(panels, shown):
        columns = columns_of(rows, prefix)
        for i, found in enumerate(columns.values()):
            axes.plot([i + 0.08 * (k - 2) for k in range(len(found))], [x[name] for x in found], "o", color="C0", ms=4)
            middle = sorted(x[name] for x in found)[len(found) // 2]
            axes.plot([i - 0.3, i + 0.3], [middle, middle], color="C1")
        words = {"start": "before", "zero": "zero: RL", "sft": "sft: imitate", "r1": "r1: RL again"}
        words |= {"alone": "alone: RL only", "mixed": "mixed: before", "language": "language:\nRL, readable"}
        names = [stage.removeprefix("mixed ") for stage in columns]
        axes.set_xticks(range(len(columns)), [words[name] for name in names], rotation=30, ha="right", fontsize=9)
        axes.set(title=title, ylim=(0, 1.02))
        axes.grid(axis="y", alpha=0.3)
    panels[0].plot([], [], "o", color="C0", ms=4, label="one seed")
    panels[0].plot([], [], color="C1", label="median")
    panels[0].legend(loc="lower right")
    figure.savefig(ROOT / "docs" / "figures" / "r1.png", dpi=120)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    path = RESULTS / "r1.jsonl"
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]] if path.exists() else []
    for seed in [] if args.show else args.seeds:
        with tempfile.TemporaryDirectory() as work:
            row = run_seed(seed, Path(work))
        kept = sorted([other for other in kept if other["seed"] != seed] + [row], key=lambda row: row["seed"])
        path.write_text("".join(f"{json.dumps(line)}\n" for line in [machine(), *kept]), encoding="utf-8")
    table(kept)
    draw(kept)


if __name__ == "__main__":
    main()
