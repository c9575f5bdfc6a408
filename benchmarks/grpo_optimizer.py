"""Nanoseconds a parameter of an optimizer's step: grpo_llm.py's AdamW8bit in slices of several sizes, torch's AdamW.

Run      python benchmarks/grpo_optimizer.py
Writes   benchmarks/results/grpo_optimizer.jsonl (a line naming the machine, then a line a measured step)

33.6M parameters in one tensor, one thread, five rounds, one step of each program a round, after one that warms up.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from cartpole import RESULTS, machine  # noqa: E402

import grpo_llm  # noqa: E402

COUNT, ROUNDS = 1 << 25, 5


def adamw8bit(slice_bits):
    parameter = torch.nn.Parameter(torch.randn(COUNT // 1024, 1024).bfloat16())
    parameter.grad = torch.randn_like(parameter)
    optimizer = grpo_llm.AdamW8bit([parameter], lr=1e-5)
    optimizer.at_once = 1 << slice_bits
    return optimizer.step


def adamw():
    parameter = torch.nn.Parameter(torch.randn(COUNT // 1024, 1024))
    parameter.grad = torch.randn_like(parameter)
    return torch.optim.AdamW([parameter], lr=1e-5, fused=True).step


def main():
    torch.set_num_threads(1)
    torch.manual_seed(1)
    programs = {f"AdamW8bit, slices of 2^{bits}": adamw8bit(bits) for bits in (14, 15, 16, 17, 18, 25)}
    programs["torch.optim.AdamW, float32, fused"] = adamw()
    rows = []
    for round_number in range(ROUNDS + 1):
        for name, step in programs.items():
            start = time.perf_counter()
            step()
            nanoseconds = (time.perf_counter() - start) / COUNT * 1e9
            if round_number:
                rows.append({"program": name, "round": round_number, "nanoseconds": round(nanoseconds, 3)})
    head = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "parameters": COUNT}
    text = "".join(f"{json.dumps(row)}\n" for row in (head, *rows))
    (RESULTS / "grpo_optimizer.jsonl").write_text(text, encoding="utf-8")
    print("| program | ns a parameter: median (lowest to highest) |\n|---|---|")
    for name in programs:
        found = [row["nanoseconds"] for row in rows if row["program"] == name]
        print(f"| {name} | {median(found):.1f} ({min(found):.1f} to {max(found):.1f}) |")


if __name__ == "__main__":
    main()
