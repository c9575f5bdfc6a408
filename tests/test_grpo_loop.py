"""What happens inside grpo_llm's train: each test watches one thing, on a Qwen3 of 32 dimensions."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import flags, two_processes
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

import gae_reference


@pytest.fixture
def watch(grpo, monkeypatch):
    """Train and keep what passes through: arguments and results of functions; weights, gradients and rates at each
    step of the optimizer."""

    def run(args):
        seen = SimpleNamespace(steps=[], calls={}, args=args)

        def keep(name):
            function = getattr(grpo, name)
            calls = seen.calls.setdefault(name, [])

            def watched(*arguments, **options):
                kept = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in arguments]
                result = function(*arguments, **options)
                at = SimpleNamespace(arguments=kept, result=result, step=len(seen.steps))
                calls.append(at)
                return result

            return watched

        class AdamW(torch.optim.AdamW):
            def step(self):
                (group,) = self.param_groups
                gradients = [None if p.grad is None else p.grad.clone() for p in group["params"]]
                weights = [p.detach().clone() for p in group["params"]]
                seen.steps.append(SimpleNamespace(gradients=gradients, weights=weights, rate=group["lr"]))
                super().step()

        names = (
            "sample_groups rate_group process_advantages advantages_of grpo_token_loss reduce_loss pack_rows "
            "completion_logprobs score raw_scores kl_k3"
        )
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim, "AdamW", AdamW)
            for name in names.split():
                patch.setattr(grpo, name, keep(name))
            seen.metrics = grpo.train(args)
        seen.groups = [
            call.result for call in seen.calls["sample_groups"] if call.arguments[7][0][0] == "train"
        ]  # of each round, the P groups that were sampled
        # without those that check the model when it is loaded, on 12 tokens
        for name, tokens in (
            ("pack_rows", lambda call: call.arguments[1].shape[1]),
            ("completion_logprobs", lambda call: call.arguments[2]),
        ):
            seen.calls[name] = [call for call in seen.calls[name] if tokens(call) == args.max_tokens]
        return seen

    return run


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors])


def base_model(args):
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()


def model_with(args, weights):
    """The tiny model with the weights that the optimizer held."""
    model = base_model(args)
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)
    return model


def plain_logprobs(model, group, temperature=1.0):
    """A list of (length,) log-probabilities of a group's completions, one plain forward pass each, with gradients."""
    rows = []
    for row, length in zip(group.tokens, group.mask.sum(-1).tolist()):
        sequence = torch.tensor([group.prompt + row[:length].tolist()])
        logits = model(sequence).logits[0, len(group.prompt) - 1 : -1] / temperature
        rows.append(logits.log_softmax(-1).gather(-1, row[:length, None])[:, 0])
    return rows


def slopes(model, loss):
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return flat([torch.zeros_like(p) if g is None else g for g, p in zip(gradients, model.parameters())])


def assert_same_gradient(found, expected):
    size = float(expected.abs().max())
    assert size > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * size)


FREE = {"max_grad_norm": 1e9}  # gradients as they come


# ---- The first update ----


@pytest.mark.parametrize("options", [{}, {"num_epochs": 2, "num_minibatches": 2}, {"importance": "sequence"}])
def test_first_update_identities(watch, tiny_grpo, options):
    """[G6] At a temperature that is not 1: the ratio is exactly 1 and the KL exactly 0. The loss is 0, for advantages
    of a group sum to 0; its gradient is not."""
    seen = watch(tiny_grpo(temperature=0.8, beta=0.1, steps=1, **FREE, **options))
    logprob, old_logprob, _, advantage, *_ = seen.calls["grpo_token_loss"][0].arguments
    mask = seen.calls["reduce_loss"][0].arguments[1].bool()
    assert mask.sum() > 20 and (logprob[mask] < 0).all()
    assert torch.equal(logprob[mask], old_logprob[mask])
    own, ref_logprob = seen.calls["kl_k3"][0].arguments
    assert torch.equal(own[mask], logprob[mask]) and torch.equal(own[mask], ref_logprob[mask])
    assert advantage.abs().max() > 0.5
    row = seen.metrics[1]
    if not options.get("num_epochs"):
        assert row["policy/ratio_mean"] == row["policy/ratio_max"] == 1
        assert row["kl/reference"] == row["policy/clip_low"] == row["policy/clip_high"] == 0
        assert abs(row["policy/loss"]) < 1e-6
    assert row["policy/grad_norm"] > 0.1 and row["policy/sampler_gap"] < 1e-5


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
def test_gradient_is_that_of_the_definition(watch, tiny_grpo, reduction):
    """[G2] [G4] [G7] [G8] [G10] [G17] Against one plain forward pass a sequence and advantages by the reference,
    whatever the rows and micro-batches. A group of equal rewards is in the mean, and in no row."""
    found = []
    for name, micro_batch_tokens in (("whole", 10_000), ("split", 1)):
        options = {"micro_batch_tokens": micro_batch_tokens, "temperature": 0.8}
        seen = watch(tiny_grpo(name, reduction=reduction, steps=1, **options, **FREE))
        found.append(flat(seen.steps[0].gradients))
    assert len(seen.calls["pack_rows"]) >= 4  # what the second was split into
    ratings = [call.result for call in seen.calls["rate_group"]]
    assert seen.metrics[1]["groups/zero_variance"] == pytest.approx(1 / 3)
    model = base_model(seen.args)
    loss, total = 0.0, sum(int(group.mask.sum()) for group in seen.groups[0])
    for group, rating in zip(seen.groups[0], ratings, strict=True):
        advantages = gae_reference.group_advantages(rating.rewards.tolist())
        for logprobs, advantage in zip(plain_logprobs(model, group, 0.8), advantages, strict=True):
            weight = {"sequence": 1 / (12 * len(logprobs)), "token": 1 / total, "constant": 1 / 120}[reduction]
            loss = loss - weight * advantage * logprobs.sum()
    expected = slopes(model, loss)
    for gradient in found:
        assert_same_gradient(gradient, expected)
    equal = [i for i, rating in enumerate(ratings) if len(set(rating.rewards.tolist())) == 1]
    taught = {i // 4 for call in seen.calls["pack_rows"] for i in call.result.sequences.tolist()}
    assert len(equal) == 1 and taught == {0, 1, 2} - set(equal)
    assert all(call.arguments[5:6] != [8] and int(call.arguments[4]) == 12 for call in seen.calls["reduce_loss"])


def test_gradient_checkpointing_in_the_loop(watch, tiny_grpo):
    """Less memory, the same gradient, with an adapter too; sampling is not slowed down by it."""
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    for options in ({}, {"lora_rank": 4}):
        runs = []
        for kept in (False, True):
            name = f"{len(options)} {kept}"
            seen = watch(tiny_grpo(name, gradient_checkpointing=kept, steps=1, logprob_tokens=8, **options, **FREE))
            runs.append(flat([g for g in seen.steps[0].gradients if g is not None]))
        assert_same_gradient(*runs)


# ---- Groups without variance ----


def rewards_by_step(grpo, monkeypatch, seen_steps):
    """Rewards by length at first; equal for every answer once the optimizer has taken `seen_steps` steps."""
    count = itertools.count()
    original = grpo.reward_parts

    def parts(args, problem, completion, num_tokens, is_truncated):
        if next(count) >= seen_steps * args.prompts_per_step * args.group_size:
            return {"verifier": 1.0, "length": 0.0}
        return original(args, problem, completion, num_tokens, is_truncated)

    monkeypatch.setattr(grpo, "reward_parts", parts)


def test_equal_rewards_move_nothing_without_kl(watch, grpo, tiny_grpo, monkeypatch):
    """[G10] With β 0 no step is taken at all: weight decay does not pull either."""
    rewards_by_step(grpo, monkeypatch, 0)
    seen = watch(tiny_grpo(weight_decay=0.1))
    assert seen.steps == [] and seen.calls["grpo_token_loss"] == []
    for row in seen.metrics[1:]:
        assert row["groups/zero_variance"] == 1 and row["reward/std"] == 0 and row["reward/mean"] == 1
        assert row["policy/loss"] == row["policy/grad_norm"] == 0 and "policy/ratio_max" not in row
    saved = torch.load(Path(seen.args.run_dir) / "checkpoint.pt", weights_only=True)["policy"]
    before = base_model(seen.args).state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in saved.items()) and len(saved) > 20


