"""grpo_llm.py without training: --evaluate, --ask, --eval-data, and the commands that a run proposes at its end."""

import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

SUMS = [{"prompt": f"{i}+{j}", "answer": i + j} for i in range(5) for j in range(6)]


@pytest.fixture
def settings(grpo, monkeypatch):
    """settings(words): the Args of a command line, with what a run that it names adds."""

    def parse(*words):
        monkeypatch.setattr(sys, "argv", ["grpo_llm.py", *map(str, words)])
        return grpo.parse_args()

    return parse


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def small_run(grpo, tmp_path_factory):
    """(directory, metrics) of a run of the small model, shortened; its directory has a space."""
    run_dir = tmp_path_factory.mktemp("runs of grpo") / "run"
    sizes = {"terms": 2, "num_problems": 60, "steps": 1, "warm_start_steps": 25, "max_tokens": 12, "eval_every": 0}
    sizes |= {"prompts_per_step": 2, "group_size": 4, "eval_problems": 8, "eval_samples": 4, "eval_k": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "draw_curves", lambda metrics, path: None)
        return run_dir, grpo.train(grpo.Args(**sizes, learning_rate=0.05, length_weight=0.5, run_dir=str(run_dir)))


def means(scores):
    found = {f"eval/{name}": sum(row[name] for row in scores) / len(scores) for name in scores[0]}
    return {name: x for name, x in found.items() if not math.isnan(x)}  # there is no --reward


def own_scores(metrics):
    return {name: value for name, value in metrics.items() if name.startswith("eval/")}


# ---- Evaluate ----


def test_a_run_of_the_small_model_scores_what_its_summary_says(grpo, small_run, settings, capsys):
    """Before and after: the same problems, prompts without an instruction, the same noise."""
    run_dir, metrics = small_run
    before, after = grpo.compare_models(settings("--evaluate", run_dir / "start", run_dir))
    assert means(before) == own_scores(metrics[0]) and means(after) == own_scores(metrics[-1])
    assert means(before) != means(after), "the two policies differ, or this shows little"
    out = capsys.readouterr().out
    assert f"problems    all 8 that the run of {run_dir}/start held out" in out and "chosen" not in out
    cells = re.search(
        r"^  pass@1 +(\S+) \(\S+ to \S+\) +(\S+) \(\S+ to \S+\) +(\S+) \(\S+ to \S+\)$", out, re.MULTILINE
    )
    a, b = metrics[0]["eval/pass@1"], metrics[-1]["eval/pass@1"]
    assert cells.groups() == (f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}")


@pytest.mark.parametrize("lora", [0, 4])
def test_a_run_of_a_real_model_scores_what_its_summary_says(grpo, tiny_grpo, settings, lora):
    """Beside the model that it started from; an adapter is evaluated as it was trained, not merged."""
    args = tiny_grpo("a run", lora_rank=lora, learning_rate=0.05, eval_samples=8)
    metrics = grpo.train(args)
    before, after = grpo.compare_models(settings("--evaluate", args.model, args.run_dir))
    assert means(before) == own_scores(metrics[0]) and means(after) == own_scores(metrics[-1])


def test_evaluation_uses_the_runs_own_settings_but_for_those_given(grpo, tiny_grpo, settings):
    args = tiny_grpo(steps=1, instruction="Say {}", seed=3)
    grpo.train(args)
    found = settings("--eval-samples", "5", "--evaluate", args.run_dir, "--terms=3")  # a k of 8 would not fit in 5
    assert (found.instruction, found.seed, found.eval_samples, found.terms) == ("Say {}", 3, 5, 3)
    assert (found.model, found.run_dir, found.evaluate) == (None, None, (args.run_dir,))


