"""What happens inside rlhf_gpt2_ppo: each test watches one thing, on a GPT-2 of 16 dimensions."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


@pytest.fixture
def watch(rlhf, monkeypatch):
    """Train and keep what passes through: arguments and results of functions, and Adam's settings and gradients."""

    def run(args):
        seen = SimpleNamespace(steps=[], adam=[], calls={})

        def keep(name):
            function = getattr(rlhf, name)
            calls = seen.calls.setdefault(name, [])

            def watched(*arguments, **options):
                kept = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in arguments]
                result = function(*arguments, **options)
                calls.append(SimpleNamespace(arguments=kept, options=options, result=result))
                return result

            return watched

        class Adam(torch.optim.Adam):
            def __init__(self, groups, **options):
                super().__init__(groups, **options)
                seen.adam.append(options)

            def step(self):
                gradients = [[p.grad.clone() for p in group["params"]] for group in self.param_groups]
                rates = [group["lr"] for group in self.param_groups]
                seen.steps.append(SimpleNamespace(gradients=gradients, rates=rates))
                super().step()

        names = "kl_penalized_rewards compute_gae clipped_policy_loss clipped_value_loss roll_out judge_rollout"
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim, "Adam", Adam)
            for name in (*names.split(), "train_reward", "train_ppo", "rate_policy", "normalise_scores"):
                patch.setattr(rlhf, name, keep(name))
            seen.metrics = rlhf.train(args)
        seen.args = args
        seen.ppo = [row for row in seen.metrics if row["stage"] == "ppo"]
        return seen

    return run


def model_and_tokenizer(rlhf, args):
    torch.manual_seed(0)
    return rlhf.start_model(args, args.model)


def reward_model(rlhf, args, tokenizer):
    torch.manual_seed(1)
    return rlhf.new_reward_model(args, args.model, tokenizer)


def weights_of(directory, kind=AutoModelForCausalLM):
    return kind.from_pretrained(directory, dtype=torch.float32).state_dict()


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


SEQUENCES = [[5, 9, 300, 17], [8], [40, 41, 42, 43, 44, 45], [7, 7]]


# ---- Padding ----


def padded(sequences, left, right, junk):
    """(tokens, mask) with `left` and `right` columns of padding more than needed, filled with the token `junk`."""
    length = max(map(len, sequences))
    rows = [[junk] * left + s + [junk] * (length - len(s) + right) for s in sequences]
    masks = [[0] * left + [1] * len(s) + [0] * (length - len(s) + right) for s in sequences]
    return torch.tensor(rows), torch.tensor(masks)


@pytest.mark.parametrize(("left", "right", "junk"), [(0, 3, 1), (5, 0, 1), (4, 2, 0), (1, 0, 77)])
def test_padding_changes_nothing(rlhf, tiny, left, right, junk):
    """[R3] Any side, any amount, any content: loss and gradient of stage 1, scores of stage 2."""
    model, tokenizer = model_and_tokenizer(rlhf, tiny())
    scorer = reward_model(rlhf, tiny(), tokenizer)
    results = []
    for tokens, mask in (padded(SEQUENCES, 0, 0, 1), padded(SEQUENCES, left, right, junk)):
        learned = mask * (mask.cumsum(-1) > 1)  # all but each first token: what stands before it is padding or nothing
        loss = rlhf.sft_loss(model, tokens, mask, learned)
        scores = rlhf.reward_scores(scorer, tokens, mask)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        slopes = torch.autograd.grad(scores.pow(2).sum(), list(scorer.parameters()))
        results.append((loss, scores, flat(gradients), flat(slopes)))
    for one, other in zip(*results, strict=True):
        assert one.abs().max() > 0.1
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_padding_and_truncation(rlhf, tiny):
    """[R2] A padding token of its own; the mask follows the lengths; a cut text has no EOS, a whole one has."""
    _, tokenizer = model_and_tokenizer(rlhf, tiny())
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    tokens, mask = rlhf.pad([[5, 6], [7]], 1, "cpu", "left")
    assert tokens.tolist() == [[5, 6], [1, 7]] and mask.tolist() == [[1, 1], [0, 1]]
    tokens, mask = rlhf.pad([[5, 6], [7]], 1, "cpu")
    assert tokens.tolist() == [[5, 6], [7, 1]] and mask.tolist() == [[1, 1], [1, 0]]
    text = ("The plot of this drama", " was dull.")
    ((prompt, response),) = rlhf.encode(tokenizer, [text], 64)
    assert response[-1] == tokenizer.eos_token_id and tokenizer.decode(prompt + response[:-1]) == "".join(text)
    ((same, cut),) = rlhf.encode(tokenizer, [text], len(prompt) + 2)
    assert same == prompt and cut == response[:2] and tokenizer.eos_token_id not in cut


