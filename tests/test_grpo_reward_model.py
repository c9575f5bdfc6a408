"""What a learned reward reads in grpo_llm.py: its own chat form, or the tokens that rlhf_gpt2_ppo.py trained it on."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification


@pytest.fixture(scope="module")
def stage_3(rlhf, tiny_gpt2, tmp_path_factory):
    """Run directory of stages 1 and 2, a few steps each, with a policy `sft` and its `reward`."""
    run_dir = tmp_path_factory.mktemp("stage_3") / "run"
    sizes = {"num_texts": 100, "max_length": 40, "response_length": 8, "eval_prompts": 10, "checkpoint_every": 0}
    steps = {"sft_steps": 3, "reward_steps": 6, "reward_learning_rate": 1e-2, "ppo_iterations": 1, "batch_size": 4}
    rlhf.train(rlhf.Args(model=tiny_gpt2, **sizes, **steps, run_dir=str(run_dir)))
    return run_dir


def scores_of_stage_3(rlhf, stage_3, sequences):
    """Its own scores of token lists, by its own functions, together in one padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(stage_3 / "reward")
    model = rlhf.load_reward_model(rlhf.Args(), str(stage_3 / "reward"), tokenizer)
    return rlhf.score_texts(rlhf.Args(), model, tokenizer, sequences)


def held_out_texts(rlhf):
    args = rlhf.Args(num_texts=60, seed=5)
    return rlhf.texts_and_pairs(rlhf.load_rows(args), args)[0][:12]


