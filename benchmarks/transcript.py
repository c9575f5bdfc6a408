"""What a new user sees, from `git clone` to `--ask`: every command is run, and what it prints is kept.

Run      python benchmarks/transcript.py --model DIR      (an instruct model of 135M; ten minutes on one core)
Writes   benchmarks/results/transcript.txt, which docs/transcript.md shows

The clone is made from this checkout, as it was last committed, into a temporary directory. Its commands use the Python
that runs this program, in place of a fresh environment. Progress bars go to the terminal and are not kept.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from cartpole import RESULTS, ROOT, machine

SUMS = """python -c "
import json
for a in range(10):
    for b in range(10):
        print(json.dumps({'prompt': f'What is {a} + {b}? Answer with the number alone.', 'answer': str(a + b)}))
" > sums.jsonl"""

QUESTION = "What is 7 + 5? Answer with the number alone."
COMMANDS = [
    "git clone REPOSITORY road && cd road",
    "python grpo_llm.py --run-dir runs/first",
    'python grpo_llm.py --ask "12+3+4" --model runs/first',
    SUMS,
    "head -2 sums.jsonl",
    "python grpo_llm.py --model MODEL --task jsonl --data sums.jsonl --steps 16 --run-dir runs/mine",
    "python grpo_llm.py --evaluate MODEL runs/mine",
    f"python grpo_llm.py --ask {shlex.quote(QUESTION)} --model runs/mine",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of an instruct model, shown as SmolLM2-135M-Instruct")
    args = parser.parse_args()
    cpu = machine()
    lines = [f"# {cpu['cpu']}, {cpu['cores']} cores, {cpu['system']}, Python {cpu['python']}"]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        (folder / "SmolLM2-135M-Instruct").symlink_to(Path(args.model).resolve())
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        where = folder
        for command in COMMANDS:
            shown = command.replace("MODEL", "../SmolLM2-135M-Instruct")
            real = shown.replace("REPOSITORY", shlex.quote(str(ROOT)))
            run = subprocess.run(real, shell=True, cwd=where, env=environment, capture_output=True, text=True)
            if run.returncode:
                sys.exit(f"{real}\n{run.stdout}{run.stderr[-2000:]}")
            where = folder / "road"
            text = re.sub(r"[ \t]+$", "", run.stdout, flags=re.MULTILINE).strip("\n")
            lines += ["", f"$ {shown}", *([text] if text else [])]
            print(lines[-1], flush=True)
    (RESULTS / "transcript.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
