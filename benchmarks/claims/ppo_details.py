"""PPO's details on and off, and the time limit treated as death: what each is worth on CartPole and Acrobot.

Run      python benchmarks/claims/ppo_details.py                    (about 25 minutes on one core)
         python benchmarks/claims/ppo_details.py --draw             (table and figure from the kept results)
Writes   benchmarks/results/claims_ppo_details.jsonl, docs/figures/claims_ppo_details.png

Each variant is ppo_cartpole.py with its defaults but for a flag or one line of source. The measure is the area under
the learning curve: the mean, over a run's steps, of the mean return of the episodes that ended last, so that slow
learners, unstable ones and those that never learn all lose by it. Median, quartiles, and the 95% bootstrap interval of
the difference of the means from the defaults'. An interval that holds 0 says: with so few seeds no difference was
found, not that there is none.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from cartpole import RESULTS, machine  # noqa: E402

FILE = RESULTS / "claims_ppo_details.jsonl"
ENVS = {"CartPole-v1": 100_000, "Acrobot-v1": 100_000}  # steps of a run

# name → (flags, replacements in the source)
INIT = "    nn.init.orthogonal_(layer.weight, gain)\n    nn.init.zeros_(layer.bias)\n"
VARIANTS = {
    "defaults": ({}, []),
    "λ = 0: one-step advantages": ({"gae_lambda": 0.0}, []),
    "λ = 0.5": ({"gae_lambda": 0.5}, []),
    "λ = 1: Monte Carlo advantages": ({"gae_lambda": 1.0}, []),
    "no advantage normalisation [D7]": ({"norm_adv": False}, []),
    "one epoch [D6]": ({"update_epochs": 1}, []),
    "epochs without minibatches [D6]": ({"num_minibatches": 1}, []),
    "one epoch, one minibatch [D6]": ({"update_epochs": 1, "num_minibatches": 1}, []),
    "no ratio clipping [D8]": ({"clip_coef": 1e9}, []),
    "value clipping [D9]": ({"clip_vloss": True}, []),
    "torch's initialisation [D2]": ({}, [(INIT, "    pass\n")]),
    "Adam's ε 1e-8 [D3]": ({}, [("eps=1e-5", "eps=1e-8")]),
    "no learning-rate annealing [D4]": ({"anneal_lr": False}, []),
    "no gradient clipping [D11]": ({"max_grad_norm": 1e9}, []),
    "entropy bonus 0.01 [D10]": ({"ent_coef": 0.01}, []),
    "time limit treated as death [D5]": (
        {},
        [("torch.where(terminated, 0.0, next_values)", "torch.where(done, 0.0, next_values)")],
    ),
    "autoreset rows in the batch": (
        {},
        [("(row[is_transition] for row in rows)", "(row.flatten(0, 1) for row in rows)")],
    ),
}


def variant(replacements, folder):
    """ppo_cartpole.py with the replacements, as a module."""
    source = (ROOT / "ppo_cartpole.py").read_text(encoding="utf-8")
    for right, wrong in replacements:
        if source.count(right) != 1:
            sys.exit(f"{right!r} stands {source.count(right)} times in ppo_cartpole.py, not once")
        source = source.replace(right, wrong)
    path = Path(folder) / "ppo_cartpole.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("variant", path)
    sys.modules["variant"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_run(env_id, steps, seed, flags, replacements):
    """(area under the learning curve, mean return of the last 100 episodes, steps until CartPole counts as solved)."""
    with tempfile.TemporaryDirectory() as folder:
        script = variant(replacements, folder)
        settings = {"env_id": env_id, "seed": seed, "total_timesteps": steps, **flags}
        metrics = script.train(script.Args(**settings, eval_episodes=0, run_dir=f"{folder}/run"))
    rows = [(row["global_step"], row.get("charts/episodic_return")) for row in metrics]
    steps_before, area, last = 0, 0.0, None
    for step, value in rows:  # a rollout in which nothing ended counts with the value before
        last = value if value is not None else last
        area += (last if last is not None else 0.0) * (step - steps_before)
        steps_before = step
    solved = [row["global_step"] for row in metrics if row.get("charts/return_100", -1e9) >= 475]
    return round(area / steps_before, 2), metrics[-1].get("charts/return_100"), solved[0] if solved else None


def measure(options):
    with FILE.open("w", encoding="utf-8") as file:
        head = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "steps": ENVS}
        file.write(json.dumps(head, ensure_ascii=False) + "\n")
        for seed in range(1, options.seeds + 1):
            for env_id, steps in ENVS.items():
                for name, (flags, replacements) in VARIANTS.items():
                    area, final, solved = one_run(env_id, steps, seed, flags, replacements)
                    line = {"env": env_id, "variant": name, "seed": seed, "area": area}
                    line |= {"final": final, "solved": solved}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()


def draw():
    from matplotlib.figure import Figure

    head, *rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    rng = np.random.default_rng(0)
    panels = Figure(figsize=(11, 6), layout="constrained").subplots(1, len(ENVS), sharey=True)
    for axes, env_id in zip(panels, ENVS):
        print(f"\n| {env_id}, {head['steps'][env_id]:,} steps | area: median (quartiles) | ", end="")
        print("difference of the means from the defaults' (95%) | solved |")
        print("|---|---|---|---|")
        mine = {name: [row for row in rows if (row["env"], row["variant"]) == (env_id, name)] for name in VARIANTS}
        areas = {name: np.array([row["area"] for row in own]) for name, own in mine.items()}
        for i, (name, area) in enumerate(areas.items()):
            low, middle, high = np.quantile(area, (0.25, 0.5, 0.75))
            ours = rng.choice(areas["defaults"], (10_000, len(area))).mean(1)
            gains = np.quantile(rng.choice(area, (10_000, len(area))).mean(1) - ours, (0.025, 0.975))
            difference = area.mean() - areas["defaults"].mean()
            count = sum(row["solved"] is not None for row in mine[name])
            solved = f"{count} of {len(area)}" if env_id == "CartPole-v1" else ""
            against = "" if name == "defaults" else f"{difference:+.1f} ({gains[0]:+.1f} to {gains[1]:+.1f})"
            print(f"| {name} | {middle:.1f} ({low:.1f} to {high:.1f}) | {against} | {solved} |")
            color = "0.5" if gains[0] <= 0 <= gains[1] else "C2" if difference > 0 else "C3"
            axes.plot(area, [i] * len(area), ".", color="k" if name == "defaults" else color, alpha=0.6)
            axes.plot([middle], [i], "|", color="k", markersize=14)
        axes.set_yticks(range(len(VARIANTS)), list(VARIANTS))
        axes.axvline(np.median(areas["defaults"]), color="0.8", zorder=0)
        axes.set(title=env_id, xlabel="mean return over the run")
    panels[0].invert_yaxis()
    for color, label in (("C3", "one seed: worse than the defaults"), ("0.5", "no difference seen"), ("C2", "better")):
        panels[0].plot([], [], ".", color=color, label=label)
    panels[0].plot([], [], "|", color="k", markersize=12, label="median")
    panels[0].plot([], [], color="0.8", label="median of the defaults")
    panels[0].figure.legend(loc="outside lower center", ncols=5, fontsize=9)
    panels[0].figure.savefig(ROOT / "docs" / "figures" / "claims_ppo_details.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--draw", action="store_true", help="table and figure from the kept results, no runs")
    options = parser.parse_args()
    if not options.draw:
        measure(options)
    draw()
