"""What rlhf_gpt2_ppo has against reward hacking: bottleneck, energy loss, PPO-max, frozen layers, updated rewards."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from check import check, value_and_gradient
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import gae_reference

pytestmark = pytest.mark.slow

KL = "bottleneck_kl: ½ Σ (μ² + σ² − 1 − ln σ²)"
DISTANCE = "mahalanobis_distance: √((s − m)ᵀ Σ⁻¹ (s − m))"
ENERGY = "energy_loss: mean over the mask of ‖h_in‖₁ − ‖h_out‖₁"
SCALE = "RunningScale: (r − mean) / biased std of all scores so far, cut to ±clip"
NAN = float("nan")
numbers = st.floats(-3, 3)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# ---- Equations ----


def test_bottleneck_kl_by_hand(rlhf):
    """The prior itself costs 0; a mean of 2 costs 2; a variance of e costs (e − 2) / 2; dimensions add up."""
    mean, log_variance = tensor([0.0, 0.0], [2.0, 0.0], [0.0, 0.0], [2.0, -1.0]), tensor([0, 0], [0, 0], [0, 1], [0, 1])
    expected = [0.0, 2.0, (math.e - 2) / 2, 2.5 + (math.e - 2) / 2]
    check(rlhf.bottleneck_kl(mean, log_variance), expected, KL, "four rows of two dimensions")


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=2), min_size=1, max_size=4))
def test_bottleneck_kl_equals_the_reference(rlhf, rows):
    """Values; and slopes μ and (σ² − 1) / 2."""
    mean, log_variance = (tensor(*([pair[i] for pair in row] for row in rows)) for i in (0, 1))
    expected = [gae_reference.bottleneck_kl(*zip(*row)) for row in rows]
    check(rlhf.bottleneck_kl(mean, log_variance), expected, KL, f"(μ, ln σ²) = {rows}")
    _, slope = value_and_gradient(lambda x: rlhf.bottleneck_kl(x, log_variance).sum(), mean)
    check(slope, [[m for m, _ in row] for row in rows], KL, f"gradient by μ, {rows}")
    _, slope = value_and_gradient(lambda x: rlhf.bottleneck_kl(mean, x).sum(), log_variance)
    check(slope, [[(math.exp(v) - 1) / 2 for _, v in row] for row in rows], KL, f"gradient by ln σ², {rows}")


def test_mahalanobis_distance_by_hand(rlhf):
    """Two standard deviations along an axis; a correlation of 0.6 makes one diagonal nearer and the other farther."""
    identity, wide = torch.eye(2, dtype=torch.float64), tensor([4.0, 0.0], [0.0, 1.0])
    zero, joined = torch.zeros(2, dtype=torch.float64), tensor([1.0, 0.6], [0.6, 1.0])
    check(rlhf.mahalanobis_distance(tensor([3.0, 4.0]), zero, identity), [5.0], DISTANCE, "Σ = I")
    check(rlhf.mahalanobis_distance(tensor([5.0, 1.0]), tensor(1.0, 1.0), wide), [2.0], DISTANCE, "Σ = diag(4, 1)")
    expected = [math.sqrt(2 / 1.6), math.sqrt(2 / 0.4)]
    check(rlhf.mahalanobis_distance(tensor([1.0, 1.0], [1.0, -1.0]), zero, joined), expected, DISTANCE, "correlated")


@settings(max_examples=60, deadline=None)
@given(known=st.lists(st.tuples(numbers, numbers), min_size=4, max_size=8), new=st.tuples(numbers, numbers))
def test_mahalanobis_distance_equals_the_reference(rlhf, known, new):
    """Values; the known texts' mean square is k; the slope g has Σ g = gap / distance."""
    texts = tensor(*known)
    mean = texts.mean(0)
    covariance = (texts - mean).T @ (texts - mean) / len(texts)
    assume(torch.linalg.eigvalsh(covariance)[0] > 0.01)
    expected = gae_reference.mahalanobis_distance(new, known)
    assume(expected > 0.01)
    value, slope = value_and_gradient(lambda x: rlhf.mahalanobis_distance(x, mean, covariance)[0], tensor(new))
    check(value, expected, DISTANCE, f"{new} from {known}")
    check(slope @ covariance, (tensor(new) - mean) / expected, DISTANCE, f"gradient, {new} from {known}")
    squares = rlhf.mahalanobis_distance(texts, mean, covariance) ** 2
    check(squares.mean(), 2.0, DISTANCE, f"mean square of {known} themselves")


