"""The equations of GRPO, values and gradients, against hand tables, limits and gae_reference.py."""

import math

import contract
import pytest
import torch
from check import check, check_every_kind, value_and_gradient
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gae_reference

FAMILIES = [contract.GRPO]
pytestmark = pytest.mark.equation

GROUPS = "group_advantages, DeepSeekMath §4.1.2: (R − mean) / std within each group of consecutive rows, std over G"
PROCESS = (
    "process_advantages, DeepSeekMath §4.1.3: Σ of the normalised rewards of a token's own step and the later ones"
)
LOGPROBS = "token_logprobs: ln softmax(logits / temperature) at the token"
K3 = "kl_k3, DeepSeekMath Eq. 4: π_ref/π − ln(π_ref/π) − 1"
LOSS = "grpo_token_loss, DeepSeekMath Eq. 3: −min(ρ Â, clip(ρ, 1−ε_low, 1+ε_high) Â) + β k3"
REDUCE = "reduce_loss: sequence (GRPO), token (DAPO), constant (Dr. GRPO)"

NAN = float("nan")


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# ---- group_advantages ----


def test_one_right_of_four(group_advantages):
    """Mean ¼, standard deviation √3/4 over G: 1.732 and −0.577. Over G − 1 it would be 1.5 and −0.5."""
    expected = [math.sqrt(3), *[-1 / math.sqrt(3)] * 3]
    check(group_advantages(tensor(1.0, 0.0, 0.0, 0.0), 4), expected, GROUPS, "R = 1, 0, 0, 0, G = 4")
    check(
        group_advantages(tensor(1.0, 0.0, 0.0, 0.0), 4, False),
        [0.75, -0.25, -0.25, -0.25],
        GROUPS,
        "R = 1, 0, 0, 0, not divided by std",
    )


def test_groups_are_consecutive_rows(group_advantages):
    """Each group by itself: 0, 10 and 100, 104 both become −1, 1, in either order of the groups."""
    check(group_advantages(tensor(0.0, 10.0, 104.0, 100.0), 2), [-1, 1, 1, -1], GROUPS, "R = 0, 10 | 104, 100, G = 2")
    check(
        group_advantages(tensor(0.0, 10.0, 104.0, 100.0), 2, False),
        [-5, 5, 2, -2],
        GROUPS,
        "R = 0, 10 | 104, 100, not divided by std",
    )


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, -1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale_by_std", [True, False])
def test_equal_rewards_give_exactly_zero(group_advantages, reward, dtype, scale_by_std):
    """The mean of seven times 0.1 is not 0.1: what is left over, divided by itself, would be ±1."""
    advantages = group_advantages(torch.full((14,), reward, dtype=dtype), 7, scale_by_std)
    check(advantages, [0.0] * 14, GROUPS, f"14 rewards of {reward} in {dtype}, G = 7: exactly 0", rtol=0, atol=0)


def test_an_equal_group_beside_an_unequal_one(group_advantages):
    check(group_advantages(tensor(0.1, 0.1, 0.1, 0.0, 0.0, 3.0), 3)[:3], [0.0] * 3, GROUPS, "R = 0.1 × 3 | 0, 0, 3")
    check(
        group_advantages(tensor(0.1, 0.1, 0.1, 0.0, 0.0, 3.0), 3)[3:],
        [-1 / math.sqrt(2), -1 / math.sqrt(2), math.sqrt(2)],
        GROUPS,
        "R = 0.1 × 3 | 0, 0, 3",
    )


def test_scale_and_shift_of_the_rewards(group_advantages):
    """Divided by std, neither matters; undivided, the scale does."""
    rewards = tensor(0.3, -2.0, 1.0, 0.5)
    check(group_advantages(rewards * 7 + 5, 4), group_advantages(rewards, 4), GROUPS, "7 R + 5 against R")
    check(
        group_advantages(rewards * 7 + 5, 4, False),
        7 * group_advantages(rewards, 4, False),
        GROUPS,
        "7 R + 5 against R, not divided by std",
    )


