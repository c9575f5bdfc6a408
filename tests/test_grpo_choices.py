"""What grpo_llm.py chooses for a model, a task and a machine, and that what is given by hand wins."""

import re
from dataclasses import replace

import pytest
import torch

MODEL = {"model": "m", "task": "gsm8k"}
DEFAULTS = {
    "device": "cpu",
    "torch_threads": 1,
    "dtype": "float32",
    "optimizer": "adamw",
    "learning_rate": 3e-4,
    "prompts_per_step": 32,
    "group_size": 8,
    "max_tokens": 40,
    "generate_rows": 2048,
    "eval_samples": 16,
    "gradient_checkpointing": False,
    "offload": False,
}
# other values than those that are chosen, for a model of 2B parameters on a GPU
BY_HAND = {
    "device": "cpu",
    "torch_threads": 3,
    "dtype": "float32",
    "optimizer": "adamw",
    "learning_rate": 0.5,
    "prompts_per_step": 5,
    "group_size": 3,
    "max_tokens": 7,
    "generate_rows": 6,
    "eval_samples": 9,
    "gradient_checkpointing": False,
    "offload": True,
}


@pytest.fixture
def machine(grpo, monkeypatch):
    """machine(gpu, bfloat16, free): a machine with or without a GPU, which has so many bytes free, and whose CPU
    multiplies bfloat16 or does not."""

    def make(gpu=False, bfloat16=False, free=80e9):
        monkeypatch.setattr(grpo, "free_memory", lambda device: free)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": bfloat16})

    make()
    return make


def test_the_default_run_is_what_it_was(grpo, machine):
    for gpu in (False, True):
        machine(gpu, bfloat16=True)
        args, why = grpo.chosen(grpo.Args())
        assert args == grpo.Args(**DEFAULTS) and why.keys() == DEFAULTS.keys() == set(grpo.CHOSEN)


@pytest.mark.parametrize("model", [{}, MODEL])
@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_given_by_hand_wins(grpo, machine, model, name):
    machine(gpu=True)
    free, _ = grpo.chosen(grpo.Args(**model), size=2_000_000_000)
    args, why = grpo.chosen(grpo.Args(**model, **{name: BY_HAND[name]}), size=2_000_000_000)
    assert getattr(args, name) == BY_HAND[name] and name not in why
    assert None not in [getattr(args, other) for other in grpo.CHOSEN]
    assert not model or getattr(free, name) != BY_HAND[name]


@pytest.mark.parametrize(
    ("gpu", "bfloat16", "given", "expected"),
    [
        (False, False, {}, ("cpu", "float32", "adamw")),
        (False, True, {}, ("cpu", "bfloat16", "adamw8bit")),
        (True, False, {}, ("cuda", "bfloat16", "adamw8bit")),
        (True, True, {"device": "cpu"}, ("cpu", "bfloat16", "adamw8bit")),
        (True, False, {"device": "cpu"}, ("cpu", "float32", "adamw")),
        (False, False, {"device": "cuda:1"}, ("cuda:1", "bfloat16", "adamw8bit")),
        (False, True, {"device": "mps"}, ("mps", "float32", "adamw")),
        (False, False, {"dtype": "bfloat16"}, ("cpu", "bfloat16", "adamw8bit")),
        (True, False, {"dtype": "float32"}, ("cuda", "float32", "adamw")),
        (True, False, {"optimizer": "adamw"}, ("cuda", "float32", "adamw")),
        (True, False, {"optimizer": "adamw", "lora_rank": 4}, ("cuda", "bfloat16", "adamw")),
        (False, False, {"optimizer": "adamw8bit"}, ("cpu", "float32", "adamw8bit")),
        (False, False, {"offload": True}, ("cpu", "float32", "adamw8bit")),
        (False, False, {"shard": True}, ("cpu", "float32", "adamw8bit")),
    ],
)
def test_device_dtype_and_optimizer(grpo, machine, gpu, bfloat16, given, expected):
    machine(gpu, bfloat16)
    args, _ = grpo.chosen(grpo.Args(**MODEL, **given), size=10**9)
    assert (args.device, args.dtype, args.optimizer) == expected


def test_the_small_model_in_bfloat16_takes_the_8_bit_optimizer(grpo):
    assert grpo.chosen(grpo.Args(dtype="bfloat16"))[0].optimizer == "adamw8bit"


