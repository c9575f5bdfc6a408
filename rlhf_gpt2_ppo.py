# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0",
#     "tokenizers==0.23.3",
#     "datasets==5.2.0",
#     "tensorboard==2.21.0",
#     "tyro==1.0.17",
#     "tqdm==4.70.1",
#     "matplotlib==3.11.2",
# ]
# ///
"""Three-stage RLHF with PPO on GPT-2: supervised fine-tuning, a reward model, PPO with four models, in one file.

Teaches  the details of RLHF with PPO, tagged [R1]..[R29] on the line where each happens (docs/details.md)
Run      python rlhf_gpt2_ppo.py
Expect   94 to 99% truly positive reviews (32 to 39% before stage 3) at 1.9 to 2.9 nats of KL a response, distinct-2
         lower by 2 to 27%, in 30 runs: 10 seeds under 3 instruction sets; 100 s on one core of an Intel Xeon
         whose other core was busy (benchmarks/RESULTS.md)
Departs  from Ziegler et al. 2019 in four ways:
         - β is steered to 2.9 nats with a horizon of 500 responses, not to 6 nats with one of 10,000, because the
           default run has only 2,880 responses.
         - A response without EOS costs 1. They rejected texts by the position of their periods.
         - Rewards are whitened only with --whiten-rewards, and then once per rollout, not once per minibatch.
         - The value is a network of its own. It begins as the reward model [R20].

    L_RM = −E[ ln σ( r(x, y_chosen) − r(x, y_rejected) ) ]                     InstructGPT Eq. 1
    rₜ   = −β ln( π(yₜ|sₜ) / π_ref(yₜ|sₜ) )  +  [t is the last token] r(x, y)    Ziegler et al. 2019 Eq. 2, per token
    Âₜ   = δₜ + γλ Âₜ₊₁,  δₜ = rₜ + γ V(sₜ₊₁) − V(sₜ),  γ = 1                    GAE Eq. 16
    L    = −E[ min(ρₜ Âₜ, clip(ρₜ, 1−ε, 1+ε) Âₜ) ] + c₁ ½ (V(sₜ) − Rₜ)²          PPO Eq. 7, Eq. 9
    with --ptx-coef, also maximise  γ_ptx E[ ln π(x) ]  over the texts of stage 1   InstructGPT Eq. 2

Shapes   B sequences, Q tokens of the query (padded on the left), T tokens of the response. sₜ is the query and the
         first t tokens of the response. A mask (B, T) is 1 up to the first EOS, which it includes, and 0 after it.
"""

import inspect
import json
import os
import random
import re
import shlex
import shutil
import sys
import textwrap
import time
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import nn

# a field's type says between which bounds its value must lie
PositiveInt = Annotated[int, "must be above 0", lambda x: x > 0]
PositiveFloat = Annotated[float, "must be above 0", lambda x: x > 0]
PositiveFloatOrNone = Annotated[float | None, "must be above 0", lambda x: x is None or x > 0]
NonNegativeInt = Annotated[int, "must not be negative", lambda x: x >= 0]
NonNegativeFloat = Annotated[float, "must not be negative", lambda x: x >= 0]
UnitFloat = Annotated[float, "must lie between 0 and 1", lambda x: 0 <= x <= 1]


@dataclass(frozen=True)
class Args:
    # the stages and their data
    stage: Literal["all", "sft", "reward", "ppo"] = "all"  # run all three stages, or one of them
    num_texts: PositiveInt = 16_000  # texts that the grammar writes, or rows that are read from --dataset
    prompt_words: PositiveInt = 5  # the first words of a labelled text are the prompt; the rest is the response
    max_length: PositiveInt = 64  # tokens of a text; what is longer is cut
    seed: NonNegativeInt = 1  # of weights, data and samples
    # stage 1: supervised fine-tuning
    sft_steps: PositiveInt = 300  # gradient steps of stage 1
    sft_batch_size: PositiveInt = 32  # texts in each step
    sft_learning_rate: PositiveFloatOrNone = None  # default 3e-3 below 10M parameters, else 3e-5
    mask_prompt: bool = False  # learn only the responses, not the prompts
    # stage 2: the reward model
    reward_steps: PositiveInt = 300  # gradient steps of stage 2
    reward_batch_size: PositiveInt = 24  # pairs in each step
    reward_learning_rate: PositiveFloatOrNone = None  # default 1e-3 below 10M parameters, else 2e-5
    # stage 3: PPO
    ppo_iterations: PositiveInt = 30  # rollouts of stage 3, each followed by its updates
    batch_size: PositiveInt = 96  # responses in each rollout, B
    response_length: PositiveInt = 20  # the most tokens of a response, T
    temperature: PositiveFloat = 1.0  # temperature of the sampling and of every log-probability
    num_epochs: PositiveInt = 2  # passes over each rollout
    num_minibatches: PositiveInt = 2  # gradient steps in each pass
    learning_rate: PositiveFloatOrNone = None  # of stage 3; default 6e-4 below 10M parameters, else 1e-5
    value_learning_rate: PositiveFloatOrNone = None  # of the value network; default --learning-rate
    warmup_iterations: NonNegativeInt = 5  # iterations over which stage 3's rates rise to their value; 0: none
    kl_coef: NonNegativeFloat = 0.2  # β, the price of one nat of KL to the reference
    adaptive_kl: bool = True  # change β so that the KL of a response comes to --kl-target
    kl_target: PositiveFloat = 2.9  # in nats a response
    kl_horizon: PositiveInt = 500  # β changes by at most a fifth in so many responses
    gamma: UnitFloat = 1.0  # discount per token
    gae_lambda: UnitFloat = 0.95  # GAE's λ
    clip_coef: PositiveFloat = 0.2  # ε: the ratio's range is 1 − ε to 1 + ε
    value_clip: PositiveFloatOrNone = 0.2  # how far a value may move from the old one; None: the loss is not clipped
    vf_coef: NonNegativeFloat = 0.5  # weight of the value loss, c₁
    ent_coef: NonNegativeFloat = 0.01  # weight of the entropy bonus
    whiten_rewards: bool = False  # scale the rewards of a rollout to variance 1; their mean is kept
    whiten_advantages: bool = True  # shift and scale the advantages of a minibatch to mean 0, variance 1
    missing_eos_penalty: NonNegativeFloat = 1.0  # subtracted from the score of a response without EOS
    length_penalty: NonNegativeFloat = 0.0  # subtracted from the score for each token of the response
    target_kl: PositiveFloatOrNone = None  # stop a rollout's updates when a minibatch's KL is above this, in nats
    share_backbone: bool = False  # make the value a head on the policy, not a network of its own
    ptx_coef: NonNegativeFloat = 0.0  # weight of stage 1's loss in stage 3, InstructGPT's γ
    # every stage
    micro_batch_size: PositiveInt = 64  # sequences in one forward pass; changes the memory, never the gradient
    anneal_lr: bool = True  # let the learning rates fall to 0 over their stage
    max_grad_norm: PositiveFloat = 1.0  # gradients of each network are scaled down to this global norm
    eval_prompts: PositiveInt = 1024  # held-out prompts that the policies before and after stage 3 answer
    # the run
    device: str = "cpu"  # cpu, cuda, cuda:1 …, or mps, which is untried
    torch_threads: PositiveInt = 1  # CPU threads of torch
    torch_deterministic: bool = True  # refuse operations whose result varies from run to run
    run_dir: str | None = None  # where everything is written; default runs/<data>__<script>__<seed>__<time>
    checkpoint_every: NonNegativeInt = 50  # steps (stage 3: iterations) between checkpoints; 0: at a stage's end only
    resume: str | None = None  # directory of a run that was stopped: continue it, with the same bits on a CPU
    track: bool = False  # log to Weights & Biases too (pip install wandb)
    wandb_project: str = "rlhf-gpt2-ppo"  # the project there
    ask: str | None = None  # train nothing: let the policies of --run-dir, by default the newest run, go on from a text
    # your own model and data
    model: str | None = None  # Hub id or directory of a GPT-2, e.g. gpt2; default a small one with random weights
    dataset: str | None = None  # Hub id or file: text and label, or chosen and rejected; default the grammar's texts
    text_column: str = "text"  # the data set's column of texts
    label_column: str = "label"  # its column of labels: 1 positive, 0 negative
    # several reward models
    reward_model: tuple[str, ...] = ()  # for --stage ppo: directories of reward models; several are an ensemble
    ensemble: PositiveInt = 1  # K, reward models to train
    ensemble_std: NonNegativeFloat = 1.0  # k: the score is the ensemble's mean minus k standard deviations
    train_gold: bool = False  # train another reward model, on the other half of the pairs, that only judges
    gold_model: str | None = None  # for --stage ppo: a reward model that only judges, instead of the grammar's truth
    # a language model as the judge
    judge: str | None = None  # Hub id or directory of an instruct model
    preferences: Literal["labels", "ai"] = "labels"  # which text of a pair is better is said by the data, or by --judge
    sft_data: Literal["texts", "critique"] = "texts"  # learn from the texts, or from --judge's revisions of them
    judge_pairs: PositiveInt = 1000  # pairs that it judges, or texts that it revises
    constitution: str | None = None  # file of principles for it, one a line; default PRINCIPLES in this file
    # against reward hacking
    reward_bottleneck: NonNegativeInt = 0  # latent dimensions of the reward models' bottleneck (InfoRM); 0: none
    bottleneck_coef: NonNegativeFloat = 0.1  # weight of that bottleneck's KL to N(0, I) in stage 2's loss
    outlier_coef: NonNegativeFloat = 0.0  # subtracted from the score for each unit of Mahalanobis distance in it (IBL)
    energy_coef: NonNegativeFloat = 0.0  # subtracted from the score for each unit of the energy gap (EPPO), η
    reward_clip: PositiveFloatOrNone = None  # scale the scores by their running mean and std, cut them to ± this value
    value_only_iterations: NonNegativeInt = 0  # first iterations of stage 3, in which the policy does not learn
    freeze_layers: NonNegativeInt = 0  # lower layers of the policy that stage 3 does not train, nor the embeddings
    reward_update_every: NonNegativeInt = 0  # iterations between updates of the reward models in stage 3; 0: none
    reward_update_steps: PositiveInt = 4  # gradient steps of such an update, on the policy's own responses

    def __post_init__(self):
        check_bounds(self)
        check_settings(self)

    @property
    def stages(self):
        """Names of the stages to run. Each writes the directory of its name; ppo writes policy and value."""
        rewards = ["reward", *(f"reward{k}" for k in range(2, self.ensemble + 1)), *["gold"] * self.train_gold]
        return {"all": ["sft", *rewards, "ppo"], "sft": ["sft"], "reward": rewards, "ppo": ["ppo"]}[self.stage]

    def rate(self, name, model):
        """The learning rate of that name: the given one, else the default for a model of this size."""
        small, large = {
            "sft_learning_rate": (3e-3, 3e-5),
            "reward_learning_rate": (1e-3, 2e-5),
            "learning_rate": (6e-4, 1e-5),
        }[name]
        is_small = sum(weights.numel() for weights in model.parameters()) < 10_000_000
        return getattr(self, name) or (small if is_small else large)


class InputError(ValueError):
    """A mistake that the user can fix. main() prints its message, one sentence, and exits with status 2."""


# ---- Equations ----


def token_logprobs(logits, tokens, temperature):
    """ln π(token) at a temperature [R9]: logits (B, T, V), tokens (B, T) → (B, T), in nats.

    Use the temperature of the sampling: with another one the ratio is not 1 before the first update.
    """
    logits = logits if temperature == 1 else logits / temperature
    return -torch.nn.functional.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none").view_as(tokens)


