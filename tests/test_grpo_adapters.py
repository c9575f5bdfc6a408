"""A LoRA adapter as --model of grpo_llm.py, what is saved of one, and models with odd tokenizers."""

import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import flags
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

pytest.importorskip("peft", reason="peft is not installed: pip install peft")


INPUTS = torch.tensor([[3, 4, 5, 13, 6, 7]])


@pytest.fixture(scope="module")
def adapter(grpo, tiny_lm, tmp_path_factory):
    """Directory of an adapter of rank 4 that moves the tiny model's logits, with a dropout of its own."""
    from peft import LoraConfig, get_peft_model

    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.2, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_lm), config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(directory)
    return str(directory)


@torch.no_grad()
def logits(name):
    return AutoModelForCausalLM.from_pretrained(name).eval()(INPUTS).logits


@pytest.fixture
def scored(grpo, monkeypatch):
    """Train and keep what score() said of the rollouts: once a step the reference, at one update a rollout."""

    def run(args):
        seen, original = SimpleNamespace(reference=[]), grpo.score

        def score(own, model, sequences, plan):
            seen.reference.append((sequences, original(own, model, sequences, plan)))
            return seen.reference[-1][1]

        with monkeypatch.context() as patch:
            patch.setattr(grpo, "score", score)
            seen.metrics = grpo.train(args)
        return seen

    return run


# ---- An adapter as --model ----


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}, {"lora_rank": 4, "quantize": "int8"}])
def test_a_run_goes_on_from_an_adapter(grpo, tiny_grpo, adapter, scored, capsys, options):
    """[G22] Merged, or trained further: the policy begins as the adapter's, not as the model under it. The reference is
    what the run began with, at its start and after its policy has moved, so the KL is first 0 and then is not."""
    seen = scored(tiny_grpo(model=adapter, beta=0.1, steps=3, **options))
    begun = AutoModelForCausalLM.from_pretrained(adapter).eval()
    (prompts, tokens, mask), logprobs = seen.reference[2]
    tolerance = 0.2 if options.get("quantize") else 1e-4
    count = 0
    for i, (row, length) in enumerate(zip(tokens, mask.sum(-1).tolist())):
        if logprobs[i].any():
            ids = torch.tensor([prompts[i // 4] + row[:length].tolist()])
            with torch.no_grad():
                own = begun(ids).logits[0, -length - 1 : -1].log_softmax(-1).gather(-1, ids[0, -length:, None])[:, 0]
            assert float((logprobs[i, :length] - own).abs().mean()) < tolerance
            count += 1
    assert count >= 8 and len(seen.reference) == 3
    kl = [row["kl/reference"] for row in seen.metrics[1:]]
    assert kl[0] == 0 < min(kl[1:])
    assert seen.metrics[1]["policy/ratio_max"] == 1 and seen.metrics[1]["policy/sampler_gap"] < 1e-4  # no dropout
    what = "trained further" if options else "merged"
    assert f"adapter     {adapter}, of " in (out := capsys.readouterr().out) and what in out
    saved = Path(tiny_grpo().run_dir) / "policy"
    assert (saved / "adapter_config.json").exists() == bool(options)
    moved = float((logits(saved) - logits(adapter)).abs().max())
    assert 1e-4 < moved < float((logits(saved) - logits(tiny_grpo().model)).abs().max())


def test_adapter_and_model_under_it_differ(tiny_lm, adapter):
    assert float((logits(tiny_lm) - logits(adapter)).abs().max()) > 1


def test_all_weights_of_a_merged_adapter_learn(grpo, tiny_grpo, adapter):
    model, _, _ = grpo.load_model(tiny_grpo(model=adapter), adapter)
    with torch.no_grad():
        torch.testing.assert_close(model(INPUTS).logits, logits(adapter), rtol=0, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_another_rank_is_refused(grpo, tiny_grpo, adapter, command):
    status, _, error = command(*flags(grpo, tiny_grpo(model=adapter, lora_rank=8)))
    assert status == 2 and "an adapter of rank 4: --lora-rank 4 trains it further" in error
    assert not Path(tiny_grpo().run_dir).exists() and "Traceback" not in error


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"base_model_name_or_path": "runs/gone/start"},
            "its base_model_name_or_path: runs/gone/start cannot be loaded",
        ),
        ({"base_model_name_or_path": None}, "does not say of which model"),
        ({"target_modules": ["query_key_value"]}, "does not fit"),
        ({"peft_type": "IA3", "feedforward_modules": []}, "of the kind IA3, and only LoRA can be trained further"),
    ],
)
def test_adapters_that_cannot_be_used(grpo, tiny_grpo, adapter, command, tmp_path, config, message):
    shutil.copytree(adapter, tmp_path / "odd")
    path = tmp_path / "odd" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    status, _, error = command(*flags(grpo, tiny_grpo(model=str(tmp_path / "odd"))))
    assert status == 2 and message in error.splitlines()[-1] and "Traceback" not in error
    assert not Path(tiny_grpo().run_dir).exists()


