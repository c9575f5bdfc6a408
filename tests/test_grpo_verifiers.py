"""Verifiers, rewards of steps and the scores of an evaluation: exact, safe and quick whatever a model writes."""

import csv
import json
import re
import sys
import threading
import time
from fractions import Fraction
from itertools import combinations

import pytest
from contract import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"  # real material, of which nothing is in the project
SOLUTIONS = GSM8K.with_name("example_model_solutions.jsonl")
with (ROOT / "tests" / "answers.tsv").open(encoding="utf-8", newline="") as file:
    ANSWERS = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))  # ⏎ stands for the end of a line


@pytest.fixture
def sum_problem(grpo):
    return grpo.Problem("28000+80", "28080", ("28080", "28080"))


@pytest.fixture
def countdown(grpo):
    return grpo.Problem("3,4,6=18", "18", (), "", (3, 4, 6))


# ---- Numbers ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("28080", 28080),
        ("28,080", 28080),
        ("−28080", -28080),
        ("-28,080.50", Fraction(-56161, 2)),
        ("$1.50", Fraction(3, 2)),
        ("-$3", -3),
        ("0.1", Fraction(1, 10)),
        (".5", Fraction(1, 2)),
        ("007", 7),
        ("", None),
        ("1,2", None),
        ("1e5", 100_000),
        ("1.5 × 10^{-3}", Fraction(3, 2000)),
        ("2^10", 1024),
        ("1/2", Fraction(1, 2)),
        ("-1\\frac{1}{2}", Fraction(-3, 2)),
        ("1{,}000", 1000),
        ("1 000", 1000),
        ("50%", 50),
        ("1/0", None),
        ("0^-1", None),
        ("10:30", None),
        ("3 ", None),
        ("٣", None),
        ("²", None),
        ("x", None),
        ("--3", None),
        ("9" * 41, None),
    ],
)
def test_as_number(grpo, text, value):
    assert grpo.as_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("first 12, then #28,080", 28080),
        ("12+34=46\n46-56=-10\n#-10", -10),
        ("it is 5-3", 3),
        ("it is 5 - -3", -3),
        ("(4)-3", 3),
        ("x=-3", -3),
        ("= −28080", -28080),
        ("That makes $1,234.50.", Fraction(2469, 2)),
        ("72.", 72),
        ("between 3 and 4, no: 3,4", 4),
        ("1,2345", 2345),
        ("The answer is .5", Fraction(1, 2)),
        ("none", None),
        ("", None),
        ("7 and ٣", 7),
        ("12345" + "x" * 1998, None),  # the window's edge cuts no number into one that was never written
        ("12345" + "x" * 1995, 12345),
    ],
)
def test_last_number(grpo, text, value):
    assert grpo.last_number(text) == value


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "${}", "{}.00"]), st.sampled_from("-−"))
def test_a_number_as_people_write_it(grpo, number, form, minus):
    text = ("" if number >= 0 else minus) + form.format(abs(number))
    assert grpo.as_number(text) == number
    assert grpo.last_number(f"so 7 − 1 = {text}.\n") == number


# ---- Right and wrong ----


@pytest.mark.parametrize(
    ("completion", "is_right"),
    [
        ("#28080", True),
        ("#28,080", True),
        ("#28080.00", True),
        ("I get $28,080.", True),
        ("1 2 3 28080", True),
        ("#−28080", False),
        ("#-28080", False),
        ("28080, no, 7", False),  # the last answer counts
        ("#28081", False),
        ("#280,80", False),
        ("", False),
        ("#２８０８０", False),
    ],
)
def test_numbers_are_compared_as_numbers(grpo, sum_problem, completion, is_right):
    assert grpo.is_right(sum_problem, completion) is is_right


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(6-3)*4", 12),
        ("6*3*4", 72),
        ("6×4÷3", 8),
        ("4/(6/3)", 2),
        (" 4−3 + 6 ", 7),
        ("3/4/6", Fraction(1, 8)),
        ("6*3", None),  # each number once
        ("6*3+4-4+4", None),
        ("6**3+4", None),
        ("6//3+4", None),
        ("63+4", None),
        ("6/(4-4)*3", None),
        ("-6+3+4", None),
        ("6(3)+4", None),
        ("(6,3,4)", None),
        ("06+3+4", None),
        ("6+3+4)", None),
        ("6+3+0x4", None),
        ("6+3+4.0", None),
        ("__import__", None),
        ("", None),
    ],
)
def test_countdown_value(grpo, expression, value):
    assert grpo.countdown_value(expression, (3, 4, 6)) == value


