"""Any causal language model: the plain path is transformers' own, the fast one equals it, or is not taken."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

COMMON = {
    "vocab_size": 29,  # 26 are the tokenizer's
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
LINEAR = {
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 3,
}
GPT2 = {"vocab_size": 29, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "eos_token_id": 1}
GPT2["tie_word_embeddings"] = False  # tied, with weights as large as these, a token predicts itself
BOTH = ["sliding_attention", "full_attention"]
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
IMAGES = {"mm_tokens_per_image": 4, "image_token_index": 28, "boi_token_index": 27, "eoi_token_index": 26}

# name: (kind of model, its configuration, whether the fast path is right for it)
MODELS = {
    "llama": ("llama", COMMON, True),
    "gpt2": ("gpt2", GPT2, True),
    "window": ("mistral", {**COMMON, "sliding_window": 9}, True),
    "windows": ("qwen2", {**COMMON, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, True),
    "gemma3": ("gemma3_text", {**COMMON, "head_dim": 16, "sliding_window": 9, "layer_types": BOTH}, True),
    "pictures": (
        "gemma3",
        {
            "text_config": {**COMMON, "head_dim": 16, "sliding_window": 9, "layer_types": BOTH},
            "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
            **IMAGES,
        },
        True,
    ),
    "sinks": ("gpt_oss", {**COMMON, **EXPERTS, "head_dim": 16, "sliding_window": 9}, True),
    "experts": ("mixtral", {**COMMON, **EXPERTS, "sliding_window": None, "router_jitter_noise": 0.1}, True),
    "scaled": ("granite", {**COMMON, "logits_scaling": 4.0}, False),
    "capped": ("gemma2", {**COMMON, "head_dim": 16, "sliding_window": 9, "final_logit_softcapping": 5.0}, False),
    "no positions": ("bloom", {"vocab_size": 29, "hidden_size": 32, "n_layer": 2, "n_head": 2}, False),
    "recurrent": (
        "qwen3_5_text",
        {**COMMON, **LINEAR, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
        False,
    ),
}
IN_SPANS = {"llama", "gpt2", "window", "windows", "gemma3", "pictures", "experts"}  # those whose attention is sdpa


def build(grpo, directory, kind, settings, std=0.3):
    """A tiny model of that configuration, with weights so large that its attention matters, and our tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "conv" not in name:
                weight.normal_(0, std)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(directory)
    grpo.new_tokenizer().save_pretrained(directory)
    return str(directory)


PROMPTS = [[4, 5, 6], [(7 * i) % 23 + 3 for i in range(21)]]  # shorter and longer than the windows
EOS_IDS = [1, 5, 9, 13]


def noise_of(rows, seed=0):
    return torch.rand(rows, 12, generator=torch.Generator().manual_seed(seed))


