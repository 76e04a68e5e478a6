"""The report of finished runs: one page that needs nothing else, that reads well for everyone and on every screen."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from jobs import run

from runtime.errors import BadArguments
from tools import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Elements in order with their attributes and text; fails on tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self.open.append(self.found[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, *tags):
        return [element for element in self.found if element[0] in tags]


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """The report of one run, and of two that differ in their dense model."""
    out = tmp_path_factory.mktemp("report")
    other = out / "other"
    shutil.copytree(runs["tuned"], other)
    summary = json.loads((other / "summary.json").read_text())
    summary["dense"]["dims"]["embed"] += 8
    summary["finetuned"]["dims"]["blocks"][1]["tokens"] = 11
    (other / "summary.json").write_text(json.dumps(summary))
    run(report, runs["tuned"], "--output", out / "one")
    run(report, runs["tuned"], runs["pruned"], other, "--output", out / "several")
    return dict(
        one=(out / "one" / "report.html").read_text(), several=(out / "several" / "report.html").read_text(), path=out
    )


def brightness(colour):
    """WCAG 2's relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("which", ["one", "several"])
def test_the_page_is_accessible(written, which):
    page = Page(written[which])
    (html,), (title,) = page.all("html"), page.all("title")
    assert html[1]["lang"] == "en" and title[2] and [e[0] for e in page.all("header", "main", "footer")]
    levels = [int(e[0][1]) for e in page.all("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False)), "a heading level is skipped"
    pictures = page.all("img")
    assert len(pictures) >= 10 and all(len(e[1]["alt"]) > 20 and e[1]["width"] for e in pictures)
    assert all(e[1].get("scope") in ("row", "col") and e[2] for e in page.all("th")) and page.all("caption")
    assert any(e[1].get("name") == "viewport" for e in page.all("meta"))
    background = brightness("#fff7ed")  # the darkest behind text but for the table's head
    for colour in re.findall(r"(?<![-\w])color: (#\w{6})", page.all("style")[0][2]):
        assert (background + 0.05) / (brightness(colour) + 0.05) >= 4.5, colour


@pytest.mark.parametrize("which", ["one", "several"])
def test_the_page_needs_nothing_else(written, which):
    page = Page(written[which])
    assert not page.all("script", "link", "iframe")
    for _, attributes, _ in page.found:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    for picture in page.all("img"):
        assert base64.b64decode(picture[1]["src"].split(",")[1]).startswith(b"\x89PNG")
    assert "url(" not in written[which] and "@import" not in written[which]


def test_the_page_says_what_the_summary_says(runs, written):
    page, summary = Page(written["one"]), json.loads((runs["tuned"] / "summary.json").read_text())
    rows = {e[2] for e in page.all("tr")}
    for name, stage in summary.items():
        assert any(row.startswith(name) and f"{stage['params']:,}" in row for row in rows)
    titles = [e[2] for e in page.all("h2")]
    assert titles == ["Result", "Widths that are left", "Where pruning took them", "The way there", "How it was made"]
    mlp = ", ".join(str(b["mlp"]) for b in summary["finetuned"]["dims"]["blocks"])
    assert any(mlp in e[1]["alt"] for e in page.all("img"))
    (made,) = page.all("pre")
    assert made[2].count("python ") == 4 and "timm 1" in made[2]  # commands and versions of pruning and finetuning


def test_runs_that_do_not_compare_are_said_to(written, capsys):
    page = Page(written["several"])
    (note,) = [e for e in page.all("p") if e[1].get("role") == "note"]
    assert "other and " in note[2] and "have different dense models" in note[2]
    names = {e[2].split()[0] + e[2].split()[1][:6] for e in page.all("th") if e[1]["scope"] == "row"}
    assert {"Adense", "Apruned"[:7], "Bpruned"[:7], "Cdense"} <= names and "Bdense" not in names


def test_tokens_are_drawn_where_some_were_merged(written):
    captions = {which: [e[2] for e in Page(written[which]).all("figcaption")] for which in ("one", "several")}
    assert [found.count("Tokens per block") for found in captions.values()] == [0, 1]
    (picture,) = [e for e in Page(written["several"]).all("img") if e[1]["alt"].startswith("tokens left")]
    assert picture[1]["alt"] == "tokens left in blocks 1 to 2: 18, 11; dense: 18, 18"


def test_files_and_last_line(runs, tmp_path, capsys):
    run(report, runs["tuned"], "--output", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "summary.json", "widths.png"]
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {(tmp_path / 'report.html').as_uri()}"


def test_bad_runs_are_all_named(runs, tmp_path):
    (unfinished := tmp_path / "unfinished").mkdir()
    (unfinished / "args.json").write_text("{}")
    (unfinished / "log.txt").write_text('{"epoch": 0}\n{"epo')
    shutil.copytree(runs["pruned"], within := tmp_path / "report" / "run")
    for name in ("summary.json", "report.html", "dense.pth"):  # what a report has written where it was told to
        shutil.copy(within / "summary.json", within.parent / name)
    (damaged := tmp_path / "damaged").mkdir()
    (damaged / "summary.json").write_text('{"dense": {"dims": 3}}')
    with pytest.raises(BadArguments) as error:
        run(report, unfinished, damaged, runs["root"], tmp_path / "nothing", within.parent, *[runs["tuned"]] * 2)
    assert f"report is not the folder of a run; these in it are: {within}" in error.value.problems[4]
    assert [
        re.search(
            "not finished .1 epoch is|is damaged|is not the folder of a run; these in it|there is no|twice", problem
        )
        is not None
        for problem in error.value.problems
    ] == [True] * 6


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_sticks_out_in_a_browser(written, tmp_path, width):
    """Inside a frame of that width, since a window cannot be as narrow as a phone."""
    measure = "<script>onload = () => document.title = document.documentElement.scrollWidth</script>"
    (tmp_path / "page.html").write_text(written["several"].replace("</head>", f"{measure}</head>"))
    (tmp_path / "frame.html").write_text(
        f'<body style="margin:0"><iframe src="page.html" style="border:0;width:{width}px;height:3000px"></iframe>'
        "<script>onload = () => document.body.dataset.width = frames[0].document.title</script>"
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=3000",
    ]
    shot = tmp_path / "shot.png"
    for wish in (["--dump-dom"], [f"--screenshot={shot}", f"--window-size={width},3000"]):
        done = subprocess.run(
            [BROWSER, *flags, *wish, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-500:]
        if "--dump-dom" in wish:
            assert int(re.search(r'data-width="(\d+)"', done.stdout)[1]) <= width
    assert shot.stat().st_size > 50_000
