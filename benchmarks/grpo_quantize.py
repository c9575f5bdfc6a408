"""What 8 and 4 bits cost a frozen base under LoRA: accuracy, memory, time; and whether the adapters learn on it.

Run      python benchmarks/grpo_quantize.py --model DIR     (needs bitsandbytes)
         python benchmarks/grpo_quantize.py --learn         (the default task with adapters, on both bases)
         python benchmarks/grpo_quantize.py --table         (prints the tables of the kept results again)
Writes   benchmarks/results/grpo_quantize.jsonl, benchmarks/results/grpo_quantize_learn.jsonl

Accuracy: log-probabilities of twelve sentences' tokens, against the same weights in float32, in nats. Memory: bytes of
the weights; beyond them, what PyTorch's allocator hands out in one micro-batch forward and backward with adapters of
rank 16, without and with gradient checkpointing. Sampler against trainer: the same log-probabilities in evaluation and
in training mode. Time: a token of eight rows. "bitsandbytes int8" is that library's own 8-bit layer, for comparison.
Each way runs in a separate process. A way or a run that the results have already is not measured again, so a series
that was stopped can be continued: --ways and --seeds choose.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from cartpole import RESULTS, machine  # noqa: E402
from grpo_plans import allocated  # noqa: E402

SENTENCES = (
    "The ferry leaves the harbour at seven in the morning and comes back before dark.",
    "Water boils at a lower temperature on a mountain because the air is thinner there.",
    "She counted the coins twice and put the smaller ones back into the jar.",
    "If a train covers 60 kilometres in an hour, it covers 90 kilometres in an hour and a half.",
    "A triangle with sides of 3, 4 and 5 has a right angle.",
    "The committee could not agree on a date, so the meeting was moved to the spring.",
    "Bread dough needs flour, water, salt, yeast and a little patience.",
    "Most of the old town was built of the same grey stone as the castle above it.",
    "To open the file, the program needs permission to read the folder that it lies in.",
    "An octopus has three hearts, and two of them stop beating while it swims.",
    "He had promised to write every week, and for a month he did.",
    "Seven times eight is 56, and 56 minus 6 is 50.",
)
WAYS = ("bfloat16", "int8", "nf4", "bitsandbytes int8")


def load(way, directory):
    """(args, model with frozen weights of that kind, tokenizer)."""
    import torch

    import grpo_llm

    quantize = way if way in ("int8", "nf4") else "none"
    args = grpo_llm.Args(
        model=directory,
        device="cpu",
        dtype="bfloat16",
        optimizer="adamw8bit",
        lora_rank=16,
        quantize=quantize,
        micro_batch_tokens=256,
    )
    model, tokenizer, _ = grpo_llm.load_model(args, directory, is_compared=False)
    if way == "bitsandbytes int8":
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_8bit=True)
        options = {"dtype": torch.bfloat16, "quantization_config": config, "device_map": {"": "cpu"}}
        model = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    return args, model, tokenizer


def run_way(way, directory):
    """One row."""
    import torch
    from memory_plan import bytes_of_weights

    import grpo_llm

    torch.set_num_threads(1)
    start = time.perf_counter()
    args, model, tokenizer = load(way, directory)
    seconds, resident = time.perf_counter() - start, grpo_llm.peak_memory("cpu")
    row = {"way": way, "weights": bytes_of_weights(model), "load_seconds": seconds, "load_peak_resident": resident}

    reference = grpo_llm.from_disk("AutoModelForCausalLM", directory, dtype=torch.float32).eval()
    difference, divergence, between_modes = [], [], []
    with torch.no_grad():
        for sentence in SENTENCES:
            tokens = tokenizer(sentence, return_tensors="pt")["input_ids"]
            right, found = (x(tokens).logits[0, :-1].float().log_softmax(-1) for x in (reference, model))
            divergence.append((right.exp() * (right - found)).sum(-1))
            difference.append((right - found).gather(-1, tokens[0, 1:, None]).abs()[:, 0])
            training = model.train()(tokens).logits[0, :-1].float().log_softmax(-1)
            model.eval()
            between_modes.append((training - found).gather(-1, tokens[0, 1:, None]).abs()[:, 0])
    difference, divergence = torch.cat(difference), torch.cat(divergence)
    row |= {"tokens": len(difference), "difference": difference.mean().item(), "largest": difference.max().item()}
    row |= {"kl": divergence.mean().item(), "sampler_trainer": torch.cat(between_modes).mean().item()}
    del reference

    times = []
    for length in (2, 10):  # their difference is 8 tokens without the prefill
        noise = torch.rand(8, length)
        grpo_llm.generate(model, [[5] * 32], noise, 1.0, [10**6], 0)
        start = time.perf_counter()
        grpo_llm.generate(model, [[5] * 32], noise, 1.0, [10**6], 0)
        times.append(time.perf_counter() - start)
    row["seconds_a_token"] = (times[1] - times[0]) / 8

    torch.manual_seed(0)
    grpo_llm.add_adapter(args, model)
    tokens = torch.full((4, 48), 5)
    batch = grpo_llm.pack_rows([[5] * 48], tokens, torch.ones_like(tokens), [[0, 1, 2, 3]], 4)
    model.train()

    def learn():
        grpo_llm.completion_logprobs(model, batch, 48, 1.0, 128).sum().backward()

    start = time.perf_counter()
    row["learning"] = allocated(learn)
    row["learning_seconds"] = time.perf_counter() - start
    model.zero_grad()
    model.activation_checkpointing_enable()
    row["learning_checkpointed"] = allocated(learn)
    return row


def way_rows(kept, ways, directory):
    for way in ways:
        if any(row["way"] == way for row in kept):
            continue
        command = [sys.executable, __file__, "--model", directory, "--one", way]
        run = subprocess.run(command, capture_output=True, text=True)
        line = next((line for line in run.stdout.splitlines() if line.startswith("RESULT ")), None)
        if line:
            yield json.loads(line.removeprefix("RESULT "))
        elif "needs bitsandbytes" in run.stderr or "bitsandbytes" in run.stderr.strip().splitlines()[-1]:
            print(f"skipped     {way}: bitsandbytes is not installed")
        else:
            raise RuntimeError(f"{way}:\n{run.stderr[-2000:]}")


def learn_rows(kept, seeds, steps=25):
    """The default task; before and after, held out, on a plain and on a quantized base."""
    import grpo_llm

    for seed in seeds:
        for quantize in ("none", "int8", "nf4"):
            if any((row["seed"], row["quantize"]) == (seed, quantize) for row in kept):
                continue
            with tempfile.TemporaryDirectory() as folder:
                options = {"lora_rank": 16, "quantize": quantize, "steps": steps, "eval_every": 0}
                options |= {"prompts_per_step": 16, "eval_problems": 128, "eval_samples": 8}
                args = grpo_llm.Args(seed=seed, run_dir=f"{folder}/run", learning_rate=1e-3, **options)
                start = time.perf_counter()
                metrics = grpo_llm.train(args)
            before, after = (
                {name: row[name] for name in ("eval/greedy", "eval/pass@1")} for row in (metrics[0], metrics[-1])
            )
            row = {"seed": seed, "quantize": quantize, "before": before, "after": after}
            yield row | {"steps": steps, "seconds": round(time.perf_counter() - start, 1)}


def go_on(path, head, measure):
    """Write rows as they come, after those that are there."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "machine": machine(), **head}) + "\n")
    kept = list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))[1:]
    for row in measure(kept):
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def print_tables():
    if (path := RESULTS / "grpo_quantize.jsonl").exists():
        head, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        print(f"\n{head['model']}, {head['machine']['cpu']}; {rows[0]['tokens']} tokens; nats, MB, ms\n")
        names = "base | weights | mean difference | largest | KL | sampler against trainer"
        print(f"| {names} | learning, beyond the weights | with checkpointing | a token of 8 rows |")
        print("|---|---|---|---|---|---|---|---|---|")
        for row in rows:
            nats = [f"{row[name]:.{digits}f}" for name, digits in (("difference", 3), ("largest", 2), ("kl", 4))]
            nats.append(f"{row['sampler_trainer']:.3f}")
            cells = [row["way"], f"{row['weights'] / 1e6:.0f}", *nats]
            cells += [f"{row[name] / 1e6:.0f}" for name in ("learning", "learning_checkpointed")]
            print(f"| {' | '.join([*cells, '{:.0f}'.format(1e3 * row['seconds_a_token'])])} |")
    if (path := RESULTS / "grpo_quantize_learn.jsonl").exists():
        print("\n| seed | base | pass@1 before | after | greedy before | after |\n|---|---|---|---|---|---|")
        for row in list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))[1:]:
            shares = [row[when][f"eval/{name}"] for name in ("pass@1", "greedy") for when in ("before", "after")]
            base = row["quantize"].replace("none", "float32")
            print(f"| {row['seed']} | {base} | {' | '.join(f'{x:.3f}' for x in shares)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a causal language model")
    parser.add_argument("--learn", action="store_true", help="train, with adapters on both bases")
    parser.add_argument("--table", action="store_true", help="only print the tables, from the kept results")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="those to measure")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="of --learn")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(run_way(options.one, options.model)))
        sys.exit()
    if options.learn:
        go_on(RESULTS / "grpo_quantize_learn.jsonl", {}, partial(learn_rows, seeds=options.seeds))
    elif options.model:
        head = {"model": Path(options.model).name}
        rows = partial(way_rows, ways=options.ways, directory=options.model)
        go_on(RESULTS / "grpo_quantize.jsonl", head, rows)
    print_tables()
