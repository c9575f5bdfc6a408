"""The Chinese pages say what the English pages say: a page that is changed in one language only fails here.

docs/X.md belongs with docs/zh/X.md, and README.md with README.zh.md. The glossary is one page for both languages.
"""

import ast
import functools
import io
import re
import tokenize
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from contract import ROOT
from test_pages import anchors, formulas, read, without_code

NO_CHINESE = {"glossary.md"}  # one page for both languages
NO_ENGLISH = {"messages.md"}  # explains the scripts' English messages to Chinese readers
CHINESE = sorted((ROOT / "docs" / "zh").glob("*.md"))
TWINS = {page: ROOT / "docs" / page.name for page in CHINESE if page.name not in NO_ENGLISH}
README = ROOT / "README.zh.md"
if README.exists():
    CHINESE = [*CHINESE, README]
    TWINS[README] = ROOT / "README.md"

ENGLISH = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
HAN = r"[\u3400-\u9fff]"
MARKS = "，。；：、？！（）《》“”‘’…—「」"


def name(page):
    return str(page.relative_to(ROOT))


def english(path):
    """The English page of a path, whose language may be either."""
    path = Path(str(path).replace("README.zh.md", "README.md"))
    return ROOT / "docs" / path.name if path.parent == ROOT / "docs" / "zh" else path


def chinese(path):
    """The Chinese page of an English one, or None."""
    return next((page for page, twin in TWINS.items() if twin == path), None)


@functools.cache
def links(page):
    """[target] of a page's links and pictures, as they are written."""
    text = re.sub(r"`[^`]+`", "code", without_code(read(page)))
    return re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r'<img [^>]*src="([^"]+)"', text)


def numbers(text):
    """The numbers of prose, without the commas between thousands; 1.2 million and 120 万 are both 1200000."""
    text = re.sub(r"<img [^>]*alt=\"([^\"]*)\"[^>]*>", r"\1", text)
    text = re.sub(r"<[^>\s][^>]*>|\]\([^)]*\)|`[^`]+`|https?://\S+", " ", text)
    text = re.sub(r"\$\$\n.*?\n\$\$", " ", text, flags=re.DOTALL)
    text = re.sub(r"(?<![\w$\\-])\$(?! )[^$\n]+?(?<! )\$(?![\w$])", " ", text)
    units = {"million": 10**6, "billion": 10**9, "thousand": 1000, "万": 10**4, "亿": 10**8, "千": 1000}
    found = []
    number = r"((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)(e[-−]?[0-9]+)?"
    for digits, power, unit in re.findall(rf"{number}(?:\s+({'|'.join(units)}))?", text):
        value = digits.replace(",", "")
        if unit:
            value = f"{(Decimal(value) * units[unit]).normalize():f}"
        found.append(value + power.replace("−", "-"))
    return found


def contents(page):
    """{kind: [items]} of a page: what both languages must have alike. A link is that of the English page."""
    text = read(page)
    prose = without_code(text)
    inside, outside, figures = [], [], []
    for target in links(page):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            outside.append(target.replace("/docs/notebooks/zh/", "/docs/notebooks/"))  # each language has its notebook
        elif path.endswith(".png"):
            figures.append(Path(path).name)
        else:
            where = english((page.parent / path).resolve()) if path else english(page)
            # a link to the same page in the other language is free, and one to a page without English
            if where.name not in NO_ENGLISH and (path == "" or where != english(page) or anchor):
                inside.append(f"{name(where)}#{anchor}")
    code = [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose)]
    return {
        "headings": [len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)],
        "code blocks": re.findall(r"^ *```.*?^ *```$", text, re.MULTILINE | re.DOTALL),
        "inline code": sorted(code),
        "formulas": sorted(formulas(text)[0]),
        "figures": sorted(figures),
        "outside links": sorted(outside),
        "inside links": sorted(inside),
        "numbers": sorted(numbers(prose)),
        "comments": re.findall(r"<!--.*?-->", prose),
    }


