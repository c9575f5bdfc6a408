"""GRPO on a real model, side by side: seconds a step, samples a second and peak memory, ours and TRL's GRPOTrainer.

Run      python benchmarks/grpo_peers.py --model DIR --questions train.jsonl --trl-python VENV/bin/python
         python benchmarks/grpo_peers.py --model DIR --rows sums --programs ours trl trl-one-batch
         python benchmarks/grpo_peers.py --table                  (prints the table of the kept results again)
Writes   benchmarks/results/grpo_peers.jsonl (raw: a line naming the machine, then a line a step and a line a run)

Rows, the work of a step, 4 prompts (--prompts) × 8 samples in both:
    sums   sums and differences of two one-digit numbers, at most 64 tokens. The reward is 1 where the last number of
           the completion is the answer, so some groups are equal
    gsm8k  questions of --questions, a JSONL of {"question"} such as GSM8K's, at most 128 tokens, of which an answer
           uses most. The reward is a checksum of the completion, so no group is equal and every sample teaches

Programs, interleaved round by round, each in a process of its own:
    ours                  grpo_llm.py as it comes: on a CPU micro-batches of 2,048 tokens, logits of 1,024 at once
    ours-small            with micro-batches of 512 tokens and logits of 128 at once, which needs less memory
    ours-adamw8bit        ours with --optimizer adamw8bit, which is its choice for bfloat16
    ours-own-attention    ours with the model's own attention, not in spans; each part of its speed on a CPU alone
    ours-own-order        ours without weights in the processor's order
    ours-default-malloc   ours with --no-keep-memory
    ours-large-caches     ours with PyTorch's and oneDNN's own limits on the products that they keep
    trl                   TRL's GRPOTrainer as it comes: batches of 8, gradient checkpointing on
    trl-one-batch         the same, all sequences in one batch
    trl-no-checkpointing  as it comes, gradient checkpointing off

DIR is an instruct model with a chat template; the figures kept are SmolLM2-135M-Instruct's. VENV is an environment with
trl==1.16.0 and the torch and transformers of requirements.txt; it may be the one that runs this file.

The same for all: the model's chat template, tokens sampled from the whole distribution at temperature 1 (no top-k or
top-p) up to EOS, β 0, one gradient step a rollout, ε 0.2, sequence means, constant learning rate, the same threads, and
weights of one type: bfloat16 where the processor multiplies it, else float32. A step counts from the end of the one
before to its own end: generation, rewards, update. The first step warms up and is left out of the table. Ours leaves
groups of equal rewards, whose gradient is 0, out of the update, TRL computes them; `equal_groups` is their share.
`cpu_seconds` is the processor time of the step over all threads: on a busy machine compare that. Peak memory is VmHWM,
the largest resident set of the process, libraries and weights included. `peak_gflops`, in a line of its own, is
what products of the model's size reach just after the run.
"""

import argparse
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from cartpole import RESULTS, machine  # noqa: E402

GROUP = 8
MAX_TOKENS = {"sums": 64, "gsm8k": 128}
TRL = {"trl": {}, "trl-one-batch": {"batch": None}, "trl-no-checkpointing": {"gradient_checkpointing": False}}
OURS = {
    "ours": {},
    "ours-small": {"micro_batch_tokens": 512, "logprob_tokens": 128},
    "ours-adamw8bit": {"optimizer": "adamw8bit"},
    "ours-own-attention": {},
    "ours-own-order": {},
    "ours-default-malloc": {"keep_memory": False},
    "ours-large-caches": {},
}
PROGRAMS = [*OURS, *TRL]
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def write_problems(path, seed):
    """A JSONL of {"prompt", "answer"}, every one of the 155 problems once; no difference is negative."""
    problems = [(f"{a} + {b}", a + b) for a in range(10) for b in range(10)]
    problems += [(f"{a} - {b}", a - b) for a in range(10) for b in range(a + 1)]
    random.Random(seed).shuffle(problems)
    with path.open("w", encoding="utf-8") as file:
        for problem, answer in problems:
            prompt = f"What is {problem}? Answer with the number alone."
            file.write(json.dumps({"prompt": prompt, "answer": str(answer)}) + "\n")


