"""grpo_llm beyond what a small card holds: --offload, --quantize, --shard; transformers of a few dimensions."""

import gc
import os
import socket
import subprocess
import sys
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

NOT_COMPARED = ("time/", "memory/")
BF16 = {"dtype": "bfloat16", "optimizer": "adamw8bit", "learning_rate": 1e-3}


def run(grpo, args):
    """(metrics, weights, optimizer state) of a run."""
    metrics = grpo.train(args)
    saved = torch.load(Path(args.run_dir) / "checkpoint.pt", weights_only=True)
    rows = [{name: x for name, x in row.items() if not name.startswith(NOT_COMPARED)} for row in metrics]
    return rows, saved["policy"], saved["optimizer"]


def weights_of(grpo, args):
    return {name: x.detach().clone() for name, x in grpo.load_model(args, args.model)[0].named_parameters()}


# ---- --offload ----


def test_offload_changes_nothing(grpo, tiny_grpo):
    """[G24] [G25] Gradients that add up on the host over micro-batches, a norm that is cut, state that is streamed, a
    reference whose weights visit: the bits of the plain run."""
    options = {**BF16, "beta": 0.1, "micro_batch_tokens": 48, "num_minibatches": 2, "max_grad_norm": 0.05, "steps": 3}
    plain = run(grpo, tiny_grpo("plain", **options))
    offloaded = run(grpo, tiny_grpo("offloaded", **options, offload=True))
    assert plain[0] == offloaded[0]
    assert all(row["policy/grad_norm"] > 0.05 for row in plain[0][1:]), "the norm was cut"
    before = weights_of(grpo, tiny_grpo(**options))
    assert sum(not torch.equal(before[name], x) for name, x in plain[1].items()) > len(before) / 2
    for name, weights in plain[1].items():
        assert torch.equal(weights, offloaded[1][name]), name
    for own, other in zip(plain[2]["state"], offloaded[2]["state"], strict=True):
        assert all(torch.equal(*pair) for pair in zip(own, other, strict=True))


def test_an_offloaded_run_goes_on_without(grpo, tiny_grpo):
    """--offload says where things are, not what they are: a resumed run may change it."""
    straight = run(grpo, tiny_grpo("straight", **BF16, steps=4))
    args = tiny_grpo("split", **BF16, steps=4, offload=True, checkpoint_every=2)
    stop_after(grpo, args, 2)
    resumed = grpo.replace(grpo.resumed_args(args.run_dir), offload=False)
    grpo.train(resumed)
    saved = torch.load(Path(args.run_dir) / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 4
    assert all(torch.equal(x, saved["policy"][name]) for name, x in straight[1].items())


def stop_after(grpo, args, step):
    """Train until the checkpoint of that step is written, then be interrupted."""
    save = grpo.save

    def save_and_stop(path, content):
        save(path, content)
        if content["step"] == step:
            raise KeyboardInterrupt

    grpo.save = save_and_stop
    try:
        with pytest.raises(KeyboardInterrupt):
            grpo.train(args)
    finally:
        grpo.save = save


@pytest.mark.parametrize("offload", [False, True])
def test_gradients_alive_in_backward(grpo, tiny_grpo, tiny_lm, offload):
    """[G24] Plain, all of them at the end; offloaded, never more than one parameter's, and two micro-batches add up."""
    args = tiny_grpo(**BF16, offload=offload)
    model = grpo.load_model(args, tiny_lm)[0]
    parameters = list(model.parameters())
    alive = []
    for parameter in parameters:  # before the optimizer's own hooks
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(x.grad.nbytes for x in parameters if x.grad is not None))
        )
    grpo.new_optimizer(args, model)
    tokens = torch.arange(3, 13).view(1, -1)
    for _ in range(2):
        model(tokens).logits.square().mean().backward()
    sizes = [parameter.nbytes for parameter in parameters]
    assert len(alive) == 2 * len(parameters)
    assert max(alive) == (max(sizes) if offload else sum(sizes))
    twice = [grpo.gradient_of(x) for x in parameters]
    assert all((x.grad is None) == offload for x in parameters)
    other = grpo.load_model(args, tiny_lm)[0]
    other(tokens).logits.square().mean().backward()
    for parameter, gradient in zip(other.parameters(), twice):
        torch.testing.assert_close(gradient, 2 * parameter.grad, rtol=0, atol=0)