def test_energy_loss_by_hand(rlhf):
    """‖(1, −2)‖₁ − ‖(0, 1)‖₁ = 2 and 4 − 1 = 3: 2.5 over two tokens; padding may hold NaN; no token: 0."""
    states_in = tensor([[1.0, -2.0], [4.0, 0.0], [NAN, NAN]], [[NAN, 1.0], [NAN, 1.0], [NAN, 1.0]])
    states_out = tensor([[0.0, 1.0], [0.5, -0.5], [1.0, NAN]], [[1.0, 1.0], [NAN, 1.0], [NAN, 1.0]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    loss, slope = value_and_gradient(lambda x: rlhf.energy_loss(x, states_out, mask).sum(), states_in)
    check(rlhf.energy_loss(states_in, states_out, mask), [2.5, 0.0], ENERGY, "two tokens, none")
    check(loss, 2.5, ENERGY, "their sum")
    check(slope[0], [[0.5, -0.5], [0.5, 0.0], [0.0, 0.0]], ENERGY, "gradient by h_in: sign / tokens")
    check(slope[1], [[0.0, 0.0]] * 3, ENERGY, "gradient off the mask")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.tuples(*[numbers] * 4), min_size=1, max_size=5), min_size=1, max_size=3),
    extra=st.integers(0, 2),
)
def test_energy_loss_equals_the_reference(rlhf, rows, extra):
    """Values; and the slope by h_out, −sign / tokens, 0 in the padding."""
    width = max(map(len, rows)) + extra
    padded = tensor(*([*row, *[(NAN,) * 4] * (width - len(row))] for row in rows))
    mask = tensor(*([1.0] * len(row) + [0.0] * (width - len(row)) for row in rows))
    expected = [gae_reference.energy_loss([h[:2] for h in row], [h[2:] for h in row]) for row in rows]
    check(rlhf.energy_loss(padded[..., :2], padded[..., 2:], mask), expected, ENERGY, f"{rows}")
    _, slope = value_and_gradient(lambda x: rlhf.energy_loss(padded[..., :2], x, mask).sum(), padded[..., 2:])
    signs = torch.where(mask.bool().unsqueeze(-1), -padded[..., 2:].sign() / mask.sum(-1).view(-1, 1, 1), 0.0)
    check(slope, signs, ENERGY, f"gradient by h_out, {rows}")


def test_running_scale_by_hand(rlhf):
    """1 and 3 have mean 2, standard deviation 1. With 6 and 6 after them: mean 4, variance 4.5."""
    running = rlhf.RunningScale(1.2)
    check(running.update(tensor(1.0, 3.0)), [-1.0, 1.0], SCALE, "1 and 3")
    check(running.update(tensor(6.0, 6.0)), [2 / math.sqrt(4.5)] * 2, SCALE, "then 6 and 6")
    check(running.update(tensor(90.0)), [1.2], SCALE, "then 90, cut")
    check(rlhf.RunningScale(5.0).update(tensor(2.0, 2.0)), [0.0, 0.0], SCALE, "all equal")


@settings(max_examples=60, deadline=None)
@given(batches=st.lists(st.lists(numbers, min_size=1, max_size=5), min_size=1, max_size=4), clip=st.floats(0.1, 3))
def test_running_scale_equals_the_reference(rlhf, batches, clip):
    running = rlhf.RunningScale(clip)
    for count, batch in enumerate(batches, start=1):
        seen = [score for each in batches[:count] for score in each]
        assume(max(seen) - min(seen) > 1e-2)
        expected = gae_reference.scaled_scores(batches[:count], clip)
        check(running.update(torch.tensor(batch, dtype=torch.float64)), expected, SCALE, f"{batches[:count]}, ±{clip}")


# ---- The bottleneck of a reward model ----


