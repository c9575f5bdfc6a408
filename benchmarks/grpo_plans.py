"""grpo_llm.py's memory: planned for Qwen2.5's shapes, and planned against measured on a real model.

Run      python benchmarks/grpo_plans.py                          (the plans; no weights, no download)
         python benchmarks/grpo_plans.py --model DIR              (measured on this CPU, beside its plan)
         python benchmarks/grpo_plans.py --table                  (prints the tables of the kept results again)
Writes   benchmarks/results/grpo_plans.jsonl, benchmarks/results/grpo_memory.jsonl

The plans are those of benchmarks/memory_plan.py, for the shapes in benchmarks/qwen2.5.json. Every plan: G = 8, 8
prompts of 256 tokens a step, 1,024 new tokens, bfloat16, 8-bit AdamW, gradient checkpointing, one sequence a
micro-batch. GB are 1e9 bytes; a card sold as 24 GB has 24 GiB, 25.8 of these.

Measured: what PyTorch's CPU allocator hands out beyond the weights, in two micro-batches forward and backward and in
the sampling of all sequences at full length, as its profiler reports it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from cartpole import RESULTS, machine  # noqa: E402

FLAGS = (
    "--dtype bfloat16 --optimizer adamw8bit --group-size 8 --prompts-per-step 8 --max-tokens 1024 "
    "--gradient-checkpointing --micro-batch-tokens 1280 --logprob-tokens 256 --generate-rows 32 --eval-problems 32 "
    "--eval-samples 8"
)
PLANS = [  # model, card in GB, what it is, flags
    ("Qwen2.5-0.5B", 8, "with KL, everything on the card", "--beta 0.04 --no-offload"),
    ("Qwen2.5-1.5B", 12, "with KL, everything on the card", "--beta 0.04 --no-offload"),
    ("Qwen2.5-1.5B", 12, "with KL, --offload", "--beta 0.04 --offload"),
    ("Qwen2.5-1.5B", 16, "with KL, everything on the card", "--beta 0.04 --no-offload"),
    ("Qwen2.5-3B", 16, "with KL, --offload", "--beta 0.04 --offload"),
    ("Qwen2.5-7B", 24, "β = 0, --offload", "--offload"),
    ("Qwen2.5-7B", 24, "with KL, --offload", "--beta 0.04 --offload"),
    ("Qwen2.5-7B", 24, "with KL, LoRA of rank 16, base in bfloat16", "--beta 0.04 --lora-rank 16"),
    ("Qwen2.5-7B", 16, "with KL, LoRA of rank 16, base in 8 bits", "--beta 0.04 --lora-rank 16 --quantize int8"),
    (
        "Qwen2.5-7B",
        12,
        "the same, 8 sequences sampled at once",
        "--beta 0.04 --lora-rank 16 --quantize int8 --generate-rows 8",
    ),
]
MEASURED = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "offload": {"offload": True},
    "offload, checkpointing": {"offload": True, "gradient_checkpointing": True},
    "LoRA": {"lora_rank": 16},
    "LoRA, base in 8 bits": {"lora_rank": 16, "quantize": "int8"},
    "LoRA, base in 8 bits, checkpointing": {"lora_rank": 16, "quantize": "int8", "gradient_checkpointing": True},
}


def plan_rows():
    """A row a plan: model, card, the command and the table that it prints, in bytes."""
    import tyro
    from memory_plan import PlanArgs, memory_plan

    for model, card, what, flags in PLANS:
        flags = f"--model Qwen/{model}-Instruct --device cuda {FLAGS} {flags} --plan 256 --gpu-memory {card}"
        args = tyro.cli(PlanArgs, args=flags.split(), config=(tyro.conf.DisallowNone,))
        plan = memory_plan(args, args.plan, args.gpu_memory)
        yield {
            "model": model,
            "card": card,
            "what": what,
            "command": f"python benchmarks/memory_plan.py {flags}",
            "plan": plan,
        }


def allocated(action):
    """Bytes alive at most beyond those at the start, as the CPU's allocator reports them."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    alive = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def measured_rows(model_name, dtype="bfloat16", T=48, Q=48, P=2, G=4):
    """A row a way to keep things: planned and measured bytes beyond the weights, learning and sampling."""
    import torch
    from memory_plan import memory_plan

    import grpo_llm

    torch.set_num_threads(1)
    for name, options in MEASURED.items():
        args = grpo_llm.Args(
            model=model_name,
            device="cpu",
            dtype=dtype,
            optimizer="adamw8bit",
            group_size=G,
            prompts_per_step=P,
            max_tokens=T,
            micro_batch_tokens=256,
            logprob_tokens=128,
            eval_problems=1,
            eval_samples=1,
            eval_k=1,
            **options,
        )
        plan = memory_plan(args, Q)
        model = grpo_llm.load_model(args, model_name)[0]
        if args.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if args.lora_rank:
            torch.manual_seed(0)
            grpo_llm.add_adapter(args, model)
        parameters, alive = [x for x in model.parameters() if x.requires_grad], []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(
                lambda _, alive=alive, parameters=parameters: alive.append(
                    sum(x.grad.nbytes for x in parameters if x.grad is not None)
                )
            )
        optimizer = grpo_llm.new_optimizer(args, model)  # its hooks come after those that count
        tokens = torch.full((P * G, T), 5)
        rows = grpo_llm.plan_for(args, model, [Q] * P, dict.fromkeys(range(P * G), T), G)
        batch = grpo_llm.pack_rows([[5] * Q] * P, tokens, torch.ones_like(tokens), rows[0], G)

        def learn(model=model, batch=batch, args=args, rows=rows):
            for _ in rows[:2]:
                logprobs = grpo_llm.completion_logprobs(model, batch, T, args.temperature, args.logprob_tokens)
                logprobs.sum().backward()

        model.train()
        learning = allocated(learn)
        optimizer.zero_grad()
        model.eval()
        noise = torch.rand(P * G, T)

        def sample(model=model, noise=noise):
            grpo_llm.generate(model, [[5] * Q] * P, noise, 1.0, [model.config.vocab_size + 1], 0)

        sampling = allocated(sample)
        always = plan["weights"][0] + plan["optimizer state"][0]
        yield {
            "way": name,
            "weights": plan["weights"][0],
            "gradients_alive": max(alive),
            "learning": {"planned": plan["peak of learning"][0] - always, "measured": learning},
            "sampling": {"planned": plan["peak of sampling"][0] - always, "measured": sampling},
        }


