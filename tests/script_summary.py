"""What `python -m pytest --script=FILE` adds: it chooses the tests, runs simple functions first, and begins its report
with a summary: how many functions are correct, what is wrong with the others, which ones the file does not define."""

import re

import contract
import pytest


def names_of(item):
    """The functions of the contract that a test looks at, the simplest first."""
    parameters = getattr(item, "callspec", None)
    found = {value[1] for value in parameters.params.values() if isinstance(value, contract.Case)} if parameters else ()
    return tuple(name for name in contract.SIMPLE_FIRST if name in found)


def in_one_line(message, most=200):
    """The case of a failure, what was expected and what came out; of an exception its own last line."""
    parts = dict(re.findall(r"^  (case|expected|got|differs) +(.+)$", message, re.MULTILINE))
    if "as coarse as float32" in parts.get("differs", ""):
        line = f"{parts['case']}: differs {parts['differs']}"
        most = 400  # the hint is what helps
    elif "case" in parts:
        line = f"{parts['case']}: expected {parts['expected']}, got {parts['got']}"
    else:
        errors = re.findall(r"^E +(.*\S)", message, re.MULTILINE)
        line = errors[0] if errors else message.strip().splitlines()[-1]
    return line if len(line) <= most else f"{line[:most]} …"


class ScriptSummary:
    def __init__(self, path):
        self.path, self.module = path, contract.load_script(path)
        self.family = contract.family_of(self.module)
        self.defined = [name for name in self.family if hasattr(self.module, name)]
        if not self.defined:
            pytest.exit(
                f"error: {path} defines none of the functions that can be checked. The exercises of a stage's page "
                f"list them; those of stage 1 are {', '.join(contract.PPO)}",
                returncode=2,
            )
        self.passed, self.wrong = set(), {}

    def pytest_ignore_collect(self, collection_path):
        """A file without tests of equations is not even imported: that takes seconds."""
        is_file = collection_path.suffix == ".py"
        return True if is_file and "mark.equation" not in collection_path.read_text(encoding="utf-8") else None

    @pytest.hookimpl(trylast=True)  # after pytest's own sorting
    def pytest_collection_modifyitems(self, config, items):
        """Keep the tests of the functions that the file defines. A wrong argument list is said once a function."""
        misfit = {
            name
            for name in self.defined
            if contract.signature_error(getattr(self.module, name), self.family[name]) is not None
        }
        kept = []
        for item in items:
            names = names_of(item)
            can_run = item.originalname == "test_arguments" or not misfit.intersection(names)
            if item.get_closest_marker("equation") and names and set(names) <= set(self.defined) and can_run:
                kept.append(item)
                item.user_properties.append(("functions", names))  # for the report, in whatever process
        kept.sort(key=lambda item: contract.SIMPLE_FIRST.index(names_of(item)[-1]))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_runtest_logreport(self, report):
        names = dict(report.user_properties)["functions"]
        if report.failed:  # of several functions the first that is wrong by itself, else the most composed
            wrong = next((name for name in names if name in self.wrong), names[-1])
            self.wrong.setdefault(wrong, in_one_line(report.longreprtext))
        elif report.when == "call" and report.passed:
            self.passed.update(names)

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # before the failures at length
    def pytest_terminal_summary(self, terminalreporter):
        correct = [name for name in self.defined if name in self.passed and name not in self.wrong]
        lines = [f"{name} is wrong: {self.wrong[name]}" for name in contract.SIMPLE_FIRST if name in self.wrong]
        lines += [f"{self.path.name} defines no {name}" for name in self.family if name not in self.defined]
        lines += [
            f"{name} was not checked" for name in self.defined if name not in self.passed and name not in self.wrong
        ]
        terminalreporter.section(f"summary of {self.path.name}")
        terminalreporter.line("; ".join([f"{len(correct)} of {len(self.family)} correct", *lines[:1]]))
        for line in lines[1:]:
            terminalreporter.line(line)
        if len(self.wrong) > 1:
            terminalreporter.line("Begin with the first: what calls a wrong function is wrong too.")
        terminalreporter.line("")
        return (yield)
