"""The equations that every script must offer: names and arguments, as people's copies and other tools know them."""

import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

PPO = {
    "compute_gae": ["rewards", "values", "next_values", "terminated", "done", "gamma", "gae_lambda"],
    "clipped_policy_loss": ["logprob", "old_logprob", "advantage", "clip_coef"],
    "clipped_value_loss": ["value", "old_value", "returns", "clip_coef"],
    "approx_kl": ["logprob", "old_logprob"],
}

RLHF = {
    "token_logprobs": ["logits", "tokens", "temperature"],
    "preference_loss": ["chosen_score", "rejected_score"],
    "kl_penalized_rewards": ["score", "logprob", "ref_logprob", "mask", "kl_coef"],
    "masked_mean": ["x", "mask"],
    "masked_whiten": ["x", "mask", "shift_mean"],
    "compute_gae": ["rewards", "values", "mask", "gamma", "gae_lambda"],
    "clipped_policy_loss": ["logprob", "old_logprob", "advantage", "mask", "clip_coef"],
    "clipped_value_loss": ["value", "old_value", "returns", "mask", "clip_coef"],
    "AdaptiveKLController": ["kl_coef", "target", "horizon"],
}

GRPO = {
    "group_advantages": ["rewards", "group_size", "scale_by_std"],
    "process_advantages": ["step_rewards", "step_ids", "group_size"],
    "token_logprobs": ["logits", "tokens", "temperature"],
    "kl_k3": ["logprob", "ref_logprob"],
    "grpo_token_loss": ["logprob", "old_logprob", "ref_logprob", "advantage", "clip_low", "clip_high", "beta"],
    "reduce_loss": ["loss", "mask", "reduction", "total_tokens", "total_sequences", "max_tokens"],
}

# every name once, those that others are made of before these others
SIMPLE_FIRST = list(dict.fromkeys(["approx_kl", *RLHF, *PPO, *GRPO]))


class Case(NamedTuple):
    """A function that a test asks for by its name."""

    path: Path
    name: str
    arguments: list


# script → the contract that it fulfils. A test file says whose equations it checks in FAMILIES; without, PPO's
SCRIPTS = {
    ROOT / "ppo_cartpole.py": PPO,
    ROOT / "ppo_atari.py": PPO,
    ROOT / "rlhf_gpt2_ppo.py": RLHF,
    ROOT / "grpo_llm.py": GRPO,
}


def load_script(path):
    """Import a file by its path, once a session, under a name of its own. Raises whatever the file raises."""
    path = Path(path).resolve()
    name = f"script_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def family_of(module):
    """The contract that a reader's file means: the one of which it has most, counted by name and arguments."""

    def score(family):
        own = [(getattr(module, name, None), arguments) for name, arguments in family.items()]
        return sum(function is not None and signature_error(function, arguments) is None for function, arguments in own)

    return max((PPO, RLHF, GRPO), key=score)  # the first of equals


def signature_error(function, arguments):
    """None if `function` takes the contract's arguments by position, whatever it calls them; else a sentence."""
    given = list(inspect.signature(function).parameters)
    if len(given) == len(arguments):
        return None
    return f"the contract is {function.__name__}({', '.join(arguments)}), this one takes ({', '.join(given)})"