def test_a_streamed_model_visits(grpo, tiny_grpo, tiny_lm):
    """[G25] The same log-probabilities; while a module runs its weights are copies, the others' wait; a tied weight
    waits once."""
    args = tiny_grpo(offload=True, optimizer="adamw8bit")
    plain, streamed = grpo.load_model(args, tiny_lm)[0], grpo.load_reference(args, tiny_lm)
    homes = {name: x.data_ptr() for name, x in streamed.named_parameters()}
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight
    visiting = []
    for module in streamed.modules():
        module.register_forward_hook(
            lambda *_: visiting.append(sum(x.data_ptr() != homes[name] for name, x in streamed.named_parameters())),
            prepend=True,
        )
    tokens = torch.arange(3, 13).view(1, -1)
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, streamed(tokens).logits)
    assert max(visiting) == 1 and sum(visiting) > len(homes) / 2
    assert {name: x.data_ptr() for name, x in streamed.named_parameters()} == homes
    assert not any(x.requires_grad for x in streamed.parameters())


def test_cut_gradients(grpo):
    """A global norm, in float32 however small the gradients' type: 5 of 3 and 4, cut to 1."""
    gradients = [torch.full((9,), 1.0), torch.full((16,), 1.0, dtype=torch.bfloat16)]
    parameters = [torch.nn.Parameter(torch.zeros_like(x)) for x in gradients]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    assert grpo.cut_gradients(parameters, 100.0) == pytest.approx(5.0)
    assert gradients[0][0] == 1
    assert grpo.cut_gradients([*parameters, torch.nn.Parameter(torch.zeros(1))], 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(gradients[0], torch.full((9,), 0.2))
    torch.testing.assert_close(gradients[1], torch.full((16,), 0.2, dtype=torch.bfloat16))


@pytest.mark.parametrize("options", [{}, {"num_minibatches": 2, "optimizer": "adamw8bit"}])
def test_no_gradient_outlives_its_step(grpo, tiny_grpo, monkeypatch, options):
    """While the next answers are sampled, no gradient of the last step is in memory, by whatever name."""
    gradients, samplings, original, sample = [], [], grpo.cut_gradients, grpo.sample_groups

    def cut(parameters, *arguments):
        gradients.extend(weakref.ref(parameter.grad) for parameter in parameters)
        return original(parameters, *arguments)

    def sample_groups(*arguments):
        gc.collect()
        samplings.append((len(gradients), sum(x() is not None for x in gradients)))
        return sample(*arguments)

    monkeypatch.setattr(grpo, "cut_gradients", cut)
    monkeypatch.setattr(grpo, "sample_groups", sample_groups)
    grpo.train(tiny_grpo(**options))
    assert samplings[-1][0] > 10 and all(alive == 0 for _, alive in samplings)


def test_offload_needs_the_8_bit_optimizer(grpo):
    with pytest.raises(
        ValueError,
        match="offload keeps the state of optimizer adamw8bit on the host: it does not go with optimizer adamw",
    ):
        grpo.Args(offload=True, optimizer="adamw")


# ---- --quantize ----

INT8 = {"lora_rank": 4, "quantize": "int8"}


def quantized_layers(model):
    """{name: layer} of those in 8 bits."""
    return {name: x for name, x in model.named_modules() if isinstance(x, torch.nn.Linear) and hasattr(x, "scale")}


def unpacked_twin(grpo, args, model):
    """The plain model with the weights that the quantized one's codes and scales stand for."""
    twin = grpo.load_model(grpo.replace(args, quantize="none"), args.model)[0]
    modules = dict(twin.named_modules())
    for name, layer in quantized_layers(model).items():
        weight = layer.weight.double() * layer.scale.double()[:, None]
        modules[name].weight.data = weight.to(twin.dtype)
    for name, layer in four_bit_layers(model).items():
        from bitsandbytes.functional import dequantize_4bit

        modules[name].weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(twin.dtype)
    return twin


def four_bit_layers(model):
    return {name: x for name, x in model.named_modules() if hasattr(getattr(x, "weight", None), "quant_state")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_bits_are_half_a_byte(grpo, tiny_grpo, tiny_lm, capsys, dtype):
    """[G29] NF4 in every linear layer but the head: 0.5 bytes a weight and scales, near the plain weights, frozen."""
    pytest.importorskip("bitsandbytes")
    options = {"lora_rank": 4, "dtype": dtype}
    model = grpo.load_model(tiny_grpo(**options, quantize="nf4"), tiny_lm)[0]
    assert "quantized   14 of 14 weights\n" in capsys.readouterr().out
    plain = grpo.load_model(tiny_grpo(**options), tiny_lm)[0]
    layers, twin = four_bit_layers(model), unpacked_twin(grpo, tiny_grpo(**options), model)
    assert len(layers) == 2 * 7 and "lm_head" not in layers
    for name, layer in layers.items():
        weight, unpacked = (x.get_submodule(name).weight.detach() for x in (plain, twin))
        assert 2 * layer.weight.nbytes == weight.numel() and not layer.weight.requires_grad
        assert 0.02 < float((unpacked - weight).norm() / weight.norm()) < 0.15


@pytest.mark.parametrize("width", [64, 96, 48])
def test_four_bits_are_right_or_refused(grpo, width):
    """bitsandbytes unpacks rows that have no whole blocks wrongly on some processors, in silence."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    layer = torch.nn.Linear(width, 40)
    try:
        packed = grpo.nf4_linear(layer, "cpu")
    except grpo.InputError as error:
        assert width == 48 and "rows of 48 weights wrongly" in str(error)
        return
    unpacked = functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    assert 0.02 < float((unpacked - layer.weight).norm() / layer.weight.norm()) < 0.15


def test_four_bits_need_bitsandbytes(grpo, tiny_grpo, tiny_lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(grpo.InputError, match=r"^--quantize nf4 needs bitsandbytes \(pip install bitsandbytes\): "):
        grpo.load_model(tiny_grpo(lora_rank=4, quantize="nf4"), tiny_lm)


def test_what_is_not_reached_is_said(grpo, tiny_grpo, tmp_path, capsys):
    """Experts that are one 3-D tensor are no linear layers and are not packed. PEFT adapts them, unless what it is to
    adapt is named. The load-balancing loss of the model's config is not added."""
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 16}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=27, num_experts_per_tok=2, **sizes))
    model.save_pretrained(tmp_path / "experts")
    grpo.new_tokenizer().save_pretrained(tmp_path / "experts")
    args = tiny_grpo(model=str(tmp_path / "experts"), **INT8)
    model = grpo.load_model(args, args.model)[0]
    lines = capsys.readouterr().out.splitlines()
    assert "quantized   8 of 14 weights; not experts.down_proj, experts.gate_up_proj, mlp.gate" in lines
    assert "experts     the load-balancing loss of the model's config is not added to GRPO's" in lines
    grpo.add_adapter(args, model)
    assert "adapter" not in capsys.readouterr().out
    model = grpo.load_model(args, args.model, is_compared=False)[0]
    brought = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    brought.save_pretrained(tmp_path / "adapter")
    grpo.new_tokenizer().save_pretrained(tmp_path / "adapter")
    args = grpo.replace(args, model=str(tmp_path / "adapter"))
    capsys.readouterr()
    grpo.add_adapter(args, grpo.load_model(args, args.model, is_compared=False)[0])
    left_out = "experts.down_proj, experts.gate_up_proj, mlp.gate, self_attn.k_proj, self_attn.o_proj"
    assert f"adapter     for 4 of 14 weights; not {left_out}" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_are_the_nearest(grpo, tiny_grpo, tiny_lm, dtype):
    """[G29] Each weight within half a scale of what its code stands for, a row's largest at the end of the range; every
    linear layer but the head, which is the embedding here; the rest as it was."""
    args = tiny_grpo(**INT8, dtype=dtype)
    model, plain = grpo.load_model(args, tiny_lm)[0], grpo.load_model(tiny_grpo(dtype=dtype, lora_rank=4), tiny_lm)[0]
    layers, others = quantized_layers(model), dict(plain.named_modules())
    assert len(layers) == 2 * 7 and "lm_head" not in layers
    for name, layer in layers.items():
        weight, codes, scale = others[name].weight.data.double(), layer.weight, layer.scale
        assert codes.dtype == torch.int8 and not codes.requires_grad and scale.dtype == plain.dtype
        assert int(codes.abs().amax(-1).min()) >= 126 and len(codes.unique()) > 100
        error = (codes.double() * scale.double()[:, None] - weight).abs() / scale.double()[:, None]
        assert 0.4 < float(error.max()) < 0.501
    rest = {name: x for name, x in model.named_parameters() if x.is_floating_point()}
    assert len(rest) > 5 and all(torch.equal(x, plain.get_parameter(name)) for name, x in rest.items())