@pytest.mark.parametrize(("count", "group_size"), [(5, 2), (3, 4), (4, 0), (4, -2)])
def test_what_is_no_whole_group_is_refused(group_advantages, count, group_size):
    """ValueError, and its message holds the number of rewards. No group has 0 rewards, or −2."""
    with pytest.raises(ValueError, match=str(count)):
        group_advantages(torch.arange(count).double(), group_size)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(2, 6), st.booleans())
def test_groups_equal_the_reference(group_advantages, data, group_size, scale_by_std):
    rewards = st.lists(st.floats(-5, 5), min_size=group_size, max_size=group_size)
    groups = data.draw(st.lists(rewards, min_size=1, max_size=4))
    assume(all(max(group) == min(group) or max(group) - min(group) > 1e-3 for group in groups))
    expected = [x for group in groups for x in gae_reference.group_advantages(group, scale_by_std)]
    flat = tensor(*(x for group in groups for x in group))
    advantages = group_advantages(flat, group_size, scale_by_std)
    check(advantages, expected, GROUPS, f"R = {groups}, scale_by_std={scale_by_std}", 1e-8)


# ---- process_advantages ----


@pytest.mark.parametrize(("count", "group_size"), [(5, 2), (3, 4), (4, 0), (4, -2)])
def test_sequences_that_are_no_whole_groups_are_refused(process_advantages, count, group_size):
    with pytest.raises(ValueError, match=str(count)):
        process_advantages([[1.0]] * count, torch.zeros(count, 3, dtype=torch.long), group_size)


def test_step_rewards_are_normalised_in_float64(process_advantages):
    """They are Python floats: 1, 0, 0 become √2 and −1/√2 to the last digits of a float64."""
    advantages = process_advantages([[1.0], [0.0], [0.0]], torch.zeros(3, 1, dtype=torch.long), 3)
    check(advantages, [[math.sqrt(2)], [-math.sqrt(0.5)], [-math.sqrt(0.5)]], PROCESS, "one step each: 1, 0, 0")


def test_process_hand_table(process_advantages):
    """Rewards 1, 0 | 1, 1, 1: mean 0.8, standard deviation 0.4, normalised 0.5, −2 | 0.5 × 3; then sums to the end."""
    ids = torch.tensor([[0, 0, 1, -1], [0, 1, 1, 2]])
    advantages = process_advantages([[1.0, 0.0], [1.0, 1.0, 1.0]], ids, 2)
    check(advantages, [[-1.5, -1.5, -2.0, 0.0], [1.5, 1.0, 1.0, 0.5]], PROCESS, "steps 1, 0 | 1, 1, 1")


def test_groups_are_normalised_separately(process_advantages):
    """A second group with rewards of another size changes nothing in the first."""
    ids = torch.tensor([[0], [0], [0], [0]])
    advantages = process_advantages([[0.0], [10.0], [5.0], [4.0]], ids, 2)
    check(advantages, [[-1.0], [1.0], [1.0], [-1.0]], PROCESS, "one step each: 0, 10 | 5, 4")


def test_no_steps_and_no_step(process_advantages):
    """An output without steps, a group without steps, tokens of no step: 0 everywhere there."""
    ids = torch.tensor([[-1, -1], [0, -1], [-1, -1], [-1, -1]])
    advantages = process_advantages([[], [1.0, 3.0], [], []], ids, 2)
    check(advantages, [[0, 0], [0, 0], [0, 0], [0, 0]], PROCESS, "steps none | 1, 3 (−1 + 1 from step 0 on) || none")
    ids = torch.tensor([[-1, -1], [1, -1]])
    advantages = process_advantages([[], [1.0, 3.0]], ids, 2)
    check(advantages, [[0, 0], [1, 0]], PROCESS, "steps none | 1, 3, a token of step 1 and one of none")