def test_without_a_run_all_problems_of_a_file_are_used(grpo, tiny_lm, settings, tmp_path, capsys):
    """And what only a training run needs is neither chosen nor counted."""
    data = write_rows(tmp_path / "d.jsonl", SUMS)
    words = ["--evaluate", tiny_lm, "--task", "jsonl", "--data", data, "--eval-samples", 2, "--eval-k", 2]
    (scores,) = grpo.compare_models(settings(*words))
    assert len(scores) == len(SUMS)
    out = capsys.readouterr().out
    assert f"problems    all 30 of {data}\n" in out and "--max-tokens 33" in out
    assert not re.search("--learning-rate|--optimizer|--group-size|--prompts-per-step|--gradient", out)
    args = settings(*words, "--eval-problems", "7")
    assert len(grpo.problems_to_evaluate(args, [(tiny_lm, None)])) == 7
    assert f"problems    --eval-problems 7 of the 30 of {data}\n" in capsys.readouterr().out


def test_a_bar_shows_how_far_the_evaluation_is(grpo, tiny_lm, settings, tmp_path, bars):
    """It moves after as many problems as are sampled at once, and the scores do not depend on how many those are."""
    data = write_rows(tmp_path / "d.jsonl", SUMS)
    words = "--evaluate", tiny_lm, "--task", "jsonl", "--data", data, "--dtype", "float32"
    (rows,) = grpo.compare_models(settings(*words, "--generate-rows", 16))
    (at_once,) = grpo.compare_models(settings(*words))
    bar = bars[0]
    assert (bar.n, bar.options["desc"], len(rows)) == (30, "evaluate", 30)
    assert str(rows) == str(at_once) and any(row["greedy"] or row["pass@1"] for row in rows)  # as text nan equals nan


def test_problems_that_a_named_run_learned_from_are_left_out(grpo, tiny_grpo, settings, tmp_path, capsys):
    """Two runs with other seeds held out other problems. Only those that neither learned from compare them."""
    data = write_rows(tmp_path / "d.jsonl", SUMS)
    runs = [tiny_grpo(f"r{seed}", task="jsonl", data=data, seed=seed, steps=1, eval_problems=15) for seed in (1, 2)]
    held_out = [{problem.prompt for problem in grpo.load_problems(args)[1]} for args in runs]
    for args in runs:
        grpo.train(args)
    args = settings("--evaluate", *(run.run_dir for run in runs))
    capsys.readouterr()
    found = grpo.problems_to_evaluate(args, [grpo.policy_of(name) for name in args.evaluate])
    assert {problem.prompt for problem in found} == held_out[0] & held_out[1] and 0 < len(found) < 15
    assert f"{15 - len(found)} are left out because {runs[1].run_dir} learned from them" in capsys.readouterr().out
    new = write_rows(tmp_path / "new.jsonl", [*SUMS, {"prompt": "9+9", "answer": 18}])
    args = settings("--evaluate", runs[0].run_dir, "--data", new, "--eval-problems", 20)
    found = grpo.problems_to_evaluate(args, [grpo.policy_of(name) for name in args.evaluate])
    assert {problem.prompt for problem in found} == held_out[0] | {"9+9"}


def test_a_prompt_beyond_the_context_of_one_model_is_asked_of_none(grpo, tiny_lm, settings, tmp_path, capsys):
    data = write_rows(tmp_path / "d.jsonl", [*SUMS[:4], {"prompt": "1+" * 120 + "1", "answer": 121}])
    words = ["--evaluate", tiny_lm, "--task", "jsonl", "--data", data, "--eval-samples", 2, "--eval-k", 2]
    assert len(grpo.compare_models(settings(*words))[0]) == 4
    out = capsys.readouterr().out
    assert (
        f"{tiny_lm}: 1 of 5 prompts, up to " in out and "and --max-tokens 35 exceed the model's context of 256" in out
    )


@pytest.mark.parametrize(
    ("scores", "low", "high"),
    [
        ([1.0] * 8 + [0.0] * 2, 0.4902, 0.9433),  # Wilson's for 8 of 10
        ([1.0] * 10, 0.7225, 1.0),
        ([0.0] * 10, 0.0, 0.2775),
        ([0.25] * 50 + [0.75] * 50, 0.4512, 0.5488),  # a standard deviation of 1/4: as 400 problems of yes or no
    ],
)
def test_intervals_of_a_mean(grpo, scores, low, high):
    assert grpo.interval(scores) == pytest.approx((low, high), abs=1e-4)


