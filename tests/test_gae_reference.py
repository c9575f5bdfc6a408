"""The reference itself: its worked tables, its two forms of GAE against each other, its derivatives by differences."""

import ast
import math
import subprocess
import sys

import pytest
from contract import ROOT

from gae_reference import (
    EXAMPLE,
    clipped_surrogate,
    clipped_value_loss,
    gae_double_sum,
    gae_n_step_average,
    group_advantages,
    grpo_objective,
    kl_estimates,
    process_advantages,
    td_errors,
    whiten,
)

TABLES = """\
1. Generalized advantage estimation, γ = 0.9: six steps, truncated at t=2, terminated at t=4

   t      r      V  V(next)  end                δ    Â λ=0  Â λ=0.95    Â λ=1
   0    1.0    2.0      4.0               2.6000   2.6000    6.4881   6.8750
   1    2.0    4.0      3.0               0.7000   0.7000    4.5475   4.7500
   2    3.0    3.0      5.0  truncated    4.5000   4.5000    4.5000   4.5000
   3    1.0    1.0      3.0               2.7000   2.7000    1.8450   1.8000
   4    2.0    3.0      7.0  terminated  -1.0000  -1.0000   -1.0000  -1.0000
   5    1.0    2.0      4.0               2.6000   2.6000    2.6000   2.6000

2. The clipped surrogate, ε = 0.2: four quadrants

      ρ      Â  objective  d/dρ  gradient flows
    1.5    2.0        2.4   0.0  no, clipped
    0.5    2.0        1.0   2.0  yes
    1.5   -2.0       -3.0  -2.0  yes
    0.5   -2.0       -1.6   0.0  no, clipped

3. Group advantages: four answers to one question, one of them right

   reward  Â GRPO  Â Dr. GRPO
      1.0   1.732       0.750
      0.0  -0.577      -0.250
      0.0  -0.577      -0.250
      0.0  -0.577      -0.250

4. Process supervision: two outputs, five step rewards, mean 0.8, standard deviation 0.4

   output  step rewards  step of each token  Â of each token
        0  1 0            0  0  1 -1         -1.5 -1.5 -2.0  0.0
        1  1 1 1          0  1  1  2          1.5  1.0  1.0  0.5

5. Whitening: mean 2.5, variance 1.25

   reward  whitened  mean kept
      1.0   -1.3416     1.1584
      2.0   -0.4472     2.0528
      3.0    0.4472     2.9472
      4.0    1.3416     3.8416
"""


def test_printed_tables():
    """`python gae_reference.py`, to the letter."""
    run = subprocess.run([sys.executable, ROOT / "gae_reference.py"], capture_output=True, text=True, encoding="utf-8")
    assert run.stdout == TABLES
    assert run.returncode == 0 and run.stderr == ""


def test_plain_python():
    """The equations need math's exp and sqrt, printing the standard library: no torch, no numpy."""
    tree = ast.parse((ROOT / "gae_reference.py").read_text(encoding="utf-8"))
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports == [
        "import os",
        "import sys",
        "from io import TextIOWrapper",
        "from math import exp, log, prod, sqrt, tanh",
    ]


def test_td_errors_by_hand():
    """δ = r + 0.9 V(next) − V, and r − V where the episode terminated."""
    arguments = (EXAMPLE[key] for key in ("rewards", "values", "next_values", "terminated"))
    expected = [1 + 3.6 - 2, 2 + 2.7 - 4, 3 + 4.5 - 3, 1 + 2.7 - 1, 2 - 3, 1 + 3.6 - 2]
    assert td_errors(*arguments, 0.9) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_the_two_forms_of_gae_agree(gae_lambda):
    double_sum = gae_double_sum(**EXAMPLE, gamma=0.9, gae_lambda=gae_lambda)
    assert len(double_sum) == 6 and all(double_sum)
    assert gae_n_step_average(**EXAMPLE, gamma=0.9, gae_lambda=gae_lambda) == pytest.approx(double_sum, abs=1e-12)


def test_lambda_1_telescopes_to_the_return():
    """The truncated episode: 1 + 0.9·2 + 0.81·3 + 0.729·V(final = 5) − V(s₀ = 2)."""
    advantages = gae_double_sum(**EXAMPLE, gamma=0.9, gae_lambda=1.0)
    assert advantages[0] == pytest.approx(1 + 1.8 + 2.43 + 3.645 - 2, abs=1e-12)
    assert advantages[3] == pytest.approx(1 + 1.8 - 1, abs=1e-12)  # the terminated one ends with its reward


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.3, 0.79, 0.81, 1.0, 1.29, 1.31, 2.0])
def test_slope_of_the_surrogate(ratio, advantage):
    """The stated derivative is the one that finite differences see; the range is (1 − 0.2, 1 + 0.3)."""
    above, below = (clipped_surrogate(ratio + h, advantage, 0.2, 0.3)[0] for h in (1e-6, -1e-6))
    value, slope = clipped_surrogate(ratio, advantage, 0.2, 0.3)
    assert slope == pytest.approx((above - below) / 2e-6, abs=1e-6)
    assert value == min(ratio * advantage, max(0.8, min(1.3, ratio)) * advantage)


