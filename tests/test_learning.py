"""Learning over seeds: what ppo_cartpole.py's docstring promises, and Acrobot (python -m pytest -m learning)."""

import pytest

pytestmark = pytest.mark.learning


@pytest.mark.parametrize("seed", range(1, 11))
def test_cartpole_is_solved(cartpole, tmp_path, seed):
    """Default flags: the last 100 episodes reach a mean of 475, and greedy play holds the pole."""
    metrics = cartpole.train(cartpole.Args(seed=seed, run_dir=str(tmp_path / "run")))
    assert max(row.get("charts/return_100", 0) for row in metrics) >= 475
    assert metrics[-1]["charts/eval_return"] >= 495


@pytest.mark.parametrize("seed", range(1, 4))
def test_acrobot_is_learned(cartpole, tmp_path, seed):
    """Another environment, without a vector form, same flags: −500 at first, Gymnasium calls −100 solved."""
    args = cartpole.Args(env_id="Acrobot-v1", seed=seed, eval_episodes=20, run_dir=str(tmp_path / "run"))
    assert cartpole.train(args)[-1]["charts/eval_return"] >= -110
