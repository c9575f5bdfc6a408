"""What happens inside ppo_cartpole.train, seen on the real environment: each test watches one thing."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

SHORT, SYNC = "ShortCartPole-v1", "ShortCartPoleSync-v1"  # registered in conftest.py


@pytest.fixture
def watch(cartpole, monkeypatch):
    """Train and keep what passes through: environment steps, arguments of the equations, optimizer steps, losses."""

    def run(args):
        seen = SimpleNamespace(steps=[], gae=[], policy=[], value=[], kl=[], optimizer=[], losses=[], entropy=[])

        class Agent(cartpole.Agent):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                seen.agent, seen.initial = self, copy.deepcopy(self.state_dict())

        def make_envs(*arguments, make=cartpole.make_envs, **options):
            envs = make(*arguments, **options)
            step, reset = envs.step, envs.reset

            def watched_reset(**options):
                seen.obs, info = reset(**options)
                seen.first_obs = seen.obs
                return seen.obs, info

            def watched_step(actions):
                obs, result = seen.obs, step(actions)
                seen.obs = result[0]
                names = ("obs", "actions", "next_obs", "reward", "terminated", "truncated")
                row = zip(names, (obs, actions, *result[:4]))
                seen.steps.append(SimpleNamespace(**{name: np.array(value) for name, value in row}))
                return result

            envs.step, envs.reset = watched_step, watched_reset
            seen.envs = envs
            return envs

        def keep(name, into):
            function = getattr(cartpole, name)

            def watched(*arguments):
                result = function(*arguments)
                kept = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
                numbers = tuple(x.detach() for x in result) if isinstance(result, tuple) else result.detach()
                into.append(SimpleNamespace(arguments=kept, result=numbers))
                if name == "compute_gae":
                    assert not result.requires_grad  # advantages are numbers, no graph hangs on them
                    into[-1].agent = copy.deepcopy(seen.agent)  # as it was when the rollout was judged
                return result

            return watched

        class Adam(torch.optim.Adam):
            def __init__(self, parameters, **options):
                super().__init__(parameters, **options)
                seen.adam = options

            def step(self):
                gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]
                norm = torch.stack([g.norm() for g in gradients]).norm().item()
                seen.optimizer.append(SimpleNamespace(lr=self.param_groups[0]["lr"], norm=norm, gradients=gradients))
                super().step()

        def backward(loss, function=torch.Tensor.backward):
            seen.losses.append(loss.item())
            function(loss)

        with monkeypatch.context() as patch:
            patch.setattr(cartpole, "Agent", Agent)
            patch.setattr(cartpole, "make_envs", make_envs)
            patch.setattr(torch.optim, "Adam", Adam)
            patch.setattr(torch.Tensor, "backward", backward)
            for name, into in (
                ("compute_gae", seen.gae),
                ("clipped_policy_loss", seen.policy),
                ("clipped_value_loss", seen.value),
                ("approx_kl", seen.kl),
                ("action_logprob_and_entropy", seen.entropy),
            ):
                patch.setattr(cartpole, name, keep(name, into))
            seen.args = args
            seen.metrics = cartpole.train(args)
        # what the environment's own record says of which steps are transitions: all but the one after an end
        done = np.array([step.terminated | step.truncated for step in seen.steps])
        seen.done = done
        seen.is_transition = np.concatenate([np.ones_like(done[:1]), ~done[:-1]])
        return seen

    return run


def rollout(seen, index):
    """The environment's steps of one rollout, each field stacked to (T, N, …) as a tensor."""
    T = seen.args.num_steps
    steps = seen.steps[index * T : (index + 1) * T]
    fields = {name: torch.as_tensor(np.array([getattr(step, name) for step in steps])) for name in vars(steps[0])}
    return SimpleNamespace(**fields, is_transition=torch.from_numpy(seen.is_transition[index * T : (index + 1) * T]))


# ---- Rollout ----


@pytest.mark.parametrize("env_id", [SHORT, SYNC])
def test_rollout_holds_what_the_environments_did(watch, small, env_id):
    """[D1] N environments, T steps: rewards, ends and V of the observations, row by row as they happened."""
    seen = watch(small(env_id=env_id))
    assert len(seen.gae) == len(seen.metrics) == 3
    for index, call in enumerate(seen.gae):
        rewards, values, next_values, terminated, done, gamma, gae_lambda = call.arguments
        real = rollout(seen, index)
        assert rewards.shape == (32, 4)
        assert torch.equal(rewards, real.reward.float())
        assert torch.equal(terminated, real.terminated)
        assert torch.equal(done, real.terminated | real.truncated)
        with torch.no_grad():
            torch.testing.assert_close(values, call.agent.critic(real.obs).squeeze(-1))
            torch.testing.assert_close(next_values, call.agent.critic(real.next_obs).squeeze(-1))
        assert (gamma, gae_lambda) == (seen.args.gamma, seen.args.gae_lambda)


