"""benchmarks/memory_plan.py: the memory of a run of grpo_llm.py, planned, against what is allocated."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract import ROOT

pytestmark = pytest.mark.slow

PROGRAM = str(ROOT / "benchmarks" / "memory_plan.py")
BF16 = {"dtype": "bfloat16", "optimizer": "adamw8bit", "learning_rate": 1e-3}


def allocated(action):
    """Bytes alive at most beyond those at the start, as the CPU's allocator reports them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    alive = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def learning(grpo, args, model):
    """Bytes beyond the weights that learning from the two longest micro-batches allocates; prompts of 20 tokens."""
    Q, T, G, P = 20, args.max_tokens, args.group_size, args.prompts_per_step
    tokens = torch.full((P * G, T), 5)
    rows = grpo.plan_for(args, model, [Q] * P, dict.fromkeys(range(P * G), T), G)
    assert len(rows) > 1
    batch = grpo.pack_rows([[5] * Q] * P, tokens, torch.ones_like(tokens), rows[0], G)

    def learn():
        for _ in range(2):
            grpo.completion_logprobs(model, batch, T, args.temperature, args.logprob_tokens).sum().backward()

    model.train()
    return allocated(learn)


PLANNED = [
    {"dtype": "bfloat16", "optimizer": "adamw8bit"},
    {"dtype": "bfloat16", "optimizer": "adamw8bit", "offload": True, "gradient_checkpointing": True},
    {"micro_batch_tokens": 200, "logprob_tokens": 64, "gradient_checkpointing": True},
    {"max_tokens": 100, "micro_batch_tokens": 500, "logprob_tokens": 32},
    {"dtype": "bfloat16", "optimizer": "adamw8bit", "lora_rank": 4, "quantize": "int8"},
    {"lora_rank": 4, "quantize": "int8", "gradient_checkpointing": True},
    {"dtype": "bfloat16", "optimizer": "adamw8bit", "lora_rank": 4, "quantize": "nf4", "gradient_checkpointing": True},
]


@pytest.mark.parametrize("options", PLANNED, ids=range(len(PLANNED)))
def test_plan_is_what_the_allocator_counts(grpo, planner, tiny_grpo, options):
    """[G26] Within 10% of the peaks of real tensors, weights aside: learning from two micro-batches, and sampling."""
    args = tiny_grpo(**{"max_tokens": 40, "micro_batch_tokens": 300, "eval_problems": 1, **options})
    plan = planner.memory_plan(args, 20)
    model = grpo.load_model(args, args.model)[0]
    if args.lora_rank:
        grpo.add_adapter(args, model)
    weights = planner.bytes_of_weights(model)
    assert plan["weights"] == (weights, 0)
    if args.quantize == "nf4":
        assert weights > sum(x.nbytes for x in (*model.parameters(), *model.buffers()))  # the scales' too
    state = plan["optimizer state"]
    optimizer = grpo.new_optimizer(args, model)
    if args.optimizer == "adamw8bit":
        learned = sum(x.nbytes for x in model.parameters() if x.requires_grad)
        assert state[bool(args.offload)] == sum(x.nbytes for own in optimizer.state for x in own) > learned * 0.4
        assert state[not args.offload] == 0
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()

    always = weights + state[0]
    assert plan["peak of learning"][0] - always == pytest.approx(learning(grpo, args, model), rel=0.1)
    optimizer.zero_grad()
    model.eval()
    Q, T, G, P = 20, args.max_tokens, args.group_size, args.prompts_per_step
    noise = torch.rand(P * G, T)
    sampled = allocated(lambda: grpo.generate(model, [[5] * Q] * P, noise, 1.0, [1000], 0))
    assert plan["peak of sampling"][0] - always == pytest.approx(sampled, rel=0.1)
    assert plan["keys and values"][0] == P * G * (Q + T) * 2 * 2 * 16 * (2 if args.dtype == "bfloat16" else 4)
    assert plan["peak"] == max(row for name, row in plan.items() if name.startswith("peak of"))


