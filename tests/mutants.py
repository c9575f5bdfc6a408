"""Planted bugs: what people get wrong, each as one replaced text in a script.

python tests/mutants.py [SCRIPT]   plants each in turn, runs the suite on it, prints which test caught it
python tests/mutants.py --write N FILE [SCRIPT]   writes SCRIPT, by default ppo_cartpole.py, with the N-th of its own
                                   bugs to FILE: an exercise, which line is wrong?
python -m pytest -m mutants        the same as a test: every one must be caught
"""

import argparse
import difflib
import gc
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# script → the part of the suite that looks at it, quick tests first
EQUATIONS = ("compute_gae", "clipped_policy_loss", "clipped_value_loss", "approx_kl")
SUITES = {
    "ppo_cartpole.py": [
        f"tests/test_{name}.py"
        for name in (*EQUATIONS, "cartpole_loop", "cartpole_runs", "cartpole_reports", "track", "machinery")
    ],
    "ppo_atari.py": [
        "tests/test_atari.py",
        "tests/test_track.py",
    ],  # its equations are ppo_cartpole.py's to the letter (test_copies.py)
    "rlhf_gpt2_ppo.py": [
        f"tests/test_{name}.py"
        for name in ("rlhf_equations", "rlhf_hacking", "rlhf_loop", "rlhf_runs", "rlhf_reports", "track")
    ],
    "grpo_llm.py": [
        *(f"tests/test_grpo_{name}.py" for name in ("equations", "verifiers", "model", "loop", "runs", "full_size")),
        *(f"tests/test_grpo_{name}.py" for name in ("adapters", "reward_model", "reports", "families", "choices")),
        *(f"tests/test_grpo_{name}.py" for name in ("limits", "own_reward", "stop", "evaluate", "look", "imitation")),
        "tests/test_grpo_other_algorithms.py",
        "tests/test_grpo_tools.py",
        "tests/test_track.py",
    ],
}

SLOW_IMPORTS = (
    "gymnasium.wrappers",
    "hypothesis.strategies",
    "matplotlib.figure",
    "peft",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.qwen3.modeling_qwen3",
)

# (what is wrong, the right text, the wrong text)
CARTPOLE = [
    ("truncation treated as death", "torch.where(terminated, 0.0, next_values)", "torch.where(done, 0.0, next_values)"),
    ("termination bootstraps", "torch.where(terminated, 0.0, next_values)", "next_values"),
    ("advantages flow across a time limit", "torch.where(done[t], 0.0, last)", "torch.where(terminated[t], 0.0, last)"),
    ("advantages flow across every episode end", "torch.where(done[t], 0.0, last)", "last"),
    ("λ forgotten", "gamma * gae_lambda * torch", "gamma * torch"),
    ("γ forgotten in the recursion", "gamma * gae_lambda * torch", "gae_lambda * torch"),
    ("γ forgotten in δ", "rewards + gamma * torch", "rewards + torch"),
    ("GAE runs forwards", "for t in reversed(range(len(rewards))):", "for t in range(len(rewards)):"),
    ("V(s) not subtracted", "next_values) - values", "next_values)"),
    ("policy loss maximised", "return -torch.min(ratio", "return torch.min(ratio"),
    ("max for min in the policy loss", "-torch.min(ratio", "-torch.max(ratio"),
    ("ratio upside down", "(logprob - old_logprob).exp()", "(old_logprob - logprob).exp()"),
    (
        "clipped objective alone, no min",
        "torch.min(ratio * advantage, ratio.clamp",
        "torch.min(ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage, ratio.clamp",
    ),
    ("clip range half open", "ratio.clamp(1 - clip_coef, 1 + clip_coef)", "ratio.clamp(None, 1 + clip_coef)"),
    ("policy loss summed", "1 + clip_coef) * advantage).mean()", "1 + clip_coef) * advantage).sum()"),
    ("min for max in the value loss", "loss = torch.max(loss, (clipped", "loss = torch.min(loss, (clipped"),
    ("½ of the value loss lost", "return 0.5 * loss.mean()", "return loss.mean()"),
    (
        "value clipped around the return",
        "clipped = old_value + (value - old_value)",
        "clipped = returns + (value - returns)",
    ),
    ("KL the other way round", "log_ratio = logprob - old_logprob\n", "log_ratio = old_logprob - logprob\n"),
    ("k1 for k3", "(log_ratio.expm1() - log_ratio).mean()", "(-log_ratio).mean()"),
    ("k3 that cancels in float32", "(log_ratio.expm1() - log_ratio)", "(log_ratio.exp() - 1 - log_ratio)"),
    ("entropy of the wrong sign", "-(logprobs.exp() * logprobs).sum(-1)", "(logprobs.exp() * logprobs).sum(-1)"),
    ("autoreset rows kept in the batch", "(row[is_transition] for row in rows)", "(row.flatten(0, 1) for row in rows)"),
    ("autoreset rows counted as steps", "global_step += int(is_transition.sum())", "global_step += T * N"),
    ("the row of done dropped, the autoreset kept", "torch.as_tensor(~was_done)", "torch.as_tensor(~is_done)"),
    ("episode length counts the autoreset", "episode_length += ~was_done", "episode_length += 1"),
    ("returns run on into the next episode", "episode_return[i] = episode_length[i] = 0", "episode_length[i] = 0"),
    (
        "actions greedy in the rollout",
        "torch.multinomial(agent.actor(obs[t]).softmax(-1), 1).squeeze(-1)",
        "agent.actor(obs[t]).argmax(-1)",
    ),
    ("rollout begins at a stale observation", "        obs[0] = obs[T]\n", ""),
    ("Adam's ε left at torch's", "eps=1e-5, ", ""),
    ("learning rate not annealed", '        optimizer.param_groups[0]["lr"] = learning_rate\n', ""),
    (
        "clip range not annealed",
        "advantage, clip_coef)\n            value_loss",
        "advantage, args.clip_coef)\n            value_loss",
    ),
    (
        "policy's last layer begins large",
        "int(envs.single_action_space.n), 0.01)",
        "int(envs.single_action_space.n), 1.0)",
    ),
    ("weights not orthogonal", "    nn.init.orthogonal_(layer.weight, gain)\n", ""),
    (
        "critic on top of the actor's layers",
        "self.critic = mlp(inputs, args.hidden_size, 1, 1.0)",
        "self.critic = nn.Sequential(*self.actor[:4], init_layer(nn.Linear(args.hidden_size, 1), 1.0))",
    ),
    ("advantages normalised by the wrong spread", "(advantage.std(correction=0) + 1e-8)", "(advantage.var() + 1e-8)"),
    ("advantages not centred", "(advantage - advantage.mean()) /", "advantage /"),
    ("minibatches of one order for ever", "torch.randperm(len(b_obs))", "torch.arange(len(b_obs))"),
    ("last minibatch dropped", ".tensor_split(args.num_minibatches)", ".tensor_split(args.num_minibatches)[:-1]"),
    ("gradients never zeroed", "            optimizer.zero_grad()\n", ""),
    (
        "gradients not clipped",
        "            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)  # [D11]\n",
        "",
    ),
    (
        "actor's gradients clipped alone",
        "clip_grad_norm_(agent.parameters()",
        "clip_grad_norm_(agent.actor.parameters()",
    ),
    ("entropy penalised", "policy_loss - args.ent_coef", "policy_loss + args.ent_coef"),
    ("value loss unweighted", "args.vf_coef * value_loss", "value_loss"),
    ("value loss against the advantages", "b_values[mb], b_returns[mb], clip", "b_values[mb], b_advantages[mb], clip"),
    (
        "target-kl ten times too lax",
        "            if args.target_kl is not None and kl > args.target_kl:\n                break",
        "            if args.target_kl is not None and kl > 10 * args.target_kl:\n                break",
    ),
    (
        "target-kl skips a minibatch and goes on",
        "break  # before this step is taken",
        "continue  # before this step is taken",
    ),
    ("losses of the last minibatch logged", "torch.stack(losses).mean(0)", "losses[-1]"),
    (
        "weights written in place",
        "        torch.save(content, temporary)\n        os.replace(temporary, path)\n",
        "        torch.save(content, path)\n",
    ),
    ("weights unpickled without a guard", "weights_only=True", "weights_only=False"),
    (
        "evaluation samples",
        "device=args.device)).argmax(-1)",
        "device=args.device)).softmax(-1).multinomial(1).squeeze(-1)",
    ),
    ("evaluation by a fresh network", "        agent.load_state_dict(weights)\n    except", "        pass\n    except"),
    ("evaluation of other settings than the saved ones", "settings = replace(args, **trained)", "settings = args"),
    (
        "a fresh network saved as the model",
        '"model.pt", {"args": asdict(args), "agent": agent.state_dict()}',
        '"model.pt", {"args": asdict(args), "agent": Agent(envs, args).state_dict()}',
    ),
    ("evaluation without a seed", "envs.reset(seed=env_seed(args.seed, evaluation=True))", "envs.reset()"),
    ("evaluation on the episodes of training", "env_seed(args.seed, evaluation=True)", "env_seed(args.seed)"),
    (
        "two seeds share environments",
        "    return int(np.random.SeedSequence([seed, 0, int(evaluation)]).generate_state(1)[0] % 2**30)",
        "    return seed + 10**6 * evaluation",
    ),
    ("solved reported late", "solved[0]['global_step']", "solved[-1]['global_step']"),
    (
        "best game for the mean of the games",
        "evaluate(agent, args, run_dir).mean()",
        "evaluate(agent, args, run_dir).max()",
    ),
    ("evaluation counts later episodes", "returns += rewards * running", "returns += rewards"),
    ("W&B not told of TensorBoard", "sync_tensorboard=True)", "sync_tensorboard=False)"),
    ("dones of 0 and 1 not taken", "    terminated, done = terminated.bool(), done.bool()\n", ""),
    ("NaN of an environment is not noticed", "        if finite.all():", "        if True:"),
    ("the first environment is blamed", 'f"environment {i} returned', 'f"environment 0 returned'),
    ("a target KL of 0 is accepted", "lambda x: x is None or x > 0]", "lambda x: x is None or x >= 0]"),
    (
        "an evaluation that is cut late",
        "while running.any() and steps < args.eval_max_steps:",
        "while running.any() and steps < 10 * args.eval_max_steps:",
    ),
    ("a film is tried after training", "if envs.render()[0] is None:", "if False:"),
    ("two runs in one directory", "run_dir.mkdir(parents=True)", "run_dir.mkdir(parents=True, exist_ok=True)"),
    ("half a file is left", "        temporary.unlink(missing_ok=True)\n", ""),
    ("a full disk is a traceback", "except (OSError, RuntimeError) as error:  # on", "except OSError as error:  # on"),
    ("a pipe that broke is an error", "    except BrokenPipeError:", "    except FileNotFoundError:"),
    ("letters that the terminal lacks", 'reconfigure(errors="replace", line', "reconfigure(line"),
    ("runs of one second share a name", "%H%M%S-%f}", "%H%M%S}"),
]