def test_division_by_zero(grpo):
    assert grpo.countdown_value("6/(3-3)", (3, 3, 6)) is None


def test_countdown_answers(grpo, countdown):
    for completion in ("(6+3)*4/2\n6*4-(3*2)\n(6*3)*4/4", "18", "6*3=18", "6*3+4"):
        assert not grpo.is_right(countdown, completion), completion
    right = grpo.Problem("3,4,6=21", "21", (), "", (3, 4, 6))
    assert grpo.is_right(right, "let me see\n(3+4)*6/2 no\n (6-4)*3 no\n3*4+6 no\n(3+4)*(6/2)") is False
    assert grpo.final_answer(right, "try 3*4\n6*4-3 = 21") == 21
    assert grpo.is_right(right, "try 3*4\n6*4-3 = 21\n")
    assert not grpo.is_right(right, "6*4-3\nthat is it")  # the last line is the answer


def test_generated_problems_have_right_solutions(grpo):
    """What the warm start learns from: right by the verifiers, each line worth its reward."""
    for task, options in (("arithmetic", {"operators": "+-", "terms": 4}), ("countdown", {"terms": 4, "max_term": 20})):
        args = grpo.Args(task=task, num_problems=200, eval_problems=20, **options)
        learned, held_out = grpo.load_problems(args)
        assert len(held_out) == 20 and len(learned) > 150
        assert not {p.prompt for p in learned} & {p.prompt for p in held_out}
        for problem in learned:
            assert grpo.is_right(problem, problem.solution), problem
            if task == "arithmetic":
                rewards, _ = grpo.step_rewards_of(problem, problem.solution)
                assert rewards == [1.0] * 4, problem
                assert not grpo.is_right(problem, f"#{int(problem.answer) + 1}")


# ---- The table of answers ----


def test_the_table_is_large_and_has_both_verdicts_of_every_kind():
    assert len(ANSWERS) >= 400 and {row["right"] for row in ANSWERS} == {"yes", "no"}
    kinds = {row["kind"] for row in ANSWERS}
    assert len(kinds) >= 20
    for kind in kinds - {"empty", "hedges", "negations"}:
        assert {row["right"] for row in ANSWERS if row["kind"] == kind} == {"yes", "no"}, kind


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in ANSWERS}))
def test_answers_are_judged_as_the_table_says(grpo, kind):
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install math-verify")
    wrong = []
    for row in ANSWERS:
        if row["kind"] == kind:
            problem = grpo.Problem("?", row["answer"])
            grpo.check_answer(problem)
            if grpo.is_right(problem, row["completion"].replace("⏎", "\n")) is not (row["right"] == "yes"):
                wrong.append(row)
    assert not wrong


@pytest.mark.parametrize("answer", ["", " ", "...", "$$", "**", "\\boxed{}", '""', "a" * 2001])
def test_an_answer_that_nothing_could_match_is_refused(grpo, answer):
    with pytest.raises(grpo.InputError, match="nothing could match the answer"):
        grpo.check_answer(grpo.Problem("?", answer))


@pytest.mark.parametrize("answer", ["Two lines\nof a poem", "The answer is", "it's", "18", "1e16", "?!x", "a" * 2000])
def test_an_answer_matches_itself(grpo, answer):
    grpo.check_answer(grpo.Problem("?", answer))
    assert not grpo.is_right(grpo.Problem("?", answer), "another")