def test_equal_step_rewards_give_exactly_zero(process_advantages):
    ids = torch.tensor([[0, 1], [0, -1]])
    check(process_advantages([[0.1, 0.1], [0.1]], ids, 2), [[0, 0], [0, 0]], PROCESS, "0.1 × 3", rtol=0, atol=0)


def test_one_step_each_is_outcome_supervision(process_advantages, group_advantages):
    rewards = [0.3, -2.0, 1.0, 0.5]
    advantages = process_advantages([[reward] for reward in rewards], torch.zeros(4, 3, dtype=torch.long), 4)
    expected = group_advantages(tensor(*rewards), 4).unsqueeze(-1).expand(4, 3)
    check(advantages, expected, PROCESS, f"one step an output, rewards {rewards}: the group advantages")


@st.composite
def outputs(draw):
    """(G, step rewards of one to three groups, step of each token, −1 for none)."""
    group_size, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    count = group_size * draw(st.integers(1, 3))
    rewards = [draw(st.lists(st.sampled_from([0.0, 1.0, 0.5, -2.0]), max_size=4)) for _ in range(count)]
    ids = [[draw(st.integers(-1, len(own) - 1)) for _ in range(tokens)] for own in rewards]
    return group_size, rewards, ids


@settings(max_examples=100, deadline=None)
@given(case=outputs())
def test_process_equals_the_reference(process_advantages, case):
    group_size, rewards, ids = case
    expected = []
    for start in range(0, len(rewards), group_size):
        part = slice(start, start + group_size)
        if any(rewards[part]):
            expected += gae_reference.process_advantages(rewards[part], ids[part])
        else:
            expected += [[0.0] * len(row) for row in ids[part]]
    check(process_advantages(rewards, torch.tensor(ids), group_size), expected, PROCESS, f"{case}")


# ---- token_logprobs ----


def test_logprobs_at_a_temperature(token_logprobs):
    """Odds of 1 : 9 become 1 : 3 at temperature 2; gradient (1[a] − π) / temperature; large logits do no harm."""
    logits, tokens = tensor([[0.0, math.log(9)], [0.0, math.log(9)]]), torch.tensor([[0, 1]])
    for temperature, expected in ((1.0, [0.1, 0.9]), (2.0, [0.25, 0.75])):
        case = f"odds 1 : 9, temperature {temperature}"
        check(token_logprobs(logits, tokens, temperature), [[math.log(x) for x in expected]], LOGPROBS, case)
    _, slope = value_and_gradient(lambda x: token_logprobs(x, tokens, 2.0).sum(), logits)
    check(slope, [[[0.375, -0.375], [-0.125, 0.125]]], LOGPROBS, "gradient, odds 1 : 9 at temperature 2: π = ¼, ¾")
    large = token_logprobs(tensor([[1000.0, 0.0]]), torch.tensor([[1]]), 1.0)
    check(large, [[-1000.0]], LOGPROBS, "logits 1000 and 0")


# ---- kl_k3 ----


@settings(max_examples=100, deadline=None)
@given(logprob=st.floats(-5, 0), log_ratio=st.floats(-5, 5))
def test_k3_equals_the_reference(kl_k3, logprob, log_ratio):
    """Value, gradient 1 − π_ref/π by ln π, and never negative, in float32 either."""
    ref = logprob + log_ratio
    value, slope = value_and_gradient(lambda x: kl_k3(x, tensor([ref])).sum(), tensor([logprob]))
    case = f"ln π = {logprob}, ln π_ref = {ref}"
    check(value, gae_reference.kl_estimates(ref, logprob)[2], K3, case)
    check(slope, [[1 - math.exp(ref - logprob)]], K3, f"gradient by ln π, {case}", atol=1e-8)
    assert value >= 0 and (kl_k3(tensor([logprob]).float(), tensor([ref]).float()) >= 0).all(), case