def test_a_tokenizer_without_padding_gets_one(rlhf, tiny, tiny_gpt2, tmp_path):
    """As GPT-2's own: a new token, a row more in every model, and no confusion with EOS."""
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer.pad_token = tokenizer.eos_token
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    rlhf.train(tiny(model=str(tmp_path / "plain")))
    for name in ("sft", "reward", "policy"):
        saved = AutoTokenizer.from_pretrained(tmp_path / "run" / name)
        assert saved.pad_token == "<|pad|>" or saved.pad_token_id != saved.eos_token_id
    vocabulary = weights_of(tmp_path / "run" / "policy")["transformer.wte.weight"].shape[0]
    assert vocabulary == len(saved) >= model.config.vocab_size


# ---- Sampling ----


def sampled(rlhf, tiny, temperature=0.7, length=20, eos_id=5):
    """Responses of 64 queries of several lengths, and the model: a common token stands for EOS, so that many end."""
    model, _ = model_and_tokenizer(rlhf, tiny())
    with torch.no_grad():
        model.transformer.wte.weight *= 0.5
        model.transformer.ln_f.bias += (
            8 * model.transformer.wte.weight[eos_id] / model.transformer.wte.weight[eos_id].norm()
        )
    queries, query_mask = rlhf.pad(SEQUENCES * 16, 1, "cpu", "left")
    torch.manual_seed(3)
    return model, queries, query_mask, *rlhf.sample(model, queries, query_mask, length, temperature, eos_id, 1)


def test_sampler_and_trainer_agree(rlhf, tiny):
    """[R9] At temperature 0.7, with left padding: the sampler's log-probabilities, made token by token, are those of
    one forward pass over query and response: the ratio is 1 to 1e-5."""
    model, queries, query_mask, tokens, logprobs, mask = sampled(rlhf, tiny)
    whole, whole_mask = torch.cat([queries, tokens], 1), torch.cat([query_mask, mask], 1)
    with torch.no_grad():
        again = rlhf.token_logprobs(rlhf.policy_logits(model, whole, whole_mask, 20), tokens, 0.7)
    ratio = (again - logprobs).exp()[mask.bool()]
    assert len(ratio) > 300
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)


def test_mask_ends_with_the_first_eos(rlhf, tiny):
    """[R4] The first EOS is in the mask, nothing after it; rows are filled up with padding to one length."""
    _, _, _, tokens, logprobs, mask = sampled(rlhf, tiny)
    is_eos = tokens == 5
    assert mask.shape == tokens.shape == (64, 20)
    assert 10 < is_eos.any(-1).sum() < 64, "some end, some do not"
    expected = (is_eos.cumsum(-1) - is_eos.long()) == 0
    assert torch.equal(mask.bool(), expected)
    assert (tokens[~expected] == 1).all() and (logprobs[~expected] == 0).all() and (logprobs[expected] < 0).all()
    assert is_eos.sum(-1).max() == 1


def test_samples_follow_the_distribution(rlhf, tiny):
    """No top-k, no top-p, and the temperature: frequencies of 20,000 first tokens against softmax(logits / 1.5)."""
    model, _ = model_and_tokenizer(rlhf, tiny())
    queries = torch.tensor([[40, 41, 42]]).expand(20_000, 3)
    torch.manual_seed(0)
    tokens, _, _ = rlhf.sample(model, queries, torch.ones_like(queries), 1, 1.5, 0, 1)
    with torch.no_grad():
        expected = (model(queries[:1]).logits[0, -1] / 1.5).softmax(-1)
    found = torch.bincount(tokens[:, 0], minlength=len(expected)) / 20_000
    assert expected.max() < 0.5 and (expected > 0).all()
    assert (found - expected).abs().sum() < 0.15  # in total variation twice this; a wrong temperature gives above 0.3
    assert (found[expected > 5 / 20_000] > 0).float().mean() > 0.95  # the tail is sampled too


