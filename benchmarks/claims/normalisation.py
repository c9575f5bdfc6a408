"""Claim 11: what GRPO's standard deviation and its mean over each answer do (Dr. GRPO's two biases). Exact.

Run      python benchmarks/claims/normalisation.py             (some seconds on one core)
         python benchmarks/claims/normalisation.py --draw      (table and figure from the kept results)
Writes   benchmarks/results/claims_normalisation.jsonl, docs/figures/claims_normalisation.png

Nothing is sampled: every expectation is a sum over all outcomes of a group, so there are no seeds.

* Standard deviation. A question is answered rightly with chance p. The expected gradient on its log-odds, summed over
  the binomial number of right answers among G, with and without the division; its ratio to the policy gradient
  p(1 − p) is the weight that the question gets.
* Two questions that share a parameter: A is right with chance σ(1 + θ), B with σ(1 − 3θ). Where does each expected
  gradient come to rest, and how many answers are right there?
* Length. A policy chooses one of four answers by its first token, right or wrong, of 10 or of 100 tokens; the rest of
  the answer is forced. From even odds, 400 steps on the exact expected gradient for G = 8 (165 outcomes), each
  reduction of grpo_llm.py's own reduce_loss. What becomes of the length of wrong and of right answers?
"""

import argparse
import itertools
import json
import math
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from cartpole import RESULTS, machine  # noqa: E402

import grpo_llm as grpo  # noqa: E402

FILE = RESULTS / "claims_normalisation.jsonl"
GROUP, STEPS, RATE = 8, 400, 0.5
ANSWERS = {"right, short": (1.0, 10), "right, long": (1.0, 100), "wrong, short": (0.0, 10), "wrong, long": (0.0, 100)}


@cache
def total_advantages(count, group_size, scale_by_std):
    """Sum of the advantages of `count` right answers, and of the others."""
    rewards = torch.tensor([1.0] * count + [0.0] * (group_size - count), dtype=torch.float64)
    advantages = grpo.group_advantages(rewards, group_size, scale_by_std)
    return float(advantages[:count].sum()), float(advantages[count:].sum())


def expected_gradient(p, group_size, scale_by_std):
    """By the log-odds of a right answer, whose score is 1 − p, and −p for a wrong one: E[Σ Â·score / G]."""
    total = 0.0
    for count in range(group_size + 1):
        right, wrong = total_advantages(count, group_size, scale_by_std)
        chance = math.comb(group_size, count) * p**count * (1 - p) ** (group_size - count)
        total += chance * (right * (1 - p) - wrong * p) / group_size
    return total


def question_weights():
    for group_size, scale_by_std in itertools.product((2, 8, 64), (True, False)):
        for p in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99):
            weight = expected_gradient(p, group_size, scale_by_std) / (p * (1 - p))
            row = {"part": "question", "group_size": group_size, "scale_by_std": scale_by_std, "p": p}
            yield {**row, "weight": round(weight, 4)}


def shared_parameter():
    for group_size, scale_by_std in itertools.product((2, 8, 64), (True, False)):
        theta, logistic = 0.0, lambda x: 1 / (1 + math.exp(-x))
        for _ in range(1000):
            a, b = logistic(1 + theta), logistic(1 - 3 * theta)
            step = expected_gradient(a, group_size, scale_by_std) - 3 * expected_gradient(b, group_size, scale_by_std)
            theta += 0.3 * step
            if abs(step) < 1e-7:
                break
        row = {"part": "shared", "group_size": group_size, "scale_by_std": scale_by_std, "theta": round(theta, 4)}
        yield {**row, "a": round(a, 4), "b": round(b, 4), "right": round((a + b) / 2, 4)}


