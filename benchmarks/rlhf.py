"""rlhf_gpt2_ppo.py, measured: one thread and two, real sentences, a real judge. The default run over seeds and
instruction sets is processors.py, the first update rlhf_first_update.py, reward hacking claims/hacking.py.

Run      python benchmarks/rlhf.py threads                        (the default run on one thread and on two)
         python benchmarks/rlhf.py broken                         (stage 3 with one flag that it should not have)
         python benchmarks/rlhf.py sentences --shared ../shared   (reviews by people, GPT-2's BPE; rlhf_sentences.png)
         python benchmarks/rlhf.py judge --shared ../shared --judge DIR    (an instruct model's preferences)
         python benchmarks/rlhf.py sentences --plot               (redraws the figure from the kept results)
Writes   benchmarks/results/rlhf_NAME.jsonl (raw: a line naming the machine, then lines of each run),
         for some a figure in docs/figures; models go to --work

Each run is a process of its own, `python rlhf_gpt2_ppo.py …`; its seconds are those of the whole process.
DIR/data/sentence_polarity holds rt-polarity.pos and rt-polarity.neg (Pang and Lee 2005), DIR/data/gpt2_bpe the
vocab.json and merges.txt of GPT-2; neither is part of this repository.
"""

import argparse
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from cartpole import RESULTS, ROOT, machine
from matplotlib.figure import Figure

KEPT = ("objective/", "response/", "policy/", "val/", "held_out", "calibration", "perplexity")


def run(name, flags, work):
    """One process of the script; returns its rows, the last with the seconds that it took."""
    run_dir = work / name
    command = [sys.executable, str(ROOT / "rlhf_gpt2_ppo.py"), *map(str, flags), "--run-dir", str(run_dir)]
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stderr[-2000:]}")
    rows = []
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found = {key: round(value, 4) for key, value in row.items() if any(kept in key for kept in KEPT)}
        if found and (row["stage"] != "sft" or "sft/perplexity" in row):
            rows.append({"run": name, "stage": row["stage"], "step": row["step"], **found})
    out = result.stdout.splitlines()
    rows.append({"run": name, "flags": " ".join(map(str, flags)), "seconds": round(seconds, 1), "said": out})
    print(f"{name}: {seconds:.1f} s", *out, sep="\n", flush=True)
    return rows


def threads(args):
    return [row for n in (1, 2) for row in run(f"{n} threads", ["--torch-threads", n], args.work)]


def broken(args):
    """The runs of docs/3_rlhf.md that go wrong on purpose: the default run's stages, a flag of stage 3 changed."""
    rows = run("sft", ["--stage", "sft", "--sft-steps", 200], args.work)
    sft = ["--model", args.work / "sft" / "sft"]
    rows += run("reward", ["--stage", "reward", "--reward-steps", 200, *sft], args.work)
    ppo = ["--stage", "ppo", *sft, "--reward-model", args.work / "reward" / "reward"]
    fast = ["--learning-rate", 1e-2, "--warmup-iterations", 0, "--ppo-iterations", 12]
    rows += run("learning rate 1e-2", [*ppo, *fast], args.work)
    short = ["--missing-eos-penalty", 0, "--length-penalty", 0.3, "--learning-rate", 6e-4, "--warmup-iterations", 0]
    return rows + run("a token costs 0.3, a missing EOS nothing", [*ppo, *short], args.work)


