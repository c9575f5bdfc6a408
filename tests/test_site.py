"""The site that docs/build.py writes: first its files, then the same site in a browser.

Needs docs/requirements.txt; the second half needs Chromium and chromedriver, and is skipped without them.
"""

import functools
import html
import http.server
import json
import posixpath
import re
import shutil
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest
from contract import ROOT, SCRIPTS
from test_pages import formulas

try:
    from selenium.webdriver import Chrome as Browser
    from selenium.webdriver import ChromeOptions, ChromeService, Keys
except ImportError:
    Browser = None

import gae_reference as reference

pytestmark = pytest.mark.site

NAMES = ["gae_reference.py", *sorted(path.name for path in SCRIPTS)]
TAG = r"\[([DRG]\d+)\]"


def read(path):
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def site(tmp_path_factory, worker_id):
    """The directory of a fresh site. The first process builds it; the others wait."""
    if any(find_spec(name) is None for name in ("material", "markdown_it", "latex2mathml", "ziamath", "fontTools")):
        pytest.skip("the site needs: pip install -r docs/requirements.txt")
    shared = tmp_path_factory.getbasetemp()
    shared = shared if worker_id == "master" else shared.parent
    try:
        (shared / "site_begun").mkdir()
    except FileExistsError:
        while not (shared / "site_log").exists():
            time.sleep(0.5)
    else:
        command = [sys.executable, str(ROOT / "docs" / "build.py"), "--out", str(shared / "site")]
        run = subprocess.run(command, capture_output=True, text=True, timeout=500)
        (shared / "log").write_text(f"{run.returncode}\n{run.stdout}{run.stderr}", encoding="utf-8")
        (shared / "log").rename(shared / "site_log")
    log = read(shared / "site_log")
    assert log.startswith("0\n") and "WARNING" not in log, log
    return shared / "site"


@pytest.fixture(scope="session")
def pages(site):
    """{address: HTML} of every page."""
    return {path.relative_to(site).as_posix(): read(path) for path in sorted(site.rglob("*.html"))}


def both(name):
    """The addresses of a page in both languages."""
    return [name, f"zh/{name}"]


def text_of(fragment):
    return html.unescape(re.sub(r"<[^>]+>", "", fragment))


def lines_of(page):
    """[(number, text)] of the lines of code of a page."""
    found = re.findall(r'<span class="line" id="L(\d+)">(.*?)\n</span>', page, re.DOTALL)
    return [(int(number), text_of(line)) for number, line in found]


# ---- The files of the site ----


def test_every_page_is_there_in_both_languages(pages):
    english = [path.stem for path in (ROOT / "docs").glob("*.md")]
    chinese = [path.stem for path in (ROOT / "docs" / "zh").glob("*.md")]
    assert len(english) >= 17 and len(chinese) >= 16
    needed = {f"docs/{name}.html" for name in english} | {f"zh/docs/{name}.html" for name in chinese}
    needed |= {page for name in ("index", "docs/glossary", *(x[:-3] for x in NAMES)) for page in both(f"{name}.html")}
    needed |= {"benchmarks/RESULTS.html", "CONTRIBUTING.html"}
    needed |= {page for name in ("clip", "gae", "group") for page in both(f"docs/interactive/{name}.html")}
    assert needed - pages.keys() == set()


def test_no_link_is_dead(site, pages):
    """Every file that a page names is there, and every anchor."""
    ids = {address: set(re.findall(r'\bid="([^"]+)"', page)) for address, page in pages.items()}
    files = {path.relative_to(site).as_posix() for path in site.rglob("*")}
    checked, dead = 0, []
    for address, page in pages.items():
        for link in set(re.findall(r' (?:href|src)="([^"]*)"', page)):
            link = html.unescape(link)
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            checked += 1
            folder = posixpath.dirname(address)
            there = posixpath.normpath(posixpath.join(folder, unquote(path))) if path else address
            there = "index.html" if there == "." else there  # the logo leads to the first page
            if there not in files:
                dead.append(f"{address}: {link}")
            elif anchor and there in ids and unquote(anchor) not in ids[there] and anchor != "__top":
                dead.append(f"{address}: {link} has no such anchor")
    assert dead == []
    assert checked >= 5000


