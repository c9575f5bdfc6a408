"""What the repository says of itself is so: commands parse, versions agree, tags and tests exist."""

import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
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
            lines = re.sub(r"\\\n\s*", "", block).splitlines()  # a backslash continues a line
            found += [(path.name, line.strip()) for line in lines if line.strip()]
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
                config = (tyro.conf.DisallowNone,)  # as parse_args() of grpo_llm.py has it
                tyro.cli(load_script(script).Args, args=words[words.index(names[0]) + 1 :], config=config)
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
    headings = re.findall(r"^### ([DRG]\d+) (.+)$", details, re.MULTILINE)
    listed = {tag for tag, _ in headings}
    programs = [*SCRIPTS, ROOT / "benchmarks" / "memory_plan.py"]
    used = {tag for script in programs for tag in re.findall(r"\[([DRG]\d+)\]", read(script).split('"""', 2)[2])}
    assert used == listed and len(headings) == len(listed)
    assert {f"D{i}" for i in range(1, 14)} <= used
    contents = re.findall(r"^  \[([DRG]\d+)\]\(#([\w-]+)\)$", details.split("\n## ")[0], re.MULTILINE)
    assert [tag for tag, _ in contents] == [tag for tag, _ in headings]
    assert all(anchor.startswith(f"{tag.lower()}-") for tag, anchor in contents)
    parts = r"\S+ .+\n\n\* \*\*What\.\*\* .+\n\* \*\*Why\.\*\* .+\n\* \*\*Test\.\*\* `tests/\w+\.py::test_\w+`\n"
    for detail in re.split(r"^#{2,3} ", details, flags=re.MULTILINE):
        if re.match(r"[DRG]\d+ ", detail):
            assert re.match(parts, detail, re.DOTALL), detail
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


IMPORTS = """
import contextlib, importlib, io, sys
import torch
known = set(sys.modules)
for script in sys.argv[1:]:
    module = importlib.import_module(script)
    for when in ("import", "help"):
        if when == "help":
            sys.argv = [f"{script}.py", "--help"]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                module.main()
        names = {name.partition(".")[0] for name in set(sys.modules) - known}
        known |= set(sys.modules)
        print(script, when, *names - sys.stdlib_module_names)
"""