def preference_loss(chosen_score, rejected_score):
    """−E[ln σ(chosen − rejected)], Bradley–Terry (InstructGPT Eq. 1). Both (B,); a scalar to minimise."""
    return -nn.functional.logsigmoid(chosen_score - rejected_score).mean()


def masked_mean(x, mask):
    """Mean of x where mask is 1, both (B, T); 0 if mask is all 0. Values off the mask are not read, not even NaN."""
    mask = mask.bool()
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def masked_whiten(x, mask, shift_mean=True):
    """x with variance 1 and mean 0 over the mask, 0 off it [R14]. shift_mean=False keeps the mean. All (B, T).

    As in lm-human-preferences, the variance is biased and 1e-8 is added to it under the root.
    """
    mask = mask.bool()
    mean = masked_mean(x, mask)
    centred = torch.where(mask, x - mean, 0.0)
    whitened = centred * torch.rsqrt(masked_mean(centred**2, mask) + 1e-8)
    return whitened if shift_mean else torch.where(mask, whitened + mean, 0.0)


def last_real(mask):
    """(B,) index of the last 1 in each row of mask (B, T), on whichever side the padding is; 0 in a row without a 1."""
    return (mask.long() * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)


def kl_penalized_rewards(score, logprob, ref_logprob, mask, kl_coef):
    """rₜ = −β (ln π − ln π_ref) on each token [R13], plus the score on the last one. score (B,), the others (B, T)."""
    mask = mask.bool()
    rewards = torch.where(mask, -kl_coef * (logprob - ref_logprob), 0.0)
    is_last = nn.functional.one_hot(last_real(mask), mask.shape[1]).bool() & mask
    return rewards + torch.where(is_last, score.unsqueeze(-1), 0.0)


def compute_gae(rewards, values, mask, gamma, gae_lambda):
    """Âₜ = δₜ + γλ Âₜ₊₁ (GAE Eq. 16) over each response, all (B, T); 0 off the mask.

    A response is an episode that ends with its last real token. After that token, values and advantages are 0.
    """
    mask = mask.bool()
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = last = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = torch.where(mask[:, t], rewards[:, t], 0.0) + gamma * next_value - values[:, t]
        last = torch.where(mask[:, t], delta + gamma * gae_lambda * last, 0.0)
        next_value = values[:, t]
        advantages[:, t] = last
    return advantages


def clipped_policy_loss(logprob, old_logprob, advantage, mask, clip_coef):
    """−E[min(ρ Â, clip(ρ, 1−ε, 1+ε) Â)] over the mask (PPO Eq. 7). All (B, T); a scalar to minimise."""
    mask = mask.bool()
    ratio = torch.where(mask, logprob - old_logprob, 0.0).exp()
    return -masked_mean(torch.min(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage), mask)


def clipped_value_loss(value, old_value, returns, mask, clip_coef):
    """½ E[max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²)] over the mask [R15]. All (B, T).

    clip_coef=None is the plain ½ E[(V − R)²]. A scalar to minimise.
    """
    mask = mask.bool()
    value = torch.where(mask, value, 0.0)  # so that a NaN in the padding stays out of the gradient too
    loss = (value - returns) ** 2
    if clip_coef is not None:
        clipped = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
        loss = torch.max(loss, (clipped - returns) ** 2)
    return 0.5 * masked_mean(loss, mask)


class AdaptiveKLController:
    """Changes β so that the KL of a response, in nats, comes to the target (Ziegler et al. 2019 §2.2) [R16].

    e = clip(KL / target − 1, ±0.2),  β ← β (1 + e n / horizon)  after n responses.
    """

    def __init__(self, kl_coef, target, horizon):
        self.kl_coef, self.target, self.horizon = kl_coef, target, horizon

    def update(self, kl, n):
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * n / self.horizon
        return self.kl_coef


