"""grpo_llm.py, measured: the default run over seeds, outcome against process supervision, a real model.

Run      python benchmarks/grpo.py seeds                     (outcome and process supervision, five seeds each)
         python benchmarks/grpo.py real --model DIR          (SmolLM2-135M-Instruct, three seeds)
         python benchmarks/grpo.py short --model DIR --sets own avx2 --seeds 3
                                                             (settings chosen by the script; adds the runs that lack)
         python benchmarks/grpo.py tools                     (the default run with a calculator, five seeds)
         python benchmarks/grpo.py seeds --plot              (redraws the figure from the kept results)
Writes   benchmarks/results/grpo_NAME.jsonl (raw: a line naming the machine, then lines of each run),
         docs/figures/grpo_seeds.png, grpo_real.png, grpo_short.png; models go to --work

Each run is a process of its own, `python grpo_llm.py …`; its seconds are those of the whole process, start to end,
both evaluations included. The real model's problems are those of grpo_peers.py: the 155 sums and differences of two
one-digit numbers that are not negative. Those of `short` are the 100 sums of two one-digit numbers, half of them held
out. Its commands name the steps, --lora-rank and the seed; the script chooses all other settings. Its instruction sets
are those of processors.py. A processor that has only AVX2 chooses float32, but the script cannot see that another one
pretends to be such a processor: --dtype float32 is added to the commands of the sets that are not the machine's own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path
from statistics import median

import torch
from cartpole import RESULTS, ROOT, machine
from grpo_peers import write_problems
from matplotlib.figure import Figure
from processors import SETS


def run(name, flags, work, instructions="own"):
    """One process of the script; returns its rows, the last with the seconds that it took."""
    run_dir = work / name
    command = [sys.executable, str(ROOT / "grpo_llm.py"), *map(str, flags), "--run-dir", str(run_dir)]
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | SETS[instructions])
    seconds = time.perf_counter() - start
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stderr[-2000:]}")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{"run": name, **{key: round(x, 4) for key, x in row.items()}} for row in rows]
    rows.append({"run": name, "flags": " ".join(map(str, flags)), "seconds": round(seconds, 1)})
    print(json.dumps(rows[-1]), ends(rows), flush=True)
    return rows


def ends(rows):
    """Evaluations before and after."""
    found = [{key: x for key, x in row.items() if key.startswith("eval/")} for row in rows if "eval/greedy" in row]
    return found[0], found[-1]


def seeds(args):
    for seed in range(1, args.seeds + 1):
        for supervision in ("outcome", "process"):
            yield run(f"{supervision}-{seed}", ["--seed", seed, "--supervision", supervision], args.work)


REAL = (
    "--dtype bfloat16 --optimizer adamw8bit --prompts-per-step 8 --group-size 8 --max-tokens 12 "
    "--learning-rate 2.5e-5 --warmup-steps 2 --no-anneal-lr --steps 16 --micro-batch-tokens 512 --logprob-tokens 256 "
    "--eval-every 0 --eval-problems 40 --eval-samples 8 --torch-threads 1"
)


def real(args):
    args.work.mkdir(parents=True, exist_ok=True)
    data = args.work / "sums.jsonl"
    write_problems(data, 0)
    task = ["--model", args.model, "--task", "jsonl", "--data", data]
    for seed in range(1, args.seeds + 1):
        yield run(f"seed-{seed}", [*task, "--seed", seed, *REAL.split()], args.work)


def short(args):
    args.work.mkdir(parents=True, exist_ok=True)
    data = args.work / "sums.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for a, b in product(range(10), range(10)):
            row = {"prompt": f"What is {a} + {b}? Answer with the number alone.", "answer": str(a + b)}
            file.write(json.dumps(row) + "\n")
    task = ["--model", args.model, "--task", "jsonl", "--data", data]
    cpu = torch.backends.cpu.get_cpu_capability()
    for instructions, seed, steps in product(args.sets, range(1, args.seeds + 1), args.steps):
        label = cpu if instructions == "own" else f"{instructions} on {cpu}"
        dtype = [] if instructions == "own" else ["--dtype", "float32"]
        for name, lora in (("all weights", []), ("LoRA", ["--lora-rank", 16])):
            if (name := f"{label}, {name}, {steps} steps-{seed}") not in args.kept:
                yield run(name, [*task, "--steps", steps, *lora, "--seed", seed, *dtype], args.work, instructions)


def tools(args):
    for seed in range(1, args.seeds + 1):
        yield run(f"calculator-{seed}", ["--seed", seed, "--tools", "calculator"], args.work)


def draw(rows, figure):
    """Reward and pass@1 of each run, a colour for each kind. If nothing lies between two evaluations, they are dots."""
    panels = Figure(figsize=(10, 4), layout="constrained").subplots(1, 3)
    names = list(dict.fromkeys(row["run"] for row in rows))
    kinds = list(dict.fromkeys(name.rsplit("-", 1)[0] for name in names))
    titles = {"reward/verifier": "right answers while training", "eval/pass@1": "pass@1, held out"}
    titles["eval/pass@8"] = "pass@8, held out"
    for axes, (key, title) in zip(panels, titles.items()):
        for name in names:
            kind = name.rsplit("-", 1)[0]
            points = [(row["step"], row[key]) for row in rows if row["run"] == name and key in row]
            label = kind if name == next(other for other in names if other.startswith(kind)) else None
            is_pair = len(points) == 2  # before and after: dots, one colour for each seed
            color = f"C{names.index(name) if len(kinds) == 1 else kinds.index(kind)}"
            label = name.replace("-", " ") if len(kinds) == 1 else label
            if is_pair:
                points = [(i, value) for i, (_, value) in enumerate(points)]
            style = "o" if is_pair else ".-" if key.startswith("eval") else "-"
            axes.plot(*zip(*points), style, color=color, alpha=0.6, lw=1, label=label)
        axes.set(title=title, xlabel="step", ylim=(0, 1.02))
        if is_pair:
            steps = [row["step"] for row in rows if row["run"] == names[0] and key in row]
            axes.set_xticks([0, 1], ["before", f"after {steps[-1]} steps"])
            axes.set(xlim=(-0.5, 1.5), xlabel="")
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("share")
    panels[0].legend(title=None if len(kinds) == 1 else "supervision; one line a run")
    panels[0].figure.savefig(figure, dpi=120)


def print_table(rows):
    keys = [key for key in ends(rows)[0] if key.startswith("eval/")]
    print("| run | seconds | " + " | ".join(key.removeprefix("eval/") for key in keys) + " |")
    names = list(dict.fromkeys(row["run"] for row in rows))
    for kind in dict.fromkeys(name.rsplit("-", 1)[0] for name in names):
        runs = [[row for row in rows if row["run"] == name] for name in names if name.rsplit("-", 1)[0] == kind]
        for one in runs:
            before, after = ends(one)
            cells = " | ".join(f"{before[key]:.3f} → {after[key]:.3f}" for key in keys)
            print(f"| {one[0]['run']} | {one[-1]['seconds']:.0f} | {cells} |")
        befores, afters = zip(*map(ends, runs))
        cells = " | ".join(
            f"{median(x[key] for x in befores):.3f} → {median(x[key] for x in afters):.3f}" for key in keys
        )
        print(f"| {kind}, median | {median(one[-1]['seconds'] for one in runs):.0f} | {cells} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["seeds", "real", "short", "tools"])
    parser.add_argument("--seeds", type=int, help="default 5, real: 3, short: 1")
    parser.add_argument("--model", help="for real and short: directory or Hub id of an instruct model")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["own"], help="instruction sets for short")
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 6, 2], help="for short")
    parser.add_argument("--work", type=Path, help="where the models go; default runs/benchmark_grpo_NAME")
    parser.add_argument("--plot", action="store_true", help="only print the table and redraw the figure")
    args = parser.parse_args()
    args.seeds = args.seeds or {"seeds": 5, "real": 3, "short": 1, "tools": 5}[args.name]
    args.work = args.work or ROOT / "runs" / f"benchmark_grpo_{args.name}"
    path = RESULTS / f"grpo_{args.name}.jsonl"
    if not args.plot:
        head = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "torch": version("torch")}
        head["transformers"] = version("transformers")
        kept = path.read_text(encoding="utf-8").splitlines() if args.name == "short" and path.exists() else []
        args.kept = {json.loads(line).get("run") for line in kept}
        program = {"seeds": seeds, "real": real, "short": short, "tools": tools}[args.name]
        with path.open("a" if kept else "w", encoding="utf-8") as file:
            for rows in chain([] if kept else [[head]], program(args)):
                lines = (json.dumps(row, ensure_ascii=False).replace(str(args.model), "DIR") for row in rows)
                file.writelines(f"{line.replace(str(args.work), 'WORK')}\n" for line in lines)
                file.flush()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][1:]
    print_table(rows)
    if args.name in ("seeds", "real"):
        draw(rows, ROOT / "docs" / "figures" / f"grpo_{args.name}.png")


if __name__ == "__main__":
    main()
