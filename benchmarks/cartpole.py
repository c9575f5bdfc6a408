"""CartPole-v1, side by side: seconds and steps until the mean return of the last 100 episodes reaches 475.

Run      python benchmarks/cartpole.py                            (what is not installed is skipped with a word)
         python benchmarks/cartpole.py --cleanrl PATH/TO/cleanrl/ppo.py --cleanrl-python VENV/bin/python
         python benchmarks/cartpole.py --plot                     (redraws the figure from the kept results)
         python benchmarks/cartpole.py --programs ours ours-2-threads --busy 2 --results cartpole_busy.jsonl
Writes   benchmarks/results/cartpole.jsonl (raw, a line a run), docs/figures/cartpole_peers.png

Programs, interleaved seed by seed, each run in a process of its own with one CPU thread:
    ours            ppo_cartpole.py with its defaults
    ours-textbook   ppo_cartpole.py with CleanRL's hyperparameters
    ours-2-threads  ppo_cartpole.py with its defaults and two threads
    sb3             Stable-Baselines3's PPO with RL Zoo's tuned CartPole settings (pip install stable-baselines3==2.9.2)
    cleanrl         CleanRL's ppo.py as its authors publish it, a file that you fetch yourself. It was written for
                    Gymnasium 0.29.1; --cleanrl-python names an interpreter that has that version

The clock starts at the first environment step and stops when the hundredth of the last 100 episodes is in. Ours looks
at the mean once per rollout and counts the update after it; the others are watched from the outside at every episode.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import deque
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = ROOT / "docs" / "figures" / "cartpole_peers.png"
PROGRAMS = ["ours", "sb3", "cleanrl", "ours-textbook", "ours-2-threads"]
TEXTBOOK = dict(
    num_envs=4, num_steps=128, learning_rate=2.5e-4, gamma=0.99, gae_lambda=0.95, ent_coef=0.01, total_timesteps=500_000
)


class Solved(Exception):
    """Raised into a peer's program to end it."""


class Watch:
    """Counts steps and episodes from the outside; `seconds` is None until the last 100 episodes average 475."""

    def __init__(self):
        self.start, self.steps, self.returns, self.seconds = None, 0, deque(maxlen=100), None

    def begin(self):
        if self.start is None:
            self.start = time.perf_counter()

    def episode(self, episode_return):
        self.returns.append(episode_return)
        if len(self.returns) == 100 and sum(self.returns) >= 47_500:
            self.seconds = time.perf_counter() - self.start

    def result(self):
        return {"seconds": self.seconds, "steps": self.steps if self.seconds is not None else None}


def run_ours(seed, **settings):
    sys.path.insert(0, str(ROOT))
    from ppo_cartpole import Args, train

    with tempfile.TemporaryDirectory() as folder:
        metrics = train(Args(seed=seed, run_dir=f"{folder}/run", **settings))
    solved = next((row for row in metrics if row.get("charts/return_100", 0) >= 475), {})
    return {
        "seconds": solved.get("seconds"),
        "steps": solved.get("global_step"),
        "total_seconds": metrics[-1]["seconds"],
        "greedy_return": metrics[-1]["charts/eval_return"],
    }


