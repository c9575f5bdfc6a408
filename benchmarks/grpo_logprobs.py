"""Processor seconds of a chunk's log-probabilities, forward and backward, as grpo_llm.py has computed them and does.

Run      python benchmarks/grpo_logprobs.py
Writes   benchmarks/results/grpo_logprobs.jsonl (a line naming the machine, then a line a round)

512 states of width 576, 49,152 words (SmolLM2-135M's), float32, one thread. The forms, interleaved round by round:
    gather, recomputed         logits / temperature, gather less logsumexp; the chunk is computed again in backward
    cross_entropy, recomputed  the same with cross_entropy, and no division at temperature 1: all but the last chunk
    cross_entropy, once        without recomputing: the last chunk
Each row also has how far values and gradients are from the first form's.
"""

import json
import sys
import time
from statistics import median

import torch
from cartpole import RESULTS, ROOT, machine
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(ROOT))
import grpo_llm

TOKENS, WIDTH, WORDS, ROUNDS = 512, 576, 49_152, 3


def by_gather(head, states, targets, temperature):
    logits = head(states).float() / temperature
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


FORMS = {
    "gather, recomputed": lambda *x: checkpoint(by_gather, *x, use_reentrant=False),
    "cross_entropy, recomputed": lambda *x: checkpoint(grpo_llm.logprobs_of, *x, use_reentrant=False),
    "cross_entropy, once": grpo_llm.logprobs_of,
}


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, WORDS, bias=False)
    states, targets = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randint(WORDS, (TOKENS,))
    weights = torch.randn(TOKENS)
    with (RESULTS / "grpo_logprobs.jsonl").open("w", encoding="utf-8") as file:
        file.write(json.dumps({"machine": machine(), "date": time.strftime("%Y-%m-%d"), "tokens": TOKENS}) + "\n")
        seconds, right = {}, None
        for round_number in range(1, ROUNDS + 1):
            for name, form in FORMS.items():
                head.weight.grad = states.grad = None
                begun = time.process_time()
                logprobs = form(head, states, targets, 1.0)
                (logprobs * weights).sum().backward()
                spent = time.process_time() - begun
                found = [logprobs.detach(), states.grad, head.weight.grad]
                right = right or found
                differences = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, right)]
                row = {"form": name, "round": round_number, "seconds": round(spent, 3), "differences": differences}
                file.write(json.dumps(row) + "\n")
                seconds.setdefault(name, []).append(spent)
    for name, own in seconds.items():
        print(f"| {name} | {median(own):.2f} ({min(own):.2f} to {max(own):.2f}) |")


if __name__ == "__main__":
    main()