def test_equal_rewards_have_the_gradient_of_the_kl(watch, grpo, tiny_grpo, monkeypatch):
    """[G5] [G10] β times the mean of k3's gradient, with the policy of the first step away from the reference."""
    rewards_by_step(grpo, monkeypatch, 1)
    seen = watch(tiny_grpo(beta=0.3, **FREE))
    assert len(seen.steps) == 2 and seen.metrics[2]["groups/zero_variance"] == 1
    policy, reference = model_with(seen.args, seen.steps[1].weights), base_model(seen.args)
    loss = 0.0
    for group in seen.groups[1]:
        for own, ref in zip(plain_logprobs(policy, group), plain_logprobs(reference, group), strict=True):
            log_ratio = ref.detach() - own
            loss = loss + 0.3 / 12 * (log_ratio.exp() - 1 - log_ratio).mean()
    assert_same_gradient(flat(seen.steps[1].gradients), slopes(policy, loss))
    assert seen.metrics[2]["policy/loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert seen.metrics[1]["kl/reference"] == 0 < seen.metrics[2]["kl/reference"]


def test_dynamic_sampling(watch, grpo, tiny_grpo, monkeypatch):
    """[G11] Groups without variance are replaced from further prompts, in order; the rest counts what was seen."""
    spoiled = []
    original = grpo.reward_parts

    def parts(args, problem, *rest):
        if int(problem.answer) % 2:
            spoiled.append(problem.prompt)
            return {"verifier": 0.0, "length": 0.0}
        return original(args, problem, *rest)

    monkeypatch.setattr(grpo, "reward_parts", parts)
    seen = watch(tiny_grpo(dynamic_sampling=6, steps=1, num_minibatches=1))
    rounds = len(seen.groups)
    ratings = [call.result for call in seen.calls["rate_group"]]
    assert 2 <= rounds <= 7 and len(ratings) == 3 * rounds and spoiled
    differ = [rating for rating in ratings if len(set(rating.rewards.tolist())) > 1][:3]
    (call,) = seen.calls["advantages_of"]
    assert len(differ) == len(call.arguments[1]) == 3
    assert all(one is other for one, other in zip(call.arguments[1], differ))
    assert (call.result.view(3, 4).abs().sum(-1) > 0).all()
    zero = sum(len(set(rating.rewards.tolist())) == 1 for rating in ratings) / len(ratings)
    assert seen.metrics[1]["groups/zero_variance"] == pytest.approx(zero) and zero > 0.2
    prompts = [group.problem.prompt for groups in seen.groups for group in groups]
    assert len(set(prompts)) == 3 * rounds
    saved = torch.load(Path(seen.args.run_dir) / "checkpoint.pt", weights_only=True)
    assert saved["cursor"] == 3 * rounds


# ---- Truncation ----


def test_truncated_completions(watch, tiny_grpo):
    """[G12] Kept, out of the loss, or penalised; always counted."""
    keep, mask, penalise = (
        watch(tiny_grpo(kind, truncated=kind, steps=1, beta=0.1, truncation_penalty=3.0))
        for kind in ("keep", "mask", "penalise")
    )
    truncated = torch.cat([~(group.tokens == 1).any(-1) for group in keep.groups[0]])
    assert 0 < truncated.sum() < 12
    for seen in (keep, mask, penalise):
        assert seen.metrics[1]["completion/truncated"] == pytest.approx(float(truncated.float().mean()))
        assert seen.metrics[1]["completion/eos_rate"] == pytest.approx(1 - float(truncated.float().mean()))

    def in_the_loss(seen):
        return {i for call in seen.calls["pack_rows"] for i in call.result.sequences.tolist()}

    assert in_the_loss(keep) == in_the_loss(penalise) == set(range(12))
    assert in_the_loss(mask) == set((~truncated).nonzero()[:, 0].tolist())
    tokens = {seen.args.truncated: int(seen.calls["reduce_loss"][0].arguments[3]) for seen in (keep, mask, penalise)}
    lengths = torch.cat([group.mask.sum(-1) for group in keep.groups[0]])
    assert tokens == {
        "keep": lengths.sum(),
        "mask": lengths[~truncated].sum(),
        "penalise": lengths.sum(),
    }
    rewards = {
        seen.args.truncated: torch.cat([call.result.rewards for call in seen.calls["rate_group"]])
        for seen in (keep, mask, penalise)
    }
    assert torch.equal(rewards["keep"], rewards["mask"])
    torch.testing.assert_close(rewards["penalise"], rewards["keep"] - 3.0 * truncated)


# ---- Reference ----


def test_the_reference_does_not_move(watch, tiny_grpo):
    seen = watch(tiny_grpo(beta=0.1, steps=3))
    reference = seen.calls["score"][-1].arguments[1]
    before = base_model(seen.args).state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in reference.state_dict().items())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert seen.metrics[-1]["kl/reference"] > 0
    policy = AutoModelForCausalLM.from_pretrained(Path(seen.args.run_dir) / "policy").state_dict()
    assert sum(not torch.equal(weight, before[name]) for name, weight in policy.items()) == len(policy)


