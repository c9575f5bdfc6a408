"""What a run of rlhf_gpt2_ppo.py reports: perplexity, accuracy, calibration, tables, curves, progress; exact values."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy


def test_the_new_gpt2(rlhf, tiny):
    """Its context holds a text, or a prompt, and a response."""
    args = tiny(model=None, max_length=40, response_length=8)
    texts = [(row["text"], "") for row in rlhf.load_rows(args)]
    model, tokenizer = rlhf.start_model(args, None, texts)
    sizes = model.config.n_positions, model.config.n_embd, model.config.n_layer, model.config.n_head
    assert sizes == (48, 128, 4, 4) and model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("mask_prompt", [False, True])
def test_perplexity(rlhf, tiny, mask_prompt):
    """exp of the mean cross-entropy of all tokens alike, three texts in batches of two; the first has no guess."""
    args = tiny(mask_prompt=mask_prompt, micro_batch_size=2)
    torch.manual_seed(0)
    model, tokenizer = rlhf.start_model(args, args.model)
    texts = [([5, 6, 7], [8, 9, 0]), ([5], [10, 0]), ([11, 12], [13, 14, 15, 16, 0])]
    losses = []
    for prompt, response in texts:
        tokens = torch.tensor([prompt + response])
        own = cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="none")
        losses.append(own[len(prompt) - 1 :] if mask_prompt else own)
    expected = math.exp(float(torch.cat(losses).detach().mean()))
    assert rlhf.perplexity(args, model, tokenizer, texts) == pytest.approx(expected, rel=1e-4)


def test_perplexity_is_that_of_the_last_step(rlhf, tiny, bars, monkeypatch, capsys):
    """Of the model that was saved, on the held-out texts, in the row of the last step and no other, and printed."""
    calls, perplexity = [], rlhf.perplexity

    def watched(*arguments):
        calls.append(arguments)
        return perplexity(*arguments)

    monkeypatch.setattr(rlhf, "perplexity", watched)
    args = tiny(stage="sft")
    metrics = rlhf.train(args)
    ((_, _, tokenizer, held_out),) = calls
    saved, _ = rlhf.start_model(args, str(Path(args.run_dir) / "sft"))
    assert ["sft/perplexity" in row for row in metrics] == [False, False, True] and len(held_out) == 10
    assert [(row["stage"], row["step"]) for row in metrics] == [("sft", 1), ("sft", 2), ("sft", 3)]
    assert metrics[-1]["sft/perplexity"] == pytest.approx(perplexity(args, saved, tokenizer, held_out), rel=1e-4)
    assert f"sft         perplexity {metrics[-1]['sft/perplexity']:.3f}\n" in capsys.readouterr().out
    (bar,) = bars
    assert (bar.n, bar.total, bar.options["desc"]) == (3, 3, "1 sft")
    assert [shown["loss"] for shown in bar.shown] == [f"{row['sft/loss']:.3f}" for row in metrics]
    assert [row["sft/learning_rate"] for row in metrics] == pytest.approx([1e-2, 1e-2 * 2 / 3, 1e-2 / 3])


def test_reward_model_reports(rlhf, tiny, bars, monkeypatch, capsys):
    """Held-out accuracy and calibration error before the scores are normalised, mean and spread after. Micro-batches
    change no number, not even the share of pairs in the right order."""
    kept = []

    def normalise_scores(args, model, *rest, function=rlhf.normalise_scores):
        pairs = monkeypatch.held_out
        sides = [[rlhf.reward_scores(model, *rlhf.pad([ids], 0, "cpu")).item() for ids in side] for side in zip(*pairs)]
        kept.append([one - other for one, other in zip(*sides)])
        function(args, model, *rest)
        kept.append((model.config.reward_mean, model.config.reward_std))

    def train_reward(args, run, stage, policy, tokenizer, pairs, held_out, prompts, function=rlhf.train_reward):
        monkeypatch.held_out = held_out
        function(args, run, stage, policy, tokenizer, pairs, held_out, prompts)

    monkeypatch.setattr(rlhf, "normalise_scores", normalise_scores)
    monkeypatch.setattr(rlhf, "train_reward", train_reward)
    metrics = rlhf.train(tiny(stage="reward", micro_batch_size=64))
    margins, spread = kept
    last = metrics[-1]
    assert [(row["stage"], row["step"]) for row in metrics] == [("reward", 1), ("reward", 2), ("reward", 3)]
    assert len(margins) >= 3 and ["reward/held_out_accuracy" in row for row in metrics] == [False, False, True]
    right = sum(margin > 0 for margin in margins) / len(margins)
    assert last["reward/held_out_accuracy"] == pytest.approx(right)
    assert last["reward/calibration_error"] == pytest.approx(calibration_error(margins, 10), abs=1e-4)
    assert (last["reward/mean"], last["reward/std"]) == spread and spread[1] > 1e-3
    out = capsys.readouterr().out
    assert f"reward      held out accuracy {right:.3f}\n" in out and "perplexity" not in out
    assert [bar.options["desc"] for bar in bars] == ["2 reward"] and bars[0].n == 3
    assert [shown["accuracy"] for shown in bars[0].shown] == [f"{row['reward/accuracy']:.2f}" for row in metrics]
    again = rlhf.train(tiny("again", stage="reward", micro_batch_size=4))
    for one, other in zip(metrics, again, strict=True):
        assert one.keys() == other.keys() and one.pop("stage") == other.pop("stage")
        assert one == pytest.approx(other, rel=1e-2, abs=1e-4)
        assert one["reward/accuracy"] * 6 == pytest.approx(round(one["reward/accuracy"] * 6), abs=1e-6)


def calibration_error(margins, bins):
    """Sure of σ(|margin|), from ½ to 1 in equal bins: how far the mean of each is from the share that was right."""
    total = 0.0
    for b in range(bins):
        low, high = 0.5 + b / (2 * bins), 0.5 + (b + 1) / (2 * bins)
        sure = [(1 / (1 + math.exp(-abs(m))), m > 0) for m in margins]
        own = [(p, is_right) for p, is_right in sure if low <= p < high or (b == bins - 1 and p >= high)]
        total += abs(sum(p for p, _ in own) - sum(is_right for _, is_right in own))
    return total / len(margins)


@pytest.mark.parametrize("bins", [2, 10])
def test_calibration_error_of_many(rlhf, bins):
    """Right where the probability's second digit lies below 5: neighbouring bins err in opposite directions."""
    sure = (3 * torch.rand(200, generator=torch.Generator().manual_seed(bins))).tolist()
    margins = [x if int(20 / (1 + math.exp(-x))) % 2 == 0 else -x for x in sure]
    expected = calibration_error(margins, bins)
    assert abs(expected - calibration_error(margins, bins // 2)) > 0.01
    assert rlhf.calibration_error(torch.tensor(margins), bins) == pytest.approx(expected, abs=1e-5)


def test_what_responses_are_like(rlhf):
    """KL summed over the mask of each response, lengths, ends: means over responses, by hand. Token 0 is EOS."""
    tokens = torch.tensor([[5, 0, 0], [5, 6, 7]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    logprobs, ref = torch.tensor([[-1.0, -2.0, 50.0], [-1.0, -1.0, -1.0]]), torch.tensor([[-2.0, -2.5, 9.0]] * 2)
    rollout = rlhf.Rollout(tokens, logprobs, mask, tokens, mask, [("a", "b")] * 2)
    row = rlhf.describe(rollout, ref, torch.tensor([1.0, 4.0]), torch.tensor([1.0, 0.0]), 0)
    expected = {"objective/scores": 2.5, "objective/kl": (1 + 0.5 + 1 + 1.5 - 10) / 2, "objective/gold": 0.5}
    assert row == pytest.approx({**expected, "response/length": 2.5, "response/eos_rate": 0.5})
    without_truth = rlhf.describe(rollout, ref, torch.tensor([1.0, 4.0]), None, 0)
    assert "objective/gold" not in without_truth and len(without_truth) == 4


def test_a_rating_weighs_every_response_alike(rlhf, tiny, monkeypatch):
    """Five prompts in batches of two: the last batch is one response, and counts as one."""
    parts = []

    def roll_out(args, policy, tokenizer, prompts):
        parts.append(len(prompts))
        return SimpleNamespace(texts=[("p", f"a b {prompt}") for prompt in prompts])

    monkeypatch.setattr(rlhf, "roll_out", roll_out)
    monkeypatch.setattr(rlhf, "judge_rollout", lambda args, rollout, *judges: (rollout,))
    monkeypatch.setattr(
        rlhf, "describe", lambda rollout, judged, eos_id: {"objective/kl": float(rollout.texts[0][1][-1])}
    )
    tokenizer = SimpleNamespace(eos_token_id=0)
    texts, row = rlhf.rate_policy(tiny(batch_size=2), None, None, [None], None, tokenizer, [1, 2, 3, 4, 9])
    assert parts == [2, 2, 1] and [response for _, response in texts] == [f"a b {i}" for i in (1, 2, 3, 4, 9)]
    assert row["objective/kl"] == pytest.approx((1 + 1 + 3 + 3 + 9) / 5)
    assert row["response/distinct_2"] == pytest.approx(6 / 10)


def test_table_of_before_and_after(rlhf, capsys):
    """The evaluations' rows and no other, the first of them before, the last after; four prompts at most."""
    before, after = {"objective/kl": 0.0, "response/length": 7.5}, {"objective/kl": 2.5, "response/length": 9.25}
    rows = [{"stage": "ppo", "step": 1, "objective/kl": 77.0}, {"stage": "eval", **before}, {"stage": "eval", **after}]
    texts = [[(f"prompt {i}", f" {when} {i} ") for i in range(5)] for when in ("old", "new")]
    rlhf.print_comparison(rows, *texts)
    lines = [re.sub(" +", " ", line).strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[:3] == [
        "before after",
        "KL to the reference, nats a response 0.000 2.500",
        "tokens a response 7.500 9.250",
    ]
    assert lines[3:6] == ["prompt 0", "before old 0", "after new 0"] and len(lines) == 3 + 4 * 3


@pytest.mark.picture
def test_curves_of_stage_3(rlhf, pictures, tmp_path):
    rows = [
        {"stage": "sft", "step": 9, "objective/kl": 5.0},
        {"stage": "ppo", "step": 1, "objective/scores": 0.5, "objective/kl": 1.0, "policy/entropy": 3.0},
        {"stage": "ppo", "step": 2, "objective/scores": 0.75, "objective/kl": 2.0, "response/length": 4.0},
        {"stage": "eval", "step": 2, "objective/kl": 7.0},
    ]
    rlhf.draw_curves(rows, tmp_path / "curves.png")
    (panels,) = pictures
    assert [panel["x"] for panel in panels] == ["iteration"] * 4 and len(panels) == 4
    drawn = {label: points for panel in panels for label, points in panel.items() if "/" in label}
    assert drawn == {
        "objective/scores": [(1, 0.5), (2, 0.75)],
        "objective/gold": [],
        "objective/kl": [(1, 1), (2, 2)],
        "policy/entropy": [(1, 3)],
        "response/length": [(2, 4)],
    }


def test_the_share_that_the_judge_and_the_data_agree_on(rlhf, tiny, monkeypatch):
    """Margins 2, −1, 0.5 and 0: half of four pairs agree, the others are turned round."""
    monkeypatch.setattr(rlhf, "load_judge", lambda args: (None, None))
    monkeypatch.setattr(rlhf, "judge_margins", lambda *arguments: torch.tensor([2.0, -1.0, 0.5, 0.0]))
    pairs = [((f"good {i}", ""), (f"bad {i}", "")) for i in range(6)]
    relabelled, agreement = rlhf.label_by_judge(tiny(judge="x", judge_pairs=4), pairs)
    assert agreement == 0.5
    assert relabelled == [pairs[0], pairs[1][::-1], pairs[2], pairs[3][::-1]]
