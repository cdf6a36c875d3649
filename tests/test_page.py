"""The report: one page from records, looked at by a real browser; and the fingerprints that are remembered for it."""

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_experiments import no_texts, whole  # noqa: F401, the fixture puts laptop cells on packaged speeches

from experiments import memo, report
from experiments.__main__ import main
from experiments.artefacts import load, names
from experiments.cells import Row, Runs
from experiments.markup import sparkline, table, thinned
from experiments.memo import remembered
from experiments.page import Cited, cited
from welore.config import fingerprint
from welore.records import Record

MODES = ("none", "welore", "lora")
ERRS = (0.3, 0.5)


@pytest.fixture
def outputs(configured, tmp_path):
    """Six runs with curves, one of them failed with a text that would end a script."""
    for mode in MODES:
        for err in ERRS:
            config = configured(f"mode={mode}", f"err={err}")
            name = fingerprint(config)
            found = {"dense/perplexity": 10.0, "compressed/perplexity": 20.0 + err, "compress/err": err}
            environment = {"device": "a CPU", "protocol": "the protocol", "torch": "2.13.0"}
            record = Record(name, "done", asdict(config), found, environment, "c0ffee", "2026-01-01", 12.5)
            folder = tmp_path / "tiny" / name
            record.save(folder)
            if mode != "none":
                lines = [{"step": step, "train/loss": 3 - step / 10} for step in range(20)]
                (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    broken = replace(record, fingerprint="ffffffffff", status="failed", error="ValueError: </script><b>&amp;")
    broken.save(tmp_path / "tiny" / "broken")
    return tmp_path


def of(outputs, mode, err):
    """The fingerprint of one of those runs."""
    found = [Record.read(path.parent) for path in outputs.rglob("record.json")]
    done = [record for record in found if record.status == "done"]
    return next(r.fingerprint for r in done if r.config["mode"]["name"] == mode and r.config["err"] == err)


@pytest.fixture
def page(outputs, monkeypatch):
    """The page of those runs, with one artefact."""
    monkeypatch.setattr(report, "names", lambda: ["table1"])
    return report.write(Runs.of(report_runs(outputs)), str(outputs))


def report_runs(outputs):
    return [(path.parent, Record.read(path.parent)) for path in sorted(outputs.rglob("record.json"))]


@pytest.mark.parametrize("name", names())
def test_every_line_of_an_artefact_leads_to_its_runs(name, tmp_path):
    body = load(name).render(whole(name, "laptop", tmp_path / "run")).body
    bare = [line for line in body if not any(isinstance(text, Cited) for text in line)]
    by_formula = ["dense", "dense", "0.3", "0.5", "0.7"] if name == "table7" else []  # of no run
    assert body and [line[1] for line in bare] == by_formula
    assert {run for line in body for text in line if isinstance(text, Cited) for run in text.runs} == {"0000000000"}


def test_a_text_without_a_run_is_not_a_link():
    assert not isinstance(cited("missing", [Row({}, why="never run")]), Cited)


def test_a_table_shows_text_as_it_is_and_numbers_as_links_to_their_runs():
    record = Record("abc", "done", {})
    number = cited("1.5 (0.1, 0.9)", [Row({}, record=record), Row({}, record=replace(record, fingerprint="def"))])
    html = table(["<model>", "paper", "ours"], [["a & b", "2.0", number], ["c", "—", "missing"]], "a table")
    assert "&lt;model&gt;" in html and "a &amp; b" in html
    assert '<td class="number"><a href="#runs=abc,def">1.5</a> <small>(0.1, 0.9)</small></td>' in html
    assert '<th scope="col" class="paper number">paper</th>' in html and "<em>missing</em>" in html


def test_a_small_curve_runs_from_left_to_right_and_leaves_out_what_is_no_number():
    svg = sparkline([(1, 3.0), (2, math.nan), (3, 1.0)], "a curve")
    ((x0, y0), (x1, y1)) = [map(float, p.split(",")) for p in re.search('points="(.*?)"', svg)[1].split()]
    assert x0 < x1 and y0 < y1  # a loss that falls goes down, where y counts from the top
    assert sparkline([(1, 3.0)], "a point") == ""


def test_a_long_curve_keeps_its_ends():
    points = [(float(step), 1.0) for step in range(1000)]
    kept = thinned(points, 10)
    assert len(kept) == 10 and kept[0] == points[0] and kept[-1] == points[-1]


class Elements(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_page_is_whole_in_itself_and_its_text_is_no_markup(page):
    text = page.read_text()
    elements = Elements(text).found
    addresses = [a[key] for _, a in elements for key in ("src", "href", "srcset", "action") if key in a]
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)
    assert "url(" not in text and "@import" not in text and not [a for tag, a in elements if tag == "link"]
    assert [tag for tag, _ in elements].count("script") == 2 and not [1 for tag, a in elements if tag == "b" and a]


def test_what_scrolls_can_be_reached_with_the_keyboard_and_has_a_name(page):
    elements = Elements(page.read_text()).found
    wide = [a for _, a in elements if a.get("class") == "wide"]
    assert wide and all(a["tabindex"] == "0" and a["aria-label"] and a["role"] == "region" for a in wide)
    targets = {a["id"] for _, a in elements if "id" in a}
    links = [a["href"][1:] for tag, a in elements if tag == "a" and not a["href"].startswith(("#run", "#q="))]
    assert set(links) <= targets
    assert [a["for"] for tag, a in elements if tag == "label"] == ["query"]


def luminance(color):
    def linear(part):
        share = int(part, 16) / 255
        return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(color[i : i + 2]) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    """The ratio of WCAG 2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_has_the_contrast_of_wcag_aa_in_light_and_in_dark(scheme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    css = Path(report.__file__).with_suffix(".css").read_text()
    block = re.findall(r":root \{(.*?)\}", css, re.S)[scheme]
    colors = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
    pairs = [(text, back) for text in ("ink", "soft", "link", "fails") for back in ("paper", "surface")]
    pairs += [(state, f"{state}-back") for state in ("holds", "fails", "open")]
    assert {pair: ratio for pair in pairs if (ratio := contrast(*(colors[name] for name in pair))) < 4.5} == {}


def test_an_artefact_that_cannot_be_rendered_says_so_and_costs_no_other(outputs, monkeypatch):
    monkeypatch.setattr(report, "names", lambda: ["table1", "table7"])

    def fails(rows):
        raise KeyError("compress/err")

    monkeypatch.setattr(load("table7"), "render", fails)
    text = report.write(Runs.of(report_runs(outputs)), str(outputs)).read_text()
    assert "It cannot be shown: KeyError: &#x27;compress/err&#x27;" in text and "WeLore tuned" in text


def test_a_curve_that_is_not_finite_and_a_name_that_is_markup_do_no_harm(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "names", lambda: [])
    Record('"><b id=x>', "done", {}, {"tuned/perplexity": math.inf}).save(tmp_path / "run")
    lines = [{"step": step, "train/loss": loss} for step, loss in enumerate([3.0, math.inf, math.nan])]
    (tmp_path / "run" / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report.write(Runs.of(report_runs(tmp_path)), str(tmp_path)).read_text()
    assert not [a for tag, a in Elements(text).found if tag == "b"]

    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1], parse_constant=refuse)
    assert data["runs"]['"><b id=x>']["curves"] == {"train/loss": [[1, 3.0], [2, None], [3, None]]}


@pytest.mark.parametrize(("done", "said"), [(True, "1 of 1 runs"), (False, "0 of 1 runs")])
def test_runs_that_an_artefact_offers_are_counted_apart(tmp_path, done, said):
    record = Record("0", "done", {}) if done else None
    cells = [{"mode": "welore", "err": err} for err in ERRS]
    rows = [Row(cells[0], tmp_path, record, "never run"), Row(cells[1], why="never run", offered=True)]
    text = report._scale(report.Sheet("table6", "laptop", "", "", rows, None, "", str(tmp_path)), True)
    assert said in text and ("1 of 1 runs are missing" in text) is not done
    beyond = text.partition("1 more runs are offered")[2]
    assert "err=0.5" in beyond and "err=0.3" not in beyond


def test_a_figure_is_drawn_anew_when_the_code_that_draws_it_has_changed(tmp_path, monkeypatch):
    sheet, drawn = report.Sheet("figure7", "laptop", "", "", [], None, "", str(tmp_path)), []
    monkeypatch.setattr(report, "png", lambda figure: drawn.append(figure) or b"a picture")
    for code in (b"one", b"one", b"two"):
        monkeypatch.setattr(report, "_drawing", lambda code=code: [code])
        assert sheet.drawn("", "a figure") == b"a picture"
    assert len(drawn) == 2


def test_records_of_another_time_are_listed_with_what_they_say(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "names", lambda: [])
    for name, config in (("empty", {}), ("old", {"model": "tiny", "err": 0.0}), ("odd", {"err": "0.3"})):
        Record(name, "done", config).save(tmp_path / name)
    text = report.write(Runs.of(report_runs(tmp_path)), str(tmp_path)).read_text()
    assert {a["data-run"] for tag, a in Elements(text).found if "data-run" in a} == {"empty", "old", "odd"}
    assert ">err=0<" in text and text.count(">as given<") == 2


def test_the_report_starts_no_run(capsys, tmp_path):
    assert main(["report", "logger=none", f"outputs={tmp_path}"]) == 2
    assert "starts no run" in capsys.readouterr().err


def test_fingerprints_are_remembered_until_a_file_that_a_cell_names_changes(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(memo, "fingerprint_of", lambda cell: asked.append(cell) or f"name{len(asked)}")
    file = tmp_path / "texts" / "a.txt"
    file.parent.mkdir()
    file.write_text("one")
    cell = {"model": "tiny", "task.path": str(file.parent)}

    def name():
        with remembered(str(tmp_path)) as known:
            return known(cell)

    assert [name(), name()] == ["name1", "name1"] and len(asked) == 1
    file.write_text("another")
    assert [name(), name()] == ["name2", "name2"] and len(asked) == 2
    monkeypatch.setattr(memo, "state", lambda: "changed code")
    assert name() == "name3"


# In a browser.


@pytest.fixture(scope="session")
def chromium():
    """The path of Chromium, which is installed where that is possible."""
    if found := shutil.which("chromium"):
        return found
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        pytest.skip("no chromium here, and no right to install one")
    install = "apt-get update -qq; apt-get install -y -qq --no-install-recommends chromium"
    # Tests in other processes install too, and apt does not wait: as in scripts/slurm_here.sh.
    locked = ["flock", "--close", "/tmp/welore-apt.lock", "sh", "-c", install]
    subprocess.run(locked, capture_output=True, timeout=900, check=False)
    return shutil.which("chromium") or pytest.skip("chromium could not be installed")


@pytest.fixture
def look(chromium, tmp_path):
    """A function of a page and what follows # in its address to the document after its scripts have run."""

    def look(path, fragment="", width=1280):
        quiet = [
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-sync",
        ]
        quiet += ["--disable-component-update", "--disable-quic", f"--user-data-dir={tmp_path / 'browser'}"]
        command = [
            chromium,
            "--headless",
            *quiet,
            f"--window-size={width},900",
            "--dump-dom",
            f"file://{path}{fragment}",
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return look


def visible(document):
    """The runs that are listed, in a document after a search."""
    rows = [a for tag, a in Elements(document).found if tag == "tr" and "data-run" in a]
    return {a["data-run"] for a in rows if "hidden" not in a}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "modes", "errs"),
    [
        ("mode=welore", ["welore"], ERRS),
        ("mode=welore err=0.5", ["welore"], [0.5]),
        ("err<0.4 TINY", MODES, [0.3]),
        ("mode=wel", [], []),
        ("lore status=done", MODES, ERRS),  # every run has ranks=welore
    ],
)
def test_the_search_finds_runs_by_model_mode_and_err(query, modes, errs, page, outputs, look):
    document = look(page, f"#q={query.replace(' ', '%20')}")
    assert visible(document) == {of(outputs, mode, err) for mode in modes for err in errs}
    assert f"{len(visible(document))} of 7 runs" in document


