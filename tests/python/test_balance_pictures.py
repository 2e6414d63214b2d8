"""The pictures: what is asked for is drawn, in both styles, without warnings and without labels that collide."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from balance_cases import answer_of, comparison_of, keys_of, report_of
from moda_attn.analysis import optional
from moda_attn.analysis.measures import MEASURES
from moda_attn.analysis.plot import comparison, gap, generation, heads, image, measures, profile
from moda_attn.analysis.plot.style import DARK, LIGHT, Theme
from moda_attn.errors import ModaValueError

# What matplotlib complains of. Not every kind: a file that another test left open would count, whenever it is found.
pytestmark = [pytest.mark.filterwarnings(f"error::{kind}") for kind in ("UserWarning", "RuntimeWarning")]

HEAT = np.random.default_rng(0).dirichlet(np.ones(12), 5).reshape(5, 3, 4)
PICTURES = {
    "profile": lambda style: profile(report_of(), style=style),
    "profile of one layer": lambda style: profile(report_of(layers=1), style=style),
    "heads": lambda style: heads(report_of(), style=style),
    "heads of many": lambda style: heads(report_of(layers=48, heads=40), style=style),
    "comparison": lambda style: comparison(comparison_of(), style=style),
    "measures": lambda style: measures(comparison_of(), style=style),
    "image": lambda style: image(HEAT, np.eye(30), style=style),
    "image without picture": lambda style: image(HEAT[:1], style=style),
    "answer of a word": lambda style: generation(answer_of(1).balance, ["four"], style=style),
    "answer of words": lambda style: generation(answer_of(9).balance, list("fourteen."), style=style),
    "long answer": lambda style: generation(answer_of(90).balance, style=style),
    "keys": lambda style: gap(keys_of(), style=style),
    "keys of an unpatched model": lambda style: gap(keys_of(patched=False), style=style),
}


def overlaps(figure) -> list[tuple[str, str]]:
    """Pairs of texts that lie on each other, and texts that leave the figure."""
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    hidden = {id(label) for axes in figure.axes for label in labels_beyond_the_limits(axes)}
    drawn = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and id(text) not in hidden]
    # The box of a slanted word is mostly air.
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in drawn if text.get_rotation() in (0, 90)]
    found = [
        (one, other)
        for place, (one, box) in enumerate(boxes)
        for other, second in boxes[place + 1 :]
        if box.padded(-1).overlaps(second.padded(-1))
    ]
    whole = figure.bbox.padded(1)
    return found + [
        (text, "outside") for text, box in boxes if box.x0 < whole.x0 or box.x1 > whole.x1 or box.y1 > whole.y1
    ]


def labels_beyond_the_limits(axes):
    """Those that matplotlib keeps for ticks it does not show."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high:
                yield from (tick.label1, tick.label2)


