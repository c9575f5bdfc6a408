"""Claim 12: bfloat16 weights and small learning rates: how much of the way AdamW's steps really go.

Run      python benchmarks/claims/bf16.py             (some seconds on one core)
         python benchmarks/claims/bf16.py --draw      (table and figure from the kept results)
Writes   benchmarks/results/claims_bf16.jsonl, docs/figures/claims_bf16.png

8,192 weights, normal with deviation 0.02, whose gradient has a fixed sign for each weight and noise of its
own size; 200 steps. Five seeds. In float32 each weight goes about learning rate × steps in its direction; what is
reported is how far it goes as a share of that, and the share of weights that have moved at all:

    float32            torch.optim.AdamW
    bfloat16           torch.optim.AdamW on bfloat16 weights, which rounds to the nearest
    bfloat16, random   the 8-bit AdamW of grpo_llm.py, which rounds up or down with the chances that keep the mean
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import quantiles

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from cartpole import RESULTS, machine  # noqa: E402

import grpo_llm as grpo  # noqa: E402

FILE = RESULTS / "claims_bf16.jsonl"
WEIGHTS, STEPS, SEEDS = 1 << 13, 200, 5
RATES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
KINDS = ("float32", "bfloat16", "bfloat16, random")


def run(kind, rate, seed):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the random rounding
    start = (0.02 * torch.randn(WEIGHTS, generator=generator)).bfloat16()  # the same weights for all
    sign = torch.randint(2, (WEIGHTS,), generator=generator) * 2.0 - 1
    weights = torch.nn.Parameter(start.float() if kind == "float32" else start.clone())
    settings = {"lr": rate, "weight_decay": 0.0, "betas": (0.9, 0.95)}
    optimizer = (grpo.AdamW8bit if kind == "bfloat16, random" else torch.optim.AdamW)([weights], **settings)
    for _ in range(STEPS):
        gradient = -sign * (1 + torch.randn(WEIGHTS, generator=generator))
        weights.grad = gradient.to(weights.dtype)
        optimizer.step()
    moved = (weights.detach().float() - start.float()) * sign
    return {"way": float(moved.mean()) / (rate * STEPS), "moved": float((moved != 0).float().mean())}


def summary(rows):
    """Per kind and rate: quartiles of the way as a share of float32's with the same seed, and the share that moved."""
    whole = {(row["rate"], row["seed"]): row["way"] for row in rows if row["kind"] == "float32"}
    for kind in KINDS[1:]:
        for rate in RATES:
            own = [row for row in rows if (row["kind"], row["rate"]) == (kind, rate)]
            shares = [row["way"] / whole[rate, row["seed"]] for row in own]
            yield kind, rate, quantiles(shares, n=4), sum(row["moved"] for row in own) / len(own)


def draw(rows):
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6, 3.5), layout="constrained").subplots()
    for kind in KINDS[1:]:
        points = [(rate, quartiles) for name, rate, quartiles, _ in summary(rows) if name == kind]
        rates = [rate for rate, _ in points]
        label = kind.replace("random", "with stochastic rounding")
        axes.plot(rates, [middle for _, (_, middle, _) in points], marker="o", label=label)
        axes.fill_between(rates, [low for _, (low, _, _) in points], [high for _, (*_, high) in points], alpha=0.3)
    axes.axhline(1, color="0.4", ls="--", lw=1, zorder=0, label="float32")
    axes.set(xscale="log", xlabel="learning rate", title="how far the weights go, as a share of float32")
    axes.legend()
    axes.figure.savefig(ROOT / "docs" / "figures" / "claims_bf16.png", dpi=120)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--draw", action="store_true")
    if not parser.parse_args().draw:
        torch.set_num_threads(1)
        found = [
            {"kind": kind, "rate": rate, "seed": seed, **run(kind, rate, seed)}
            for seed in range(SEEDS)
            for kind in KINDS
            for rate in RATES
        ]
        FILE.write_text("".join(f"{json.dumps(row)}\n" for row in [machine(), *found]), encoding="utf-8")
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()][1:]
    print("| weights | learning rate | way, of float32's: median (quartiles) | weights that moved |")
    print("|---|---|---|---|")
    for kind, rate, (low, middle, high), moved in summary(rows):
        print(f"| {kind} | {rate:.0e} | {middle:.3f} ({low:.3f} to {high:.3f}) | {moved:.1%} |")
    draw(rows)


if __name__ == "__main__":
    main()
