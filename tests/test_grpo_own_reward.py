"""--reward: the functions of a file of the user's are the reward. --system: a turn before every prompt."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from contract import ROOT
from transformers import AutoTokenizer

# As TRL's GRPOTrainer takes them, to the letter: the first three are those of its documentation (TRL 1.16).
TRL = '''
import re

from transformers import TrainerState


def reward_len(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def format_reward(completions, **kwargs):
    """Reward function that checks if the completion has a specific format."""
    pattern = r"^<think>.*?</think><answer>.*?</answer>$"
    completion_contents = [completion[0]["content"] for completion in completions]
    matches = [re.match(pattern, content) for content in completion_contents]
    return [1.0 if match else 0.0 for match in matches]


def math_reward_func(prompts, completions, task, **kwargs):
    return [1.0 if t == "math" else None for t in task]


async def async_reward(prompts, completions, completion_ids, task, trainer_state, log_metric, log_extra, **kwargs):
    log_extra("task", task)
    log_metric("seen", len(completions))
    return [float(trainer_state.global_step) for _ in completion_ids]
'''
CHAT = "{% for m in messages %}({{ m['role'][0] }}{{ m['content'] }}){% endfor %}="


@pytest.fixture
def own(tiny_grpo, tmp_path):
    """own(code, …): Args of a run with these functions as the reward, on rows without answers."""

    def make(code, name="run", rows=None, chosen="", **changes):
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        rows = rows or [{"prompt": f"{i}+1", "level": i % 3} for i in range(20)]
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        reward = f"{tmp_path / f'{name}.py'}{chosen}"
        defaults = {"task": "jsonl", "data": str(data), "instruction": None, "length_weight": 0.0, "reward": reward}
        return tiny_grpo(name, **{**defaults, **changes})

    return make


def watch_rewards(grpo, monkeypatch):
    """(group, rating) of all that is rated."""
    rated, rate_group = [], grpo.rate_group

    def watched(args, group, *others):
        rated.append((group, rate_group(args, group, *others)))
        return rated[-1][1]

    monkeypatch.setattr(grpo, "rate_group", watched)
    return rated


def problems_of(grpo, args):
    return [problem for part in grpo.load_problems(args) for problem in part]


def group_of(grpo, problem, *texts):
    ids, mask = torch.tensor([[5, 6, 7]] * len(texts)), torch.tensor([[1, 1, 0]] * len(texts))
    return grpo.Group(problem, [3], ids, torch.zeros(ids.shape), mask, list(texts))


def rewards_of(grpo, args, *groups, step=0):
    """{name: rewards of all completions}"""
    found = [dict(group.own_rewards) for group in grpo.with_own_rewards(args, list(groups), step)]
    return {name: torch.cat([rewards[name] for rewards in found]).tolist() for name in found[0]}


ONE_WORD = """
def one_word_reward(prompt, completion, answer, **row):
    assert answer is None and set(row) == {"level"} and prompt.endswith("+1")
    return len(completion) % 3 + row["level"] / 10


def short_reward(completion):
    return -0.5 * ("1" in completion)


def helper(completion):
    return 1 / 0


def _private_reward(completion):
    return 1 / 0
