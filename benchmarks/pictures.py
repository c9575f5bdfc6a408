"""The pictures of ideas in the pages: clipping, GAE's weights, groups, reductions, packed rows, and others.

Run      python benchmarks/pictures.py               (all of them, half a minute)
         python benchmarks/pictures.py idea_clip     (those whose names are given)
Writes   docs/figures/idea_agent.png idea_clip.png idea_gae.png idea_ends.png idea_models.png idea_tokens.png
         idea_group.png idea_reductions.png idea_packed.png idea_offload.png idea_kl.png

Every number in a picture comes from a function of the scripts, of gae_reference.py or of memory_plan.py. Nothing is
measured and nothing is random but the samples of idea_kl, whose seed is fixed.
"""

import sys
from dataclasses import replace

import torch
from cartpole import ROOT
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

sys.path.insert(0, str(ROOT))
import gae_reference
import grpo_llm
import ppo_cartpole
import rlhf_gpt2_ppo

GOOD, BAD, NEUTRAL, ACCENT, LIGHT, DARK = "#1b7f4d", "#b5342b", "#8a8f98", "#2f5fa8", "#eef1f5", "#22262b"
STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False}


def new_figure(width, height, *grid, **options):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(*(grid or (1, 1)), **options)


def save(figure, name):
    figure.savefig(ROOT / "docs" / "figures" / name, dpi=110)