def test_an_adapter_without_a_tokenizer_has_its_models(grpo, tiny_grpo, tiny_lm, adapter, tmp_path):
    for path in Path(adapter).glob("adapter*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = grpo.load_model(tiny_grpo(), str(tmp_path))[1]
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny_lm).get_vocab()


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}])
def test_resumed_it_ends_with_the_same_bits(grpo, tiny_grpo, adapter, monkeypatch, options):
    options = {"model": adapter, "beta": 0.1, "steps": 3, "checkpoint_every": 1, **options}
    whole = grpo.train(tiny_grpo("whole", **options))
    original, count = grpo.learning_rate_of, itertools.count()

    def breaks(*arguments):
        if next(count) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "learning_rate_of", breaks)
        with pytest.raises(KeyboardInterrupt):
            grpo.train(tiny_grpo("broken", **options))
    resumed = grpo.train(grpo.resumed_args(tiny_grpo("broken").run_dir))
    assert [row["kl/reference"] for row in resumed[1:]] == [row["kl/reference"] for row in whole[1:]]
    ends = [logits(Path(tiny_grpo(name).run_dir) / "policy") for name in ("whole", "broken")]
    assert torch.equal(*ends) and resumed[3]["kl/reference"] > 0


def test_the_plan_knows_the_adapter(planner, tiny_grpo, adapter, tiny_lm):
    """Its model's shapes; a brought adapter under β is kept twice."""
    new, brought = (
        planner.memory_plan(tiny_grpo(model=model, lora_rank=4, beta=0.1), 20) for model in (tiny_lm, adapter)
    )
    assert brought["weights"][0] - new["weights"][0] == new["gradients"][0] == brought["gradients"][0] > 0
    merged = planner.memory_plan(tiny_grpo(model=adapter, beta=0.1), 20)
    assert merged == planner.memory_plan(tiny_grpo(beta=0.1), 20)