@pytest.mark.parametrize("env_id", [SHORT, SYNC])
def test_truncation_bootstraps_and_termination_does_not(watch, small, env_id):
    """On the real environment: Â = r + γ V(final observation) − V at a cut, r − V where the pole fell."""
    seen = watch(small(env_id=env_id))
    ends = {"truncated": 0, "terminated": 0}
    for index, call in enumerate(seen.gae):
        real = rollout(seen, index)
        with torch.no_grad():
            value, final_value = (call.agent.critic(obs).squeeze(-1) for obs in (real.obs, real.next_obs))
        fell, cut = real.terminated, real.truncated & ~real.terminated
        torch.testing.assert_close(call.result[fell], (real.reward - value)[fell].float())
        bootstrapped = (real.reward + seen.args.gamma * final_value - value).float()
        torch.testing.assert_close(call.result[cut], bootstrapped[cut])
        ends["truncated"] += int(cut.sum())
        ends["terminated"] += int(fell.sum())
    assert ends["truncated"] > 0 and ends["terminated"] > 0, ends


@pytest.mark.parametrize("env_id", [SHORT, SYNC])
def test_autoreset_rows_are_no_transitions(watch, small, env_id):
    """The step after done ignores its action: it is in no minibatch, and no step is counted for it."""
    seen = watch(small(env_id=env_id, num_minibatches=1, update_epochs=1, norm_adv=False))
    assert 0 < (~seen.is_transition).sum() < seen.is_transition.sum()
    for index, (gae, policy, value) in enumerate(zip(seen.gae, seen.policy, seen.value, strict=True)):
        real = rollout(seen, index)
        for batch, everything in ((policy.arguments[2], gae.result), (value.arguments[1], gae.arguments[1])):
            assert torch.equal(batch.sort().values, everything[real.is_transition].sort().values)
    counted = np.cumsum([rollout(seen, i).is_transition.sum() for i in range(len(seen.gae))]).tolist()
    assert [row["global_step"] for row in seen.metrics] == counted
    autoreset = ~seen.is_transition
    assert all(step.reward[i] == 0 for step, row in zip(seen.steps, autoreset) for i in np.flatnonzero(row))


def test_the_run_ends_after_total_timesteps(watch, small):
    """Rollouts go on until total_timesteps transitions are there, and no longer."""
    seen = watch(small(total_timesteps=200))
    steps = [row["global_step"] for row in seen.metrics]
    assert steps[-1] >= 200 > steps[-2]


