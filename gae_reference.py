# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Every equation of the scripts beside this file, written as its definition, in plain Python floats.

Teaches  what GAE, the clipped losses, the KL estimators and the group advantages are, before any tensor
Run      python gae_reference.py
Expect   five worked tables, each small enough to redo with a pencil; the tests check every number in them
Departs  nowhere: it uses no batch, no recursion and no trick. It is slow on purpose, because code that follows the
         definition is easier to trust than the fast code that the tests compare with it

    δₜ = rₜ + γ V(sₜ₊₁) − V(sₜ)                                       GAE §3;     PPO Eq. 12
    Âₜ = Σₗ (γλ)ˡ δₜ₊ₗ                                                GAE Eq. 16; PPO Eq. 11
    Âₜ⁽ⁿ⁾ = rₜ + γ rₜ₊₁ + … + γⁿ V(sₜ₊ₙ) − V(sₜ)                      GAE Eq. 11–14
    L_CLIP = min(ρ Â, clip(ρ, 1−ε, 1+ε) Â)                            PPO Eq. 7
    Âᵢ = (rᵢ − mean(r)) / std(r)                                      DeepSeekMath §4.1.2
    Âᵢₜ = Σ over the steps j that end at token t or later of r̃ᵢⱼ        DeepSeekMath §4.1.3
    J = 1/G Σᵢ 1/|oᵢ| Σₜ { min(ρᵢₜ Âᵢₜ, clip(ρᵢₜ) Âᵢₜ) − β k3ᵢₜ }     DeepSeekMath Eq. 3–4
    L_SFT = −1/Σᵢ|oᵢ| Σᵢ Σₜ ln π(oᵢₜ | q, oᵢ,₍<t₎)                     DeepSeekMath §A.1.1, by token
    KL( N(μ, σ²) ‖ N(0, 1) ) = ½ (μ² + σ² − 1 − ln σ²)                InfoRM
    D² = (s − m)ᵀ Σ⁻¹ (s − m)                                         Mahalanobis; IBL
    ΔE = mean over tokens of ‖h_in‖₁ − ‖h_out‖₁                       EPPO

Papers   GAE: Schulman et al. 2015, arXiv:1506.02438.  PPO: Schulman et al. 2017, arXiv:1707.06347.
         DeepSeekMath: Shao et al. 2024, arXiv:2402.03300.  DAPO: Yu et al. 2025, arXiv:2503.14476.
         Dr. GRPO: Liu et al. 2025, arXiv:2503.20783.  k1, k2, k3: Schulman, "Approximating KL Divergence", 2020.
         InfoRM: Miao et al. 2024, arXiv:2402.09345.  IBL: Miao et al. 2025, arXiv:2510.13694.
         EPPO: Miao et al. 2025, arXiv:2501.19358.  PPO-max: Zheng et al. 2023, arXiv:2307.04964.
         CISPO: MiniMax 2025, arXiv:2506.13585.  SAPO: Gao et al. 2025, arXiv:2511.20347.
         REINFORCE++: Hu et al. 2025, arXiv:2501.03262.  GDPO: Liu et al. 2026, arXiv:2601.05242.
         DeepSeek-V3.2: DeepSeek-AI 2025, arXiv:2512.02556.

