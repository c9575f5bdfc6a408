"""Claims 6, 7, 9 and 14: fine-tuning on right answers, new references, groups of 2 to 64, old samplers; all algorithms.

Run      python benchmarks/claims/grpo_arms.py online         (claim 6: about 6 minutes on one core)
         python benchmarks/claims/grpo_arms.py iterative      (claim 7: about 11 minutes)
         python benchmarks/claims/grpo_arms.py groups         (claim 9: about 11 minutes)
         python benchmarks/claims/grpo_arms.py stale          (claim 14: about 25 minutes)
         python benchmarks/claims/grpo_arms.py algorithms     (each row of docs/4_grpo.md's table: about 25 minutes)
         python benchmarks/claims/grpo_arms.py online --draw  (table and figure from the kept results)
Writes   benchmarks/results/claims_grpo.jsonl, claims_grpo_stale.jsonl or claims_grpo_algorithms.jsonl, and
         docs/figures/claims_grpo_NAME.png; starting policies go to --work

Every arm is grpo_llm.py with its defaults (sums of five one-digit numbers) but for 20 steps and the flags below. The
arms of a seed begin at the same policy, which has seen worked sums until a third of its answers were right, ask the
same questions in the same order and are judged on the same 256 held-out sums, by 4 samples of each. Offline, the
answers to the training questions come from the policy of the start, in place of the one that learns; nothing else
differs from online. A line is written as a run ends; what the file has already is not run again.
"""

import argparse
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from cartpole import RESULTS, machine  # noqa: E402

import grpo_llm as grpo  # noqa: E402

FILES = {"stale": "claims_grpo_stale.jsonl", "algorithms": "claims_grpo_algorithms.jsonl"}  # others: claims_grpo.jsonl
FIGURES = {
    "online": "claims_grpo_online.png",
    "iterative": "claims_grpo_iterative.png",
    "groups": "claims_grpo_groups.png",
    "stale": "claims_grpo_stale.png",
    "algorithms": "claims_grpo_algorithms.png",
}
STEPS, SAMPLES = 20, 256  # of a run, of a step
SMALL = {"device": "cpu", "torch_threads": 1, "dtype": "float32", "optimizer": "adamw", "learning_rate": 3e-4}
SMALL |= {"prompts_per_step": 32, "group_size": 8, "max_tokens": 40, "generate_rows": 2048}  # the small model's own