def own_logprobs(model, prompts, tokens, mask, temperature=1.0):
    """(B, T), one forward pass a sequence, without padding, up to the last 1 of its mask; 0 off the mask."""
    rows = []
    for i, row in enumerate(tokens):
        prompt, length = prompts[i * len(prompts) // len(tokens)], int(mask[i].nonzero().max()) + 1
        ids = torch.tensor([[*prompt, *row[:length].tolist()]])
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / temperature
        own = logits.log_softmax(-1).gather(-1, row[:length, None])[:, 0]
        rows.append(torch.nn.functional.pad(own, (0, len(row) - length)) * mask[i])
    return torch.stack(rows)


def gradient_of(model, logprobs):
    weights = torch.linspace(-1, 2, logprobs.numel()).view(logprobs.shape)
    model.zero_grad()
    (weights * logprobs).sum().backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    largest = max(float(x.abs().max()) for x in expected.values())
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-3, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("spans_from", [512, 0], ids=["own attention", "attention in spans"])
@pytest.mark.parametrize("name", MODELS)
def test_a_family_is_sampled_and_scored_as_by_itself(grpo, tiny_grpo, tmp_path, name, spans_from, monkeypatch):
    """By the path that is taken, and by the plain one: greedy tokens of model.generate, samples by the noise, and in
    training mode values and gradients of one forward pass a sequence. Prompts on both sides of the windows."""
    kind, settings, expected = MODELS[name]
    monkeypatch.setattr(grpo, "SPANS_FROM", spans_from)  # these models are narrow
    args = tiny_grpo(model=build(grpo, tmp_path / "m", kind, settings), temperature=0.8)
    model, _, _ = grpo.load_model(args, args.model)
    assert (model.plain_because == "") == expected == grpo.is_fast(args, model), model.plain_because
    assert model.has_spans == (spans_from == 0 and name in IN_SPANS)
    reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    right = []
    for path in (args, grpo.replace(args, fast=False)):
        tokens, _, mask = grpo.sample(path, model, PROMPTS, noise_of(2), 0.0, EOS_IDS, 0)
        for prompt, row, length in zip(PROMPTS, tokens.tolist(), mask.sum(-1).tolist()):
            options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": EOS_IDS, "pad_token_id": 0}
            ids = torch.tensor([prompt])
            theirs = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :]
            assert theirs.tolist() == row[:length]
        tokens, logprobs, mask = grpo.sample(path, model, PROMPTS, noise_of(8), 0.8, EOS_IDS, 0)
        assert mask.sum(-1).min() < mask.sum(-1).max(), "some end early"
        own = own_logprobs(reference, PROMPTS, tokens, mask, 0.8)
        torch.testing.assert_close(logprobs, own.detach(), rtol=0, atol=2e-4)
        scored = grpo.policy_logprobs(path, model.train(), PROMPTS, tokens, mask)
        torch.testing.assert_close(scored, own, rtol=0, atol=2e-4)
        assert_close(gradient_of(model, scored), gradient_of(reference, own))
        model.eval()
        right.append((tokens * mask, mask))
    assert all(torch.equal(*pair) for pair in zip(*right)), "both paths choose the same tokens by the same noise"


