"""The code that opens docs/4_grpo.md and docs/3_rlhf.md has the gradients of the scripts. test_docs.py trains it."""

import copy

import pytest
import torch
from contract import ROOT
from test_docs import blocks
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification


def definitions(page):
    """The names that the first block of a page defines, without its training run."""
    first = blocks(ROOT / "docs" / page)[0]
    names = {}
    exec(first.split("\nhistory = ")[0], names)
    assert "train" in names
    return names


def models(eos_id, num_letters):
    """A policy, a critic, the reference and a policy that has moved away from the one that samples, in float64."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": num_letters + 1, "bos_token_id": None, "eos_token_id": eos_id, "pad_token_id": eos_id}
    config = LlamaConfig(**sizes, **tokens, num_labels=1, classifier_dropout=0.0, initializer_range=0.1)
    policy, critic = LlamaForCausalLM(config).double(), LlamaForTokenClassification(config).double()
    return policy, moved(policy), moved(policy), critic, moved(critic)


def moved(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.1 * torch.randn_like(weights)
    return model


def gradients(loss, *networks):
    weights = [weight for model in networks for weight in model.parameters()]
    return torch.autograd.grad(loss, weights, retain_graph=True)


@pytest.mark.parametrize("page", ["3_rlhf.md", "4_grpo.md"])
def test_it_is_one_screen(page):
    assert len(blocks(ROOT / "docs" / page)[0].splitlines()) <= 100


def test_grpo_has_the_gradient_of_the_script(grpo):
    page = definitions("4_grpo.md")
    old_policy, policy, reference, _, _ = models(page["EOS"], len(page["CHARACTERS"]))
    questions = [question for question in page["QUESTIONS"][:3] for _ in range(page["GROUP"])]
    prompts = torch.tensor([page["encode"](question) for question in questions])
    answers, mask = page["sample"](old_policy, prompts)
    assert 0 < mask.mean() < 1  # some answers end early
    rewards = torch.rand(len(answers), dtype=torch.float64)
    rewards[: page["GROUP"]] = 0.1  # a group whose rewards are all equal
    with torch.no_grad():
        old, ref = (page["logprobs_of"](model, prompts, answers) for model in (old_policy, reference))
    logprob = page["logprobs_of"](policy, prompts, answers)
    ratio = (logprob - old).exp()
    assert (ratio > 1 + page["CLIP"]).any() and (ratio < 1 - page["CLIP"]).any()
    loss = page["grpo_loss"](logprob, old, ref, page["advantages_of"](rewards), mask)

    logits = policy(torch.cat([prompts, answers], 1)).logits[:, prompts.shape[1] - 1 : -1]
    logprob = grpo.token_logprobs(logits, answers, 1.0)
    advantages = grpo.group_advantages(rewards, page["GROUP"])
    token_loss = grpo.grpo_token_loss(logprob, old, ref, advantages, page["CLIP"], page["CLIP"], page["BETA"])
    expected = grpo.reduce_loss(token_loss, mask, "sequence", mask.sum(), len(answers), page["MAX_TOKENS"])

    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    found = gradients(loss, policy)
    torch.testing.assert_close(found, gradients(expected, policy), rtol=0, atol=1e-9)
    assert max(gradient.abs().max() for gradient in found) > 1e-3


def test_ppo_has_the_gradient_of_the_script(rlhf):
    page = definitions("3_rlhf.md")
    old_policy, policy, reference, old_critic, critic = models(page["EOS"], len(page["LETTERS"]))
    prompts = torch.arange(26).unsqueeze(-1)
    words, mask = page["sample"](old_policy, prompts)
    assert 0 < mask.mean() < 1
    score = torch.randn(len(words), dtype=torch.float64)
    with torch.no_grad():
        old, ref = (page["logprobs_of"](model, prompts, words) for model in (old_policy, reference))
        old_value = page["read"](old_critic, prompts, words).squeeze(-1)
    advantage = page["advantages_of"](page["rewards_of"](score, old, ref, mask), old_value, mask)
    value = page["read"](critic, prompts, words).squeeze(-1)
    assert ((value - old_value).abs() > page["CLIP"]).any()
    loss = page["ppo_loss"](page["logprobs_of"](policy, prompts, words), old, value, old_value, advantage, mask)

    rewards = rlhf.kl_penalized_rewards(score, old, ref, mask, page["BETA"])
    expected_advantage = rlhf.compute_gae(rewards, old_value, mask, page["GAMMA"], page["LAMBDA"])
    returns = expected_advantage + old_value
    logits = policy(torch.cat([prompts, words], 1)).logits[:, prompts.shape[1] - 1 : -1]
    logprob = rlhf.token_logprobs(logits, words, 1.0)
    whitened = rlhf.masked_whiten(expected_advantage, mask)
    policy_loss = rlhf.clipped_policy_loss(logprob, old, whitened, mask, page["CLIP"])
    value_loss = rlhf.clipped_value_loss(value, old_value, returns, mask, page["CLIP"])
    expected = policy_loss + page["VF_COEF"] * value_loss

    torch.testing.assert_close(advantage, expected_advantage, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    found = gradients(loss, policy, critic)
    torch.testing.assert_close(found, gradients(expected, policy, critic), rtol=0, atol=1e-9)
    assert max(gradient.abs().max() for gradient in found) > 1e-3
