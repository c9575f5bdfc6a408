"""What is not GRPO itself: other losses, corrections of an old sampler, other advantages, rewards and KL."""

import math
from types import SimpleNamespace

import pytest
import torch
from check import check, value_and_gradient
from hypothesis import given
from hypothesis import strategies as st

import gae_reference

LOGPROBS = st.floats(-4, -0.01)
SHIFTS = st.floats(-1.5, 1.5)
TOKENS = st.lists(st.tuples(LOGPROBS, SHIFTS), min_size=1, max_size=6)


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def own_gradient(loss, logprob):
    """Token losses (B, T) and the gradient of their sum by ln π."""
    return value_and_gradient(lambda x: loss(x).sum(), logprob)


# ---- Other losses ----


@given(TOKENS, st.sampled_from([-1.5, 0.0, 0.7]), st.sampled_from([0.2, 1.0]))
def test_cispo_equals_the_reference(grpo, tokens, advantage, clip_high):
    """[G33] The gradient by ln π is the cut ratio times the advantage, and never 0 for a clipped token."""
    old, shift = double(tokens).T
    logprob = (old + shift)[None]
    loss = lambda x: grpo.cispo_token_loss(x, old[None], double([advantage]), clip_high)  # noqa: E731
    total, gradient = own_gradient(loss, logprob)
    expected = [-gae_reference.cispo_slope(math.exp(x), advantage, clip_high) for x in shift.tolist()]
    check(gradient[0], expected, "cispo_token_loss", f"{tokens}, Â {advantage}")
    check(total, sum(x * y for x, y in zip(expected, logprob[0].tolist())), "cispo_token_loss", f"{tokens}")
    assert advantage == 0 or (gradient != 0).all()


@given(TOKENS, st.sampled_from([-1.5, 0.0, 0.7]))
def test_sapo_equals_the_reference(grpo, tokens, advantage):
    """[G33] Value and slope; the derivative by ln π is ρ times that by ρ."""
    old, shift = double(tokens).T
    loss = lambda x: grpo.sapo_token_loss(x, old[None], double([[advantage] * len(tokens)]))  # noqa: E731
    total, gradient = own_gradient(loss, (old + shift)[None])
    ratios = [math.exp(x) for x in shift.tolist()]
    values, slopes = zip(*(gae_reference.sapo_objective(ratio, advantage) for ratio in ratios))
    check(total, -sum(values), "sapo_token_loss", f"{tokens}, Â {advantage}")
    check(gradient[0], [-ratio * slope for ratio, slope in zip(ratios, slopes)], "sapo_token_loss", f"{tokens}")


@pytest.mark.parametrize("name", ["cispo", "sapo"])
def test_without_a_move_every_loss_has_the_policy_gradient(grpo, tiny_grpo, name):
    logprob, advantage = -torch.rand(2, 3, dtype=torch.float64) - 0.1, double([1.5, -0.5])
    args = tiny_grpo(policy_loss=name)
    _, gradient = own_gradient(lambda x: grpo.other_token_loss(args, x, logprob, advantage), logprob)
    check(gradient, [[-1.5] * 3, [0.5] * 3], name, "ρ = 1")


# ---- A sampler that is not the policy ----


@given(TOKENS, st.sampled_from(["token", "sequence"]), st.sampled_from([0.5, 1.5, 4.0]), st.booleans())
def test_sampler_weights_equal_the_reference(grpo, tokens, level, cap, is_masked):
    """[G34] And what stands off the mask, even NaN, changes nothing."""
    old, shift = double(tokens).T
    sampler = old - shift
    padding = double([math.nan])
    columns = [torch.cat([x, padding])[None] for x in (old, sampler)]
    mask = torch.cat([torch.ones_like(old), torch.zeros(1, dtype=torch.float64)])[None]
    weights = grpo.sampler_weights(*columns, mask, level, cap, is_masked).expand(1, len(tokens) + 1)
    given = [x.exp().tolist() for x in (old, sampler)]
    expected = gae_reference.sampler_weights(*given, level, cap, is_masked)
    check(weights[0, :-1], expected, "sampler_weights", f"{tokens}, {level}, cap {cap}, masked {is_masked}")


def test_sampler_weights_by_hand(grpo):
    """Ratios 2, 1/2 and 4, so a product of 4."""
    old, sampler = double([[0.4, 0.2, 0.8]]).log(), double([[0.2, 0.4, 0.2]]).log()
    mask = torch.ones(1, 3)
    old.requires_grad_()
    for level, masked, expected in (
        ("token", False, [[2, 0.5, 3]]),
        ("token", True, [[2, 0.5, 0]]),
        ("sequence", False, [[3]]),
        ("sequence", True, [[0]]),
    ):
        weights = grpo.sampler_weights(old, sampler, mask, level, 3.0, masked)
        assert not weights.requires_grad
        check(weights, expected, "sampler_weights", f"{level}, masked {masked}")