def test_intervals_of_a_paired_difference(grpo):
    """Of 100 problems, 10 that only B solves and 2 that only A solves: Agresti and Min's 13/102 − …; never 0 wide."""
    low, high = grpo.paired_interval([1.0] * 10 + [-1.0] * 2 + [0.0] * 88)
    mean, half = 8 / 102, 1.96 * (((10.5 + 2.5) / 102 - (8 / 102) ** 2) / 102) ** 0.5
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=1e-12)
    low, high = grpo.paired_interval([0.0] * 10)
    assert low == -high and high > 0.1


# ---- Held-out problems of one's own ----


def test_prompts_of_the_evaluation_file_are_not_learned_from(grpo, tiny_grpo, tmp_path, capsys):
    """All the others are, and held out are those of the file, by --eval-problems."""
    data = write_rows(tmp_path / "d.jsonl", SUMS)
    eval_data = write_rows(tmp_path / "e.jsonl", [*SUMS[:6], {"prompt": "9+9", "answer": 18}])
    args = tiny_grpo(task="jsonl", data=data, eval_data=eval_data, eval_problems=5, steps=1)
    learned, held_out = grpo.load_problems(args)
    asked = {row["prompt"] for row in SUMS[:6]}
    assert {problem.prompt for problem in learned} == {row["prompt"] for row in SUMS} - asked and len(learned) == 24
    assert len(held_out) == 5 and {problem.prompt for problem in held_out} <= asked | {"9+9"}
    out = capsys.readouterr().out
    assert "problems    24 to learn from, 5 held out\n" in out
    assert f"6 are left out because they stand in --eval-data {eval_data} too" in out
    assert grpo.train(args)[-1]["step"] == 1


