"""The loss of grpo_llm.py against TRL's GRPOTrainer on the same tensors, value and gradient; skipped without TRL.

A real trainer on a tiny model; only its log-probabilities are given, so that everything after them is TRL's own.
"""

from types import SimpleNamespace

import pytest
import torch
from check import check

pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0")

GROUP, T, B = 4, 5, 8  # sequences of a group, tokens, sequences
MAX_TOKENS = 7  # longer than any completion, as Dr. GRPO's constant is

# knobs of ours → settings of TRL's, whose default use_bias_correction_kl=True weights k3 by the ratio, unlike the paper
PRESETS = {
    "GRPO": (
        {"reduction": "sequence", "clip_low": 0.2, "clip_high": 0.2, "beta": 0.04},
        {"loss_type": "grpo", "epsilon": 0.2, "beta": 0.04, "use_bias_correction_kl": False},
    ),
    "DAPO": (
        {"reduction": "token", "clip_low": 0.2, "clip_high": 0.28, "beta": 0.0},
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0},
    ),
    "Dr. GRPO": (
        {"reduction": "constant", "clip_low": 0.2, "clip_high": 0.2, "beta": 0.0},
        {"loss_type": "dr_grpo", "epsilon": 0.2, "beta": 0.0, "scale_rewards": "none"},
    ),
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A model of 8 dimensions on disk, its tokenizer knows the words a to h."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = str(tmp_path_factory.mktemp("tiny_llama"))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefgh"])}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
    sizes = dict(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=1, pad_token_id=0)).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


@pytest.fixture
def trl_trainer(tiny_model, tmp_path):
    """A GRPOTrainer for B sequences a step in `micro_batches` parts; rewards are those that its data set carries."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    def make(micro_batches=1, reward_funcs=None, **settings):
        config = GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=B // micro_batches,
            gradient_accumulation_steps=micro_batches,
            num_generations=GROUP,
            max_completion_length=MAX_TOKENS,
            **settings,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model),
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
            reward_funcs=reward_funcs or (lambda completions, reward, **_: reward),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": "a b", "reward": 0.0}] * B),
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = micro_batches  # set by trainer.train() otherwise
        return trainer

    return make


@pytest.fixture
def batch():
    """Log-probabilities whose ratios lie inside, below and above the clip range, under both signs of the advantage."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(B, T, generator=generator, dtype=torch.float64) * 3 - 0.1
    change = torch.linspace(-0.6, 0.6, B * T, dtype=torch.float64)[torch.randperm(B * T, generator=generator)]
    lengths = torch.tensor([5, 1, 3, 4, 2, 5, 1, 3])
    return {
        "logprob": old + change.view(B, T),
        "old_logprob": old,
        "ref_logprob": old + torch.randn(B, T, generator=generator, dtype=torch.float64) * 0.3,
        "advantage": torch.tensor([1.5, -0.5, -0.7, -0.3, 0.8, -1.2, 1.2, -0.8], dtype=torch.float64),
        "mask": (torch.arange(T) < lengths.unsqueeze(-1)).double(),
    }


def trl_loss(trainer, batch, weights=None):
    """Loss and gradient by the log-probabilities, summed over the micro-batches of one optimiser step."""
    logprob = batch["logprob"].clone().requires_grad_()
    size = trainer.args.per_device_train_batch_size
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, B, size):
        part = slice(start, start + size)
        given = (logprob[part], torch.ones(size, T), None)  # log-probabilities, entropies, no auxiliary loss
        trainer._get_per_token_logps_and_entropies = lambda *_, given=given, **__: given
        inputs = {
            "prompt_ids": torch.full((size, 2), 2),
            "prompt_mask": torch.ones(size, 2, dtype=torch.long),
            "completion_ids": torch.full((size, T), 3),
            "completion_mask": batch["mask"][part],
            "advantages": batch["advantage"][part],
            "old_per_token_logps": batch["old_logprob"][part],
            "ref_per_token_logps": batch["ref_logprob"][part],
            "num_items_in_batch": batch["mask"].sum(),
        }
        if weights is not None:  # as if a separate sampler had been used, by vLLM
            trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
            inputs["importance_sampling_ratio"] = weights[part]
        total = total + trainer.compute_loss(trainer.model, inputs)
    return total.detach(), torch.autograd.grad(total, logprob)[0]


