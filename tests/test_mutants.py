"""The suite must fail on every planted bug (python -m pytest -m mutants)."""

import ast
import re

import mutants
import pytest


@pytest.mark.mutants
@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=[": ".join(mutant[:2]) for mutant in mutants.MUTANTS])
def test_mutant_is_caught(mutant, tmp_path):
    """By the test that caught it last time (benchmarks/results/mutants.txt), which is quick, or else by any."""
    assert mutants.catch(mutant, tmp_path), f"no test noticed: {mutant[1]}"


def test_every_mutant_can_be_planted():
    """The text that each replaces stands in its script exactly once, and the changed block of code can be parsed."""
    assert all(sum(mutant[0] == script for mutant in mutants.MUTANTS) >= 15 for script in mutants.SUITES)
    sources = {script: (mutants.ROOT / script).read_text(encoding="utf-8") for script in mutants.SUITES}
    for script, what, right, wrong in mutants.MUTANTS:
        source = sources[script]
        assert source.count(right) == 1, f"{what!r}: its text stands {source.count(right)} times in {script}, not once"
        begin = source.index(right)
        end = begin + len(right)
        block_begin = max(source.rfind("\n\n\n", 0, begin), 0)  # two empty lines stand between functions
        block_end = source.find("\n\n\n", end)
        ast.parse(source[block_begin:begin] + wrong + source[end:block_end], what)


def test_results_say_how_many_there_are():
    text = (mutants.ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    for script in mutants.SUITES:
        count = sum(mutant[0] == script for mutant in mutants.MUTANTS)
        assert re.search(rf"\b{count}\s+(planted\s+bugs\s+)?in\s+`{script}`", text), f"{count} in {script}"
