"""clipped_value_loss: value and gradient against the case-by-case reference."""

import pytest
import torch
from check import check, value_and_gradient
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gae_reference

pytestmark = pytest.mark.equation
V_CLIP = "clipped_value_loss: ½ mean(max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²))"


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("value", "loss", "gradient"),
    [
        (1.1, 0.5 * 1.9**2, -1.9),  # within ±0.2 of V_old = 1: plain squared error towards R = 3
        (2.0, 0.5 * 1.8**2, 0.0),  # moved too far towards R: held at 1.2, no gradient
        (0.5, 0.5 * 2.5**2, -2.5),  # moved away from R: the plain error is larger and pulls back
        (4.5, 0.5 * 1.8**2, 0.0),  # overshot, still nearer than 1.2: held, no gradient
        (5.5, 0.5 * 2.5**2, 2.5),  # overshot so far that the plain error is the larger one
    ],
)
def test_hand_table(clipped_value_loss, value, loss, gradient):
    result, slope = value_and_gradient(clipped_value_loss, tensor(value), tensor(1.0), tensor(3.0), 0.2)
    check(result, loss, V_CLIP, f"V={value}, V_old=1, R=3, ε=0.2")
    check(slope, [gradient], V_CLIP, f"gradient by V at V={value}, V_old=1, R=3, ε=0.2")


def test_none_is_half_the_mean_squared_error(clipped_value_loss):
    result, slope = value_and_gradient(clipped_value_loss, tensor(1.0, 5.0), tensor(0.0, 0.0), tensor(3.0, 2.0), None)
    check(result, (4 + 9) / 4, V_CLIP, "clip_coef=None: ½ mean((V − R)²)")
    check(slope, [-1.0, 1.5], V_CLIP, "gradient by V, clip_coef=None")


def test_first_update_is_not_clipped(clipped_value_loss):
    result, slope = value_and_gradient(clipped_value_loss, tensor(1.0, 5.0), tensor(1.0, 5.0), tensor(3.0, 2.0), 0.2)
    check(result, (4 + 9) / 4, V_CLIP, "V = V_old")
    check(slope, [-1.0, 1.5], V_CLIP, "gradient by V where V = V_old")


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=8),
    clip_coef=st.one_of(st.none(), st.floats(0.01, 3)),
)
def test_equals_the_reference(clipped_value_loss, rows, clip_coef):
    if clip_coef is not None:  # at a kink, and where both errors are equal, any slope between is right
        for value, old_value, return_ in rows:
            moved = value - old_value
            held = old_value + max(-clip_coef, min(clip_coef, moved))
            assume(abs(abs(moved) - clip_coef) > 1e-6)
            assume(abs(moved) < clip_coef or abs((held - return_) ** 2 - (value - return_) ** 2) > 1e-6)
    cases = [gae_reference.clipped_value_loss(*row, clip_coef) for row in rows]
    value, old_value, returns = (tensor(*column) for column in zip(*rows, strict=True))
    result, slope = value_and_gradient(clipped_value_loss, value, old_value, returns, clip_coef)
    check(result, sum(loss for loss, _ in cases) / len(rows), V_CLIP, f"(V, V_old, R) = {rows}, ε={clip_coef}")
    expected = [slope / len(rows) for _, slope in cases]
    check(slope, expected, V_CLIP, f"gradient by V, (V, V_old, R) = {rows}, ε={clip_coef}")


def test_float32_follows_float64(clipped_value_loss):
    generator = torch.Generator().manual_seed(0)
    value, old_value, returns = torch.randn(3, 1000, generator=generator, dtype=torch.float64)
    exact = clipped_value_loss(value, old_value, returns, 0.2)
    single = clipped_value_loss(value.float(), old_value.float(), returns.float(), 0.2)
    assert single.dtype == torch.float32
    check(single, exact, V_CLIP, "float32 against float64, M=1000", rtol=1e-6, atol=0)