@pytest.mark.slow
def test_import_and_help_wait_for_little_but_torch():
    """transformers, datasets, TensorBoard, Matplotlib and the emulator take seconds. Only a run imports them."""
    scripts = ["rlhf_gpt2_ppo", "grpo_llm", "ppo_cartpole", "ppo_atari"]
    run = subprocess.run([sys.executable, "-c", IMPORTS, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    words = [line.split() for line in run.stdout.splitlines()]
    new = {(script, when): set(names) for script, when, *names in words}
    assert len(new) == 8 and all(script in new[script, "import"] for script in scripts)
    assert "gymnasium" in new["ppo_cartpole", "import"] and "tyro" in new["rlhf_gpt2_ppo", "help"]
    quick = {"gymnasium", "farama_notifications", "numpy", "cython_runtime", "tyro", "docstring_parser", "typeguard"}
    slow = {name for names in new.values() for name in names if not name.startswith("_")} - quick - set(scripts)
    assert slow == set()


def test_every_script_keeps_the_contract():
    for path, functions in SCRIPTS.items():
        module = load_script(path)
        for name, arguments in functions.items():
            assert list(inspect.signature(getattr(module, name)).parameters) == arguments


@pytest.fixture
def pytest_on(tmp_path, monkeypatch, capsys):
    """Run pytest with --script on a text; returns (exit status, output).

    It runs in this process and without Hypothesis, which takes most of the time and proves nothing about the report.
    """

    def run(text, name="my_ppo.py", option="--script", folder=tmp_path):
        (tmp_path / name).write_text(text, encoding="utf-8")
        monkeypatch.chdir(ROOT)
        capsys.readouterr()
        options = ["-m", "not hypothesis", "--capture=sys", "-p", "no:cacheprovider"]
        status = pytest.main([f"{option}={folder}/{name}", *options])
        return status, "".join(capsys.readouterr())

    return run


def equations_of(script):
    """The equations of a script as a file of its own. A short file: pytest parses it for each failure that it shows."""
    (equations,) = re.findall(r"^# ---- Equations ----\n.*?(?=^# ----)", read(ROOT / script), re.MULTILINE | re.DOTALL)
    return f"import math\n\nimport torch\nfrom torch import nn\n\n\n{equations}"


def one_equation(name):
    """The text of a file with one equation of ppo_cartpole.py and nothing else."""
    source = equations_of("ppo_cartpole.py")
    start = source.index(f"def {name}")
    return "import torch\n\n\n" + source[start : source.index("\n\n\n", start)] + "\n"


@pytest.mark.slow
def test_a_named_file_runs_its_slow_tests_too():
    """The default run leaves out what is marked "slow"; a file of slow tests alone would have none."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/test_track.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "test_every_scalar_arrives" in run.stdout, run.stdout


@pytest.mark.slow
def test_script_command_of_the_readme_in_another_directory(tmp_path):
    """In a process of its own, by a relative path with a space, and with the tests that use Hypothesis."""
    path = tmp_path / "my files" / "my_ppo.py"
    path.parent.mkdir()
    path.write_text(one_equation("approx_kl"), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", f"--script={os.path.relpath(path, ROOT)}", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert section(run.stdout)[0] == "1 of 4 correct; my_ppo.py defines no compute_gae"


def test_script_option_finds_the_home_directory(pytest_on, tmp_path, monkeypatch):
    """No shell replaces a ~ that follows an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    status, output = pytest_on(one_equation("approx_kl"), folder="~")
    assert status == 0 and section(output)[0].startswith("1 of 4 correct"), output


def section(output):
    """The lines of the summary, which stands before any failure at length."""
    before = output.split("= FAILURES =")[0]
    return re.search(r"=+ summary of \S+ =+\n(.*?)\n\n", before, re.DOTALL).group(1).strip().splitlines()


def without(source, name, following):
    """A script's text less one of its functions."""
    return source[: source.index(f"def {name}")] + source[source.index(f"def {following}") :]


def test_script_option_passes_a_right_copy_and_names_what_is_lacking(pytest_on):
    """One line for each function that is missing, and no failure."""
    status, output = pytest_on(one_equation("compute_gae"))
    assert status == 0, output
    assert "passed" in output and "failed" not in output
    missing = ("clipped_policy_loss", "clipped_value_loss", "approx_kl")
    assert section(output) == [
        "1 of 4 correct; my_ppo.py defines no clipped_policy_loss",
        *(f"my_ppo.py defines no {name}" for name in missing[1:]),
    ]
    assert all(output.count(name) == 1 for name in missing), output


def test_script_option_says_which_equation_is_wrong(pytest_on):
    """The classic: the time limit treated as death."""
    source = equations_of("ppo_cartpole.py").replace("torch.where(terminated, 0.0", "torch.where(done, 0.0")
    status, output = pytest_on(source)
    assert status == 1
    (summary,) = section(output)
    assert summary.startswith("3 of 4 correct; compute_gae is wrong: ")
    assert re.search(r"expected \[.+\], got \[", summary) and len(summary) < 300
    assert "GAE Eq. 16" in output and "expected  [[1.5]]" in output and "got       [[-1.0]]" in output
    assert "one step, truncated: r=1, V=2, V(next)=5, γ=0.5" in output
    assert "PPO Eq. 7" not in output  # the other equations are right


def test_script_option_says_simple_functions_first(pytest_on):
    """One raises, and so does what calls it; one is wrong, one is missing; a test of two blames the wrong one."""
    source = equations_of("grpo_llm.py").replace("return log_ratio.expm1() - log_ratio", "return -log_ratio")
    source = source.replace("groups = rewards.view(-1, group_size)", "groups = rewards.view(7, 7, 7)")
    status, output = pytest_on(without(source, "reduce_loss", "sequence_logprob"), "my_grpo.py")
    assert status == 1
    lines = section(output)
    assert lines[0].startswith("2 of 6 correct; group_advantages is wrong: RuntimeError: shape '[7, 7, 7]' is invalid")
    assert lines[1].startswith("process_advantages is wrong: ") and lines[2].startswith("kl_k3 is wrong: ")
    assert lines[3:] == [
        "my_grpo.py defines no reduce_loss",
        "Begin with the first: what calls a wrong function is wrong too.",
    ]


def test_script_option_does_not_blame_a_right_function_that_is_tested_beside_a_wrong_one(pytest_on):
    source = equations_of("grpo_llm.py").replace(
        "loss + beta * kl_k3(logprob, ref_logprob)\n\n", "loss + kl_k3(logprob, ref_logprob)\n\n"
    )
    status, output = pytest_on(source, "my_grpo.py")
    assert status == 1
    assert len(section(output)) == 1 and section(output)[0].startswith("5 of 6 correct; grpo_token_loss is wrong: ")


def test_script_option_names_the_cause_of_a_rounding_to_float32(pytest_on):
    """γλ times a bool is a float32, in an equation that is right."""
    right = "gamma * gae_lambda * torch.where(done[t], 0.0, last)"
    source = equations_of("ppo_cartpole.py")
    assert right in source
    status, output = pytest_on(source.replace(right, "gamma * gae_lambda * (~done[t]) * last"))
    assert status == 1
    (summary,) = section(output)
    assert "A Python float times a bool or integer tensor is float32" in summary


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def compute_gae(rewards, values):\n    return rewards\n", "this one takes (rewards, values)"),
        ("import nothing_of_this_name\n", "cannot be imported: ModuleNotFoundError"),
        ("def broken(:\n", "cannot be imported: SyntaxError"),
        ("x = 1\n", "defines none of the functions that can be checked"),
    ],
)
def test_script_option_explains_what_it_cannot_check(pytest_on, text, expected):
    status, output = pytest_on(text)
    assert status != 0 and expected in output
    assert "Traceback" not in output