def differences(page, twin):
    """[what the Chinese page lacks or has more]. Headings and code blocks have an order; the rest has none."""
    found, ours, theirs = [], contents(page), contents(twin)
    for kind in theirs:
        lacking, more = Counter(theirs[kind]) - Counter(ours[kind]), Counter(ours[kind]) - Counter(theirs[kind])
        if lacking or more:
            found.append(f"{kind}: {name(page)} lacks {dict(lacking)} and has {dict(more)} more")
        elif kind in ("headings", "code blocks") and ours[kind] != theirs[kind]:
            at = next(i for i, (mine, other) in enumerate(zip(ours[kind], theirs[kind])) if mine != other)
            found.append(f"{kind}: number {at + 1} of {name(page)} has another place in {name(twin)}")
    return found


@pytest.mark.parametrize(("page", "twin"), TWINS.items(), ids=name)
def test_both_languages_have_the_same(page, twin):
    found = differences(page, twin)
    if found:
        pytest.fail("\n".join([f"{name(page)} and {name(twin)} differ.", *found]), pytrace=False)


def ids(page):
    """{id: number of the heading below it, None if the next line is no heading}."""
    lines, heading, found = without_code(read(page)).splitlines(), 0, {}
    for line, following in zip(lines, [*lines[1:], ""]):
        heading += bool(re.match(r"#+ ", line))
        for anchor in re.findall(r'<a id="([^"]+)"></a>', line):
            is_alone = re.fullmatch(r'(<a id="[^"]+"></a>)+', line) and re.match(r"#+ ", following)
            found[anchor] = heading if is_alone else None
    return found


def anchors_in_order(page):
    headings = re.findall(r"^#+ .+$", without_code(read(page)), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.lstrip("# ")) for heading in headings]
    return [re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in plain]


def needed_anchors(twin):
    """The anchors of an English page that some English page links to."""
    needed = set()
    for page in ENGLISH:
        for target in links(page):
            path, _, anchor = target.partition("#")
            if anchor and not re.match(r"\w+:", target):
                where = (page.parent / path).resolve() if path else page
                needed |= {anchor} if where == twin else set()
    return needed


@pytest.mark.parametrize(("page", "twin"), TWINS.items(), ids=name)
def test_english_anchors_lead_to_the_same_heading(page, twin):
    """<a id="english-anchor"></a> stands alone on the line before its heading."""
    found, order = ids(page), anchors_in_order(twin)
    missing = needed_anchors(twin) - found.keys()
    assert not missing, f'{name(page)} lacks <a id="…"></a> for {sorted(missing)}'
    for anchor, heading in found.items():
        assert heading is not None, f'{name(page)}: <a id="{anchor}"></a> is not alone on the line before a heading'
        assert anchor in order, f"{name(page)}: {name(twin)} has no heading with the anchor {anchor}"
        assert order.index(anchor) == heading, f"{name(page)}: {anchor} stands before another heading"


@pytest.mark.parametrize("page", CHINESE, ids=name)
def test_links_lead_to_the_chinese_page(page):
    """And to its ids. A page that is not there in Chinese yet is linked to as if it were."""
    for target in links(page):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        other = (page.parent / path).resolve() if path else page
        own = other == TWINS.get(page) and not anchor  # the line at the top that leads to the other language
        is_chinese = other.parent == ROOT / "docs" / "zh" or other.name == "README.zh.md"
        has_chinese = other.parent == ROOT / "docs" and other.suffix == ".md" and other.name not in NO_CHINESE
        assert own or not (has_chinese or other == ROOT / "README.md"), f"{name(page)} links to the English {target}"
        assert other.exists() or (is_chinese and english(other).exists()), f"{name(page)} links to {target}"
        if anchor and is_chinese and other.exists():
            assert anchor in ids(other), f"{name(page)} links to {target}, and {name(other)} has no such id"
        elif anchor and other.suffix == ".md" and other.exists():
            assert anchor in anchors(other), f"{name(page)} links to {target}"


def test_every_chinese_page_has_its_english_twin():
    assert {page.name for page, twin in TWINS.items() if not twin.exists()} == set()