Shapes   one sequence of T steps is a list of T numbers; a group of G outputs is a list of G lists.
"""

import os
import sys
from io import TextIOWrapper
from math import exp, log, prod, sqrt, tanh


def td_errors(rewards, values, next_values, terminated, gamma):
    """δₜ for each of T steps (PPO Eq. 12). A terminated step has a future of 0, a truncated step one of V(sₜ₊₁)."""
    deltas = []
    for reward, value, next_value, is_terminal in zip(rewards, values, next_values, terminated, strict=True):
        future = 0.0 if is_terminal else gamma * next_value
        deltas.append(reward + future - value)
    return deltas


def steps_to_the_end(t, done):
    """The number of steps from t to the end of its episode, or to the end of the list. Step t itself counts."""
    for length, is_last in enumerate(done[t:], start=1):
        if is_last:
            return length
    return len(done) - t


def gae_double_sum(rewards, values, next_values, terminated, done, gamma, gae_lambda):
    """Âₜ = Σₗ (γλ)ˡ δₜ₊ₗ, summed to the end of the episode that t belongs to (GAE Eq. 16)."""
    deltas = td_errors(rewards, values, next_values, terminated, gamma)
    advantages = []
    for t in range(len(rewards)):
        terms = [(gamma * gae_lambda) ** k * deltas[t + k] for k in range(steps_to_the_end(t, done))]
        advantages.append(sum(terms))
    return advantages


def n_step_advantage(t, n, rewards, values, next_values, terminated, gamma):
    """n rewards from step t on, then V for all later ones, minus V(sₜ) (GAE Eq. 11–14)."""
    collected = sum(gamma**k * rewards[t + k] for k in range(n))
    rest = 0.0 if terminated[t + n - 1] else gamma**n * next_values[t + n - 1]
    return collected + rest - values[t]


def gae_n_step_average(rewards, values, next_values, terminated, done, gamma, gae_lambda):
    """The same Âₜ as an average of its n-step advantages: (1−λ) Σₙ λⁿ⁻¹ Âₜ⁽ⁿ⁾ (GAE Eq. 16, first line).

    If the episode ends after h steps, n is at most h, and the h-step advantage gets all the remaining weight, λʰ⁻¹.
    The two forms agree because inside an episode next_values[t] is values[t + 1], so that the δs of n steps telescope.
    """
    advantages = []
    for t in range(len(rewards)):
        horizon = steps_to_the_end(t, done)
        total = 0.0
        for n in range(1, horizon + 1):
            weight = gae_lambda ** (n - 1) * (1.0 if n == horizon else 1.0 - gae_lambda)
            total += weight * n_step_advantage(t, n, rewards, values, next_values, terminated, gamma)
        advantages.append(total)
    return advantages


def clipped_surrogate(ratio, advantage, clip_low, clip_high):
    """PPO Eq. 7 case by case: (objective to maximise, its derivative by the ratio).

    Outside the range the derivative is 0 only if the ratio has already moved in the direction that the advantage asks
    for.
    """
    if advantage > 0 and ratio > 1 + clip_high:
        return (1 + clip_high) * advantage, 0.0
    if advantage < 0 and ratio < 1 - clip_low:
        return (1 - clip_low) * advantage, 0.0
    return ratio * advantage, advantage


def clipped_value_loss(value, old_value, return_, clip_coef):
    """½ max((V − R)², (clip(V, V_old ± ε) − R)²) case by case: (loss, its derivative by V).

    With clip_coef=None the loss is ½ (V − R)².
    """
    loss, slope = 0.5 * (value - return_) ** 2, value - return_
    if clip_coef is None or abs(value - old_value) <= clip_coef:
        return loss, slope
    clipped = old_value + clip_coef if value > old_value else old_value - clip_coef
    clipped_loss = 0.5 * (clipped - return_) ** 2
    return (clipped_loss, 0.0) if clipped_loss > loss else (loss, slope)


def kl_estimates(logprob, old_logprob):
    """(k1, k2, k3): three estimates of KL(old‖new) from one sample of the old policy.

    k1 is unbiased and can be negative. k2 is biased and never negative. k3 is unbiased and never negative.
    """
    log_ratio = logprob - old_logprob
    return -log_ratio, 0.5 * log_ratio**2, exp(log_ratio) - 1 - log_ratio


def mean_and_std(numbers):
    """Mean and biased standard deviation: it divides by the count, not by the count minus one."""
    mean = sum(numbers) / len(numbers)
    return mean, sqrt(sum((x - mean) ** 2 for x in numbers) / len(numbers))


def whiten(numbers, shift_mean=True):
    """Scale to variance 1 and mean 0; shift_mean=False keeps the mean. lm-human-preferences adds the same 1e-8."""
    mean, std = mean_and_std(numbers)
    return [(x - mean) / sqrt(std**2 + 1e-8) + (0.0 if shift_mean else mean) for x in numbers]


def group_advantages(rewards, scale_by_std=True):
    """(rᵢ − mean) / std of one group (DeepSeekMath §4.1.2); Dr. GRPO does not divide. Equal rewards give all 0."""
    if max(rewards) == min(rewards):
        return [0.0 for _ in rewards]
    mean, std = mean_and_std(rewards)
    return [(reward - mean) / (std if scale_by_std else 1.0) for reward in rewards]


def process_advantages(step_rewards, step_ids):
    """One group under process supervision (DeepSeekMath §4.1.3): an advantage for each token of each output.

    step_rewards[i][j] is the reward of step j of output i. step_ids[i][t] is the step that token t belongs to, −1 for
    none. All step rewards of the group are normalised together. A token gets the sum over its own and the later steps.
    """
    normalised = iter(group_advantages([reward for rewards in step_rewards for reward in rewards]))
    advantages = []
    for rewards, ids in zip(step_rewards, step_ids, strict=True):
        own = [next(normalised) for _ in rewards]
        advantages.append([sum(own[step:]) if step >= 0 else 0.0 for step in ids])
    return advantages


def grpo_objective(logprobs, old_logprobs, ref_logprobs, advantages, clip_low, clip_high, beta, reduction, max_tokens):
    """J of one group as nested loops (DeepSeekMath Eq. 3–4), to be maximised. The loss of a script is −J.

    The first four arguments are lists of G lists with one number for each token that the policy chose. reduction:
    "sequence" averages over the tokens of each output, then over the outputs (GRPO); "token" averages over all tokens
    (DAPO §3.3); "constant" divides by G · max_tokens, whatever the lengths are (Dr. GRPO §3.2).
    """
    outputs = list(zip(logprobs, old_logprobs, ref_logprobs, advantages, strict=True))
    total = 0.0
    for output in outputs:
        output_total = 0.0
        for logprob, old_logprob, ref_logprob, advantage in zip(*output, strict=True):
            surrogate, _ = clipped_surrogate(exp(logprob - old_logprob), advantage, clip_low, clip_high)
            _, _, kl = kl_estimates(ref_logprob, logprob)  # KL(policy‖reference), because the policy drew the sample
            output_total += surrogate - beta * kl
        total += output_total / len(output[0]) if reduction == "sequence" else output_total
    if reduction == "sequence":
        return total / len(outputs)
    if reduction == "token":
        return total / sum(len(output[0]) for output in outputs)
    if reduction == "constant":
        return total / (len(outputs) * max_tokens)
    raise ValueError(f"reduction {reduction!r} is none of sequence, token, constant")


def cispo_slope(ratio, advantage, clip_high):
    """What ln π of a token gets as gradient of CISPO's objective (MiniMax-M1 Eq. 4 and 5). The clipped surrogate's is
    ρ times its derivative by ρ: 0 where it clips."""
    return ratio * advantage if ratio <= 1 + clip_high else (1 + clip_high) * advantage


def sapo_objective(ratio, advantage, tau_positive=1.0, tau_negative=1.05):
    """(SAPO's objective of a token, its derivative by the ratio), with tanh for the paper's sigmoid."""
    tau = tau_positive if advantage > 0 else tau_negative
    gate = tanh(tau * (ratio - 1) / 2)
    return 2 / tau * (1 + gate) * advantage, (1 - gate**2) * advantage


def sampler_weights(probabilities, sampler_probabilities, level, cap, is_masked=False):
    """The weight of each token of one sequence: π_old/π_sampler, or for "sequence" the product of all of them."""
    weights = [p / q for p, q in zip(probabilities, sampler_probabilities, strict=True)]
    if level == "sequence":
        weights = [prod(weights)] * len(weights)
    return [weight if weight <= cap else 0.0 if is_masked else cap for weight in weights]


def stays_in_the_loss(probabilities, sampler_probabilities, advantage, limit):
    """DeepSeek-V3.2's mask of one sequence. A bad answer leaves the loss if π gives it far less than the sampler."""
    differences = [log(q) - log(p) for p, q in zip(probabilities, sampler_probabilities, strict=True)]
    return advantage >= 0 or sum(differences) / len(differences) <= limit


def reinforce_pp_advantages(rewards, logprobs, ref_logprobs, kl_coef):
    """REINFORCE++ Eq. 8 to 10: rewards of B sequences, lists of B lists for the tokens → B lists of advantages."""
    returns = []
    for reward, own, reference in zip(rewards, logprobs, ref_logprobs, strict=True):
        kl = [p - q for p, q in zip(own, reference, strict=True)]
        returns.append([reward - kl_coef * sum(kl[t:]) for t in range(len(kl))])
    mean, std = mean_and_std([x for row in returns for x in row])
    return [[(x - mean) / std for x in row] for row in returns]


def decoupled_advantages(parts, weights):
    """GDPO for one group, before the batch is normalised. parts[k][i]: reward k of answer i, None if it has none."""
    totals = [0.0 for _ in parts[0]]
    for rewards, weight in zip(parts, weights, strict=True):
        found = iter(group_advantages([reward for reward in rewards if reward is not None]))
        totals = [x if reward is None else x + weight * next(found) for x, reward in zip(totals, rewards, strict=True)]
    return totals


def soft_overlong_punishment(num_tokens, max_tokens, buffer):
    """DAPO Eq. 13, its three cases."""
    if num_tokens <= max_tokens - buffer:
        return 0.0
    if num_tokens <= max_tokens:
        return ((max_tokens - buffer) - num_tokens) / buffer
    return -1.0


def supervised_loss(logprobs):
    """Cross-entropy in nats a token, of completions that a model is to imitate; logprobs: a list of numbers for each.

    Each completion's own mean of −ln π counts by its share of all the tokens. It is the logarithm of the perplexity.
    """
    num_tokens = sum(len(own) for own in logprobs)
    return sum(len(own) / num_tokens * (-sum(own) / len(own)) for own in logprobs)


def bottleneck_kl(means, log_variances):
    """KL(q‖p) of independent Gaussians q and the standard normal p, as cross-entropy minus entropy (InfoRM).

    −E_q[ln p(s)] is ½ (ln 2π + E[s²]), and the entropy of q is ½ (ln 2π + 1 + ln σ²): ln 2π cancels and is left out.
    Each argument has a number for each dimension.
    """
    total = 0.0
    for mean, log_variance in zip(means, log_variances, strict=True):
        cross_entropy, entropy = 0.5 * (mean**2 + exp(log_variance)), 0.5 * (1 + log_variance)
        total += cross_entropy - entropy
    return total


def mahalanobis_distance(vector, known):
    """Length of `vector` after a map that gives the known vectors mean 0 and (biased) covariance I.

    The covariance is written as L Lᵀ with a lower triangle L (Cholesky), and z solves L z = vector − mean.
    """
    size = len(vector)
    mean = [sum(row[i] for row in known) / len(known) for i in range(size)]
    lower = [[0.0] * size for _ in range(size)]
    z = []
    for i in range(size):
        for j in range(i + 1):
            rest = sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in known) / len(known)
            rest -= sum(lower[i][k] * lower[j][k] for k in range(j))
            lower[i][j] = sqrt(rest) if i == j else rest / lower[j][j]
        z.append((vector[i] - mean[i] - sum(lower[i][k] * z[k] for k in range(i))) / lower[i][i])
    return sqrt(sum(x**2 for x in z))


