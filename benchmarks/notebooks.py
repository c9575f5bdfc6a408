"""How long each notebook of docs/notebooks takes from top to bottom, and that each of its commands ends as it should.

Run      pip install -r docs/requirements.txt && python benchmarks/notebooks.py [PAGE …]      (about 14 minutes)
Writes   benchmarks/results/notebooks.txt (raw), the lines of these pages

The English notebooks run. The Chinese ones have the same code, which tests/test_notebooks.py checks.
"""

import copy
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from cartpole import RESULTS, ROOT, machine
from nbclient import NotebookClient

FILE = RESULTS / "notebooks.txt"
NOT_COPIED = (".git", ".venv", "runs", "shared", "site", "__pycache__", ".*_cache", ".hypothesis")


def checked(notebook):
    """The notebook, with a check behind each command: a planted bug must be found, and all else must succeed."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":

            def with_check(match):
                space, command = match.groups()
                status = 1 if re.search(r"pytest .*--(script|mutant)=bug", command) else 0
                return f"{space}!{command}\n{space}assert _exit_code == {status}, _exit_code"

            cell.source = re.sub(r"^( *)!(.+)$", with_check, cell.source, flags=re.MULTILINE)
    return notebook


def run(path, folder):
    """Run a notebook in a copy of the repository below this folder: (its outputs, wall seconds, CPU seconds)."""
    copied = Path(folder) / "repository"
    shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(*NOT_COPIED))
    notebook = checked(nbformat.read(path, as_version=4))
    nbformat.validate(notebook)
    started, used = time.perf_counter(), sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    where = {"metadata": {"path": str(copied / "docs" / "notebooks")}}
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=where).execute()
    used = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - used
    return notebook, time.perf_counter() - started, used


def keep(line):
    """Put the line of a notebook into the raw results, in the place of an older one."""
    kept = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    lines = {line.split()[0]: line for line in [*kept, line] if not line.startswith("#")}
    head = [f"# {machine()}, one thread; notebook, cells of code, seconds, CPU seconds, load of the machine, day"]
    FILE.write_text("\n".join([*head, *(lines[stem] for stem in sorted(lines))]) + "\n", encoding="utf-8")


def main():
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    paths = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    for path in [path for path in paths if path.stem in sys.argv[1:]] or paths:
        with tempfile.TemporaryDirectory() as folder:
            notebook, seconds, cpu = run(path, folder)
        cells = sum(cell.cell_type == "code" for cell in notebook.cells)
        line = f"{path.stem} {cells} {seconds:.1f} {cpu:.1f} {os.getloadavg()[1]:.1f} {time.strftime('%Y-%m-%d')}"
        print(line, flush=True)
        keep(line)


if __name__ == "__main__":
    main()