@pytest.mark.parametrize("env_id", [SHORT, SYNC])
def test_logged_returns_are_those_of_whole_episodes(watch, small, env_id):
    """CartPole pays 1 a step: return and length are the count of transitions between two resets."""
    seen = watch(small(env_id=env_id))
    length, finished = np.zeros(4), []
    for t in range(len(seen.steps)):
        length += seen.is_transition[t]
        for i in np.flatnonzero(seen.done[t]):
            finished.append((t // seen.args.num_steps, length[i]))
            length[i] = 0
    assert len(finished) > 20
    assert max(length for _, length in finished) == 12
    for index, row in enumerate(seen.metrics):
        expected = np.mean([length for rollout_index, length in finished if rollout_index == index])
        assert row["charts/episodic_return"] == pytest.approx(expected)
        assert row["charts/episodic_length"] == pytest.approx(expected)


def test_return_100_waits_for_a_hundred_episodes(watch, small):
    seen = watch(small(total_timesteps=2000))
    lengths, running = [], np.zeros(4)
    for t in range(len(seen.steps)):
        running += seen.is_transition[t]
        lengths += [running[i] for i in np.flatnonzero(seen.done[t])]
        running[seen.done[t]] = 0
        row = seen.metrics[t // 32]
        if (t + 1) % 32 == 0 and len(lengths) >= 100:
            assert row["charts/return_100"] == pytest.approx(np.mean(lengths[-100:]))
        elif (t + 1) % 32 == 0:
            assert "charts/return_100" not in row
    assert len(lengths) > 120


def test_actions_are_drawn_from_the_policy(watch, small, cartpole, monkeypatch):
    """A policy made to prefer action 1 by 0.9 to 0.1 takes it nine times in ten."""
    seen = {}

    class Biased(cartpole.Agent):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            with torch.no_grad():
                self.actor[-1].weight.zero_()
                self.actor[-1].bias.copy_(torch.tensor([0.1, 0.9]).log())

    monkeypatch.setattr(cartpole, "Agent", Biased)
    seen = watch(small(num_envs=32, num_steps=64, total_timesteps=10))
    actions = np.array([step.actions for step in seen.steps])
    assert actions.size == 2048
    assert actions.mean() == pytest.approx(0.9, abs=0.03)


# ---- Update ----


def test_first_update_identities(watch, small):
    """Before the first gradient step new policy and old are one: ratio 1, KL 0, clipfrac 0, loss −mean(Â)."""
    seen = watch(small(total_timesteps=1, num_minibatches=1, update_epochs=1, norm_adv=False))
    logprob, old_logprob, advantage, _ = seen.policy[0].arguments
    assert len(advantage) > 100 and advantage.abs().mean() > 0.1
    torch.testing.assert_close((logprob - old_logprob).exp(), torch.ones(len(logprob)))
    row = seen.metrics[0]
    assert abs(row["losses/approx_kl"]) < 1e-9
    assert row["losses/clipfrac"] == 0
    assert row["losses/policy_loss"] == pytest.approx(-advantage.mean().item(), abs=1e-6)
    real = rollout(seen, 0)
    assert -row["losses/policy_loss"] == pytest.approx(seen.gae[0].result[real.is_transition].mean().item(), abs=1e-6)
    assert row["losses/entropy"] == pytest.approx(np.log(2), abs=1e-3)  # [D2] the policy begins nearly uniform


def test_old_logprobs_are_those_of_the_actions_taken(watch, small):
    seen = watch(small(total_timesteps=1, num_minibatches=1, update_epochs=1))
    real = rollout(seen, 0)
    with torch.no_grad():
        logprobs = seen.gae[0].agent.actor(real.obs).log_softmax(-1)
    taken = logprobs.gather(-1, real.actions.unsqueeze(-1)).squeeze(-1)[real.is_transition]
    torch.testing.assert_close(seen.policy[0].arguments[1].sort().values, taken.sort().values)
    assert taken.std() > 0


def test_returns_are_advantages_plus_values(watch, small):
    seen = watch(small(total_timesteps=1, num_minibatches=1, update_epochs=1))
    real = rollout(seen, 0)
    expected = (seen.gae[0].result + seen.gae[0].arguments[1])[real.is_transition]
    torch.testing.assert_close(seen.value[0].arguments[2].sort().values, expected.sort().values)


def test_every_epoch_sees_every_transition_once(watch, small):
    """[D6] Shuffled anew each epoch, in minibatches whose sizes differ by one at most."""
    seen = watch(small(total_timesteps=1, num_minibatches=3, update_epochs=4))
    batch = seen.gae[0].arguments[1][rollout(seen, 0).is_transition].sort().values
    sizes = [len(call.arguments[1]) for call in seen.value]
    assert len(sizes) == 12 and len(seen.optimizer) == 12
    assert max(sizes) - min(sizes) <= 1
    epochs = [torch.cat([call.arguments[1] for call in seen.value[i : i + 3]]) for i in range(0, 12, 3)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, batch)
    assert not any(torch.equal(epochs[0], epoch) for epoch in epochs[1:])


@pytest.mark.parametrize("norm_adv", [True, False])
def test_advantages_are_normalised_in_each_minibatch(watch, small, norm_adv):
    """[D7] Mean 0 and standard deviation 1 over the minibatch, not over the batch."""
    seen = watch(small(norm_adv=norm_adv))
    for call in seen.policy:
        advantage = call.arguments[2]
        is_normal = abs(advantage.mean()) < 1e-5 and abs(advantage.std(correction=0) - 1) < 1e-4
        assert is_normal == norm_adv


def test_policy_loss_is_clipped_at_clip_coef(watch, small):
    """[D8] The loss gets the new and old log-probabilities and the annealed ε."""
    seen = watch(small(anneal_clip=False, clip_coef=0.3))
    assert {call.arguments[3] for call in seen.policy} == {0.3}
    assert any(not torch.equal(call.arguments[0], call.arguments[1]) for call in seen.policy)


@pytest.mark.parametrize("clip_vloss", [True, False])
def test_value_loss_is_clipped_on_request(watch, small, clip_vloss):
    """[D9] With --clip-vloss at the same ε as the policy's, around the rollout's values; plain without."""
    seen = watch(small(clip_vloss=clip_vloss))
    assert [call.arguments[3] for call in seen.value] == [
        call.arguments[3] if clip_vloss else None for call in seen.policy
    ]
    first, last = seen.value[0].arguments, seen.value[5].arguments
    torch.testing.assert_close(first[0], first[1])  # the first minibatch's values are the rollout's
    assert not torch.allclose(last[0], last[1])


def test_overall_loss(watch, small):
    """[D10] What is differentiated: policy loss − c₂ entropy + c₁ value loss."""
    seen = watch(small(ent_coef=0.3, vf_coef=0.7))
    entropies = [call.result[1].mean() for call in seen.entropy if call.arguments[1].ndim == 1]
    assert len(seen.losses) == len(seen.policy) == len(entropies) > 0
    for loss, policy, value, entropy in zip(seen.losses, seen.policy, seen.value, entropies):
        assert loss == pytest.approx(float(policy.result - 0.3 * entropy + 0.7 * value.result), rel=1e-5)
    assert min(entropies) > 0.1


def test_gradients_are_clipped_by_their_global_norm(watch, small):
    """[D11] One norm over all parameters of both networks; below it nothing changes."""
    seen = watch(small(max_grad_norm=0.05))
    assert all(step.norm == pytest.approx(0.05, rel=1e-3) for step in seen.optimizer)
    free = watch(small("free", max_grad_norm=1e6))
    assert all(step.norm > 0.05 for step in free.optimizer)
    scale = 0.05 / free.optimizer[0].norm
    for clipped, whole in zip(seen.optimizer[0].gradients, free.optimizer[0].gradients, strict=True):
        torch.testing.assert_close(clipped, whole * scale, rtol=1e-3, atol=1e-8)


def test_gradients_do_not_pile_up(watch, small):
    """Each step's gradient is its own minibatch's: with a frozen network all are of one size."""
    seen = watch(small(learning_rate=1e-12, num_minibatches=1, update_epochs=5, total_timesteps=1, max_grad_norm=1e6))
    norms = [step.norm for step in seen.optimizer]
    assert len(norms) == 5
    assert norms == pytest.approx([norms[0]] * 5, rel=1e-3)


def test_adam_epsilon(watch, small):
    """[D3] 1e-5, not torch's 1e-8."""
    assert watch(small(total_timesteps=1)).adam["eps"] == 1e-5


@pytest.mark.parametrize("anneal", [True, False])
def test_learning_rate_and_clip_range_fall_linearly(watch, small, anneal):
    """[D4] Proportional to the steps that are left: all of it at first, never below 0."""
    seen = watch(small(anneal_lr=anneal, anneal_clip=anneal, learning_rate=0.01, clip_coef=0.2, total_timesteps=500))
    done_before = [0, *(row["global_step"] for row in seen.metrics[:-1])]
    assert len(done_before) >= 4
    for index, steps in enumerate(done_before):
        share = 1 - steps / 500 if anneal else 1
        updates = slice(6 * index, 6 * index + 6)
        assert [step.lr for step in seen.optimizer[updates]] == pytest.approx([0.01 * share] * 6)
        assert [call.arguments[3] for call in seen.policy[updates]] == pytest.approx([0.2 * share] * 6)
        assert seen.metrics[index]["charts/learning_rate"] == pytest.approx(0.01 * share)


def test_target_kl_stops_the_epochs(watch, small):
    """Per minibatch, on k3, before the step is taken: the offending minibatch changes nothing."""
    plenty = {"update_epochs": 50, "learning_rate": 0.01, "total_timesteps": 1}
    free, held = watch(small("free", **plenty)), watch(small("held", **plenty, target_kl=0.005))
    kls = [call.result.item() for call in held.kl]
    assert len(free.optimizer) == 150
    assert kls[-1] > 0.005 >= max(kls[:-1])
    assert len(held.optimizer) == len(kls) - 1 < 150
    assert len(held.optimizer) > 1


def test_losses_are_means_over_every_minibatch(watch, small):
    """[D12] Not the last minibatch's, as in many scripts."""
    seen = watch(small())
    per_rollout = 6
    for index, row in enumerate(seen.metrics):
        calls = slice(index * per_rollout, (index + 1) * per_rollout)
        assert row["losses/policy_loss"] == pytest.approx(
            np.mean([float(c.result) for c in seen.policy[calls]]), abs=1e-6
        )
        assert row["losses/value_loss"] == pytest.approx(
            np.mean([float(c.result) for c in seen.value[calls]]), rel=1e-5
        )
        assert row["losses/approx_kl"] == pytest.approx(np.mean([float(c.result) for c in seen.kl[calls]]), abs=1e-7)
        outside = [
            ((c.arguments[0] - c.arguments[1]).exp() - 1).abs().gt(c.arguments[3]).float().mean()
            for c in seen.policy[calls]
        ]
        assert row["losses/clipfrac"] == pytest.approx(np.mean(outside), abs=1e-6)
    assert max(row["losses/clipfrac"] for row in seen.metrics) > 0


def test_explained_variance(watch, small):
    """[D12] 1 − Var(R − V) / Var(R) over the transitions, with the rollout's values."""
    seen = watch(small(total_timesteps=1))
    chosen = rollout(seen, 0).is_transition
    advantages, values = seen.gae[0].result[chosen], seen.gae[0].arguments[1][chosen]
    expected = 1 - advantages.var() / (advantages + values).var()
    assert seen.metrics[0]["losses/explained_variance"] == pytest.approx(float(expected), abs=1e-5)


# ---- Networks ----


def test_initialisation(cartpole):
    """[D2] Orthogonal weights of gain √2, 0.01 for the policy's last layer, 1 for the value's; zero biases."""
    agent = cartpole.Agent(cartpole.make_envs(cartpole.Args(), 2), cartpole.Args())
    for network, last_gain, outputs in ((agent.actor, 0.01, 2), (agent.critic, 1.0, 1)):
        layers = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
        assert [layer.out_features for layer in layers] == [64, 64, outputs]
        for layer, gain in zip(layers, (2**0.5, 2**0.5, last_gain), strict=True):
            weight = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
            torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), atol=1e-5, rtol=0)
            assert not layer.bias.any()


def test_networks_share_nothing(cartpole):
    """[D13] The value loss leaves the policy alone, and the other way round."""
    agent = cartpole.Agent(cartpole.make_envs(cartpole.Args(), 2), cartpole.Args())
    agent.critic(torch.randn(5, 4)).sum().backward()
    assert all(p.grad is None for p in agent.actor.parameters())
    assert all(p.grad is not None for p in agent.critic.parameters())
    assert agent.actor(torch.randn(5, 4)).shape == (5, 2)
    assert sum(p.numel() for p in agent.parameters()) == sum(
        p.numel() for p in (*agent.actor.parameters(), *agent.critic.parameters())
    )


def test_entropy_and_logprob(cartpole):
    """Against torch.distributions, with gradients."""
    logits = torch.randn(7, 3, 4, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(4, (7, 3))
    distribution = torch.distributions.Categorical(logits=logits)
    results = cartpole.action_logprob_and_entropy(logits, actions)
    for result, expected in zip(results, (distribution.log_prob(actions), distribution.entropy()), strict=True):
        torch.testing.assert_close(result, expected)
        gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (result, expected)]
        torch.testing.assert_close(*gradients)


# ---- Evaluation ----


def test_evaluation_counts_first_episodes_and_acts_greedily(cartpole, small, monkeypatch):
    """One episode of each environment: long ones are waited for, the second of a short one does not count."""
    actions, done = [], []

    def make_envs(*arguments, make=cartpole.make_envs, **options):
        envs = make(*arguments, **options)
        step = envs.step

        def watched_step(action):
            result = step(action)
            actions.append(action.copy())
            done.append(result[2] | result[3])
            return result

        envs.step = watched_step
        return envs

    agent = cartpole.Agent(cartpole.make_envs(small(), 1), small())
    with torch.no_grad():
        agent.actor[-1].weight.zero_()
        agent.actor[-1].bias.copy_(torch.tensor([0.0, 0.1]))  # hardly prefers action 1: greedy takes it always
    monkeypatch.setattr(cartpole, "make_envs", make_envs)
    returns = cartpole.play(agent, small(), 20)
    first_lengths = np.argmax(done, axis=0) + 1  # CartPole pays 1 a step
    assert returns.tolist() == first_lengths.tolist() and len(returns) == 20
    assert returns.min() + 2 <= returns.max() == len(actions)  # so a second episode would have been counted
    assert all((a == 1).all() for a in actions)
