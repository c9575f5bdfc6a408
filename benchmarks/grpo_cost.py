"""How the cost of a GRPO step grows: tokens a processor second of sampling and learning at 1, 2, 4 and 8 times the
prompts, the group and the length of the answers; and at 1 and 2 processes.

Run      python benchmarks/grpo_cost.py --model DIR          (DIR: an instruct model; kept: SmolLM2-135M-Instruct)
         python benchmarks/grpo_cost.py --model DIR --axes length --append
         python benchmarks/grpo_cost.py --table              (the table and the figure of the kept results again)
Writes   benchmarks/results/grpo_cost.jsonl (raw: a line naming the machine, then a line a measured size)
         docs/figures/grpo_cost.png

The base is 1 prompt of 32 tokens, 4 answers, 64 tokens each. One axis grows at a time. All answers use their full
length, and the advantages are random, so every answer teaches. The functions are the script's own: sample() and
minibatch_gradient(), on the fast path, with micro-batches of 1,024 tokens and one thread a process, in bfloat16 where
the processor multiplies it and else in float32. Answers are counted, prompts are not. Processor seconds count the work
and not the waiting, so a busy machine changes them less than seconds by the clock. With 2 processes each takes half of
the prompts, the gradients are summed, and the processor seconds of both are added up; `sum_seconds` is the share of the
summing.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time

from cartpole import RESULTS, ROOT, machine

SIZES, BASE = (1, 2, 4, 8), {"prompts": 1, "group": 4, "length": 64}
AXES = [*BASE, "processes"]
PROMPT = 32  # tokens


def dtype():
    import grpo_llm

    return "bfloat16" if grpo_llm.multiplies_bfloat16() else "float32"


def measure_size(model, eos_ids, size, repeats=2):
    """One size in this process: a dict of processor seconds, the least of the repeats."""
    import torch

    import grpo_llm

    args = grpo_llm.Args(
        model="-", task="jsonl", data="-", device="cpu", dtype=dtype(), optimizer="adamw8bit", learning_rate=1e-6,
        prompts_per_step=size["prompts"], group_size=size["group"], max_tokens=size["length"], micro_batch_tokens=1024,
        generate_rows=128, eval_samples=8, gradient_checkpointing=False, offload=False, torch_threads=1,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 40_000, (size["prompts"], PROMPT), generator=generator).tolist()
    prompts = grpo_llm.own_share(prompts)
    B, T = len(prompts) * size["group"], size["length"]
    found = {"sample_seconds": [], "learn_seconds": [], "sum_seconds": []}
    for _ in range(repeats):
        clock = [time.process_time()]
        tokens, logprobs, mask = grpo_llm.sample(args, model, prompts, torch.rand(B, T), 1.0, eos_ids, 0)
        clock.append(time.process_time())
        assert mask.all()
        advantages = torch.randn(B, 1, generator=generator).expand(-1, T)
        rollout = grpo_llm.Rollout((prompts, tokens, mask), advantages, logprobs, logprobs, None)
        minibatch = torch.arange(B), dict.fromkeys(range(B), T)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # it only clears the gradients
        grpo_llm.minibatch_gradient(args, model.train(), optimizer, rollout, minibatch, grpo_llm.new_statistics(), True)
        model.eval()
        clock.append(time.process_time())
        grpo_llm.sum_gradients(args, list(model.parameters()))
        clock.append(time.process_time())
        for times, begun, ended in zip(found.values(), clock, clock[1:]):
            times.append(ended - begun)
    return {name: round(min(times), 3) for name, times in found.items()}


def run_child(options):
    """In the child: the sizes of an axis, one after the other, as lines of JSON."""
    sys.path.insert(0, str(ROOT))
    import torch
    import torch.distributed as dist

    import grpo_llm

    torch.set_num_threads(1)
    if options.one == "processes":
        dist.init_process_group("gloo")
    args = grpo_llm.Args(model=options.model, device="cpu", dtype=dtype(), optimizer="adamw8bit", torch_threads=1)
    grpo_llm.prepare_memory(args)
    model, _, _ = grpo_llm.load_model(args, options.model, is_compared=False)
    model.plain_because = ""
    grpo_llm.set_spans(model, True)
    sizes = [2] if options.one == "processes" else SIZES
    for times in sizes:
        axis = "prompts" if options.one == "processes" else options.one
        size = BASE | {axis: BASE[axis] * (8 if options.one == "processes" else times)}
        row = {"axis": options.one, "times": times, **size, **measure_size(model, [], size)}
        print("RESULT " + json.dumps(row), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def run_axis(axis, options):
    """Yield the rows of an axis as they come. Of two processes each row is the sum of both."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable]
    if axis == "processes":
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, __file__, "--one", axis, "--model", options.model]
    waiting = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "RESULT " in line:
                row = json.loads(line.partition("RESULT ")[2])
                waiting.append(row)
                if axis != "processes" or len(waiting) == 2:
                    for name in ("sample_seconds", "learn_seconds", "sum_seconds"):
                        row[name] = round(sum(own[name] for own in waiting), 3)
                    yield row
                    waiting = []
    if process.returncode:
        sys.exit(f"{axis} failed")


