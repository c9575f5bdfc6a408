"""The site: every page in English and Chinese, the five scripts with notes beside their lines, three moving pictures.

Run      pip install -r docs/requirements.txt
         python docs/build.py                   (about 20 seconds; writes site/)
         python -m http.server -d site          (then open http://localhost:8000)
         python docs/build.py --notebooks       (writes docs/notebooks too)

Nothing in the site comes from another host: it works offline.

MkDocs with its theme Material makes the frame, the search and the dark mode. Its successor Zensical is at version
0.1.3, and pip did not find all of its parts when we tried it. Material can also cut Chinese into words for the search.
The text itself is rendered by markdown-it, because it reads Markdown as GitHub does. Formulas become MathML, which
browsers show by themselves, without a script.
"""

import argparse
import html
import posixpath
import re
import shutil
import tempfile
import tomllib
from pathlib import Path

import yaml
from annotated import LANGUAGES, Script, annotated, code_page, highlighted, places_in
from fontTools import subset
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mkdocs.commands.build import build as build_mkdocs
from mkdocs.config import load_config
from mkdocs.plugins import BasePlugin
from mkdocs.structure.toc import get_toc

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["site"]["repository"]
SCRIPTS = ["gae_reference.py", "ppo_cartpole.py", "ppo_atari.py", "rlhf_gpt2_ppo.py", "grpo_llm.py"]
STAGES = ["0_foundations", "1_ppo", "2_atari", "3_rlhf", "4_grpo", "5_full_size"]
SCRIPT_OF = dict(zip(STAGES, [*SCRIPTS, "grpo_llm.py"]))  # the script that a page explains
PPO_TESTS = ["test_compute_gae", "test_clipped_policy_loss", "test_clipped_value_loss", "test_approx_kl"]
TESTS_OF = {  # where the equations of a script are tested
    "gae_reference.py": ["test_gae_reference"],
    "ppo_cartpole.py": PPO_TESTS,
    "ppo_atari.py": PPO_TESTS,
    "rlhf_gpt2_ppo.py": ["test_rlhf_equations"],
    "grpo_llm.py": ["test_grpo_equations", "test_grpo_other_algorithms"],
}
GROUPS = {
    ("The road", "学习路线"): STAGES,
    ("Look it up", "查阅"): ["details", "settings", "metrics", "glossary", "results", "reading", "transcript"],
    ("Help and claims", "排错与论断"): ["troubleshooting", "pitfalls", "claims", "graduate", "guide"],
}
WIDE = r"[\u3000-\u9fff\uff00-\uffef]"  # Chinese letters and marks
LARGEST = 300_000  # bytes: a larger file is not copied into the site, a link to it leads to the repository


def pages_of(language):
    """{file of the repository: its place in that language's site}, without .html."""
    if language == "en":
        found = {"README.md": "index", "CONTRIBUTING.md": "CONTRIBUTING", "benchmarks/RESULTS.md": "benchmarks/RESULTS"}
        return found | {f"docs/{path.name}": f"docs/{path.stem}" for path in sorted(DOCS.glob("*.md"))}
    found = {"README.zh.md": "index", "docs/glossary.md": "docs/glossary"}  # the glossary has both languages
    return found | {f"docs/zh/{path.name}": f"docs/{path.stem}" for path in sorted((DOCS / "zh").glob("*.md"))}


def slug(heading):
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")


def formula(latex, is_display=False):
    """LaTeX → MathML, with what latex2mathml leaves out: a thin space after ln, and names in one piece."""
    found = convert(latex, display="block" if is_display else "inline")
    found = re.sub(
        r'(?:<mi mathvariant="normal">\w</mi>){2,}', lambda x: f"<mi>{re.sub('<.*?>', '', x[0])}</mi>", found
    )
    found = re.sub(r"(<mi>(?:ln|exp)</mi>)(?=<m(?:i|sub|over|frac))", r'\1<mspace width="0.17em"/>', found)
    found = re.sub(r"<mo>(?=(?:max|min)<)", '<mo lspace="0" rspace="0.17em">', found)
    found = re.sub(r'(?<=<mo) (?=stretchy="false">&#x0007C;)', ' lspace="0" rspace="0" ', found)
    return f'<div class="formula">{found}</div>' if is_display else found


