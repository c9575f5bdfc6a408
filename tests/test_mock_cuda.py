"""What waits for a GPU, on a mock one: a device "cuda" in host memory (tests/mock_cuda)."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from contract import ROOT

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has a CUDA of its own"),
]
QUICK = {
    "ppo_cartpole.py": "--total-timesteps 3000 --eval-episodes 3",
    "ppo_atari.py": "--num-envs 2 --num-steps 16 --total-timesteps 64",
    "rlhf_gpt2_ppo.py": "--num-texts 200 --sft-steps 2 --reward-steps 2 --ppo-iterations 1",
    "grpo_llm.py": "--warm-start-steps 2 --steps 2 --eval-problems 16",
}


def on_mock_cuda(*command, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "mock_cuda"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, **more)


@pytest.mark.parametrize(
    "line, refusal",
    [
        ("torch.ones(2, device='cuda') + torch.ones(2)", "on the same device"),
        ("torch.ones(2, 2, device='cuda') @ torch.ones(2, 2)", "on the same device"),
        ("torch.ones(4, device='cuda').gather(0, torch.tensor([1]))", "on the same device"),
        ("torch.ones(4)[torch.tensor([1], device='cuda')]", "indices should be"),
        ("torch.rand(4, device='cuda', generator=torch.Generator())", "generator"),
        ("torch.ones(4, device='cuda').numpy()", "to host memory"),
        ("capture(lambda: int(x.sum()))", "not permitted when stream is capturing"),
        ("capture(lambda: x.add_(torch.ones(2).cuda()))", "not permitted when stream is capturing"),
        ("torch.cuda.set_per_process_memory_fraction(1e-4); torch.empty(10**7, device='cuda')", "out of memory"),
    ],
)
def test_it_refuses_what_a_gpu_refuses(line, refusal):
    setting = """
import torch
def capture(function):
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        function()
x = torch.ones(2, device="cuda")
print("ready")
"""
    run = on_mock_cuda("-c", setting + line)
    assert run.returncode == 1 and run.stdout == "ready\n", run.stderr
    assert refusal in run.stderr.splitlines()[-1], run.stderr


def test_it_counts_memory_and_replays_graphs():
    lines = """
import torch
before = torch.cuda.memory_allocated()
x, big = torch.arange(3.0, device="cuda"), torch.empty(1000, device="cuda")
assert torch.cuda.memory_allocated() - before == 512 + 4096
del big
assert torch.cuda.memory_allocated() - before == 512 and torch.cuda.max_memory_allocated() - before == 512 + 4096
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = (x[1:] * 2).exp()
x.copy_(torch.tensor([0.0, 0.5, 1.0]))
graph.replay()
assert torch.equal(y.cpu(), torch.tensor([1.0, 2.0]).exp())
"""
    run = on_mock_cuda("-c", lines)
    assert run.returncode == 0, run.stderr


def test_the_gpu_tests():
    run = on_mock_cuda("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_grpo_gpu.py", cwd=ROOT)
    assert run.returncode == 0 and "6 passed" in run.stdout, run.stdout


@pytest.mark.parametrize("script", QUICK)
def test_a_run_and_its_resumption(script, tmp_path):
    """Every tensor where it must be, in training, evaluation, checkpoint and resumption. CartPole's run saves its
    weights and has no resumption: they are played again."""
    saved, again = "checkpoint.pt", ("--resume", "run")
    if script == "ppo_cartpole.py":
        saved, again = "model.pt", ("--evaluate", "run/model.pt", "--eval-episodes", "2")
    arguments = (str(ROOT / script), "--device", "cuda")
    run = on_mock_cuda(*arguments, *QUICK[script].split(), "--run-dir", "run", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    places = set()
    path = tmp_path / "run" / saved
    torch.load(path, map_location=lambda storage, place: places.add(place) or storage, weights_only=True)
    assert "cuda:0" in places  # what was trained was there
    resumed = on_mock_cuda(*arguments, *again, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr


def test_a_run_that_does_not_fit_at_first(tmp_path):
    """Under a cap of 60% of what it took: sampling, then learning is halved until it fits, and the run ends well."""
    code = """
import runpy, sys, torch
limit = float(sys.argv.pop(1))
if limit:
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
runpy.run_path(sys.argv[0], run_name="__main__")
print("peak", torch.cuda.max_memory_allocated())
"""
    words = f"--device cuda {QUICK['grpo_llm.py']} --group-size 24 --warm-start-batch-size 4".split()
    words += ["--micro-batch-tokens", "8192"]

    def run(limit, name):
        script = ["-c", f"import sys; sys.argv.pop(0)\n{code}", str(ROOT / "grpo_llm.py"), str(limit)]
        done = on_mock_cuda(*script, *words, "--run-dir", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout, int(done.stdout.split("peak ")[1])

    out, peak = run(0, "whole")
    assert "ran out" not in out
    out, less = run(0.6 * peak, "halves")
    assert "memory      it ran out: --" in out and less <= 0.6 * peak
    saved = torch.load(tmp_path / "halves" / "checkpoint.pt", map_location="cpu", weights_only=True)
    assert saved["step"] == 2


NO_FLOAT64 = """
import importlib, sys, torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            if isinstance(x, torch.Tensor) and x.is_cuda and x.dtype is torch.float64:
                raise TypeError(f"float64 on the device: {function}")
        return output

sys.path.insert(0, sys.argv[1])
script = importlib.import_module(sys.argv[2])
sys.argv = sys.argv[2:]
with NoFloat64():
    try:
        torch.ones(2, dtype=torch.float64).to("cuda")
    except TypeError:
        script.main()
    else:
        sys.exit("float64 was not refused")
"""
SMALL = ["--no-cuda-graph", "--prompts-per-step", "2", "--max-tokens", "12"]
MANY_FLAGS = "--supervision process --beta 0.1 --num-minibatches 2 --dtype bfloat16 --no-fast"


@pytest.mark.parametrize(
    ("script", "more"), [*((script, "") for script in QUICK if script != "grpo_llm.py"), ("grpo_llm.py", MANY_FLAGS)]
)
def test_no_float64_reaches_the_device(script, more, tmp_path):
    """Apple's mps has none, and only an Apple has mps. Here the mock device refuses it as mps does."""
    words = [*QUICK[script].split(), *more.split(), *SMALL * (script == "grpo_llm.py")]
    program = ("-c", NO_FLOAT64, str(ROOT), script.removesuffix(".py"))
    run = on_mock_cuda(*program, "--device", "cuda", *words, "--run-dir", "run", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run").is_dir()