@given(TOKENS, st.sampled_from([-1.0, 0.0, 1.0]), st.floats(0.0, 1.0))
def test_what_stays_in_the_loss_equals_the_reference(grpo, tokens, advantage, limit):
    own, shift = double(tokens).T
    sampler = own + shift
    mask = torch.ones(1, len(tokens))
    kept = grpo.is_near_policy(own[None], sampler[None], double([advantage]), mask, limit)
    expected = gae_reference.stays_in_the_loss(own.exp().tolist(), sampler.exp().tolist(), advantage, limit)
    near = abs(float(shift.mean()) - limit) < 1e-9  # rounding may decide
    assert near or kept.tolist() == [[expected]]


def test_only_bad_answers_that_the_policy_has_left_are_left_out(grpo):
    """[G35] A mean of 0.5 nats; the padding, a million, does not count."""
    own, sampler = double([[-1.0, -2.0, -1e6]] * 3), double([[-1.0, -1.0, 0.0]] * 3)
    mask = torch.tensor([[1, 1, 0]] * 3)
    kept = grpo.is_near_policy(own, sampler, double([-1.0, 0.0, 1.0]), mask, 0.4)
    assert kept.expand(3, 3)[:, 0].tolist() == [False, True, True]
    assert grpo.is_near_policy(own, sampler, double([-1.0, 0.0, 1.0]), mask, 0.6).all()


# ---- Advantages and rewards ----


def ratings_of(parts, group_size=4):
    """Ratings of consecutive groups from {name: rewards of all answers}, None where one does not apply."""
    columns = {name: torch.tensor([math.nan if x is None else x for x in own]) for name, own in parts.items()}
    count = len(next(iter(columns.values()))) // group_size
    groups = [{k: x.view(-1, group_size)[i] for k, x in columns.items()} for i in range(count)]
    return [SimpleNamespace(parts=group, rewards=torch.stack([*group.values()]).nansum(0)) for group in groups]


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.lists(TOKENS, min_size=4, max_size=4), st.floats(0, 1))
def test_reinforce_pp_equals_the_reference(grpo, rewards, rows, kl_coef):
    """[G36] Answers of other lengths; the KL of a token counts for it and for those before it."""
    T = max(map(len, rows)) + 1
    own, reference, mask = (torch.zeros(4, T, dtype=torch.float64) for _ in range(3))
    own += math.inf  # padding
    for i, row in enumerate(rows):
        own[i, : len(row)] = double([a for a, _ in row])
        reference[i, : len(row)] = double([a + b for a, b in row])
        mask[i, : len(row)] = 1
    given = [[x[: len(row)].tolist() for x, row in zip(column, rows)] for column in (own, reference)]
    returns = grpo.rewards_less_kl(double(rewards), own - reference, mask, kl_coef)
    found = returns[mask.bool()]
    if float(found.std(correction=0)) < 1e-3:
        return
    expected = gae_reference.reinforce_pp_advantages(rewards, *given, kl_coef)
    advantages = grpo.normalised_over_batch(returns, mask)
    check(
        advantages[mask.bool()],
        [x for row in expected for x in row],
        "REINFORCE++ Eq. 8 to 10",
        f"{rewards}, {rows}",
        1e-7,
        1e-9,
    )
    assert (advantages[~mask.bool()] == 0).all()


def test_equal_rewards_over_the_batch_give_exactly_zero(grpo):
    for reward in (0.1, 1 / 3, 1e6 + 0.1):
        assert grpo.normalised_over_batch(torch.full((7,), reward), torch.ones(7)).tolist() == [0.0] * 7


def test_scale_over_the_batch(grpo, tiny_grpo):
    """[G36] The mean is the group's, the standard deviation that of the batch: √(1/8 · (12/16 + 4/4)) = 0.4677."""
    ratings = ratings_of({"verifier": [1.0, 0, 0, 0, 1, 1, 0, 0]})
    found = grpo.advantages_of(tiny_grpo(scale="batch"), ratings)
    std = math.sqrt((0.75 + 1.0) / 8)
    check(found, [x / std for x in (0.75, -0.25, -0.25, -0.25, 0.5, 0.5, -0.5, -0.5)], "scale batch", "", 1e-6)


