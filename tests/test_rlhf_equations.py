"""The equations of RLHF on masked responses, against hand tables, published values and gae_reference.py."""

import math

import contract
import pytest
import torch
from check import check, check_every_kind, value_and_gradient
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gae_reference

FAMILIES = [contract.RLHF]
pytestmark = pytest.mark.equation

LOGPROBS = "token_logprobs: ln softmax(logits / temperature) at the token"
PREFERENCE = "preference_loss, InstructGPT Eq. 1: −mean ln σ(chosen − rejected)"
MEAN = "masked_mean: Σ mask x / Σ mask"
WHITEN = "masked_whiten: (x − mean) / sqrt(biased variance + 1e-8) over the mask, + mean if not shift_mean; 0 off it"
REWARDS = "kl_penalized_rewards: −β (logprob − ref_logprob) on each token, + score on the last real one; 0 off the mask"
GAE = "compute_gae, GAE Eq. 16 over each response; nothing beyond its last real token; 0 off the mask"
L_CLIP = "clipped_policy_loss, PPO Eq. 7 over the mask: −mean min(ρ Â, clip(ρ, 1−ε, 1+ε) Â)"
V_CLIP = "clipped_value_loss over the mask: ½ mean max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²)"
ADAPTIVE = "AdaptiveKLController, Ziegler et al. 2019 §2.2: β (1 + clip(KL/target − 1, ±0.2) n / horizon)"

NAN = float("nan")
numbers = st.floats(-5, 5)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@st.composite
def responses(draw, *columns):
    """Lists of B responses of 1 to 6 tokens, each token a tuple of numbers from `columns`; and how much padding."""
    tokens = st.lists(st.tuples(*columns), min_size=1, max_size=6)
    return draw(st.lists(tokens, min_size=1, max_size=4)), draw(st.integers(0, 2))


def stack(rows, width, junk):
    """One column of B responses as (B, T), `junk` in the padding."""
    return tensor(*([*row, *[junk] * (width - len(row))] for row in rows))


def masked_columns(case, junk):
    """(columns …, mask) as (B, T) tensors from the pair that responses() draws."""
    rows, extra = case
    width = max(map(len, rows)) + extra
    columns = [stack([[token[i] for token in row] for row in rows], width, junk) for i in range(len(rows[0][0]))]
    return [*columns, stack([[1.0] * len(row) for row in rows], width, 0.0)]


# ---- token_logprobs ----


def test_logprobs_at_a_temperature(token_logprobs):
    """Odds of 1 : 9 become 1 : 3 at temperature 2."""
    logits, tokens = tensor([0.0, math.log(9)], [0.0, math.log(9)]).unsqueeze(0), torch.tensor([[0, 1]])
    check(token_logprobs(logits, tokens, 1.0), [[math.log(0.1), math.log(0.9)]], LOGPROBS, "odds 1 : 9, temperature 1")
    check(
        token_logprobs(logits, tokens, 2.0), [[math.log(0.25), math.log(0.75)]], LOGPROBS, "odds 1 : 9, temperature 2"
    )


def test_logprobs_survive_large_logits(token_logprobs):
    logits = tensor([1000.0, 0.0]).view(1, 1, 2)
    check(token_logprobs(logits, torch.tensor([[1]]), 1.0), [[-1000.0]], LOGPROBS, "logits 1000 and 0")


def test_logprob_gradient(token_logprobs):
    """d ln π(a) / d logits = (1[a] − π) / temperature."""
    logits = tensor([math.log(1), math.log(3)]).view(1, 1, 2)
    _, slope = value_and_gradient(lambda x: token_logprobs(x, torch.tensor([[0]]), 0.5).sum(), logits)
    check(slope, [[[(1 - 0.1) / 0.5, -0.9 / 0.5]]], LOGPROBS, "gradient, odds 1 : 3, temperature ½: π = 0.1, 0.9")


# ---- preference_loss ----


def test_preference_loss(preference_loss):
    value, slope = value_and_gradient(preference_loss, tensor(0.0, math.log(3)), tensor(0.0, 0.0))
    check(value, (math.log(2) + math.log(4 / 3)) / 2, PREFERENCE, "differences 0 and ln 3: σ = ½ and ¾")
    check(slope, [-0.25, -0.125], PREFERENCE, "gradient by the chosen score: −(1 − σ) / 2")


def test_preference_loss_of_a_sure_mistake(preference_loss):
    """ln σ(−1000) is −1000, not −inf."""
    check(preference_loss(tensor(-500.0), tensor(500.0)), 1000.0, PREFERENCE, "difference −1000")


# ---- masked_mean, masked_whiten ----