@pytest.fixture
def watch(rlhf, monkeypatch):
    """Train and keep the arguments and results of what passes through; a method's arguments begin with its object."""

    def run(args, *names):
        calls = {name: [] for name in names}

        def keep(name):
            function = getattr(rlhf, name)

            def watched(*arguments, **options):
                kept = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in arguments]
                result = function(*arguments, **options)
                calls[name].append(SimpleNamespace(arguments=kept, result=result))
                return result

            return watched

        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(rlhf, name, keep(name))
            metrics = rlhf.train(args)
        ppo = [row for row in metrics if row["stage"] == "ppo"]
        return SimpleNamespace(args=args, metrics=metrics, ppo=ppo, calls=calls)

    return run


def weights_of(directory, kind=AutoModelForCausalLM):
    return kind.from_pretrained(directory, dtype=torch.float32).state_dict()


def changed(one, other):
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.fixture
def scorer(rlhf, tiny):
    """(args, reward model with a bottleneck of 3 dimensions, its tokenizer, tokens, mask of four texts)."""
    args = tiny(reward_bottleneck=3)
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = rlhf.new_reward_model(args, args.model, tokenizer)
    tokens, mask = rlhf.pad([[5, 9, 300, 17], [8], [40, 41, 42, 43, 44, 45], [7, 7]], tokenizer.pad_token_id, "cpu")
    return args, model, tokenizer, tokens, mask


def test_stage_2_draws_latent_vectors_and_pays_for_them(rlhf, scorer):
    """[R24] s = μ + σ ε at the last real token, a new ε each time; the price is the coefficient times the mean KL."""
    args, model, _, tokens, mask = scorer
    torch.manual_seed(3)
    scores, loss = rlhf.training_scores(args, model, tokens, mask)
    torch.manual_seed(3)
    noise = torch.randn(4, 3)
    hidden = rlhf.hidden_states(model, tokens, mask)
    last = torch.stack([hidden[i, length - 1] for i, length in enumerate((4, 1, 6, 2))])
    mean, log_variance = (last @ model.bottleneck.encoder.weight.T).chunk(2, -1)
    expected = (mean + (log_variance / 2).exp() * noise) @ model.bottleneck.head.weight[0]
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, 0.1 * rlhf.bottleneck_kl(mean, log_variance).mean(), rtol=1e-5, atol=1e-6)
    again, _ = rlhf.training_scores(args, model, tokens, mask)
    assert (again - scores).abs().min() > 1e-4 and loss > 0.01


def test_a_plain_reward_model_learns_as_before(rlhf, tiny, scorer):
    args, _, tokenizer, tokens, mask = scorer
    model = rlhf.new_reward_model(tiny(), args.model, tokenizer)
    scores, loss = rlhf.training_scores(tiny(), model, tokens, mask)
    assert torch.equal(scores, rlhf.reward_scores(model, tokens, mask)) and loss == 0


def test_scores_are_those_of_the_mean(rlhf, scorer):
    """Merged, the plain head gives the bottleneck's score at s = μ."""
    _, model, _, tokens, mask = scorer
    mean, _ = rlhf.latent_gaussian(model, tokens, mask)
    expected = (mean @ model.bottleneck.head.weight[0]).detach()
    assert (rlhf.reward_scores(model, tokens, mask) - expected).abs().min() > 1e-3
    rlhf.merge_bottleneck(model)
    torch.testing.assert_close(rlhf.reward_scores(model, tokens, mask).detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_bottleneck_is_kept_beside_a_plain_reward_model(watch, rlhf, tiny, tmp_path):
    """transformers loads the directory as any reward model; stage 3 finds in it what stage 1's responses look like."""
    seen = watch(tiny(reward_bottleneck=3, eval_prompts=8), "finish_bottleneck", "train_ppo")
    model = seen.calls["finish_bottleneck"][0].arguments[1]
    options = {"output_loading_info": True, "dtype": torch.float32}
    plain, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "reward", **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(plain.score.weight, model.score.weight)
    (loaded,) = seen.calls["train_ppo"][0].arguments[5]
    assert not changed(model.bottleneck.state_dict(), loaded.bottleneck.state_dict())
    assert loaded.bottleneck.known_mean.abs().max() > 0.01 and loaded.bottleneck.known_covariance[0, 1] != 0
    value = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "value", **options)[1]
    assert not value["missing_keys"] and not value["unexpected_keys"], "the value network is a plain one"
    rows = [row for row in seen.metrics if row["stage"] in ("ppo", "eval")]
    assert all(row["objective/outlier_index"] > 0 for row in rows) and len(rows) == 4