def test_stage_3_refuses_an_adapter(rlhf, tiny, tiny_gpt2, tmp_path):
    """It would train and save who knows what of it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_gpt2), config).save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "adapter")
    with pytest.raises(rlhf.InputError, match="is an adapter: merge it into its model first"):
        rlhf.start_model(tiny(), str(tmp_path / "adapter"))


# ---- What is saved ----


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_adapter_and_merged_model_load_from_anywhere(grpo, tiny_grpo, tiny_lm, monkeypatch, tmp_path, quantize):
    """--save-merged; --model given as a relative path; both have the same logits in another working directory."""
    monkeypatch.chdir(Path(tiny_lm).parent)
    relative = Path(tiny_lm).name
    grpo.train(tiny_grpo(model=relative, lora_rank=4, quantize=quantize, save_merged=True))
    monkeypatch.chdir(tmp_path)
    saved, merged = (logits(Path(tiny_grpo().run_dir) / name) for name in ("policy", "merged"))
    torch.testing.assert_close(merged, saved, rtol=0, atol=1e-4)
    assert float((saved - logits(tiny_lm)).abs().max()) > 1e-3
    assert not (Path(tiny_grpo().run_dir) / "merged" / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(Path(tiny_grpo().run_dir) / "merged").eos_token_id == 1


def test_a_finished_run_can_still_be_merged(grpo, tiny_grpo):
    """--resume RUN --save-merged."""
    args = tiny_grpo(lora_rank=4)
    grpo.train(args)
    assert not (Path(args.run_dir) / "merged").exists()
    grpo.train(grpo.replace(grpo.resumed_args(args.run_dir), save_merged=True))
    torch.testing.assert_close(*(logits(Path(args.run_dir) / name) for name in ("policy", "merged")), rtol=0, atol=1e-4)


def test_a_hub_id_stays_a_hub_id(grpo, tiny_grpo, tiny_lm):
    """Only what is a directory here has its path written out."""
    for name, expected in (("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), (os.path.relpath(tiny_lm), tiny_lm)):
        model = AutoModelForCausalLM.from_pretrained(tiny_lm)
        model.name_or_path = model.config._name_or_path = name
        config = grpo.add_adapter(tiny_grpo(lora_rank=4), model).peft_config["default"]
        assert config.base_model_name_or_path == expected


def test_save_merged_needs_an_adapter(grpo):
    with pytest.raises(ValueError, match="save_merged merges an adapter: it needs lora_rank"):
        grpo.Args(save_merged=True)


# ---- Odd tokenizers and weights ----


def altered(tiny_lm, directory, change):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_lm), AutoTokenizer.from_pretrained(tiny_lm)
    change(model, tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def same_run(grpo, one, other):
    for row, twin in zip(grpo.train(one), grpo.train(other), strict=True):
        for name in row:
            assert name.startswith(("time/", "memory/")) or row[name] == twin[name], name


def test_padding_outside_the_embedding(grpo, tiny_grpo, tiny_lm, tmp_path):
    """As [PAD] is after add_special_tokens without resize_token_embeddings: prompts of unlike lengths, the same run."""

    def change(model, tokenizer):
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings

    options = {"max_term": 15, "steps": 1, "eval_problems": 12}
    assert len({len(problem.prompt) for problem in grpo.load_problems(tiny_grpo(**options))[1]}) > 1
    odd = altered(tiny_lm, tmp_path / "odd", change)
    same_run(grpo, tiny_grpo("a", **options), tiny_grpo("b", model=odd, **options))


def test_an_eos_outside_the_embedding_ends_nothing(grpo, tiny_grpo, tiny_lm, tmp_path):
    """The model can never write it; where there is no other, nothing could end."""

    def change(model, tokenizer):
        model.generation_config.eos_token_id = 1
        tokenizer.add_special_tokens({"eos_token": "[END]"})

    def alone(model, tokenizer):
        change(model, tokenizer)
        model.generation_config.eos_token_id = model.config.eos_token_id = None

    assert grpo.load_model(tiny_grpo(), altered(tiny_lm, tmp_path / "a", change))[2] == [1]
    with pytest.raises(grpo.InputError, match="nothing could end"):
        grpo.load_model(tiny_grpo(), altered(tiny_lm, tmp_path / "b", alone))


def test_an_eos_that_the_tokenizer_appends_is_left_out(grpo, tiny_grpo, tiny_lm, tmp_path, capsys):
    """Nothing should be sampled after it; an EOS of the prompt's own, in its middle, stays, and so does a BOS."""
    from tokenizers.processors import TemplateProcessing

    def change(model, tokenizer):
        special = [("<eos>", tokenizer.eos_token_id), ("<unk>", tokenizer.unk_token_id)]
        form = TemplateProcessing(single="<unk> $A <eos>", special_tokens=special)
        tokenizer.backend_tokenizer.post_processor = form

    odd = altered(tiny_lm, tmp_path / "odd", change)
    tokenizer = AutoTokenizer.from_pretrained(odd)
    assert tokenizer("1+2\n")["input_ids"][-1] == tokenizer.eos_token_id
    for prompt in ("1+2", "1<eos>2"):
        ids = grpo.encode_prompt(tiny_grpo(), tokenizer, grpo.Problem(prompt, "3"))
        assert tokenizer.decode(ids) == f"<unk>{prompt}\n"
    grpo.train(tiny_grpo(model=odd, steps=1))
    assert "prompts     the EOS that the tokenizer appends is left out" in capsys.readouterr().out
    grpo.train(tiny_grpo("usual", steps=1))
    assert "prompts  " not in capsys.readouterr().out


def test_a_template_without_a_system_role(grpo, tiny_grpo, tiny_lm, tmp_path):
    """As Gemma's: the problem is the user's turn, and nothing else is said. The template's own BOS comes once."""

    def change(model, tokenizer):
        refuse = "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        tokenizer.chat_template = (
            "{{ '<unk>' }}{% for m in messages %}" + refuse + "({{ m['content'] }}){% endfor %}"
            "{% if add_generation_prompt %}:{% endif %}"
        )

    odd = altered(tiny_lm, tmp_path / "odd", change)
    tokenizer = AutoTokenizer.from_pretrained(odd)
    ids = grpo.encode_prompt(tiny_grpo(), tokenizer, grpo.Problem("1+2", "3"))
    assert tokenizer.decode(ids) == "<unk>(1+2):"
    assert len(grpo.train(tiny_grpo(model=odd, steps=1))) == 2


@pytest.mark.parametrize("options", [{"optimizer": "adamw8bit"}, {"lora_rank": 4, "save_merged": True}])
def test_tied_weights_in_bfloat16(grpo, tiny_grpo, tiny_lm, tmp_path, options):
    """One matrix for embedding and head: it is one still when saved, and what is saved is what was trained."""
    args = tiny_grpo(dtype="bfloat16", beta=0.1, **options)
    grpo.train(args)
    name = "merged" if "lora_rank" in options else "policy"
    saved = AutoModelForCausalLM.from_pretrained(Path(args.run_dir) / name)
    assert saved.dtype == torch.bfloat16 and saved.lm_head.weight is saved.model.embed_tokens.weight
    trained = torch.load(Path(args.run_dir) / "checkpoint.pt", weights_only=True)["policy"]
    if name == "policy":
        assert all(torch.equal(x, trained[key]) for key, x in saved.named_parameters()) and len(trained) > 20
    else:
        assert float((logits(Path(args.run_dir) / "policy") - logits(Path(args.run_dir) / name)).abs().max()) < 0.2