def test_plan_of_where_things_are(planner, tiny_grpo):
    """--offload takes gradients, state and reference to the host; what stays is one parameter's gradient and one
    module of the reference. A LoRA has a reference for nothing and gradients for its adapters alone."""
    options = {**BF16, "beta": 0.1}
    plain, offloaded = (planner.memory_plan(tiny_grpo(**options, offload=offload), 20) for offload in (False, True))
    for name in ("gradients", "reference", "optimizer state"):
        assert plain[name][1] == 0 < offloaded[name][1] == plain[name][0], name
        assert offloaded[name][0] < plain[name][0] / 2
    assert plain["peak"][1] == 0 and offloaded["peak"][1] == sum(x[1] for n, x in offloaded.items() if "peak" not in n)
    assert offloaded["peak of learning"][0] < plain["peak of learning"][0]
    assert "peak of scoring" in plain and "peak of scoring" not in planner.memory_plan(tiny_grpo(), 20)
    on_gpu = planner.memory_plan(tiny_grpo(**options), 20, gpu_memory=8.0)
    assert on_gpu["peak of learning"][0] == plain["peak of learning"][0] + planner.GPU_CONTEXT
    pytest.importorskip("peft")
    adapted = planner.memory_plan(tiny_grpo(beta=0.1, lora_rank=2), 20)
    assert adapted["reference"] == (0, 0) and 0 < adapted["gradients"][0] < adapted["weights"][0]


def test_plan_from_a_configuration_alone(tiny_lm, tmp_path):
    """A directory with nothing but config.json; the table and the verdict are printed, nothing is trained."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((Path(tiny_lm) / "config.json").read_bytes())
    command = [sys.executable, PROGRAM, "--model", "model", "--max-tokens", "30", "--plan", "20"]
    done = subprocess.run([*command, "--gpu-memory", "0.5"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "peak of learning" in done.stdout and "does not fit" in done.stdout.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_plan_of_a_shape_in_the_repository_needs_no_download(planner, monkeypatch):
    """By the model's name on the Hub, with and without an adapter; 15.2 GB of weights are those of Qwen2.5-7B."""
    monkeypatch.setattr(planner.grpo_llm, "from_disk", lambda *_, **__: pytest.fail("something is downloaded"))
    monkeypatch.setattr(planner.grpo_llm, "base_of_adapter", lambda name: pytest.fail("something is downloaded"))
    options = {**BF16, "model": "Qwen/Qwen2.5-7B-Instruct", "beta": 0.1, "lora_rank": 2, "prompts_per_step": 1}
    options |= {"task": "gsm8k", "max_tokens": 40}
    plan = planner.memory_plan(planner.grpo_llm.Args(**options, gradient_checkpointing=True), 20)
    assert plan["weights"][0] == pytest.approx(2 * 7_615_616_512, rel=0.002)


@pytest.mark.parametrize("family", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_plan_of_experts_in_float32(grpo, planner, tiny_grpo, tmp_path, family):
    """[G26] Experts are one grouped product, which PyTorch knows without content in bfloat16 alone."""
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32}
    model_class = getattr(transformers, family)
    config = model_class.config_class(vocab_size=27, num_experts_per_tok=2, **sizes)
    torch.manual_seed(0)
    model_class(config).save_pretrained(tmp_path / "experts")
    grpo.new_tokenizer().save_pretrained(tmp_path / "experts")
    args = tiny_grpo(model=str(tmp_path / "experts"), max_tokens=40, micro_batch_tokens=300, eval_problems=1)
    plan = planner.memory_plan(args, 20)
    model = grpo.load_model(args, args.model)[0]
    assert plan["weights"][0] == sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    planned = plan["peak of learning"][0] - plan["weights"][0] - plan["optimizer state"][0]
    assert planned == pytest.approx(learning(grpo, args, model), rel=0.1)


def test_a_plan_needs_the_length_of_a_prompt_and_the_fast_path(planner):
    for options, words in (
        ({"plan": 0}, "plan must be above 0, got 0"),
        ({"plan": 1, "gpu_memory": -1.0}, "gpu_memory must not be negative, got -1.0"),
        ({"plan": 1, "fast": False}, "the memory plan is that of the fast path"),
    ):
        with pytest.raises(ValueError, match=words):
            planner.PlanArgs(**options)


@pytest.mark.parametrize(
    ("memory", "verdict"), [(10, "fits, 2.0 to spare"), (8, "fits, 0.0 to spare"), (7.5, "does not fit, 0.5 too many")]
)
def test_a_plan_in_gigabytes(planner, capsys, memory, verdict):
    plan = {"weights": (3e9, 0), "peak": (8e9, 2.5e9)}
    planner.print_plan(plan, memory)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [["GB", "device", "host"], ["weights", "3.000", "0.000"], ["peak", "8.000", "2.500"]]
    assert " ".join(lines[3]) == f"of {memory:g} GB: {verdict}"
    planner.print_plan(plan)
    assert "fit" not in capsys.readouterr().out