def test_mutant_option_names_the_script_that_was_meant(pytest_on):
    status, output = pytest_on("x = 1\n", "ppo_cartpol.py", "--mutant")
    assert status == 2
    assert "ppo_cartpol.py is none of " in output and "did you mean ppo_cartpole.py?" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        (["--help"], 0, "python tests/mutants.py --write N FILE [SCRIPT]"),
        (["grpo_lm.py"], 2, "did you mean grpo_llm.py?"),
        (["--write", "1", "bug.py", "xyz"], 2, "xyz is none of ppo_cartpole.py"),
        (["--write", "0", "bug.py"], 2, "--write takes a number from 1 to"),
        (["--write", "1", "nowhere/bug.py"], 2, "there is no such directory"),
        (["--wrong"], 2, "unrecognized arguments: --wrong"),
    ],
)
def test_mutants_command_line(words, status, expected, tmp_path):
    """Help is help, and a mistake is a sentence with exit status 2; nothing is planted."""
    command = [sys.executable, ROOT / "tests" / "mutants.py", *words]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (run.returncode, list(tmp_path.iterdir())) == (status, [])
    assert expected in run.stdout + run.stderr and "Traceback" not in run.stderr


PAGES = {"1_ppo.md": "ppo_cartpole.py", "3_rlhf.md": "rlhf_gpt2_ppo.py", "4_grpo.md": "grpo_llm.py"}


@pytest.mark.parametrize("page", PAGES)
def test_signatures_of_the_exercises_are_those_of_the_script(page):
    """Names, order and defaults, one line for each function of the contract."""
    block = re.search(r'^signatures = """\n(.*?)"""', read(ROOT / "docs" / page), re.MULTILINE | re.DOTALL).group(1)
    on_page = dict(re.findall(r"^(\w+)(\([^)]*\))", block, re.MULTILINE))
    script = ROOT / PAGES[page]
    module = load_script(script)
    assert on_page == {name: str(inspect.signature(getattr(module, name))) for name in SCRIPTS[script]}


def test_the_experiments_that_break_grpo_can_be_made(monkeypatch):
    """The lines that benchmarks/break_grpo.py changes stand in the script, and what it leaves compiles."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "break_grpo.py"))
    changes = [change for _, change in benchmark["EXPERIMENTS"].values() if change]
    assert len(changes) == 2
    for right, wrong in changes:
        source = read(ROOT / "grpo_llm.py")
        assert source.count(right) == 1
        compile(source.replace(right, wrong), "grpo_llm.py", "exec")


def test_the_stages_of_r1_are_commands(monkeypatch):
    """Each stage of benchmarks/r1.py has flags that the script takes, and needs earlier stages alone."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "r1.py"))
    config, done = (tyro.conf.DisallowNone,), {"solutions": "s.jsonl", "pattern": benchmark["READABLE"]}
    for stage, flags in benchmark["RECIPE"] + benchmark["READABILITY"]:
        words = [word.format(**done) for word in re.findall(r"\S*\{[^}]*\}\S*|\S+", flags)]  # KeyError: no such stage
        tyro.cli(load_script(ROOT / "grpo_llm.py").Args, args=words, config=config)
        done[stage] = stage.replace(" ", "_")
    assert re.fullmatch(benchmark["READABLE"], "3+4=7\n7+2=9\n#9")
    assert not re.fullmatch(benchmark["READABLE"], "3+4=7\n7,2:9\n#9")
