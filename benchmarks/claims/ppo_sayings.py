"""Two pieces of advice on PPO, tried on CartPole and Acrobot: let the entropy bonus fall; normalise in each minibatch.

Run      python benchmarks/claims/ppo_sayings.py                    (about 10 minutes on one core)
         python benchmarks/claims/ppo_sayings.py --table            (the tables from the kept results)
Writes   benchmarks/results/claims_ppo_sayings.jsonl

Each arm is ppo_cartpole.py with its defaults but for a flag and at most one line of source. Where the bonus falls, c₂
falls linearly to 0 as the learning rate does. The measure, the quartiles and the intervals are those of ppo_details.py.
"""

import argparse
import json
import time

import numpy as np
from ppo_details import ENVS, RESULTS, machine, one_run

FILE = RESULTS / "claims_ppo_sayings.jsonl"
FALLS = [("args.ent_coef * entropy.mean()", "args.ent_coef * remaining * entropy.mean()")]
OVER_ALL = "(b_advantages[mb] - b_advantages.mean()) / (b_advantages.std(correction=0) + 1e-8)"
ARMS = {
    "defaults": ({}, []),
    "entropy bonus 0.01": ({"ent_coef": 0.01}, []),
    "entropy bonus 0.01, falling to 0": ({"ent_coef": 0.01}, FALLS),
    "entropy bonus 0.05": ({"ent_coef": 0.05}, []),
    "entropy bonus 0.05, falling to 0": ({"ent_coef": 0.05}, FALLS),
    "advantages normalised over the rollout": ({"norm_adv": False}, [("= b_advantages[mb]", f"= {OVER_ALL}")]),
    "advantages not normalised": ({"norm_adv": False}, []),
}


def measure(seeds):
    with FILE.open("w", encoding="utf-8") as file:
        head = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "steps": ENVS}
        file.write(json.dumps(head, ensure_ascii=False) + "\n")
        for seed in range(1, seeds + 1):
            for env_id, steps in ENVS.items():
                for name, (flags, replacements) in ARMS.items():
                    area, final, solved = one_run(env_id, steps, seed, flags, replacements)
                    line = {"env": env_id, "arm": name, "seed": seed, "area": area, "final": final, "solved": solved}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()


def print_tables():
    _, *rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    rng = np.random.default_rng(0)
    for env_id in ENVS:
        print(f"\n| {env_id} | area: median (quartiles) | difference of the means from the defaults' (95%) |")
        print("|---|---|---|")
        areas = {name: np.array([r["area"] for r in rows if (r["env"], r["arm"]) == (env_id, name)]) for name in ARMS}
        for name, area in areas.items():
            low, middle, high = np.quantile(area, (0.25, 0.5, 0.75))
            ours = rng.choice(areas["defaults"], (10_000, len(area))).mean(1)
            gains = np.quantile(rng.choice(area, (10_000, len(area))).mean(1) - ours, (0.025, 0.975))
            difference = area.mean() - areas["defaults"].mean()
            against = "" if name == "defaults" else f"{difference:+.1f} ({gains[0]:+.1f} to {gains[1]:+.1f})"
            print(f"| {name} | {middle:.1f} ({low:.1f} to {high:.1f}) | {against} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--table", action="store_true", help="print the tables from the kept results, no runs")
    options = parser.parse_args()
    if not options.table:
        measure(options.seeds)
    print_tables()
