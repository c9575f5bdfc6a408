"""compute_gae against hand tables, limits and the two plain-Python forms of gae_reference.py."""

import pytest
import torch
from check import check, check_every_kind
from hypothesis import given, settings
from hypothesis import strategies as st

import gae_reference

pytestmark = pytest.mark.equation
GAE = "compute_gae, GAE Eq. 16: Â_t = Σ_l (γλ)^l δ_{t+l} within the episode, δ_t = r_t + γ V(s_{t+1}) − V(s_t)"
EXAMPLE = gae_reference.EXAMPLE

numbers = st.floats(-10, 10)


def column(values, dtype=torch.float64):
    """One environment's T values as (T, 1)."""
    return torch.tensor(values, dtype=torch.bool if isinstance(values[0], bool) else dtype).unsqueeze(1)


@st.composite
def rollouts(draw):
    """Rollouts (T, N) as lists of N dicts, the arguments of the reference. Some steps terminate, some truncate.

    Inside an episode next_values[t] is values[t + 1]; where one ends, and at the rollout's last step, it is its own.
    """
    num_steps, num_envs = draw(st.integers(1, 10)), draw(st.integers(1, 3))
    envs = []
    for _ in range(num_envs):
        ends = draw(st.lists(st.sampled_from("..TX"), min_size=num_steps, max_size=num_steps))
        rewards, values, finals = draw(
            st.lists(st.tuples(numbers, numbers, numbers), min_size=num_steps, max_size=num_steps).map(
                lambda rows: zip(*rows)
            )
        )
        is_cut = [end != "." for end in ends[:-1]] + [True]
        next_values = [final if cut else value for cut, final, value in zip(is_cut, finals, (*values[1:], 0.0))]
        envs.append(
            {
                "rewards": list(rewards),
                "values": list(values),
                "next_values": next_values,
                "terminated": [end == "T" for end in ends],
                "done": [end != "." for end in ends],
            }
        )
    return envs


def stack(envs, dtype=torch.float64):
    """The reference's lists as the contract's tensors (T, N)."""
    keys = ("rewards", "values", "next_values", "terminated", "done")
    return [torch.cat([column(env[key], dtype) for env in envs], dim=1) for key in keys]


@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [
        (0.0, [2.6, 0.7, 4.5, 2.7, -1.0, 2.6]),
        (0.95, [2.6 + 0.855 * (0.7 + 0.855 * 4.5), 0.7 + 0.855 * 4.5, 4.5, 2.7 - 0.855, -1.0, 2.6]),
        (1.0, [2.6 + 0.9 * (0.7 + 0.9 * 4.5), 0.7 + 0.9 * 4.5, 4.5, 2.7 - 0.9, -1.0, 2.6]),
    ],
)
def test_hand_table(compute_gae, gae_lambda, expected):
    """Six steps by pencil: truncated at t=2 (its V(next) = 5 counts), terminated at t=4 (its V(next) = 7 does not)."""
    case = f"six steps, truncated at t=2, terminated at t=4, γ=0.9, λ={gae_lambda}"
    check(compute_gae(*stack([EXAMPLE]), 0.9, gae_lambda), [[x] for x in expected], GAE, case)


def test_truncation_bootstraps(compute_gae):
    """An episode that the time limit cut would have gone on: V of its final observation is in δ."""
    advantage = compute_gae(*(column(x) for x in ([1.0], [2.0], [5.0], [False], [True])), 0.5, 0.95)
    check(advantage, [[1 + 0.5 * 5 - 2]], GAE, "one step, truncated: r=1, V=2, V(next)=5, γ=0.5")


def test_termination_has_no_future(compute_gae):
    """Whatever the critic says of a terminal state stays out."""
    for next_value in (5.0, -1e6):
        advantage = compute_gae(*(column(x) for x in ([1.0], [2.0], [next_value], [True], [True])), 0.5, 0.95)
        check(advantage, [[1 - 2.0]], GAE, f"one step, terminated: r=1, V=2, V(next)={next_value}, γ=0.5")


def test_unfinished_episode_bootstraps(compute_gae):
    advantage = compute_gae(*(column(x) for x in ([1.0], [2.0], [5.0], [False], [False])), 0.5, 0.95)
    check(advantage, [[1 + 0.5 * 5 - 2]], GAE, "one step, the rollout ends in mid-episode: r=1, V=2, V(next)=5, γ=0.5")


