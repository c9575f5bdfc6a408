"""Why is stage 3's first update so large, and what cures it? Five seeds, one change at a time.

Run      python benchmarks/rlhf_first_update.py           (about 12 minutes on one core)
         python benchmarks/rlhf_first_update.py --table   (the tables from the kept results)
Writes   benchmarks/results/rlhf_first_update.jsonl (raw: a line naming the machine, then a line a seed and change);
         models go to --work

For each seed, stages 1 and 2 of 200 and 400 steps. Then, at a learning rate of 6e-4, from the same models, the same
first 96 responses and the same minibatches, the four gradient steps of iteration 1 with one thing changed. After each
step: the k3 estimate of the KL to the sampler, a token, over the whole rollout. After the fourth: the KL to the
reference of the next 96 responses, a response. At last, the first 12 iterations of the script itself, with and without
warm-up: how far the mean weight of the policy moves in a step, as a share of the full learning rate, and the largest KL
of a rollout.
"""

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from cartpole import RESULTS, machine  # noqa: E402

import rlhf_gpt2_ppo as rlhf  # noqa: E402

FILE = RESULTS / "rlhf_first_update.jsonl"
FULL = 6e-4
CHANGES = {  # name → what differs from the full rate at once
    "full rate at once": {},
    "no value network: V = 0": {"value": 0.0},
    "no entropy bonus": {"ent_coef": 0.0},
    "whole batch, two steps": {"num_minibatches": 1},
    "40 gradients into Adam's moments first": {"filled": 40},
    "advantages of other responses": {"shuffled": True},
    "half the rate": {"rates": [FULL / 2] * 4},
    "a quarter of the rate": {"rates": [FULL / 4] * 4},
    "warm-up over 20 steps": {"rates": [FULL * (i + 1) / 20 for i in range(4)]},
}