def test_nothing_comes_from_another_host(site, pages):
    """No script, style, font or picture; and nothing that makes the theme's scripts ask another host."""
    resource = (
        r'<(?:script|img|iframe|source|video|audio|embed|link)\b[^>]*?\b(?:src|href|srcset)="(?:[a-z]+:)?//[^"]*"'
    )
    for address, page in pages.items():
        assert re.findall(resource, page) == [], address
        assert 'class="mermaid"' not in page and 'data-md-component="source"' not in page, address
    styles = sorted(site.rglob("*.css"))
    assert len(styles) >= 6
    for path in styles:
        assert re.findall(r"(?:url\(|@import)[\s\"']*(?:https?:)?//[^)]*", read(path)) == [], path
    assert [path.name for path in site.rglob("*.woff")] == ["STIXTwoMath.woff"] * 2


def test_the_languages_lead_to_each_other(pages):
    for address, page in pages.items():
        links = dict(re.findall(r'<a href="([^"]+)" hreflang="(\w+)"', page))
        if "interactive" in address:
            continue
        assert sorted(links.values()) == ["en", "zh"], address
        other = next(link for link, language in links.items() if language == ("en" if address[:3] == "zh/" else "zh"))
        plain = address.removeprefix("zh/")
        twin = plain if address.startswith("zh/") else f"zh/{plain}"
        if twin in pages:
            assert other.endswith(Path(plain).name), f"{address} leads to {other}"


@pytest.mark.parametrize("name", NAMES)
def test_every_line_once_and_in_order(pages, name):
    lines = read(ROOT / name).splitlines()
    for address in both(name.replace(".py", ".html")):
        assert lines_of(pages[address]) == list(enumerate(lines, 1)), address


@pytest.mark.parametrize("name", NAMES)
def test_machinery_is_folded(pages, name):
    lines = read(ROOT / name).splitlines()
    heading = [number for number, line in enumerate(lines, 1) if line.startswith("# ==== Machinery")]
    for address in both(name.replace(".py", ".html")):
        folded = re.findall(r'<details class="part" id="machinery">(.*?)</details>', pages[address], re.DOTALL)
        found = [number for part in folded for number, _ in lines_of(part)]
        assert found == ([*range(heading[0], len(lines) + 1)] if heading else []), address
    assert heading or name == "gae_reference.py"


def details():
    """{tag: (what it is, why, the name of its test)} of docs/details.md."""
    text = read(ROOT / "docs" / "details.md")
    found = re.findall(
        r"^### ([DRG]\d+) .+\n\n\* \*\*What\.\*\* ([^*]+)\* \*\*Why\.\*\* ([^*]+)\* .*::(\w+)", text, re.MULTILINE
    )
    return {tag: (" ".join(what.split()), " ".join(why.split()), test) for tag, what, why, test in found}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gae_reference.py"])
def test_tags_lead_in_both_directions(pages, name):
    """Each tag of a script has a note with its test, which leads to the detail; the detail leads to the lines."""
    code = read(ROOT / name)
    first = code[: code.index('"""', code.index('"""') + 3)].count("\n") + 1  # the docstring only announces tags
    tagged = [(tag, number) for number, line in enumerate(code.splitlines(), 1) for tag in re.findall(TAG, line)]
    tagged = [(tag, number) for tag, number in tagged if number > first]
    assert len(tagged) >= 13
    for address in both(name.replace(".py", ".html")):
        page = pages[address]
        prefix = address.removesuffix(name.replace(".py", ".html"))
        listed = pages[f"{prefix}docs/details.html"]
        for tag, number in tagged:
            note = re.search(rf'<p class="title" id="{tag}"><a href="docs/details\.html#({tag.lower()}-[^"]+)">', page)
            assert note, f"{address} has no note {tag}"
            section = listed[listed.index(f'id="{unquote(note[1])}"') :]
            section = section[: re.search(r"<h[23] |$", section[10:]).start() + 10]
            assert f'href="../{name.replace(".py", ".html")}#L{number}"' in section, f"{address}: {tag} at {number}"
            assert details()[tag][2] in page[note.start() :][:6000], f"{address}: {tag} names no test"