ATARI = [
    ("no no-op starts", '"noop_max": 30', '"noop_max": 0'),
    ("no maximum over two frames", '"maxpool": True', '"maxpool": False'),
    ("no frame skip", '"frameskip": 4', '"frameskip": 1'),
    ("sticky actions at gym.make's default", "args.sticky,  # gym.make", "0.25,  # gym.make"),
    ("a lost life restarts the game", '"episodic_life": False', '"episodic_life": True'),
    ("a lost life is not terminal", '"life_loss_info": args.episodic_life', '"life_loss_info": False'),
    ("no FIRE on reset", '"use_fire_reset": True', '"use_fire_reset": False'),
    ("rewards clipped before they are logged", '"reward_clipping": False', '"reward_clipping": True'),
    ("two frames for four", '"stack_num": 4', '"stack_num": 2'),
    ("pixels from 0 to 255", ".div_(255)", ""),
    ("pixels scaled twice", ".div_(255)", ".div_(255).div_(255)"),
    ("frames taken for rows", ".permute(0, 3, 1, 2)  # [D22]", ".permute(0, 2, 1, 3).reshape(-1, 4, 84, 84)  # [D22]"),
    (
        "the policy's last layer begins large",
        "int(envs.single_action_space.n)), 0.01)",
        "int(envs.single_action_space.n)), 1.0)",
    ),
    (
        "heads in bfloat16",
        "torch.autocast(obs.device.type, enabled=False)",
        "torch.autocast(obs.device.type, torch.bfloat16)",
    ),
    ("rewards unclipped", "np.sign(reward)", "reward"),
    ("a lost life taken for the game's end", 'terminated & (info["lives"] == 0)', "terminated"),
    (
        "a lost life not terminal in the batch",
        "terminated[t] = torch.as_tensor(is_terminated)",
        "terminated[t] = torch.as_tensor(is_terminated & (info['lives'] == 0))",
    ),
    ("autoreset rows kept in the batch", "(row[is_transition] for row in rows)", "(row.flatten(0, 1) for row in rows)"),
    ("autoreset rows counted as steps", "transitions = is_transition.sum()", "transitions = torch.tensor(T * N)"),
    (
        "every lost life followed by an autoreset",
        "was_over = is_game_over(is_terminated, is_truncated, info)",
        "was_over = is_terminated | is_truncated",
    ),
    ("scores of signs", "episode_return += reward * ~was_over", "episode_return += np.sign(reward) * ~was_over"),
    ("a minibatch left out", ".tensor_split(args.num_minibatches)", ".tensor_split(args.num_minibatches)[:-1]"),
    ("advantages normalised by each process for itself", "dist.all_reduce(sums)\n", "pass\n"),
    ("spread of each process for itself", "dist.all_reduce(squares)\n", "pass\n"),
    ("gradients of uneven parts averaged evenly", "    parts *= count\n", ""),
    ("gradients not exchanged", "dist.all_reduce(parts)\n", "pass\n"),
    ("steps of one process counted", "dist.all_reduce(transitions)\n", "pass\n"),
    ("the film in grey", "grayscale=False", "grayscale=True"),
    (
        "actions greedy in the rollout",
        "action = torch.multinomial(logits.softmax(-1), 1).squeeze(-1)\n                old",
        "action = logits.argmax(-1)\n                old",
    ),
    ("rollout begins at a stale observation", "        obs[0] = obs[T]\n", ""),
    ("the last row's value left over", "            values[T] = agent(obs[T])[1]\n", ""),
    ("Adam's ε left at torch's", "eps=1e-5, ", ""),
    ("learning rate not annealed", '        optimizer.param_groups[0]["lr"] = learning_rate\n', ""),
    (
        "clip range not annealed",
        "advantage, clip_coef)\n            value_loss",
        "advantage, args.clip_coef)\n            value_loss",
    ),
    ("advantages not centred", "centred = advantage - total / count", "centred = advantage"),
    ("minibatches of one order for ever", "torch.randperm(len(b_obs))", "torch.arange(len(b_obs))"),
    ("gradients never zeroed", "            optimizer.zero_grad()\n", ""),
    ("gradients not clipped", "            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)  # [D11]\n", ""),
    ("entropy penalised", "policy_loss - args.ent_coef", "policy_loss + args.ent_coef"),
    ("value loss unweighted", "args.vf_coef * value_loss", "value_loss"),
    ("value loss against the advantages", "b_values[mb], b_returns[mb], clip", "b_values[mb], b_advantages[mb], clip"),
    (
        "target-kl skips a minibatch and goes on",
        "break  # before this step is taken",
        "continue  # before this step is taken",
    ),
    ("losses of the last minibatch logged", "torch.stack(losses).mean(0)", "losses[-1]"),
    (
        "network not restored on resume",
        '        agent.load_state_dict(saved["agent"])\n        optimizer',
        "        optimizer",
    ),
    ("optimizer not restored on resume", '        optimizer.load_state_dict(saved["optimizer"])\n', ""),
    (
        "evaluation by a fresh network",
        '        agent.load_state_dict(saved["agent"])\n    except',
        "        pass\n    except",
    ),
    (
        "a fresh network saved as the model",
        '"model.pt", {"args": asdict(args), "agent": agent.state_dict()}',
        '"model.pt", {"args": asdict(args), "agent": Agent(envs, args).state_dict()}',
    ),
    ("evaluation counts second games", "returns += rewards * running", "returns += rewards"),
    (
        "evaluation ends with the first life",
        "running &= ~is_game_over(terminated, truncated, info)",
        "running &= ~terminated",
    ),
    ("two seeds share games", "    return int(hashed % 2**30)", "    return seed + global_step + 10**6 * evaluation"),
    (
        "every process plays the same games",
        "envs.reset(seed=env_seed(args.seed, global_step) + rank * N)",
        "envs.reset(seed=env_seed(args.seed, global_step))",
    ),
    ("bfloat16 on a CPU that is slow in it", "    if times_slower <= 1:", "    if times_slower <= 1e9:"),
]