def test_the_outlier_index_of_stage_1_is_1(rlhf, tiny, tmp_path):
    """[R25] Over many responses of the reference; a latent vector that is moved away raises it."""
    args = tiny(reward_bottleneck=2, eval_prompts=8, ppo_iterations=1, learning_rate=1e-6)
    rlhf.train(args)
    policy, tokenizer = rlhf.start_model(args, str(tmp_path / "run" / "sft"))
    directory = str(tmp_path / "run" / "reward")
    model = rlhf.with_bottleneck(rlhf.load_reward_model(args, directory, tokenizer), directory)
    prompts = [prompt for prompt, _ in rlhf.encode(tokenizer, rlhf.texts_and_pairs(rlhf.load_rows(args), args)[0], 40)]
    rollout = rlhf.roll_out(args, policy, tokenizer, [prompts[i % len(prompts)] for i in range(600)])
    index = rlhf.outlier_index(rollout, [model])["objective/outlier_index"]
    assert index == pytest.approx(1, abs=0.2)
    model.bottleneck.known_mean += 3 * model.bottleneck.known_covariance.diagonal().sqrt()
    assert rlhf.outlier_index(rollout, [model])["objective/outlier_index"] > 2 * index


def test_without_a_bottleneck_no_outlier_index(watch, tiny):
    seen = watch(tiny())
    assert not any("outlier" in name or "energy" in name or "update" in name for row in seen.metrics for name in row)


def test_outliers_are_penalised(watch, rlhf, tiny):
    """--outlier-coef takes the distance of each response off its score."""
    args = tiny(reward_bottleneck=3, outlier_coef=0.5, missing_eos_penalty=0.0)
    seen = watch(args, "kl_penalized_rewards", "judge_rollout")
    for rewards, judged in zip(seen.calls["kl_penalized_rewards"], seen.calls["judge_rollout"]):
        distance = rlhf.latent_distance(judged.arguments[3][0], judged.arguments[1])
        assert distance.min() > 0.01
        torch.testing.assert_close(rewards.arguments[0], judged.result[1] - 0.5 * distance, rtol=1e-4, atol=1e-5)


# ---- Energy loss ----


def test_energy_of_the_last_layer(rlhf, tiny):
    """[R26] What enters GPT-2's last block and what leaves it, before the last norm, at the states that are read."""
    args = tiny()
    policy, tokenizer = rlhf.start_model(args, args.model)
    torch.manual_seed(0)
    rollout = rlhf.roll_out(args, policy, tokenizer, [[5, 9, 17], [8], [40, 41, 42, 43, 44]])
    found = rlhf.response_energy(policy, rollout, 8)
    assert not policy.transformer.h[-1]._forward_hooks, "the hook is gone"
    positions = (rollout.whole_mask.cumsum(-1) - 1).clamp(min=0)
    options = {"attention_mask": rollout.whole_mask, "position_ids": positions, "output_hidden_states": True}
    with torch.no_grad():
        states = policy.transformer(rollout.whole, **options).hidden_states
        last = policy.transformer.h[-1]
        mask = torch.ones(states[-2].shape[1], states[-2].shape[1]).tril().bool() & rollout.whole_mask[:, None].bool()
        out = last(states[-2], attention_mask=torch.where(mask, 0.0, -1e9)[:, None])
        out = out if isinstance(out, torch.Tensor) else out[0]
    torch.testing.assert_close(policy.transformer.ln_f(out)[:, -9:], states[-1][:, -9:], rtol=1e-3, atol=1e-4)
    expected = rlhf.energy_loss(states[-2][:, -9:-1], out[:, -9:-1], rollout.mask)
    assert expected.abs().min() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_energy_gap_is_penalised(watch, tiny):
    """η times the gap comes off the score; the reference has answered the same queries itself."""
    seen = watch(
        tiny(energy_coef=0.5, missing_eos_penalty=0.0, learning_rate=3e-2),
        "kl_penalized_rewards",
        "judge_rollout",
        "compare_energy",
        "response_energy",
    )
    calls = seen.calls
    for i, gap in enumerate(call.result for call in calls["compare_energy"]):
        score = calls["judge_rollout"][i].result[1]
        torch.testing.assert_close(calls["kl_penalized_rewards"][i].arguments[0], score - 0.5 * gap)
        assert seen.ppo[i]["objective/energy_gap"] == pytest.approx(float(gap.mean()), rel=1e-5)
        reference, policy = calls["response_energy"][2 * i : 2 * i + 2]
        torch.testing.assert_close(gap, (reference.result - policy.result).abs())
        ours, theirs = policy.arguments[1], reference.arguments[1]
        assert [prompt for prompt, _ in ours.texts] == [prompt for prompt, _ in theirs.texts]
        assert [text for _, text in ours.texts] != [text for _, text in theirs.texts]
        assert policy.arguments[0] is not reference.arguments[0]
    assert len(calls["compare_energy"]) == 2


