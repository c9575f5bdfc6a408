"""Generation, packed rows and the optimizer of grpo_llm, on transformers of a few dimensions."""

import copy
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["12+34\n", "7\n", "99-1+20\n"]


@pytest.fixture
def lm(grpo, tiny_grpo, tiny_lm):
    """(model, tokenizer, EOS ids, prompts as token lists) as a run loads them."""
    model, tokenizer, eos_ids = grpo.load_model(tiny_grpo(), tiny_lm)
    return model, tokenizer, eos_ids, [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def noise_of(rows, length, seed=0):
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))


EOS_IDS = (1, 5, 9)  # several, so that rows end early and at different times


def sampled(grpo, lm, group_size=4, eos_ids=EOS_IDS, pad_id=0):
    """Tokens, log-probabilities, mask of 12 tokens at most at temperature 0.7."""
    model, _, _, prompts = lm
    return grpo.generate(model, prompts, noise_of(len(prompts) * group_size, 12), 0.7, eos_ids, pad_id)


def plain_logprobs(grpo, model, prompts, tokens, mask, temperature):
    """(B, T) log-probabilities, one sequence at a time by the model's own forward pass, without padding."""
    group_size, rows = len(tokens) // len(prompts), []
    for i, row in enumerate(tokens):
        prompt, length = prompts[i // group_size], int(mask[i].sum())
        logits = model(torch.tensor([prompt + row[:length].tolist()])).logits[:, len(prompt) - 1 : -1]
        own = grpo.token_logprobs(logits.float(), row[None, :length], temperature)[0]
        rows.append(torch.cat([own, own.new_zeros(len(row) - length)]))
    return torch.stack(rows)


def packed_logprobs(grpo, model, prompts, tokens, mask, temperature, row_tokens, micro_batch_tokens, chunk=1024):
    """The same by packed rows, and how many rows and micro-batches it took."""
    group_size = len(tokens) // len(prompts)
    lengths = dict(enumerate(mask.sum(-1).tolist()))
    plan = grpo.plan_rows(list(map(len, prompts)), lengths, group_size, row_tokens, micro_batch_tokens)
    parts, order = [], []
    for rows in plan:
        batch = grpo.pack_rows(prompts, tokens, mask, rows, group_size)
        parts.append(grpo.completion_logprobs(model, batch, tokens.shape[1], temperature, chunk))
        order += batch.sequences.tolist()
    assert sorted(order) == list(range(len(tokens)))
    return torch.cat(parts)[torch.tensor(order).argsort()], (sum(map(len, plan)), len(plan))


def gradient_of(model, logprobs):
    """Of a weighted sum in which every token has a weight of its own."""
    weights = torch.linspace(-1, 2, logprobs.numel()).view(logprobs.shape)
    gradients = torch.autograd.grad((weights * logprobs).sum(), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


# ---- Generation ----


def test_greedy_generation_is_transformers_own(grpo, lm):
    """Three prompts of different lengths, padded on the left: token for token what model.generate gives."""
    model, tokenizer, eos_ids, prompts = lm
    tokens, _, mask = grpo.generate(model, prompts, noise_of(3, 12), 0.0, eos_ids, tokenizer.pad_token_id)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    theirs = model.generate(**inputs, do_sample=False, max_new_tokens=12, pad_token_id=tokenizer.pad_token_id)
    theirs = theirs[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(tokens[:, : theirs.shape[1]], theirs) and len({tuple(row) for row in tokens.tolist()}) == 3
    assert mask.sum() >= 12


def test_sampler_and_trainer_agree(grpo, lm):
    """[R9] At temperature 0.7: the sampler's log-probabilities, token by token with a shared prompt and rows that
    leave, are those of packed rows and of one plain forward pass each, to 1e-5."""
    model, _, _, prompts = lm
    tokens, logprobs, mask = sampled(grpo, lm)
    on = mask.bool()
    assert on.sum() > 60 and not on.all()
    with torch.no_grad():
        plain = plain_logprobs(grpo, model, prompts, tokens, mask, 0.7)
        packed, _ = packed_logprobs(grpo, model, prompts, tokens, mask, 0.7, 48, 96)
        other, _ = packed_logprobs(grpo, model, prompts, tokens, mask, 1.0, 48, 96)
    assert (plain[on] < -0.1).float().mean() > 0.3
    torch.testing.assert_close(logprobs[on], plain[on], rtol=0, atol=1e-5)
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-5)
    assert (other - plain)[on].abs().mean() > 0.05, "the temperature matters"


@pytest.mark.parametrize("eos_ids", [[1], [1, 5, 9]])
def test_mask_ends_with_the_first_eos(grpo, lm, eos_ids):
    """[G9] The first EOS, of one or of several, is in the mask; nothing after it; the rest is padding."""
    tokens, logprobs, mask = sampled(grpo, lm, group_size=20, eos_ids=eos_ids, pad_id=2)
    is_eos = torch.isin(tokens, torch.tensor(eos_ids))
    assert 5 < is_eos.any(-1).sum() < 60, "some end, some do not"
    if len(eos_ids) > 1:
        assert len(tokens[is_eos].unique()) > 1
    expected = (is_eos.cumsum(-1) - is_eos.long()) == 0
    assert torch.equal(mask.bool(), expected) and is_eos.sum(-1).max() == 1
    assert (tokens[~expected] == 2).all() and (logprobs[~expected] == 0).all()
    assert (logprobs[expected] <= 0).all() and (logprobs[expected] < 0).float().mean() > 0.9


def test_completions_do_not_depend_on_their_neighbours(grpo, lm):
    """[G1] [G23] A prompt alone, one row alone, other prompts beside it, other padding: the same tokens from the same
    noise, though the neighbours end at other times."""
    model, _, _, prompts = lm
    tokens, logprobs, mask = sampled(grpo, lm)
    noise = noise_of(12, 12)
    assert len(mask.sum(-1).unique()) > 2
    for p, prompt in enumerate(prompts):
        part = slice(4 * p, 4 * p + 4)
        alone = grpo.generate(model, [prompt], noise[part], 0.7, EOS_IDS, 7)
        assert torch.equal(alone[0] * alone[2], tokens[part] * mask[part]) and torch.equal(alone[2], mask[part])
        torch.testing.assert_close(alone[1], logprobs[part], rtol=0, atol=1e-5)
    for i in range(12):
        one = grpo.generate(model, [prompts[i // 4]], noise[i : i + 1], 0.7, EOS_IDS, 0)
        assert torch.equal(one[0][0], tokens[i]) and torch.equal(one[2][0], mask[i])
    longer = grpo.generate(model, [*prompts, [5] * 30], noise_of(16, 12), 0.7, EOS_IDS, 0)
    assert torch.equal(longer[0][:12], tokens)


def test_rows_at_once_change_nothing(grpo, lm, tiny_grpo):
    """--generate-rows splits the prompts; each group has the noise of its name."""
    model, tokenizer, eos_ids, _ = lm
    problems = [grpo.Problem(prompt.strip(), "1") for prompt in PROMPTS]
    names = [("train", 7), ("train", 8), ("train", 9)]
    runs = []
    for rows, chosen in ((100, [0, 1, 2]), (4, [0, 1, 2]), (1, [2, 0])):
        args = tiny_grpo(generate_rows=rows)
        given = [problems[i] for i in chosen], 4, 0.7, [names[i] for i in chosen]
        runs.append(grpo.sample_groups(args, model, tokenizer, eos_ids, *given))
    whole, split, turned = runs
    for one, other in [*zip(whole, split, strict=True), (whole[2], turned[0]), (whole[0], turned[1])]:
        assert one.texts == other.texts and torch.equal(one.tokens, other.tokens) and one.prompt == other.prompt
    assert len({text for group in whole for text in group.texts}) > 8


def test_samples_follow_the_distribution(grpo, lm):
    """No top-k, no top-p, and the temperature: 20,000 first tokens against softmax(logits / 1.5) by chi-square."""
    model, _, eos_ids, prompts = lm
    tokens, logprobs, _ = grpo.generate(model, prompts[:1], noise_of(20_000, 1), 1.5, eos_ids, 0)
    with torch.no_grad():
        logits = model(torch.tensor(prompts[:1])).logits[0, -1]
    expected = (logits / 1.5).softmax(-1) * 20_000
    found = torch.bincount(tokens[:, 0], minlength=len(expected))
    common = expected > 5
    chi_square = float(((found - expected)[common] ** 2 / expected[common]).sum())
    assert common.sum() > 15 and chi_square < 60  # 99.9% of a χ² with 25 degrees of freedom are below 53
    torch.testing.assert_close(logprobs[:, 0], (logits / 1.5).log_softmax(-1)[tokens[:, 0]], rtol=0, atol=1e-5)
    wrong = logits.softmax(-1) * 20_000
    assert float(((found - wrong)[common] ** 2 / wrong[common]).sum()) > 200


def test_sample_token(grpo):
    """Chances 0.1, 0.2, 0.7: noise below 0.1 is the first, up to 0.3 the second."""
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(5, 3)
    token, logprob = grpo.sample_token(logits, torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31]), 1.0)
    assert token.tolist() == [0, 0, 1, 1, 2]
    torch.testing.assert_close(logprob.exp(), torch.tensor([0.1, 0.1, 0.2, 0.2, 0.7]))
    odds = torch.tensor([1.0, 9.0]).log().expand(2, 2)
    token, logprob = grpo.sample_token(odds, torch.tensor([0.24, 0.26]), 2.0)  # 1 : 3 at temperature 2
    assert token.tolist() == [0, 1]
    torch.testing.assert_close(logprob.exp(), torch.tensor([0.25, 0.75]))
    token, logprob = grpo.sample_token(odds, torch.tensor([0.0, 0.0]), 0.0)
    assert token.tolist() == [1, 1] and logprob.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [3, 1000, 50_000])
def test_noise_at_its_edges(grpo, vocabulary, dtype):
    """0 and the largest float32 below 1 never find a token of chance 0, at either end of the vocabulary."""
    logits = torch.zeros(2, vocabulary, dtype=dtype)
    logits[:, 0] = logits[:, -1] = -math.inf
    token, logprob = grpo.sample_token(logits, torch.tensor([0.0, 1 - 2**-24]), 1.0)
    assert token.tolist() == [1, vocabulary - 2]
    torch.testing.assert_close(logprob, torch.full((2,), -math.log(vocabulary - 2)), rtol=0, atol=1e-4)
    large = torch.tensor([[1e4, -1e4, 1e4]], dtype=dtype)
    token, logprob = grpo.sample_token(large, torch.tensor([0.75]), 1.0)
    assert token.tolist() == [2] and float(logprob) == pytest.approx(-math.log(2), abs=1e-5)


# ---- Packed rows ----


@st.composite
def layouts(draw):
    group_size = draw(st.integers(1, 4))
    prompt_lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    sequences = range(group_size * len(prompt_lengths))
    lengths = {i: draw(st.integers(1, 15)) for i in sequences if draw(st.booleans())}
    return prompt_lengths, lengths, group_size, draw(st.integers(1, 60)), draw(st.integers(1, 150))


@settings(max_examples=200, deadline=None)
@given(case=layouts())
def test_plan_of_rows(grpo, case):
    """[G17] Every sequence once; a prompt once a row; no row above its capacity; the longest first; within budget."""
    prompt_lengths, lengths, group_size, row_tokens, micro_batch_tokens = case
    plan = grpo.plan_rows(*case)
    rows = [row for rows in plan for row in rows]
    assert sorted(i for row in rows for i in row) == sorted(lengths)
    assert all(rows) and all(plan)
    sizes = []
    for row in rows:
        groups = [i // group_size for i in row]
        changes = 1 + sum(one != other for one, other in pairwise(groups))
        assert changes == len(set(groups)), "a group's sequences are neighbours"
        sizes.append(sum(prompt_lengths[g] for g in set(groups)) + sum(lengths[i] - 1 for i in row))
        assert sizes[-1] == grpo.row_size(row, prompt_lengths, lengths, group_size)
    capacity = max([row_tokens, *(prompt_lengths[i // group_size] + n - 1 for i, n in lengths.items())])
    assert all(size <= capacity for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
    start = 0
    for part in plan:
        assert len(part) == 1 or len(part) * sizes[start] <= micro_batch_tokens
        start += len(part)


def test_a_group_shares_its_prompt(grpo):
    assert grpo.plan_rows([10], {0: 5, 1: 5, 2: 5}, 3, 22, 100) == [[[0, 1, 2]]]  # 10 + 3 × 4
    assert sorted(map(len, grpo.plan_rows([10], {0: 5, 1: 5, 2: 5}, 3, 21, 100)[0])) == [1, 2]
    assert grpo.plan_rows([10], {}, 3, 21, 100) == []


LAYOUTS = [(1, 1), (30, 60), (48, 10_000), (500, 500)]  # row_tokens, micro_batch_tokens


def test_packed_rows_are_plain_sequences(grpo, lm):
    """[G17] Prompts shared, several groups a row, any sizes: values and gradients of one plain pass a sequence."""
    model, _, _, prompts = lm
    tokens, _, mask = sampled(grpo, lm)
    expected = plain_logprobs(grpo, model, prompts, tokens, mask, 0.7)
    slope = gradient_of(model, expected)
    assert slope.abs().max() > 1
    counts = set()
    for layout in LAYOUTS:
        found, count = packed_logprobs(grpo, model, prompts, tokens, mask, 0.7, *layout)
        counts.add(count)
        assert (found[~mask.bool()] == 0).all()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(gradient_of(model, found), slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()))
    assert len(counts) == len(LAYOUTS) and max(counts)[0] == 6 and min(counts)[0] < 3


def test_log_probabilities_in_chunks(grpo, lm):
    """[G16] Any number of tokens at a time: values and gradients of all at once."""
    model, _, _, prompts = lm
    tokens, _, mask = sampled(grpo, lm)
    whole, _ = packed_logprobs(grpo, model, prompts, tokens, mask, 0.7, 48, 96)
    slope = gradient_of(model, whole)
    for chunk in (1, 7):
        found, _ = packed_logprobs(grpo, model, prompts, tokens, mask, 0.7, 48, 96, chunk)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(gradient_of(model, found), slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()))


def test_logits_of_a_chunk_alone_exist(grpo, lm):
    """[G16] The head never sees more than logprob_tokens states, forward or backward. The last chunk is computed once:
    the backward pass begins with it, when its logits are the only ones."""
    model, _, _, prompts = lm
    tokens, _, mask = sampled(grpo, lm)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    found, _ = packed_logprobs(grpo, model, prompts, tokens, mask, 0.7, 500, 500, chunk=7)
    forward = len(seen)
    gradient_of(model, found)
    last = seen[forward - 1]
    assert max(seen) == 7 and sum(seen[:forward]) == mask.sum() and sum(seen[forward:]) == mask.sum() - last
    assert forward > 2


def test_gradient_checkpointing_changes_nothing(grpo, lm):
    model, _, _, prompts = lm
    tokens, _, mask = sampled(grpo, lm)
    whole, _ = packed_logprobs(grpo, model, prompts, tokens, mask, 0.7, 48, 96)
    slope = gradient_of(model, whole)
    model.activation_checkpointing_enable()
    model.train()
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    found, (_, micro_batches) = packed_logprobs(grpo, model, prompts, tokens, mask, 0.7, 48, 96)
    torch.testing.assert_close(gradient_of(model, found), slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()))
    assert len(calls) == 2 * micro_batches, "each layer is computed again in the backward pass"


@pytest.mark.parametrize("fault", ["positions", "mask", "state"])
def test_a_wrong_position_or_mask_shows(grpo, lm, fault):
    """Positions that go on through the row, completions that see each other, a completion's first token predicted
    from the token beside the prompt's last: not 1e-5 off but whole nats."""
    model, _, _, prompts = lm
    tokens, _, mask = sampled(grpo, lm)
    ((rows,),) = [grpo.plan_rows(list(map(len, prompts)), dict(enumerate(mask.sum(-1).tolist())), 4, 500, 500)]
    batch = grpo.pack_rows(prompts, tokens, mask, rows, 4)
    order = batch.sequences
    with torch.no_grad():
        plain = plain_logprobs(grpo, model, prompts, tokens, mask, 0.7)[order]
        right = grpo.completion_logprobs(model, batch, 12, 0.7, 1024)
        size = batch.ids.shape[1]
        wrong = {
            "positions": batch._replace(positions=torch.arange(size).expand_as(batch.positions)),
            "mask": batch._replace(attention_mask=torch.ones_like(batch.attention_mask).tril()),
            "state": batch._replace(sources=(batch.sources - 1).clamp(min=0)),
        }[fault]
        found = grpo.completion_logprobs(model, wrong, 12, 0.7, 1024)
    on = mask[order].bool()
    assert (right - plain)[on].abs().mean() < 1e-5
    assert (found - plain)[on].abs().mean() > 0.3


# ---- Models that fit and models that do not ----


def saved_model(tmp_path, tokenizer, kind, **sizes):
    import transformers

    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(config)
    model.save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    return str(tmp_path / kind)


COMMON = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
OTHERS = {
    "Llama": COMMON,
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3, "n_positions": 64},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(grpo, tiny_grpo, tmp_path, kind):
    """[G14] GPT-2 with its learned positions and dropout 0.1, and Llama: sampler, packed rows and plain passes agree,
    in training mode too, where dropout would show."""
    directory = saved_model(tmp_path, grpo.new_tokenizer(), kind, **OTHERS[kind])
    model, tokenizer, eos_ids = grpo.load_model(tiny_grpo(), directory)
    lm = model, tokenizer, eos_ids, [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    tokens, logprobs, mask = sampled(grpo, lm)
    model.train()
    with torch.no_grad():
        packed, _ = packed_logprobs(grpo, model, lm[3], tokens, mask, 0.7, 48, 96)
        plain = plain_logprobs(grpo, model, lm[3], tokens, mask, 0.7)
    on = mask.bool()
    assert plain[on].abs().mean() > 0.3
    torch.testing.assert_close(packed[on], plain[on], rtol=0, atol=1e-5)
    torch.testing.assert_close(logprobs[on], plain[on], rtol=0, atol=1e-5)


def test_dropout_is_off(grpo, tiny_grpo, tiny_lm):
    """[G14] The checkpoint has attention dropout 0.1; in training mode two passes are equal all the same."""
    tokens = torch.tensor([[3, 4, 5, 6, 7, 8, 9]])
    plain = AutoModelForCausalLM.from_pretrained(tiny_lm).train()
    assert plain.config.attention_dropout == 0.1 and not torch.equal(plain(tokens).logits, plain(tokens).logits)
    model, _, _ = grpo.load_model(tiny_grpo(), tiny_lm)
    assert not model.training
    model.train()
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def altered(tiny_lm, directory, change):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_lm), AutoTokenizer.from_pretrained(tiny_lm)
    change(model, tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_eos_of_config_and_tokenizer(grpo, tiny_grpo, tiny_lm, tmp_path):
    """[G9] The generation config's, one or several, and the tokenizer's; a model without any is refused."""

    def several(model, tokenizer):
        model.generation_config.eos_token_id = [5, 9]

    def none(model, tokenizer):
        model.generation_config.eos_token_id = None
        model.config.eos_token_id = None
        tokenizer.eos_token = None

    assert grpo.load_model(tiny_grpo(), tiny_lm)[2] == [1]
    assert grpo.load_model(tiny_grpo(), altered(tiny_lm, tmp_path / "a", several))[2] == [1, 5, 9]
    with pytest.raises(grpo.InputError, match="has an EOS token; nothing could end"):
        grpo.load_model(tiny_grpo(), altered(tiny_lm, tmp_path / "b", none))


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_padding_may_be_missing_or_eos(grpo, tiny_grpo, tiny_lm, tmp_path, monkeypatch, pad):
    """As Llama's and GPT-2's tokenizers: the run is the same, for padding is read nowhere."""

    def change(model, tokenizer):
        tokenizer.pad_token = pad

    directory = altered(tiny_lm, tmp_path / "other", change)
    assert AutoTokenizer.from_pretrained(directory).pad_token == pad
    usual, other = (grpo.train(tiny_grpo(name, model=name_or)) for name, name_or in (("a", tiny_lm), ("b", directory)))
    for one, two in zip(usual, other, strict=True):
        for name in one:
            assert name.startswith(("time/", "memory/")) or one[name] == two[name], name


def test_prompts_in_the_models_own_chat_form(grpo, tiny_grpo, lm):
    _, tokenizer, _, _ = lm
    problem = grpo.Problem("12+34", "46")
    assert tokenizer.decode(grpo.encode_prompt(tiny_grpo(), tokenizer, problem)) == "12+34\n"
    assert tokenizer.decode(grpo.encode_prompt(tiny_grpo(model=None), tokenizer, problem)) == "12+34\n"
    tokenizer.chat_template = "{% for m in messages %}({{ m['content'] }}){% endfor %}:"
    ids = grpo.encode_prompt(tiny_grpo(instruction="{}=, {}"), tokenizer, problem)
    assert tokenizer.decode(ids) == "(12+34=, 12+34):"


# ---- bfloat16 and the 8-bit optimizer ----


def test_round_stochastically(grpo):
    """[G18] One of the two neighbours, with the chances that make the mean right, of either sign."""
    torch.manual_seed(0)
    for value in (1.0 + 0.3 / 128, -(1.0 + 0.3 / 128), 3e-5, -1e20):
        x = torch.full((40_000,), value)
        rounded = grpo.round_stochastically(x)
        assert rounded.dtype == torch.bfloat16
        low, high = sorted(rounded.float().unique().tolist())
        assert low < value < high and high - low < abs(value) / 64
        chance = (value - low) / (high - low)
        found = float((rounded.float() == high).float().mean())
        assert abs(found - chance) < 4 * (chance * (1 - chance) / 40_000) ** 0.5 + 1e-6
    exact = torch.tensor([0.0, 1.0, -2.5, 2.0**-40]).repeat(1000)
    assert torch.equal(grpo.round_stochastically(exact).float(), exact)


def test_small_steps_are_not_lost(grpo):
    """[G18] The trap: at lr 1e-6 every weight of size 0.02 or more, rounded to the nearest, stays where it is, for
    ever; rounded stochastically they move by lr a step on average."""
    torch.manual_seed(0)
    start = (0.02 + torch.rand(50_000)).bfloat16()
    nearest = (start.float() - 1e-6).bfloat16()
    assert torch.equal(nearest, start)
    weights = torch.nn.Parameter(start.clone())
    optimizer = grpo.AdamW8bit([weights], lr=1e-6)
    for _ in range(50):
        weights.grad = torch.ones_like(weights)
        optimizer.step()
    moved = float((weights.detach().float() - start.float()).mean())
    assert moved == pytest.approx(-50e-6, rel=0.15)
    assert weights.dtype == torch.bfloat16


def compared(grpo, steps, shape=(12, 250), lr=1e-2, **options):
    """The same gradients, of different sizes, through AdamW8bit and torch.optim.AdamW: weights of both."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    scale = torch.logspace(-3, 1, start.numel()).view(shape)
    mine, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    own = grpo.AdamW8bit([mine], lr=lr, **options)
    reference = torch.optim.AdamW([theirs], lr=lr, betas=(0.9, 0.95), **{"weight_decay": 0.0, **options})
    for _ in range(steps):
        mine.grad = scale * (1 + 0.5 * torch.randn(shape, generator=generator))
        theirs.grad = mine.grad.clone()
        own.step()
        reference.step()
    return start, mine.detach(), theirs.detach()


def test_adamw8bit_follows_adamw(grpo):
    """[G19] The first step exactly; then within the error of its codes, 2.2% of √v and 4.4% of m."""
    start, mine, theirs = compared(grpo, 1)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert (theirs - start).abs().min() > 0.009
    for steps in (2, 10):
        start, mine, theirs = compared(grpo, steps)
        error = ((mine - theirs) / (theirs - start)).abs()
        assert float(error.mean()) < 0.03 and float(error.quantile(0.99)) < 0.08, steps


def test_adamw8bit_weight_decay(grpo):
    """Decoupled: weights shrink by lr · decay, whatever the gradient; without it they do not."""
    weights = torch.nn.Parameter(torch.full((3, 100), 2.0))
    optimizer = grpo.AdamW8bit([weights], lr=0.1, weight_decay=0.5)
    weights.grad = torch.zeros(3, 100)
    optimizer.step()
    torch.testing.assert_close(weights.detach(), torch.full((3, 100), 1.9))
    _, mine, theirs = compared(grpo, 5, weight_decay=0.1)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=4e-3)


def test_adamw8bit_state(grpo):
    """[G19] 2 bytes a parameter and a little for each block; parameters of any shape; those without gradient rest."""
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((1000, 100), (2, 3, 7), (7,), (3, 5))]
    optimizer = grpo.AdamW8bit(parameters, lr=1e-2)
    state = sum(x.numel() * x.element_size() for x in optimizer.state[0])
    assert state / parameters[0].numel() <= 2.1
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters[:3]:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert [torch.equal(one, two) for one, two in zip(before, parameters)] == [False, False, False, True]
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in parameters)


def test_blocks_are_never_split_by_rows(grpo):
    """[G27] Every block lies in one row, so the rows of a parameter, updated as two parameters, keep the same state."""
    start = [torch.randn(shape) for shape in ((128, 320), (128, 16), (128, 2, 272), (128,))]
    whole = [torch.nn.Parameter(x.clone()) for x in start]
    parts = [torch.nn.Parameter(part.clone()) for x in start for part in x.split([80, 48])]
    together, apart = grpo.AdamW8bit(whole, lr=1e-2), grpo.AdamW8bit(parts, lr=1e-2)
    assert [x[0].shape for x in together.state] == [(128, 2, 160), (128, 1, 16), (128, 4, 136), (128, 1, 1)]
    for _ in range(3):
        for i, parameter in enumerate(whole):
            parameter.grad = torch.randn_like(parameter)
            for part, gradient in zip(parts[2 * i : 2 * i + 2], parameter.grad.split([80, 48])):
                part.grad = gradient.clone()
        together.step()
        apart.step()
    for i, state in enumerate(together.state):
        for x, one, two in zip(state, *apart.state[2 * i : 2 * i + 2], strict=True):
            assert torch.equal(x, torch.cat([one, two]))
    vector, moments = whole[3], together.decode(*together.state[3])
    assert vector.shape == moments[0].flatten().shape and moments[0].abs().min() > 0


def test_state_in_the_blocks_of_an_older_version_is_refused(grpo):
    optimizer = grpo.AdamW8bit([torch.nn.Parameter(torch.ones(3, 100))], lr=1e-2)
    older = [torch.zeros(2, n) for n in (256, 256, 1, 1)]
    with pytest.raises(
        grpo.InputError, match="has the blocks of an older version of this script and cannot be resumed"
    ):
        optimizer.load_state_dict({"steps": 1, "state": [older]})


def test_adamw8bit_in_slices(grpo):
    """A parameter larger than a slice: the same bits as its two parts have as parameters of their own."""
    rows = (1 << 9) + 3  # of 1,024: multiples of a processor's vectors, whose ends may be rounded otherwise
    start, gradients = torch.randn(rows, 1024), torch.randn(3, rows, 1024)
    ends = []
    for parts in ([rows], [rows // 2, rows - rows // 2]):
        parameters = [torch.nn.Parameter(part.clone()) for part in start.split(parts)]
        optimizer = grpo.AdamW8bit(parameters, lr=1e-2)
        for gradient in gradients:
            for parameter, part in zip(parameters, gradient.split(parts)):
                parameter.grad = part.clone()
            optimizer.step()
        ends.append(torch.cat([parameter.detach() for parameter in parameters]))
    assert torch.equal(*ends) and (ends[0] - start).abs().mean() > 1e-2


def test_adamw8bit_saved_and_loaded(grpo, tmp_path):
    """Through a file, in the middle: the same bits as without the pause."""
    gradients = torch.randn(6, 7, 100, generator=torch.Generator().manual_seed(1))
    ends = []
    for pause in (False, True):
        weights = torch.nn.Parameter(torch.ones(7, 100))
        optimizer = grpo.AdamW8bit([weights], lr=1e-2)
        for step, gradient in enumerate(gradients):
            if pause and step == 3:
                torch.save(optimizer.state_dict(), tmp_path / "o.pt")
                optimizer = grpo.AdamW8bit([weights], lr=1e-2)
                optimizer.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
            weights.grad = gradient.clone()
            optimizer.step()
        ends.append(weights.detach())
    assert torch.equal(*ends)


def test_adamw8bit_beside_a_large_gradient(grpo):
    """Small gradients in the block of a large one that changes its sign, so that √v has a large maximum and m has not.
    They take steps that are too small, never huge ones, after they have ended either: √v is rounded up, not to 0."""
    small = torch.logspace(-9, -3, 255)
    weights = torch.nn.Parameter(torch.zeros(1, 256))
    optimizer = grpo.AdamW8bit([weights], lr=1e-2)
    for step in range(30):
        before = weights.detach().clone()
        weights.grad = torch.cat([torch.tensor([(-1.0) ** step]), small if step < 20 else 0 * small])[None]
        optimizer.step()
        moved = (weights.detach() - before)[0, 1:]
        assert (moved <= 0).all() and moved.abs().max() < 0.02
    assert weights.detach()[0, -1] < -0.1


def test_adamw8bit_converges(grpo):
    """A quadratic whose curvatures lie four orders of magnitude apart, in bfloat16 weights too: to its minimum."""
    curvature, target = torch.logspace(-2, 2, 1000).view(4, 250), torch.linspace(-1, 1, 1000).view(4, 250)
    for dtype, nearest in ((torch.float32, 1e-3), (torch.bfloat16, 5e-3)):
        torch.manual_seed(0)
        weights = torch.nn.Parameter(torch.zeros(4, 250, dtype=dtype))
        optimizer = grpo.AdamW8bit([weights], lr=0.0)
        for step in range(400):
            optimizer.param_groups[0]["lr"] = 2e-2 * (1 - step / 400)
            weights.grad = (curvature * (weights.detach().float() - target)).to(dtype)
            optimizer.step()
        assert float((weights.detach().float() - target).abs().mean()) < nearest


def test_a_run_in_bfloat16(grpo, tiny_grpo, tiny_lm):
    """Weights move and stay bfloat16; the sampler's arithmetic is not the trainer's to the last bit, and it is said
    by how much; ratios are 1 all the same."""
    args = tiny_grpo(dtype="bfloat16", optimizer="adamw8bit", learning_rate=1e-4, steps=3, beta=0.1)
    metrics = grpo.train(args)
    assert all(0 < row["policy/sampler_gap"] < 0.1 for row in metrics[1:])
    assert all(row["policy/ratio_mean"] == row["policy/ratio_max"] == 1 for row in metrics[1:])
    assert metrics[1]["kl/reference"] == 0 < metrics[-1]["kl/reference"]
    saved = torch.load(Path(args.run_dir) / "checkpoint.pt", weights_only=True)["policy"]
    before = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.bfloat16).state_dict()
    assert all(weight.dtype == torch.bfloat16 for weight in saved.values())
    moved = [not torch.equal(weight, before[name]) for name, weight in saved.items()]
    assert sum(moved) > len(moved) / 2
    assert copy.deepcopy(metrics) == metrics  # plain numbers, no tensors