@pytest.mark.parametrize("clip_coef", [None, 0.2])
@pytest.mark.parametrize("value", [0.5, 0.9, 1.1, 2.0, 4.5, 5.5])
def test_slope_of_the_value_loss(value, clip_coef):
    above, below = (clipped_value_loss(value + h, 1.0, 3.0, clip_coef)[0] for h in (1e-6, -1e-6))
    assert clipped_value_loss(value, 1.0, 3.0, clip_coef)[1] == pytest.approx((above - below) / 2e-6, abs=1e-6)


def test_kl_estimates_in_expectation():
    """k1 and k3 have exactly KL(old‖new) as their mean under the old policy; k2 has not; k2, k3 are never negative."""
    old, new = [0.5, 0.3, 0.2], [0.4, 0.35, 0.25]
    exact = sum(p * math.log(p / q) for p, q in zip(old, new))
    estimates = [kl_estimates(math.log(q), math.log(p)) for p, q in zip(old, new)]
    k1, k2, k3 = (sum(p * estimate[i] for p, estimate in zip(old, estimates)) for i in range(3))
    assert k1 == pytest.approx(exact, abs=1e-15) and k3 == pytest.approx(exact, abs=1e-15)
    assert k2 == pytest.approx(exact, rel=0.05) and abs(k2 - exact) > 1e-4
    assert min(estimate[0] for estimate in estimates) < 0 < min(min(estimate[1:]) for estimate in estimates)


def test_group_advantages():
    """Mean ¼, standard deviation √3/4 over all four (biased)."""
    assert group_advantages([1, 0, 0, 0]) == pytest.approx([3**0.5, *[-1 / 3**0.5] * 3], abs=1e-12)
    assert group_advantages([1, 0, 0, 0], scale_by_std=False) == [0.75, -0.25, -0.25, -0.25]
    assert (
        group_advantages([0.1] * 3) == [0.0] * 3
    )  # 0.1 · 3 / 3 is not 0.1 in floats: the spread, not the std, decides
    assert group_advantages([7.0]) == [0.0]


def test_process_advantages():
    """Five step rewards 1 0 1 1 1 normalise to ½ −2 ½ ½ ½; a token sums its own step and the later ones."""
    advantages = process_advantages([[1, 0], [1, 1, 1]], [[0, 0, 1, -1], [0, 1, 1, 2]])
    assert advantages[0] == pytest.approx([-1.5, -1.5, -2.0, 0.0], abs=1e-12)
    assert advantages[1] == pytest.approx([1.5, 1.0, 1.0, 0.5], abs=1e-12)


def test_whiten():
    assert whiten([1, 2, 3, 4]) == pytest.approx([x / 1.25**0.5 for x in (-1.5, -0.5, 0.5, 1.5)], rel=1e-8)
    kept = whiten([1, 2, 3, 4], shift_mean=False)
    assert sum(kept) / 4 == pytest.approx(2.5, abs=1e-12)
    assert kept == pytest.approx([2.5 + x for x in whiten([1, 2, 3, 4])], abs=1e-12)


def two_outputs(beta, reduction):
    """A group of two outputs with 1 and 3 tokens; ratios 1.5 | 1, 1, 0.5; the reference agrees but on one token."""
    old = [[-1.0], [-1.0, -1.0, -1.0]]
    new = [[-1.0 + math.log(1.5)], [-1.0, -1.0, -1.0 + math.log(0.5)]]
    reference = [list(new[0]), [-1.0, -1.0 + math.log(2.0), new[1][2]]]
    advantages = [[1.0], [-1.0, -1.0, -1.0]]
    return grpo_objective(new, old, reference, advantages, 0.2, 0.28, beta, reduction, max_tokens=10)


@pytest.mark.parametrize(
    ("reduction", "objective", "kl"),
    [
        ("sequence", (1.28 + (-1 - 1 - 0.8) / 3) / 2, (0 + 1 / 3) / 2),
        ("token", (1.28 - 2.8) / 4, 1 / 4),
        ("constant", (1.28 - 2.8) / 20, 1 / 20),
    ],
)
def test_grpo_objective_by_hand(reduction, objective, kl):
    """Token terms: min(1.5, 1.28) | −1, −1, −0.8 (clipped at 1 − 0.2). k3 of one token: 2 − 1 − ln 2."""
    assert two_outputs(0.0, reduction) == pytest.approx(objective, abs=1e-12)
    assert two_outputs(0.04, reduction) == pytest.approx(objective - 0.04 * (1 - math.log(2)) * kl, abs=1e-12)


@pytest.mark.parametrize("kind", [int, float])
def test_ends_may_be_0_and_1(kind):
    """terminated and done as 0 and 1, whole numbers or floats, mean what False and True do."""
    numbers = {**EXAMPLE, **{name: [kind(end) for end in EXAMPLE[name]] for name in ("terminated", "done")}}
    for form in (gae_double_sum, gae_n_step_average):
        assert form(**numbers, gamma=0.9, gae_lambda=0.95) == form(**EXAMPLE, gamma=0.9, gae_lambda=0.95)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="mean"):
        two_outputs(0.0, "mean")
