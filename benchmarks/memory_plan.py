"""How much memory a run of grpo_llm.py needs, counted before anything is downloaded or trained.

Run      python benchmarks/memory_plan.py --model Qwen/Qwen2.5-7B-Instruct --plan 256 --gpu-memory 24 …
         All other flags are those of grpo_llm.py. --plan is the length of a prompt in tokens.
Prints   a table in GB (1e9 bytes): what lies on the device and on the host, and the peak of each phase of a step

The phases of a step run on tensors without content (PyTorch's FakeTensorMode), so what is counted is what the code
does: scoring and learning from the longest micro-batches, the prefill and the last token of the largest batch of
samples, and the optimizer's update. A reward model is not counted. The models in benchmarks/qwen2.5.json need no
download. Any other model needs its config.json, from the Hub or in a directory.
"""

import json
import os
import sys
import warnings
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import grpo_llm  # noqa: E402

GPU_CONTEXT = 0.8e9  # bytes that a GPU holds before the first tensor. Assumed: it differs by card and driver
SHAPES = json.loads((ROOT / "benchmarks" / "qwen2.5.json").read_text(encoding="utf-8"))
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 1e6}
QWEN |= {"max_position_embeddings": 32768, "hidden_act": "silu", "attention_dropout": 0.0}  # what the shapes share


@dataclass(frozen=True, kw_only=True)
class PlanArgs(grpo_llm.Args):
    # the plan
    plan: int  # tokens of a prompt
    gpu_memory: float = 0.0  # GB of the card that the peak is compared with; 0: none, and nothing is added for a GPU

    def __post_init__(self):
        super().__post_init__()
        if self.plan < 1:
            raise ValueError(f"plan must be above 0, got {self.plan}")
        if not self.gpu_memory >= 0:
            raise ValueError(f"gpu_memory must not be negative, got {self.gpu_memory}")
        if not self.fast:
            raise ValueError("the memory plan is that of the fast path: no_fast cannot be planned")


def counter_of_bytes(known):
    """A context that counts the bytes of the tensors made in it: .alive now, .peak at most. The known ones are free."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    seen = weakref.WeakSet(x.untyped_storage() for x in known)

    class Counter(TorchDispatchMode):
        alive = peak = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._grouped_mm.default:  # experts: its fake form takes bfloat16 alone
                as_bfloat16 = [x.bfloat16() for x in args[:2]]
                output = function(*as_bfloat16, *args[2:], **(kwargs or {})).to(args[0].dtype)
            else:
                output = function(*args, **(kwargs or {}))
            for x in tree_leaves(output):
                if isinstance(x, torch.Tensor) and (storage := x.untyped_storage()) not in seen:
                    seen.add(storage)
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self.free, storage.nbytes())
            self.peak = max(self.peak, self.alive)
            return output

        def free(self, count):
            self.alive -= count

    return Counter()


def shape_of(name):
    """The configuration of a model in benchmarks/qwen2.5.json, by its name there or on the Hub; None for any other."""
    if name is None or Path(name).is_dir():
        return None
    return SHAPES.get(name.removeprefix("Qwen/").removesuffix("-Instruct"))


def model_without_content(args):
    """The policy, made from its configuration alone. On the meta device its weights are shapes without content."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if args.model is None:
        model = grpo_llm.new_model(grpo_llm.new_tokenizer())
    else:
        if shape := shape_of(args.model):
            own = {key: x for key, x in (QWEN | shape).items() if key != "architectures"}
            config = AutoConfig.for_model(**own, name_or_path=args.model)
        else:
            config = grpo_llm.from_disk("AutoConfig", grpo_llm.base_of_adapter(args.model) or args.model)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    model = grpo_llm.without_dropout(model).eval()
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if args.quantize != "none":
        grpo_llm.quantize(model, args.quantize, "meta")
    if args.lora_rank:
        with warnings.catch_warnings(action="ignore"):  # the weights of a saved adapter are not needed
            known = replace(args, model=None, task="arithmetic", data=None) if shape_of(args.model) else args
            grpo_llm.add_adapter(known, model)
    return model


