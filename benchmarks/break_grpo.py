"""The experiments of docs/4_grpo.md that break GRPO on purpose: what happens, in numbers.

Run      python benchmarks/break_grpo.py                 (about ten minutes a seed on one core)
         python benchmarks/break_grpo.py --seeds 4 5     (other seeds; a run that is kept is not repeated)
         python benchmarks/break_grpo.py NAME …          (some of the experiments)
         python benchmarks/break_grpo.py --show          (table and figure from the kept results)
Writes   benchmarks/results/break_grpo.jsonl (a line a run), docs/figures/break_grpo.png

Sums of five one-digit numbers, 30 steps of 256 samples. A seed has one warm-started model, and all of its experiments
begin with it. Where a flag cannot do the damage, a copy of the script with one line changed does it. To repeat a run,
delete its line in the results.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cartpole import RESULTS, ROOT, machine

SHARED = "--terms 5 --max-term 9 --max-tokens 40 --learning-rate 3e-4 --steps 30 --eval-every 0 --eval-problems 128"
SHARED += " --eval-samples 8 --checkpoint-every 0 --torch-threads 1 --device cpu --dtype float32 --optimizer adamw"
SHARED += " --prompts-per-step 32 --group-size 8"
# in the plain path, so these runs take --no-fast: a fault in one path is found when the two are compared at the start
SCORED_AT_1 = (
    "token_logprobs(logits.float(), ids[:, first:], temperature)",
    "token_logprobs(logits.float(), ids[:, first:], 1.0)",
)
NO_EOS = (
    "tokens[going, t], logprobs[going, t], mask[going, t] = token[going], logprob[going], chosen[going]",
    "tokens[going, t], logprobs[going, t] = token[going], logprob[going]\n"
    "        mask[going, t] = (~torch.isin(token[going], eos)).long()",
)
EXPERIMENTS = {  # name: (flags, (text of the script, what it becomes) or None)
    "defaults": ("", None),
    "too short to answer": ("--max-tokens 12", None),
    "groups of two": ("--group-size 2 --prompts-per-step 128", None),
    "short is good": ("--length-weight 2", None),
    "short is good, EOS masked out": ("--length-weight 2 --no-fast", NO_EOS),
    "sampled at 0.7": ("--temperature 0.7 --old-logprobs sampler", None),
    "sampled at 0.7, scored at 1": ("--temperature 0.7 --old-logprobs sampler --no-fast", SCORED_AT_1),
    "learning rate 1e-2": ("--learning-rate 1e-2", None),
}
NAMES = {
    "reward/verifier": "right",
    "reward/std": "reward_std",
    "groups/zero_variance": "zero_variance",
    "completion/length": "length",
    "completion/eos_rate": "eos_rate",
    "policy/entropy": "entropy",
    "policy/grad_norm": "grad_norm",
    "policy/sampler_gap": "sampler_gap",
    "policy/ratio_mean": "ratio_mean",
    "policy/ratio_max": "ratio_max",
}


def run(name, seed, work):
    """One process of the script; its first step, its last one (0 for what it does not log) and the evaluations."""
    flags, change = EXPERIMENTS[name]
    source = (ROOT / "grpo_llm.py").read_text(encoding="utf-8")
    if change:
        assert source.count(change[0]) == 1, f"{name}: the line to change is not in the script"
        source = source.replace(*change)
    script, run_dir, start = work / "grpo_llm.py", work / f"{name} {seed}".replace(" ", "_"), work / f"start_{seed}"
    script.write_text(source, encoding="utf-8")
    begin = ["--model", str(start), "--instruction", "{}"] if start.exists() else []
    command = [sys.executable, str(script), *SHARED.split(), *flags.split(), *begin]
    command += ["--seed", str(seed), "--run-dir", str(run_dir)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{name}: {result.stderr[-2000:]}")
    if not begin:
        shutil.copytree(run_dir / "start", start)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ends = {"first": rows[1], "last": rows[-1]}
    row = {end: {short: round(x.get(long, 0.0), 7) for long, short in NAMES.items()} for end, x in ends.items()}
    row |= {f"pass_at_1_{end}": round(x["eval/pass@1"], 4) for end, x in zip(("before", "after"), (rows[0], rows[-1]))}
    row["right"], row["length"] = (
        [round(x[key], 3) for x in rows[1:]] for key in ("reward/verifier", "completion/length")
    )
    row["seconds"] = round(sum(x.get("time/step_seconds", 0.0) for x in rows), 1)
    return {"experiment": name, "seed": seed, "flags": flags, "line_changed": bool(change), **row}


def span(values, digits=2):
    """The smallest and the largest value, or one number where they are the same to that many digits."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def table(rows):
    """A row an experiment; each cell is the range over the seeds."""
    print("| run | right before | right after | reward std | groups without variance | tokens | largest ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["experiment"] for row in rows):
        mine = [row for row in rows if row["experiment"] == name]
        cells = [span([row[key] for row in mine]) for key in ("pass_at_1_before", "pass_at_1_after")]
        for key, digits in (("reward_std", 2), ("zero_variance", 2), ("length", 1)):
            cells.append(" → ".join(span([row[end][key] for row in mine], digits) for end in ("first", "last")))
        print(f"| {name} | {' | '.join(cells)} | {span([row['last']['ratio_max'] for row in mine])} |")


def draw(rows):
    """A panel an experiment, a line a seed."""
    from matplotlib.figure import Figure

    panels = Figure(figsize=(11, 5), layout="constrained").subplots(2, 4, sharex=True, sharey=True)
    for axes, name in zip(panels.flat, EXPERIMENTS):
        for row in (row for row in rows if row["experiment"] == name):
            steps = range(1, len(row["right"]) + 1)
            (right,) = axes.plot(steps, row["right"], color="C0", linewidth=1.2)
            (length,) = axes.plot(steps, [x / 40 for x in row["length"]], color="C1", linewidth=1.2, linestyle="--")
        axes.set_title(name, fontsize="medium")
        axes.set(xlim=(1, None), ylim=(0, 1.05))
        axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel("step")
    words = ["share of right answers", "tokens of an answer, as a share of the 40 that are allowed"]
    panels[0, 0].figure.legend([right, length], words, loc="outside upper center", ncols=2)
    panels[0, 0].figure.savefig(ROOT / "docs" / "figures" / "break_grpo.png", dpi=120)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", choices=[*EXPERIMENTS, []])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    path = RESULTS / "break_grpo.jsonl"
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]] if path.exists() else []
    with tempfile.TemporaryDirectory() as work:
        for seed in [] if args.show else args.seeds:
            for name in args.names or EXPERIMENTS:  # a seed's first run makes its warm-started model
                if any((row["experiment"], row["seed"]) == (name, seed) for row in kept):
                    continue
                row = run(name, seed, Path(work))
                print(json.dumps(row), flush=True)
                kept.append(row)
                path.write_text("".join(f"{json.dumps(line)}\n" for line in [machine(), *kept]), encoding="utf-8")
    kept.sort(key=lambda row: (list(EXPERIMENTS).index(row["experiment"]), row["seed"]))
    table(kept)
    draw(kept)


if __name__ == "__main__":
    main()
