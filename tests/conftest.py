"""Options and fixtures.

python -m pytest --script my_ppo.py     checks the equations of any file: those of the contract that it defines
python -m pytest --mutant FILE          runs the whole suite on FILE in place of ppo_cartpole.py
"""

import contract
import gymnasium as gym
import pytest
import torch

# CartPole with a time limit of 12 steps, so that a random policy reaches both ends of an episode: the pole falls in
# some, the limit cuts others. The second is the same without a vector form of its own.
CARTPOLE = "gymnasium.envs.classic_control.cartpole:CartPole"
for env_id, vector in (("ShortCartPole-v1", f"{CARTPOLE}VectorEnv"), ("ShortCartPoleSync-v1", None)):
    if env_id not in gym.registry:
        gym.register(env_id, f"{CARTPOLE}Env", vector_entry_point=vector, max_episode_steps=12, reward_threshold=475)


def pytest_configure(config):
    torch.set_num_threads(1)
    for option in ("--script", "--mutant"):
        path = config.getoption(option)
        if path is None:
            continue
        if not path.is_file():
            raise pytest.UsageError(f"{option} {path}: there is no such file")
        if option == "--script":
            try:
                contract.load_script(path)
            except (Exception, SystemExit) as error:
                raise pytest.UsageError(
                    f"--script {path} cannot be imported: {type(error).__name__}: {error}"
                ) from None


def pytest_collection_modifyitems(config, items):
    """--script keeps the equation tests alone."""
    if config.getoption("--script") is not None:
        kept = [item for item in items if item.get_closest_marker("equation")]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def scripts_of(config):
    """{path: contract} of what is under test."""
    if config.getoption("--script") is not None:
        return {config.getoption("--script"): contract.PPO}
    if config.getoption("--mutant") is not None:
        return {config.getoption("--mutant").resolve(): contract.PPO}
    return contract.SCRIPTS


def pytest_generate_tests(metafunc):
    """A test that asks for an equation by its name runs once for every script that has it."""
    scripts = scripts_of(metafunc.config)
    for name in contract.PPO:
        if name in metafunc.fixturenames:
            paths = [path for path, functions in scripts.items() if name in functions]
            ids = [path.stem for path in paths]
            metafunc.parametrize(name, [(path, name) for path in paths], ids=ids, indirect=True, scope="session")


def find_equation(request):
    path, name = request.param
    function = getattr(contract.load_script(path), name, None)
    if function is None:
        lacking = f"{path.name} defines no {name}"
        if request.config.getoption("--script") is not None:
            pytest.skip(lacking)
        pytest.fail(lacking)
    if contract.signature_error(function, contract.PPO[name]):
        pytest.skip(f"{path.name}: the arguments of {name} are not the contract's, see test_arguments")
    return function


@pytest.fixture(scope="session")
def scripts(request):
    return scripts_of(request.config)


@pytest.fixture(scope="session")
def compute_gae(request):
    return find_equation(request)


@pytest.fixture(scope="session")
def clipped_policy_loss(request):
    return find_equation(request)


@pytest.fixture(scope="session")
def clipped_value_loss(request):
    return find_equation(request)


@pytest.fixture(scope="session")
def approx_kl(request):
    return find_equation(request)


def load_script(request, name):
    """The script as a module; --mutant FILE stands in for the script of the same name."""
    mutant = request.config.getoption("--mutant")
    return contract.load_script(mutant if mutant is not None and mutant.name == name else contract.ROOT / name)


@pytest.fixture(scope="session")
def cartpole(request):
    return load_script(request, "ppo_cartpole.py")


@pytest.fixture(scope="session")
def atari(request):
    return load_script(request, "ppo_atari.py")


@pytest.fixture
def small(cartpole, tmp_path):
    """Args of a run of a few rollouts of four environments, less what the test changes."""

    def make(name="run", **changes):
        defaults = {
            "env_id": "ShortCartPole-v1",
            "total_timesteps": 300,
            "num_envs": 4,
            "num_steps": 32,
            "num_minibatches": 3,
            "update_epochs": 2,
            "eval_episodes": 0,
            "checkpoint_every": 0,
            "run_dir": str(tmp_path / name),
        }
        return cartpole.Args(**{**defaults, **changes})

    return make
