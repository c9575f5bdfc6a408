"""Each equation takes what the contract says it takes."""

import contract
import pytest

FAMILIES = [contract.PPO, contract.RLHF, contract.GRPO]
pytestmark = pytest.mark.equation


def test_arguments(any_function):
    """As many arguments as the contract has, in its order; their names may differ in a copy."""
    path, name, arguments = any_function
    function = getattr(contract.load_script(path), name, None)
    error = f"there is no {name}" if function is None else contract.signature_error(function, arguments)
    if error:
        pytest.fail(f"{path.name}: {error}", pytrace=False)