def test_the_reference_catches_up(watch, tiny_grpo):
    """[G13] Every second step: the KL is 0 in steps 1, 3 and 5, and not between."""
    seen = watch(tiny_grpo(beta=0.1, steps=5, reference_every=2))
    assert [row["kl/reference"] == 0 for row in seen.metrics[1:]] == [True, False, True, False, True]


def test_without_beta_there_is_no_reference(watch, tiny_grpo):
    seen = watch(tiny_grpo(steps=1))
    assert seen.calls["score"] == [] and "kl/reference" not in seen.metrics[1]
    assert seen.calls["kl_k3"] == [] and all(call.arguments[2] is None for call in seen.calls["grpo_token_loss"])


def test_lora_off_is_the_base_model(watch, tiny_grpo):
    """[G22] Only the adapter learns; the reference, with the adapter's first weights, is the base model, though the
    adapter has moved; the same seed gives the same adapter."""
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    seen = watch(tiny_grpo(beta=0.1, lora_rank=4, steps=3))
    again = watch(tiny_grpo("again", beta=0.1, lora_rank=4, steps=3))
    base = base_model(seen.args)
    (reference,) = [call.result for call in seen.calls["score"] if call.step == 2]
    row = 0
    for group in seen.groups[2]:
        for logprobs in plain_logprobs(base, group):
            torch.testing.assert_close(reference[row, : len(logprobs)], logprobs.detach(), rtol=0, atol=1e-5)
            row += 1
    assert seen.metrics[1]["kl/reference"] == 0 < seen.metrics[3]["kl/reference"]
    saved = torch.load(Path(seen.args.run_dir) / "checkpoint.pt", weights_only=True)["policy"]
    assert saved and all("lora_" in name for name in saved)
    assert any(weight.abs().max() > 0 for name, weight in saved.items() if "lora_B" in name)
    twin = torch.load(Path(again.args.run_dir) / "checkpoint.pt", weights_only=True)["policy"]
    assert all(torch.equal(weight, twin[name]) for name, weight in saved.items())
    model, before = seen.calls["score"][0].arguments[1], base.state_dict()
    frozen = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
    assert len(frozen) > 20 and all(torch.equal(weight, before[name]) for name, weight in frozen.items())
    assert json.loads((Path(seen.args.run_dir) / "policy" / "adapter_config.json").read_text())["r"] == 4


# ---- Algorithms ----


def test_one_ratio_for_the_sequence(watch, tiny_grpo):
    """[G15] GSPO: s = exp(mean of ln π/π_old); the gradient of −mean min(s Â, clip(s) Â) in the second update, where s
    is no longer 1, by plain forward passes."""
    options = {"importance": "sequence", "num_epochs": 2, "clip_low": 0.02, "clip_high": 0.03, "learning_rate": 3e-3}
    seen = watch(tiny_grpo(steps=1, **options, **FREE))
    start, policy = base_model(seen.args), model_with(seen.args, seen.steps[1].weights)
    loss, clipped = 0.0, 0
    for group, rating in zip(seen.groups[0], [call.result for call in seen.calls["rate_group"]], strict=True):
        advantages = gae_reference.group_advantages(rating.rewards.tolist())
        for own, old, advantage in zip(plain_logprobs(policy, group), plain_logprobs(start, group), advantages):
            ratio = (own - old.detach()).mean().exp()
            slope = gae_reference.clipped_surrogate(ratio.item(), advantage, 0.02, 0.03)[1]
            clipped += advantage != 0 and slope == 0
            loss = loss - slope * ratio / 12
    assert 0 < clipped < 8
    assert_same_gradient(flat(seen.steps[1].gradients), slopes(policy, loss))


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("grpo", [math.sqrt(3), *[-1 / math.sqrt(3)] * 3, 0, 0, 0, 0]),
        ("reinforce", [0.375, *[-0.625] * 3, *[0.375] * 4]),  # mean of all 0.625
        ("rloo", [1, *[-1 / 3] * 3, 0, 0, 0, 0]),  # less the mean of the other three
        ("rft", [1, 0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_advantages_of_the_baselines(grpo, tiny_grpo, algorithm, expected):
    ratings = [SimpleNamespace(rewards=x) for x in torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])]
    found = grpo.advantages_of(tiny_grpo(algorithm=algorithm), ratings)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6)