def run_sb3(seed):
    """RL Zoo's hyperparams/ppo.yml, CartPole-v1: n_envs 8, n_steps 32, batch 256, 20 epochs, linear lr and clip."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Callback(BaseCallback):
        def _on_rollout_start(self):
            watch.begin()

        def _on_step(self):
            watch.steps = self.num_timesteps
            for info in self.locals["infos"]:
                if "episode" in info:
                    watch.episode(info["episode"]["r"])
            return watch.seconds is None

    torch.set_num_threads(1)
    watch = Watch()
    settings = dict(n_steps=32, batch_size=256, n_epochs=20, gae_lambda=0.8, gamma=0.98, ent_coef=0.0, device="cpu")
    schedules = dict(learning_rate=lambda left: 0.001 * left, clip_range=lambda left: 0.2 * left)
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", n_envs=8, seed=seed), seed=seed, **settings, **schedules)
    model.learn(100_000, callback=Callback())
    return watch.result()


def run_cleanrl(seed, path):
    """The fetched file, unchanged, with its default flags; an observing wrapper around every environment."""
    import runpy

    import gymnasium

    watch, make = Watch(), gymnasium.make

    class Observe(gymnasium.Wrapper):
        def reset(self, **options):
            self.total = 0.0
            return self.env.reset(**options)

        def step(self, action):
            watch.begin()
            result = self.env.step(action)
            watch.steps += 1
            self.total += float(result[1])
            if result[2] or result[3]:
                watch.episode(self.total)
                if watch.seconds is not None:
                    raise Solved
            return result

    gymnasium.make = lambda *arguments, **options: Observe(make(*arguments, **options))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.argv = [str(path), "--seed", str(seed), "--no-cuda"]
        with contextlib.suppress(Solved):
            runpy.run_path(str(path), run_name="__main__")
        os.chdir("/")
    return watch.result()


def run_one(program, seed, cleanrl):
    """In the child process: one run, its result as one line of JSON after a marker."""
    if program == "sb3":
        result = run_sb3(seed)
    elif program == "cleanrl":
        result = run_cleanrl(seed, cleanrl)
    else:
        settings = {"ours": {}, "ours-textbook": TEXTBOOK | {"clip_vloss": True, "anneal_clip": False}}
        result = run_ours(seed, **settings.get(program, {"torch_threads": 2}))
    packages = {name: version(name) for name in ("torch", "gymnasium", "numpy")}
    print("RESULT " + json.dumps({"program": program, "seed": seed, **result, "packages": packages}))


def missing(program, options):
    """Why a program cannot run here, or None."""
    if program == "cleanrl" and options.cleanrl is None:
        return "give --cleanrl PATH/TO/ppo.py, fetched from its repository"
    if program == "sb3":
        import importlib.util

        if importlib.util.find_spec("stable_baselines3") is None:
            return "pip install stable-baselines3==2.9.2"
    return None


def machine(device="cpu"):
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    found = {"cpu": model, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}
    if device != "cpu":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def measure(options):
    """Run everything, interleaved; write each result as it comes."""
    programs = []
    for program in options.programs:
        reason = missing(program, options)
        if reason:
            print(f"skipped     {program}: {reason}")
        else:
            programs.append(program)
    RESULTS.mkdir(parents=True, exist_ok=True)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.busy)]
    try:
        measure_all(programs, options)
    finally:
        for process in busy:
            process.kill()


def measure_all(programs, options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (RESULTS / options.results).open("w", encoding="utf-8") as file:
        head = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "busy_processes": options.busy}
        file.write(json.dumps(head) + "\n")
        for seed in range(1, options.seeds + 1):
            for program in programs:
                python = options.cleanrl_python if program == "cleanrl" else sys.executable
                command = [python, __file__, "--one", program, "--seed", str(seed)]
                if program == "cleanrl":
                    command += ["--cleanrl", str(Path(options.cleanrl).resolve())]
                threads = {"OMP_NUM_THREADS": "2"} if program == "ours-2-threads" else {}
                run = subprocess.run(command, env=environment | threads, capture_output=True, text=True)
                line = next((line for line in run.stdout.splitlines() if line.startswith("RESULT ")), None)
                if line is None:
                    sys.exit(f"{program}, seed {seed}, failed:\n{run.stderr[-2000:]}")
                file.write(line.removeprefix("RESULT ") + "\n")
                file.flush()
                print(line.removeprefix("RESULT "), flush=True)


def read_results(name):
    lines = [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]
    return lines[0], lines[1:]


def print_table(name):
    """Markdown: seconds and steps to 475 of each program, and how many times faster ours is."""
    from statistics import median

    head, rows = read_results(name)
    seconds = {p: [row["seconds"] for row in rows if row["program"] == p] for p in PROGRAMS}
    beside = f"{head.get('busy_processes', 0)} busy processes beside"
    print(f"\n{head['machine']['cpu']}, {head['machine']['cores']} cores, {beside}, {head['date']}\n")
    print("| program | solved | seconds: median (lowest to highest) | steps: median | ours is faster |")
    print("|---|---|---|---|---|")
    slowest_ours = max(s for s in seconds["ours"] if s is not None)
    for program, times in seconds.items():
        solved = [s for s in times if s is not None]
        if not solved:
            continue
        steps = median(row["steps"] for row in rows if row["program"] == program and row["steps"])
        ratio = (
            f"{median(solved) / median(seconds['ours']):.1f}× (our slowest seed: {median(solved) / slowest_ours:.1f}×)"
        )
        spread = f"{median(solved):.2f} ({min(solved):.2f} to {max(solved):.2f})"
        ratio = "" if program == "ours" else ratio
        print(f"| {program} | {len(solved)} of {len(times)} | {spread} | {steps:,.0f} | {ratio} |")


def plot():
    """One dot a seed on a logarithmic axis of seconds."""
    from statistics import median

    from matplotlib.figure import Figure

    _, rows = read_results("cartpole.jsonl")
    programs = [p for p in PROGRAMS if any(row["program"] == p and row["seconds"] for row in rows)]
    names = {"ours": "ppo_cartpole.py", "ours-2-threads": "ppo_cartpole.py,\ntwo threads"}
    names |= {"sb3": "Stable-Baselines3, tuned", "cleanrl": "CleanRL, its defaults"}
    axes = Figure(figsize=(7, 0.8 + 0.5 * len(programs)), layout="constrained").subplots()
    for height, program in enumerate(reversed(programs)):
        times = [row["seconds"] for row in rows if row["program"] == program and row["seconds"]]
        axes.plot(times, [height] * len(times), "o", alpha=0.6, color="C0" if program.startswith("ours") else "C1")
        axes.plot([median(times)], [height], "|", color="k", markersize=16)
    axes.set_yticks(range(len(programs)), [names.get(program, program) for program in reversed(programs)])
    axes.set(xscale="log", xlabel="seconds until 100 episodes average 475; dot: one seed, bar: median")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50, 100], ["0.5", "1", "2", "5", "10", "20", "50", "100"])
    axes.set_ylim(-0.6, len(programs) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(FIGURE, dpi=120)
    print(f"drew {FIGURE.relative_to(ROOT)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="seeds 1 to this")
    parser.add_argument("--programs", nargs="+", default=PROGRAMS[:3], choices=PROGRAMS)
    parser.add_argument("--cleanrl", help="CleanRL's cleanrl/ppo.py")
    parser.add_argument("--cleanrl-python", default=sys.executable, help="interpreter for it, with gymnasium==0.29.1")
    parser.add_argument("--busy", type=int, default=0, help="processes that spin beside every run")
    parser.add_argument("--results", default="cartpole.jsonl", help="file name under benchmarks/results")
    parser.add_argument("--plot", action="store_true", help="only redraw, from the kept results")
    parser.add_argument("--one", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(options.one, options.seed, options.cleanrl)
    else:
        if not options.plot:
            measure(options)
        print_table(options.results)
        plot()