def test_equal_answers_are_one_vote(grpo):
    number, word = grpo.Problem("?", "18"), grpo.Problem("?", "Paris")
    assert len({grpo.final_answer(number, text) for text in ("18", "It is $18.00.", "\\boxed{18}", "36/2")}) == 1
    assert len({grpo.final_answer(word, text) for text in ("Paris", "It is Paris.", "**paris**")}) == 1
    assert grpo.final_answer(word, "London") not in (None, grpo.final_answer(word, "Paris"))
    assert grpo.final_answer(word, "...") is None and grpo.final_answer(number, "none") is None


def test_expressions_without_math_verify(grpo, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    grpo.math_verifier.cache_clear()
    problem = grpo.Problem("?", "x + 1")
    with pytest.raises(grpo.InputError, match="pip install math-verify"):
        grpo.check_answer(problem)
    grpo.check_answer(grpo.Problem("?", "Paris"))
    assert grpo.is_right(problem, "$x+1$")  # equal texts need no library


def test_mathematics_in_a_thread(grpo):
    """Limits of time by signals work in the main thread alone."""
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install math-verify")
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(grpo.is_right(grpo.Problem("?", "a^2-b^2"), "(a+b)(a-b)")))
    thread.start()
    thread.join(60)
    assert verdicts == [True]


def test_mathematics_is_bounded_in_time_and_length(grpo):
    """A tower of powers is one product of integers that no signal stops. After it the next formula is judged."""
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install math-verify")
    problem = grpo.Problem("?", "x^2-1")
    assert grpo.is_right(problem, "(x-1)(x+1)")
    started = time.perf_counter()
    assert not grpo.is_right(problem, "x+9^{9^{9^{9}}}")
    assert time.perf_counter() - started < 20  # 3 seconds, on a machine that may be busy
    assert grpo.is_right(problem, "(1+x)(x-1)")
    started = time.process_time()
    assert not grpo.is_right(problem, "(x-1)(x+1)" + "+0" * 50_000)
    assert time.process_time() - started < 0.1


# ---- Steps ----


def test_steps_of_a_solution(grpo):
    """Each line by its last number; what a right solution does not come to, or came to before, is worth nothing."""
    problem = grpo.Problem("12+34-56", "-10", ("46", "-10", "-10"))
    for completion, rewards, lines in (
        ("12+34=46\n46-56=-10\n#-10", [1, 1, 1], [0, 1, 2]),
        ("12+34=46\n12+34=46\n#-10", [1, 0, 1], [0, 1, 2]),
        ("12+34=45\n\n45-56=-11\n#-10\n", [0, 0, 1], [0, -1, 1, 2, -1]),  # consistent with its own mistake
        ("#-10\n#-10\n#-10", [1, 1, 0], [0, 1, 2]),  # -10 is in the solution twice
        ("46-56=10", [0], [0]),
        ("well\n46", [0, 1], [0, 1]),
        ("", [], [-1]),
        (" \n", [], [-1, -1]),
    ):
        assert grpo.step_rewards_of(problem, completion) == (rewards, lines), completion


def test_reward_parts_add_up(grpo, sum_problem):
    options = {"format_weight": 0.3, "length_weight": 0.5, "truncated": "penalise", "truncation_penalty": 2.0}
    args = grpo.Args(max_tokens=10, **options)
    parts = grpo.reward_parts(args, sum_problem, "80+28000=28080\n#28080", 4, True)
    assert parts == {"verifier": 1.0, "format": 0.3, "length": -0.2, "truncation": -2.0}
    parts = grpo.reward_parts(args, sum_problem, "28080 #", 10, False)
    assert parts == {"verifier": 1.0, "format": 0.0, "length": -0.5, "truncation": 0.0}
    assert grpo.reward_parts(grpo.Args(), sum_problem, "#1", 4, True) == {"verifier": 0.0}


# ---- pass@k, maj@k ----


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_by_enumeration(grpo, n):
    """The share of all choices of k samples out of n that hold a right one."""
    for right in range(n + 1):
        outcomes = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            choices = list(combinations(outcomes, k))
            expected = sum(map(any, choices)) / len(choices)
            assert grpo.pass_at_k(n, right, k) == pytest.approx(expected, abs=1e-12), (n, right, k)


