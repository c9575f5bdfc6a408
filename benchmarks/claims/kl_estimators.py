"""Claim 13: the KL estimators k1, k2 and k3, in the loss and in the reward: value, gradient, where training ends.

Run      python benchmarks/claims/kl_estimators.py                 (half a minute on one core)
         python benchmarks/claims/kl_estimators.py --draw          (tables and figure from the kept results)
Writes   benchmarks/results/claims_kl_estimators.jsonl, docs/figures/claims_kl_estimators.png

With r = ln π_ref(x) − ln π(x) and x drawn from π:  k1 = −r,  k2 = r²/2,  k3 = eʳ − 1 − r  (Schulman 2020).

* Value: two normal distributions a step apart, as in Schulman's own table, by a sum over a fine grid.
* Gradient: a softmax over 8 tokens, so every expectation is a sum over 8 terms, exact. "In the loss" the estimator is
  differentiated and the sampling is not: E[∇k]. "In the reward" it is a number that weighs the score: E[k ∇ln π].
  Compared by cosine and length with ∇KL(π‖ref), and with ∇KL(ref‖π), the other direction. The spread is that of one
  sample's gradient.
* Training: E[R] − β·KL by exact gradient steps, each estimator in each place. The optimum is known, π* ∝ π_ref·e^(R/β);
  what is reported is the true KL(π‖π*) after 3,000 steps.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from cartpole import RESULTS, machine  # noqa: E402

FILE = RESULTS / "claims_kl_estimators.jsonl"
ESTIMATORS = {"k1": lambda r: -r, "k2": lambda r: r * r / 2, "k3": lambda r: torch.expm1(r) - r}
PLACES = ("loss", "reward")
LN10 = float(np.log(10))
TOKENS, BETA, RATE, STEPS = 8, 0.5, 0.3, 3000


def kl(logp, logq):
    return (logp.exp() * (logp - logq)).sum()


def per_token_gradients(theta, ref, estimator, place):
    """(TOKENS, TOKENS): row x is the gradient by θ that a sample x contributes. π-weighted, their mean is exact."""
    pi = theta.softmax(-1)
    score = torch.eye(TOKENS, dtype=theta.dtype) - pi  # row x: ∇ ln π(x)
    r = (ref - theta.log_softmax(-1)).detach().requires_grad_()
    k = estimator(r)
    if place == "reward":
        return k.detach()[:, None] * score
    (slope,) = torch.autograd.grad(k.sum(), r)  # dk/dr, and dr/dθ = −∇ ln π
    return -slope[:, None] * score


def values():
    """Schulman's table: π = N(0, 1), ref = N(μ, 1)."""
    x = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    weight = torch.exp(-x * x / 2)
    weight /= weight.sum()
    for mu in (0.1, 1.0):
        r, true = mu * x - mu * mu / 2, mu * mu / 2
        for name, estimator in ESTIMATORS.items():
            k = estimator(r)
            mean = float((weight * k).sum())
            deviation = float((weight * (k - mean) ** 2).sum().sqrt())
            row = {"part": "value", "mu": mu, "estimator": name, "true": true}
            yield {
                **row,
                "bias_by_true": round((mean - true) / true, 4),
                "deviation_by_true": round(deviation / true, 3),
            }