def test_a_row_of_zeros_stays_one(grpo):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    model.get_output_embeddings = lambda: None
    model[0].weight.data = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 4.0]])
    bias = model[0].bias.detach().clone()
    model.get_input_embeddings = lambda: None
    grpo.quantize(model, "int8", "cpu")
    assert torch.equal(model(torch.zeros(1, 3)), bias[None])
    torch.testing.assert_close(model(torch.eye(3))[:, 1] - bias[1], torch.tensor([1.0, -2.0, 4.0]), rtol=0, atol=0.02)
    assert model(torch.eye(3))[:, 0].tolist() == [bias[0].item()] * 3


def adapter_gradients(grpo, args, model):
    """Log-probabilities of a batch, and the gradients of the adapters, which are no longer 0."""
    torch.manual_seed(5)
    grpo.add_adapter(args, model)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    adapters = {name: x for name, x in model.named_parameters() if x.requires_grad}
    for x in adapters.values():
        x.data.normal_(0.0, 0.1)
    tokens = torch.arange(3, 15).repeat(4, 1) + torch.arange(4)[:, None]
    batch = grpo.pack_rows([[4, 5, 6]], tokens, torch.ones_like(tokens), [[0, 1, 2, 3]], 4)
    model.train()
    logprobs = grpo.completion_logprobs(model, batch, 12, 1.0, 8)
    logprobs.square().sum().backward()
    return logprobs.detach(), {name: x.grad for name, x in adapters.items()}


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize(
    ("dtype", "gradient_checkpointing"), [("float32", False), ("float32", True), ("bfloat16", True)]
)
def test_gradients_through_quantized_weights(grpo, tiny_grpo, tiny_lm, dtype, gradient_checkpointing, quantize):
    """[G29] The adapters' gradients are those of the model whose weights are what the codes stand for: to 1e-4 of
    the gradient's norm in float32, to 10% in bfloat16, in which those weights themselves are rounded."""
    pytest.importorskip("peft")
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    options = {"lora_rank": 4, "quantize": quantize, "dtype": dtype}
    args = tiny_grpo(**options, gradient_checkpointing=gradient_checkpointing)
    model = grpo.load_model(args, tiny_lm)[0]
    twin = unpacked_twin(grpo, args, model)
    (logprobs, found), (twins, expected) = (adapter_gradients(grpo, args, x) for x in (model, twin))
    tolerance = 1e-4 if dtype == "float32" else 0.1
    assert float((logprobs - twins).norm()) < tolerance * float(twins.norm())
    assert len(found) == 2 * 2 * 7 and found.keys() == expected.keys()
    for name, gradient in found.items():
        assert float(gradient.norm()) > 1e-2
        assert float((gradient - expected[name]).norm()) < tolerance * float(expected[name].norm()), name


