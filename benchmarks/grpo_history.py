"""How long is grpo_llm.py, part by part, and how long was it before? Read from git.

Run      python benchmarks/grpo_history.py
         python benchmarks/grpo_history.py --commits 9c9a14d HEAD   (these commits alone)
Writes   benchmarks/results/grpo_history.jsonl

A row is a commit of the main line that changed the script. Part I reaches from the first line to the heading
"Machinery". Older versions have no such heading, and nothing to compare with it. `code` are the lines that are neither
empty nor a comment nor in a docstring. `sections` has the lines of each heading of the newest version.
"""

import argparse
import ast
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from cartpole import RESULTS, machine  # noqa: E402

SCRIPT = "grpo_llm.py"


def git(*words):
    """What git prints, or one sentence if there is no history to read, as in a downloaded archive."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
        sys.exit(f"error: the history of {SCRIPT} cannot be read from git here: {reason}")


def measure(source):
    """The lines of one version of the script, by part."""
    lines, tree = source.splitlines(), ast.parse(source)
    documented = ast.Module, ast.ClassDef, ast.FunctionDef
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = [n for n, line in enumerate(lines, start=1) if line.strip() and not line.strip().startswith("#")]
    train = [node for node in tree.body if getattr(node, "name", "") == "train"]
    headings = [n for n, line in enumerate(lines) if line.startswith(("# ---- ", "# ==== "))]
    part1 = next((n for n in headings if lines[n].startswith("# ==== Machinery")), None)
    sections = {lines[a].strip("#-= "): b - a for a, b in zip(headings, [*headings[1:], len(lines)])}
    return {
        "lines": len(lines),
        "part1": part1,
        "machinery": len(lines) - part1 if part1 else None,
        "train": sum(node.end_lineno - node.lineno + 1 for node in train),
        "code": len(set(code) - docstrings),
        "docstrings": len(docstrings),
        "functions_and_classes": sum(isinstance(node, documented[1:]) for node in tree.body),
        "sections": sections,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commits", nargs="*", help="commits to measure; default all of the main line")
    options = parser.parse_args()
    commits = options.commits or git("log", "--first-parent", "--reverse", "--format=%h", "--", SCRIPT).split()
    if not commits:
        sys.exit(f"error: git knows no commit of {SCRIPT} here")
    rows = []
    for commit in commits:
        row = {"commit": commit, "date": git("log", "-1", "--format=%as", commit).strip()}
        rows.append(row | measure(git("show", f"{commit}:{SCRIPT}")))
        print("{commit}  {date}  {lines:5} lines  Part I {part1}  train {train}".format(**rows[-1]))
    for row in rows[:-1]:
        del row["sections"]
    if not options.commits:
        RESULTS.mkdir(parents=True, exist_ok=True)
        head = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "script": SCRIPT}
        text = "".join(f"{json.dumps(row)}\n" for row in (head, *rows))
        (RESULTS / "grpo_history.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