def write_sentences(args):
    """The real sentences as the script reads them, and a small GPT-2 with GPT-2's own vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "sentences.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for label, name in ((1, "rt-polarity.pos"), (0, "rt-polarity.neg")):
            for line in (args.shared / "data/sentence_polarity" / name).read_text(encoding="utf-8").splitlines():
                file.write(json.dumps({"text": line.strip(), "label": label}) + "\n")
    if not (args.work / "gpt2").exists():
        sizes = {"n_positions": 128, "n_embd": 128, "n_layer": 4, "n_head": 4}
        config = GPT2Config(**sizes, activation_function="gelu_pytorch_tanh")
        GPT2LMHeadModel(config).save_pretrained(args.work / "gpt2")
        GPT2Tokenizer.from_pretrained(args.shared / "data/gpt2_bpe").save_pretrained(args.work / "gpt2")
    return ["--model", args.work / "gpt2", "--dataset", path, "--num-texts", 10_000, "--max-length", 48]


def sentences(args):
    """Stage 3 against a reward model, judged by another one that was trained on the other half of the pairs."""
    real = write_sentences(args)
    sizes = ["--sft-steps", 250, "--sft-batch-size", 16, "--sft-learning-rate", 2e-3]
    sizes += ["--reward-steps", 100, "--reward-learning-rate", 3e-4]
    rewards = ["--train-gold", "--ensemble", 3]
    ppo = ["--ppo-iterations", 25, "--batch-size", 32, "--num-epochs", 1, "--learning-rate", 3e-4]
    ppo += ["--no-adaptive-kl", "--missing-eos-penalty", 0, "--ent-coef", 0, "--no-anneal-lr", "--eval-prompts", 96]
    ppo += ["--warmup-iterations", 0]
    rows = run("sft", ["--stage", "sft", *real, *sizes], args.work)
    stage = [*real[2:], "--model", args.work / "sft" / "sft"]
    rows += run("rewards", ["--stage", "reward", *stage, *sizes, *rewards, "--eval-prompts", 96], args.work)
    models = [args.work / "rewards" / name for name in ("reward", "reward2", "reward3")]
    common = ["--stage", "ppo", *stage, *ppo, "--gold-model", args.work / "rewards" / "gold", "--reward-model"]
    rows += run("β = 0.05", [*common, models[0], "--kl-coef", 0.05], args.work)
    held = ["--kl-coef", 0.3, "--length-penalty", 0.01]
    rows += run("β = 0.3, 3 reward models, length penalty", [*common, *models, *held], args.work)
    return rows


def judge(args):
    """How often an instruct model prefers the sentence that people called positive; then the stages on its word."""
    real = write_sentences(args)
    few = ["--judge-pairs", args.pairs, "--judge", args.judge, "--sft-steps", 50, "--reward-steps", 30]
    few += ["--ppo-iterations", 3, "--batch-size", 16, "--eval-prompts", 16, "--micro-batch-size", 8]
    rates = ["--sft-learning-rate", 2e-3, "--reward-learning-rate", 3e-4, "--learning-rate", 3e-4]
    rows = run("preferences", [*real, *few, *rates, "--preferences", "ai"], args.work)
    critique = [*few, "--judge-pairs", 16, "--sft-data", "critique", "--stage", "sft"]
    return rows + run("critique", [*real, *critique, *rates], args.work)


def draw(path, figure):
    """Score, what is truly wanted, KL, length: a line for each run."""
    head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    panels = Figure(figsize=(10, 6.5), layout="constrained").subplots(2, 2)
    titles = {"objective/scores": "score of the reward model", "objective/gold": ""}
    titles |= {"objective/kl": "KL to the reference, nats a response", "response/length": "tokens a response"}
    titles["objective/gold"] = "score of a second reward model, which judges only"
    runs = dict.fromkeys(row["run"] for row in rows if row.get("stage") == "ppo")
    for axes, (key, title) in zip(panels.flat, titles.items()):
        for name in runs:
            points = [(row["step"], row[key]) for row in rows if row["run"] == name and row.get("stage") == "ppo"]
            axes.plot(*zip(*points), label=name)
        axes.set(title=title, xlabel="iteration")
    panels.flat[2].set_ylim(bottom=0)
    panels.flat[0].figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    panels.flat[0].figure.savefig(figure, dpi=120)
    print(f"{figure} ({head['machine']})")


def main():
    programs = {program.__name__: program for program in (threads, broken, sentences, judge)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=programs)
    parser.add_argument("--work", type=Path, help="where the models go; default runs/benchmark_NAME")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder of the real material")
    parser.add_argument("--judge", help="directory or Hub id of an instruct model")
    parser.add_argument("--pairs", type=int, default=200, help="pairs that it judges")
    parser.add_argument("--plot", action="store_true", help="only redraw the figure")
    args = parser.parse_args()
    args.work = args.work or ROOT / "runs" / f"benchmark_{args.name}"
    path = RESULTS / f"rlhf_{args.name}.jsonl"
    if not args.plot:
        rows = programs[args.name](args)
        head = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "torch": version("torch")}
        head["transformers"] = version("transformers")
        lines = [json.dumps(row, ensure_ascii=False).replace(str(args.work), "WORK") for row in (head, *rows)]
        lines = [line.replace(str(args.judge), "JUDGE").replace(str(ROOT.parent), "..") for line in lines]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if args.name == "sentences":
        draw(path, ROOT / "docs" / "figures" / "rlhf_sentences.png")


if __name__ == "__main__":
    main()
