"""The suite must fail on every planted bug (python -m pytest -m mutants)."""

import mutants
import pytest


@pytest.mark.mutants
@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=[mutant[0] for mutant in mutants.MUTANTS])
def test_mutant_is_caught(mutant, tmp_path):
    assert mutants.killer(mutants.plant(mutant, tmp_path)), f"no test noticed: {mutant[0]}"


def test_every_mutant_can_be_planted(tmp_path):
    """The texts that they replace still stand in the script, and what they leave compiles."""
    assert len(mutants.MUTANTS) >= 15
    for mutant in mutants.MUTANTS:
        compile(mutants.plant(mutant, tmp_path).read_text(encoding="utf-8"), mutant[0], "exec")
