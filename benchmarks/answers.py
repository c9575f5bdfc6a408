"""The table of answers (tests/answers.tsv) as grpo_llm.py judges it; hostile completions: what raises, what is slow.

Run      python benchmarks/answers.py            (ten minutes; --hostile 1000 is quicker)
         python benchmarks/answers.py --solutions example_model_solutions.jsonl
             also judges GSM8K's published solutions, of github.com/openai/grade-school-math
Writes   benchmarks/results/answers.txt
"""

import argparse
import csv
import json
import random
import sys
import time
from itertools import groupby
from pathlib import Path

from cartpole import RESULTS, ROOT, machine

sys.path.insert(0, str(ROOT))
from grpo_llm import Problem, is_mathematics, is_right

PIECES = r"""
\frac{ } { ( ) [ ] ^ _ $ $$ \boxed{ \boxed \text{ \sqrt{ √ \sqrt[ 9 1 , 000 .5 / 1/2 e9 E+ ×10^ ^{9 - − – ** ` # = ½ ²
% ' ” ! ? ... x y pi sin \pi \infty ∞ \left \right \\ \begin{pmatrix} & \int_0^1 \sum_{i=1}^{9} 9**9 ^9^9^9
10^{10^{10}} \binom{ é 答案是 Paris not or 18 10:30 <think> {,} \, ~ \( \) \[ \] if import
"""
PIECES = [*PIECES.split(), " ", "\n", "\t", "\x00", "\ud800", "\u2028", "The answer is ", "1 ", "= "]
ANSWERS = {"texts and numbers": ("18", "0.5", "Paris", "10:30"), "mathematics": ("x^2+1", "(2,3)", r"\sqrt{2}", "x=5")}


def hostile(rng):
    """Pieces at random, one or two of them thousands of times, or any characters."""
    kind = rng.random()
    if kind < 0.4:
        return "".join(rng.choices(PIECES, k=rng.randint(0, 60)))
    if kind < 0.85:
        return ("".join(rng.choices(PIECES, k=rng.choice([1, 2]))) * 20_000)[: rng.choice([50, 300, 2500, 98_000])]
    return "".join(map(chr, rng.choices([*range(128), *range(0xA0, 0x3000), 0x1D7D9, 0x1F468], k=rng.randint(0, 300))))


def attack(kind, count):
    """One line of figures. Texts and numbers by the processor's time, mathematics, which has its own process, by the
    clock."""
    rng, clock = random.Random(1), time.process_time if kind == "texts and numbers" else time.perf_counter
    problems = [Problem("", answer) for answer in ANSWERS[kind]]
    is_right(problems[0], "x+x^2")  # starts math-verify
    seconds, raised = [], 0
    for _ in range(count):
        problem, text = rng.choice(problems), hostile(rng)
        started = clock()
        try:
            is_right(problem, text)
        except Exception:
            raised += 1
        seconds.append(clock() - started)
    seconds.sort()
    slow = ", ".join(f"{sum(s > limit for s in seconds)} above {limit} s" for limit in (0.01, 0.1, 1))
    times = f"median {1000 * seconds[count // 2]:.2f} ms, {slow}, slowest {seconds[-1]:.3f} s"
    return f"{kind}: {count:,} hostile completions, {raised} raised; {times}"


def judge(path):
    """Published solutions, each with the label of its publisher."""
    verdicts = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        problem = Problem(row["question"], row["ground_truth"].rpartition("A: ")[2].strip())
        solutions = [value for value in row.values() if isinstance(value, dict)]
        verdicts += [(x["is_correct"], is_right(problem, x["solution"])) for x in solutions]
    right, agreed = sum(label for label, _ in verdicts), sum(label is verdict for label, verdict in verdicts)
    return f"GSM8K's published solutions: {len(verdicts):,}, labelled right {right:,}; judged as labelled {agreed:,}"


def main(options):
    with (ROOT / "tests" / "answers.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    lines, table = [f"{time.strftime('%Y-%m-%d')}, {machine()}", ""], []
    form = "{:16} {:>5} {:>5} {:>5} {:>22} {:>11}"
    lines.append(form.format("kind", "cases", "right", "wrong", "judged as the table", "median ms"))
    is_right(Problem("", "x^2+1"), "1+x^2")  # starts math-verify
    for kind, group in groupby(rows, key=lambda row: row["kind"]):
        cases, agreed, seconds = list(group), 0, []
        table += ["", f"{kind:40} {'completion':52} right"]
        for row in cases:
            started = time.perf_counter()
            verdict = is_right(Problem("", row["answer"]), row["completion"].replace("⏎", "\n"))
            seconds.append(time.perf_counter() - started)
            agreed += verdict is (row["right"] == "yes")
            mathematics = "" if not is_mathematics(row["answer"]) else " (mathematics)"
            table.append(f"  {row['answer'] + mathematics:38} {row['completion']:52} {'yes' if verdict else 'no'}")
        right = sum(row["right"] == "yes" for row in cases)
        middle = f"{1000 * sorted(seconds)[len(seconds) // 2]:.2f}"
        lines.append(form.format(kind, len(cases), right, len(cases) - right, agreed, middle))
    lines.append("")
    if options.solutions:
        lines.append(judge(options.solutions))
    lines.append(attack("texts and numbers", options.hostile))
    lines.append(attack("mathematics", options.hostile // 10))
    print("\n".join(lines))
    (RESULTS / "answers.txt").write_text("\n".join([*lines, *table, ""]), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hostile", type=int, default=60_000, help="hostile completions; a tenth for mathematics")
    parser.add_argument("--solutions", help="GSM8K's example_model_solutions.jsonl")
    main(parser.parse_args())