class Edition:
    """One language of the site: where each file lies in it, and how its Markdown becomes HTML."""

    def __init__(self, language, wanted):
        self.language, self.wanted = language, wanted  # wanted: the files that some page links to, shown as code pages
        self.words = LANGUAGES[language]
        self.pages = pages_of(language)
        self.prefix = "" if language == "en" else "zh/"
        self.scripts = {name: Script(ROOT / name) for name in SCRIPTS}
        self.planner = Script(ROOT / "benchmarks" / "memory_plan.py")  # has a tag too
        self.markdown = MarkdownIt("gfm-like", {"linkify": False, "html": True, "highlight": self.highlight})
        self.markdown.use(dollarmath_plugin, allow_space=False)
        self.markdown.add_render_rule("math_inline", self.math)
        self.markdown.add_render_rule("math_block", self.math)
        self.details = "docs/details.md" if language == "en" else "docs/zh/details.md"
        self.tags = self.read_details()
        self.mentions = self.read_mentions()

    @staticmethod
    def highlight(code, name, attributes):
        lines = "\n".join(highlighted(code, name or "text"))
        return f'<pre class="highlight"><code>{lines}</code></pre>'

    @staticmethod
    def math(renderer, tokens, index, options, environment):
        return formula(tokens[index].content.strip(), tokens[index].type == "math_block")

    # ---- What the pages say of tags and functions ----

    def text(self, source):
        return (ROOT / source).read_text(encoding="utf-8")

    def read_details(self):
        """{tag: (its anchor in details, title, [what, why, test] in Markdown)}."""
        own = self.text(self.details)
        anchors = re.findall(r"^### (([DRG]\d+) .+)$", self.text("docs/details.md"), re.MULTILINE)
        anchors = {tag: slug(heading) for heading, tag in anchors}
        found = {}
        for tag, title, body in re.findall(r"^### ([DRG]\d+) (.+)\n\n((?:[ *].+\n)+)", own, re.MULTILINE):
            items = re.split(r"^\* ", body, flags=re.MULTILINE)[1:]
            found[tag] = (anchors[tag], title, [re.sub(r"\s*\n\s*", "\n", item).strip() for item in items])
        return found

    def read_mentions(self):
        """{tag, function or "PPO Eq. 7": [(page, anchor, heading, LaTeX or None)]}: where stage pages speak of them.

        The LaTeX is the display formula after a paragraph that names the tag or the equation.
        """
        found = {}
        for source in self.pages:
            stage = Path(source).stem
            if stage not in SCRIPT_OF:
                continue
            anchor, heading, before = "", "", []
            for block in re.split(r"\n{2,}", re.sub(r"^ *```.*?^ *```", "", self.text(source), flags=re.M | re.S)):
                ids = re.findall(r'<a id="([^"]+)"></a>', block)
                if title := re.search(r"^#+ (.+)", block, re.MULTILINE):
                    heading = re.sub(r"[`*]|\]\(.*?\)|\[", "", title[1])
                    anchor = ids[0] if ids else slug(title[1])
                last = [x[0] or x[1] for x in re.findall(r"\[([DRG]\d+)\]|`(\w+)(?:\(.*?\))?`", block)]
                last += places_in(block)
                if latex := re.match(r"\$\$\n(.*?)\n\$\$", block, re.DOTALL):
                    for name in before:
                        found.setdefault((SCRIPT_OF[stage], name), []).append((source, anchor, heading, latex[1]))
                for name in last:
                    found.setdefault((SCRIPT_OF[stage], name), []).append((source, anchor, heading, None))
                before = last
        return found

    # ---- Where things lie ----

    def address(self, source, here):
        """The relative address of a file of the repository, seen from the page `here` of this language."""
        path, _, anchor = source.partition("#")
        if path in self.pages:
            found = f"{self.prefix}{self.pages[path]}.html"
        elif path in (english := pages_of("en")):
            found = f"{english[path]}.html"
        elif path in (chinese := pages_of("zh")):
            found = f"zh/{chinese[path]}.html"
        elif path in SCRIPTS:
            found = f"{self.prefix}{Path(path).stem}.html"
        elif path.startswith("docs/interactive/"):
            found = self.prefix + path
        elif path.startswith("docs/figures/"):
            found = path
        elif (ROOT / path).is_file() and (ROOT / path).stat().st_size < LARGEST and not path.endswith(".ipynb"):
            self.wanted.add(path)
            found = f"{path}.html"
        else:
            return f"{REPOSITORY}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
        return posixpath.relpath(found, posixpath.dirname(self.prefix + here)) + (f"#{anchor}" if anchor else "")

    repository = REPOSITORY

    def script_of(self, source):
        return SCRIPT_OF.get(Path(source).stem)

    def title(self, source):
        return re.sub(r"[`*\"]", "", re.search(r"^# (.+)$", self.text(source), re.MULTILINE)[1])

    def detail(self, tag, here):
        return self.address(f"{self.details}#{self.tags[tag][0]}", here)

    def test(self, file, name, here):
        """The address of a test, at the line where it begins."""
        lines = self.text(file).splitlines()
        number = next((i for i, line in enumerate(lines, 1) if name and line.startswith(f"def {name}(")), 1)
        return self.address(f"{file}#L{number}", here)

    def test_link(self, file, name, here):
        return f'<a href="{self.test(file, name, here)}"><code>{name or Path(file).name}</code></a>'

    def tests_of(self, script, function):
        """[(file, test)]: the first test of the script's equations that names this function."""
        for file in TESTS_OF[script]:
            for test in re.split(r"^def (?=test_)", self.text(f"tests/{file}.py"), flags=re.MULTILINE)[1:]:
                if re.search(rf"\b{function}\b", test):
                    return [(f"tests/{file}.py", test.split("(")[0])]
        return []

    # ---- Markdown → HTML ----

    def render(self, text, source, here):
        """(HTML, [headings of the table of contents]) of a page's Markdown."""
        tokens = self.markdown.parse(text)
        toc, used = [], set()
        for token, following in zip(tokens, [*tokens[1:], None]):
            if token.type == "heading_open":
                title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", following.content)
                anchor = unique = slug(title)
                while unique in used:
                    unique = f"{anchor}-{len(used)}"
                used.add(unique)
                token.attrSet("id", unique)
                toc.append((int(token.tag[1]), unique, html.escape(title.replace("`", "").replace("*", ""))))
            elif token.type == "inline":
                token.children = self.inline(token.children, source, here)
            elif token.type == "html_block":
                token.content = self.addresses(token.content, source, here)
        found = self.markdown.renderer.render(tokens, self.markdown.options, {})
        found = re.sub(r"<table>.*?</table>", r'<div class="table">\g<0></div>', found, flags=re.DOTALL)
        # an <a id> alone before a heading becomes part of it
        alone = r'<p>((?:<a id="[^"]+"></a>\s*)+)</p>\s*(<h\d [^>]*>)'
        return re.sub(alone, r"\2\1", found), nested(toc)

    def addresses(self, text, source, here):
        return re.sub(r'\b(src|href)="([^":#]+)"', lambda x: f'{x[1]}="{self.target(x[2], source, here)}"', text)

    def target(self, link, source, here):
        if re.match(r"[\w+.-]+:", link):
            return link
        if link.startswith("#"):
            return link if self.pages.get(source) == here else self.address(source + link, here)
        return self.address(posixpath.normpath(posixpath.join(posixpath.dirname(source), link)), here)

    def inline(self, tokens, source, here):
        """Lead the links to where things lie; make links of tests, tags and functions."""
        found, is_link = [], False
        for token, before, after in zip(tokens, [None, *tokens], [*tokens[1:], None]):
            is_link = token.type == "link_open" or (is_link and token.type != "link_close")
            if token.type == "link_open":
                token.attrSet("href", self.target(token.attrGet("href"), source, here))
            elif token.type == "image":
                token.attrSet("src", self.target(token.attrGet("src"), source, here))
            elif token.type == "html_inline":
                token.content = self.addresses(token.content, source, here)
            elif token.type == "code_inline" and not is_link:
                if address := self.address_of_code(token.content, source, here):
                    token.type, text = "html_inline", html.escape(token.content)
                    token.content = f'<a href="{address}"><code>{text}</code></a>'
            elif token.type == "softbreak" and before and after and re.search(WIDE + "$", before.content):
                if re.match(f"{WIDE}|$", after.content):  # Chinese has no space where a line ends
                    token.type = "text"
            elif token.type == "text" and not is_link:
                text = re.sub(r"\[([DRG]\d+)\]", lambda x: self.tag_link(x, here), html.escape(token.content))
                token.type, token.content = "html_inline", text
            found.append(token)
        return found

    def tag_link(self, match, here):
        return f'<a href="{self.detail(match[1], here)}">{match[0]}</a>' if match[1] in self.tags else match[0]

    def address_of_code(self, code, source, here):
        """Where inline code leads: a test, a tag, a file, or a function of the page's script."""
        if match := re.fullmatch(r"((?:tests|benchmarks)/\w+\.(?:py|txt))(?:::(\w+))?", code):
            return self.test(*match.groups(), here) if (ROOT / match[1]).is_file() else None
        if match := re.fullmatch(r"\[([DRG]\d+)\]", code):
            return self.detail(match[1], here) if match[1] in self.tags else None
        if code in SCRIPTS:
            return self.address(code, here)
        name = re.sub(r"\(.*\)$", "", code)
        own = SCRIPT_OF.get(Path(source).stem)
        having = [script for script in SCRIPTS if name in self.scripts[script].lines_of]
        if own in having or (len(having) == 1 and "_" in name):
            script = own if own in having else having[0]
            return self.address(f"{script}#L{self.scripts[script].lines_of[name]}", here)
        return None

    def page(self, source, here):
        text = self.text(source)
        if Path(source).name == "details.md":
            text = re.sub(r"(?<=\n)### ([DRG]\d+) .+\n", lambda x: x[0] + self.lines_with(x[1], here), text)
        return self.render(text, source, here)

    def lines_with(self, tag, here):
        """A paragraph of links to the lines that have the tag."""
        links = []
        for name, script in [*self.scripts.items(), ("benchmarks/memory_plan.py", self.planner)]:
            for number in script.tags.get(tag, []):
                links.append(f'<a href="{self.address(f"{name}#L{number}", here)}">{name}:{number}</a>')
        return f'\n<p class="lines">{self.words["lines"]} {" ".join(links)}</p>\n' if links else ""


