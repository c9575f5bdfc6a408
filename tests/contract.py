"""The equations that every script must offer: names and arguments, as people's copies and other tools know them."""

import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PPO = {
    "compute_gae": ["rewards", "values", "next_values", "terminated", "done", "gamma", "gae_lambda"],
    "clipped_policy_loss": ["logprob", "old_logprob", "advantage", "clip_coef"],
    "clipped_value_loss": ["value", "old_value", "returns", "clip_coef"],
    "approx_kl": ["logprob", "old_logprob"],
}

# script → the contract that it fulfils
SCRIPTS = {ROOT / "ppo_cartpole.py": PPO, ROOT / "ppo_atari.py": PPO}


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


def signature_error(function, arguments):
    """None if `function` takes the contract's arguments by position, whatever it calls them; else a sentence."""
    given = list(inspect.signature(function).parameters)
    if len(given) == len(arguments):
        return None
    return f"the contract is {function.__name__}({', '.join(arguments)}), this one takes ({', '.join(given)})"
