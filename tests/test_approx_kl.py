"""approx_kl: the k3 estimator of KL(old‖new)."""

import math

import pytest
import torch
from check import check
from hypothesis import given, settings
from hypothesis import strategies as st

import gae_reference

pytestmark = pytest.mark.equation
K3 = "approx_kl, Schulman's k3 of KL(old‖new): mean((ρ − 1) − ln ρ), ρ = exp(logprob − old_logprob)"


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_equal_policies(approx_kl):
    check(approx_kl(tensor(-1.0, -2.0), tensor(-1.0, -2.0)), 0.0, K3, "logprob = old_logprob", atol=0)


def test_direction(approx_kl):
    """Samples in the exact proportions of the old policy (½, ¼, ¼) give the exact KL(old‖new), not KL(new‖old)."""
    old, new = [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]
    samples = [0, 0, 1, 2]
    exact = sum(p * math.log(p / q) for p, q in zip(old, new, strict=True))
    logprob, old_logprob = (tensor(*(math.log(probs[a]) for a in samples)) for probs in (new, old))
    check(approx_kl(logprob, old_logprob), exact, K3, "old policy (½, ¼, ¼), new policy (0.2, 0.3, 0.5)")


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(st.floats(-5, 0), st.floats(-5, 0)), min_size=1, max_size=8))
def test_equals_the_reference(approx_kl, rows):
    logprob, old_logprob = (tensor(*column) for column in zip(*rows, strict=True))
    expected = sum(gae_reference.kl_estimates(*row)[2] for row in rows) / len(rows)
    check(approx_kl(logprob, old_logprob), expected, K3, f"(logprob, old_logprob) = {rows}")


def test_small_differences_survive_float32(approx_kl):
    """x²/2 of a log-ratio x = 1e-3 is 5e-7; exp(x) − 1 − x in float32 loses it in rounding, expm1(x) − x does not."""
    log_ratio = torch.full((4,), 1e-3)
    result = approx_kl(log_ratio, torch.zeros(4))
    assert result.dtype == torch.float32
    x = float(log_ratio[0])
    check(result, math.expm1(x) - x, K3, "float32, log ρ = 1e-3 (torch.expm1 keeps the digits)", rtol=1e-3, atol=0)
