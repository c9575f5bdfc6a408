"""The options --script and --mutant, and why they have a file of their own.

pytest looks for its configuration beside the paths on its command line. `--script ~/mine/my_ppo.py` would send it to
~/mine, where it finds no pytest.ini, no conftest.py and so no such option. Hence this plugin: script_option.dist-info
names it as an entry point, which `python -m pytest` finds in the current directory; conftest.py loads it otherwise.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption("--script", type=Path, help="check the equations of this file instead of the project's scripts")
    parser.addoption("--mutant", type=Path, help="run the suite on this file in place of the script of its name")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Begin again with the project's own configuration if the path led pytest to another one."""
    if config.inipath == ROOT / "pytest.ini":
        return None
    arguments = ["-c", str(ROOT / "pytest.ini"), "--rootdir", str(ROOT)]
    for argument in config.invocation_params.args:
        path = config.getoption("--script")
        arguments.append(str(path.resolve()) if path is not None and argument == str(path) else str(argument))
    return pytest.main(arguments)