def prepare(seed, work):
    """Stages 1 and 2 of a seed, unless they are there: (settings, tokenizer, prompts)."""
    sft, reward = str(work / f"{seed}_sft" / "sft"), str(work / f"{seed}_reward" / "reward")
    if not Path(sft).is_dir():
        rlhf.train(rlhf.Args(stage="sft", seed=seed, sft_steps=200, run_dir=str(Path(sft).parent)))
    if not Path(reward).is_dir():
        settings = {"model": sft, "seed": seed, "reward_steps": 400, "run_dir": str(Path(reward).parent)}
        rlhf.train(rlhf.Args(stage="reward", **settings))
    args = rlhf.Args(stage="ppo", model=sft, reward_model=(reward,), seed=seed, learning_rate=FULL)
    rows = rlhf.load_rows(args)
    texts, _ = rlhf.texts_and_pairs(rows[-(-len(rows) // 10) :], args)
    _, tokenizer = rlhf.start_model(args, sft)
    prompts = [prompt for prompt, _ in rlhf.encode(tokenizer, texts, args.max_length)]
    order = rlhf.epochs_of(len(prompts), args.ppo_iterations, args.batch_size, rlhf.stage_seed(args, "ppo"))
    return args, tokenizer, [[prompts[i] for i in order[iteration]] for iteration in (0, 1)]


def first_update(
    args, tokenizer, prompts, value=None, ent_coef=0.01, num_minibatches=2, filled=0, shuffled=False, rates=(FULL,) * 4
):
    """Iteration 1's gradient steps on the policy: (KL a token after each, KL a response of the next rollout)."""
    policy = rlhf.start_model(args, args.model)[0]
    reference = rlhf.frozen(rlhf.start_model(args, args.model)[0])
    reward_models = [rlhf.frozen(rlhf.load_reward_model(args, args.reward_model[0], tokenizer))]
    torch.manual_seed(rlhf.stage_seed(args, "ppo"))
    rollout = rlhf.roll_out(args, policy, tokenizer, prompts[0])
    tokens, old_logprobs, mask, whole, whole_mask, _ = rollout
    T = args.response_length
    ref_logprobs, scores, _ = rlhf.judge_rollout(args, rollout, reference, reward_models, None)
    with torch.no_grad():
        values = rlhf.response_values(reward_models[0], policy, whole, whole_mask, T)
    values = values if value is None else torch.full_like(values, value)
    has_eos = (tokens == tokenizer.eos_token_id).any(-1)
    scores = scores - args.missing_eos_penalty * ~has_eos
    rewards = rlhf.kl_penalized_rewards(scores, old_logprobs, ref_logprobs, mask, args.kl_coef)
    advantages = rlhf.compute_gae(rewards, values, mask, args.gamma, args.gae_lambda)
    if shuffled:  # no longer about these tokens: as large, and without any meaning
        advantages = advantages[torch.randperm(len(advantages))]
    optimizer = rlhf.new_optimizer((policy, FULL))

    def logits_and_logprob(rows):
        logits = rlhf.policy_logits(policy, whole[rows], whole_mask[rows], T)
        return logits, rlhf.token_logprobs(logits, tokens[rows], args.temperature)

    def step(rows, rate):
        optimizer.zero_grad()
        logits, logprob = logits_and_logprob(rows)
        advantage = rlhf.masked_whiten(advantages[rows], mask[rows])
        loss = rlhf.clipped_policy_loss(logprob, old_logprobs[rows], advantage, mask[rows], args.clip_coef)
        entropy = rlhf.masked_mean(rlhf.token_entropy(logits, args.temperature), mask[rows])
        (loss - ent_coef * entropy).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        rlhf.anneal(optimizer, rate / FULL)
        optimizer.step()

    minibatches = [rows for _ in range(2) for rows in torch.randperm(len(tokens)).tensor_split(num_minibatches)]
    for i in range(filled):
        step(minibatches[i % len(minibatches)], 0.0)
    found = []
    for rows, rate in zip(minibatches, rates):
        step(rows, rate)
        with torch.no_grad():
            log_ratio = logits_and_logprob(slice(None))[1] - old_logprobs
        found.append(float(rlhf.masked_mean(log_ratio.expm1() - log_ratio, mask)))
    following = rlhf.roll_out(args, policy, tokenizer, prompts[1])
    judged = rlhf.judge_rollout(args, following, reference, reward_models, None)
    row = rlhf.describe(following, *judged, tokenizer.eos_token_id)
    return {"kl_of_steps": found, "next_kl": row["objective/kl"], "next_score": row["objective/scores"]}


def watched_run(args, warmup_iterations, work):
    """The script's own first 12 iterations of 30: how far the mean weight moves in each step, and the KL."""
    moved, make = [], rlhf.new_optimizer

    def watched(*groups):
        optimizer = make(*groups)
        weights, step = optimizer.param_groups[0]["params"], optimizer.step

        def watched_step():
            before = [x.detach().clone() for x in weights]
            step()
            distance = sum((x.detach() - old).abs().sum() for x, old in zip(weights, before))
            moved.append(float(distance) / sum(x.numel() for x in weights) / FULL)
            if len(moved) == 48:
                raise StopIteration

        optimizer.step = watched_step
        return optimizer

    rows, log = [], rlhf.Run.log
    rlhf.new_optimizer = watched
    rlhf.Run.log = lambda run, stage, step, row: (rows.append(row), log(run, stage, step, row))
    try:
        settings = {"warmup_iterations": warmup_iterations, "run_dir": str(work)}
        rlhf.train(rlhf.Args(**{**vars(args), **settings}))
    except StopIteration:
        pass
    finally:
        rlhf.new_optimizer, rlhf.Run.log = make, log
    return {"moved": moved, "kl": [row["objective/kl"] for row in rows if "objective/kl" in row]}


def measure(work):
    lines = [{"machine": machine(), "date": time.strftime("%Y-%m-%d"), "torch": version("torch")}]
    for seed in range(1, 6):
        args, tokenizer, prompts = prepare(seed, work)
        for name, change in CHANGES.items():
            lines.append({"seed": seed, "change": name, **first_update(args, tokenizer, prompts, **change)})
            print(json.dumps(lines[-1], ensure_ascii=False), flush=True)
        for warmup in (0, 5):
            found = watched_run(args, warmup, work / f"{seed}_watched_{warmup}_{time.time_ns()}")
            lines.append({"seed": seed, "warmup_iterations": warmup, **found})
    FILE.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")


def print_tables():
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()][1:]

    def cell(numbers, form=".2f"):
        return f"{median(numbers):{form}} ({min(numbers):{form}} to {max(numbers):{form}})"

    print("| iteration 1 | KL a token after its steps | KL of the next rollout, nats a response |\n|---|---|---|")
    for name in CHANGES:
        own = [row for row in rows if row.get("change") == name]
        last = [row["kl_of_steps"][-1] for row in own]
        print(f"| {name} | {cell(last, '.3f')} | {cell([row['next_kl'] for row in own])} |")
    print("\n| warm-up | mean weight's move in step 1 | step 4 | step 20 | step 40 | largest KL of 12 iterations |")
    print("|---|---|---|---|---|---|")
    for warmup in (0, 5):
        own = [row for row in rows if row.get("warmup_iterations") == warmup]
        moves = " | ".join(cell([row["moved"][i - 1] for row in own]) for i in (1, 4, 20, 40))
        print(f"| {warmup} iterations | {moves} | {cell([max(row['kl']) for row in own], '.1f')} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmark_first_update")
    parser.add_argument("--table", action="store_true", help="only print the tables of the kept results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.table:
        measure(args.work)
    print_tables()


if __name__ == "__main__":
    main()