def canvas(axes, width, height):
    """Axes without ticks, a unit of width and of height alike."""
    axes.set(xlim=(-0.1, width + 0.1), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return axes


def box(axes, x, y, width, height, text, color=LIGHT, text_color=DARK, edge=NEUTRAL, **options):
    style = f"round,pad=0,rounding_size={min(width, height) * 0.12}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=edge))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=text_color, **options)


def arrow(axes, start, end, color=DARK, bend=0.0, style="-|>"):
    connection = f"arc3,rad={bend}"
    shape = {"arrowstyle": style, "mutation_scale": 14, "connectionstyle": connection}
    axes.add_patch(FancyArrowPatch(start, end, color=color, lw=1.5, **shape))


def idea_agent():
    """Agent and environment, and a language model's reading of them."""
    figure, panels = new_figure(11, 3.6, 1, 2)
    names = (
        ("any agent", "agent\npolicy π(a|s)", "environment", "action aₜ", "state sₜ₊₁, reward rₜ"),
        (
            "a language model",
            "model\nπ(token | text so far)",
            "the text, and a verifier\nor a reward model",
            "next token",
            "the text with it;\na reward after EOS",
        ),
    )
    for axes, (title, agent, environment, action, answer) in zip(panels, names):
        canvas(axes, 10, 6.6)
        box(axes, 0.0, 2.1, 4.1, 1.8, agent, "#dfe8f5", edge=ACCENT)
        box(axes, 5.9, 2.1, 4.1, 1.8, environment)
        arrow(axes, (2.2, 4.0), (7.8, 4.0), ACCENT, bend=-0.35)
        arrow(axes, (7.8, 2.0), (2.2, 2.0), GOOD, bend=-0.35)
        axes.text(5, 5.25, action, ha="center", va="bottom", color=ACCENT)
        axes.text(5, 0.8, answer, ha="center", va="top", color=GOOD)
        axes.text(5, 6.1, title, ha="center", weight="bold")
    save(figure, "idea_agent.png")


def idea_clip():
    """PPO's objective and its gradient by the ratio, for a good and for a bad action."""
    figure, panels = new_figure(10, 3.8, 1, 2, sharey=True)
    ratios = torch.linspace(0.4, 1.8, 561).tolist()
    low, high = ppo_cartpole.Args().clip_coef, ppo_cartpole.Args().clip_coef
    for axes, advantage in zip(panels, (1.0, -1.0)):
        found = [gae_reference.clipped_surrogate(ratio, advantage, low, high) for ratio in ratios]
        axes.axvspan(1 - low, 1 + high, color=LIGHT)
        axes.axhline(0, color=NEUTRAL, lw=0.8)
        axes.plot(ratios, [ratio * advantage for ratio in ratios], ":", color=NEUTRAL, lw=1.5, label="ρ Â, not clipped")
        axes.plot(ratios, [value for value, _ in found], color=ACCENT, lw=2.5, label="the objective: the minimum")
        slopes = [slope for _, slope in found]
        axes.step(ratios, slopes, color=GOOD if advantage > 0 else BAD, lw=1.8, ls="--", label="its gradient by ρ")
        axes.plot([1], [advantage], "o", color=DARK, ms=6)
        kind = "a good action, Â = +1" if advantage > 0 else "a bad action, Â = −1"
        axes.set(title=kind, xlabel="ratio ρ = π / π_old   (the dot: before the first step)", ylim=(-2, 2))
        axes.legend(loc="lower right" if advantage > 0 else "upper right", frameon=False)
    save(figure, "idea_clip.png")


def idea_gae():
    """The weight of each later TD error in an advantage, for four λ: GAE of a reward of 1 at one step."""
    figure, axes = new_figure(9, 3.6)
    steps, nothing, width = 16, [0.0] * 16, 0.2
    for i, (gae_lambda, color) in enumerate(zip((0.0, 0.5, 0.95, 1.0), (DARK, BAD, ACCENT, GOOD))):
        weights = []
        for later in range(steps):
            rewards = [float(t == later) for t in range(steps)]
            ends = [False] * steps
            found = gae_reference.gae_double_sum(rewards, nothing, nothing, ends, ends, 1.0, gae_lambda)
            weights.append(found[0])
        places = [later + (i - 1.5) * width for later in range(steps)]
        axes.bar(places, weights, width, color=color, label=f"λ = {gae_lambda:g}")
    axes.set(xlabel="steps ahead, l   (γ = 1)", ylabel="weight of δₜ₊ₗ in Âₜ", xticks=range(steps))
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    save(figure, "idea_gae.png")


def idea_ends():
    """Six steps with a truncation and a termination: what the advantage of each step takes from the future."""
    example = gae_reference.EXAMPLE
    names = ("rewards", "values", "next_values")
    tensors = [torch.tensor(example[name], dtype=torch.float64).unsqueeze(-1) for name in names]
    ends = [torch.tensor(example[name]).unsqueeze(-1) for name in ("terminated", "done")]
    advantages = ppo_cartpole.compute_gae(*tensors, *ends, gamma=0.9, gae_lambda=0.95).flatten().tolist()
    figure, axes = new_figure(11, 3.9)
    canvas(axes, 18.4, 7.0)
    axes.set_aspect("auto")
    axes.text(0.2, 6.6, "which V each step counts on:", color=NEUTRAL)
    axes.text(0.2, 0.15, "advantages flow back along the green arrows, never across a dotted line", color=GOOD)
    for t, advantage in enumerate(advantages):
        x = 0.3 + 3 * t
        terminated, done = example["terminated"][t], example["done"][t]
        last = t == len(advantages) - 1
        color = BAD if terminated else ACCENT if done or last else NEUTRAL
        box(axes, x, 2.4, 2.2, 1.9, f"t = {t}\nr = {example['rewards'][t]:g}\nV = {example['values'][t]:g}", edge=color)
        if terminated:
            axes.text(x + 2.2, 5.25, "terminated:\nno future", ha="center", va="bottom", color=color)
            axes.plot([x + 2.35, x + 2.85], [3.6, 3.1], color=color, lw=3)
            axes.plot([x + 2.35, x + 2.85], [3.1, 3.6], color=color, lw=3)
        else:
            arrow(axes, (x + 2.5, 5.1), (x + 1.6, 4.4), color, bend=0.3)
            kind = "truncated:\n" if done else "rollout ends:\n" if last else ""
            text = f"{kind}V(next) = {example['next_values'][t]:g}"
            axes.text(x + 2.2, 5.25, text, ha="center", va="bottom", color=color)
        if not done and not last:
            arrow(axes, (x + 3.05, 1.4), (x + 2.15, 1.4), GOOD)
        if done:
            axes.plot([x + 2.6] * 2, [0.8, 2.9], color=DARK, ls=":", lw=1.5)
        axes.text(x + 1.1, 1.4, signed(f"Â = {advantage:.2f}"), ha="center", va="center", weight="bold")
    save(figure, "idea_ends.png")


def idea_models():
    """Which models PPO for language models holds, and which GRPO. Heights: bytes a parameter in float32 with Adam."""
    trained, frozen = 4 + 4 + 8, 4  # weight, gradient, Adam's two moments; a frozen model is its weights
    columns = (
        ("PPO", [("policy", trained), ("value network", trained), ("reference", frozen), ("reward model", frozen)]),
        ("GRPO, β above 0,\na reward model", [("policy", trained), ("reference", frozen), ("reward model", frozen)]),
        ("GRPO, β above 0,\na verifier", [("policy", trained), ("reference", frozen)]),
        ("GRPO, β = 0,\na verifier: our default", [("policy", trained)]),
    )
    figure, axes = new_figure(10, 4.6)
    for x, (_, models) in enumerate(columns):
        bottom = 0
        for name, size in models:
            color = "#dfe8f5" if size == trained else LIGHT
            edge = ACCENT if size == trained else NEUTRAL
            axes.add_patch(Rectangle((x - 0.38, bottom), 0.76, size, facecolor=color, edgecolor=edge, lw=1.5))
            axes.text(x, bottom + size / 2, name, ha="center", va="center")
            bottom += size
        axes.text(x, bottom + 0.8, f"{bottom} bytes", ha="center", weight="bold")
    axes.set(xlim=(-0.6, 3.6), ylim=(0, 45), ylabel="bytes a parameter (float32, Adam)")
    axes.set_xticks(range(len(columns)), [name for name, _ in columns])
    handles = [Rectangle((0, 0), 1, 1, facecolor=c, edgecolor=e) for c, e in (("#dfe8f5", ACCENT), (LIGHT, NEUTRAL))]
    axes.legend(
        handles, ["trained: weight 4, gradient 4, Adam 8", "frozen: weight 4"], loc="upper right", frameon=False
    )
    save(figure, "idea_models.png")


def signed(text):
    """With a minus sign instead of a hyphen."""
    return text.replace("-", "−")


def cells(axes, y, label, values, colors=None, size=11):
    """A row of a table of tokens."""
    axes.text(-0.15, y + 0.5, label, ha="right", va="center")
    for t, value in enumerate(values):
        color = LIGHT if colors is None else colors[t]
        axes.add_patch(Rectangle((t, y), 1, 1, facecolor=color, edgecolor="white", lw=2))
        axes.text(t + 0.5, y + 0.5, value, ha="center", va="center", fontsize=size)


def idea_tokens():
    """A response token by token: mask, log-probabilities, rewards and advantages of stage 3."""
    tokens = ["The", "plot", "was", "moving", ".", "EOS", "pad", "pad"]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    ref_logprob = torch.tensor([[-1.2, -2.0, -0.3, -3.1, -0.9, -0.4, 0.0, 0.0]])
    logprob = torch.tensor([[-1.2, -1.8, -0.3, -1.9, -0.9, -0.2, 0.0, 0.0]])
    score, args = torch.tensor([1.0]), rlhf_gpt2_ppo.Args()
    rewards = rlhf_gpt2_ppo.kl_penalized_rewards(score, logprob, ref_logprob, mask, args.kl_coef)
    values = torch.zeros_like(rewards)
    advantages = rlhf_gpt2_ppo.compute_gae(rewards, values, mask, args.gamma, args.gae_lambda)
    figure, axes = new_figure(10, 4.2)
    canvas(axes, 8, 6)
    axes.set(xlim=(-2.9, 8), aspect="auto")
    real = mask[0].tolist()
    faded = [LIGHT if m else "#fafafa" for m in real]
    cells(axes, 5, "token yₜ", tokens, ["#dfe8f5" if m else "#fafafa" for m in real])
    cells(axes, 4, "mask: 1 up to the first EOS", real, faded)
    cells(
        axes, 3, "ln π − ln π_ref", [f"{x:.1f}" if m else "" for x, m in zip((logprob - ref_logprob)[0], real)], faded
    )
    colors = [
        "#fafafa" if not m else "#d8eee2" if x > 0 else "#f7dcd9" if x < 0 else LIGHT for x, m in zip(rewards[0], real)
    ]
    cells(
        axes,
        2,
        f"reward rₜ (β = {args.kl_coef:g}, score {score.item():g})",
        [signed(f"{x:.2f}") if m else "0" for x, m in zip(rewards[0], real)],
        colors,
    )
    tints = ["#d8eee2" if m else "#fafafa" for m in real]
    cells(
        axes,
        1,
        f"advantage (γ = 1, λ = {args.gae_lambda:g}, V = 0)",
        [signed(f"{x:.2f}") if m else "0" for x, m in zip(advantages[0], real)],
        tints,
    )
    axes.text(3.5, 0.75, "likelier than in the\nreference: pays KL", ha="center", va="top", color=BAD)
    axes.text(5.5, 0.75, "the end: the\nscore is paid", ha="center", va="top", color=GOOD)
    axes.text(7.0, 0.75, "padding:\nnever counts", ha="center", va="top", color=NEUTRAL)
    save(figure, "idea_tokens.png")


def idea_group():
    """Eight answers to one question become eight advantages."""
    answers = ["7", "7", "8", "12", "7", "9", "7", "71"]
    rewards = torch.tensor([float(answer == "7") for answer in answers])
    panels_of = [
        ("rewards: 1 if right", rewards),
        ("less the group's mean", grpo_llm.group_advantages(rewards, 8, scale_by_std=False)),
        ("divided by its standard deviation", grpo_llm.group_advantages(rewards, 8)),
    ]
    rare = torch.tensor([1.0] + [0.0] * 7)
    figure, panels = new_figure(11, 5.4, 2, 3, sharey=True)
    rows = [(panels[0], panels_of, answers)]
    rare_of = [
        (title, x)
        for (title, _), x in zip(
            panels_of, (rare, grpo_llm.group_advantages(rare, 8, False), grpo_llm.group_advantages(rare, 8))
        )
    ]
    rows.append((panels[1], rare_of, ["7", "8", "9", "12", "6", "5", "71", "8"]))
    for row, found, texts in rows:
        for axes, (title, numbers) in zip(row, found):
            colors = [GOOD if x > 0 else BAD if x < 0 else NEUTRAL for x in numbers]
            axes.bar(range(8), numbers, color=colors)
            axes.axhline(0, color=DARK, lw=0.8)
            for i, x in enumerate(numbers.tolist()):
                if i and x == numbers[i - 1]:
                    continue  # as its neighbour: there is no room for so many labels
                axes.text(
                    i,
                    x + (0.12 if x >= 0 else -0.12),
                    signed(f"{x:.2g}"),
                    ha="center",
                    va="bottom" if x >= 0 else "top",
                    fontsize=9,
                )
            axes.set(ylim=(-1.7, 3.2))
            axes.set_xticks(range(8), texts)
            axes.set_title(title if texts is answers else "")
            axes.spines["bottom"].set_visible(False)
    panels[0][0].set_ylabel("four of eight right")
    panels[1][0].set_ylabel("one of eight right")
    figure.supxlabel("the eight answers to “3+4=”", fontsize=11)
    save(figure, "idea_group.png")


def idea_reductions():
    """What a token weighs under the three reductions: areas are the gradients of reduce_loss."""
    lengths, longest = (2, 8), 10
    mask = torch.tensor([[1.0] * n + [0.0] * (longest - n) for n in lengths])
    figure, panels = new_figure(11, 2.7, 1, 3)
    titles = {
        "sequence": "GRPO: mean of each answer",
        "token": "DAPO: mean of all tokens",
        "constant": "Dr. GRPO: by a constant, T = 10",
    }
    for axes, (reduction, title) in zip(panels, titles.items()):
        loss = torch.ones_like(mask, requires_grad=True)
        grpo_llm.reduce_loss(loss, mask, reduction, int(mask.sum()), len(lengths), longest).backward()
        scale = 3.2  # units of height for a weight of 1
        for row, n in enumerate(lengths):
            weight = loss.grad[row, 0].item()
            y = 0.75 - 0.7 * row
            for t in range(n):
                axes.add_patch(
                    Rectangle((t, y), 1, weight * scale, facecolor=(ACCENT, GOOD)[row], edgecolor="white", lw=2)
                )
            total = loss.grad[row].sum().item()
            axes.text(n + 0.25, y, f"{weight:.3f} a token\n{total:.2f} the answer", va="bottom", fontsize=10)
            axes.text(-0.2, y, ("short", "long")[row], ha="right", va="bottom")
        axes.set(xlim=(-2.4, 14), ylim=(0, 1.65), title=title)
        axes.axis("off")
    save(figure, "idea_reductions.png")


def idea_packed():
    """One packed row: a prompt, and three completions of it that do not see each other."""
    prompts, lengths, longest = [[1, 2, 3, 4]], (4, 3, 5), 5
    tokens = torch.arange(3 * longest).view(3, longest)
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
    batch = grpo_llm.pack_rows(prompts, tokens, mask, [[0, 1, 2]], 3)
    seen, positions = batch.attention_mask[0, 0], batch.positions[0].tolist()
    owner = ["q"] * len(prompts[0]) + [name for name, n in zip("abc", lengths) for _ in range(n - 1)]
    index = {name: 0 for name in "qabc"}
    labels = []
    for name in owner:
        labels.append(f"{name}{index[name]}")
        index[name] += 1
    colors = {"q": NEUTRAL, "a": ACCENT, "b": GOOD, "c": BAD}
    size = len(owner)
    figure, axes = new_figure(7.6, 6.6)
    for i in range(size):
        for j in range(size):
            color = colors[owner[j]] if seen[i, j] else "#fafafa"
            axes.add_patch(Rectangle((j, size - 1 - i), 1, 1, facecolor=color, edgecolor="white", lw=1.5))
    for j, label in enumerate(labels):
        axes.text(j + 0.5, size + 0.95, label, ha="center", color=colors[owner[j]])
        axes.text(j + 0.5, size + 0.25, positions[j], ha="center", color=DARK, fontsize=10)
        axes.text(-0.25, size - 0.5 - j, label, ha="right", va="center", color=colors[owner[j]])
    axes.text(-0.25, size + 0.95, "token", ha="right")
    axes.text(-0.25, size + 0.25, "position", ha="right", fontsize=10)
    axes.set(xlim=(-2.2, size + 0.2), ylim=(-0.2, size + 1.8), aspect="equal")
    axes.set_title("a row's token (left) sees the coloured tokens (top)")
    axes.axis("off")
    save(figure, "idea_packed.png")


def idea_offload():
    """What lies on the card and on the host, without --offload and with it, as memory_plan.py counts it."""
    from memory_plan import PlanArgs, memory_plan

    settings = PlanArgs(
        model="Qwen/Qwen2.5-1.5B-Instruct", task="gsm8k", plan=256, gpu_memory=12, beta=0.04, max_tokens=1024,
        gradient_checkpointing=True, micro_batch_tokens=1280, logprob_tokens=256, generate_rows=32, offload=False,
        dtype="bfloat16", optimizer="adamw8bit", prompts_per_step=8, group_size=8,
    )  # fmt: skip
    plans = [memory_plan(replace(settings, offload=offload), settings.plan, 12) for offload in (False, True)]
    names = ("weights", "gradients", "optimizer state", "reference")
    colors = dict(zip(names, (ACCENT, "#7fa3d6", "#9aa0a8", "#d2d6dc")))
    figure, axes = new_figure(10, 3.9)
    places = ["on the card, without", "on the card, with --offload", "on the host, with --offload"]
    columns = [(plans[0], 0), (plans[1], 0), (plans[1], 1)]
    for y, (plan, column) in enumerate(columns):
        left = 0.0
        for name in names:
            size = plan[name][column] / 1e9
            axes.barh(y, size, left=left, color=colors[name], edgecolor="white", label=name if y == 0 else None)
            if size > 0.6:
                white = name in ("weights",)
                axes.text(left + size / 2, y, f"{size:.1f}", ha="center", va="center", color="white" if white else DARK)
            left += size
        axes.text(left + 0.15, y, f"{left:.1f} GB", va="center", weight="bold")
    axes.set_yticks(range(3), places)
    axes.invert_yaxis()
    axes.set(xlabel="GB of what stays (activations, keys and values come on top)", xlim=(0, 15))
    axes.legend(ncols=4, frameon=False, loc="upper center", bbox_to_anchor=(0.45, 1.17))
    save(figure, "idea_offload.png")


def idea_kl():
    """Distributions of k1, k2 and k3 over samples of one normal against another."""
    generator = torch.Generator().manual_seed(0)
    x, shift = torch.randn(20_000, generator=generator, dtype=torch.float64), 0.5
    old, new = -(x**2) / 2, -((x - shift) ** 2) / 2  # ln p up to the same constant; KL(old‖new) = shift² / 2
    found = [gae_reference.kl_estimates(a, b) for a, b in zip(new.tolist(), old.tolist())]
    figure, panels = new_figure(11, 3.5, 1, 3, sharex=True, sharey=True)
    edges = torch.linspace(-1.5, 2.0, 71).tolist()
    for axes, name, values, color in zip(panels, ("k1", "k2", "k3"), zip(*found), (BAD, ACCENT, GOOD)):
        values = torch.tensor(values)
        axes.hist(values.clamp(max=1.99).tolist(), edges, color=color, alpha=0.75)
        axes.axvline(shift**2 / 2, color=DARK, lw=2, label=f"true KL {shift**2 / 2:.3f}")
        axes.axvline(values.mean().item(), color=DARK, lw=2, ls=":", label=f"their mean {values.mean():.3f}")
        axes.set(
            title=f"{name}: standard deviation {values.std():.2f}", xlabel="one sample's estimate, nats", yticks=[]
        )
        axes.legend(frameon=False, loc="upper right", handlelength=1.2, fontsize=10)
        axes.spines["left"].set_visible(False)
    save(figure, "idea_kl.png")


PICTURES = (idea_agent, idea_clip, idea_gae, idea_ends, idea_models, idea_tokens, idea_group, idea_reductions)
PICTURES = {draw.__name__: draw for draw in (*PICTURES, idea_packed, idea_offload, idea_kl)}


def main():
    from matplotlib import rc_context

    names = sys.argv[1:] or list(PICTURES)
    if unknown := [name for name in names if name not in PICTURES]:
        sys.exit(f"error: {unknown[0]} is none of {', '.join(PICTURES)}")
    with rc_context(STYLE):
        for name in names:
            PICTURES[name]()
            print(f"docs/figures/{name}.png")


if __name__ == "__main__":
    main()
