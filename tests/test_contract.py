"""Each equation takes what the contract says it takes."""

import contract
import pytest

pytestmark = pytest.mark.equation


@pytest.mark.parametrize("name", contract.PPO)
def test_arguments(request, scripts, name):
    """As many arguments as the contract has, in its order; their names may differ in a copy."""
    for path in scripts:
        function = getattr(contract.load_script(path), name, None)
        error = contract.signature_error(function, contract.PPO[name]) if function else None
        if error:
            pytest.fail(f"{path.name}: {error}", pytrace=False)
