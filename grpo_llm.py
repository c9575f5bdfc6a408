# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0",
#     "tokenizers==0.23.3",
#     "datasets==5.2.0",
#     "peft==0.21.2",
#     "bitsandbytes==0.50.2",
#     "math-verify==0.9.0",
#     "tensorboard==2.21.0",
#     "tyro==1.0.17",
#     "tqdm==4.70.1",
#     "matplotlib==3.11.2",
# ]
# ///
"""GRPO for language models: groups of answers instead of a critic, from a toy on a laptop to full size on one GPU.

Teaches  group relative policy optimisation. Its details are tagged [G1]..[G41] where each happens (docs/details.md)
Run      python grpo_llm.py
         python grpo_llm.py --model Qwen/Qwen2.5-1.5B-Instruct --task gsm8k   (it chooses what you do not give)
Read     from here to the heading "Machinery": that is all of GRPO, in its plainest form, and right for any causal
         language model of transformers. Begin with "Equations" and train(), then read what train() calls. Below the
         heading is what makes it fast, large, distributed and restartable: you can stop there (docs/4_grpo.md)
Expect   a small transformer first sees worked sums, until it answers 29 to 61% of new ones. After 100 steps of GRPO it
         answers 84 to 97%, and 96 to 100% with its likeliest words, in 21 runs: 5 seeds, as four processors round.
         A run takes two to four minutes on one thread of an AMD EPYC. SmolLM2-135M goes from a sixth of one-digit
         sums to 82 to 95% in 16 steps (benchmarks/RESULTS.md)
Departs  from the settings of DeepSeekMath. β is 0, not 0.04 (--beta), so no reference model is kept. Groups of 8, not
         64. Learning rate 3e-4, not 1e-6, because the default model is tiny. AdamW's β₂ is 0.95. Each rollout gets one
         gradient step, as there: every ratio is 1, and nothing is clipped until you raise --num-minibatches or
         --num-epochs. Groups without variance are skipped in the update but counted in its averages. That is the same
         gradient in less time

    Âᵢ   = (Rᵢ − mean(R)) / std(R)  over the G answers to one question        DeepSeekMath §4.1.2, outcome supervision
    Âᵢₜ  = Σ of the normalised rewards of the steps that end at t or later     DeepSeekMath §4.1.3, process supervision
    ρᵢₜ  = π(oᵢₜ | q, oᵢ,₍<t₎) / π_old(oᵢₜ | q, oᵢ,₍<t₎)
    k3ᵢₜ = π_ref/π − ln(π_ref/π) − 1                                          DeepSeekMath Eq. 4
    L    = −1/G Σᵢ 1/|oᵢ| Σₜ { min(ρᵢₜ Âᵢₜ, clip(ρᵢₜ, 1−ε_low, 1+ε_high) Âᵢₜ) − β k3ᵢₜ }      DeepSeekMath Eq. 3

Which flags make which algorithm (docs/4_grpo.md has more). Combinations that make no sense are refused:

    GRPO       --reduction sequence --scale group --clip-low 0.2 --clip-high 0.2, the defaults, and --beta above 0
    DAPO       --reduction token --clip-high 0.28 --dynamic-sampling 4 --truncated mask --overlong-buffer 8, --beta 0
    Dr. GRPO   --reduction constant --scale none, --beta 0
    GSPO       --importance sequence --clip-low 3e-4 --clip-high 4e-4, --beta 0

Shapes   P prompts, G completions of each, B = P·G sequences, at most T tokens in a completion. (B, T) are completion
         tokens. Their mask is 1 up to the first EOS, which is included, and 0 after it. A group is G consecutive rows.
"""

import argparse
import ast
import asyncio
import gc
import importlib.util
import inspect
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import unicodedata
import warnings
import weakref
import zlib
from collections import Counter, deque
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from fractions import Fraction
from functools import cache, lru_cache, partial
from io import TextIOWrapper
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

PositiveInt = Annotated[int, "must be above 0", lambda x: x > 0]
PositiveFloat = Annotated[float, "must be above 0", lambda x: x > 0]
NonNegativeInt = Annotated[int, "must not be negative", lambda x: x >= 0]
NonNegativeFloat = Annotated[float, "must not be negative", lambda x: x >= 0]
ChosenInt = Annotated[int | None, "must be above 0", lambda x: x is None or x > 0]  # None: chosen() chooses it
ChosenFloat = Annotated[float | None, "must be above 0", lambda x: x is None or x > 0]


@dataclass(frozen=True)
class Args:
    # what most people set first
    model: str | None = None  # Hub id or directory of a causal language model; default a small one, trained here
    task: Literal["arithmetic", "countdown", "gsm8k", "jsonl"] = "arithmetic"  # questions; the last two need --model
    data: str | None = None  # file of lines {"question", "answer"} for gsm8k, {"prompt", "answer"} for jsonl
    steps: PositiveInt = 100  # rollouts: each samples answers, then learns from them
    learning_rate: ChosenFloat = None  # AdamW's; chosen for you: the larger the model, the smaller
    prompts_per_step: ChosenInt = None  # P, prompts in a rollout, over all processes; chosen for you
    group_size: ChosenInt = None  # G, completions of each prompt; chosen for you
    max_tokens: ChosenInt = None  # T, the most tokens of a completion; chosen for you
    lora_rank: NonNegativeInt = 0  # train LoRA adapters of this rank; the reference then costs no memory
    seed: NonNegativeInt = 1  # seed of weights, problems and samples
    run_dir: str | None = None  # where everything is written; default runs/<task>__<script>__<seed>__<time>
    resume: str | None = None  # directory of a run that was stopped: continue it, with the same bits on a CPU
    # the problems
    terms: PositiveInt = 5  # numbers in a problem of arithmetic or countdown
    max_term: PositiveInt = 9  # the largest number that such a problem may have
    operators: Literal["+", "+-"] = "+"  # signs in a problem of arithmetic
    eval_data: str | None = None  # file of held-out problems, in the form of --data; default some of the problems found
    num_problems: PositiveInt = 20_000  # problems to generate; of a file, the most rows to take, at random
    # the algorithm
    temperature: PositiveFloat = 1.0  # temperature of the sampling, and of every log-probability in training
    num_epochs: PositiveInt = 1  # μ, passes over each rollout
    num_minibatches: PositiveInt = 1  # gradient steps in each pass
    clip_low: NonNegativeFloat = 0.2  # ε_low: below a ratio of 1 − ε_low a bad answer has no gradient
    clip_high: PositiveFloat = 0.2  # ε_high: above a ratio of 1 + ε_high a good answer has no gradient
    beta: NonNegativeFloat = 0.0  # β, weight of the KL to the reference in the loss; with 0 no reference is kept
    scale: Literal["group", "batch", "none"] = "group"  # advantages are divided by the standard deviation of this
    reduction: Literal["sequence", "token", "constant"] = "sequence"  # what the token losses are averaged over
    # the update
    warmup_steps: NonNegativeInt = 0  # rollouts over which the learning rate rises to its value
    anneal_lr: bool = True  # after the warm-up, let the learning rate fall to 0 until the end of the run
    weight_decay: NonNegativeFloat = 0.0  # AdamW's
    max_grad_norm: PositiveFloat = 1.0  # the largest global norm of the gradient; a larger gradient is scaled down
    # the warm start, without --model
    warm_start: PositiveFloat = 0.33  # stop the supervised steps when this share of answers is right
    warm_start_steps: PositiveInt = 2000  # the most supervised steps on worked solutions
    warm_start_batch_size: PositiveInt = 32  # solutions in each of these steps
    warm_start_learning_rate: PositiveFloat = 3e-3  # AdamW's in these steps
    # evaluation
    eval_every: NonNegativeInt = 25  # steps between two evaluations on held-out problems; 0: before and after only
    eval_problems: PositiveInt = 256  # held-out problems
    eval_samples: ChosenInt = None  # n, samples of each held-out problem; chosen for you
    eval_k: PositiveInt = 8  # k of pass@k and maj@k
    # the run
    device: str | None = None  # cpu, cuda, cuda:1 …, or mps, which is untried; chosen for you
    torch_threads: ChosenInt = None  # CPU threads of torch; chosen for you
    keep_memory: bool = True  # on a CPU, use freed memory again, do not give it back to the system; 1.06 times faster
    max_hours: ChosenFloat = None  # after so many hours finish the step, evaluate, save and end; no limit if not given
    checkpoint_every: NonNegativeInt = 25  # steps between two checkpoints; 0: at the end only
    verbose: bool = False  # at each step show the best and the worst completion on the screen
    track: bool = False  # log to Weights & Biases too (pip install wandb)
    wandb_project: str = "grpo-llm"  # project there
    # without training: evaluate models, keep samples of one, ask one
    evaluate: tuple[str, ...] = ()  # models or run directories: print how well they answer, side by side; train nothing
    sample_to: str | None = None  # write right, readable samples of --model, or of the newest run, to this file
    ask: str | None = None  # a question: print some answers of --model, or of the newest run in runs; train nothing
    # your own model
    instruction: str | None = None  # what --model is told; {} stands for the problem; default INSTRUCTIONS[task]
    system: str | None = None  # system message before every prompt; a prompt that has one already is refused
    tools: Literal["none", "calculator"] = "none"  # calculator: the result is written behind <calc>12*34</calc>
    stop: tuple[str, ...] = ()  # texts such as "</answer>" that end a completion, as EOS does; they stay in it
    reward: str | None = None  # rewards.py or rewards.py:name,name: its functions are the reward, not the verifier
    dtype: Literal["float32", "bfloat16"] | None = None  # type of the weights; chosen for you
    quantize: Literal["none", "int8", "nf4"] = "none"  # with --lora-rank: keep the frozen weights in 8 or 4 bits
    save_merged: bool = False  # with --lora-rank: also write the model with the adapter merged into it, as merged
    # other algorithms
    algorithm: Literal["grpo", "reinforce", "rloo", "rft", "reinforce++"] = "grpo"  # how rewards become advantages
    sft_data: str | None = None  # file of lines {"prompt", "completion"}: take --steps supervised steps on it, no RL
    supervision: Literal["outcome", "process"] = "outcome"  # one reward for an answer, or one for each of its steps
    importance: Literal["token", "sequence"] = "token"  # one ratio for each token, or one for the sequence (GSPO)
    policy_loss: Literal["clip", "cispo", "sapo"] = "clip"  # the loss of a token: PPO's clipped one, CISPO or SAPO
    unbiased_kl: bool = False  # weigh the KL's estimate by the ratio, so that its gradient is the KL's (DeepSeek-V3.2)
    old_logprobs: Literal["recomputed", "sampler"] = "recomputed"  # π_old: computed by the trainer or by the sampler
    sampler_correction: Literal["none", "token", "sequence"] = "none"  # weigh tokens, or answers, by π_old/π_sampler
    sampler_cap: PositiveFloat = 2.0  # the largest such weight: a larger one is cut to it
    sampler_mask: bool = False  # set a weight that is above --sampler-cap to 0, do not cut it
    off_policy_limit: ChosenFloat = None  # leave out bad answers that π has left by more than so many nats a token
    staleness: NonNegativeInt = 0  # learn from answers that the policy of so many steps ago sampled, as async runs do
    dynamic_sampling: NonNegativeInt = 0  # the most further rounds of prompts to replace groups without variance (DAPO)
    truncated: Literal["keep", "mask", "penalise"] = "keep"  # completions without EOS: keep, leave out, or pay less
    truncation_penalty: NonNegativeFloat = 1.0  # with --truncated penalise: subtracted from their reward
    reference_every: NonNegativeInt = 0  # steps after which the policy becomes the reference (iterative GRPO); 0: never
    # further rewards; all are added up, and the verifier's has weight 1
    format_weight: NonNegativeFloat = 0.0  # reward of a completion that matches --format-pattern
    format_pattern: str = r"(?s).*# *-?[\d,.]+\s*"  # regular expression that the whole completion must match
    overlong_buffer: NonNegativeInt = 0  # the last tokens before --max-tokens cost up to 1 in reward (DAPO); 0: nothing
    decouple_rewards: bool = False  # scale each reward within its group before they are added up (GDPO)
    length_weight: NonNegativeFloat = 0.0  # subtracted for a completion of T tokens; for a shorter one in proportion
    reward_model: str | None = None  # Hub id or directory of a classifier with one output, R_φ, e.g. stage 3's reward
    reward_model_weight: float = 1.0  # weight of its score
    reward_model_steps: NonNegativeInt = 0  # gradient steps of R_φ at each --reference-every; a tenth is replay
    reward_model_learning_rate: NonNegativeFloat = 1e-5  # AdamW's in these steps
    # speed and memory
    fast: bool = True  # shared-prompt cache and packed rows, if they are right for the model; else the plain path
    optimizer: Literal["adamw", "adamw8bit"] | None = None  # torch's, or 2 bytes of state a parameter; chosen for you
    micro_batch_tokens: NonNegativeInt = 0  # tokens in a training pass, halved if memory runs out; 0: 2048, GPU 8192
    logprob_tokens: PositiveInt = 1024  # tokens whose logits exist at the same time
    generate_rows: ChosenInt = None  # sequences sampled at once, halved if memory runs out; chosen for you
    cuda_graph: bool = True  # on a GPU, replay the sampling of a token as one CUDA graph
    gradient_checkpointing: bool | None = None  # keep each layer's input, compute the rest again; chosen for you
    offload: bool | None = None  # gradients, 8-bit state and reference in host memory, not on the GPU; chosen for you
    shard: bool = False  # under torchrun: each process keeps a part of weights, gradients and 8-bit state (FSDP2)

    def __post_init__(self):
        check_settings(self)
        object.__setattr__(self, "reward", with_absolute_path(self.reward))  # a run is resumed from any directory

    @property
    def updates(self):
        """Gradient steps for each rollout. With one step π_old is π, and every ratio is exactly 1."""
        return self.num_epochs * self.num_minibatches


class InputError(ValueError):
    """A mistake that the user can fix. main() prints its message, one sentence, and exits with status 2."""


# ---- Equations ----


def group_advantages(rewards, group_size, scale_by_std=True):
    """(Rᵢ − mean) / std within each group [G2] (DeepSeekMath §4.1.2). rewards (B,), groups consecutive → (B,).

    The standard deviation is the paper's: the mean over G, not G − 1. scale_by_std=False is Dr. GRPO. A group whose
    rewards are all equal gives exactly 0, not 0/0. Raises ValueError if the rewards do not make whole groups.
    """
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards are no whole groups of {group_size}")
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.mean(-1, keepdim=True)
    if scale_by_std:
        advantages = advantages / groups.std(-1, correction=0, keepdim=True)
    all_equal = (groups == groups[:, :1]).all(-1, keepdim=True)
    return torch.where(all_equal, 0.0, advantages).flatten()


def process_advantages(step_rewards, step_ids, group_size):
    """Σ of the normalised rewards of a token's own step and of later steps [G3] (DeepSeekMath §4.1.3) → (B, T).

    step_rewards: B lists of floats. step_ids (B, T): the step of each token; −1 is no step and gets 0. All step rewards
    of a group are normalised together, in float64. Raises ValueError if the B sequences do not make whole groups.
    """
    if group_size < 1 or len(step_rewards) % group_size:
        raise ValueError(f"{len(step_rewards)} sequences are no whole groups of {group_size}")
    rows = []
    for start in range(0, len(step_rewards), group_size):
        group = step_rewards[start : start + group_size]
        rewards = torch.tensor([reward for own in group for reward in own], dtype=torch.float64)
        normalised = group_advantages(rewards, len(rewards)) if len(rewards) else rewards
        rows += normalised.split([len(own) for own in group])
    to_go = [torch.cat([own.flip(0).cumsum(0).flip(0), own.new_zeros(1)]) for own in rows]  # step −1 finds the 0
    return torch.stack([own.to(ids.device)[ids] for own, ids in zip(to_go, step_ids)])


def token_logprobs(logits, tokens, temperature):
    """ln π(token) at a temperature [R9]: logits (B, T, V), tokens (B, T) → (B, T), in nats.

    Use the temperature of the sampling: with another one the ratio is not 1 before the first update.
    """
    logits = logits if temperature == 1 else logits / temperature
    return -torch.nn.functional.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none").view_as(tokens)


def kl_k3(logprob, ref_logprob):
    """expm1(r) − r with r = ln π_ref − ln π (DeepSeekMath Eq. 4) [G5]: an estimate of KL(π‖π_ref), never negative."""
    log_ratio = ref_logprob - logprob
    return log_ratio.expm1() - log_ratio


