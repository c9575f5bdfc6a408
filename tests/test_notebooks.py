"""The notebooks of docs/notebooks are made from the pages, are up to date, and run from top to bottom."""

import ast
import importlib.util
import json
import re
import subprocess
import sys

import pytest
from contract import ROOT

spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebooks)

PAGES = notebooks.pages()
ENGLISH = [page for page in PAGES if page.parent.name == "docs"]


def name(page):
    return str(page.relative_to(ROOT))


def cells(page, kind):
    path = ROOT / "docs" / "notebooks" / notebooks.place(page)
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_notebook_is_up_to_date(page):
    path = ROOT / "docs" / "notebooks" / notebooks.place(page)
    is_equal = path.exists() and path.read_text(encoding="utf-8") == notebooks.notebook(page)
    assert is_equal, f"{path.relative_to(ROOT)} is older than {name(page)}: run python docs/notebooks.py"


def test_every_page_with_python_has_a_notebook_and_no_other_notebook_is_there():
    written = {path.relative_to(ROOT / "docs" / "notebooks") for path in ROOT.glob("docs/notebooks/**/*.ipynb")}
    assert written == {notebooks.place(page) for page in PAGES}
    assert len(ENGLISH) >= 11 and len(PAGES) == 2 * len(ENGLISH)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_page_has_the_button_of_its_notebook(page):
    assert page.read_text(encoding="utf-8") == notebooks.with_button(page), "run python docs/notebooks.py"
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and lines[2].endswith(f"({notebooks.address(page)})")


@pytest.mark.parametrize("page", ENGLISH, ids=name)
def test_both_languages_have_the_same_code(page):
    """But for comments. So it is enough to run the English notebooks."""

    def code(page):
        whole = "\n".join(cells(page, "code"))
        return [line for line in whole.splitlines() if not re.match(r" *# (?!!)", line)]

    chinese = page.parent / "zh" / page.name
    assert code(page) == code(chinese) and len(code(page)) > 30


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_pictures_lead_out_of_the_notebook(page):
    prose = "\n\n".join(cells(page, "markdown"))
    prose = re.sub(r"`[^`\n]+`", "code", re.sub(r"^ *```.*?^ *```$", "", prose, flags=re.MULTILINE | re.DOTALL))
    targets = re.findall(r"\]\(([^)\s]+)", prose) + re.findall(r'src="([^"]+)"', prose)
    assert len(targets) >= 3
    assert [target for target in targets if not re.match(r"https?:|mailto:", target)] == []
    own = rf"{re.escape(notebooks.REPOSITORY)}/(blob|raw|tree)/main/([^#]+)"
    files = [match.group(2) for target in targets if (match := re.match(own, target))]
    assert files and all((ROOT / file).exists() for file in files)


def test_python_blocks_and_commands_become_cells():
    page = ROOT / "docs" / "4_grpo.md"
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)\n```", text, re.MULTILINE | re.DOTALL)
    code = cells(page, "code")
    assert [cell for cell in code if cell in blocks] == blocks
    assert any(re.search(r"^!python grpo_llm\.py$", cell, re.MULTILINE) for cell in code)
    assert any(re.search(r"^# !python benchmarks/break_grpo\.py$", cell, re.MULTILINE) for cell in code)
    assert "--model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --max-hours 1" in code[-1] and "--ask" in code[-1]
    commands = [line for line in "\n".join(code).splitlines() if re.match(r" *(# )?!", line)]
    assert len(commands) >= 15 and all(line.count("{}") == line.count("{{}}") for line in commands)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/1_ppo.md", "docs/zh/1_ppo.md"])
def test_the_first_cell_clones_the_repository_where_there_is_none(page, tmp_path):
    source, elsewhere = tmp_path / "NAME", tmp_path / "elsewhere"
    source.mkdir()
    elsewhere.mkdir()
    for file in ("requirements.txt", "gae_reference.py"):
        (source / file).write_bytes((ROOT / file).read_bytes())
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *words], cwd=source, check=True, capture_output=True)
    first = cells(ROOT / page, "code")[0]
    ast.parse(first)
    assert notebooks.REPOSITORY in first
    first = first.replace(notebooks.REPOSITORY, source.as_uri())
    code = f"{first}\nimport gae_reference\nprint('file', gae_reference.__file__)"
    for folder in (elsewhere, elsewhere, elsewhere / "NAME"):  # cloned, cloned already, inside the clone
        run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert f"file {elsewhere / 'NAME' / 'gae_reference.py'}" in run.stdout and "device     cpu" in run.stdout


@pytest.mark.site
@pytest.mark.parametrize("page", ENGLISH, ids=name)
def test_notebook_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    pytest.importorskip("nbclient", reason="pip install -r docs/requirements.txt")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import notebooks as benchmark

    notebook, *_ = benchmark.run(ROOT / "docs" / "notebooks" / notebooks.place(page), tmp_path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and not is_comment(cell.source)]
    assert [cell.source for cell in code if cell.execution_count is None] == []
    assert any("text" in output for cell in code for output in cell.outputs)


def is_comment(source):
    return all(line.startswith("#") for line in source.splitlines())