def test_no_unpacked_weight_is_kept(grpo, tiny_grpo, tiny_lm):
    """[G29] What autograd keeps of a quantized model's forward pass, weights aside, is what it keeps of a plain one."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    kept = []
    for quantize in ("none", "int8", "nf4"):
        args = tiny_grpo(lora_rank=4, quantize=quantize)
        model = grpo.load_model(args, tiny_lm)[0]
        grpo.add_adapter(args, model)
        own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
        storages = {}

        def keep(x, own=own, storages=storages):
            storage = x.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(torch.arange(3, 13).view(1, -1)).logits.square().sum()
        kept.append(sum(storages.values()))
        loss.backward()
    assert kept[0] > 10_000 and max(kept) <= 1.01 * kept[0]


def test_a_quantized_run(grpo, tiny_grpo, tiny_lm, monkeypatch):
    """[G22] [G29] Adapters learn, codes and scales keep their bytes; the reference is the quantized model with the
    adapter off, so the KL is 0 at first and not later; what is saved are adapters, which load on the plain model."""
    peft = pytest.importorskip("peft")
    models, new_optimizer, score, references = [], grpo.new_optimizer, grpo.score, []
    monkeypatch.setattr(grpo, "new_optimizer", lambda args, model: models.append(model) or new_optimizer(args, model))

    def watched(*arguments):
        references.append((arguments[2:], score(*arguments)))
        return references[-1][1]

    monkeypatch.setattr(grpo, "score", watched)
    args = tiny_grpo(**INT8, beta=0.1, steps=3)
    metrics, weights, _ = run(grpo, args)
    (model,), base = models, grpo.load_model(args, tiny_lm)[0]
    before = {name: (x.weight, x.scale) for name, x in quantized_layers(base).items()}
    after = {name.replace(".base_layer", ""): (x.weight, x.scale) for name, x in quantized_layers(model).items()}
    assert before.keys() == after.keys() and len(before) == 14
    assert all(torch.equal(x, y) for name in before for x, y in zip(before[name], after[name]))
    assert weights and all("lora_" in name for name in weights)
    assert all(x.abs().max() > 0 for name, x in weights.items() if "lora_B" in name)
    assert metrics[1]["kl/reference"] == 0 < metrics[3]["kl/reference"]
    arguments, last = references[-1]
    assert len(references) == 3 and float(last.abs().sum()) > 1
    torch.testing.assert_close(score(args, base, *arguments), last, rtol=0, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tiny_lm)
    exported = peft.PeftModel.from_pretrained(plain, Path(args.run_dir) / "policy").state_dict()
    for name, x in weights.items():
        assert torch.equal(exported[f"base_model.model.{name}"], x), name


def test_quantize_needs_an_adapter_and_linear_layers(grpo, tiny_grpo, tiny_gpt2):
    with pytest.raises(
        ValueError, match="quantize int8 freezes the weights, so that others must learn: it needs lora_rank"
    ):
        grpo.Args(quantize="int8")
    with pytest.raises(grpo.InputError, match="--quantize knows torch's linear layers, and GPT2LMHeadModel has none"):
        grpo.load_model(tiny_grpo(**INT8, model=tiny_gpt2), tiny_gpt2)


# ---- --shard and several processes ----


def two_processes(grpo, args):
    """The run as torchrun would start it, twice. Each process returns its part of the weights and of the optimizer's
    state, and the whole state that it gathered from what it had loaded of a checkpoint."""
    words = []
    for name, value in vars(args).items():
        if value is not None and value != getattr(grpo.Args(), name):
            flag = name.replace("_", "-")
            words += (
                [f"--{flag}"] if value is True else [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
            )
    worker = f"""
