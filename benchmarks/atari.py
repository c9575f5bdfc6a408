"""Atari, side by side: agent's steps a second on this machine, rollout and update included.

Run      python benchmarks/atari.py                               (what is not given is skipped with a word)
         python benchmarks/atari.py --cleanrl FOLDER --cleanrl-python VENV/bin/python
         … --envpool-python VENV2/bin/python                      (if the variant with envpool needs another one)
         python benchmarks/atari.py --device cuda --programs ours ours-compiled ours-graphs cleanrl …    (on a GPU)
Writes   benchmarks/results/atari_speed.jsonl or, on a GPU, atari_speed_cuda.jsonl (raw, a line a run)

Programs, interleaved round by round, each in a process of its own. Pong, 8 games × 128 steps, 4 epochs × 4 minibatches:
    ours             ppo_atari.py with its defaults: bfloat16, one thread a core
    ours-float32     --no-bf16
    ours-1-thread    --torch-threads 1
    ours-default-malloc  --no-keep-memory
    ours-compiled    the network under torch.compile, which the script does without
    ours-graphs      the same with mode="reduce-overhead": CUDA graphs on a GPU
    cleanrl          CleanRL's cleanrl/ppo_atari.py, which you fetch yourself (it needs gymnasium 0.29.1, ale-py 0.10.1)
    cleanrl-envpool  its cleanrl/ppo_atari_envpool.py (it needs envpool 1.0.1, as later versions return
                     from reset() what the file does not expect, and gym 0.23.1)

A program that fails is left out from then on, and the others are measured. The first two iterations warm up and are not
counted. For ours the time is split into environment, rest of the rollout and update.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from cartpole import RESULTS, machine  # noqa: E402

OURS = {
    "ours": {},
    "ours-float32": {"bf16": False},
    "ours-1-thread": {"torch_threads": 1},
    "ours-default-malloc": {"keep_memory": False},
    "ours-compiled": {"compile": "default"},
    "ours-graphs": {"compile": "reduce-overhead"},
}
PEERS = {"cleanrl": ("ppo_atari.py", "PongNoFrameskip-v4"), "cleanrl-envpool": ("ppo_atari_envpool.py", "Pong-v5")}
ROLLOUT, WARM_UP = 8 * 128, 2  # steps of an iteration; iterations that do not count


def run_ours(program, iterations, device):
    """In the child process: train, and note when each environment step begins and ends and when each rollout ends."""
    sys.path.insert(0, str(ROOT))
    import ppo_atari as atari

    settings = {"eval_episodes": 0, "checkpoint_every": 0, "device": device, **OURS[program]}
    if mode := settings.pop("compile", None):
        agent_class = atari.Agent

        def compiled_agent(*arguments):
            agent = agent_class(*arguments)
            agent.compile(mode=mode)
            return agent

        atari.Agent = compiled_agent
    make_envs, compute_gae = atari.make_envs, atari.compute_gae
    steps, rollout_ends = [], []  # (begin, end) of each envs.step; compute_gae is called where a rollout ends

    def timed_envs(*arguments, **options):
        envs = make_envs(*arguments, **options)
        step = envs.step

        def timed_step(actions):
            begin = time.perf_counter()
            result = step(actions)
            steps.append((begin, time.perf_counter()))
            return result

        envs.step = timed_step
        return envs

    def timed_gae(*arguments):
        rollout_ends.append(time.perf_counter())
        return compute_gae(*arguments)

    atari.make_envs, atari.compute_gae = timed_envs, timed_gae
    with tempfile.TemporaryDirectory() as folder:
        total = ROLLOUT * iterations - 64  # a few rows of a rollout may be autoresets
        atari.train(atari.Args(run_dir=f"{folder}/run", total_timesteps=total, **settings))
    begin, end = rollout_ends[WARM_UP - 1], rollout_ends[-1]
    counted = [(start, stop) for start, stop in steps if start > begin]
    updates = [min(start for start, _ in steps if start > mark) - mark for mark in rollout_ends[WARM_UP - 1 : -1]]
    environment, update = sum(stop - start for start, stop in counted), sum(updates)
    return {
        "sps": 8 * len(counted) / (end - begin),
        "environment": environment / (end - begin),
        "update": update / (end - begin),
        "rest_of_rollout": 1 - (environment + update) / (end - begin),
    }


def run_apart(program, options):
    """run_ours in a process of its own."""
    command = [sys.executable, __file__, "--one", program, "--iterations", str(options.iterations)]
    run = subprocess.run([*command, "--device", options.device], capture_output=True, text=True)
    line = next((line for line in run.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(run.stderr[-600:])
    return json.loads(line.removeprefix("RESULT "))


def run_peer(program, options, threads):
    """A peer's file, unchanged: it prints a line "SPS: …" after each iteration; the lines' times are what counts."""
    file, env_id = PEERS[program]
    iterations, interpreter = options.iterations, options.cleanrl_python
    if program == "cleanrl-envpool":
        interpreter = options.envpool_python or interpreter
    start = f"import runpy, sys; sys.argv = sys.argv[1:]; {'import ale_py; ' if program == 'cleanrl' else ''}"
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = ["--env-id", env_id, "--total-timesteps", str(ROLLOUT * iterations)]
    flags += ["--no-cuda"] if options.device == "cpu" else []
    path = Path(options.cleanrl).resolve() / "cleanrl" / file
    environment = {**os.environ, "PYTHONPATH": str(Path(options.cleanrl).resolve()), "PYTHONUNBUFFERED": "1"}
    environment |= {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [interpreter, "-c", start, str(path), *flags],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        times = [time.perf_counter() for line in process.stdout if line.startswith("SPS:")]
        errors = process.communicate()[1]
    if len(times) < iterations:
        raise RuntimeError(f"it printed {len(times)} SPS lines for {iterations}:\n{errors[-2000:]}")
    return {"sps": ROLLOUT * (iterations - WARM_UP) / (times[-1] - times[WARM_UP - 1])}


def measure(options):
    threads = os.cpu_count()
    programs = [program for program in options.programs if program in OURS or options.cleanrl]
    for program in set(options.programs) - set(programs):
        print(f"skipped     {program}: give --cleanrl FOLDER, a copy of its repository")
    RESULTS.mkdir(parents=True, exist_ok=True)
    with results_file(options).open("w", encoding="utf-8") as file:
        file.write(json.dumps({"machine": machine(options.device), "date": time.strftime("%Y-%m-%d")}) + "\n")
        for round_number in range(1, options.rounds + 1):
            for program in list(programs):
                try:
                    result = run_peer(program, options, threads) if program in PEERS else run_apart(program, options)
                except (OSError, RuntimeError) as error:
                    print(f"failed      {program}, left out from here on: {error}")
                    programs.remove(program)
                    continue
                line = json.dumps({"program": program, "round": round_number, **result})
                file.write(line + "\n")
                file.flush()
                print(line, flush=True)


def results_file(options):
    return RESULTS / (options.results or f"atari_speed{'' if options.device == 'cpu' else '_cuda'}.jsonl")


def print_table(options):
    lines = [json.loads(line) for line in results_file(options).read_text(encoding="utf-8").splitlines()]
    head, rows = lines[0], lines[1:]
    device = head["machine"].get("gpu") or f"{head['machine']['cpu']}, {head['machine']['cores']} cores"
    print(f"\n{device}, {head['date']}\n")
    print("| program | steps a second: median (lowest to highest) | ours is faster | environment, rollout, update |")
    print("|---|---|---|---|")
    own = [row["sps"] for row in rows if row["program"] == "ours"]
    for program in dict.fromkeys(row["program"] for row in rows):
        mine = [row for row in rows if row["program"] == program]
        sps = [row["sps"] for row in mine]
        parts = ""
        if "update" in mine[0]:
            shares = (median(row[key] for row in mine) for key in ("environment", "rest_of_rollout", "update"))
            parts = ", ".join(f"{100 * share:.0f}%" for share in shares)
        ratio = f"{median(own) / median(sps):.2f}×" if own and program != "ours" else ""
        print(f"| {program} | {median(sps):,.0f} ({min(sps):,.0f} to {max(sps):,.0f}) | {ratio} | {parts} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=14, help="rollouts of 1,024 steps a run")
    default = [program for program in (*OURS, *PEERS) if program not in ("ours-compiled", "ours-graphs")]
    parser.add_argument("--programs", nargs="+", default=default, choices=[*OURS, *PEERS])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--results", help="name of the file of raw results")
    parser.add_argument("--cleanrl", help="a copy of CleanRL's repository")
    parser.add_argument("--cleanrl-python", default=sys.executable, help="an interpreter with what it needs")
    parser.add_argument("--envpool-python", help="one with what its envpool variant needs; default --cleanrl-python")
    parser.add_argument("--one", choices=list(OURS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(run_ours(options.one, options.iterations, options.device)))
    else:
        measure(options)
        print_table(options)