def faults(text):
    """[what is wrong with the typography of a Chinese text], outside code, formulas and addresses."""
    wrong = [f"full-width character: {x}" for x in re.findall(r"[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a\u3000]", text)]
    wrong += ["您: write 你"] * text.count("您")
    text = without_code(text)
    text = re.sub(r"^\$\$\n.*?\n\$\$$", "", text, flags=re.MULTILINE | re.DOTALL)
    for line, following in zip(text.splitlines(), [*text.splitlines()[1:], ""]):
        start = re.match(r" *(?:[*+-] |[0-9]+\. |[|#>$<]|```|$)", following)
        if re.search(rf"{HAN}$", line) and re.match(rf" *{HAN}", following) and not start:
            wrong.append(f"GitHub shows a blank where a line ends inside a sentence; end it after a mark: {line[-20:]}")
    text = re.sub(r"`[^`]+`", "A", text)
    for found in re.finditer(rf"[{MARKS}](\$[^$\n]+\$)", text):
        wrong.append(f"GitHub opens no formula right after a full-width mark; put a space between: {found.group()}")
    text = re.sub(rf"(?<=[{MARKS}]) (?=\$)", "", text)
    text = re.sub(r"(?<![\w$\\-])\$(?! )[^$\n]+?(?<! )\$(?![\w$])", "A", text)
    for found in re.finditer(r"(.?)(\*\*?)(?=\S)([^*\n]+?)\2(.?)", text):
        before, _, inner, after = found.groups()
        if inner[-1] in MARKS and re.match(r"\w", after):
            wrong.append(f"GitHub does not close the stars after a mark; put it outside: {found.group()}")
        if inner[0] in MARKS and re.match(r"\w", before):
            wrong.append(f"GitHub does not open the stars before a mark; put it outside: {found.group()}")
    text = re.sub(rf"([{MARKS}]\*\*?) ", r"\1", text)  # **A sentence.** The next one
    text = re.sub(r"\]\([^)\s]*[^)]*\)|[\[\]*]|<[^>\s][^>]*>|!(?=\[)", "", text)
    near = [
        ("no space between Chinese and a letter, a digit or code", rf"{HAN}[A-Za-z0-9$]|[A-Za-z0-9%$]{HAN}"),
        ("a half-width mark beside Chinese", rf"{HAN} ?[,;:?!(\"]|[,;?!\"] ?{HAN}|{HAN}\)|\){HAN}|{HAN}\.(?!\w)"),
        ("a space beside a full-width mark", r"(?<=\S) [，。；：、？！）]|[，。；：、？！（](?: +)(?=[^\s|])"),
    ]
    for line in text.splitlines():
        for what, pattern in near:
            wrong += [f"{what}: {line[max(0, x.start() - 8) : x.end() + 8]}" for x in re.finditer(pattern, line)]
    return wrong


@pytest.mark.parametrize("page", CHINESE, ids=name)
def test_typography(page):
    """Full-width marks, spaces beside Latin letters and code, and what GitHub needs to show bold text."""
    wrong = faults(read(page))
    if wrong:
        pytest.fail("\n".join([f"{name(page)}:", *wrong]), pytrace=False)


def test_faults_of_typography_are_found():
    assert faults("策略（policy）是 `code` 和 $x$， $y$，见 **说明**：第 3 阶段。\n\n下一行，\n继续。\n") == []
    bad = "策略policy 很好,是\n的，$x$。**注意：**这里 您　请看 `x`。 又 ３\n"
    found = " ".join(faults(bad))
    for what in ("full-width character", "您", "inside a sentence", "does not close", "opens no formula"):
        assert what in found
    for what in ("no space", "a half-width mark", "a space beside"):
        assert what in found


def test_numbers_of_both_languages():
    assert numbers("1,143 steps; 1.2 million; 1e-5; `7` and $8$; [9](x10.md)") == ["1143", "1200000", "1e-5", "9"]
    assert numbers("1143 步；120 万；1e-5；`7` 和 $8$；[9](x10.md)") == ["1143", "1200000", "1e-5", "9"]


