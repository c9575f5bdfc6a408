"""Every page with runnable blocks as a notebook, in English and in Chinese.

Run      python docs/notebooks.py               (a second; needs nothing but Python)
Writes   docs/notebooks/PAGE.ipynb, docs/notebooks/zh/PAGE.ipynb, or below --out DIR
         The pages' links to the hosted notebooks, if the address in pyproject.toml has changed.

A notebook is JSON, so no package is needed to write one. The notebooks are in the repository because a hosted service
opens them from there. They have no outputs. tests/test_notebooks.py checks that they are up to date, and runs them.

* A Python block becomes a cell.
* A block of commands becomes a cell too. A command of SHORT runs. Every other command is a comment: it takes minutes
  or hours, or it needs a GPU or a file of the reader's. A block with commands that no notebook can run stays text.
* Links and pictures lead to the repository's address, because a hosted notebook has no files beside it.
"""

import argparse
import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["site"]["repository"]
HOST = "https://colab.research.google.com/github/"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
FOR_A_GPU = ("4_grpo", "5_full_size")  # a hosted notebook of these asks for a GPU

SHORT = {  # commands that a notebook runs: each takes less than about two minutes on one core
    "python gae_reference.py",
    "python benchmarks/foundations.py",
    "python ppo_cartpole.py",
    "python ppo_cartpole.py --total-timesteps 100000 --clip-coef 1000",
    "python ppo_cartpole.py --total-timesteps 100000 --gae-lambda 0",
    "python ppo_cartpole.py --total-timesteps 100000 --update-epochs 1 --num-minibatches 1",
    "python rlhf_gpt2_ppo.py",
    'python rlhf_gpt2_ppo.py --ask "The music of this musical"',
    "python grpo_llm.py",
    "python grpo_llm.py --ask 3+4+5",
    "mkdir -p bug",
}
SHORT_PATTERNS = (  # planted bugs and the tests that find them; the planner of memory
    r"python tests/mutants\.py --write .+",
    r"python -m pytest --script=bug\w*\.py",
    r"python -m pytest -x --mutant=bug/.+",
    r"sed .+ > bug_b\.py",
    r"python benchmarks/memory_plan\.py .+",
)
RUNNABLE = ("python ", "tensorboard ", "torchrun ", "mkdir ", "cp ", "sed ", "diff ")

WORDS = {
    "en": {
        "button": "Open this page as a notebook",
        "made": "*This notebook is made from [a page of the repository]({page}). The next cell prepares it: it finds "
        "or clones the repository, installs the packages, and picks a GPU if there is one.*",
        "remove": "Remove the # before a command to run it. It takes longer, or it needs a GPU or a file of yours.",
        "curves": "Remove the # before both lines to see the curves.",
        "first": "It uses the repository in which this notebook is. Elsewhere it clones the repository.",
        "restart": "If a later cell cannot import a package, restart the kernel and run this cell again.",
        "real": "## A real model on a borrowed GPU\n\nThis cell trains a model of 0.5 billion parameters on GSM8K. It "
        "needs a GPU with 16 GB, such as a hosted notebook lends, and it stops after one hour. Then it asks the "
        "trained model a question.",
    },
    "zh": {
        "button": "把本页作为笔记本打开",
        "made": "*这个笔记本由[仓库中的一页]({page})生成。下一个单元格做准备：找到或克隆仓库，安装所需的包，"
        "有 GPU 就选一块。*",
        "remove": "去掉命令前面的 # 就能运行它。它需要更长时间，或者需要 GPU，或者需要你自己的文件。",
        "curves": "去掉这两行前面的 #，就能看曲线。",
        "first": "笔记本在仓库里时使用这个仓库，否则克隆一份。",
        "restart": "如果后面的单元格导入不了某个包，请重启内核，再运行本单元格。",
        "real": "## 在借来的 GPU 上训练真实模型\n\n这个单元格用 GSM8K 训练一个 5 亿参数的模型。"
        "它需要一块 16 GB 的 GPU，托管的笔记本服务通常可以借到。训练一小时后停止，然后向训练好的模型提一个问题。",
    },
}

FIRST = """# {first}
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "{repository}"
clone = Path(REPOSITORY.rsplit("/", 1)[1]).resolve()
found = [folder for folder in (Path.cwd(), *Path.cwd().parents, clone) if (folder / "gae_reference.py").exists()]
if not found:
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, clone], check=True)
    found = [clone]
os.chdir(found[0])
sys.path.insert(0, str(found[0]))
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]  # !python is this Python


def is_installed(line):
    name, version = line.split("==")
    try:
        return importlib.metadata.version(name).split("+")[0] == version
    except importlib.metadata.PackageNotFoundError:
        return False


needed = [line.strip() for line in open("requirements.txt") if "==" in line]
if not all(is_installed(line) for line in needed):
    # {restart}
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", "requirements.txt"], check=True)

import torch

torch.set_num_threads(1)  # the examples are small
device = "cpu"
if torch.cuda.is_available():  # the GPU with the most free memory
    free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    device = f"cuda:{{free.index(max(free))}}"
print("repository", found[0])
print("device    ", device, torch.cuda.get_device_name(device) if device != "cpu" else "")"""

REAL = """if device == "cpu":
    print("There is no GPU here, so this cell is skipped. A hosted notebook lends one: change the type of the runtime.")
else:
    !python grpo_llm.py --device {device} --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --max-hours 1
    !python grpo_llm.py --device {device} --ask "Ann has 4 boxes of 12 eggs and eats 9. How many are left?\""""


