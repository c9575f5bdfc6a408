"""What two scripts share, each has a copy of: same name, same code, unless the difference is declared here."""

import ast
from itertools import combinations

import pytest
from contract import SCRIPTS

# ppo_cartpole.py runs for seconds: it writes the weights once, at the end
NO_RESUME = {
    "save": "one file: written_aside is not needed",
    "make_run_dir": "no --resume",
    "main": "no --resume, no run that goes on when the reader of its output has left",
}

# what the two have of their own beside stages 3 and 4
PPO = {
    "ppo_cartpole": {
        **NO_RESUME,
        "check_settings": "it has other settings",
        "print_summary": "of a return, not of a table",
    },
    "ppo_atari": {
        "check_settings": "it has other settings",
        "load": "settings alone are read without the weights",
        "parse_args": "a run that is asked has settings",
    },
}

# (script, script): {name: why it differs}
DIFFERENT = {
    ("ppo_cartpole", "ppo_atari"): {
        "Args": "other defaults; sticky, episodic_life and bf16 for hidden_size",
        **NO_RESUME,
        "check_settings": "no --resume",
        "start_run": "no --resume, one process",
        "env_seed": "no --resume: the environments are seeded once",
        "draw_learning_curve": "no written_aside",
        "evaluate_saved": "the weights of a finished run, no checkpoint",
        "Agent": "one convolutional network for two MLPs",
        "make_envs": "ale-py's emulator and the nine Atari details",
        "check_video": "every game of ale-py can be drawn",
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
            "new_run_dir": "named after the data, not an environment",
            "train": "three stages",
            "main": "--ask, no --evaluate, no Gymnasium",
            **own,
        }
        for ppo, own in PPO.items()
    },
    **{
        (ppo, "grpo_llm"): {
            "Args": "groups of answers of a language model",
            "evaluate": "held-out problems, greedy and sampled",
            "new_run_dir": "named after the task, not an environment",
            "train": "no critic, no environment",
            "main": "--ask, no Gymnasium; what to do when memory is out",
            **own,
            "start_run": "of several processes",
            **({"load_checkpoint": "of several processes"} if ppo == "ppo_atari" else {}),
        }
        for ppo, own in PPO.items()
    },
    ("rlhf_gpt2_ppo", "grpo_llm"): {
        "Args": "one stage, groups of answers",
        "check_settings": "it has other settings",
        "print_summary": "other numbers",
        "load": "leaves out settings that no longer exist",
        "parse_args": "--evaluate; says what took the place of a removed flag",
        "new_optimizer": "torch's AdamW, or one of 8 bits, for a single network",
        "Rollout": "no values, no returns",
        "new_run_dir": "named after the task, not the data",
        "sample": "by noise that is given, on the plain path or the fast one",
        "new_tokenizer": "of characters, not of words",
        "load_reward_model": "any classifier of the Hub, with a tokenizer of its own",
        "score_texts": "that tokenizer reads prompt and completion as text",
        "without_dropout": "of any model, attention's dropout too",
        "save_model": "weights that were gathered from several processes",
        "describe": "of groups",
        "draw_curves": "other scalars",
        "train": "one stage, no critic",
        "main": "--evaluate; what to do when memory is out",
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
    assert {"InputError", "check_device", "start_wandb", *equations} <= equal
    if one.stem != "ppo_cartpole":
        assert {"save", "written_aside", "make_run_dir", "guard_output"} <= equal
    if (one.stem, other.stem) == ("rlhf_gpt2_ppo", "grpo_llm"):
        assert {"token_logprobs", "from_disk", "resumed_args"} <= equal
    assert SCRIPTS[one] is not SCRIPTS[other] or equations == SCRIPTS[one].keys()
