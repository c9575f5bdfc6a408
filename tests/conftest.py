"""Options and fixtures.

python -m pytest --script=my_ppo.py     checks the equations of any file: those of the contract that it defines
python -m pytest --mutant=FILE          runs the suite on FILE instead of the script of that name

The equals sign is needed. After a space, pytest takes the file for a file of tests, reads no conftest.py of this
directory, and so does not know the option.
"""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import contract
import gymnasium as gym
import mutants
import pytest
import torch
from script_summary import ScriptSummary

# CartPole with a time limit of 12 steps, so that a random policy reaches both ends of an episode: the pole falls in
# some, the limit cuts others. The second is the same without a vector form of its own.
CARTPOLE = "gymnasium.envs.classic_control.cartpole:CartPole"
for env_id, vector in (("ShortCartPole-v1", f"{CARTPOLE}VectorEnv"), ("ShortCartPoleSync-v1", None)):
    if env_id not in gym.registry:
        gym.register(env_id, f"{CARTPOLE}Env", vector_entry_point=vector, max_episode_steps=12, reward_threshold=475)


def pytest_addoption(parser):
    def path(text):  # no shell replaces a ~ that follows an equals sign
        return Path(text).expanduser()

    parser.addoption("--script", type=path, help="check the equations of this file instead of the project's scripts")
    parser.addoption("--mutant", type=path, help="run the suite on this file instead of the script of its name")


def is_whole(config):
    """Whether the whole suite runs, not files that the command names."""
    return config.args_source is config.ArgsSource.TESTPATHS


def pytest_xdist_auto_num_workers(config):
    """How many processes share the tests, without -n: at most four for the whole suite, none for single files."""
    if not is_whole(config) or config.getoption("--script") or config.getoption("--mutant"):
        return 0
    return min(os.cpu_count() or 1, 4)


def order_event_files():
    """TensorBoard numbers the files of events that a process writes in one second 1, 2, … 10, and reads them in the
    order of their names. From 1,000 on the names of all that a test run writes are in the order of the numbers."""
    from tensorboard.summary.writer import event_file_writer

    event_file_writer._global_uid = event_file_writer.AtomicCounter(1000)


def refuse(sentence):
    pytest.exit(f"error: {sentence}", returncode=2)


def pytest_configure(config):
    torch.set_num_threads(1)
    order_event_files()
    if not is_whole(config) and config.option.markexpr in config.getini("addopts"):  # of a named file the slow ones too
        config.option.markexpr = config.option.markexpr.replace("not slow and ", "")
    for option in ("--script", "--mutant"):
        path = config.getoption(option)
        if path is None:
            continue
        if not path.is_file():
            refuse(f"{option}={path}: there is no such file")
        if option == "--mutant" and path.name not in mutants.SUITES:
            refuse(f"--mutant takes a file with the name of a script: {mutants.no_such_script(path.name)}")
        if option == "--script":
            try:
                contract.load_script(path)
            except (Exception, SystemExit) as error:
                refuse(f"--script={path} cannot be imported: {type(error).__name__}: {error}")
            config.pluginmanager.register(ScriptSummary(path))
            config.option.verbose, config.option.reportchars = -1, ""  # its own summary says it


def scripts_of(config):
    """{path: contract} of what is under test."""
    if (path := config.getoption("--script")) is not None:
        return {path: contract.family_of(contract.load_script(path))}
    if (path := config.getoption("--mutant")) is not None:
        return {path.resolve(): contract.SCRIPTS[contract.ROOT / path.name]}
    return contract.SCRIPTS


def families_of(module):
    return getattr(module, "FAMILIES", [contract.PPO])


def pytest_generate_tests(metafunc):
    """A test that asks for an equation by its name runs once for every script of its families that has it."""
    scripts = {path: own for path, own in scripts_of(metafunc.config).items() if own in families_of(metafunc.module)}
    for name in sorted(EQUATIONS & set(metafunc.fixturenames)):  # one order in every process
        cases = [contract.Case(path, name, functions[name]) for path, functions in scripts.items() if name in functions]
        ids = [case.path.stem for case in cases]
        metafunc.parametrize(name, cases, ids=ids, indirect=True, scope="session")
    if "any_function" in metafunc.fixturenames:
        cases = [contract.Case(path, *own) for path, functions in scripts.items() for own in functions.items()]
        metafunc.parametrize("any_function", cases, ids=[f"{case.path.stem}-{case.name}" for case in cases])


def find_equation(request):
    path, name, arguments = request.param
    function = getattr(contract.load_script(path), name, None)
    if function is None:
        pytest.fail(f"{path.name} defines no {name}", pytrace=False)
    if error := contract.signature_error(function, arguments):
        pytest.fail(f"{path.name}: {error}", pytrace=False)
    return function


# a fixture for each equation: compute_gae, token_logprobs, …
EQUATIONS = {*contract.PPO, *contract.RLHF, *contract.GRPO}
for equation in EQUATIONS:
    globals()[equation] = pytest.fixture(scope="session", name=equation)(lambda request: find_equation(request))


def load_script(request, name):
    """The script as a module; --mutant=FILE stands in for the script of the same name."""
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
            "run_dir": str(tmp_path / name),
        }
        return cartpole.Args(**{**defaults, **changes})

    return make


@pytest.fixture(scope="session")
def rlhf(request):
    return load_script(request, "rlhf_gpt2_ppo.py")


