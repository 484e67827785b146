"""The report, in a real browser: headless Chromium."""

import html
import json
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import mistake
from PIL import Image

import evaluate
import train
from pictures import line_chart

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def opened(browser, file, width=1280, scheme="light"):
    """→ the page of a file, and what went wrong meanwhile."""
    page, wrong = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(file.resolve().as_uri())
    return page, [line for line in wrong if line != file.resolve().as_uri()]


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_of_the_report_is_seen(browser, trained, width, scheme):
    page, wrong = opened(browser, trained / "report.html", width, scheme)
    assert not wrong
    sizes = page.eval_on_selector_all("img", "images => images.map(i => [i.naturalWidth, i.clientWidth])")
    assert len(sizes) > 10 and all(natural > 10 and shown > 40 for natural, shown in sizes)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
    assert (bright[0] > bright[1]) == (scheme == "light") and abs(bright[0] - bright[1]) > 500
    charts = page.eval_on_selector_all("svg", "all => all.map(s => s.getBoundingClientRect().width)")
    assert len(charts) == 3 and min(charts) > 250
    for words in page.eval_on_selector_all("svg text", "all => all.map(t => [t.getBBox().x, t.getBBox().width])"):
        assert words[0] >= 0 and sum(words) <= 480  # no label leaves its chart
    page.close()


@needs_browser
def test_it_prints(browser, trained, tmp_path):
    page, _ = opened(browser, trained / "report.html")
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
    page.close()


@needs_browser
def test_it_says_what_the_figures_are(browser, trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    page, _ = opened(browser, trained / "report.html")
    said = page.inner_text("main")
    for words in ("not a medical device", f"{metrics['ece']:.3f}", "--lora-rank", "PyTorch"):
        assert words in said
    assert page.inner_text(".card b") == f"{metrics['accuracy']:.3f}"
    table = page.eval_on_selector_all(".matrix tr", "rows => rows.map(r => [...r.cells].map(c => c.innerText))")
    assert [[int(cell.replace("·", "0")) for cell in row[1:]] for row in table[1:]] == metrics["confusion"]
    wrong = sum(map(sum, metrics["confusion"])) - sum(row[i] for i, row in enumerate(metrics["confusion"]))
    assert (f"{wrong} mistake" in said) if wrong else "None: every image got its class" in said
    page.close()


@needs_browser
def test_names_and_captions_are_shown_and_not_obeyed(script, browser, base, tmp_path):
    evil = ["<img src=x onerror=alert(1)>", "</style><script>alert(2)</script>", "a'\"&b"]
    rows = ["image\tlabel\tcaption\tgroup"]
    for i, name in enumerate(evil * 4):
        Image.new("RGB", (40, 40), (60 * (i % 3), 40, 20 * i)).save(tmp_path / f"{i}<b>.png")
        quoted = '"' + name.replace('"', '""') + '"'
        rows.append(f"{i}<b>.png\t{quoted}\t{quoted}\t")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    flags = "--weights", base, "--steps", 2, "--flip", "none", "--duplicates", "ignore", "--device", "cpu"
    status, _, err = script(train, "--data", tmp_path / "m.csv", *flags, "--run", "run")
    assert status == 0, err
    page, wrong = opened(browser, tmp_path / "run/report.html")
    assert not wrong and page.locator("script").count() == 0
    said = page.inner_text("main")
    assert all(re.sub("[_-]+", " ", name) in said for name in evil)
    page.close()


# ---------------------------------------------------------------------------------------------------------------------


def test_it_counts_what_was_trained_on(trained):
    text = (trained / "report.html").read_text(encoding="utf-8")
    lines = (trained / "split.csv").read_text().splitlines()[1:]
    images = {line.split(",")[0]: line.split(",") for line in lines}
    counts = Counter((row[1], row[-2]) for row in images.values())
    for label in {label for label, _ in counts}:
        cells = "".join(f"<td>{counts[label, split]}</td>" for split in ("train", "val"))
        assert f"<td>{label.replace('-', ' ')}</td>{cells}" in text


def test_a_report_of_other_images(script, trained, pictures, tmp_path):
    status, _, err = script(
        evaluate, "--run", trained, "--data", pictures / "manifest.csv", "--report", tmp_path / "other.html"
    )
    assert status == 0, err
    text = (tmp_path / "other.html").read_text(encoding="utf-8")
    assert "the figures are of" in text and html.escape(str(pictures / "manifest.csv")) in text
    assert "data:image/jpeg;base64," in text and not re.search(r'(src|href)="(?!data:)', text)
    for name in ("other.txt", "nowhere/other.html"):
        assert "--report" in mistake(script(evaluate, "--run", trained, "--report", name))


def test_skipped_images_and_notes_are_named(script, base, pictures, tmp_path):
    shutil.copytree(pictures / "images", tmp_path / "images")
    first = next(Path(tmp_path / "images").rglob("*.png"))
    shutil.copy(first, first.with_name("copy.png"))
    first.with_name("broken.png").write_bytes(b"no image")
    flags = "--weights", base, "--steps", 2, "--skip-bad", "--device", "cpu", "--run", "run"
    assert script(train, "--data", "images", *flags)[0] == 0
    text = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "1 image could not be read" in text and "broken.png" in text
    assert "1 picture found more than once; copies are kept on one side" in text


def test_a_chart_keeps_its_points_inside():
    chart = line_chart({"loss": [(1, 3.2), (5, 0.4), (10, 0.9)], "other": [(1, 1.0), (10, 2.0)]}, "step")
    points = [
        tuple(map(float, pair.split(","))) for line in re.findall('points="(.*?)"', chart) for pair in line.split()
    ]
    assert len(points) == 5 and all(52 <= x <= 464 and 44 <= y <= 228 for x, y in points)
    assert points[0][1] < points[2][1] < points[1][1]  # SVG's y grows downwards
    assert line_chart({"one": [(1, 1.0)]}, "step").count("<text") > 3
    started = time.monotonic()
    line_chart({"large": [(1, -1e6), (2, 1e6)]}, "step")
    assert time.monotonic() - started < 5


def test_odd_logs_make_no_curves(script, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for lines in ('{"step": 1}\n{"step": 2}', '{"step": 1, "loss": 1e400}\n{"step": 2, "loss": "x"}', "[]\n{", "\xff"):
        (tmp_path / "run/metrics.jsonl").write_text(lines, encoding="latin-1")
        status, _, err = script(evaluate, "--run", "run", "--report", "out.html")
        assert status == 0 and "<polyline" not in (tmp_path / "out.html").read_text(encoding="utf-8"), err


def test_two_classes_without_captions_are_two_texts(script, base, pictures, tmp_path):
    for label in ("half-left", "half-right"):
        shutil.copytree(pictures / "images" / label, tmp_path / "images" / label)
    flags = "--weights", base, "--steps", 2, "--device", "cpu", "--run", "run"
    assert script(train, "--data", "images", *flags)[0] == 0
    text = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    found = re.findall("<p>“(.*?)”</p>", text)
    assert len(found) == len(set(found)) == 2