"""


def test_a_run_without_answers(grpo, own, command, monkeypatch, capsys):
    """Two functions add up, instead of the verifier. Each has a curve. Evaluations have their mean and no accuracy."""
    rated = watch_rewards(grpo, monkeypatch)
    args = own(ONE_WORD, eval_every=1)
    metrics = grpo.train(args)
    out = capsys.readouterr().out
    assert f"reward      one_word_reward, short_reward of {args.reward}\n" in out
    assert "            20 problems have no answer that can be compared" in out and "right is" not in out
    assert re.search(r"held-out problems +before +after\n  reward  +-?\d", out) and "greedy" not in out
    assert len(rated) == 6
    for group, rating in rated:
        level = dict(group.problem.columns)["level"]
        expected = [[len(text) % 3 + level / 10, -0.5 * ("1" in text)] for text in group.texts]
        assert rating.parts.keys() == {"one_word_reward", "short_reward"}
        torch.testing.assert_close(torch.stack([*rating.parts.values()], 1), torch.tensor(expected))
        torch.testing.assert_close(rating.rewards, torch.tensor(expected).sum(1))
    for row, step in ((metrics[1], rated[:3]), (metrics[2], rated[3:])):
        for name in ("one_word_reward", "short_reward"):
            mean = float(torch.cat([rating.parts[name] for _, rating in step]).mean())
            assert row[f"reward/{name}"] == pytest.approx(mean) and "reward/verifier" not in row
    for row in metrics:
        assert [name for name in row if name.startswith("eval/")] == ["eval/reward"]
    assert len({rating.rewards.std() for _, rating in rated}) > 1


def test_the_reward_of_an_evaluation(grpo, own, monkeypatch):
    """The mean over the samples; accuracies are those of the problems that have an answer."""
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b"}, {"prompt": "c", "answer": ["1"]}]
    args = own("def reward(completion, answer):\n    return float(completion) if answer else None\n", rows=rows)
    args = grpo.replace(args, eval_problems=1, prompts_per_step=1, eval_samples=4, eval_k=1)
    problems = sorted(problems_of(grpo, args))
    assert [problem.answer for problem in problems] == ["1", None, None]
    texts = {"a": ["1", "1", "0", "3"], "b": ["9"] * 4, "c": ["2", "3", "0", "2"]}

    def sample_groups(args, model, tokenizer, eos_ids, chosen, group_size, temperature, names):
        return [group_of(grpo, problem, *texts[problem.prompt][:group_size]) for problem in chosen]

    monkeypatch.setattr(grpo, "sample_groups", sample_groups)
    row = grpo.mean_over_ranks(grpo.evaluate(args, torch.nn.Module(), None, None, problems))
    expected = {"eval/reward": 12 / 12, "eval/greedy": 1.0, "eval/pass@1": 0.5, "eval/maj@1": 0.5}
    assert row == pytest.approx(expected)


JUDGE = """
import time

SIZES = []


def judge_reward(prompts, completions, level, **kwargs):
    time.sleep(0.01)
    SIZES.append((len(prompts), len(completions), len(level)))
    return [len(completion) * x for completion, x in zip(completions, level)]