def test_notes_say_what_the_details_say(pages):
    """Word for word; where a text has code or a formula, its first words."""
    found = details()
    everything = {name: " ".join(text_of(pages[name.replace(".py", ".html")]).split()) for name in NAMES}
    assert len(found) >= 80
    in_scripts = set(re.findall(TAG, "".join(read(ROOT / name) for name in NAMES)))
    for tag, (what, why, _) in found.items():
        if tag not in in_scripts:  # G26 stands in benchmarks/memory_plan.py
            continue
        owner = {"D": "ppo_", "R": "rlhf", "G": "grpo"}[tag[0]]
        for text in (what, why):
            start = re.split(r"[`$\[]", text)[0].strip()
            assert any(start in page for name, page in everything.items() if name.startswith(owner)), f"{tag}: {start}"


def test_names_of_functions_lead_to_their_lines(pages):
    for page, name, function in (
        ("docs/1_ppo.html", "ppo_cartpole", "compute_gae"),
        ("docs/3_rlhf.html", "rlhf_gpt2_ppo", "masked_whiten"),
        ("docs/4_grpo.html", "grpo_llm", "group_advantages"),
    ):
        for address in both(page):
            link = re.search(rf'<a href="\.\./{name}\.html#L(\d+)"><code>{function}\b', pages[address])
            if link is None:
                assert f"`{function}" not in read(ROOT / page.replace(".html", ".md"))
                continue
            script = pages[f"{address.removesuffix(page)}{name}.html"]
            assert dict(lines_of(script))[int(link[1])].startswith(f"def {function}(")
            back = rf'<a href="{page}#[^"]+"><span class="nf">{function}</span></a>'
            assert re.search(back, script), f"{function} does not lead to {page}"


def test_every_formula_is_there(pages):
    sources = {f"docs/{path.stem}.html": path for path in (ROOT / "docs").glob("*.md")}
    sources |= {f"zh/docs/{path.stem}.html": path for path in (ROOT / "docs" / "zh").glob("*.md")}
    total = 0
    for address, source in sources.items():
        wanted = len(formulas(read(source))[0])
        assert pages[address].count("<math") == wanted, address
        total += wanted
    assert total >= 500
    for name in NAMES:
        for address in both(name.replace(".py", ".html")):
            assert len(re.findall(r'<math[^>]*display="block"', pages[address])) >= 4, address


@pytest.fixture(scope="module")
def annotated_module():
    pytest.importorskip("pygments")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import annotated
    finally:
        sys.path.pop(0)
    return annotated


@pytest.mark.parametrize(
    ("unicode", "latex"),
    [
        ("δₜ = rₜ + γ V(sₜ₊₁) − V(sₜ)", "δ_{t} = r_{t} + γ V(s_{t+1}) - V(s_{t})"),
        ("L_CLIP = min(ρ Â, clip(ρ) Â)", r"L_{\mathrm{CLIP}} = \mathrm{min}(ρ \hat A, \mathrm{clip}(ρ) \hat A)"),
        ("π(oᵢₜ | q, oᵢ,₍<t₎)", "π(o_{it} | q, o_{i,<t})"),
        ("Âₜ⁽ⁿ⁾ = γⁿ V(sₜ₊ₙ)", r"\hat A_{t}^{(n)} = γ^{n} V(s_{t+n})"),
        ("k3ᵢₜ = ln π(aₜ|sₜ)", r"k_{3it} = \ln π(a_{t}|s_{t})"),
    ],
)  # fmt: skip
def test_latex_of_a_docstring(annotated_module, unicode, latex):
    assert annotated_module.latex_of(unicode).replace(" ", "") == latex.replace(" ", "")


def test_papers_are_those_of_the_reading_list(annotated_module):
    linked = set(re.findall(r"arxiv\.org/abs/([\d.]+)\)", read(ROOT / "docs" / "reading.md")))
    assert set(annotated_module.PAPERS.values()) - linked == set()