GROUPS = {f"groups of {size}": {"group_size": size, "prompts_per_step": SAMPLES // size} for size in (2, 4, 16, 32, 64)}
BF16 = {"dtype": "bfloat16", "optimizer": "adamw8bit"}
STALE = {
    f"{k} steps old{', ' * bool(how)}{how}": {"staleness": k, **flags}
    for k in (4, 8)
    for how, flags in (
        ("", {}),
        ("by token", {"sampler_correction": "token"}),
        ("by sequence", {"sampler_correction": "sequence"}),
        ("π_old the sampler's", {"old_logprobs": "sampler"}),
    )
}
STALE |= {"bfloat16": BF16, "bfloat16, by token": {**BF16, "sampler_correction": "token"}}
ALGORITHMS = {
    "process supervision": {"supervision": "process"},
    "iterative": {"beta": 0.04, "reference_every": 5},
    "DAPO": {
        **{"reduction": "token", "clip_high": 0.28, "dynamic_sampling": 4, "truncated": "mask", "overlong_buffer": 8},
    },
    "Dr. GRPO": {"reduction": "constant", "scale": "none"},
    "GSPO": {"importance": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "num_minibatches": 4},
    "GRPO, 4 updates": {"num_minibatches": 4},
    "CISPO, 4 updates": {"policy_loss": "cispo", "reduction": "token", "num_minibatches": 4},
    "SAPO, 4 updates": {"policy_loss": "sapo", "num_minibatches": 4},
    "REINFORCE++": {"algorithm": "reinforce++", "reduction": "token", "beta": 0.01},
    "REINFORCE++, group mean": {"scale": "batch", "reduction": "token", "beta": 0.01},
    "GDPO": {"decouple_rewards": True, "length_weight": 0.1},
    "sum of the same rewards": {"length_weight": 0.1},
    "DeepSeek-V3.2": {"beta": 0.01, "unbiased_kl": True, "off_policy_limit": 0.1},
    "RLOO": {"algorithm": "rloo", "reduction": "constant"},
    "REINFORCE": {"algorithm": "reinforce", "reduction": "constant"},
    "RFT": {"algorithm": "rft"},
}
ARMS = {  # name → flags
    "GRPO": {},  # groups of 8, no reference
    "offline RFT": {"algorithm": "rft"},
    "online RFT": {"algorithm": "rft"},
    "β 0.04, fixed": {"beta": 0.04},
    "β 0.04, renewed": {"beta": 0.04, "reference_every": 5},
    "β 0.4, fixed": {"beta": 0.4},
    "β 0.4, renewed": {"beta": 0.4, "reference_every": 5},
    **GROUPS,
    **STALE,
    **ALGORITHMS,
}
CLAIMS = {
    "online": ["GRPO", "offline RFT", "online RFT"],
    "iterative": ["GRPO", *(name for name in ARMS if "β" in name)],
    "groups": ["groups of 2", "groups of 4", "GRPO", "groups of 16", "groups of 32", "groups of 64"],
    "stale": ["GRPO", *STALE],
    "algorithms": ["GRPO", *ALGORITHMS],
}


def starting_policy(seed, work):
    """Directory of the warm-started policy of a seed, made if it is not there."""
    directory = work / f"start-{seed}"
    if not directory.exists():
        args = grpo.Args(seed=seed, **SMALL)
        problems, held_out = grpo.load_problems(args)
        torch.manual_seed(seed)
        tokenizer = grpo.new_tokenizer()
        policy = grpo.new_model(tokenizer)
        grpo.warm_start(args, policy, tokenizer, problems, held_out[:128])
        work.mkdir(parents=True, exist_ok=True)
        grpo.save_model(directory, policy, tokenizer)
    return str(directory)


def offline(sample_groups, start):
    """sample_groups, but training questions are answered by the policy of the start."""

    def sample(args, model, tokenizer, eos_ids, problems, group_size, temperature, names):
        is_training = names[0][0] == "train"
        model = start if is_training else model
        return sample_groups(args, model, tokenizer, eos_ids, problems, group_size, temperature, names)

    return sample


def run(name, seed, start):
    """One arm: its evaluations and what the figures show of its steps."""
    policy, sample_groups = grpo.load_model(grpo.Args(**SMALL), start)[0], grpo.sample_groups
    began = time.process_time()
    if name.startswith("offline"):
        grpo.sample_groups = offline(sample_groups, policy)
    settings = {"steps": STEPS, "eval_samples": 4, "eval_k": 4, "eval_every": STEPS // 2, "checkpoint_every": 0}
    try:
        with tempfile.TemporaryDirectory() as folder:
            where = {"model": start, "instruction": "{}", "run_dir": f"{folder}/run"}
            metrics = grpo.train(grpo.Args(seed=seed, **{**SMALL, **settings, **ARMS[name], **where}))
    finally:
        grpo.sample_groups = sample_groups
    line = {"arm": name, "seed": seed, "cpu_seconds": round(time.process_time() - began, 1)}
    for key in ("eval/greedy", "eval/pass@1", "eval/pass@4", "eval/maj@4"):
        line[key] = [(row["step"], round(row[key], 4)) for row in metrics if key in row]
    keys = "reward/mean groups/zero_variance policy/entropy kl/reference policy/sampler_gap policy/sampler_weight"
    for key in keys.split():
        line[key] = [round(row[key], 4) for row in metrics if key in row]
    return line


def measure(file, names, options):
    if not file.exists():
        head = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "steps": STEPS, "samples": SAMPLES}
        head |= {"torch": version("torch"), "transformers": version("transformers")}
        file.write_text(f"{json.dumps(head)}\n", encoding="utf-8")
    done = {(row["arm"], row["seed"]) for row in kept_rows(file)}
    for seed in range(1, options.seeds + 1):
        for name in names:
            if (name, seed) not in done:
                line = json.dumps(run(name, seed, starting_policy(seed, options.work)), ensure_ascii=False)
                with file.open("a", encoding="utf-8") as results:
                    results.write(f"{line}\n")


def kept_rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][1:]


def last(rows, key):
    return np.array([row[key][-1][1] for row in rows])


def shown(name):
    return "GRPO, groups of 8" if name == "GRPO" else name


def print_table(arms):
    print("| arm | seeds | pass@1 | greedy | pass@4 | maj@4 | pass@1 less GRPO's, mean (95%) ", end="")
    print("| groups without variance | CPU seconds |\n|---|---|---|---|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    reference = {row["seed"]: row["eval/pass@1"][-1][1] for row in arms["GRPO"]}
    for name, rows in arms.items():
        cells = [shown(name), str(len(rows))]
        for key in ("eval/pass@1", "eval/greedy", "eval/pass@4", "eval/maj@4"):
            low, middle, high = np.quantile(last(rows, key), (0.25, 0.5, 0.75))
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        gains = last(rows, "eval/pass@1") - np.array([reference[row["seed"]] for row in rows])  # the same start
        low, high = np.quantile(rng.choice(gains, (10_000, len(gains))).mean(1), (0.025, 0.975))
        cells.append("" if name == "GRPO" else f"{gains.mean():+.3f} ({low:+.3f} to {high:+.3f})")
        cells.append(f"{np.median([np.mean(row['groups/zero_variance']) for row in rows]):.2f}")
        cells.append(f"{np.median([row['cpu_seconds'] for row in rows]):.0f}")
        print(f"| {' | '.join(cells)} |")
    starts = [row["eval/pass@1"][0][1] for row in arms["GRPO"]]
    print(f"pass@1 before: median {np.median(starts):.3f}, {min(starts):.3f} to {max(starts):.3f}")


def draw(claim, arms):
    """Left: pass@1 while learning, medians. Right: where each seed ends, against GRPO from the same start."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    left, right = Figure(figsize=(10, max(3.8, 0.32 * len(arms))), layout="constrained").subplots(1, 2)
    reference = {row["seed"]: row["eval/pass@1"][-1][1] for row in arms["GRPO"]}
    colors = [f"C{i}" for i in range(10)] if len(arms) <= 10 else list(colormaps["tab20"].colors)
    for i, (name, rows) in enumerate(arms.items()):
        color = colors[i]
        curves = np.array([row["eval/pass@1"] for row in rows])
        left.plot(*np.median(curves, axis=0).T, marker=".", color=color, label=shown(name))
        gains = last(rows, "eval/pass@1") - np.array([reference[row["seed"]] for row in rows])
        right.plot(gains, [i] * len(gains), "o", color=color, alpha=0.6)
        right.plot([np.median(gains)], [i], "|", color="k", markersize=16)
    right.set_yticks(range(len(arms)), left.get_legend_handles_labels()[1])
    right.invert_yaxis()
    right.axvline(0, color="0.8", zorder=0)
    right.locator_params(axis="x", nbins=6)
    is_long = len(arms) > 7  # a legend would hide the curves
    title = "pass@1, held out: medians" + ", colours as on the right" * is_long
    left.set(xlabel="step", title=title, xticks=range(0, STEPS + 1, STEPS // 2))
    right.set(title="pass@1 at the end, minus GRPO's", xlabel="one dot for each seed; bar: median")
    if not is_long:
        left.legend(fontsize="small")
    left.figure.savefig(ROOT / "docs" / "figures" / FIGURES[claim], dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=list(CLAIMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "claims_grpo", help="for the starting policies")
    parser.add_argument("--draw", action="store_true", help="table and figure from the kept results, no runs")
    options = parser.parse_args()
    file = RESULTS / FILES.get(options.claim, "claims_grpo.jsonl")
    if not options.draw:
        torch.set_num_threads(1)
        measure(file, CLAIMS[options.claim], options)
    rows = kept_rows(file)
    arms = {name: [row for row in rows if row["arm"] == name] for name in CLAIMS[options.claim]}
    print_table(arms)
    draw(options.claim, arms)


if __name__ == "__main__":
    main()