"""


def test_a_slow_judge_is_called_once_a_rollout(grpo, own):
    """With the completions of all groups together: 4 × 2 in an evaluation, 3 × 4 in a step."""
    args = own(JUDGE, eval_samples=2)
    grpo.train(args)
    assert grpo.own_functions(args.reward)["judge_reward"].__globals__["SIZES"] == [(n,) * 3 for n in (8, 12, 12, 8)]


def test_functions_of_trl_run_unchanged(grpo, own):
    """Every column is a list, completions of messages are messages, an async function is awaited."""
    messages = [{"role": "user", "content": "2+2?"}]
    rows = [{"prompt": messages, "task": "math", "answer": 4}, {"prompt": "1+1?", "task": "other"}]
    args = own(TRL, rows=rows, chosen=":format_reward,math_reward_func,async_reward", prompts_per_step=1)
    problems = {problem.prompt: problem for problem in problems_of(grpo, args)}
    chat, text = problems["user: 2+2?"], problems["1+1?"]
    found = rewards_of(grpo, args, group_of(grpo, chat, "<think>x</think><answer>y</answer>", "no"), step=3)
    assert found == {"format_reward": [1, 0], "math_reward_func": [1, 1], "async_reward": [3, 3]}
    assert grpo.logged_metrics() == {"logged/seen": 2.0} and grpo.logged_metrics() == {}
    args = grpo.replace(args, reward=args.reward.replace("format_reward", "reward_len"))
    found = rewards_of(grpo, args, group_of(grpo, text, "abc", ""), step=None)
    assert found["reward_len"] == [3, 0] and found["async_reward"] == [3, 3]
    assert all(x != x for x in found["math_reward_func"]) and grpo.logged_metrics() == {}


def test_the_call_is_that_of_trl(grpo, own, monkeypatch):
    """TRL's own method and this script give a function the same arguments, but for the trainer's state."""
    trainer = pytest.importorskip("trl", reason="trl is not installed").GRPOTrainer
    code = (
        "CALLS = []\n\n\ndef reward(completions, **kwargs):\n    CALLS.append(dict(kwargs, completions=completions))\n"
    )
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2?"}]
    rows = [{"prompt": messages, "answer": 4, "more": [1]}, {"prompt": messages * 2, "answer": "5", "more": None}]
    args = own(f"{code}    return [0.0] * len(completions)\n", rows=rows, prompts_per_step=1, eval_problems=1)
    problems = problems_of(grpo, args)
    groups = [group_of(grpo, problem, "a", "b") for problem in problems]
    function = grpo.own_functions(args.reward)["reward"]
    grpo.with_own_rewards(args, groups, 0)
    inputs = [row for problem in problems for row in rows for _ in range(2) if row["prompt"] == [*problem.messages]]

    class Trainer:
        accelerator = type("", (), {"device": "cpu"})
        state = args = None
        reward_funcs, reward_processing_classes, reward_func_names = [function], [None], ["reward"]
        environments, _log_completion_extra, _log_metric = None, None, None

    completions = [[{"role": "assistant", "content": text}] for text in ("a", "b", "a", "b")]
    monkeypatch.setattr(sys.modules[trainer.__module__], "profiling_context", lambda *_: grpo.nullcontext())
    monkeypatch.setattr(sys.modules[trainer.__module__], "gather", lambda x: x, raising=False)
    prompts = [row["prompt"] for row in inputs]
    trainer._calculate_rewards.__wrapped__(Trainer(), inputs, prompts, completions, [[5, 6]] * 4)
    ours, theirs = function.__globals__["CALLS"]
    assert ours.keys() == theirs.keys() and len(ours) == 8
    for name in ours.keys() - {"trainer_state", "log_metric", "log_extra"}:
        assert ours[name] == theirs[name], name


def test_none_does_not_apply(grpo, own, monkeypatch):
    """It adds nothing, and is left out of the curve's mean. Where it never applies there is no point of the curve."""
    code = "def reward_a(completion, level):\n    return None if level == 1 else 1.0\n\n\n"
    code += (
        "def reward_b(completions):\n    return [0.25] * len(completions)\n\n\ndef reward_c(answer):\n    return None\n"
    )
    rated = watch_rewards(grpo, monkeypatch)
    metrics = grpo.train(own(code, prompts_per_step=6))
    levels = [dict(group.problem.columns)["level"] for group, _ in rated]
    assert 1 in levels[:6] and levels[:6] != [1] * 6
    for level, (_, rating) in zip(levels, rated, strict=True):
        assert rating.rewards.tolist() == [0.25 if level == 1 else 1.25] * 4
    for row in metrics[1:]:
        assert row["reward/reward_a"] == 1.0 and row["reward/reward_b"] == 0.25 and "reward/reward_c" not in row