def test_masked_mean(masked_mean):
    x, mask = tensor([1.0, 2.0, NAN], [6.0, NAN, NAN]), tensor([1, 1, 0], [1, 0, 0])
    value, slope = value_and_gradient(masked_mean, x, mask)
    check(value, 3.0, MEAN, "1, 2 and 6, NaN in the padding: a mean over tokens, not over rows")
    check(slope, [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0]], MEAN, "gradient, NaN in the padding")


def test_means_by_a_mask_of_every_kind(masked_mean, masked_whiten):
    """bool, integer or float 0 and 1: people copy from code that has each."""
    x, mask = tensor([1.0, 3.0, NAN], [5.0, NAN, NAN]), [[1, 1, 0], [1, 0, 0]]
    check_every_kind(lambda m: masked_mean(x, m), (mask,), 3.0, MEAN, "1, 3 and 5")
    root = math.sqrt(8 / 3 + 1e-8)
    kept = [[3 - 2 / root, 3.0, 0.0], [3 + 2 / root, 0.0, 0.0]]
    check_every_kind(lambda m: masked_whiten(x, m, False), (mask,), kept, WHITEN, "1, 3 and 5, mean kept")
    shifted = [[-2 / root, 0.0, 0.0], [2 / root, 0.0, 0.0]]
    check_every_kind(lambda m: masked_whiten(x, m, True), (mask,), shifted, WHITEN, "1, 3 and 5")


def test_masked_mean_of_nothing(masked_mean):
    check(masked_mean(tensor([1.0, NAN]), tensor([0.0, 0.0])), 0.0, MEAN, "mask all 0")


def test_published_whitening(masked_whiten):
    """The worked example of Huang et al., "The N Implementation Details of RLHF with PPO" (2023), biased variance.

    They round to four digits: mean kept, the first row is 0.0508, 0.4381, 0.8254.
    """
    x = tensor([1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0])
    kept = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6000, 1.9873], [2.3746, 2.7619, 3.1492]]
    whitened = masked_whiten(x, torch.ones_like(x), False)
    check(whitened, kept, WHITEN, "1.2 … 2.0, mean kept, four digits as published", rtol=0, atol=6e-5)
    check(masked_whiten(x, torch.ones_like(x), True), whitened - 1.6, WHITEN, "1.2 … 2.0: the same less its mean 1.6")


@settings(max_examples=100, deadline=None)
@given(case=responses(numbers), shift_mean=st.booleans())
def test_whitening_equals_the_reference(masked_whiten, case, shift_mean):
    values = [token[0] for row in case[0] for token in row]
    assume(max(values) == min(values) or max(values) - min(values) > 1e-3)
    expected = gae_reference.whiten(values, shift_mean)
    for junk in (0.0, NAN):
        x, mask = masked_columns(case, junk)
        whitened = masked_whiten(x, mask, shift_mean)
        check(
            whitened[mask.bool()],
            expected,
            WHITEN,
            f"{case}, shift_mean={shift_mean}, {junk} in the padding",
            1e-7,
            1e-7,
        )
        check(whitened[~mask.bool()], [0.0] * int((mask == 0).sum()), WHITEN, f"off the mask, {case}")


def test_whitening_shifts_the_mean_by_default(masked_whiten):
    x = tensor([1.0, 3.0])
    check(masked_whiten(x, torch.ones_like(x)), [[-1.0, 1.0]], WHITEN, "1 and 3, shift_mean left out", 1e-7, 1e-7)


# ---- kl_penalized_rewards ----


def test_published_rewards(kl_penalized_rewards):
    """KL −0.1 a token, β 0.5, score 1 → 0.05, 0.05, 1.05: Huang et al. 2023, "Per-token KL penalty"."""
    logprob, ref_logprob = tensor([-0.6, -0.7, -0.8]), tensor([-0.5, -0.6, -0.7])
    rewards = kl_penalized_rewards(tensor(1.0), logprob, ref_logprob, torch.ones_like(logprob), 0.5)
    check(rewards, [[0.05, 0.05, 1.05]], REWARDS, "KL −0.1 a token, β = 0.5, score 1")


def test_score_lands_on_the_last_real_token(kl_penalized_rewards):
    """Full length, shorter, one token, none; what stands in the padding is not read."""
    mask = tensor([1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0])
    logprob = torch.where(mask.bool(), -1.0, NAN).double()
    rewards = kl_penalized_rewards(tensor(1.0, 2.0, 3.0, 4.0), logprob, logprob * 2, mask, 0.1)
    expected = [[-0.1, -0.1, 0.9], [-0.1, 1.9, 0.0], [2.9, 0.0, 0.0], [0.0, 0.0, 0.0]]
    check(rewards, expected, REWARDS, "π twice as close: KL 1 a token, β = 0.1; masks 111, 110, 100, 000")


