"""docs/claims.md: its tables and its verdicts agree with the raw results in benchmarks/results."""

import json
from collections import defaultdict
from statistics import mean, median

import numpy as np
import pytest
from contract import ROOT

PAGE = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")


def raw(name):
    """The measurements of one raw file, without its first line, which describes the machine."""
    text = (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()[1:]]


def raw_lines(name):
    """All lines of a raw file whose lines each name their machine."""
    text = (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def grouped(rows, *keys):
    """{values of the keys: [rows that have them]}."""
    found = defaultdict(list)
    for row in rows:
        found[tuple(row.get(key) for key in keys)].append(row)
    return found


def spread(values, digits):
    """Median and quartiles, as the page writes them: 0.62 (0.55 to 0.73)."""
    low, middle, high = (f"{x:.{digits}f}" for x in np.quantile(values, (0.25, 0.5, 0.75)))
    return f"{middle} ({low} to {high})"


def stands(*cells):
    """A row of a table of the page begins with these cells."""
    start = "| " + " | ".join(str(cell) for cell in cells) + " |"
    assert any(line.startswith(start) for line in PAGE.splitlines()), f"docs/claims.md has no row {start}"


def test_claim_1_bias_variance_and_error_over_lambda():
    found = grouped(raw("claims_gae_lambda"), "sigma", "lambda")
    errors = {}
    for (sigma, lam), rows in found.items():
        assert len(rows) == 10
        bias2 = [max(row["bias2"], 0) for row in rows]  # the estimate of a square, so it may lie below 0
        error = [(bias + row["variance"] / 25) ** 0.5 for bias, row in zip(bias2, rows)]
        errors.setdefault(sigma, {})[lam] = median(error)
        if f"\n| {sigma:g} | {lam:g} | " in PAGE:
            bias, deviation = median(x**0.5 for x in bias2), median(row["variance"] ** 0.5 for row in rows)
            stands(f"{sigma:g}", f"{lam:g}", f"{bias:.3f}", f"{deviation:.3f}", f"{median(error):.3f}")
    assert {sigma: min(error, key=error.get) for sigma, error in errors.items()} == {0: 0, 0.1: 0.6, 0.3: 0.9}


def test_claim_2_what_each_detail_changes_on_cartpole_and_acrobot():
    area = {
        key: [row["area"] for row in rows] for key, rows in grouped(raw("claims_ppo_details"), "env", "variant").items()
    }
    assert all(len(own) == 10 for own in area.values())

    def change(variant, env="CartPole-v1"):
        return round(mean(area[env, variant]) - mean(area[env, "defaults"]))

    assert round(median(area["CartPole-v1", "defaults"])) == 358
    assert change("λ = 0: one-step advantages") == -243
    assert change("no ratio clipping [D8]") == -250
    assert change("one epoch, one minibatch [D6]") == -239
    assert change("value clipping [D9]") == -70
    assert change("torch's initialisation [D2]") == -33
    alike = ["Adam's ε 1e-8 [D3]", "no learning-rate annealing [D4]", "entropy bonus 0.01 [D10]"]
    assert all(abs(change(variant)) < 16 for variant in [*alike, "no gradient clipping [D11]"])
    assert change("λ = 0: one-step advantages", "Acrobot-v1") > 0 and change("one epoch [D6]", "Acrobot-v1") > 0
    lambdas = ["λ = 0: one-step advantages", "λ = 0.5", "defaults", "λ = 1: Monte Carlo advantages"]
    assert [round(median(area["CartPole-v1", variant])) for variant in lambdas] == [123, 180, 358, 367]


def test_claim_3_a_limit_with_the_bootstrap_and_without():
    found = grouped(raw("claims_truncation"), "env", "limit", "variant")
    assert all(len(rows) == 10 for rows in found.values())
    for (env, limit, variant), rows in found.items():
        returns = [row["return"] for row in rows]
        if env == "CartPole":
            values = [f"{median(row[name] for row in rows):.1f}" for name in ("value", "value_aside")]
            stands(limit, "as it is" if variant == "right" else "cut", spread(returns, 0))
            assert f"| {spread(returns, 0)} | " in PAGE and f"| {values[0]} | {values[1]} |" in PAGE
        else:
            low, middle, high = (f"{x:.1f}" for x in np.quantile(returns, (0.25, 0.5, 0.75)))
            assert f"it is {middle} ({low} to {high})" in PAGE.replace("\n", " ")
    ends = {key: median(row["return"] for row in rows) for key, rows in found.items()}
    assert ends["CartPole", 25, "right"] < 140 < 490 < ends["CartPole", 25, "wrong"]
    assert ends["CartPole", 500, "right"] == ends["CartPole", 500, "wrong"] == 500


WAYS = ("GRPO", "GRPO, β 0", "GRPO, β 0, a rule for the reward")


def test_claim_4_memory_by_plan_is_that_of_the_table():
    plan = grouped([row for row in raw("claims_ppo_grpo") if row["part"] == "plan"], "model", "account")
    assert len(plan) == 24
    names = {
        "float32, Adam": "float32, Adam",
        "bfloat16, Adam and master weights in float32": "bfloat16, float32 master weights",
        "bfloat16, 8-bit Adam": "bfloat16, 8-bit Adam",
    }
    for (model, account), [row] in plan.items():
        saved = [100 * (1 - row["bytes"][way] / row["bytes"]["PPO"]) for way in WAYS]
        cells = [f"{x:.1f}%" for x in saved]
        if "7B" not in model:
            stands(names[account], *cells)
        elif account == "float32, Adam":
            stands("the same, the 7B model", *cells)
        else:
            [other] = plan["Qwen2.5-3B", account]
            more = [100 * (1 - other["bytes"][way] / other["bytes"]["PPO"]) for way in WAYS]
            assert all(0.5 < x - y < 2 for x, y in zip(more, saved))  # "one to two points less"


def test_claim_4_measured_memory_is_that_of_the_table():
    measured = grouped([row for row in raw("claims_ppo_grpo") if row["part"] == "measured"], "size")
    assert len(measured) == 3
    for (size,), rows in measured.items():
        used = {row["way"]: row["memory"]["peak"] - row["memory"]["before"] for row in rows}
        less = [f"{used[way] / 1e6:,.0f} ({100 * (1 - used[way] / used['PPO']):.0f}%" for way in WAYS]
        stands(
            size,
            f"{used['PPO'] / 1e6:,.0f}",
            f"{less[0]} less)" if size == "26M" else f"{less[0]})",
            f"{less[1]})",
            f"{less[2]})",
        )


def test_claim_4_truth_kl_and_time_on_the_task():
    ends = grouped([row for row in raw("claims_ppo_grpo") if row["part"] == "learn"], "way")
    assert [len(rows) for rows in ends.values()] == [5, 5, 5]
    ends = {way: sorted(rows, key=lambda row: row["seed"]) for (way,), rows in ends.items()}
    for way, rows in ends.items():
        after = {name: [row["after"][name] for row in rows] for name in ("gold", "scores", "kl", "length")}
        stands(way, spread(after["gold"], 3), spread(after["scores"], 2), spread(after["kl"], 1))
        seconds, peak = median(row["seconds"] for row in rows), median(row["memory"]["peak"] for row in rows)
        assert f"| {median(after['length']):.1f} | {seconds:.1f} | {peak / 1e6:.0f} |" in PAGE
    pairs = list(zip(ends["PPO"], ends["GRPO"]))
    lead = [ppo["after"]["gold"] - grpo["after"]["gold"] for ppo, grpo in pairs]
    assert sum(x > 0 for x in lead) == 4 and all(0.015 < x < 0.105 for x in lead if x > 0)
    assert all(ppo["after"]["kl"] < grpo["after"]["kl"] for ppo, grpo in pairs)
    times = [grpo["seconds"] / ppo["seconds"] for ppo, grpo in pairs]
    assert (round(min(times), 2), round(max(times), 2)) == (0.49, 0.65)


def supervised(kind):
    """{seed: [evaluation before, evaluation after]} of the runs with this supervision."""
    runs = grouped([row for row in raw("grpo_seeds") if "eval/pass@1" in row], "run")
    found = {run.split("-")[1]: [rows[0], rows[-1]] for (run,), rows in runs.items() if run.startswith(kind)}
    assert len(found) == 5
    return found


def medians(runs, name):
    return [median(run[end][f"eval/{name}"] for run in runs.values()) for end in (0, 1)]


def test_claim_5_process_supervision_is_no_better_than_outcome():
    outcome, process = supervised("outcome"), supervised("process")
    assert [round(x, 3) for x in medians(outcome, "pass@1")] == [0.426, 0.933]
    assert round(medians(process, "pass@1")[1], 3) == 0.937
    lead = [process[seed][1]["eval/pass@1"] - outcome[seed][1]["eval/pass@1"] for seed in outcome]
    assert sum(x > 0 for x in lead) == 3 and max(map(abs, lead)) < 0.005


@pytest.fixture(scope="module")
def arms():
    """{arm: {seed: pass@1 at steps 0, 10 and 20}} of claims 6, 7 and 9."""
    found = {}
    for row in raw("claims_grpo"):
        found.setdefault(row["arm"], {})[row["seed"]] = [value for _, value in row["eval/pass@1"]]
    assert all(len(curves) == 5 for curves in found.values())
    return found


def gains(arms, arm, other="GRPO"):
    """What each seed ends with, less what the other arm ends with from the same start."""
    return [curve[-1] - arms[other][seed][-1] for seed, curve in arms[arm].items()]


def learned(arms, arm, shown):
    """The row of an arm: pass@1 after 10 steps, after 20, and less GRPO's."""
    curves = list(arms[arm].values())
    half = f"{median(curve[1] for curve in curves):.3f}"
    stands(shown, half, spread([curve[2] for curve in curves], 3))
    if arm != "GRPO":
        gain = f"{mean(gains(arms, arm)):+.3f}".replace("-", "−")
        assert f"| {shown} | {half} | {spread([curve[2] for curve in curves], 3)} | {gain} (" in PAGE


def test_claim_6_online_beats_offline_and_grpo_does_not_beat_online_rft(arms):
    learned(arms, "offline RFT", "RFT")
    learned(arms, "online RFT", "online RFT")
    learned(arms, "GRPO", "GRPO")
    assert f"{median(curve[0] for curve in arms['GRPO'].values()):.3f}" == "0.413"
    assert min(gains(arms, "online RFT", "offline RFT")) > 0
    assert mean(gains(arms, "online RFT")) > 0


def test_claim_7_a_renewed_reference_helps_if_beta_is_large(arms):
    learned(arms, "GRPO", "none (β 0)")
    for arm in ("β 0.04, fixed", "β 0.04, renewed", "β 0.4, fixed", "β 0.4, renewed"):
        learned(arms, arm, arm)
    large = gains(arms, "β 0.4, renewed", "β 0.4, fixed")
    assert min(large) > 0 and round(mean(large), 3) == 0.063
    assert round(mean(gains(arms, "β 0.04, renewed", "β 0.04, fixed")), 3) == 0.003
    assert 0.6 < mean(large) / -mean(gains(arms, "β 0.4, fixed")) < 0.7  # "two thirds of that loss"


def test_claim_8_both_maj_and_pass_rise():
    outcome = supervised("outcome")
    assert [f"{x:.2f}" for x in medians(outcome, "maj@8")] == ["0.54", "0.99"]
    assert [f"{x:.2f}" for x in medians(outcome, "pass@8")] == ["0.88", "0.99"]
    assert [round(100 * (1 - x)) for x in medians(outcome, "pass@8")] == [12, 1]


def test_claim_9_large_groups_learn_less_from_as_many_samples(arms):
    for size in (2, 4, 16, 32, 64):
        own = gains(arms, f"groups of {size}")
        gain = f"{mean(own):+.3f}".replace("-", "−")
        shown = spread([curve[2] for curve in arms[f"groups of {size}"].values()], 3)
        assert f"\n| {size} | {shown} | {gain} (" in PAGE
        assert abs(mean(own)) < 0.01 if size < 8 else mean(own) < -0.02
    skipped = grouped(raw("claims_grpo"), "arm")
    for size in (2, 4, 8, 16, 32, 64):
        rows = skipped["GRPO" if size == 8 else f"groups of {size}",]
        share = f"{median(mean(row['groups/zero_variance']) for row in rows):.2f}"  # as the command rounds it
        seconds = f"{median(row['cpu_seconds'] for row in rows):.0f}"
        [line] = [line for line in PAGE.splitlines() if line.startswith(f"| {size} | 0.")]
        assert line.endswith(f"| {100 * float(share):.0f}% | {seconds} |")


def test_claim_10_what_keeps_the_truth_up():
    arms = grouped([row for row in raw("claims_hacking") if "arm" in row], "arm")
    assert len(arms) == 15 and all(len(rows) == 5 for rows in arms.values())
    gold = {arm: sorted(row["after"]["gold"] for row in rows) for (arm,), rows in arms.items()}
    assert median(gold["β 0"]) < 0.01 and median(gold["β 0.01"]) > 0.98 and median(gold["β 0.05"]) > 0.97
    assert gold["β 0.01"][0] < 0.01 < 0.8 < gold["ensemble, β 0.01"][0] and median(gold["ensemble, β 0"]) < 0.25
    assert median(gold["length penalty, β 0.01"]) < 0.23
    learning = gold["reward model goes on learning, β 0"]
    assert learning[0] > 0.58 and median(learning) > 0.97
    best = {arm: sorted(max(x["gold"] for x in row["curve"]) for row in rows) for (arm,), rows in arms.items()}
    for arm, shown in (
        ("PPO-max, β 0", "PPO-max's choices but its KL penalty"),
        ("three of four layers frozen, β 0", "three of four layers frozen"),
        ("energy penalty, β 0", "energy penalty, η 0.1"),
        ("bottleneck, β 0", "bottleneck of 8 dimensions"),
    ):
        stands(shown, ", ".join(f"{x:.2f}" for x in gold[arm]))
    assert gold["PPO-max, β 0"][0] > 0.6
    for row in arms["bottleneck, β 0",]:
        assert (row["after"]["outliers"] > 10) == (row["after"]["gold"] < 0.1)
    assert best["β 0"][0] < 0.4 and best["β 0.05"][0] > 0.9 and best["β 0, a third of the learning rate"][0] > 0.79


def test_claim_11_weights_of_questions_and_lengths_of_answers():
    rows = raw("claims_normalisation")
    weight = {
        (row["group_size"], row["p"]): row["weight"]
        for row in rows
        if row["part"] == "question" and row["scale_by_std"]
    }
    assert {weight[2, p] for p in (0.01, 0.5, 0.9)} == {1.0}  # at G = 2 the bias does not exist
    for size in (8, 64):
        stands(size, *(f"{weight[size, p]:.2f}" for p in (0.5, 0.05, 0.01)))
    right = {(row["group_size"], row["scale_by_std"]): row["right"] for row in rows if row["part"] == "shared"}
    assert right[2, True] == right[2, False] == right[8, False] == right[64, False] == 0.7736
    assert (right[8, True], right[64, True]) == (0.7723, 0.7601)
    found = {row["reduction"]: row for row in rows if row["part"] == "length"}
    for reduction in ("sequence", "token", "constant"):
        wrong, short = found[reduction]["long_of_wrong"], 1 - found[reduction]["long_of_right"]
        assert f"| {100 * wrong:.0f}% | {100 * short:.0f}% |" in PAGE


def test_claim_12_how_far_bfloat16_weights_go():
    rows = raw("claims_bf16")
    whole = {(row["rate"], row["seed"]): row["way"] for row in rows if row["kind"] == "float32"}
    own = grouped([{**row, "share": row["way"] / whole[row["rate"], row["seed"]]} for row in rows], "kind", "rate")
    for rate, shown in ((1e-7, "1e-7"), (1e-6, "1e-6"), (1e-5, "1e-5"), (1e-4, "1e-4"), (1e-3, "1e-3")):
        nearest, random = own["bfloat16", rate], own["bfloat16, random", rate]
        assert len(nearest) == len(random) == 5
        moved = 100 * mean(row["moved"] for row in nearest)
        stands(shown, f"{100 * median(row['share'] for row in nearest):.1f}%", f"{moved:.1f}%".replace("100.0", "100"))
        assert abs(median(row["share"] for row in random) - 1) < 0.02


def test_claim_13_values_gradients_and_optima_of_the_estimators():
    rows = raw("claims_kl_estimators")
    values = {(row["mu"], row["estimator"]): row for row in rows if row["part"] == "value"}
    names = ("k1", "k2", "k3")
    assert [values[0.1, k]["bias_by_true"] for k in names] == [0, 0.0025, 0]
    assert [values[1.0, k]["bias_by_true"] for k in names] == [0, 0.25, 0]
    assert [round(values[0.1, k]["deviation_by_true"], 2) for k in names] == [20, 1.42, 1.42]
    assert [round(values[1.0, k]["deviation_by_true"], 1) for k in names] == [2, 1.7, 1.7]
    found = grouped([row for row in rows if row["part"] != "value"], "part", "place", "estimator")
    assert all(len(own) == 10 for own in found.values())
    for (part, place, estimator), own in found.items():
        [line] = [line for line in PAGE.splitlines() if line.startswith(f"| {place} | {estimator} |")]
        if part == "gradient":
            assert f"| {100 * median(row['error'] for row in own):.0f}% |" in line
        else:
            ends = spread([row["curve"][-1][1] for row in own], 3)
            assert line.endswith(f"| {ends} | {median(row['kl_to_ref'] for row in own):.2f} |")
    assert round(median(row["least_log10"] for row in found["training", "reward", "k3"])) == -217


def test_claim_14_an_old_sampler_without_a_correction_unlearns():
    found = {}
    for row in raw("claims_grpo_stale"):
        found.setdefault(row["arm"], {})[row["seed"]] = [value for _, value in row["eval/pass@1"]]
    assert len(found) == 11 and all(len(curves) == 5 for curves in found.values())
    for age in (4, 8):
        alone = found[f"{age} steps old"]
        assert all(curve[-1] < curve[0] for curve in alone.values())
        by_token, by_sequence = (gains(found, f"{age} steps old, by {level}") for level in ("token", "sequence"))
        assert max(gains(found, f"{age} steps old")) < -0.3
        assert -0.15 < mean(by_token) < -0.05 and -0.04 < mean(by_sequence) < 0
        for name, shown in (("", ""), (", by sequence", ", `--sampler-correction sequence`")):
            ends = [curve[-1] for curve in found[f"{age} steps old{name}"].values()]
            gain = f"{mean(gains(found, f'{age} steps old{name}')):+.3f}".replace("-", "−")
            stands(f"{age} steps old{shown}", spread(ends, 3), gain)
    assert max(map(abs, gains(found, "bfloat16"))) < 0.03


def test_claim_15_a_calculator_starts_better_and_ends_no_better():
    runs = grouped([row for row in raw("grpo_tools") if "eval/pass@1" in row], "run")
    assert len(runs) == 5
    before, after = ([rows[i]["eval/pass@1"] for rows in runs.values()] for i in (0, -1))
    plain = [row for row in raw_lines("processors_grpo") if row["set"] == "own"]
    assert len(plain) == 5 and min(before) > max(row["pass@1 before"] for row in plain)
    assert f"| {min(before):.3f} to {max(before):.3f} | {min(after):.3f} to {max(after):.3f} |" in PAGE
    ends = [row["pass@1"] for row in plain]
    assert f"| {min(ends):.3f} to {max(ends):.3f} |" in PAGE and mean(after) < mean(ends)