PROBLEM = "problem '{}+1', completion"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "def reward(completion):\n    return float('nan')\n",
            "reward gave nan, and a finite number or None is needed",
        ),
        ("def reward(completion):\n    return '1'\n", "reward gave '1', and a finite number or None is needed"),
        ("def reward(completions):\n    return [1e400] * len(completions)\n", "reward gave inf, and a finite number"),
        (
            "def reward(completions):\n    return [1] * 7\n",
            "reward gave a list of 7, and a list of 8 rewards is needed",
        ),
        ("def reward(completions):\n    return 1.0\n", "reward gave 1.0, and a list of 8 rewards is needed"),
        ("def reward(completions):\n    return 'abcdefgh'\n", "reward gave 'abcdefgh', and a list of 8"),
        ("def reward(completion):\n    a = 1\n    return a / 0\n", "line 3: reward raised ZeroDivisionError: division"),
        ("import json\n\ndef reward(completions):\n    json.loads('{')\n", "line 4: reward raised JSONDecodeError: "),
        ("async def reward(completion):\n    raise KeyError(1)\n", "line 2: reward raised KeyError: 1"),
        ("def reward(completion):\n    exit(3)\n", "line 2: reward raised SystemExit: 3"),
    ],
    ids=["nan", "text", "inf", "too-few", "a-number", "letters", "raises", "raises-in-a-library", "async", "exit"],
)
def test_what_is_no_reward(grpo, own, command, code, message):
    """One sentence that names file, line, function, problem and value; exit status 2."""
    args = own(code)
    given = {**vars(args), "instruction": None, "system": None}
    words = [f"--{name.replace('_', '-')}={x}" for name, x in given.items() if x != getattr(grpo.Args(), name)]
    words = [word for word in words if not word.startswith(("--scale", "--fast"))]
    status, _, error = command(*words)
    line = error.splitlines()[-1]
    assert status == 2 and line.startswith(f"error: --reward {args.reward}") and "Traceback" not in error
    assert message in line and re.search(r"problem '\d+\+1', completion '", line)


@pytest.mark.parametrize(
    ("code", "chosen", "message"),
    [
        (None, "", "there is no such file"),
        ("def reward(:\n", "", "line 1 cannot be imported: SyntaxError"),
        ("x = 1\n1 / 0\n", "", "line 2 cannot be imported: ZeroDivisionError"),
        ("import sys\nsys.exit(1)\n", "", "line 2 cannot be imported: SystemExit: 1"),
        ("def score(completion):\n    return 1\n", "", "defines no function whose name begins or ends with reward"),
        ("from os.path import join as join_reward\n", "", "defines no function whose name begins or ends with reward"),
        ("def reward(completion):\n    return 1\n", ":reward,other", "has no function other"),
        ("def mean(completion):\n    return 1\n", ":mean", "rename mean, because reward/mean is another curve"),
        (
            "def reward(text):\n    return 1\n",
            "",
            "reward is given by name answer, completion, level, prompt: missing a required argument: 'text'",
        ),
        (
            "def reward(completion, solution):\n    return 1\n",
            "",
            "missing a required argument: 'solution'",
        ),
        ("def reward(completions, solution, **k):\n    return 1\n", "", "missing a required argument: 'solution'"),
        ("def reward(completion, /):\n    return 1\n", "", "reward is given by name answer, completion"),
    ],
)
def test_files_that_are_refused(grpo, own, tmp_path, code, chosen, message):
    """Before anything is written."""
    args = own(code or "", chosen=chosen)
    if code is None:
        (tmp_path / "run.py").unlink()
    with pytest.raises(grpo.InputError, match=re.escape(message)) as error:
        grpo.train(args)
    assert str(error.value).startswith(f"--reward {tmp_path / 'run.py'}") and "\n" not in str(error.value)
    assert not Path(args.run_dir).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "rewards"}, "reward must be a file such as rewards.py"),
        ({"reward": "rewards.py:"}, "reward must be a file such as rewards.py"),
        ({"reward": ""}, "reward must not be empty"),
        ({"reward": "r.py", "supervision": "process"}, "takes the place of the verifier"),
        ({"reward": "r.py", "algorithm": "rft"}, "takes the place of the verifier"),
        (
            {"reward": "r.py", "reward_model": "m", "reward_model_steps": 1, "reference_every": 1},
            "takes the place of the verifier",
        ),
        ({"system": "s"}, "system s is for a model; the small one has no chat form"),
    ],
)
def test_settings_that_do_not_fit(grpo, changes, message):
    with pytest.raises(ValueError, match=message):
        grpo.Args(**changes)