@pytest.mark.parametrize("terminated", [True, False])
def test_nothing_flows_across_an_episode_end(compute_gae, terminated):
    """What happens after done, an autoreset row included, changes nothing before it."""
    done = [False, True, False, False]
    ends = [False, terminated, False, False]
    results = []
    for after in (0.0, 1000.0):
        columns = ([1.0, 2.0, after, after], [1.0, 1.0, after, 1.0], [1.0, 3.0, 1.0, after], ends, done)
        results.append(compute_gae(*(column(x) for x in columns), 0.9, 0.95))
    case = f"rewards and values after a {'terminated' if terminated else 'truncated'} step changed from 0 to 1000"
    assert results[0][:2].abs().sum() > 0
    check(results[1][:2], results[0][:2], GAE, case)


def test_lambda_0_is_the_td_error(compute_gae):
    rollout = stack([EXAMPLE])
    deltas = gae_reference.td_errors(*(EXAMPLE[k] for k in ("rewards", "values", "next_values", "terminated")), 0.97)
    check(compute_gae(*rollout, 0.97, 0.0), [[x] for x in deltas], GAE, "λ=0 must leave δ alone")


def test_lambda_1_is_the_discounted_return_less_the_value(compute_gae):
    """λ=1 trusts no value but the last: Â = Σ γ^l r + γ^h V(s_h) − V."""
    rewards, values, next_values = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [5.0, 6.0, 10.0]
    g = 0.9
    expected = [
        [1 + g * 2 + g**2 * 3 + g**3 * 10 - 4],
        [2 + g * 3 + g**2 * 10 - 5],
        [3 + g * 10 - 6],
    ]
    columns = (rewards, values, next_values, [False] * 3, [False] * 3)
    check(compute_gae(*(column(x) for x in columns), g, 1.0), expected, GAE, "λ=1: discounted return − V")


def test_environments_do_not_mix(compute_gae):
    """Each column is one environment: computed together or alone, the same."""
    other = {**EXAMPLE, "rewards": [-x for x in EXAMPLE["rewards"]], "done": [False] * 6, "terminated": [False] * 6}
    together = compute_gae(*stack([EXAMPLE, other]), 0.9, 0.8)
    alone = torch.cat([compute_gae(*stack([env]), 0.9, 0.8) for env in (EXAMPLE, other)], dim=1)
    check(together, alone, GAE, "two environments at once against one at a time")


def test_dones_of_every_kind(compute_gae):
    """bool, integer or float 0 and 1: people copy from code that has each."""
    rewards, values, next_values, terminated, done = stack([EXAMPLE])
    expected = [[2.6 + 0.45 * (0.7 + 0.45 * 4.5)], [0.7 + 0.45 * 4.5], [4.5], [2.7 - 0.45], [-1.0], [2.6]]
    check_every_kind(
        lambda *ends: compute_gae(rewards, values, next_values, *ends, 0.9, 0.5),
        (terminated.tolist(), done.tolist()),
        expected,
        GAE,
        "six steps, truncated at t=2, terminated at t=4, γ=0.9, λ=0.5",
    )


def test_inputs_are_left_alone(compute_gae):
    rollout = stack([EXAMPLE])
    copies = [x.clone() for x in rollout]
    compute_gae(*rollout, 0.9, 0.95)
    assert all(torch.equal(x, copy) for x, copy in zip(rollout, copies, strict=True)), "compute_gae changed its inputs"


@settings(max_examples=200, deadline=None)
@given(envs=rollouts(), gamma=st.floats(0, 1), gae_lambda=st.floats(0, 1))
def test_equals_the_double_sum_and_the_n_step_average(compute_gae, envs, gamma, gae_lambda):
    advantages = compute_gae(*stack(envs), gamma, gae_lambda)
    for form in (gae_reference.gae_double_sum, gae_reference.gae_n_step_average):
        columns = [form(**env, gamma=gamma, gae_lambda=gae_lambda) for env in envs]
        check(
            advantages,
            torch.tensor(columns, dtype=torch.float64).T,
            GAE,
            f"γ={gamma}, λ={gae_lambda}, {form.__name__}, {envs}",
        )


def test_float32_follows_float64(compute_gae):
    generator = torch.Generator().manual_seed(0)
    rewards, values, next_values = torch.randn(3, 128, 8, generator=generator, dtype=torch.float64)
    done = torch.rand(128, 8, generator=generator) < 0.05
    terminated = done & (torch.rand(128, 8, generator=generator) < 0.5)
    exact = compute_gae(rewards, values, next_values, terminated, done, 0.99, 0.95)
    single = compute_gae(rewards.float(), values.float(), next_values.float(), terminated, done, 0.99, 0.95)
    assert single.dtype == torch.float32
    assert done.sum() > 0 and 0 < terminated.sum() < done.sum()
    check(single, exact, GAE, "float32 against float64, 128 × 8", rtol=1e-6, atol=1e-6 * float(exact.abs().max()))
