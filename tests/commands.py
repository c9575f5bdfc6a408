"""Scripts as commands: their flags, and two processes as torchrun starts them."""

import os
import socket
import subprocess
import sys

from contract import ROOT


def flags(script, args, *left_out):
    """Command-line flags of what these settings change."""
    words = []
    for name, value in vars(args).items():
        if value == getattr(script.Args(), name) or name in left_out:
            continue
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def two_processes(*words):
    """What `python WORDS` prints as process 0 and as process 1 of two, which speak over gloo: [(stdout, stderr)] * 2.
    Both must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs
