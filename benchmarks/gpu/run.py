"""Everything that waits for a GPU, in one command that can be stopped and started again.

Run      python benchmarks/gpu/run.py                (needs requirements.txt; peft and trl if they are there)
         python benchmarks/gpu/run.py --rehearse     (the same with tiny shapes, on a CPU if there is no GPU)
         python benchmarks/gpu/run.py --table        (prints the tables of what is kept)
Writes   benchmarks/results/gpu/DEVICE.json and DEVICE.md: a part that is in the JSON is not run again

tests       tests/test_grpo_gpu.py: CUDA graph against growing cache, --offload against plain, plan against measured
memory      a whole training step of each row of benchmarks/grpo_plans.py, random weights of the true shapes, under a
            cap of the row's card (set_per_process_memory_fraction): fits or not, peak against plan, seconds
decode      seconds a token of sampling with the growing cache and with CUDA graphs, and which share of the physical
            floor that is: one pass over the weights at the bandwidth that a copy reaches here
training    samples a second and peak memory, ours and TRL's GRPOTrainer, 1.5B: the same model, data, lengths, dtype
atari       benchmarks/atari.py: eager, compiled, CUDA graphs

Each part runs in a process of its own. Random weights: no EOS comes, so every completion has its full length.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from cartpole import RESULTS, machine  # noqa: E402
from grpo_plans import FLAGS, PLANS  # noqa: E402
from memory_plan import QWEN, SHAPES, memory_plan  # noqa: E402

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": True}
SIZES = {"prompt": 256, "tokens": 1024, "prompts": 4, "decode_tokens": 128, "steps": 3}
TINY_SIZES = {"prompt": 20, "tokens": 12, "prompts": 2, "decode_tokens": 8, "steps": 2}


# ---- In the children ----


def random_model(script, shape, args):
    """What load_model() gives: a Qwen2 of this shape with random weights made on args.device, tokenizer, EOS ids."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{key: value for key, value in (QWEN | shape).items() if key != "architectures"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    if args.quantize != "none":
        script.quantize(model, args.quantize, "meta")  # without content: the card never holds more
    model = model.to_empty(device=args.device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(args.device)
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.int8:
                parameter.random_(-127, 128)
            else:
                parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0 if "norm" in name else 0.0)
        for name, buffer in model.named_buffers():
            if name.endswith(".scale"):
                buffer.fill_(0.02 / 73.6)  # the codes' standard deviation
    tokenizer, model.plain_because = script.new_tokenizer(), ""  # Qwen2 is right on the fast path
    return model.eval(), tokenizer, [tokenizer.eos_token_id]


def step_of(shape, flags, device, sizes, steps=1, **changes):
    """Train for some steps on random weights; plan, peaks in bytes, seconds of each step."""
    import torch
    import tyro

    import grpo_llm as script

    words = ["--model", "random", *FLAGS.split(), *flags.split()]
    args = tyro.cli(script.Args, args=words)
    args = replace(
        args,
        device=device,
        steps=steps,
        prompts_per_step=sizes["prompts"],
        max_tokens=sizes["tokens"],
        instruction="1" * (sizes["prompt"] - 6) + "{}",
        terms=2,
        operators="+",
        length_weight=0.1,
        eval_every=0,
        eval_problems=1,
        eval_samples=1,
        eval_k=1,
        torch_threads=os.cpu_count() if device == "cuda" else 1,
        **changes,
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(QWEN | shape), encoding="utf-8")
        plan = memory_plan(replace(args, model=folder), sizes["prompt"])
    script.load_model = lambda args, name, is_compared=True: random_model(script, shape, args)
    script.evaluate = lambda *_: {"eval/greedy": 0.0}
    script.save = script.save_model = lambda *_, **__: None
    script.is_right = lambda problem, text: len(text) % 2 == 0  # random text: half of it is praised
    with tempfile.TemporaryDirectory() as folder:
        try:
            metrics = script.train(replace(args, run_dir=f"{folder}/run"))
        except torch.OutOfMemoryError as error:
            return {"fits": False, "plan": plan["peak"], "error": str(error)[:200]}
    row = {"fits": True, "plan": plan["peak"], "seconds": [x["time/step_seconds"] for x in metrics[1:]]}
    row["samples"] = args.prompts_per_step * args.group_size
    row["tokens_a_second"] = [x["time/generate_tokens_per_second"] for x in metrics[1:]]
    if device == "cuda":
        row |= {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return row


def run_memory(options, shapes, sizes):
    """One row of the plans under its cap."""
    import torch

    model, card, what, flags = PLANS[options.row]
    if options.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(card * 1e9 / total, 1.0))
    return {"model": model, "card": card, "what": what, **step_of(shapes[model], flags, options.device, sizes)}


