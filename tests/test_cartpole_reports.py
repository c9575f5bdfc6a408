"""What a run of ppo_cartpole.py or ppo_atari.py reports: curves, speed, progress, the summary; exact values."""

import re

import pytest
import torch


@pytest.mark.parametrize("name", ["cartpole", "atari"])
def test_learning_curve(request, name, pictures, tmp_path):
    """A point for each rollout in which an episode ended, and for each that knows the last 100."""
    script = request.getfixturevalue(name)
    rows = [
        {"global_step": 10},
        {"global_step": 20, "charts/episodic_return": 3.0},
        {"global_step": 30, "charts/episodic_return": 5.0, "charts/return_100": 4.0},
    ]
    for threshold in (None, 475.0):
        script.draw_learning_curve(rows, threshold, tmp_path / "curve.png")
    script.draw_learning_curve(rows[:1], None, tmp_path / "curve.png")
    plain, solved, empty = (panels[0] for panels in pictures)
    points = {"of each rollout": [(20, 3), (30, 5)], "of the last 100": [(30, 4)]}
    axes = {"x": "environment steps", "legend": True}
    assert {**points, **axes}.items() <= plain.items() and re.search("return|score", plain["y"])
    assert solved["solved: 475"] == [(0, 475), (1, 475)] and not any("solved" in label for label in plain)
    assert empty["of each rollout"] == empty["of the last 100"] == []


def test_cartpole_says_how_fast_and_how_far(cartpole, small, bars, clock_of, capsys):
    """Steps, seconds and their quotient; the bar ends at total_timesteps though the last rollout goes beyond it."""
    clock_of(cartpole)
    metrics = cartpole.train(small(total_timesteps=300))
    steps = metrics[-1]["global_step"]
    assert steps > 300 and [row["seconds"] for row in metrics] == [float(i + 1) for i in range(len(metrics))]
    speed = f"{steps / len(metrics):,.0f}"
    assert f"ShortCartPole-v1: {steps:,} steps in {len(metrics)}.0 s, {speed} steps a second" in capsys.readouterr().out
    (bar,) = bars
    assert (bar.total, bar.n) == (300, 300) and len(bar.shown) == len(metrics)
    finished = [row["charts/episodic_return"] for row in metrics if "charts/episodic_return" in row]
    assert finished and bar.shown[0]["last_100"] in ("-", f"{finished[0]:.1f}")


def test_cartpole_without_a_solution_says_so(cartpole, small, capsys):
    metrics = cartpole.train(small(total_timesteps=1))
    out = capsys.readouterr().out
    assert "not solved  the mean return of the last 100 episodes never reached 475" in out
    assert len(metrics) == 1 and "charts/return_100" not in metrics[0]


def test_cartpole_evaluation_shows_mean_and_lowest(cartpole, small, capsys, monkeypatch):
    monkeypatch.setattr(cartpole, "play", lambda agent, args, episodes: torch.tensor([9.0, 4.0, 8.0]).numpy())
    returns = cartpole.evaluate(None, small(eval_episodes=3), None)
    assert "evaluation  3 greedy episodes: mean return 7.0, lowest 4.0\n" in capsys.readouterr().out
    assert returns.tolist() == [9, 4, 8]