def test_imported_functions_are_taken_if_they_are_named(grpo, own):
    """As those of trl.rewards are; a file may import its neighbours."""
    args = own("from run_helper import given_reward\n", chosen=":given_reward")
    Path(args.reward.rpartition(":")[0]).with_name("run_helper.py").write_text(
        "def given_reward(completion):\n    return 2\n", encoding="utf-8"
    )
    grpo.load_problems(args)
    assert rewards_of(grpo, args, group_of(grpo, grpo.Problem("1+1", None), "x")) == {"given_reward": [2]}


def test_answers_reach_the_functions_as_they_are(grpo, own):
    """A number stays a number, a list stays a list, and columns that a row lacks are None; gsm8k's is the number."""
    code = "def reward(prompt, answer, tags=0):\n    return (prompt, answer, tags) in (('a', 7, 1), ('b', [1], None))\n"
    rows = [{"prompt": "a", "answer": 7, "tags": 1}, {"prompt": "b", "answer": [1]}]
    args = own(code, rows=rows, prompts_per_step=1)
    problems = sorted(problems_of(grpo, args))
    assert [problem.answer for problem in problems] == ["7", None]
    assert rewards_of(grpo, args, *(group_of(grpo, problem, "x") for problem in problems)) == {"reward": [1, 1]}
    gsm8k = grpo.replace(args, task="gsm8k")
    problem = grpo.read_problem(gsm8k, {"question": "a", "answer": "<<3+4=7>>7\n#### 7", "tags": 2})
    assert problem.answer == "7" and problem.columns == (("tags", 2),)


def test_own_rewards_and_other_rewards_add_up(grpo, own, monkeypatch):
    rated = watch_rewards(grpo, monkeypatch)
    grpo.train(own("def reward(completion):\n    return 1\n", steps=1, length_weight=1.0, truncated="penalise"))
    for group, rating in rated:
        expected = 1 - group.mask.sum(-1) / 10 - rating.is_truncated.float()
        torch.testing.assert_close(rating.rewards, expected)
        assert rating.parts.keys() == {"length", "truncation", "reward"}


def test_a_run_is_resumed_from_another_directory(grpo, own, tmp_path, monkeypatch):
    """The path of the file is stored whole. Another file would be another run."""
    args = own("def reward(completion):\n    return len(completion)\n", steps=2, checkpoint_every=1)
    monkeypatch.chdir(tmp_path)
    args = grpo.replace(args, reward="run.py")
    assert args.reward == str(tmp_path / "run.py")
    whole = grpo.train(args)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    content = torch.load(Path(args.run_dir) / "checkpoint.pt", weights_only=True)
    torch.save({**content, "step": 1, "metrics": content["metrics"][:2]}, Path(args.run_dir) / "checkpoint.pt")
    resumed = grpo.train(grpo.resumed_args(args.run_dir))
    assert [row["step"] for row in resumed] == [0, 1, 2]
    assert resumed[1] == whole[1] and resumed[2]["eval/reward"] != whole[0]["eval/reward"]
    with pytest.raises(grpo.InputError, match="--resume keeps the run's own reward"):
        grpo.load_checkpoint(grpo.replace(grpo.resumed_args(args.run_dir), reward="other.py"))


def test_the_rewards_of_the_small_model(grpo, own, tmp_path):
    """Without --model: its sums have answers, so the accuracies are there too."""
    code = "def reward(prompt, completion, answer):\n    return int(eval(prompt)) == int(answer) and len(completion)\n"
    args = own(code, model=None, task="arithmetic", data=None, warm_start_steps=1, steps=1)
    metrics = grpo.train(args)
    assert metrics[1]["reward/reward"] > 1 and {"eval/reward", "eval/greedy"} <= metrics[1].keys()


# ---- --system ----


@pytest.fixture
def tiny_chat(tiny_lm, tmp_path):
    """The tiny model with a chat template that shows the first letter of each role."""
    shutil.copytree(tiny_lm, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "chat")
    return str(tmp_path / "chat")