def test_decoupled_rewards(grpo, tiny_grpo):
    """[G37] Each reward is scaled by itself, by the flag's weight; a sum of them hides what differs in both."""
    args = tiny_grpo(decouple_rewards=True, length_weight=0.5)
    parts = {"verifier": [1.0, 0.0, 1.0, 0.0, 1, 1, 1, 1], "length": [-0.5, 0.5, -0.1, 0.3, 0.2, 0.2, 0.2, 0.2]}
    parts["some_reward"] = [None, 1.0, 0.0, None, None, None, None, None]
    ratings = ratings_of(parts)
    columns = [parts["verifier"][:4], [2 * x for x in parts["length"][:4]], [None, 1.0, 0.0, None]]
    expected = gae_reference.decoupled_advantages(columns, [1.0, 0.5, 1.0])
    check(grpo.decoupled_advantages(args, ratings), [*expected, 0, 0, 0, 0], "GDPO", f"{parts}", 1e-6, 1e-6)
    whole = grpo.advantages_of(args, ratings)
    check(whole.mean(), 0.0, "GDPO, over the batch", "mean", atol=1e-6)
    check(whole.std(correction=0), 1.0, "GDPO, over the batch", "standard deviation", 1e-6)


def test_a_group_whose_rewards_differ_in_parts_alone(grpo, tiny_grpo):
    """The sums are all 1: nothing for GRPO, something for GDPO."""
    (rating,) = ratings_of({"verifier": [1.0, 0.0, 1.0, 0.0], "format": [0.0, 1.0, 0.0, 1.0]})
    assert not grpo.has_variance(tiny_grpo(), rating)
    assert grpo.has_variance(tiny_grpo(decouple_rewards=True, format_weight=1.0), rating)
    (rating,) = ratings_of({"verifier": [1.0] * 4, "some_reward": [None, 0.5, None, 0.5]})
    assert not grpo.has_variance(tiny_grpo(decouple_rewards=True), rating)


def test_the_last_tokens_cost(grpo, tiny_grpo):
    """[G38] 10 tokens, a buffer of 4: free up to 6, then a quarter each."""
    args = tiny_grpo(overlong_buffer=4, length_weight=0.0)
    problem = grpo.Problem("1+2", "3")
    found = [grpo.reward_parts(args, problem, "3", n, False)["overlong"] for n in range(1, 11)]
    assert found == [0, 0, 0, 0, 0, 0, -0.25, -0.5, -0.75, -1]
    assert found == [gae_reference.soft_overlong_punishment(n, 10, 4) for n in range(1, 11)]
    assert "overlong" not in grpo.reward_parts(tiny_grpo(), problem, "3", 10, False)


# ---- The KL whose gradient is the KL's ----


def test_the_ratio_makes_the_kl_and_its_gradient_unbiased(grpo):
    """[G40] Over the whole vocabulary, with samples of π_old: the mean of ρ k3 is KL(π‖π_ref), and so is its gradient.
    The gradient of k3 alone is, even at π_old = π, that of KL(π_ref‖π)."""
    torch.manual_seed(0)
    scores, old, reference = (torch.randn(6, dtype=torch.float64) for _ in range(3))
    old, reference = old.log_softmax(-1), reference.log_softmax(-1)

    def found(expectation):
        return value_and_gradient(lambda x: expectation(x.log_softmax(-1)), scores)

    def weighted(logprob):
        return (old.exp() * (logprob - old).exp() * grpo.kl_k3(logprob, reference)).sum()

    exact = found(lambda logprob: (logprob.exp() * (logprob - reference)).sum())
    for own, expected in zip(found(weighted), exact):
        check(own, expected.tolist(), "E[ρ k3] is the KL", "π_old far from π")
    drawn = scores.log_softmax(-1).exp()
    _, alone = found(lambda logprob: (drawn * grpo.kl_k3(logprob, reference)).sum())
    _, other_way = found(lambda logprob: (reference.exp() * (reference - logprob)).sum())
    check(alone, other_way.tolist(), "E[k3]", "gradient at π_old = π")
    assert (alone - exact[1]).abs().max() > 0.05


def test_nothing_to_normalise_over(grpo):
    """Every answer of a step may be cut off and left out."""
    assert grpo.normalised_over_batch(torch.rand(2, 3), torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


def test_what_is_0_stays_exactly_0(grpo, tiny_grpo):
    """A group without variance beside others: the step skips it [G10]. Rewards that cancel are no signal either."""
    ratings = ratings_of({"verifier": [0.3, 0.1, 0.1, 0.1, 0.7, 0.7, 0.7, 0.7]})
    found = grpo.advantages_of(tiny_grpo(scale="batch"), ratings)
    assert (found[4:] == 0).all() and found[:4].abs().min() > 0.1
    paid = torch.rand(280, generator=torch.Generator().manual_seed(0))  # of 40 groups some leave a rounding error
    ratings = ratings_of({"verifier": paid.tolist(), "some_reward": (1 - paid).tolist()}, 7)
    assert grpo.advantages_of(tiny_grpo(decouple_rewards=True, group_size=7), ratings).tolist() == [0.0] * 280
