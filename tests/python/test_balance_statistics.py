"""The statistics of a balance: their coverage, the fit, the comparison of two reports, and what has no value."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from moda_attn.analysis import balance_of_masses, compare
from moda_attn.analysis.intervals import of_masses, over_inputs, paired_change, unpaired_change
from moda_attn.analysis.measures import FACTORS, MEASURES, fit_decay, measures
from moda_attn.analysis.student import t_quantile
from moda_attn.analysis.tally import Tally
from moda_attn.errors import ModaValueError

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # NumPy's of what has no value

LAYERS = range(8)
GAMMA = 0.85
SHARES = [name for name in MEASURES if name not in FACTORS]


def true_means(gamma: float = GAMMA, pseudo: float = 0.05) -> np.ndarray:
    """(L, 3): self, cross, pseudo with cross mass 0.3 gamma^l."""
    cross = 0.3 * gamma ** np.array(LAYERS)
    return np.stack([1 - cross - pseudo, cross, np.full(len(LAYERS), pseudo)], axis=-1)


def sampled(rng: np.random.Generator, inputs: int, means: np.ndarray | None = None) -> Tally:
    """Text rows of inputs whose cross mass varies by a factor of mean 1, from input to input and layer to layer."""
    means = true_means() if means is None else means
    rows = rng.integers(3, 30, inputs)
    factor = rng.gamma(20, 1 / 20, (inputs, len(means))) * rng.gamma(10, 1 / 10, (inputs, 1))
    cross = means[:, 1] * factor
    masses = np.stack([1 - cross - means[:, 2], cross, np.broadcast_to(means[:, 2], cross.shape)], axis=-1)
    return Tally(0, rows, masses * rows[:, None, None], np.full((len(means), 1, 3), np.nan))


# Two-sided 95 %, from any printed table of the distribution.
@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (29, 2.045), (120, 1.980)]
)
def test_quantiles_of_student(freedom, value):
    assert t_quantile(freedom) == pytest.approx(value, abs=6e-4)


def test_quantiles_of_student_at_the_ends():
    assert t_quantile(5, 0.5) == pytest.approx(0.7267, abs=1e-4)
    assert t_quantile(10**9) == pytest.approx(1.959964, rel=2e-4)
    assert math.isnan(t_quantile(0))


@pytest.mark.parametrize("inputs", [4, 12, 60])
def test_intervals_over_inputs_cover_the_truth_as_often_as_they_say(inputs):
    truth, rng, trials = measures(true_means(), LAYERS), np.random.default_rng(7), 1500
    hits = dict.fromkeys(MEASURES, 0)
    for _ in range(trials):
        for name, (low, high) in over_inputs(sampled(rng, inputs), LAYERS).items():
            hits[name] += low <= truth[name] + 1e-12 and truth[name] - 1e-12 <= high
    # 95 % less what few and unequal inputs cost; the spread of the count itself is 0.6 %.
    for name in ("disparity", "relative_disparity", "decay", "error"):
        assert 0.895 <= hits[name] / trials <= 0.98, (name, hits[name] / trials)


@pytest.mark.parametrize("layers", [3, 6, 32])
def test_the_fit_recovers_a_known_decay_within_its_interval(layers):
    rng, trials, gamma = np.random.default_rng(3), 3000, 0.9
    hits = {"gamma": 0, "error": 0}
    for _ in range(trials):
        cross = 0.3 * gamma ** np.arange(layers) * np.exp(rng.normal(0, 0.05, layers))
        means = np.stack([np.full(layers, 0.6), cross, np.zeros(layers)], axis=-1)
        fit = fit_decay(means, range(layers))
        # The gaps are what they are; gamma alone is uncertain.
        error = gamma ** (layers * (layers + 1) / 2) * np.prod(np.abs(means[:, 0] - cross))
        hits["gamma"] += fit.low <= gamma <= fit.high
        hits["error"] += fit.error_low <= error <= fit.error_high
    for name, count in hits.items():
        assert 0.93 <= count / trials <= 0.97, (name, count / trials)


def test_without_noise_the_fit_is_exact():
    fit = fit_decay(true_means(), LAYERS)
    assert (fit.low, fit.gamma, fit.high) == pytest.approx((GAMMA,) * 3)
    assert fit.log_error < 1e-12
    value = float(measures(true_means(), LAYERS)["error"])
    assert (fit.error_low, fit.error_high) == pytest.approx((value, value))


def test_the_standard_error_is_that_of_least_squares():
    logs = np.array([-1.0, -1.3, -1.2, -1.9])
    means = np.stack([np.full(4, 0.5), np.exp(logs), np.zeros(4)], axis=-1)
    design = np.stack([np.ones(4), np.arange(4)], axis=1)
    solution, (squares,), *_ = np.linalg.lstsq(design, logs, rcond=None)
    error = np.sqrt(squares / 2 * np.linalg.inv(design.T @ design)[1, 1])
    fit = fit_decay(means, range(4))
    assert fit.gamma == pytest.approx(np.exp(solution[1]))
    assert fit.log_error == pytest.approx(error)
    assert fit.high == pytest.approx(np.exp(solution[1] + 4.302653 * error))


def test_e_dda_of_many_layers_has_its_logarithm_before_it_vanishes():
    layers = range(120)
    means = np.stack([np.full(120, 0.6), 0.3 * 0.8 ** np.arange(120.0), np.zeros(120)], axis=-1)
    assert measures(means, layers)["error"] == 0
    tally = Tally(0, np.array([1, 1]), np.stack([means, means]), np.zeros((120, 1, 3)))
    change = paired_change(tally, tally, (layers, layers))["error"]
    assert (change.value, change.low, change.high) == (1, 1, 1)


def test_intervals_of_masses_are_those_of_a_mean_when_inputs_weigh_the_same():
    rng = np.random.default_rng(0)
    sums = rng.dirichlet([5, 3, 2], (9, 4))
    low, high = of_masses(Tally(0, np.ones(9, dtype=int), sums, np.zeros((4, 1, 3))))
    reach = 2.306004 * sums.std(axis=0, ddof=1) / 3
    assert low == pytest.approx(sums.mean(axis=0) - reach)
    assert high == pytest.approx(sums.mean(axis=0) + reach)


def test_pairing_cancels_what_the_inputs_have_in_common():
    rng = np.random.default_rng(1)
    before = sampled(rng, 20)
    shift = np.array([-0.02, 0.0, 0.02])
    after = Tally(0, before.rows, before.sums + shift * before.rows[:, None, None], before.heads)
    both = (LAYERS, LAYERS)
    paired, unpaired = paired_change(before, after, both), unpaired_change(before, after, both)
    for name in ("disparity", "pseudo_share"):
        expected = -0.02 if name == "disparity" else 0.02
        assert paired[name].value == pytest.approx(expected) == unpaired[name].value
        assert paired[name].high - paired[name].low < 1e-12
    assert unpaired["disparity"].high - unpaired["disparity"].low > 0.01


@pytest.mark.parametrize("change", [paired_change, unpaired_change])
def test_changes_cover_the_truth(change):
    rng, trials, hits = np.random.default_rng(5), 1200, dict.fromkeys(MEASURES, 0)
    after_means = true_means(gamma=0.95, pseudo=0.1)
    first, second = measures(true_means(), LAYERS), measures(after_means, LAYERS)
    for _ in range(trials):
        before, after = sampled(rng, 15), sampled(rng, 15, after_means)
        if change is paired_change:
            after = Tally(
                0, before.rows, after.sums / after.rows[:, None, None] * before.rows[:, None, None], after.heads
            )
        for name, found in change(before, after, (LAYERS, LAYERS)).items():
            truth = second[name] / first[name] if name in FACTORS else second[name] - first[name]
            hits[name] += found.low - 1e-12 <= truth <= found.high + 1e-12
    for name in ("disparity", "relative_disparity", "decay", "error"):
        assert 0.90 <= hits[name] / trials <= 0.985, (name, hits[name] / trials)


def masses_of(rng: np.random.Generator, inputs: int = 6, layers: int = 3) -> tuple[list[np.ndarray], np.ndarray]:
    modality = np.tile([0, 1, 1, 0, 0], (inputs, 1))
    return [rng.dirichlet([4, 3, 1], (inputs, 2, 5)) for _ in range(layers)], modality


def test_a_report_counts_its_inputs_and_carries_their_intervals():
    masses, modality = masses_of(np.random.default_rng(2))
    modality[4:, 1:3] = -1
    report = balance_of_masses(masses, modality)
    assert [(row.rows, row.inputs) for row in report.modalities] == [(18, 6), (8, 4)]
    for row in report.modalities:
        assert all(low <= getattr(row, name) <= high for name, (low, high) in row.intervals.items())
        assert row.mass_interval.shape == (2, 3, 3)
        assert (row.mass_interval[0, :, 0] <= row.self_mass).all()
    assert "6 inputs" in str(report)
    assert "over inputs" in str(report)


def test_one_input_has_the_intervals_of_the_fit_alone():
    masses, modality = masses_of(np.random.default_rng(2), inputs=1)
    report = balance_of_masses(masses, modality)
    for row in report.modalities:
        assert row.inputs == 1
        assert all(math.isnan(end) for interval in row.intervals.values() for end in interval)
        assert row.decay_fit.low < row.decay < row.decay_fit.high
        assert row.decay_fit.error_low < row.error < row.decay_fit.error_high
    written = json.loads(report.to_json())["modalities"][0]
    assert written["intervals"]["disparity"] == [None, None]
    assert written["decay_fit"]["low"] == report.of(0).decay_fit.low
    assert "inputs" not in str(report)


@pytest.mark.parametrize(
    "means",
    [
        [[1.0, 0.0, 0.0]] * 3,  # no cross mass: no logarithm
        [[0.5, 0.5, 0.0]] * 3,  # no gap: a product of 0
        [[0.0, 0.0, 1.0]] * 3,  # nothing visible
        [[0.7, 0.3, 0.0]],  # one layer: no slope
        [[0.7, 0.3, 0.0], [0.8, 0.2, 0.0]],  # two layers: no residual
    ],
)
@pytest.mark.parametrize("inputs", [1, 2, 5])
def test_what_has_no_value_is_nan_without_a_warning(means, inputs):
    masses = [np.broadcast_to(mass, (inputs, 2, 3, 3)) for mass in means]
    report = balance_of_masses(masses, np.zeros((inputs, 3), dtype=int))
    same = compare(report, report)
    for text in (str(report), str(same), str(compare(report, report, paired=False))):
        assert "nan [" not in text
    for name in SHARES:
        assert getattr(report.of(0), name) == pytest.approx(float(measures(np.array(means), range(len(means)))[name]))
        assert same.rows[0].changes[name].value == 0
    json.loads(report.to_json())
    json.loads(same.to_json())


def test_the_comparison_has_the_shape_of_the_papers_table(tmp_path):
    """56.97 % to 50.31 % for text and 62.44 % to 41.01 % for vision, as constant masses."""
    modality = np.tile([0, 1], (4, 1))

    def report_with(text: float, vision: float):
        mass = np.zeros((4, 2, 2, 3))
        mass[:, :, 0] = [(1 + text) / 2, (1 - text) / 2, 0]
        mass[:, :, 1] = [(1 - vision) / 2, (1 + vision) / 2, 0]
        return balance_of_masses([mass] * 4, modality)

    result = compare(report_with(0.5697, 0.6244), report_with(0.5031, 0.4101), names=("LLaVA", "MODA"))
    lines = str(result).splitlines()
    assert lines[0].startswith("Attention balance, LLaVA → MODA; 4 inputs, paired")
    assert [line.split() for line in lines if "disparity" in line and "relative" not in line] == [
        ["text", "disparity", "56.97", "%", "→", "50.31", "%", "-6.66", "points", "[-6.66,", "-6.66]"],
        ["vision", "disparity", "62.44", "%", "→", "41.01", "%", "-21.43", "points", "[-21.43,", "-21.43]"],
    ]
    # All three measures and both factors for both.
    for title in ("relative disparity", "pseudo share", "decay γ", "E_DDA"):
        assert sum(title in line for line in lines) == 2
    result.to_json(tmp_path / "made" / "changes.json")
    written = json.loads((tmp_path / "made" / "changes.json").read_text())
    change = written["changes"][0]["disparity"]
    assert (change["before"], change["after"], change["difference"]) == pytest.approx((0.5697, 0.5031, -0.0666))
    assert "ratio" in written["changes"][1]["decay"]


def test_reports_that_cannot_be_paired_say_so():
    rng = np.random.default_rng(4)
    one, other = (balance_of_masses(*masses_of(rng, inputs)) for inputs in (3, 5))
    with pytest.raises(ModaValueError, match=r"text query rows differ: 9 of 3 inputs and 15 of 5; .* paired=False"):
        compare(one, other)
    assert compare(one, other, paired=False).paired is False
    masses, modality = masses_of(rng)
    vision_only = balance_of_masses(masses, np.where(modality == 1, 1, -1))
    text_only = balance_of_masses(masses, np.where(modality == 0, 0, -1))
    with pytest.raises(ModaValueError, match="no kind of query rows in common"):
        compare(vision_only, text_only)
