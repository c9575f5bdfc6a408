"""grpo_llm beyond what a small card holds: --offload, --plan, --shard, on transformers of a few dimensions."""

from pathlib import Path

import pytest
import torch

NOT_COMPARED = ("time/", "memory/")
BF16 = {"dtype": "bfloat16", "optimizer": "adamw8bit", "learning_rate": 1e-3}


def run(grpo, args):
    """(metrics, weights, optimizer state) of a run."""
    metrics = grpo.train(args)
    saved = torch.load(Path(args.run_dir) / "checkpoint.pt", weights_only=True)
    rows = [{name: x for name, x in row.items() if not name.startswith(NOT_COMPARED)} for row in metrics]
    return rows, saved["policy"], saved["optimizer"]


def weights_of(grpo, args):
    return {name: x.detach().clone() for name, x in grpo.load_model(args, args.model)[0].named_parameters()}


# ---- --offload ----


def test_offload_changes_nothing(grpo, tiny_grpo):
    """[G24] [G25] Gradients that add up on the host over micro-batches, a norm that is cut, state that is streamed, a
    reference whose weights visit: the bits of the plain run."""
    options = {**BF16, "beta": 0.1, "micro_batch_tokens": 48, "num_minibatches": 2, "max_grad_norm": 0.05, "steps": 3}
    plain = run(grpo, tiny_grpo("plain", **options))
    offloaded = run(grpo, tiny_grpo("offloaded", **options, offload=True))
    assert plain[0] == offloaded[0]
    assert all(row["policy/grad_norm"] > 0.05 for row in plain[0][1:]), "the norm was cut"
    before = weights_of(grpo, tiny_grpo(**options))
    assert sum(not torch.equal(before[name], x) for name, x in plain[1].items()) > len(before) / 2
    for name, weights in plain[1].items():
        assert torch.equal(weights, offloaded[1][name]), name
    for own, other in zip(plain[2]["state"], offloaded[2]["state"], strict=True):
        assert all(torch.equal(*pair) for pair in zip(own, other, strict=True))


def test_an_offloaded_run_goes_on_without(grpo, tiny_grpo):
    """--offload says where things are, not what they are: a resumed run may change it."""
    straight = run(grpo, tiny_grpo("straight", **BF16, steps=4))
    args = tiny_grpo("split", **BF16, steps=4, offload=True, checkpoint_every=2)
    stop_after(grpo, args, 2)
    resumed = grpo.replace(grpo.resumed_args(args.run_dir), offload=False)
    grpo.train(resumed)
    saved = torch.load(Path(args.run_dir) / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 4
    assert all(torch.equal(x, saved["policy"][name]) for name, x in straight[1].items())


def stop_after(grpo, args, step):
    """Train until the checkpoint of that step is written, then be interrupted."""
    save = grpo.save

    def save_and_stop(path, content):
        save(path, content)
        if content["step"] == step:
            raise KeyboardInterrupt

    grpo.save = save_and_stop
    try:
        with pytest.raises(KeyboardInterrupt):
            grpo.train(args)
    finally:
        grpo.save = save


@pytest.mark.parametrize("offload", [False, True])
def test_gradients_alive_in_backward(grpo, tiny_grpo, tiny_lm, offload):
    """[G24] Plain, all of them at the end; offloaded, never more than one parameter's, and two micro-batches add up."""
    args = tiny_grpo(**BF16, offload=offload)
    model = grpo.load_model(args, tiny_lm)[0]
    parameters = list(model.parameters())
    alive = []
    for parameter in parameters:  # before the optimizer's own hooks
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(x.grad.nbytes for x in parameters if x.grad is not None))
        )
    grpo.new_optimizer(args, model)
    tokens = torch.arange(3, 13).view(1, -1)
    for _ in range(2):
        model(tokens).logits.square().mean().backward()
    sizes = [parameter.nbytes for parameter in parameters]
    assert len(alive) == 2 * len(parameters)
    assert max(alive) == (max(sizes) if offload else sum(sizes))
    twice = [grpo.gradient_of(x) for x in parameters]
    assert all((x.grad is None) == offload for x in parameters)
    other = grpo.load_model(args, tiny_lm)[0]
    other(tokens).logits.square().mean().backward()
    for parameter, gradient in zip(other.parameters(), twice):
        torch.testing.assert_close(gradient, 2 * parameter.grad, rtol=0, atol=0)


def test_a_streamed_model_visits(grpo, tiny_grpo, tiny_lm):
    """[G25] The same log-probabilities; while a module runs its weights are copies, the others' wait; a tied weight
    waits once."""
    args = tiny_grpo(offload=True, optimizer="adamw8bit")
    plain, streamed = grpo.load_model(args, tiny_lm)[0], grpo.load_reference(args, tiny_lm)
    homes = {name: x.data_ptr() for name, x in streamed.named_parameters()}
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight
    visiting = []
    for module in streamed.modules():
        module.register_forward_hook(
            lambda *_: visiting.append(sum(x.data_ptr() != homes[name] for name, x in streamed.named_parameters())),
            prepend=True,
        )
    tokens = torch.arange(3, 13).view(1, -1)
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, streamed(tokens).logits)
    assert max(visiting) == 1 and sum(visiting) > len(homes) / 2
    assert {name: x.data_ptr() for name, x in streamed.named_parameters()} == homes
    assert not any(x.requires_grad for x in streamed.parameters())


def test_cut_gradients(grpo):
    """A global norm, in float32 however small the gradients' type: 5 of 3 and 4, cut to 1."""
    gradients = [torch.full((9,), 1.0), torch.full((16,), 1.0, dtype=torch.bfloat16)]
    assert grpo.cut_gradients(gradients, 100.0) == pytest.approx(5.0)
    assert gradients[0][0] == 1
    assert grpo.cut_gradients(gradients, 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(gradients[0], torch.full((9,), 0.2))
    torch.testing.assert_close(gradients[1], torch.full((16,), 0.2, dtype=torch.bfloat16))


def test_offload_needs_the_8_bit_optimizer(grpo):
    with pytest.raises(ValueError, match="offload keeps the state of optimizer adamw8bit on the host, got adamw"):
        grpo.Args(offload=True)
