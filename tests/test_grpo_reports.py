"""What a run of grpo_llm.py reports: evaluations, averages, samples, plans, curves, times; exact values."""

import re
import sys
from pathlib import Path

import pytest
import torch


def test_the_new_transformer(grpo):
    """Its context, which a prompt and --max-tokens have to fit into, and its shape."""
    config = grpo.new_model(grpo.new_tokenizer()).config
    assert config.max_position_embeddings == 1024 and config.vocab_size == 26
    sizes = config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    assert (*sizes, config.intermediate_size, config.head_dim) == (128, 2, 4, 2, 384, 32)


def test_majority_by_ballots(grpo):
    """Ballots of 2 of five answers: two, the fifth answer is left over. A tie goes to the answer that came first."""
    assert grpo.majority_at_k(["1", "2", "2", "1", "1"], [True, False, False, True, True], 2) == 0.5
    assert grpo.majority_at_k([None, "1", None, None], [False, True, False, False], 2) == 0.5
    assert grpo.majority_at_k(["2", "1", "1"], [False, True, True], 3) == 1.0
    assert grpo.majority_at_k(["1"], [True], 1) == 1.0


def rating_of(grpo, rewards, is_truncated, step_rewards):
    parts = {"verifier": torch.tensor(rewards)}
    return grpo.Rating(torch.tensor(rewards), parts, torch.tensor(is_truncated), step_rewards, torch.zeros(2, 3))


def test_what_answers_are_like(grpo, tiny_grpo):
    """Two groups of two answers by hand: means over answers, groups, written steps and tokens."""
    masks = [torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([[1, 1, 0], [1, 1, 0]])]
    logprobs = [torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 9.0, 9.0]]), torch.tensor([[-1.0, -1.0, 9.0]] * 2)]
    groups = [grpo.Group(None, [1], None, logprob, mask, ["", ""]) for logprob, mask in zip(logprobs, masks)]
    ratings = [
        rating_of(grpo, [1.0, 0.0], [True, False], [[1.0, 0.0], []]),
        rating_of(grpo, [1.0, 1.0], [False] * 2, [[1.0], [1.0]]),
    ]
    row = grpo.describe(tiny_grpo(), list(zip(groups, ratings)))
    expected = {
        "reward/mean": 0.75,
        "reward/std": 0.25,
        "reward/verifier": 0.75,
        "reward/steps": 0.75,
        "groups/zero_variance": 0.5,
        "completion/length": 2.0,
        "completion/truncated": 0.25,
        "completion/eos_rate": 0.75,
        "policy/entropy": 14 / 8,
    }
    assert row == pytest.approx(expected)
    process = grpo.describe(tiny_grpo(supervision="process", length_weight=0.0), list(zip(groups, ratings)))
    assert process["groups/zero_variance"] == 0.5  # the rewards of the steps, 1 and 0 | 1 and 1


def test_pairs_for_the_reward_model(grpo, tiny_grpo):
    """Each right answer with a wrong one, as many as the rarer kind."""
    group = grpo.Group(grpo.Problem("1+1", "2"), [1], None, None, None, ["#2", "#3", "2", "#4", "x"])
    rating = grpo.Rating(None, {"verifier": torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])}, torch.arange(5) == 3, None, None)
    right, wrong = [("1+1", "#2", True), ("1+1", "2", True)], [("1+1", "#3", True), ("1+1", "#4", False)]
    assert grpo.pairs_of(tiny_grpo(model=None), group, rating) == list(zip(right, wrong))


