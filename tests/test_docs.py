"""The pages of docs/: their code runs, their figures are there and can be drawn again."""

import json
import multiprocessing
import os
import re

import mutants
import numpy as np
import pytest
from contract import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


# A new process for each page, forked from one that has nothing but these imports, which would take longer than most
# pages.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["datasets", "gymnasium", "torch.utils.tensorboard", "transformers.models.llama"])


def run_code(code, output):
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    exec("import torch\ntorch.set_num_threads(1)\n" + code, {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_code_runs(page, tmp_path):
    """All Python blocks of a page, from top to bottom, in one session in the repository's root."""
    code = "\n".join(blocks(page))
    process = FRESH.Process(target=run_code, args=(code, tmp_path / "printed.txt"))
    process.start()
    process.join(timeout=300)
    process.kill()  # if it hangs
    assert process.exitcode == 0, (tmp_path / "printed.txt").read_text(encoding="utf-8")
    assert "assert " in code  # a page's code states what comes out


@pytest.mark.slow
def test_an_error_in_a_page_is_seen(tmp_path):
    process = FRESH.Process(target=run_code, args=("print('so far')\nassert 1 == 2", tmp_path / "printed.txt"))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 1
    printed = (tmp_path / "printed.txt").read_text(encoding="utf-8")
    assert "so far" in printed and "AssertionError" in printed


def test_planted_bugs_of_the_pages_can_be_written(tmp_path):
    """`tests/mutants.py --write N FILE [SCRIPT]`: SCRIPT has so many; a copy that is put in its place has its name."""
    written = 0
    for page in PAGES:
        for line in re.findall(
            r"^python tests/mutants\.py --write (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE
        ):
            number, file, *script = line.split()
            path, script = tmp_path / file, script[0] if script else "ppo_cartpole.py"
            path.parent.mkdir(exist_ok=True)
            assert mutants.write(number, str(path), script) is None, f"{page.name}: {line}"
            assert "/" not in file or path.name == script, f"{page.name}: {line}"
            assert path.read_text(encoding="utf-8") != (ROOT / script).read_text(encoding="utf-8")
            written += 1
    assert written >= 5


def test_the_transcript_is_what_was_printed():
    page = (ROOT / "docs" / "transcript.md").read_text(encoding="utf-8")
    printed = (ROOT / "benchmarks" / "results" / "transcript.txt").read_text(encoding="utf-8")
    assert f"```text\n{printed}```\n" in page and printed.count("\n$ ") == 8


def test_the_length_of_the_script_is_what_was_counted():
    """Each row of the table of RESULTS.md is a commit that benchmarks/grpo_history.py has counted."""
    raw = (ROOT / "benchmarks" / "results" / "grpo_history.jsonl").read_text(encoding="utf-8").splitlines()
    counted = {row["commit"]: row for row in map(json.loads, raw[1:])}
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w{7,})` \| (\S+) \|[^|]*\| ([\d,]+) \| ([\d,–]+) \| (\d+) \|$", text, re.MULTILINE)
    assert len(rows) >= 5
    for commit, date, *shown in rows:
        row = counted[commit]
        assert date == row["date"]
        assert shown == [f"{row['lines']:,}", str(row["part1"] or "–"), str(row["train"])]


def test_the_numbers_about_variance_are_the_measured_ones():
    """Of the two pages about the foundations: four deviations, and how many seeds learn."""
    kept = json.loads((ROOT / "benchmarks" / "results" / "foundations.json").read_text(encoding="utf-8"))
    deviations = [f"{np.std(values):.2f}" for values in kept["gradients"].values()]
    learned = [sum(np.mean(curve[-100:]) > 0.7 for curve in curves) for curves in kept["curves"].values()]
    assert [len(values) for values in kept["gradients"].values()] == [2000] * 4
    assert learned == [10, 10, 3, 7]
    page = (ROOT / "docs" / "0_foundations.md").read_text(encoding="utf-8")
    assert f"the standard deviation is {deviations[0]} with $b = 0$\nand {deviations[1]} with $V$" in page
    assert f"it is {deviations[2]} with $b = 0$, and still {deviations[3]} with $V$" in page
    assert "all ten learn, with $b = 0$ as with $V$. With the 10, three of ten learn" in page
    assert "with $b = 0$, and seven of ten with $V$" in page


def test_every_figure_is_shown_and_drawn_by_a_command():
    """Each PNG of docs/figures stands in some page, and its name in the benchmark that draws it."""
    figures = sorted((ROOT / "docs" / "figures").glob("*.png"))
    pages = [*PAGES, ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"]
    texts = [path.read_text(encoding="utf-8") for path in pages]
    programs = [path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("**/*.py")]
    assert len(figures) >= 4
    for figure in figures:
        assert any(f"figures/{figure.name}" in text for text in texts), f"{figure.name} is shown nowhere"
        named = re.sub(r"^[a-z]+_", "NAME_", figure.name)  # atari_curve.py draws NAME_curve.png of any name
        assert any(figure.name in text or named in text for text in programs), f"{figure.name}: nothing draws it"


PROSE = [*sorted(ROOT.glob("*.md")), *PAGES, *sorted((ROOT / "docs" / "zh").glob("*.md"))]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_line_of_prose_is_longer_than_120(page):
    """But for tables, code, headings, pictures and the link to the notebook, which cannot be broken."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    prose = [
        line
        for line in text.splitlines()
        if line.strip() and not re.match(r" *[|#!<>]|    |\[[^]]+\]\(https://colab\.", line)
    ]
    assert len(prose) > 5
    assert [line for line in prose if len(line) > 120] == []