def test_imitation_of_the_right_answers(watch, grpo, tiny_grpo, monkeypatch):
    """RFT: at ρ = 1 the gradient is that of −ln π of what earned a reward, over all sequences."""
    rewards = itertools.cycle([1.0, 0.0, 0.0])
    monkeypatch.setattr(grpo, "reward_parts", lambda *_: {"verifier": next(rewards)})
    seen = watch(tiny_grpo(algorithm="rft", steps=1, **FREE))
    model = base_model(seen.args)
    rows = [logprobs for group in seen.groups[0] for logprobs in plain_logprobs(model, group)]
    loss = -sum(logprobs.mean() for logprobs in rows[::3]) / 12
    assert_same_gradient(flat(seen.steps[0].gradients), slopes(model, loss))


def test_undivided_advantages(watch, tiny_grpo):
    seen = watch(tiny_grpo(scale="none", steps=1))
    (call,) = seen.calls["advantages_of"]
    groups = torch.stack([rating.rewards for rating in call.arguments[1]])
    assert groups.shape == (3, 4)
    torch.testing.assert_close(call.result, (groups - groups.mean(-1, keepdim=True)).flatten())


# ---- Other losses, corrections and advantages (test_grpo_other_algorithms.py has their equations) ----


def second_update(watch, tiny_grpo, grpo, token_slope, **options):
    """The gradient of the second update of one rollout, and the same from plain forward passes: token_slope(ratio,
    advantage) is the derivative of a token's loss by ln π."""
    seen = watch(tiny_grpo(steps=1, num_epochs=2, learning_rate=3e-3, **options, **FREE))
    start, policy = base_model(seen.args), model_with(seen.args, seen.steps[1].weights)
    loss = 0.0
    for group, rating in zip(seen.groups[0], [call.result for call in seen.calls["rate_group"]], strict=True):
        advantages = gae_reference.group_advantages(rating.rewards.tolist())
        for own, old, advantage in zip(plain_logprobs(policy, group), plain_logprobs(start, group), advantages):
            found = [token_slope(float(x), advantage) for x in (own - old).detach().exp()]
            loss = loss + (torch.tensor(found) * own).mean() / 12
    return flat(seen.steps[1].gradients), slopes(policy, loss)


def test_gradient_of_cispo(watch, tiny_grpo, grpo):
    slope = lambda ratio, advantage: -gae_reference.cispo_slope(ratio, advantage, 0.02)  # noqa: E731
    assert_same_gradient(*second_update(watch, tiny_grpo, grpo, slope, policy_loss="cispo", clip_high=0.02))


def test_gradient_of_sapo(watch, tiny_grpo, grpo):
    slope = lambda ratio, advantage: -ratio * gae_reference.sapo_objective(ratio, advantage)[1]  # noqa: E731
    assert_same_gradient(*second_update(watch, tiny_grpo, grpo, slope, policy_loss="sapo"))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradient_with_an_old_sampler(watch, tiny_grpo, grpo, level):
    """[G34] [G39] With --staleness 1 the second step learns from what the first weights sampled, at π_old of the second
    ones, and each token's loss has the weight π_old/π_sampler, cut at the cap."""
    options = {"staleness": 1, "steps": 2, "learning_rate": 1e-2, "sampler_cap": 1.1}
    seen = watch(tiny_grpo(sampler_correction=level, **options, **FREE))
    first, second = base_model(seen.args), model_with(seen.args, seen.steps[1].weights)
    assert len(seen.groups) == 3  # two rollouts before the first step, one before the second
    ratings = [call.result for call in seen.calls["rate_group"]][3:6]
    loss, cut = 0.0, 0
    for group, rating in zip(seen.groups[1], ratings, strict=True):
        advantages = gae_reference.group_advantages(rating.rewards.tolist())
        for own, sampler, advantage in zip(plain_logprobs(second, group), plain_logprobs(first, group), advantages):
            given = [x.detach().double().exp().tolist() for x in (own, sampler)]
            weights = gae_reference.sampler_weights(*given, level, 1.1)
            cut += weights.count(1.1)
            loss = loss - (torch.tensor(weights) * advantage * own).mean() / 12
    assert cut > 0
    assert_same_gradient(flat(seen.steps[1].gradients), slopes(second, loss))
    assert seen.metrics[1]["policy/sampler_weight"] == pytest.approx(1, abs=1e-4)
    assert abs(seen.metrics[2]["policy/sampler_weight"] - 1) > 1e-3 and seen.metrics[2]["policy/sampler_gap"] > 1e-2


def test_bad_answers_far_from_the_policy_are_left_out(watch, tiny_grpo):
    """[G35] By the distance of the policy from the sampler, which is a step old."""
    assert watch(tiny_grpo(steps=1, off_policy_limit=1e-4)).metrics[1]["policy/sampler_weight"] == 1  # none has moved
    options = {"staleness": 1, "steps": 2, "learning_rate": 3e-2, "off_policy_limit": 1e-3}
    seen = watch(tiny_grpo("stale", **options, **FREE))
    assert 0.2 < seen.metrics[2]["policy/sampler_weight"] < 0.95


def test_the_kl_is_weighted_by_the_ratio(watch, tiny_grpo):
    """[G40] The token loss is that of the policy plus β ρ k3."""
    options = {"beta": 0.3, "unbiased_kl": True, "num_epochs": 2, "learning_rate": 1e-2, "steps": 1}
    seen = watch(tiny_grpo(**options, **FREE))
    losses, kls = seen.calls["reduce_loss"], seen.calls["kl_k3"]
    assert len(losses) == len(kls) == len(seen.calls["grpo_token_loss"]) == 2
    far = 0.0
    for call, kl, loss in zip(seen.calls["grpo_token_loss"], kls, losses):
        ratio = (call.arguments[0] - call.arguments[1]).exp()
        mask = loss.arguments[1].bool()
        torch.testing.assert_close(loss.arguments[0][mask], (call.result + 0.3 * ratio * kl.result)[mask])
        far = max(far, float((ratio[mask] - 1).abs().max()))
    assert far > 0.05


