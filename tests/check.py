"""One assertion for every equation test: what is wrong, in which equation, and what was expected."""

import pytest
import torch


def check(actual, expected, equation, case, rtol=1e-9, atol=1e-9):
    """Fail in one readable message unless `actual` (tensor or number) equals `expected` within the tolerance."""
    __tracebackhide__ = True
    expected = torch.as_tensor(expected, dtype=torch.float64)
    if not isinstance(actual, torch.Tensor):
        pytest.fail(f"{equation}\n  case      {case}\n  expected  a tensor\n  got       {actual!r}", pytrace=False)
    got = actual.detach().to(torch.float64)
    if got.shape != expected.shape:
        shapes = f"shape {tuple(expected.shape)}\n  got       shape {tuple(got.shape)}"
        pytest.fail(f"{equation}\n  case      {case}\n  expected  {shapes}", pytrace=False)
    if not torch.allclose(got, expected, rtol=rtol, atol=atol):
        torch.set_printoptions(precision=6, linewidth=120)
        message = f"{equation}\n  case      {case}\n  expected  {expected.tolist()}\n  got       {got.tolist()}"
        difference = (got - expected).abs()
        hint = ""
        if difference.max() < 1e-5 * expected.abs().max():
            hint = (
                " (as coarse as float32. A Python float times a bool or integer tensor is float32: turn the tensor "
                "into numbers of the others' dtype first, or use torch.where. torch.zeros and .float() are float32 "
                "too: torch.zeros_like keeps the dtype)"
            )
        pytest.fail(f"{message}\n  differs   by up to {float(difference.max()):.3g}{hint}", pytrace=False)


def check_every_kind(function, masks, expected, equation, case):
    """`function` gives `expected` whether the masks that it takes, lists of 0 and 1, are bool, integer or float."""
    __tracebackhide__ = True
    for kind in (torch.bool, torch.long, torch.float64):
        case_of_kind = f"{case}, masks and dones of {kind}"
        try:
            result = function(*(torch.tensor(mask).to(kind) for mask in masks))
        except Exception as error:
            message = f"{equation}\n  case      {case_of_kind}\n  expected  {expected}\n  got       {error!r}"
            pytest.fail(message, pytrace=False)
        check(result, expected, equation, case_of_kind)


def value_and_gradient(function, argument, *rest):
    """A scalar loss and its gradient by `argument`, which must be the function's first."""
    argument = argument.detach().clone().requires_grad_()
    loss = function(argument, *rest)
    (gradient,) = torch.autograd.grad(loss, argument)
    return loss, gradient
