"""Claim 10: what keeps a policy from hacking its reward model? KL coefficient, ensemble, length penalty and more.

Run      python benchmarks/claims/hacking.py                       (about 70 minutes on one core)
         python benchmarks/claims/hacking.py --plot                (table and figure from the kept results)
Writes   benchmarks/results/claims_hacking.jsonl (a line a run; a stopped series goes on),
         docs/figures/claims_hacking.png

The grammar of rlhf_gpt2_ppo.py knows which review is truly positive. For each seed: stage 1; four weak reward models,
trained on the same 180 pairs; a good one, trained on 7,200. Then stage 3 from the same models in each arm: 25
iterations of 96 responses, no warm-up, no annealing, no entropy bonus, β fixed, so that what holds the policy back is
what the arm names. The ensemble's score is the mean of the four less one standard deviation; the length penalty takes
0.02 a token; the smaller learning rate is 2e-4. The reward model that goes on learning takes four gradient steps in
every iteration, on pairs of the policy's responses that the grammar judges. PPO-max stands for its choices but the KL
penalty. 256 held-out prompts are answered before and after.
"""

import argparse
import json
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from cartpole import RESULTS, machine  # noqa: E402

import rlhf_gpt2_ppo as rlhf  # noqa: E402

FILE = RESULTS / "claims_hacking.jsonl"
COMMON = {"reward_batch_size": 32, "eval_prompts": 256, "checkpoint_every": 0}
PPO = {"num_texts": 4000, "ppo_iterations": 25, "anneal_lr": False, "ent_coef": 0.0, "adaptive_kl": False}
PPO |= {"warmup_iterations": 0, "learning_rate": 6e-4}
WEAK = {"num_texts": 400, "reward_steps": 60}
LENGTH = {"length_penalty": 0.02}
PPO_MAX = {"reward_clip": 5.0, "value_only_iterations": 3, "ptx_coef": 1.0}
BOTTLENECK = {"reward_bottleneck": 8, "bottleneck_coef": 0.1}
ARMS = {  # name → reward models, flags of stage 3
    "β 0": ("weak", {"kl_coef": 0.0}),
    "β 0.01": ("weak", {"kl_coef": 0.01}),
    "β 0.05": ("weak", {"kl_coef": 0.05}),
    "β 0.2": ("weak", {"kl_coef": 0.2}),
    "length penalty, β 0": ("weak", {"kl_coef": 0.0, **LENGTH}),
    "length penalty, β 0.01": ("weak", {"kl_coef": 0.01, **LENGTH}),
    "ensemble, β 0": ("ensemble", {"kl_coef": 0.0}),
    "ensemble, β 0.01": ("ensemble", {"kl_coef": 0.01}),
    "β 0, a third of the learning rate": ("weak", {"kl_coef": 0.0, "learning_rate": 2e-4}),
    "β 0, good reward model": ("good", {"kl_coef": 0.0}),
    "reward model goes on learning, β 0": ("weak", {"kl_coef": 0.0, "reward_update_every": 1}),
    "bottleneck, β 0": ("bottleneck", {"kl_coef": 0.0}),
    "three of four layers frozen, β 0": ("weak", {"kl_coef": 0.0, "freeze_layers": 3}),
    "PPO-max, β 0": ("weak", {"kl_coef": 0.0, **PPO_MAX}),
    "energy penalty, β 0": ("weak", {"kl_coef": 0.0, "energy_coef": 0.1}),
}
CURES = ("β 0", *(arm for arm in list(ARMS)[10:] if arm.endswith(" β 0")))
NAMES = {"objective/scores": "score", "objective/gold": "gold", "objective/kl": "kl"}
NAMES |= {"response/length": "length", "response/distinct_2": "distinct_2"}
NAMES |= {"objective/outlier_index": "outliers", "objective/energy_gap": "energy_gap", "reward_update/pairs": "pairs"}