def case(seed):
    """Logits of π and ref, and a reward for each token."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda size: size * torch.randn(TOKENS, dtype=torch.float64, generator=generator)  # noqa: E731
    return draw(1.0), draw(1.0).log_softmax(-1), draw(1.0)


def gradients(seed):
    theta, ref, _ = case(seed)
    theta.requires_grad_()
    logpi = theta.log_softmax(-1)
    (reverse,) = torch.autograd.grad(kl(logpi, ref), theta, retain_graph=True)
    (forward,) = torch.autograd.grad(kl(ref, logpi), theta)
    pi = logpi.exp().detach()
    cosine = lambda a, b: float(torch.cosine_similarity(a, b, dim=0)) if a.norm() > 1e-12 else None  # noqa: E731
    for place in PLACES:
        for name, estimator in ESTIMATORS.items():
            rows = per_token_gradients(theta.detach(), ref, estimator, place)
            mean = pi @ rows
            spread = float((pi @ ((rows - mean) ** 2).sum(-1)).sqrt())
            row = {"part": "gradient", "seed": seed, "place": place, "estimator": name}
            row |= {"length": round(float(mean.norm() / reverse.norm()), 6), "cosine": cosine(mean, reverse)}
            row |= {"cosine_other": cosine(mean, forward), "spread": round(spread / float(reverse.norm()), 4)}
            row["error"] = round(float((mean - reverse).norm() / reverse.norm()), 6)
            row["error_other"] = round(float((mean - forward).norm() / forward.norm()), 6)
            yield row


def training(seed):
    _, ref, reward = case(seed)
    best = (ref + reward / BETA).log_softmax(-1)
    for place in PLACES:
        for name, estimator in ESTIMATORS.items():
            theta, curve = ref.clone(), []
            for step in range(STEPS + 1):
                logpi = theta.log_softmax(-1)
                if step in (0, 10, 30, 100, 300, 1000, STEPS):
                    curve.append([step, round(float(kl(logpi, best)), 6)])
                pi = logpi.exp()
                uphill = pi * (reward - pi @ reward)  # ∇ E[R]
                theta = theta + RATE * (uphill - BETA * pi @ per_token_gradients(theta, ref, estimator, place))
            row = {"part": "training", "seed": seed, "place": place, "estimator": name, "curve": curve}
            logpi = theta.log_softmax(-1)
            yield {
                **row,
                "kl_to_ref": round(float(kl(logpi, ref)), 4),
                "least_log10": round(float(logpi.min()) / LN10, 1),
            }


def draw():
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()][1:]
    print("| π = N(0, 1), ref = N(μ, 1) | true KL | estimator | bias / true | standard deviation / true |")
    print("|---|---|---|---|---|")
    for r in (r for r in rows if r["part"] == "value"):
        print(f"| μ = {r['mu']} | {r['true']:g} | {r['estimator']} | {r['bias_by_true']:.3f} | ", end="")
        print(f"{r['deviation_by_true']:.2f} |")
    print(
        "\n| place | estimator | error against ∇KL(π‖ref) | error against ∇KL(ref‖π) | cosine with ∇KL(π‖ref) | ",
        end="",
    )
    print("spread of one sample | after training: KL to the optimum | KL to ref | rarest token |\n" + "|---" * 9 + "|")
    left, right = Figure(figsize=(10, 3.8), layout="constrained").subplots(1, 2)
    for i, (place, name) in enumerate((place, name) for place in PLACES for name in ESTIMATORS):
        own = [r for r in rows if (r.get("place"), r.get("estimator")) == (place, name)]
        grad, train = ([r for r in own if r["part"] == part] for part in ("gradient", "training"))
        medians = {key: np.median([r[key] for r in grad]) for key in ("error", "error_other", "spread")}
        cosines = [r["cosine"] for r in grad if r["cosine"] is not None]
        cosine = f"{np.median(cosines):.2f}" if cosines else "none, it is 0"
        ends = np.array([r["curve"][-1][1] for r in train])
        low, middle, high = np.quantile(ends, (0.25, 0.5, 0.75))
        away = np.median([r["kl_to_ref"] for r in train])
        print(f"| {place} | {name} | {medians['error']:.2f} | {medians['error_other']:.2f} | {cosine} | ", end="")
        least = np.median([r["least_log10"] for r in train])
        print(f"{medians['spread']:.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) | {away:.2f} | 10^{least:.0f} |")
        label, color, style = f"{name} in the {place}", f"C{i % 3}", "-" if place == "loss" else "--"
        left.plot([i] * len(grad), [r["error"] for r in grad], ".", color=color, alpha=0.6)
        curves = np.array([r["curve"] for r in train])
        right.plot(
            np.maximum(curves[0, :, 0], 3), np.median(curves[:, :, 1], 0) + 1e-6, style, color=color, label=label
        )
    left.set_xticks(range(6), [f"{name}\n{place}" for place in PLACES for name in ESTIMATORS])
    left.set(title="error of the expected gradient; one dot for each seed", ylabel="‖E[g] − ∇KL‖ / ‖∇KL‖")
    right.set(title="distance from the optimum", xlabel="gradient steps", ylabel="KL(π‖π*), median")
    right.set(xscale="log", yscale="log")
    right.legend(fontsize=8)
    left.figure.savefig(ROOT / "docs" / "figures" / "claims_kl_estimators.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--draw", action="store_true", help="tables and figure from the kept results, no runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.draw:
        with FILE.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"machine": machine(), "date": time.strftime("%Y-%m-%d")}) + "\n")
            for row in values():
                file.write(json.dumps(row) + "\n")
            for seed in range(1, options.seeds + 1):
                for row in (*gradients(seed), *training(seed)):
                    file.write(json.dumps(row) + "\n")
    draw()