def test_rewards_by_a_mask_of_every_kind(kl_penalized_rewards):
    logprob, score = tensor([-1.0, -1.0, NAN], [-1.0, NAN, NAN]), tensor(1.0, 2.0)
    expected = [[-0.1, 0.9, 0.0], [1.9, 0.0, 0.0]]
    check_every_kind(
        lambda m: kl_penalized_rewards(score, logprob, logprob * 2, m, 0.1),
        ([[1, 1, 0], [1, 0, 0]],),
        expected,
        REWARDS,
        "KL 1 a token, β = 0.1, scores 1 and 2",
    )


# ---- compute_gae ----


@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [
        (0.0, [0.5, 1.0, 3.0]),
        (0.5, [0.5 + 0.5 * (1.0 + 0.5 * 3.0), 1.0 + 0.5 * 3.0, 3.0]),
        (1.0, [4.5, 4.0, 3.0]),
    ],
)
def test_gae_hand_table(compute_gae, gae_lambda, expected):
    """γ = 1, rewards 0, 0, 5, values 0.5, 1, 2: δ = 0.5, 1, 3. Then padding with a value that nothing may use."""
    rewards, values, mask = tensor([0.0, 0.0, 5.0, NAN]), tensor([0.5, 1.0, 2.0, 100.0]), tensor([1, 1, 1, 0])
    advantages = compute_gae(rewards, values, mask, 1.0, gae_lambda)
    check(advantages, [[*expected, 0.0]], GAE, f"r = 0, 0, 5, V = 0.5, 1, 2, γ = 1, λ = {gae_lambda}, one padded token")


@settings(max_examples=100, deadline=None)
@given(case=responses(numbers, numbers), gamma=st.floats(0, 1), gae_lambda=st.floats(0, 1))
def test_gae_equals_the_reference(compute_gae, case, gamma, gae_lambda):
    """Each response is an episode that terminates with its last token."""
    rewards, values, mask = masked_columns(case, NAN)
    advantages = compute_gae(rewards, values, mask, gamma, gae_lambda)
    assert advantages.shape == rewards.shape
    for row, response in zip(advantages, case[0], strict=True):
        r, v = (list(column) for column in zip(*response))
        ends = [False] * (len(r) - 1) + [True]
        rest = gamma, gae_lambda
        for form in (gae_reference.gae_double_sum, gae_reference.gae_n_step_average):
            expected = [*form(r, v, [*v[1:], 7.0], ends, ends, *rest), *[0.0] * (len(row) - len(r))]
            check(
                row,
                expected,
                GAE,
                f"{form.__name__}, γ={gamma}, λ={gae_lambda}, response {response}, NaN in the padding",
            )


def test_gae_by_a_mask_of_every_kind(compute_gae):
    rewards, values = tensor([0.0, 5.0, NAN], [2.0, NAN, NAN]), tensor([1.0, 2.0, 100.0], [0.5, 100.0, 100.0])
    check_every_kind(
        lambda m: compute_gae(rewards, values, m, 1.0, 0.5),
        ([[1, 1, 0], [1, 0, 0]],),
        [[1.0 + 0.5 * 3.0, 3.0, 0.0], [1.5, 0.0, 0.0]],
        GAE,
        "r = 0, 5 | 2, V = 1, 2 | 0.5, γ = 1, λ = 0.5",
    )


def test_gae_leaves_its_inputs_alone(compute_gae):
    inputs = tensor([1.0, 2.0]), tensor([3.0, 4.0]), tensor([1.0, 0.0])
    copies = [x.clone() for x in inputs]
    compute_gae(*inputs, 1.0, 0.95)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


# ---- clipped_policy_loss, clipped_value_loss ----


@settings(max_examples=100, deadline=None)
@given(case=responses(st.floats(-3, 0), st.floats(-1.5, 1.5), numbers), clip_coef=st.floats(0.01, 0.9))
def test_policy_loss_equals_the_reference(clipped_policy_loss, case, clip_coef):
    """Value and gradient, a mean over all tokens of all responses; NaN in the padding touches neither."""
    rows = [token for row in case[0] for token in row]
    ratios = [math.exp((old + log_ratio) - old) for old, log_ratio, _ in rows]
    assume(all(abs(abs(ratio - 1) - clip_coef) > 1e-6 for ratio in ratios))
    slopes = [gae_reference.clipped_surrogate(r, row[2], clip_coef, clip_coef) for r, row in zip(ratios, rows)]
    for junk in (0.0, NAN):
        old_logprob, log_ratio, advantage, mask = masked_columns(case, junk)
        arguments = old_logprob + log_ratio, old_logprob, advantage, mask, clip_coef
        value, slope = value_and_gradient(clipped_policy_loss, *arguments)
        text = f"(old_logprob, log ρ, Â) = {case[0]}, ε = {clip_coef}, {junk} in the padding"
        check(value, -sum(objective for objective, _ in slopes) / len(rows), L_CLIP, text)
        expected = [-ratio * d / len(rows) for ratio, (_, d) in zip(ratios, slopes, strict=True)]
        check(slope[mask.bool()], expected, L_CLIP, f"gradient by logprob, {text}")
        check(slope[~mask.bool()], [0.0] * int((mask == 0).sum()), L_CLIP, f"gradient off the mask, {text}")