def nested(toc):
    """[(level, id, name)] as the tree that MkDocs takes."""
    root = {"level": 0, "children": []}
    stack = [root]
    for level, anchor, name in toc:
        while stack[-1]["level"] >= level:
            stack.pop()
        item = {"level": level, "id": anchor, "name": name, "children": []}
        stack[-1]["children"].append(item)
        stack.append(item)
    return root["children"]


class Contents(BasePlugin):
    """Gives MkDocs the HTML of each page, and the other language's address of it."""

    def __init__(self, edition, made):
        super().__init__()
        self.edition, self.code = edition, {}
        self.made = made  # made: {place: (HTML, table of contents)}

    def on_page_content(self, content, *, page, config, files):
        content, toc = self.made[page.file.src_uri.removesuffix(".md")]
        page.toc = get_toc(toc)
        before, code, self.code[page.url] = content.partition('<div class="annotated"')
        return before + code  # the code itself is not searched

    def on_post_page(self, output, *, page, config):
        # the theme's script would look for a sitemap behind each of these
        output = re.sub(r' *<link rel="alternate".*?>\n', "", output)
        place = page.url.removesuffix(".html")
        for language, prefix in (("en", ""), ("zh", "zh/")):
            scripts = {name.removesuffix(".py") for name in SCRIPTS}
            there = place if place in {*pages_of(language).values(), *scripts} else "index"
            link = posixpath.relpath(f"{prefix}{there}.html", posixpath.dirname(self.edition.prefix + place))
            output = output.replace(f'href="#{language}" hreflang', f'href="{link}" hreflang')
        return output.replace('<div class="annotated"', '<div class="annotated"' + self.code[page.url])


