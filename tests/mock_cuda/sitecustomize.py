"""A mock CUDA device: a test double for a GPU, on a machine that has none.

Run      PYTHONPATH=tests/mock_cuda python benchmarks/gpu/run.py --rehearse
         PYTHONPATH=tests/mock_cuda python -m pytest tests/test_grpo_gpu.py
         PYTHONPATH=tests/mock_cuda python ppo_cartpole.py --device cuda          (any script, any command)
Needs    g++ and PyTorch's CPU build; the first use compiles device.cpp, for about a minute

Python imports this file at its start. Then there is a device "cuda", 80 GB, whose tensors lie in host memory and are
computed by the CPU. It has of a GPU what programs get wrong before they first see one:

    tensors of its own, that no operator mixes with the host's, save for numbers and indices
    memory that is counted, in blocks of 512 bytes, and refused above set_per_process_memory_fraction
    page-locked memory that knows that it is
    graphs that replay what was captured on the tensors of then, and refuse to capture a wait for the device

It has no speed, no fragments, no workspaces, no kernels of its own (attention is the CPU's fused one), no NCCL.
"""

import contextlib
import fcntl
import importlib.util
import subprocess
import sys
import sysconfig
import types
import weakref
import zlib
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.cpp_extension import include_paths, library_paths
from torch.utils.weak import WeakIdKeyDictionary

TOTAL = 80 * 10**9
SOURCE = Path(__file__).with_name("device.cpp")


def compiled():
    """The module of device.cpp, compiled once for each version of PyTorch and of the file, by one process at a time."""
    stamp = f"{torch.__version__}-{sys.version_info.minor}-{zlib.crc32(SOURCE.read_bytes())}"
    library = SOURCE.parent / "__pycache__" / f"device-{stamp}.so"
    library.parent.mkdir(exist_ok=True)
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            flags = ["-shared", "-fPIC", "-std=c++20", "-O1", "-w", "-DTORCH_EXTENSION_NAME=mock_cuda"]
            folders = [f"-I{folder}" for folder in (*include_paths(), sysconfig.get_path("include"))]
            libraries = [*(f"-L{folder}" for folder in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch_python"]
            partial = library.with_suffix(".tmp")
            subprocess.run(["g++", *flags, *folders, str(SOURCE), *libraries, "-o", str(partial)], check=True)
            partial.rename(library)
    spec = importlib.util.spec_from_file_location("mock_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Capture(TorchDispatchMode):
    """What runs meanwhile goes on the tape: operators, their arguments, and which of their outputs these were."""

    WAITS = ("copy to host", "copy to device", "aten::_local_scalar_dense", "aten::nonzero")

    def __init__(self):
        super().__init__()
        self.tape, self.slots, self.outputs = [], WeakIdKeyDictionary(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = [device.calls().get(name, 0) for name in self.WAITS]
        call = tree_map(self.slot_of, (args, kwargs or {}))
        output = function(*args, **(kwargs or {}))
        if waits != [device.calls().get(name, 0) for name in self.WAITS]:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {function}")
        made = []
        for x in tree_leaves(output):
            if isinstance(x, torch.Tensor):
                self.slots[x] = len(self.outputs)
                self.outputs.append(weakref.ref(x))
            made.append(self.slot_of(x))
        self.tape.append((function, call, made))
        return output

    def slot_of(self, x):
        return Slot(self.slots[x]) if isinstance(x, torch.Tensor) and x in self.slots else x


class Slot(int):
    """The place of a captured output, in place of the tensor."""


class Graph:
    def keep(self, mode):
        self.outputs, self.tape, later = mode.outputs, [], set()
        for function, call, made in reversed(mode.tape):
            slots = {x for x in tree_leaves((call, made)) if isinstance(x, Slot)}
            self.tape.insert(0, (function, call, made, slots - later))  # the last are not used again: memory is freed
            later |= slots

    def replay(self):
        held = {}
        for function, call, made, spent in self.tape:
            args, kwargs = tree_map(lambda x: held[x] if isinstance(x, Slot) else x, call)
            for slot, x in zip(made, tree_leaves(function(*args, **kwargs))):
                if isinstance(slot, Slot):
                    first = self.outputs[slot]()  # what was captured and is still held gets the new content
                    if first is not None and first.data_ptr() != x.data_ptr():
                        x = first.copy_(x)
                    held[slot] = x
            args = kwargs = x = first = None
            for slot in spent:
                held.pop(slot, None)


class capture:
    """torch.cuda.graph."""

    def __init__(self, graph):
        self.graph, self.mode = graph, Capture()

    def __enter__(self):
        self.mode.__enter__()

    def __exit__(self, *error):
        self.mode.__exit__(*error)
        self.graph.keep(self.mode)


class Stream:
    def __init__(self, *_):
        pass

    def wait_stream(self, stream):
        pass


class Device(contextlib.nullcontext):
    """torch.cuda.device, of which there is one."""


host_attention = torch.nn.functional.scaled_dot_product_attention


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if not query.is_cuda:
        settings = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
        return host_attention(query, key, value, **settings, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


if torch.version.cuda:
    sys.exit("the mock CUDA device needs PyTorch's CPU build: this one has CUDA of its own")
device = compiled()
properties = types.SimpleNamespace(name="Mock CUDA", total_memory=TOTAL, major=8, minor=0, multi_processor_count=1)
nothing = {"_lazy_init", "set_device", "manual_seed", "manual_seed_all", "synchronize", "empty_cache", "check_error"}
constant = {
    "is_available": True,
    "is_initialized": True,
    "is_bf16_supported": True,
    "_is_in_bad_fork": False,
    "device_count": 1,
    "current_device": 0,
    "get_device_name": properties.name,
    "get_device_capability": (8, 0),
    "get_device_properties": properties,
    "cudart": types.SimpleNamespace(
        cudaHostRegister=lambda pointer, *_: device.pin(pointer), cudaHostUnregister=device.unpin
    ),
}
for name, answer in {**constant, **dict.fromkeys(nothing)}.items():
    setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
torch.cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
torch.cuda.memory_allocated = lambda *_: device.alive()
torch.cuda.max_memory_allocated = torch.cuda.max_memory_reserved = lambda *_: device.peak()
torch.cuda.reset_peak_memory_stats = lambda *_: device.reset_peak()
torch.cuda.set_per_process_memory_fraction = lambda fraction, *_: device.set_limit(int(fraction * TOTAL))
torch.cuda.mem_get_info = lambda *_: (TOTAL - device.alive(), TOTAL)
torch.cuda.Stream, torch.cuda.device = Stream, Device
torch.cuda.current_stream, torch.cuda.stream = (lambda *_: Stream()), contextlib.nullcontext
torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture
torch.nn.functional.scaled_dot_product_attention = attention

# bitsandbytes would look for the kernels of a real GPU; PEFT imports it wherever it is installed
sys.modules["bitsandbytes"] = None
