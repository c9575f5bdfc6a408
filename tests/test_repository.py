"""What the repository says of itself is so: commands parse, versions agree, tags and tests exist."""

import inspect
import os
import re
import shlex
import subprocess
import tomllib

import pytest
import tyro
from contract import ROOT, SCRIPTS, load_script

TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]


def read(path):
    return path.read_text(encoding="utf-8")


def requirements():
    lines = (line.split("#")[0].strip() for line in read(ROOT / "requirements.txt").splitlines())
    return dict(line.split("==") for line in lines if line)


def commands():
    """Every command line in a fenced block of the documentation, and every one that a script's docstring gives."""
    found = []
    for path in TEXTS:
        for block in re.findall(r"^```bash\n(.*?)^```", read(path), re.MULTILINE | re.DOTALL):
            found += [(path.name, line.strip()) for line in block.splitlines() if line.strip()]
    for script in SCRIPTS:
        found += [(script.name, line.strip()) for line in re.findall(r"^Run +(.+)$", read(script), re.MULTILINE)]
    return found


def test_requirements_are_pinned():
    assert requirements()["torch"] == "2.13.0"
    assert len(requirements()) >= 10
    assert all(re.fullmatch(r"[\d.]+", version) for version in requirements().values())


@pytest.mark.parametrize("path", [ROOT / "gae_reference.py", *SCRIPTS], ids=lambda path: path.stem)
def test_inline_metadata_agrees_with_requirements(path):
    """PEP 723: `uv run SCRIPT` installs what requirements.txt would."""
    block = re.search(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", read(path), re.MULTILINE).group(1)
    metadata = tomllib.loads("".join(line[2:] or "\n" for line in block.splitlines(keepends=True)))
    assert metadata["requires-python"] == ">=3.11"
    pinned = dict(dependency.split("==") for dependency in metadata["dependencies"])
    assert pinned.items() <= requirements().items()
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", read(path), re.MULTILINE))
    needed = {name for name in requirements() if name in imported} | (
        {"tensorboard"} if "SummaryWriter" in read(path) else set()
    )
    assert needed <= pinned.keys()
    assert path.name == "gae_reference.py" or "torch" in needed


def test_documented_commands_parse():
    """Every `python SCRIPT.py …` in the documentation is accepted by that script's Args."""
    parsed = 0
    for where, line in commands():
        for part in re.split(r"&&|;", line):
            words = shlex.split(part, comments=True)
            names = [word for word in words if word.endswith(".py")]
            if not names or "pytest" in words or not re.search(r"(^|/)(python3?|uv)$", words[0]):
                continue
            script = ROOT / names[0]
            assert script.exists(), f"{where}: {part.strip()} names no file of this repository"
            if script in SCRIPTS and "--help" not in words:
                tyro.cli(load_script(script).Args, args=words[words.index(names[0]) + 1 :])
                parsed += 1
    assert parsed >= 5


def test_ci_runs_the_test_command_of_the_readme():
    block = re.search(r"<!-- test -->\n```bash\n(.+?)\n```", read(ROOT / "README.md")).group(1)
    assert block in read(ROOT / ".ci" / "run").splitlines()
    assert block.endswith("python -m pytest")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_tags_and_details_agree():
    """Each tag in a script stands in docs/details.md and the other way round; the tests named there exist."""
    details = read(ROOT / "docs" / "details.md")
    listed = set(re.findall(r"^\| ([DRG]\d+) \|", details, re.MULTILINE))
    used = {tag for script in SCRIPTS for tag in re.findall(r"\[([DRG]\d+)\]", read(script).split('"""', 2)[2])}
    assert used == listed
    assert {f"D{i}" for i in range(1, 14)} <= used
    for row in re.findall(r"^\| [DRG]\d+ \|.*$", details, re.MULTILINE):
        assert re.search(r"`tests/\w+\.py::test_\w+` \|$", row), row
    named = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", details)
    assert len(named) >= 13
    for file, test in named:
        assert re.search(rf"^def {test}\(", read(ROOT / file), re.MULTILINE), f"{file} has no {test}"


def test_links_resolve():
    links = 0
    for path in TEXTS:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", read(path)):
            if not re.match(r"\w+:", target):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"
                links += 1
    assert links > 3


def test_scripts_stand_alone():
    """No script imports another, and none evaluates text."""
    names = {path.stem for path in SCRIPTS} | {"gae_reference", "tests", "contract", "check"}
    for path in SCRIPTS:
        imported = set(re.findall(r"^\s*(?:import|from) (\w+)", read(path), re.MULTILINE))
        assert "torch" in imported and not imported & (names - {path.stem})
        assert not re.search(r"(?<![.\w])(eval|exec)\(", read(path))  # model.eval() is another thing


def test_every_script_keeps_the_contract():
    for path, functions in SCRIPTS.items():
        module = load_script(path)
        for name, arguments in functions.items():
            assert list(inspect.signature(getattr(module, name)).parameters) == arguments


@pytest.fixture
def pytest_on(request, tmp_path):
    """Run `python -m pytest --script` on a text as a reader would; returns (exit status, output)."""

    def run(text):
        import sys

        path = tmp_path / "my_ppo.py"
        path.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "--script", path, "-p", "no:cacheprovider"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return result.returncode, result.stdout + result.stderr

    return run


def test_script_option_passes_a_right_copy_and_names_what_is_lacking(pytest_on):
    source = read(ROOT / "ppo_cartpole.py")
    start = source.index("def compute_gae")
    equation = source[start : source.index("def clipped_policy_loss")]
    status, output = pytest_on("import torch\n\n" + equation)
    assert status == 0, output
    assert "passed" in output and "failed" not in output
    for name in ("clipped_policy_loss", "clipped_value_loss", "approx_kl"):
        assert f"my_ppo.py defines no {name}" in output
    assert "defines no compute_gae" not in output


def test_script_option_says_which_equation_is_wrong(pytest_on):
    """The classic: the time limit treated as death."""
    source = read(ROOT / "ppo_cartpole.py").replace("torch.where(terminated, 0.0", "torch.where(done, 0.0")
    status, output = pytest_on(source)
    assert status == 1
    assert "GAE Eq. 16" in output and "expected  [[1.5]]" in output and "got       [[-1.0]]" in output
    assert "one step, truncated: r=1, V=2, V(next)=5, γ=0.5" in output
    assert "PPO Eq. 7" not in output  # the other equations are right


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def compute_gae(rewards, values):\n    return rewards\n", "this one takes (rewards, values)"),
        ("import nothing_of_this_name\n", "cannot be imported: ModuleNotFoundError"),
        ("def broken(:\n", "cannot be imported: SyntaxError"),
    ],
)
def test_script_option_explains_what_it_cannot_check(pytest_on, text, expected):
    status, output = pytest_on(text)
    assert status != 0 and expected in output