def our_loss(grpo, batch, micro_batches, reduction, clip_low, clip_high, beta):
    logprob = batch["logprob"].clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for part in torch.arange(B).chunk(micro_batches):
        token_loss = grpo.grpo_token_loss(
            logprob[part],
            batch["old_logprob"][part],
            batch["ref_logprob"][part] if beta else None,
            batch["advantage"][part],
            clip_low,
            clip_high,
            beta,
        )
        total = total + grpo.reduce_loss(token_loss, batch["mask"][part], reduction, batch["mask"].sum(), B, MAX_TOKENS)
    return total.detach(), torch.autograd.grad(total, logprob)[0]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_loss_and_gradient_are_trls(grpo, trl_trainer, batch, preset, micro_batches):
    ours, theirs = PRESETS[preset]
    value, gradient = trl_loss(trl_trainer(micro_batches, **theirs), batch)
    assert value != 0
    clipped = (gradient == 0) & batch["mask"].bool()
    assert ours["beta"] or (clipped.any() and not clipped.all())  # both sides of the clip range are met
    own_value, own_gradient = our_loss(grpo, batch, micro_batches, **ours)
    case = f"{preset}, {micro_batches} micro-batches"
    check(own_value, value, "the loss is TRL's", case)
    check(own_gradient, gradient, "its gradient is TRL's", case)


OTHERS = {  # ours as a token loss of (grpo, batch, log-probabilities), reduction, settings of TRL's
    "CISPO": (  # TRL's epsilon_high is the largest ratio itself
        lambda grpo, batch, x: grpo.cispo_token_loss(x, batch["old_logprob"], batch["advantage"], 0.2),
        "token",
        {"loss_type": "cispo", "epsilon_high": 1.2},
    ),
    "SAPO": (
        lambda grpo, batch, x: grpo.sapo_token_loss(x, batch["old_logprob"], batch["advantage"]),
        "sequence",
        {"loss_type": "sapo"},
    ),
    "unbiased KL": (
        lambda grpo, batch, x: 0.3 * (x - batch["old_logprob"]).exp() * grpo.kl_k3(x, batch["ref_logprob"]),
        "sequence",
        {"loss_type": "grpo", "epsilon": 0.2, "beta": 0.3, "use_bias_correction_kl": True},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_are_trls(grpo, trl_trainer, batch, name):
    ours, reduction, theirs = OTHERS[name]
    if "KL" in name:  # the KL alone
        batch["advantage"] = torch.zeros(B, dtype=torch.float64)
    value, gradient = trl_loss(trl_trainer(**theirs), batch)
    logprob = batch["logprob"].clone().requires_grad_()
    token_loss = ours(grpo, batch, logprob)
    own = grpo.reduce_loss(token_loss, batch["mask"], reduction, batch["mask"].sum(), B, MAX_TOKENS)
    assert value != 0
    near = {"rtol": 1e-6, "atol": 1e-6} if name == "SAPO" else {}  # TRL's temperatures are float32
    check(own, value, "the loss is TRL's", name, **near)
    check(torch.autograd.grad(own, logprob)[0], gradient, "its gradient is TRL's", name, **near)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sampler_weights_enter_the_loss_as_in_trl(grpo, trl_trainer, batch, level):
    """Without β. With it TRL, like ours, leaves the KL without a weight."""
    sampler = batch["old_logprob"] + 0.3 * torch.randn(B, T, generator=torch.Generator().manual_seed(1)).double()
    weights = grpo.sampler_weights(batch["old_logprob"], sampler, batch["mask"], level, 1.3)
    assert (weights == 1.3).any() and (weights < 1.3).any()
    value, gradient = trl_loss(trl_trainer(**PRESETS["GRPO"][1]), batch, weights)
    logprob = batch["logprob"].clone().requires_grad_()
    given = logprob, batch["old_logprob"], None, batch["advantage"], 0.2, 0.2, 0.0
    token_loss = weights * grpo.grpo_token_loss(*given) + 0.04 * grpo.kl_k3(logprob, batch["ref_logprob"])
    own = grpo.reduce_loss(token_loss, batch["mask"], "sequence", batch["mask"].sum(), B, MAX_TOKENS)
    check(own, value, "the weighted loss is TRL's", level)
    check(torch.autograd.grad(own, logprob)[0], gradient, "its gradient is TRL's", level)


def test_off_policy_mask_is_trls(grpo, trl_trainer, batch):
    trainer = trl_trainer()
    found = set()
    for limit in (-0.2, 0.0, 0.1, 0.3):
        given = batch["logprob"], batch["old_logprob"]
        theirs = trainer.get_off_policy_mask(batch["advantage"][:, None], *given, batch["mask"], limit)
        own = grpo.is_near_policy(*given, batch["advantage"], batch["mask"], limit)
        check(own.double(), theirs.tolist(), "which sequences stay in the loss is TRL's", f"limit {limit}")
        found.add(int(theirs.sum()))
    assert len(found) >= 3 and min(found) < B


def test_kl_gradient_is_trls(grpo, trl_trainer, batch):
    """Without advantages the loss is β k3 alone."""
    batch["advantage"] = torch.zeros(B, dtype=torch.float64)
    ours, theirs = PRESETS["GRPO"]
    value, gradient = trl_loss(trl_trainer(**theirs), batch)
    logprob = batch["logprob"].clone().requires_grad_()
    kl = grpo.kl_k3(logprob, batch["ref_logprob"])
    own = ours["beta"] * grpo.reduce_loss(kl, batch["mask"], "sequence", batch["mask"].sum(), B, MAX_TOKENS)
    assert value > 0
    check(own, value, "β k3 is TRL's", "advantages 0")
    check(torch.autograd.grad(own, logprob)[0], gradient, "the gradient of β k3 is TRL's", "advantages 0")


def test_token_mean_over_micro_batches_is_not_bnpo(grpo, trl_trainer, batch):
    """TRL's "bnpo" is the token mean of each micro-batch: the same in one piece, another loss in two."""
    ours, _ = PRESETS["DAPO"]
    for micro_batches, same in ((1, True), (2, False)):
        trainer = trl_trainer(micro_batches, loss_type="bnpo", epsilon=0.2, epsilon_high=0.28)
        _, gradient = trl_loss(trainer, batch)
        _, own_gradient = our_loss(grpo, batch, micro_batches, **ours)
        assert torch.allclose(own_gradient, gradient, rtol=1e-9, atol=1e-9) == same


REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.3, 2.0, -1.0, 0.5])