def test_reinforce_pp_reaches_the_loss(watch, tiny_grpo):
    """[G36] Advantages of the definition, from sampled and reference log-probabilities; no KL in the loss."""
    options = {"algorithm": "reinforce++", "beta": 0.2, "steps": 2, "num_epochs": 2, "learning_rate": 1e-2}
    seen = watch(tiny_grpo(**options, **FREE))
    start, policy = base_model(seen.args), model_with(seen.args, seen.steps[2].weights)  # of the second rollout
    ratings = [call.result for call in seen.calls["rate_group"]][3:]
    rewards = torch.cat([rating.rewards for rating in ratings]).tolist()
    rows = [[x.tolist() for group in seen.groups[1] for x in plain_logprobs(m, group)] for m in (policy, start)]
    expected = gae_reference.reinforce_pp_advantages(rewards, *rows, 0.2)
    calls = [call for call in seen.calls["grpo_token_loss"] if call.step == 2]
    found = sorted(row[row != 0].tolist() for row in torch.cat([call.arguments[3] for call in calls]))
    assert len(found) == len(expected) == 12
    for own, other in zip(found, sorted(expected)):
        assert own == pytest.approx(other, abs=5e-3)
    losses = [call.arguments[0] for call in seen.calls["reduce_loss"] if call.step == 2]
    for call, loss in zip(calls, losses, strict=True):
        assert torch.equal(loss, call.result)  # the clipped loss alone, without β k3


def test_stale_rollouts_are_learned_from_in_their_order(watch, tiny_grpo):
    seen = watch(tiny_grpo(staleness=2, steps=4))
    calls = [call for call in seen.calls["sample_groups"] if call.arguments[7][0][0] == "train"]
    assert [call.step for call in calls] == [0, 0, 0, 1, 2, 3]
    fresh = watch(tiny_grpo("fresh", steps=4))
    lengths = [row["completion/length"] for row in seen.metrics[1:]]
    assert lengths[0] == fresh.metrics[1]["completion/length"] and len(lengths) == 4
    sampled = [sum(float(group.mask.sum()) for group in groups) / 12 for groups in seen.groups]
    assert lengths == pytest.approx(sampled[:4])


# ---- Epochs and minibatches ----


