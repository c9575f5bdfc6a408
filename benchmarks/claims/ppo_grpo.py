"""Claim 4: GRPO against PPO on the same language task, in memory, time and reward. "40 to 60% less memory"?

Run      python benchmarks/claims/ppo_grpo.py                      (about a quarter of an hour on one core)
         python benchmarks/claims/ppo_grpo.py --plot               (tables and figure from the kept results)
Writes   benchmarks/results/claims_ppo_grpo.jsonl (a line a run; a stopped series goes on),
         docs/figures/claims_ppo_grpo.png

* The task is stage 3 of rlhf_gpt2_ppo.py: five seeds, from the same stage 1 and the same reward model of 7,200 pairs.
  PPO is that script's, GRPO is grpo_llm.py's with two functions replaced, so that both read the same tokens and get the
  same score: the prompt without a newline after it, and the score of the very tokens that were sampled, less 1 where
  no EOS came, in the place of the verifier. The same in both: 16 times 96 samples, 2 epochs of 2 minibatches, learning
  rate 3e-4 falling to 0, β 0.05, clipping at 0.2, temperature 1. What differs is the algorithm: 96 prompts or 12 times
  8 answers, critic or group, β in the reward on k1 or in the loss on k3; and Adam's ε and β₂, as each script has them.
* Bytes by plan: weights, gradients and Adam's state of the models that each keeps, counted on models without content
  in the shapes of GPT-2 and Qwen2.5.
* Bytes measured: the peak of the resident memory of a process that makes one rollout and its updates, at three sizes of
  random weights in float32, and what it had before a model was loaded.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from cartpole import RESULTS, machine  # noqa: E402

FILE = RESULTS / "claims_ppo_grpo.jsonl"
ITERATIONS, BATCH, GROUP, T, BETA, RATE = 16, 96, 8, 20, 0.05, 3e-4
WAYS = {  # name → what is kept beside the policy
    "PPO": ("value", "reference", "reward"),
    "GRPO": ("reference", "reward"),
    "GRPO, β 0": ("reward",),
    "GRPO, β 0, a rule for the reward": (),
}
LEARN = list(WAYS)[:3]  # those that are trained on the task
SIZES = {"26M": (8, 512, 8), "86M": (12, 768, 12), "171M": (24, 768, 12)}  # layers, width, heads; 1,024 tokens
GPT2 = {"GPT-2": (12, 768), "GPT-2 medium": (24, 1024), "GPT-2 large": (36, 1280), "GPT-2 XL": (48, 1600)}
ACCOUNTS = {  # bytes a parameter of what is trained, and of what is frozen
    "float32, Adam": (4 + 4 + 8, 4),
    "bfloat16, Adam and master weights in float32": (2 + 2 + 12, 2),
    "bfloat16, 8-bit Adam": (2 + 2 + 2, 2),
}


# ---- A run, in a process of its own ----


def resident(name):
    """Bytes of this process in memory: now (VmRSS), or at most so far (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status).group(1))


def run_ppo(job):
    import rlhf_gpt2_ppo as rlhf

    settings = {
        "num_texts": 4000,
        "kl_coef": job["beta"],
        "adaptive_kl": False,
        "ent_coef": 0.0,
        "warmup_iterations": 0,
    }
    settings |= {"learning_rate": RATE, "eval_prompts": 1, "checkpoint_every": 0}
    settings |= {"ppo_iterations": job["iterations"], "batch_size": job["batch"], "micro_batch_size": job["micro"]}
    settings |= {"model": job["sft"], "reward_model": (job["reward"],), "run_dir": job["run_dir"], "seed": job["seed"]}
    args = rlhf.Args(stage="ppo", **settings)
    before = resident("VmRSS")
    metrics = rlhf.train(args)
    memory = {"before": before, "peak": resident("VmHWM")}
    seconds = sum(rlhf.load(Path(args.run_dir) / "checkpoint.pt")["seconds"].values())
    curve = [(row["objective/scores"], row["objective/gold"]) for row in metrics if row["stage"] == "ppo"]
    return memory, seconds, curve