def test_learning_rates(grpo, machine):
    """They fall with the size, to that of the papers for 7B, never below, and never above the small model's."""
    sizes = (1e5, 135e6, 494e6, 1.54e9, 7e9, 70e9)
    rates = [grpo.learning_rate_for(size, is_lora=False) for size in sizes]
    assert rates == [3e-4, 2e-5, 7.6e-6, 3.2e-6, 1e-6, 1e-6]
    assert [grpo.learning_rate_for(size, is_lora=True) for size in sizes] == pytest.approx([10 * x for x in rates])
    for rank, rate in ((0, 2e-5), (8, 2e-4)):
        assert grpo.chosen(grpo.Args(**MODEL, lora_rank=rank), size=135e6)[0].learning_rate == pytest.approx(rate)


@pytest.mark.parametrize(("gpu", "size", "expected"), [(True, 2e9, True), (True, 5e8, False), (False, 2e9, False)])
def test_gradient_checkpointing_is_for_large_models_on_a_gpu(grpo, machine, gpu, size, expected):
    machine(gpu)
    assert grpo.chosen(grpo.Args(**MODEL), size=size)[0].gradient_checkpointing is expected


# Bytes a parameter on the card: weight 2, gradient 2, 8-bit state 2, reference 2 with β; and 2 GB for all else
FITS = [
    (11.3e9, {}, False),
    (11.1e9, {}, True),
    (11.3e9, {"beta": 0.1}, True),
    (14.5e9, {"beta": 0.1}, False),
    (5.2e9, {}, True),
    (5.2e9, {"lora_rank": 8}, False),
    (3.0e9, {"lora_rank": 8, "quantize": "nf4"}, False),
    (3.6e9, {"lora_rank": 8, "quantize": "int8"}, False),
    (26.7e9, {"dtype": "float32", "optimizer": "adamw"}, False),
    (1e9, {"device": "cpu"}, False),
    (1e9, {"offload": False}, False),
    (1e9, {"offload": True}, True),
]


@pytest.mark.parametrize(("free", "given", "offload"), FITS)
def test_what_does_not_fit_on_the_card_lies_on_the_host(grpo, machine, free, given, offload):
    machine(gpu=True, free=free)
    args, why = grpo.chosen(grpo.Args(**MODEL, **given), size=1.54e9)
    assert args.offload is offload
    assert ("offload" in given) or ("offload" in why)


def test_what_does_not_fit_at_all_is_refused_with_what_would(grpo, machine):
    for given, free, needed in (
        ({}, 5e9, "5.1"),
        ({"lora_rank": 8}, 5e9, "5.1"),
        ({"optimizer": "adamw"}, 26e9, "26.6"),
    ):
        machine(gpu=True, free=free)
        with pytest.raises(grpo.InputError) as error:
            grpo.chosen(grpo.Args(**MODEL, **given), size=1.54e9)
        rank = given.get("lora_rank", 16)
        assert f"m needs about {needed} GB of the GPU, and {free / 1e9} are free" in str(error.value)
        assert f"--lora-rank {rank} --quantize nf4 needs about 2.9" in str(error.value)


def sizes_of(args):
    return args.prompts_per_step, args.group_size, args.max_tokens, args.eval_samples


def test_sizes_by_task(grpo, machine):
    problems = [grpo.Problem("q", "a" * length) for length in (1, 50, 3)] * 10
    jsonl = grpo.Args(task="jsonl", model="m", data="d")
    assert sizes_of(grpo.chosen(jsonl, problems, size=1e9)[0]) == (8, 8, 82, 8)  # 32 tokens and the longest answer
    for task, expected in (("gsm8k", (16, 8, 320, 8)), ("countdown", (8, 8, 256, 8)), ("arithmetic", (8, 8, 64, 8))):
        assert sizes_of(grpo.chosen(grpo.Args(task=task, model="m"), size=1e9)[0]) == expected


def test_choices_fit_what_is_given(grpo, machine, monkeypatch):
    """Few problems, many minibatches, several processes, a large k: the choice is one that the run accepts."""
    problems = [grpo.Problem(str(i), "1") for i in range(6)]
    few = grpo.Args(task="jsonl", model="m", data="d")
    assert grpo.chosen(few, problems, size=1e9)[0].prompts_per_step == 6
    assert grpo.chosen(grpo.Args(num_minibatches=40))[0].prompts_per_step == 40
    assert grpo.chosen(grpo.Args(eval_k=20))[0].eval_samples == 20
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert grpo.chosen(grpo.Args())[0].prompts_per_step == 33
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert grpo.chosen(few, problems, size=1e9)[0].prompts_per_step == 4
    with pytest.raises(grpo.InputError, match="num_minibatches 7 must not exceed prompts_per_step 4"):
        grpo.choose_settings(replace(few, num_minibatches=7, learning_rate=0.1), None, problems)


