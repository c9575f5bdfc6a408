"""GRPO on a real model, side by side: seconds a step, samples a second and peak memory, ours and TRL's GRPOTrainer.

Run      python benchmarks/grpo_peers.py --model DIR --trl-python VENV/bin/python
         python benchmarks/grpo_peers.py --model DIR --trl-python VENV/bin/python --programs ours trl trl-one-batch
         python benchmarks/grpo_peers.py --table                  (prints the table of the kept results again)
Writes   benchmarks/results/grpo_peers.jsonl (raw: a line naming the machine, then a line a step and a line a run)

Programs, interleaved round by round, each in a process of its own:
    ours                  grpo_llm.py
    trl                   TRL's GRPOTrainer as it comes: batches of 8, gradient checkpointing on
    trl-one-batch         the same, all 32 sequences in one batch
    trl-no-checkpointing  as it comes, gradient checkpointing off

DIR is an instruct model with a chat template; the figures kept are SmolLM2-135M-Instruct's. VENV is an environment with
trl==1.16.0 and the torch and transformers of requirements.txt; it may be the one that runs this file.

The same for all: sums and differences of two one-digit numbers in the model's chat template, 4 prompts × 8 samples a
step, at most 64 tokens or up to EOS, sampled from the whole distribution at temperature 1 (no top-k or top-p), bfloat16
weights, β 0, one gradient step a rollout, ε 0.2, sequence means, constant learning rate, 2 CPU threads. The reward is 1
where the last number of the completion is the answer. A step counts from the end of the one before to its own end:
generation, rewards, update. The first step warms up and is left out of the table. Ours leaves groups of equal rewards,
whose gradient is 0, out of the update, TRL computes them; `equal_groups` is their share. Peak memory is VmHWM, the
largest resident set of the process, libraries and weights included.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from cartpole import RESULTS, machine  # noqa: E402

PROMPTS, GROUP, MAX_TOKENS, THREADS = 4, 8, 64, 2
SAMPLES = PROMPTS * GROUP
TRL = {"trl": {}, "trl-one-batch": {"batch": SAMPLES}, "trl-no-checkpointing": {"gradient_checkpointing": False}}
PROGRAMS = ["ours", *TRL]
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

    torch.set_num_threads(THREADS)
    settings = {"batch": 8, **TRL[program]}
    batch = settings.pop("batch")
    rows = load_dataset("json", data_files=str(options.data), split="train")
    rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})

    def reward(completions, answer, **_):
        return [float(last_number_is(own[0]["content"], right)) for own, right in zip(completions, answer)]

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.generation = 0.0
            self.mark = time.perf_counter()

        def on_step_end(self, *_, **__):
            now = time.perf_counter()
            self.seconds, self.mark = now - self.mark, now

        def on_log(self, args, state, control, logs, **_):
            if "reward" in logs:
                emit(
                    step=state.global_step,
                    seconds=round(self.seconds, 3),
                    generation_seconds=round(self.generation, 3),
                    reward=round(logs["reward"], 4),
                    tokens=round(logs["completions/mean_length"] * SAMPLES),
                    truncated=logs["completions/clipped_ratio"],
                    equal_groups=logs["frac_reward_zero_std"],
                )
                self.generation = 0.0

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            max_steps=options.steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=SAMPLES // batch,
            num_generations=GROUP,
            max_completion_length=MAX_TOKENS,
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
            model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16),
            processing_class=AutoTokenizer.from_pretrained(options.model, padding_side="left"),
            reward_funcs=reward,
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


def run_ours(options):
    """grpo_llm.train in this process; rows that it returns, one a step, tell what happened."""
    sys.path.insert(0, str(ROOT))
    import grpo_llm

    with tempfile.TemporaryDirectory() as folder:
        rows = grpo_llm.train(
            grpo_llm.Args(
                model=options.model,
                task="jsonl",
                data=str(options.data),
                dtype="bfloat16",
                optimizer="adamw8bit",
                steps=options.steps,
                prompts_per_step=PROMPTS,
                group_size=GROUP,
                max_tokens=MAX_TOKENS,
                learning_rate=options.learning_rate,
                anneal_lr=False,
                seed=options.seed,
                micro_batch_tokens=512,
                logprob_tokens=256,
                torch_threads=THREADS,
                eval_every=0,
                eval_problems=PROMPTS,
                eval_samples=1,
                eval_k=1,
                checkpoint_every=0,
                run_dir=f"{folder}/run",
            )
        )
    for row in rows:
        if "time/step_seconds" in row:
            tokens = row["completion/length"] * SAMPLES
            emit(
                step=row["step"],
                seconds=round(row["time/step_seconds"], 3),
                generation_seconds=round(tokens / row["time/generate_tokens_per_second"], 3),
                reward=round(row["reward/mean"], 4),
                tokens=round(tokens),
                truncated=row["completion/truncated"],
                equal_groups=row["groups/zero_variance"],
            )


def run_one(program, options):
    """In the child: its rows as lines of JSON after a marker, memory in the last."""
    if program == "ours":
        run_ours(options)
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


# ---- In the parent ----


def run_child(program, round_number, options, data):
    """Yield the rows of one run as they come; exits with its error where it fails."""
    python = options.python if program == "ours" else options.trl_python
    command = [python, __file__, "--one", program, "--model", str(Path(options.model).resolve()), "--data", str(data)]
    command += ["--steps", str(options.steps), "--learning-rate", str(options.learning_rate)]
    command += ["--seed", str(options.seed + round_number - 1)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS)}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        for line in process.stdout:
            if line.startswith("RESULT "):
                row = json.loads(line.removeprefix("RESULT "))
                yield {"program": program, "round": round_number, **row}
        if process.wait() != 0:
            errors.seek(0)
            sys.exit(f"{program} failed:\n{errors.read()[-2000:]}")


def measure(options):
    RESULTS.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": Path(options.model).name,
        "learning_rate": options.learning_rate,
        "steps": options.steps,
    }
    with (RESULTS / options.results).open("w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as folder:

        def write(row):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(json.dumps(row), flush=True)

        write({"machine": machine(), "date": time.strftime("%Y-%m-%d"), **settings})
        for round_number in range(1, options.rounds + 1):
            data = Path(folder) / f"problems_{round_number}.jsonl"
            write_problems(data, options.seed + round_number - 1)
            for program in options.programs:
                for row in run_child(program, round_number, options, data):
                    write(row)


def print_table(options):
    """Markdown: medians over the steps after the first, and each program against ours."""
    lines = [json.loads(line) for line in (RESULTS / options.results).read_text(encoding="utf-8").splitlines()]
    head, rows = lines[0], lines[1:]
    print(f"\n{head['machine']['cpu']}, {head['machine']['cores']} cores, {head['date']}\n")
    print("| program | seconds a step: median (lowest to highest) | of which generation | tokens a step |", end="")
    print(" samples a second | peak MB | samples a second, ours to this | peak MB, ours to this |")
    print("|---|---|---|---|---|---|---|---|")
    found = {}
    for program in dict.fromkeys(row["program"] for row in rows):
        steps = [row for row in rows if row["program"] == program and row.get("step", 0) > 1]
        ends = [row for row in rows if row["program"] == program and "peak_mb" in row]
        found[program] = {
            "seconds": [row["seconds"] for row in steps],
            "generation": median(row["generation_seconds"] for row in steps),
            "tokens": median(row["tokens"] for row in steps),
            "peak": median(row["peak_mb"] for row in ends),
        }
    ours = found.get("ours")
    for program, its in found.items():
        seconds = median(its["seconds"])
        cells = [program, f"{seconds:.1f} ({min(its['seconds']):.1f} to {max(its['seconds']):.1f})"]
        cells += [f"{its['generation']:.1f}", f"{its['tokens']:,.0f}", f"{SAMPLES / seconds:.2f}"]
        cells += [f"{its['peak']:,.0f}"]
        compared = ours is not None and program != "ours"
        cells += [f"{seconds / median(ours['seconds']):.1f}×" if compared else ""]
        cells += [f"{ours['peak'] / its['peak']:.2f}×" if compared else ""]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of an instruct model")
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
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps must be 2 or more, since the first does not count, got {options.steps}")
    if options.one:
        run_one(options.one, options)
    else:
        if not options.table:
            if options.model is None or not Path(options.model).is_dir():
                parser.error(f"--model must be the directory of a model, got {options.model}")
            measure(options)
        print_table(options)
