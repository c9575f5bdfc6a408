"""clipped_policy_loss: value and gradient against the case-by-case reference."""

import math

import pytest
import torch
from check import check, value_and_gradient
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gae_reference

pytestmark = pytest.mark.equation
L_CLIP = "clipped_policy_loss, PPO Eq. 7: −mean(min(ρ Â, clip(ρ, 1−ε, 1+ε) Â)), ρ = exp(logprob − old_logprob)"


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 2.0, -2.4, 0.0),  # good, and already 1.5 times as likely: clipped
        (0.5, 2.0, -1.0, -1.0),  # good, and less likely than before: full gradient −ρÂ
        (1.5, -2.0, 3.0, 3.0),  # bad, and more likely than before: full gradient
        (0.5, -2.0, 1.6, 0.0),  # bad, and already half as likely: clipped
        (1.1, 2.0, -2.2, -2.2),  # inside the range nothing is clipped
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_quadrants(clipped_policy_loss, ratio, advantage, loss, gradient):
    """Value and gradient by logprob, ε = 0.2."""
    arguments = tensor(-1.0 + math.log(ratio)), tensor(-1.0), tensor(advantage), 0.2
    value, slope = value_and_gradient(clipped_policy_loss, *arguments)
    check(value, loss, L_CLIP, f"ρ={ratio}, Â={advantage}, ε=0.2")
    check(slope, [gradient], L_CLIP, f"gradient by logprob at ρ={ratio}, Â={advantage}, ε=0.2")


def test_first_update(clipped_policy_loss):
    """Before the first step the policies are equal: the loss is −mean(Â), its gradient the policy gradient −Â/M."""
    logprob, advantage = tensor(-0.1, -0.7, -2.0, -3.0), tensor(1.0, -2.0, 3.0, 0.5)
    value, slope = value_and_gradient(clipped_policy_loss, logprob, logprob.clone(), advantage, 0.2)
    check(value, -2.5 / 4, L_CLIP, "logprob = old_logprob, Â = [1, −2, 3, 0.5]")
    check(slope, -advantage / 4, L_CLIP, "gradient where logprob = old_logprob")


def test_wide_range_is_plain_importance_sampling(clipped_policy_loss):
    logprob, old_logprob, advantage = tensor(-0.2, -1.5), tensor(-1.0, -0.5), tensor(1.0, -2.0)
    expected = -(math.exp(0.8) * 1 + math.exp(-1.0) * -2) / 2
    check(clipped_policy_loss(logprob, old_logprob, advantage, 1e6), expected, L_CLIP, "ε = 1e6 clips nothing")


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(-3, 0), st.floats(-1.5, 1.5), st.floats(-5, 5)), min_size=1, max_size=8),
    clip_coef=st.floats(0.01, 0.9),
)
def test_equals_the_reference(clipped_policy_loss, rows, clip_coef):
    """Mean over the batch, of value and of gradient (d/d logprob = ρ · d/dρ)."""
    old_logprob, log_ratio, advantage = (tensor(*column) for column in zip(*rows, strict=True))
    ratios = [math.exp(x) for x in ((old_logprob + log_ratio) - old_logprob).tolist()]
    assume(all(abs(abs(ratio - 1) - clip_coef) > 1e-6 for ratio in ratios))  # at the kink any slope is right
    cases = [gae_reference.clipped_surrogate(ratio, row[2], clip_coef, clip_coef) for ratio, row in zip(ratios, rows)]
    value, slope = value_and_gradient(clipped_policy_loss, old_logprob + log_ratio, old_logprob, advantage, clip_coef)
    case = f"(old_logprob, log ρ, Â) = {rows}, ε={clip_coef}"
    check(value, -sum(objective for objective, _ in cases) / len(rows), L_CLIP, case)
    expected = [-ratio * slope / len(rows) for ratio, (_, slope) in zip(ratios, cases, strict=True)]
    check(slope, expected, L_CLIP, f"gradient by logprob, {case}")


def test_float32_follows_float64(clipped_policy_loss):
    generator = torch.Generator().manual_seed(0)
    logprob, old_logprob, advantage = torch.randn(3, 1000, generator=generator, dtype=torch.float64)
    logprob, old_logprob = -logprob.abs(), -old_logprob.abs()
    exact = clipped_policy_loss(logprob, old_logprob, advantage, 0.2)
    single = clipped_policy_loss(logprob.float(), old_logprob.float(), advantage.float(), 0.2)
    assert single.dtype == torch.float32
    check(single, exact, L_CLIP, "float32 against float64, M=1000", rtol=1e-6, atol=1e-6)