import importlib.util, os, sys, torch
spec = importlib.util.spec_from_file_location("script", {str(grpo.__file__)!r})
script = importlib.util.module_from_spec(spec)
sys.modules["script"] = script
spec.loader.exec_module(script)
models, optimizers, new_optimizer = [], [], script.new_optimizer
loaded, load = [], script.AdamW8bit.load_state_dict

def keep(args, model):
    models.append(model)
    optimizers.append(new_optimizer(args, model))
    return optimizers[0]

def load_and_gather(optimizer, saved):
    load(optimizer, saved)
    loaded.extend(optimizer.state_dict()["state"])

script.new_optimizer, script.AdamW8bit.load_state_dict = keep, load_and_gather
script.main()
content = {{
    "weights": {{name: script.own_part(x.detach()) for name, x in models[0].named_parameters()}},
    "state": optimizers[0].state,
    "loaded": loaded,
}}
torch.save(content, {(args.resume or args.run_dir)!r} + f".{{os.environ['RANK']}}.pt")
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", worker, *words],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [torch.load(f"{args.resume or args.run_dir}.{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.processes
def test_replicas_stay_equal(grpo, tiny_grpo):
    """[G18] Two processes with all of the weights each: rounded stochastically, in bfloat16, to the same bits."""
    args = tiny_grpo(**BF16, prompts_per_step=4, beta=0.1)
    one, two = (part["weights"] for part in two_processes(grpo, args))
    before = weights_of(grpo, args)
    assert sum(not torch.equal(x, before[name]) for name, x in one.items()) > len(before) / 2
    assert all(torch.equal(x, two[name]) for name, x in one.items())


SHARDED = {"optimizer": "adamw8bit", "prompts_per_step": 4, "beta": 0.1, "learning_rate": 1e-3, "max_grad_norm": 0.5}
SHARDED |= {"micro_batch_tokens": 60, "reduction": "token", "eval_problems": 5}


@pytest.mark.processes
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_two_shards_train_as_one_process(grpo, tiny_grpo, gradient_checkpointing):
    """[G27] Half of every parameter a process, generation and scores after gathering, an uneven number of
    micro-batches: samples, gradients' norm and weights of one process with all of it; a checkpoint for any number."""
    options = {**SHARDED, "steps": 1, "gradient_checkpointing": gradient_checkpointing}
    alone = tiny_grpo("alone", **options)
    metrics, weights, state = run(grpo, alone)
    args = tiny_grpo("both", **options, shard=True)
    processes = two_processes(grpo, args)
    parts = [process["weights"] for process in processes]
    before = weights_of(grpo, alone)
    for name, x in weights.items():
        assert sum(len(part[name]) for part in parts) == len(x) and len(parts[1][name]) <= len(parts[0][name]) < len(x)
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), x, rtol=0, atol=2e-5)
    assert max(float((x - before[name]).abs().max()) for name, x in weights.items()) > 1e-3
    saved = torch.load(Path(args.run_dir) / "checkpoint.pt", weights_only=True)
    rows = [{name: x for name, x in row.items() if not name.startswith(NOT_COMPARED)} for row in saved["metrics"]]
    for row, other in zip(metrics, rows, strict=True):
        for name in row:
            assert other[name] == pytest.approx(row[name], rel=1e-3, abs=1e-5), name
    for name, x in weights.items():
        torch.testing.assert_close(saved["policy"][name], x, rtol=0, atol=2e-5)
        assert torch.equal(saved["policy"][name], torch.cat([part[name] for part in parts]))
    for i, (own, kept) in enumerate(zip(state["state"], saved["optimizer"]["state"], strict=True)):
        assert [x.shape for x in own] == [x.shape for x in kept]
        codes = own[1].float() - kept[1].float()
        assert codes.abs().mean() < 0.1
        halves = zip(*(process["state"][i] for process in processes), strict=True)
        assert all(torch.equal(x, torch.cat(half)) for x, half in zip(kept, halves, strict=True))
    exported = AutoModelForCausalLM.from_pretrained(Path(args.run_dir) / "policy")
    assert type(exported).__name__ == "Qwen3ForCausalLM" == exported.config.architectures[0]
    assert all(torch.equal(x, saved["policy"][name]) for name, x in exported.named_parameters())


