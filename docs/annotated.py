"""A script as a page: its code on the right, and beside the lines what docs/details.md says of their tags.

Used by docs/build.py. Every line of the script appears once and in order. The notes and the numbers of the lines cannot
be selected, so what a reader copies is code alone.
"""

import ast
import html
import re
from functools import cache

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

LANGUAGES = {
    "en": {
        "site": "PPO and GRPO, one file at a time",
        "home": "Home",
        "scripts": "The scripts, annotated",
        "more": "More",
        "light": "light",
        "dark": "dark",
        "auto": "as the system",
        "lines": "Lines:",
        "test": "Test:",
        "page": "Page:",
        "paper": "Paper:",
        "picture": "Moving picture:",
        "see": "explained at line {}",
        "equations": "The equations",
        "machinery": "Machinery: lines {} to {}. A first reader can stop here.",
        "intro": "Page: {page}. File: {file}. A note stands beside the line that it explains. A number leads to its "
        "line, a tag to its detail, and a function's name to its definition or to the page that explains it. If you "
        "copy, you get code alone.",
        "functions": "Functions",
    },
    "zh": {
        "site": "PPO 与 GRPO：一次读懂一个文件",
        "home": "首页",
        "scripts": "带注解的脚本",
        "more": "更多",
        "light": "浅色",
        "dark": "深色",
        "auto": "跟随系统",
        "lines": "所在行：",
        "test": "测试：",
        "page": "页面：",
        "paper": "论文：",
        "picture": "动图：",
        "see": "见第 {} 行",
        "equations": "公式",
        "machinery": "Machinery：第 {} 到 {} 行。第一次阅读可以到此为止。",
        "intro": "页面：{page}。文件：{file}。注解写在它所解释的那一行旁边。点行号得到这一行的地址，点标签看细节，"
        "点函数名看它的定义或讲解它的页面。复制时只会得到代码。",
        "functions": "函数",
    },
}

PAPERS = {  # as the scripts name them: the number at arXiv
    "GAE": "1506.02438",
    "PPO": "1707.06347",
    "DeepSeekMath": "2402.03300",
    "DAPO": "2503.14476",
    "Dr. GRPO": "2503.20783",
    "GSPO": "2507.18071",
    "InstructGPT": "2203.02155",
    "Ziegler et al. 2019": "1909.08593",
    "Engstrom et al. 2020": "2005.12729",
    "MiniMax-M1": "2506.13585",
    "SAPO": "2511.20347",
    "REINFORCE++": "2501.03262",
    "GDPO": "2601.05242",
    "DeepSeek-V3.2": "2512.02556",
    "InfoRM": "2402.09345",
    "IBL": "2510.13694",
    "EPPO": "2501.19358",
    "PPO-max": "2307.04964",
}
PICTURES = {  # tags and functions that a page of docs/interactive shows
    **dict.fromkeys(["D8", "clipped_surrogate"], "clip.html"),
    **dict.fromkeys(["D5", "gae_double_sum"], "gae.html"),
    **dict.fromkeys(["G2", "group_advantages"], "group.html"),
}
PAPER = "|".join(re.escape(name) for name in PAPERS)
PLACE = re.compile(rf"\b({PAPER})(?: (Eq\. \d+|§[\w.]*\w))?")  # PPO Eq. 7; DeepSeekMath §4.1.2

