"""The pages that a reader looks things up in: what they say of the scripts and of each other is so."""

import dataclasses
import re

import pytest
import torch
from contract import ROOT, load_script

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]
SOURCES = [*PAGES, *sorted(ROOT.glob("*.py"))]


def read(path):
    return path.read_text(encoding="utf-8")


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(read(path)), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]  # a link keeps its text
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_headings_that_exist(page):
    for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", without_code(read(page))):
        other = (page.parent / target).resolve() if target else page
        if other.suffix == ".md":
            assert anchor in anchors(other), f"{page.name} links to {target}#{anchor}"


def test_the_tests_that_pages_name_exist():
    """As `tests/FILE.py::test_NAME`, in every page."""
    named = {found for page in PAGES for found in re.findall(r"(tests/\w+\.py)::(test_\w+)", read(page))}
    assert len(named) >= 100
    for file, test in sorted(named):
        assert re.search(rf"^def {test}\(", read(ROOT / file), re.MULTILINE), f"{file} has no {test}"


def test_reading_names_every_paper_that_a_page_or_a_script_names():
    """By its number at arXiv; each is a link."""
    number = r"\b(2[0-9]{3}\.[0-9]{5}|1[5-9][0-9]{2}\.[0-9]{5})\b"
    named = {found for path in SOURCES for found in re.findall(rf"arXiv[: ]{{1,2}}{number}", read(path))}
    named |= {found for path in SOURCES for found in re.findall(rf"arxiv\.org/abs/{number}", read(path))}
    linked = set(re.findall(rf"\]\(https://arxiv\.org/abs/{number}\)", read(ROOT / "docs" / "reading.md")))
    assert len(named) >= 20
    assert named - linked == set()


SETTINGS = {
    "## Stages 1 and 2": ["ppo_cartpole.py", "ppo_atari.py"],
    "## Stage 3": ["rlhf_gpt2_ppo.py"],
    "## Stage 4": ["grpo_llm.py"],
}


IN_ENGLISH = {
    "## 第 1、2 阶段": "## Stages 1 and 2",
    "## 第 3 阶段": "## Stage 3",
    "## 第 4 阶段": "## Stage 4",
    "| 参数 |": "| setting |",
    "| 自动 |": "| chosen |",
    "| 无 |": "| none |",
    "| 开 |": "| on |",
    "| 关 |": "| off |",
}


def tables_of_settings():
    """[(script, [(flag, default as the page says it, metrics)])] of docs/settings.md and of its Chinese page."""
    found = []
    for page in ("docs/settings.md", "docs/zh/settings.md"):
        text = read(ROOT / page)
        for chinese, english in IN_ENGLISH.items():
            text = text.replace(chinese, english)
        for heading, scripts in SETTINGS.items():
            section = text[text.index(heading) :].split("\n## ")[0]
            tables = re.split(r"^\| setting \|.*\n\|---.*\n", section, flags=re.MULTILINE)[1:]
            assert len(tables) == len(scripts), page
            for script, table in zip(scripts, tables):
                rows = re.findall(r"^\| `--([\w-]+)` \| ([^|]+) \|.*\| ([^|]+) \|$", table, re.MULTILINE)
                found.append((script, rows))
    return found


@pytest.mark.parametrize(("script", "rows"), tables_of_settings(), ids=lambda x: x if isinstance(x, str) else "")
def test_settings_are_the_defaults_of_the_script(script, rows):
    fields = {field.name: field.default for field in dataclasses.fields(load_script(ROOT / script).Args)}
    metrics = read(ROOT / "docs" / "metrics.md")
    assert len(rows) >= 10
    for flag, said, curves in rows:
        default = fields[flag.replace("-", "_")]
        if said in ("chosen", "none"):
            assert default is None, f"{script} --{flag}"
        elif isinstance(default, bool):
            assert said == ("on" if default else "off"), f"{script} --{flag}"
        elif isinstance(default, str):
            assert said == default, f"{script} --{flag}"
        else:
            assert float(said) == default, f"{script} --{flag}: the page says {said}, the script {default}"
        assert all(f"| `{curve}` |" in metrics for curve in re.findall(r"`([\w/@]+)`", curves)), f"{script} --{flag}"
        assert "`" in curves