def run_training(options, shapes, sizes):
    """Ours, several steps, eight sequences a micro-batch as in TRL's batches: the first step warms up."""
    shape, tokens = shapes["Qwen2.5-1.5B"], 8 * (sizes["prompt"] + sizes["tokens"])
    return step_of(shape, "", options.device, sizes, sizes["steps"], micro_batch_tokens=tokens)


def run_trl(options, shapes, sizes):
    """TRL's GRPOTrainer on the same."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import grpo_llm as script

    args = script.Args(dtype="bfloat16", optimizer="adamw8bit", device=options.device)
    model, tokenizer, _ = random_model(script, shapes["Qwen2.5-1.5B"], args)
    prompts, group = sizes["prompts"], 8
    marks = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=options.device == "cpu",
            bf16=options.device == "cuda",
            max_steps=sizes["steps"],
            per_device_train_batch_size=group,
            gradient_accumulation_steps=prompts,
            num_generations=group,
            max_completion_length=sizes["tokens"],
            temperature=1.0,
            beta=0.0,
            loss_type="grpo",
            learning_rate=1e-6,
            gradient_checkpointing=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=lambda completions, **_: [float(len(text) % 2) for text in completions],
            args=config,
            train_dataset=Dataset.from_list([{"prompt": "1" * sizes["prompt"]}] * 64),
            callbacks=[Watch()],
        )
        start = time.perf_counter()
        trainer.train()
    seconds = [after - before for before, after in zip([start, *marks], marks)]
    row = {"seconds": seconds, "samples": prompts * group}
    if options.device == "cuda":
        row |= {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return row


def run_decode(options, shapes, sizes):
    """Seconds a token at 32 rows, growing cache and fixed shapes; the floor: one pass over the weights."""
    import torch

    import grpo_llm as script

    args = script.Args(dtype="bfloat16", optimizer="adamw8bit", device=options.device)
    model = random_model(script, shapes["Qwen2.5-1.5B"], args)[0]
    T, weights = sizes["decode_tokens"], sum(x.nbytes for x in model.parameters())

    def wait():
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    one, two = (torch.empty(weights // 2, dtype=torch.uint8, device=options.device) for _ in range(2))
    two.copy_(one)
    start = wait()
    for _ in range(5):
        two.copy_(one)
    floor = (wait() - start) / 5  # half of the weights read and half written: the traffic of one pass
    row = {"weights": weights, "floor_seconds": floor, "bandwidth_gb_a_second": weights / floor / 1e9}
    del one, two
    for name, is_fixed in (("growing", False), ("fixed", True)):
        times = []
        for length in (2, 2 + T):  # their difference is T tokens without the prefill
            noise = torch.rand(32, length)
            script.generate(model, [[5] * sizes["prompt"]] * 4, noise, 1.0, [10**6], 0, is_fixed)
            start = wait()
            script.generate(model, [[5] * sizes["prompt"]] * 4, noise, 1.0, [10**6], 0, is_fixed)
            times.append(wait() - start)
        row[name] = {"seconds_a_token": (times[1] - times[0]) / T}
        row[name]["share_of_floor"] = floor / row[name]["seconds_a_token"]
    return row


# ---- In the parent ----


def child(name, options, row=0):
    """The result of a part in a process of its own; its error instead, where it fails."""
    command = [sys.executable, __file__, "--one", name, "--row", str(row)] + (["--rehearse"] * options.rehearse)
    run = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    line = next((line for line in run.stdout.splitlines() if line.startswith("RESULT ")), None)
    return json.loads(line.removeprefix("RESULT ")) if line else {"error": run.stderr[-600:]}


def run_tests(options):
    environment = {**os.environ, "GRPO_TEST_DEVICE": options.device}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_grpo_gpu.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=options.timeout)
    return {"passed": run.returncode == 0, "output": run.stdout[-600:]}


def run_atari(options):
    """On a GPU the whole benchmark, which keeps its own raw results; in rehearsal a few rollouts of ours."""
    command = [sys.executable, str(ROOT / "benchmarks" / "atari.py"), "--device", options.device]
    if options.rehearse:
        command += ["--one", "ours", "--iterations", "3"]
    else:
        command += ["--rounds", "2", "--iterations", "24", "--programs"]
        command += ["ours", "ours-compiled", "ours-graphs", "ours-float32"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    return {"output": run.stdout[-1500:]} if run.returncode == 0 else {"error": run.stderr[-600:]}


def measure(options, path):
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept.setdefault("machine", {**machine(options.device), "date": time.strftime("%Y-%m-%d")})
    parts = {"tests": lambda: run_tests(options), "decode": lambda: child("decode", options)}
    for row, (model, card, what, _) in enumerate(PLANS):
        parts[f"memory: {model}, {card} GB, {what}"] = lambda row=row: child("memory", options, row)
    parts |= {"training: ours": lambda: child("training", options), "training: trl": lambda: child("trl", options)}
    parts["atari"] = lambda: run_atari(options)
    for name, part in parts.items():
        if name in kept and "error" not in kept[name]:
            continue
        start = time.perf_counter()
        try:
            kept[name] = part()
        except subprocess.TimeoutExpired:
            kept[name] = {"error": f"not done after {options.timeout} s"}
        kept[name]["wall_seconds"] = round(time.perf_counter() - start, 1)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        os.replace(temporary, path)
        print(f"{name}: {json.dumps(kept[name])[:300]}", flush=True)
    return kept


def table(kept, is_rehearsal):
    """Markdown of what is kept."""
    device = kept["machine"].get("gpu") or kept["machine"]["cpu"]
    lines = [f"# {device}, {kept['machine']['date']}", ""]
    if is_rehearsal:
        lines += [
            "A rehearsal with tiny shapes: it shows that every part runs, and no number of it means anything.",
            "",
        ]
    lines += [
        "| memory, a whole step | fits | planned GB | allocated GB | reserved GB | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in kept.items():
        if name.startswith("memory"):
            numbers = [row.get("plan", [None])[0], row.get("peak"), row.get("reserved")]
            cells = [name.removeprefix("memory: "), {True: "yes", False: "no"}.get(row.get("fits"), "failed")]
            cells += ["" if x is None else f"{x / 1e9:.1f}" for x in numbers]
            cells += ["{:.1f}".format(*row.get("seconds", [0.0]))]
            lines.append(f"| {' | '.join(cells)} |")
    if "floor_seconds" in (decode := kept.get("decode", {})):
        lines += ["", "| decode, 32 rows | ms a token | share of the floor |", "|---|---|---|"]
        for way in ("growing", "fixed"):
            lines.append(
                f"| {way} | {1e3 * decode[way]['seconds_a_token']:.2f} | {decode[way]['share_of_floor']:.2f} |"
            )
    lines += ["", "| training | samples a second, after the first step | peak GB |", "|---|---|---|"]
    for name in ("training: ours", "training: trl"):
        if "seconds" in (row := kept.get(name, {})):
            seconds = row["seconds"][1:]
            rate = row["samples"] * len(seconds) / sum(seconds)
            lines.append(f"| {name.removeprefix('training: ')} | {rate:.2f} | {row.get('peak', 0) / 1e9:.1f} |")
    lines += ["", f"Tests: {'passed' if kept.get('tests', {}).get('passed') else 'not passed'}.", ""]
    lines += [f"{name}: {row['error'].strip()[-200:]}" for name, row in kept.items() if "error" in row]
    return "\n".join([*lines, kept.get("atari", {}).get("output", "")])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, and a CPU if there is no GPU")
    parser.add_argument("--table", action="store_true", help="only print what is kept")
    parser.add_argument("--timeout", type=int, default=420, help="seconds for a part")
    one = parser.add_argument_group("one part alone, which prints its result and keeps nothing")
    one.add_argument("--one", choices=["memory", "training", "trl", "decode"])
    one.add_argument("--row", type=int, default=0, help="of the plans, for --one memory")
    one.add_argument("--prompts", type=int, help="of a step, in place of the part's own number")
    one.add_argument("--tokens", type=int, help="of a completion, in place of the part's own number")
    one.add_argument("--steps", type=int, help="of training, in place of the part's own number")
    options = parser.parse_args()
    import torch

    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cpu" and not options.rehearse:
        parser.error("there is no GPU here: --rehearse runs everything on the CPU with tiny shapes")
    shapes = {name: TINY if options.rehearse else shape for name, shape in SHAPES.items()}
    sizes = TINY_SIZES if options.rehearse else SIZES
    own = {name: getattr(options, name) for name in ("prompts", "tokens", "steps") if getattr(options, name)}
    sizes = {**sizes, **own}
    if options.one:
        torch.set_num_threads(1 if options.rehearse else os.cpu_count())
        part = {"memory": run_memory, "training": run_training, "trl": run_trl, "decode": run_decode}[options.one]
        print("RESULT " + json.dumps(part(options, shapes, sizes)))
        return
    (RESULTS / "gpu").mkdir(parents=True, exist_ok=True)
    name = "rehearsal" if options.rehearse else torch.cuda.get_device_name().replace(" ", "-")
    path = RESULTS / "gpu" / f"{name}.json"
    if options.rehearse and not options.table:
        path.unlink(missing_ok=True)
    kept = json.loads(path.read_text(encoding="utf-8")) if options.table else measure(options, path)
    path.with_suffix(".md").write_text(table(kept, options.rehearse) + "\n", encoding="utf-8")
    print(table(kept, options.rehearse))


if __name__ == "__main__":
    main()