def trl_advantages(trainer, rewards):
    rows = [{"prompt": "a b", "reward": float(reward)} for reward in rewards]
    return trainer._generate_and_score_completions(rows)["advantages"]


def test_advantages_without_scaling_are_trls(grpo, trl_trainer):
    theirs = trl_advantages(trl_trainer(scale_rewards="none"), REWARDS)
    own = grpo.group_advantages(REWARDS, GROUP, scale_by_std=False)
    check(own, theirs, "R − mean is TRL's", "two groups of 4", rtol=1e-6, atol=1e-7)


def test_advantages_with_scaling_are_trls_but_for_its_standard_deviation(grpo, trl_trainer):
    """TRL divides by the deviation over G − 1, plus 1e-4; ours, the paper's, is over G, and nothing is added."""
    theirs = trl_advantages(trl_trainer(scale_rewards="group"), REWARDS)
    own = grpo.group_advantages(REWARDS, GROUP, scale_by_std=True)
    groups = REWARDS.view(-1, GROUP)
    biased, unbiased = groups.std(-1, correction=0), groups.std(-1, correction=1)
    factor = (biased / (unbiased + 1e-4)).repeat_interleave(GROUP)
    check(own * factor, theirs, "ours · σ_G / (σ_(G−1) + 1e-4) is TRL's", "two groups of 4", rtol=1e-5, atol=1e-6)
    assert torch.allclose(factor, torch.tensor(((GROUP - 1) / GROUP) ** 0.5), rtol=1e-3)


def test_scale_over_the_batch_is_trls_but_for_its_standard_deviation(grpo, trl_trainer):
    """TRL divides by the deviation of the rewards, ours, as REINFORCE++ with a baseline, by that of R − mean."""
    theirs = trl_advantages(trl_trainer(scale_rewards="batch"), REWARDS)
    centred = grpo.group_advantages(REWARDS, GROUP, scale_by_std=False)
    own = grpo.normalised_over_batch(centred, torch.ones(B))
    factor = centred.std(correction=0) / (REWARDS.std() + 1e-4)
    check(own * factor, theirs, "ours · σ(R − mean) / (σ(R) + 1e-4) is TRL's", "two groups of 4", rtol=1e-5, atol=1e-6)


def test_decoupled_rewards_are_trls_but_for_its_standard_deviations(grpo, trl_trainer):
    """GDPO of two rewards. TRL's deviations are over N − 1 and have 1e-4 added."""
    second = torch.tensor([0.1, 0.9, 0.2, 0.2, 0.5, 0.4, 0.3, 0.2])
    functions = [lambda completions, reward, **_: reward, lambda completions, other, **_: other]
    trainer = trl_trainer(reward_funcs=functions, multi_objective_aggregation="normalize_then_sum")
    rows = [{"prompt": "a b", "reward": float(x), "other": float(y)} for x, y in zip(REWARDS, second)]
    theirs = trainer._generate_and_score_completions(rows)["advantages"]
    parts = [{"some_reward": x, "other_reward": y} for x, y in zip(REWARDS.view(-1, GROUP), second.view(-1, GROUP))]
    ratings = [SimpleNamespace(parts=part, rewards=part["some_reward"] + part["other_reward"]) for part in parts]
    own = grpo.advantages_of(grpo.Args(decouple_rewards=True), ratings)
    check(own * ((B - 1) / B) ** 0.5, theirs, "GDPO's advantages are TRL's", "two groups of 4", rtol=2e-3, atol=1e-3)
    assert theirs.abs().max() > 0.5


def test_equal_rewards_give_no_advantage_in_both(grpo, trl_trainer):
    rewards = torch.tensor([1.0] * GROUP + [0.0] * GROUP)
    assert (grpo.group_advantages(rewards, GROUP) == 0).all()
    assert (trl_advantages(trl_trainer(), rewards) == 0).all()
