"""What the four scripts share around their training: files written whole, run directories, terminals, pipes."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

FIXTURES = ("cartpole", "atari", "rlhf", "grpo")


@pytest.fixture(params=FIXTURES)
def script(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=FIXTURES[1:])
def long_script(request):
    """One of the scripts whose runs take long, so that they write checkpoints and survive a pipe that breaks."""
    return request.getfixturevalue(request.param)


# ---- Files ----


def test_a_full_disk_leaves_the_former_checkpoint_and_nothing_else(script, tmp_path, monkeypatch):
    """torch.save raises a RuntimeError there, others an OSError: both end in one sentence that names the file."""
    path = tmp_path / "checkpoint.pt"
    script.save(path, {"generation": 1})
    for error in (OSError(28, "No space left on device"), RuntimeError("unexpected pos 49152 vs 49044")):

        def save_half(content, target, error=error):
            Path(target).write_bytes(b"half")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", save_half)
            with pytest.raises(OSError, match=r"checkpoint\.pt could not be written, with [\d.]+ MB free"):
                script.save(path, {"generation": 2})
        assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
        assert torch.load(path, weights_only=True) == {"generation": 1}
    script.save(path, {"generation": 3})
    assert torch.load(path, weights_only=True) == {"generation": 3}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_directory_is_replaced_whole_or_not_at_all(long_script, tmp_path, error):
    path = tmp_path / "policy"
    for content in ("old", None, "new"):
        try:
            with long_script.written_aside(path) as temporary:
                temporary.mkdir()
                (temporary / "weights").write_text(content or "half")
                if content is None:
                    raise error
        except (OSError, KeyboardInterrupt):
            assert content is None and (path / "weights").read_text() == "old"
        assert [file.name for file in tmp_path.iterdir()] == ["policy"]
    assert (path / "weights").read_text() == "new"


def test_a_full_disk_when_a_model_is_saved(grpo, rlhf, tmp_path):
    class Model:
        def __init__(self, is_full=False):
            self.is_full = is_full

        def state_dict(self):
            return {}

        def save_pretrained(self, directory, **options):
            Path(directory).mkdir(exist_ok=True)
            (Path(directory) / "model.safetensors").write_text("half" if self.is_full else "whole")
            if self.is_full:
                raise Exception("I/O error: No space left on device")  # safetensors' is no OSError

    for number, module in enumerate((grpo, rlhf)):
        directory = tmp_path / str(number) / "policy"
        directory.parent.mkdir()
        module.save_model(directory, Model(), Model())
        with pytest.raises(OSError, match="policy could not be written"):
            module.save_model(directory, Model(is_full=True), Model())
        assert [path.name for path in directory.parent.iterdir()] == ["policy"]
        assert (directory / "model.safetensors").read_text() == "whole"


# ---- Run directories ----


def test_of_runs_that_start_together_one_gets_the_directory(script, tmp_path):
    """Eight at once, all of which found it free: mkdir decides, the others are refused."""
    barrier, ends = threading.Barrier(8), []

    def start():
        barrier.wait()
        try:
            script.make_run_dir(tmp_path / "new" / "run")
            ends.append("made")
        except script.InputError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ends) == 8 and ends.count("made") == 1
    assert all(end == "made" or "exists: choose another" in end for end in ends)


def test_runs_of_one_second_have_names_of_their_own(script):
    args = script.Args()
    assert len({script.new_run_dir(args) for _ in range(20)}) == 20


# ---- Terminals ----


def test_a_terminal_that_lacks_letters(long_script, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    long_script.guard_output()
    print("λ is 0.95 – and ε é")
    sys.stdout.flush()
    assert raw.getvalue().decode("cp1252") == "? is 0.95 – and ? é" + os.linesep


def run_into_a_closed_pipe(path, *flags):
    """(exit status, standard error) of a script whose reader has left before it prints."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(path), *map(str, flags)]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    return run.returncode, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FIXTURES, "gae_reference"])
def test_help_into_a_pipe_that_nobody_reads(request, name):
    path, flags = Path(__file__).parent.parent / "gae_reference.py", ()
    if name != "gae_reference":
        path, flags = request.getfixturevalue(name).__file__, ("--help",)
    assert run_into_a_closed_pipe(path, *flags) == (0, "")


@pytest.mark.slow
def test_a_run_whose_reader_leaves_saves_weights_and_plot(cartpole, tmp_path):
    sizes = ["--total-timesteps", 600, "--num-envs", 4, "--eval-episodes", 2]
    status, error = run_into_a_closed_pipe(cartpole.__file__, *sizes, "--run-dir", tmp_path / "run")
    assert status == 0 and "Broken pipe" not in error and "Exception" not in error
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"model.pt", "learning_curve.png"}


def test_the_reference_prints_to_any_terminal():
    path = Path(__file__).parent.parent / "gae_reference.py"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and run.stderr == "" and "1. Generalized advantage estimation, ? = 0.9" in run.stdout


# ---- Apple's mps: nobody has tried it, but a run must begin ----


class Reached(Exception):
    pass


@pytest.mark.parametrize("name", FIXTURES[:3])
def test_what_varies_on_mps_is_a_warning(request, name, monkeypatch, tmp_path):
    """mps has no deterministic form of some operations of every update: refused, no run could learn."""
    script, found = request.getfixturevalue(name), {}

    def stop(mode, *, warn_only=False):
        found[device] = mode, warn_only
        raise Reached

    monkeypatch.setattr(script, "check_device", lambda device: None)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", stop)
    for device in ("cpu", "cuda", "mps"):
        with pytest.raises(Reached):
            script.train(script.Args(device=device, torch_threads=1, run_dir=str(tmp_path / device)))
    assert found == {"cpu": (True, False), "cuda": (True, False), "mps": (True, True)}


def test_a_device_that_is_not_there_is_named(script):
    with pytest.raises(script.InputError, match=r"^--device mps is not available: .{1,100}$"):
        script.check_device("mps" if not torch.backends.mps.is_available() else pytest.skip("this machine has mps"))


def test_what_is_chosen_on_mps(grpo, atari, capsys):
    """float32, torch's AdamW and no bfloat16 convolutions. mps is never chosen; torch has its fused AdamW there."""
    args, why = grpo.chosen(grpo.Args(model="m", task="countdown", device="mps"), size=1e9)
    assert (args.device, args.dtype, args.optimizer) == ("mps", "float32", "adamw")
    assert why["dtype"] == "untried: bfloat16 on mps" and args.gradient_checkpointing is False
    assert atari.without_slow_bf16(atari.Args(device="mps"), "mps").bf16 is False
    assert capsys.readouterr().out == "bf16        off: it is untried on mps\n"
    assert atari.without_slow_bf16(atari.Args(device="cuda"), "cuda").bf16 is True
    assert "mps" in torch.utils._foreach_utils._get_fused_kernels_supported_devices()
    with torch.autocast("mps", enabled=False):  # as the Atari network does
        pass