def test_samples_that_are_shown(grpo, capsys):
    """Four at most: reward, tokens, lines joined by a slash."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]])
    group = grpo.Group(grpo.Problem("1+1", "2"), [1], None, None, mask, ["1+1=2\n#2", "#3", "a", "b" * 120, "e"])
    rating = grpo.Rating(torch.tensor([1.0, 0.0, -0.25, 0.5, 9.0]), {}, None, None, None)
    grpo.print_samples(group, rating)
    assert capsys.readouterr().out == (
        "\n1+1    right is 2\n  reward  tokens  completion\n"
        "    1.00       3  1+1=2 / #2\n    0.00       1  #3\n   -0.25       2  a\n"
        f"    0.50       2  {'b' * 100}\n"
    )


def test_warm_start_ends_with_the_share_that_was_asked_for(grpo, bars, monkeypatch):
    """Looked at every 25 steps: 0 of 4 right, then half of them, which is enough for 0.5."""
    sizes = {"num_problems": 60, "eval_problems": 4, "warm_start_batch_size": 8}
    args, _ = grpo.chosen(grpo.Args(terms=2, warm_start=0.5, warm_start_steps=100, **sizes))
    problems, held_out = grpo.load_problems(args)
    right = iter([False] * 4 + [True, False, True, False])
    monkeypatch.setattr(grpo, "is_right", lambda problem, text: next(right))
    torch.manual_seed(0)
    tokenizer = grpo.new_tokenizer()
    grpo.warm_start(args, grpo.new_model(tokenizer), tokenizer, problems, held_out)
    (bar,) = bars
    assert bar.n == 49 and [shown["right"] for shown in bar.shown] == ["0.00", "0.50"]
    first, second = (float(shown["loss"]) for shown in bar.shown)
    assert 0 < second < first < 3


def test_grpo_reports_first_and_last_evaluation_speed_and_time(grpo, tiny_grpo, bars, clock_of, monkeypatch, capsys):
    """The clock gains a second a reading: a step has one for sampling and one for learning."""
    values = iter([0.125, 0.25, 0.5])
    monkeypatch.setattr(grpo, "evaluate", lambda *arguments: {"eval/greedy": next(values)})
    monkeypatch.setattr(grpo, "peak_memory", lambda device: 2.5e9)
    groups, sample_groups = [], grpo.sample_groups
    monkeypatch.setattr(grpo, "sample_groups", lambda *given: groups.append(sample_groups(*given)) or groups[-1])
    clock_of(grpo)
    metrics = grpo.train(tiny_grpo(eval_every=1, num_epochs=2))
    assert [(row["step"], row.get("eval/greedy")) for row in metrics] == [(0, 0.125), (1, 0.25), (2, 0.5)]
    for row, sampled in zip(metrics[1:], groups, strict=True):
        tokens = sum(float(group.mask.sum()) for group in sampled)
        assert row["time/generate_tokens_per_second"] == tokens and row["time/train_tokens_per_second"] == 2 * tokens
        assert row["time/step_seconds"] == 2 and row["memory/peak_gb"] == 2.5
    out = capsys.readouterr().out
    assert "4 held-out problems   before    after\n  greedy                  0.125    0.500\n" in out
    assert re.search(r"^seconds     \d+\.0 in all, 4\.0 of them in 2 steps of GRPO$", out, re.MULTILINE)
    (bar,) = bars
    assert (bar.n, bar.total, bar.options["disable"]) == (2, 2, False)
    shown = [(f"{row['reward/mean']:.3f}", f"{row['completion/length']:.1f}") for row in metrics[1:]]
    assert [(now["reward"], now["tokens"]) for now in bar.shown] == shown


@pytest.mark.picture
def test_curves_of_grpo(grpo, pictures, tmp_path):
    """Each name in one panel, with the steps that have it; a panel without a line has no legend."""
    rows = [
        {"step": 0, "eval/greedy": 0.25},
        {"step": 1, "reward/mean": 0.5},
        {"step": 2, "reward/mean": 1.0, "eval/greedy": 0.5},
    ]
    grpo.draw_curves(rows, tmp_path / "curves.png")
    (panels,) = pictures
    drawn = [{label: points for label, points in panel.items() if "/" in label} for panel in panels]
    assert drawn[:2] == [{"reward/mean": [(1, 0.5), (2, 1)]}, {"eval/greedy": [(0, 0.25), (2, 0.5)]}] and not any(
        drawn[2:]
    )
    assert [panel["legend"] for panel in panels] == [True, True] + [False] * 7


def test_learning_rate_of_each_step(grpo):
    """Up over two steps, then from its value down to 0 after the last of six, or not at all."""
    args = grpo.Args(steps=6, warmup_steps=2, learning_rate=3.0)
    assert [grpo.learning_rate_of(args, step) for step in range(6)] == pytest.approx([1, 2, 3, 2.25, 1.5, 0.75])
    args = grpo.Args(steps=3, learning_rate=3.0, anneal_lr=False)
    assert [grpo.learning_rate_of(args, step) for step in range(3)] == [3, 3, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_peak_memory_is_in_bytes(grpo):
    """As the kernel says it in /proc/self/status, in kilobytes of 1024."""
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    assert grpo.peak_memory("cpu") == pytest.approx(peak, rel=0.05)