def test_k3_of_two_close_policies(kl_k3):
    """r²/2 for small r: exp(r) − 1 − r in float32 would give 0, or less than that."""
    for r in (1e-5, -1e-5, 1e-4):
        value = kl_k3(torch.zeros(1), torch.full((1,), r))
        check(value, [r * r / 2], K3, f"ln π_ref − ln π = {r} in float32", rtol=0.5, atol=0)


def test_k3_estimates_the_kl(kl_k3):
    """Its mean over π, tokens of a vocabulary of three, is KL(π‖π_ref)."""
    policy, ref = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    mean = (policy * kl_k3(policy.log(), ref.log())).sum()
    check(mean, float((policy * (policy / ref).log()).sum()), K3, "E over π of k3, π = .5, .3, .2, π_ref = .2, .2, .6")


# ---- grpo_token_loss ----


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.25, 2.0, -2.5, -2.5),  # within 1 + ε_high = 1.3
        (1.5, 2.0, -2.6, 0.0),  # beyond it: clipped
        (0.5, 2.0, -1.0, -1.0),  # the wrong way: never clipped
        (1.5, -2.0, 3.0, 3.0),  # the wrong way, upwards
        (0.95, -2.0, 1.9, 1.9),  # within 1 − ε_low = 0.9
        (0.5, -2.0, 1.8, 0.0),  # below it: clipped
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clip_cases(grpo_token_loss, ratio, advantage, loss, slope):
    """ε_low = 0.1, ε_high = 0.3: each side has a range of its own. The slope is by ln π."""
    old = tensor([-1.0])
    arguments = old, None, tensor(advantage), 0.1, 0.3, 0.0
    value, found = value_and_gradient(lambda x: grpo_token_loss(x, *arguments).sum(), old + math.log(ratio))
    case = f"ρ = {ratio}, Â = {advantage}, ε_low = 0.1, ε_high = 0.3, β = 0"
    check(value, loss, LOSS, case)
    check(found, [[slope]], LOSS, f"gradient by ln π, {case}")


def test_advantage_of_a_sequence_or_of_each_token(grpo_token_loss):
    logprob, old = tensor([-1.0, -2.0], [-0.5, -1.5]), tensor([-1.1, -1.9], [-0.6, -1.2])
    one = grpo_token_loss(logprob, old, None, tensor(2.0, -3.0), 0.2, 0.2, 0.0)
    each = grpo_token_loss(logprob, old, None, tensor([2.0, 2.0], [-3.0, -3.0]), 0.2, 0.2, 0.0)
    assert one.abs().min() > 0.1
    check(one, each, LOSS, "Â (2,) against the same as (2, 2)")
    square = grpo_token_loss(logprob, old, None, tensor([2.0, -3.0], [2.0, -3.0]), 0.2, 0.2, 0.0)
    check(square[0], grpo_token_loss(logprob.T, old.T, None, tensor(2.0, -3.0), 0.2, 0.2, 0.0)[:, 0], LOSS, "by token")


def test_beta_weighs_the_kl(grpo_token_loss, kl_k3):
    """Loss and gradient are those without β, plus β times those of k3."""
    logprob, old, ref = tensor([-1.0, -2.0]), tensor([-1.1, -1.9]), tensor([-2.0, -1.0])
    rest = tensor(0.7), 0.2, 0.2
    parts = [
        value_and_gradient(lambda x: grpo_token_loss(x, old, None, *rest, 0.0).sum(), logprob),
        value_and_gradient(lambda x: kl_k3(x, ref).sum(), logprob),
        value_and_gradient(lambda x: grpo_token_loss(x, old, ref, *rest, 0.04).sum(), logprob),
    ]
    for name, without, kl, whole in zip(("value", "gradient"), *parts):
        assert kl.abs().max() > 0.1
        check(whole, without + 0.04 * kl, LOSS, f"{name}, β = 0.04")