def measure(options):
    path = RESULTS / "grpo_cost.jsonl"
    with path.open("a" if options.append else "w", encoding="utf-8") as file:

        def write(row):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(json.dumps(row), flush=True)

        if not options.append:
            sys.path.insert(0, str(ROOT))
            settings = {"dtype": dtype(), "prompt": PROMPT, "base": BASE}
            write({"machine": machine(), "date": time.strftime("%Y-%m-%d"), **settings})
        for axis in random.Random(1).sample(options.axes, len(options.axes)):
            for row in run_axis(axis, options):
                write(row)


def rates():
    """(head of the results, {axis: [(times, tokens sampled a processor second, tokens learned)]})."""
    head, *rows = map(json.loads, (RESULTS / "grpo_cost.jsonl").read_text(encoding="utf-8").splitlines())
    found = {}
    for row in rows:
        tokens = row["prompts"] * row["group"] * row["length"]
        learned = tokens / (row["learn_seconds"] + (row["sum_seconds"] if row["axis"] == "processes" else 0))
        found.setdefault(row["axis"], []).append((row["times"], tokens / row["sample_seconds"], learned))
    return head, {axis: sorted(found[axis]) for axis in AXES if axis in found}


def print_table():
    head, found = rates()
    print(f"\n{head['machine']['cpu']}, {head['date']}, {head['dtype']}\n")
    print("| axis | phase | " + " | ".join(f"{times}×" for times in SIZES) + " |")
    print("|---" * 6 + "|")
    for axis, own in found.items():
        if axis == "processes":
            continue
        for column, phase in ((1, "sampling"), (2, "learning")):
            print(f"| {axis} | {phase} | " + " | ".join(f"{point[column]:.0f}" for point in own) + " |")
    if "processes" in found and len(found["prompts"]) == len(SIZES):
        for column, phase in ((1, "sampling"), (2, "learning")):
            one, two = found["prompts"][-1][column], found["processes"][0][column]
            print(f"8 prompts, {phase}: {one:.0f} tokens a processor second with 1 process, {two:.0f} with 2")


def draw():
    from matplotlib.figure import Figure

    _, found = rates()
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    styles = {"prompts": ("o-", "#1b7f4d"), "group": ("s--", "#2f5fa8"), "length": ("^:", "#b5342b")}
    for panel, column, title in zip(figure.subplots(1, 2), (1, 2), ("sampling", "learning")):
        for axis, (style, color) in styles.items():
            points = found.get(axis, [])
            panel.plot([x[0] for x in points], [x[column] for x in points], style, color=color, label=axis)
        panel.set(xscale="log", xticks=SIZES, xlabel="times the base", title=title)
        panel.set_xticklabels([f"{times}×" for times in SIZES])
        panel.set_ylim(0, 1.1 * max(point[column] for axis in styles for point in found.get(axis, [])))
        panel.minorticks_off()
        panel.set_ylabel("answer tokens a processor second")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.savefig(ROOT / "docs" / "figures" / "grpo_cost.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of an instruct model")
    parser.add_argument("--axes", nargs="+", default=AXES, choices=AXES)
    parser.add_argument("--append", action="store_true", help="add to the results that are there")
    parser.add_argument("--table", action="store_true", help="only the table and the figure, from the kept results")
    parser.add_argument("--one", choices=AXES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_child(options)
    else:
        if not options.table:
            if options.model is None:
                parser.error("--model must be the directory of a model")
            measure(options)
        print_table()
        draw()