@pytest.mark.slow
@pytest.mark.parametrize("link", ["run", "runs"])
def test_a_number_is_one_click_from_the_origin_of_its_run(link, page, outputs, look):
    name = of(outputs, "welore", 0.3)
    document = look(page, f"#{link}={name}")
    shown = document[document.index("<dialog") : document.index("</dialog>")]
    assert "open" in shown[: shown.index(">")]
    told = [
        str(outputs / "tiny" / name),
        "c0ffee",
        "a CPU",
        "2.13.0",
        name,
        "task.training.lr",
        "compressed perplexity",
    ]
    assert [text for text in told if text not in shown] == []
    assert "<polyline" in shown and "step 20" in shown


@pytest.mark.slow
def test_the_error_of_a_failed_run_is_shown_as_text(page, look):
    document = look(page, "#run=ffffffffff")
    assert "ValueError: &lt;/script&gt;&lt;b&gt;&amp;amp;" in document


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_as_wide_as_the_window(width, page, look):
    assert beyond(page, width, look) == 0


@pytest.mark.slow
def test_a_page_that_is_wider_than_its_window_would_be_noticed(page, look):
    page.write_text(page.read_text().replace("</main>", '<div style="width:600px">wide</div></main>'))
    assert beyond(page, 390, look) > 0


def beyond(page, width, look):
    """By how many pixels the page is wider than a window of this width; every artefact of it is laid out."""
    measure = (
        "<style>.artefact { content-visibility: visible !important }</style><script>addEventListener('load', () => {"
        "for (const part of document.querySelectorAll('details')) part.open = true; "
        "const page = document.documentElement; "
        "parent.postMessage([innerWidth, page.scrollWidth - page.clientWidth], '*') })</script></body>"
    )
    framed = page.with_name("framed.html")
    framed.write_text(page.read_text().replace("</body>", measure))
    frame = page.with_name("frame.html")  # a window of Chromium is at least 500 pixels wide, a frame is not
    frame.write_text(
        "<script>addEventListener('message', (told) => { document.title = told.data.join() })</script>"
        f'<iframe src="{framed.name}" style="width:{width}px;height:900px;border:0"></iframe>'
    )
    seen, more = re.search("<title>(.*),(.*)</title>", look(frame, width=1400)).groups()
    assert int(seen) == width
    return int(more)