@settings(max_examples=100, deadline=None)
@given(
    token=st.tuples(st.floats(-3, 0), st.floats(-1.5, 1.5), st.floats(-3, 0), st.floats(-5, 5)),
    clips=st.tuples(st.floats(0.01, 0.9), st.floats(0.01, 0.9)),
    beta=st.floats(0, 1),
)
def test_loss_equals_the_reference(grpo_token_loss, token, clips, beta):
    old, log_ratio, ref, advantage = token
    logprob = old + log_ratio
    ratio = math.exp(logprob - old)
    assume(abs(ratio - 1 + clips[0]) > 1e-6 and abs(ratio - 1 - clips[1]) > 1e-6)
    objective, slope = gae_reference.clipped_surrogate(ratio, advantage, *clips)
    k3 = gae_reference.kl_estimates(ref, logprob)[2]
    rest = tensor([old]), tensor([ref]), tensor(advantage), *clips, beta
    value, found = value_and_gradient(lambda x: grpo_token_loss(x, *rest).sum(), tensor([logprob]))
    case = f"(ln π_old, ln ρ, ln π_ref, Â) = {token}, ε = {clips}, β = {beta}"
    check(value, -(objective - beta * k3), LOSS, case)
    expected = -ratio * slope + beta * (1 - math.exp(ref - logprob))
    check(found, [[expected]], LOSS, f"gradient by ln π, {case}", atol=1e-8)


def test_first_update(grpo_token_loss):
    """π = π_old: every ratio is 1 and the loss −Â, whose mean over a group is 0; its gradient is −Â, not 0."""
    logprob, advantage = tensor([-1.0, -2.0], [-0.5, -1.5]), tensor(1.0, -1.0)
    arguments = logprob, None, advantage, 0.2, 0.2, 0.0
    value, slope = value_and_gradient(lambda x: grpo_token_loss(x, *arguments).sum(), logprob)
    check(value, 0.0, LOSS, "π = π_old, Â = 1, −1: loss")
    check(slope, [[-1.0, -1.0], [1.0, 1.0]], LOSS, "π = π_old, Â = 1, −1: gradient")


# ---- reduce_loss ----

TOKEN_LOSS = [[1.0, 2.0, 6.0], [5.0, NAN, NAN]]