def test_a_plain_sample_follows_the_noise(grpo, tiny_grpo, tiny_lm):
    """A token is where its noise falls in the cumulative distribution of its own forward pass; the rest is padding."""
    args = tiny_grpo(fast=False)
    model, _, _ = grpo.load_model(args, tiny_lm)
    noise = noise_of(6, seed=3)
    tokens, _, mask = grpo.sample(args, model, PROMPTS, noise, 1.0, EOS_IDS, 2)
    is_eos = torch.isin(tokens, torch.tensor(EOS_IDS))
    assert torch.equal(mask.bool(), is_eos.cumsum(-1) - is_eos.long() == 0) and 0 < is_eos.sum() < len(tokens) + 1
    assert (tokens[mask == 0] == 2).all() and 0 in mask
    for i, row in enumerate(tokens):
        prompt = PROMPTS[i // 3]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *row.tolist()]])).logits[0, len(prompt) - 1 : -1]
        upper = logits.softmax(-1).cumsum(-1)
        for t in range(int(mask[i].sum())):
            token = int(row[t])
            low = float(upper[t, token - 1]) if token else 0.0
            assert low - 1e-5 <= float(noise[i, t]) <= float(upper[t, token]) + 1e-5


@pytest.mark.parametrize("fast", [True, False])
def test_the_tokens_of_a_tool_are_read_and_not_scored(grpo, tiny_grpo, tiny_lm, fast):
    """Zeros before the last 1 of a mask: 0 there, elsewhere the values and gradients of the sequence with them in it,
    in any micro-batches. A row without any 1 has neither."""
    model, _, _ = grpo.load_model(tiny_grpo(), tiny_lm)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 26, (6, 12), generator=generator)
    mask = (torch.rand(6, 12, generator=generator) < 0.5).long()
    mask[1], mask[4, 0], mask[5] = 0, 0, 1
    assert grpo.lengths_of(mask)[1] == 0 and (mask.cumsum(-1) < torch.arange(1, 13)).any(-1).sum() == 5
    on = torch.tensor([0, 2, 3, 4, 5])
    own = [own_logprobs(model, [PROMPTS[i // 3]], tokens[i : i + 1], mask[i : i + 1])[0] for i in on.tolist()]
    expected = torch.zeros(6, 12).index_put((on,), torch.stack(own))
    slope = gradient_of(model, expected)
    for micro_batch_tokens in (0, 1):
        args = tiny_grpo(fast=fast, micro_batch_tokens=micro_batch_tokens)
        for kind in (torch.long, torch.bool, torch.float32):
            scored = grpo.policy_logprobs(args, model, PROMPTS, tokens, mask.to(kind))
            torch.testing.assert_close(scored, expected, rtol=0, atol=1e-5)
            assert (scored[mask == 0] == 0).all()
        assert_close(gradient_of(model, scored), slope)


def test_plain_rows_hold_one_sequence_each_the_longest_first(grpo, tiny_grpo):
    args = tiny_grpo(fast=False, micro_batch_tokens=40)
    lengths = {0: 5, 1: 9, 3: 2, 4: 12, 5: 1}
    plan = grpo.plan_for(args, None, [6, 20], lengths, 3)
    assert sorted(i for rows in plan for row in rows for i in row) == sorted(lengths)
    assert all(len(row) == 1 for rows in plan for row in rows)
    sizes = [[6 * (i < 3) + 20 * (i > 2) + lengths[i] - 1 for (i,) in rows] for rows in plan]
    assert [x for row in sizes for x in row] == sorted((x for row in sizes for x in row), reverse=True)
    assert all(len(row) == 1 or len(row) * row[0] <= 40 for row in sizes) and max(map(len, sizes)) > 1


def test_rows_hold_several_answers_of_a_prompt(grpo, tiny_grpo):
    """[G17] At the lengths of GSM8K, prompts of 120 and answers of 80, a packed row reads at most 0.7 times as much as
    plain rows do, padding included; a row is never longer than a micro-batch unless a sequence is."""
    args, lengths = tiny_grpo(), dict.fromkeys(range(32), 80)
    counts = []
    for path in (args, grpo.replace(args, fast=False)):
        plan = grpo.plan_for(path, None, [120] * 4, lengths, 8)
        sizes = [[grpo.row_size(row, [120] * 4, lengths, 8) for row in rows] for rows in plan]
        counts.append(sum(len(rows) * max(rows) for rows in sizes))
    assert counts[0] < 0.7 * counts[1] and counts[1] == 32 * 199
    for micro_batch_tokens in (250, 500):
        plan = grpo.plan_for(tiny_grpo(micro_batch_tokens=micro_batch_tokens), None, [120] * 4, lengths, 8)
        rows = [grpo.row_size(row, [120] * 4, lengths, 8) for rows in plan for row in rows]
        assert max(rows) <= micro_batch_tokens


# ---- Attention in spans ----


def test_attention_by_plain_products_is_the_fused_one(grpo):
    """attend() shares each key head between query heads without repeating it. Values have another width than keys."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    is_seen = torch.rand(2, 1, 5, 7) < 0.7
    is_seen[..., 0] = True
    mask = torch.zeros(is_seen.shape).masked_fill(~is_seen, torch.finfo(torch.float32).min)
    found = grpo.attend(query, key, value, mask, 0.3)
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    right = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=is_seen, scale=0.3)
    torch.testing.assert_close(found, right)


def test_long_spans_keep_no_weights_of_attention(grpo, monkeypatch):
    """Beyond a number of pairs attend() is the fused kernel, with the same result and less memory."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    mask, found, fused = torch.randn(2, 1, 5, 7), [], []
    own = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *x, **kw: fused.append(1) or own(*x, **kw)
    )
    for pairs in (35, 34):
        monkeypatch.setattr(grpo, "LONGEST_PRODUCT", pairs)
        found.append(grpo.attend(query, key, value, mask, 0.3))
    assert len(fused) == 1 and found[0].all()
    torch.testing.assert_close(*found)


def test_wide_models_attend_in_spans_and_narrow_ones_do_not(grpo, tiny_grpo, tiny_lm, monkeypatch):
    """[G17] In spans a row fills the micro-batch. On the plain path, sampling included, sdpa is as it was."""
    narrow = grpo.load_model(tiny_grpo(), tiny_lm)[0]
    monkeypatch.setattr(grpo, "SPANS_FROM", narrow.config.hidden_size)
    wide = grpo.load_model(tiny_grpo(), tiny_lm)[0]
    assert (narrow.has_spans, wide.has_spans) == (False, True) and wide.plain_because == narrow.plain_because == ""
    lengths, args = dict.fromkeys(range(8), 40), tiny_grpo(micro_batch_tokens=400)
    rows = [[len(row) for rows in grpo.plan_for(args, x, [6], lengths, 8) for row in rows] for x in (narrow, wide)]
    assert rows == [[2] * 4, [8]]
    attended, attend = [], grpo.attend
    monkeypatch.setattr(grpo, "attend", lambda *given: attended.append(given[0].shape[2]) or attend(*given))
    given = [PROMPTS[0]], noise_of(4), 1.0, EOS_IDS, 0
    tokens, _, mask = grpo.sample(args, wide, *given)
    layers = wide.config.num_hidden_layers
    assert attended == [1] * layers * (int(mask.sum(-1).max()) - 1), "the tokens after the first, in each layer"
    attended.clear()
    grpo.policy_logprobs(args, wide, [PROMPTS[0]], tokens, mask)
    spans = [3, *(length - 1 for length in sorted(mask.sum(-1).tolist(), reverse=True) if length > 1)]
    assert attended == spans * layers, "the prompt once, then each answer"
    attended.clear()
    plain = grpo.replace(args, fast=False)
    grpo.policy_logprobs(plain, wide, [PROMPTS[0]], tokens, mask), grpo.sample(plain, wide, *given)
    grpo.policy_logprobs(args, narrow, [PROMPTS[0]], tokens, mask), grpo.sample(args, narrow, *given)
    assert not attended


def test_spans_of_rows_with_padding(grpo, tiny_grpo, tiny_lm, monkeypatch):
    """Short rows of several lengths in one micro-batch: the same log-probabilities as each sequence alone."""
    monkeypatch.setattr(grpo, "SPANS_FROM", 0)
    model = grpo.load_model(tiny_grpo(), tiny_lm)[0]
    tokens, _, mask = grpo.sample(tiny_grpo(), model, PROMPTS, noise_of(8), 1.0, EOS_IDS, 0)
    plans, plan_rows = [], grpo.plan_rows

    def in_short_rows(args, model, prompt_lengths, lengths, group_size):
        plans.append(plan_rows(prompt_lengths, lengths, group_size, 24, 400))
        sizes = {grpo.row_size(row, prompt_lengths, lengths, group_size) for row in plans[-1][0]}
        assert len(sizes) > 1, "no row needs padding"
        return plans[-1]

    monkeypatch.setattr(grpo, "plan_for", in_short_rows)
    found = grpo.policy_logprobs(tiny_grpo(), model, PROMPTS, tokens, mask)
    assert model.has_spans and len(plans) == 1 == len(plans[0])
    torch.testing.assert_close(found, own_logprobs(model, PROMPTS, tokens, mask), rtol=0, atol=1e-4)


def test_spans_are_kept_by_gradient_checkpointing(grpo, tiny_grpo, tiny_lm, monkeypatch):
    """A layer that is computed again in the backward pass has the same spans: the same gradient."""
    monkeypatch.setattr(grpo, "SPANS_FROM", 0)
    model = grpo.load_model(tiny_grpo(), tiny_lm)[0]
    tokens, _, mask = grpo.sample(tiny_grpo(), model, PROMPTS, noise_of(8), 1.0, EOS_IDS, 0)
    right = gradient_of(model, grpo.policy_logprobs(tiny_grpo(), model, PROMPTS, tokens, mask))
    calls, attend = [], grpo.attend
    monkeypatch.setattr(grpo, "attend", lambda *given: calls.append(1) or attend(*given))
    model.activation_checkpointing_enable()
    logprobs = grpo.policy_logprobs(tiny_grpo(), model.train(), PROMPTS, tokens, mask)
    forward = len(calls)
    assert_close(gradient_of(model, logprobs), right)
    assert forward and len(calls) == 2 * forward


def test_spans_that_do_not_fit_a_model_are_found(grpo, tiny_grpo, tiny_lm, monkeypatch, capsys):
    """Planted: answers that do not see their prompt. The model keeps its own attention and the fast path, and a line
    says so; what is saved is a model like any other."""
    monkeypatch.setattr(grpo, "SPANS_FROM", 0)
    right, attend = grpo.load_model(tiny_grpo(), tiny_lm)[0], grpo.attend_in_spans

    def alone(query, key, value, mask, scaling, spans):
        own = [[(length, i) for i, (length, _) in enumerate(row)] for row in spans]
        return attend(query, key, value, mask, scaling, own)

    monkeypatch.setattr(grpo, "attend_in_spans", alone)
    model = grpo.load_model(tiny_grpo(), tiny_lm)[0]
    assert right.has_spans and not model.has_spans and model.plain_because == ""
    assert "the model's own, not in spans: log-probabilities in packed rows differ" in capsys.readouterr().out
    tokens, _, mask = grpo.sample(tiny_grpo(), model, PROMPTS, noise_of(8), 1.0, EOS_IDS, 0)
    found = grpo.policy_logprobs(tiny_grpo(), model, PROMPTS, tokens, mask)
    torch.testing.assert_close(found, own_logprobs(model, PROMPTS, tokens, mask), rtol=0, atol=1e-4)


def test_a_reference_attends_as_its_policy(grpo, tiny_grpo, tiny_lm, monkeypatch):
    """So the KL is exactly 0 at first, in bfloat16 too."""
    for spans_from, dtype in ((0, "float32"), (0, "bfloat16"), (512, "bfloat16")):
        monkeypatch.setattr(grpo, "SPANS_FROM", spans_from)
        args = tiny_grpo(dtype=dtype, optimizer="adamw8bit")
        policy = grpo.load_model(args, tiny_lm)[0]
        reference = grpo.load_reference(args, tiny_lm, policy)
        assert reference.has_spans == policy.has_spans == (spans_from == 0) and policy.plain_because == ""
        tokens, _, mask = grpo.sample(args, policy, PROMPTS, noise_of(8), 1.0, EOS_IDS, 0)
        found = [grpo.policy_logprobs(args, x, PROMPTS, tokens, mask).detach() for x in (policy, reference)]
        assert mask.any() and found[0].any() and torch.equal(*found)


@pytest.mark.parametrize(
    ("now", "wanted", "asked"),
    [
        ("sdpa", True, {"": "spans", "text": "spans"}),
        ("spans", False, {"": "sdpa", "text": "sdpa"}),
        ("sdpa", False, None),
        ("eager", True, None),
        ("eager", False, None),
    ],
)
def test_only_the_part_that_reads_text_attends_in_spans(grpo, now, wanted, asked):
    """Of a model with parts for pictures or sound, which may refuse it. Nothing is set where nothing changes."""
    text, sound, found = SimpleNamespace(_attn_implementation=now), SimpleNamespace(_attn_implementation="eager"), []
    config = SimpleNamespace(text=text, sound=sound, sub_configs={"text": 0, "sound": 0}, get_text_config=lambda: text)
    model = SimpleNamespace(config=config, set_attn_implementation=found.append)
    grpo.set_spans(model, wanted)
    assert found == ([asked] if asked else [])


def test_a_saved_model_says_nothing_of_spans(grpo, tiny_grpo, tiny_lm, monkeypatch, tmp_path):
    monkeypatch.setattr(grpo, "SPANS_FROM", 0)
    model = grpo.load_model(tiny_grpo(), tiny_lm)[0]
    model.save_pretrained(tmp_path / "saved")
    assert model.has_spans and "spans" not in (tmp_path / "saved" / "config.json").read_text()


def test_a_copy_of_the_weights_is_not_forced(grpo, monkeypatch):
    """Weights stay as they are where a copy would fill the memory, and where the processor has no such product."""
    model = torch.nn.Sequential(torch.nn.Linear(512, 256), torch.nn.Linear(256, 512))
    model.device, size = torch.device("cpu"), 2 * 512 * 256 * 4
    changed, reorder, calls = [], torch.ops.mkldnn._reorder_linear_weight, []

    def fails_at_second(*given):
        calls.append(1)
        if len(calls) % 2 == 0:
            raise RuntimeError("no such product")
        return reorder(*given)

    for bytes_left, fails in ((2 * size, False), (2 * size - 1, False), (math.inf, True)):
        monkeypatch.setattr(grpo, "available_memory", lambda left=bytes_left: left)
        if fails:
            monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", fails_at_second)
        with grpo.reordered_weights(model, 3):
            changed.append(["forward" in vars(x) for x in model])
    assert changed == [[True, True], [False, False], [False, False]] and len(calls) == 2
    assert not any("forward" in vars(x) for x in model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_the_processors_order(grpo, dtype):
    """Large linear layers give the same products with their weights in the processor's own order. Small layers, and
    layers with a product of their own, stay. Afterwards, and after an error, all are as they were. A processor may lack
    such products in bfloat16: then nothing changes."""
    torch.manual_seed(0)
    own = torch.nn.Linear(512, 256)
    own.forward = lambda x: x
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 512, bias=False), own)
    model = model.append(torch.nn.Linear(512, 8)).to(dtype)
    model.device = torch.device("cpu")
    changed, has_order = [x for x in model[:2]], True
    try:
        torch.ops.mkldnn._reorder_linear_weight(model[0].weight.detach(), 3)
    except RuntimeError:
        has_order = False
    assert has_order or dtype == torch.bfloat16
    for rows in (1, 3, 40):
        states = torch.randn(rows, 256, dtype=dtype)
        with torch.no_grad():
            right = model(states)
            with grpo.reordered_weights(model, 3):
                assert ["forward" in vars(x) for x in model] == [has_order, has_order, True, False]
                found = model(states)
        torch.testing.assert_close(found, right, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)
    with pytest.raises(ZeroDivisionError), grpo.reordered_weights(model, 3):
        raise ZeroDivisionError
    assert not any("forward" in vars(x) for x in changed) and own.forward(3) == 3


# ---- The comparison at the start ----


@pytest.fixture
def window(grpo, tmp_path):
    return build(grpo, tmp_path / "window", "mistral", {**COMMON, "sliding_window": 40})


def test_a_window_that_the_fast_path_ignores_is_found(grpo, tiny_grpo, window, monkeypatch):
    """Planted: masks without windows. Prompts of 20 do not reach beyond a window of 40; the comparison does."""
    assert grpo.load_model(tiny_grpo(), window)[0].plain_because == ""
    masks = grpo.attention_masks

    def ignored(model, attention_mask, *positions):
        here = torch.zeros(1, 1, dtype=torch.long)
        return masks(model, attention_mask, here, here)

    monkeypatch.setattr(grpo, "attention_masks", ignored)
    model = grpo.load_model(tiny_grpo(), window)[0]
    assert "nats a token" in model.plain_because and not grpo.is_fast(tiny_grpo(), model)
    tokens, logprobs, mask = grpo.sample(tiny_grpo(), model, [PROMPTS[1] * 3], noise_of(4), 1.0, EOS_IDS, 0)
    own = own_logprobs(model, [PROMPTS[1] * 3], tokens, mask).detach()
    torch.testing.assert_close(logprobs, own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fault", ["fill", "positions", "raises"])
def test_a_fault_of_the_fast_path_is_found(grpo, tiny_grpo, tiny_lm, monkeypatch, fault):
    """Rows that mix up the cache when others leave it; positions that are one off; an exception."""
    if fault == "fill":
        new_cache = grpo.new_cache

        def mixed_up(*arguments):
            cache = new_cache(*arguments)
            for layer in cache.layers:
                layer.fill = lambda finished, moved, live, used, layer=layer: setattr(layer, "live", live)
            return cache

        monkeypatch.setattr(grpo, "new_cache", mixed_up)
    if fault == "positions":
        pack_rows = grpo.pack_rows
        off = lambda batch: batch._replace(positions=torch.arange(batch.ids.shape[1]).expand_as(batch.ids))  # noqa: E731
        monkeypatch.setattr(grpo, "pack_rows", lambda *arguments: off(pack_rows(*arguments)))
    if fault == "raises":
        monkeypatch.setattr(grpo, "new_cache", lambda *arguments: 1 / 0)
    why = grpo.load_model(tiny_grpo(), tiny_lm)[0].plain_because
    assert {
        "fill": "with the shared cache differ by",
        "positions": "in packed rows differ by",
        "raises": "do not fit it: ZeroDivisionError",
    }[fault] in why


def test_memory_that_is_out_is_no_reason(grpo, tiny_grpo, tiny_lm, monkeypatch):
    def out(*arguments):
        raise torch.OutOfMemoryError("out")

    monkeypatch.setattr(grpo, "new_cache", out)
    with pytest.raises(torch.OutOfMemoryError):
        grpo.load_model(tiny_grpo(), tiny_lm)


def test_a_model_without_a_cache_is_refused(grpo, tiny_grpo, tmp_path):
    settings = {key: x for key, x in GPT2.items() if key != "eos_token_id"}
    directory = build(grpo, tmp_path / "m", "openai-gpt", settings)
    with pytest.raises(grpo.InputError, match="cannot be trained here: it cannot sample with a cache: AttributeError"):
        grpo.train(tiny_grpo(model=directory))
    assert not (tmp_path / "run").exists()


def test_every_dropout_is_off(grpo, tiny_grpo, tmp_path):
    """[G14] Outside nn.Dropout too, where it is a float of a module or a config: training mode is evaluation mode."""
    dropouts = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    cases = {
        "gpt2": ("gpt2", {**GPT2, **dropouts}),
        "opt": ("opt", {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.3, "attention_dropout": 0.3}),
        "mixtral": ("mixtral", {**COMMON, **EXPERTS, "attention_dropout": 0.3, "router_jitter_noise": 0.3}),
    }
    ids = torch.tensor([PROMPTS[1]])
    for name, (kind, settings) in cases.items():
        directory = build(grpo, tmp_path / name, kind, settings)
        left = AutoModelForCausalLM.from_pretrained(directory).train()
        assert not torch.equal(left(ids).logits, left(ids).logits)
        model, _, _ = grpo.load_model(tiny_grpo(), directory)
        evaluated = model(ids).logits
        assert torch.equal(model.train()(ids).logits, evaluated), name
        assert not model.config.attention_dropout if name != "gpt2" else not model.config.attn_pdrop


def test_a_cap_that_is_not_felt_yet_is_found(grpo, tiny_grpo, tmp_path):
    """Logits far below their cap: no comparison finds it, but training can make them grow."""
    kind, settings, _ = MODELS["capped"]
    directory = build(grpo, tmp_path / "m", kind, {**settings, "final_logit_softcapping": 1e4})
    assert "final_logit_softcapping" in grpo.load_model(tiny_grpo(), directory)[0].plain_because


def test_a_model_that_is_another_in_training_mode_is_refused(grpo, tiny_grpo, tmp_path, monkeypatch):
    """As by a dropout that goes by another name: planted, dropout is left on."""
    monkeypatch.setattr(grpo, "without_dropout", lambda model: model)
    directory = build(grpo, tmp_path / "m", "gpt2", {**GPT2, "resid_pdrop": 0.3})
    with pytest.raises(grpo.InputError, match=r"cannot be trained here: a forward pass in training mode differs by"):
        grpo.load_model(tiny_grpo(), directory)


def test_a_sampler_in_the_router_is_refused(grpo, tiny_grpo, tmp_path):
    """PhiMoE's: it samples only between experts that are nearly equal, so that a comparison may not see it."""
    directory = build(grpo, tmp_path / "m", "phimoe", {**COMMON, **EXPERTS, "sliding_window": None})
    with pytest.raises(grpo.InputError, match="its routers sample their experts in training mode"):
        grpo.load_model(tiny_grpo(), directory)


# ---- Whole runs on the plain path ----


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"beta": 0.1, "num_epochs": 2}, {"lora_rank": 2, "beta": 0.1}])
def test_a_plain_run_is_a_fast_run(grpo, tiny_grpo, options, capsys):
    """--no-fast changes rounding alone, for a policy with reference and adapter too, and says so."""
    if "lora_rank" in options:
        pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    options = {"steps": 2, "learning_rate": 1e-3, **options}
    fast = grpo.train(tiny_grpo("fast", **options))
    assert "plain, not fast" not in capsys.readouterr().out
    plain = grpo.train(tiny_grpo("plain", **options, fast=False))
    assert "path        plain, not fast: --no-fast\n" in capsys.readouterr().out
    for one, other in zip(fast, plain, strict=True):
        for name, number in one.items():
            if not name.startswith(("time/", "memory/", "policy/sampler_gap")):
                assert other[name] == pytest.approx(number, rel=2e-3, abs=1e-4), name


def test_a_run_of_a_model_that_only_the_plain_path_gets_right(grpo, tiny_grpo, tmp_path, capsys):
    """It learns, its reference too is scored plainly, and a line says why it is slower."""
    kind, settings, _ = MODELS["recurrent"]
    args = tiny_grpo(model=build(grpo, tmp_path / "m", kind, settings), beta=0.1, steps=2)
    metrics = grpo.train(args)
    assert "path        plain, not fast: linear_attention layers: " in capsys.readouterr().out
    assert metrics[1]["policy/sampler_gap"] < 1e-4 and metrics[1]["policy/grad_norm"] > 1e-3
    assert metrics[1]["kl/reference"] == pytest.approx(0, abs=1e-6) and metrics[2]["kl/reference"] > 1e-6