def test_majority_at_k(grpo):
    """Ballots of k answers in a row; ties go to the first; no answer has no vote."""
    answers = [7, 5, 7, 5, 5, 7, None, None, 7]
    right = [answer == 7 for answer in answers]
    assert grpo.majority_at_k(answers, right, 3) == 2 / 3  # 7 | 5 | 7
    assert grpo.majority_at_k(answers, right, 2) == 2 / 4  # 7, 5: the first | 7, 5 | 5, 7 | none
    assert grpo.majority_at_k(answers, right, 1) == pytest.approx(4 / 9)
    assert grpo.majority_at_k([None] * 3, [False] * 3, 3) == 0


# ---- Hostile text ----

HOSTILE = {
    "digits": "9" * 20_000,
    "parentheses": "(" * 20_000,
    "commas": "1," * 9_000,
    "thousands": "1" + ",111" * 4_900 + "1",
    "numbers": "1 " * 10_000,
    "points": ".5" * 10_000,
    "hashes": "#" * 5_000,  # 20,000 for a pattern of quadratic time would be half a minute
    "hashes and spaces": "# " * 10_000,
    "signs": "-" * 20_000,
    "dollars": "$" * 20_000,
    "power": "9**9**9",
    "tower": "9**" * 6_000 + "9",
    "nested": "(" * 49 + "3" + ")" * 49,
    "minuses": "3-" * 49 + "4",
    "calls": "3(4)(6)",
    "unicode digits": "٣߃३" * 5_000,
    "full width": "９" * 20_000,
    "nulls": "\x00" * 20_000,
    "separators": "\u2028\x85\x0b" * 6_000,
    "surrogate": "\ud800 3",
    "import": "__import__('os').system('true')",
    "halves": "²½" * 10_000,
    "boxes": "\\boxed{" * 3_000,
    "dots": ". " * 10_000,
    "quotes": "'" * 20_000,
    "exclamations": "!" * 20_000,
    "lead-ins": "so the answer is " * 1_000,
    "fractions": "1 1/2 " * 4_000,
    "fractions of LaTeX": "\\frac{1}{2}" * 2_000,
    "texts of LaTeX": "\\text{" * 3_000,
    "exponents": "9^99" * 5_000,
    "exponents of ten": "9e999 " * 3_000,
}


def rate(grpo, problems, text):
    """Everything that a completion goes through, with every reward switched on; seconds of the quickest of three."""
    args = grpo.Args(max_tokens=10, format_weight=1.0, length_weight=1.0)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        for problem in problems:
            grpo.reward_parts(args, problem, text, 10, True)
            grpo.final_answer(problem, text)
            grpo.step_rewards_of(problem, text)
        seconds.append(time.process_time() - started)
    return min(seconds)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions(grpo, sum_problem, countdown, name):
    """No exception, a few milliseconds, and never right."""
    text, word = HOSTILE[name], grpo.Problem("?", "Paris")
    assert rate(grpo, [sum_problem, countdown], text) < 0.1
    assert rate(grpo, [word], text) < 0.1
    for problem in (sum_problem, countdown, word):
        assert not grpo.is_right(problem, text)
        assert not any(grpo.step_rewards_of(problem, text)[0])


def test_ten_thousand_lines(grpo, sum_problem):
    """The dearest text there is costs some microseconds a line."""
    assert rate(grpo, [sum_problem], "1\n" * 10_000) < 0.2


PIECES = r"""
\frac{ } { ( ) [ ] ^ _ $ \boxed{ \text{ \sqrt{ √ 9 1 , 000 .5 / 1/2 e9 ×10^ ^{9 - − ** ` # = ½ ² % ' ” ! ? .. x \pi ∞
\left \\ \int_0^1 9**9 ^9^9^9 \binom{ é 答案是 Paris not or 18 10:30 {,} ~ \( \] if
"""
PIECES = [*PIECES.split(), " ", "\n", "\x00", "\ud800", "The answer is "]


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.text(max_size=200),
        st.text(alphabet="0123456789+-*/()., =#$\n−×÷e", max_size=300),
        st.lists(st.sampled_from(PIECES), max_size=60).map("".join),
        st.tuples(st.text(max_size=4), st.integers(1, 20_000)).map(lambda pair: (pair[0] * pair[1])[:20_000]),
    )
)
def test_no_text_raises(grpo, text):
    problems = [grpo.Problem("q", "28080", ("28080",)), grpo.Problem("q", "18", (), "", (3, 4, 6))]
    problems.append(grpo.Problem("q", "Paris"))
    assert rate(grpo, problems, text) < 0.3
    for problem in problems:
        assert grpo.is_right(problem, text) in (True, False)
    rewards, lines = grpo.step_rewards_of(problems[0], text)
    assert len(lines) == len(text.split("\n")) and set(rewards) <= {0.0, 1.0} and sum(rewards) <= 1
    assert [line for line in lines if line >= 0] == list(range(len(rewards)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([piece for piece in PIECES if "9^9" not in piece]), max_size=20).map("".join))