def token_entropy(logits, temperature):
    """Entropy of the policy at a temperature: logits (B, T, V) → (B, T), in nats."""
    logprobs = (logits / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def ensemble_score(scores, k):
    """(K, B) scores of K reward models → (B,): mean − k·std (biased) [R22]. Models that disagree know little."""
    return scores.mean(0) - k * scores.std(0, correction=0)


# ---- Data ----

# The grammar's words. A review has two or three sentences. Most of them have the sentiment of the review.
WORDS = {
    "aspects": "acting camera cast dialogue direction editing ending humour music pacing plot script",
    "genres": "cartoon comedy drama musical mystery remake sequel thriller western",
    "praise": "brilliant charming clever delightful elegant fresh gripping moving stunning superb tender witty",
    "blame": "awkward bland boring clumsy dull hollow lifeless messy shallow stale tedious tired",
    "love": "admired enjoyed loved",
    "hate": "disliked hated regretted",
    "adverbs": "often quite really truly",
    "times": "alone abroad twice yesterday",
}
ASPECTS, GENRES, PRAISE, BLAME, LOVE, HATE, ADVERBS, TIMES = (words.split() for words in WORDS.values())
NEUTRAL = [*(f"I saw it {time}." for time in TIMES), "It runs for hours."]


def one_of(words):
    return f"(?:{'|'.join(words)})"


WORD = one_of(PRAISE + BLAME)
PHRASE = f"(?:(?:not |{one_of(ADVERBS)} )?{WORD}|{WORD} (?:and|but) {WORD})"
SENTENCE = re.compile(
    rf"The {one_of(ASPECTS)}(?: of this {one_of(GENRES)})? was {PHRASE}\."
    rf"|I {one_of(LOVE + HATE)} the {one_of(ASPECTS)}\.|{one_of(map(re.escape, NEUTRAL))}"
)


def write_sentence(rng, sentiment, subject):
    """A sentence of sentiment 1, 0 or −1. With a subject it is "<subject> was …"; with None it may have any form."""
    words, others = (PRAISE, BLAME) if sentiment > 0 else (BLAME, PRAISE)
    (one, two), other = rng.sample(words, 2), rng.choice(others)
    if sentiment == 0:
        phrases = [f"{one} but {other}"]
    else:
        phrases = [one, f"{one} and {two}", f"{rng.choice(ADVERBS)} {one}", f"not {other}"]
    forms = [f"{subject or f'The {rng.choice(ASPECTS)}'} was {rng.choice(phrases)}."]
    if subject is None and sentiment == 0:
        forms.append(rng.choice(NEUTRAL))
    elif subject is None:
        forms.append(f"I {rng.choice(LOVE if sentiment > 0 else HATE)} the {rng.choice(ASPECTS)}.")
    return rng.choice(forms)


def write_review(rng, is_positive):
    """A review that is truly positive or truly negative. Its first five words do not show which."""
    own = 1 if is_positive else -1
    text = ""
    while true_sentiment(text) * own <= 0:
        subject = f"The {rng.choice(ASPECTS)} of this {rng.choice(GENRES)}"
        sentiments = rng.choices((own, 0, -own), (6, 2, 1), k=rng.choice((2, 3)))
        text = " ".join(write_sentence(rng, each, None if i else subject) for i, each in enumerate(sentiments))
    return text


def true_sentiment(text):
    """(positive − negative sentences) / all sentences. A sentence that the grammar cannot produce counts as neutral."""
    sentences = re.findall(r"\S[^.]*\.?", text)
    total = 0
    for sentence in sentences:
        if SENTENCE.fullmatch(sentence):
            words = sentence.rstrip(".").split()
            praise, blame = (sum(word in kind for word in words) for kind in (PRAISE + LOVE, BLAME + HATE))
            sign = (praise > blame) - (praise < blame)
            total += -sign if "not" in words else sign
    return total / max(len(sentences), 1)


def load_rows(args):
    """num_texts rows, dicts with text and label: written by the grammar, or read from --dataset."""
    if args.dataset is None:
        rng = random.Random(args.seed)
        labels = [i % 2 for i in range(args.num_texts)]
        return [{args.text_column: write_review(rng, label == 1), args.label_column: label} for label in labels]
    return read_data_set(args)


DIALOGUE = re.compile(r"(.*\bAssistant:)(.*)", re.DOTALL)  # hh-rlhf: all up to the last answer, and that answer


def texts_and_pairs(rows, args, part="data"):
    """Texts to imitate, each (prompt, response), and pairs (chosen, rejected) of such texts.

    A labelled text is split after prompt_words words, and a pair is a positive and a negative text. A row with chosen
    and rejected is a pair. It has a column prompt, or is split at the last "Assistant:", as in hh-rlhf. part is the
    name of these rows in a message.
    """
    if args.label_column not in rows[0]:
        pairs = []
        for row in rows:
            if "prompt" in row:
                pair = [(row["prompt"], row[key]) for key in ("chosen", "rejected")]
            else:
                pair = [DIALOGUE.fullmatch(row[key]).groups() for key in ("chosen", "rejected")]
            pairs.append(tuple(pair))
        return [chosen for chosen, _ in pairs], pairs
    by_label, texts = {0: [], 1: []}, []
    for row in rows:
        words = re.match(rf"(?:\s*\S+(?!\S)){{{args.prompt_words}}}(?=\s+\S)", row[args.text_column])
        if words:  # a text with no word after its prompt has no response
            texts.append((words.group(), row[args.text_column][words.end() :]))
            by_label[row[args.label_column]].append(texts[-1])
    if not all(by_label.values()):
        counts = f"{len(by_label[1])} positive and {len(by_label[0])} negative"
        raise InputError(
            f"--dataset {args.dataset} has {counts} texts of more than {args.prompt_words} words among the {len(rows)} "
            f"rows of its {part}; both kinds are needed"
        )
    return texts, list(zip(by_label[1], by_label[0]))


def encode(tokenizer, texts, max_length):
    """Texts (prompt, response) → token lists (prompt, response with EOS), cut to max_length in all [R2]."""
    prompts, responses = (tokenizer(list(part), add_special_tokens=False)["input_ids"] for part in zip(*texts))
    encoded = []
    for prompt, response in zip(prompts, responses):
        room = max(max_length - len(prompt), 0)
        encoded.append((prompt[:max_length], [*response, tokenizer.eos_token_id][:room]))
    return encoded


def encode_pairs(tokenizer, pairs, max_length):
    """Pairs of texts → pairs (chosen, rejected) of token lists. Each list is a prompt with its response."""
    sides = [[prompt + response for prompt, response in encode(tokenizer, side, max_length)] for side in zip(*pairs)]
    return list(zip(*sides))


def pad(sequences, pad_id, device, side="right"):
    """Token lists → tokens (B, L), and mask (B, L) with 0 on the padding; both of dtype long [R2]."""
    length = max(map(len, sequences))
    tokens, mask = (torch.full((len(sequences), length), x, dtype=torch.long) for x in (pad_id, 0))
    for i, sequence in enumerate(sequences):
        columns = slice(length - len(sequence), length) if side == "left" else slice(0, len(sequence))
        tokens[i, columns] = torch.tensor(sequence, dtype=torch.long)
        mask[i, columns] = 1
    return tokens.to(device), mask.to(device)


def in_parts(items, size):
    """Consecutive parts of a list or a tensor, of `size` items each; the last part has the rest."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def epochs_of(count, steps, batch_size, seed):
    """Indices (steps, batch_size) that go through shuffled 0 … count − 1 again and again. The seed alone sets them."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch_size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return order[: steps * batch_size].view(steps, batch_size)


# ---- Models ----


def start_model(args, name, texts=()):
    """(language model, tokenizer) of a Hub id or a directory; without a name, a small GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if name is None:
        tokenizer = new_tokenizer(prompt + response for prompt, response in texts)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=args.max_length + args.response_length,
            n_embd=128,
            n_layer=4,
            n_head=4,
            activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new is the same function, but slower
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = GPT2LMHeadModel(config)
    else:
        tokenizer = from_disk("AutoTokenizer", name)
        model = from_disk("AutoModelForCausalLM", name, dtype=torch.float32)
        check_model(args, name, model, tokenizer)
        if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):  # if padding is EOS, no model learns to stop
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    fit_to_tokenizer(model, tokenizer)
    return without_dropout(model).to(args.device), tokenizer


def new_reward_model(args, name, tokenizer):
    """The model of stage 1 with a head of one output instead of the head over the vocabulary."""
    model = from_disk("AutoModelForSequenceClassification", name, num_labels=1, dtype=torch.float32)
    fit_to_tokenizer(model, tokenizer)
    nn.init.normal_(model.score.weight, std=(model.config.hidden_size + 1) ** -0.5)  # [R7]
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0
    if args.reward_bottleneck:
        model.bottleneck = Bottleneck(model.config.hidden_size, args.reward_bottleneck)  # [R24]
    return without_dropout(model).to(args.device)


def without_dropout(model):
    """Switch dropout off for good. With dropout the ratio would compare two different networks [R17].

    It sets p = 0. Evaluation mode would also switch gradient checkpointing off.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def frozen(model):
    return model.requires_grad_(False)


def hidden_states(model, tokens, mask):
    """(B, L, d) of tokens (B, L). Positions count real tokens only [R3], so that padding changes nothing."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model.base_model(input_ids=tokens, attention_mask=mask, position_ids=positions).last_hidden_state


def head_scores(model, hidden):
    """A reward model's score of each hidden state, (B, L), normalised by the mean and std in its config [R8]."""
    config = model.config
    return (model.score(hidden).squeeze(-1) - config.reward_mean) / config.reward_std


def reward_scores(model, tokens, mask):
    """(B,) scores of prompts with their responses [R1], read at the last real token only [R6]."""
    hidden = hidden_states(model, tokens, mask)
    return head_scores(model, hidden[torch.arange(len(hidden)), last_real(mask)])


def policy_logits(policy, tokens, mask, length):
    """Logits (B, T, V) for the last `length` tokens of (B, L): those for a token are read at the token before it."""
    return policy.lm_head(hidden_states(policy, tokens, mask)[:, -length - 1 : -1])


def response_values(value_model, policy, tokens, mask, length):
    """V (B, T) of the states before the last `length` tokens: each is the query and the response so far [R1].

    value_model has the form of a reward model, or is a linear head on the policy's backbone.
    """
    shared = isinstance(value_model, nn.Linear)
    hidden = hidden_states(policy if shared else value_model, tokens, mask)[:, -length - 1 : -1]
    return value_model(hidden).squeeze(-1) if shared else head_scores(value_model, hidden)


# ---- Rollouts ----


@torch.no_grad()
def sample(model, queries, query_mask, length, temperature, eos_id, pad_id):
    """Responses to queries (B, Q), padded on the left: tokens, their log-probabilities and mask, each (B, length).

    Tokens are drawn from the whole distribution: no top-k, no top-p. After the first EOS of a response there is
    padding with mask 0, so that all responses have the same length [R4]. Each step computes one token and keeps the
    keys and values of the earlier ones.
    """
    B, Q = queries.shape
    tokens = torch.full((B, length), pad_id, device=queries.device)
    logprobs = torch.zeros(B, length, device=queries.device)
    mask = torch.cat([query_mask, torch.zeros_like(tokens)], dim=1)
    running = torch.ones(B, dtype=torch.bool, device=queries.device)
    inputs, positions, cache = queries, (query_mask.cumsum(-1) - 1).clamp(min=0), None
    for t in range(length):
        seen = mask[:, : Q + t]
        output = model(
            inputs, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = output.past_key_values
        token = torch.multinomial((output.logits[:, -1] / temperature).softmax(-1), 1)
        tokens[:, t] = torch.where(running, token[:, 0], pad_id)
        logprobs[:, t] = torch.where(running, token_logprobs(output.logits[:, -1:], token, temperature)[:, 0], 0.0)
        mask[:, Q + t] = running
        running = running & (token[:, 0] != eos_id)
        if not running.any():
            break
        inputs, positions = tokens[:, t : t + 1], seen.sum(-1, keepdim=True)
    return tokens, logprobs, mask[:, Q:]


class Rollout(NamedTuple):
    tokens: torch.Tensor  # (B, T) response tokens
    logprobs: torch.Tensor  # (B, T) their log-probabilities under the policy that drew them
    mask: torch.Tensor  # (B, T) 1 up to the first EOS, which it includes
    whole: torch.Tensor  # (B, Q + T) query and response
    whole_mask: torch.Tensor  # (B, Q + T) 0 on the padding
    texts: list  # B pairs (prompt, response) of text


def roll_out(args, policy, tokenizer, prompts):
    """The policy's responses to B prompts (token lists)."""
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    queries, query_mask = pad(prompts, pad_id, args.device, "left")
    tokens, logprobs, mask = sample(policy, queries, query_mask, args.response_length, args.temperature, eos_id, pad_id)
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    texts = list(zip(*(tokenizer.batch_decode(part, **options) for part in (prompts, tokens))))
    whole, whole_mask = torch.cat([queries, tokens], 1), torch.cat([query_mask, mask], 1)
    return Rollout(tokens, logprobs, mask, whole, whole_mask, texts)


@torch.no_grad()
def judge_rollout(args, rollout, reference, reward_models, gold_model):
    """The reference's log-probabilities (B, T), the scores (B,), and the truth (B,), or None if it is not known.

    The truth is 1 for a positive review of the grammar and 0 for any other, or the score of the gold model.
    """
    logits = policy_logits(reference, rollout.whole, rollout.whole_mask, args.response_length)
    ref_logprobs = token_logprobs(logits, rollout.tokens, args.temperature)
    scores = torch.stack([reward_scores(model, rollout.whole, rollout.whole_mask) for model in reward_models])
    gold = None
    if gold_model is not None:
        gold = reward_scores(gold_model, rollout.whole, rollout.whole_mask)
    elif args.dataset is None:
        gold = torch.tensor([float(true_sentiment(prompt + response) > 0) for prompt, response in rollout.texts])
    return ref_logprobs, ensemble_score(scores, args.ensemble_std), gold


# ---- Stage 1: supervised fine-tuning ----


def stage_seed(args, stage):
    """A seed for each stage, so that it draws the same numbers whether it runs alone or after the others."""
    return args.seed + zlib.crc32(stage.encode())


def new_optimizer(*groups):
    """One Adam for several pairs (module, learning rate)."""
    groups = [{"params": list(module.parameters()), "lr": rate, "initial_lr": rate} for module, rate in groups]
    return torch.optim.Adam(groups, eps=1e-5, fused=True)  # [D3] not 1e-8


def anneal(optimizer, remaining):
    """Set each learning rate to a share of its first value [R5]. The share falls linearly to 0 over a stage."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * remaining


def sft_loss(model, tokens, mask, learned):
    """Sum of −ln π over the tokens where learned is 1, in nats. tokens, mask and learned are (B, L)."""
    hidden = hidden_states(model, tokens, mask)[:, :-1]
    logprobs = token_logprobs(model.lm_head(hidden), tokens[:, 1:], 1.0)
    return -torch.where(learned[:, 1:].bool(), logprobs, 0.0).sum()


def sft_backward(args, model, tokenizer, texts, weight):
    """Add the gradient of weight × the mean loss over all tokens of texts, in micro-batches [R12]. Returns the mean."""
    tokens, mask = pad([prompt + response for prompt, response in texts], tokenizer.pad_token_id, args.device)
    learned = learned_tokens(texts, mask, args.mask_prompt)
    count = learned[:, 1:].sum().clamp(min=1)
    loss = torch.zeros((), device=args.device)
    for rows in in_parts(torch.arange(len(texts)), args.micro_batch_size):
        micro_loss = sft_loss(model, tokens[rows], mask[rows], learned[rows]) / count
        (weight * micro_loss).backward()
        loss += micro_loss.detach()
    return loss


def learned_tokens(texts, mask, mask_prompt):
    """(B, L) with 1 on the tokens that stage 1 learns: all real tokens, or only those of the responses."""
    learned = mask.clone()
    for i, (prompt, _) in enumerate(texts):
        learned[i, : len(prompt) if mask_prompt else 0] = 0
    return learned


def train_sft(args, run, model, tokenizer, texts, held_out):
    """Supervised fine-tuning on token lists (prompt, response). Writes the directory sft."""
    from tqdm import trange

    started = time.perf_counter() - run.seconds.get("sft", 0.0)
    optimizer = new_optimizer((model, args.rate("sft_learning_rate", model)))
    first = run.begin("sft", {"model": model}, optimizer)
    order = epochs_of(len(texts), args.sft_steps, args.sft_batch_size, stage_seed(args, "sft"))
    bar = trange(first, args.sft_steps, desc="1 sft", initial=first, total=args.sft_steps)
    for step in bar:
        anneal(optimizer, 1 - step / args.sft_steps if args.anneal_lr else 1)
        batch = [texts[i] for i in order[step]]
        optimizer.zero_grad()
        loss = sft_backward(args, model, tokenizer, batch, weight=1.0)
        run.check_finite(loss, "sft", step)
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        row = {"sft/loss": float(loss), "sft/learning_rate": optimizer.param_groups[0]["lr"]}
        if step + 1 == args.sft_steps:
            row["sft/perplexity"] = perplexity(args, model, tokenizer, held_out)
        bar.set_postfix(loss=f"{row['sft/loss']:.3f}", refresh=False)
        run.seconds["sft"] = time.perf_counter() - started
        run.log("sft", step + 1, row)
        run.checkpoint("sft", step + 1, args.sft_steps, {"model": model}, optimizer)
    save_model(run.dir / "sft", model, tokenizer)


# ---- Stage 2: the reward model ----


def train_reward(args, run, stage, policy, tokenizer, pairs, held_out, prompts):
    """Train a reward model on pairs (chosen, rejected) of token lists. Writes the directory with the stage's name."""
    from tqdm import trange

    started = time.perf_counter() - run.seconds.get(stage, 0.0)
    torch.manual_seed(stage_seed(args, stage))
    model = new_reward_model(args, policy.name_or_path, tokenizer)
    optimizer = new_optimizer((model, args.rate("reward_learning_rate", model)))
    first = run.begin(stage, {"model": model}, optimizer)
    order = epochs_of(len(pairs), args.reward_steps, args.reward_batch_size, stage_seed(args, stage))
    bar = trange(first, args.reward_steps, desc=f"2 {stage}", initial=first, total=args.reward_steps)
    for step in bar:
        anneal(optimizer, 1 - step / args.reward_steps if args.anneal_lr else 1)
        batch = [pairs[i] for i in order[step]]
        optimizer.zero_grad()
        loss = accuracy = 0.0
        for micro in in_parts(batch, args.micro_batch_size):
            both = [chosen for chosen, _ in micro] + [rejected for _, rejected in micro]
            scores, bottleneck = training_scores(args, model, *pad(both, tokenizer.pad_token_id, args.device))
            chosen, rejected = scores.chunk(2)
            micro_loss = (preference_loss(chosen, rejected) + bottleneck) * len(micro) / len(batch)
            micro_loss.backward()
            loss += micro_loss.detach()
            accuracy += float((chosen > rejected).float().sum()) / len(batch)
        run.check_finite(loss, stage, step)
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        row = {f"{stage}/loss": float(loss), f"{stage}/accuracy": accuracy}
        if step + 1 == args.reward_steps:
            finish_bottleneck(args, model, policy, tokenizer, prompts)
            chosen, rejected = (score_texts(args, model, tokenizer, side) for side in zip(*held_out))
            row[f"{stage}/held_out_accuracy"] = float((chosen > rejected).float().mean())
            row[f"{stage}/calibration_error"] = calibration_error(chosen - rejected)
            normalise_scores(args, model, policy, tokenizer, prompts)
            row[f"{stage}/mean"], row[f"{stage}/std"] = model.config.reward_mean, model.config.reward_std
        bar.set_postfix(accuracy=f"{accuracy:.2f}", refresh=False)
        run.seconds[stage] = time.perf_counter() - started
        run.log(stage, step + 1, row)
        more = {"reward_mean": model.config.reward_mean, "reward_std": model.config.reward_std}
        run.checkpoint(stage, step + 1, args.reward_steps, {"model": model}, optimizer, **more)
    if first == args.reward_steps:
        model.config.reward_mean, model.config.reward_std = run.saved["reward_mean"], run.saved["reward_std"]
    save_model(run.dir / stage, model, tokenizer)


@torch.no_grad()
def normalise_scores(args, model, policy, tokenizer, prompts):
    """[R8] Scale the scores to mean 0, variance 1 on responses of stage 1's policy: β and the penalties rely on it."""
    scores = []
    for part in in_parts(prompts, args.batch_size):
        rollout = roll_out(args, policy, tokenizer, part)
        scores.append(reward_scores(model, rollout.whole, rollout.whole_mask))
    scores = torch.cat(scores)
    model.config.reward_mean, model.config.reward_std = float(scores.mean()), max(float(scores.std(correction=0)), 1e-6)


# ---- Stage 3: PPO ----


def train_ppo(args, run, policy, value_model, reference, reward_models, gold_model, tokenizer, prompts, texts):
    """PPO on prompts (token lists), with stage 1's texts for --ptx-coef. Writes the directories policy and value."""
    from tqdm import trange

    # 1. Optimizer and β, new or from the checkpoint
    T = args.response_length
    rate = args.rate("learning_rate", policy)
    freeze_lower_layers(policy, args.freeze_layers)
    optimizer = new_optimizer((policy, rate), (value_model, args.value_learning_rate or rate))
    modules = {"policy": policy, "value": value_model}
    cures = Cures(args, reward_models)  # what the flags against reward hacking keep between iterations
    first = run.begin("ppo", modules | cures.modules, optimizer)
    cures.load_state(run.saved if first else None)
    controller = AdaptiveKLController(run.saved["kl_coef"] if first else args.kl_coef, args.kl_target, args.kl_horizon)
    order = epochs_of(len(prompts), args.ppo_iterations, args.batch_size, stage_seed(args, "ppo"))
    updates = args.num_epochs * args.num_minibatches
    ptx_order = epochs_of(len(texts), args.ppo_iterations * updates, args.sft_batch_size, stage_seed(args, "ptx"))
    names = [
        "policy/loss",
        "val/loss",
        "policy/entropy",
        "policy/approx_kl",
        "policy/clipfrac",
        "val/ratio",
    ]  # of stats
    bar = trange(first, args.ppo_iterations, desc="3 ppo", initial=first, total=args.ppo_iterations)

    for iteration in bar:
        clock = [time.perf_counter()]
        remaining = 1 - iteration / args.ppo_iterations if args.anneal_lr else 1

        # 2. Rollout: the policy answers B queries
        rollout = roll_out(args, policy, tokenizer, [prompts[i] for i in order[iteration]])
        tokens, old_logprobs, mask, whole, whole_mask, _ = rollout
        clock.append(time.perf_counter())

        # 3. Log-probabilities of the reference, scores, values
        ref_logprobs, scores, gold = judge_rollout(args, rollout, reference, reward_models, gold_model)
        with torch.no_grad():
            values = response_values(value_model, policy, whole, whole_mask, T)

        # 4. Rewards, advantages, returns
        has_eos = (tokens == tokenizer.eos_token_id).any(-1)
        scaled = cures.scale(scores, policy, reference, tokenizer, rollout)
        penalised = scaled - args.length_penalty * mask.sum(-1) - args.missing_eos_penalty * ~has_eos  # [R19] [R18]
        rewards = kl_penalized_rewards(penalised, old_logprobs, ref_logprobs, mask, controller.kl_coef)
        rlhf_reward = rewards.sum(-1)
        if args.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages = compute_gae(rewards, values, mask, args.gamma, args.gae_lambda)  # [R11] γ is 1
        returns = advantages + values
        clock.append(time.perf_counter())

        # 5. Update: epochs of minibatches, each in micro-batches [R12]
        losses = []
        epochs = [torch.randperm(len(tokens)).tensor_split(args.num_minibatches) for _ in range(args.num_epochs)]
        for update, mb in enumerate(indices for epoch in epochs for indices in epoch):
            mb_advantages = masked_whiten(advantages[mb], mask[mb]) if args.whiten_advantages else advantages[mb]
            is_value_only = iteration < args.value_only_iterations
            since = iteration if is_value_only else iteration - args.value_only_iterations
            warmed_up = (since * updates + update + 1) / max(args.warmup_iterations * updates, 1)
            anneal(optimizer, remaining * min(warmed_up, 1))  # [R23] without warm-up Adam's first steps are the largest
            optimizer.zero_grad()
            stats = torch.zeros(len(names), device=args.device)
            parts = zip(in_parts(mb, args.micro_batch_size), in_parts(mb_advantages, args.micro_batch_size))
            for rows, advantage in parts:
                m = mask[rows]
                logits = policy_logits(policy, whole[rows], whole_mask[rows], T)
                logprob = token_logprobs(logits, tokens[rows], args.temperature)
                entropy = masked_mean(token_entropy(logits, args.temperature), m)
                value = response_values(value_model, policy, whole[rows], whole_mask[rows], T)
                policy_loss = clipped_policy_loss(logprob, old_logprobs[rows], advantage, m, args.clip_coef)
                value_loss = clipped_value_loss(value, values[rows], returns[rows], m, args.value_clip)
                loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
                share = m.sum() / mask[mb].sum()  # by tokens: a plain mean would weigh short responses more
                (loss * share).backward()
                with torch.no_grad():
                    log_ratio = logprob - old_logprobs[rows]
                    k3 = masked_mean(log_ratio.expm1() - log_ratio, m)
                    clipfrac = masked_mean((log_ratio.expm1().abs() > args.clip_coef).float(), m)
                    ratio = masked_mean(log_ratio.exp(), m)
                    stats += share * torch.stack([policy_loss, value_loss, entropy, k3, clipfrac, ratio])
            run.check_finite(stats, "ppo", iteration)
            losses.append(stats)
            if args.target_kl is not None and stats[names.index("policy/approx_kl")] > args.target_kl:
                break  # before this step is taken; training continues with the next rollout
            if args.ptx_coef:  # [R21]
                batch = [texts[i] for i in ptx_order[iteration * updates + update]]
                sft_backward(args, policy, tokenizer, batch, args.ptx_coef)
            if is_value_only:
                policy.zero_grad()  # [R29] Adam passes over weights without a gradient, not over those with zeros
            for module in modules.values():
                nn.utils.clip_grad_norm_(module.parameters(), args.max_grad_norm)
            optimizer.step()
        clock.append(time.perf_counter())

        # 6. Metrics. The losses are means over all minibatches
        for phase, begin, end in zip(("sample", "score", "update"), clock, clock[1:]):
            run.seconds[f"ppo {phase}"] = run.seconds.get(f"ppo {phase}", 0.0) + end - begin
        row = describe(rollout, ref_logprobs, scores, gold, tokenizer.eos_token_id)
        row |= cures.after_update(iteration, rollout, gold, tokenizer, run)
        row |= dict(zip(names, torch.stack(losses).mean(0).tolist()))
        row["objective/rlhf_reward"] = float(rlhf_reward.mean())
        row["objective/kl_coef"] = controller.kl_coef
        row["time/tokens_per_second"] = float(mask.sum()) / (clock[-1] - clock[0])
        if args.adaptive_kl and not is_value_only:
            controller.update(row["objective/kl"], len(tokens))
        shown = {
            name.split("/")[1]: f"{row[name]:.2f}"
            for name in ("objective/scores", "objective/gold", "objective/kl")
            if name in row
        }
        bar.set_postfix(shown, refresh=False)
        run.log("ppo", iteration + 1, row)
        more = {"kl_coef": controller.kl_coef, **cures.state()}
        run.checkpoint("ppo", iteration + 1, args.ppo_iterations, modules | cures.modules, optimizer, **more)
    for name, model in {"policy": policy, **cures.modules}.items():
        save_model(run.dir / name, model, tokenizer)
    if not isinstance(value_model, nn.Linear):
        save_model(run.dir / "value", value_model, tokenizer)


# ---- All stages ----


def train(args: Args) -> list[dict]:
    """Run the stages, then compare the policies before and after. Returns the metrics of each step, oldest first."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()

    # 1. Settings
    saved = load(Path(args.resume) / "checkpoint.pt", "stage", "modules", "metrics") if args.resume else None
    if saved:
        check_resumed(args, saved)
    check_device(args.device)
    torch.set_num_threads(args.torch_threads)
    # mps lacks a deterministic form of some operations: there it warns instead of refusing
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=args.device.startswith("mps"))
    torch.utils.deterministic.fill_uninitialized_memory = False  # this debugging aid writes every new tensor twice

    if args.judge:
        read_constitution(args)  # a mistake in it is reported now, not after stage 1

    # 2. Texts and pairs. A tenth of the rows is held out
    rows = load_rows(args)
    tenth = -(-len(rows) // 10)
    texts, pairs = texts_and_pairs(rows[tenth:], args, "nine tenths to learn from")
    held_out_texts, held_out_pairs = texts_and_pairs(rows[:tenth], args, "tenth that is held out")
    report_short_texts(args, len(rows), len(texts) + len(held_out_texts))

    # 3. The model that stage 1 trains
    torch.manual_seed(args.seed)
    policy, tokenizer = start_model(args, args.model, texts)
    check_layers(args, policy)

    # 4. Run directory, logs
    run_dir = Path(args.resume or args.run_dir or new_run_dir(args))
    if run_dir.exists() and not saved:
        make_run_dir(run_dir)  # it is refused now, not after the judge's work
    if args.track:
        start_wandb(args, run_dir)
    run = Run(args, run_dir, saved, saved["metrics"] if saved else [], saved["seconds"] if saved else {})

    # 5. Preferences and revisions of a judge, if they are asked for
    texts, pairs = ask_judge(args, run, texts, pairs)

    # 6. Tokens
    text_ids, held_out_ids = (encode(tokenizer, part, args.max_length) for part in (texts, held_out_texts))
    pair_ids, held_out_pair_ids = (encode_pairs(tokenizer, part, args.max_length) for part in (pairs, held_out_pairs))
    room = policy.config.max_position_embeddings - args.response_length
    prompts, eval_prompts = ([prompt for prompt, _ in part if len(prompt) <= room] for part in (text_ids, held_out_ids))
    check_lengths(args, text_ids + held_out_ids, prompts, eval_prompts, room, tokenizer.eos_token_id)
    eval_prompts = eval_prompts[: args.eval_prompts]

    # 7. The stages. Those before the stage of the checkpoint are done
    stages = args.stages[args.stages.index(saved["stage"]) :] if saved else args.stages
    sft_dir, names, gold_name = model_dirs(args, run_dir)
    for stage in stages:
        if stage == "sft":
            train_sft(args, run, policy, tokenizer, text_ids, held_out_ids)
        elif stage != "ppo":
            policy, tokenizer = start_model(args, sft_dir)
            half = len(pair_ids) // 2 if args.train_gold else len(pair_ids)
            own_pairs = pair_ids[half:] if stage == "gold" else pair_ids[:half]
            train_reward(args, run, stage, policy, tokenizer, own_pairs, held_out_pair_ids, eval_prompts)
    if "ppo" in stages:
        policy, tokenizer = start_model(args, sft_dir)
        reference = frozen(start_model(args, sft_dir)[0])
        reward_models = [frozen(with_bottleneck(load_reward_model(args, name, tokenizer), name)) for name in names]
        gold_model = frozen(load_reward_model(args, gold_name, tokenizer)) if gold_name else None
        value_model = load_reward_model(args, names[0], tokenizer)  # [R20] it begins as the reward model
        if args.share_backbone:
            value_model = nn.Linear(policy.config.hidden_size, 1, device=args.device)
            nn.init.zeros_(value_model.weight)  # [R10]
            nn.init.zeros_(value_model.bias)
        judges = reference, reward_models, gold_model
        train_ppo(args, run, policy, value_model, *judges, tokenizer, prompts, text_ids)

        # 8. The policies before and after, on held-out prompts
        before, row = rate_policy(args, reference, *judges, tokenizer, eval_prompts)
        run.log("eval", 0, row)
        after, row = rate_policy(args, policy, *judges, tokenizer, eval_prompts)
        run.log("eval", args.ppo_iterations, row)
        draw_curves(run.metrics, run_dir / "curves.png")
        print_comparison(run.metrics, before, after)
        print(f"\ncurves      {run_dir / 'curves.png'}")

    # 9. Summary
    run.writer.close()
    with written_aside(run_dir / "metrics.jsonl") as path:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in run.metrics), encoding="utf-8")
    print_summary(args, run, sft_dir, time.perf_counter() - started)
    return run.metrics


# ==== Machinery: files, logs, the judge, cures of reward hacking. A first reader can stop here ====


# ---- Models and tokenizers from disk ----


def model_dirs(args, run_dir):
    """Where a run's models are: that of stage 1, the list of its reward models, the gold model or None."""
    rewards = args.reward_model or [str(run_dir / stage) for stage in args.stages if stage.startswith("reward")]
    gold = args.gold_model or (str(run_dir / "gold") if args.train_gold else None)
    return str(run_dir / "sft") if "sft" in args.stages else args.model, rewards, gold


def from_disk(kind, name, **options):
    """transformers' AutoTokenizer, AutoModelForCausalLM, … of a Hub id or a directory."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be loaded as {kind}: {str(error).strip().splitlines()[0]}") from error


def new_tokenizer(texts):
    """A byte-level BPE like GPT-2's, trained on the texts. Its padding token is not EOS [R2]."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    eos, pad = "<|endoftext|>", "<|pad|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # all 256 bytes, so that every text can be encoded
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[eos, pad], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, bos_token=eos, pad_token=pad)


def check_model(args, name, model, tokenizer):
    """Refuse a model that this script cannot train."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(f"{name} is an adapter: merge it into its model first, by PEFT's merge_and_unload()")
    if model.config.model_type != "gpt2":
        raise InputError(f"{name} is a model of type {model.config.model_type}: this script trains GPT-2 only")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{name}: its tokenizer has no EOS token, so no response could ever end")
    context = model.config.max_position_embeddings
    if args.max_length > context or args.response_length >= context:
        raise InputError(
            f"--max-length {args.max_length} and --response-length {args.response_length} must fit into the context "
            f"of {context} tokens that {name} has"
        )


def load_reward_model(args, name, tokenizer):
    """A reward model from disk. It must have a trained head and the vocabulary of the policy."""
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, info = from_disk("AutoModelForSequenceClassification", name, **options)
    if info["missing_keys"] or model.config.num_labels != 1:
        raise InputError(f"{name} is not a reward model: it has no trained head with one output")
    if from_disk("AutoTokenizer", name).get_vocab() != tokenizer.get_vocab():
        raise InputError(f"{name} has another vocabulary than the policy: the reward model would read other words")
    return without_dropout(model).to(args.device)


def fit_to_tokenizer(model, tokenizer):
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id


# ---- Data sets ----

ROW = "number of the row"  # a column that read_data_set adds, to name a row in a message


def read_data_set(args):
    """num_texts rows of --dataset in random order. Each has a text and a label, or a chosen and a rejected text."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its messages about a file are replaced by those below
    path = Path(args.dataset)
    form = {"jsonl": "json"}.get(path.suffix.lstrip("."), path.suffix.lstrip("."))
    source = {"path": form, "data_files": args.dataset} if path.is_file() else {"path": args.dataset}
    try:
        if path.is_file() and not path.stat().st_size:
            raise ValueError("the file is empty")
        rows = datasets.load_dataset(**source, split="train", streaming=True)
        rows = rows.map(lambda batch, i: {ROW: [k + 1 for k in i]}, with_indices=True, batched=True)
        # many sets are sorted by label: their first rows would all be of one class
        buffer_size = 1_000_000 if path.is_file() else 50_000  # rows to download first from the Hub
        rows = list(rows.shuffle(seed=args.seed, buffer_size=buffer_size).take(args.num_texts))
        random.Random(args.seed).shuffle(rows)  # the buffer yields earlier rows first, and the first tenth is held out
    except Exception as error:
        reason = broken_line(path) or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--dataset {args.dataset} cannot be read: {reason}") from error
    if len(rows) < 10:
        raise InputError(f"--dataset {args.dataset} has {len(rows)} rows; at least 10 are needed: a tenth is held out")
    labelled, paired = [args.text_column, args.label_column], ["chosen", "rejected"]
    columns = [name for name in rows[0] if name != ROW]
    if not any(set(needed) <= set(columns) for needed in (labelled, paired)):
        raise InputError(
            f"--dataset {args.dataset} has the columns {', '.join(columns)}; needed are {' and '.join(labelled)} "
            f"(--text-column, --label-column), or {' and '.join(paired)}"
        )
    is_labelled = set(labelled) <= set(columns)
    texts = [args.text_column] if is_labelled else [*paired, *{"prompt"} & set(columns)]
    for row in rows:
        where = f"--dataset {args.dataset}, row {row[ROW]}"
        for name in texts:
            if not isinstance(row[name], str) or not row[name].strip():
                raise InputError(f"{where}: {name} must hold texts, found {row[name]!r}")
        if is_labelled and row[args.label_column] not in (0, 1):
            raise InputError(f"{where}: labels must be 0 and 1, found {row[args.label_column]!r}")
        if not is_labelled and "prompt" not in columns and not all(DIALOGUE.fullmatch(row[name]) for name in paired):
            raise InputError(f"{where}: neither a column prompt nor 'Assistant:' in each text")
    return rows


def report_short_texts(args, num_rows, num_texts):
    """Print how many texts are left out because they have no response."""
    num_short = num_rows - num_texts
    if num_short:
        print(f"data        {num_short:,} of {num_rows:,} texts have no more than {args.prompt_words} words: left out")


def check_lengths(args, encoded, prompts, eval_prompts, room, eos_id):
    """Print how many responses are cut and how many prompts stage 3 leaves out. Without any prompt, refuse."""
    responses = [response for _, response in encoded]
    if num_cut := sum(response[-1:] != [eos_id] for response in responses):
        where = f"at --max-length {args.max_length}, {responses.count([]):,} of them whole"
        print(f"data        {num_cut:,} of {len(responses):,} responses are cut {where}")
    if num_over := len(responses) - len(prompts + eval_prompts):
        print(f"data        {num_over:,} prompts are longer than {room} tokens: stage 3 leaves them out")
    if not prompts or not eval_prompts:
        raise InputError(
            f"every prompt is longer than {room} tokens: --response-length {args.response_length} leaves no more of a "
            f"context of {room + args.response_length}"
        )


def broken_line(path):
    """What is wrong with the first broken line in a file of JSON lines; None for any other file.

    The library datasets would count from 0, in the part of the file that it reads at once.
    """
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return None
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.startswith("["):
                return None  # the file is one JSON array
            try:
                json.loads(line.strip() or "0")
            except ValueError as error:
                return f"line {number} is not JSON: {str(error).partition(': line')[0]}"


# ---- A judge instead of labels: Constitutional AI ----


PRINCIPLES = (
    "Prefer the review that is glad about the film.",
    "Prefer praise to complaint.",
)


def read_constitution(args):
    if args.constitution is None:
        return list(PRINCIPLES)
    try:
        lines = Path(args.constitution).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--constitution {args.constitution} cannot be read as text: {error}") from error
    principles = [line.strip() for line in lines if line.strip()]
    if not principles:
        raise InputError(f"--constitution {args.constitution} holds no principle")
    return principles


def load_judge(args):
    tokenizer = from_disk("AutoTokenizer", args.judge)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless here: nothing is learned, and masks are explicit
    model = from_disk("AutoModelForCausalLM", args.judge, dtype=torch.float32)
    return frozen(without_dropout(model)).to(args.device), tokenizer


def chat_ids(tokenizer, request, answer=""):
    """Token list of a request in the judge's chat template, followed by the beginning of its answer."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": request}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = f"{request}\n\n"
    return tokenizer(text + answer, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def judge_margins(judge, tokenizer, pairs, principles, batch_size):
    """ln P(first is better) − ln P(second is better) for pairs of texts, (N,), in nats.

    The judge answers "A" or "B", and the log-probabilities of the two letters count (Bai et al. 2022 §4.1). Each pair
    is shown in both orders and the two answers are averaged. A small judge often prefers the letter A to the letter
    B more than one text to the other; in the average this preference cancels.
    """
    rules = "\n".join(f"- {principle}" for principle in principles)
    question = "Which text is better by these principles? Answer with A or B."
    form = f"Two texts:\n\nA: {{}}\n\nB: {{}}\n\nPrinciples:\n{rules}\n\n{question}"
    shown = [form.format(a.strip(), b.strip()) for pair in pairs for a, b in (pair, pair[::-1])]
    prompts = [chat_ids(tokenizer, request, "The better text is") for request in shown]
    letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in "AB"]
    margins = []
    for part in in_parts(prompts, batch_size):
        tokens, mask = pad(part, tokenizer.pad_token_id, judge.device, "left")
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = judge(tokens, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits[:, -1]
        margins.append(logits[:, letters[0]] - logits[:, letters[1]])
    first_shown_first, first_shown_second = torch.cat(margins).view(-1, 2).T
    return (first_shown_first - first_shown_second) / 2


def label_by_judge(args, pairs):
    """judge_pairs pairs with the text first that the judge prefers, and the share on which the data agrees."""
    judge, tokenizer = load_judge(args)
    pairs = pairs[: args.judge_pairs]
    texts = [("".join(chosen), "".join(rejected)) for chosen, rejected in pairs]
    margins = judge_margins(judge, tokenizer, texts, read_constitution(args), args.micro_batch_size)
    relabelled = [pair if margin > 0 else pair[::-1] for pair, margin in zip(pairs, margins.tolist())]
    return relabelled, float((margins > 0).float().mean())


@torch.no_grad()
def judge_answers(judge, tokenizer, requests, batch_size, max_new_tokens=64):
    """The judge's greedy answers to requests (texts)."""
    pad_id, answers = tokenizer.pad_token_id, []
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": pad_id}
    for part in in_parts(requests, batch_size):
        tokens, mask = pad([chat_ids(tokenizer, request) for request in part], pad_id, judge.device, "left")
        output = judge.generate(tokens, attention_mask=mask, **options)
        answers += tokenizer.batch_decode(output[:, tokens.shape[1] :], skip_special_tokens=True)
    return [" ".join(answer.split()) for answer in answers]


def revise_by_judge(args, texts):
    """judge_pairs texts that the judge criticised and rewrote, with their prompts kept (Bai et al. 2022 §3.1)."""
    judge, tokenizer = load_judge(args)
    texts = texts[: args.judge_pairs]
    rules = " ".join(read_constitution(args))
    requests = [
        f"Text: {''.join(text).strip()}\n\nIn one sentence, say where this text goes against: {rules}" for text in texts
    ]
    critiques = judge_answers(judge, tokenizer, requests, args.micro_batch_size)
    requests = [
        f"Text: {''.join(text).strip()}\n\nCritique: {critique}\n\nRewrite the text in one sentence so that it keeps "
        f"to: {rules} Begin with the words: {text[0].strip()}"
        for text, critique in zip(texts, critiques)
    ]
    revised = []
    for (prompt, _), revision in zip(texts, judge_answers(judge, tokenizer, requests, args.micro_batch_size)):
        rest = revision.removeprefix(prompt.strip()).strip()
        if rest:
            revised.append((prompt, f" {rest}"))
    return revised, critiques


def ask_judge(args, run, texts, pairs):
    """Texts and pairs, revised or relabelled by the judge if --sft-data or --preferences ask for it."""
    if args.preferences == "ai" and "reward" in args.stages:
        run.claim()
        pairs, agreement = kept_in(run.dir / "preferences.json", label_by_judge, args, pairs)
        print(f"judge       agrees with the data on {agreement:.1%} of {len(pairs)} pairs: {run.dir}/preferences.json")
    if args.sft_data == "critique" and "sft" in args.stages:
        run.claim()
        texts, _ = kept_in(run.dir / "revisions.json", revise_by_judge, args, texts)
        print(f"judge       revised {len(texts)} texts: {run.dir}/revisions.json")
    return texts, pairs


def kept_in(path, ask, *arguments):
    """The result of ask(*arguments), kept in the file path: a resumed run does not ask the slow judge again."""
    if not path.is_file():
        content = json.dumps(ask(*arguments), ensure_ascii=False, indent=1)
        with written_aside(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


# ---- Against reward hacking ----

KNOWN_RESPONSES = 1000  # of stage 1's policy, at least, from which mean and covariance of the latent vectors are taken


def bottleneck_kl(mean, log_variance):
    """KL( N(μ, diag σ²) ‖ N(0, I) ) = ½ Σ (μ² + σ² − 1 − ln σ²) [R24]: both (B, k) → (B,), in nats.

    It is the price of what a reward model's latent vector says about a text (Miao et al. 2024, InfoRM).
    """
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(-1)


def mahalanobis_distance(latents, mean, covariance):
    """√((s − m)ᵀ Σ⁻¹ (s − m)) of each row s of latents (B, k) [R25]; mean (k,), covariance (k, k) → (B,).

    It is a distance in standard deviations of the known texts. Its square has the mean k over the texts that m and the
    biased Σ were taken from.
    """
    gap = latents - mean
    return (gap * torch.linalg.solve(covariance, gap.T).T).sum(-1).sqrt()


def energy_loss(states_in, states_out, mask):
    """Mean over a response's tokens of ‖h_in‖₁ − ‖h_out‖₁ [R26]: both (B, T, d), mask (B, T) → (B,).

    h_in enters the last layer and h_out leaves it (Miao et al. 2025, "The Energy Loss Phenomenon in RLHF"). A row
    without a token has 0.
    """
    mask = mask.bool()
    before, after = (torch.where(mask.unsqueeze(-1), states, 0.0).abs().sum(-1) for states in (states_in, states_out))
    return (before - after).sum(-1) / mask.sum(-1).clamp(min=1)


class RunningScale:
    """Scores less their mean, divided by their standard deviation, both over all scores so far, cut to ±clip [R27].

    PPO-max (Zheng et al. 2023) does this before the KL penalty is added. The standard deviation is biased.
    """

    def __init__(self, clip):
        self.clip, self.count, self.mean, self.squares = clip, 0, 0.0, 0.0

    def update(self, scores):
        """Add scores (B,) to the record, and return them scaled and cut, (B,)."""
        n, mean = len(scores), float(scores.mean())
        moved, total = mean - self.mean, self.count + n
        self.squares += float(((scores - mean) ** 2).sum()) + moved**2 * self.count * n / total  # around the new mean
        self.mean, self.count = self.mean + moved * n / total, total
        std = max((self.squares / total) ** 0.5, 1e-6)
        return ((scores - self.mean) / std).clamp(-self.clip, self.clip)


class Bottleneck(nn.Module):
    """InfoRM's head: hidden state (B, d) → a Gaussian over k latent dimensions → one score.

    While training, the latent vector is drawn from the Gaussian. For scoring it is the Gaussian's mean. Both layers
    are linear, so this score is linear in the hidden state, and merge_bottleneck() makes it the model's plain head: the
    directory loads everywhere as any reward model does. known_mean and known_covariance describe the latent vectors of
    stage 1's responses.
    """

    def __init__(self, width, k):
        super().__init__()
        self.encoder = nn.Linear(width, 2 * k, bias=False)  # μ, then ln σ²
        self.head = nn.Linear(k, 1, bias=False)
        nn.init.normal_(self.encoder.weight, std=(width + 1) ** -0.5)
        nn.init.normal_(self.head.weight, std=(k + 1) ** -0.5)
        self.register_buffer("known_mean", torch.zeros(k))
        self.register_buffer("known_covariance", torch.eye(k))


def bottleneck_of(model):
    return getattr(model, "bottleneck", None)


def latent_gaussian(model, tokens, mask):
    """(mean, log-variance), both (B, k), of a reward model's bottleneck at the last real token."""
    hidden = hidden_states(model, tokens, mask)
    last = hidden.gather(1, last_real(mask).view(-1, 1, 1).expand(-1, 1, hidden.shape[-1]))[:, 0]
    return model.bottleneck.encoder(last).chunk(2, -1)


def training_scores(args, model, tokens, mask):
    """(B,) scores that stage 2 learns from, and the bottleneck's loss, a scalar; 0 for a model without one."""
    if bottleneck_of(model) is None:
        return reward_scores(model, tokens, mask), 0.0
    mean, log_variance = latent_gaussian(model, tokens, mask)
    latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
    scores = (model.bottleneck.head(latents).squeeze(-1) - model.config.reward_mean) / model.config.reward_std
    return scores, args.bottleneck_coef * bottleneck_kl(mean, log_variance).mean()


@torch.no_grad()
def merge_bottleneck(model):
    """Make the plain head of a reward model that of its bottleneck: head · μ is one row over the hidden state."""
    if bottleneck_of(model) is not None:
        to_mean, _ = model.bottleneck.encoder.weight.chunk(2)
        model.score.weight.copy_(model.bottleneck.head.weight @ to_mean)


@torch.no_grad()
def finish_bottleneck(args, model, policy, tokenizer, prompts):
    """At the end of stage 2: merge the bottleneck, keep mean and covariance of the latents of stage 1's responses."""
    if bottleneck_of(model) is None:
        return
    merge_bottleneck(model)
    enough = prompts * -(-KNOWN_RESPONSES // len(prompts))
    rollouts = [roll_out(args, policy, tokenizer, part) for part in in_parts(enough, args.batch_size)]
    latents = torch.cat([latent_gaussian(model, rollout.whole, rollout.whole_mask)[0] for rollout in rollouts])
    gaps = latents - latents.mean(0)
    model.bottleneck.known_mean.copy_(latents.mean(0))
    ridge = 1e-6 * torch.eye(latents.shape[1], device=latents.device)  # a dimension that no text uses has variance 0
    model.bottleneck.known_covariance.copy_(gaps.T @ gaps / len(gaps) + ridge)


@torch.no_grad()
def latent_distance(model, rollout):
    """(B,) Mahalanobis distance of the responses' latent vectors from those of stage 1's responses."""
    latents, _ = latent_gaussian(model, rollout.whole, rollout.whole_mask)
    return mahalanobis_distance(latents, model.bottleneck.known_mean, model.bottleneck.known_covariance)


def outlier_index(rollout, reward_models):
    """Mean squared distance of the responses' latent vectors, divided by k: 1 for stage 1's responses.

    It is that of the first reward model, as a dict of one metric. Without a bottleneck the dict is empty.
    """
    bottleneck = bottleneck_of(reward_models[0])
    if bottleneck is None:
        return {}
    squared = latent_distance(reward_models[0], rollout) ** 2
    return {"objective/outlier_index": float(squared.mean()) / len(bottleneck.known_mean)}


def with_bottleneck(model, name):
    """The reward model with the bottleneck that lies in its directory, if one does."""
    path = Path(name) / "bottleneck.pt"
    if path.is_file():
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            model.bottleneck = Bottleneck(model.config.hidden_size, len(weights["known_mean"])).to(model.device)
            model.bottleneck.load_state_dict(weights)
        except Exception as error:
            raise InputError(f"{path} is no bottleneck of this reward model, or is damaged") from error
    return model


@torch.no_grad()
def response_energy(model, rollout, length):
    """(B,) energy loss of a GPT-2's last layer over the states from which a response's tokens are predicted."""
    kept = []
    hook = model.base_model.h[-1].register_forward_hook(lambda block, given, made: kept.extend((given[0], made)))
    hidden_states(model, rollout.whole, rollout.whole_mask)
    hook.remove()
    before, after = (states[:, -length - 1 : -1] for states in kept)
    return energy_loss(before, after, rollout.mask)


def compare_energy(args, policy, reference, tokenizer, rollout):
    """(B,) |ΔE_ref(x) − ΔE_policy(x)|: each model reads its own response, so the reference answers the queries too."""
    Q = rollout.whole.shape[1] - args.response_length
    queries = [tokens[:Q][mask[:Q].bool()].tolist() for tokens, mask in zip(rollout.whole, rollout.whole_mask)]
    own = roll_out(args, reference, tokenizer, queries)
    gap = response_energy(reference, own, args.response_length) - response_energy(policy, rollout, args.response_length)
    return gap.abs()


def check_layers(args, policy):
    layers = policy.config.n_layer
    if args.freeze_layers >= layers:
        raise InputError(f"--freeze-layers {args.freeze_layers} leaves nothing to train: the model has {layers} layers")


def freeze_lower_layers(policy, count):
    """Exclude the first `count` layers from training, and the embeddings, which GPT-2 shares with its output head."""
    if count:
        for module in (policy.base_model.wte, policy.base_model.wpe, *policy.base_model.h[:count]):
            frozen(module)


def judged_pairs(rollout, gold):
    """Pairs (chosen, rejected) of token lists: the truly best response with the truly worst, the second best with the
    second worst, and so on. Pairs that are equally good are left out. gold (B,) is the truth."""
    texts = [tokens[mask.bool()].tolist() for tokens, mask in zip(rollout.whole, rollout.whole_mask)]
    order = gold.argsort(stable=True).tolist()
    pairs = zip(order[::-1], order[: len(order) // 2])
    return [(texts[best], texts[worst]) for best, worst in pairs if gold[best] > gold[worst]]


class Cures:
    """What the flags against reward hacking keep between the iterations of stage 3; all of it is in the checkpoint."""

    def __init__(self, args, reward_models):
        self.args, self.reward_models, self.running = args, reward_models, RunningScale(args.reward_clip)
        self.row = {}  # metrics of the iteration
        if args.outlier_coef and bottleneck_of(reward_models[0]) is None:
            raise InputError(
                "--outlier-coef needs a reward model with a bottleneck: train one with --reward-bottleneck 8"
            )
        self.modules = {}  # the reward models that go on learning
        if args.reward_update_every:
            self.modules = {
                f"updated_reward{k if k > 1 else ''}": model for k, model in enumerate(reward_models, start=1)
            }
            rates = [(model.requires_grad_(), args.rate("reward_learning_rate", model)) for model in reward_models]
            self.optimizer = new_optimizer(*rates)

    def state(self):
        kept = {"reward_scale": [self.running.count, self.running.mean, self.running.squares]}
        return kept | ({"reward_optimizer": self.optimizer.state_dict()} if self.modules else {})

    def load_state(self, saved):
        """Continue from a checkpoint of stage 3, or begin if it is None."""
        if saved is not None:
            self.running.count, self.running.mean, self.running.squares = saved.get("reward_scale", (0, 0.0, 0.0))
            if self.modules:
                self.optimizer.load_state_dict(saved["reward_optimizer"])

    def scale(self, scores, policy, reference, tokenizer, rollout):
        """(B,) scores, scaled by --reward-clip, less what --outlier-coef and --energy-coef take off."""
        scaled = scores if self.args.reward_clip is None else self.running.update(scores)
        if self.args.outlier_coef:
            scaled = scaled - self.args.outlier_coef * latent_distance(self.reward_models[0], rollout)
        if self.args.energy_coef:
            gap = compare_energy(self.args, policy, reference, tokenizer, rollout)
            self.row["objective/energy_gap"] = float(gap.mean())
            scaled = scaled - self.args.energy_coef * gap
        return scaled

    def after_update(self, iteration, rollout, gold, tokenizer, run):
        """The metrics of an iteration, after the update of the reward models, if one is due [R28].

        They learn from the policy's responses, which the truth labels. Where all responses are equally good there is
        nothing to learn.
        """
        row = self.row | outlier_index(rollout, self.reward_models)
        every = self.args.reward_update_every
        if not every or (iteration + 1) % every:
            return row
        pairs = judged_pairs(rollout, gold)
        row["reward_update/pairs"] = len(pairs)
        if pairs:
            size = min(self.args.reward_batch_size, len(pairs))
            seed = stage_seed(self.args, f"reward update {iteration}")
            order = epochs_of(len(pairs), self.args.reward_update_steps, size, seed)
            steps = [self.learn([pairs[i] for i in batch], tokenizer) for batch in order]
            loss, accuracy = torch.tensor(steps).mean(0)
            run.check_finite(loss, "ppo", iteration)
            row |= {"reward_update/loss": float(loss), "reward_update/accuracy": float(accuracy)}
        return row

    def learn(self, pairs, tokenizer):
        """One gradient step of every reward model on the same pairs: means over the models of (loss, accuracy)."""
        self.optimizer.zero_grad()
        total, right, share = 0.0, 0.0, 1 / len(pairs)
        for model in self.reward_models:
            for part in in_parts(pairs, self.args.micro_batch_size):
                both = [chosen for chosen, _ in part] + [rejected for _, rejected in part]
                tokens, mask = pad(both, tokenizer.pad_token_id, self.args.device)
                scores, bottleneck = training_scores(self.args, model, tokens, mask)
                chosen, rejected = scores.chunk(2)
                loss = (preference_loss(chosen, rejected) + bottleneck) * len(part) * share
                loss.backward()
                total += float(loss.detach())
                right += float((chosen > rejected).sum()) * share
            nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        for model in self.reward_models:
            merge_bottleneck(model)
        return total / len(self.reward_models), right / len(self.reward_models)


# ---- Evaluation ----


@torch.no_grad()
def perplexity(args, model, tokenizer, texts):
    total, count = 0.0, 0
    for batch in in_parts(texts, args.micro_batch_size):
        tokens, mask = pad([prompt + response for prompt, response in batch], tokenizer.pad_token_id, args.device)
        learned = learned_tokens(batch, mask, args.mask_prompt)
        total += float(sft_loss(model, tokens, mask, learned))
        count += int(learned[:, 1:].sum())
    return float(torch.tensor(total / max(count, 1)).exp())


@torch.no_grad()
def score_texts(args, model, tokenizer, sequences):
    """(N,) scores of token lists."""
    batches = (pad(part, tokenizer.pad_token_id, args.device) for part in in_parts(sequences, args.micro_batch_size))
    return torch.cat([reward_scores(model, *batch) for batch in batches])


def calibration_error(margins, bins=10):
    """Expected calibration error of σ(|margin|) as a probability of being right. margins (N,) are above 0 if right."""
    confidence, right = margins.abs().sigmoid(), (margins > 0).float()
    bin_of = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = [(confidence[bin_of == b] - right[bin_of == b]).sum().abs() for b in range(bins)]
    return float(sum(gaps) / len(margins))


def distinct_2(responses):
    """Number of different pairs of neighbouring words, divided by the number of all such pairs (Li et al. 2016)."""
    pairs = [pair for response in responses for pair in zip(response.split(), response.split()[1:])]
    return len(set(pairs)) / max(len(pairs), 1)


def describe(rollout, ref_logprobs, scores, gold, eos_id):
    """Means over the responses: score, KL, truth, length, and the share that ends with EOS."""
    kl = torch.where(rollout.mask.bool(), rollout.logprobs - ref_logprobs, 0.0).sum(-1)
    row = {
        "objective/scores": scores,
        "objective/kl": kl,  # of a whole response, nats
        "objective/gold": gold,
        "response/length": rollout.mask.sum(-1),
        "response/eos_rate": (rollout.tokens == eos_id).any(-1),
    }
    return {name: float(values.float().mean()) for name, values in row.items() if values is not None}


def rate_policy(args, policy, reference, reward_models, gold_model, tokenizer, prompts):
    """(texts, means) of the policy's responses to held-out prompts, always sampled with the same random numbers."""
    torch.manual_seed(stage_seed(args, "rate"))
    texts, rows = [], []
    for part in in_parts(prompts, args.batch_size):
        rollout = roll_out(args, policy, tokenizer, part)
        judged = judge_rollout(args, rollout, reference, reward_models, gold_model)
        row = describe(rollout, *judged, tokenizer.eos_token_id) | outlier_index(rollout, reward_models)
        rows += [row] * len(rollout.texts)
        texts += rollout.texts
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return texts, {**means, "response/distinct_2": distinct_2([response for _, response in texts])}


def draw_curves(metrics, path):
    """PNG of stage 3: score and truth, KL, entropy, length."""
    from matplotlib.figure import Figure

    rows = [row for row in metrics if row["stage"] == "ppo"]
    panels = Figure(figsize=(9, 6), layout="constrained").subplots(2, 2)
    names = (("objective/scores", "objective/gold"), ("objective/kl",), ("policy/entropy",), ("response/length",))
    for axes, lines in zip(panels.flat, names):
        for name in lines:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot([step for step, _ in points], [number for _, number in points], label=name)
        axes.set(xlabel="iteration")
        axes.legend()
    with written_aside(path) as temporary:
        axes.figure.savefig(temporary, dpi=120, format="png")


def print_comparison(metrics, before, after):
    """Print how the policies before and after stage 3 answer held-out prompts: a table, and four answers of each."""
    rows = [row for row in metrics if row["stage"] == "eval"]
    units = {"objective/scores": "mean score", "objective/gold": "truly positive, or the gold model's score"}
    units |= {"objective/kl": "KL to the reference, nats a response", "response/distinct_2": "distinct pairs of words"}
    units |= {"response/length": "tokens a response", "response/eos_rate": "responses that end"}
    units["objective/outlier_index"] = "outlier index, 1 for stage 1's texts"
    print("\n                                              before    after")
    for name, unit in units.items():
        if name in rows[0]:
            print(f"  {unit:42}  {rows[0][name]:7.3f}  {rows[1][name]:7.3f}")
    for (prompt, old), (_, new) in list(zip(before, after))[:4]:
        print(f"\n{prompt}\n  before  {old.strip()}\n  after   {new.strip()}")


def print_summary(args, run, sft_dir, seconds):
    """Print how good the models are, how long the stages took, where everything is, and the next command to try."""
    for row in run.metrics:
        for name in ("sft/perplexity", *(f"{stage}/held_out_accuracy" for stage in args.stages)):
            if name in row:
                print(f"{row['stage']:10}  {name.split('/')[1].replace('_', ' ')} {row[name]:.3f}")
    phases = ", ".join(f"{phase} {share:.1f}" for phase, share in run.seconds.items())
    since = "since it was resumed" if run.saved else "in all"
    print(f"seconds     {seconds:.1f} {since}; the stages: {phases}")
    print(f"models      {', '.join(sorted(path.parent.name for path in run.dir.glob('*/config.json')))} in {run.dir}")
    print(f"logs        tensorboard --logdir {run.dir}")
    sft, reward = shlex.quote(str(sft_dir)), shlex.quote(str(run.dir / "reward"))
    following = {
        "sft": f"reward --model {sft}",
        "reward": f"ppo --model {sft} --reward-model {reward}",
        "all": f"ppo --model {sft} --reward-model {reward} --kl-coef 0 --no-adaptive-kl",
    }
    if args.stage in following:
        given = [name for name in DATA.split() if getattr(args, name) != getattr(Args, name)]
        data = "".join(f" --{name.replace('_', '-')} {shlex.quote(str(getattr(args, name)))}" for name in given)
        print(f"next        python rlhf_gpt2_ppo.py --stage {following[args.stage]}{data}")
    if "ppo" in args.stages:
        question = "The music of this musical" if args.dataset is None else "I think that"
        command = shlex.join(["python", "rlhf_gpt2_ppo.py", "--ask", question, "--run-dir", str(run.dir)])
        print(f"ask         {command}")


# ---- Files, logs, resuming ----

# the settings that --resume may change; any other would make it a different run
CHANGEABLE = "resume device torch_threads checkpoint_every track wandb_project"

# the settings that all stages of one experiment must share
DATA = "dataset text_column label_column num_texts prompt_words max_length seed"


def check_bounds(args):
    """Raise ValueError for the first field that lies outside the bounds in its type. NaN lies outside all."""
    for field in fields(args):
        _, *bounds = get_args(field.type) if hasattr(field.type, "__metadata__") else (None,)
        if bounds and not bounds[1](getattr(args, field.name)):
            raise ValueError(f"{field.name} {bounds[0]}, got {getattr(args, field.name)}")


def check_settings(args):
    """Raise ValueError for settings that do not fit together."""
    if args.batch_size < args.num_minibatches:
        raise ValueError(f"num_minibatches {args.num_minibatches} must not exceed batch_size {args.batch_size}")
    if args.stage in ("reward", "ppo") and args.model is None:
        raise ValueError(f"stage {args.stage} starts from a model: model must name stage 1's, got none")
    if args.stage == "ppo" and not args.reward_model:
        raise ValueError("stage ppo needs reward_model, the directory of at least one, got none")
    if args.stage != "ppo" and (args.reward_model or args.gold_model):
        raise ValueError(f"reward_model and gold_model are for stage ppo; stage {args.stage} trains its own")
    if (args.preferences == "ai" or args.sft_data == "critique") and args.judge is None:
        raise ValueError("preferences ai and sft_data critique need judge, an instruct model, got none")
    if args.adaptive_kl and args.kl_coef == 0:
        raise ValueError("adaptive_kl multiplies kl_coef, which must be above 0, got 0 (--no-adaptive-kl)")
    if args.reward_bottleneck and args.stage in ("sft", "ppo"):
        raise ValueError(f"reward_bottleneck is for stages that train a reward model; stage {args.stage} trains none")
    if args.outlier_coef and args.stage == "all" and not args.reward_bottleneck:
        raise ValueError("outlier_coef needs a reward model with a bottleneck: reward_bottleneck must be above 0")
    if args.reward_update_every and args.dataset is not None and not (args.train_gold or args.gold_model):
        raise ValueError("reward_update_every needs the truth of a response: the grammar's, train_gold or gold_model")
    if args.value_only_iterations >= args.ppo_iterations:
        raise ValueError(f"value_only_iterations must be below ppo_iterations, got {args.value_only_iterations}")
    if "" in (args.model, args.dataset, args.judge, args.resume, args.run_dir):
        raise ValueError("model, dataset, judge, resume and run_dir need a name or a path, got an empty one")
    if args.resume and args.run_dir:
        raise ValueError(f"resume {args.resume} continues in its own directory, not in run_dir {args.run_dir}")
    if args.ask is not None and not args.ask.strip():
        raise ValueError("ask needs the beginning of a text, got an empty one")
    if args.ask is not None and (args.resume or args.track):
        raise ValueError("ask trains nothing: resume and track exclude it")


def check_device(device):
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise InputError(f"--device {device} is not available: {reason}") from error


@contextmanager
def written_aside(path):
    """A temporary path to write to, renamed at the end: whatever happens, the old file or the new one is whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException as error:
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        if isinstance(error, Exception):  # on a full disk torch raises a RuntimeError, and other writers their own
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise OSError(f"{path} could not be written, with {free / 1e6:.1f} MB free: {reason}") from error
        raise


def save(path, content):
    with written_aside(path) as temporary:
        torch.save(content, temporary)


def load(path, *keys):
    """The dict that save() wrote, `keys` among its own; tensors and plain data only: a foreign file can run no code."""
    if not path.is_file():
        raise InputError(f"{path} is not a file: --resume takes a run directory")
    try:
        # without keys only the settings are read, so the weights can stay on the disk
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=not keys)
        content["args"] = Args(**content["args"])
        missing = set(keys) - content.keys()
    except Exception as error:
        raise InputError(f"{path} is no checkpoint of this script, or is damaged") from error
    if missing:
        raise InputError(f"{path} is no checkpoint of this script: it lacks {', '.join(sorted(missing))}")
    return content


def save_model(directory, model, tokenizer):
    """Write a normal transformers directory: first under another name, then renamed, so that it is always complete."""
    with written_aside(directory) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed here
        plain = {name: weights for name, weights in model.state_dict().items() if not name.startswith("bottleneck.")}
        model.save_pretrained(temporary, state_dict=plain)
        if bottleneck_of(model) is not None:  # beside the model, which transformers then loads without a warning
            torch.save(model.bottleneck.state_dict(), temporary / "bottleneck.pt")
        tokenizer.save_pretrained(temporary)


def start_wandb(args, run_dir):
    try:
        import wandb
    except ImportError as error:
        with suppress(OSError):
            run_dir.rmdir()  # still empty
        raise InputError("--track needs Weights & Biases: pip install wandb") from error
    options = {"project": args.wandb_project, "id": run_dir.name, "resume": "allow", "config": asdict(args)}
    try:
        wandb.init(**options, sync_tensorboard=True)  # it watches the writers of TensorBoard that are made from now on
    except Exception as error:  # no API key, no connection, a name that it does not take: it has many exceptions
        with suppress(OSError):
            run_dir.rmdir()  # still empty
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--track: Weights & Biases does not begin: {reason}") from error


@dataclass
class Run:
    """What the stages share: the directory, what was logged, and the checkpoint from which a run is resumed."""

    args: Args
    dir: Path
    saved: dict | None
    metrics: list
    seconds: dict  # of each phase
    is_made: bool = False  # whether its directory exists; it is made before the first file is written

    def claim(self):
        if not self.saved and not self.is_made:
            make_run_dir(self.dir)
        self.is_made = True

    def begin(self, stage, modules, optimizer):
        """Seed the stage and open its log. Returns the first step: 0 unless the checkpoint is of this stage."""
        from torch.utils.tensorboard import SummaryWriter

        self.claim()
        torch.manual_seed(stage_seed(self.args, stage))
        resumed = self.saved is not None and self.saved["stage"] == stage
        first = self.saved["step"] if resumed else 0
        self.writer = SummaryWriter(self.dir / "logs" / stage, purge_step=first + 1 if resumed else None)
        if resumed:
            for name, module in modules.items():
                module.load_state_dict(self.saved["modules"][name])
            optimizer.load_state_dict(self.saved["optimizer"])
            torch.set_rng_state(self.saved["rng"])
            if self.saved["cuda_rng"] is not None and self.args.device.startswith("cuda"):
                torch.cuda.set_rng_state(self.saved["cuda_rng"], self.args.device)
        return first

    def log(self, stage, step, row):
        for name, number in row.items():  # evaluations have curves of their own, apart from the rollouts
            self.writer.add_scalar(f"eval/{name}" if stage == "eval" else name, number, step)
        self.metrics.append({"stage": stage, "step": step, **row})

    def checkpoint(self, stage, step, steps, modules, optimizer, **more):
        """After a step, if a checkpoint is due, save everything that a resumed run needs."""
        every = self.args.checkpoint_every
        if step != steps and (not every or step % every):
            return
        self.writer.flush()
        cuda = self.args.device.startswith("cuda")
        content = {
            "args": asdict(self.args),
            "stage": stage,
            "step": step,
            "modules": {name: module.state_dict() for name, module in modules.items()},
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.args.device) if cuda else None,
            "metrics": self.metrics,
            "seconds": self.seconds,
            **more,
        }
        save(self.dir / "checkpoint.pt", content)

    def check_finite(self, losses, stage, step):
        if not losses.isfinite().all():
            path = self.dir / "checkpoint.pt"
            kept = f"; {path} holds the last good state" if path.exists() else ""
            raise InputError(f"the loss is not finite in step {step} of stage {stage}: lower its learning rate{kept}")


def check_resumed(args, saved):
    """Refuse a changed setting with which --resume would not continue the same run."""
    settings = replace(saved["args"], run_dir=None)
    for name in {field.name for field in fields(Args)} - set(CHANGEABLE.split()):
        given, before = getattr(args, name), getattr(settings, name)
        if given != before:
            raise InputError(f"--resume keeps the run's own {name} {before}; {given} needs a separate run")


def make_run_dir(run_dir):
    """Make the run's own directory. Of two runs that start at once with one name, the second is refused."""
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError as error:
        can_resume = (run_dir / "checkpoint.pt").exists()
        hint = f"--resume {run_dir} resumes it" if can_resume else "choose another"
        raise InputError(f"--run-dir {run_dir} exists: {hint}") from error


def new_run_dir(args):
    name = Path(args.dataset or "grammar").stem
    return f"runs/{name}__{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"


def resumed_args(run_dir):
    """The settings with which train() resumes the run in run_dir."""
    return replace(load(Path(run_dir) / "checkpoint.pt")["args"], resume=str(run_dir), run_dir=None)


# ---- Ask the policies of a run (--ask) ----

NUM_ANSWERS = 4  # of each policy


def newest_run():
    """The directory of the run in runs that ended last, of this script."""
    for policy in sorted(Path("runs").glob("*/policy"), key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(InputError):  # a run of another script
            load(policy.parent / "checkpoint.pt")
            print(f"run         {policy.parent}, the newest in runs")
            return str(policy.parent)
    raise InputError("the directory runs holds no finished run of this script, so a run must be named")


def asked_args(args):
    """The settings of the run whose policies are asked."""
    run_dir = args.run_dir or newest_run()
    if not (Path(run_dir) / "policy").is_dir():
        raise InputError(f"--run-dir {run_dir} has no policy: --ask needs a run whose stage 3 has ended")
    saved = load(Path(run_dir) / "checkpoint.pt")["args"]
    return replace(saved, ask=args.ask, run_dir=str(run_dir), resume=None, track=False)


def ask_policies(args):
    """--ask: how the policies before and after stage 3 continue a text, sampled with the same random numbers.

    Returns a tuple for each response: (before or after, text, score, truth). The truth is judge_rollout()'s.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    check_device(args.device)
    torch.set_num_threads(args.torch_threads)
    sft_dir, names, gold_name = model_dirs(args, Path(args.run_dir))
    reference, tokenizer = start_model(args, sft_dir)
    prompt = tokenizer(args.ask.rstrip(), add_special_tokens=False)["input_ids"]
    room = reference.config.max_position_embeddings - args.response_length
    if len(prompt) > room:
        raise InputError(
            f"--ask: the text has {len(prompt)} tokens, and --response-length leaves {room} of the context"
        )
    policy, _ = start_model(args, str(Path(args.run_dir) / "policy"))
    reward_models = [load_reward_model(args, name, tokenizer) for name in names]
    gold_model = load_reward_model(args, gold_name, tokenizer) if gold_name else None
    answers = []
    for kind, model in (("before", reference), ("after", policy)):
        torch.manual_seed(stage_seed(args, "ask"))
        rollout = roll_out(args, model, tokenizer, [prompt] * NUM_ANSWERS)
        _, scores, truth = judge_rollout(args, rollout, reference, reward_models, gold_model)
        truth = [None] * NUM_ANSWERS if truth is None else truth.tolist()
        answers += [(kind, text, *row) for (_, text), *row in zip(rollout.texts, scores.tolist(), truth)]
    print_responses(args, answers, gold_model is not None)
    return answers


def print_responses(args, answers, has_gold_model):
    """Each response behind the text that was asked, below its score and the truth, wrapped for a terminal."""
    width = max(min(shutil.get_terminal_size().columns, 120), 40)
    for number, (kind, text, score, truth) in enumerate(answers):
        if number % NUM_ANSWERS == 0:
            print(f"\n{kind} stage 3")
        judged = f", gold model's score {truth:+.2f}" if has_gold_model else ", truly positive" if truth else ""
        if truth == 0 and not has_gold_model:
            judged = ", not truly positive"
        print(f"  score {score:+.2f}{judged}")
        whole = "".join(x if x.isprintable() else " " for x in args.ask.rstrip() + text)  # it must not steer a terminal
        print(textwrap.fill(whole, width, initial_indent="    ", subsequent_indent="    "))


# ---- Command line ----


def print_help():
    """Print the flags under the headings that stand in Args, each with what it takes, its comment and its default."""
    width, types = max(shutil.get_terminal_size().columns - 1, 60), get_type_hints(Args)
    print(f"usage: python {Path(__file__).name} [--flag value ...]\n\n{__doc__.splitlines()[0]}")
    for line in inspect.getsource(Args).splitlines():
        name = line.split(":")[0].strip()
        if line.startswith("    # "):
            print(f"\n{line.removeprefix('    # ')}")
        elif name in types:
            kind, flag, default = types[name], name.replace("_", "-"), getattr(Args, name)
            options = get_args(kind)  # int | None takes an int, tuple[str, ...] takes several texts
            kind = options[0] if type(None) in options or ... in options else kind
            takes = f"{{{','.join(get_args(kind))}}}" if get_origin(kind) is Literal else kind.__name__.upper()
            words = f"--{flag}, --no-{flag}" if kind is bool else f"--{flag} {takes}" + " ..." * (... in options)
            text = line.rpartition("  # ")[2] + f" (default: {default})" * (default not in (None, ()))
            if len(words) > 25:
                print(f"  {words}")
                words = ""
            indents = {"initial_indent": f"  {words:26}", "subsequent_indent": " " * 28}
            print(textwrap.fill(text, width, **indents, break_on_hyphens=False, break_long_words=False))


def parse_args():
    """The command line. With --resume and --ask the saved run's settings are the defaults of the other flags."""
    import tyro

    if {"-h", "--help"} & {*sys.argv[1:]}:
        print_help()
        sys.exit(0)
    args = tyro.cli(Args, description=__doc__.splitlines()[0])
    if args.resume:
        return tyro.cli(Args, default=resumed_args(args.resume))
    if args.ask is not None:
        return tyro.cli(Args, default=asked_args(args))
    return args if args.run_dir else replace(args, run_dir=new_run_dir(args))


def guard_output():
    """Print "?" for letters that the terminal lacks. Run to the end when the reader has left (`| head`)."""

    def guarded(stream, method):
        def call(*arguments):
            try:
                return method(*arguments)
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what else is printed goes nowhere

        return call

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
            stream.write, stream.flush = guarded(stream, stream.write), guarded(stream, stream.flush)


def main():
    """Parse the flags and train. A mistake that the user can fix ends in one sentence and exit status 2."""
    guard_output()
    run_dir = None
    try:
        args = parse_args()
        run_dir = args.resume or args.run_dir
        ask_policies(args) if args.ask is not None else train(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        can_resume = run_dir and (Path(run_dir) / "checkpoint.pt").exists()
        print(f"\ninterrupted{f': continue with --resume {run_dir}' if can_resume else ''}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