def test_glossary_has_each_word_in_both_languages():
    rows = re.findall(
        r"^\| (?!English|---)(.+) \| (.+) \| (.+) \| (.+) \|$", read(ROOT / "docs" / "glossary.md"), re.MULTILINE
    )
    words = [row[0] for row in rows]
    assert len(rows) >= 70 and len(set(words)) == len(rows)
    assert words == sorted(words, key=lambda word: word.lower().replace("–", "-"))
    for word, chinese, plain, explained in rows:
        assert re.search(r"[\u4e00-\u9fff]", explained) and not re.search(r"[\u4e00-\u9fff]", word + plain)
        assert re.search(r"[\u4e00-\u9fff]", chinese) or chinese == word or chinese.split("（")[0].isascii()
        assert plain.endswith(".") and explained.endswith("。")
    for needed in ("temperature", "top-k, top-p", "LoRA", "perplexity", "chat template", "FSDP2", "advantage"):
        assert needed in words
    assert len([word for word in words if word.startswith("bootstrap")]) == 2


def test_settings_name_the_rates_that_stage_3_chooses():
    args = load_script(ROOT / "rlhf_gpt2_ppo.py").Args()
    models = [torch.nn.Linear(1, size, bias=False, device="meta") for size in (10_000, 20_000_000)]
    rows = re.findall(
        r"^\| `--([\w-]+)` \| chosen .*ours (\S+) and ([\de-]+) ", read(ROOT / "docs" / "settings.md"), re.MULTILINE
    )
    assert len(rows) == 3
    for flag, *said in rows:
        assert [float(x) for x in said] == [args.rate(flag.replace("-", "_"), model) for model in models]


FORMULAS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md"))]


def formulas(text):
    """([formulas of a page], [what is wrong with its dollars]), outside code."""
    wrong = []
    text = re.sub(r"`[^`\n]+`", "`code`", without_code(text))
    parts = re.split(r"^\$\$\n(.+?)\n\$\$$", text, flags=re.MULTILINE | re.DOTALL)  # prose, display, prose, …
    found = [re.sub(r"\s+", " ", display) for display in parts[1::2]]
    for prose in parts[::2]:
        wrong += [f"a line of $$ is not alone: {line}" for line in prose.splitlines() if "$$" in line]
        # GitHub's inline formula: on one line, no space inside the dollars, no letter or digit outside them
        inline = r"(?<![\w$\\-])\$(?! )([^$\n]+?)(?<! )\$(?![\w$])"
        found += re.findall(inline, prose)
        tables = re.findall(r"^\|.*$", prose, re.MULTILINE)
        wrong += [f"a | ends a cell: {x}" for row in tables for x in re.findall(inline, row) if "|" in x]
        rest = re.sub(inline, "", prose)
        wrong += [f"a dollar alone: {line}" for line in rest.splitlines() if "$" in line and "$$" not in line]
    return found, wrong


@pytest.mark.parametrize("page", FORMULAS, ids=lambda page: str(page.relative_to(ROOT)))
def test_formulas_are_read_by_github_and_by_mathtext(page):
    r"""GitHub reads Markdown first: a backslash before punctuation is lost (\, \{ \|; write \quad \lbrace \Vert), an
    underscore after punctuation opens italics (\hat A_t, not \hat{A}_t), `](` is a link, < without spaces is HTML."""
    from matplotlib.mathtext import MathTextParser

    parser = MathTextParser("path")
    found, wrong = formulas(read(page))
    for formula in found:
        lost = r"\\[^A-Za-z\s]|[^\w\s]_|(^|\s)_|\]\(|<(?! )|\*"
        wrong += [f"GitHub loses {match.group(0)!r}: {formula}" for match in re.finditer(lost, formula)]
        try:
            parser.parse(f"${formula}$")
        except ValueError as error:
            wrong.append(f"{formula}: {str(error).splitlines()[-1]}")
    assert wrong == []


def test_a_page_with_broken_formulas_is_found_out():
    found, wrong = formulas(
        "It costs $5.\n\nAn $a_t$, `$x` and\n\n$$\nb\n+ c\n$$\n\nbut $$d$$\nand $ e$.\n\n| $|o|$ |\n"
    )
    assert found == ["b + c", "a_t", "|o|"]
    assert [x.split(":")[0] for x in wrong] == [
        "a dollar alone",
        "a line of $$ is not alone",
        "a | ends a cell",
        "a dollar alone",
    ]