def prolong(args):
    """The run's checkpoint, to go on for one step more."""
    path = Path(args.run_dir) / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["args"]["steps"] = args.steps + 1
    torch.save(saved, path)


@pytest.mark.processes
def test_a_checkpoint_fits_any_number_of_processes(grpo, tiny_grpo):
    """[G27] Two steps by two processes and a third by one, or the other way round: near three by one. The state that
    moves from one number to the other keeps its bits."""
    options = {**SHARDED, "anneal_lr": False}
    straight = run(grpo, tiny_grpo("straight", **options, steps=3))[1]
    began_as_two, began_as_one = tiny_grpo("two", **options, steps=2, shard=True), tiny_grpo("one", **options, steps=2)
    two_processes(grpo, began_as_two)
    grpo.train(began_as_one)
    prolong(began_as_two)
    prolong(began_as_one)
    grpo.train(grpo.replace(grpo.resumed_args(began_as_two.run_dir), shard=False))
    kept = torch.load(Path(began_as_one.run_dir) / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    for process in two_processes(grpo, grpo.replace(grpo.resumed_args(began_as_one.run_dir), shard=True)):
        for own, other in zip(kept, process["loaded"], strict=True):
            assert all(torch.equal(*pair) for pair in zip(own, other, strict=True))
    before = weights_of(grpo, began_as_one)
    for args in (began_as_two, began_as_one):
        saved = torch.load(Path(args.run_dir) / "checkpoint.pt", weights_only=True)
        assert saved["step"] == 3
        moved = torch.cat([(x - before[name]).flatten() for name, x in straight.items()])
        apart = torch.cat([(x - saved["policy"][name]).flatten() for name, x in straight.items()])
        assert moved.norm() > 0.05 and apart.norm() < 0.01 * moved.norm()


def test_shard_needs_processes(grpo, tiny_grpo):
    with pytest.raises(grpo.InputError, match="--shard needs several processes"):
        grpo.train(tiny_grpo(optimizer="adamw8bit", shard=True))
    with pytest.raises(
        ValueError, match="shard splits the weights and the 8-bit state of all of them: it does not go with"
    ):
        grpo.Args(shard=True, optimizer="adamw")


# ---- The step of a token as a GPU replays it ----


@pytest.mark.parametrize("group_size", [2, 4])
def test_fixed_shapes_sample_the_same(grpo, tiny_grpo, tiny_lm, monkeypatch, group_size):
    """[G28] Attention over the cache's full length, rows that stay when they are done until half are: the tokens of
    the growing cache, prompts of several lengths, several EOS."""
    model = grpo.load_model(tiny_grpo(), tiny_lm)[0]
    prompts, noise = (
        [[4, 5, 6], [7], [8, 3, 4, 12, 9]] * 2,
        torch.rand(6 * group_size, 14, generator=torch.Generator().manual_seed(0)),
    )
    sizes, fixed_step = [], grpo.fixed_step

    def watched(model, cache, token, *rest):
        sizes.append(len(token))
        return fixed_step(model, cache, token, *rest)

    monkeypatch.setattr(grpo, "fixed_step", watched)
    growing = grpo.generate(model, prompts, noise, 0.9, [1, 5, 9], 0)
    assert sizes == []
    fixed = grpo.generate(model, prompts, noise, 0.9, [1, 5, 9], 0, is_fixed=True)
    assert sizes[0] > len(prompts) * group_size // 2 and len(sizes) > 1
    assert all(2 * after <= before for before, after in pairwise(sizes))
    assert torch.equal(growing[0], fixed[0]) and torch.equal(growing[2], fixed[2])
    assert len(growing[2].sum(-1).unique()) > 2
    torch.testing.assert_close(growing[1], fixed[1], rtol=0, atol=1e-5)
