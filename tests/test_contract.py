"""Each equation takes what the contract says it takes."""

import contract
import pytest

FAMILIES = [contract.PPO, contract.RLHF, contract.GRPO]
pytestmark = pytest.mark.equation


def test_arguments(scripts):
    """As many arguments as the contract has, in its order; their names may differ in a copy."""
    found = 0
    for path, functions in scripts.items():
        for name, arguments in functions.items():
            if function := getattr(contract.load_script(path), name, None):
                found += 1
                if error := contract.signature_error(function, arguments):
                    pytest.fail(f"{path.name}: {error}", pytrace=False)
    if not found:
        pytest.skip(f"{', '.join(path.name for path in scripts)}: none of the contract's names")
