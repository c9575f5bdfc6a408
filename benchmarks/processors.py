"""Do the defaults hold on other processors? Seeds × instruction sets, a process each.

Run      python benchmarks/processors.py rlhf --seeds 6 7 8 9 10 11 12 13 14 15
         python benchmarks/processors.py rlhf_no_warmup --sets own avx2 sse4 compatible   (as it was)
         python benchmarks/processors.py cartpole --seeds 1 2 3 4 5 6 7 8 9 10
         python benchmarks/processors.py grpo --seeds 1 2 3 4 5
         python benchmarks/processors.py breakout --seeds 1
         python benchmarks/processors.py smollm2 --seeds 1 2 3 --model DIR     (float32; an instruct model of 135M)
         python benchmarks/processors.py one_screen_grpo --seeds 1 2 3 4 5     (the first code of docs/4_grpo.md)
         python benchmarks/processors.py one_screen_ppo --seeds 1 2 3 4 5      (the first code of docs/3_rlhf.md)
         python benchmarks/processors.py rlhf --table          (prints the table, redraws rlhf_processors.png)
Writes   benchmarks/results/processors_NAME.jsonl, a line a run, added to what is there: a run that is there is left out

Rounding differs between processors, and a default that stands at the edge of a cliff falls on some of them. The same
processor rounds otherwise when its libraries are told to use fewer of its instructions:

    own         what the processor has
    avx2        ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
    sse4        ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
    compatible  MKL_CBWR=COMPATIBLE, which changes MKL's float32 products too

Seconds are those of train(), on one thread, and are no speed where something else ran on the machine.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from cartpole import RESULTS, ROOT, machine

SETS = {
    "own": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "sse4": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "compatible": {"MKL_CBWR": "COMPATIBLE"},
}


def first_and_last(metrics, key):
    found = [row[key] for row in metrics if key in row]
    return found[0], found[-1]


def cartpole(args, run_dir):
    import ppo_cartpole

    metrics = ppo_cartpole.train(ppo_cartpole.Args(seed=args.seed, run_dir=run_dir))
    solved = [row["global_step"] for row in metrics if row.get("charts/return_100", 0) >= 475]
    return {"steps to 475": solved[0] if solved else None, "greedy return": metrics[-1]["charts/eval_return"]}


def breakout(args, run_dir):
    import ppo_atari

    settings = {"env_id": "ALE/Breakout-v5", "total_timesteps": 120_000, "learning_rate": 5e-4, "anneal_lr": False}
    settings |= {"torch_threads": 1, "eval_episodes": 40}
    metrics = ppo_atari.train(ppo_atari.Args(seed=args.seed, run_dir=run_dir, **settings))
    return {"return, 40 games": metrics[-1]["charts/eval_return"]}


def rlhf(args, run_dir, **more):
    import rlhf_gpt2_ppo

    metrics = rlhf_gpt2_ppo.train(rlhf_gpt2_ppo.Args(seed=args.seed, run_dir=run_dir, **more))
    rollouts = [row for row in metrics if row["stage"] == "ppo"]
    before, after = (row for row in metrics if row["stage"] == "eval")
    (accuracy,) = (row["reward/held_out_accuracy"] for row in metrics if "reward/held_out_accuracy" in row)
    return {
        "held-out pairs": accuracy,
        "truly positive before": before["objective/gold"],
        "truly positive": after["objective/gold"],
        "KL": after["objective/kl"],
        "largest KL": max(row["objective/kl"] for row in rollouts),
        "distinct-2": after["response/distinct_2"] / before["response/distinct_2"] - 1,
        "curve of KL": [round(row["objective/kl"], 3) for row in rollouts],
        "curve of truth": [round(row["objective/gold"], 3) for row in rollouts],
    }


def rlhf_no_warmup(args, run_dir):
    """The defaults as they were: shorter stages 1 and 2, and the full learning rate in the first update."""
    return rlhf(args, run_dir, sft_steps=200, reward_steps=200, warmup_iterations=0)


def grpo(args, run_dir, **more):
    import grpo_llm

    metrics = grpo_llm.train(grpo_llm.Args(seed=args.seed, run_dir=run_dir, **more))
    (before, after), (greedy_before, greedy) = (first_and_last(metrics, f"eval/{x}") for x in ("pass@1", "greedy"))
    return {"pass@1 before": before, "pass@1": after, "greedy before": greedy_before, "greedy": greedy}


def smollm2(args, run_dir):
    from grpo import REAL
    from grpo_peers import write_problems

    data = Path(run_dir).with_suffix(".jsonl")
    write_problems(data, 0)
    import tyro

    import grpo_llm

    flags = REAL.replace("--dtype bfloat16 --optimizer adamw8bit", "--dtype float32 --optimizer adamw8bit").split()
    flags += ["--model", args.model, "--task", "jsonl", "--data", str(data)]
    settings = tyro.cli(grpo_llm.Args, args=flags, config=(tyro.conf.DisallowNone,))
    return grpo(args, run_dir, **{k: v for k, v in vars(settings).items() if k not in ("seed", "run_dir")})


def one_screen(args, page, first, last):
    """The first Python block of a page with another seed: the mean of the first rollouts and of the last."""
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M | re.S)[1]
    assert code.count("seed=1)") == 1
    names = {}
    exec(code.replace("seed=1)", f"seed={args.seed})").split("\nassert ")[0], names)
    history = names["history"]
    return {"first rollouts": sum(history[:first]) / first, "last rollouts": sum(history[-last:]) / last}


def one_screen_grpo(args, run_dir):
    return one_screen(args, "4_grpo.md", 5, 5)


def one_screen_ppo(args, run_dir):
    return one_screen(args, "3_rlhf.md", 1, 1)


PROGRAMS = (cartpole, breakout, rlhf, rlhf_no_warmup, grpo, smollm2, one_screen_grpo, one_screen_ppo)
PROGRAMS = {program.__name__: program for program in PROGRAMS}


def one(args):
    """A run in this process; its line of JSON is the last thing printed."""
    sys.path.insert(0, str(ROOT))
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        found = PROGRAMS[args.name](args, str(Path(work) / "run"))
        seconds = round(time.perf_counter() - start, 1)
    found = {key: round(x, 4) if isinstance(x, float) else x for key, x in found.items()}
    return {"seed": args.seed, "set": args.one, "seconds": seconds, **found, "machine": machine()}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def print_table(rows):
    """A line a set and one over all of it: the lowest, the median and the highest of each number."""
    names = [name for name, x in rows[0].items() if isinstance(x, float | int) and name not in ("seed", "seconds")]
    print("| instruction set | runs | seconds | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 3) + "|")
    for kind in (*SETS, "all"):
        own = [row for row in rows if kind in (row["set"], "all")]
        if own:
            cells = []
            for name in names:
                found = [row[name] for row in own if row[name] is not None]
                form = ",.0f" if isinstance(found[0], int) else ".1f" if max(map(abs, found)) > 20 else ".3f"
                cells.append(" / ".join(format(x, form) for x in (min(found), median(found), max(found))))
            seconds = f"{min(row['seconds'] for row in own):.0f} to {max(row['seconds'] for row in own):.0f}"
            print(f"| {kind} | {len(own)} | {seconds} | {' | '.join(cells)} |")


def draw(rows, path):
    """KL and truth of every run of stage 3, a colour for each instruction set."""
    from matplotlib.figure import Figure

    panels = Figure(figsize=(10, 4), layout="constrained").subplots(1, 2)
    names = {"own": "the processor's own", "avx2": "AVX2 only", "sse4": "SSE4 only"}
    for axes, key, title in zip(
        panels,
        ("curve of KL", "curve of truth"),
        ("KL to the reference, nats a response", "truly positive responses, share"),
    ):
        for i, kind in enumerate(SETS):
            for j, row in enumerate(row for row in rows if row["set"] == kind):
                steps = range(1, len(row[key]) + 1)
                axes.plot(steps, row[key], color=f"C{i}", lw=0.8, alpha=0.7, label=None if j else names.get(kind, kind))
        axes.set(xlabel="iteration; one line for each run", title=title)
        axes.set_ylim(bottom=0)
    panels[0].axhline(6, color="0.4", ls="--", lw=1)
    panels[0].text(30, 6.05, "bound: 6", ha="right", va="bottom", color="0.4")
    panels[1].legend(title="instruction set", loc="lower right")
    panels[0].figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PROGRAMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["own", "avx2", "sse4"])
    parser.add_argument("--model", help="for smollm2: directory of an instruct model")
    parser.add_argument("--results", type=Path, help="default benchmarks/results/processors_NAME.jsonl")
    parser.add_argument("--table", action="store_true", help="only print the table and redraw the figure")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args), ensure_ascii=False))
        return
    path = args.results or RESULTS / f"processors_{args.name}.jsonl"
    runs = [] if args.table else [(seed, kind) for seed in args.seeds for kind in args.sets]
    for seed, kind in runs:
        if any((row["seed"], row["set"]) == (seed, kind) for row in read(path)):
            continue
        command = [sys.executable, __file__, args.name, "--one", kind, "--seed", str(seed)]
        command += ["--model", args.model] if args.model else []
        result = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **SETS[kind]}
        )
        if result.returncode:
            sys.exit(f"{' '.join(command)}\n{result.stderr[-2000:]}")
        line = result.stdout.splitlines()[-1]
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        print(line, flush=True)
    rows = read(path)
    print_table(rows)
    if args.name == "rlhf":
        draw(rows, ROOT / "docs" / "figures" / "rlhf_processors.png")


if __name__ == "__main__":
    main()