def test_a_system_turn_comes_before_texts_and_messages(grpo, tiny_grpo, tiny_chat):
    args = tiny_grpo(model=tiny_chat, system="12", task="jsonl", data="d", instruction=None)
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    messages = (
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "5"},
    )
    for problem, text in (
        (grpo.Problem("7", "1"), "(u7)="),
        (grpo.Problem("", "1", messages=messages), "(u3)(a4)(u5)="),
    ):
        for system, before in (("12", "(s12)"), (None, ""), ("", "(s)")):
            own = grpo.replace(args, system=system)
            expected = tokenizer(before + text, add_special_tokens=False)["input_ids"]
            assert grpo.encode_prompt(own, tokenizer, problem) == expected
            shown = grpo.answers_of(own, group_of(grpo, problem, "x"), torch.tensor([False]))[0][0]  # a reward model
            is_text = system is None and not problem.messages
            assert shown == ("7" if is_text else grpo.messages_of(own, problem))


def test_a_second_system_turn_is_refused(grpo, tiny_grpo, tmp_path):
    row = {"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "answer": 1}
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(row)}\n", encoding="utf-8")
    args = tiny_grpo(task="jsonl", data=str(tmp_path / "d.jsonl"), instruction=None, system="c")
    with pytest.raises(grpo.InputError, match=r"line 1: --system adds a system turn, and this prompt has one: {'role'"):
        grpo.load_problems(args)


def test_a_model_without_a_chat_template_has_no_system_turn(grpo, tiny_grpo):
    args = tiny_grpo(system="a")
    with pytest.raises(grpo.InputError, match=r"--system needs a chat template, and .*tiny_lm.* has none"):
        grpo.train(args)
    assert not Path(args.run_dir).exists()


# ---- The example of the page ----


def test_the_example_of_the_page(grpo, own):
    """docs/4_grpo.md shows a file rewards.py: a reward for one-word answers, and a judge that gets lists."""
    page = (ROOT / "docs" / "4_grpo.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"An example of `rewards\.py`:\n\n```py\n(.*?)```", page, re.DOTALL)
    args = own(code, rows=[{"prompt": str(i), "answer": "Paris"} for i in range(20)])
    problems, _ = grpo.load_problems(args)
    found = rewards_of(grpo, args, group_of(grpo, problems[0], "Paris", "It is Paris", "x"))
    assert found == {"one_word_reward": [1, 0, 1], "judge_reward": [1, 1, 0]}


@pytest.mark.slow
def test_looking_at_a_run_with_an_own_reward(grpo, own, monkeypatch, capsys, tmp_path):
    """Samples, --verbose, --evaluate and --ask where no problem has an answer, and one reward does not apply."""
    lines = "def some_reward(completion):\n    return len(completion) % 2 or None\n"
    lines += "def reward(completion, hint):\n    return 0.5\n"
    rows = [{"prompt": f"{i}+1", "hint": "h"} for i in range(20)]
    args = grpo.replace(own(lines, rows=rows), verbose=True, steps=1, max_tokens=8)
    grpo.train(args)
    kept = [json.loads(line) for line in (Path(args.run_dir) / "samples.jsonl").read_text().splitlines()]
    found = {x["rewards"]["some_reward"] for row in kept for x in row["completions"]}
    assert found == {None, 1.0} and all(row["answer"] is None for row in kept)
    assert "right is" not in capsys.readouterr().out

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["grpo_llm.py", *words])
        grpo.main()
        return capsys.readouterr().out

    out = command("--evaluate", args.run_dir, args.run_dir)
    assert re.search(r"reward +\d\.\d{3} \(.*\+0\.000 \(", out) and "greedy" not in out
    out = command("--ask", "3+1", "--model", args.run_dir)  # its row has the hint
    assert out.count("reward ") >= 5 and "not known:" not in out
    out = command("--ask", "who?", "--model", args.run_dir)  # this question has none
    assert "reward      not known: --reward" in out and out.count("tokens") == 5