def test_the_number_of_parameters(grpo, tiny_lm, tiny_grpo):
    """Tied weights count once, and no weight is read."""
    model, _, _ = grpo.load_model(tiny_grpo(), tiny_lm)
    assert grpo.num_parameters(tiny_lm) == sum(x.numel() for x in model.parameters())


def test_the_block_of_choices(grpo, machine, tiny_lm, capsys):
    """A line for each reason, the reasons below each other; the flags are accepted as they stand."""
    given = grpo.Args(task="arithmetic", model=tiny_lm, group_size=4)
    args = grpo.choose_settings(given, None, [])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("chosen      --device cpu ") and 5 <= len(lines) <= 10
    assert max(map(len, lines)) <= 130
    flags, reasons = zip(*(re.split(r" {2,}", line[12:]) for line in lines))
    assert len({line.index(reason) for line, reason in zip(lines, reasons)}) == 1
    assert len(set(reasons)) == len(lines) and "--group-size" not in " ".join(flags)
    import tyro

    words = ["--task", "arithmetic", "--model", tiny_lm, "--group-size", "4", *" ".join(flags).split()]
    assert tyro.cli(grpo.Args, args=words, config=(tyro.conf.DisallowNone,)) == args


SHORT = {"terms": 2, "num_problems": 60, "steps": 2, "max_tokens": 6, "eval_problems": 4, "eval_every": 0}


@pytest.mark.slow
def test_a_resumed_run_keeps_what_was_chosen(grpo, machine, tiny_lm, tmp_path, capsys, monkeypatch):
    """Another machine would choose otherwise; the device may be given."""
    monkeypatch.setattr(grpo, "num_parameters", lambda name: 135e6)
    args = grpo.Args(**SHORT, model=tiny_lm, checkpoint_every=1, run_dir=str(tmp_path / "run"))
    grpo.train(args)
    assert "chosen      --device cpu" in capsys.readouterr().out
    saved = grpo.load(tmp_path / "run" / "checkpoint.pt")["args"]
    expected, _ = grpo.chosen(args, [grpo.Problem("1+1", "2")] * 30)
    assert saved == expected and saved.dtype == "float32" and saved.prompts_per_step == 8
    machine(bfloat16=True)
    monkeypatch.setattr(grpo, "num_parameters", lambda name: 7e9)
    content = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    torch.save({**content, "step": 1}, tmp_path / "run" / "checkpoint.pt")
    grpo.train(replace(args, run_dir=None, resume=str(tmp_path / "run")))
    assert "chosen " not in capsys.readouterr().out
    again = grpo.load(tmp_path / "run" / "checkpoint.pt")["args"]
    assert replace(again, resume=None, run_dir=None) == replace(saved, run_dir=None)
    given = replace(args, run_dir=None, resume=str(tmp_path / "run"), device="meta")
    assert grpo.choose_settings(given, grpo.load_checkpoint(given), []).device == "meta"
    with pytest.raises(grpo.InputError, match=r"--resume keeps the run's own learning_rate 2e-05; 0\.1 needs"):
        grpo.load_checkpoint(replace(given, learning_rate=0.1))


def test_help_says_which_settings_are_chosen(grpo, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["grpo_llm.py", "--help"])
    with pytest.raises(SystemExit):
        grpo.parse_args()
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert text.count("chosen for you") == len(grpo.CHOSEN)
    assert "--gradient-checkpointing, --no-gradient-checkpointing" in text and "{None}" not in text


def test_a_plan_chooses_as_a_run_does(grpo, planner, machine):
    """For a card that is named the plan is that of a machine with a GPU."""
    args, why = planner.chosen(grpo.Args(model="Qwen/Qwen2.5-1.5B-Instruct", task="gsm8k"), gpu_memory=12)
    machine(gpu=True, free=12e9 - planner.GPU_CONTEXT)
    assert args == grpo.chosen(grpo.Args(model=args.model, task="gsm8k", device="cuda"), size=1.54e9)[0]
    assert args.offload and args.gradient_checkpointing
    assert args.learning_rate == 3.2e-6 and "1.5B" in why["learning_rate"]
