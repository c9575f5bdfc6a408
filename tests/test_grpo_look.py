"""What grpo_llm.py shows while it runs: samples.jsonl, TensorBoard's samples, --verbose, the warning, and --help."""

import json
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def samples(args):
    with open(Path(args.run_dir) / "samples.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def kept_calls(grpo, monkeypatch, name):
    """The list of what each call of the script's function `name` gives back, as it grows."""
    results, original = [], getattr(grpo, name)

    def call(*arguments):
        results.append(original(*arguments))
        return results[-1]

    monkeypatch.setattr(grpo, name, call)
    return results


def test_samples_are_what_was_learned_from(grpo, tiny_grpo, monkeypatch):
    """Two groups a step: texts, tokens, reward parts that add up, and the advantages of the update."""
    groups = kept_calls(grpo, monkeypatch, "sample_groups")
    advantages = kept_calls(grpo, monkeypatch, "advantages_of")
    args = tiny_grpo(steps=3)
    grpo.train(args)
    lines, trained = samples(args), groups[2:-2]  # the first and the last two are of the evaluations
    assert [line["step"] for line in lines] == [1, 1, 2, 2, 3, 3] and len(trained) == 3
    distinct = set()
    for i, line in enumerate(lines):
        group = trained[i // 2][i % 2]
        assert (line["prompt"], line["answer"]) == (group.problem.prompt, group.problem.answer)
        answers = line["completions"]
        assert [x["text"] for x in answers] == group.texts
        assert [x["tokens"] for x in answers] == group.mask.sum(-1).tolist()
        own = advantages[i // 2].view(3, 4)[i % 2]
        assert [x["advantage"] for x in answers] == pytest.approx(own.tolist(), abs=1e-5)
        for x, row in zip(answers, group.tokens):
            assert x["truncated"] == (1 not in row.tolist())  # 1 is the EOS of this tokenizer
            assert x["rewards"].keys() == {"verifier", "length"}
            assert sum(x["rewards"].values()) == pytest.approx(x["reward"], abs=1e-5)
            assert x["rewards"]["length"] == pytest.approx(-0.5 * x["tokens"] / 10, abs=1e-5)
        distinct |= {x["advantage"] for x in answers}
    assert len(distinct) > 5


def test_samples_of_process_supervision(grpo, tiny_grpo):
    """The advantage is the mean over the tokens of an answer; the rewards of its steps stand beside it."""
    problem = grpo.Problem("1+1", "2")
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    group = grpo.Group(problem, [1], torch.zeros(2, 4), None, mask, ["1\n2", "7"])
    rewards = torch.tensor([1.0, 0.0])
    rating = grpo.Rating(rewards, {"verifier": rewards}, torch.tensor([False, True]), [[0.0, 1.0], [0.0]], None)
    advantages = torch.tensor([[0.5, 0.5, 2.0, 9.0], [-1.0, -2.0, 9.0, 9.0]])
    args = tiny_grpo(supervision="process", length_weight=0.0)
    first, second = grpo.sample_row(args, 7, group, rating, advantages)["completions"]
    assert first["advantage"] == 1.0 and first["step_rewards"] == [0.0, 1.0]
    assert second["advantage"] == -1.5 and second["step_rewards"] == [0.0] and second["truncated"]


def test_a_resumed_run_repeats_no_sample(grpo, tiny_grpo):
    """The lines after the checkpoint, and a half line that a killed run left, are written again; the others stay."""
    args = tiny_grpo("whole", steps=4, checkpoint_every=2)
    grpo.train(args)
    whole = samples(args)
    cut = tiny_grpo("cut", steps=4, checkpoint_every=2)
    save, saved = grpo.save_checkpoint, []

    def save_once(args, run_dir, writer, progress, *rest):
        if not saved:
            save(args, run_dir, writer, progress, *rest)
        saved.append(progress["step"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "save_checkpoint", save_once)
        grpo.train(cut)
    assert saved == [2, 4] and samples(cut) == whole
    path = Path(cut.run_dir) / "samples.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 5, "prom')
    grpo.train(grpo.resumed_args(cut.run_dir))
    assert samples(cut) == whole and [line["step"] for line in whole] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_damaged_samples_are_cut_and_none_are_made_up(grpo, tmp_path):
    path = tmp_path / "samples.jsonl"
    grpo.cut_samples(path, 3)
    assert not path.exists()
    for damage in ('{"step": 4}\n', "\0\0", "[1]", '{"steps": 1}', "7"):
        path.write_text('{"step": 1}\n{"step": 3}\n' + damage, encoding="utf-8")
        grpo.cut_samples(path, 3)
        assert path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 3}\n'


def test_samples_in_tensorboard_after_each_evaluation(grpo, tiny_grpo):
    """At the steps that were evaluated and only there: the texts of samples.jsonl, as they are."""
    args = tiny_grpo(steps=5, eval_every=2, learning_rate=1e-6)
    grpo.train(args)
    events = EventAccumulator(args.run_dir)
    events.Reload()
    shown = events.Tensors("samples/text_summary")
    assert [event.step for event in shown] == [2, 4, 5]
    for event in shown:
        text = event.tensor_proto.string_val[0].decode()
        for line in samples(args):
            if line["step"] == event.step:
                assert f"{line['prompt']}    right is {line['answer']}" in text
                words = [word for x in line["completions"] for word in x["text"].splitlines()]
                assert len(words) >= 2 and {f"    {word}" for word in words} <= {*text.splitlines()}
        assert text.count("advantage") == 2 * 4 and all(x.startswith("    ") for x in text.splitlines())


def test_only_the_first_process_writes_samples(grpo, tiny_grpo, tmp_path):
    grpo.show_answers(tiny_grpo(), tmp_path, None, None, [{"step": 1}], [], [], None)
    assert not list(tmp_path.iterdir())


def rating_of(grpo, rewards):
    rewards = torch.tensor(rewards)
    return grpo.Rating(rewards, {"verifier": rewards}, torch.zeros(2).bool(), [], None)


@pytest.mark.parametrize("differ", [True, False])
def test_best_and_worst_answer_on_the_screen(grpo, tiny_grpo, tmp_path, differ):
    """Of all groups of the step, also of those that samples.jsonl leaves out; one answer if the rewards are equal."""
    problems = [grpo.Problem(f"{i}+1", str(i + 1)) for i in range(3)]
    texts = [["a", "b"], ["c", "d"], ["e\n#\x1b[2J", "f"]]
    mask = torch.ones(2, 3)
    groups = [grpo.Group(problem, [1], None, None, mask, own) for problem, own in zip(problems, texts)]
    rewards = [[0.5, 0.0], [0.5, -0.25], [1.0, 0.5]] if differ else [[0.5, 0.5]] * 3
    ratings, bar = [rating_of(grpo, own) for own in rewards], SimpleNamespace(written=[])
    bar.write = bar.written.append
    args = tiny_grpo(verbose=True, group_size=2, prompts_per_step=3)
    grpo.show_answers(args, tmp_path, object(), bar, [{"step": 4}], groups, ratings, torch.zeros(6, 3))
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2
    best = "best        step 4, reward 1.00: 2+1, right is 3\n            e / # [2J"
    worst = "worst       step 4, reward -0.25: 1+1, right is 2\n            d"
    assert bar.written == (
        [best, worst] if differ else ["all equal   step 4, reward 0.50: 2+1, right is 3\n            f"]
    )


def test_verbose_is_off_unless_it_is_wanted(grpo, tiny_grpo, bars):
    grpo.train(tiny_grpo("quiet"))
    grpo.train(tiny_grpo("loud", verbose=True))
    quiet, loud = bars
    assert quiet.written == [] and len(loud.written) >= 2
    assert {text.split(",")[0].split("step ")[1] for text in loud.written} == {"1", "2"}


# ---- The warning that nothing is learned ----


def told(grpo, tiny_grpo, shares, **changes):
    """The steps at which the warning is printed, and its text, if the groups without variance have these shares."""
    metrics, bar, steps = [{"step": 0, "eval/greedy": 0.5}], SimpleNamespace(written=[]), []
    bar.write = bar.written.append
    for step, share in enumerate(shares, start=1):
        row = {"groups/zero_variance": share, "reward/verifier": 0.97, "completion/truncated": 0.02}
        metrics.append({"step": step, **row})
        before = len(bar.written)
        grpo.warn_without_variance(tiny_grpo(**changes), bar, metrics)
        steps += [step] * (len(bar.written) - before)
    return steps, " ".join(" ".join(bar.written).split())


def test_groups_without_variance_are_told_once_a_stretch(grpo, tiny_grpo):
    steps, text = told(grpo, tiny_grpo, [1.0] * 4 + [0.5] + [0.9] * 9 + [0.89] + [1.0] * 5)
    assert steps == [10, 20]
    for words in (
        "last 5 steps",
        "97% of the answers are right and 2% are cut off",
        "harder",
        "easier",
        "--max-tokens",
    ):
        assert words in text
    page, heading = re.search(r'\((docs/\S+), "(.+?)"\)', text).groups()
    assert f"\n## {heading}\n" in (Path(__file__).parent.parent / page).read_text(encoding="utf-8")


def test_groups_with_variance_are_not_warned_of(grpo, tiny_grpo):
    assert told(grpo, tiny_grpo, [1.0, 1.0, 1.0, 1.0, 0.89] * 4) == ([], "")
    assert told(grpo, tiny_grpo, [1.0] * 6, algorithm="rft") == ([], "")  # all right: there they are imitated
    assert told(grpo, tiny_grpo, [1.0] * 6, dynamic_sampling=2)[0] == [5]


@pytest.mark.parametrize(("changes", "count"), [({"length_weight": 0.0}, 1), ({}, 0)])
def test_a_run_warns_if_it_learns_nothing(grpo, tiny_grpo, bars, monkeypatch, changes, count):
    """All answers are wrong: without a reward for the length no group has variance, with one nearly all have it."""
    monkeypatch.setattr(grpo, "is_right", lambda *_: False)
    metrics = grpo.train(tiny_grpo(steps=7, **changes))
    assert all((row["groups/zero_variance"] == 1) == bool(count) for row in metrics[1:])
    (bar,) = bars
    assert sum(text.startswith("warning     ") for text in bar.written) == count


# ---- --help ----


@pytest.fixture(params=["grpo", "rlhf"])
def script(request):
    return request.getfixturevalue(request.param)


def help_of(script, monkeypatch, capsys, columns=200, flag="--help"):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.argv", ["script.py", flag])
    with pytest.raises(SystemExit) as error:
        script.parse_args()
    assert error.value.code == 0
    return capsys.readouterr().out


def test_help_has_each_flag_under_its_heading(script, monkeypatch, capsys):
    """In the order of Args: the headings and, under each, its flags with what they take, comment and default."""
    source = Path(script.__file__).read_text(encoding="utf-8")
    source = source[source.index("class Args:") : source.index("def __post_init__")]
    out = help_of(script, monkeypatch, capsys)
    assert out == help_of(script, monkeypatch, capsys, flag="-h")
    order = re.findall(r"^ {4}(# .+|\w+(?=: ))", source, re.MULTILINE)
    shown = [
        line[2:].split(" ")[0].rstrip(",") if line.startswith("  ") else f"# {line}" for line in out.splitlines()[4:]
    ]
    shown = [word for word in shown if word not in ("", "# ")]
    assert shown == [word if word.startswith("# ") else f"--{word.replace('_', '-')}" for word in order]
    assert len(fields(script.Args)) > 50 and sum(word.startswith("# ") for word in order) >= 8
    flat = " ".join(out.split())
    for field in fields(script.Args):
        comment = re.search(rf"^    {field.name}: .*?  # (.+)$", source, re.MULTILINE)[1]
        default = "" if field.default in (None, ()) else f" (default: {field.default})"
        assert f"{comment}{default}" in flat, field.name


def test_help_says_what_a_flag_takes(grpo, rlhf, monkeypatch, capsys):
    out = " ".join(help_of(grpo, monkeypatch, capsys).split())
    assert "Literal" not in out and "dataclass" not in out, "a field whose comment is not on its line"
    for words in (
        "--task {arithmetic,countdown,gsm8k,jsonl} questions",
        "--dtype {float32,bfloat16} type",
        "--group-size INT G",
        "--learning-rate FLOAT AdamW's",
        "--model STR Hub",
        "--scale {group,batch,none} advantages",
        "--gradient-checkpointing, --no-gradient-checkpointing keep",
    ):
        assert words in out
    out = " ".join(help_of(rlhf, monkeypatch, capsys).split())
    assert "--reward-model STR ... for" in out and "--value-clip FLOAT how" in out


@pytest.mark.parametrize("columns", [70, 90, 110])
def test_help_fits_the_terminal(script, monkeypatch, capsys, columns):
    lines = help_of(script, monkeypatch, capsys, columns).splitlines()
    assert all(len(line) < columns or " " not in line.strip() for line in lines[3:])
    assert max(map(len, lines[3:])) > columns - 8 and "\x1b" not in "".join(lines)


def test_help_begins_with_what_most_people_need(grpo, monkeypatch, capsys):
    first = help_of(grpo, monkeypatch, capsys).split("\n\n")[2]
    flags = " ".join(re.findall(r"^  --([\w-]+)", first, re.MULTILINE))
    assert flags == (
        "model task data steps learning-rate prompts-per-step group-size max-tokens lora-rank seed run-dir resume"
    )
