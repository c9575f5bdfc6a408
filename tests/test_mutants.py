"""The suite must fail on every planted bug (python -m pytest -m mutants)."""

import ast

import mutants
import pytest


@pytest.mark.mutants
@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=[": ".join(mutant[:2]) for mutant in mutants.MUTANTS])
def test_mutant_is_caught(mutant, tmp_path):
    """By the test that caught it last time (benchmarks/results/mutants.txt), which is quick, or else by any."""
    assert mutants.catch(mutant, tmp_path), f"no test noticed: {mutant[1]}"


def test_every_mutant_can_be_planted(tmp_path):
    """The texts that they replace still stand in the script, and what they leave can be parsed."""
    assert all(sum(mutant[0] == script for mutant in mutants.MUTANTS) >= 15 for script in mutants.SUITES)
    for mutant in mutants.MUTANTS:
        ast.parse(mutants.plant(mutant, tmp_path).read_text(encoding="utf-8"), mutant[1])