@pytest.fixture(scope="session")
def tiny_gpt2(rlhf, tmp_path_factory):
    """A GPT-2 of 16 dimensions on disk, with dropout and a tokenizer of the grammar's words."""
    from transformers import GPT2Config, GPT2LMHeadModel

    directory = tmp_path_factory.mktemp("tiny_gpt2")
    texts = [row["text"] for row in rlhf.load_rows(rlhf.Args(num_texts=200))]
    tokenizer = rlhf.new_tokenizer(texts)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2, eos_token_id=0, bos_token_id=0))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def tiny(rlhf, tiny_gpt2, tmp_path):
    """Args of a run of a few steps with that model, less what the test changes."""

    def make(name="run", **changes):
        defaults = {
            "model": tiny_gpt2,
            "num_texts": 100,
            "max_length": 40,
            "response_length": 8,
            "sft_steps": 3,
            "sft_batch_size": 8,
            "sft_learning_rate": 1e-2,
            "reward_steps": 3,
            "reward_batch_size": 6,
            "reward_learning_rate": 1e-2,
            "ppo_iterations": 2,
            "batch_size": 12,
            "num_epochs": 2,
            "adaptive_kl": False,
            "ent_coef": 0.0,
            "learning_rate": 1e-2,
            "eval_prompts": 10,
            "checkpoint_every": 0,
            "run_dir": str(tmp_path / name),
        }
        return rlhf.Args(**{**defaults, **changes})

    return make


@pytest.fixture(scope="session")
def grpo(request):
    return load_script(request, "grpo_llm.py")


@pytest.fixture(scope="session")
def tiny_lm(grpo, tmp_path_factory):
    """A Qwen3 of 32 dimensions and random weights on disk; it knows digits, signs and an EOS."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    directory = tmp_path_factory.mktemp("tiny_lm")
    tokenizer = grpo.new_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        attention_dropout=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def tiny_grpo(grpo, tiny_lm, tmp_path):
    """Args of a run of a second with that model, less what the test changes. Length is rewarded, so groups differ."""

    def make(name="run", **changes):
        defaults = {
            "model": tiny_lm,
            "device": "cpu",
            "torch_threads": 1,
            "dtype": "float32",
            "optimizer": "adamw",
            "instruction": "{}",
            "terms": 2,
            "max_term": 9,
            "num_problems": 60,
            "steps": 2,
            "prompts_per_step": 3,
            "group_size": 4,
            "max_tokens": 10,
            "generate_rows": 2048,
            "length_weight": 0.5,
            "learning_rate": 1e-2,
            "eval_every": 0,
            "eval_problems": 4,
            "eval_samples": 2,
            "eval_k": 2,
            "checkpoint_every": 0,
            "run_dir": str(tmp_path / name),
        }
        return grpo.Args(**{**defaults, **changes})

    return make


DRAWS = {  # fixture: the function of its script that draws the curves of a run
    "cartpole": "draw_learning_curve",
    "atari": "draw_learning_curve",
    "rlhf": "draw_curves",
    "grpo": "draw_curves",
}


@pytest.fixture(autouse=True)
def no_picture(request):
    """The curves would take most of a short run's time. Tests that look at them are marked with "picture"."""
    with pytest.MonkeyPatch.context() as patch:
        for name, draw in DRAWS.items():
            if name in request.fixturenames and not request.node.get_closest_marker("picture"):
                patch.setattr(request.getfixturevalue(name), draw, lambda *_: None)
        yield


@pytest.fixture
def command(grpo, monkeypatch, capsys):
    """Run the command line of grpo_llm.py in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["grpo_llm.py", *map(str, arguments)])
        status = 0
        try:
            grpo.main()
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def planner(grpo, monkeypatch):
    """benchmarks/memory_plan.py, which plans for the script under test."""
    module = contract.load_script(contract.ROOT / "benchmarks" / "memory_plan.py")
    monkeypatch.setattr(module, "grpo_llm", grpo)
    return module


# ---- What a run shows, caught (test_*_reports.py) ----


@pytest.fixture
def pictures(monkeypatch):
    """Instead of PNGs: for each picture its panels, each {label: its points} and "x", "y": the names of the axes."""
    from matplotlib.figure import Figure

    found = []

    def keep(figure, path, **options):
        found.append(
            [
                {line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()] for line in axes.lines}
                | {"x": axes.get_xlabel(), "y": axes.get_ylabel(), "legend": axes.get_legend() is not None}
                for axes in figure.axes
            ]
        )
        Path(path).write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


@pytest.fixture
def bars(monkeypatch):
    """Instead of progress bars: how each was made, how far it came, and what it showed beside."""
    found = []

    class Bar:
        def __init__(self, steps=None, total=None, initial=0, **options):
            self.steps, self.total, self.n, self.shown, self.written = steps, total, initial, [], []
            self.options = options
            found.append(self)

        def __iter__(self):
            for step in self.steps:
                yield step
                self.n += 1

        def update(self, count):
            self.n += count

        def set_postfix(self, shown=(), refresh=True, **more):
            self.shown.append({**dict(shown), **more})

        def write(self, text):
            self.written.append(text)

        def close(self):
            pass

    import tqdm

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(tqdm, "trange", lambda *limits, **options: Bar(range(*limits), **options))
    return found


@pytest.fixture
def clock_of(monkeypatch):
    """clock_of(script): its clock gains one second each time it is read."""

    def start(script):
        seconds = iter(range(1000, 100_000))
        fake = SimpleNamespace(perf_counter=lambda: float(next(seconds)), strftime=time.strftime)
        monkeypatch.setattr(script, "time", fake)

    return start