def run(folder, **settings):
    """The metrics of one stage, and its seconds."""
    shutil.rmtree(folder, ignore_errors=True)  # of a series that was stopped in the middle of it
    start = time.perf_counter()
    metrics = rlhf.train(rlhf.Args(run_dir=str(folder), **COMMON, **settings))
    return metrics, round(time.perf_counter() - start, 1)


def short(row):
    return {own: round(row[name], 4) for name, own in NAMES.items() if name in row}


def stages_before(seed, work, kind, in_ensemble, known):
    """Stage 1 and one kind of reward models of a seed, unless they are there: (stage 1's, {kind: directories}).

    The weak one is the first of the ensemble, which is trained at once if it is needed too. A kind's accuracy is kept
    unless it is known from an earlier series: the same seed gives the same models.
    """
    sft = str(work / "sft" / "sft")
    if not Path(sft).is_dir():
        run(work / "sft", stage="sft", seed=seed, sft_steps=200)
    weak = [str(work / "weak" / name) for name in ("reward", "reward2", "reward3", "reward4")]
    kinds = {"weak": weak[:1], "ensemble": weak}
    kinds |= {name: [str(work / name / "reward")] for name in ("good", "bottleneck")}
    settings = {"weak": {**WEAK, "ensemble": 4 if in_ensemble else 1}, "good": {"reward_steps": 120}}
    settings["bottleneck"] = {**WEAK, **BOTTLENECK}
    needed = kinds["ensemble" if kind == "weak" and in_ensemble else kind]
    if not Path(needed[-1]).is_dir():
        kind = "weak" if kind == "ensemble" else kind
        metrics, seconds = run(work / kind, stage="reward", seed=seed, model=sft, **settings[kind])
        found = [round(x, 4) for row in metrics for name, x in row.items() if name.endswith("held_out_accuracy")]
        if (seed, kind) not in known:
            known.add((seed, kind))
            keep({"seed": seed, "reward_models": kind, "held_out_accuracy": found, "seconds": seconds})
    return sft, kinds


def keep(row):
    with FILE.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(seeds, work):
    if not FILE.exists():
        keep({"machine": machine(), "date": time.strftime("%Y-%m-%d"), "torch": version("torch")})
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    done = {(row["seed"], row["arm"]) for row in rows if "arm" in row}
    known = {(row["seed"], row["reward_models"]) for row in rows if "reward_models" in row}
    for arm, (kind, flags) in ARMS.items():
        for seed in range(1, seeds + 1):
            if (seed, arm) in done:
                continue
            own = work / str(seed)
            in_ensemble = any(ARMS[name][0] == "ensemble" and (seed, name) not in done for name in ARMS)
            sft, kinds = stages_before(seed, own, kind, in_ensemble, known)
            settings = {"stage": "ppo", "seed": seed, "model": sft, "reward_model": tuple(kinds[kind]), **PPO, **flags}
            metrics, seconds = run(own / "ppo", **settings)
            before, after = (short(row) for row in metrics if row["stage"] == "eval")
            curve = [short(row) for row in metrics if row["stage"] == "ppo"]
            keep({"seed": seed, "arm": arm, "seconds": seconds, "before": before, "after": after, "curve": curve})


def medians(rows, arm, *names):
    """For each name the median over the seeds at each iteration of an arm."""
    curves = [row["curve"] for row in rows if row["arm"] == arm]
    return np.median([[[point[name] for name in names] for point in curve] for curve in curves], axis=0).T