# (script, what is wrong, the right text, the wrong text)
MUTANTS = [("ppo_cartpole.py", *mutant) for mutant in CARTPOLE]
MUTANTS += [("ppo_atari.py", *mutant) for mutant in ATARI]
RLHF = [
    (
        "temperature forgotten in the score",
        "    logits = logits if temperature == 1 else logits / temperature\n",
        "",
    ),
    (
        "preference the wrong way round",
        "logsigmoid(chosen_score - rejected_score)",
        "logsigmoid(rejected_score - chosen_score)",
    ),
    (
        "mean over rows of means",
        "return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)",
        "return (torch.where(mask, x, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)).mean()",
    ),
    ("mask multiplied, NaN leaks", "return torch.where(mask, x, 0.0).sum() / mask", "return (x * mask).sum() / mask"),
    (
        "whitening loses the mean that it should keep",
        "return whitened if shift_mean else torch.where(mask, whitened + mean, 0.0)",
        "return whitened",
    ),
    (
        "score on the last column",
        "is_last = nn.functional.one_hot(last_real(mask), mask.shape[1]).bool() & mask",
        "is_last = nn.functional.one_hot(torch.full_like(last_real(mask), mask.shape[1] - 1), mask.shape[1]).bool()",
    ),
    ("score on every token", "torch.where(is_last, score", "torch.where(mask, score"),
    ("KL penalty of the wrong sign", "-kl_coef * (logprob - ref_logprob)", "kl_coef * (logprob - ref_logprob)"),
    ("GAE reads the values of padding", "    values = torch.where(mask, values, 0.0)\n", ""),
    ("λ forgotten", "delta + gamma * gae_lambda * last", "delta + gamma * last"),
    ("clip range half open", "ratio.clamp(1 - clip_coef, 1 + clip_coef)", "ratio.clamp(None, 1 + clip_coef)"),
    ("max for min in the policy loss", "torch.min(ratio * advantage", "torch.max(ratio * advantage"),
    ("½ of the value loss lost", "return 0.5 * masked_mean(loss, mask)", "return masked_mean(loss, mask)"),
    (
        "β not kept by the controller",
        "self.kl_coef *= 1 + error * n / self.horizon",
        "return self.kl_coef * (1 + error * n / self.horizon)",
    ),
    (
        "temperature forgotten in the sampling",
        "(output.logits[:, -1] / temperature).softmax(-1)",
        "output.logits[:, -1].softmax(-1)",
    ),
    (
        "greedy sampling",
        "token = torch.multinomial((output.logits[:, -1] / temperature).softmax(-1), 1)",
        "token = output.logits[:, -1:].argmax(-1)",
    ),
    ("ensemble's mean plus its spread", "scores.mean(0) - k *", "scores.mean(0) + k *"),
    (
        "a cut text gets an EOS",
        "[*response, tokenizer.eos_token_id][:room]",
        "[*response[: room - 1], tokenizer.eos_token_id]",
    ),
    ("no text has an EOS", "[*response, tokenizer.eos_token_id][:room]", "response[:room]"),
    (
        "positions count padding",
        "positions = (mask.cumsum(-1) - 1).clamp(min=0)\n    return model.base_model",
        "positions = torch.arange(mask.shape[1]).expand_as(mask)\n    return model.base_model",
    ),
    (
        "attention sees padding",
        "return model.base_model(input_ids=tokens, attention_mask=mask, position_ids",
        "return model.base_model(input_ids=tokens, attention_mask=torch.ones_like(mask), position_ids",
    ),
    ("reward read off the last column", "hidden[torch.arange(len(hidden)), last_real(mask)]", "hidden[:, -1]"),
    (
        "reward not normalised",
        "return (model.score(hidden).squeeze(-1) - config.reward_mean) / config.reward_std",
        "return model.score(hidden).squeeze(-1)",
    ),
    (
        "logits one token late",
        "hidden_states(policy, tokens, mask)[:, -length - 1 : -1])",
        "hidden_states(policy, tokens, mask)[:, -length:])",
    ),
    (
        "values one token late",
        "tokens, mask)[:, -length - 1 : -1]\n    return value_model",
        "tokens, mask)[:, -length:]\n    return value_model",
    ),
    (
        "the first EOS masked out",
        "        mask[:, Q + t] = running\n        running = running & (token[:, 0] != eos_id)",
        "        running = running & (token[:, 0] != eos_id)\n        mask[:, Q + t] = running",
    ),
    (
        "tokens after EOS go on",
        "running = running & (token[:, 0] != eos_id)",
        "running = running | (token[:, 0] != eos_id)",
    ),
    (
        "padding is EOS",
        "if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):",
        "if tokenizer.pad_token_id is None:",
    ),
    ("dropout left on", "            module.p = 0.0\n", "            pass\n"),
    ("reward head of another size", "std=(model.config.hidden_size + 1) ** -0.5", "std=0.02"),
    (
        "gradients of micro-batches averaged",
        "(loss * share).backward()",
        "(loss / -(-len(mb) // args.micro_batch_size)).backward()",
    ),
    ("SFT averages over micro-batches", "learned[rows]) / count", "learned[rows]) / learned[rows][:, 1:].sum()"),
    ("prompt learned though masked", "learned[i, : len(prompt) if mask_prompt else 0] = 0", "pass"),
    ("learning rate not annealed", '        group["lr"] = group["initial_lr"] * remaining\n', "        pass\n"),
    ("no warm-up of the learning rate", "remaining * min(warmed_up, 1)", "remaining"),
    ("Adam's ε left at torch's", "eps=1e-5, ", ""),
    (
        "advantages not whitened",
        "masked_whiten(advantages[mb], mask[mb]) if args.whiten_advantages else advantages[mb]",
        "advantages[mb]",
    ),
    ("rewards whitened to mean 0", "masked_whiten(rewards, mask, shift_mean=False)", "masked_whiten(rewards, mask)"),
    ("length rewarded", "scaled - args.length_penalty", "scaled + args.length_penalty"),
    ("responses that end are penalised", "args.missing_eos_penalty * ~has_eos", "args.missing_eos_penalty * has_eos"),
    ("reference learns too", "reference = frozen(start_model(args, sft_dir)[0])", "reference = policy"),
    (
        "value network begins anew",
        "value_model = load_reward_model(args, names[0], tokenizer)",
        "value_model = new_reward_model(args, sft_dir, tokenizer)",
    ),
    ("value head begins at random", "            nn.init.zeros_(value_model.weight)  # [R10]\n", ""),
    (
        "one norm clipped for both networks",
        "                nn.utils.clip_grad_norm_(module.parameters(), args.max_grad_norm)\n            optimizer.step()\n        clock",
        "                pass\n            nn.utils.clip_grad_norm_([p for m in modules.values() for p in m.parameters()], args.max_grad_norm)\n            optimizer.step()\n        clock",
    ),
    (
        "target-kl ignored",
        "                break  # before this step is taken",
        "                pass  # before this step is taken",
    ),
    ("β never updated", '            controller.update(row["objective/kl"], len(tokens))\n', "            pass\n"),
    (
        "pretraining mix unweighted",
        "[texts[i] for i in ptx_order[iteration * updates + update]]\n                sft_backward(args, policy, tokenizer, batch, args.ptx_coef)",
        "[texts[i] for i in ptx_order[iteration * updates + update]]\n                sft_backward(args, policy, tokenizer, batch, 1.0)",
    ),
    (
        "minibatches of one order for ever",
        "torch.randperm(len(tokens)).tensor_split",
        "torch.arange(len(tokens)).tensor_split",
    ),
    ("random state not restored on resume", '            torch.set_rng_state(self.saved["rng"])\n', ""),
    ("optimizer not restored on resume", '            optimizer.load_state_dict(self.saved["optimizer"])\n', ""),
    ("β not restored on resume", 'run.saved["kl_coef"] if first else args.kl_coef', "args.kl_coef"),
    ("NaN goes unnoticed", "if not losses.isfinite().all():", "if False:"),
    (
        "the judge's liking for A kept",
        "return (first_shown_first - first_shown_second) / 2",
        "return first_shown_first",
    ),
    ("the judge's verdict turned round", "pair if margin > 0 else pair[::-1]", "pair if margin < 0 else pair[::-1]"),
    ("the negative called positive", 'total += -sign if "not" in words else sign', "total += sign"),
    (
        "gold trained on the others' pairs",
        'own_pairs = pair_ids[half:] if stage == "gold" else pair_ids[:half]',
        "own_pairs = pair_ids",
    ),
    ("after rated with other random numbers", '    torch.manual_seed(stage_seed(args, "rate"))\n', ""),
    (
        "masks of 0 and 1 not taken",
        "    mask = mask.bool()\n    return torch.where(mask, x, 0.0).sum()",
        "    return torch.where(mask, x, 0.0).sum()",
    ),
    (
        "evaluations among the rollouts' points",
        'f"eval/{name}" if stage == "eval" else name',
        "name",
    ),
    ("perplexity after the first step", "if step + 1 == args.sft_steps:", "if step == 0:"),
    ("bins of calibration half as fine", "((confidence - 0.5) * 2 * bins)", "((confidence - 0.5) * bins)"),
    ("rows read from a sorted file's front", "1_000_000 if path.is_file() else 50_000", "50_000"),
    ("held out from a sorted stream's front", "random.Random(args.seed).shuffle(rows)", "pass"),
    ("words of a short text cut in two", r"(?:\s*\S+(?!\S))", r"(?:\s*\S+)"),
    ("rows counted from 0", "ROW: [k + 1 for k in i]", "ROW: list(i)"),
    ("bottleneck's KL without its entropy", "log_variance.exp() - 1 - log_variance", "log_variance.exp() - 1"),
    (
        "correlations left out of the distance",
        "torch.linalg.solve(covariance, gap.T).T",
        "gap / covariance.diagonal()",
    ),
    ("energy gained for energy lost", "(before - after).sum(-1)", "(after - before).sum(-1)"),
    (
        "energy averaged over padding",
        "(before - after).sum(-1) / mask.sum(-1).clamp(min=1)",
        "(before - after).mean(-1)",
    ),
    ("running variance around old means", " + moved**2 * self.count * n / total  # around", "  # around"),
    ("variance for standard deviation in the draw", "(0.5 * log_variance).exp() *", "log_variance.exp() *"),
    ("outliers rewarded", "scaled - self.args.outlier_coef", "scaled + self.args.outlier_coef"),
    ("energy gap rewarded", "scaled - self.args.energy_coef", "scaled + self.args.energy_coef"),
    (
        "reference reads the policy's response",
        "own = roll_out(args, reference, tokenizer, queries)",
        "own = rollout",
    ),
    ("policy learns before its time", "                policy.zero_grad()  # [R29]", "                pass  # [R29]"),
    (
        "warm-up spent on the value network",
        "iteration if is_value_only else iteration - args.value_only_iterations",
        "iteration",
    ),
    (
        "embeddings learn below frozen layers",
        "(policy.base_model.wte, policy.base_model.wpe, *policy.base_model.h[:count])",
        "policy.base_model.h[:count]",
    ),
    ("the worse response called better", "(texts[best], texts[worst]) for", "(texts[worst], texts[best]) for"),
    (
        "bottleneck not merged after an update",
        "            merge_bottleneck(model)\n        return total",
        "            pass\n        return total",
    ),
    (
        "reward optimizer not restored on resume",
        'self.optimizer.load_state_dict(saved["reward_optimizer"])',
        "pass",
    ),
    ("running mean not restored on resume", 'saved.get("reward_scale", (0, 0.0, 0.0))', "(0, 0.0, 0.0)"),
]

