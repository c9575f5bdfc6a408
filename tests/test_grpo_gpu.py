"""grpo_llm on a GPU: what a CPU cannot show. Without one: tests/mock_cuda, or GRPO_TEST_DEVICE=cpu."""

import os
from dataclasses import replace

import pytest
import torch

DEVICE = os.environ.get("GRPO_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no GPU")
BF16 = {"dtype": "bfloat16", "optimizer": "adamw8bit", "learning_rate": 1e-3}


def test_a_cuda_graph_samples_what_the_growing_cache_samples(grpo, tiny_grpo, tiny_lm):
    """[G28] Token for token in float32, prompts of several lengths, rows that end at different times."""
    model = grpo.load_model(tiny_grpo(device=DEVICE), tiny_lm)[0]
    prompts, noise = [[4, 5, 6], [7], [8, 3, 4, 12, 9]] * 4, torch.rand(48, 14)
    growing, fixed = (grpo.generate(model, prompts, noise, 0.9, [1, 5, 9], 0, is_fixed) for is_fixed in (False, True))
    assert growing[0].device.type == DEVICE
    assert torch.equal(growing[2], fixed[2]) and torch.equal(growing[0], fixed[0])
    torch.testing.assert_close(growing[1], fixed[1], rtol=0, atol=1e-4)


def test_offload_changes_nothing_on_the_device(grpo, tiny_grpo):
    """[G24] [G25] Gradients, state and reference in page-locked host memory: the plain run's metrics."""
    options = {**BF16, "device": DEVICE, "beta": 0.1, "micro_batch_tokens": 48, "num_minibatches": 2, "steps": 3}
    plain, offloaded = (grpo.train(tiny_grpo(str(x), **options, offload=x)) for x in (False, True))
    for row, other in zip(plain[1:], offloaded[1:], strict=True):
        for name in ("policy/grad_norm", "kl/reference", "reward/mean", "policy/entropy"):
            assert other[name] == pytest.approx(row[name], rel=2e-2, abs=1e-5), name


def test_what_is_offloaded_is_on_the_host(grpo, tiny_grpo, tiny_lm):
    args = tiny_grpo(**BF16, device=DEVICE, offload=True)
    model = grpo.load_model(args, tiny_lm)[0]
    optimizer = grpo.new_optimizer(args, model)
    model(torch.arange(3, 13, device=DEVICE).view(1, -1)).logits.square().mean().backward()
    assert all(x.grad is None and grpo.gradient_of(x).device.type == "cpu" for x in model.parameters())
    assert all(x.device.type == "cpu" for own in optimizer.state for x in own)
    reference = grpo.load_reference(args, tiny_lm)
    assert all(x.device.type == "cpu" for x in reference.parameters())
    with torch.no_grad():
        assert reference(torch.arange(3, 13, device=DEVICE).view(1, -1)).logits.device.type == DEVICE
    for _ in range(3):  # each where the one before was: what is freed must not stay page-locked
        large = grpo.zeros_on_host((1 << 24,), torch.float32, DEVICE)
        assert large.is_pinned() == (DEVICE == "cuda")
        del large


def test_quantized_weights_on_the_device(grpo, tiny_grpo, tiny_lm):
    """[G29] The host's codes, but for an ulp of a scale; a graph unpacks them at each replay; adapters learn."""
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    options = {"lora_rank": 4, "quantize": "int8", "beta": 0.1, "steps": 3}
    model, host = (grpo.load_model(tiny_grpo(**options, device=device), tiny_lm)[0] for device in (DEVICE, "cpu"))
    codes = {name: x for name, x in model.state_dict().items() if x.dtype == torch.int8}
    assert len(codes) == 14 and all(x.device.type == DEVICE for x in codes.values())
    apart = torch.cat([(x.cpu().int() - host.state_dict()[name].int()).abs().flatten() for name, x in codes.items()])
    assert int(apart.max()) <= 1 and float(apart.float().mean()) < 0.01
    prompts, noise = [[4, 5, 6], [7], [8, 3, 4, 12, 9]] * 4, torch.rand(48, 14)
    growing, fixed = (grpo.generate(model, prompts, noise, 0.9, [1, 5, 9], 0, is_fixed) for is_fixed in (False, True))
    assert torch.equal(growing[2], fixed[2]) and torch.equal(growing[0], fixed[0])
    metrics = grpo.train(tiny_grpo(**options, device=DEVICE, gradient_checkpointing=True))
    assert metrics[1]["kl/reference"] == pytest.approx(0, abs=1e-6) and metrics[3]["kl/reference"] > 1e-5


def test_plan_against_the_device(grpo, planner, tiny_grpo, monkeypatch):
    """[G26] Peaks of tensors on the device within 15% of the plan, the context aside. The allocator rounds up small
    tensors, so the model is one of some megabytes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    args = tiny_grpo(**BF16, device=DEVICE, max_tokens=100, micro_batch_tokens=1000, eval_problems=1)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = Qwen3Config(vocab_size=8000, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True, **sizes)
    monkeypatch.setattr(planner, "model_without_content", lambda args: Qwen3ForCausalLM(config).bfloat16().eval())
    plan = planner.memory_plan(args, 60)
    model = Qwen3ForCausalLM(config).bfloat16().to(DEVICE)
    tokens = torch.full((12, 100), 5)
    rows = grpo.plan_for(args, model, [60] * 3, dict.fromkeys(range(12), 100), 4)
    batch = grpo.pack_rows([[5] * 60] * 3, tokens, torch.ones_like(tokens), rows[0], 4, DEVICE)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in rows[:2]:
        grpo.completion_logprobs(model, batch, 100, 1.0, args.logprob_tokens).sum().backward()
    if DEVICE == "cuda":
        planned = plan["peak of learning"][0] - planner.GPU_CONTEXT - plan["optimizer state"][0]
        assert torch.cuda.max_memory_allocated() == pytest.approx(planned, rel=0.15)


def test_a_resumed_run_may_change_the_device(grpo, tiny_grpo):
    args = tiny_grpo(**BF16, device="cpu", steps=2, checkpoint_every=2)
    grpo.train(args)
    saved = grpo.resumed_args(args.run_dir)
    assert grpo.train(replace(saved, device=DEVICE))[-1]["step"] == 2