@pytest.mark.parametrize("style", ["light", "dark"])
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_drawn_and_their_words_do_not_collide(name, style, tmp_path):
    figure = PICTURES[name](style)
    assert overlaps(figure) == []
    figure.savefig(tmp_path / "picture.png")
    from PIL import Image

    with Image.open(tmp_path / "picture.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    paper = {"light": LIGHT, "dark": DARK}[style].paper
    assert "#" + bytes(pixels[0, 0]).hex() == paper
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 30


def test_reports_draw_themselves():
    for figure in (
        report_of().plot(),
        report_of().plot("heads"),
        comparison_of().plot(),
        comparison_of().plot("measures"),
    ):
        assert figure.axes
    for subject in (report_of(), comparison_of()):
        with pytest.raises(ModaValueError, match="kind='pie'; 'profile' or "):
            subject.plot("pie")
    with pytest.raises(ModaValueError, match="style='sepia'; 'light' or 'dark' wanted"):
        report_of().plot(style="sepia")


def test_the_profile_draws_the_masses_with_their_bands():
    report = report_of()
    axes = profile(report).axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    row = report.of(0)
    assert tuple(lines["own modality"]) == row.self_mass
    assert tuple(lines["others"]) == row.cross_mass
    assert tuple(lines["pseudo-scores"]) == row.pseudo_mass
    assert len(axes.collections) == 3
    assert axes.collections[0].get_datalim(axes.transData).ymin == pytest.approx(row.mass_interval[0, :, 0].min())
    assert profile(report_of(inputs=1)).axes[0].collections[:] == []


def test_the_map_of_heads_shows_own_less_others():
    report = report_of()
    shown = heads(report).axes[0].images[0]
    mass = report.of(0).mass
    assert np.asarray(shown.get_array()) == pytest.approx(mass[..., 0] - mass[..., 1])
    assert shown.get_clim() == (-1, 1)


def test_bars_of_an_answer_stack_to_the_whole():
    answer = answer_of(7)
    bars = generation(answer.balance).axes[0].containers
    assert [bar.get_label() for bar in bars] == ["image", "prompt’s text", "generated before", "pseudo-scores"]
    assert sum(bar.patches[-1].get_height() for bar in bars) == pytest.approx(1)
    assert bars[0].patches[3].get_height() == pytest.approx(answer.balance.mass[:, 0, 3, 1].mean())


def test_what_cannot_be_drawn_says_what_was_wanted():
    with pytest.raises(ModaValueError, match=r"heat has shape \(3, 4\); \(L, height, width\)"):
        image(HEAT[0])
    with pytest.raises(ModaValueError, match=r"heat has 5 layers; .* got \[7\]"):
        image(HEAT, shown=[7])
    with pytest.raises(ModaValueError, match=r"picture has shape \(2, 2, 2, 2\)"):
        image(HEAT, np.zeros((2, 2, 2, 2)))
    with pytest.raises(ModaValueError, match="1 words for 7 generated tokens"):
        generation(answer_of(7).balance, ["one"])


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_have_contrast_and_are_all_different(theme: Theme):
    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    # WCAG: 4.5 for text, 3 for lines.
    assert contrast(theme.ink, theme.paper) > 10
    assert contrast(theme.muted, theme.paper) >= 4.5
    for colour in (theme.own, theme.cross, theme.pseudo, theme.further):
        assert contrast(colour, theme.paper) >= 3
    colours = list(vars(theme).values())
    assert len(set(colours)) == len(colours)


def test_tables_hold_what_the_report_says():
    report = report_of()
    table = report.to_pandas()
    assert len(table) == 3 * len(report.layers)
    line = table[(table.rows_of == "vision") & (table.layer == 2)].iloc[0]
    row = report.of(1)
    assert (line.self, line.cross, line.pseudo) == (row.self_mass[2], row.cross_mass[2], row.pseudo_mass[2])
    assert line.self_low == row.mass_interval[0, 2, 0]
    assert line.on_vision == pytest.approx(row.self_mass[2])
    assert line.on_text == pytest.approx(row.cross_mass[2])
    changes = comparison_of().to_pandas()
    assert list(changes.measure[:5]) == list(MEASURES)
    assert changes.after[0] - changes.before[0] == pytest.approx(changes.change[0])


@pytest.mark.parametrize(
    ("library", "act"), [("matplotlib", "plot"), ("pandas", "to_pandas"), ("matplotlib", "to_html")]
)
def test_a_missing_library_says_what_to_install(library, act, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, library, None)
    arguments = (tmp_path / "report.html",) if act == "to_html" else ()
    with pytest.raises(ImportError, match=rf'needs {library}, .* pip install {library} or "moda-attn\[plot\]"'):
        getattr(report_of(), act)(*arguments)


def test_a_library_that_is_there_but_broken_keeps_its_own_error(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'kiwisolver'", name="kiwisolver")

    monkeypatch.setattr(optional.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="kiwisolver"):
        optional.need("matplotlib", "plot", "a picture")


def test_the_analysis_imports_neither_matplotlib_nor_pandas_nor_torch():
    program = (
        "import sys, moda_attn.analysis, moda_attn.analysis.plot, moda_attn.analysis.html\n"
        "print([name for name in ('matplotlib', 'pandas', 'torch', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_measured_of_a_model_draws_itself():
    from moda_attn.analysis import GenerationBalance, KeySpace, ReceivedAttention
    from moda_attn.analysis.grid import ImageTokens

    answer, keys = answer_of(4).balance, keys_of()
    tokens = np.arange(4)[None]
    assert GenerationBalance(answer.layers, tokens, answer.mass, False).plot(["a", "b", "c", "d"]).axes
    assert KeySpace(keys.layers, keys.before, keys.after).plot(style="dark").axes
    given = np.random.default_rng(0).dirichlet(np.ones(8), (5, 1))
    images = ((ImageTokens(np.arange(1, 7), (1, 2, 3)),),)
    received = ReceivedAttention((0, 1, 2, 3, 4), np.zeros((1, 8), dtype=int), {(0, False): given}, images, False)
    maps = received.plot(np.eye(6), modality=0).axes
    assert np.asarray(maps[2].images[1].get_array()).shape == (2, 3)
    assert f"{given[0, 0, 1:7].sum():.1%}" in maps[2].get_title(loc="left")