def energy_loss(states_in, states_out):
    """What the last layer takes off the L1 norm of the state, a mean over a response's tokens (EPPO).

    Each argument has a vector for each token: the state that enters the layer, and the one that leaves it.
    """
    losses = []
    for before, after in zip(states_in, states_out, strict=True):
        losses.append(sum(abs(x) for x in before) - sum(abs(x) for x in after))
    return sum(losses) / len(losses)


def scaled_scores(batches, clip):
    """The last batch of scores, less the mean of all batches, divided by their standard deviation, cut (PPO-max)."""
    mean, std = mean_and_std([score for batch in batches for score in batch])
    return [min(max((score - mean) / std, -clip), clip) for score in batches[-1]]


# Six steps of one environment. The time limit cuts an episode at t=2, another ends in failure at t=4, and the rollout
# ends in the middle of a third at t=5. The 7 is the critic's value of the failed state: no result may depend on it.
EXAMPLE = {
    "rewards": [1.0, 2.0, 3.0, 1.0, 2.0, 1.0],
    "values": [2.0, 4.0, 3.0, 1.0, 3.0, 2.0],
    "next_values": [4.0, 3.0, 5.0, 3.0, 7.0, 4.0],
    "terminated": [False, False, False, False, True, False],
    "done": [False, False, True, False, True, False],
}