def test_what_differs_is_named(tmp_path, monkeypatch):
    """Each kind of difference, on two pages that agree until one of them is changed."""
    text = "# A\n\n## B 7\n\n`c` $d$ [e](https://f.org) [g](1_ppo.md) ![h](figures/i.png)\n\n```bash\nls\n```\n"
    monkeypatch.setattr("test_chinese.ROOT", tmp_path)
    (tmp_path / "docs" / "zh").mkdir(parents=True)
    page, twin = tmp_path / "docs" / "zh" / "x.md", tmp_path / "docs" / "x.md"
    twin.write_text(text, encoding="utf-8")
    ours = text.replace("figures/", "../figures/")
    page.write_text(ours, encoding="utf-8")
    assert differences(page, twin) == []
    changes = {
        "headings": ("## B", "### B"),
        "code blocks": ("ls", "ls -l"),
        "inline code": ("`c`", "`cc`"),
        "formulas": ("$d$", "$dd$"),
        "figures": ("i.png", "j.png"),
        "outside links": ("f.org", "f.com"),
        "inside links": ("1_ppo.md", "2_atari.md"),
        "numbers": ("B 7", "B 8"),
    }
    for kind, (right, wrong) in changes.items():
        page.write_text(ours.replace(right, wrong), encoding="utf-8")
        links.cache_clear()
        (found,) = differences(page, twin)
        assert found.startswith(f"{kind}: docs/zh/x.md lacks ")


MESSAGES = ROOT / "docs" / "zh" / "messages.md"


@functools.cache
def texts_of(script):
    """Every string and every comment of a script, in one line each; what an f-string fills in is "…"."""
    source = read(ROOT / script)
    found = [
        token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return [" ".join(text.split()) for text in found]


def is_in(message, texts):
    """Is the message, whose "…" stand for anything, in one of the texts?"""
    pattern = ".*".join(re.escape(part.strip()) for part in message.split("…"))
    return any(re.search(pattern, text) for text in texts)


def messages_of(page):
    """[(message, [scripts])] of the tables that follow a comment which names their scripts."""
    tables = re.findall(r"^<!-- ([\w. ]+) -->\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = [(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE), scripts.split()) for scripts, table in tables]
    assert all(len(table.splitlines()) == len(found) + 2 for (_, table), (found, _) in zip(tables, rows))
    return [(message, scripts) for found, scripts in rows for message in found]


def test_messages_stand_in_the_scripts():
    """docs/zh/messages.md quotes each message to the letter; every heading of --help is there."""
    found = messages_of(read(MESSAGES))
    assert len(found) >= 90
    assert len(read(MESSAGES).split("| 标题 |")) + len(read(MESSAGES).split("| 信息 |")) - 2 == len(
        re.findall(r"^<!-- [\w. ]+ -->$", read(MESSAGES), re.MULTILINE)
    )
    wrong = [
        f"{script}: {message}"
        for message, scripts in found
        for script in scripts
        if not is_in(message, texts_of(script))
    ]
    if wrong:
        pytest.fail("\n".join(["docs/zh/messages.md quotes what is not there:", *wrong]), pytrace=False)
    for script in ("rlhf_gpt2_ppo.py", "grpo_llm.py"):
        source = read(ROOT / script)
        fields = source[source.index("class Args:") :].split("@property")[0].split("\n\n    def ")[0]
        headings = re.findall(r"^    # (.+)$", fields, re.MULTILINE)
        assert len(headings) >= 10
        assert set(headings) <= {message for message, scripts in found if scripts == [script]}, script


def test_a_message_that_changed_is_found():
    texts = ["error … of … rows", "memory it ran out: … from here on"]
    assert is_in("memory it ran out: … from here on", texts) and is_in("… of … rows", texts)
    assert not is_in("memory ran out: … from here on", texts) and not is_in("rows of …", texts)


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "zh" / "troubleshooting.md"], ids=name)
def test_the_messages_are_linked(page):
    assert any(target.partition("#")[0].endswith("messages.md") for target in links(page))
