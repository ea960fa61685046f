"""report.html in a real browser, headless Chromium, opened as a file as its readers open it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from chanscale.pipeline import scale_and_select
from chanscale.report_page.writing import REPORT
from tiny_fits import tiny_classifier, tiny_config
from tiny_reports import EVIL, draw, few_draws

playwright = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 90_000
"""Milliseconds: a busy machine must not fail a test."""
VIOLATIONS = """
    window.violations = [];
    addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""
LONG = "a_class_whose_name_is_longer_than_the_screen_of_any_phone_is_wide_and_has_no_spaces"


@pytest.fixture(scope="module", autouse=True)
def _few_draws():
    with few_draws():
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    if not CHROMIUM:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # No sandbox: containers, in which tests run, rarely allow one.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shown") / "run"
    scale_and_select(tiny_classifier().trunk, draw(EVIL), config=tiny_config(), out=out)
    return out / REPORT


@pytest.fixture(scope="module")
def long_names(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("long") / "run"
    images = draw((LONG, f"{LONG}_too"))
    scale_and_select(tiny_classifier().trunk, images, config=tiny_config(), out=out)
    return out / REPORT


@pytest.fixture(scope="module")
def chosen(tmp_path_factory) -> Path:
    """A report of a run with an operating point and prediction sets."""
    out = tmp_path_factory.mktemp("chosen") / "run"
    config = tiny_config(sensitivity=0.6, coverage=0.5, validation=0.3)
    scale_and_select(tiny_classifier().trunk, draw(EVIL), config=config, out=out)
    return out / REPORT


@pytest.fixture
def open_page(browser):
    """Return a function that opens a report in a tab; what the tab complains of, or asks for, fails the test."""
    pages, heard = [], []

    def open_one(path: Path, **options) -> "playwright.Page":
        page = browser.new_page(**options)
        pages.append(page)
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((path.as_uri(), "data:")) else heard.append(request.url)
            ),
        )
        page.add_init_script(VIOLATIONS)
        page.goto(path.as_uri())
        return page

    yield open_one
    assert [page.evaluate("window.violations || []") for page in pages] == [[]] * len(pages)
    for page in pages:
        page.close()
    assert heard == []


def counts(page) -> dict[str, int]:
    return {name: int(page.text_content(f"#{name}")) for name in ("tp", "fn", "fp", "tn")}


def test_the_threshold_moves_by_keyboard_and_the_figures_with_it(open_page, report):
    page = open_page(report)
    told = json.loads(page.text_content("#data"))
    page.focus("#threshold")
    for key, step in (("ArrowRight", 51), ("ArrowLeft", 50), ("Home", 0), ("End", 100)):
        page.keyboard.press(key)
        assert page.text_content("#threshold-shown") == f"{step / 100:.2f}"
        tp, fp = told["true_positives"][step], told["false_positives"][step]
        assert counts(page) == {
            "tp": tp, "fp": fp, "fn": told["positives"] - tp, "tn": told["negatives"] - fp,
        }  # fmt: skip
        sensitivity, specificity = tp / told["positives"], 1 - fp / told["negatives"]
        assert page.text_content("#sensitivity") == f"{100 * sensitivity:.1f} %"
        assert page.text_content("#specificity") == f"{100 * specificity:.1f} %"
        assert page.text_content("#ppv") == (f"{100 * tp / (tp + fp):.1f} %" if tp + fp else "–")
        frame, point = told["frame"], page.locator("#roc-point")
        across = frame["left"] + frame["width"] * (1 - specificity)
        up = frame["top"] + frame["height"] * (1 - sensitivity)
        assert float(point.get_attribute("cx")) == pytest.approx(across)
        assert float(point.get_attribute("cy")) == pytest.approx(up)


def test_one_key_leads_back_to_one_half(open_page, report):
    page = open_page(report)
    before = counts(page), page.text_content("#npv"), page.text_content("#threshold-shown")
    page.focus("#threshold")
    page.keyboard.press("End")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "reset"
    page.keyboard.press("Enter")
    assert (counts(page), page.text_content("#npv"), page.text_content("#threshold-shown")) == before


def test_the_slider_starts_at_the_operating_point_and_comes_back_to_it(open_page, chosen):
    page, plain = open_page(chosen), open_page(chosen, java_script_enabled=False)
    start = json.loads(page.text_content("#data"))["start"]
    assert start["threshold"] != 0.5
    for step in ("as it opens", "after a way"):
        assert page.text_content("#threshold-shown") == f"{start['threshold']:.3f}", step
        assert counts(page) == counts(plain), step
        assert (counts(page)["tp"], counts(page)["fp"]) == (start["true_positives"], start["false_positives"])
        page.focus("#threshold")
        page.keyboard.press("End")
        assert counts(page)["tp"] == 0
        page.click("#reset")


def test_without_a_script_the_figures_at_one_half_stand_there(open_page, report):
    page, plain = open_page(report), open_page(report, java_script_enabled=False)
    assert page.is_visible("#threshold")
    assert not plain.is_visible("#threshold")
    assert counts(plain) == counts(page)
    assert plain.text_content("#threshold-shown") == "0.50"


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_screen_needs_horizontal_scrolling(open_page, report, long_names, chosen, width, scheme):
    for path in (report, long_names, chosen):
        page = open_page(path, viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_both_colour_schemes_are_readable(open_page, report):
    shades = {}
    for scheme in ("light", "dark"):
        page = open_page(report, color_scheme=scheme)
        script = "['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])"
        colours = page.evaluate(script)
        shades[scheme] = [sum(map(int, colour[4:-1].split(","))) for colour in colours]
    assert shades["light"][0] < 150 < 600 < shades["light"][1]
    assert shades["dark"][1] < 150 < 600 < shades["dark"][0]


def test_on_paper_all_is_open_and_nothing_asks_to_be_moved(open_page, report):
    page = open_page(report)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert not page.is_visible("#threshold")
    assert page.eval_on_selector_all("details", "all => all.every(one => one.open)")
    assert len(page.pdf()) > 10_000


def test_no_name_becomes_a_script(open_page, report):
    page = open_page(report)
    page.on("dialog", lambda _: pytest.fail("a name was run"))
    assert page.text_content("h1").strip() == " or ".join(reversed(EVIL))
    assert page.locator("main script").count() == 0
