"""bfloat16 weights at a learning rate of 1e-6: how many change, and by how much, under two ways of rounding.

Run      python benchmarks/grpo_rounding.py --model DIR
Writes   benchmarks/results/grpo_rounding.jsonl

The same gradient, of one text, goes ten times through grpo_llm.py's AdamW8bit at lr 1e-6, rounded to the nearest
bfloat16 and stochastically. With one gradient g all the time Adam's step is lr g/(|g| + ε), so after ten steps a weight
should have moved by nearly 1e-5 against the sign of g. What counts is the sum of these movements, as a share of what
was asked for.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from cartpole import RESULTS, machine  # noqa: E402

TEXT = "A train leaves at noon and drives 60 kilometres an hour. Where is it at three? It is 180 kilometres away."
STEPS, LEARNING_RATE, EPS = (1, 10), 1e-6, 1e-8


def measure(directory):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import grpo_llm

    torch.set_num_threads(1)
    tokens = AutoTokenizer.from_pretrained(directory)(TEXT, return_tensors="pt")["input_ids"]
    stochastically = grpo_llm.round_stochastically
    for way, rounding in (("nearest", lambda x: x.bfloat16()), ("stochastic", stochastically)):
        grpo_llm.round_stochastically = rounding
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        model(tokens, labels=tokens).loss.backward()
        parameters = list(model.parameters())
        before = [x.detach().clone() for x in parameters]
        optimizer = grpo_llm.AdamW8bit(parameters, lr=LEARNING_RATE)
        for step in range(1, max(STEPS) + 1):
            optimizer.step()
            if step in STEPS:
                changed = sum(int((x != old).sum()) for x, old in zip(parameters, before))
                moved = sum(
                    float(((old.float() - x.float()) * x.grad.float().sign()).sum().detach())
                    for x, old in zip(parameters, before)
                )
                count = sum(x.numel() for x in parameters)
                asked = sum(float((x.grad.float().abs() / (x.grad.float().abs() + EPS)).sum()) for x in parameters)
                wanted = LEARNING_RATE * step * asked
                yield {"rounding": way, "steps": step, "changed": changed / count, "movement": moved / wanted}
    grpo_llm.round_stochastically = stochastically


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a causal language model")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    head = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "model": Path(options.model).name}
    with (RESULTS / "grpo_rounding.jsonl").open("w", encoding="utf-8") as file:
        for row in (head, *measure(options.model)):
            file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