def test_every_epoch_sees_every_group_once(watch, tiny_grpo):
    """Whole groups in each minibatch, shuffled anew; π_old is the policy before the first step, in all of them."""
    seen = watch(
        tiny_grpo(
            num_epochs=2,
            num_minibatches=2,
            prompts_per_step=8,
            beta=0.1,
            steps=1,
            micro_batch_tokens=10_000,
        )
    )
    batches = [call.result.sequences.tolist() for call in seen.calls["pack_rows"][2 * 2 :]]  # before: π_old, π_ref
    assert len(batches) == 4 and len(seen.steps) == 4
    for epoch in (batches[:2], batches[2:]):
        assert sorted(itertools.chain(*epoch)) == list(range(32))
        assert all(len({i // 4 for i in batch}) == 4 and len(batch) == 16 for batch in epoch)
    assert set(batches[0]) not in (set(batches[2]), set(batches[3]))
    old, ref = (call.result for call in seen.calls["score"])
    assert torch.equal(old, ref) and (old[:, 0] < 0).all()
    differ = []
    for batch, call, kl in zip(batches, seen.calls["grpo_token_loss"], seen.calls["kl_k3"], strict=True):
        (logprob, old_logprob), (own, ref_logprob) = call.arguments[:2], kl.arguments
        assert torch.equal(own, logprob)
        assert torch.equal(old_logprob, old[batch]) and torch.equal(ref_logprob, old[batch])
        differ.append(not torch.equal(logprob[old_logprob != 0], old_logprob[old_logprob != 0]))
    assert differ == [False, True, True, True]


def test_old_logprobs_of_the_sampler(watch, tiny_grpo):
    seen = watch(tiny_grpo(old_logprobs="sampler", num_epochs=2, steps=1, temperature=0.7))
    sampled = torch.cat([group.logprobs for group in seen.groups[0]])
    packed = [call.result.sequences for call in seen.calls["pack_rows"]]
    assert seen.calls["score"] == []
    for rows, call in zip(packed, seen.calls["grpo_token_loss"], strict=True):
        assert torch.equal(call.arguments[1], sampled[rows])
    ratio = seen.metrics[1]["policy/sampler_gap"]
    assert 0 < ratio < 1e-5


def test_temperature_scores(watch, tiny_grpo):
    """[R9] That of the sampling, in every forward pass that scores."""
    seen = watch(tiny_grpo(temperature=0.6, beta=0.1, num_epochs=2))
    scored = [call.arguments[3] for call in seen.calls["completion_logprobs"]]
    assert len(scored) >= 8 and set(scored) == {0.6}
    assert all(row["policy/sampler_gap"] < 1e-5 for row in seen.metrics[1:])


def test_policy_metrics(watch, tiny_grpo):
    """Ratios, clip fractions and KL are means over every token of every minibatch, the loss over the updates."""
    seen = watch(tiny_grpo(num_epochs=3, beta=0.1, steps=1, clip_low=0.05, clip_high=0.3, learning_rate=3e-3))
    ratios, low, high, k3, losses = [], [], [], [], []
    calls = (seen.calls[name] for name in ("grpo_token_loss", "kl_k3", "reduce_loss"))
    for token, kl, reduce in zip(*calls, strict=True):
        logprob, old_logprob, _, advantage = token.arguments[:4]
        ref_logprob = kl.arguments[1]
        on = reduce.arguments[1].bool()
        ratio, side = (logprob - old_logprob).exp()[on], advantage[on]
        ratios.append(ratio)
        low.append((ratio < 0.95) & (side < 0))
        high.append((ratio > 1.3) & (side > 0))
        k3.append(((ref_logprob - logprob).exp() - 1 - (ref_logprob - logprob))[on])
        losses.append(reduce.result.item())
    row = seen.metrics[1]
    assert row["policy/ratio_mean"] == pytest.approx(float(torch.cat(ratios).mean()), rel=1e-4)
    assert row["policy/ratio_max"] == pytest.approx(float(torch.cat(ratios).max()), rel=1e-5)
    assert row["policy/clip_low"] == pytest.approx(float(torch.cat(low).float().mean()), rel=1e-4) and any(low[-1])
    assert row["policy/clip_high"] == pytest.approx(float(torch.cat(high).float().mean()), rel=1e-4) and any(high[-1])
    assert row["policy/clip_low"] != row["policy/clip_high"]
    assert row["kl/reference"] == pytest.approx(float(torch.cat(k3).mean()), rel=1e-3)
    assert row["policy/loss"] == pytest.approx(sum(losses) / 3, rel=1e-3, abs=1e-6)
    norms = [float(flat(step.gradients).norm()) for step in seen.steps]
    assert row["policy/grad_norm"] >= sum(norms) / 3 * 0.999


def test_rollout_metrics(watch, tiny_grpo):
    seen = watch(tiny_grpo(steps=1, format_weight=0.2, prompts_per_step=8))
    ratings = [call.result for call in seen.calls["rate_group"]]
    rewards = torch.stack([rating.rewards for rating in ratings])
    mask, logprobs = (torch.cat([getattr(group, name) for group in seen.groups[0]]) for name in ("mask", "logprobs"))
    steps = [reward for rating in ratings for row in rating.step_rewards for reward in row]
    row = seen.metrics[1]
    expected = {
        "reward/mean": rewards.mean(),
        "reward/std": rewards.var(-1, correction=0).sqrt().mean(),
        "completion/length": mask.sum() / 32,
        "policy/entropy": -logprobs[mask.bool()].mean(),
        "reward/steps": sum(steps) / len(steps),
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(float(value), rel=1e-4), name
    parts = [row[f"reward/{name}"] for name in ("verifier", "format", "length")]
    assert row["reward/mean"] == pytest.approx(sum(parts), abs=1e-6) and row["reward/length"] < 0


def test_rewards_are_the_sum_of_their_parts(watch, tiny_grpo):
    seen = watch(tiny_grpo(format_weight=0.5, truncated="penalise", steps=1, format_pattern=r"(?s).*\d.*"))
    for call in seen.calls["rate_group"]:
        rating, group = call.result, call.arguments[1]
        assert set(rating.parts) == {"verifier", "format", "length", "truncation"}
        torch.testing.assert_close(sum(rating.parts.values()), rating.rewards)
        torch.testing.assert_close(rating.parts["length"], -0.5 * group.mask.sum(-1) / 10)
        torch.testing.assert_close(rating.parts["truncation"], -1.0 * rating.is_truncated)
        assert rating.parts["format"].tolist() == [0.5 * any(c.isdigit() for c in text) for text in group.texts]


# ---- Process supervision ----


def group_of(grpo, tokenizer, texts, length):
    """A group whose completions are these texts, an EOS at the end of each."""
    tokens, mask = torch.zeros(len(texts), length, dtype=torch.long), torch.zeros(len(texts), length, dtype=torch.long)
    for i, text in enumerate(texts):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        tokens[i, : len(ids)], mask[i, : len(ids)] = torch.tensor(ids), 1
    problem = grpo.Problem("1+2+3", "6", ("3", "6", "6"))
    return grpo.Group(problem, [3, 4], tokens, torch.zeros(len(texts), length), mask, texts)


def test_step_of_each_token(grpo, tiny_grpo):
    """[G3] A newline and the EOS belong to the line that they end; a blank line to no step; nothing off the mask."""
    tokenizer = grpo.new_tokenizer()
    group = group_of(grpo, tokenizer, ["3\n\n#6", "3", "\n"], 7)
    rating = grpo.rate_group(tiny_grpo(), group, tokenizer, [1], None, 0)
    assert rating.step_rewards == [[1.0, 1.0], [1.0], []]
    assert rating.step_ids.tolist() == [[0, 0, -1, 1, 1, 1, -1], [0, 0, *[-1] * 5], [-1] * 7]
    assert rating.is_truncated.tolist() == [False] * 3 and rating.rewards[0] == 1 - 0.5 * 0.6


def test_process_advantages_reach_their_tokens(watch, grpo, tiny_grpo, monkeypatch):
    """[G3] In the loop: tokens of a line get the sum over its step and the later ones, each group by itself."""
    original = grpo.step_rewards_of

    def step_rewards_of(problem, text):  # of a model that writes at random: a step of even length is right
        steps = [line for line in text.split("\n") if line.strip()]
        return [float(len(step) % 2 == 0) for step in steps], original(problem, text)[1]

    monkeypatch.setattr(grpo, "step_rewards_of", step_rewards_of)
    options = {"supervision": "process", "length_weight": 0.0, "beta": 0.1, "prompts_per_step": 6, "max_tokens": 14}
    seen = watch(tiny_grpo(**options, steps=1))
    (call,) = seen.calls["process_advantages"]
    ratings = [call.result for call in seen.calls["rate_group"]]
    expected = []
    for rating in ratings:
        expected += gae_reference.process_advantages(rating.step_rewards, rating.step_ids.tolist())
    torch.testing.assert_close(call.result.float(), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert (call.result != 0).any() and (call.result == 0).any()
    varied = [len({r for row in rating.step_rewards for r in row}) > 1 for rating in ratings]
    assert seen.metrics[1]["groups/zero_variance"] == pytest.approx(1 - sum(varied) / 6) and any(varied)
    for packed, loss in zip(seen.calls["pack_rows"][-len(seen.calls["reduce_loss"]) :], seen.calls["grpo_token_loss"]):
        assert torch.equal(loss.arguments[3], call.result.float()[packed.result.sequences])


# ---- Optimizer ----


def test_learning_rate(watch, grpo, tiny_grpo):
    """Rises over the warm-up, then falls to 0 after the last step; or stays."""
    seen = watch(tiny_grpo(steps=6, warmup_steps=2, learning_rate=1e-3))
    assert [step.rate for step in seen.steps] == pytest.approx(
        [1e-3 * x for x in (1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4)]
    )
    assert [row["policy/learning_rate"] for row in seen.metrics[1:]] == [step.rate for step in seen.steps]
    args = tiny_grpo(steps=6, warmup_steps=2, learning_rate=1e-3, anneal_lr=False)
    assert [grpo.learning_rate_of(args, step) for step in (0, 2, 5)] == pytest.approx([1e-3 / 3, 1e-3, 1e-3])


def test_gradients_are_clipped(watch, tiny_grpo):
    seen = watch(tiny_grpo(max_grad_norm=1e-3, num_epochs=2))
    assert len(seen.steps) == 4
    for step in seen.steps:
        assert float(flat(step.gradients).norm()) == pytest.approx(1e-3, rel=1e-2)
    assert seen.metrics[1]["policy/grad_norm"] > 0.1  # as it was


def test_both_optimizers_go_the_same_way(grpo, tiny_grpo):
    ends = []
    for name in ("adamw", "adamw8bit"):
        args = tiny_grpo(name, optimizer=name, steps=3, learning_rate=1e-3)
        grpo.train(args)
        ends.append(AutoModelForCausalLM.from_pretrained(Path(args.run_dir) / "policy").state_dict())
    before = base_model(args).state_dict()
    moved = flat([ends[0][name] - before[name] for name in before])
    apart = flat([ends[0][name] - ends[1][name] for name in before])
    assert 0 < apart.norm() < 0.1 * moved.norm()


# ---- The stream of problems ----


def test_problems_are_shuffled_anew_each_epoch(grpo):
    problems = [grpo.Problem(str(i), str(i)) for i in range(10)]
    epochs = [[p.prompt for p in grpo.problems_from(problems, range(10 * e, 10 * e + 10), 1)] for e in range(3)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(10)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = [p.prompt for start in range(0, 30, 3) for p in grpo.problems_from(problems, range(start, start + 3), 1)]
    assert again == list(itertools.chain(*epochs))
    assert [p.prompt for p in grpo.problems_from(problems, range(10), 2)] != epochs[0]


def test_each_step_asks_other_problems_with_other_noise(watch, tiny_grpo):
    seen = watch(tiny_grpo(steps=4))
    prompts = [group.problem.prompt for groups in seen.groups for group in groups]
    assert len(prompts) == len(set(prompts)) == 12
    assert len({text for groups in seen.groups for group in groups for text in group.texts}) > 24
    held_out = {
        call.arguments[4][0].prompt for call in seen.calls["sample_groups"] if call.arguments[7][0][0] == "eval"
    }
    assert held_out and not held_out & set(prompts)


def test_evaluation_has_the_same_noise_before_and_after(watch, tiny_grpo):
    """[G21] With a learning rate of next to nothing the samples are the same; greedy ones have temperature 0."""
    seen = watch(tiny_grpo(learning_rate=1e-12, eval_every=1))
    calls = [call for call in seen.calls["sample_groups"] if call.arguments[7][0][0] == "eval"]
    assert [call.arguments[5:7] for call in calls] == [[1, 0.0], [2, 1.0]] * 3
    for kind in (calls[::2], calls[1::2]):
        texts = [[group.texts for group in call.result] for call in kind]
        assert texts[0] == texts[1] == texts[2]


def test_evaluation_scores(grpo, tiny_grpo, monkeypatch):
    """[G21] Of 4 samples of 2 problems, 2 and 0 right: pass@1 ¼, pass@2 ½ · 5/6, maj@2 by ballots of neighbours."""
    texts = {"a": ["#1", "#2", "#1", "#3"], "b": ["#5", "#5", "#6", "x"]}
    problems = [grpo.Problem("a", "1"), grpo.Problem("b", "7")]

    def sample_groups(args, model, tokenizer, eos_ids, chosen, group_size, temperature, names):
        return [grpo.Group(p, [], None, None, None, texts[p.prompt][:group_size]) for p in chosen]

    monkeypatch.setattr(grpo, "sample_groups", sample_groups)
    row = grpo.mean_over_ranks(
        grpo.evaluate(tiny_grpo(eval_samples=4, eval_k=2), torch.nn.Module(), None, None, problems)
    )
    expected = {"eval/greedy": 0.5, "eval/pass@1": 0.25, "eval/pass@2": 5 / 12, "eval/maj@2": 0.5}
    assert row == pytest.approx(expected)


# ---- The reward model ----


@pytest.fixture
def reward_model(grpo, tmp_path):
    """A sequence classifier with one output on disk."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    tokenizer = grpo.new_tokenizer()
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 1, "n_positions": 64, "initializer_range": 0.5}
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **sizes)
    config.reward_mean, config.reward_std = 0.5, 2.0
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


def test_a_learned_reward_adds_up(watch, grpo, tiny_grpo, reward_model):
    """Prompt, completion and its EOS are read together, normalised by what the config keeps, weighted; it does not
    move."""
    seen = watch(tiny_grpo(reward_model=reward_model, reward_model_weight=0.7))
    model, tokenizer = grpo.load_reward_model(seen.args)
    for call in seen.calls["rate_group"]:
        group, rating = call.arguments[1], call.result
        scores = []
        for text, cut in zip(group.texts, rating.is_truncated.tolist()):
            ids = tokenizer(group.problem.prompt + text + ("" if cut else "<eos>"), return_tensors="pt")["input_ids"]
            scores.append((float(model(ids).logits) - 0.5) / 2.0)
        torch.testing.assert_close(rating.parts["model"], 0.7 * torch.tensor(scores), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rating.rewards, sum(rating.parts.values()))
    assert seen.metrics[1]["reward/model"] != 0
    assert "reward_model/loss" not in seen.metrics[-1]


def test_the_reward_model_goes_on_learning(watch, grpo, tiny_grpo, reward_model, monkeypatch):
    """[G13] At each refresh, on the pairs since the last one; from the second on a tenth of them are older ones."""
    right = itertools.cycle([True, False, False, True])
    monkeypatch.setattr(grpo, "is_right", lambda *_: next(right))
    calls, learn = [], grpo.RewardModel.learn

    def watched(self, step):
        pairs, replay = self.pairs, self.replay
        calls.append(SimpleNamespace(step=step, pairs=pairs, replay=replay, result=learn(self, step)))
        return calls[-1].result

    monkeypatch.setattr(grpo.RewardModel, "learn", watched)
    options = {"reward_model": reward_model, "reward_model_steps": 3, "reference_every": 2, "steps": 4}
    seen = watch(tiny_grpo(**options, reward_model_learning_rate=1e-3))
    assert len(calls) == 2 and [call.step for call in calls] == [1, 3]
    pairs = [call.pairs for call in calls]
    assert len(pairs[0]) == len(pairs[1]) == 2 * 3 * 2 and calls[0].replay == []
    replay = calls[1].replay
    assert replay == pairs[0]
    batches = [call.arguments[2] for call in seen.calls["raw_scores"] if len(call.arguments[2]) == 40]
    assert len(batches) == 6
    for batch in batches[3:]:
        taken = list(zip(batch[::2], batch[1::2], strict=True))
        assert [pair in replay for pair in taken] == [i % 10 == 0 for i in range(20)]
    for pair in pairs[1]:
        assert pair[0][0] == pair[1][0]  # two answers to one question
    losses = [row["reward_model/loss"] for row in seen.metrics if "reward_model/loss" in row]
    assert losses == [call.result for call in calls]
    saved = torch.load(Path(seen.args.run_dir) / "checkpoint.pt", weights_only=True)
    before = grpo.load_reward_model(seen.args)[0].state_dict()
    assert not torch.equal(saved["reward_model"]["score.weight"], before["score.weight"])


def test_the_reward_model_learns_what_is_right(grpo, tiny_grpo, reward_model):
    """Its loss is −ln σ(right − wrong) and falls."""
    options = {"reward_model": reward_model, "reference_every": 1, "reward_model_steps": 60}
    scorer = grpo.RewardModel(tiny_grpo(**options, reward_model_learning_rate=3e-3))
    scorer.pairs = [((f"{i}+1", f"#{i + 1}", True), (f"{i}+1", f"#{i}:", True)) for i in range(5)]
    texts = [text for pair in scorer.pairs for text in pair]

    def loss():
        with torch.no_grad():
            right, wrong = grpo.raw_scores(scorer.model, scorer.tokenizer, texts).view(-1, 2).T
        return float(-logsigmoid(right - wrong).mean())

    before, mean = loss(), scorer.learn(0)
    assert before > 0.4 > 0.1 > loss() and loss() < mean < before + 0.1


# ---- Several processes ----


@pytest.mark.processes
def test_two_processes_train_as_one(grpo, tiny_grpo, tmp_path):
    """As torchrun starts them, with gloo: prompts are split, generation, loss and gradient are those of one process
    with all of them, however uneven the shares of tokens; one run directory, one log."""
    options = {"prompts_per_step": 4, "beta": 0.1, "num_epochs": 2, "learning_rate": 1e-3, "algorithm": "reinforce"}
    options |= {"reduction": "token", "truncated": "mask", "eval_problems": 5}
    alone, both = tiny_grpo("alone", **options), tiny_grpo("both", **options)
    one = grpo.train(alone)
    outputs = two_processes(grpo.__file__, *flags(grpo, both))
    two = [json.loads(line) for line in (Path(both.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert len(one) == len(two) == 3
    for row, other in zip(one, two, strict=True):
        for name in row:
            if not name.startswith(("time/", "memory/")):
                assert other[name] == pytest.approx(row[name], rel=1e-3, abs=1e-5), name
    weights = [AutoModelForCausalLM.from_pretrained(Path(a.run_dir) / "policy").state_dict() for a in (alone, both)]
    before = base_model(alone).state_dict()
    moved = flat([weights[0][name] - before[name] for name in before])
    apart = flat([weights[0][name] - weights[1][name] for name in before])
    assert moved.norm() > 0.05 and apart.norm() < 0.01 * moved.norm()
    assert len(list(Path(both.run_dir).glob("events*"))) == 1
    assert ["held-out problems" in out for out, _ in outputs] == [True, False]


def test_processes_must_divide_the_prompts(grpo, tiny_grpo, reward_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(grpo.InputError, match="3 cannot be split evenly over 2"):
        grpo.train(tiny_grpo())
    with pytest.raises(grpo.InputError, match="1 held-out problems are fewer than the 2 processes"):
        grpo.train(tiny_grpo(prompts_per_step=4, eval_problems=1))
    options = {"reward_model": reward_model, "reward_model_steps": 3, "reference_every": 2, "prompts_per_step": 4}
    with pytest.raises(grpo.InputError, match="reward_model_steps 3 works in one process, there are 2"):
        grpo.train(tiny_grpo(**options))