# ---- Reward model ----


def test_reward_is_read_off_the_last_real_token(rlhf, tiny):
    """[R6] The same as transformers' own GPT2ForSequenceClassification says, which looks for the last token itself."""
    _, tokenizer = model_and_tokenizer(rlhf, tiny())
    model = reward_model(rlhf, tiny(), tokenizer)
    tokens, mask = rlhf.pad(SEQUENCES, tokenizer.pad_token_id, "cpu")
    scores = rlhf.reward_scores(model, tokens, mask)
    assert scores.std() > 1e-3
    torch.testing.assert_close(scores, model(tokens, attention_mask=mask).logits[:, 0], rtol=1e-5, atol=1e-6)
    model.config.reward_mean, model.config.reward_std = 2.0, 4.0
    torch.testing.assert_close(rlhf.reward_scores(model, tokens, mask), (scores - 2) / 4, rtol=1e-5, atol=1e-6)


def test_reward_and_value_read_query_and_response(rlhf, tiny):
    """[R1] A query changed far from the end changes the score and every value; a token to come changes no value."""
    _, tokenizer = model_and_tokenizer(rlhf, tiny())
    model = reward_model(rlhf, tiny(), tokenizer)
    tokens, mask = torch.tensor([[40, 41, 42, 43, 44, 45]]), torch.ones(1, 6, dtype=torch.long)
    other_query, other_end = tokens.clone(), tokens.clone()
    other_query[0, 0], other_end[0, -1] = 99, 99
    score, moved = (rlhf.reward_scores(model, x, mask) for x in (tokens, other_query))
    assert not torch.isclose(score, moved, rtol=0, atol=1e-6).any()
    values, moved, same = (rlhf.response_values(model, None, x, mask, 3) for x in (tokens, other_query, other_end))
    assert values.shape == (1, 3) and (values - moved).abs().min() > 1e-6
    torch.testing.assert_close(values, same)  # V(s_t) knows the tokens before t alone
    torch.testing.assert_close(values[0, 0], rlhf.reward_scores(model, tokens[:, :3], mask[:, :3])[0])


def test_reward_head_initialisation(rlhf, tiny, tiny_gpt2):
    """[R7] N(0, 1/√(d+1)), no bias."""
    _, tokenizer = model_and_tokenizer(rlhf, tiny())
    heads = torch.cat(
        [rlhf.new_reward_model(tiny(), tiny_gpt2, tokenizer).score.weight.flatten() for _ in range(60)]
    ).detach()
    assert len(heads) == 60 * 16
    assert float(heads.std()) == pytest.approx(1 / math.sqrt(17), rel=0.08) and abs(float(heads.mean())) < 0.03
    assert rlhf.new_reward_model(tiny(), tiny_gpt2, tokenizer).score.bias is None


