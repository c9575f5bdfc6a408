"""Does a test hold every number that a run reports? One-token changes to the lines that report, tried on the suite.

python benchmarks/random_mutants.py [--script ppo_cartpole.py] [--number 40] [--seed 1] [--out FILE]
    draws changes such as + for −, < for <=, 0 for 1, min for max, and for or, `not` left out, plants each alone and
    runs the script's tests until one fails. Prints the changes that none noticed. Tens of seconds a change.

A survivor is a question, not yet a fault: some changes alter nothing (x >= 0.5 for x > 0.5 where x is never 0.5).
tests/mutants.py has the bugs that people really write; all of those are caught. Raw lists: benchmarks/results.
"""

import argparse
import ast
import importlib
import io
import json
import os
import random
import sys
import tempfile
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

# script → the functions that report, and the steps of train() that do, by the numbers of their headings
REPORTS = {
    "ppo_cartpole.py": ("play evaluate draw_learning_curve print_summary", (9, 10)),
    "ppo_atari.py": ("play evaluate draw_learning_curve", (9, 11)),
    "rlhf_gpt2_ppo.py": (
        "perplexity calibration_error distinct_2 describe rate_policy train_sft train_reward normalise_scores "
        "print_comparison draw_curves label_by_judge",
        (8, 9),
    ),
    "grpo_llm.py": (
        "new_model evaluate majority_at_k describe print_samples learning_rate_of peak_memory draw_curves "
        "has_variance pairs_of warm_start",
        (11, 12),
    ),
}
# their tests, less those that start processes or train again and again and look at weights alone
TESTS = {
    "ppo_cartpole.py": "cartpole_reports cartpole_loop cartpole_runs",
    "ppo_atari.py": "cartpole_reports atari",
    "rlhf_gpt2_ppo.py": "rlhf_reports rlhf_loop rlhf_runs",
    "grpo_llm.py": "grpo_reports grpo_loop grpo_runs",
}
SKIPPED = "killed interrupted same_bits import refused bad_ ctrl_c damaged resume two_processes track same_seed"
PAIRS = "+ -  * /  < <=  > >=  == !=  0 1  1 2  min max  and or  True False  sum mean  mean std  any all  0.0 1.0"
CHANGES = {}
for one, other in (pair.split() for pair in PAIRS.split("  ")):
    CHANGES.setdefault(one, []).append(other)
    CHANGES.setdefault(other, []).append(one)
CHANGES["not"] = [""]


def lines_that_report(source, functions, steps):
    """The numbers of the lines of these functions, and of these steps of train()."""
    lines, wanted = source.splitlines(), set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in functions.split():
            wanted |= set(range(node.body[0].end_lineno + 1, node.end_lineno + 1))
        if isinstance(node, ast.FunctionDef) and node.name == "train":
            step = 0
            for number in range(node.lineno, node.end_lineno + 1):
                head = lines[number - 1].split("# ")[-1].split(".")[0]
                step = int(head) if lines[number - 1].lstrip().startswith("# ") and head.isdecimal() else step
                wanted |= {number} if steps[0] <= step <= steps[1] else set()
    return wanted


def changes(source, wanted):
    """Every (line, column, token, its replacement) on these lines."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.start[0] in wanted:
            for new in CHANGES.get(token.string, ()):
                yield (*token.start, token.string, new)


def survives(script, source, change, folder):
    """Whether the script's tests pass with this change, in a process that has all libraries loaded already."""
    line, column, old, new = change
    lines = source.splitlines(keepends=True)
    lines[line - 1] = lines[line - 1][:column] + new + lines[line - 1][column + len(old) :]
    path = Path(folder) / script
    path.write_text("".join(lines), encoding="utf-8")
    child = os.fork()
    if child == 0:
        import pytest

        log = os.open(Path(folder) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        tests = [f"tests/test_{name}.py" for name in TESTS[script].split()]
        options = ["-x", "-q", "-p", "no:cacheprovider", "-k", f"not ({' or '.join(SKIPPED.split())})"]
        os.chdir(ROOT)
        os._exit(pytest.main([*options, f"--mutant={path}", *tests]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=REPORTS, default="ppo_cartpole.py")
    parser.add_argument("--number", type=int, default=40, help="changes to try, drawn by the seed; 0 for all of them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON lines: each change, and whether it survived")
    args = parser.parse_args()
    for library in ("gymnasium", "torch", "transformers"):  # loaded once, for all children
        importlib.import_module(library)

    source = (ROOT / args.script).read_text(encoding="utf-8")
    found = list(changes(source, lines_that_report(source, *REPORTS[args.script])))
    drawn = random.Random(args.seed).sample(found, min(args.number or len(found), len(found)))
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        if not survives(args.script, source, (1, 0, "", ""), folder):
            sys.exit(
                f"the tests of {args.script} fail without any change:\n{(Path(folder) / 'log.txt').read_text()[-2000:]}"
            )
    for change in sorted(drawn):
        with tempfile.TemporaryDirectory() as folder:
            survived = survives(args.script, source, change, folder)
        survivors += survived
        text = source.splitlines()[change[0] - 1].strip()
        row = {"script": args.script, "line": text, "column": change[1], "from": change[2], "to": change[3]}
        if args.out:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "survived": survived}, ensure_ascii=False) + "\n")
        if survived:
            print(f"{change[0]:5}: {change[2]} → {change[3] or 'nothing'}   {text}", flush=True)
    print(f"{args.script}: {len(found)} changes to choose from, {len(drawn)} tried, {survivors} survived")
