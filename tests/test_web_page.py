"""The page in a real browser, headless Chromium, against ONNX Runtime on the same images."""

import base64
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from chanscale.artifact import load_model
from chanscale.conformal import PredictionSets
from chanscale.export.examples import draw_examples
from chanscale.export.onnx_file import export_onnx
from chanscale.export.web import RUNTIME, build_page
from chanscale.files import is_file
from chanscale.operating_point import OperatingPoint
from chanscale.predictions import Predictions, predict_images
from chanscale.weights import cache_folder
from chanscale.wording import NOTICE

pytest.importorskip("onnxruntime", reason="needs: pip install 'chanscale[export]'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")

from standin_model import run_model, standin  # noqa: E402
from test_export import INFO, made  # noqa: E402, F401  # a fixture

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TOLERANCE = 1e-3
"""Of a probability: browser and Pillow may round the colours of a JPEG differently, by one level of 255."""
PATIENCE = 90_000
"""Milliseconds: a busy machine must not fail a test."""
TWO = ("clear", "<script>window.harmed = true</script>")
THREE = ("red", "<b>green</b>", "blue")
VIOLATIONS = """
    window.violations = [];
    addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""
DROP = """([name, text, count]) => {
    const transfer = new DataTransfer();
    for (let copy = 0; copy < count; copy += 1)
        transfer.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name));
    document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
}"""
PAINTED = "() => [...document.getElementById('map').getContext('2d').getImageData(0, 0, 4, 4).data]"


@dataclass
class Site:
    """A page that is served: its address, its model, and a tab that shows it."""

    url: str
    model: bytes
    page: "playwright.Page"
    requests: list[str] = field(default_factory=list)

    def choose(self, path: Path) -> str:
        """Give the page an image; return what it says."""
        self.forget()
        self.page.set_input_files("#file", path)
        return self.answer()

    def forget(self) -> None:
        """Take away what the page said last, so that `answer` cannot return it."""
        self.page.evaluate("document.getElementById('status').dataset.state = ''")

    def answer(self) -> str:
        """Wait until the page says what became of an image."""
        # By selectors: playwright's wait_for_function needs `eval`, which the page's policy forbids.
        self.page.wait_for_selector(
            ":is(#status[data-state=done], #status[data-state=error])", state="attached"
        )
        return self.page.text_content("#status")

    def probabilities(self) -> list[float]:
        return [
            float(item.get_attribute("data-probability")) for item in self.page.query_selector_all("#bars li")
        ]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    if not CHROMIUM:
        pytest.skip("needs Chromium: apt-get install chromium")
    if not is_file(cache_folder() / RUNTIME.filename):
        pytest.skip(f"needs: npm pack {RUNTIME.package} --pack-destination {cache_folder()}")
    with playwright.sync_playwright() as driver:
        # No sandbox: containers, in which tests run, rarely allow one.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def open_site(browser, tmp_path_factory):
    """Return a function that builds a page for a model, serves it and opens it."""
    servers = []

    def open_one(
        model, classes=TWO, *, grey_only=False, channels=1, multilabel=False, rules=None, **options
    ) -> Site:
        folder = tmp_path_factory.mktemp("served") / "site"
        build_page(
            model, folder, classes=classes, name="A <i>tiny</i> model", channels=channels, grey_only=grey_only,
            multilabel=multilabel, rules=rules, notice="Trained on noise.",
        )  # fmt: skip
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder))
        thread = Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        page = browser.new_page(**options)
        site = Site(f"http://127.0.0.1:{server.server_port}/", model, page)
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: site.requests.append(request.url))
        page.add_init_script(VIOLATIONS)
        page.goto(site.url)
        page.wait_for_selector("#status[data-state=ready]")
        return site

    yield open_one
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def two(open_site) -> Site:
    return open_site(standin())


@pytest.fixture(scope="module")
def three(open_site) -> Site:
    return open_site(standin(3), THREE, channels=3)


def draw(path: Path, *, colour: bool = False, size: tuple[int, int] = (83, 57), **options) -> Path:
    """Save a smooth image, brighter to the right, of which colours differ."""
    width, height = size
    down, right = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    planes = [60 + 130 * right, 200 * down, 255 * right * down] if colour else [20 + 220 * right * down]
    pixels = np.stack(planes, -1).round().astype(np.uint8)
    Image.fromarray(pixels if colour else pixels[..., 0]).save(path, **options)
    return path


def assert_same_probabilities(site: Site, path: Path) -> None:
    site.choose(path)
    with Image.open(path) as image:
        wanted = run_model(site.model, np.asarray(image.convert("L" if image.mode == "L" else "RGB")))[0][0]
    np.testing.assert_allclose(site.probabilities(), wanted, atol=TOLERANCE)
    assert wanted.max() < 0.95  # not so sure that nothing could change it


@pytest.mark.parametrize("name", ["grey.png", "colour.png", "grey.jpg", "colour.jpg"])
@pytest.mark.parametrize("site", ["two", "three"])
def test_probabilities_equal_those_of_onnx_runtime(request, tmp_path, site, name):
    path = draw(tmp_path / name, colour=name.startswith("colour"))
    assert_same_probabilities(request.getfixturevalue(site), path)


def test_probabilities_of_chest_radiographs_equal_those_of_onnx_runtime(two, nih_opacity, tmp_path):
    for film in sorted(nih_opacity.glob("*/*.png"))[:600:200]:
        assert_same_probabilities(two, film)
        with Image.open(film) as image:
            image.save(tmp_path / f"{film.stem}.jpg", quality=90)
        assert_same_probabilities(two, tmp_path / f"{film.stem}.jpg")


def test_the_page_of_a_run_says_what_predict_says(made, open_site, nih_opacity):  # noqa: F811
    model, info = load_model(made[0])
    graph, _ = export_onnx(model, info, draw_examples(grey_only=False))
    site = open_site(graph, info.classes)
    films = sorted(nih_opacity.glob("*/*.png"))[:600:120]
    said = []
    for film in films:
        site.choose(film)
        said.append(site.probabilities())
    np.testing.assert_allclose(said, predict_images(model, info, films).probabilities, atol=TOLERANCE)
    assert np.ptp(said, axis=0).min() > 0.01


def test_a_turned_photograph_is_seen_upright(two, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    two.choose(draw(tmp_path / "turned.jpg", exif=exif))
    assert "57 × 83 pixels" in two.page.text_content("#seconds")


def test_pixels_are_not_colour_managed(two, tmp_path):
    linear = bytes.fromhex("00000001") + b"\0" * 4  # never an ICC profile that a reader would apply
    path = draw(tmp_path / "managed.png", icc_profile=linear)
    assert_same_probabilities(two, path)


def test_the_most_probable_class_is_named_and_all_have_a_figure(three, tmp_path):
    said = three.choose(draw(tmp_path / "colour.png", colour=True))
    shares = three.probabilities()
    winner = THREE[int(np.argmax(shares))]
    assert sum(shares) == pytest.approx(1, abs=1e-6)
    assert three.page.text_content("#heading") == "Most probable"
    assert three.page.text_content("#verdict") == winner
    assert not three.page.is_visible("#rules")
    assert said == f"colour.png: {winner}, {max(shares) * 100:.1f} %."
    assert three.page.text_content("#file-name") == "colour.png"
    assert [item.text_content() for item in three.page.query_selector_all("#bars li span")] == [
        text for name, share in zip(THREE, shares, strict=True) for text in (name, f"{100 * share:.1f} %")
    ]


def test_of_several_labels_those_more_probable_than_not_are_named(open_site, tmp_path):
    site = open_site(standin(3, multilabel=True), THREE, channels=3, multilabel=True)
    path = draw(tmp_path / "colour.png", colour=True)
    assert_same_probabilities(site, path)
    called = [name for name, share in zip(THREE, site.probabilities(), strict=True) if share > 0.5]
    assert 1 < len(called) < 3
    assert site.page.text_content("#verdict") == ", ".join(called)
    assert site.page.text_content("#status") == f"colour.png: {', '.join(called)}."
    assert site.page.locator("#bars li.wins").count() == len(called)
    assert site.page.text_content("#heading") == "More probable than not"


@pytest.mark.parametrize(("above", "held"), [(0.01, -0.01), (-0.01, 0.01)])
def test_the_rules_of_the_model_are_read_as_predict_reads_them(two, open_site, tmp_path, above, held):
    path = draw(tmp_path / "grey.png")
    two.choose(path)
    shares = np.array([two.probabilities()])
    point = OperatingPoint(float(shares[0, 1]) + above, 0.9, 20, 2)
    sets = PredictionSets(0.8, tuple(float(share) + held for share in shares[0]), (9, 9))
    info = replace(INFO, classes=TWO, operating_point=point, prediction_sets=sets)
    site = open_site(standin(), rules=info.rules)
    said = site.choose(path)
    rules = site.page.text_content("#rules")
    assert site.page.is_visible("#rules")
    assert said.endswith(rules)
    told = Predictions(("grey.png",), TWO, shares.astype(np.float32), (), point, sets)
    assert rules.startswith("Positive" if told.called_positive[0] else "Not positive")
    assert f"({TWO[1]} from {100 * point.threshold:#.3g} % on, for a sensitivity of 0.9)" in rules
    assert rules.endswith(f"for a coverage of 0.8: {', '.join(told.sets[0])}.")


def test_the_map_is_the_models_positive_in_one_colour_negative_in_another(two, tmp_path):
    path = draw(tmp_path / "grey.png", size=(32, 32))
    two.choose(path)
    evidence = run_model(two.model, np.asarray(Image.open(path)))[1].ravel()
    assert evidence.min() < 0 < evidence.max()
    painted = np.array(two.page.evaluate(PAINTED)).reshape(-1, 4)
    seen = painted[:, 3] > 8  # a canvas keeps no colour where it is nearly clear
    np.testing.assert_array_equal((painted[:, 0] > painted[:, 2])[seen], (evidence > 0)[seen])
    full = np.sort(abs(evidence))[14]  # of 16: what is stronger is painted alike
    np.testing.assert_allclose(painted[:, 3] / 255, (abs(evidence) / full).clip(max=1), atol=1 / 255)


def test_each_class_has_a_map_of_its_own(three, tmp_path):
    three.choose(draw(tmp_path / "colour.png", colour=True, size=(32, 32)))
    maps = []
    for index, name in enumerate(THREE):
        three.page.select_option("#map-class", str(index))
        assert three.page.text_content("#for").endswith(name)
        maps.append(three.page.evaluate(PAINTED))
    assert maps[0] != maps[1] != maps[2]


def test_a_model_without_a_map_shows_none(open_site, tmp_path):
    site = open_site(standin(with_map=False))
    site.choose(draw(tmp_path / "grey.png"))
    assert len(site.probabilities()) == 2
    assert not site.page.is_visible("#evidence")
    assert not site.page.is_visible("#map")


def test_a_grey_model_takes_grey_and_refuses_colours(open_site, tmp_path):
    site = open_site(standin(grey_only=True), grey_only=True)
    assert_same_probabilities(site, draw(tmp_path / "grey.png"))
    grey_in_three = tmp_path / "three.png"
    Image.open(tmp_path / "grey.png").convert("RGB").save(grey_in_three)
    site.choose(grey_in_three)
    assert len(site.probabilities()) == 2
    said = site.choose(draw(tmp_path / "colour.png", colour=True))
    assert said == "colour.png has colours; this model takes grey images only."


def test_colours_before_a_model_of_grey_images_are_mentioned(two, tmp_path):
    two.choose(draw(tmp_path / "colour.png", colour=True))
    assert two.page.is_visible("#colours")
    two.choose(draw(tmp_path / "grey.png"))
    assert not two.page.is_visible("#colours")


def test_what_is_no_image_gives_a_sentence_and_the_next_one_works(two, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    said = two.choose(tmp_path / "text.png")
    assert said == "text.png is not an image that this browser can read; choose a PNG or a JPEG."
    assert two.page.get_attribute("#status", "role") == "status"
    assert not two.page.is_visible("#result")
    assert_same_probabilities(two, draw(tmp_path / "grey.png"))
    assert two.page.is_visible("#result")


def test_transparent_pixels_are_refused_and_an_opaque_alpha_is_not(two, tmp_path):
    image = Image.open(draw(tmp_path / "colour.png", colour=True)).convert("RGBA")
    image.save(tmp_path / "opaque.png")
    assert_same_probabilities(two, tmp_path / "opaque.png")
    image.putpixel((3, 3), (10, 20, 30, 254))
    image.save(tmp_path / "clear.png")
    assert two.choose(tmp_path / "clear.png") == "clear.png has transparent pixels; save it without them."


def test_an_image_that_is_too_large_gives_a_sentence(two, tmp_path):
    Image.new("1", (8000, 5500)).save(tmp_path / "huge.png")
    assert two.choose(tmp_path / "huge.png") == "huge.png has 44 megapixels; choose an image of at most 40."


def test_a_model_that_fails_gives_a_sentence_and_the_next_image_works(open_site, tmp_path):
    site = open_site(standin(grey_only=True))  # the page is not told, and gives it colours
    said = site.choose(draw(tmp_path / "colour.png", colour=True))
    assert said == "The model failed on colour.png; try a smaller image."
    assert_same_probabilities(site, draw(tmp_path / "grey.png"))


def drop(site: Site, path: Path, count: int = 1) -> str:
    """Drop `count` copies of an image on the page; return what it says."""
    site.forget()
    site.page.evaluate(DROP, [path.name, base64.b64encode(path.read_bytes()).decode(), count])
    return site.answer()


def test_a_dropped_image_is_classified(two, tmp_path):
    path = draw(tmp_path / "dropped.png")
    assert drop(two, path).startswith("dropped.png: ")
    wanted = run_model(two.model, np.asarray(Image.open(path)))[0][0]
    np.testing.assert_allclose(two.probabilities(), wanted, atol=TOLERANCE)


def test_several_images_at_once_are_refused_rather_than_dropped_silently(two, tmp_path):
    assert drop(two, draw(tmp_path / "one.png"), count=2) == "Got 2 files; give one image at a time."


def open_chooser(page: "playwright.Page") -> "playwright.FileChooser":
    """Press Enter until the browser opens its dialog: on a busy machine it may miss that a user pressed the key."""
    for _ in range(5):
        try:
            with page.expect_file_chooser(timeout=PATIENCE / 5) as chooser:
                page.keyboard.press("Enter")
        except playwright.TimeoutError:
            continue
        return chooser.value
    raise AssertionError("Enter opens no dialog")


def test_all_of_it_works_by_keyboard(open_site, tmp_path):
    site = open_site(standin())
    page, focused = site.page, "document.activeElement.id"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "file"
    assert page.evaluate("getComputedStyle(document.querySelector('.picker label')).outlineStyle") == "solid"
    site.forget()
    open_chooser(page).set_files(draw(tmp_path / "grey.png"))
    assert site.answer().startswith("grey.png: ")
    opacity = "Number(document.getElementById('map').style.opacity)"
    assert page.evaluate(opacity) == pytest.approx(0.6)
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "show-map"
    page.keyboard.press("Space")
    assert page.evaluate(opacity) == 0
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "opacity"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(opacity) == pytest.approx(0.65)


def test_a_phone_needs_no_horizontal_scrolling(open_site, tmp_path):
    long = "a_class_whose_name_is_longer_than_the_screen_of_any_phone_is_wide_and_has_no_spaces"
    site = open_site(standin(3), (long, *THREE[1:]), viewport={"width": 360, "height": 740})
    for path in (tmp_path / f"{long}.png", tmp_path / "tall.png"):
        site.choose(draw(path, size=(83, 57) if path.stem == long else (16, 400)))
        assert site.page.evaluate("document.documentElement.scrollWidth") == 360
        assert site.page.evaluate("document.getElementById('image').getBoundingClientRect().right") <= 360


def test_names_are_text_and_never_markup(two, three, tmp_path):
    two.choose(draw(tmp_path / "<img src=x onerror=alert(1)>.png"))
    assert two.page.text_content("#bars li:nth-child(2) span") == TWO[1]
    assert two.page.text_content("h1") == two.page.title() == "A <i>tiny</i> model"
    assert two.page.query_selector_all("main script, main i, main img") == []
    assert two.page.evaluate("window.harmed") is None
    three.choose(draw(tmp_path / "grey.png"))
    assert three.page.query_selector_all("main b") == []


def test_the_page_says_what_it_is_not_and_where_images_stay(two):
    said = two.page.inner_text(".warning")
    assert NOTICE in said
    assert "Trained on noise." in said
    assert "Your images stay on this machine" in said


def test_nothing_is_asked_for_elsewhere(two, tmp_path):
    two.choose(draw(tmp_path / "grey.png"))
    assert any(url.endswith("model.onnx") for url in two.requests)
    assert [url for url in two.requests if not url.startswith((two.url, "data:"))] == []
    assert two.page.evaluate("window.violations") == []


def test_the_policy_stops_what_would_leave(two, three):
    before = len(two.requests)
    tried = "url => fetch(url + 'model.json', {mode: 'no-cors'}).then(() => 'sent', () => 'stopped')"
    assert two.page.evaluate(tried, three.url) == "stopped"
    assert two.page.evaluate("window.violations.splice(0)") == ["connect-src"]
    assert two.requests[before:] == []


@pytest.mark.parametrize(
    ("gone", "named"),
    [("model.json", "model.json"), ("ort.wasm.min.js", "the runtime"), ("model.onnx", "model.onnx")],
)
def test_a_missing_file_is_said_in_a_sentence(two, browser, gone, named):
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.route(f"**/{gone}", lambda route: route.fulfill(status=404))
    page.goto(two.url)
    page.wait_for_selector("#status[data-state=error]")
    assert named in page.text_content("#status")
    assert "put the whole folder on the server" in page.text_content("#status")