@settings(max_examples=100, deadline=None)
@given(case=responses(numbers, numbers, numbers), clip_coef=st.one_of(st.none(), st.floats(0.01, 2)))
def test_value_loss_equals_the_reference(clipped_value_loss, case, clip_coef):
    rows = [token for row in case[0] for token in row]
    if clip_coef is not None:
        assume(all(abs(abs(v - old) - clip_coef) > 1e-6 for v, old, _ in rows))
        for v, old, target in rows:  # equal errors on both sides: any slope between is right
            assume(
                abs((v - target) ** 2 - (old + max(min(v - old, clip_coef), -clip_coef) - target) ** 2) > 1e-9
                or abs(v - old) < clip_coef
            )
    expected = [gae_reference.clipped_value_loss(*row, clip_coef) for row in rows]
    for junk in (0.0, NAN):
        value, old_value, returns, mask = masked_columns(case, junk)
        loss, slope = value_and_gradient(clipped_value_loss, value, old_value, returns, mask, clip_coef)
        text = f"(V, V_old, R) = {case[0]}, ε = {clip_coef}, {junk} in the padding"
        check(loss, sum(x for x, _ in expected) / len(rows), V_CLIP, text)
        check(slope[mask.bool()], [d / len(rows) for _, d in expected], V_CLIP, f"gradient by V, {text}")
        check(slope[~mask.bool()], [0.0] * int((mask == 0).sum()), V_CLIP, f"gradient off the mask, {text}")


def test_losses_by_a_mask_of_every_kind(clipped_policy_loss, clipped_value_loss):
    """ρ = 1.5 and 1 with Â = 2 and −1: clipped at 1.2. V moves from 1 by 1 and by 0 towards R = 3: held at 1.2."""
    logprob, old = tensor([math.log(1.5), 0.0, NAN]), tensor([0.0, 0.0, NAN])
    advantage, mask = tensor([2.0, -1.0, NAN]), ([[1, 1, 0]],)
    check_every_kind(
        lambda m: clipped_policy_loss(logprob, old, advantage, m, 0.2), mask, -(2.4 - 1) / 2, L_CLIP, "ρ = 1.5 and 1"
    )
    value, old_value, returns = tensor([2.0, 1.0, NAN]), tensor([1.0, 1.0, NAN]), tensor([3.0, 3.0, NAN])
    check_every_kind(
        lambda m: clipped_value_loss(value, old_value, returns, m, 0.2),
        mask,
        0.5 * (1.8**2 + 2.0**2) / 2,
        V_CLIP,
        "V = 2 and 1, V_old = 1, R = 3",
    )


def test_losses_in_float32(clipped_policy_loss, clipped_value_loss):
    generator = torch.Generator().manual_seed(0)
    one, two, three = -torch.rand(3, 50, 20, generator=generator, dtype=torch.float64)
    mask = (torch.arange(20) < torch.randint(1, 21, (50, 1), generator=generator)).double()
    for loss, equation in ((clipped_policy_loss, L_CLIP), (clipped_value_loss, V_CLIP)):
        exact = loss(one, two, three, mask, 0.2)
        single = loss(one.float(), two.float(), three.float(), mask.float(), 0.2)
        assert single.dtype == torch.float32 and exact.abs() > 1e-3
        check(single, exact, equation, "float32 against float64, 50 × 20", rtol=1e-6, atol=1e-6)


# ---- AdaptiveKLController ----


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.2), (6.6, 0.2 * (1 + 0.1 * 0.0256)), (60.0, 0.2 * (1 + 0.2 * 0.0256)), (0.0, 0.2 * (1 - 0.2 * 0.0256))],
)
def test_adaptive_kl(AdaptiveKLController, kl, expected):
    """β 0.2, target 6, horizon 10,000, 256 responses: on target, a tenth above, far above (cut to 0.2), far below."""
    controller = AdaptiveKLController(0.2, 6.0, 10_000)
    value = controller.update(kl, 256)
    assert value == pytest.approx(expected, rel=1e-12), f"{ADAPTIVE}: KL {kl} gave {value}, expected {expected}"
    again = controller.update(6.0, 256)
    assert again == pytest.approx(expected, rel=1e-12), f"{ADAPTIVE}: β was not kept: {again}"