def nf4_without_content(weight):
    """A weight as bitsandbytes keeps it in NF4: 4-bit codes, an 8-bit scale for each block, and scales of the scales. A
    block has 64 weights, or 32 if 64 does not divide a row (grpo_llm.nf4_linear)."""
    from bitsandbytes.functional import QuantState

    block = 32 if weight.shape[-1] % 64 else 64
    num_scales = -(-weight.numel() // block)
    outer = torch.empty(-(-num_scales // 256))
    outer = QuantState(outer, code=torch.empty(256), blocksize=256, dtype=torch.float32)
    inner = torch.empty(num_scales, dtype=torch.uint8)
    packed = torch.nn.Parameter(torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = QuantState(
        inner,
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=block,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=torch.empty(()),
        state2=outer,
    )
    return packed


def fill_with_fake_tensors(model):
    """Replace meta tensors, under FakeTensorMode, by fake tensors of a CPU, on which attention is the fused kernel."""
    made = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, x in own.items():
                if x is not None and x not in made:
                    new = torch.empty(x.shape, dtype=x.dtype)
                    made[x] = torch.nn.Parameter(new, x.requires_grad) if own is module._parameters else new
                    if hasattr(x, "quant_state"):  # bitsandbytes does not pack weights on the meta device
                        made[x] = nf4_without_content(new)
                own[name] = None if x is None else made[x]  # a tied weight stays one


def bytes_of_weights(model):
    """Of parameters and buffers, and of the scales that bitsandbytes keeps beside its 4-bit codes."""
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    states = [x.quant_state for x in model.parameters() if hasattr(x, "quant_state")]
    own = [x for state in states for x in (state.absmax, state.code, state.offset, state.state2.absmax)]
    return weights + sum(x.nbytes for x in own)


@torch.no_grad()
def sample_both_ends(args, model, num_prompts, prompt_tokens, group_size):
    """The two largest steps of generate(): the prefill, and the last token of full-length rows. Bytes of the cache."""
    num_rows, length = num_prompts * group_size, prompt_tokens + args.max_tokens
    cache, head = grpo_llm.new_cache(model, num_rows, length), model.get_output_embeddings()
    for rows, new_tokens, seen in ((num_prompts, prompt_tokens, prompt_tokens), (num_rows, 1, length)):
        ids = torch.zeros(rows, new_tokens, dtype=torch.long)
        attention_mask = torch.ones(rows, 1, new_tokens, seen, dtype=torch.bool)
        masks = grpo_llm.attention_masks(model, attention_mask, ids, torch.zeros(1, seen, dtype=torch.long))
        states = grpo_llm.last_states(model, ids, ids, masks, cache)
        logits = head(states[:, -1]).repeat_interleave(num_rows // rows, 0)
        grpo_llm.sample_token(logits, torch.zeros(num_rows), args.temperature)
        for layer in cache.layers:
            layer.used = length - 1
    return sum(room.nbytes for layer in cache.layers for room in layer.room)


def chosen(args, gpu_memory=0.0):
    """(args, {field: why}) with the settings that a run would choose. A card that is planned for counts as found."""
    args = replace(args, device=args.device or ("cuda" if gpu_memory else None))
    if not gpu_memory:
        args = replace(args, offload=bool(args.offload))
    size = None
    if args.model and None in (args.learning_rate, args.gradient_checkpointing, args.offload):
        plain = replace(args, dtype="float32", optimizer=None, lora_rank=0, quantize="none", save_merged=False)
        with torch.device("meta"):
            size = sum(x.numel() for x in model_without_content(plain).parameters())
    try:
        return grpo_llm.chosen(args, size=size, free=gpu_memory * 1e9 - GPU_CONTEXT)
    except grpo_llm.InputError:
        if args.offload is not None:
            raise
        return grpo_llm.chosen(replace(args, offload=False), size=size)  # it does not fit: the plan tells by how much


def memory_plan(args, prompt_tokens, gpu_memory=0.0):
    """{what: (bytes on the device, bytes on the host)}, the peaks of a step's phases last [G26].

    args: an Args of grpo_llm. gpu_memory above 0, or a device cuda, adds what a GPU takes beside the tensors. What the
    Args leave open is chosen as a run chooses it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_map_only

    args, _ = chosen(args, gpu_memory)
    Q, T, G = prompt_tokens, args.max_tokens, args.group_size
    P = max(args.prompts_per_step // int(os.environ.get("WORLD_SIZE", 1)), 1)
    for_gpu = bool(gpu_memory) or args.device.startswith("cuda")
    fake = FakeTensorMode()
    with torch.device("meta"):
        model = model_without_content(args)
    with fake:
        fill_with_fake_tensors(model)
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        optimizer = grpo_llm.new_optimizer(replace(args, offload=False), model)
    weights = bytes_of_weights(model)
    is_adapter = args.model and not shape_of(args.model) and grpo_llm.base_of_adapter(args.model)
    if args.beta and args.lora_rank and is_adapter:
        weights += sum(x.nbytes for x in trained)  # the adapter as it began, which is the reference
    gradients, largest = sum(x.nbytes for x in trained), max(x.nbytes for x in trained)
    state = 2 * gradients if args.optimizer == "adamw" else sum(x.nbytes for own in optimizer.state for x in own)
    reference = weights if args.beta and not args.lora_rank else 0

    # Learning from the two longest micro-batches, and scoring the first
    on_device = replace(args, device="cuda" if for_gpu else "cpu")
    rows = grpo_llm.plan_for(on_device, model, [Q] * P, dict.fromkeys(range(P * G), T), G)
    tokens = torch.zeros(P * G, T, dtype=torch.long)
    batch = grpo_llm.pack_rows([[0] * Q] * P, tokens, torch.ones_like(tokens), rows[0], G)
    batch = tree_map_only(torch.Tensor, fake.from_tensor, batch)
    settings = T, args.temperature, args.logprob_tokens
    with fake, torch.no_grad(), counter_of_bytes(parameters) as scoring:
        grpo_llm.completion_logprobs(model, batch, *settings)
    for parameter in trained if args.offload else ():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    model.train()
    with fake, counter_of_bytes(parameters) as learning:
        for _ in rows[:2]:
            grpo_llm.completion_logprobs(model, batch, *settings).sum().backward()
    model.eval()
    for parameter in trained:
        parameter.grad = None

    # Sampling, for training and for both kinds of evaluation
    sampling = cache = 0
    for num_prompts, group_size in {(P, G), (args.eval_problems, 1), (args.eval_problems, args.eval_samples)}:
        num_prompts = min(num_prompts, max(args.generate_rows // group_size, 1))
        with fake, counter_of_bytes(parameters) as counter:
            cache = max(cache, sample_both_ends(args, model, num_prompts, Q, group_size))
        sampling = max(sampling, counter.peak)

    # The update of a large parameter. torch's AdamW needs nothing beside its state
    with fake:
        rows = max(min(1 << 25, largest // trained[0].itemsize) // 256, 1)
        parameter = torch.nn.Parameter(torch.zeros(rows, 256, dtype=trained[0].dtype))
        parameter.grad = torch.zeros_like(parameter)
        update = grpo_llm.new_optimizer(replace(args, offload=False), torch.nn.ParameterList([parameter]))
        if args.optimizer == "adamw8bit":
            update.at_once = 1 << 24 if for_gpu else update.at_once
            with counter_of_bytes([parameter, parameter.grad, *update.state[0]]) as updating:
                update.step()

    away = args.offload
    held = largest if away else gradients
    visiting = max(x.nbytes for x in parameters) if reference and away else reference
    context = GPU_CONTEXT if for_gpu else 0
    always = weights + (0 if away else state + reference) + context
    table = {
        "weights": (weights, 0),
        "gradients": (held, gradients if away else 0),
        "optimizer state": (0, state) if away else (state, 0),
        "reference": (visiting, reference if away else 0),
        "keys and values": (cache, 0),
        "activations and logits": (learning.peak - held, 0),
        "GPU context, assumed": (context, 0),
    }
    host = sum(on_host for _, on_host in table.values())
    has_scoring = args.beta or args.updates > 1
    peaks = {
        "peak of sampling": sampling,
        "peak of scoring": scoring.peak + (visiting if away else 0) if has_scoring else 0,
        "peak of learning": learning.peak,
        "peak of the update": gradients,
    }
    if args.optimizer == "adamw8bit":
        peaks["peak of the update"] = updating.peak + (0 if away else gradients)
    table |= {name: (always + more, host) for name, more in peaks.items() if more}
    return table | {"peak": max(row for name, row in table.items() if name.startswith("peak"))}


def print_plan(plan, gpu_memory=0.0):
    print(f"{'GB':38}{'device':>15}{'host':>10}")
    for name, (device, host) in plan.items():
        print(f"{name:38}{device / 1e9:15.3f}{host / 1e9:10.3f}")
    if gpu_memory:
        spare = gpu_memory - plan["peak"][0] / 1e9
        fits = f"fits, {spare:.1f} to spare" if spare >= 0 else f"does not fit, {-spare:.1f} too many"
        print(f"of {gpu_memory:g} GB: {fits}")


def main():
    import tyro

    grpo_llm.guard_output()
    args = tyro.cli(PlanArgs, description=__doc__.splitlines()[0], config=(tyro.conf.DisallowNone,))
    try:
        args, why = chosen(args, args.gpu_memory)
        grpo_llm.print_choices(args, why)
        print_plan(memory_plan(args, args.plan, args.gpu_memory), args.gpu_memory)
    except (grpo_llm.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