def first_token_slopes(reduction):
    """−dL/d ln π of the first tokens at ratio 1, summed over the answers of a kind: (165, 4), and the 165 outcomes."""
    rewards, lengths = (torch.tensor(x) for x in zip(*ANSWERS.values()))
    outcomes = [x for x in itertools.product(range(GROUP + 1), repeat=len(ANSWERS)) if sum(x) == GROUP]
    slopes = []
    for counts in outcomes:
        kinds = torch.arange(len(ANSWERS)).repeat_interleave(torch.tensor(counts))
        mask = torch.arange(int(lengths.max())) < lengths[kinds][:, None]
        logprob = torch.zeros(mask.shape, dtype=torch.float64, requires_grad=True)
        scale_by_std = reduction != "constant"
        advantages = grpo.group_advantages(rewards[kinds].double(), GROUP, scale_by_std)
        loss = grpo.grpo_token_loss(logprob, logprob.detach(), None, advantages, 0.2, 0.2, 0.0)
        grpo.reduce_loss(loss, mask, reduction, int(mask.sum()), GROUP, int(lengths.max())).backward()
        slopes.append(torch.zeros(len(ANSWERS), dtype=torch.float64).index_add(0, kinds, -logprob.grad[:, 0]).numpy())
    return np.array(slopes), np.array(outcomes)


def lengths():
    for reduction in ("sequence", "token", "constant"):
        slopes, outcomes = first_token_slopes(reduction)
        ways = np.array([math.factorial(GROUP) / math.prod(map(math.factorial, x)) for x in outcomes.tolist()])
        logits, curve, first = np.zeros(len(ANSWERS)), [], None
        for step in range(STEPS + 1):
            p = np.exp(logits) / np.exp(logits).sum()
            if step % 10 == 0:
                curve.append([round(float(x), 4) for x in p])
            coefficients = (ways * (p**outcomes).prod(-1)) @ slopes  # E of each kind's total push on its own ln π
            gradient = coefficients - coefficients.sum() * p
            first = np.linalg.norm(gradient) if first is None else first  # the same first step for all three
            logits += RATE / first * 0.05 * gradient
        wrong_long, right_long = p[3] / (p[2] + p[3]), p[1] / (p[0] + p[1])
        row = {"part": "length", "reduction": reduction, "right": round(float(p[:2].sum()), 4)}
        yield {**row, "long_of_wrong": round(wrong_long, 4), "long_of_right": round(right_long, 4), "curve": curve}


def draw(rows):
    from matplotlib.figure import Figure

    panels = Figure(figsize=(10, 3.5), layout="constrained").subplots(1, 2)
    for group_size, scale_by_std in itertools.product((8, 64), (True, False)):
        points = [
            (row["p"], row["weight"])
            for row in rows
            if row["part"] == "question" and (row["group_size"], row["scale_by_std"]) == (group_size, scale_by_std)
        ]
        label = f"G = {group_size}, {'divided' if scale_by_std else 'not divided'} by std"
        panels[0].plot(*zip(*points), "-" if scale_by_std else "--", label=label)
    panels[0].set(
        xlabel="share of right answers p", title="weight of a question in the policy gradient", ylim=(0, None)
    )
    names = {"sequence": "GRPO", "token": "DAPO", "constant": "Dr. GRPO"}
    for color, row in enumerate(row for row in rows if row["part"] == "length"):
        p = np.array(row["curve"])
        for style, name, share in (
            ("-", "wrong", p[:, 3] / (p[:, 2] + p[:, 3])),
            (":", "right", p[:, 1] / (p[:, 0] + p[:, 1])),
        ):
            label = f"{names[row['reduction']]}, {name}"
            panels[1].plot(np.arange(len(p)) * 10, share, style, color=f"C{color}", label=label)
    panels[1].set(xlabel="step", title="share of the long among the answers", ylim=(0, 1.1))
    for axes in panels:
        axes.legend(fontsize="x-small", loc="upper center", ncols=3 if axes is panels[1] else 1)
    panels[0].figure.savefig(ROOT / "docs" / "figures" / "claims_normalisation.png", dpi=120)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--draw", action="store_true")
    if not parser.parse_args().draw:
        torch.set_num_threads(1)
        found = [machine(), *question_weights(), *shared_parameter(), *lengths()]
        FILE.write_text("".join(f"{json.dumps(row)}\n" for row in found), encoding="utf-8")
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()][1:]
    for row in rows:
        if row["part"] != "question" or row["p"] in (0.01, 0.05, 0.5, 0.9):
            print({name: x for name, x in row.items() if name != "curve"})
    draw(rows)


if __name__ == "__main__":
    main()