# (script, what is wrong, the right text, the wrong text)
MUTANTS += [("rlhf_gpt2_ppo.py", *mutant) for mutant in RLHF]

GRPO = [
    ("standard deviation over G − 1", "groups.std(-1, correction=0, keepdim=True)", "groups.std(-1, keepdim=True)"),
    (
        "standard deviation of the batch",
        "groups.std(-1, correction=0, keepdim=True)",
        "groups.std(correction=0)",
    ),
    ("mean of the batch", "groups - groups.mean(-1, keepdim=True)", "groups - groups.mean()"),
    ("0/0 of equal rewards", "return torch.where(all_equal, 0.0, advantages).flatten()", "return advantages.flatten()"),
    (
        "equal rewards divided by an epsilon",
        "keepdim=True)\n    all_equal = (groups == groups[:, :1]).all(-1, keepdim=True)\n    return torch.where(all_equal, 0.0, advantages)",
        "keepdim=True).clamp(min=1e-8)\n    return advantages",
    ),
    ("groups interleaved", "groups = rewards.view(-1, group_size)", "groups = rewards.view(group_size, -1).T"),
    (
        "steps of all groups normalised together",
        "group = step_rewards[start : start + group_size]\n        rewards = torch.tensor([reward for own in group",
        "group = step_rewards[start : start + group_size]\n        rewards = torch.tensor([reward for own in step_rewards",
    ),
    ("a token gets its own step alone", "own.flip(0).cumsum(0).flip(0)", "own"),
    ("a token gets the steps before it", "own.flip(0).cumsum(0).flip(0)", "own.cumsum(0)"),
    (
        "temperature forgotten in the trainer",
        "    logits = logits if temperature == 1 else logits / temperature\n",
        "",
    ),
    ("k3 the wrong way round", "log_ratio = ref_logprob - logprob\n", "log_ratio = logprob - ref_logprob\n"),
    ("k1 for k3", "return log_ratio.expm1() - log_ratio", "return -log_ratio"),
    ("k2 for k3", "return log_ratio.expm1() - log_ratio", "return log_ratio.square() / 2"),
    ("max for min", "loss = -torch.min(ratio * advantage", "loss = -torch.max(ratio * advantage"),
    ("clip range symmetric", "ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(1 - clip_low, 1 + clip_low)"),
    ("loss maximised", "loss = -torch.min(ratio", "loss = torch.min(ratio"),
    ("β ignored", "loss + beta * kl_k3(logprob, ref_logprob)\n\n", "loss + kl_k3(logprob, ref_logprob)\n\n"),
    ("KL rewarded", "loss + beta * kl_k3(logprob, ref_logprob)\n\n", "loss - beta * kl_k3(logprob, ref_logprob)\n\n"),
    ("mask ignored", "    loss = torch.where(mask, loss, 0.0)\n", ""),
    (
        "sequences divided by the width of the batch",
        "(loss.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / total_sequences",
        "loss.mean(-1).sum() / total_sequences",
    ),
    (
        "averaged over micro-batches",
        "        return loss.sum() / total_tokens\n",
        "        return loss.sum() / mask.sum()\n",
    ),
    ("constant reduction by the longest", "(total_sequences * max_tokens)", "(total_sequences * loss.shape[1])"),
    (
        "GSPO by the sum",
        "return old_logprob + log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)\n",
        "return old_logprob + log_ratio.sum(-1, keepdim=True)\n",
    ),
    (
        "pass@k biased",
        "1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)",
        "1.0 - (1 - num_right / num_samples) ** k",
    ),
    ("the first number counts", "  # noqa: B007\n        pass", "  # noqa: B007\n        break"),
    ("signs ignored", 'return -value if match["minus"] else value', "return value"),
    ("thousands cut off", "[0-9]{1,3}(?:[,'][0-9]{3})+(?![0-9])|", ""),
    ("the 2 of cm2 is a number", "(?<![0-9A-Za-z_^])(?<![_^][-{])", "(?<![0-9])"),
    ("the 2 of √2 is a number", 'or match["root"] or match["unread"]', ""),
    (
        "a sentence that has the answer is right",
        "if key(bare(wanted)) in (given, key(bare(line)))",
        "if key(bare(wanted)) in given",
    ),
    ("a lead-in anywhere", 'r"^(?:(?:so|thus', 'r"(?:(?:so|thus'),
    ("words judged as mathematics", "    if not is_mathematics(wanted):\n        return False\n", ""),
    (
        "a box that is not closed is an answer",
        "            return text[starts[-1] : position]\n    return text\n",
        "            return text[starts[-1] : position]\n    return text[starts[-1] :] if starts else text\n",
    ),
    ("the brackets of a list forgotten", "len({text[0] + text[-1] for text in ends}) > 1", "False"),
    ("an equation for an expression", ' or ("=" in given) > ("=" in wanted)', ""),
    ("a formula takes half a minute", "dump_traceback_later(3, exit=True)", "dump_traceback_later(30, exit=True)"),
    ("an answer that nothing could match is kept", "            check_answer(problems[-1])\n", ""),
    ("a step paid twice", "            wanted[value] -= 1\n", ""),
    (
        "numbers of a countdown used at will",
        "found[0] if found and Counter(found[1]) == Counter(numbers) else None",
        "found and found[0]",
    ),
    (
        "ties go to any right answer",
        "right[answers.index(votes.most_common(1)[0][0], start)]",
        "any(right[start : start + k])",
    ),
    ("no answer has a vote", "if answer is not None)", ")"),
    ("format pattern of quadratic time", "(?s).*# *-?", "(?s).*#+ *-?"),
    (
        "temperature forgotten in the sampler",
        ".amax(-1, keepdim=True)).div_(temperature).exp_()",
        ".amax(-1, keepdim=True)).exp_()",
    ),
    (
        "noise of 0 finds a token without chance",
        "noise[:, None] * total, right=True)",
        "noise[:, None] * total, right=False)",
    ),
    (
        "EOS masked out",
        "tokens[on, t], logprobs[on, t], mask[on, t] = token[going], logprob[going], chosen[going]\n        going &= ~torch.isin(token, eos)",
        "tokens[on, t], logprobs[on, t], was = token[going], logprob[going], going\n        going = going & ~torch.isin(token, eos)\n        mask[on, t] = going[was].long()",
    ),
    (
        "tokens after EOS go on",
        "going &= ~torch.isin(token, eos)\n        going = without_stopped(model, going, tokens, t, rows)",
        "going = without_stopped(model, going, tokens, t, rows)",
    ),
    (
        "one EOS of several",
        "going &= ~torch.isin(token, eos)\n        going = without_stopped(model, going, tokens, t, rows)",
        "going &= token != eos[0]\n        going = without_stopped(model, going, tokens, t, rows)",
    ),
    (
        "tokens after EOS go on, plainly",
        "going &= ~torch.isin(token, eos)\n        going = without_stopped(model, going, tokens, t)",
        "going = without_stopped(model, going, tokens, t)",
    ),
    (
        "positions of the sampler count padding",
        "lengths[rows] + t\n        if is_fixed",
        "torch.full_like(token, Q + t)\n        if is_fixed",
    ),
    (
        "the sampler sees padding",
        "(seen[rows, :K] & (columns[:K] <= Q + t))",
        "(columns[None, :K] <= Q + t).expand(len(rows), -1)",
    ),
    ("the sampler sees the empty end of its cache", "(seen[rows, :K] & (columns[:K] <= Q + t))", "seen[rows, :K]"),
    ("spans without their prompt", "sorted({prompt, own})", "[own]"),
    ("spans without the padding of a row", " + [(size - end, len(of_row))] * (size > end)", ""),
    ("spans without a causal mask", "scores.view(R, H, Lq, -1) + mask", "scores.view(R, H, Lq, -1)"),
    ("weights stay in the processor's order", "            del layer.forward\n", "            pass\n"),
    ("a reference that attends otherwise", "        set_spans(model, policy.has_spans)\n", ""),
    ("memory is kept against the flag", "if args.keep_memory and sys.platform", "if sys.platform"),
    ("windows of attention ignored", 'if kind == "sliding_attention" and window:', "if False:"),
    ("rows that leave mix up the cache", "room[finished, :, :used] = room[moved, :, :used]", "pass"),
    (
        "positions go on through the row",
        "len(prompt) + torch.arange(lengths[i] - 1)\n",
        "end + torch.arange(lengths[i] - 1)\n",
    ),
    (
        "completions see each other",
        "attention_mask = same_prompt & ((owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == -1))",
        "attention_mask = same_prompt.clone()",
    ),
    ("prompts see each other", "attention_mask = same_prompt & (", "attention_mask = ("),
    ("the prompt's last state missed", "                last = end - 1\n", "                last = end - 2\n"),
    ("rows above their capacity", "            if needed > room or", "            if needed > room + 5 or"),
    (
        "rounded to the nearest",
        "    return ((x.view(torch.int32) + noise + (1 << 15)) >> 16).short().view(torch.bfloat16)",
        "    return x.bfloat16()",
    ),
    ("noise of rounding off centre", "+ noise + (1 << 15)) >> 16)", "+ noise) >> 16)"),
    (
        "8-bit moments without bias correction",
        "root_v.div_((1 - beta2**self.steps) ** 0.5).add_(self.eps)",
        "root_v.add_(self.eps)",
    ),
    (
        "small √v becomes 0",
        "(v_codes.float() - 255).div_(16)).mul_(v_max)",
        "(v_codes.float() - 255).div_(16)).mul_(v_max).mul_(v_codes.sign())",
    ),
    ("8-bit state not loaded", "                mine.copy_(scattered(other, parameter))\n", "                pass\n"),
    ("dropout left on", "                setattr(owner, name, 0.0)\n", "                pass\n"),
    (
        "reference never refreshed",
        "                reference.load_state_dict(policy.state_dict())\n",
        "                pass\n",
    ),
    (
        "reference learns too",
        "reference_of(args, start_dir, policy, adapter, saved) if args.beta else None",
        "policy if args.beta else None",
    ),
    (
        "old log-probabilities of a later step",
        'if args.old_logprobs == "recomputed" and args.updates == 1:',
        'if args.old_logprobs == "recomputed":',
    ),
    ("β ignored in the loop", "token_loss = token_loss + args.beta * (", "token_loss = token_loss + ("),
    ("KL rewarded in the loop", "token_loss = token_loss + args.beta * (", "token_loss = token_loss - args.beta * ("),
    (
        "truncated completions learned from",
        "mask = mask * ~torch.cat([rating.is_truncated for rating in ratings])[:, None]  # [G12]",
        "pass",
    ),
    (
        "answers that end are penalised",
        "-args.truncation_penalty * is_truncated  # [G12]",
        "-args.truncation_penalty * (not is_truncated)",
    ),
    (
        "the KL of groups without variance skipped",
        '(advantages != 0).any(-1) | (args.beta > 0) | (args.algorithm == "reinforce++")',
        "(advantages != 0).any(-1)",
    ),
    ("dynamic sampling keeps what it has seen", "(has_variance(args, rating) or not args.dynamic_sampling)", "True"),
    (
        "a newline belongs to the next line",
        '            ids[i, t] = step_of_line[i][min(line, len(step_of_line[i]) - 1)]\n            line += text.count("\\n")\n',
        '            line += text.count("\\n")\n            ids[i, t] = step_of_line[i][min(line, len(step_of_line[i]) - 1)]\n',
    ),
    (
        "minibatches of one order for ever",
        "torch.randperm(len(groups)).tensor_split",
        "torch.arange(len(groups)).tensor_split",
    ),
    (
        "gradients cut one by one",
        "norms.append(cut_gradients(parameters, args.max_grad_norm, args.shard))",
        "norms.append(sum(cut_gradients([x], args.max_grad_norm, args.shard) for x in parameters))",
    ),
    (
        "gradients of micro-batches forgotten",
        "    for micro_batch in micro_batches:\n",
        "    for micro_batch in micro_batches:\n        optimizer.zero_grad()\n",
    ),
    ("learning rate not annealed", "(remaining if args.anneal_lr else 1.0)", "1.0"),
    (
        "same questions in every process",
        "items[len(items) * rank // count : len(items) * (rank + 1) // count]",
        "items[: len(items) // count]",
    ),
    (
        "gradients not exchanged",
        "gradient_of(parameter).copy_(over_ranks(gradient_of(parameter).to(args.device)))",
        "pass",
    ),
    (
        "totals of one process",
        "total_tokens, total_sequences = over_ranks(torch.tensor([mask[answers].sum(), len(answers)]))",
        "total_tokens, total_sequences = torch.tensor([mask[answers].sum(), len(answers)])",
    ),
    ("optimizer not restored on resume", '    optimizer.load_state_dict(saved["optimizer"])\n', ""),
    (
        "questions begin anew on resume",
        'return saved["step"], saved["cursor"], saved["metrics"]',
        'return saved["step"], 0, saved["metrics"]',
    ),
    (
        "reference not restored on resume",
        '        reference.load_state_dict(saved["reference"])\n',
        "        pass\n",
    ),
    ("replay not kept", "(self.replay + self.pairs)[-10_000:]", "[]"),
    ("NaN goes unnoticed", "    if not math.isfinite(norm):", "    if False:"),
    (
        "checkpoint unpickled without a guard",
        "weights_only=True, mmap=not keys)\n        removed",
        "weights_only=False, mmap=not keys)\n        removed",
    ),
    (
        "held-out problems learned from",
        "return learned, held_out",
        "return problems, held_out",
    ),
    ("the file's first rows held out", "random.Random(args.seed).shuffle(problems)", "pass"),
    ("lines counted from 0", "for number, line in enumerate(lines, start=1):", "for number, line in enumerate(lines):"),
    ("a byte-order mark refused", 'encoding="utf-8-sig") as file', 'encoding="utf-8") as file'),
    (
        "messages shown as their repr",
        'system + (list(problem.messages) or [{"role"',
        'system + ([{"role"',
    ),
    (
        "prompts beyond the context kept",
        "for problem, size in zip(problems, sizes) if size <= room]",
        "for problem, size in zip(problems, sizes)]",
    ),
    (
        "no room for the completion",
        "    room = context - args.max_tokens\n",
        "    room = context\n",
    ),
    (
        "a trained model gets the small model's learning rate",
        "    rate = min(max(2e-5 * (135e6 / size) ** 0.75, 1e-6), 3e-4)\n",
        "    rate = 3e-4\n",
    ),
    (
        "choices overrule what is given by hand",
        "for name, x in values.items() if getattr(args, name) is None}\n        why",
        "for name, x in values.items()}\n        why",
    ),
    (
        "a resumed run chooses again",
        "    if saved:\n        return replace(args, **{name",
        "    if False:\n        return replace(args, **{name",
    ),
    ("bfloat16 with torch's AdamW", 'if args.dtype == "bfloat16" or args.offload or', "if args.offload or"),
    ("a reward of None or NaN let pass", "            if not is_finite_number(reward):", "            if False:"),
    (
        "offloaded gradients stay on the device",
        "        parameter.grad = None\n\n    parameter.host",
        "\n    parameter.host",
    ),
    (
        "offloaded micro-batches overwrite each other",
        "host.add_(parameter.grad.cpu())",
        "host.copy_(parameter.grad.cpu())",
    ),
    ("offloaded gradients never forgotten", "parameter.grad = parameter.host_gradient = None", "parameter.grad = None"),
    (
        "the norm of each process's part",
        "norm = (over_ranks(norm.square()).sqrt() if are_shards else norm)",
        "norm = norm",
    ),
    ("visitors do not leave", "parameter.data = parameter.on_host\n\n", "pass\n\n"),
    ("sharded gradients averaged", "            module.set_gradient_divide_factor(1.0)\n", ""),
    (
        "parts saved for the whole",
        "gathered(x.detach()) for name, x in policy.named_parameters() if",
        "own_part(x.detach()) for name, x in policy.named_parameters() if",
    ),
    ("copies rounded apart", 'update, "rounding")', 'update, process_rank(), "rounding")'),
    ("fixed shapes see what was never written", "seen[rows] & (columns <= Q + t)", "seen[rows]"),
    ("a window one token too wide", "keys[:, None, None, :] < window)", "keys[:, None, None, :] <= window)"),
    ("the paths are compared within the window alone", "for length in sorted({20, beyond}):", "for length in (20,):"),
    (
        "the paths are compared in evaluation mode",
        "path, model.train(), prompts, tokens",
        "path, model, prompts, tokens",
    ),
    ("capped logits taken as the head makes them", "if odd_logits and not reason:", "if False:"),
    (
        "the tokens of a tool are scored",
        "scored = mask[i, : lengths[i]].nonzero()[:, 0].tolist()",
        "scored = list(range(lengths[i]))",
    ),
    (
        "a sequence ends with its first 0",
        "(mask.bool() * torch.arange(1,",
        "(mask.bool().cumprod(-1) * torch.arange(1,",
    ),
    (
        "plain positions count padding",
        "positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[",
        "positions = (torch.ones_like(attention_mask).cumsum(-1) - 1)[",
    ),
    ("plain scores one token late", "kept).logits[:, -kept:-1]", "kept).logits[:, -kept + 1 :]"),
    ("fixed shapes write one column late", "columns[None, Q + t : Q + t + 1]", "columns[None, Q + t - 1 : Q + t]"),
    (
        "unpacked weights kept for the backward pass",
        "Int8Linear.apply(x, module.weight, module.scale)",
        "torch.nn.functional.linear(x, module.weight.to(x.dtype)) * module.scale",
    ),
    ("gradient of the codes without their scale", "(gradient * ctx.scale) @", "gradient @"),
    (
        "one scale for the whole matrix",
        "weight.abs().amax(-1).float()",
        "weight.abs().amax().float().expand(len(weight))",
    ),
    ("the head in 8 bits too", "isinstance(x, torch.nn.Linear) and x is not head}", "isinstance(x, torch.nn.Linear)}"),
    (
        "gradients kept until the next ones have come",
        "            norms.append(cut_gradients(",
        "            kept = [gradient_of(x) for x in parameters]  # noqa\n            norms.append(cut_gradients(",
    ),
    ("biases lost under 8 bits", "y if module.bias is None else y + module.bias", "y"),
    ("W&B never begins", "        start_wandb(args, run_dir)  # before", "        pass  # before"),
    ("the reward model sees no EOS", "*ids, *[tokenizer.eos_token_id] * (has_ended and", "*ids, *[0] * (False and"),
    ("a newline before the response", "tokenizer([prompt, text], add", 'tokenizer([f"{prompt}\\n", text], add'),
    (
        "the score read before an EOS that is padding",
        "padding = min(set(range(1 + sum(map(len, rows)))).difference(*rows))",
        "padding = tokenizer.pad_token_id or 0",
    ),
    (
        "a truncated answer gets the reward model's EOS",
        "(prompt, text, not cut)",
        "(prompt, text, True)",
    ),
    ("the first adapter dropped", "if base_of_adapter(name) and not args.lora_rank:\n", "if False:\n"),
    (
        "a brought adapter thrown away for a new one",
        "if args.model and base_of_adapter(args.model):\n        adapter",
        "if False:\n        adapter",
    ),
    (
        "the reference before the first adapter",
        "zip(trained, adapter.first_weights)",
        "zip(trained, [0 * x for x in now])",
    ),
    ("merged weights stay frozen", ".merge_and_unload().requires_grad_(True)", ".merge_and_unload()"),
    ("dropout of a brought adapter", "    without_dropout(model)  # an adapter can bring its own\n", ""),
    (
        "a relative path in the saved adapter",
        "os.path.abspath(config.base_model_name_or_path)",
        "config.base_model_name_or_path",
    ),
    ("prompts end in EOS", "ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids", "ids"),
    (
        "prompts padded by a token that the embedding lacks",
        "pad_id = 0  # it",
        "pad_id = tokenizer.pad_token_id or 0  # it",
    ),
    ("bytes taken for kilobytes", '1 if sys.platform == "darwin" else 1024', "1024"),
    (
        "groups of none divide by zero",
        "if group_size < 1 or len(rewards) % group_size:",
        "if len(rewards) % group_size:",
    ),
    (
        "sequences in groups of none",
        "if group_size < 1 or len(step_rewards) % group_size:",
        "if len(step_rewards) % group_size:",
    ),
    (
        "masks of 0 and 1 not taken",
        "    mask = mask.bool()\n    loss = torch.where(mask",
        "    loss = torch.where(mask",
    ),
    ("the first evaluation for the last", "for rows in (metrics, metrics[::-1]))", "for rows in (metrics, metrics))"),
    (
        "what a failed attempt left stays in the gradient",
        "    optimizer.zero_grad()\n    for micro_batch in micro_batches:\n",
        "    for micro_batch in micro_batches:\n",
    ),
    (
        "what a failed attempt left stays in the statistics",
        "    statistics = {name: x.clone() for name, x in statistics.items()}\n",
        "",
    ),
    ("reference not counted in what fits", "+ width * (args.beta > 0)", ""),
    ("the second Ctrl-C does not stop the run", "        self.restore()\n        say(", "        say("),
    (
        "the verifier is paid beside an own reward",
        "parts = {} if args.reward else {",
        "parts = {",
    ),
    ("a reward that does not apply makes NaN", "torch.stack(list(parts.values())).nansum(0)", "sum(parts.values())"),
    ("None counts as 0 in its curve", "[x.nansum(), (~x.isnan()).sum()]", "[x.nansum(), x.numel()]"),
    (
        "NaN taken for a reward",
        "if reward is not None and not is_finite_number(reward):",
        "if isinstance(reward, str):",
    ),
    ("too few rewards", "len(rewards) != len(about):", "len(rewards) > len(about):"),
    (
        "a judge is called for each group",
        "for group in with_own_rewards(args, sampled, step):",
        "for group in (with_own_rewards(args, [group], step)[0] for group in sampled):",
    ),
    (
        "completions of messages as texts",
        '"completion": [{"role": "assistant", "content": text}] if messages else text,',
        '"completion": text,',
    ),
    ("a relative path of the reward", "Path(found[1]).expanduser().absolute()", "Path(found[1])"),
    (
        "no system turn before messages",
        "return system + (list(problem.messages) or",
        "return (list(problem.messages) or system +",
    ),
    (
        "a second system turn",
        'args.system is not None and messages[0]["role"] in',
        'args.system is None and messages[0]["role"] in',
    ),
    ("a stop text in the last token only", "tokens[looked_at, : t + 1]", "tokens[looked_at, t : t + 1]"),
    (
        "a stop text must end its token",
        "return any(text in completion for text in texts)",
        "return any(completion.endswith(text) for text in texts)",
    ),
    (
        "stop texts not found by the fast sampler",
        "        going = without_stopped(model, going, tokens, t, rows)\n",
        "",
    ),
    (
        "stop texts not found by the plain sampler",
        "        going = without_stopped(model, going, tokens, t)  # --stop\n",
        "",
    ),
    ("stopped taken for truncated", "~(has_ended | torch.tensor([has_stop", "~(has_ended & torch.tensor([has_stop"),
    (
        "the verifier reads the stop text too",
        "float(is_right(problem, before_stop(args, completion)))",
        "float(is_right(problem, completion))",
    ),
    ("parts of a letter end nothing", ' or "\\ufffd" in piece', ""),
    ("learned from what is evaluated", "for problem in apart or held_out}", "for problem in held_out if not apart}"),
    ("a run evaluated on what it learned from", "if problem.prompt not in learned]", "if True]"),
    (
        "the small model asked with an instruction",
        "    if is_small(directory):\n        return replace(args, model=None, system",
        "    if False:\n        return replace(args, model=None, system",
    ),
    (
        "imitation: completions averaged, not tokens",
        "torch.where(mask.bool(), logprob, 0.0).sum() / total_tokens",
        "(logprob.sum(-1) / mask.sum(-1)).mean()",
    ),
    (
        "imitation maximised",
        "return -torch.where(mask.bool(), logprob, 0.0)",
        "return torch.where(mask.bool(), logprob, 0.0)",
    ),
    (
        "imitation of padding",
        "-torch.where(mask.bool(), logprob, 0.0).sum() / total_tokens",
        "-logprob.sum() / total_tokens",
    ),
    (
        "imitation: each micro-batch by its own tokens",
        "mask[order].to(args.device), total_tokens)",
        "mask[order].to(args.device), mask[order].sum())",
    ),
    ("imitation: the tokens of one process", "total_tokens = over_ranks(mask.sum())", "total_tokens = mask.sum()"),
    (
        "prompt tokens in the imitation",
        "examples.append(Example(prompt, completion))",
        "examples.append(Example(prompt[:1], prompt[1:] + completion))",
    ),
    ("EOS left out of the imitation", "ids if ids and ids[-1] in eos_ids else ids + eos", "ids"),
    (
        "an instruction around a prompt that has one",
        'plain = replace(args, instruction="{}", system=None)',
        "plain = replace(args, system=None)",
    ),
    ("held-out prompts imitated", "        if tuple(prompt) in not_learned:\n", "        if False:\n"),
    ("imitated at the temperature of the sampling", "at_1 = replace(args, temperature=1.0)", "at_1 = replace(args)"),
    (
        "wrong answers kept",
        "        if right and readable and not is_truncated:\n",
        "        if readable and not is_truncated:\n",
    ),
    (
        "unreadable answers kept",
        "        if right and readable and not is_truncated:\n",
        "        if right and not is_truncated:\n",
    ),
    (
        "answers that were cut off kept",
        "        if right and readable and not is_truncated:\n",
        "        if right and readable:\n",
    ),
    ("gsm8k evaluated on its training split", '"--eval-data", "test"))', '"--eval-data", "train"))'),
    ("shares taken for yes and no", "        n *= p * (1 - p) / variance\n", "        pass\n"),
    ("no problem added to the pairs", "[*differences, 0.5**0.5, -(0.5**0.5)]", "differences"),
    (
        "a resumed run writes a step's samples twice",
        'json.loads(line)["step"] > step:',
        'json.loads(line)["step"] < 0:',
    ),
    (
        "a resumed run loses the checkpoint's samples",
        'json.loads(line)["step"] > step:',
        'json.loads(line)["step"] >= step:',
    ),
    (
        "samples beside the advantages of other groups",
        "advantages.split(args.group_size))",
        "advantages.flip(0).split(args.group_size))",
    ),
    (
        "a sample's advantage over padding too",
        "advantages[i][group.mask[i].bool()].mean()",
        "advantages[i].mean()",
    ),
    ("each process writes samples", "    if writer is None:\n        return\n    step, count", "    step, count"),
    (
        "the best and the worst of the kept groups alone",
        "len(groups) if args.verbose else SHOWN_GROUPS",
        "SHOWN_GROUPS",
    ),
    ("a warning at each step without variance", "    if len(stretch) != steps or", "    if len(stretch) < steps or"),
    ("a warning after steps that are not in a row", "list(takewhile(", "list(filter("),
    ("a warning where equal rewards teach", 'args.algorithm in ("reinforce", "rft", "reinforce++")', "False"),
    ("CISPO's weight has a gradient", "clamp(max=1 + clip_high).detach()", "clamp(max=1 + clip_high)"),
    (
        "CISPO's weight is not cut",
        "(logprob - old_logprob).exp().clamp(max=1 + clip_high).detach()",
        "(logprob - old_logprob).exp().detach()",
    ),
    (
        "SAPO's temperatures the wrong way round",
        "torch.full_like(advantage, tau_negative).masked_fill(advantage > 0, tau_positive)",
        "torch.full_like(advantage, tau_positive).masked_fill(advantage > 0, tau_negative)",
    ),
    (
        "the sampler's weight upside down",
        "torch.where(mask.bool(), old_logprob - sampler_logprob, 0.0).detach()",
        "torch.where(mask.bool(), sampler_logprob - old_logprob, 0.0).detach()",
    ),
    (
        "the sampler's weight has a gradient",
        "torch.where(mask.bool(), old_logprob - sampler_logprob, 0.0).detach()",
        "torch.where(mask.bool(), old_logprob - sampler_logprob, 0.0)",
    ),
    (
        "the product of a sequence's ratios counts padding",
        "torch.where(mask.bool(), old_logprob - sampler_logprob, 0.0).detach()",
        "(old_logprob - sampler_logprob).detach()",
    ),
    ("good answers far from the policy are left out too", "(advantage >= 0) | (mean <= limit)", "mean <= limit"),
    (
        "the distance from the sampler counts padding",
        "torch.where(mask, sampler_logprob - logprob, 0.0).detach()",
        "(sampler_logprob - logprob).detach()",
    ),
    ("a token pays for the KL before it", "log_ratio.flip(-1).cumsum(-1).flip(-1)", "log_ratio.cumsum(-1)"),
    ("the batch's mean over padding too", "own = x[mask.bool()].double()", "own = x.flatten().double()"),
    (
        "equal advantages over the batch are divided",
        "    if -low < high:\n        result[mask.bool()]",
        "    if True:\n        result[mask.bool()]",
    ),
    ("REINFORCE++ has the KL in the loss too", 'if args.beta and args.algorithm != "reinforce++":', "if args.beta:"),
    ("a reward's weight is undone by the scaling", "weights.get(name, 1.0) * group_advantages(", "group_advantages("),
    (
        "a reward that does not apply is scaled as 0",
        "applies = ~part.isnan()",
        "part, applies = part.nan_to_num(), ~part.isinf()",
    ),
    (
        "a group whose parts alone differ is left out",
        "rating.parts.values() if args.decouple_rewards else [rating.rewards]",
        "[rating.rewards]",
    ),
    (
        "the punishment of long answers at the limit alone",
        "-max(num_tokens - (max_tokens - buffer), 0) / buffer",
        "-float(num_tokens >= max_tokens)",
    ),
    ("the KL is not weighted by the ratio", "((logprob - old_logprob).exp() * kl if args.unbiased_kl else kl)", "kl"),
    (
        "the sampler's weight does not reach the loss",
        "token_loss = token_loss if weight is None else weight * token_loss",
        "token_loss = token_loss",
    ),
    ("the newest rollout is learned from", "waiting.popleft()", "waiting.pop()"),
    (
        "rollouts that waited are lost when a run resumes",
        'for rollout in saved.get("rollouts", ()):',
        "for rollout in ():",
    ),
    ("what the tool wrote is learned", "self.waiting[row].pop(0), 0.0, 0", "self.waiting[row].pop(0), logprob[i], 1"),
    (
        "the tool's answer in another row",
        "                answer = self.tool.tokenizer(calculate(calls[-1])",
        "                row = 0\n                answer = self.tool.tokenizer(calculate(calls[-1])",
    ),
    ("a call is answered while an answer is written", "if row not in self.waiting and len(calls)", "if len(calls)"),
    (
        "the tool may end the answer",
        "[token for token in answer if token not in self.eos]",
        "[*answer, int(self.eos[0])]",
    ),
    (
        "an answer ends at the tool's first token",
        "completions = [row[:length].tolist() for row, length in zip(tokens, lengths_of(mask))]\n                texts = tokenizer.batch_decode(completions, skip_special_tokens=True)\n                groups",
        "completions = [row[:length].tolist() for row, length in zip(tokens, mask.sum(-1).tolist())]\n                texts = tokenizer.batch_decode(completions, skip_special_tokens=True)\n                groups",
    ),
    (
        "the warm start teaches what the calculator writes",
        "mask = mask * padded([[*chosen_tokens(tokenizer, problem.solution), 1] for problem in batch])[0]",
        "pass",
    ),
    (
        "a call that a token goes on behind is not answered",
        "len(calls) > len(re.findall(CALL, old))",
        'text.endswith("</calc>") and calls',
    ),
    ("a call is answered again and again", "len(calls) > len(re.findall(CALL, old))", "calls"),
    (
        "a cut result shortens the answer",
        "[group.mask.shape[1] if cut else length for length, cut in zip(lengths, is_truncated.tolist())]",
        "lengths",
    ),
    (
        "an exact 0 is shifted over the batch",
        "torch.ones_like(rewards), shift_mean=False)\n    return advantages",
        "torch.ones_like(rewards))\n    return advantages",
    ),
    ("rewards that cancel become a signal", "torch.where(total.abs() < 1e-5, 0.0, total)", "total"),
]
MUTANTS += [("grpo_llm.py", *mutant) for mutant in GRPO]