SUBSCRIPTS = str.maketrans("ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "aehijklmnoprstuvx0123456789+-()")
SUPERSCRIPTS = str.maketrans("ⁿˡᵀ⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾", "nlT0123456789+-()")
SYMBOLS = {
    "Σ": r"\sum ", "Â": r"\hat A", "r̃": r"\tilde r", "−": "-", "·": r"\cdot ", "½": r"\tfrac{1}{2}", "‖": r"\Vert ",
    "…": r"\ldots ", "{": r"\{", "}": r"\}",
}  # fmt: skip


def latex_of(text):
    """The LaTeX of an equation that a docstring writes in Unicode."""
    text = re.sub(r"k3(?=\W|[ᵢₜ])", "k₃", text)
    text = "".join(SYMBOLS.get(part, part) for part in re.split(r"(r̃|.)", text) if part)
    text = re.sub(r"_(\w+)", r"_{\\mathrm{\1}}", text)
    text = re.sub(r"([ᵢⱼₜ]+),₍(.+?)₎", lambda x: f"_{{{x[1]},{x[2]}}}".translate(SUBSCRIPTS), text)
    text = re.sub(r"[ₐ-ₜ₀-₎ᵢᵣᵤᵥⱼ]+", lambda x: f"_{{{x[0].translate(SUBSCRIPTS)}}}", text)
    text = re.sub(r"[ⁿˡᵀ⁰¹²³⁴-⁾]+", lambda x: f"^{{{x[0].translate(SUPERSCRIPTS)}}}", text)
    text = re.sub(r"(?<![\\A-Za-z{])(?:ln|exp)(?![A-Za-z])", r"\\\g<0> ", text)
    text = re.sub(r"(?<![\\A-Za-z{])([A-Za-z]{2,}(?: [A-Za-z]{2,})*)(?![A-Za-z}])", r"\\text{ \1 }", text)
    text = re.sub(r"\\text\{ (min|max|clip|mean|std|KL) \}(?= ?[\\({])", r"\\mathrm{\1}", text)
    return re.sub(r"\bE\[", r"\\mathbb{E}[", text)


@cache
def highlighted(code, name):
    """[HTML of each line]: no element crosses the end of a line."""
    try:
        lexer = get_lexer_by_name(name, stripnl=False, ensurenl=False)
    except ClassNotFound:
        lexer = get_lexer_by_name("text", stripnl=False, ensurenl=False)
    found = highlight(code.removesuffix("\n"), lexer, HtmlFormatter(nowrap=True)).split("\n")
    return found[: code.removesuffix("\n").count("\n") + 1]


def numbered(lines, first=1):
    """Lines of code with an address each. The number is drawn by the style sheet, so that nobody copies it."""
    parts = []
    for number, line in enumerate(lines, first):
        link = f'<a class="number" href="#L{number}" data-line="{number}" tabindex="-1" aria-hidden="true"></a>'
        parts.append(f'<span class="line" id="L{number}">{link}{line}\n</span>')
    return f'<pre class="highlight"><code>{"".join(parts)}</code></pre>'


def code_page(path, name):
    """A file that pages link to: a test, a benchmark, raw results."""
    kind = "python" if path.suffix == ".py" else "text"
    lines = highlighted(path.read_text(encoding="utf-8"), kind)
    return f'<h1>{html.escape(name)}</h1><div class="file">{numbered(lines)}</div>'


class Script:
    """What stands at which line of a script."""

    def __init__(self, path):
        self.name, self.code = path.name, path.read_text(encoding="utf-8")
        self.lines = self.code.splitlines()
        tree = ast.parse(self.code)
        self.docstring = ast.get_docstring(tree, clean=False)
        end = tree.body[0].end_lineno
        self.definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        self.lines_of = {node.name: node.lineno for node in self.definitions}  # function or class: its line
        self.tags = {}  # tag: the lines that have it, below the docstring
        for number, line in enumerate(self.lines[end:], end + 1):
            for tag in re.findall(r"\[([DRG]\d+)\]", line):
                if number not in self.tags.setdefault(tag, []):
                    self.tags[tag].append(number)
        machinery = [number for number, line in enumerate(self.lines, 1) if line.startswith("# ==== Machinery")]
        self.machinery = machinery[0] if machinery else None
        self.docstring_line = tree.body[0].lineno
        self.starts = {}  # a line of a docstring: the line where its function or class begins
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                self.starts |= dict.fromkeys(range(first, node.body[0].end_lineno + 1), first)
        args = [node for node in self.definitions if node.name == "Args"]
        self.in_args = range(args[0].lineno, args[0].end_lineno + 1) if args else range(0)

    def equations(self):
        """[(LaTeX, where it is from)] of the docstring's equations."""
        found = []
        for line in re.findall(r"^ {4}(\S.*)$", self.docstring, re.MULTILINE):
            equation, *sources = re.split(rf" {{2,}}(?=(?:\w+; )?(?:{PAPER}))", line)
            if re.search(r" = |^maximise ", equation) and "--" not in line:
                parts = [latex_of(re.sub(r"  +", " ", part)) for part in re.split(r",  +", equation)]
                found += [*((part, "") for part in parts[:-1]), (parts[-1], "  ".join(sources))]
        return found

    def place_of(self, tag):
        """The line where the whole text of a tag stands: the first outside Args."""
        lines = [number for number in self.tags[tag] if number not in self.in_args]
        return (lines or self.tags[tag])[0]


def paper_links(text):
    """[link] of each paper that a text names, by equation or section if it says which."""
    found = dict.fromkeys(PLACE.findall(text))
    exact = {name for name, place in found if place}
    kept = [(name, place) for name, place in found if place or name not in exact]
    return [f'<a href="https://arxiv.org/abs/{PAPERS[name]}">{f"{name} {place}".strip()}</a>' for name, place in kept]


def annotated(edition, name, formula, nested):
    """(HTML, table of contents) of a script's page."""
    script, words, here = edition.scripts[name], edition.words, name.removesuffix(".py")
    lines = linked(edition, script, highlighted(script.code, "python"), here)
    by_place = {label: latex for latex, labels in script.equations() for label in places_in(labels)}

    def page_links(key):
        found = {}
        for source, anchor, heading, _ in edition.mentions.get((name, key), []):
            address = edition.address(f"{source}#{anchor}", here)
            found.setdefault(anchor, f'<a href="{address}">{html.escape(heading)}</a>')
        return list(found.values())[:3]

    def latex_for(key):
        """The formula that a page has for a tag or an equation, this script's page first, else the docstring's own."""
        own = edition.mentions.get((name, key), [])
        others = [mention for (_, other), mentions in edition.mentions.items() if other == key for mention in mentions]
        latex = [x[3] for x in [*own, *others] if x[3]]
        return latex[:1] or ([by_place[key]] if key in by_place else [])

    def note(start, node, tags):
        """The HTML beside the line `start`: a function or class that begins there (or None), tags that stand there."""
        told = [tag for tag in tags if script.place_of(tag) in tags[tag]]
        parts, latex, pages, tests, said = [], [], [], [], ""
        for tag in tags:
            title = edition.markdown.renderInline(edition.tags[tag][1])
            head = f'<a href="{edition.detail(tag, here)}">{tag} {title}</a>'
            if tag not in told:
                other = script.place_of(tag)
                parts.append(
                    f'<p class="title">{head} <a class="see" href="#L{other}">{words["see"].format(other)}</a></p>'
                )
                continue
            *items, test = edition.tags[tag][2]
            text = "".join(edition.render(item, edition.details, here)[0] for item in items)
            parts.append(f'<p class="title" id="{tag}">{head}</p>{text}')
            latex += latex_for(tag)
            tests += re.findall(r"(tests/\w+\.py)::(\w+)", test)
            pages += page_links(tag)
            said += " ".join(items)
        if node:
            docstring = ast.get_docstring(node) or ""
            said += docstring
            if not told:
                latex += [found for key in places_in(docstring) for found in latex_for(key)]
            tests += edition.tests_of(name, node.name)
            pages += page_links(node.name)
            if not tags and (tests or pages or paper_links(said) or latex):
                parts.append(f'<p class="title"><a href="#L{node.lineno}"><code>{node.name}</code></a></p>')
        parts += [formula(found, True) for found in dict.fromkeys(latex)]
        pictures = [PICTURES[key] for key in (*told, node.name if node else "") if key in PICTURES]
        pictures = [f'<a href="{edition.address(f"docs/interactive/{x}", here)}">{x}</a>' for x in pictures]
        tests = [edition.test_link(*test, here) for test in tests]
        for label, links in (
            (words["test"], tests),
            (words["page"], pages),
            (words["paper"], paper_links(said)),
            (words["picture"], pictures),
        ):
            if links and parts:
                parts.append(f'<p class="links">{label} {" · ".join(dict.fromkeys(links))}</p>')
        return f"<aside>{''.join(parts)}</aside>" if parts else ""

    nodes = {script.starts.get(node.lineno, node.lineno): node for node in script.definitions}
    tags_at = {}  # line: {tag: [lines]}
    for tag, numbers in script.tags.items():
        for number in numbers if tag in edition.tags else []:
            tags_at.setdefault(script.starts.get(number, number), {}).setdefault(tag, []).append(number)
    starts = sorted({*nodes, *tags_at})
    notes = {start: note(start, nodes.get(start), tags_at.get(start, {})) for start in starts}
    equations = "".join(
        formula(latex, True) + (f'<p class="links">{" · ".join(paper_links(source))}</p>' if source else "")
        for latex, source in script.equations()
    )
    notes[script.docstring_line] = f'<aside><p class="title">{words["equations"]}</p>{equations}</aside>'

    headings = {i: x[1] for i, line in enumerate(script.lines, 1) if (x := re.match(r"# ---- (.+) ----$", line))}
    starts = sorted({1, *(number for number in notes if notes[number]), *headings, script.machinery or 1})
    rows = {}
    for start, end in zip(starts, [*starts[1:], len(lines) + 1]):
        code = numbered(lines[start - 1 : end - 1], start)
        rows[start] = f'<div class="row"><div class="notes">{notes.get(start, "")}</div>{code}</div>'
    first = "".join(row for start, row in rows.items() if not script.machinery or start < script.machinery)
    rest = "".join(row for start, row in rows.items() if script.machinery and start >= script.machinery)
    if rest:
        summary = words["machinery"].format(script.machinery, len(lines))
        rest = f'<details class="part" id="machinery"><summary>{summary}</summary>{rest}</details>'

    stage = next(source for source in edition.pages if edition.script_of(source) == name)
    page = f'<a href="{edition.address(stage, here)}">{html.escape(edition.title(stage))}</a>'
    file = f'<a href="{edition.repository}/blob/main/{name}">{name}</a>'
    intro = words["intro"].format(page=page, file=file)
    functions = " ".join(f'<a href="#L{number}"><code>{key}</code></a>' for key, number in script.lines_of.items())
    top = f"<h1>{name}</h1><p>{intro}</p><details><summary>{words['functions']}</summary><p>{functions}</p></details>"
    toc = [(1, "__top", name), *((2, f"L{number}", html.escape(title)) for number, title in headings.items())]
    return f'{top}<div class="annotated" data-search-exclude="">{first}{rest}</div>', nested(toc)


def places_in(text):
    return [f"{name} {place}" for name, place in PLACE.findall(text) if place]


def linked(edition, script, lines, here):
    """Lead each tag to its detail, each call to its function, and each definition to the page that explains it."""

    def call(match):
        name = match[1]
        return f'<a href="#L{script.lines_of[name]}">{match[0]}</a>' if name in script.lines_of else match[0]

    def definition(match):
        if mentions := edition.mentions.get((script.name, match[1])):
            source, anchor, *_ = mentions[0]
            return f'<a href="{edition.address(f"{source}#{anchor}", here)}">{match[0]}</a>'
        return match[0]

    found = []
    for line in lines:
        line = re.sub(r"\[([DRG]\d+)\]", lambda x: edition.tag_link(x, here), line)
        line = re.sub(r'(?<!<span class="o">\.</span>)<span class="n">(\w+)</span>(?=<span class="p">\()', call, line)
        found.append(re.sub(r'<span class="n[fc]">(\w+)</span>', definition, line))
    return found