def print_tables():
    print("1. Generalized advantage estimation, γ = 0.9: six steps, truncated at t=2, terminated at t=4\n")
    advantages = [gae_double_sum(**EXAMPLE, gamma=0.9, gae_lambda=gae_lambda) for gae_lambda in (0.0, 0.95, 1.0)]
    steps = {key: EXAMPLE[key] for key in ("rewards", "values", "next_values", "terminated")}
    print("   t      r      V  V(next)  end                δ    Â λ=0  Â λ=0.95    Â λ=1")
    for t, delta in enumerate(td_errors(**steps, gamma=0.9)):
        end = "terminated" if EXAMPLE["terminated"][t] else "truncated" if EXAMPLE["done"][t] else ""
        numbers = f"{EXAMPLE['rewards'][t]:5.1f}  {EXAMPLE['values'][t]:5.1f}  {EXAMPLE['next_values'][t]:7.1f}"
        columns = f"{advantages[0][t]:7.4f}  {advantages[1][t]:8.4f}  {advantages[2][t]:7.4f}"
        print(f"   {t}  {numbers}  {end:10}  {delta:7.4f}  {columns}")

    print("\n2. The clipped surrogate, ε = 0.2: four quadrants\n")
    print("      ρ      Â  objective  d/dρ  gradient flows")
    for ratio, advantage in ((1.5, 2.0), (0.5, 2.0), (1.5, -2.0), (0.5, -2.0)):
        objective, slope = clipped_surrogate(ratio, advantage, 0.2, 0.2)
        print(f"   {ratio:4.1f}  {advantage:5.1f}  {objective:9.1f}  {slope:4.1f}  {'yes' if slope else 'no, clipped'}")

    print("\n3. Group advantages: four answers to one question, one of them right\n")
    rewards = [1.0, 0.0, 0.0, 0.0]
    print("   reward  Â GRPO  Â Dr. GRPO")
    for row in zip(rewards, group_advantages(rewards), group_advantages(rewards, False), strict=True):
        print("   {:6.1f}  {:6.3f}  {:10.3f}".format(*row))

    print("\n4. Process supervision: two outputs, five step rewards, mean 0.8, standard deviation 0.4\n")
    step_rewards, step_ids = [[1.0, 0.0], [1.0, 1.0, 1.0]], [[0, 0, 1, -1], [0, 1, 1, 2]]
    print("   output  step rewards  step of each token  Â of each token")
    for i, row in enumerate(process_advantages(step_rewards, step_ids)):
        given = " ".join(f"{reward:g}" for reward in step_rewards[i])
        ids = " ".join(f"{step:2d}" for step in step_ids[i])
        print(f"   {i:6d}  {given:12}  {ids:18}  {' '.join(f'{advantage:4.1f}' for advantage in row)}")

    print("\n5. Whitening: mean 2.5, variance 1.25\n")
    print("   reward  whitened  mean kept")
    for row in zip([1.0, 2.0, 3.0, 4.0], whiten([1, 2, 3, 4]), whiten([1, 2, 3, 4], shift_mean=False), strict=True):
        print("   {:6.1f}  {:8.4f}  {:9.4f}".format(*row))


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


if __name__ == "__main__":
    guard_output()
    print_tables()