def plant(mutant, folder):
    """Write the mutated script; returns its path. The text to replace must stand in the script exactly once."""
    script, what, right, wrong = mutant
    source = (ROOT / script).read_text(encoding="utf-8")
    if source.count(right) != 1:
        raise ValueError(f"mutant {what!r}: its text stands {source.count(right)} times in {script}, not once")
    path = Path(folder) / script
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    return path


def last_killers():
    """(script, what is wrong) → the test that caught it in the kept results: the one to try first."""
    lines = (ROOT / "benchmarks" / "results" / "mutants.txt").read_text(encoding="utf-8").splitlines()
    rows = (re.fullmatch(r" *\d+  (\S+) +(.+?) +(tests/.+)", line) for line in lines)
    return {(row[1], row[2]): row[3] for row in rows if row}


def run_pytest(arguments, output, seconds):
    """Exit status of pytest in a forked process, which prints into the file `output`; None if it hangs.

    The imports of torch and transformers take longer than most tests: a forked process has them already. It also leaves
    their objects alone: pytest collects garbage at its end, and among a million objects that took a second.
    """
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 3
        try:
            os.setsid()  # what it starts can be stopped with it
            os.chdir(ROOT)
            os.environ.pop("PYTEST_XDIST_WORKER", None)
            gc.freeze()
            with open(output, "w", encoding="utf-8") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                sys.stdout = sys.stderr = file
                status = int(pytest.main(arguments))
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def killer(path, tests=None):
    """The first test that fails on this copy of the script, or "hangs"; None if the whole suite, or `tests`, passes."""
    output = Path(path).parent / "pytest.txt"
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-n", "0", f"--mutant={path}"]
    arguments += ["--basetemp", str(output.parent / "tmp"), *(tests or SUITES[path.name])]
    arguments += ["-m", "not learning and not mutants"]  # the tests of several processes too
    status = run_pytest(arguments, output, 300 if tests else 1800)  # the suite in one process takes minutes
    if status is None:
        return "hangs"
    if status == 0:
        return None
    text = output.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^(?:FAILED|ERROR) (tests/\S+?\.py(?:::\w+)?(?:\[.*?\](?= - |$))?)", text, re.MULTILINE)
    if status != 1 or not found:
        raise RuntimeError(f"pytest ended with status {status}:\n{text[-4000:]}")
    return found.group(1)