def test_a_reward_model_of_stage_3_gives_its_scores(rlhf, grpo, tiny_grpo, stage_3):
    """Prompt and response joined without a newline, EOS where the response ended, normalised: to float tolerance, one
    by one as in a batch."""
    texts = held_out_texts(rlhf)
    tokenizer = AutoTokenizer.from_pretrained(stage_3 / "reward")
    whole = [prompt + response for prompt, response in rlhf.encode(tokenizer, texts, 60)]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in whole) and len({len(ids) for ids in whole}) > 3
    scorer = grpo.load_reward_model(tiny_grpo(reward_model=str(stage_3 / "reward")))
    for has_ended, sequences in ((True, whole), (False, [ids[:-1] for ids in whole])):
        expected = scores_of_stage_3(rlhf, stage_3, sequences)
        answers = [(prompt, response, has_ended) for prompt, response in texts]
        found = grpo.score_texts(*scorer, answers)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        alone = torch.cat([grpo.score_texts(*scorer, [answer]) for answer in answers])
        torch.testing.assert_close(alone, found, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.01
    assert scorer[0].config.reward_std != 1.0


def test_stage_4_is_paid_as_stage_3_is(rlhf, grpo, tiny_grpo, stage_3, monkeypatch, tmp_path):
    """A run of stage 4 on stage 1's policy and stage 2's reward model, from their prompts: the same scores."""
    rows = [{"prompt": prompt, "answer": "brilliant"} for prompt, _ in held_out_texts(rlhf)]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    rated, original = [], grpo.rate_group

    def rate_group(args, group, *others):
        rated.append((group, original(args, group, *others)))
        return rated[-1][1]

    monkeypatch.setattr(grpo, "rate_group", rate_group)
    models = {"model": str(stage_3 / "sft"), "reward_model": str(stage_3 / "reward"), "reward_model_weight": 0.7}
    grpo.train(tiny_grpo(task="jsonl", data=str(tmp_path / "prompts.jsonl"), instruction=None, steps=1, **models))
    tokenizer = AutoTokenizer.from_pretrained(stage_3 / "reward")
    assert len(rated) == 3
    for group, rating in rated:
        texts = [(group.problem.prompt, text) for text in group.texts]
        encoded = [prompt + response for prompt, response in rlhf.encode(tokenizer, texts, 64)]
        sequences = [ids[:-1] if cut else ids for ids, cut in zip(encoded, rating.is_truncated.tolist())]
        expected = 0.7 * scores_of_stage_3(rlhf, stage_3, sequences)
        torch.testing.assert_close(rating.parts["model"], expected, rtol=1e-4, atol=1e-4)


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture(params=["<|pad|>", "<|endoftext|>", None])
def with_template(request, stage_3, tmp_path):
    """The reward model as one of the Hub: a chat template that ends in EOS; padding of its own, EOS, or none."""
    shutil.copytree(stage_3 / "reward", tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, request.param
    tokenizer.save_pretrained(tmp_path / "chat")
    return str(tmp_path / "chat")


def test_a_chat_template_is_what_the_reward_model_reads(grpo, tiny_grpo, with_template):
    """Prompt as the user's turn, completion as the assistant's, exactly the template's text, no token more; the score
    is read at its last token, the template's EOS, also where padding is EOS."""
    args = tiny_grpo(reward_model=with_template)
    model, tokenizer = grpo.load_reward_model(args)
    answers = [("The plot", " was fine.", True), ("A film", " of tiresome length, I", False), ("It", "", True)]
    seen = []
    model.register_forward_pre_hook(lambda module, _, inputs: seen.append(inputs), with_kwargs=True)
    scores = grpo.score_texts(model, tokenizer, answers)
    (inputs,) = seen
    plain = AutoModelForSequenceClassification.from_pretrained(with_template, pad_token_id=None)
    for ids, mask, score, (prompt, text, _) in zip(*inputs.values(), scores, answers, strict=True):
        expected = f"<|endoftext|>[user] {prompt}<|endoftext|>[assistant] {text}<|endoftext|>"
        assert tokenizer.decode(ids[mask.bool()]) == expected
        whole = torch.tensor([tokenizer(expected, add_special_tokens=False)["input_ids"]])
        own = (plain(whole).logits.detach()[0, 0] - plain.config.reward_mean) / plain.config.reward_std
        assert float(score) == pytest.approx(float(own), rel=1e-4, abs=1e-4)


def test_a_template_that_refuses_is_one_sentence(grpo, with_template):
    tokenizer = AutoTokenizer.from_pretrained(with_template)
    tokenizer.chat_template = "{{ raise_exception('No answers here') }}"
    with pytest.raises(grpo.InputError, match="chat template refuses the answer 'Paris': No answers here"):
        grpo.reward_ids(tokenizer, "Where?", "Paris", True)


def test_the_reward_model_is_told_what_the_policy_is(grpo, tiny_grpo, with_template):
    """The instruction belongs to the user's turn."""
    group = grpo.Group(grpo.Problem("1+1", "2"), [], None, None, None, ["2", "3"])
    answers = grpo.answers_of(tiny_grpo(instruction="What is {}?"), group, torch.tensor([True, False]))
    assert answers == [("What is 1+1?", "2", False), ("What is 1+1?", "3", True)]
    assert grpo.answers_of(tiny_grpo(model=None), group, torch.tensor([True, False]))[0][0] == "1+1"


def test_messages_are_the_turns_that_the_reward_model_reads(grpo, tiny_grpo, with_template, stage_3):
    """The row's own messages, then the completion; without a template there is no form for them."""
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"})
    group = grpo.Group(grpo.Problem("2+2?", "4", messages=messages), [], None, None, None, ["4"])
    (answer,) = grpo.answers_of(tiny_grpo(), group, torch.tensor([False]))
    tokenizer = AutoTokenizer.from_pretrained(with_template)
    text = tokenizer.decode(grpo.reward_ids(tokenizer, *answer))
    turns = ("[system] Be brief.", "[user] 2+2?", "[assistant] 4")
    assert text == "<|endoftext|>" + "".join(f"{turn}<|endoftext|>" for turn in turns)
    with pytest.raises(grpo.InputError, match="no chat template for prompts that are lists of messages"):
        grpo.reward_ids(AutoTokenizer.from_pretrained(stage_3 / "reward"), *answer)


def test_beyond_its_context_the_end_is_read(grpo, tiny_grpo, stage_3):
    """The answer is at the end; a context of 64 positions has no room for the beginning."""
    model, tokenizer = grpo.load_reward_model(tiny_grpo(reward_model=str(stage_3 / "reward")))
    prompt, text = "The plot of this drama was dull. " * 20, " It was brilliant."
    whole = tokenizer(prompt)["input_ids"] + tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    assert len(whole) > 100 and model.config.max_position_embeddings == 64
    with torch.no_grad():
        own = float(model(torch.tensor([whole[-64:]])).logits)
    with pytest.warns(UserWarning, match="exceeds the reward model's context: its last 64 tokens are read"):
        score = float(grpo.raw_scores(model, tokenizer, [(prompt, text, True)]).detach())
    assert score == pytest.approx(own, rel=1e-4, abs=1e-4)


def test_an_encoder_is_refused(grpo, tiny_grpo, tmp_path):
    """BERT reads a pair with [CLS] and [SEP] and segments, which nothing here writes."""
    tokenizer = grpo.new_tokenizer()
    tokenizer.cls_token = "#"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=26, num_labels=1, **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(grpo.InputError, match="is an encoder without a chat template"):
        grpo.load_reward_model(tiny_grpo(reward_model=str(tmp_path / "bert")))