# ---- PPO-max, frozen layers ----


def test_scores_are_scaled_by_what_all_rollouts_had(watch, rlhf, tiny):
    """[R27] --reward-clip: mean and standard deviation over this and all earlier rollouts, then the cut."""
    seen = watch(
        tiny(reward_clip=0.7, missing_eos_penalty=0.0, ppo_iterations=3), "kl_penalized_rewards", "judge_rollout"
    )
    batches = [call.result[1].tolist() for call in seen.calls["judge_rollout"]]
    for count, rewards in enumerate(seen.calls["kl_penalized_rewards"], start=1):
        expected = torch.tensor(gae_reference.scaled_scores(batches[:count], 0.7))
        torch.testing.assert_close(rewards.arguments[0], expected, rtol=1e-4, atol=1e-4)
        assert expected.abs().max() == pytest.approx(0.7)


def test_first_the_value_network_alone(watch, rlhf, tiny, monkeypatch):
    """[R27] In the first iterations the policy stays and the value moves; then warm-up begins again; β waits too."""
    rates, add_step = [], torch.optim.Adam.step

    def step(optimizer, *arguments):
        groups = optimizer.param_groups
        rates.append([group["lr"] for group in groups if any(p.grad is not None for p in group["params"])])
        return add_step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    options = {"num_epochs": 1, "num_minibatches": 1, "anneal_lr": False, "adaptive_kl": True, "kl_coef": 0.1}
    args = tiny(value_only_iterations=2, warmup_iterations=2, ppo_iterations=4, ptx_coef=1.0, **options)
    seen = watch(args, "kl_penalized_rewards", "clipped_value_loss")
    assert rates[6:] == [[0.5e-2], [1e-2], [0.5e-2, 0.5e-2], [1e-2, 1e-2]]
    moved = [abs(row["objective/kl"]) for row in seen.ppo]
    assert max(moved[:3]) < 1e-4 < moved[3], "the first three rollouts are the reference's"
    betas = [call.arguments[4] for call in seen.calls["kl_penalized_rewards"]]
    assert betas[:3] == [0.1] * 3 and betas[3] < 0.1
    with pytest.raises(ValueError, match="value_only_iterations must be below ppo_iterations"):
        tiny(value_only_iterations=4, ppo_iterations=4)


def test_lower_layers_stay(rlhf, tiny, tmp_path):
    """--freeze-layers 1 of 2: the embeddings and the first block are stage 1's, the second and the last norm move."""
    rlhf.train(tiny(freeze_layers=1, ptx_coef=0.5))
    moved = changed(weights_of(tmp_path / "run" / "sft"), weights_of(tmp_path / "run" / "policy"))
    assert moved and not any("wte" in name or "wpe" in name or "lm_head" in name or ".h.0." in name for name in moved)
    assert len([name for name in moved if ".h.1." in name]) == 12 and "transformer.ln_f.weight" in moved
    with pytest.raises(rlhf.InputError, match="--freeze-layers 2 leaves nothing to train: the model has 2 layers"):
        rlhf.train(tiny("other", freeze_layers=2))
    assert not (tmp_path / "other").exists()