def write_questions(path, source, seed):
    """A JSONL of {"prompt", "answer"} from one of {"question"}, in an order of its own for each seed."""
    questions = [json.loads(line)["question"] for line in Path(source).read_text(encoding="utf-8").splitlines()]
    random.Random(seed).shuffle(questions)
    with path.open("w", encoding="utf-8") as file:
        for question in questions[:1000]:
            file.write(json.dumps({"prompt": question, "answer": "0"}) + "\n")


def checksum(completions, **_):
    """Rewards that tell nothing, but differ within every group: what a step costs does not depend on them."""
    texts = [own if isinstance(own, str) else own[0]["content"] for own in completions]
    return [zlib.crc32(text.encode()) / 2**32 for text in texts]


def last_number_is(text, answer):
    found = NUMBER.findall(text)
    return bool(found) and float(found[-1].replace(",", "")) == float(answer)


# ---- In the child process ----


def peak_resident_mb():
    """VmHWM of this process in MB; None where there is no /proc."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return round(int(found.group(1)) / 1024) if found else None


def emit(**row):
    print("RESULT " + json.dumps(row), flush=True)


def run_trl(program, options):
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(options.threads)
    settings = {"batch": 8, **TRL[program]}
    samples = options.prompts * GROUP
    batch = settings.pop("batch") or samples
    rows = load_dataset("json", data_files=str(options.data), split="train")
    rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})

    def is_right(completions, answer, **_):
        return [float(last_number_is(own[0]["content"], right)) for own, right in zip(completions, answer)]

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.generation = 0.0
            self.mark, self.cpu_mark = time.perf_counter(), time.process_time()

        def on_step_end(self, *_, **__):
            now, cpu_now = time.perf_counter(), time.process_time()
            self.seconds, self.mark = now - self.mark, now
            self.cpu_seconds, self.cpu_mark = cpu_now - self.cpu_mark, cpu_now

        def on_log(self, args, state, control, logs, **_):
            if "reward" in logs:
                emit(
                    step=state.global_step,
                    seconds=round(self.seconds, 3),
                    cpu_seconds=round(self.cpu_seconds, 3),
                    generation_seconds=round(self.generation, 3),
                    reward=round(logs["reward"], 4),
                    tokens=round(logs["completions/mean_length"] * samples),
                    truncated=logs["completions/clipped_ratio"],
                    equal_groups=logs["frac_reward_zero_std"],
                )
                self.generation = 0.0

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=options.dtype == "bfloat16",
            max_steps=options.steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=samples // batch,
            num_generations=GROUP,
            max_completion_length=MAX_TOKENS[options.row],
            temperature=1.0,
            beta=0.0,
            epsilon=0.2,
            loss_type="grpo",
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            shuffle_dataset=False,
            seed=options.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)),
            processing_class=AutoTokenizer.from_pretrained(options.model, padding_side="left"),
            reward_funcs=checksum if options.row == "gsm8k" else is_right,
            args=config,
            train_dataset=rows,
            callbacks=[watch],
        )
        assert (trainer.top_p, trainer.top_k, trainer.min_p, trainer.repetition_penalty) == (1.0, 0, None, 1.0)
        generate = trainer._generate_single_turn

        def timed_generate(*arguments, **keywords):
            start = time.perf_counter()
            result = generate(*arguments, **keywords)
            watch.generation += time.perf_counter() - start
            return result

        trainer._generate_single_turn = timed_generate
        trainer.train()


def run_ours(program, options):
    """grpo_llm.train in this process; rows that it returns, one a step, tell what happened."""
    sys.path.insert(0, str(ROOT))
    import grpo_llm

    if program == "ours-own-attention":
        grpo_llm.SPANS_FROM = math.inf
    if program == "ours-own-order":
        grpo_llm.reordered_weights = lambda model, rows: nullcontext()
    if program == "ours-large-caches":
        os.environ |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
    speed_metrics, cpu_clock = grpo_llm.speed_metrics, []

    def with_cpu_clock(*arguments):
        cpu_clock.append(time.process_time())
        return speed_metrics(*arguments)

    grpo_llm.speed_metrics = with_cpu_clock  # it is called once a step
    with tempfile.TemporaryDirectory() as folder:
        rows = grpo_llm.train(
            grpo_llm.Args(
                model=options.model,
                task="jsonl",
                data=str(options.data),
                dtype=options.dtype,
                steps=options.steps,
                prompts_per_step=options.prompts,
                group_size=GROUP,
                max_tokens=MAX_TOKENS[options.row],
                learning_rate=options.learning_rate,
                anneal_lr=False,
                seed=options.seed,
                torch_threads=options.threads,
                reward=f"{__file__}:checksum" if options.row == "gsm8k" else None,
                eval_every=0,
                eval_problems=options.prompts,
                eval_samples=1,
                eval_k=1,
                checkpoint_every=0,
                run_dir=f"{folder}/run",
                **OURS[program],
            )
        )
    steps = [row for row in rows if "time/step_seconds" in row]
    for row, begun, ended in zip(steps, [None, *cpu_clock], cpu_clock):
        tokens = row["completion/length"] * options.prompts * GROUP
        emit(
            step=row["step"],
            seconds=round(row["time/step_seconds"], 3),
            cpu_seconds=None if begun is None else round(ended - begun, 3),
            generation_seconds=round(tokens / row["time/generate_tokens_per_second"], 3),
            reward=round(row["reward/mean"], 4),
            tokens=round(tokens),
            truncated=row["completion/truncated"],
            equal_groups=row["groups/zero_variance"],
        )


def speed_of_products(options):
    """What this machine does in this minute, the floor of every step: Gflop/s of a product of SmolLM2's shape, the best
    of ten."""
    import torch

    torch.set_num_threads(options.threads)
    states, weights = (torch.randn(n, 576, dtype=getattr(torch, options.dtype)) for n in (512, 1536))
    wall, cpu = [], []
    for _ in range(10):
        begun, cpu_begun = time.perf_counter(), time.process_time()
        torch.nn.functional.linear(states, weights)
        wall.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - cpu_begun)
    operations = 2 * 512 * 576 * 1536 / 1e9
    return {"peak_gflops": round(operations / min(wall), 1), "peak_gflops_cpu": round(operations / min(cpu), 1)}


def run_one(program, options):
    """In the child: its rows as lines of JSON after a marker, memory in the last."""
    if program in OURS:
        run_ours(program, options)
    else:
        run_trl(program, options)
    packages = {}
    for name in ("torch", "transformers", "trl"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    unit = 1 << 20 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in kB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
    emit(peak_mb=peak_resident_mb() or peak, ru_maxrss_mb=peak, packages=packages)
    emit(**speed_of_products(options))  # not before: ours limits what oneDNN keeps before its first product


# ---- In the parent ----


def run_child(row_name, program, round_number, options, data):
    """Yield the rows of one run as they come; exits with its error where it fails."""
    python = options.python if program in OURS else options.trl_python
    command = [python, __file__, "--one", program, "--model", str(Path(options.model).resolve()), "--data", str(data)]
    command += ["--steps", str(options.steps), "--learning-rate", str(options.learning_rate)]
    command += ["--seed", str(options.seed + round_number - 1), "--threads", str(options.threads)]
    command += ["--prompts", str(options.prompts)]
    command += ["--row", row_name, "--dtype", options.dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        for line in process.stdout:
            if line.startswith("RESULT "):
                row = json.loads(line.removeprefix("RESULT "))
                yield {"row": row_name, "program": program, "round": round_number, **row}
        if process.wait() != 0:
            errors.seek(0)
            sys.exit(f"{program} failed:\n{errors.read()[-2000:]}")


def measure(options):
    RESULTS.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": Path(options.model).name,
        "learning_rate": options.learning_rate,
        "steps": options.steps,
        "dtype": options.dtype,
        "threads": options.threads,
        "prompts": options.prompts,
    }
    with (
        (RESULTS / options.results).open("a" if options.append else "w", encoding="utf-8") as file,
        tempfile.TemporaryDirectory() as folder,
    ):

        def write(row):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(json.dumps(row), flush=True)

        if not options.append:
            write({"machine": machine(), "date": time.strftime("%Y-%m-%d"), **settings})
        for round_number in range(1, options.rounds + 1):
            for row_name in options.rows:
                data = Path(folder) / f"{row_name}_{round_number}.jsonl"
                if row_name == "gsm8k":
                    write_questions(data, options.questions, options.seed + round_number - 1)
                else:
                    write_problems(data, options.seed + round_number - 1)
                for program in options.programs:
                    for row in run_child(row_name, program, round_number, options, data):
                        write(row | {"load": round(os.getloadavg()[0], 1)})


def show(number, form):
    return "" if math.isnan(number) else format(number, form)


def print_table(options):
    """Markdown: medians over the steps after the first, and each program against ours."""
    lines = [json.loads(line) for line in (RESULTS / options.results).read_text(encoding="utf-8").splitlines()]
    before = {"dtype": "bfloat16", "prompts": 4, "threads": 2}  # of results kept before --dtype, --prompts, --threads
    head, rows = before | lines[0], [{"row": "sums", "cpu_seconds": None} | row for row in lines if "program" in row]
    print(f"\n{head['machine']['cpu']}, {head['machine']['cores']} cores, {head['date']}, {head['dtype']}, ", end="")
    print(f"threads: {head['threads']}, prompts: {head['prompts']}\n")
    print("| row | program | seconds a step: median (lowest to highest) | processor seconds a step |", end="")
    print(" of the seconds generation | tokens a step | equal groups | samples a second | peak MB |", end="")
    print(" samples a second, ours to this | by processor seconds | peak MB, ours to this |")
    print("|---" * 12 + "|")
    found = {}
    for name, program in dict.fromkeys((row["row"], row["program"]) for row in rows):
        own = [row for row in rows if (row["row"], row["program"]) == (name, program)]
        steps = [row for row in own if row.get("step", 0) > 1]
        if not steps or not any("peak_mb" in row for row in own):  # it did not come to its end
            continue
        found[name, program] = {
            "seconds": [row["seconds"] for row in steps],
            "cpu": median([row["cpu_seconds"] for row in steps if row["cpu_seconds"]] or [math.nan]),
            "generation": median(row["generation_seconds"] for row in steps),
            "tokens": median(row["tokens"] for row in steps),
            "equal": sum(row["equal_groups"] for row in steps) / len(steps),
            "peak": median(row["peak_mb"] for row in own if "peak_mb" in row),
        }
    for (name, program), its in found.items():
        seconds, ours = median(its["seconds"]), found.get((name, "ours"))
        cells = [name, program, f"{seconds:.1f} ({min(its['seconds']):.1f} to {max(its['seconds']):.1f})"]
        cells += [show(its["cpu"], ".1f"), f"{its['generation']:.1f}", f"{its['tokens']:,.0f}", f"{its['equal']:.2f}"]
        cells += [f"{head['prompts'] * GROUP / seconds:.2f}", f"{its['peak']:,.0f}"]
        compared = ours is not None and program != "ours"
        cells += [f"{seconds / median(ours['seconds']):.1f}×" if compared else ""]
        cells += [show(its["cpu"] / ours["cpu"], ".1f") + "×" * (ours["cpu"] > 0) if compared else ""]
        cells += [f"{ours['peak'] / its['peak']:.2f}×" if compared else ""]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of an instruct model")
    parser.add_argument("--rows", nargs="+", default=["sums", "gsm8k"], choices=[*MAX_TOKENS])
    parser.add_argument("--questions", help="JSONL of {question} for the row gsm8k")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 where the CPU multiplies it"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=4, help="of a step, with 8 samples each")
    parser.add_argument("--append", action="store_true", help="add to the results that are there")
    parser.add_argument("--programs", nargs="+", default=["ours", "trl"], choices=PROGRAMS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of each run; the first does not count")
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--python", default=sys.executable, help="interpreter for ours")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter for TRL")
    parser.add_argument("--results", default="grpo_peers.jsonl", help="file name under benchmarks/results")
    parser.add_argument("--table", action="store_true", help="only print the table, from the kept results")
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--row", choices=[*MAX_TOKENS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps must be 2 or more, since the first does not count, got {options.steps}")
    if options.one:
        run_one(options.one, options)
    else:
        if not options.table:
            if options.model is None or not Path(options.model).is_dir():
                parser.error(f"--model must be the directory of a model, got {options.model}")
            if "gsm8k" in options.rows and (options.questions is None or not Path(options.questions).is_file()):
                parser.error(f"--questions must be a file of questions for the row gsm8k, got {options.questions}")
            if options.dtype is None:
                sys.path.insert(0, str(ROOT))
                import grpo_llm

                options.dtype = "bfloat16" if grpo_llm.multiplies_bfloat16() else "float32"
            measure(options)
        print_table(options)