def grpo_token_loss(logprob, old_logprob, ref_logprob, advantage, clip_low, clip_high, beta):
    """−min(ρ Â, clip(ρ, 1−ε_low, 1+ε_high) Â) + β k3 for each token [G4] (DeepSeekMath Eq. 3).

    logprob, old_logprob, ref_logprob (B, T), advantage (B,) or (B, T) → (B, T). ref_logprob is None if beta is 0.
    """
    advantage = advantage.unsqueeze(-1) if advantage.dim() < logprob.dim() else advantage
    ratio = (logprob - old_logprob).exp()
    loss = -torch.min(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    return loss if ref_logprob is None else loss + beta * kl_k3(logprob, ref_logprob)


def reduce_loss(loss, mask, reduction, total_tokens, total_sequences, max_tokens):
    """Token losses (B, T) → the scalar to minimise [G7].

    "sequence"  the mean over each sequence, then over sequences               GRPO, DeepSeekMath Eq. 3
    "token"     the mean over all tokens                                       DAPO Eq. 8
    "constant"  the sum, divided by sequences · max_tokens, whatever the length  Dr. GRPO §3.2

    The totals are those of the whole optimizer step, so the losses of its micro-batches add up to its loss.
    """
    mask = mask.bool()
    loss = torch.where(mask, loss, 0.0)
    if reduction == "sequence":
        return (loss.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / total_sequences
    if reduction == "token":
        return loss.sum() / total_tokens
    if reduction == "constant":
        return loss.sum() / (total_sequences * max_tokens)
    raise ValueError(f"reduction {reduction!r} is none of sequence, token, constant")


def sequence_logprob(logprob, old_logprob, mask):
    """ln π_old + the mean of ln π/π_old over the sequence, (B, T) [G15]: each token then has GSPO's ratio (Eq. 7)."""
    mask = mask.bool()
    log_ratio = torch.where(mask, logprob - old_logprob, 0.0)
    return old_logprob + log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


# ---- Problems and rewards ----


class Problem(NamedTuple):
    prompt: str  # the question; the messages of a chat as one text
    answer: str | None  # a number, a text or a formula; the target of a countdown; None with --reward only
    values: tuple = ()  # the result of each step of a right solution, for process supervision
    solution: str = ""  # a worked solution, for the warm start
    numbers: tuple = ()  # the numbers of a countdown
    messages: tuple = ()  # the messages of a chat, {"role", "content"} each
    columns: tuple = ()  # (name, value) of the other columns of its row, for --reward


def write_sum(rng, args):
    """A random problem such as 12+34-56. Its solution is the lines 12+34=46, 46-56=-10 and #-10."""
    total = rng.randint(0, args.max_term)
    prompt, lines, values = str(total), [], []
    for _ in range(args.terms - 1):
        operator, term = rng.choice(args.operators), rng.randint(0, args.max_term)
        before, total = total, total + term if operator == "+" else total - term
        prompt += f"{operator}{term}"
        lines.append(f"{before}{operator}{term}={total}")
        values.append(str(total))
    if args.tools == "calculator":
        lines = [f"<calc>{prompt}</calc>{total}"]
    return Problem(prompt, str(total), (*values, str(total)), "\n".join([*lines, f"#{total}"]))


def load_problems(args):
    """(problems to learn from, held-out problems). No held-out prompt is learned from."""
    rng, write = random.Random(args.seed), {"arithmetic": write_sum, "countdown": write_countdown}.get(args.task)
    found = [write(rng, args) for _ in range(args.num_problems)] if write else read_problems(args, read_rows(args.data))
    drawn = found[: args.num_problems]
    problems = list({problem.prompt: problem for problem in drawn}.values())  # each prompt once
    apart = load_eval_problems(args)  # those of --eval-data; [] if the task has none of its own
    held_out = (apart or problems[: len(problems) // 2])[: args.eval_problems]
    not_learned = {problem.prompt for problem in apart or held_out}
    learned = [problem for problem in problems if problem.prompt not in not_learned]
    check_problems(args, found, drawn, problems, learned, held_out)
    return learned, held_out


def problems_from(problems, positions, seed):
    """The problems at these positions of an endless stream. Each epoch of the stream has an order of its own."""
    chosen, orders = [], {}
    for position in positions:
        epoch, index = divmod(position, len(problems))
        if epoch not in orders:
            orders[epoch] = torch.randperm(len(problems), generator=seeded(seed, "order", epoch)).tolist()
        chosen.append(problems[orders[epoch][index]])
    return chosen


def seeded(*names):
    """A random generator. What it draws depends on these names alone, so a resumed run draws the same."""
    return torch.Generator().manual_seed(zlib.crc32(repr(names).encode()))


def is_right(problem, completion):
    """Is the completion's answer right [G20]? A number, such as a sum's, is compared by its exact value with the last
    number of the completion. Other answers are texts or formulas: is_right_text()."""
    given, wanted = final_answer(problem, completion), wanted_number(problem)
    if given is None or wanted is not None:
        return given is not None and given == wanted
    return is_right_text(problem, completion, given)


def step_rewards_of(problem, completion):
    """(reward of each step, step of each line) of a completion. Each line that is not blank is a step.

    The value of a step is its last number. The reward is 1 if a step of a right solution has this value and no earlier
    line of the completion had it, else 0 [G20]. So a repeated line earns nothing, nor does a line that no solution has.
    """
    wanted = Counter(as_number(value) for value in problem.values)
    rewards, step_of_line = [], []
    for line in completion.split("\n"):
        step_of_line.append(len(rewards) if line.strip() else -1)
        if line.strip():
            value = last_number(line)
            rewards.append(float(value is not None and wanted[value] > 0))
            wanted[value] -= 1
    return rewards, step_of_line


def reward_parts(args, problem, completion, num_tokens, is_truncated):
    """The rewards of a completion, by name. They are added up. YOUR OWN TASK: add a line with its reward here."""
    parts = {} if args.reward else {"verifier": float(is_right(problem, before_stop(args, completion)))}
    if args.format_weight:
        parts["format"] = args.format_weight * bool(re.fullmatch(args.format_pattern, completion))
    if args.length_weight:
        parts["length"] = -args.length_weight * num_tokens / args.max_tokens
    if args.overlong_buffer:
        parts["overlong"] = soft_overlong_punishment(num_tokens, args.max_tokens, args.overlong_buffer)
    if args.truncated == "penalise":
        parts["truncation"] = -args.truncation_penalty * is_truncated  # [G12]
    return parts


class Rating(NamedTuple):
    rewards: torch.Tensor  # (G,)
    parts: dict  # name → (G,); their sum is rewards, in which NaN, "does not apply", counts 0
    is_truncated: torch.Tensor  # (G,) whether there is no EOS, and no --stop, within max_tokens
    step_rewards: list  # G lists of floats
    step_ids: torch.Tensor  # (G, T) step of each token, −1 for none


def rate_group(args, group, tokenizer, eos_ids, reward_model, step):
    """The rewards of a group: of each completion, and of each step in it. An error message names the training step."""
    is_truncated = truncated_rows(args, group, eos_ids)
    columns = zip(group.texts, lengths_of_texts(args, group, is_truncated), is_truncated.tolist())
    parts = parts_by_name([reward_parts(args, group.problem, *column) for column in columns], group, step)
    if reward_model:
        scores = args.reward_model_weight * reward_model.score(answers_of(args, group, is_truncated))
        parts |= parts_by_name([{"model": score} for score in scores.tolist()], group, step)
    parts |= group.own_rewards
    step_rewards, step_of_line = zip(*(step_rewards_of(group.problem, before_stop(args, text)) for text in group.texts))
    step_ids = step_ids_of(tokenizer, group, step_of_line)
    return Rating(torch.stack(list(parts.values())).nansum(0), parts, is_truncated, list(step_rewards), step_ids)


def has_variance(args, rating):
    """Do the rewards of a group differ? If not, its advantages of GRPO are all 0 and it teaches nothing [G10]."""
    if args.supervision == "process":
        return len({reward for rewards in rating.step_rewards for reward in rewards}) > 1
    rewards = rating.parts.values() if args.decouple_rewards else [rating.rewards]
    return any(len(set(part[~part.isnan()].tolist())) > 1 for part in rewards)


def advantages_of(args, ratings):
    """Advantages (B,) of the groups with these ratings. The algorithms that are not GRPO keep its loss, whose gradient
    at ρ = 1 is the policy gradient."""
    rewards = torch.cat([rating.rewards for rating in ratings])
    if args.decouple_rewards:  # GDPO
        return normalised_over_batch(decoupled_advantages(args, ratings), torch.ones_like(rewards), shift_mean=False)
    if args.algorithm in ("reinforce", "reinforce++"):  # baseline: the mean of all rewards (Williams 1992)
        total, count = over_ranks(torch.stack([rewards.sum(), torch.tensor(float(len(rewards)))]))
        return rewards - total / count
    if args.algorithm == "rloo":  # baseline: the mean of the other G − 1 (Kool et al. 2019; Ahmadian et al. 2024)
        return group_advantages(rewards, args.group_size, False) * args.group_size / (args.group_size - 1)
    if args.algorithm == "rft":  # imitate the right answers (DeepSeekMath §5.2.1)
        return (rewards > 0).float()
    advantages = group_advantages(rewards, args.group_size, args.scale == "group")
    if args.scale == "batch":
        return normalised_over_batch(advantages, torch.ones_like(rewards), shift_mean=False)
    return advantages


# ---- Model ----


def load_model(args, name, is_compared=True):
    """(language model, tokenizer, EOS ids) of a Hub id or a directory, ready to be trained, or refused in one sentence.

    is_compared: find out whether the fast path is right for this model (Machinery), and keep the answer with it.
    """
    model, tokenizer = read_model(args, name)
    eos_ids = model.generation_config.eos_token_id  # [G9] one, several or none; chat models often have two
    eos_ids = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids or [])
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    eos_ids = sorted({*eos_ids, *own, *special_stops(args.stop, tokenizer)})
    eos_ids = [token for token in eos_ids if token < model.get_input_embeddings().num_embeddings]
    if not eos_ids and not args.stop:
        raise InputError(f"{name}: neither its generation config nor its tokenizer has an EOS token; nothing could end")
    if args.quantize != "none":
        quantize(model, args.quantize, args.device)
    model = without_dropout(model).to(args.device).eval()
    model.stops = find_stops(args, model, tokenizer)  # None without --stop
    model.tool = find_tool(args, model, tokenizer)  # None without --tools
    model.has_spans, model.plain_because = False, ""
    if is_compared:
        choose_path(args, model, tokenizer, name)
    return model, tokenizer, eos_ids


# ---- Sampling and log-probabilities ----


class Group(NamedTuple):
    problem: Problem
    prompt: list  # its tokens
    tokens: torch.Tensor  # (G, T)
    logprobs: torch.Tensor  # (G, T) computed by the sampler
    mask: torch.Tensor  # (G, T) 1 up to the first EOS, which is included
    texts: list  # G completions
    own_rewards: tuple = ()  # (name, (G,)) of each function of --reward, NaN where it does not apply


def sample_groups(args, model, tokenizer, eos_ids, problems, group_size, temperature, names):
    """Sample a group for each problem, generate_rows sequences at a time. names: the seed of each problem's noise."""
    prompts = [encode_prompt(args, tokenizer, problem) for problem in problems]
    noise = torch.stack([torch.rand(group_size, args.max_tokens, generator=seeded(args.seed, *name)) for name in names])
    width = min(args.generate_rows, group_size)  # completions of one prompt that are sampled at the same time
    at_once, groups = args.generate_rows // width, []
    pad_id = 0  # it is never read, and the tokenizer's own may lie outside the embedding
    with whole(model):  # under --shard the weights are gathered once
        for start in range(0, len(prompts), at_once):
            part = slice(start, start + at_once)
            pieces = []
            for rows in noise[part].split(width, 1):  # (prompts, width, T)
                output = sample(args, model, prompts[part], rows.flatten(0, 1), temperature, eos_ids, pad_id)
                pieces.append([x.cpu().view(rows.shape) for x in output])
            columns = (torch.cat(own, 1) for own in zip(*pieces))
            for problem, prompt, tokens, logprobs, mask in zip(problems[part], prompts[part], *columns):
                completions = [row[:length].tolist() for row, length in zip(tokens, lengths_of(mask))]
                texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
                groups.append(Group(problem, prompt, tokens, logprobs, mask, texts))
    return groups


def sample(args, model, prompts, noise, temperature, eos_ids, pad_id):
    """G completions of each prompt by plain_sample(), or by its fast equal generate() if it is right for the model."""
    settings = noise.to(args.device), temperature, eos_ids, pad_id
    if not is_fast(args, model):
        return plain_sample(model, prompts, *settings)
    is_fixed = args.cuda_graph and args.device.startswith("cuda") and not args.shard
    with reordered_weights(model, len(noise)):
        return generate(model, prompts, *settings, is_fixed)


def sample_token(logits, noise, temperature):
    """For each row of logits (B, V) one token and its log-probability. noise (B,) is uniform in [0, 1); the token is
    where the cumulative distribution exceeds it. Temperature 0 takes the likeliest token.

    On a CPU torch.multinomial takes many times as long with a vocabulary of 49k.
    """
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(-1)
        return token, torch.zeros_like(logits[:, 0])
    weights = (logits - logits.amax(-1, keepdim=True)).div_(temperature).exp_()
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    token = torch.searchsorted(sums, noise[:, None] * total, right=True).clamp(max=logits.shape[-1] - 1)
    return token[:, 0], (weights.gather(-1, token) / total).log()[:, 0]


@torch.no_grad()
def plain_sample(model, prompts, noise, temperature, eos_ids, pad_id):
    """G completions of each prompt: tokens, log-probabilities, mask, each (B, T). noise (B, T) is uniform in [0, 1).

    prompts: P token lists; B = P·G, and the completions of a prompt are G consecutive rows [G1]. Tokens come from the
    whole distribution at the temperature, without top-k or top-p. The mask ends with the first EOS, included [G9].
    """
    (B, T), device = noise.shape, noise.device
    prompts = [prompt for prompt in prompts for _ in range(B // len(prompts))]
    Q = max(map(len, prompts))  # padding is on the left, so all prompts end in the same column
    ids = torch.tensor([[pad_id] * (Q - len(prompt)) + prompt for prompt in prompts], device=device)
    attention_mask = torch.tensor([[0] * (Q - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    eos, cache = torch.tensor(eos_ids, dtype=torch.long, device=device), None
    going, calls = torch.ones_like(ids[:, 0]).bool(), ToolCalls(model, eos)  # (B,) which sequences have not ended yet
    tokens = torch.full((B, T), pad_id, device=device)
    logprobs, mask = torch.zeros(B, T, device=device), torch.zeros_like(tokens)
    for t in range(T):
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(
            ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        token, logprob, chosen = calls.write(*sample_token(output.logits[:, -1], noise[:, t], temperature))  # --tools
        tokens[going, t], logprobs[going, t], mask[going, t] = token[going], logprob[going], chosen[going]
        going &= ~torch.isin(token, eos)
        going = without_stopped(model, going, tokens, t)  # --stop
        calls.read(tokens, t, going)
        if not going.any():
            break
        ids, cache = token[:, None], output.past_key_values
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(B, 1)], 1)
    return tokens, logprobs, mask


def policy_logprobs(args, model, prompts, tokens, mask):
    """(B, T) log-probabilities of completions with gradient, 0 off the mask, computed as train() computes them."""
    lengths = {i: length for i, length in enumerate(lengths_of(mask)) if length}
    logprobs = torch.zeros(mask.shape, device=args.device)
    for rows in plan_for(args, model, list(map(len, prompts)), lengths, len(tokens) // len(prompts)):
        order = torch.tensor([i for row in rows for i in row], device=args.device)
        logprobs = logprobs.index_put((order,), micro_batch_logprobs(args, model, prompts, tokens, mask, rows))
    return logprobs


def plain_logprobs(model, prompts, tokens, mask, temperature):
    """(B, T) log-probabilities with gradient, 0 off the mask. Each sequence is one row, padded on the right.

    prompts: B token lists. A sequence ends with the last 1 of its mask. A token before it whose mask is 0, such as one
    of a tool's answer, is read but not scored.
    """
    T, device = tokens.shape[1], tokens.device
    rows = [prompt + row[:n] for prompt, row, n in zip(prompts, tokens.tolist(), lengths_of(mask))]
    L = max(map(len, rows))
    ids = torch.tensor([row + [0] * (L - len(row)) for row in rows], device=device)
    attention_mask = torch.tensor([[1] * len(row) + [0] * (L - len(row)) for row in rows], device=device)
    first = min(map(len, prompts))  # column of the first scored token; the column before predicts it
    kept = L - first + 1
    logits = model(ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=kept).logits[:, -kept:-1]
    scored = token_logprobs(logits.float(), ids[:, first:], temperature)
    starts = torch.tensor([len(prompt) - first for prompt in prompts], device=device)
    columns = starts[:, None] + torch.arange(T, device=device)
    return torch.where(mask.bool(), scored.gather(1, columns.clamp(max=scored.shape[1] - 1)), 0.0)


def lengths_of(mask):
    """Length of each row of a mask (B, T), up to its last 1: a list of B integers."""
    return (mask.bool() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(-1).tolist()


@torch.no_grad()
def score(args, model, sequences, minibatches):
    """(B, T) log-probabilities of the sequences under a model, without gradient, 0 for those that are not taught."""
    prompts, tokens, mask = sequences
    logprobs = torch.zeros(mask.shape)
    with whole(model):  # under --shard the weights are gathered once
        for _, lengths in minibatches:
            for rows in plan_for(args, model, list(map(len, prompts)), lengths, len(tokens) // len(prompts)):
                order = [i for row in rows for i in row]
                logprobs[order] = micro_batch_logprobs(args, model, prompts, tokens, mask, rows).cpu()
    return logprobs


# ---- Training ----


def scores_of(args, model, tokenizer, eos_ids, problems, numbers):
    """For each problem: is the greedy answer right, and pass@1, pass@k and maj@k of eval_samples samples [G21], NaN if
    it has no answer; the samples' mean reward, NaN without --reward. numbers: the problems' places among all. They set
    the noise, so two policies differ only in what they have learned."""
    n, k = args.eval_samples, args.eval_k
    names = [("eval", number) for number in numbers]
    with whole(model):  # under --shard the weights are gathered once
        greedy = sample_groups(args, model, tokenizer, eos_ids, problems, 1, 0.0, names)
        sampled = sample_groups(args, model, tokenizer, eos_ids, problems, n, args.temperature, names)
    scores = []
    for problem, one, group, reward in zip(problems, greedy, sampled, own_rewards_of(args, sampled)):
        row = [math.nan] * 4
        if problem.answer is not None:
            likeliest, *texts = (before_stop(args, text) for text in (*one.texts, *group.texts))
            right = [is_right(problem, text) for text in texts]
            answers = [final_answer(problem, text) for text in texts]
            row = [is_right(problem, likeliest), sum(right) / n]
            row += [pass_at_k(n, sum(right), k), majority_at_k(answers, right, k)]
        columns = "reward", "greedy", "pass@1", f"pass@{k}", f"maj@{k}"
        scores.append(dict(zip(columns, map(float, (reward, *row)))))
    return scores


def evaluate(args, model, tokenizer, eos_ids, problems):
    """{name: a number for each of this process's share of the held-out problems}."""
    numbers = own_share(range(len(problems)))
    scores = scores_of(args, model, tokenizer, eos_ids, own_share(problems), numbers)
    return {f"eval/{name}": [row[name] for row in scores] for name in scores[0]}


def learning_rate_of(args, step):
    """It rises over warmup_steps. Then it falls to 0 at the end of the run, or stays with --no-anneal-lr."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / (args.warmup_steps + 1)
    remaining = (args.steps - step) / (args.steps - args.warmup_steps)
    return args.learning_rate * (remaining if args.anneal_lr else 1.0)


class Rollout(NamedTuple):
    sequences: tuple  # prompts (P token lists), tokens (B, T), mask (B, T)
    advantages: torch.Tensor  # (B, T)
    sampler_logprobs: torch.Tensor  # (B, T) computed by the sampler
    old_logprobs: torch.Tensor  # (B, T) ln π_old
    ref_logprobs: torch.Tensor | None  # (B, T) ln π_ref, with β above 0


def minibatch_gradient(args, policy, optimizer, rollout, minibatch, statistics, is_first):
    """The gradient of one minibatch, added up over micro-batches that fit into memory. Returns the statistics with
    those of its tokens added."""
    (prompts, tokens, mask), (answers, lengths) = rollout.sequences, minibatch
    # [G8] Totals of the whole step and of all processes: a mean of means would weigh small micro-batches more
    total_tokens, total_sequences = over_ranks(torch.tensor([mask[answers].sum(), len(answers)]))
    micro_batches = plan_for(args, policy, list(map(len, prompts)), lengths, args.group_size)
    num_idle = idle_passes(micro_batches)
    statistics = {name: x.clone() for name, x in statistics.items()}
    optimizer.zero_grad()
    for micro_batch in micro_batches:
        logprob = micro_batch_logprobs(args, policy, prompts, tokens, mask, micro_batch)
        mb = [i for row in micro_batch for i in row]  # its answers
        columns = mask, rollout.advantages, rollout.old_logprobs, rollout.sampler_logprobs
        mb_mask, advantage, old_logprob, sampler_logprob = (x[mb].to(args.device) for x in columns)
        if args.old_logprobs == "recomputed" and args.updates == 1:
            old_logprob = logprob.detach()  # [G6] every ratio is 1; its gradient is not 0
        is_gspo = args.importance == "sequence"
        ratio_logprob = sequence_logprob(logprob, old_logprob, mb_mask) if is_gspo else logprob
        if args.policy_loss == "clip":  # the KL is added below: GSPO changes the ratio but not the KL
            clip_range = args.clip_low, args.clip_high
            token_loss = grpo_token_loss(ratio_logprob, old_logprob, None, advantage, *clip_range, 0.0)
        else:
            token_loss = other_token_loss(args, logprob, old_logprob, advantage)
        weight = off_policy_weight(args, logprob, old_logprob, sampler_logprob, advantage, mb_mask)
        token_loss = token_loss if weight is None else weight * token_loss
        kl = kl_k3(logprob, rollout.ref_logprobs[mb].to(args.device)) if args.beta else None
        if args.beta and args.algorithm != "reinforce++":  # which has the KL in the reward; [G40] the ratio
            token_loss = token_loss + args.beta * ((logprob - old_logprob).exp() * kl if args.unbiased_kl else kl)
        loss = reduce_loss(token_loss, mb_mask, args.reduction, total_tokens, total_sequences, args.max_tokens)
        loss.backward()
        gap = logprob - sampler_logprob if is_first else None  # later the weights differ too
        add_statistics(args, statistics, mb_mask, ratio_logprob - old_logprob, advantage, kl, loss, gap, weight)
    run_idle_passes(args, policy, num_idle)
    return statistics


def sample_rollout(args, policy, tokenizer, eos_ids, reward_model, problems, cursor, step):
    """Sample G answers to each of P questions [G1] and rate them. Returns (args, where the stream of problems stands,
    (the groups to learn from, their ratings, all groups with their ratings)).

    DAPO's dynamic sampling replaces groups without variance by answers to further questions, until there are P groups
    or no rounds left [G11]. retry_with_less() calls a function, again if memory runs out.
    """
    groups, ratings, seen, P = [], [], [], len(own_share(range(args.prompts_per_step)))
    for _ in range(1 + args.dynamic_sampling):
        positions = own_share(range(cursor, cursor + args.prompts_per_step))
        names = [("train", position) for position in positions]
        asked = problems_from(problems, positions, args.seed)
        given = policy, tokenizer, eos_ids, asked, args.group_size, args.temperature, names
        args, sampled = retry_with_less(args, "generate_rows", sample_groups, *given)
        for group in with_own_rewards(args, sampled, step):
            rating = rate_group(args, group, tokenizer, eos_ids, reward_model, step)
            seen.append((group, rating))
            if len(groups) < P and (has_variance(args, rating) or not args.dynamic_sampling):
                groups.append(group)
                ratings.append(rating)
        cursor += args.prompts_per_step
        if over_ranks(torch.tensor(len(groups)), "MIN") == P:
            break
    return args, cursor, (groups, ratings, seen)


def train(args: Args) -> list[dict]:
    """Run GRPO. Returns the metrics of each step and of each evaluation, oldest first."""
    from tqdm import trange

    if args.sft_data:
        return fine_tune(args)  # imitates a file instead (Machinery)
    started = time.perf_counter()

    # 1. Problems, processes, run directory
    saved = load_checkpoint(args)  # of the run that --resume names, else None
    problems, held_out = load_problems(args)
    args = choose_settings(args, saved, problems)  # what was not given: learning rate, group size, device, …
    args, run_dir = start_run(args, held_out)
    P = len(own_share(range(args.prompts_per_step)))  # prompts of this process
    G, T = args.group_size, args.max_tokens

    # 2. The policy π: --model, or a small transformer that has seen worked solutions
    start_dir = args.model or str(run_dir / "start")
    if args.model is None:
        problems, held_out = make_start_model(args, start_dir, problems, held_out)
    policy, tokenizer, eos_ids = load_model(args, start_dir)
    problems, held_out = those_that_fit(args, policy, tokenizer, problems, held_out)
    adapter = prepare_policy(args, policy, tokenizer, saved)  # None without --lora-rank
    optimizer = new_optimizer(args, policy)
    parameters = optimizer.param_groups[0]["params"]

    # 3. The reference π_ref, which is the policy as the run begins, frozen; a learned reward model R_φ
    reference = reference_of(args, start_dir, policy, adapter, saved) if args.beta else None
    reward_model = RewardModel(args) if args.reward_model else None

    # 4. A first evaluation; a resumed run has its own already
    first, cursor, metrics, waiting = restore(saved, optimizer, reward_model)  # waiting: rollouts, for --staleness
    writer = open_log(args, run_dir, first)
    if not metrics:
        args, scores = retry_with_less(args, "generate_rows", evaluate, policy, tokenizer, eos_ids, held_out)
        log(writer, metrics, 0, mean_over_ranks(scores))

    seen, ending = [], Ending(args, started)  # --max-hours, Ctrl-C
    bar = trange(first, args.steps, desc="grpo", initial=first, total=args.steps, disable=process_rank() > 0)
    for step in bar:
        seed_torch(args.seed, step, process_rank())
        optimizer.param_groups[0]["lr"] = learning_rate_of(args, step)
        clock = [time.perf_counter()]

        # 5. Sample G answers to each of P questions and rate them. `seen` are all groups, `groups` those to learn from.
        # With --staleness some rollouts wait, and the oldest is taken
        while len(waiting) <= args.staleness:
            given = policy, tokenizer, eos_ids, reward_model, problems, cursor, step
            args, cursor, rollout = sample_rollout(args, *given)
            waiting.append(rollout)
        groups, ratings, seen = waiting.popleft()
        row = describe(args, seen)
        if args.reward_model_steps:
            reward_model.pairs += [pair for group, rating in seen for pair in pairs_of(args, group, rating)]
        if not groups:  # no group has variance: the last ones are kept, which with β above 0 still have a KL
            groups, ratings = zip(*seen[-P:])
        clock.append(time.perf_counter())

        # 6. Advantages: how much better is an answer than the other answers to the same question?
        prompts = [group.prompt for group in groups]
        tokens = torch.cat([group.tokens for group in groups])
        mask = torch.cat([group.mask for group in groups])
        sampler_logprobs = torch.cat([group.logprobs for group in groups])
        if args.supervision == "process":
            step_rewards = [rewards for rating in ratings for rewards in rating.step_rewards]
            step_ids = torch.cat([rating.step_ids for rating in ratings])
            advantages = process_advantages(step_rewards, step_ids, G).float()
        else:
            advantages = advantages_of(args, ratings)[:, None].expand(-1, T)
        if args.truncated == "mask":
            mask = mask * ~torch.cat([rating.is_truncated for rating in ratings])[:, None]  # [G12]

        # 7. Each epoch splits the groups into minibatches. An answer whose advantage is 0 has no gradient and is left
        # out, unless the KL gives it one [G10]
        teaches = mask.any(-1) & ((advantages != 0).any(-1) | (args.beta > 0) | (args.algorithm == "reinforce++"))
        lengths, minibatches = lengths_of(mask), []  # each: (its answers, {answer: length} of those that teach)
        for _ in range(args.num_epochs):
            for chosen in torch.randperm(len(groups)).tensor_split(args.num_minibatches):
                answers = (chosen[:, None] * G + torch.arange(G)).flatten()
                minibatches.append((answers, {i: lengths[i] for i in answers[teaches[answers]].tolist()}))

        # 8. ln π_old and ln π_ref, before the policy moves
        first_epoch, sequences = minibatches[: args.num_minibatches], (prompts, tokens, mask)
        old_logprobs, ref_logprobs = sampler_logprobs, None  # with 1 update minibatch_gradient() takes its own π_old
        if args.old_logprobs == "recomputed" and args.updates > 1:
            args, old_logprobs = retry_with_less(args, "micro_batch_tokens", score, policy, sequences, first_epoch)
        if args.beta:
            given = reference, adapter, sequences, first_epoch
            args, ref_logprobs = retry_with_less(args, "micro_batch_tokens", score_reference, *given)
        if args.algorithm == "reinforce++":
            advantages = reinforce_pp_advantages(args, ratings, old_logprobs, ref_logprobs, mask)
        rollout = Rollout(sequences, advantages, sampler_logprobs, old_logprobs, ref_logprobs)

        # 9. Update: one optimizer step for each minibatch
        policy.train()
        statistics, norms = new_statistics(), []
        for update, minibatch in enumerate(minibatches):
            if not over_ranks(torch.tensor(len(minibatch[1]))):
                continue  # no process has anything to learn from
            given = policy, optimizer, rollout, minibatch, statistics, update == 0
            args, statistics = retry_with_less(args, "micro_batch_tokens", minibatch_gradient, *given)
            sum_gradients(args, parameters)  # over all processes
            norms.append(cut_gradients(parameters, args.max_grad_norm, args.shard))
            check_gradient(norms[-1], run_dir, step)
            seed_torch(args.seed, step, update, "rounding")  # all processes round alike
            optimizer.step()
        optimizer.zero_grad()
        policy.eval()
        clock.append(time.perf_counter())

        # 10. Iterative GRPO: the policy becomes the reference, and the reward model learns from what was sampled [G13]
        if args.reference_every and (step + 1) % args.reference_every == 0:
            if args.beta:
                reference.load_state_dict(policy.state_dict())
            if args.reward_model_steps and reward_model.pairs:
                row["reward_model/loss"] = reward_model.learn(step)

        # 11. Metrics, evaluation, checkpoint
        row |= update_metrics(args, statistics, norms) | {"policy/learning_rate": optimizer.param_groups[0]["lr"]}
        row |= speed_metrics(args, clock, [group for group, _ in seen], mask)
        done = step + 1
        is_ending = ending.is_due()
        is_last = is_ending or done == args.steps
        if is_last or is_due(args.eval_every, done):
            args, scores = retry_with_less(args, "generate_rows", evaluate, policy, tokenizer, eos_ids, held_out)
            row |= mean_over_ranks(scores)
        shown = {"reward": f"{row['reward/mean']:.3f}", "tokens": f"{row['completion/length']:.1f}"}
        bar.set_postfix(shown, refresh=False)
        log(writer, metrics, done, row)
        show_answers(args, run_dir, writer, bar, metrics, groups, ratings, advantages)
        warn_without_variance(args, bar, metrics)
        if is_last or is_due(args.checkpoint_every, done):
            progress = {"step": done, "cursor": cursor, "metrics": metrics, "rollouts": packed(waiting)}
            save_checkpoint(args, run_dir, writer, progress, policy, optimizer, reference, reward_model)
        if is_ending:
            break
    bar.close()
    ending.restore()

    # 12. The trained policy, the curves, a summary
    seconds = time.perf_counter() - started
    end_run(args, run_dir, writer, policy, adapter, tokenizer, metrics, held_out, seen, seconds)
    return metrics


# ==== Machinery: the same mathematics, fast and large; files, logs, flags. A first reader can stop here ====


# ---- Other losses, advantages and rewards ----
#
# What GRPO itself does not have: a small function for each thing that a flag adds (docs/4_grpo.md, "Which settings are
# which algorithm"). With the default flags none of them is called.


def cispo_token_loss(logprob, old_logprob, advantage, clip_high):
    """−sg(min(ρ, 1 + ε_high)) Â ln π for each token [G33] (CISPO: MiniMax-M1, arXiv 2506.13585, Eq. 4 and 5).

    logprob, old_logprob (B, T), advantage (B,) or (B, T) → (B, T). sg: the weight has no gradient. So no token is left
    without a gradient, as the clipped loss leaves it. A large ratio only counts for less.
    """
    advantage = advantage.unsqueeze(-1) if advantage.dim() < logprob.dim() else advantage
    weight = (logprob - old_logprob).exp().clamp(max=1 + clip_high).detach()
    return -weight * advantage * logprob


def sapo_token_loss(logprob, old_logprob, advantage, tau_positive=1.0, tau_negative=1.05):
    """−4/τ σ(τ (ρ − 1)) Â for each token [G33] (SAPO: Gao et al. 2025, arXiv 2511.20347; its τ).

    logprob, old_logprob (B, T), advantage (B,) or (B, T) → (B, T). At ρ = 1 the gradient is that of ρ Â. It fades as ρ
    leaves 1, a little faster where Â is not positive, where the clipped loss cuts it off at once.
    """
    advantage = advantage.unsqueeze(-1) if advantage.dim() < logprob.dim() else advantage
    tau = torch.full_like(advantage, tau_negative).masked_fill(advantage > 0, tau_positive)
    return -4 / tau * (tau * ((logprob - old_logprob).exp() - 1)).sigmoid() * advantage


def other_token_loss(args, logprob, old_logprob, advantage):
    """(B, T) by --policy-loss."""
    if args.policy_loss == "cispo":
        return cispo_token_loss(logprob, old_logprob, advantage, args.clip_high)
    return sapo_token_loss(logprob, old_logprob, advantage)


def sampler_weights(old_logprob, sampler_logprob, mask, level, cap, is_masked=False):
    """w = π_old/π_sampler, cut to the cap, or 0 above it with is_masked [G34]. No gradient.

    old_logprob, sampler_logprob, mask (B, T) → (B, T) with level "token"; (B, 1) with "sequence", the product of the
    ratios of its tokens. Truncated importance sampling (Yao et al. 2025), masked importance sampling (Liu et al. 2025).
    The sampler may differ from the trainer's π_old by its arithmetic, or by being some steps old.
    """
    log_ratio = torch.where(mask.bool(), old_logprob - sampler_logprob, 0.0).detach()
    weights = (log_ratio.sum(-1, keepdim=True) if level == "sequence" else log_ratio).exp()
    return torch.where(weights > cap, 0.0 if is_masked else cap, weights)


def is_near_policy(logprob, sampler_logprob, advantage, mask, limit):
    """Which tokens stay in the loss [G35] (DeepSeek-V3.2, arXiv 2512.02556, off-policy sequence masking).

    logprob, sampler_logprob, mask (B, T), advantage (B,) or (B, T) → (B, T) bool. An answer with a negative advantage
    leaves the loss if the mean of ln π_sampler − ln π over its tokens is above the limit, in nats.
    """
    advantage = advantage.unsqueeze(-1) if advantage.dim() < logprob.dim() else advantage
    mask = mask.bool()
    difference = torch.where(mask, sampler_logprob - logprob, 0.0).detach()
    mean = difference.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return (advantage >= 0) | (mean <= limit)


def off_policy_weight(args, logprob, old_logprob, sampler_logprob, advantage, mask):
    """The factor of each token's loss, (B, T) or (B, 1), by --sampler-correction and --off-policy-limit; else None."""
    weight = None
    if args.sampler_correction != "none":
        cap = args.sampler_cap, args.sampler_mask
        weight = sampler_weights(old_logprob, sampler_logprob, mask, args.sampler_correction, *cap)
    if args.off_policy_limit is not None:
        kept = is_near_policy(logprob, sampler_logprob, advantage, mask, args.off_policy_limit).to(logprob.dtype)
        weight = kept if weight is None else weight * kept
    return weight


def normalised_over_batch(x, mask, shift_mean=True):
    """(x − mean) / std over all entries whose mask is 1, of the whole batch and all processes [G36]; 0 off the mask and
    where all are equal. x, mask (B,) or (B, T). REINFORCE++ Eq. 10 (Hu et al. 2025, arXiv 2501.03262); std over N.
    shift_mean=False for what has mean 0 already: an exact 0 stays 0."""
    own = x[mask.bool()].double()
    total, count = over_ranks(torch.stack([own.sum(), torch.tensor(float(len(own)), dtype=own.dtype)]))
    mean = total / count.clamp(min=1)
    std = (over_ranks((own - mean).square().sum()) / count.clamp(min=1)).sqrt()
    none = own.new_full((1,), -torch.inf)  # where a process has no entry
    low, high = (over_ranks(torch.cat([side, none]).max(), "MAX") for side in (-own, own))
    result = torch.zeros_like(x)
    if -low < high:
        result[mask.bool()] = ((own - mean if shift_mean else own) / std).to(x.dtype)
    return result


def rewards_less_kl(rewards, log_ratio, mask, kl_coef):
    """R − β Σ ln π_old/π_ref over a token and those after it [G36] (REINFORCE++ Eq. 8 and 9), (B, T).

    rewards (B,), log_ratio (B, T) = ln π_old − ln π_ref, mask (B, T). The KL stands in the reward, as in PPO's RLHF.
    """
    log_ratio = torch.where(mask.bool(), log_ratio, 0.0)
    return rewards[:, None] - kl_coef * log_ratio.flip(-1).cumsum(-1).flip(-1)


def reinforce_pp_advantages(args, ratings, old_logprobs, ref_logprobs, mask):
    """Advantages (B, T) of REINFORCE++: R less the KL to come, normalised over all tokens of the batch [G36]. With one
    update a rollout ln π_old is the sampler's."""
    log_ratio = old_logprobs - ref_logprobs if args.beta else torch.zeros_like(old_logprobs)
    rewards = torch.cat([rating.rewards for rating in ratings])
    return normalised_over_batch(rewards_less_kl(rewards, log_ratio, mask, args.beta), mask)


def decoupled_advantages(args, ratings):
    """Σ of the advantages of each reward by itself, times its weight [G37] (GDPO: Liu et al. 2026, arXiv 2601.05242),
    (B,). A reward that does not apply to a completion, NaN, takes no part in its group.

    Added up first, a reward of 0 or 2 hides one of 0 or 1: two answers may differ in both and have the same sum.
    """
    weights = {"format": args.format_weight, "length": args.length_weight, "truncation": args.truncation_penalty}
    weights["model"] = abs(args.reward_model_weight)
    advantages = []
    for rating in ratings:
        total = torch.zeros_like(rating.rewards)
        for name, part in rating.parts.items():
            applies = ~part.isnan()
            if applies.any():
                total[applies] += weights.get(name, 1.0) * group_advantages(part[applies], int(applies.sum()))
        advantages.append(torch.where(total.abs() < 1e-5, 0.0, total))  # rewards that cancel leave a rounding error
    return torch.cat(advantages)


def soft_overlong_punishment(num_tokens, max_tokens, buffer):
    """0 while `buffer` tokens are left, then linearly down to −1 at max_tokens [G38] (DAPO Eq. 13)."""
    return -max(num_tokens - (max_tokens - buffer), 0) / buffer


def packed(waiting):
    """Rollouts that wait to be learned from (--staleness [G39]), as plain data for the checkpoint."""
    return [
        [(tuple(group.problem), *group[1:], tuple(rating), any(group is x for x in groups)) for group, rating in seen]
        for groups, _, seen in waiting
    ]


# ---- Problems: the other tasks, files ----
#
# Countdown writes its own problems. gsm8k and jsonl are read from a file or the Hub, and a row that cannot be used ends
# the run in one sentence that names its line.


def write_countdown(rng, args):
    """Numbers and a target that they reach: joined two at a time by an operator that leaves a whole number."""
    numbers = [rng.randint(1, args.max_term) for _ in range(args.terms)]
    parts = [(str(number), number) for number in numbers]
    while len(parts) > 1:
        (left, a), (right, b) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        choices = [("+", a + b), ("*", a * b)] + [("-", a - b)] * (a >= b)
        choices += [("/", a // b)] if b and a % b == 0 else []
        operator, value = rng.choice([choice for choice in choices if choice[1] <= 1000] or choices)
        parts.append((f"({left}{operator}{right})", value))
    expression, target = parts[0]
    return Problem(f"{','.join(map(str, numbers))}={target}", str(target), (), expression[1:-1], tuple(numbers))


def say(line):
    """Print a line, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


@contextmanager
def refused(beginning, kind=InputError):
    """A context that turns an error of this kind into an InputError with this beginning, such as a row's place."""
    try:
        yield
    except kind as error:
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise InputError(f"{beginning}: {reason.splitlines()[0]}") from error


def read_rows(path, flag="--data", split="train"):
    """(where the row stands, row) for each row of the file that a flag names, or of a split of gsm8k from the Hub."""
    if path is None:
        import datasets

        datasets.disable_progress_bars()
        with refused(f"{flag} takes a file in the form of gsm8k, which cannot be fetched", Exception):
            rows = list(datasets.load_dataset("openai/gsm8k", "main", split=split, streaming=True))
        return [(f"gsm8k {split}, row {number}", row) for number, row in enumerate(rows, start=1)]
    rows, form = [], f"{flag} {path} is no file of JSON lines"
    # -sig: a byte-order mark may come first
    with refused(f"{form} in UTF-8", (OSError, UnicodeDecodeError)), open(path, encoding="utf-8-sig") as file:
        lines = list(file)
    if "".join(lines[:10]).lstrip().startswith("["):
        raise InputError(f"{form} but a JSON array: write each of its rows on a separate line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append((f"{flag} {path}, line {number}", json.loads(line)))
            json.dumps(rows[-1], ensure_ascii=False).encode()  # fails at half an emoji, which no tokenizer reads
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else error
            raise InputError(f"{form}: line {number} cannot be read: {reason}") from error
    return rows


def read_problem(args, row):
    """A row {"question", "answer"} in gsm8k's form, "… <<48/2=24>>24 … #### 72"; or {"prompt", "answer"}. With --reward
    a prompt needs no answer, and the row's other columns are kept."""
    names = ("question" if args.task == "gsm8k" else "prompt", "answer")
    has_no_verifier = args.reward and args.task == "jsonl"
    prompt, messages = read_prompt(row, names[:1] if has_no_verifier else names, f"task {args.task}")
    prompt, answer = prompt.strip(), row.get("answer")
    columns = tuple((name, x) for name, x in row.items() if name != names[0]) if args.reward else ()
    if messages and args.instruction is not None:
        raise InputError("--instruction is for prompts that are texts, this one is a list of messages")
    if messages and args.system is not None and messages[0]["role"] in ("system", "developer"):
        raise InputError(f"--system adds a system turn, and this prompt has one: {shortened(messages[0])}")
    if has_no_verifier:  # an answer that the verifier could not compare is left out; the functions still get it
        problem = Problem(prompt, str(answer).strip(), messages=messages, columns=columns)
        with suppress(InputError):
            if isinstance(answer, (str, int)) or is_finite_number(answer):
                check_answer(problem)
                return problem
        return problem._replace(answer=None)
    if not (isinstance(answer, (str, int)) or is_finite_number(answer)) or not str(answer).strip():
        raise InputError(f"answer must be a text or a number, found {shortened(answer)}")
    answer = str(answer).strip()
    if args.task == "jsonl":
        return Problem(prompt, answer, messages=messages)
    worked, _, final = answer.partition("####")
    final = final.strip()
    if not final:
        raise InputError(f"task gsm8k needs #### before the answer, found {answer[-60:]!r}")
    values = (*re.findall(r"=([^=<>]*)>>", worked), final)
    solution = re.sub(r"<<[^<>]*>>", "", worked).strip() + f"\n#### {final}"
    columns = tuple((name, x) for name, x in columns if name != "answer")  # functions get the number after ####
    return Problem(prompt, final, values, solution, columns=columns)


def read_prompt(row, names, what):
    """(prompt as a text, its messages) of a row with these columns, of which the first is the prompt: a text or, if it
    is no question of gsm8k, the messages of a chat, {"role", "content"} each, the last of which the model answers."""
    if not isinstance(row, dict) or not set(names) <= row.keys():
        found = ", ".join(row) if isinstance(row, dict) else shortened(row)
        raise InputError(f"{what} needs rows with {' and '.join(names)}, found {found}")
    prompt, messages, kinds = row[names[0]], (), "a text" + " or a list of messages" * (names[0] == "prompt")
    if isinstance(prompt, list) and names[0] == "prompt":
        messages = tuple(prompt)
        are_whole = all(isinstance(x, dict) and None not in (x.get("role"), x.get("content")) for x in messages)
        if not messages or not are_whole or not messages[-1]["content"]:
            raise InputError(f"each message needs role and content, found {shortened(prompt)}")
        if messages[-1]["role"] == "assistant":
            raise InputError("the last message must not be the assistant's, which the model is to write")
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{names[0]} must be {kinds}, found {shortened(prompt)}")
    return prompt, messages


def shortened(value, length=60):
    """A value as Python writes it, on one line, cut to a length."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}…"


def is_finite_number(x):
    """Whether x is a number (of Python, numpy or torch) that float32 can hold. NaN and texts are not."""
    try:
        return not isinstance(x, (str, bytes)) and abs(float(x)) <= torch.finfo(torch.float32).max
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def load_eval_problems(args):
    """The problems of --eval-data, or of gsm8k's test split. [] if the held-out ones are some of the problems found."""
    if not has_eval_problems(args):
        return []
    found = read_problems(args, read_rows(args.eval_data, "--eval-data", "test"))
    if not found:
        raise InputError(f"--eval-data {args.eval_data} holds no problem")
    return list({problem.prompt: problem for problem in found}.values())


def has_eval_problems(args):
    """Do the held-out problems come from --eval-data, or from gsm8k's test split? If not, they are split off."""
    return args.eval_data is not None or (args.task == "gsm8k" and args.data is None)


def read_problems(args, rows):
    """The problems of such rows in random order: in a sorted file the first ones are alike."""
    problems = []
    for where, row in rows:
        with refused(where):
            problems.append(read_problem(args, row))
            check_answer(problems[-1])
    names = dict.fromkeys(name for problem in problems for name, _ in problem.columns)  # None where a row lacks one
    problems = [problem._replace(columns=(*(names | dict(problem.columns)).items(),)) for problem in problems]
    random.Random(args.seed).shuffle(problems)
    return problems


def check_problems(args, found, drawn, problems, learned, held_out):
    """Refuse a task that is too small, and say what of the problems found is left out: not drawn, drawn twice, held out
    by --eval-data. --evaluate and --ask learn from none of them."""
    if args.evaluate or args.ask is not None:
        return
    if not found:
        raise InputError(f"--data {args.data} has no rows")
    prompts_per_step = args.prompts_per_step or 1  # None: chosen later, at most as many as there are
    num_in_both = len(problems) - len(learned) if has_eval_problems(args) else 0
    other = f"--eval-data {args.eval_data}" if args.eval_data else "gsm8k's test split"
    if len(learned) < prompts_per_step or not held_out:
        where = f"{num_in_both} stand in {other} too" if num_in_both else f"{len(held_out)} are held out"
        raise InputError(
            f"too few problems: of {len(problems)} with different prompts {where} and {len(learned)} are left, and a "
            f"step takes {prompts_per_step}. Bring more, or lower --prompts-per-step or --eval-problems"
        )
    left_out = {
        f"are left out by --num-problems {args.num_problems}": len(found) - len(drawn),
        "are left out because another has the same prompt": len(drawn) - len(problems),
        "of these have another answer than it": len({(x.prompt, x.answer) for x in drawn}) - len(problems),
        f"are left out because they stand in {other} too": num_in_both,
    }
    say(f"problems    {len(learned):,} to learn from, {len(held_out):,} held out")
    for why, count in left_out.items():
        if count:
            say(f"            {count:,} {why}")
    if args.reward:
        check_own_reward(args, problems, held_out)


# ---- Verifiers: is an answer right? ----
#
# Whatever a verifier lets pass is what the policy will learn. Numbers are compared by their exact value. Expressions
# are parsed and never run. Texts must be equal once case, quotation marks and "The answer is" are taken off.

# Signs that can be written in several ways, and the one way that is used here
ONE_WAY = str.maketrans(
    dict.fromkeys("‐‑‒–−－", "-")
    | dict.fromkeys("’‘", "'")
    | dict.fromkeys("“”", '"')
    | dict.fromkeys("\t\u00a0\u2009\u202f\u3000", " ")
    | {"²": "^2", "³": "^3", "°": ""}
)
REWRITTEN = [  # (pattern, replacement)
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname) ?\{([^{}]*)\}", r"\1"),
    (r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\!|\^(?:\\circ|\{\\circ\})", ""),
    (r"\\[,;: ]|\\quad|~", " "),
    (r"\{,\}", ","),
    (r"\\([$%])", r"\1"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
]
NUMBER = re.compile(
    r"(?P<root>√|\\sqrt(?:\[[0-9]+\])? ?\{?|\}\{)?"
    # after a digit, a letter or a parenthesis a minus subtracts, elsewhere it is a sign
    r"(?P<minus>(?<![0-9A-Za-z)\]}^])-)?[$€£¥₹]?"
    # no digits of a word, an exponent or an index: the 2 of cm2, m^2, s^{-2}, x_2
    r"(?<![0-9A-Za-z_^])(?<![_^][-{])(?<!\^\{-)(?<![0-9]\.)"
    r"(?:(?P<whole>[0-9]{1,9}) (?=[0-9]+/[0-9]))?"  # 1 1/2
    # commas, apostrophes and spaces count between groups of three digits; "2 3 100" is three numbers
    r"(?P<digits>(?:[0-9]{1,3}(?:[,'][0-9]{3})+(?![0-9])|(?<![0-9] )[0-9]{1,3}(?: [0-9]{3})+(?! ?[0-9])|[0-9]+)"
    r"(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    r"(?:[eE](?P<e>[+-]?[0-9]{1,3})(?![0-9A-Za-z])"  # 1e3
    r"| ?(?:[x×*·⋅]|\\times|\\cdot) ?10\^(?P<ten>-?[0-9]{1,3}|\{-?[0-9]{1,3}\})"  # 1.5 × 10^3
    r"|\^(?P<power>-?[0-9]{1,2}|\{-?[0-9]{1,2}\}))?"  # 2^10
    r"(?: ?/ ?(?P<divisor>[0-9]+(?![0-9.])))?"  # 1/2
    r"(?P<unread>[:/.][0-9][0-9:/.]*|\^|[√π]| ?\\(?:pi|sqrt|frac)|[xyzi](?![A-Za-z]))?"  # 10:30, 1.2.3, 2π, 3x
    r"(?: ?%)?"
)


def one_way(text):
    """The text with each sign and LaTeX command written in one way, so that what follows must know only that one."""
    if text.isascii() and not re.search(r"[\\*{~\t]", text):
        return text
    text = unicodedata.normalize("NFC", text).translate(ONE_WAY)
    for pattern, replacement in REWRITTEN:
        text = re.sub(pattern, replacement, text)
    return re.sub(r"(?<=[\w)])\*\*(?=[\w(])", "^", text)


def slashed(text):
    """½ and \\frac{1}{2} written as 1/2, and 1\\frac12 as 1 1/2, which NUMBER can read."""
    text = one_way(text)
    if text.isascii() and "\\frac" not in text:
        return text
    for sign, fraction in (("½", "1/2"), ("¼", "1/4"), ("¾", "3/4")):
        text = re.sub(f"(-?){sign}", rf" \g<1>{fraction}", text)
    text = re.sub(r"(?<=[0-9])\\frac", r" \\frac", text)
    return re.sub(r"\\frac(?:\{(-?[0-9]+)\}|([0-9])) ?(?:\{([0-9]+)\}|([0-9]))", r"\1\2/\3\4", text)


def value_of(match):
    """The exact value of what NUMBER found. None if it is the beginning of something else: 10:30, 2π, √2."""
    if len(match[0]) > 40 or match["root"] or match["unread"]:
        return None
    digits = re.sub(r"[,' ]", "", match["digits"])
    value = Fraction(digits) if "." in digits else int(digits)
    try:
        if match["e"] or match["ten"]:
            value *= Fraction(10) ** int((match["e"] or match["ten"]).strip("{}"))
        if match["power"]:
            value = Fraction(value) ** int(match["power"].strip("{}"))
        if match["divisor"]:
            value = int(match["whole"] or 0) + Fraction(value) / int(match["divisor"])
    except ZeroDivisionError:
        return None
    return -value if match["minus"] else value


def as_number(text):
    """The exact value of a number as people write it: 28,080, −3, $1.50, 1/2, 1e3. None for anything else."""
    match = NUMBER.fullmatch(slashed(text)) if len(text) <= 60 else None
    return value_of(match) if match else None


def ending(text):
    """The last 2,000 characters, without the word or number that the cut would halve."""
    return text if len(text) <= 2000 else text[-2000:].lstrip(".," + string.ascii_letters + string.digits)


OPERATIONS = {ast.Add: Fraction.__add__, ast.Sub: Fraction.__sub__, ast.Mult: Fraction.__mul__}
OPERATIONS[ast.Div] = Fraction.__truediv__


def value_and_numbers(expression, is_free=False):
    """(value, numbers used) of an expression of + - * / and integers: parsed, never evaluated [G20]. Else None.
    is_free: decimals and a minus before a number too."""
    expression = expression.replace("×", "*").replace("÷", "/").replace("−", "-")
    if not re.fullmatch(r"[0-9.+\-*/() ]{1,100}" if is_free else r"[0-9+\-*/() ]{1,100}", expression):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    used = []

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if is_free and isinstance(node, ast.Constant) and type(node.value) is float and math.isfinite(node.value):
            return Fraction(repr(node.value))
        if is_free and isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        raise ValueError

    try:
        return value(tree), used
    except (ValueError, LookupError, ZeroDivisionError):
        return None


def countdown_value(expression, numbers):
    """Value of an expression of + - * / that uses each number once, else None."""
    found = value_and_numbers(expression)
    return found[0] if found and Counter(found[1]) == Counter(numbers) else None


STOPS = " \n.,;:?…。，：！？"
QUOTES = ('""', "''", "**", "__", "«»", "「」")
LEAD_IN = re.compile(
    r"^(?:(?:so|thus|hence|therefore)\b,? ?"
    r"|(?:the |my )?(?:final |correct )?(?:answer|solution|result)(?: is\b| ?[:=]) ?:? ?"
    r"|(?:it is|it's|that is|this is|i get|we get|option|choice)\b:? ?|= ?"
    r"|(?:la |die )?(?:respuesta|réponse|antwort|ответ|答案|答え)(?: (?:es|est|ist|lautet)\b|是|为|は| ?[:：]) ?:? ?)+",
    re.IGNORECASE,
)


def bare(text):
    """The text without what only surrounds an answer: dollars, \\boxed, Markdown, quotation marks, punctuation."""
    text = re.sub(r"\\boxed(?![A-Za-z])|\\[()\[\]]|\$|\*\*|`|^ *#+", "", one_way(text)).strip()
    size = -1
    while len(text) != size:
        size = len(text)
        ends_in_word = re.search(r"[^\W\d]{2}!+$", text[-4:])  # Yes! but not 5! or n!
        text = text.rstrip(STOPS + "!" * bool(ends_in_word)).lstrip(" \n¿¡")
        if len(text) > 1 and text[0] + text[-1] in QUOTES:
            text = text[1:-1]
    option = re.fullmatch(r"\(?(\w+)\)", text)  # (A), A)
    return option[1] if option else text


def without_lead_in(line):
    """The answer in "The answer is Paris.", or the whole line if nothing would be left of it."""
    return bare(LEAD_IN.sub("", bare(line))) or bare(line)


def unboxed(text):
    """What stands in the last \\boxed{…}, or the whole text if there is none."""
    starts = [match.end() for match in re.finditer(r"\\boxed ?\{", text)]
    depth = 1
    for position in range(starts[-1], len(text)) if starts else ():
        depth += (text[position] == "{") - (text[position] == "}")
        if not depth:
            return text[starts[-1] : position]
    return text


def last_line(text):
    """The last line that is not empty, of the last \\boxed{…} or of the text. It looks at twenty lines."""
    return next((line for line in unboxed(ending(text)).splitlines()[:-21:-1] if bare(line)), "")


def key(text):
    """A form that equal texts share: no case, numbers by their value, spaces only between words and between digits."""
    if len(text) > 200:
        return " ".join(text.casefold().split())
    text = NUMBER.sub(lambda x: x[0] if (value := value_of(x)) is None else f" {value} ", slashed(text.casefold()))
    text = " ".join(text.split())
    return re.sub(r"(?<![^\W\d_]) (?!\d)|(?<!\d) (?![^\W\d_])", "", text)


def wanted_number(problem):
    """The value of the right answer if it is a number, else None."""
    return as_number(bare(unboxed(problem.answer)))


def final_answer(problem, completion):
    """What a completion answers, in a form that can be compared and counted. None if it gives no answer."""
    if problem.numbers:
        lines = completion.strip().splitlines()
        expression = lines[-1].partition("=")[0].strip() if lines else ""
        return countdown_value(expression, problem.numbers)
    if wanted_number(problem) is not None:
        return last_number(unboxed(ending(completion)))
    return key(without_lead_in(last_line(completion))) or None


def check_answer(problem):
    """Refuse a right answer that no completion could match, or that needs math-verify when that is not installed."""
    if problem.answer is None:
        return
    if not is_right(problem, problem.answer):
        shown = repr(problem.answer[:60])
        raise InputError(f"nothing could match the answer {shown}: empty but for punctuation, or too long")
    if wanted_number(problem) is None and is_mathematics(problem.answer):
        math_verifier()


def last_number(text):
    """Value of the last number in the text [G20], None if there is none: the answer comes at the end."""
    match = None
    for match in NUMBER.finditer(ending(slashed(ending(text)))):  # noqa: B007
        pass
    return value_of(match) if match else None


def is_right_text(problem, completion, given):
    """Does a completion answer as the problem wants, where that is no number [G20]? `given` is its final_answer().

    In general the wanted answer says what is compared:
    A number (18, 1,000, 1/2, 1e3, −5, $18, 50%): its exact value with the last number of the completion. What follows a
    number is its unit and is set aside, % too: 50% is 50, and not 0.5.
    Anything else: its text with the last line of the completion, as it is or without a lead-in ("The answer is"). They
    must be equal, but for case, outer punctuation, dollars, \\text{} and the way in which a number is written. Nothing
    is searched inside a sentence. An answer of several lines is compared with the whole completion.
    Mathematics (x^2+1, (2,3), \\sqrt{2}: is_mathematics), if its text differs: by math-verify with the last formula
    between dollars in the last line, or with all of that line.
    Where a completion has a \\boxed{}, only what stands in the last one is read.
    """
    wanted, line = unboxed(problem.answer), last_line(completion)
    if key(bare(wanted)) in (given, key(bare(line))) or ("\n" in wanted and key(bare(wanted)) == key(bare(completion))):
        return True
    if not is_mathematics(wanted):
        return False
    formulas = re.findall(r"\$+([^$]+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]", line)
    line = "".join(formulas[-1]) if formulas else without_lead_in(line)
    return same_mathematics(as_latex(wanted), as_latex(line))


# ---- Mathematics, by math-verify in a separate process ----
#
# Needed only where the right answer of a problem is a formula.

FUNCTIONS = "sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|log|ln|exp|pi"


def has_words(text):
    """Does the text hold a word that is not the name of a function? Up to three letters may be a product: abc."""
    letters = re.sub(rf"\\[A-Za-z]+|(?<![A-Za-z])(?:{FUNCTIONS})(?![A-Za-z])", " ", text)
    return bool(re.search(r"[^\W\d_]{4}|\b(?:or|and|not|no|yes|is|in|to|of|the)\b", letters, re.IGNORECASE))


OPERATION = re.compile(
    r"\\[A-Za-z]|[√π∞]|[+*^=<>≤≥≠×·∪∩] *[\w\\({\[|.-]"  # a command of LaTeX, an operator with something behind it
    r"|[(\[{].*,.*[)\]}]"  # a list
    r"|(?<![A-Za-z\d])\d+[A-Za-z](?![A-Za-z])"  # 2x
    r"|(?<![A-Za-z])[A-Za-z] ?[-/] ?(?:[A-Za-z](?![A-Za-z])|[\d(])|[\d)] ?[-/] ?[A-Za-z](?![A-Za-z])"  # x-1, 1/x
)


def is_mathematics(answer):
    """Is the right answer a formula? It is if it has no words, and has an OPERATION or dollars around it. Dates, times
    and scores are texts: digits with only - / . : between them are no operation, and neither is the - of x-ray."""
    return not has_words(bare(answer)) and bool(OPERATION.search(bare(answer)) or re.search(r"\$.+\$", answer))


def as_latex(text):
    """A formula as LaTeX, however it was typed: x**10, x^(n+1), sqrt(2), √2, >=."""
    text = bare(text)
    text = re.sub(rf"(?<![\\A-Za-z])({FUNCTIONS})(?![A-Za-z])", r"\\\1 ", text)
    text = re.sub(r"(?:√|\\sqrt) ?(?:\(([^()]*)\)|(\w+))", r"\\sqrt{\1\2}", text)
    text = re.sub(r"\^(?:\(([^()]*)\)|(-?\d+))", r"^{\1\2}", text)
    for sign, command in ((">=", "\\ge "), ("<=", "\\le "), ("∞", "\\infty "), ("∪", "\\cup "), ("·", "\\cdot ")):
        text = text.replace(sign, command)
    return text


@lru_cache(maxsize=10_000)
def same_mathematics(wanted, given):
    """Do two formulas in LaTeX mean the same? No if the given one has words or more than 200 characters, if the
    brackets of a list differ, or if it is an equation and an expression is wanted. Else math-verify decides, within
    3 seconds."""
    given = given if "=" in wanted else re.sub(r"^[A-Za-z](?:\([a-z]\))? ?= ?", "", given)  # y = x^2
    if not re.fullmatch(r"[ -~Α-ω≤≥≠×÷]{1,200}", given) or has_words(given) or ("=" in given) > ("=" in wanted):
        return False
    ends = [re.sub(r"\\([{}])", r"\1", text) for text in (wanted, given)]
    if re.fullmatch(r"[(\[{].*,.*[)\]}]", ends[0]) and len({text[0] + text[-1] for text in ends}) > 1:
        return False
    with MATH_LOCK:
        worker, verdict = math_verifier(), ""
        try:
            worker.stdin.write(json.dumps([wanted, given]) + "\n")
            worker.stdin.flush()
            verdict = worker.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            if not verdict:  # it took too long or was interrupted: a late verdict must not be read as the next one's
                worker.kill()
                worker.communicate()
                math_verifier.cache_clear()
    return verdict == "True\n"


# math-verify limits its time by signals. They work in the main thread only and do not stop a long product of integers.
# Here, a process that takes too long ends itself, and the next formula starts a new one.
MATH_LOCK = threading.Lock()
MATH_WORKER = """
import faulthandler, json, sys
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

config = LatexExtractionConfig(True, -1, NormalizationConfig(True, False, True, False, "none", False))

def is_same(*formulas):
    parsed = [parse(f"${text}$", [config], "no_fallback", parsing_timeout=None) for text in formulas]
    return verify(*parsed, float_rounding=12, timeout_seconds=None)

print(is_same("(x+1)^2", "x^2 + 2x + 1"), flush=True)  # loads everything before the first formula's time is taken
for line in sys.stdin:
    faulthandler.dump_traceback_later(3, exit=True)
    verdict = is_same(*json.loads(line))
    faulthandler.cancel_dump_traceback_later()
    print(verdict, flush=True)
"""


@cache
def math_verifier():
    """The process that compares formulas."""
    if importlib.util.find_spec("math_verify") is None:
        raise InputError("an answer is mathematics: pip install math-verify to compare it")
    command, pipe = [sys.executable, "-c", MATH_WORKER], subprocess.PIPE
    worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    if worker.stdout.readline() != "True\n":
        raise InputError(f"an answer is mathematics, and math-verify does not work in {sys.executable}")
    return worker


# ---- The steps of a completion; what a reward must be ----


def truncated_rows(args, group, eos_ids):
    """(G,) which completions of a group have neither an EOS nor a --stop within max_tokens."""
    has_ended = torch.isin(group.tokens, torch.tensor(eos_ids, dtype=torch.long)).any(-1)
    return ~(has_ended | torch.tensor([has_stop(args.stop, text) for text in group.texts]))


def lengths_of_texts(args, group, is_truncated):
    """Tokens of each completion of a group. One that max_tokens cut has max_tokens, also if a tool wrote the last."""
    lengths = lengths_of(group.mask)
    if args.tools == "none":
        return lengths
    return [group.mask.shape[1] if cut else length for length, cut in zip(lengths, is_truncated.tolist())]


def step_ids_of(tokenizer, group, step_of_line):
    """(G, T): the step of each token is that of its line. A newline belongs to the line that it ends."""
    ids = torch.full(group.tokens.shape, -1)
    for i, (row, length) in enumerate(zip(group.tokens.tolist(), lengths_of(group.mask))):
        line = 0
        for t, text in enumerate(tokenizer.batch_decode([[token] for token in row[:length]], skip_special_tokens=True)):
            ids[i, t] = step_of_line[i][min(line, len(step_of_line[i]) - 1)]
            line += text.count("\n")
    return ids


def parts_by_name(rows, group, step):
    """The dicts that reward_parts() gave for the completions of a group, as one dict of lists. Refuses a reward that is
    no finite number: it would become the weights."""
    if not all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows):
        found = " and ".join(sorted({str(list(row) if isinstance(row, dict) else row) for row in rows}))
        raise InputError(f"reward_parts must give every completion the same rewards, in step {step} it gave {found}")
    for row, text in zip(rows, group.texts):
        for name, reward in row.items():
            if not is_finite_number(reward):
                raise InputError(
                    f"reward {name} is {shortened(reward)} in step {step}, where a finite number is needed: problem "
                    f"{shortened(group.problem.prompt)}, completion {shortened(text)}"
                )
    return {name: torch.tensor([float(row[name]) for row in rows]) for name in rows[0]}


# ---- Your own reward (--reward) ----
#
# Needed where no verifier can say what is right. A function gets by name what it has parameters for. One that names
# prompts, completions or completion_ids gets lists, as TRL's GRPOTrainer gives them, in one call for all completions of
# a rollout: so a slow judge can read them at the same time. Any other is called for each completion.

FOR_LISTS = ("prompts", "completions", "completion_ids")
TRAINER = ("trainer_state", "log_metric", "log_extra")  # what TRL gives besides
# reward/… of other rewards
CURVES = ("mean", "std", "verifier", "format", "length", "overlong", "truncation", "model", "steps")
LOGGED = {}  # name → the numbers that functions gave to log_metric in this rollout
STATE = SimpleNamespace(global_step=0, max_steps=0)  # trainer_state


def with_absolute_path(reward):
    """FILE.py or FILE.py:name,name with the absolute path of the file. None stays None."""
    if reward is None:
        return None
    found = re.fullmatch(r"(.+\.py)(:\w+(?:,\w+)*)?", reward)
    if not found:
        raise ValueError(f"reward must be a file such as rewards.py, or rewards.py:name,name, got {reward!r}")
    return f"{Path(found[1]).expanduser().absolute()}{found[2] or ''}"


def file_of(reward):
    return f"{reward.rpartition('.py')[0]}.py"


@cache
def own_functions(reward):
    """{name: function}: those that --reward names, or those of its file whose names begin or end with `reward`."""
    file, names = file_of(reward), reward.rpartition(".py")[2].removeprefix(":")
    if not Path(file).is_file():
        raise InputError(f"--reward {file}: there is no such file")
    if str(Path(file).parent) not in sys.path:
        sys.path.append(str(Path(file).parent))  # for what the file imports
    spec = importlib.util.spec_from_file_location("own_reward", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"--reward {file}{line_in(file, error)} cannot be imported: {one_line(error)}") from error
    found = {name: getattr(module, name, None) for name in names.split(",") if name}
    for name, x in {} if names else vars(module).items():
        is_defined_here = callable(x) and not isinstance(x, type) and getattr(x, "__module__", None) == spec.name
        if is_defined_here and re.fullmatch(r"reward.*|[^_].*reward", name):
            found[name] = x
    if not found:
        raise InputError(f"--reward {file} defines no function whose name begins or ends with reward")
    for name, function in found.items():
        if not callable(function):
            own = [key for key, x in vars(module).items() if getattr(x, "__module__", None) == spec.name]
            raise InputError(f"--reward {file} has no function {name}, it has {', '.join(own) or 'none'}")
        if name in CURVES:
            raise InputError(f"--reward {file}: rename {name}, because reward/{name} is another curve")
    return found


def line_in(file, error):
    """The words ", line 12" if that is where in this file an exception was raised, else no words."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines = [error.lineno]
    return f", line {lines[-1]}" if lines else ""


def is_for_lists(function):
    return any(name in inspect.signature(function).parameters for name in FOR_LISTS)


def check_own_reward(args, problems, held_out):
    """Load the functions, print their names, and refuse one that has a parameter which cannot be given."""
    own_functions.cache_clear()  # the file may have changed since the last run of this process
    LOGGED.clear()
    file, names = file_of(args.reward), []
    columns = {"answer", *(dict(problems[0].columns).keys() & dict(held_out[0].columns).keys())}
    for name, function in own_functions(args.reward).items():
        with refused(f"--reward {file}: the parameters of {name} are unknown", (TypeError, ValueError)):
            signature, of_lists = inspect.signature(function), is_for_lists(function)
        offered = {*columns, *(FOR_LISTS + TRAINER if of_lists else ("prompt", "completion"))}
        with refused(f"--reward {file}: {name} is given by name {', '.join(sorted(offered))}", TypeError):
            signature.bind(**dict.fromkeys(offered & signature.parameters.keys()))
        names.append(f"{name} (lists)" if of_lists else name)
    say(f"reward      {', '.join(names)} of {file}")
    num_unknown = sum(problem.answer is None for problem in problems)
    if num_unknown:
        say(f"            {num_unknown:,} problems have no answer that can be compared, so accuracies leave them out")


def with_own_rewards(args, groups, step=None):
    """The groups with the rewards of --reward's functions, if there are any. step: None in an evaluation."""
    if not args.reward:
        return groups
    columns, rewards = columns_of(groups), {}
    if step is not None:
        STATE.global_step, STATE.max_steps = step, args.steps
    for name, function in own_functions(args.reward).items():
        rewards[name] = torch.tensor(rewards_by(args, name, function, columns, step)).view(len(groups), -1)
    return [group._replace(own_rewards=(*zip(rewards, own),)) for group, own in zip(groups, zip(*rewards.values()))]


def own_rewards_of(args, groups):
    """The mean reward of each group of an evaluation, all functions added up; NaN without --reward."""
    if not args.reward:
        return [math.nan] * len(groups)
    return [sum(own.nan_to_num().mean() for _, own in group.own_rewards) for group in with_own_rewards(args, groups)]


def columns_of(groups):
    """{name: a list over all completions} of what functions can be given. Prompts are texts or lists of messages, as
    the data has them, and the completion of messages is a list of one message."""
    rows = []
    for group in groups:
        problem, messages = group.problem, group.problem.messages
        for text, tokens, length in zip(group.texts, group.tokens.tolist(), lengths_of(group.mask)):
            sampled = {
                "prompt": [dict(message) for message in messages] if messages else problem.prompt,
                "completion": [{"role": "assistant", "content": text}] if messages else text,
                "completion_ids": tokens[:length],
            }
            rows.append({"answer": problem.answer} | dict(problem.columns) | sampled)
    return {name: [row[name] for row in rows] for name in rows[0]}


def rewards_by(args, name, function, columns, step):
    """The rewards of a function for all completions: a list of floats, NaN where it gave None."""
    pairs = zip(columns["prompt"], columns["completion"])
    about = [f"problem {shortened(prompt)}, completion {shortened(completion)}" for prompt, completion in pairs]
    gave = f"--reward {file_of(args.reward)}: {name} gave"
    if is_for_lists(function):
        given = {f"{x}s" if x in ("prompt", "completion") else x: list(column) for x, column in columns.items()}
        given |= {"trainer_state": STATE, "log_extra": lambda *table: None}  # log_extra: TRL's table of completions
        given["log_metric"] = log_metric if step is not None else lambda name, value: None
        rewards = result_of(args, name, function, given, f"{about[0]}, the first of {len(about)}")
        rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards  # of numpy or torch
        is_list = isinstance(rewards, (list, tuple))
        if not is_list or len(rewards) != len(about):
            found = f"a list of {len(rewards)}" if is_list else shortened(rewards)
            raise InputError(f"{gave} {found}, and a list of {len(about)} rewards is needed, the first for {about[0]}")
    else:
        single = {x: column for x, column in columns.items() if x != "completion_ids"}
        rows = [dict(zip(single, row)) for row in zip(*single.values())]
        rewards = [result_of(args, name, function, row, own) for row, own in zip(rows, about)]
    for reward, own in zip(rewards, about):
        if reward is not None and not is_finite_number(reward):
            raise InputError(f"{gave} {shortened(reward)}, and a finite number or None is needed: {own}")
    return [math.nan if reward is None else float(reward) for reward in rewards]


def result_of(args, name, function, given, about):
    """What a function returns, called with those of the arguments that it has parameters for. Coroutines are run."""
    parameters = inspect.signature(function).parameters
    if not any(x.kind == x.VAR_KEYWORD for x in parameters.values()):
        given = {x: value for x, value in given.items() if x in parameters}
    try:
        result = function(**given)
        return event_loop().run_until_complete(result) if inspect.isawaitable(result) else result
    except (Exception, SystemExit) as error:
        file = file_of(args.reward)
        raise InputError(f"--reward {file}{line_in(file, error)}: {name} raised {one_line(error)}: {about}") from error


event_loop = cache(asyncio.new_event_loop)  # one for all calls, so that a function can keep its connections open


def log_metric(name, value):
    LOGGED.setdefault(name, []).append(float(value))


def logged_metrics():
    """The means of what functions gave to log_metric in this process since the last call."""
    row = {f"logged/{name}": sum(values) / len(values) for name, values in LOGGED.items()}
    LOGGED.clear()
    return row


# ---- A learned reward model, R_φ ----
#
# Needed with --reward-model: any classifier with one output. It must read an answer in the form that it was trained on,
# or its scores mean little.


def load_reward_model(args):
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, info = from_disk("AutoModelForSequenceClassification", args.reward_model, **options)
    if info["missing_keys"] or model.config.num_labels != 1:
        raise InputError(f"{args.reward_model} is no reward model: it has no trained head with one output")
    tokenizer = from_disk("AutoTokenizer", args.reward_model)
    if tokenizer.cls_token and not tokenizer.chat_template:
        raise InputError(f"{args.reward_model} is an encoder without a chat template; how it reads pairs is not known")
    return model.to(args.device).eval(), tokenizer


def answers_of(args, group, is_truncated):
    """What a reward model reads of a group: G times (prompt, completion, has it ended). Prompts: texts or messages."""
    is_chat = group.problem.messages or args.system is not None
    prompt = messages_of(args, group.problem) if is_chat else told(args, group.problem)
    return [(prompt, text, not cut) for text, cut in zip(group.texts, is_truncated.tolist())]


def reward_ids(tokenizer, prompt, text, has_ended):
    """The tokens of an answer in the form that the reward model was trained on [G30]: its tokenizer's chat template. If
    it has none, the form of rlhf_gpt2_ppo.py: prompt, response, and EOS if the response has ended."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        with refused(f"the reward model's chat template refuses the answer {text[:60]!r}", Exception):
            whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": text}], tokenize=False)
        return tokenizer(whole, add_special_tokens=False)["input_ids"]
    if not isinstance(prompt, str):
        raise InputError("the reward model has no chat template for prompts that are lists of messages: bring texts")
    prompt_ids, ids = tokenizer([prompt, text], add_special_tokens=False)["input_ids"]
    return [*prompt_ids, *ids, *[tokenizer.eos_token_id] * (has_ended and tokenizer.eos_token_id is not None)]


def raw_scores(model, tokenizer, answers):
    """(N,) scores of (prompt, completion, has it ended), with gradients. If one exceeds the context, its end is read.

    Padding stands on the right, and is a token that no row holds: the head looks for it to find each row's last token.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    rows = [reward_ids(tokenizer, *answer) for answer in answers]
    if max(map(len, rows)) > context:
        warnings.warn(f"an answer exceeds the reward model's context: its last {context} tokens are read", stacklevel=2)
    rows = [row[-context:] for row in rows]
    padding = min(set(range(1 + sum(map(len, rows)))).difference(*rows))
    model.config.get_text_config().pad_token_id = padding
    longest = max(map(len, rows))
    ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows], device=model.device)
    return model(input_ids=ids, attention_mask=(ids != padding).long()).logits[:, 0]


@torch.no_grad()
def score_texts(model, tokenizer, answers):
    """(N,) scores, normalised by the mean and deviation in the config, where rlhf_gpt2_ppo.py keeps them."""
    scores = raw_scores(model, tokenizer, answers).cpu()
    return (scores - getattr(model.config, "reward_mean", 0.0)) / getattr(model.config, "reward_std", 1.0)


def pairs_of(args, group, rating):
    """(right, wrong) pairs of one group's answers, judged by the verifier. The reward model learns from them."""
    texts = answers_of(args, group, rating.is_truncated)
    is_right = rating.parts["verifier"].bool().tolist()
    right = [text for text, it_is in zip(texts, is_right) if it_is]
    return list(zip(right, [text for text, it_is in zip(texts, is_right) if not it_is]))


class RewardModel:
    """The learned reward R_φ. With --reward-model-steps it keeps learning, from (right, wrong) pairs of answers."""

    def __init__(self, args):
        self.args = args
        self.model, self.tokenizer = load_reward_model(args)
        self.pairs, self.replay, self.optimizer = [], [], None  # pairs since it last learned, and older ones
        if args.reward_model_steps:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), args.reward_model_learning_rate)

    def score(self, answers):
        return score_texts(self.model, self.tokenizer, answers)

    def learn(self, step):
        """Train on the pairs of the last rollouts, with a tenth of earlier pairs in each batch [G13] (DeepSeekMath
        Algorithm 1, line 11). Returns the mean loss −ln σ(right − wrong)."""
        rng, losses = random.Random(f"{self.args.seed} reward {step}"), []
        for _ in range(self.args.reward_model_steps):
            sources = [self.replay if self.replay and i % 10 == 0 else self.pairs for i in range(20)]
            texts = [text for source in sources for text in rng.choice(source)]
            right, wrong = raw_scores(self.model, self.tokenizer, texts).view(-1, 2).T
            loss = -torch.nn.functional.logsigmoid(right - wrong).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        self.pairs, self.replay = [], (self.replay + self.pairs)[-10_000:]
        return sum(losses) / len(losses)

    def state_dict(self):
        """What is needed to resume one that learns. Any other is loaded from where it came from."""
        if self.optimizer is None:
            return {}
        states = {"reward_model": self.model.state_dict(), "reward_optimizer": self.optimizer.state_dict()}
        return {**states, "pairs": self.pairs, "replay": self.replay}

    def load_state_dict(self, saved):
        if self.optimizer is not None:
            self.model.load_state_dict(saved["reward_model"])
            self.optimizer.load_state_dict(saved["reward_optimizer"])
            self.pairs, self.replay = saved["pairs"], saved["replay"]


# ---- Models: from disk, prompts, the warm start ----
#
# The small model needs the warm start, because GRPO can only choose among what the model samples. A model that you
# bring needs prompts in its own chat form, short enough for its context.


def check_device(device):
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise InputError(f"--device {device} is not available: {reason}") from error


def from_disk(kind, name, **options):
    """transformers' AutoTokenizer, AutoModelForCausalLM, … of a Hub id or a directory."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be loaded as {kind}: {str(error).strip().splitlines()[0]}") from error


def told(args, problem):
    """The problem in the words that the model reads."""
    if args.model is None:
        return problem.prompt
    return (args.instruction or INSTRUCTIONS[args.task]).replace("{}", problem.prompt)


def messages_of(args, problem):
    """The messages of a chat that the model answers: --system's turn, if there is one, and the problem's own."""
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    return system + (list(problem.messages) or [{"role": "user", "content": told(args, problem)}])


def encode_prompt(args, tokenizer, problem):
    """The tokens that the model reads: the problem alone, or the instruction in the model's own chat form."""
    text = told(args, problem)
    if args.system is not None and not tokenizer.chat_template:
        raise InputError(f"--system needs a chat template, and {args.model} has none: use --instruction")
    if args.model is None:
        return tokenizer(f"{text}\n", add_special_tokens=False)["input_ids"]
    if not tokenizer.chat_template:
        if problem.messages:
            raise InputError(f"{args.model} has no chat template for prompts that are lists of messages: bring texts")
        ids = tokenizer(f"{text}\n")["input_ids"]
        return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids  # some append an EOS, which nothing should follow
    messages = messages_of(args, problem)
    about = f"the chat template of {args.model} refuses the prompt {shortened(problem.prompt)}"
    with refused(about, Exception):  # a template has its own words for what it refuses, such as a system role
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def context_of(model):
    """How many tokens a model has positions for; inf if its configuration names no limit."""
    config = model.config.get_text_config()
    found = [getattr(config, name, None) or 0 for name in ("max_position_embeddings", "max_seq_len")]
    return max(found) if max(found) > 0 else math.inf


def that_fit(args, context, tokenizer, problems):
    """(the problems that leave room for max_tokens in a model's context, how many do not as the beginning of a
    sentence). The small model has one token a character, so thousands of prompts need not be encoded."""
    sizes = [len(encode_prompt(args, tokenizer, x) if args.model else f"{x.prompt}\n") for x in problems]
    room = context - args.max_tokens
    kept = [problem for problem, size in zip(problems, sizes) if size <= room]
    over = f"{len(problems) - len(kept):,} of {len(problems):,} prompts, up to {max(sizes):,} tokens long, and"
    return kept, f"{over} --max-tokens {args.max_tokens} exceed the model's context of {context:,}"


def those_that_fit(args, model, tokenizer, problems, held_out):
    """(problems, held_out) without those that leave no room for max_tokens in the model's context; prints how many.

    Beyond its context a model with learned positions fails, and one with rotary positions has learned nothing.
    """
    kept, over = that_fit(args, context_of(model), tokenizer, problems + held_out)
    if len(kept) < len(problems + held_out):
        prompts = {problem.prompt for problem in kept}
        problems, held_out = ([x for x in part if x.prompt in prompts] for part in (problems, held_out))
        if len(problems) < args.prompts_per_step or len(held_out) < num_processes():
            raise InputError(f"{over}: too few are left; lower --max-tokens or shorten the prompts")
        say(f"            {over}: they are left out, {len(problems):,} and {len(held_out):,} are left")
    return problems, held_out


def new_tokenizer(has_calls=False):
    """One token for each character of arithmetic, and one for each end of a call. Padding and EOS are two tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<pad>", "<eos>", "<unk>", *"0123456789+-*/()=#,.: \n"]
    characters += ["<calc>", "</calc>"] if has_calls else []
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?calc>|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def new_model(tokenizer):
    """A Qwen3 of 0.4M parameters with random weights. Large models take the same path through the code."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def warm_start(args, model, tokenizer, problems, held_out):
    """Supervised steps on worked solutions, until some answers are right: GRPO can only choose among samples."""
    from tqdm import trange

    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    eos = tokenizer.eos_token_id
    bar = trange(args.warm_start_steps, desc="warm start")
    for step in bar:
        optimizer.param_groups[0]["lr"] = args.warm_start_learning_rate * min((step + 1) / 50, 1.0)
        count = args.warm_start_batch_size
        batch = problems_from(problems, range(step * count, (step + 1) * count), f"{args.seed} warm start")
        prompts = [encode_prompt(args, tokenizer, problem) for problem in batch]
        solutions = [[*tokenizer(problem.solution, add_special_tokens=False)["input_ids"], eos] for problem in batch]
        tokens, mask = padded(solutions)
        if args.tools != "none":
            mask = mask * padded([[*chosen_tokens(tokenizer, problem.solution), 1] for problem in batch])[0]
        logprob = policy_logprobs(replace(args, temperature=1.0), model, prompts, tokens, mask)
        loss = supervised_loss(logprob, mask.to(args.device), mask.sum().item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 24:
            names = [("warm start", i) for i in range(len(held_out))]
            groups = sample_groups(args, model, tokenizer, [eos], held_out, 1, args.temperature, names)
            right = sum(is_right(group.problem, group.texts[0]) for group in groups) / len(groups)
            bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{right:.2f}", refresh=False)
            if right >= args.warm_start:
                break
    bar.close()


def without_dropout(model):
    """Turn off dropout and jitter, in modules and configs [G14]: else the ratio compares two different networks."""
    modules = list(model.modules())
    for owner in (*modules, *(module.config for module in modules if hasattr(module, "config"))):
        if isinstance(owner, torch.nn.modules.dropout._DropoutNd):
            owner.p = 0.0
        for name, value in list(vars(owner).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(owner, name, 0.0)
    return model


def load_reference(args, name, policy=None):
    """A frozen copy of the model that the policy starts from, on the device or, with --offload, on the host."""
    device = "cpu" if args.offload else args.device
    model = load_model(replace(args, device=device), name, is_compared=False)[0].requires_grad_(False)
    if policy is not None:  # it computes as the policy does, so their KL is 0 at first
        model.plain_because = policy.plain_because
        set_spans(model, policy.has_spans)
    return stream_weights(model, args.device) if args.offload else model


INSTRUCTIONS = {
    "arithmetic": "What is {}?",
    "countdown": "{}\nUse each of the numbers once, with + - * / and parentheses, to reach the target. "
    "Write the expression alone on the last line.",
    "gsm8k": "{}\nThink step by step, a step a line, and end with #### and the answer, a number.",
    "jsonl": "{}",
}


# ---- LoRA adapters, quantized weights ----
#
# --lora-rank trains small matrices beside the frozen weights, which saves gradients and optimizer state. --quantize
# packs the frozen weights in 8 or 4 bits. You need both when the model's weights alone nearly fill the card.
# The reference costs nothing then: it is the same model with the adapter as it was at first.


def base_of_adapter(name):
    """The name of the model that a saved PEFT adapter was trained on. None if `name` is no adapter."""
    from transformers.utils import find_adapter_config_file

    path = None
    with suppress(OSError):  # neither a directory nor a name that the Hub could have
        path = find_adapter_config_file(name)
    if path is None:
        return None
    base = json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise InputError(f"{name} is an adapter, and its adapter_config.json does not say of which model")
    return base


def with_adapter(model, name):
    """The model with a saved LoRA adapter on it, which can be trained further."""
    with refused(f"{name} is an adapter, which needs peft (pip install peft)", ImportError):
        from peft import PeftConfig, PeftModel
    with refused(f"the adapter {name} does not fit {model.name_or_path}", (OSError, ValueError, RuntimeError)):
        kind = PeftConfig.from_pretrained(name).peft_type
        if kind != "LORA":
            raise ValueError(f"it is of the kind {kind.value}, and only LoRA can be trained further")
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT reads an attribute's old name
            return PeftModel.from_pretrained(model, name, is_trainable=True, torch_device="cpu")


def add_adapter(args, model):
    """Add LoRA (Hu et al. 2021) to every linear layer, in place, or the adapter that --model names.

    Returns PEFT's handle. The model's name is saved with the adapter, a directory's as a full path, so that the adapter
    loads from anywhere.
    """
    with refused("--lora-rank needs peft (pip install peft)", ImportError):
        from peft import LoraConfig, get_peft_model
    if args.model and base_of_adapter(args.model):
        adapter = with_adapter(model, args.model)
    else:
        config = LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT reads an attribute's old name
            adapter = get_peft_model(model, config)
    config = adapter.peft_config["default"]
    if config.r != args.lora_rank:
        raise InputError(
            f"--model {args.model} is an adapter of rank {config.r}: --lora-rank {config.r} trains it further, "
            "without --lora-rank it is merged and the whole model is trained"
        )
    if os.path.isdir(config.base_model_name_or_path or ""):
        config.base_model_name_or_path = os.path.abspath(config.base_model_name_or_path)
    without_dropout(model)  # an adapter can bring its own
    tuner = adapter.base_model  # it knows its layers, and parameters such as the experts of a layer
    reached = reach(
        model, [x.removesuffix(".weight") for x in tuner.targeted_module_names + tuner.targeted_parameter_names]
    )
    if "not" in reached:
        say(f"adapter     for {reached}")
    return adapter


@contextmanager
def as_begun(adapter):
    """A context in which the policy is the reference, the model as the run found it: the adapter has its first weights,
    which are no change at all if the adapter is new [G22]."""
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    now = [parameter.data for parameter in trained]
    for parameter, weights in zip(trained, adapter.first_weights):
        parameter.data = weights
    try:
        yield
    finally:
        for parameter, weights in zip(trained, now):
            parameter.data = weights


class Int8Linear(torch.autograd.Function):
    """x Wᵀ for a frozen W in 8 bits [G29]. codes (out, in) int8, scale (out,): Wᵢⱼ = scaleᵢ codesᵢⱼ.

    Backward unpacks the codes again. Autograd, left alone, would keep each layer's unpacked weights from the forward
    pass until then, which is the whole model. bitsandbytes' 8-bit product is not used, because it rounds x too, and on
    a CPU only in evaluation mode: on SmolLM2-135M that puts 0.18 nats a token between sampler and trainer, where this
    product has 0. It also keeps x where gradient checkpointing cannot free it (benchmarks/grpo_quantize.py).
    """

    @staticmethod
    def forward(ctx, x, codes, scale):
        ctx.codes, ctx.scale = codes, scale
        return torch.nn.functional.linear(x, codes.to(x.dtype)) * scale

    @staticmethod
    def backward(ctx, gradient):
        return (gradient * ctx.scale) @ ctx.codes.to(gradient.dtype), None, None


def int8_linear(module, x):
    y = Int8Linear.apply(x, module.weight, module.scale)
    return y if module.bias is None else y + module.bias


def nf4_linear(layer, device):
    """The layer in bitsandbytes' 4-bit NF4 (Dettmers et al. 2023, QLoRA §3); its product has the layer's own dtype.

    bitsandbytes 0.50.2 packs a matrix in blocks of consecutive weights. On a CPU with AVX-512 it unpacks it row by row,
    which is wrong unless a row has whole blocks. So the block is chosen by the row, and the result is looked at.
    """
    with refused("--quantize nf4 needs bitsandbytes (pip install bitsandbytes)", ImportError):
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Linear4bit, Params4bit
    sizes = layer.in_features, layer.out_features
    packed = Linear4bit(*sizes, bias=False, compute_dtype=layer.weight.dtype, quant_type="nf4", device="meta")
    block = 32 if layer.in_features % 64 else 64
    packed.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", blocksize=block)
    packed.bias = layer.bias
    packed.support_avx512bf16_for_cpu = False  # sampling would repack the weights for products without a gradient
    packed = packed.to(device)
    if torch.device(device).type == "cpu":
        gap = dequantize_4bit(packed.weight.data, packed.weight.quant_state).float() - layer.weight.float()
        if gap.norm() > 0.15 * layer.weight.float().norm():  # right is 0.09
            raise InputError(
                f"--quantize nf4: on this processor bitsandbytes unpacks rows of {layer.in_features} weights wrongly: "
                "take --quantize int8"
            )
    return packed


@torch.no_grad()
def quantize(model, kind, device):
    """Pack every linear layer but the head in 8 or 4 bits, in place, each on its way to the device.

    In 8 bits a row's largest weight becomes ±127. The scale is rounded to the model's dtype before it divides, so the
    product multiplies by what was divided by, and the scale adds no error.
    """
    head = model.get_output_embeddings()
    layers = {name: x for name, x in model.named_modules() if isinstance(x, torch.nn.Linear) and x is not head}
    if not layers:
        raise InputError(f"--quantize knows torch's linear layers, and {type(model).__name__} has none but the head")
    for name, layer in layers.items():
        if kind == "nf4":
            model.set_submodule(name, nf4_linear(layer, device))
            continue
        weight = layer.weight.to(device)
        scale = (weight.abs().amax(-1).float() / 127).clamp(min=1e-30).to(weight.dtype)
        codes = (weight.float() / scale[:, None].float()).round_().clamp_(-127, 127).to(torch.int8)
        layer.weight = torch.nn.Parameter(codes, requires_grad=False)
        layer.register_buffer("scale", scale)
        layer.forward = partial(int8_linear, layer)
    say(f"quantized   {reach(model, layers)}")


def reach(model, reached):
    """ "210 of 210 weights", or "8 of 14 weights; not experts.gate_up_proj, …": how much of the model is `reached`.

    reached: names of layers or parameters. Counted are the weights with two dimensions or more, but neither the
    embedding nor the head.
    """
    ends = [x.weight for x in (model.get_input_embeddings(), model.get_output_embeddings()) if x is not None]
    weights = [name for name, x in model.named_parameters() if x.dim() > 1 and not any(x is end for end in ends)]
    names = [name.replace(".base_layer", "").removesuffix(".weight") for name in weights if "lora_" not in name]
    left_out = [name for name in names if name not in reached]
    kinds = sorted({".".join(name.split(".")[-2:]) for name in left_out})
    return f"{len(names) - len(left_out)} of {len(names)} weights" + f"; not {', '.join(kinds)}" * bool(kinds)


def read_model(args, name):
    """(model, tokenizer) from disk or the Hub. An adapter that was saved is merged into the model that it was trained
    on; with --lora-rank that model comes without it, and add_adapter() adds it."""
    model = base_from_disk("AutoModelForCausalLM", name, dtype=getattr(torch, args.dtype))
    if base_of_adapter(name) and not args.lora_rank:
        model = with_adapter(model, name).merge_and_unload().requires_grad_(True)
    return model, read_tokenizer(name)


def base_from_disk(kind, name, **options):
    """from_disk() of a model, or of the model that an adapter was trained on."""
    base = base_of_adapter(name)
    with refused(f"{name} is an adapter, and its base_model_name_or_path") if base else nullcontext():
        return from_disk(kind, base or name, **options)


def read_tokenizer(name):
    """The tokenizer of a model. An adapter can be saved without one: then it is that of its base model."""
    if base_of_adapter(name):
        with suppress(InputError):
            return from_disk("AutoTokenizer", name)
    return base_from_disk("AutoTokenizer", name)


# ---- Texts that end a completion (--stop) ----
#
# Needed by base models, which often go on after their answer. A completion ends with the first token after which its
# text has one of the stop texts. Only few tokens can complete one, so only after these a row is decoded.


class Watch(NamedTuple):
    """How the samplers find a stop text, or a call of the tool, in what they have written."""

    tokenizer: object
    can_end: torch.Tensor  # (V,) whether what is looked for may be complete after this token
    texts: tuple = ()  # the stop texts


def has_stop(texts, completion):
    return any(text in completion for text in texts)


def before_stop(args, completion):
    """The completion without the stop text that has ended it: what a verifier judges."""
    for text in args.stop:
        completion = completion.partition(text)[0]
    return completion


def special_stops(texts, tokenizer):
    """The ids of those stop texts that are special tokens. Decoding drops these, so they end as an EOS does."""
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for text in texts:
        for name in special:
            if name in text and name != text:
                raise InputError(f"--stop {text!r} holds the special token {name}, which must be a stop text alone")
    return [special[text] for text in texts if text in special]


def find_stops(args, model, tokenizer):
    """What without_stopped() needs, None without --stop. A token that has the last letter of a stop text may end it."""
    if not args.stop:
        return None
    can_end = tokens_with({text[-1] for text in args.stop}, model, tokenizer)
    return Watch(tokenizer, can_end.to(args.device), args.stop)


def tokens_with(letters, model, tokenizer):
    """(V,) bool: which tokens may hold one of the letters. True also for a token that is a part of a letter, decoded as
    U+FFFD, and for one that may lose a space at its beginning."""
    found = torch.zeros(model.get_input_embeddings().num_embeddings, dtype=torch.bool)
    tokens = range(min(len(tokenizer), len(found)))
    pieces = tokenizer.batch_decode([[token] for token in tokens], skip_special_tokens=True)
    for token, piece in enumerate(pieces):
        found[token] = " " in letters or not letters.isdisjoint(piece) or "\ufffd" in piece
    return found


def without_stopped(model, going, tokens, t, rows=None):
    """`going` (B,), but False where the text has a stop text now that token t is written. rows: which sequences of
    `tokens` these are, if not all."""
    stops = getattr(model, "stops", None)
    if stops is None:
        return going
    tokens = tokens if rows is None else tokens[rows]
    looked_at = (going & stops.can_end[tokens[:, t]]).nonzero()[:, 0]
    texts = stops.tokenizer.batch_decode(tokens[looked_at, : t + 1].tolist(), skip_special_tokens=True)
    are_stopped = [has_stop(stops.texts, text) for text in texts]
    going[looked_at] = ~torch.tensor(are_stopped, dtype=torch.bool, device=going.device)
    return going


# ---- A calculator in the loop (--tools) ----
#
# An answer of several turns is still one row of tokens. The policy writes <calc>12*34</calc>, the calculator writes 408
# behind it, and the policy goes on. What the policy did not write has a mask of 0 [G41]. It is read and not scored: it
# is in no loss, in no ratio and in no mean, and has no gradient. Nothing else changes.

CALL = r"<calc>([^<>]*)</calc>"


def find_tool(args, model, tokenizer):
    """What ToolCalls needs, None without --tools."""
    if args.tools == "none":
        return None
    ids = tokenizer("<calc>1</calc>", add_special_tokens=False)["input_ids"]
    if not re.fullmatch(CALL, tokenizer.decode(ids, skip_special_tokens=True)):
        raise InputError(f"--tools: the tokenizer of {args.model or 'the small model'} cannot write <calc>1</calc>")
    return Watch(tokenizer, tokens_with({">"}, model, tokenizer).to(args.device))


def calculate(expression):
    """The value of an expression of + - * / and numbers as text: 408, -3, 2.5, 1/3. Empty if there is none, or if it is
    longer than 20 characters. The expression is parsed, never evaluated [G20]."""
    found = value_and_numbers(re.sub(r"(?<=\d),(?=\d{3})", "", expression), is_free=True)
    if found is None:
        return ""
    value = found[0]
    is_decimal = value.denominator > 1 and (value * 1000).denominator == 1 and abs(value) < 1e9
    text = str(float(value)) if is_decimal else str(value)
    return text if len(text) <= 20 else ""


def chosen_tokens(tokenizer, solution):
    """1 for each token of a worked solution that the policy is to write, 0 for those that the calculator writes."""
    by_tool = [(call.end(), call.end() + len(calculate(call[1]))) for call in re.finditer(CALL, solution)]
    places = tokenizer(solution, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [int(not any(start <= place < end for start, end in by_tool)) for place, _ in places]


class ToolCalls:
    """The calls of the tool while a batch is sampled. Without --tools it changes nothing."""

    def __init__(self, model, eos):
        self.tool, self.eos = getattr(model, "tool", None), eos
        self.waiting = {}  # sequence → tokens of the tool's answer that are still to be written

    def write(self, token, logprob, rows=None):
        """(token, logprob, mask), each (B,), for sampled ones: where a tool's answer waits, its next token, 0 and 0.
        rows: which sequences these are, if not the first, the second and so on."""
        chosen = torch.ones_like(token)
        if self.waiting:
            for i, row in enumerate(range(len(token)) if rows is None else rows.tolist()):
                if self.waiting.get(row):
                    token[i], logprob[i], chosen[i] = self.waiting[row].pop(0), 0.0, 0
        return token, logprob, chosen

    def read(self, tokens, t, going, rows=None):
        """Now that token t is written: compute what the sequences that end with a call ask for."""
        if self.tool is None:
            return
        self.waiting = {row: answer for row, answer in self.waiting.items() if answer}
        sequences = torch.arange(len(tokens), device=going.device) if rows is None else rows
        asking = sequences[going & self.tool.can_end[tokens[sequences, t]]]
        now, before = (
            self.tool.tokenizer.batch_decode(tokens[asking, :end].tolist(), skip_special_tokens=True)
            for end in (t + 1, t)
        )
        for row, text, old in zip(asking.tolist(), now, before):
            calls = re.findall(CALL, text)
            if row not in self.waiting and len(calls) > len(re.findall(CALL, old)):  # a token may go on behind the call
                answer = self.tool.tokenizer(calculate(calls[-1]), add_special_tokens=False)["input_ids"]
                self.waiting[row] = [token for token in answer if token not in self.eos]


# ---- Is the fast path right for this model? ----
#
# The fast path makes assumptions about a model that its code may not keep: how masks are given, what a cache layer is,
# that the logits are what the head makes. So both paths are compared on the model that you brought, before anything is
# written. Their log-probabilities must be those of one forward pass a sequence, up to rounding.

COMPARED_TOKENS = 8192  # the longest prompt on which the two paths are compared


def is_fast(args, model):
    """Whether the fast path is taken: load_model() has compared it with the plain one on this model."""
    return args.fast and not getattr(model, "plain_because", "")


def choose_path(args, model, tokenizer, name):
    """Decide how this model computes, and keep the decision with it: fast with attention in spans, fast with its own
    attention, or plain. model.plain_because says why not fast, "" if it is fast; model.has_spans is about attention."""
    config = model.config.get_text_config()
    if config.model_type == "phimoe":  # it shows only where experts are nearly equal, so no comparison can be sure
        raise InputError(f"{name} cannot be trained here: its routers sample their experts in training mode")
    if getattr(config, "router_aux_loss_coef", 0) or getattr(config, "output_router_logits", False):
        say("experts     the load-balancing loss of the model's config is not added to GRPO's")
    model.plain_because = why_plain(args, model, tokenizer, name)
    is_wide = getattr(config, "hidden_size", 0) >= SPANS_FROM
    if model.device.type == "cpu" and is_wide and not model.plain_because:
        set_spans(model, True)
        reason = why_plain(args, model, tokenizer, name) if model.has_spans else ""
        if reason:
            set_spans(model, False)
            say(f"attention   the model's own, not in spans: {reason}")


def why_plain(args, model, tokenizer, name):
    """Why the fast path is not taken with this model; "" if it is taken, because it gives what the plain path gives.

    They are compared after short prompts, then after one that is longer than any window of attention. A model that the
    plain path gets wrong is refused. Rounding makes 0.0000 nats a token in float32 and up to 0.015 in bfloat16, or 0.05
    if a router chooses another expert. A wrong mask or position makes 0.025 and more, a sampler in a router 0.2. Spans
    are compared after all else was right, and make up to 0.035 in bfloat16: as far from float32 as what they replace.
    Quantized weights need no other bounds. Measured on SmolLM2-135M in packed rows, right, wrong positions, wrong mask:
    bfloat16 0.005, 0.07, 0.18; int8 on it 0.004, 0.09, 0.28; nf4 on it 0.009, 0.06, 0.15. In float32 int8 has 0.0000,
    0.03, 0.28 and nf4 0.0000, 0.05, 0.26.
    """
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or math.inf
    windows = [x for key, x in config.to_dict().items() if type(x) is int and ("window" in key or "chunk" in key)]
    beyond = max([x for x in windows if x < context], default=0) + 20
    text = "".join(f"{i}+{i * i}={i + i * i}, " for i in range(min(beyond, COMPARED_TOKENS)))
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    is_exact = model.dtype == torch.float32 and args.quantize != "nf4"  # its products were not measured on a GPU
    odd_layers = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    odd_logits = [key for key, x in config.to_dict().items() if "logit" in key and isinstance(x, float) and x != 1]
    reason = "" if args.fast else "--no-fast"
    if odd_logits and not reason:  # a cap changes little, and is not found, before the logits have grown
        reason = f"{', '.join(odd_logits)} of its config: the fast path takes logits as the head makes them"
    if beyond > COMPARED_TOKENS and not reason:
        reason = f"a window of attention is longer than the {COMPARED_TOKENS} tokens of a comparison"
    for length in sorted({20, beyond}):  # the first is quick and finds most faults
        prompts = [tokens[:5], tokens[: min(length, context - 12, COMPARED_TOKENS)]]
        plain = differences(args, model, prompts, is_fast=False)
        if isinstance(plain, Exception):
            raise InputError(f"{name} cannot be trained here: it cannot sample with a cache: {one_line(plain)}")
        for what, difference in zip(("sampling with a cache", "a forward pass in training mode"), plain):
            if not difference < (1e-3 if is_exact else 0.1):
                raise InputError(f"{name} cannot be trained here: {what} differs by {difference:.2g} nats a token")
        fast = () if reason else differences(args, model, prompts, is_fast=True)
        if isinstance(fast, Exception):
            reason, fast = f"the shared cache or packed rows do not fit it: {one_line(fast)}", ()
        for what, difference, own in zip(("with the shared cache", "in packed rows"), fast, plain):
            if not difference < (1e-3 if is_exact else max(0.05 if model.has_spans else 0.02, 1.5 * own)):
                reason = f"log-probabilities {what} differ by {difference:.2g} nats a token"
    return f"{', '.join(sorted(odd_layers))} layers: {reason}" if reason and odd_layers and args.fast else reason


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@torch.no_grad()
def differences(args, model, prompts, is_fast):
    """How far a path is from one forward pass a sequence, without padding, in evaluation mode. In mean nats a token:
    (the sampler with rows that end early, the trainer in training mode). If the path raises, the error.
    """
    path = replace(args, fast=is_fast, temperature=1.0)
    noise = torch.rand(3 * len(prompts), 12, generator=torch.Generator().manual_seed(0))
    eos_ids = list(range(0, model.get_input_embeddings().num_embeddings, 16))  # so that about half of the rows end
    try:
        tokens, sampled, mask = sample(path, model, prompts, noise, 1.0, eos_ids, 0)
        trained = policy_logprobs(path, model.train(), prompts, tokens, mask)
        model.eval()
        rows = [(prompts[i // 3 : i // 3 + 1], tokens[i : i + 1], mask[i : i + 1]) for i in range(len(tokens))]
        right = torch.cat([plain_logprobs(model, *row, 1.0) for row in rows])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return error
    finally:
        model.eval()
    return tuple(float((logprobs - right).abs().sum() / mask.sum()) for logprobs in (sampled, trained))


# ---- Attention on a CPU, in spans ----
#
# On a CPU two plain products and a softmax are faster than PyTorch's fused attention, and a packed row hides most of
# itself from each token. So a row is cut into spans, one for each prompt and one for each answer, and an answer meets
# only the keys of its prompt and its own. A token then costs the same in a long row as in a short one, so rows can be
# long. It must equal the model's own attention. You do not need it on a GPU, where the fused kernels are fast, or in a
# narrow model, where a call costs more than its products.

SPANS_FROM = 512  # the hidden size from which a model on a CPU computes its attention in spans
LONGEST_PRODUCT = 1024 * 1024  # queries × keys


def attend(query, key, value, mask, scaling):
    """softmax(q kᵀ · scaling + mask) v, (R, H, Lq, Dv). H/K query heads share each key head, which is not repeated.

    query (R, H, Lq, D), key (R, K, Lk, D), value (R, K, Lk, Dv); mask (R, 1, Lq, Lk), 0 or −max.
    """
    R, H, Lq, D = query.shape
    if Lq * key.shape[2] > LONGEST_PRODUCT:  # the fused kernel does not keep its weights, which are many now
        key, value = (x.repeat_interleave(H // x.shape[1], 1) for x in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    shared = R, key.shape[1], -1
    scores = (query * scaling).reshape(*shared, D) @ key.transpose(2, 3)
    weights = (scores.view(R, H, Lq, -1) + mask).softmax(-1)
    return (weights.view(*shared, key.shape[2]) @ value).view(R, H, Lq, -1)


def attend_in_spans(query, key, value, mask, scaling, spans):
    """attend() for packed rows. spans: for each row, a list of (length, which span of the row its prompt is)."""
    rows = []
    for row, *tensors, row_mask in zip(spans, *(x.split(1) for x in (query, key, value, mask))):
        sizes = [length for length, _ in row]
        queries, keys, values = (x.split(sizes, 2) for x in tensors)
        parts = []
        for own, ((_, prompt), own_mask) in enumerate(zip(row, row_mask.split(sizes, 2))):
            met, masks = sorted({prompt, own}), own_mask.split(sizes, 3)  # the spans that this one sees
            k, v = (torch.cat([x[i] for i in met], 2) for x in (keys, values))
            parts.append(attend(queries[own], k, v, torch.cat([masks[i] for i in met], 3), scaling))
        rows.append(torch.cat(parts, 2))
    return torch.cat(rows)


def span_attention(sdpa, module, query, key, value, attention_mask, scaling=None, spans=None, **others):
    """What transformers calls in each layer. spans: those of attend_in_spans(); [] for whole rows; None for sdpa."""
    if spans is None or any(others.get(name) is not None for name in ("position_bias", "softcap", "s_aux")):
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **others)
    given = query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = attend_in_spans(*given, spans) if spans else attend(*given)
    return attended.transpose(1, 2).contiguous(), None


def set_spans(model, wanted):
    """Give a model that computes its attention with sdpa span_attention() instead, or sdpa again."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("spans", partial(span_attention, sdpa_attention_forward))
    AttentionMaskInterface.register("spans", sdpa_mask)
    config, name = model.config.get_text_config(), "spans" if wanted else "sdpa"
    if {config._attn_implementation, name} == {"sdpa", "spans"}:  # the part that reads text, not one for pictures
        own = [key for key in model.config.sub_configs if getattr(model.config, key, None) is config]
        model.set_attn_implementation(dict.fromkeys(["", *own], name))
    model.has_spans = config._attn_implementation == "spans"


# ---- Products of few rows on a CPU ----


@contextmanager
def reordered_weights(model, rows):
    """On a CPU, copy linear layers' weights into the order that the processor's products read, once for all tokens.

    Without this, a product of few rows, as in sampling, spends a large part of its time on reordering. oneDNN knows the
    order, and PyTorch has operators for it, but no public name. Where they are missing, where the processor has no
    such products, or where the copy would fill the memory, nothing changes.
    """
    own = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
    if model.device.type != "cpu" or not hasattr(own, "_linear_pointwise"):
        yield
        return
    layers = [x for x in model.modules() if type(x) is torch.nn.Linear and "forward" not in vars(x)]
    # not a part of a weight (--shard); in a small layer the call would cost more than the order saves
    layers = [x for x in layers if type(x.weight.data) is torch.Tensor and x.weight.numel() > 100_000]
    if 2 * sum(x.weight.nbytes for x in layers) > available_memory():
        layers = []
    try:
        weights = [own._reorder_linear_weight(layer.weight.detach(), rows) for layer in layers]
    except RuntimeError:
        layers, weights = [], []
    for layer, weight in zip(layers, weights):
        layer.forward = partial(own._linear_pointwise, W=weight, B=layer.bias, attr="none", scalars=[], algorithm="")
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def available_memory():
    """Bytes of host memory that can still be used; infinite where the system does not say."""
    text = Path("/proc/meminfo").read_text() if sys.platform == "linux" else ""
    found = re.search(r"MemAvailable: +(\d+) kB", text)
    return int(found[1]) * 1024 if found else math.inf


# ---- Fast sampling: one cache for the prompt of a group ----
#
# A prompt is read once and its keys and values are copied to the G rows of its group. Rows that have ended leave the
# batch. On a GPU, the step of one token is replayed as a CUDA graph. The tokens and log-probabilities must be those of
# plain_sample(), given the same noise.


def new_cache(model, rows, length):
    """A cache with room for `length` tokens of `rows` sequences. One that grows would copy itself at each token."""
    from transformers.cache_utils import Cache, DynamicLayer

    class RoomyLayer(DynamicLayer):
        """A preallocated KV-cache layer. A prompt's keys and values are computed once and copied to its group."""

        def lazy_initialization(self, keys, values):
            self.dtype, self.device = keys.dtype, keys.device
            self.room = [x.new_zeros(rows, x.shape[1], length, x.shape[3]) for x in (keys, values)]
            self.used, self.live, self.column, self.width, self.is_initialized = 0, rows, None, None, True

        def update(self, keys, values, *args, **kwargs):
            if not self.is_initialized:  # the prefill: each prompt is written to every row of its group
                self.lazy_initialization(keys, values)
                self.used = keys.shape[2]
                for room, x in zip(self.room, (keys, values)):
                    room.view(len(x), -1, *room.shape[1:])[:, :, :, : self.used] = x[:, None]
                return keys, values
            if self.column is not None:
                for room, x in zip(self.room, (keys, values)):
                    room[: self.live].index_copy_(2, self.column, x)
                return tuple(room[: self.live] for room in self.room)
            if self.width:
                more = self.width - self.room[0].shape[2]
                self.room = [torch.nn.functional.pad(room, (0, 0, 0, more)) if more else room for room in self.room]
            self.used += keys.shape[2]
            for room, x in zip(self.room, (keys, values)):
                room[: self.live, :, self.used - x.shape[2] : self.used] = x
            return tuple(room[: self.live, :, : self.width or self.used] for room in self.room)

        def get_seq_length(self):
            return self.used if self.is_initialized else 0

        def fill(self, finished, moved, live, used):
            """Copy the rows `moved` over the rows `finished`; the first `live` rows remain, with `used` tokens each."""
            for room in self.room:
                room[finished, :, :used] = room[moved, :, :used]
            self.live = live

    return Cache(layers=[RoomyLayer() for _ in range(model.config.get_text_config().num_hidden_layers)])


def attention_masks(model, attention_mask, queries, keys):
    """{kind of layer: additive mask}, 0 where a token sees another and −max where it does not.

    attention_mask (R, 1, Lq, Lk) bool; queries, keys: positions (R, Lq) and (R, Lk), whose difference a window limits.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    masks = {}
    for kind in dict.fromkeys(kinds):
        seen = attention_mask
        if kind == "sliding_attention" and window:
            seen = attention_mask & (queries[:, None, :, None] - keys[:, None, None, :] < window)
        lowest = torch.finfo(model.dtype).min
        masks[kind] = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill_(~seen, lowest)
    return masks


def last_states(model, ids, positions, masks, cache=None, spans=()):
    """The states before the head, (R, L, d). A model with several kinds of layers takes a dict of masks."""
    own = {"spans": spans} if getattr(model, "has_spans", False) else {}
    return model.base_model(
        ids,
        attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
        **own,
    ).last_hidden_state


def fixed_step(model, cache, token, position, column, masks):
    """A function that computes the step of one token on tensors that stay where they are [G28].

    Attention is over the cache's full length, masked, so only the content of the tensors depends on t and a GPU can
    replay the step as one CUDA graph. Without it the small kernels of a token wait for Python, not for memory.
    """
    kept = [x.clone() for x in (token, position, column, *masks.values())]
    for layer in cache.layers:
        layer.column = kept[2]

    def compute():
        own = dict(zip(masks, kept[3:]))
        return model.get_output_embeddings()(last_states(model, kept[0][:, None], kept[1][:, None], own, cache)[:, -1])

    graph = None
    if token.is_cuda:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # the set-up of the first call must not be captured
            compute()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = compute()

    def step(token, position, column, masks):
        for own, x in zip(kept, (token, position, column, *masks.values())):
            own.copy_(x)
        if graph is None:
            return compute()
        graph.replay()
        return logits

    return step


@torch.no_grad()
def generate(model, prompts, noise, temperature, eos_ids, pad_id, is_fixed=False):
    """What plain_sample() returns for the same arguments, made with one cache for each prompt of a group [G1].

    Rows that have ended leave the batch. A row's completion depends on its prompt and its noise only, not on the rows
    beside it [G23]. is_fixed: the shapes change only when half of the rows have ended, for CUDA graphs.
    """
    B, T = noise.shape
    group_size, device = B // len(prompts), model.device
    Q = max(map(len, prompts))
    queries = torch.tensor([[pad_id] * (Q - len(prompt)) + prompt for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    seen = (
        torch.arange(Q, device=device) >= Q - lengths[:, None]
    )  # padding stands on the left, so that all prompts end in the same column
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    has_spans = getattr(model, "has_spans", False)
    cache = new_cache(model, B, Q + 1 if has_spans else Q + T)
    head, eos = model.get_output_embeddings(), torch.tensor(eos_ids, dtype=torch.long, device=device)
    noise = noise.to(device)
    state = model.base_model(
        queries, attention_mask=seen.long(), position_ids=positions, past_key_values=cache, use_cache=True
    )
    logits = head(state.last_hidden_state[:, -1]).repeat_interleave(group_size, 0)
    del state  # what the prefill made
    lengths = lengths.repeat_interleave(group_size)
    seen = torch.cat([seen, seen.new_ones(len(prompts), T)], 1).repeat_interleave(group_size, 0)

    tokens = torch.full((B, T), pad_id, device=device)
    logprobs, mask = torch.zeros(B, T, device=device), torch.zeros(B, T, dtype=torch.long, device=device)
    rows = torch.arange(B, device=device)  # the sequence that each row of the batch holds
    going, columns, step = torch.ones_like(rows, dtype=torch.bool), torch.arange(Q + T, device=device), None
    calls = ToolCalls(model, eos)
    for t in range(T):
        token, logprob, chosen = calls.write(*sample_token(logits, noise[rows, t], temperature), rows)
        on = rows[going]
        tokens[on, t], logprobs[on, t], mask[on, t] = token[going], logprob[going], chosen[going]
        going &= ~torch.isin(token, eos)
        going = without_stopped(model, going, tokens, t, rows)
        calls.read(tokens, t, going, rows)
        live = int(going.sum())
        if live == 0 or t + 1 == T:
            break
        if live <= (len(rows) // 2 if is_fixed else len(rows) - 1):
            # the last rows that continue are moved over those that have finished
            finished = (~going[:live]).nonzero()[:, 0]
            moved = live + going[live:].nonzero()[:, 0]
            for layer in cache.layers:
                if layer.is_initialized:  # some models' layers share the keys of others
                    layer.fill(finished, moved, live, Q + t)
            keep = torch.arange(live, device=device)
            keep[finished] = moved
            rows, token, going, step = rows[keep], token[keep], going[keep], None
        column, position = columns[None, Q + t : Q + t + 1], lengths[rows] + t
        if is_fixed:
            masks = attention_masks(model, (seen[rows] & (columns <= Q + t))[:, None, None], column, columns[None])
            now = token, position, column[0], masks
            step = step or fixed_step(model, cache, *now)
            logits = step(*now)
            continue
        K = Q + t + 1  # keys
        if has_spans:  # a product with a part of a tensor copies it first: read the whole cache, which grows by 64
            K = min(-(-K // 64) * 64, Q + T)
            for layer in cache.layers:
                layer.width = K
        now = (seen[rows, :K] & (columns[:K] <= Q + t))[:, None, None]
        masks = attention_masks(model, now, column, columns[None, :K])
        logits = head(last_states(model, token[:, None], position[:, None], masks, cache)[:, -1])
    return tokens, logprobs, mask


# ---- Fast log-probabilities: packed rows ----
#
# The completions of one prompt share a row, in which the prompt stands once. Nothing is computed twice, and little is
# padding. Two answers of 3 and 2 tokens to a prompt of 3, where the last token of an answer is only predicted:
#
#     token           q0  q1  q2 | a0  a1 | b0 | padding
#     position         0   1   2 |  3   4 |  3 |    0        each answer continues at the end of its prompt
#     predicts                a0 | a1  a2 | b1 |             q2 also predicts b0: the state of one token is used twice
#     sees  q0         q0
#           q1         q0  q1
#           q2         q0  q1  q2
#           a0         q0  q1  q2   a0
#           a1         q0  q1  q2   a0  a1
#           b0         q0  q1  q2            b0             the prompt and itself, no token of the other answer
#
# Positions and mask must make every log-probability that of plain_logprobs(), and its gradient too.


class Batch(NamedTuple):
    sequences: torch.Tensor  # (S,) rows of the rollout that are in it
    ids: torch.Tensor  # (R, L) tokens: a prompt, its completions, the next prompt, …
    positions: torch.Tensor  # (R, L) each completion continues at the end of its prompt
    attention_mask: torch.Tensor  # (R, 1, L, L) which token sees which
    sources: torch.Tensor  # (N,) where in ids, flat, the state before each completion token is
    targets: torch.Tensor  # (N,) those tokens
    places: tuple  # two of (N,): the sequence in this batch, and t, of each
    spans: list  # for each row (length, which span its prompt is) of its prompts, its answers and its padding


def plan_rows(prompt_lengths, lengths, group_size, row_tokens, micro_batch_tokens):
    """Which sequences share a row, and which rows a micro-batch: a list of micro-batches, each a list of rows, each a
    list of indices of sequences [G17].

    Completions of one prompt are packed into rows of at most row_tokens tokens, or of the longest sequence's length if
    that is more. With row_tokens 0 each sequence has its own row. The longest rows come first, so that what does not
    fit into memory fails at once. A sequence's last token is only predicted and takes no room.
    """
    total = {i: prompt_lengths[i // group_size] + length - 1 for i, length in lengths.items()}
    capacity = max([row_tokens, *total.values()])
    groups = {}
    for i in sorted(lengths, key=lambda i: -lengths[i]):
        groups.setdefault(i // group_size, []).append(i)
    rows, room = [], 0
    for group, members in groups.items():
        new_to_row = True
        for i in members:
            needed = lengths[i] - 1 + prompt_lengths[group] * new_to_row
            if needed > room or not row_tokens:
                rows.append([])
                needed, room = total[i], capacity
            rows[-1].append(i)
            room -= needed
            new_to_row = False
    sizes = {id(row): row_size(row, prompt_lengths, lengths, group_size) for row in rows}
    rows.sort(key=lambda row: -sizes[id(row)])
    micro_batches, longest = [], 0
    for row in rows:
        if not micro_batches or (len(micro_batches[-1]) + 1) * longest > micro_batch_tokens:
            micro_batches.append([])
            longest = sizes[id(row)]
        micro_batches[-1].append(row)
    return micro_batches


def most_tokens(args, model):
    """The most tokens of a micro-batch."""
    return args.micro_batch_tokens or (8192 if args.device.startswith("cuda") and is_fast(args, model) else 2048)


def plan_for(args, model, prompt_lengths, lengths, group_size):
    """plan_rows() with the quickest length of a row. On the plain path each sequence has its own row.

    With k answers of a tokens after a prompt of p tokens, a sequence costs p/k + a tokens. In a row of L = p + k·a, a
    token costs 1 + L/c, where c is about 1,500: the length at which attention costs as much as the rest. The product
    is least at L = p + √(p (p + c)). With attention in spans a token of a long row costs no more, so rows are long.
    """
    row_tokens, micro_batch_tokens = 0, most_tokens(args, model)
    if is_fast(args, model) and getattr(model, "has_spans", False):
        row_tokens = min(micro_batch_tokens, 2048)  # the mask has the square of it
    elif is_fast(args, model) and lengths:
        p = sum(prompt_lengths[i // group_size] for i in lengths) / len(lengths)
        row_tokens = min(int(p + (p * (p + 1500)) ** 0.5), micro_batch_tokens)
    return plan_rows(prompt_lengths, lengths, group_size, row_tokens, micro_batch_tokens)


def row_size(row, prompt_lengths, lengths, group_size):
    prompts = {i // group_size for i in row}
    return sum(prompt_lengths[p] for p in prompts) + sum(lengths[i] - 1 for i in row)


def pack_rows(prompts, tokens, mask, rows, group_size, device="cpu"):
    """A Batch of prompts (P token lists), tokens and mask (B, T), packed into these rows and padded on the right."""
    lengths = lengths_of(mask)
    size = max(row_size(row, list(map(len, prompts)), lengths, group_size) for row in rows)
    ids, positions, prompt_of, owner = (torch.full((len(rows), size), x) for x in (0, 0, -1, -2))
    sequences, sources, targets, places, spans = [], [], [], [], []
    for r, row in enumerate(rows):
        end, current, of_row = 0, None, []
        for i in row:
            if i // group_size != current:
                current = i // group_size
                prompt = torch.tensor(prompts[current])
                span = slice(end, end + len(prompt))
                ids[r, span], positions[r, span] = prompt, torch.arange(len(prompt))
                prompt_of[r, span], owner[r, span] = current, -1
                end += len(prompt)
                last = end - 1
                own_prompt = len(of_row)
                of_row.append((len(prompt), own_prompt))
            completion = tokens[i, : lengths[i]]
            span = slice(end, end + lengths[i] - 1)
            ids[r, span], positions[r, span] = completion[:-1], len(prompt) + torch.arange(lengths[i] - 1)
            prompt_of[r, span], owner[r, span] = current, i
            scored = mask[i, : lengths[i]].nonzero()[:, 0].tolist()  # zeros before the last 1 are read, not scored
            before = (last, *range(end, end + lengths[i] - 1))
            sources += [r * size + before[t] for t in scored]
            targets.append(completion[scored])
            places += [(len(sequences), t) for t in scored]
            sequences.append(i)
            end += lengths[i] - 1
            of_row += [(lengths[i] - 1, own_prompt)] * (lengths[i] > 1)
        spans.append(of_row + [(size - end, len(of_row))] * (size > end))
    same_prompt = prompt_of[:, :, None] == prompt_of[:, None, :]
    attention_mask = same_prompt & ((owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == -1))
    attention_mask &= torch.ones(size, size, dtype=torch.bool).tril()
    tensors = (
        torch.tensor(sequences),
        ids,
        positions,
        attention_mask[:, None],
        torch.tensor(sources),
        torch.cat(targets),
    )
    return Batch(*(x.to(device) for x in tensors), tuple(torch.tensor(places, device=device).T), spans)


def logprobs_of(head, hidden, targets, temperature):
    """Log-probabilities (N,) in float32 of targets (N,) after the states hidden (N, d)."""
    return token_logprobs(head(hidden).float(), targets, temperature)


def completion_logprobs(model, batch, max_tokens, temperature, logprob_tokens):
    """(S, T) log-probabilities of a batch's completions, 0 off their masks.

    The logits of all tokens would be the largest tensor of all: 8 × 1,024 tokens × 152k words × 4 bytes = 5 GB. They
    are computed for logprob_tokens tokens at a time, and all but the last chunk's again in the backward pass [G16].
    """
    masks = attention_masks(model, batch.attention_mask, batch.positions, batch.positions)
    states = last_states(model, batch.ids, batch.positions, masks, spans=batch.spans)
    hidden = states.flatten(0, 1)[batch.sources]
    head, parts = model.get_output_embeddings(), []
    chunks = list(zip(hidden.split(logprob_tokens), batch.targets.split(logprob_tokens)))
    for states, targets in chunks:
        if torch.is_grad_enabled() and len(parts) < len(chunks) - 1:
            parts.append(checkpoint(logprobs_of, head, states, targets, temperature, use_reentrant=False))
        else:  # the backward pass begins with the last chunk, when no other chunk's logits exist
            parts.append(logprobs_of(head, states, targets, temperature))
    logprobs = torch.zeros(len(batch.sequences), max_tokens, device=hidden.device)
    return logprobs.index_put(batch.places, torch.cat(parts))


def micro_batch_logprobs(args, model, prompts, tokens, mask, rows):
    """(S, T) log-probabilities of the sequences in a micro-batch's rows, by the path that is right for this model."""
    group_size, order = len(tokens) // len(prompts), [i for row in rows for i in row]
    if not is_fast(args, model):
        own = tokens[order].to(args.device), mask[order].to(args.device)
        return plain_logprobs(model, [prompts[i // group_size] for i in order], *own, args.temperature)
    batch = pack_rows(prompts, tokens, mask, rows, group_size, args.device)
    packed_logprobs = getattr(model, "packed_logprobs", partial(completion_logprobs, model))  # --shard has its own
    return packed_logprobs(batch, tokens.shape[1], args.temperature, args.logprob_tokens)


# ---- Optimizer ----
#
# --optimizer adamw8bit keeps 2 bytes of state a parameter instead of 8, and makes bfloat16 weights learn although their
# precision is coarser than a step. You need it where the model fits the card and its optimizer does not. It must take
# AdamW's steps, up to the error of its codes.


def round_stochastically(x):
    """float32 → bfloat16, rounded up or down with the probabilities that make the mean right [G18].

    Rounded to the nearest, a step below 1/256 of a weight is lost, every time: at lr 1e-6 nearly all are.
    """
    # 64 random bits are the noise of four weights, from −2¹⁵ to 2¹⁵ − 1. A bfloat16 is the upper half of a float32
    place = "cpu" if x.device.type == "mps" else x.device  # mps cannot draw all 64 bits
    noise = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=place).random_(-(1 << 63), None).to(x.device)
    noise = noise.view(torch.int16)[: x.numel()].view(x.shape)
    return ((x.view(torch.int32) + noise + (1 << 15)) >> 16).short().view(torch.bfloat16)


class AdamW8bit:
    """AdamW (Loshchilov & Hutter 2019, Algorithm 2) with 2 bytes of state a parameter [G19] (Dettmers et al. 2022).

    Both moments are kept in blocks of up to 256 elements: a float32 maximum for each block and an 8-bit logarithm for
    each element, which is √v to within 2.2% over 16 octaves below the maximum, and m to within 4.4%. bfloat16 weights
    are rounded stochastically. A block lies in one row of its parameter, and FSDP never splits a row, so the state of
    several processes can be put together, and divided again, bit for bit [G27].
    The update works through a parameter in slices, in place. No float32 copy of a large one ever exists, and on a CPU
    the passes over a slice stay in its cache, 4 times faster than through memory.
    """

    def __init__(self, parameters, lr, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8, offload=False):
        self.param_groups = [{"params": list(parameters), "lr": lr, "initial_lr": lr}]
        self.weight_decay, self.betas, self.eps, self.steps = weight_decay, betas, eps, 0
        on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        # Elements of a slice, 256 or more. 2¹⁸ take 1.6 times as long as 2¹⁶ with one thread, and less with several
        self.at_once = (1 << 16 if torch.get_num_threads() == 1 else 1 << 18) if on_cpu else 1 << 24
        self.state = []
        for parameter in self.param_groups[0]["params"]:
            width = math.prod(parameter.shape[1:])  # of a row; a vector's rows are single elements
            block = next(size for size in range(min(width, 256), 0, -1) if width % size == 0)
            blocks = own_part(parameter).numel() // width, width // block
            kinds = (block, torch.int8), (block, torch.uint8), (1, torch.float32), (1, torch.float32)
            zeros = zeros_on_host if offload else torch.zeros
            self.state.append([zeros((*blocks, n), dtype=kind, device=parameter.device) for n, kind in kinds])
            if offload:
                keep_gradient_on_host(parameter)

    def zero_grad(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = parameter.host_gradient = None

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for parameter, state in zip(self.param_groups[0]["params"], self.state):
            if (gradient := gradient_of(parameter)) is None:
                continue
            weights, gradients, block = own_part(parameter).view(-1), gradient.reshape(-1), state[0].shape[-1]
            at_once = self.at_once // block * block
            for start in range(0, len(weights), at_once):
                part = slice(start, start + at_once)
                kept = [x.flatten(0, 1)[start // block : (start + at_once) // block] for x in state]
                near = [x.to(weights.device) for x in kept]  # no copies, unless they are on the host
                self.step_slice(weights[part], gradients[part].to(weights.device).float(), near)
                for own, new in zip(kept, near):
                    own.copy_(new)

    def step_slice(self, weights, gradients, state):
        (beta1, beta2), gradients = self.betas, gradients.view_as(state[0])
        m, root_v = self.decode(*state)
        m.lerp_(gradients, 1 - beta1)
        root_v.square_().lerp_(gradients.square(), 1 - beta2).sqrt_()
        self.encode(m, root_v, state)
        root_v.div_((1 - beta2**self.steps) ** 0.5).add_(self.eps)
        update, lr = m.div_(root_v).view(-1), self.param_groups[0]["lr"]
        new = weights.float() * (1 - lr * self.weight_decay)
        new.sub_(update, alpha=lr / (1 - beta1**self.steps))
        weights.copy_(round_stochastically(new) if weights.dtype == torch.bfloat16 else new)

    def decode(self, m_codes, v_codes, m_max, v_max):
        m = torch.exp2((m_codes.float().abs_() - 127).div_(8)).mul_(m_max).mul_(m_codes.sign())
        # Code 0 of √v is the smallest value and not 0, or the weight's next step would be divided by nothing
        return m, torch.exp2((v_codes.float() - 255).div_(16)).mul_(v_max)

    def encode(self, m, root_v, state):
        m_codes, v_codes, m_max, v_max = state
        for codes, maxima, x, top, octave in ((m_codes, m_max, m, 127, 8), (v_codes, v_max, root_v, 255, 16)):
            size = x.abs()
            maxima.copy_(size.amax(-1, keepdim=True))
            code = size.div_(maxima.clamp(min=1e-38)).log2_().mul_(octave).add_(top).round_()
            codes.copy_(code.clamp_(0, top).mul_(x.sign()))

    def state_dict(self):
        pairs = zip(self.param_groups[0]["params"], self.state)
        return {"steps": self.steps, "state": [[gathered(x, parameter) for x in own] for parameter, own in pairs]}

    def load_state_dict(self, saved):
        self.steps = saved["steps"]
        for parameter, own, kept in zip(self.param_groups[0]["params"], self.state, saved["state"]):
            if [x.shape[1:] for x in own] != [x.shape[1:] for x in kept]:
                raise InputError(
                    "the checkpoint's 8-bit optimizer state has the blocks of an older version of this script and "
                    "cannot be resumed: start the run again"
                )
            for mine, other in zip(own, kept):
                mine.copy_(scattered(other, parameter))


def new_optimizer(args, model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "betas": (0.9, 0.95)}
    if args.optimizer == "adamw8bit":
        return AdamW8bit(parameters, **settings, offload=args.offload)
    optimizer = torch.optim.AdamW(parameters, **settings, fused=True)
    optimizer.param_groups[0]["initial_lr"] = args.learning_rate
    return optimizer


def gradient_of(parameter):
    """The parameter's gradient, on the device or on the host. None if there is none."""
    on_host = getattr(parameter, "host_gradient", None)
    return own_part(parameter.grad) if on_host is None else on_host


def cut_gradients(parameters, max_norm, are_shards=False):
    """Scale the gradients in place to a global norm of at most max_norm. Returns the norm that they had.

    The list of gradients ends with this function. A list that outlived the step would keep them beside the next ones.
    """
    gradients = [x for x in map(gradient_of, parameters) if x is not None]
    norm = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32).cpu() for x in gradients]).norm()
    norm = (over_ranks(norm.square()).sqrt() if are_shards else norm).item()
    if norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / (norm + 1e-6))
    return norm


# ---- What waits in host memory (--offload) ----
#
# The card holds the weights, one parameter's gradient and one module of the reference. Everything else waits in host
# memory. It costs time, and must change no bit of the result.


def zeros_on_host(shape, dtype, device):
    """Zeros in host memory, page-locked if they are for a GPU, which makes copies faster. pin_memory=True is not used,
    because it rounds each tensor up to a power of 2."""
    host = torch.zeros(shape, dtype=dtype)
    if torch.device(device).type == "cuda" and host.nbytes >= 1 << 20:
        cuda, pointer = torch.cuda.cudart(), host.data_ptr()
        torch.cuda.check_error(cuda.cudaHostRegister(pointer, host.nbytes, 0))
        weakref.finalize(host.untyped_storage(), cuda.cudaHostUnregister, pointer)  # before others get the address
    return host


def keep_gradient_on_host(parameter):
    """Move the parameter's gradient to the host as soon as backward has made it; micro-batches add up there [G24].

    So the gradients are never on the device together. Taking the optimizer's steps inside backward would save as much,
    but they could neither add up micro-batches nor know the global norm.
    """
    host = zeros_on_host(parameter.shape, parameter.dtype, parameter.device)

    def leave(parameter):
        if parameter.host_gradient is None:
            parameter.host_gradient = host.copy_(parameter.grad)
        else:
            host.add_(parameter.grad.cpu())
        parameter.grad = None

    parameter.host_gradient = None
    parameter.register_post_accumulate_grad_hook(leave)


def stream_weights(model, device):
    """A frozen model whose weights wait on the host and visit the device for each module's forward pass [G25]."""
    for parameter in model.parameters():
        host = zeros_on_host(parameter.shape, parameter.dtype, device)
        parameter.data = parameter.on_host = host.copy_(parameter.data)
    for buffer in model.buffers():  # small: the positions' frequencies
        buffer.data = buffer.data.to(device)

    def come(module, inputs):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.on_host.to(device, non_blocking=True, copy=True)

    def go(module, inputs, output):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.on_host

    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(come)
            module.register_forward_hook(go, always_call=True)  # also when memory runs out in its forward pass
    return model


# ---- When memory runs out ----
#
# Neither the samples nor the gradient depend on how many are computed at the same time. So what did not fit is computed
# again, half as much at a time. All processes decide together: if one repeats alone, the others wait for ever.


def retry_with_less(args, limit, function, model, *rest):
    """Call function(args, model, *rest) and return (args, its result). If memory runs out, halve the limit in args,
    which is generate_rows or micro_batch_tokens, and call again.

    The function must be safe to call twice. After it has begun to use memory it must not wait for other processes.
    """
    while True:
        error_line, result = "", None
        try:
            result = function(args, model, *rest)
        except RuntimeError as error:
            if not is_out_of_memory(error) or (args.shard and function in (minibatch_gradient, supervised_gradient)):
                raise  # in FSDP's backward pass the other processes wait for this one
            error_line = one_line(error)
        if not over_ranks(torch.tensor(len(error_line)), "MAX"):
            return args, result
        result = None
        gc.collect()  # what the failed call has left on the device
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        args = halved(args, limit, model, error_line)


def is_out_of_memory(error):
    """Does this RuntimeError say that memory ran out? CUDA has a class for it, cuBLAS and a CPU only words."""
    signs = "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator", "MPS backend out of memory"
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def halved(args, limit, model, error_line):
    """Args with half the limit; prints a line. Raises InputError if the limit is at its minimum already."""
    now, least = (args.generate_rows, 1) if limit == "generate_rows" else (most_tokens(args, model), args.max_tokens)
    flag = f"--{limit.replace('_', '-')}"
    if now <= least:
        raise InputError(
            f"out of memory, even with {flag} {now}: lower --max-tokens, add --gradient-checkpointing, --offload, "
            f"--lora-rank 16 or --quantize nf4, or take a smaller model ({error_line})"
        )
    say(f"\nmemory      it ran out: {flag} {now // 2} from here on. What did not fit is repeated, with the same result")
    return replace(args, **{limit: now // 2})


def free_memory(device):
    """Bytes that are free on a GPU."""
    return torch.cuda.mem_get_info(device)[0]


def bytes_needed(args, size):
    """About how many bytes of a GPU a run takes for a model of `size` parameters. For each parameter: its weight and,
    if they lie there, its gradient, the optimizer's state and the reference. 2 GB are for all else. Where they are too
    few, retry_with_less() computes less at a time. benchmarks/memory_plan.py counts exactly."""
    width = 4 if args.dtype == "float32" else 2
    each = {"none": width, "int8": 1, "nf4": 0.6}[args.quantize]
    if not args.lora_rank and not args.offload:
        each += width + (2 if args.optimizer == "adamw8bit" else 8) + width * (args.beta > 0)
    return size * each / (num_processes() if args.shard else 1) + 2e9


def offload_for(args, size, free):
    """(the reason, --offload or not): everything on the GPU if it fits, else --offload. Where neither fits, the run
    ends in one sentence that says what would."""
    can_offload = args.optimizer == "adamw8bit" and not args.lora_rank and not args.shard
    for offload in (False, True)[: 1 + can_offload]:
        needed = bytes_needed(replace(args, offload=offload), size)
        if needed <= free:
            return f"about {needed / 1e9:.1f} GB on the GPU, where {free / 1e9:.1f} are free", offload
    others = {"offload": False, "shard": False, "reference_every": 0, "reward_model_steps": 0}
    small = replace(args, lora_rank=args.lora_rank or 16, quantize="nf4", **others)
    raise InputError(
        f"{args.model} needs about {needed / 1e9:.1f} GB of the GPU, and {free / 1e9:.1f} are free: "
        f"--lora-rank {small.lora_rank} --quantize nf4 needs about {bytes_needed(small, size) / 1e9:.1f}, or take a "
        "smaller model. --no-offload tries it all the same"
    )


# ---- When a run ends early ----


class Ending:
    """Whether a run is to end after the step that is running: --max-hours are over, or Ctrl-C was pressed once."""

    def __init__(self, args, started):
        self.end = started + 3600 * args.max_hours if args.max_hours else math.inf
        self.was_interrupted = False
        self.handler = None
        is_main = threading.current_thread() is threading.main_thread()  # elsewhere signals cannot be handled
        if is_main and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
            self.handler = signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, *_):
        """The first Ctrl-C is noted. The second one stops the run at once."""
        self.was_interrupted = True
        self.restore()
        say("\nending      after this step: then evaluate, save. Ctrl-C again stops at once")

    def is_due(self):
        """Whether to end now: true in all processes if it is true in one."""
        now = self.was_interrupted or time.perf_counter() > self.end
        return bool(over_ranks(torch.tensor(int(now)), "MAX"))

    def restore(self):
        if self.handler is not None:
            signal.signal(signal.SIGINT, self.handler)
            self.handler = None


# ---- Weights in parts over the processes (--shard) ----
#
# Each process keeps a part of every weight, gradient and optimizer state (PyTorch's FSDP2), for models that fit several
# cards but not one. The processes together must take the step that one process with the whole batch would take.


def shard(args, model):
    """Split the model over the processes by FSDP2, in place [G27]. A layer's parameters are whole while it computes.

    completion_logprobs becomes the model's method packed_logprobs, because FSDP gathers only around methods that it
    knows. Gradients are summed over the processes and not averaged, because the loss has the totals of all of them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    count = model.config.get_text_config().num_hidden_layers
    layers = next(x for x in model.modules() if isinstance(x, torch.nn.ModuleList) and len(x) == count)
    mesh = init_device_mesh(torch.device(args.device).type, (dist.get_world_size(),))
    for module in (*layers, model):
        fully_shard(module, mesh=mesh)
    model.packed_logprobs = partial(completion_logprobs, model)
    register_fsdp_forward_method(model, "packed_logprobs")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    with torch.no_grad():
        idle_pass(args, model)  # the first pass tells FSDP which module is the outermost
    model.reshard()


def idle_pass(args, model):
    """A one-token dummy batch. FSDP's gathers are collective, so a process with fewer micro-batches must run this."""
    one = torch.ones(1, 1, dtype=torch.long)
    return policy_logprobs(args, model, [[0]], one, one)


@contextmanager
def whole(model):
    """A context in which a sharded model is gathered once for many passes without gradients.

    Without it, sampling would gather the model for each token.
    """
    is_outermost = not getattr(model, "is_whole", False)
    parts = [module for module in model.modules() if hasattr(module, "unshard")] if is_outermost else []
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    model.is_whole = True
    try:
        yield
    finally:
        model.is_whole = not is_outermost
        for module in parts:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def own_part(x):
    """This process's part of a sharded tensor. A tensor that is not sharded is returned as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def gathered(x, like=None):
    """The whole of a sharded tensor on the host. like: x is this process's rows of a tensor sharded like another.

    What is not sharded is returned as it is.
    """
    if hasattr(like, "placements"):
        from torch.distributed.tensor import DTensor

        shape = (len(like), *x.shape[1:])
        stride = torch.empty(shape, device="meta").stride()
        x = DTensor.from_local(x, like.device_mesh, like.placements, shape=shape, stride=stride)
    return x.full_tensor().cpu() if hasattr(x, "full_tensor") else x


def scattered(x, like):
    """This process's rows of a tensor that every process has whole; all of it if `like` is not sharded."""
    if not hasattr(like, "placements"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None).to_local()


# ---- Files, logs, resuming ----
#
# A file is written aside and renamed, so that a run that is killed leaves the old file or the new one, never a half. A
# resumed run must end with the bits of a run that was never stopped, on a CPU.

# The settings that a resumed run may change. Any other would make it a different run
CHANGEABLE = (
    "resume device torch_threads keep_memory checkpoint_every track wandb_project generate_rows micro_batch_tokens "
    "offload shard cuda_graph fast save_merged max_hours verbose"
)
# Flags that were removed, and what took their place. A run that was saved with them is resumed without them
REMOVED = {
    "plan": "python benchmarks/memory_plan.py --plan took its place",
    "gpu_memory": "python benchmarks/memory_plan.py --gpu-memory took its place",
    "row_tokens": "the row length is chosen from the lengths now",
    "scale_by_std": "--scale group, batch or none took its place",
    "no_scale_by_std": "--scale none took its place",
}


def make_run_dir(run_dir):
    """Make the run's own directory. Of two runs that start at once with one name, the second is refused."""
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError as error:
        can_resume = (run_dir / "checkpoint.pt").exists()
        hint = f"--resume {run_dir} resumes it" if can_resume else "choose another"
        raise InputError(f"--run-dir {run_dir} exists: {hint}") from error


def new_run_dir(args):
    return f"runs/{args.task}__{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"


def resumed_args(run_dir):
    """The settings with which train() resumes the run in run_dir."""
    return replace(load(Path(run_dir) / "checkpoint.pt")["args"], resume=str(run_dir), run_dir=None)


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
    """The dict that save() wrote, which must have `keys`. Only tensors and plain data, so that no file can run code."""
    if not path.is_file():
        raise InputError(f"{path} is not a file: --resume takes a run directory")
    try:
        # without keys only the settings are read, so the weights can stay on the disk
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=not keys)
        removed = [name for name in REMOVED if name in content["args"]]
        settings = {name: x for name, x in content["args"].items() if name not in removed}
        if content["args"].get("scale_by_std") is False:
            settings["scale"] = "none"
        content["args"] = Args(**settings)
        missing = set(keys) - content.keys()
    except Exception as error:
        raise InputError(f"{path} is no checkpoint of this script, or is damaged") from error
    if content.get("waiting"):
        raise InputError(f"{path} holds answers that wait in the form of an older version: start the run again")
    if removed and keys:  # without keys only the settings are read, and the file will be loaded again
        say(f"resume      settings that no longer exist are ignored: {', '.join(removed)}")
    if missing:
        raise InputError(f"{path} is no checkpoint of this script: it lacks {', '.join(sorted(missing))}")
    return content


def save_model(directory, model, tokenizer, weights=None):
    """Write a normal transformers directory. weights: to be written instead of the model's own."""
    with written_aside(directory) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)  # what a run that was killed here left
        model.save_pretrained(temporary, state_dict=weights)
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


def draw_curves(metrics, path):
    """Draw a PNG of the metrics, with a panel for each kind."""
    from matplotlib.figure import Figure

    panels = Figure(figsize=(14, 10), layout="constrained").subplots(3, 3)
    kinds = (
        ("reward/",),
        ("eval/",),
        ("groups/", "completion/truncated", "completion/eos", "policy/clip"),
        ("completion/length",),
        ("policy/entropy", "kl/"),
        ("policy/ratio", "policy/sampler_gap"),
        ("policy/grad_norm", "sft/"),
        ("time/generate", "time/train"),
        ("memory/",),
    )
    for axes, prefixes in zip(panels.flat, kinds):
        for name in dict.fromkeys(name for row in metrics for name in row if name.startswith(prefixes)):
            points = [(row["step"], row[name]) for row in metrics if name in row]
            axes.plot(*zip(*points), label=name, marker="o" if len(points) < 12 else "")
        axes.set(xlabel="step")
        if axes.lines:  # a run in which nothing was taught has no ratios
            axes.legend(fontsize="small")
    with written_aside(path) as temporary:
        axes.figure.savefig(temporary, dpi=100, format="png")


def print_samples(group, rating, count=4):
    right = "" if group.problem.answer is None else f"    right is {group.problem.answer}"
    print(f"\n{group.problem.prompt}{right}\n  reward  tokens  completion")
    for text, reward, length in list(zip(group.texts, rating.rewards.tolist(), lengths_of(group.mask)))[:count]:
        print(f"  {reward:6.2f}  {length:6d}  {' / '.join(text.splitlines())[:100]}")


def peak_memory(device):
    """Peak in bytes: of the tensors on a GPU, or of the whole process on a CPU. None on Windows, which hides it."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- Settings ----
#
# Settings that contradict each other, or that would do nothing, are refused before anything is loaded.

# The settings that do nothing in supervised steps (--sft-data)
RL_ONLY = (
    "num_epochs num_minibatches clip_low clip_high beta scale reduction algorithm supervision importance policy_loss "
    "unbiased_kl old_logprobs sampler_correction sampler_cap sampler_mask off_policy_limit staleness dynamic_sampling "
    "truncated truncation_penalty reference_every format_weight length_weight overlong_buffer decouple_rewards "
    "reward_model reward_model_weight reward_model_steps reward_model_learning_rate"
)
# The rewards of a whole completion
WHOLE_REWARDS = "format_weight length_weight overlong_buffer reward_model"


# (settings, what each of them does, the settings that do not go with it). NAME=VALUE means this value alone
EXCLUDED = [
    ("sft_data", "imitates a file, and samples nothing to learn from", RL_ONLY),
    ("sft_data", "imitates every token of a completion, and tools would have written some of them", "tools"),
    ("evaluate ask", "is a separate command", "sample_to"),
    ("evaluate", "is a separate command", "ask"),
    ("evaluate ask sample_to", "trains nothing", "resume run_dir track sft_data"),
    ("sample_to", "keeps what the verifier judges right", "reward"),
    ("resume", "continues in its own directory", "run_dir"),
    ("shard", "splits the weights and the 8-bit state of all of them", "optimizer=adamw offload lora_rank"),
    ("offload", "keeps the state of optimizer adamw8bit on the host", "optimizer=adamw"),
    ("lora_rank", "keeps the model as the run found it as the reference", "reference_every"),
    ("data eval_data", "is read for task gsm8k and jsonl", "task=arithmetic task=countdown"),
    ("algorithm", "makes advantages of rewards in its own way", "scale decouple_rewards"),
    ("decouple_rewards", "scales each reward within its group, then their sum over the batch", "scale"),
    ("policy_loss=sapo", "has no clip range and no ratio of a sequence", "clip_low clip_high importance"),
    ("policy_loss=cispo", "has no lower clip and no ratio of a sequence", "clip_low importance"),
    ("old_logprobs=sampler", "makes the weights π_old/π of the sampler 1 everywhere", "sampler_correction"),
    ("unbiased_kl", "changes the KL in the loss, which is in the reward here", "algorithm=reinforce++"),
    ("staleness", "keeps rated answers for later, and this changes how they are rated", "reward_model_steps"),
    ("reward", "takes the place of the verifier, which this needs", "supervision algorithm=rft reward_model_steps"),
    ("supervision", "is GRPO's own", "algorithm scale decouple_rewards"),
    ("supervision", "needs the values of a solution's steps", "task=countdown task=jsonl"),
    ("supervision", "pays for the steps that the policy writes, and tools write some of them", "tools"),
    ("supervision", "pays for each step, not for a whole completion", f"{WHOLE_REWARDS} truncated=penalise"),
]

NAMES = "model data eval_data sft_data sample_to resume run_dir reward reward_model ask evaluate stop"  # never empty
LIMITS = [("num_minibatches", "prompts_per_step"), ("eval_k", "eval_samples"), ("overlong_buffer", "max_tokens")]

# (settings, what each of them does, the settings of which it needs one)
NEEDED = [
    ("task=gsm8k task=jsonl", "asks in words", "model"),
    ("sft_data", "trains a model that is there, such as the start of an earlier run", "model"),
    ("system stop", "is for a model; the small one has no chat form and ends by itself", "model"),
    ("tools", "is for a model, or for sums, whose worked solutions show how to call", "model task=arithmetic"),
    ("quantize", "freezes the weights, so that others must learn", "lora_rank"),
    ("save_merged", "merges an adapter", "lora_rank"),
    ("sampler_cap sampler_mask", "changes the weights of sampler_correction", "sampler_correction"),
    ("unbiased_kl", "changes the KL in the loss", "beta"),
    ("reference_every", "refreshes the reference or trains the reward model", "beta reward_model_steps"),
    ("reward_model_steps", "trains the reward model", "reward_model"),
    ("reward_model_steps", "trains it after each round of so many steps", "reference_every"),
]


def settings_given(args, names):
    """Those of the settings "NAME NAME=VALUE …" that are not at their default, or have this value, as "name value"."""
    found = []
    for name, _, wanted in (word.partition("=") for word in names.split()):
        value = getattr(args, name)
        if str(value) == wanted if wanted else value not in (getattr(Args, name), False):
            found.append(name if value is True else f"{name} {value}")
    return found


def check_settings(args):
    """Raise ValueError where a setting is out of its bounds, which stand in its type, or where two do not fit."""
    for field in fields(args):
        _, *bounds = get_args(field.type) if hasattr(field.type, "__metadata__") else (None,)
        if bounds and not bounds[1](getattr(args, field.name)):  # NaN lies outside all bounds
            raise ValueError(f"{field.name} {bounds[0]}, got {getattr(args, field.name)}")
    for name in NAMES.split():
        value = getattr(args, name)
        if "" in (value if isinstance(value, tuple) else (value and value.strip(),)):
            raise ValueError(f"{name} must not be empty, got {value!r}")
    looks = bool(args.evaluate or args.ask or args.sample_to)  # they train nothing
    for names, what, others in EXCLUDED:
        if (found := settings_given(args, names)) and (wrong := settings_given(args, others)):
            raise ValueError(f"{found[0]} {what}: it does not go with {', '.join(wrong)}")
    for names, what, others in NEEDED:
        found, is_there = settings_given(args, names), settings_given(args, others)
        if found and not is_there and not (looks and "model" in others):
            raise ValueError(f"{found[0]} {what}: it needs {' or '.join(others.split())}")
    for name, limit in LIMITS:
        value, most = getattr(args, name), getattr(args, limit)
        if most and value > most and not (looks and name == "overlong_buffer"):
            raise ValueError(f"{name} {value} must not exceed {limit} {most}")
    if args.group_size == 1:
        raise ValueError("group_size must be 2 or more, or every advantage is 0, got 1")
    if args.dtype == "bfloat16" and args.optimizer == "adamw" and not args.lora_rank:
        raise ValueError("dtype bfloat16 needs optimizer adamw8bit: adamw rounds small steps back to where they began")
    if args.instruction is not None and "{}" not in args.instruction:
        raise ValueError(f"instruction needs {{}} in the place of the problem, got {args.instruction!r}")
    if args.task == "jsonl" and args.data is None and args.ask is None and not (args.evaluate and args.eval_data):
        raise ValueError("task jsonl needs data, a file of lines with prompt and answer, got none")
    ends = [text for text in args.stop if text in "<calc></calc>" or re.fullmatch(r"[-0-9./]+", text)]
    if args.tools != "none" and ends:
        raise ValueError(f"tools: stop {ends[0]!r} would end an answer within a call or its result")
    try:
        re.compile(args.format_pattern)
    except re.error as error:
        raise ValueError(f"format_pattern {args.format_pattern!r} is no regular expression: {error}") from None


# ---- Settings that are chosen for you ----

CHOSEN = [
    *("device", "torch_threads", "dtype", "optimizer", "learning_rate", "gradient_checkpointing", "offload"),
    *("prompts_per_step", "group_size", "max_tokens", "generate_rows", "eval_samples"),
]

# With --model: prompts in a step, completions of each, the most tokens of a completion. Short answers need few tokens
TASK_SIZES = {"arithmetic": (8, 8, 64), "countdown": (8, 8, 256), "gsm8k": (16, 8, 320), "jsonl": (8, 8, 32)}


def chosen(args, problems=(), size=None, free=None):
    """(Args in which every field of CHOSEN is set, {field: why it was chosen so}). The first choice of a field stands,
    and what is given by hand stands before all of them.

    problems: those to learn from. size: the number of parameters of --model; None counts it, if a choice needs it.
    free: the bytes that are free on the GPU; None asks it.
    """
    why, has_gpu = {}, torch.cuda.is_available()

    def choose(reason, **values):
        """Set those of these fields that are still None, and note why."""
        nonlocal args
        values = {name: x for name, x in values.items() if getattr(args, name) is None}
        why.update(dict.fromkeys(values, reason))
        args = replace(args, **values)

    if args.model is None or is_small(args.model):
        reason = "enough for the small model"
        choose(reason, device="cpu", torch_threads=1, dtype="float32", gradient_checkpointing=False, offload=False)
        reason, rate, P = "found for the small model", 1e-3 if args.sft_data else 3e-4, prompts_for(args, 32, problems)
        choose(reason, learning_rate=rate, prompts_per_step=P, group_size=8, max_tokens=40, generate_rows=2048)
        choose(reason, eval_samples=max(16, args.eval_k))

    # The machine
    choose("a GPU was found" if has_gpu else "no GPU was found", device="cuda" if has_gpu else "cpu")
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        choose("the GPU does the work", torch_threads=1)
    choose("as many as torch finds", torch_threads=torch.get_num_threads())
    if args.optimizer == "adamw" and not args.lora_rank:
        choose("adamw would lose its small steps in bfloat16", dtype="float32")
    if on_gpu or (args.device == "cpu" and multiplies_bfloat16()):
        choose(f"half the memory of float32, and quick on this {'GPU' if on_gpu else 'CPU'}", dtype="bfloat16")
    is_slow = args.device == "cpu"
    choose("bfloat16 is slow on this processor" if is_slow else f"untried: bfloat16 on {args.device}", dtype="float32")
    if args.dtype == "bfloat16" or args.offload or args.shard:
        choose("bfloat16, --offload and --shard need it", optimizer="adamw8bit")
    choose("the usual one for float32", optimizer="adamw")

    # The model
    if not on_gpu:
        choose("they save memory on a GPU only", gradient_checkpointing=False, offload=False)
    if size is None and None in (args.learning_rate, args.gradient_checkpointing, args.offload):
        size = num_parameters(args.model)
    if args.learning_rate is None:
        reason = f"for {size / 1e9:.2g}B parameters" + ", ten times as much for LoRA" * bool(args.lora_rank)
        reason += ", ten times as much for supervised steps" * bool(args.sft_data)
        rate = learning_rate_for(size, args.lora_rank > 0) * (10 if args.sft_data else 1)
        choose(reason, learning_rate=float(f"{rate:.2g}"))
    choose("saves memory, takes time: for 1B parameters and more", gradient_checkpointing=(size or 0) > 1e9)
    if args.offload is None:
        reason, is_needed = offload_for(args, size, free_memory(args.device) if free is None else free)
        choose(reason, offload=is_needed)

    # The task
    P, G, T = TASK_SIZES[args.task]
    if args.task == "jsonl":
        longest = max((len(problem.answer or "") for problem in problems), default=0)
        reason = f"{T}, and {longest} for the longest answer; raise it if the model should reason first"
        choose(reason, max_tokens=T + longest)
    P = prompts_for(args, P, problems)
    choose(f"usual for task {args.task}", prompts_per_step=P, group_size=G, max_tokens=T)
    choose("their keys and values take memory", generate_rows=128)
    choose("as many as pass@k needs, 8 or more", eval_samples=max(8, args.eval_k))
    return args, why


def multiplies_bfloat16():
    """Whether this CPU has instructions that multiply bfloat16. On one without them a product of 512 x 512 weights took
    322 ms, and 2.2 ms in float32 (an AMD EPYC with AVX2, one thread)."""
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def learning_rate_for(size, is_lora):
    """AdamW's learning rate for a model of `size` parameters, to two digits: 2e-5 for 135M, with which SmolLM2 learns
    (benchmarks/RESULTS.md), 1e-6 for 7B as in DeepSeekMath and DAPO, a power of the size between the two. LoRA takes
    ten times as much (Schulman et al. 2025, "LoRA Without Regret")."""
    rate = min(max(2e-5 * (135e6 / size) ** 0.75, 1e-6), 3e-4)
    return float(f"{rate * (10 if is_lora else 1):.2g}")


def prompts_for(args, usual, problems):
    """Prompts in a step: a prompt or more for each minibatch, not more than there are, as many in each process."""
    count = num_processes()
    wanted = -(-max(usual, args.num_minibatches) // count) * count
    return min(wanted, max(len(problems) // count, 1) * count) if problems else wanted


def num_parameters(name):
    """The number of parameters of a Hub id or a directory."""
    return empty_model(name).num_parameters()


def empty_model(name):
    """The model of a Hub id or a directory without its weights, from its config.json alone."""
    from transformers import AutoModelForCausalLM

    config = base_from_disk("AutoConfig", name)
    with refused(name, ValueError), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def choose_settings(args, saved, problems):
    """The settings of a run, all of them: as --resume's run had them, or chosen, and then printed."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if saved:
        return replace(args, **{name: getattr(saved["args"], name) for name in CHOSEN if getattr(args, name) is None})
    try:
        args, why = chosen(args, problems)
    except ValueError as error:  # of check_settings(): what was given does not fit what is left to choose from
        raise InputError(str(error)) from error
    print_choices(args, why)
    return args


def print_choices(args, why):
    """The flags that were chosen, as one would give them by hand, a line for each reason."""
    lines = {}
    for name, reason in why.items():
        value, flag = getattr(args, name), name.replace("_", "-")
        word = f"--{flag}\0{value}" if not isinstance(value, bool) else f"--{flag}" if value else f"--no-{flag}"
        lines.setdefault(reason, []).append(word)
    rows = []  # (some flags, the reason for them): what is longer than half a line goes on in the next one
    for reason, words in lines.items():
        flags = textwrap.wrap(" ".join(words), 50, break_on_hyphens=False, break_long_words=False)
        rows += zip(flags, [reason, *[""] * len(flags)])
    width = max((len(flags) for flags, _ in rows), default=0)
    for i, (flags, reason) in enumerate(rows):
        say(f"{'' if i else 'chosen':12}{flags:{width}}  {reason}".replace("\0", " ").rstrip())


# ---- Several processes (torchrun) ----
#
# Each process samples and learns from its share of the prompts. Totals, gradients and metrics are summed, so that the
# result does not depend on the number of processes.


def process_rank():
    """The number of this process among those that torchrun started, from 0 on; 0 if there is one process."""
    return int(os.environ.get("RANK", 0))


def num_processes():
    return int(os.environ.get("WORLD_SIZE", 1))


def own_share(items):
    """This process's part of a sequence that all processes share: consecutive items, nearly as many in each process."""
    count, rank = num_processes(), process_rank()
    return items[len(items) * rank // count : len(items) * (rank + 1) // count]


def over_ranks(tensor, operation="SUM"):
    """The tensor, summed over all processes (or their "MIN" or "MAX"), in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


def idle_passes(plan):
    """How many micro-batches this process has fewer than the process that has most."""
    return int(over_ranks(torch.tensor(len(plan)), "MAX")) - len(plan)


def run_idle_passes(args, policy, num_idle):
    """FSDP sums gradients in backward, where no process may be missing: one with fewer micro-batches joins in."""
    for _ in range(num_idle if args.shard else 0):
        (0.0 * idle_pass(args, policy)).sum().backward()


def sum_gradients(args, parameters):
    """Sum the gradients over all processes. With --shard FSDP has done so in backward."""
    if num_processes() > 1 and not args.shard:
        for parameter in parameters:
            if gradient_of(parameter) is None:
                parameter.grad = torch.zeros_like(parameter)
            gradient_of(parameter).copy_(over_ranks(gradient_of(parameter).to(args.device)))


# ---- The beginning of a run ----
#
# What train() needs before its first step, each in one call: the checkpoint, the processes, the policy, the reference.


def load_checkpoint(args):
    """What the run that --resume names saved last; None without --resume. It keeps its settings, but for CHANGEABLE."""
    if not args.resume:
        return None
    saved = load(Path(args.resume) / "checkpoint.pt", "step", "policy", "optimizer", "metrics")
    settings = replace(saved["args"], run_dir=None)
    for name in {field.name for field in fields(Args)} - set(CHANGEABLE.split()):
        given, before = getattr(args, name), getattr(settings, name)
        if given != before and not (given is None and name in CHOSEN):
            raise InputError(f"--resume keeps the run's own {name} {before}; {given} needs a separate run")
    return saved


def start_run(args, held_out):
    """Start processes, threads and Weights & Biases, and check the device. Returns the settings, with this process's
    own device, and the run directory. A new run makes it later: if loading the model fails, nothing is left behind."""
    count = num_processes()
    if args.prompts_per_step % count:
        raise InputError(f"--prompts-per-step {args.prompts_per_step} cannot be split evenly over {count} processes")
    if args.shard and count == 1:
        raise InputError("--shard needs several processes: torchrun --nproc-per-node=2 grpo_llm.py …")
    if count > 1 and (alone := settings_given(args, "staleness reward_model_steps")):
        raise InputError(f"{', '.join(alone)} works in one process, there are {count}")
    if len(held_out) < count:
        raise InputError(f"{len(held_out)} held-out problems are fewer than the {count} processes that share them")
    run_dir = [args.resume or args.run_dir or new_run_dir(args)]
    if count > 1:
        if args.device == "cuda":
            args = replace(args, device=f"cuda:{os.environ['LOCAL_RANK']}")
        if args.device.startswith("cuda"):
            torch.cuda.set_device(args.device)  # where NCCL works
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo")
        dist.broadcast_object_list(run_dir)  # its name holds the time
    run_dir = Path(run_dir[0])
    if process_rank() == 0 and run_dir.exists() and not args.resume:
        make_run_dir(run_dir)  # it is refused now, not after minutes
    check_device(args.device)
    torch.set_num_threads(args.torch_threads)
    prepare_memory(args)
    if args.track and process_rank() == 0:
        start_wandb(args, run_dir)  # before the writer, because it watches the writers that are made after it
    return args, run_dir


def prepare_memory(args):
    """Settings of the host's memory for a run on a CPU. It must come before the first product of matrices."""
    if args.device == "cpu":
        if args.keep_memory and sys.platform == "linux":
            keep_freed_memory()
        # Each new length of a batch needs newly prepared products. By default 1,024 are kept: 200 MB more a step
        for setting in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(setting, "64")


def keep_freed_memory():
    """By default glibc returns large freed blocks to the system, and each minibatch waits for new, zeroed pages."""
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: keep the free end of the heap, however large


def make_start_model(args, directory, problems, held_out):
    """The small model, warm-started on worked solutions and saved for all processes; a resumed run has it already.
    Returns the problems and the held-out ones that fit into its context."""
    if process_rank() == 0 and not args.resume:
        make_run_dir(Path(directory).parent)
        torch.manual_seed(args.seed)
        tokenizer = new_tokenizer(args.tools != "none")
        model = new_model(tokenizer).to(args.device)
        model.tool = find_tool(args, model, tokenizer)
        problems, held_out = those_that_fit(args, model, tokenizer, problems, held_out)
        # a token a character, one for each end of a call, and EOS
        num_long = sum(len(re.sub("</?calc>", "c", problem.solution)) >= args.max_tokens for problem in problems)
        if num_long:
            say(
                f"            {num_long:,} of {len(problems):,} worked solutions do not end within "
                f"--max-tokens {args.max_tokens}"
            )
        warm_start(args, model, tokenizer, problems, held_out[:128])
        save_model(Path(directory), model, tokenizer)
    if num_processes() > 1:
        dist.barrier()
    return problems, held_out


def prepare_policy(args, policy, tokenizer, saved):
    """Add the adapter of --lora-rank, restore what a checkpoint holds, and split the weights over the processes.
    Returns PEFT's handle of the adapter, or None. Prints a line for each thing that a reader may not expect."""
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    torch.manual_seed(args.seed)  # the adapter's first weights: the same in every process
    adapter = add_adapter(args, policy) if args.lora_rank else None
    base = args.model and base_of_adapter(args.model)
    if adapter and args.beta:
        adapter.first_weights = [x.detach().clone() for x in policy.parameters() if x.requires_grad]
    if policy.plain_because:
        say(f"path        plain, not fast: {policy.plain_because}")
    if args.staleness and args.sampler_correction == "none" and args.old_logprobs != "sampler":
        say(f"staleness   answers are {args.staleness} steps old, and no --sampler-correction says so to the loss")
    if base:
        what = "trained further" if adapter else "merged into it, and the whole model is trained"
        say(f"adapter     {args.model}, of {base}: it is {what}")
    if not tokenizer.chat_template and tokenizer("1")["input_ids"][-1] == tokenizer.eos_token_id:
        say("prompts     the EOS that the tokenizer appends is left out: nothing is sampled after it")
    if saved:
        policy.load_state_dict(saved["policy"], strict=False)
    if args.shard:
        shard(args, policy)
    return adapter


def reference_of(args, start_dir, policy, adapter, saved):
    """The frozen reference. With an adapter it is the policy itself, with the first weights in score_reference()."""
    if adapter:
        return policy
    reference = load_reference(args, start_dir, policy)
    if saved and saved["reference"]:
        reference.load_state_dict(saved["reference"])
    if args.shard:
        shard(args, reference)
    return reference


def score_reference(args, reference, adapter, sequences, micro_batches):
    """ln π_ref of the sequences, (B, T)."""
    with as_begun(adapter) if adapter else nullcontext():
        return score(args, reference, sequences, micro_batches)


def restore(saved, optimizer, reward_model):
    """Restore optimizer and reward model. Returns the first step, where the stream of problems stands, the metrics, and
    the rollouts that waited."""
    if not saved:
        return 0, 0, [], deque()
    optimizer.load_state_dict(saved["optimizer"])
    if reward_model:
        reward_model.load_state_dict(saved)
    waiting = deque()
    for rollout in saved.get("rollouts", ()):
        seen = [(Group(Problem(*problem), *group), Rating(*rating)) for problem, *group, rating, _ in rollout]
        taught = [pair for pair, row in zip(seen, rollout) if row[-1]]
        waiting.append(([group for group, _ in taught], [rating for _, rating in taught], seen))
    return saved["step"], saved["cursor"], saved["metrics"], waiting


def open_log(args, run_dir, first):
    """TensorBoard's writer in the first process, None in the others."""
    from torch.utils.tensorboard import SummaryWriter

    if process_rank() > 0:
        return None
    if args.model and not args.resume:
        make_run_dir(run_dir)
    cut_samples(run_dir / "samples.jsonl", first)
    return SummaryWriter(run_dir, purge_step=first + 1 if args.resume else None)


def seed_torch(*names):
    """Seed torch's generator: what it draws depends on these names alone, so a resumed run needs no random state."""
    torch.manual_seed(zlib.crc32(" ".join(map(str, names)).encode()))


def check_gradient(norm, run_dir, step):
    """Stop before a gradient of inf or NaN becomes the weights."""
    if not math.isfinite(norm):
        can_resume = (run_dir / "checkpoint.pt").exists()
        kept = f"; {run_dir / 'checkpoint.pt'} holds the last good state" if can_resume else ""
        raise InputError(f"the gradient is not finite in step {step}: lower --learning-rate{kept}")


# ---- Metrics, checkpoints, results ----
#
# What train() shows and keeps: docs/metrics.md explains each name with its healthy range.


def pass_at_k(num_samples, num_right, k):
    """Chance that at least one of k samples is right: an unbiased estimate [G21] (Chen et al. 2021, Eq. 1)."""
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority_at_k(answers, right, k):
    """maj@k [G21] (Wang et al. 2023): split the answers into ballots of k; in each the most frequent answer wins, and
    None is no vote. Returns the share of ballots that a right answer wins."""
    starts, won = range(0, len(answers) - k + 1, k), 0
    for start in starts:
        votes = Counter(answer for answer in answers[start : start + k] if answer is not None)
        won += bool(votes) and right[answers.index(votes.most_common(1)[0][0], start)]
    return won / len(starts)


def describe(args, seen):
    """What a reader wants to know of the sampled (group, rating)s, each a mean over all processes' share of it."""
    rewards = torch.stack([rating.rewards for _, rating in seen])  # (P, G)
    mask = torch.cat([group.mask for group, _ in seen])
    logprobs = torch.cat([group.logprobs for group, _ in seen])
    truncated = torch.cat([rating.is_truncated for _, rating in seen]).float()
    row = {"reward/mean": rewards, "reward/std": rewards.std(-1, correction=0)}
    for name in seen[0][1].parts:
        row[f"reward/{name}"] = torch.cat([rating.parts[name] for _, rating in seen])
    steps = [reward for _, rating in seen for rewards in rating.step_rewards for reward in rewards]
    row |= {
        "reward/steps": torch.tensor(steps),
        "groups/zero_variance": torch.tensor([float(not has_variance(args, rating)) for _, rating in seen]),
        "completion/length": torch.cat(
            [torch.tensor(lengths_of_texts(args, group, rating.is_truncated)) for group, rating in seen]
        ),
        "completion/truncated": truncated,
        "completion/eos_rate": 1 - truncated,
        "policy/entropy": -logprobs[mask.bool()],  # E[−ln π] is the entropy, at the temperature of the sampling
    }
    if args.tools != "none":
        texts = [text for group, _ in seen for text in group.texts]
        row["tools/calls"] = torch.tensor([float(len(re.findall(CALL, text))) for text in texts])
    return mean_over_ranks(row) | logged_metrics()


def mean_over_ranks(row):
    """{name: numbers of this process} → {name: their mean over all processes}. NaN is no number: a function of --reward
    does not apply, a problem has no answer. A name without numbers is left out."""
    columns = [torch.as_tensor(x, dtype=torch.float64) for x in row.values()]
    pairs = torch.tensor([[x.nansum(), (~x.isnan()).sum()] for x in columns], dtype=torch.float64)
    sums, counts = over_ranks(pairs).T
    return {name: mean for name, mean, count in zip(row, (sums / counts).tolist(), counts) if count}


def new_statistics():
    """Sums over the tokens of a rollout's updates, and the largest ratio, by name. The same names in all processes."""
    names = (
        "tokens policy/ratio_mean policy/ratio_max policy/clip_low policy/clip_high kl/reference policy/loss "
        "first_update_tokens policy/sampler_gap policy/sampler_weight"
    )
    return {name: torch.zeros(()) for name in names.split()}


@torch.no_grad()
def add_statistics(args, statistics, mask, log_ratio, advantage, kl, loss, gap, weight):
    """Add those of a micro-batch. kl: None without β; gap, ln π minus the sampler's: None after the first update;
    weight: that of the loss, None if no flag changes it."""
    mask = mask.bool()
    ratio, side = log_ratio.exp()[mask], advantage[mask]
    found = {
        "tokens": torch.ones_like(ratio),
        "policy/ratio_mean": ratio,
        "policy/clip_low": (ratio < 1 - args.clip_low) & (side < 0),
        "policy/clip_high": (ratio > 1 + args.clip_high) & ((side > 0) | (args.policy_loss == "cispo")),
        "policy/loss": loss,
    }
    if kl is not None:
        found["kl/reference"] = kl[mask]
    if gap is not None:
        found |= {"first_update_tokens": torch.ones_like(ratio), "policy/sampler_gap": gap.abs()[mask]}
    if weight is not None:
        found["policy/sampler_weight"] = weight.expand(mask.shape)[mask]
    for name, x in found.items():
        statistics[name] += x.sum().float().cpu()
    statistics["policy/ratio_max"] = torch.maximum(statistics["policy/ratio_max"], ratio.max().cpu())


def update_metrics(args, statistics, norms):
    """Their means over the tokens of all processes; no ratio where nothing was taught."""
    for name, x in statistics.items():
        over_ranks(x, "MAX" if name == "policy/ratio_max" else "SUM")
    row, num_updates = {}, max(len(norms), 1)
    if statistics["tokens"]:
        clipped = {"clip": ["policy/clip_low", "policy/clip_high"], "cispo": ["policy/clip_high"], "sapo": []}
        names = ["policy/ratio_mean", *clipped[args.policy_loss]] + ["kl/reference"] * (args.beta > 0)
        has_weight = args.sampler_correction != "none" or args.off_policy_limit is not None
        names += ["policy/sampler_weight"] * has_weight
        row = {name: float(statistics[name] / statistics["tokens"]) for name in names}
        row["policy/ratio_max"] = float(statistics["policy/ratio_max"])
        first = statistics["first_update_tokens"].clamp(min=1)
        row["policy/sampler_gap"] = float(statistics["policy/sampler_gap"] / first)
    row["policy/loss"] = float(statistics["policy/loss"]) / num_updates
    return row | {"policy/grad_norm": sum(norms) / num_updates}


def speed_metrics(args, clock, groups, mask):
    """Tokens a second and, where the system tells it, the peak of memory. clock: begun, sampled, learned."""
    begun, sampled, learned = clock
    row = {
        "time/generate_tokens_per_second": sum(float(group.mask.sum()) for group in groups) / (sampled - begun),
        "time/train_tokens_per_second": float(mask.sum()) * args.num_epochs / (learned - sampled),
        "time/step_seconds": learned - begun,
    }
    peak = peak_memory(args.device)
    return row if peak is None else row | {"memory/peak_gb": peak / 1e9}


def is_due(every, done):
    """Is it time for what happens every so many steps, or never for 0?"""
    return bool(every and done % every == 0)


def log(writer, metrics, step, row):
    for name, number in row.items() if writer else ():
        writer.add_scalar(name, number, step)
    metrics.append({"step": step, **row})


def save_checkpoint(args, run_dir, writer, progress, policy, optimizer, reference, reward_model):
    """All that a resumed run needs. progress: the steps done, where the stream of problems stands, the metrics."""
    if process_rank() > 0 and not args.shard:  # to gather takes all processes
        return
    is_refreshed = args.reference_every and args.beta  # else it can be loaded as it was at first
    content = {
        "args": asdict(args),
        "policy": {name: gathered(x.detach()) for name, x in policy.named_parameters() if x.requires_grad},
        "optimizer": optimizer.state_dict(),
        "reference": {name: gathered(x) for name, x in reference.state_dict().items()} if is_refreshed else None,
        **progress,
        **(reward_model.state_dict() if reward_model else {}),
    }
    if process_rank() == 0:
        writer.flush()
        save(run_dir / "checkpoint.pt", content)


def end_run(args, run_dir, writer, policy, adapter, tokenizer, metrics, held_out, seen, seconds):
    """Leave the group of processes. The first one writes the policy as a transformers directory, metrics.jsonl and
    curves.png, and prints the summary."""
    weights = {name: gathered(x.detach()) for name, x in policy.named_parameters()} if args.shard else None
    if num_processes() > 1:
        dist.barrier()
        dist.destroy_process_group()
    if writer is None:
        return
    writer.close()
    save_model(run_dir / "policy", adapter or policy, tokenizer, weights)
    if args.save_merged:
        plain = replace(args, lora_rank=0, quantize="none", optimizer="adamw8bit", save_merged=False, device="cpu")
        save_model(run_dir / "merged", load_model(plain, str(run_dir / "policy"))[0], tokenizer)
    with written_aside(run_dir / "metrics.jsonl") as path:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in metrics), encoding="utf-8")
    draw_curves(metrics, run_dir / "curves.png")
    print_summary(args, run_dir, metrics, held_out, seen, seconds)


def print_summary(args, run_dir, metrics, held_out, seen, seconds):
    """One screen: before and after, some answers of the last step, where everything is, what to try next."""
    names = {"eval/greedy", "eval/reward"}  # --reward may have no accuracies
    before, after = (next(row for row in rows if names & row.keys()) for rows in (metrics, metrics[::-1]))
    print(f"\n{len(held_out)} held-out problems   before    after")
    for name in [name for name in before if name.startswith("eval/")]:
        print(f"  {name.removeprefix('eval/'):20}  {before[name]:7.3f}  {after[name]:7.3f}")
    if seen:
        print_samples(*seen[0])
    print(f"\ncurves      {run_dir / 'curves.png'}")
    if not args.sft_data:
        print(f"samples     {run_dir / 'samples.jsonl'}, answers of every step")
    print(f"policy      {run_dir / 'policy'}, for from_pretrained")
    if args.save_merged:
        print(f"merged      {run_dir / 'merged'}, the same without PEFT")
    spent = sum(row.get("time/step_seconds", 0.0) for row in metrics)
    done = metrics[-1]["step"]
    kind = "supervised steps" if args.sft_data else "steps of GRPO"
    print(f"seconds     {seconds:.1f} in all, {spent:.1f} of them in {done} {kind}")
    if done < args.steps:
        again = shlex.join(["python", Path(__file__).name, "--resume", str(run_dir)])
        print(f"ended       early, after {done} of {args.steps} steps: {again} continues")
    print(f"logs        tensorboard --logdir {run_dir}")
    commands = [("--evaluate", args.model or run_dir / "start", run_dir)]
    short = [x.prompt for x in held_out if len(x.prompt) < 80 and x.prompt[0] != "-" and x.prompt.isprintable()]
    if short:
        commands.insert(0, ("--ask", short[0], "--model", run_dir))
    for number, words in enumerate(commands):
        command = shlex.join(["python", Path(__file__).name, *map(str, words)])  # quoted as a shell needs it
        print(f"{'' if number else 'next':12}{command}")


# ---- Without training: --evaluate and --ask ----
#
# Both read models that exist, train nothing and write nothing. The settings of a run hold for its policy: the task, the
# words of the prompt, the problems that were held out, the temperature. What is given by hand wins.

# The settings that decide which problems a run learned from
SOURCES = ("task", "data", "eval_data", "terms", "max_term", "operators", "num_problems", "seed")

# The settings that decide how a model is asked
ASKED = ("task", "instruction", "system", "stop", "tools", "max_tokens", "temperature")

# What a run's settings are without the run
NO_RUN = {"run_dir": None, "resume": None, "track": False, "offload": False, "shard": False, "sft_data": None}

# Settings of training, which need not be chosen here
UNUSED = {"optimizer": "adamw8bit", "learning_rate": 1.0, "gradient_checkpointing": False, "offload": False}


def policy_of(name):
    """(a directory or Hub id, the settings of its run). A run's directory stands for its policy. The settings are None
    if the model does not lie in a run's directory."""
    path = Path(name)
    if (path / "checkpoint.pt").is_file():
        saved = load(path / "checkpoint.pt")["args"]
        if not (path / "policy").is_dir():
            raise InputError(f"{name} is a run that has no policy yet: --resume {name} brings it to its end")
        return str(path / "policy"), saved
    if path.is_dir() and (path.parent / "checkpoint.pt").is_file():  # policy, merged, or the small model's start
        with suppress(InputError):  # a run of another script
            return name, load(path.parent / "checkpoint.pt")["args"]
    if not path.is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):  # the form of a Hub id
        raise InputError(f"there is no directory {name}")
    if path.is_dir() and not ((path / "config.json").exists() or (path / "adapter_config.json").exists()):
        raise InputError(f"the directory {name} holds no model: it has no config.json")
    return name, None


def newest_run():
    """The directory of the run in runs that ended last, of this script."""
    for policy in sorted(Path("runs").glob("*/policy"), key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(InputError):  # a run of another script
            load(policy.parent / "checkpoint.pt")
            print(f"run         {policy.parent}, the newest in runs")
            return str(policy.parent)
    raise InputError("the directory runs holds no finished run of this script, so a run must be named")


def model_to_train(name, instruction, tools):
    """The model that --model means: of a run its policy, which is trained further."""
    if name is None:
        return None
    directory, saved = policy_of(name)
    if saved and saved.tools != tools:
        say(f"tools       {name} was trained with --tools {saved.tools}, and this run has --tools {tools}")
    if is_small(name) and instruction != "{}":
        raise InputError(f'--model {name} is the small model of a run, which reads no words: add --instruction "{{}}"')
    return directory


def is_small(name):
    """Is it the small model that the script makes itself, or was it trained from that, in however many runs?"""
    with suppress(InputError):
        while saved := policy_of(name)[1]:
            if saved.model is None:
                return True
            name = saved.model
    return False


def settings_to_look(words):
    """The defaults of the flags of --evaluate, --ask and --sample-to: the settings of the first run that is named, or
    the usual. None if the command line has none of the three, or a mistake that is reported later."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--evaluate", nargs="*", default=[])
    for flag in ("--ask", "--sample-to", "--model", "--resume", "--data"):
        parser.add_argument(flag, nargs="?")
    look, _ = parser.parse_known_args(words)
    commands = look.evaluate, (look.ask or "").strip(), look.sample_to
    if sum(map(bool, commands)) != 1 or look.resume or "" in (*look.evaluate, look.model, look.sample_to):
        return None
    if look.evaluate and look.model:
        raise InputError(f"--evaluate takes the names of all models: write {look.model} behind it, without --model")
    names = look.evaluate or [look.model or newest_run()]
    saved = next((saved for _, saved in map(policy_of, names) if saved), None)
    settings = {"evaluate": tuple(look.evaluate), "ask": look.ask, "sample_to": look.sample_to}
    settings["model"] = None if look.evaluate else names[0]
    settings |= {"reward": None} if look.sample_to else {}  # what is kept is what the verifier judges right
    if not saved:
        return Args(**settings)
    settings |= NO_RUN
    if look.data:  # it takes the place of the run's evaluation file too
        settings["eval_data"] = None
    try:
        check_device(saved.device)
    except InputError:  # it was trained on another machine
        settings |= dict.fromkeys(("device", "torch_threads", "dtype", "optimizer"))
    return replace(saved, **settings)


def settings_of_model(args, directory, saved):
    """args for one model. The small model of a run reads the problem alone, any other reads the instruction too."""
    if is_small(directory):
        return replace(args, model=None, system=None, stop=())  # it has no chat form, and ends by itself
    return replace(args, model=directory)


def choose_to_look(args, policies, problems):
    """(the settings with those that were not given chosen and printed, the problems that every model can read: that
    leave room for max_tokens in its context). Makes the device ready."""
    if num_processes() > 1:
        raise InputError("--evaluate, --ask and --sample-to work in one process: start them without torchrun")
    unused = UNUSED if args.sample_to else {**UNUSED, "prompts_per_step": args.num_minibatches, "group_size": 2}
    unused = {name: x for name, x in unused.items() if getattr(args, name) is None}
    args = choose_settings(replace(settings_of_model(args, *policies[0]), **unused), None, problems)
    check_device(args.device)
    torch.set_num_threads(args.torch_threads)
    prepare_memory(args)
    for directory, saved in policies:
        own, tokenizer = settings_of_model(args, directory, saved), read_tokenizer(directory)
        if own.model is None:
            check_characters(tokenizer, problems)
        kept, over = that_fit(own, context_of(empty_model(directory)), tokenizer, problems)
        if not kept:
            raise InputError(f"{directory}: {over}: lower --max-tokens or shorten the prompts")
        if len(kept) < len(problems):
            say(f"            {directory}: {over}: they are left out")
        problems = kept
    return args, problems


def load_policy(args, directory):
    """(model, tokenizer, EOS ids) as they were in the run: with --lora-rank an adapter is added and not merged."""
    model, tokenizer, eos_ids = load_model(args, directory)
    if args.lora_rank and base_of_adapter(directory):
        with_adapter(model, directory)
        without_dropout(model).eval()
    if model.plain_because:
        say(f"path        plain, not fast: {model.plain_because}")
    return model, tokenizer, eos_ids


def check_characters(tokenizer, problems):
    """Refuse a prompt that the small model cannot read."""
    known = tokenizer.get_vocab()
    for problem in problems:
        if unknown := sorted(set(problem.prompt) - known.keys()):
            characters = "".join(sorted(character for character in known if len(character) == 1)).strip()
            raise InputError(
                f"the small model reads only the characters {characters}, found {unknown[0]!r} in the prompt "
                f"{shortened(problem.prompt)}"
            )


# Evaluate


def compare_models(args):
    """--evaluate: how well one or more models answer the same problems with the same noise, as one table.

    Returns for each model the list that scores_of() made. The intervals are those of interval() and paired_interval().
    """
    from tqdm import tqdm

    policies = [policy_of(name) for name in args.evaluate]
    problems = problems_to_evaluate(args, policies)
    args, problems = choose_to_look(args, policies, problems)
    tables = []
    for number, (name, policy) in enumerate(zip(args.evaluate, policies)):
        say(f"model {string.ascii_uppercase[number % 26]}     {name}")
        own = settings_of_model(args, *policy)
        model, tokenizer, eos_ids = load_policy(own, policy[0])
        rows, bar = [], tqdm(total=len(problems), desc="evaluate", unit="problem")
        for start in range(0, len(problems), own.generate_rows):  # as many as the greedy answers have rows
            numbers = range(len(problems))[start : start + own.generate_rows]
            given = model, tokenizer, eos_ids, [problems[i] for i in numbers], numbers
            own, scores = retry_with_less(own, "generate_rows", scores_of, *given)
            rows += scores
            bar.update(len(scores))
        bar.close()
        tables.append(rows)
        del model, given  # before the next one is loaded
    print_scores(args, tables)
    return tables


def problems_to_evaluate(args, policies):
    """The problems on which models are compared, at most eval_problems; prints which they are. Of the first run those
    that it held out; if other problems are given, or there is no run, all of them that no named run learned from."""
    runs = [(name, saved) for name, (_, saved) in zip(args.evaluate, policies) if saved]
    look = {**NO_RUN, "evaluate": args.evaluate, "model": None}
    if runs and all(getattr(args, name) == getattr(runs[0][1], name) for name in SOURCES):
        problems, source = load_problems(replace(runs[0][1], **look))[1], f"that the run of {runs[0][0]} held out"
    elif has_eval_problems(args):
        problems, source = load_eval_problems(args), f"of {args.eval_data or 'the test split of gsm8k'}"
    else:
        learned, held_out = load_problems(args)
        problems, source = held_out + learned, f"of {args.data or f'task {args.task}, seed {args.seed}'}"
    count, notes = len(problems), []
    for name, saved in runs:
        asked = [x for x in (*ASKED, "quantize", "dtype") if x != "instruction" or not is_small(name)]
        if differing := [x for x in asked if getattr(saved, x) != getattr(runs[0][1], x)]:
            notes.append(f"{name} was trained with another {', '.join(differing)}; here {runs[0][0]}'s holds for all")
        try:
            learned = {problem.prompt for problem in load_problems(replace(saved, **look))[0]}
        except (InputError, OSError) as error:
            notes.append(f"{name} may have learned from some of them: its own cannot be read: {error}")
            continue
        kept = [problem for problem in problems if problem.prompt not in learned]
        if len(kept) < len(problems):
            notes.append(f"{len(problems) - len(kept):,} are left out because {name} learned from them")
        problems = kept
    if not problems:
        why = f": {'; '.join(notes)}" if notes else ""
        raise InputError(f"there is nothing to evaluate on among the {count:,} problems {source}{why}")
    used = problems[: args.eval_problems]
    share = "all" if len(used) == len(problems) else f"--eval-problems {len(used):,} of the"
    say(f"problems    {share} {len(problems):,} {source}")
    for note in notes:
        say(f"            {note}")
    return used


def interval(scores):
    """The 95% interval of the mean of problems' scores in [0, 1] (Wilson 1927), over the choice of the problems.

    Wilson's interval is for yes and no, whose variance is p (1 − p). Shares such as pass@1 vary less. They count as so
    many problems of yes or no as would give the mean the same variance, which makes it nearly the normal interval.
    """
    n, p, z = len(scores), sum(scores) / len(scores), 1.96
    variance = sum((score - p) ** 2 for score in scores) / n
    if max(scores) > min(scores):
        n *= p * (1 - p) / variance
    centre = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max((centre - half) / (1 + z**2 / n), 0.0), min((centre + half) / (1 + z**2 / n), 1.0)


def paired_interval(differences):
    """The 95% interval of the mean of problems' differences in [−1, 1] (Agresti & Min 2005).

    It is the normal interval after two problems are added: half a one with difference 1, half a one with −1, one with
    0. Without them it would have no width where the models agree on the few problems that were asked.
    """
    low, high = normal_interval([*differences, 0.5**0.5, -(0.5**0.5)], 0)  # the same sum of squares, 1
    return max(low, -1.0), min(high, 1.0)


def normal_interval(scores, correction=1):
    """The 95% interval of the mean of problems' scores of any size; NaN for one problem, which tells no variance."""
    x = torch.tensor(scores, dtype=torch.float64)
    half = 1.96 * float(x.std(correction=correction) / len(x) ** 0.5) if len(x) > 1 else math.nan
    return float(x.mean()) - half, float(x.mean()) + half


def print_scores(args, tables):
    """The means over the problems with their 95% intervals, a column a model; of two models the paired difference."""
    letters = string.ascii_uppercase[: len(tables)]
    heads = [*letters, *["B − A"] * (len(tables) == 2)]
    num_samples = f"{len(tables[0]):,} problems, {args.eval_samples} samples"
    print(f"\n{num_samples:28}" + "".join(f"{head:28}" for head in heads).rstrip())
    for name in tables[0][0]:
        columns = [[row[name] for row in rows if not math.isnan(row[name])] for rows in tables]
        if not columns[0]:
            continue  # no problem has an answer, or there is no --reward
        own, paired = (normal_interval,) * 2 if name == "reward" else (interval, paired_interval)
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(sum(x) / len(x), *own(x)) for x in columns]
        if len(columns) == 2:
            differences = [b - a for a, b in zip(*columns)]
            mean = sum(differences) / len(differences)
            cells.append("{:+.3f} ({:+.3f} to {:+.3f})".format(mean, *paired(differences)))
        print(f"  {name:26}" + "".join(f"{cell:28}" for cell in cells).rstrip())
    print("in brackets: 95% intervals, for other problems of the same kind")


# Ask

NUM_ANSWERS = 4  # that --ask samples, after the greedy one


def ask_policy(args):
    """--ask: the greedy answer and some samples of one model, each with ln π, its length and, if the right answer is
    known, its reward. Returns a (name, text, reward or None, ln π, tokens, has it ended) for each."""
    policy = policy_of(args.model)
    problem = asked_problem(args)
    if args.task == "arithmetic" and not problem.answer and args.instruction is None:
        args = replace(args, instruction="{}")  # "What is {}?" is for sums
    args, _ = choose_to_look(args, [policy], [problem])
    model, tokenizer, eos_ids = load_policy(args, policy[0])
    reward_model = RewardModel(args) if args.reward_model and problem.answer else None
    names, is_known = [("ask", problem.prompt)], bool(problem.answer or args.reward)
    answers = []
    for kind, count, temperature in (("greedy", 1, 0.0), ("sample", NUM_ANSWERS, args.temperature)):
        (group,) = sample_groups(args, model, tokenizer, eos_ids, [problem], count, temperature, names)
        if args.reward:
            try:
                (group,) = with_own_rewards(args, [group])
            except InputError as error:  # it needs a column that only the data has
                say(f"reward      not known: {error}")
                args, is_known = replace(args, reward=None), False
        rating = rate_group(args, group, tokenizer, eos_ids, reward_model, 0)
        with torch.no_grad():
            logprobs = policy_logprobs(args, model, [group.prompt], group.tokens, group.mask).cpu().sum(-1).tolist()
        columns = rating.rewards.tolist(), logprobs, lengths_of(group.mask), (~rating.is_truncated).tolist()
        for number, (text, reward, *row) in enumerate(zip(group.texts, *columns), start=1):
            name = f"{kind} {number}" if count > 1 else kind
            answers.append((name, text, reward if is_known else None, *row))
    print_answers(told(args, problem), problem.answer, answers)
    return answers


def asked_problem(args):
    """The problem of --ask with its answer, if that is known: from the run's data or by arithmetic. Else it is ""."""
    text = args.ask.strip()
    if args.task == "countdown":
        match = re.fullmatch(r"([0-9]+(?:,[0-9]+)*)=([0-9]+)", text.replace(" ", ""))
        if not match:
            raise InputError(
                f"--ask: task countdown wants numbers and a target such as 3,4,5=17, found {shortened(text)}"
            )
        return Problem(match[0], match[2], numbers=tuple(map(int, match[1].split(","))))
    if args.data or args.eval_data or (args.task == "gsm8k" and policy_of(args.model)[1]):
        try:
            learned = read_problems(args, read_rows(args.data)) if args.task == "gsm8k" or args.data else []
            for problem in load_eval_problems(args) + learned:
                if problem.prompt == text:
                    return problem
        except (InputError, OSError) as error:
            say(f"data        it cannot be read, so whether the answer is known cannot be said: {error}")
    match = re.fullmatch(r"(?:what is )?([0-9+\-*/()×÷− ]+?)[ =?]*", text, re.IGNORECASE)
    found = value_and_numbers(match[1]) if match else None
    if not found or len(found[1]) < 2:
        return Problem(text, "")
    return Problem(match[1].replace(" ", "") if args.task == "arithmetic" else text, str(found[0]))


def print_answers(question, answer, answers):
    """Each answer below a line of its numbers, indented and wrapped for a terminal."""
    width = max(min(shutil.get_terminal_size().columns, 120), 40)

    def show(text, indent):
        for line in text.splitlines() or [""]:
            line = "".join(character if character.isprintable() else "\ufffd" for character in line.expandtabs(4))
            print(textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent) or "")

    show(question, "asked       ")
    print(f"right is    {answer or 'not known'}")
    for name, text, reward, logprob, length, has_ended in answers:
        paid = "" if reward is None else f"reward {reward:.2f}  "
        print(f"\n{name:10}  {paid}ln π {logprob:.2f} nats  {length} tokens{'' if has_ended else ', not ended'}")
        show(text, "    ")


# ---- Imitation: samples to keep (--sample-to), supervised steps on a file (--sft-data) ----
#
# The two stages of DeepSeek-R1's recipe that are not RL (docs/4_grpo.md, "R1's recipe"). Rejection sampling keeps what
# the verifier calls right and a reader can read; supervised fine-tuning makes any model imitate it. The loss must count
# the tokens that the model is to write, EOS included, and no token of a prompt.


def supervised_loss(logprob, mask, total_tokens):
    """−Σ ln π(token) / total_tokens over the tokens of completions [G31]: logprob, mask (B, T) → scalar, nats a token.

    It is the cross-entropy with a file's completions: the mean over tokens, not over completions. total_tokens is that
    of the whole optimizer step, so the losses of its micro-batches add up to its loss.
    """
    return -torch.where(mask.bool(), logprob, 0.0).sum() / total_tokens


def padded(completions):
    """(tokens, mask), (B, T) each, of B token lists, which stand on the left."""
    longest = max(map(len, completions))
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in completions])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in completions])
    return tokens, mask


# Samples to keep


def keep_samples(args):
    """--sample-to: sample problems of training, --steps times as many as a rollout has, and write what is right and
    readable as lines {"prompt", "completion"} [G32]. Returns {what: how many}."""
    from tqdm import trange

    path, policy = Path(args.sample_to), policy_of(args.model)
    if path.exists() or not path.parent.is_dir():
        raise InputError(f"--sample-to {path} {'exists: choose another' if path.exists() else 'lies in no directory'}")
    if args.tools != "none":
        raise InputError("--sample-to keeps texts, and --sft-data would imitate what the calculator wrote in them too")
    args, problems = choose_to_look(args, [policy], load_problems(args)[0])
    model, tokenizer, eos_ids = load_policy(args, policy[0])
    counts, rows = Counter(), {}
    for step in trange(args.steps, desc="sample"):
        positions = range(step * args.prompts_per_step, (step + 1) * args.prompts_per_step)
        names = [("sample", position) for position in positions]  # other noise than the training's
        asked = problems_from(problems, positions, args.seed)
        given = model, tokenizer, eos_ids, asked, args.group_size, args.temperature, names
        args, groups = retry_with_less(args, "generate_rows", sample_groups, *given)
        for group in groups:
            prompt = messages_of(args, group.problem) if tokenizer.chat_template else f"{told(args, group.problem)}\n"
            for text in kept_texts(args, group, eos_ids, counts):
                rows[group.problem.prompt, text] = {"prompt": prompt, "completion": text}  # equal ones once
    counts["written"] = len(rows)
    print_kept(args, counts, len({prompt for prompt, _ in rows}))
    with written_aside(path) as temporary:
        lines = [f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows.values()]
        temporary.write_text("".join(lines), encoding="utf-8")
    return dict(counts)


def kept_texts(args, group, eos_ids, counts):
    """The completions of a group that are right, match --format-pattern and have ended. Adds to the counts."""
    kept = []
    for text, is_truncated in zip(group.texts, truncated_rows(args, group, eos_ids).tolist()):
        right = is_right(group.problem, before_stop(args, text))
        readable = bool(re.fullmatch(args.format_pattern, text))
        counts.update(sampled=1, right=right, readable=readable, ended=not is_truncated)
        if right and readable and not is_truncated:
            kept.append(text)
    counts["kept"] += len(kept)
    return kept


def print_kept(args, counts, num_prompts):
    """What --sample-to has kept, or the refusal of a file without lines."""
    shares = f"{counts['right']:,} are right, {counts['readable']:,} match --format-pattern, {counts['ended']:,} ended"
    if not counts["written"]:
        raise InputError(
            f"--sample-to: of {counts['sampled']:,} completions {shares}, and none is all three. --format-pattern "
            f"{args.format_pattern!r} says what is readable"
        )
    say(f"\nsampled     {counts['sampled']:,} completions: {shares}")
    num_equal = counts["kept"] - counts["written"]
    say(f"kept        {counts['kept']:,} are all three, {num_equal:,} of them equal to another one and not written")
    say(f"written     {args.sample_to}: {counts['written']:,} lines for {num_prompts:,} prompts")
    words = ["python", Path(__file__).name, "--model", "MODEL", "--sft-data", args.sample_to]
    words += ["--instruction", "{}"] if args.model is None else []
    say(f"next        {shlex.join(words)}")


# Supervised steps


class Example(NamedTuple):
    prompt: list  # tokens that are read
    completion: list  # tokens that are imitated, with the EOS that ends them


def read_completions(args):
    """[(where it stands, problem, completion)] of the lines {"prompt", "completion"} of --sft-data. A prompt is a text
    or the messages of a chat, a completion a text or the assistant's one message."""
    rows = []
    for where, row in read_rows(args.sft_data, "--sft-data"):
        with refused(where):
            prompt, messages = read_prompt(row, ("prompt", "completion"), "--sft-data")
            text = row["completion"]
            if isinstance(text, list) and len(text) == 1 and isinstance(text[0], dict):
                text = text[0].get("content") if text[0].get("role") == "assistant" else text
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"completion must be a text or one message of the assistant, found {shortened(text)}")
            problem = Problem(prompt.removesuffix("\n"), None, messages=messages)  # encode_prompt() adds the newline
            rows.append((where, problem, text))
    if not rows:
        raise InputError(f"--sft-data {args.sft_data} has no rows")
    return rows


def encode_completion(tokenizer, eos_ids, text):
    """The tokens of a completion and the EOS that ends it [G31]. Without that the model would never learn to stop."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    own = tokenizer.eos_token_id
    eos = [own if own in eos_ids else eos_ids[0]] if eos_ids else []  # there is none where only --stop ends an answer
    ids = ids if ids and ids[-1] in eos_ids else ids + eos
    if set(ids[:-1]) & set(eos_ids):
        raise InputError("the completion has an EOS token before its end")
    if tokenizer.unk_token_id in set(ids) - set(eos_ids):
        raise InputError(f"the tokenizer does not know a part of the completion {shortened(text)}")
    return ids


def examples_of(args, model, tokenizer, eos_ids, rows, held_out):
    """The Examples of such rows. A file's prompt is complete, so no --instruction is added; --system is, where the
    prompt has no system turn. Says what is left out, and why."""
    plain = replace(args, instruction="{}", system=None)
    with_system = replace(plain, system=args.system)
    not_learned = {tuple(encode_prompt(args, tokenizer, problem)) for problem in held_out}
    examples, notes, context = [], Counter(), context_of(model)
    for where, problem, text in rows:
        has_system = problem.messages and problem.messages[0]["role"] in ("system", "developer")
        with refused(where):
            prompt = encode_prompt(plain if has_system else with_system, tokenizer, problem)
            completion = encode_completion(tokenizer, eos_ids, text)
        if tuple(prompt) in not_learned:
            notes["are left out because their prompts are held out"] += 1
        elif len(prompt) + len(completion) > context:
            notes[f"are left out because they exceed the model's context of {context:,} tokens"] += 1
        else:
            is_long = len(completion) > args.max_tokens
            notes[f"are longer than --max-tokens {args.max_tokens}, where an evaluation cuts an answer"] += is_long
            examples.append(Example(prompt, completion))
    epochs = args.steps * args.prompts_per_step / max(len(examples), 1)
    say(f"sft-data    {len(rows):,} lines; {args.steps} steps of {args.prompts_per_step} are {epochs:.2g} epochs")
    for note, count in notes.items():
        if count:
            say(f"            {count:,} {note}")
    if not examples:
        raise InputError(f"--sft-data {args.sft_data} has no line to learn from: all are left out")
    return examples


def supervised_gradient(args, policy, optimizer, examples):
    """The gradient of one batch of examples, added up over micro-batches that fit into memory. Returns the loss and
    the number of tokens, of this process's part; the losses of all processes add up to the loss of the step."""
    prompts, completions = zip(*examples)
    tokens, mask = padded(completions)
    total_tokens = over_ranks(mask.sum())
    lengths = dict(enumerate(map(len, completions)))
    micro_batches = plan_for(args, policy, list(map(len, prompts)), lengths, 1)
    num_idle, total = idle_passes(micro_batches), 0.0
    optimizer.zero_grad()
    for rows in micro_batches:
        logprob = micro_batch_logprobs(args, policy, prompts, tokens, mask, rows)
        order = [i for row in rows for i in row]
        loss = supervised_loss(logprob, mask[order].to(args.device), total_tokens)
        loss.backward()
        total += loss.item()
    run_idle_passes(args, policy, num_idle)
    return total, int(mask.sum())


def fine_tune(args):
    """--sft-data: supervised steps on a file's completions. It reads, evaluates, logs, saves and resumes as train()
    does, whose steps 5 to 9 are one here. Returns the metrics of each step and of each evaluation, oldest first."""
    from tqdm import trange

    started = time.perf_counter()
    saved = load_checkpoint(args)
    rows = read_completions(args)
    problems, held_out = load_problems(args)
    args = choose_settings(args, saved, problems)
    args, run_dir = start_run(args, held_out)
    policy, tokenizer, eos_ids = load_model(args, args.model)
    problems, held_out = those_that_fit(args, policy, tokenizer, problems, held_out)
    examples = examples_of(args, policy, tokenizer, eos_ids, rows, held_out)
    adapter = prepare_policy(args, policy, tokenizer, saved)
    optimizer = new_optimizer(args, policy)
    parameters = optimizer.param_groups[0]["params"]
    first, _, metrics, _ = restore(saved, optimizer, None)
    writer = open_log(args, run_dir, first)
    if not metrics:
        args, scores = retry_with_less(args, "generate_rows", evaluate, policy, tokenizer, eos_ids, held_out)
        log(writer, metrics, 0, mean_over_ranks(scores))
    ending = Ending(args, started)
    bar = trange(first, args.steps, desc="sft", initial=first, total=args.steps, disable=process_rank() > 0)
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate_of(args, step)
        begun = time.perf_counter()
        positions = own_share(range(step * args.prompts_per_step, (step + 1) * args.prompts_per_step))
        batch = problems_from(examples, positions, args.seed)
        at_1 = replace(args, temperature=1.0)  # what is imitated was not sampled at --temperature
        policy.train()
        at_1, (loss, count) = retry_with_less(at_1, "micro_batch_tokens", supervised_gradient, policy, optimizer, batch)
        args = replace(args, micro_batch_tokens=at_1.micro_batch_tokens)
        sum_gradients(args, parameters)
        norm = cut_gradients(parameters, args.max_grad_norm, args.shard)
        check_gradient(norm, run_dir, step)
        seed_torch(args.seed, step, "rounding")  # all processes round alike
        optimizer.step()
        optimizer.zero_grad()
        policy.eval()
        seconds = time.perf_counter() - begun
        row = {"sft/loss": over_ranks(torch.tensor(loss, dtype=torch.float64)).item(), "policy/grad_norm": norm}
        row |= {"policy/learning_rate": optimizer.param_groups[0]["lr"]}
        row |= {"time/train_tokens_per_second": count / seconds, "time/step_seconds": seconds}
        peak, done, is_ending = peak_memory(args.device), step + 1, ending.is_due()
        row |= {} if peak is None else {"memory/peak_gb": peak / 1e9}
        is_last = is_ending or done == args.steps
        if is_last or is_due(args.eval_every, done):
            args, scores = retry_with_less(args, "generate_rows", evaluate, policy, tokenizer, eos_ids, held_out)
            row |= mean_over_ranks(scores)
        bar.set_postfix(loss=f"{row['sft/loss']:.3f}", refresh=False)
        log(writer, metrics, done, row)
        if is_last or is_due(args.checkpoint_every, done):
            progress = {"step": done, "cursor": done * args.prompts_per_step, "metrics": metrics}
            save_checkpoint(args, run_dir, writer, progress, policy, optimizer, None, None)
        if is_ending:
            break
    bar.close()
    ending.restore()
    end_run(args, run_dir, writer, policy, adapter, tokenizer, metrics, held_out, [], time.perf_counter() - started)
    return metrics


# ---- Answers, shown during the run ----
#
# Curves do not tell what a policy writes. A reward that is gamed, a form that the verifier cannot read and answers that
# are cut off are seen at once in the answers, and often nowhere else.

SHOWN_GROUPS = 2  # groups of each step whose answers are kept in samples.jsonl


def show_answers(args, run_dir, writer, bar, metrics, groups, ratings, advantages):
    """Append the first groups of the last step to samples.jsonl. After an evaluation show them in TensorBoard too, and
    with --verbose print the step's best and worst completion. Only in the first process, the one that has a writer."""
    if writer is None:
        return
    step, count = metrics[-1]["step"], len(groups) if args.verbose else SHOWN_GROUPS
    columns = zip(groups, ratings, advantages.split(args.group_size))
    rows = [sample_row(args, step, *column) for column, _ in zip(columns, range(count))]
    with open(run_dir / "samples.jsonl", "a", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows[:SHOWN_GROUPS])
    if any(name.startswith("eval/") for name in metrics[-1]):
        writer.add_text("samples", as_markdown(rows[:SHOWN_GROUPS]), step)
    if args.verbose:
        answers = [{**row, **answer} for row in rows for answer in row["completions"]]
        answers.sort(key=lambda answer: answer["reward"])
        worst, best = answers[0], answers[-1]
        shown = {"best": best, "worst": worst} if worst["reward"] < best["reward"] else {"all equal": best}
        for name, x in shown.items():
            question = on_screen(x["prompt"]) + (f", right is {on_screen(x['answer'])}" if x["answer"] else "")
            bar.write(f"{name:12}step {step}, reward {x['reward']:.2f}: {question}\n{'':12}{on_screen(x['text'], 400)}")


def sample_row(args, step, group, rating, advantages):
    """One group as a line of samples.jsonl. advantages (G, T) are those of the update. With --supervision process they
    differ from token to token: their mean is shown, and beside it the reward of each step."""
    row = {"step": step, "prompt": group.problem.prompt, "answer": group.problem.answer, "completions": []}
    for i, text in enumerate(group.texts):
        rewards = {name: None if part[i].isnan() else round(part[i].item(), 6) for name, part in rating.parts.items()}
        answer = {"text": text, "tokens": lengths_of(group.mask[i : i + 1])[0], "rewards": rewards}
        answer["reward"] = round(rating.rewards[i].item(), 6)
        answer["advantage"] = round(advantages[i][group.mask[i].bool()].mean().item(), 6)
        answer["truncated"] = bool(rating.is_truncated[i])
        if args.supervision == "process":
            answer["step_rewards"] = rating.step_rewards[i]
        row["completions"].append(answer)
    return row


def as_markdown(rows):
    """Lines of samples.jsonl as a text for TensorBoard, indented, so that it shows each character as it is."""
    lines = []
    for row in rows:
        lines.append(row["prompt"] + (f"    right is {row['answer']}" if row["answer"] else ""))
        for x in row["completions"]:
            cut = ", truncated" * x["truncated"]
            lines.append(f"---- reward {x['reward']:.2f}, advantage {x['advantage']:.2f}, {x['tokens']} tokens{cut}")
            lines.append(x["text"])
        lines.append("")
    return "\n".join(f"    {line}" for line in "\n".join(lines).splitlines())


def on_screen(text, length=100):
    """A text in one line of the screen, without what would move the cursor; of a long one the beginning and the end."""
    line = "".join(x if x.isprintable() else " " for x in " / ".join(text.splitlines()))
    return line if len(line) <= length else f"{line[: length // 2]} … {line[-length // 2 :]}"


def cut_samples(path, step):
    """Keep the lines of samples.jsonl up to this step. A resumed run writes the later ones again, and of the last one a
    run that was killed may have written a half."""
    if not path.exists():
        return
    kept = []
    with suppress(ValueError, LookupError, TypeError), open(path, encoding="utf-8") as file:
        for line in file:
            if json.loads(line)["step"] > step:
                break
            kept.append(line)
    with written_aside(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def warn_without_variance(args, bar, metrics, steps=5, share=0.9):
    """After so many steps in a row in which so many groups had no variance, say once what it means and what helps.

    Not with --algorithm reinforce, reinforce++ or rft: there a group of equal rewards can still teach.
    """
    stretch = list(takewhile(lambda row: row.get("groups/zero_variance", 0.0) >= share, reversed(metrics)))
    if len(stretch) != steps or args.algorithm in ("reinforce", "rft", "reinforce++") or process_rank() > 0:
        return
    row = metrics[-1]
    right = f"{row['reward/verifier']:.0%} of the answers are right" if "reward/verifier" in row else ""
    earned, cut = right or f"the mean reward is {row['reward/mean']:.2f}", row["completion/truncated"]
    message = (
        f"warning     In each of the last {steps} steps at least {share:.0%} of the groups had no variance: all the "
        "answers to a question earned the same, so their advantages are 0 and almost nothing is learned. In this step "
        f"{earned} and {cut:.0%} are cut off: if most are right, take harder problems; if "
        "most are wrong, take easier problems, a larger --max-tokens, an --instruction that shows the form of an "
        'answer, or a warm start (docs/troubleshooting.md, "Reward std is 0").'
    )
    bar.write(textwrap.fill(message, 110, subsequent_indent=" " * 12, break_on_hyphens=False))


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
    """The command line. With --resume, and with a run to --evaluate or --ask, the run's settings are the defaults."""
    import tyro

    if {"-h", "--help"} & {*sys.argv[1:]}:
        print_help()
        sys.exit(0)
    for word in sys.argv[1:]:
        flag = word.partition("=")[0]
        if flag.startswith("--") and (instead := REMOVED.get(flag[2:].replace("-", "_"))):
            raise InputError(f"{flag} was removed: {instead}")
    config = (tyro.conf.DisallowNone,)  # then --help shows no None, and bool | None has a flag for each of the two
    look = settings_to_look(sys.argv[1:])
    args = tyro.cli(Args, default=look, description=__doc__.splitlines()[0], config=config)
    if args.resume:
        return tyro.cli(Args, default=resumed_args(args.resume), config=config)
    if look:
        return args
    if args.ask is not None or args.evaluate:
        raise InputError("a question that begins with - needs an equals sign, such as --ask=-3+4")
    model = model_to_train(args.model, args.instruction, args.tools)
    return replace(args, model=model, run_dir=args.run_dir or new_run_dir(args))


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
    """Parse, run. A mistake that the user can fix ends in one sentence and exit status 2."""
    guard_output()
    run_dir = None
    try:
        args = parse_args()
        run_dir = args.resume or args.run_dir
        if args.evaluate:
            compare_models(args)
        elif args.sample_to:
            keep_samples(args)
        elif args.ask is not None:
            ask_policy(args)
        else:
            train(args)
    except torch.OutOfMemoryError as error:
        flags = "--generate-rows if it was sampling, --micro-batch-tokens if it was learning"
        more = "--gradient-checkpointing and --offload save most, benchmarks/memory_plan.py counts what is needed"
        print(f"error: out of memory: lower {flags}; {more}: {error}", file=sys.stderr)
        sys.exit(2)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        can_resume = run_dir and (Path(run_dir) / "checkpoint.pt").exists()
        print(f"\ninterrupted{f': continue with --resume {run_dir}' if can_resume else ''}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