# ---- A reward model that goes on learning ----


def rollout_of(*texts):
    width = max(map(len, texts))
    whole = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    return SimpleNamespace(whole=whole, whole_mask=(whole > 0).long())


def test_judged_pairs(rlhf):
    """[R28] The best with the worst, inwards; ties and the one in the middle are left out; without padding."""
    rollout = rollout_of([1, 2], [3], [4, 5, 6], [7], [8])
    gold = torch.tensor([0.5, 3.0, -1.0, 0.7, 0.6])
    assert rlhf.judged_pairs(rollout, gold) == [([3], [4, 5, 6]), ([7], [1, 2])]
    truth = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    assert rlhf.judged_pairs(rollout, truth) == [([8], [3])]
    assert rlhf.judged_pairs(rollout, torch.ones(5)) == []


def test_reward_models_go_on_learning(watch, rlhf, tiny, tmp_path):
    """Every second iteration, both models of the ensemble; the originals stay on the disk, the new ones score."""
    args = tiny(reward_update_every=2, ppo_iterations=3, ensemble=2, train_gold=True)
    seen = watch(args, "judge_rollout", "judged_pairs")
    assert [("reward_update/pairs" in row) for row in seen.ppo] == [False, True, False]
    pairs = seen.calls["judged_pairs"][0].result
    assert seen.ppo[1]["reward_update/pairs"] == len(pairs) > 0 and 0 <= seen.ppo[1]["reward_update/accuracy"] <= 1
    assert seen.ppo[1]["reward_update/loss"] > 0
    rollout, gold = seen.calls["judge_rollout"][1].arguments[1], seen.calls["judge_rollout"][1].result[2]
    assert seen.calls["judged_pairs"][0].arguments[0] is rollout and torch.equal(
        seen.calls["judged_pairs"][0].arguments[1], gold
    )
    for old, new in (("reward", "updated_reward"), ("reward2", "updated_reward2")):
        one, other = (weights_of(tmp_path / "run" / name, AutoModelForSequenceClassification) for name in (old, new))
        assert len(changed(one, other)) > 20
        score = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / new).config.reward_std
        assert score == AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / old).config.reward_std
    plain = watch(tiny("plain", ppo_iterations=3, ensemble=2, train_gold=True), "judge_rollout")
    scores = [[call.result[1] for call in run.calls["judge_rollout"]] for run in (plain, seen)]
    assert torch.equal(scores[0][1], scores[1][1]) and not torch.equal(scores[0][2], scores[1][2])


def test_an_update_makes_the_truth_score_higher(rlhf, tiny, scorer):
    """Four steps on pairs raise the chosen text's score above the rejected one's; a bottleneck stays merged."""
    args, model, tokenizer, _, _ = scorer
    cures = rlhf.Cures(tiny(reward_update_every=1, reward_learning_rate=1e-2), [model])
    pairs = [([5, 9, 300, 17], [40, 41, 42]), ([8, 7], [43, 44, 45, 46])]
    results = [cures.learn(pairs, tokenizer) for _ in range(30)]
    assert results[-1][0] < results[0][0] and results[-1][1] == 1.0
    chosen, rejected = (rlhf.score_texts(args, model, tokenizer, side) for side in zip(*pairs))
    assert (chosen > rejected).all()
    mean, _ = rlhf.latent_gaussian(model, *rlhf.pad([pairs[0][0]], tokenizer.pad_token_id, "cpu"))
    torch.testing.assert_close(chosen[:1], (mean @ model.bottleneck.head.weight[0]).detach(), rtol=1e-4, atol=1e-5)