@pytest.mark.parametrize(
    ("reduction", "expected", "slope"),
    [
        ("sequence", (3 + 5) / 2, [[1 / 6] * 3, [1 / 2, 0, 0]]),
        ("token", 14 / 4, [[1 / 4] * 3, [1 / 4, 0, 0]]),
        ("constant", 14 / 20, [[1 / 20] * 3, [1 / 20, 0, 0]]),
    ],
)
def test_reductions(reduce_loss, reduction, expected, slope):
    """Losses 1, 2, 6 | 5, NaN in the padding, at most 10 tokens."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    case = f"{reduction}: losses 1, 2, 6 | 5, NaN in the padding, at most 10 tokens"
    value, found = value_and_gradient(reduce_loss, tensor(*TOKEN_LOSS), mask, reduction, 4, 2, 10)
    check(value, expected, REDUCE, case)
    check(found, slope, REDUCE, f"gradient, {case}")


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
def test_a_sequence_out_of_the_mask(reduce_loss, reduction):
    """It adds nothing, not even NaN, and its place in the totals stays."""
    loss, mask = tensor([1.0, 3.0], [NAN, NAN]), torch.tensor([[1, 1], [0, 0]])
    expected = {"sequence": 2 / 2, "token": 4 / 2, "constant": 4 / (2 * 5)}[reduction]
    check(reduce_loss(loss, mask, reduction, 2, 2, 5), expected, REDUCE, f"{reduction}: losses 1, 3 | none")


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
def test_reductions_by_a_mask_of_every_kind(reduce_loss, reduction):
    """bool, integer or float 0 and 1: people copy from code that has each."""
    expected = {"sequence": (3 + 5) / 2, "token": 14 / 4, "constant": 14 / 20}[reduction]
    check_every_kind(
        lambda m: reduce_loss(tensor(*TOKEN_LOSS), m, reduction, 4, 2, 10),
        ([[1, 1, 1], [1, 0, 0]],),
        expected,
        REDUCE,
        f"{reduction}: losses 1, 2, 6 | 5, NaN in the padding, at most 10 tokens",
    )


def test_an_unknown_reduction(reduce_loss):
    with pytest.raises(ValueError, match="mean"):
        reduce_loss(torch.zeros(1, 1), torch.ones(1, 1), "mean", 1, 1, 1)


@st.composite
def group_of_outputs(draw):
    token = st.tuples(st.floats(-3, 0), st.floats(-1, 1), st.floats(-3, 0), st.floats(-3, 3))
    return draw(st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=5))


@settings(max_examples=100, deadline=None)
@given(
    rows=group_of_outputs(),
    reduction=st.sampled_from(["sequence", "token", "constant"]),
    size=st.integers(1, 5),
    extra=st.integers(0, 2),
)
def test_objective_equals_the_reference_however_it_is_split(grpo_token_loss, reduce_loss, rows, reduction, size, extra):
    """Token loss and reduction in micro-batches of any size, any amount of padding: −J of the nested loops, and the
    gradient of the whole."""
    width = max(map(len, rows)) + extra
    assume(all(abs(abs(math.exp(token[1]) - 1) - 0.2) > 1e-6 for row in rows for token in row))
    old, log_ratio, ref, advantage = (
        tensor(*([token[i] for token in row] + [NAN] * (width - len(row)) for row in rows)) for i in range(4)
    )
    mask = tensor(*([1.0] * len(row) + [0.0] * (width - len(row)) for row in rows))
    total_tokens, total_sequences = int(mask.sum()), len(rows)

    def whole(logprob, step):
        losses = []
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            token_loss = grpo_token_loss(logprob[part], old[part], ref[part], advantage[part], 0.2, 0.2, 0.1)
            losses.append(reduce_loss(token_loss, mask[part], reduction, total_tokens, total_sequences, 9))
        return sum(losses)

    lists = [[[token[0] + token[1] for token in row] for row in rows]]
    lists += [[[token[i] for token in row] for row in rows] for i in (0, 2, 3)]
    expected = -gae_reference.grpo_objective(*lists, 0.2, 0.2, 0.1, reduction, 9)
    logprob = torch.where(mask.bool(), old + log_ratio, 0.0)  # NaN − NaN has no gradient of 0
    case = f"{reduction}, micro-batches of {size}, {extra} columns of padding, (ln π_old, ln ρ, ln π_ref, Â) = {rows}"
    value, slope = value_and_gradient(whole, logprob, size)
    check(value, expected, REDUCE, case)
    on = mask.bool()
    check(slope[on], value_and_gradient(whole, logprob, len(rows))[1][on], REDUCE, f"gradient, {case}")


def test_float32_follows_float64(grpo_token_loss, reduce_loss, group_advantages, kl_k3):
    generator = torch.Generator().manual_seed(0)
    old, log_ratio, ref = torch.rand(3, 48, 20, generator=generator, dtype=torch.float64)
    rewards = torch.rand(48, generator=generator, dtype=torch.float64)
    mask = (torch.arange(20) < torch.randint(1, 21, (48, 1), generator=generator)).double()

    def loss(kind):
        arguments = [x.to(kind) for x in (log_ratio - old, -old, -ref)]
        token_loss = grpo_token_loss(*arguments, group_advantages(rewards.to(kind), 8), 0.2, 0.28, 0.04)
        return torch.stack([reduce_loss(token_loss, mask.to(kind), "token", mask.sum().to(kind), 48, 20)])

    single, exact = loss(torch.float32), loss(torch.float64)
    assert single.dtype == torch.float32 and exact.abs() > 1e-3
    check(single, exact, LOSS, "float32 against float64, 48 × 20", rtol=1e-5, atol=1e-6)