def language(page):
    return "zh" if page.parent.name == "zh" else "en"


def pages():
    """The pages that have a Python block, in both languages."""
    found = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "zh").glob("*.md"))]
    return [page for page in found if re.search(r"^```python$", page.read_text(encoding="utf-8"), re.MULTILINE)]


def place(page):
    """Where a page's notebook is, below the folder of the notebooks."""
    return Path("zh" if language(page) == "zh" else "") / f"{page.stem}.ipynb"


def address(page):
    """Where the hosted service opens a page's notebook."""
    return f"{HOST}{REPOSITORY.split('/', 3)[3]}/blob/main/docs/notebooks/{place(page).as_posix()}"


def with_button(page):
    """A page's text, with the line below its title that leads to the hosted notebook."""
    line = f"[{WORDS[language(page)]['button']}]({address(page)})"
    title, rest = page.read_text(encoding="utf-8").split("\n\n", 1)
    rest = re.sub(rf"\A\[[^\]]*\]\({re.escape(HOST)}[^)]*\)\n\n", "", rest)
    return f"{title}\n\n{line}\n\n{rest}"


def absolute(text, page):
    """A page's text with links and pictures that lead to the repository's address."""

    def target(match):
        before, path, anchor, after = match.groups()
        full = (page.parent / path).resolve().relative_to(ROOT).as_posix() if path else page.relative_to(ROOT)
        kind = "raw" if str(full).endswith((".png", ".gif", ".svg")) else "blob"  # raw: the picture, not its page
        if (ROOT / full).is_dir():
            kind = "tree"
        return f"{before}{REPOSITORY}/{kind}/main/{full}{anchor}{after}"

    link = r"(\]\()(?!\w+:)([^)#\s]*)((?:#[^)\s]+)?)(\))"
    image = r'(<img [^>]*src=")(?!\w+:)([^"#]+)()(")'
    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.MULTILINE | re.DOTALL)  # prose, code, prose, …
    parts[::2] = [re.sub(image, target, re.sub(link, target, prose)) for prose in parts[::2]]
    return "".join(parts)


def is_short(command):
    return command in SHORT or any(re.fullmatch(pattern, command) for pattern in SHORT_PATTERNS)


def commands_cell(text, words):
    """The code of a block of commands, or None if it stays text."""
    lines = re.sub(r" *\\\n\s*", " ", text).splitlines()
    if not all(line.startswith(RUNNABLE) for line in lines):
        return None
    code, is_explained = [], False
    for line in lines:
        escaped = line.replace("{", "{{").replace("}", "}}")  # IPython puts a variable in the place of {name}
        if is_short(line):
            code.append(f"!{escaped}")
        elif line.startswith("tensorboard "):
            code += [f"# {words['curves']}", "# %load_ext tensorboard", f"# %{line}"]
        else:
            code += [] if is_explained else [f"# {words['remove']}"]
            code.append(f"# !{escaped}")
            is_explained = True
    return "\n".join(code)


def cells_of(page):
    """[(kind, text)] of a page's notebook; kind is "markdown" or "code"."""
    words = WORDS[language(page)]
    text = with_button(page)
    here = f"{REPOSITORY}/blob/main/{page.relative_to(ROOT).as_posix()}"
    cells, prose, end = [], "", 0

    def flush():
        # each section is a cell; what is inside a fence is no heading
        nonlocal prose
        parts, is_code = [""], False
        for line in prose.splitlines(keepends=True):
            is_code ^= line.lstrip().startswith("```")
            starts = not is_code and re.match(r'## |<a id="[^"]+"></a>\n', line)
            if starts and not re.fullmatch(r'\s*(<a id="[^"]+"></a>\s*)*', parts[-1]):
                parts.append("")
            parts[-1] += line
        cells.extend(("markdown", absolute(part.strip("\n"), page)) for part in parts if part.strip())
        prose = ""

    for match in BLOCK.finditer(text):
        prose += text[end : match.start()]
        kind, code = match.groups()
        code = code.rstrip("\n") if kind == "python" else commands_cell(code, words)
        if code is None:
            prose += match.group(0)
        else:
            flush()
            cells.append(("code", code))
        end = match.end()
    prose += text[end:]
    flush()
    title, rest = cells[0][1].split("\n\n", 1)
    first = FIRST.format(first=words["first"], restart=words["restart"], repository=REPOSITORY)
    cells[:1] = [("markdown", f"{title}\n\n{words['made'].format(page=here)}"), ("code", first), ("markdown", rest)]
    if page.stem == "4_grpo":
        cells += [("markdown", words["real"]), ("code", REAL)]
    return cells


def notebook(page):
    """A page as a notebook: the text of its file."""
    cells = []
    for number, (kind, text) in enumerate(cells_of(page), 1):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        cells.append({**cell, "execution_count": None, "outputs": []} if kind == "code" else cell)
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    if page.stem in FOR_A_GPU:
        metadata |= {"accelerator": "GPU", "colab": {"gpuType": "T4"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n"


def write_notebooks(target):
    """Write the notebook of each page below this folder: the paths, English first."""
    written = []
    for page in pages():
        path = Path(target) / place(page)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(notebook(page), encoding="utf-8")
        written.append(path)
    return written


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "notebooks", help="folder of the notebooks")
    target = parser.parse_args().out
    for page in pages():
        if (text := with_button(page)) != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
    written = write_notebooks(target)
    print(f"{len(written)} notebooks in {target}, {sum(path.stat().st_size for path in written) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