def draw():
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()][1:]
    models = [row for row in rows if "reward_models" in row]
    for kind in ("weak", "good"):
        found = sorted(x for row in models if row["reward_models"] == kind for x in row["held_out_accuracy"])
        print(f"{kind}: {len(found)} reward models, {np.median(found):.1%} of held-out pairs, ", end="")
        print(f"{found[0]:.1%} to {found[-1]:.1%}")
    rows = [row for row in rows if "arm" in row]
    names = ("gold", "score", "kl", "length", "distinct_2")
    print("| stage 3 | truly positive | score | KL, nats | tokens | distinct-2 |")
    print("|---|---|---|---|---|---|")
    before = [row["before"] for row in rows if row["arm"] == "β 0"]
    arms = {"before": before} | {arm: [row["after"] for row in rows if row["arm"] == arm] for arm in ARMS}
    for arm, own in arms.items():
        cells = []
        for name in names:
            low, middle, high = np.quantile([row[name] for row in own], (0.25, 0.5, 0.75))
            digits = 1 if name in ("kl", "length") else 2
            cells.append(f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
        print(f"| {arm} | {' | '.join(cells)} |")
    panels = Figure(figsize=(11, 12), layout="constrained").subplots(3, 2)
    left, right = panels[0]
    for i, (arm, own) in enumerate(arms.items()):
        gold = [row["gold"] for row in own]
        left.plot(gold, [i] * len(gold), ".", color="k" if arm == "before" else f"C{(i - 1) % 10}", alpha=0.6, ms=9)
        left.plot([np.median(gold)], [i], "|", color="k", markersize=14)
    left.set_yticks(range(len(arms)), list(arms))
    left.invert_yaxis()
    left.set(title="truly positive after stage 3, a dot a seed", xlim=(-0.03, 1.03))
    penalties = ("β 0", "β 0.01", "β 0.05", "β 0.2", "ensemble, β 0.01")
    for arm in (*penalties, "β 0, a third of the learning rate", "β 0, good reward model"):
        color = f"C{list(ARMS).index(arm)}"
        gold, score, kl = medians(rows, arm, "gold", "score", "kl")
        right.plot(kl[1:], gold[1:], ".-", color=color, alpha=0.8, lw=1, markersize=4)
        panels[1, 0].plot(range(1, len(score) + 1), score, color=color, label=arm)
        panels[1, 1].plot(range(1, len(gold) + 1), gold, color=color)
    for arm in CURES:
        color = "k" if arm == "β 0" else f"C{list(ARMS).index(arm) % 10}"
        gold, kl = medians(rows, arm, "gold", "kl")
        shown = slice(1 + ("PPO-max" in arm) * 3, None)  # where the policy has moved
        panels[2, 0].plot(kl[shown], gold[shown], ".-", color=color, alpha=0.8, lw=1, markersize=4, label=arm)
    for row in rows:
        if row["arm"] == "bottleneck, β 0":
            outliers, gold, score = ([point[name] for point in row["curve"]] for name in ("outliers", "gold", "score"))
            steps = range(1, len(gold) + 1)
            panels[2, 1].plot(steps, outliers, color="C0", alpha=0.6, lw=1, label="outlier index")
            panels[2, 1].plot(steps, score, color="C1", alpha=0.6, lw=1, label="score")
            panels[2, 1].plot(steps, gold, color="C2", alpha=0.6, lw=1, label="truly positive")
    right.set(title="truly positive by KL, each iteration, medians", xlabel="KL to the reference, nats", xscale="log")
    right.set(ylim=(-0.03, 1.03))
    panels[1, 0].set(title="score of the reward model, medians", xlabel="iteration")
    panels[1, 0].legend(fontsize=8)
    panels[1, 1].set(title="truly positive, medians", xlabel="iteration", ylim=(-0.03, 1.03))
    panels[2, 0].set(title="cures at β 0: truly positive by KL, medians", xlabel="KL, nats", xscale="log")
    panels[2, 0].set(ylim=(-0.03, 1.03))
    panels[2, 0].legend(fontsize=8)
    panels[2, 1].set(title="bottleneck at β 0, a line a seed", xlabel="iteration", yscale="symlog")
    handles = dict(zip(*reversed(panels[2, 1].get_legend_handles_labels())))
    panels[2, 1].legend(handles.values(), handles.keys(), fontsize=8)
    left.figure.savefig(ROOT / "docs" / "figures" / "claims_hacking.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "claims_hacking", help="where the models go")
    parser.add_argument("--plot", action="store_true", help="table and figure from the kept results, no runs")
    options = parser.parse_args()
    if not options.plot:
        measure(options.seeds, options.work)
    draw()