def test_no_formula_raises(grpo, text):
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install math-verify")
    for answer in ("x^2+1", "(2,3)", "\\sqrt{2}", "x=5"):
        assert grpo.is_right(grpo.Problem("q", answer), text) in (True, False)


# ---- Problems from files ----


def test_read_problem(grpo):
    args = grpo.Args(task="gsm8k", model="m")
    answer = "He sold 48/2 = <<48/2=24>>24.\nSo 48+24 = <<48+24=72>>72 in all.\n#### 72"
    problem = grpo.read_problem(args, {"question": "How many?", "answer": answer})
    assert problem.prompt == "How many?" and problem.answer == "72" and problem.values == ("24", "72", "72")
    assert problem.solution == "He sold 48/2 = 24.\nSo 48+24 = 72 in all.\n#### 72"
    args = grpo.Args(task="jsonl", model="m", data="d")
    assert grpo.read_problem(args, {"prompt": " 1+1 ", "answer": 2, "more": 0}) == grpo.Problem("1+1", "2")
    for bad in ({"prompt": "1+1"}, ["prompt", "answer"], 3, None):
        with pytest.raises(grpo.InputError, match="needs rows with prompt and answer, found"):
            grpo.read_problem(args, bad)
    with pytest.raises(grpo.InputError, match="needs #### before the answer"):
        grpo.read_problem(grpo.Args(task="gsm8k", model="m"), {"question": "q", "answer": "72"})


@pytest.mark.skipif(not GSM8K.exists(), reason=f"no {GSM8K}: GSM8K's training problems lie there")
def test_gsm8k_solutions(grpo):
    """Every gold solution is right, and wrong with another end; every worked line that ends in its own result, and
    that result for the first time, earns its reward. (Lines without a result, one in ten, earn nothing.)"""
    args = grpo.Args(task="gsm8k", model="m")
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 7000
    earned = lines = whole = 0
    for row in rows:
        problem = grpo.read_problem(args, row)
        assert grpo.is_right(problem, problem.solution), row
        assert not grpo.is_right(problem, problem.solution + "1"), row
        rewards, _ = grpo.step_rewards_of(problem, problem.solution)
        earned, lines = earned + sum(rewards), lines + len(rewards)
        worked = [line for line in row["answer"].split("####")[0].split("\n") if line.strip()]
        results = [re.search(r"=([^=<>]*)>>\s*\$?([\d,.]+?)\D*$", line) for line in worked]
        if all(results) and all(result[1] == result[2] for result in results):
            whole += 1
            assert all(rewards), row
    assert whole > 2000 and earned / lines > 0.89


@pytest.mark.skipif(not SOLUTIONS.exists(), reason=f"no {SOLUTIONS}: github.com/openai/grade-school-math publishes it")
def test_published_solutions_are_judged_as_labelled(grpo):
    """5,276 solutions by four models, each labelled right or wrong by its publisher."""
    judged = []
    for line in SOLUTIONS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        problem = grpo.Problem(row["question"], row["ground_truth"].rpartition("A: ")[2].strip())
        for solution in row.values():
            if isinstance(solution, dict):
                judged.append((solution["is_correct"], grpo.is_right(problem, solution["solution"])))
    assert len(judged) == 5276 and {label for label, _ in judged} == {True, False}
    assert all(label is verdict for label, verdict in judged)
