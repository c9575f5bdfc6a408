"""What two scripts share, each has a copy of: same name, same code, unless the difference is declared here."""

import ast
from itertools import combinations

import pytest
from contract import SCRIPTS

# (script, script): {name: why it differs}
DIFFERENT = {
    ("ppo_cartpole", "ppo_atari"): {
        "Args": "other defaults; sticky, episodic_life and bf16 for hidden_size",
        "Agent": "one convolutional network for two MLPs",
        "make_envs": "ale-py's emulator and the nine Atari details",
        "play": "whole games by a policy that samples, filmed by a second emulator",
        "evaluate": "it says games for greedy episodes",
        "train": "one network, games for episodes, several processes",
    },
    **{
        (ppo, "rlhf_gpt2_ppo"): {
            "Args": "three stages of a language model",
            "compute_gae": "padded responses (B, T) with a mask; each ends, none is truncated",
            "clipped_policy_loss": "a mean over the mask",
            "clipped_value_loss": "a mean over the mask",
            "load": "no --evaluate, no saved model",
            "new_run_dir": "named after the data, not an environment",
            "train": "three stages",
            "parse_args": "no --evaluate",
            "main": "no --evaluate, no Gymnasium",
        }
        for ppo in ("ppo_cartpole", "ppo_atari")
    },
}


def definitions(path):
    """{name: source without comments, docstring included} of a script's top-level functions and classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: ast.dump(node) for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize(("one", "other"), list(combinations(SCRIPTS, 2)), ids=lambda path: path.stem)
def test_copies_are_equal(one, other):
    mine, theirs = definitions(one), definitions(other)
    declared = DIFFERENT[(one.stem, other.stem)]
    shared = mine.keys() & theirs.keys()
    different = {name for name in shared if mine[name] != theirs[name]}
    assert different == declared.keys()
    equal = shared - different
    equations = SCRIPTS[one].keys() & SCRIPTS[other].keys() - different  # of two families: those that both have
    assert {"InputError", "save", "check_device", "start_wandb", *equations} <= equal
    assert SCRIPTS[one] is not SCRIPTS[other] or equations == SCRIPTS[one].keys()