def configuration(edition, source, target):
    """MkDocs' settings for one language."""
    words = edition.words
    titles = {place: edition.title(page) for page, place in edition.pages.items()}
    nav = [{words["home"]: "index.md"}]
    index = 0 if edition.language == "en" else 1
    listed = {"index"}
    for names, pages in GROUPS.items():
        places = [f"docs/{page}" for page in pages if f"docs/{page}" in titles]
        nav.append({names[index]: [{titles[place]: f"{place}.md"} for place in places]})
        listed |= set(places)
        if pages == STAGES:
            nav.append({words["scripts"]: [{name: name.replace(".py", ".md")} for name in SCRIPTS]})
    rest = [{title: f"{place}.md"} for place, title in titles.items() if place not in listed]
    if rest:
        nav.append({words["more"]: rest})

    def scheme(media, name, icon, label):
        return {"media": media, "scheme": name, "toggle": {"icon": f"material/{icon}", "name": label}}

    settings = {
        "site_name": words["site"],
        "docs_dir": str(source),
        "site_dir": str(target),
        "use_directory_urls": False,
        "nav": nav,
        "copyright": f'<a href="{REPOSITORY}">{REPOSITORY.removeprefix("https://")}</a>',
        "theme": {
            "name": "material",
            "language": edition.language,
            "font": False,  # the reader's own fonts
            "features": ["navigation.top", "toc.follow", "content.code.copy", "search.highlight"],
            "palette": [
                scheme("(prefers-color-scheme)", "default", "brightness-auto", words["light"]),
                scheme("(prefers-color-scheme: light)", "default", "brightness-7", words["dark"]),
                scheme("(prefers-color-scheme: dark)", "slate", "brightness-4", words["auto"]),
            ],
        },
        "plugins": [{"search": {"lang": [edition.language]}}],
        "extra": {
            "alternate": [{"name": x, "link": f"#{y}", "lang": y} for x, y in (("English", "en"), ("中文", "zh"))]
        },
        "extra_css": ["site.css"],
        "extra_javascript": ["site.js"],
        "validation": {"nav": {"omitted_files": "ignore"}},
    }
    file = source.parent / f"mkdocs_{edition.language}.yml"
    file.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    return load_config(str(file))


