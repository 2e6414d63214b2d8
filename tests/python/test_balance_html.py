"""The HTML report: self-contained, accessible, and looked at in a browser, on a phone and a desktop, light and dark."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from balance_cases import answer_of, comparison_of, keys_of, report_of
from browser import find_browser, running
from moda_attn.analysis import balance_of_masses, compare
from moda_attn.analysis.html import ReportPage, SeenImage, words
from moda_attn.analysis.measures import MEASURES
from moda_attn.analysis.plot.style import DARK, LIGHT
from moda_attn.analysis.table import MEASURE_NAMES

LONG = "folder/with/a/name/that/has/no/place/to/break/whatsoever/and/goes/on.safetensors"


def full_page() -> ReportPage:
    """A page with everything that a page may have, and words that may break it."""
    rng = np.random.default_rng(0)
    heat = {name: 0.4 * rng.dirichlet(np.ones(16), 6).reshape(6, 4, 4) for name in ("unpatched", "MODA")}
    photograph = Image.fromarray((255 * rng.random((300, 400, 3))).astype(np.uint8))
    images = [
        SeenImage(photograph, "“What <is> this & that?”", heat, range(6), 0.61),
        SeenImage(np.arange(64).reshape(8, 8), "A scan", {"MODA": heat["MODA"]}, range(6)),
        SeenImage(None, "Without its picture", {"MODA": heat["MODA"]}, range(6)),
    ]
    facts = {"model": LONG, "prompt": "<script>alert(1)</script>"}
    answers = [answer_of(count) for count in (1, 9, 40)]
    return ReportPage(
        comparison_of(layers=24, heads=16), "Unpatched & MODA", facts, images, answers, {"MODA": keys_of()}
    )


PAGES = {
    "everything": full_page,
    "one model": lambda: ReportPage(report_of(), keys={"unpatched": keys_of(patched=False)}),
    "one input": lambda: ReportPage(comparison_of(inputs=1)),
}
EXAMPLE = Path(__file__).parents[2] / "docs" / "example" / "report.html"


@pytest.fixture(scope="module", params=[*PAGES, "docs/example"])
def page(request, tmp_path_factory):
    if request.param not in PAGES:
        return EXAMPLE
    return PAGES[request.param]().write(tmp_path_factory.mktemp("report") / "made" / "report.html")


class Outline(HTMLParser):
    """What a page is made of; complains about elements closed in the wrong order."""

    VOID = ("meta", "link", "br", "image", "use", "path", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_a_page_is_one_file_without_scripts_or_requests(page):
    outline = Outline(page.read_text(encoding="utf-8"))
    assert outline.open == []
    assert outline.all("script") == []
    for tag, attributes in outline.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    style = re.search(r"<style>(.*?)</style>", page.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert "@import" not in style
    assert "url(" not in style


def test_a_page_is_accessible(page):
    outline = Outline(page.read_text(encoding="utf-8"))
    assert outline.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in outline.all("meta")
    ids = Counter(attributes["id"] for _, attributes in outline.elements if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    for attributes in outline.all("svg"):
        if attributes.get("aria-hidden") != "true":
            assert attributes["role"] == "img"
            assert len(attributes["aria-label"]) > 20
    levels = [int(tag[1]) for tag, _ in outline.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(outline.all("caption")) == len(outline.all("table")) > 0
    assert all(attributes.get("scope") in ("col", "row", "rowgroup") for attributes in outline.all("th"))


def test_every_number_has_its_sentence_and_the_three_measures_stand_together(page):
    text = page.read_text(encoding="utf-8")
    table = re.search(r"<table .*?</table>", text, re.DOTALL)[0]
    sentences = [f"<b>{MEASURE_NAMES[name]}</b> {escape(words.OF_MEASURE[name])}" for name in MEASURES]
    places = [table.index(sentence) for sentence in sentences]
    assert places == sorted(places)
    for head, _ in words.TRAPS:
        assert head in text


def test_the_numbers_are_those_of_the_report():
    result = comparison_of()
    text = ReportPage(result).html()
    for row in result.rows:
        for name in ("disparity", "relative_disparity", "pseudo_share"):
            change = row.changes[name]
            assert f"{100 * getattr(row.before, name):.2f}\N{NO-BREAK SPACE}%" in text
            assert f"{100 * change.value:+.2f} points".replace("-", "−") in text
            assert f"{100 * change.low:+.2f} to {100 * change.high:+.2f}".replace("-", "−") in text
    report = report_of()
    assert (
        f"{report.of(0).decay_fit.low:.3f} – {report.of(0).decay_fit.high:.3f} by the fit" in ReportPage(report).html()
    )


def test_every_measure_stands_beside_its_chance():
    report, result = report_of(), comparison_of()
    single, both = ReportPage(report).html(), ReportPage(result).html()
    chance = f"{100 * report.of(0).chance.disparity:.2f}\N{NO-BREAK SPACE}%"
    assert single.count(f"<td>{chance}</td>") >= 2
    assert f'<span class="interval">at chance {chance}</span>' in both
    lift = report.of(0).lift
    assert f"that is {lift:.2f} times chance" in single
    assert f"get {result.rows[0].before.lift:.2f} times what chance would give them with unpatched" in both
    # Intervals by the fit are those of the two numbers that are fitted.
    rows = len(report.every)
    assert single.count(" by the fit</span>") == 2 * rows
    assert f"<td>{report.of(0).chance.cross_mass[2]:.3f}</td>" in single
    # Nobody of this page sees another modality.
    blind = balance_of_masses([np.array([[[[0.9, 0.0, 0.1]] * 3]])] * 2, np.zeros((1, 3), dtype=int))
    assert "Text queries: they see no key of another modality." in ReportPage(blind).html()


def test_layers_that_are_not_measured_are_named():
    reason = "MllamaTextCrossAttention: cross-attention, whose keys are not the text decoder's own tokens"
    report = replace(report_of(), unmeasured={3: reason, 8: reason, 13: reason})
    sentence = f"Not measured: layers 3, 8 and 13: {escape(reason)}. {escape(words.UNMEASURED)}"
    assert sentence in ReportPage(report).html()
    assert ReportPage(compare(report, report)).html().count(sentence) == 1
    other = compare(report_of(), report, names=("one", "two"))
    assert f"Not measured of two: layers 3, 8 and 13: {escape(reason)}." in ReportPage(other).html()
    assert "Not measured" not in ReportPage(report_of()).html()


def test_the_key_space_has_its_numbers():
    space = keys_of()
    text = ReportPage(report_of(), keys={"MODA": space, "plain": keys_of(patched=False)}).html()
    for name in space.before._fields:
        found = space.summary(name)
        assert f"{found['after'].value:.3f}" in text
        low, high = (f"{end:+.3f}".replace("-", "−") for end in found["change"][1:])
        assert f'<span class="interval">{low} to {high}</span>' in text
    assert "means over layers, heads and 8 inputs" in text


def test_what_users_write_is_escaped():
    text = full_page().html()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "“What &lt;is&gt; this &amp; that?”" in text
    assert text.count("At chance 61.0% of the attention would lie on it.") == 1


def test_verdicts_claim_no_more_than_the_intervals():
    result = comparison_of()
    names = result.names
    assert words.verdict(result.rows[0], names).startswith("Text queries: MODA looks more evenly than unpatched by ")
    single = comparison_of(inputs=1)
    assert "one input says nothing about others" in words.verdict(single.rows[0], names)
    # Pseudo-scores take from both sides alike: nothing has become more even.
    lowered = compare(report_of(0.9, 0.0), report_of(0.9, 0.2))
    sentence = words.verdict(lowered.rows[0], ("before", "after"))
    assert "no difference in relative disparity" in sentence
    assert "fell only because the pseudo-scores take mass from both sides" in sentence


def test_a_page_is_small():
    assert EXAMPLE.stat().st_size < 500_000
    assert len(full_page().html()) < 1_000_000
    assert len(ReportPage(comparison_of()).html()) < 400_000


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on this machine: the report is not looked at (apt-get install chromium)")
    with running(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


PICTURES_DECODE = """
Promise.all([...document.querySelectorAll('image')].map(async picture => {
  const copy = new Image(); copy.src = picture.href.baseVal; await copy.decode(); return copy.naturalWidth;
}))"""
WIDER_THAN_THE_PAGE = """
[...document.querySelectorAll('body *')].filter(part =>
  !part.closest('.wide, .hidden') && !(part instanceof SVGElement && part.tagName != 'svg')
  && part.getBoundingClientRect().right > innerWidth + 0.5).map(part => part.outerHTML.slice(0, 80))"""
SMALLEST_WORDS = """
Math.min(...[...document.querySelectorAll('.panels svg')].map(picture =>
  9 * picture.getBoundingClientRect().width / picture.viewBox.baseVal.width))"""
LETTERS_CUT_OFF = """
[...document.querySelectorAll('.panels svg')].flatMap(picture => {
  const frame = picture.getBoundingClientRect();
  return [...picture.querySelectorAll('use')].map(letter => letter.getBoundingClientRect()).filter(
    box => box.right > frame.right + 1 || box.left < frame.left - 1 || box.top < frame.top - 1);
}).length"""
SIZES = (
    "[...document.querySelectorAll('svg[role=img]')].map(s => s.getBoundingClientRect()).map(r => [r.width, r.height])"
)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_whole(browser, page, width, dark, tmp_path):
    browser.open(page, width=width, height=900, dark=dark)
    assert browser.evaluate("innerWidth") == width, "the page is wider than the screen"
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(WIDER_THAN_THE_PAGE) == []
    assert all(count > 0 for count in browser.evaluate(PICTURES_DECODE))
    sizes = browser.evaluate(SIZES)
    assert len(sizes) >= 4
    assert all(across > 100 and down > 50 for across, down in sizes)
    # Nine points of the picture, on the screen of a phone too.
    assert browser.evaluate(SMALLEST_WORDS) > 8.5
    assert browser.evaluate(LETTERS_CUT_OFF) == 0
    theme = DARK if dark else LIGHT
    colours = browser.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert colours == [as_css(theme.paper), as_css(theme.ink)]
    line = "getComputedStyle(document.querySelector('.panels svg path[style*=\"--own\"]')).stroke"
    assert browser.evaluate(line) == as_css(theme.own)
    assert browser.complaints() == []
    assert [address for address in browser.requests() if not address.startswith("data:")] == [page.resolve().as_uri()]

    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.width == width
        pixels = np.asarray(shot.convert("RGB"))
    assert "#" + bytes(pixels[2, 2]).hex() == theme.paper
    assert len(np.unique(pixels[::2, ::2] @ [1 << 16, 1 << 8, 1])) > 100


def as_css(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgb({red}, {green}, {blue})"


def test_the_browser_would_notice_what_is_wrong(browser, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(
        '<!DOCTYPE html><meta name="viewport" content="width=device-width"><div style="width: 700px">wide</div>'
        '<img src="missing.png"><script>console.error("no"); undefined.value</script>'
    )
    browser.open(broken, width=390, height=900, dark=False)
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
    assert len(browser.evaluate(WIDER_THAN_THE_PAGE)) == 0 or browser.evaluate("innerWidth") > 390
    complaints = "\n".join(browser.complaints())
    assert "undefined" in complaints
    assert '"no"' in complaints
    assert any("missing.png" in address for address in browser.requests())