def run_grpo(job):
    import torch

    import grpo_llm as grpo
    import rlhf_gpt2_ppo as rlhf

    run_dir = Path(job["run_dir"])
    prompts = run_dir.with_name("prompts.jsonl")
    names = [f"The {aspect} of this {genre}" for aspect in rlhf.ASPECTS for genre in rlhf.GENRES]
    prompts.write_text("".join(f"{json.dumps({'prompt': name, 'answer': '0'})}\n" for name in names), encoding="utf-8")

    def encode_prompt(args, tokenizer, problem):
        return tokenizer(problem.prompt, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def rate_group(args, group, tokenizer, eos_ids, reward_model, step):
        is_truncated = ~torch.isin(group.tokens, torch.tensor(eos_ids)).any(-1)
        gold = torch.tensor([float(rlhf.true_sentiment(group.problem.prompt + text) > 0) for text in group.texts])
        score = (group.tokens % 2).float().mean(-1)  # a rule on which even random weights differ
        if reward_model:
            queries = torch.tensor([group.prompt]).expand(len(group.tokens), -1)
            whole, mask = torch.cat([queries, group.tokens], 1), torch.cat([torch.ones_like(queries), group.mask], 1)
            score = rlhf.reward_scores(reward_model[0], whole, mask)
        no_steps = [[] for _ in group.texts], torch.full(group.tokens.shape, -1)
        return grpo.Rating(score - 1.0 * is_truncated, {"score": score, "gold": gold}, is_truncated, *no_steps)

    grpo.encode_prompt, grpo.rate_group = encode_prompt, rate_group
    settings = {"task": "jsonl", "data": str(prompts), "model": job["sft"], "run_dir": job["run_dir"]}
    settings |= {"reward_model": job["reward"], "beta": job["beta"], "learning_rate": RATE, "seed": job["seed"]}
    settings |= {"steps": job["iterations"], "prompts_per_step": job["batch"] // GROUP, "group_size": GROUP}
    settings |= {"max_tokens": T, "num_epochs": 2, "num_minibatches": 2, "checkpoint_every": 0, "eval_every": 0}
    settings |= {"eval_problems": 1, "eval_samples": 1, "eval_k": 1, "micro_batch_tokens": 28 * job["micro"]}
    settings |= {"device": "cpu", "dtype": "float32", "optimizer": "adamw", "torch_threads": 1, "generate_rows": 2048}
    args = grpo.Args(**settings)
    before = resident("VmRSS")
    metrics = grpo.train(args)
    memory = {"before": before, "peak": resident("VmHWM")}
    rows = [row for row in metrics if "reward/score" in row]
    curve = [(row["reward/score"], row["reward/gold"]) for row in rows]
    return memory, sum(row["time/step_seconds"] for row in rows), curve


def child(job):
    """Train as the job says; then rate the policy on held-out prompts, by the same function for both."""
    import torch

    import rlhf_gpt2_ppo as rlhf

    memory, seconds, curve = run_ppo(job) if "value" in WAYS[job["way"]] else run_grpo(job)
    row = {"memory": memory, "seconds": round(seconds, 1)}
    if job["eval_prompts"]:
        settings = {"num_texts": 4000, "eval_prompts": job["eval_prompts"], "seed": job["seed"], "model": job["sft"]}
        args = rlhf.Args(stage="ppo", reward_model=(job["reward"],), **settings)
        rows = rlhf.load_rows(args)
        prompts, _ = zip(*rlhf.texts_and_pairs(rows[: -(-len(rows) // 10)], args)[0])
        reference, tokenizer = rlhf.start_model(args, job["sft"])
        policy, _ = rlhf.start_model(args, f"{job['run_dir']}/policy")
        prompts = tokenizer(list(prompts[: args.eval_prompts]), add_special_tokens=False)["input_ids"]
        models = [rlhf.load_reward_model(args, job["reward"], tokenizer)]
        for name, model in (("before", reference), ("after", policy)):
            with torch.no_grad():
                _, found = rlhf.rate_policy(args, model, reference, models, None, tokenizer, prompts)
            row[name] = {key.split("/")[1]: round(value, 4) for key, value in found.items()}
        row["curve"] = [[round(x, 3) for x in point] for point in curve]
    Path(job["result"]).write_text(json.dumps(row), encoding="utf-8")


def run(work, **job):
    """A job in a process of its own; what it wrote."""
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "run", ignore_errors=True)
    job |= {"run_dir": str(work / "run"), "result": str(work / "result.json")}
    result = subprocess.run([sys.executable, __file__, "--child", json.dumps(job)], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr[-2000:])
    return json.loads((work / "result.json").read_text(encoding="utf-8"))


# ---- The three parts ----


def keep(row):
    with FILE.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def stages_before(seed, work):
    """Stage 1 and the reward model of a seed, unless claim 10 has left them there."""
    import rlhf_gpt2_ppo as rlhf

    sft, reward = work / "sft" / "sft", work / "good" / "reward"
    if not sft.is_dir():
        shutil.rmtree(sft.parent, ignore_errors=True)  # of a series that was stopped in the middle of it
        rlhf.train(rlhf.Args(stage="sft", seed=seed, sft_steps=200, checkpoint_every=0, run_dir=str(sft.parent)))
    if not reward.is_dir():
        shutil.rmtree(reward.parent, ignore_errors=True)
        settings = {"reward_batch_size": 32, "reward_steps": 120, "eval_prompts": 256, "checkpoint_every": 0}
        rlhf.train(rlhf.Args(stage="reward", model=str(sft), seed=seed, run_dir=str(reward.parent), **settings))
    return str(sft), str(reward)


def learn(seeds, work, done):
    for seed in range(1, seeds + 1):
        for way in LEARN:
            if ("learn", way, seed) not in done:
                sft, reward = stages_before(seed, work / str(seed))
                beta = BETA if "reference" in WAYS[way] else 0.0
                job = {"seed": seed, "way": way, "sft": sft, "reward": reward, "beta": beta, "eval_prompts": 256}
                found = run(work / "child", iterations=ITERATIONS, batch=BATCH, micro=64, **job)
                keep({"part": "learn", "seed": seed, "way": way, **found})


def write_models(layers, width, heads, folder, sft):
    """A GPT-2 of random weights with stage 1's tokens, and a reward model of its shape; the number of parameters."""
    import rlhf_gpt2_ppo as rlhf

    tokenizer = rlhf.from_disk("AutoTokenizer", sft)
    config = rlhf.from_disk("AutoConfig", sft)
    config.n_layer, config.n_embd, config.n_head = layers, width, heads
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder / "policy")
    config.num_labels, config.reward_mean, config.reward_std = 1, 0.0, 1.0
    GPT2ForSequenceClassification(config).save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)
    return sum(x.numel() for x in model.parameters())


def measure(work, done):
    for size, shape in SIZES.items():
        left = [way for way in WAYS if ("measured", way, size) not in done]
        if not left:
            continue
        with tempfile.TemporaryDirectory(dir=work) as folder:
            parameters = write_models(*shape, Path(folder), stages_before(1, work / "1")[0])
            for way in left:
                reward = f"{folder}/reward" if "reward" in WAYS[way] else None
                beta = BETA if "reference" in WAYS[way] else 0.0
                job = {"seed": 1, "way": way, "sft": f"{folder}/policy", "reward": reward, "beta": beta}
                found = run(work / "child", iterations=1, batch=16, micro=4, eval_prompts=0, **job)
                keep({"part": "measured", "size": size, "parameters": parameters, "way": way, **found})


def shapes():
    """name → parameters of the language model and of its shape with one output."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, Qwen2Config

    configs = {
        name: GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64) for name, (layers, width) in GPT2.items()
    }
    qwen = json.loads((ROOT / "benchmarks" / "qwen2.5.json").read_text(encoding="utf-8"))
    configs |= {name: Qwen2Config(**shape) for name, shape in qwen.items()}
    for name, config in configs.items():
        with torch.device("meta"):
            counts = [
                sum(x.numel() for x in kind.from_config(config).parameters())
                for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification)
            ]
        yield name, counts


def plan(done):
    for name, (policy, scalar) in shapes():
        for account, (trained, frozen) in ACCOUNTS.items():
            if ("plan", account, name) not in done:
                costs = {"value": trained * scalar, "reference": frozen * policy, "reward": frozen * scalar}
                total = {way: trained * policy + sum(costs[kind] for kind in kinds) for way, kinds in WAYS.items()}
                keep({"part": "plan", "model": name, "account": account, "parameters": policy, "bytes": total})


# ---- Tables, figure ----


def less(row, way):
    return 1 - row[way] / row["PPO"]


def draw():
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()][1:]
    parts = {part: [row for row in rows if row["part"] == part] for part in ("learn", "measured", "plan")}
    panels = Figure(figsize=(11, 7), layout="constrained").subplots(2, 2)

    print("| way | truly positive | score | KL, nats | tokens | seconds | peak MB |")
    print("|---|---|---|---|---|---|---|")
    for i, way in enumerate(LEARN):
        own = [row for row in parts["learn"] if row["way"] == way]
        cells = []
        for name, digits in (("gold", 3), ("scores", 2), ("kl", 1), ("length", 1)):
            low, middle, high = np.quantile([row["after"][name] for row in own], (0.25, 0.5, 0.75))
            cells.append(f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
        cells.append(f"{np.median([row['seconds'] for row in own]):.1f}")
        cells.append(f"{np.median([row['memory']['peak'] for row in own]) / 1e6:.0f}")
        print(f"| {way} | {' | '.join(cells)} |")
        curves = np.array([row["curve"] for row in own])
        for axes, column in zip(panels[0], (1, 0)):
            low, middle, high = np.quantile(curves[..., column], (0.25, 0.5, 0.75), axis=0)
            samples = BATCH * np.arange(1, ITERATIONS + 1)
            axes.plot(samples, middle, color=f"C{i}", label=way)
            axes.fill_between(samples, low, high, color=f"C{i}", alpha=0.2, lw=0)
    panels[0, 0].set(title="truly positive, median and quartiles", xlabel="samples", ylim=(0, 1.02))
    panels[0, 1].set(title="score of the reward model", xlabel="samples")
    panels[0, 0].legend(fontsize=8)

    print("\n| size | way | before loading MB | peak MB | of which models' and more | less than PPO |")
    print("|---|---|---|---|---|---|")
    gains = {}
    for size in SIZES:
        own = {row["way"]: row for row in parts["measured"] if row["size"] == size}
        added = {way: row["memory"]["peak"] - row["memory"]["before"] for way, row in own.items()}
        whole = {way: row["memory"]["peak"] for way, row in own.items()}
        for way, row in own.items():
            before, top = row["memory"]["before"] / 1e6, row["memory"]["peak"] / 1e6
            print(f"| {size} | {way} | {before:.0f} | {top:.0f} | {added[way] / 1e6:.0f} | ", end="")
            print(f"{less(added, way):.0%}; of the whole process {less(whole, way):.0%} |")
            gains.setdefault(way, []).append(less(added, way))
    width = 0.25
    for i, way in enumerate(list(WAYS)[1:]):
        height = 100 * np.array(gains[way])
        panels[1, 0].bar(np.arange(len(SIZES)) + (i - 1) * width, height, width, color=f"C{i + 1}", label=way)
    panels[1, 0].set_xticks(range(len(SIZES)), list(SIZES))
    panels[1, 0].set(title="measured, float32: less memory than PPO, %", xlabel="parameters of each model")

    print("\n| model | account | PPO GB | " + " | ".join(f"{way}: less" for way in list(WAYS)[1:]) + " |")
    print("|---|---|---|---|---|---|")
    for row in parts["plan"]:
        cells = [row["model"], row["account"], f"{row['bytes']['PPO'] / 1e9:.1f}"]
        cells += [f"{less(row['bytes'], way):.1%}" for way in list(WAYS)[1:]]
        print(f"| {' | '.join(cells)} |")
    own = [row for row in parts["plan"] if row["model"] == "Qwen2.5-7B"]
    for i, way in enumerate(list(WAYS)[1:]):
        height = [100 * less(row["bytes"], way) for row in own]
        panels[1, 1].bar(np.arange(len(own)) + (i - 1) * width, height, width, color=f"C{i + 1}", label=way)
    names = [row["account"].replace(" and", "\nand") for row in own]
    panels[1, 1].set_xticks(range(len(own)), names, fontsize=8)
    panels[1, 1].set(title="by plan, Qwen2.5-7B: less memory than PPO, %")
    for axes in panels[1]:
        axes.axhspan(40, 60, color="0.9", zorder=0, label="the claim: 40 to 60%")
        axes.set_ylim(0, 85)
        axes.legend(fontsize=8, loc="upper left")
    panels[0, 0].figure.savefig(ROOT / "docs" / "figures" / "claims_ppo_grpo.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["plan", "measured", "learn"], help="some of them, no figure")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "claims_hacking", help="models; claim 10's serve")
    parser.add_argument("--plot", action="store_true", help="tables and figure from the kept results, no runs")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        os.environ["OMP_NUM_THREADS"] = "1"
        child(json.loads(options.child))
        sys.exit()
    if not options.plot:
        if not FILE.exists():
            keep({"machine": machine(), "date": time.strftime("%Y-%m-%d"), "torch": version("torch")})
        found = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
        names = {"learn": ("way", "seed"), "measured": ("way", "size"), "plan": ("account", "model")}
        done = {(row["part"], *(row[name] for name in names[row["part"]])) for row in found if "part" in row}
        options.work.mkdir(parents=True, exist_ok=True)
        if "plan" in options.parts:
            plan(done)
        if "measured" in options.parts:
            measure(options.work, done)
        if "learn" in options.parts:
            learn(options.seeds, options.work, done)
    if set(options.parts) == {"plan", "measured", "learn"}:
        draw()