def test_reward_is_normalised_on_the_samples_of_stage_1(watch, rlhf, tiny):
    """[R8] Mean 0, variance 1 over what the model of stage 1 writes; kept in the saved config."""
    seen = watch(tiny(eval_prompts=64, num_texts=900))
    (call,) = seen.calls["normalise_scores"]
    args, model, policy, _, prompts = call.arguments
    assert same_weights(policy.state_dict(), weights_of(f"{args.run_dir}/sft"))
    scores = []
    for rollout in (call.result for call in seen.calls["roll_out"][: -(-64 // 12)]):
        scores.append(rlhf.reward_scores(model, rollout.whole, rollout.whole_mask).detach())
    scores = torch.cat(scores)
    assert len(scores) == len(prompts) == 64
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-4)
    config = json.loads((Path(args.run_dir) / "reward" / "config.json").read_text())
    assert config["reward_std"] == pytest.approx(model.config.reward_std) and config["reward_mean"] != 0


def test_ensemble(rlhf):
    """[R22] Mean less k biased standard deviations."""
    scores = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert rlhf.ensemble_score(scores, 0.5).tolist() == [1.5, 5.0]
    assert rlhf.ensemble_score(scores[:1], 1.0).tolist() == [1.0, 5.0]


def test_an_ensemble_scores_and_the_gold_model_judges(watch, rlhf, tiny):
    seen = watch(tiny(ensemble=2, train_gold=True))
    call = seen.calls["judge_rollout"][0]
    _, rollout, _, models, gold_model = call.arguments
    with torch.no_grad():
        one, two = (rlhf.reward_scores(model, rollout.whole, rollout.whole_mask) for model in models)
        gold = rlhf.reward_scores(gold_model, rollout.whole, rollout.whole_mask)
    assert (one - two).abs().min() > 1e-6
    torch.testing.assert_close(call.result[1], (one + two) / 2 - (one - two).abs() / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(call.result[2], gold)
    assert seen.ppo[0]["objective/gold"] == pytest.approx(float(gold.mean()), rel=1e-5)
    own = {call.arguments[2]: set(map(str, call.arguments[5])) for call in seen.calls["train_reward"]}
    assert {row["stage"] for row in seen.metrics} == {"sft", "reward", "reward2", "gold", "ppo", "eval"}
    assert own["reward"] == own["reward2"] and len(own["gold"]) > 15 and not own["gold"] & own["reward"]


def test_calibration_error(rlhf):
    """Sure of 0.75 and right half the time: off by 0.25. Always right and certain: 0."""
    margin = math.log(3)
    assert rlhf.calibration_error(torch.tensor([margin, -margin])) == pytest.approx(0.25, abs=1e-6)
    assert rlhf.calibration_error(torch.tensor([50.0, 60.0])) == pytest.approx(0, abs=1e-6)


# ---- Stage 1 ----


@pytest.mark.parametrize("mask_prompt", [False, True])
def test_sft_loss_is_the_cross_entropy(rlhf, tiny, mask_prompt):
    """Against torch's own, over responses alone or over prompts too; the EOS is learned, padding is not."""
    model, tokenizer = model_and_tokenizer(rlhf, tiny())
    texts = [([5, 6, 7], [8, 9, 0]), ([5], [10, 0])]
    model.zero_grad()
    loss = rlhf.sft_backward(tiny(mask_prompt=mask_prompt, micro_batch_size=1), model, tokenizer, texts, 2.0)
    gradient = flat([p.grad for p in model.parameters()])
    model.zero_grad()
    terms = []
    for prompt, response in texts:
        tokens = torch.tensor([prompt + response])
        losses = cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="none")
        terms.append(losses[len(prompt) - 1 :] if mask_prompt else losses)
    expected = torch.cat(terms).mean()
    (2 * expected).backward()
    assert len(torch.cat(terms)) == (5 if mask_prompt else 7)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, flat([p.grad for p in model.parameters()]), rtol=1e-4, atol=1e-6)


# ---- Stage 3 ----


def test_micro_batches_never_change_the_gradient(watch, tiny):
    """[R12] 12 responses at once, or 5 at a time: every first gradient of the three stages is the same."""
    runs = [watch(tiny(f"micro{size}", micro_batch_size=size, num_minibatches=1)) for size in (64, 5)]
    steps = {"sft": 0, "reward": 3, "ppo": 6}
    for stage, index in steps.items():
        one, other = (run.steps[index].gradients for run in runs)
        for mine, theirs in zip(one, other, strict=True):
            assert flat(mine).abs().max() > 1e-3
            torch.testing.assert_close(flat(mine), flat(theirs), rtol=1e-3, atol=1e-5, msg=stage)


def test_first_update_identities(watch, tiny):
    """Before the first gradient step the ratio is 1 to 1e-5, at a temperature that is not 1, and so is val/ratio."""
    seen = watch(tiny(temperature=0.8, num_epochs=1, num_minibatches=1, response_length=12))
    logprob, old_logprob, _, mask, clip_coef = seen.calls["clipped_policy_loss"][0].arguments
    ratio = (logprob - old_logprob)[mask.bool()].exp()
    assert len(ratio) > 50 and clip_coef == 0.2
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)
    assert seen.ppo[0]["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert seen.ppo[0]["policy/clipfrac"] == 0 and abs(seen.ppo[0]["policy/approx_kl"]) < 1e-6
    assert abs(seen.ppo[0]["objective/kl"]) < 1e-4  # the policy begins as the reference
    assert seen.ppo[0]["policy/loss"] == pytest.approx(0, abs=1e-5)  # −mean of whitened advantages


def test_scores_and_penalties(watch, tiny):
    """[R18] [R19] What reaches the last token: the score, less the length penalty, less one for a missing EOS."""
    seen = watch(tiny(length_penalty=0.1, missing_eos_penalty=3.0, batch_size=60, response_length=10))
    for rewards, judged in zip(seen.calls["kl_penalized_rewards"], seen.calls["judge_rollout"]):
        score, _, _, mask, _ = rewards.arguments
        rollout = judged.arguments[1]
        has_eos = (rollout.tokens == 0).any(-1)
        expected = judged.result[1] - 0.1 * mask.sum(-1) - torch.where(has_eos, 0.0, 3.0)
        torch.testing.assert_close(score, expected)
    assert max(row["response/eos_rate"] for row in seen.ppo) < 1


def test_per_token_kl_and_the_score_on_the_last_token(watch, tiny):
    """[R13] The rewards that GAE gets: −β (ln π − ln π_ref), and the score where the response ends."""
    seen = watch(tiny(kl_coef=0.4, num_epochs=4))
    call = seen.calls["kl_penalized_rewards"][1]
    score, logprob, ref_logprob, mask, beta = call.arguments
    assert beta == 0.4 and (logprob - ref_logprob).abs().max() > 1e-3
    rewards = seen.calls["compute_gae"][1].arguments[0]
    total = score - 0.4 * torch.where(mask.bool(), logprob - ref_logprob, 0.0).sum(-1)
    torch.testing.assert_close(rewards.sum(-1), total, rtol=1e-4, atol=1e-5)
    assert seen.ppo[1]["objective/rlhf_reward"] == pytest.approx(float(total.mean()), rel=1e-4, abs=1e-5)
    kl = torch.where(mask.bool(), logprob - ref_logprob, 0.0).sum(-1).mean()
    assert seen.ppo[1]["objective/kl"] == pytest.approx(float(kl), rel=1e-4, abs=1e-6)


def test_reference_log_probabilities(watch, rlhf, tiny):
    """The reference is the model of stage 1, at the sampling temperature."""
    seen = watch(tiny(temperature=0.6))
    rollout = seen.calls["judge_rollout"][0].arguments[1]
    reference = AutoModelForCausalLM.from_pretrained(f"{seen.args.run_dir}/sft", dtype=torch.float32)
    with torch.no_grad():
        logits = reference(rollout.whole, attention_mask=rollout.whole_mask).logits[:, -9:-1] / 0.6
    expected = logits.log_softmax(-1).gather(-1, rollout.tokens.unsqueeze(-1)).squeeze(-1)
    found = seen.calls["judge_rollout"][0].result[0]
    first = rollout.mask[:, :3].bool()  # no padding between: positions by default are the same up to the left padding
    same_length = (rollout.whole_mask[:, 0] == 1).unsqueeze(1)
    chosen = first & same_length
    assert chosen.sum() > 5
    torch.testing.assert_close(found[:, :3][chosen], expected[:, :3][chosen], rtol=1e-4, atol=1e-4)


def test_discount_and_whitening(watch, tiny):
    """[R11] [R14] γ 1, λ 0.95; rewards keep their mean; advantages of a minibatch have mean 0 and variance 1."""
    seen = watch(tiny(whiten_rewards=True))
    assert all(call.arguments[3:] == [1.0, 0.95] for call in seen.calls["compute_gae"])
    raw = seen.calls["kl_penalized_rewards"][0].result
    rewards, _, mask = seen.calls["compute_gae"][0].arguments[:3]
    kept = mask.bool()
    assert float(rewards[kept].var(correction=0)) == pytest.approx(1, abs=1e-3)
    assert float(rewards[kept].mean()) == pytest.approx(float(raw[kept].mean()), abs=1e-5)
    assert float(raw[kept].var(correction=0)) != pytest.approx(1, abs=0.05)
    calls = seen.calls["clipped_policy_loss"]
    assert len(calls) == 2 * 2 * 2  # iterations, epochs, minibatches
    for call in calls:
        advantage, mask = call.arguments[2:4]
        advantage = advantage[mask.bool()]
        assert float(advantage.mean()) == pytest.approx(0, abs=1e-5)
        assert float(advantage.var(correction=0)) == pytest.approx(1, abs=1e-3)


def test_every_epoch_sees_every_response_once(watch, tiny):
    seen = watch(tiny(num_minibatches=5, ppo_iterations=1))
    calls = seen.calls["clipped_policy_loss"]
    assert len(calls) == 2 * 5
    all_old = seen.calls["kl_penalized_rewards"][0].arguments[1].sum(-1).sort().values
    for epoch in (calls[:5], calls[5:]):
        sizes = [len(call.arguments[1]) for call in epoch]
        assert sorted(sizes) == [2, 2, 2, 3, 3]
        old = torch.cat([call.arguments[1] for call in epoch]).sum(-1).sort().values
        torch.testing.assert_close(old, all_old)
    order = [torch.cat([call.arguments[1] for call in epoch]).sum(-1) for epoch in (calls[:5], calls[5:])]
    assert not torch.equal(*order), "shuffled anew"


def test_value_network(watch, tiny):
    """[R20] Begins as the reward model, a network of its own; [R15] its loss is clipped around the rollout's values."""
    seen = watch(tiny(num_epochs=1, num_minibatches=1, ppo_iterations=1))
    value_model = seen.calls["train_ppo"][0].arguments[3]
    policy = seen.calls["train_ppo"][0].arguments[2]
    assert not {p.data_ptr() for p in value_model.parameters()} & {p.data_ptr() for p in policy.parameters()}
    rollout, models = seen.calls["judge_rollout"][0].arguments[1], seen.calls["judge_rollout"][0].arguments[3]
    hidden = (
        models[0]
        .transformer(
            rollout.whole,
            attention_mask=rollout.whole_mask,
            position_ids=(rollout.whole_mask.cumsum(-1) - 1).clamp(min=0),
        )
        .last_hidden_state
    )
    config = models[0].config
    scores = (models[0].score(hidden)[..., 0] - config.reward_mean) / config.reward_std
    values = seen.calls["compute_gae"][0].arguments[1]
    torch.testing.assert_close(values, scores[:, -9:-1].detach(), rtol=1e-4, atol=1e-5)
    value, old_value, returns, mask, clip = seen.calls["clipped_value_loss"][0].arguments
    kept = mask.bool()
    torch.testing.assert_close(value[kept], old_value[kept], rtol=1e-4, atol=1e-5)
    assert clip == 0.2
    advantages = seen.calls["compute_gae"][0].result
    torch.testing.assert_close(returns[kept].sort().values, (advantages + values)[kept].sort().values)
    assert (advantages[kept].abs() > 1e-4).all()


def test_shared_backbone(watch, tiny):
    """[R10] A head of zeros on the policy: the first values are 0, and its loss moves the policy's weights."""
    seen = watch(tiny(share_backbone=True, vf_coef=0.5))
    assert (seen.calls["compute_gae"][0].arguments[1] == 0).all()
    assert (seen.calls["compute_gae"][1].arguments[1] != 0).any()
    assert not (Path(seen.args.run_dir) / "value").exists()
    other = watch(tiny("other", share_backbone=True, vf_coef=50.0, max_grad_norm=1e9))
    policy, head = seen.steps[7].gradients
    assert len(head) == 2 and head[0].abs().max() > 0
    assert not torch.allclose(flat(policy), flat(other.steps[7].gradients[0]))


def test_dropout_is_off(rlhf, tiny, tiny_gpt2):
    """[R17] The checkpoint has dropout 0.1; no model here has, though in training mode."""
    assert AutoModelForCausalLM.from_pretrained(tiny_gpt2).config.resid_pdrop == 0.1
    model, tokenizer = model_and_tokenizer(rlhf, tiny())
    for each in (model, reward_model(rlhf, tiny(), tokenizer)):
        assert each.training
        tokens, mask = rlhf.pad(SEQUENCES, 1, "cpu")
        one, two = (rlhf.hidden_states(each, tokens, mask) for _ in range(2))
        assert torch.equal(one, two)


def test_learning_rates_fall_linearly(watch, tiny):
    """[R5] In each stage, to 0 after its last step; [D3] Adam's ε."""
    seen = watch(tiny(num_epochs=1, num_minibatches=1, value_learning_rate=3e-2, warmup_iterations=0))
    rates = [step.rates for step in seen.steps]
    expected = [[1e-2 * x] for x in (1, 2 / 3, 1 / 3)] * 2 + [[1e-2, 3e-2], [0.5e-2, 1.5e-2]]
    assert len(rates) == len(expected)
    for found, wanted in zip(rates, expected):
        assert found == pytest.approx(wanted)
    assert [options["eps"] for options in seen.adam] == [1e-5] * 3
    constant = watch(tiny("constant", anneal_lr=False, num_epochs=1, num_minibatches=1, warmup_iterations=0))
    assert {rate for step in constant.steps for rate in step.rates} == {1e-2}


def test_learning_rates_of_stage_3_rise_first(watch, tiny):
    """[R23] Step by step over warmup_iterations, then they stay or fall; stages 1 and 2 begin at their full rates."""
    seen = watch(tiny(num_epochs=1, num_minibatches=2, warmup_iterations=2, ppo_iterations=3, anneal_lr=False))
    rates = [step.rates[0] for step in seen.steps]
    assert rates[:6] == [1e-2] * 6
    assert rates[6:] == pytest.approx([1e-2 * x for x in (1 / 4, 2 / 4, 3 / 4, 1, 1, 1)])
    falling = watch(tiny("falling", num_epochs=1, num_minibatches=2, warmup_iterations=1))
    assert [step.rates[0] for step in falling.steps[6:]] == pytest.approx([1e-2 * x for x in (1 / 2, 1, 1 / 2, 1 / 2)])


def test_default_learning_rates_go_by_size(rlhf):
    """A small model keeps its rates when its stages run alone, from a directory; a large one gets smaller ones."""
    small, large = torch.nn.Linear(9, 9), torch.nn.Linear(4000, 4000, device="meta")
    for args in (rlhf.Args(), rlhf.Args(stage="ppo", model="x", reward_model=("y",))):
        assert args.rate("learning_rate", small) == 4e-4 and args.rate("learning_rate", large) == 1e-5
        assert args.rate("sft_learning_rate", small) == 3e-3 and args.rate("reward_learning_rate", small) == 1e-3
    assert rlhf.Args(learning_rate=0.5).rate("learning_rate", large) == 0.5


def test_gradients_are_clipped(watch, tiny):
    """Each network's by a norm of its own: the value's large gradients do not shrink the policy's."""
    free = watch(tiny("free", max_grad_norm=1e9))
    clipped = watch(tiny("clipped", max_grad_norm=1e-3))
    for step in clipped.steps:
        for gradients in step.gradients:
            assert float(flat(gradients).norm()) == pytest.approx(1e-3, rel=1e-2)
    firsts = [free.steps[i] for i in (0, 3, 6)]  # of each stage
    assert all(float(flat(gradients).norm()) > 2e-3 for step in firsts for gradients in step.gradients)


def test_adaptive_kl_in_the_loop(watch, tiny):
    """[R16] After each rollout, by its KL and its size; off, β stays."""
    seen = watch(tiny(adaptive_kl=True, kl_coef=0.1, kl_target=1.0, kl_horizon=24))
    assert [row["objective/kl_coef"] for row in seen.ppo] == pytest.approx([0.1, 0.1 * (1 - 0.2 * 12 / 24)])
    assert [call.arguments[4] for call in seen.calls["kl_penalized_rewards"]] == pytest.approx([0.1, 0.09])
    fixed = watch(tiny("fixed", kl_coef=0.1))
    assert [row["objective/kl_coef"] for row in fixed.ppo] == [0.1, 0.1]


def test_early_stop_on_kl(watch, tiny):
    """The minibatch whose KL to the sampler is too large takes no step, and none after it."""
    free = watch(tiny("free", num_epochs=4, ppo_iterations=1))
    assert len(free.steps) == 6 + 8
    stopped = watch(tiny("stopped", num_epochs=4, ppo_iterations=1, target_kl=1e-7))
    assert len(stopped.steps) == 6 + 1, "the first minibatch has KL 0, the second has moved"


def test_pretraining_mix(watch, rlhf, tiny):
    """[R21] --ptx-coef adds that many times stage 1's gradient, on texts, to the policy's."""
    options = {"num_epochs": 1, "num_minibatches": 1, "ppo_iterations": 1, "max_grad_norm": 1e9}
    plain, mixed = watch(tiny("plain", **options)), watch(tiny("mixed", **options, ptx_coef=0.7))
    added = flat(mixed.steps[-1].gradients[0]) - flat(plain.steps[-1].gradients[0])
    arguments = mixed.calls["train_ppo"][0].arguments
    tokenizer, texts = arguments[7], arguments[9]
    policy = rlhf.start_model(mixed.args, f"{mixed.args.run_dir}/sft")[0]
    order = rlhf.epochs_of(len(texts), 1, 8, rlhf.stage_seed(mixed.args, "ptx"))[0]
    rlhf.sft_backward(mixed.args, policy, tokenizer, [texts[i] for i in order], 0.7)
    expected = flat([p.grad for p in policy.parameters()])
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(flat(mixed.steps[-1].gradients[1]), flat(plain.steps[-1].gradients[1]))


def test_entropy_bonus(watch, rlhf, tiny):
    """Entropy at the temperature; its bonus changes the gradient, and the logged number is its mean."""
    logits = torch.tensor([[[0.0, math.log(9)]]])
    entropy = rlhf.token_entropy(logits, 2.0)  # odds 1 : 3
    assert float(entropy) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    plain, bonus = (watch(tiny(f"e{c}", ent_coef=c, ppo_iterations=1, max_grad_norm=1e9)) for c in (0.0, 5.0))
    assert not torch.allclose(flat(plain.steps[6].gradients[0]), flat(bonus.steps[6].gradients[0]))
    assert bonus.ppo[0]["policy/entropy"] > plain.ppo[0]["policy/entropy"] > 0


def test_frozen_models_do_not_move(watch, tiny):
    """Reference and reward model after stage 3 are, bit for bit, what stages 1 and 2 wrote."""
    seen = watch(tiny(ptx_coef=0.1))
    run_dir = Path(seen.args.run_dir)
    _, _, policy, value, reference, (reward,), *_ = seen.calls["train_ppo"][0].arguments
    sft, trained = weights_of(run_dir / "sft"), weights_of(run_dir / "reward", AutoModelForSequenceClassification)
    assert same_weights(reference.state_dict(), sft) and same_weights(reward.state_dict(), trained)
    assert not any(p.requires_grad for model in (reference, reward) for p in model.parameters())
    assert not same_weights(policy.state_dict(), sft) and not same_weights(value.state_dict(), trained)
    assert same_weights(policy.state_dict(), weights_of(run_dir / "policy"))
    changed = [name for name, w in policy.state_dict().items() if not torch.equal(w, sft[name])]
    assert len(changed) >= len(sft) - 1, "every weight of the policy learns (lm_head is tied to wte)"


def test_losses_are_means_over_every_minibatch(watch, tiny):
    seen = watch(tiny(ppo_iterations=1))
    calls = seen.calls["clipped_policy_loss"]
    assert len(calls) == 4
    losses = [float(call.result) for call in calls]
    assert len(set(losses)) > 1
    assert seen.ppo[0]["policy/loss"] == pytest.approx(sum(losses) / 4, rel=1e-4, abs=1e-6)
    k3 = []
    for call in calls:
        log_ratio = (call.arguments[0] - call.arguments[1])[call.arguments[3].bool()]
        k3.append(float((log_ratio.exp() - 1 - log_ratio).mean()))
    assert seen.ppo[0]["policy/approx_kl"] == pytest.approx(sum(k3) / 4, rel=1e-2, abs=1e-6)


def test_before_and_after_are_rated_alike(watch, rlhf, tiny):
    """The reference first, then the policy, on the same held-out prompts with the same random numbers."""
    seen = watch(tiny())
    before, after = (call.arguments for call in seen.calls["rate_policy"])
    assert before[1] is before[2] is after[2] and after[1] is not after[2]
    assert before[6] == after[6] and len(before[6]) == 10
    torch.rand(10)
    assert rlhf.rate_policy(*after) == seen.calls["rate_policy"][1].result
    rows = [row for row in seen.metrics if row["stage"] == "eval"]
    assert [row["step"] for row in rows] == [0, 2]
    assert abs(rows[0]["objective/kl"]) < 1e-4 < abs(rows[1]["objective/kl"])
    assert rows[0].keys() == rows[1].keys() >= {"objective/gold", "response/distinct_2"}