def test_updates_in_parts_give_the_same_gradient(rlhf, tiny, tiny_gpt2):
    """[R12] Three pairs at once or one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    pairs = [([5, 9, 300, 17], [40, 41, 42]), ([8, 7], [43, 44, 45, 46]), ([12], [13])]
    found = []
    for size in (64, 1):
        torch.manual_seed(0)
        model = rlhf.new_reward_model(tiny(), tiny_gpt2, tokenizer)
        cures = rlhf.Cures(tiny(reward_update_every=1, micro_batch_size=size), [model])
        loss, accuracy = cures.learn(pairs, tokenizer)
        found.append((loss, accuracy, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[0][1] == pytest.approx(found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-3, atol=1e-5)


# ---- Resuming, flags ----


@pytest.mark.parametrize(("function", "calls"), [("training_scores", 2), ("compute_gae", 3)])
def test_interrupted_with_every_cure_it_ends_with_the_same_bits(rlhf, tiny, tmp_path, monkeypatch, function, calls):
    """Running mean, the reward models' optimizer and weights, the bottleneck: all of it is in the checkpoint."""
    cures = {"reward_bottleneck": 3, "outlier_coef": 0.1, "energy_coef": 0.01, "reward_clip": 2.0, "freeze_layers": 1}
    cures |= {"value_only_iterations": 1, "reward_update_every": 1, "ppo_iterations": 4, "train_gold": True}
    options = {**cures, "checkpoint_every": 1, "eval_prompts": 6}
    whole = rlhf.train(tiny("whole", **options))
    assert sum(row.get("reward_update/pairs", 0) > 0 for row in whole) >= 3
    original, count = getattr(rlhf, function), []

    def breaks(*arguments):
        count.append(1)
        if len(count) > calls:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(rlhf, function, breaks)
        with pytest.raises(KeyboardInterrupt):
            rlhf.train(tiny("broken", **options))
    torch.rand(100)
    resumed = rlhf.train(rlhf.resumed_args(tmp_path / "broken"))
    clockless = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows] for rows in (whole, resumed)
    ]
    assert clockless[0] == clockless[1]
    for name in ("policy", "value", "reward", "updated_reward"):
        one, other = (Path(tmp_path / run / name / "model.safetensors").read_bytes() for run in ("whole", "broken"))
        assert one == other, name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", "sft", "--reward-bottleneck", "8"], "reward_bottleneck is for stages that train a reward model"),
        (["--outlier-coef", "1"], "outlier_coef needs a reward model with a bottleneck"),
        (["--dataset", "x.jsonl", "--reward-update-every", "1"], "reward_update_every needs the truth of a response"),
        (["--value-only-iterations", "30"], "value_only_iterations must be below ppo_iterations, got 30"),
        (["--reward-clip", "0"], "reward_clip must be above 0, got 0"),
        (["--freeze-layers", "4"], "--freeze-layers 4 leaves nothing to train: the model has 4 layers"),
    ],
)
def test_bad_flags(rlhf, monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.setattr(sys, "argv", ["x", *words, "--run-dir", str(tmp_path / "run"), "--num-texts", "40"])
    with pytest.raises(SystemExit) as error:
        rlhf.main()
    assert error.value.code == 2
    text = "".join(capsys.readouterr()).replace("│", "")
    assert message.replace(" ", "") in "".join(text.split())
    assert not (tmp_path / "run").exists()


def test_a_reward_model_without_a_bottleneck_is_refused(rlhf, tiny, tmp_path):
    rlhf.train(tiny("one", reward_bottleneck=0))
    dirs = {"model": str(tmp_path / "one" / "sft"), "reward_model": (str(tmp_path / "one" / "reward"),)}
    with pytest.raises(rlhf.InputError, match="--outlier-coef needs a reward model with a bottleneck"):
        rlhf.train(tiny("two", stage="ppo", outlier_coef=1.0, **dirs))


def test_a_damaged_bottleneck_is_refused(rlhf, tiny, tmp_path):
    rlhf.train(tiny("one", reward_bottleneck=3))
    (tmp_path / "one" / "reward" / "bottleneck.pt").write_bytes(b"junk")
    dirs = {"model": str(tmp_path / "one" / "sft"), "reward_model": (str(tmp_path / "one" / "reward"),)}
    with pytest.raises(rlhf.InputError, match=r"bottleneck\.pt is no bottleneck of this reward model, or is damaged"):
        rlhf.train(tiny("two", stage="ppo", **dirs))