def test_gsm8k_is_learned_from_train_and_evaluated_on_test(grpo, monkeypatch):
    import datasets

    def load_dataset(name, config, split, streaming):
        return [{"question": f"{split} {i}", "answer": f"#### {i}"} for i in range(20)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    learned, held_out = grpo.load_problems(grpo.Args(task="gsm8k", model="m", eval_problems=15))
    assert {problem.prompt.split()[0] for problem in learned} == {"train"} and len(learned) == 20
    assert {problem.prompt.split()[0] for problem in held_out} == {"test"} and len(held_out) == 15
    args = grpo.Args(task="gsm8k", evaluate=("m",))
    assert {p.prompt.split()[0] for p in grpo.problems_to_evaluate(args, [("m", None)])} == {"test"}


def test_an_evaluation_file_with_every_problem(grpo, tiny_grpo, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", SUMS)
    with pytest.raises(grpo.InputError, match=r"of 30 with different prompts 30 stand in --eval-data .* too"):
        grpo.load_problems(tiny_grpo(task="jsonl", data=data, eval_data=data))
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(grpo.InputError, match=r"--eval-data .*empty.jsonl holds no problem"):
        grpo.load_problems(tiny_grpo(task="jsonl", data=data, eval_data=empty))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "1"}\n')
    with pytest.raises(grpo.InputError, match=r"--eval-data .*broken.jsonl, line 1: task jsonl needs rows"):
        grpo.load_problems(tiny_grpo(task="jsonl", data=data, eval_data=str(broken)))


# ---- Ask ----


def test_answers_have_their_own_log_probability(grpo, tiny_grpo, settings, capsys):
    """The greedy one, then four samples. ln π is the sum over the tokens of one forward pass, at a temperature."""
    args = tiny_grpo(steps=1, temperature=0.7)
    grpo.train(args)
    groups, sample_groups = [], grpo.sample_groups
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "sample_groups", lambda *given: groups.extend(sample_groups(*given)) or groups[-1:])
        answers = grpo.ask_policy(settings("--ask", "2+3", "--model", args.run_dir))
    assert [name for name, *_ in answers] == ["greedy", *(f"sample {i}" for i in range(1, 5))]
    model = AutoModelForCausalLM.from_pretrained(Path(args.run_dir) / "policy")
    rows = [(group.prompt, row[:n]) for group in groups for row, n in zip(group.tokens, group.mask.sum(-1).tolist())]
    for (_, _, _, logprob, length, _), (prompt, row) in zip(answers, rows, strict=True):
        ids = torch.tensor([[*prompt, *row.tolist()]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(-1, row[:, None]).sum()
        assert logprob == pytest.approx(float(expected), abs=1e-3) and logprob < -0.1 and length == len(row)
    best = answers[0]
    out = capsys.readouterr().out
    assert out.index("right is    5\n") < out.index(f"greedy      reward {best[2]:.2f}  ln π {best[3]:.2f} nats")


def test_rewards_are_given_where_the_answer_is_known(grpo, tiny_grpo, monkeypatch, settings, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [*SUMS, {"prompt": "capital", "answer": "#7"}])
    args = tiny_grpo(task="jsonl", data=data, steps=1, length_weight=0.0)
    grpo.train(args)
    known = {"#7": 1.0, "19": 1.0}
    monkeypatch.setattr(grpo, "reward_parts", lambda args, problem, *_: {"verifier": known.get(problem.answer, 0.0)})
    for question, reward in (("capital", 1.0), ("12+3+4", 1.0), ("3+4", 0.0), ("city", None)):
        answers = grpo.ask_policy(settings("--ask", question, "--model", args.run_dir))
        assert [answer[2] for answer in answers] == [reward] * 5


@pytest.mark.parametrize(
    ("task", "text", "prompt", "answer"),
    [
        ("arithmetic", "12 + 3+4 = ?", "12+3+4", "19"),
        ("arithmetic", "What is 2*(3-5)?", "2*(3-5)", "-4"),
        ("arithmetic", "7/2", "7/2", "7/2"),
        ("arithmetic", "1/0", "1/0", ""),
        ("arithmetic", "9**9**9", "9**9**9", ""),
        ("arithmetic", "__import__('os').getpid()", "__import__('os').getpid()", ""),
        ("arithmetic", "42", "42", ""),
        ("arithmetic", " Why? ", "Why?", ""),
        ("countdown", "3, 4, 5=17", "3,4,5=17", "17"),
    ],
)
def test_what_is_asked_is_parsed(grpo, task, text, prompt, answer):
    problem = grpo.asked_problem(grpo.Args(task=task, ask=text, model="m"))
    assert (problem.prompt, problem.answer) == (prompt, answer)
    assert problem.numbers == ((3, 4, 5) if task == "countdown" else ())


def test_a_question_that_is_no_sum_is_asked_as_it_stands(grpo, tiny_lm, settings, capsys):
    for question, asked in (("2+3", "What is 2+3?"), ("(2", "(2")):
        grpo.ask_policy(settings("--ask", question, "--model", tiny_lm, "--max-tokens", 3))
        assert f"asked       {asked}\n" in capsys.readouterr().out


def test_the_newest_run_is_asked(grpo, small_run, settings, tmp_path, monkeypatch, capsys):
    """In runs, of this script. One that has not ended has no policy."""
    import os
    import shutil

    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(grpo.InputError, match="the directory runs holds no finished run"):
        settings("--ask", "1+1")
    for number, name in enumerate(("old", "new", "of another script", "stopped")):
        shutil.copytree(small_run[0], tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "policy", (number, number))
    torch.save({"args": {"gamma": 1.0}}, tmp_path / "runs" / "of another script" / "checkpoint.pt")
    shutil.rmtree(tmp_path / "runs" / "stopped" / "policy")
    args = settings("--ask", "1+1")
    assert args.model == "runs/new" and "run         runs/new, the newest in runs\n" in capsys.readouterr().out
    assert len(grpo.ask_policy(args)) == 5
    with pytest.raises(grpo.InputError, match="runs/stopped is a run that has no policy yet"):
        settings("--ask", "1+1", "--model", "runs/stopped")


def test_answers_cannot_steer_the_terminal(grpo, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    grpo.print_answers("q", "", [("greedy", "a\x1b[2Jb\n" + "word " * 30, None, -1.25, 9, False)])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "right is    not known" in out
    assert "greedy      ln π -1.25 nats  9 tokens, not ended\n    a\ufffd[2Jb\n    word word" in out
    assert max(map(len, out.splitlines())) <= 60


# ---- From one command to the next ----


def test_the_commands_at_the_end_of_a_run_can_be_pasted(grpo, small_run, tmp_path, capsys, command):
    """Also where the directory has a space, and for a prompt that a shell would take apart."""
    run_dir, metrics = small_run
    args = grpo.load(run_dir / "checkpoint.pt")["args"]
    held_out = [grpo.Problem("1" * 90, "1"), grpo.Problem("(2+3)*4", "20")]
    grpo.print_summary(args, run_dir, metrics, held_out, [], 1.0)
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].startswith("next        python ") and lines[1].startswith("            python ")
    ask, evaluate = (shlex.split(line[12:])[1:] for line in lines)
    assert ask == ["grpo_llm.py", "--ask", "(2+3)*4", "--model", str(run_dir)]
    assert evaluate == ["grpo_llm.py", "--evaluate", str(run_dir / "start"), str(run_dir)]
    for words, shown in ((ask, "right is    20\n"), (evaluate, f"model B     {run_dir}\n")):
        status, out, error = command(*words[1:])
        assert status == 0 and shown in out, error


def test_a_run_of_a_real_model_can_be_trained_further(grpo, tiny_grpo, small_run, settings):
    args = tiny_grpo(steps=1)
    grpo.train(args)
    assert settings("--model", args.run_dir).model == f"{args.run_dir}/policy"
    for name in ("", "start", "policy"):
        with pytest.raises(grpo.InputError, match="is the small model of a run"):
            settings("--model", small_run[0] / name)
    start = str(small_run[0] / "start")  # it reads the problem alone
    assert settings("--model", start, "--instruction", "{}").model == start


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--evaluate", "m", "--ask", "q"], "is a separate command: it does not go with ask q"),
        (["--evaluate", "m", "--run-dir", "r"], "trains nothing: it does not go with run_dir r"),
        (["--ask", "q", "--resume", "r"], "ask q trains nothing: it does not go with resume r"),
        (["--evaluate", "m", "--model", "n"], "--evaluate takes the names of all models: write n behind it"),
        (["--evaluate", "m", "--task", "jsonl"], "task jsonl needs data"),
        (["--evaluate", ""], "evaluate must not be empty, got ('',)"),
        (["--ask", ""], "ask must not be empty, got ''"),
        (["--eval-data", "e"], "eval_data e is read for task gsm8k and jsonl: it does not go with task arithmetic"),
        (["--evaluate", "/nowhere/at/all"], "there is no directory /nowhere/at/all"),
        (["--ask", "3,4", "--task", "countdown", "--model", "m"], "task countdown wants numbers and a target"),
    ],
)
def test_bad_flags(command, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    status, out, error = command(*words)
    assert status == 2 and message.replace(" ", "") in re.sub(r"[\s│]", "", out + error)
    assert "Traceback" not in error and not list(tmp_path.iterdir())


def test_the_small_model_refuses_letters(small_run, command):
    status, _, error = command("--ask", "Why?", "--model", small_run[0])
    assert status == 2 and "the small model reads only the characters" in error and "found '?'" in error


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--ask", " ", "--model", "m"], "ask must not be empty"),
        (["--ask", "-3+4", "--model", "m"], "needs an equals sign, such as --ask=-3+4"),
        (["--ask", "1+1", "--model", "/tmp/no such/model"], "there is no directory /tmp/no such/model"),
        (["--evaluate", "EMPTY", "m"], "holds no model: it has no config.json"),
        (["--model", "EMPTY"], "holds no model: it has no config.json"),
        (
            ["--model", "m", "--task", "jsonl", "--data", "EMPTY/none"],
            "--data EMPTY/none is no file of JSON lines in UTF-8: No such file",
        ),
    ],
)
def test_one_sentence_for_what_cannot_be(grpo, tmp_path, monkeypatch, capsys, words, sentence):
    empty = str(tmp_path / "empty")
    Path(empty).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["grpo_llm.py", *(word.replace("EMPTY", empty) for word in words)])
    with pytest.raises(SystemExit) as ended:
        grpo.main()
    captured = capsys.readouterr()
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", captured.out + captured.err).split())
    assert ended.value.code == 2 and sentence.replace("EMPTY", empty) in text and "Traceback" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