def test_search_knows_both_languages(site):
    for folder, word in (("", "clipped"), ("zh", "裁剪")):
        index = json.loads(read(site / folder / "search" / "search_index.json"))
        found = [entry["location"] for entry in index["docs"] if word in entry["text"] + entry["title"]]
        assert len(found) >= 10
        assert not any(entry["location"].startswith("tests/") for entry in index["docs"])
    assert "\u200b" in json.dumps(index, ensure_ascii=False)  # Chinese text is cut into words


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    if find_spec("material") is None:
        pytest.skip("the site needs: pip install -r docs/requirements.txt")
    (tmp_path / "mine.txt").write_text("mine")
    run = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 2 and "has other files in it" in run.stderr
    assert read(tmp_path / "mine.txt") == "mine"


# ---- The site in a browser ----


is_search_empty = True


@pytest.fixture
def search(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "is_search_empty", False)


@pytest.fixture(scope="session")
def address(site):
    """The site's address, while a server of this process shows it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            if self.path.endswith("search_index.json") and is_search_empty:  # each page would index all pages again
                settings = {"lang": ["en"], "separator": " ", "pipeline": [], "fields": {}}
                content = json.dumps({"config": settings, "docs": []}).encode()
                self.send_response(200)
                self.send_header("Cache-Control", "no-store")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            else:
                super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    if Browser is None:
        pytest.skip("the browser's tests need selenium: pip install -r docs/requirements.txt")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)")
    options = ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = Browser(options=options, service=ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture
def phone(browser):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture
def desktop(browser):
    browser.set_window_size(1440, 1000)
    return browser


LOOK = """
const wide = [...document.querySelectorAll("math")].filter((x) => x.checkVisibility());
return {
  width: document.documentElement.scrollWidth,
  formulas: wide.length,
  flat: wide.filter((x) => x.getBoundingClientRect().height < 4).map((x) => x.textContent),
  letters: wide.length === 0 || document.fonts.check('16px "STIX Two Math"'),
  outside: performance.getEntriesByType("resource").map((x) => x.name).filter((x) => !x.startsWith(location.origin)),
  prose: [...document.querySelectorAll("article > p, aside p, article > h1, article > h2, article > ul > li")]
    .filter((x) => x.getBoundingClientRect().right > innerWidth + 1).map((x) => x.textContent.slice(0, 60)),
};
"""


def test_every_page_on_a_phone(phone, address, pages):
    """No error in the console, no other host, formulas with the letters of their font, no scrolling sideways."""
    opened = [page for page in pages if not re.search(r"^(tests|benchmarks/(?!RESULTS))", page)]
    assert len(opened) >= 50
    wrong, formulas_seen = [], 0
    for page in opened:
        phone.get(f"{address}/{page}")
        phone.execute_async_script("document.fonts.ready.then(arguments[0])")
        seen = phone.execute_script(LOOK)
        formulas_seen += seen["formulas"]
        wrong += [f"{page}: {entry['message']}" for entry in phone.get_log("browser") if entry["level"] != "INFO"]
        wrong += [f"{page}: {kind}: {seen[kind]}" for kind in ("flat", "outside", "prose") if seen[kind]]
        if seen["width"] > 390:
            wrong.append(f"{page} is {seen['width']} wide")
        if not seen["letters"]:
            wrong.append(f"{page} lacks the letters of its formulas")
    assert wrong == []
    assert formulas_seen >= 1000


def pasted(browser):
    """What Ctrl+V puts into a text field."""
    browser.execute_script("document.body.prepend(document.createElement('textarea')); document.activeElement.blur()")
    field = browser.find_element("css selector", "body > textarea")
    field.send_keys(Keys.CONTROL, "v")
    return field.get_property("value")


@pytest.mark.parametrize(
    ("page", "name"), [("zh/ppo_cartpole", "ppo_cartpole.py"), ("gae_reference", "gae_reference.py")]
)
def test_what_is_copied_is_code_alone(desktop, address, page, name):
    """All lines, with the notes between them, by Ctrl+C: the text of the script."""
    desktop.get(f"{address}/{page}.html")
    desktop.execute_script("getSelection().selectAllChildren(document.querySelector('.annotated'))")
    desktop.find_element("css selector", "body").send_keys(Keys.CONTROL, "c")
    assert pasted(desktop) == read(ROOT / name)


def test_the_copy_button_copies_code_alone(desktop, address):
    desktop.get(f"{address}/ppo_cartpole.html")
    row = desktop.execute_script("return document.getElementById('L107').closest('.row')")
    wanted = "".join(line.get_property("textContent") for line in row.find_elements("css selector", ".line"))
    deadline = time.time() + 10
    while not (buttons := row.find_elements("css selector", "button")) and time.time() < deadline:
        time.sleep(0.1)
    desktop.execute_script("arguments[0].scrollIntoView({block: 'center'})", row)
    buttons[0].click()
    copied = pasted(desktop)
    assert copied.rstrip() == wanted.rstrip() and copied.startswith("def compute_gae(")


def test_a_link_opens_the_folded_part(desktop, address):
    number = next(i for i, line in enumerate(read(ROOT / "ppo_cartpole.py").splitlines(), 1) if line == "def main():")
    desktop.get(f"{address}/ppo_cartpole.html")
    state = "return document.getElementById('machinery').open"
    assert desktop.execute_script(state) is False
    desktop.execute_script(f"location.hash = 'L{number}'")
    time.sleep(0.3)
    assert desktop.execute_script(state) is True
    top = desktop.execute_script(f"return document.getElementById('L{number}').getBoundingClientRect().top")
    assert 40 < top < 1000


def test_notes_stand_beside_their_lines(desktop, address):
    """On a screen: on the left, at the same height as the first line that they explain."""
    desktop.get(f"{address}/ppo_cartpole.html")
    rows = desktop.execute_script("""
        const rows = [...document.querySelectorAll(".row:has(aside)")].filter((x) => x.checkVisibility());
        return rows.map((x) => {
          const [note, line] = ["aside", ".line"].map((y) => x.querySelector(y).getBoundingClientRect());
          return [note.right, line.left, note.top - line.top];
        });
    """)
    assert len(rows) >= 15
    assert all(right <= left and abs(apart) < 12 for right, left, apart in rows)


def test_dark_mode(desktop, address):
    desktop.get(f"{address}/docs/1_ppo.html")
    seen = set()
    for _ in range(3):
        time.sleep(0.2)
        colours = "return getComputedStyle(document.body).backgroundColor"
        seen.add(desktop.execute_script(colours))
        desktop.execute_script("document.querySelector('form[data-md-component=palette] label:not([hidden])').click()")
    assert len(seen) == 2, seen


@pytest.mark.parametrize(("page", "word"), [("index.html", "clipped surrogate"), ("zh/index.html", "优势函数")])
def test_search_finds(desktop, address, search, page, word):
    desktop.get(f"{address}/{page}")
    desktop.execute_script("document.querySelector('label[for=__search]').click()")
    desktop.find_element("css selector", "input.md-search__input").send_keys(word)
    deadline, found = time.time() + 20, []
    while not found and time.time() < deadline:
        time.sleep(0.2)
        found = desktop.find_elements("css selector", ".md-search-result__link")
    links = [link.get_attribute("href") for link in found]
    assert len(links) >= 3 and all(link.startswith(f"{address}/{page.removesuffix('index.html')}") for link in links)


def move(browser, **values):
    """Set sliders, as a hand would."""
    for name, value in values.items():
        browser.execute_script(
            "const x = document.getElementById(arguments[0]); x.value = arguments[1];"
            "x.dispatchEvent(new Event('input', {bubbles: true}))",
            name,
            value,
        )


def table(browser):
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#numbers tr')].map((x) => [...x.cells].map((y) => y.textContent))"
    )
    return [[cell.replace("−", "-") for cell in row] for row in rows]


@pytest.mark.parametrize("folder", ["", "zh/"])
def test_the_clip_is_the_references(desktop, address, folder):
    desktop.get(f"{address}/{folder}docs/interactive/clip.html")
    gradients = set()
    for epsilon in (0.1, 0.2, 0.5):
        for ratio in (0.0, 0.3, 0.75, 0.95, 1.0, 1.05, 1.3, 2.5):
            move(desktop, ratio=ratio, epsilon=epsilon)
            for row, advantage in zip(table(desktop), (1.0, -1.0), strict=True):
                objective, slope = reference.clipped_surrogate(ratio, advantage, epsilon, epsilon)
                assert [float(row[1]), float(row[2])] == pytest.approx([objective, slope], abs=5.1e-4)
                gradients.add(slope)
    assert gradients == {0.0, 1.0, -1.0}
    assert desktop.execute_script("return document.querySelectorAll('#plots svg').length") == 2


@pytest.mark.parametrize("folder", ["", "zh/"])
def test_gae_is_the_references(desktop, address, folder):
    desktop.get(f"{address}/{folder}docs/interactive/gae.html")
    steps = {key: reference.EXAMPLE[key] for key in ("rewards", "values", "next_values", "terminated")}
    for gamma, gae_lambda in ((0.9, 0.0), (0.9, 0.95), (1.0, 1.0), (0.5, 0.3), (0.0, 0.7)):
        move(desktop, gamma=gamma, **{"lambda": gae_lambda})
        wanted = reference.gae_double_sum(**reference.EXAMPLE, gamma=gamma, gae_lambda=gae_lambda)
        deltas = reference.td_errors(**steps, gamma=gamma)
        found = [[float(cell) for cell in row[5:]] for row in table(desktop)]
        assert [x[0] for x in found] == pytest.approx(deltas, abs=5.1e-5)
        assert [x[1] for x in found] == pytest.approx(wanted, abs=5.1e-5)
        exact = desktop.execute_script("return gae_advantages(arguments[0], arguments[1])", gamma, gae_lambda)
        assert exact == pytest.approx(wanted, abs=1e-12)
        for step in range(6):  # the bars: both kinds of weights give this step's advantage
            move(desktop, step=step)
            weights = desktop.execute_script("return gae_weights(...arguments)", step, gamma, gae_lambda)
            n_step = desktop.execute_script("return n_step_weights(...arguments)", step, gae_lambda)
            assert sum(w * d for w, d in zip(weights, deltas[step:])) == pytest.approx(wanted[step], abs=1e-12)
            example = [reference.EXAMPLE[key] for key in ("rewards", "values", "next_values", "terminated")]
            parts = [reference.n_step_advantage(step, n + 1, *example, gamma) for n in range(len(n_step))]
            assert sum(w * x for w, x in zip(n_step, parts)) == pytest.approx(wanted[step], abs=1e-12)
            bars = desktop.execute_script("return document.querySelectorAll('#weights rect').length")
            assert bars == len(weights) == reference.steps_to_the_end(step, reference.EXAMPLE["done"])


@pytest.mark.parametrize("folder", ["", "zh/"])
def test_group_advantages_are_the_references(desktop, address, folder):
    desktop.get(f"{address}/{folder}docs/interactive/group.html")
    change = """
        document.querySelectorAll("#rewards input").forEach((x, i) => x.value = arguments[0][i]);
        document.getElementById("scale").checked = arguments[1];
        document.getElementById("scale").dispatchEvent(new Event("input", {bubbles: true}));
        return [...document.querySelectorAll("#picture text")].map((x) => x.textContent).filter((x) => x.includes("."));
    """
    for rewards in ([1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0], [0.5] * 8, [0.3, -2, 4, 1.5, 0, 0, 7, 1]):
        for scale in (True, False):
            shown = desktop.execute_script(change, rewards, scale)
            wanted = reference.group_advantages(rewards, scale)
            assert [float(x.replace("−", "-")) for x in shown] == pytest.approx(wanted, abs=5.1e-4)
            exact = desktop.execute_script("return group_advantages(arguments[0], arguments[1])", rewards, scale)
            assert exact == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("page", ["clip", "gae", "group"])
def test_pictures_speak_both_languages(desktop, address, page):
    for folder, is_chinese in (("", False), ("zh/", True)):
        desktop.get(f"{address}/{folder}docs/interactive/{page}.html")
        for _ in range(2):
            heading = desktop.find_element("css selector", "h1").text
            assert bool(re.search(r"[\u4e00-\u9fff]", heading)) == is_chinese and heading
            desktop.find_element("id", "language").click()
            is_chinese = not is_chinese