def keep(path, head, rows):
    """Write rows as they come, a line each."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in ({"date": time.strftime("%Y-%m-%d"), **head}, *rows):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(json.dumps(row), flush=True)


def print_tables():
    gb = "{:.1f}".format
    if (path := RESULTS / "grpo_plans.jsonl").exists():
        print("\n| model | how | card GB | on the card GB | in which phase | to spare | on the host GB |")
        print("|---|---|---|---|---|---|---|")
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()[1:]):
            plan, (device, host) = row["plan"], row["plan"]["peak"]
            phase = next(name for name, own in plan.items() if name.startswith("peak of") and own[0] == device)
            cells = [row["model"], row["what"], row["card"], gb(device / 1e9), phase.removeprefix("peak of ")]
            print(f"| {' | '.join(map(str, [*cells, gb(row['card'] - device / 1e9), gb(host / 1e9)]))} |")
    if (path := RESULTS / "grpo_memory.jsonl").exists():
        head, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        print(f"\n{head['model']}, {head['machine']['cpu']}; MB, beyond the weights\n")
        print("| way | weights | gradients alive | learning: planned | measured | sampling: planned | measured |")
        print("|---|---|---|---|---|---|---|")
        for row in rows:
            pairs = [row[phase][kind] for phase in ("learning", "sampling") for kind in ("planned", "measured")]
            cells = [f"{x / 1e6:.0f}" for x in (row["weights"], row["gradients_alive"], *pairs)]
            print(f"| {' | '.join([row['way'], *cells])} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a causal language model: measure on it")
    parser.add_argument("--table", action="store_true", help="only print the tables, from the kept results")
    options = parser.parse_args()
    if options.model:
        head = {"machine": machine(), "model": Path(options.model).name}
        keep(RESULTS / "grpo_memory.jsonl", head, measured_rows(options.model))
    elif not options.table:
        keep(RESULTS / "grpo_plans.jsonl", {}, plan_rows())
    print_tables()