def build_language(language, work, wanted):
    """Build one language in a directory of its own, and return that directory."""
    edition = Edition(language, wanted)
    made = {place: edition.page(page, place) for page, place in edition.pages.items()}
    made |= {name.removesuffix(".py"): annotated(edition, name, formula, nested) for name in SCRIPTS}
    if language == "en":  # the files that pages link to are shown once, for both languages
        made |= {file: (code_page(ROOT / file, file), []) for file in sorted(wanted)}
    source, target = work / f"source_{language}", work / f"site_{language}"
    for place in made:
        file = source / f"{place}.md"
        file.parent.mkdir(parents=True, exist_ok=True)
        hide = "hide: [navigation, toc]\n" if f"{place}.py" in SCRIPTS or place in wanted else ""
        exclude = "search: {exclude: true}\n" if place in wanted else ""
        file.write_text(f"---\n{hide}{exclude}title: {page_title(edition, place)}\n---\n", encoding="utf-8")
    for name in ("site.css", "site.js"):
        shutil.copy(DOCS / name, source / name)
    config = configuration(edition, source, target)
    config.plugins["contents"] = Contents(edition, made)
    build_mkdocs(config)
    (target / "404.html").unlink()  # its addresses are right only on a server of its own
    shutil.copytree(DOCS / "interactive", target / "docs" / "interactive")
    for page in (target / "docs" / "interactive").glob("*.html"):
        text = page.read_text(encoding="utf-8").replace('lang="en"', f'lang="{language}"', 1)
        page.write_text(re.sub(r'href="(\S+)\.md"', r'href="\1.html"', text), encoding="utf-8")
    return target


def page_title(edition, place):
    for page, other in edition.pages.items():
        if other == place:
            return f'"{edition.title(page)}"'
    return f"{place}.py" if f"{place}.py" in SCRIPTS else place


def write_font(site):
    """The letters of the site's formulas, out of the font STIX Two Math (SIL Open Font License)."""
    import ziamath

    letters = {"0", "A"}
    for page in site.rglob("*.html"):
        for found in re.findall(r"<math.*?</math>", page.read_text(encoding="utf-8"), re.DOTALL):
            letters |= set(html.unescape(re.sub(r"<[^>]+>", "", found)))
    italic = {chr(0x1D44E + i) for i in range(26)} | {chr(0x1D434 + i) for i in range(26)}  # what <mi>x</mi> shows
    greek = {chr(0x1D6E2 + i) for i in range(58)}
    options = subset.Options(flavor="woff", name_IDs=["*"], layout_features=["*"], notdef_outline=True)
    font = subset.load_font(Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf", options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(text="".join(letters | italic | greek) + "ℎ")
    subsetter.subset(font)
    for folder in (site, site / "zh"):
        subset.save_font(font, folder / "assets" / "STIXTwoMath.woff", options)


def build(out):
    with tempfile.TemporaryDirectory() as work:
        wanted = set()
        chinese = build_language("zh", Path(work), wanted)
        site = build_language("en", Path(work), wanted)
        shutil.move(chinese, site / "zh")
        shutil.copytree(DOCS / "figures", site / "docs" / "figures")
        write_font(site)
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(site, out)


def main():
    parser = argparse.ArgumentParser(description="Write the site, and the notebooks.")
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="the directory of the site (default: site)")
    parser.add_argument("--notebooks", action="store_true", help="write docs/notebooks too")
    args = parser.parse_args()
    if args.out.exists() and not (args.out / "search").is_dir() and any(args.out.iterdir()):
        parser.error(f"--out {args.out} has other files in it: name a new directory, or one of an older site")
    build(args.out.resolve())
    print(f"wrote {args.out}; to read it: python -m http.server -d {args.out}")
    if args.notebooks:
        from notebooks import write_notebooks

        print(f"wrote {len(write_notebooks(DOCS / 'notebooks'))} notebooks in docs/notebooks")


if __name__ == "__main__":
    main()