def catch(mutant, folder):
    """The test that fails on this bug, None if none does. The one that did last time is tried first, because that is
    quick, then its neighbours of the same file, then the suite."""
    path = plant(mutant, folder)
    last = last_killers().get(mutant[:2])
    for tests in ([last], [last.partition("::")[0]]) if last else ():
        try:
            if caught_by := killer(path, tests):
                return caught_by
        except RuntimeError:  # that test is no more
            continue
    return killer(path)


def no_such_script(name):
    """The sentence for a name that is none of the scripts'; it names the one that was probably meant."""
    meant = difflib.get_close_matches(Path(name).name, SUITES, 1)
    return f"{name} is none of {', '.join(SUITES)}{f': did you mean {meant[0]}?' if meant else ''}"


def write(number="", file="", script="ppo_cartpole.py", *rest):
    """The exercise: script with its number-th bug, as file. Returns what went wrong, or None."""
    own = [mutant for mutant in MUTANTS if mutant[0] == script]
    if not own:
        return no_such_script(script)
    if not number.isdecimal() or not 1 <= int(number) <= len(own) or not file:
        return f"--write takes a number from 1 to {len(own)}, so many bugs {script} has here, and a file to write"
    if rest:
        return f"--write takes a number, a file and a script, got {' '.join(rest)} too"
    if not Path(file).resolve().parent.is_dir():
        return f"{file}: there is no such directory, mkdir it first"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(plant(own[int(number) - 1], folder), file)
    print(f"{file} is {script} with one wrong line")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", nargs="*", help=f"plant the bugs of these scripts alone: {', '.join(SUITES)}")
    parser.add_argument("--write", nargs="+", metavar=("N", "FILE"), help="write one script with its N-th bug to FILE")
    args = parser.parse_args()
    if args.write:
        if wrong := write(*args.write, *args.script):
            parser.error(wrong)
        return 0
    if unknown := [name for name in args.script if name not in SUITES]:
        parser.error(no_such_script(unknown[0]))
    survivors = 0
    wanted = [mutant for mutant in MUTANTS if mutant[0] in (args.script or SUITES)]
    for number, mutant in enumerate(wanted, start=1):
        with tempfile.TemporaryDirectory() as folder:
            caught_by = catch(mutant, folder)
        survivors += caught_by is None
        print(f"{number:3d}  {mutant[0]:16}  {mutant[1]:50}  {caught_by or 'SURVIVED'}", flush=True)
    print(f"{len(wanted)} mutants, {len(wanted) - survivors} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
