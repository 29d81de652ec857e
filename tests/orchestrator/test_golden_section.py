"""Golden section against scipy, closed forms and random curves; and through the controller, killed at random."""

# pyright: basic

import math
import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from scipy import optimize

from evaluation.records import Record, write_records
from orchestrator.golden_section import GoldenSectionSampler
from orchestrator.line import Line, Point, paired_error
from orchestrator.search import CategoricalParameter, FloatParameter, GuidanceScaleParameter
from tests.orchestrator.cluster import Cluster, drive
from tests.orchestrator.lines import SCALE, SPACE, Curve, ask, golden_spec, scanned, study_of
from tests.orchestrator.studies import score
from trainers.errors import ConfigError
from trainers.rundir import RunDir, thaw


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def line_of(points: dict[float, float], tolerance: float | None = None, max_points: int = 14, scan: int = 6) -> Line:
    return Line(-10, 10, scan, max_points, tolerance, tuple(Point(x, y) for x, y in points.items()))


def search(curve: Curve, tolerance: float | None = None, max_points: int = 14, default: float = 3.0) -> Line:
    """Evaluate until nothing is missing, one point at a time."""
    points = {default: curve(default)}
    while missing := (line := line_of(points, tolerance, max_points)).missing():
        points[missing[0]] = curve(missing[0])
    return line


@given(peak=st.floats(-10, 10), steepness=st.floats(0.01, 100), default=st.floats(-10, 10))
@settings(max_examples=300, deadline=None)
def test_the_optimum_of_a_unimodal_curve_is_as_close_as_the_tolerance_says(
    peak: float, steepness: float, default: float
):
    line = search(lambda x: -steepness * abs(x - peak) ** 1.5, tolerance=0.5, max_points=30, default=default)
    assert abs(line.best().x - peak) <= 0.5 + 1e-9


@given(peak=st.floats(-10, 10), left=st.floats(0.1, 10), right=st.floats(0.1, 10))
@settings(max_examples=200, deadline=None)
def test_fourteen_evaluations_come_within_half_a_unit_of_a_lopsided_peak(peak: float, left: float, right: float):
    line = search(lambda x: -left * (peak - x) if x < peak else -right * (x - peak))
    assert len(line.points) <= 14
    assert abs(line.best().x - peak) < 0.5


@pytest.mark.parametrize("peak", [-9.3, -2.0, 0.1, 4.4721, 7.5])
def test_it_finds_what_scipy_finds(peak: float):
    def curve(x: float) -> float:
        return math.exp(-((x - peak) ** 2) / 8) - 0.01 * abs(x - peak)

    bounded = optimize.minimize_scalar(lambda x: -curve(x), bounds=(-10, 10), method="bounded").x  # pyright: ignore[reportAttributeAccessIssue]
    golden = optimize.minimize_scalar(lambda x: -curve(x), bracket=(peak - 1, peak + 0.3, peak + 2), method="golden").x  # pyright: ignore[reportAttributeAccessIssue]
    found = search(curve, tolerance=1e-4, max_points=60).best().x
    assert found == pytest.approx(golden, abs=3e-4)
    assert found == pytest.approx(bounded, abs=3e-4)


def test_a_bracket_shrinks_by_the_golden_ratio_at_every_step():
    points = {x: -((x - 1.0) ** 2) for x in (-10.0, -6.0, -2.0, 2.0, 6.0, 10.0)}
    widths: list[float] = []
    for _ in range(30):
        line = line_of(points, tolerance=1e-9, max_points=99)
        left, _, right = line.bracket()
        widths.append(right - left)
        x = line.missing()[0]
        points[x] = -((x - 1.0) ** 2)
    golden = (math.sqrt(5) - 1) / 2
    assert (widths[-1] / widths[4]) ** (1 / 25) == pytest.approx(golden, abs=0.01)


@pytest.mark.parametrize("end", [-10.0, 10.0])
def test_an_optimum_at_an_end_is_found_and_reported(end: float):
    line = search(lambda x: -abs(x - end), tolerance=0.2, max_points=30)
    assert line.best().x == end


@given(values=st.lists(st.sampled_from([0.0, 1.0, 2.0, -math.inf]), min_size=40, max_size=40))
@settings(max_examples=200, deadline=None)
def test_plateaus_and_places_without_a_value_neither_repeat_a_point_nor_leave_the_interval(values: list[float]):
    steps = iter(values)
    line = search(lambda _: next(steps))
    places = [point.x for point in line.points]
    assert len(set(places)) == len(places) <= 14
    assert all(-10 <= x <= 10 for x in places)
    assert line.best().value == max(point.value for point in line.points)


def test_noise_moves_the_answer_no_further_than_the_measured_resolution():
    """The rule of thumb in `Line.resolution` against 300 noisy searches of a parabola."""
    rng = random.Random(0)
    curvature, noise, distances = 0.02, 0.003, list[float]()
    for _ in range(300):
        peak = rng.uniform(-3, 7)
        found = search(lambda x, peak=peak: -curvature / 2 * (x - peak) ** 2 + rng.gauss(0, noise / math.sqrt(2)))
        distances.append(abs(found.best().x - peak))
    resolution = math.sqrt(2 * noise / curvature)
    assert sorted(distances)[150] < resolution
    assert sorted(distances)[285] < 2 * resolution


def test_the_error_of_a_difference_is_that_of_paired_prompts():
    one, other = Point(0, 0, (0.0, 10.0, 20.0)), Point(1, 0, (1.0, 12.0, 20.0))
    assert paired_error(one, other) == pytest.approx(1 / math.sqrt(3))
    assert paired_error(one, Point(1, 0)) is None
    assert paired_error(one, Point(1, 0, (1.0, math.nan, math.nan))) is None


def test_the_resolution_is_where_the_curve_falls_by_a_standard_error():
    line = scanned(lambda x: -0.005 * (x - 2) ** 2, spread=0.02)
    points = {point.x: point for point in line.points}
    error = max(paired_error(points[-2.0], points[2.0]) or 0, paired_error(points[2.0], points[6.0]) or 0)
    assert line.resolution() == pytest.approx(math.sqrt(error / 0.005), rel=1e-6)


def test_more_noise_is_a_coarser_resolution_and_ends_the_search_sooner():
    curve = lambda x: -0.005 * (x - 2.3) ** 2  # noqa: E731
    fine, coarse = scanned(curve, 0.001), scanned(curve, 0.05)
    assert fine.resolution() < coarse.resolution() <= 2.0
    assert coarse.stopping_width() == coarse.resolution()


@pytest.mark.parametrize(
    ("curve", "is_unimodal"),
    [
        (lambda x: -abs(x - 3), True), (lambda x: math.cos(x / 2), False), (lambda x: 0.0, True),
        (lambda x: -abs(abs(x) - 6), False), (lambda x: x, True),
    ],
)  # fmt: skip
def test_more_than_one_peak_is_seen(curve: Curve, is_unimodal: bool):
    line = scanned(curve, spread=0.0)
    assert (line.valley() is None) is is_unimodal


def test_a_valley_within_the_noise_is_none():
    def curve(x: float) -> float:
        return -abs(x - 2) + (5 if x == 10 else 0)

    assert scanned(curve, spread=0.01).valley()
    assert scanned(curve, spread=20.0).valley() is None


def test_the_same_point_is_asked_again_after_a_kill_and_after_a_failure():
    study = study_of(GoldenSectionSampler())
    for number in range(9):
        trial, x = ask(study)
        again = optuna.Trial(study, trial._trial_id)
        assert SPACE["x"].suggest(again, "x") == x
        if number:
            study.tell(trial, state=TrialState.FAIL)
            trial, retried = ask(study)
            assert retried == x
        study.tell(trial, -abs(x - 1.7))


def test_a_pruned_trial_is_a_bad_point():
    study = study_of(GoldenSectionSampler(tolerance=0.1))
    while GoldenSectionSampler(tolerance=0.1).room(SPACE, study):
        trial, x = ask(study)
        if x > 4:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, x)
    assert 3.5 < study.best_params["x"] <= 4
    assert len(study.trials) <= 14


def test_the_scan_runs_in_parallel_and_golden_section_does_not():
    sampler = GoldenSectionSampler()
    study = study_of(sampler)
    first, x = ask(study)
    assert sampler.room(SPACE, study) >= 5
    study.tell(first, -abs(x - 1))
    together = [ask(study) for _ in range(6)]
    assert sorted(x for _, x in together) == [-10, -6, -2, 2, 6, 10]
    assert sampler.room(SPACE, study) == 0
    for trial, x in together:
        study.tell(trial, -abs(x - 1))
    assert sampler.room(SPACE, study) == 1
    ask(study)
    assert sampler.room(SPACE, study) == 0


@pytest.mark.parametrize(
    "space",
    [
        {}, {"x": SPACE["x"], "y": SPACE["x"]}, {"x": CategoricalParameter(choices=(1, 2))},
        {"x": FloatParameter(low=1, high=2, log=True)}, {"x": FloatParameter(low=1, high=2, step=0.5)},
    ],
)  # fmt: skip
def test_it_searches_one_continuous_number_only(space: dict[str, Any]):
    with pytest.raises(ValueError, match="exactly one float"):
        GoldenSectionSampler().size(space)


def test_a_guidance_scale_is_searched_from_minus_ten_to_ten_where_no_interval_is_told():
    space = {SCALE: GuidanceScaleParameter()}
    asked = [place[SCALE] for place in GoldenSectionSampler().missing(space, [])]
    assert asked == [-10, -6, -2, 2, 6, 10]


def judged(run: RunDir, peak: float, spread: float) -> None:
    """A parabola, with prompts that differ by `spread` in what they gain."""
    scale = thaw(run.trial)["evaluate"]["guidance"]["scale"]
    value = -0.01 * (scale - peak) ** 2
    gain = spread * math.sin(100 * scale)
    records = [
        Record(prompt=prompt, seed=0, file="x.png", values={"clip_t": value + sign * gain, "clip_i": 0.5})
        for prompt, sign in (("a zog", 1), ("two zogs", -1))
    ]
    write_records(run.records, records)
    score(run, clip_t=value)


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_study_asks_for_what_an_unhurt_one_asks_for(cluster: Cluster, tmp_path: Path, seed: int):
    cluster.behaviour = lambda run: judged(run, peak=3.7, spread=0.001)
    calm, _ = drive(golden_spec(tmp_path / "calm"))
    cluster.rng, cluster.crash = random.Random(seed), 0.2
    wild, crashes = drive(golden_spec(tmp_path / "wild"))
    assert crashes > 3
    assert [trial.params for trial in wild.trials] == [trial.params for trial in calm.trials]
    assert all(trial.state is TrialState.COMPLETE for trial in wild.trials)
    assert len(wild.trials) < 14
    assert wild.best_params[SCALE] == pytest.approx(3.7, abs=0.5)


def test_what_the_search_found_out_is_written_for_people(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = lambda run: judged(run, peak=3.7, spread=0.001)
    spec = golden_spec(tmp_path)
    study, _ = drive(spec)
    notes = "\n".join(study.user_attrs["sampler_notes"])
    assert "the measured noise lets places closer than" in notes
    assert "the search is over" in notes
    assert (spec.root / "search.txt").read_text().strip() == notes


def test_a_tolerance_below_the_noise_is_refused_as_soon_as_the_noise_is_known(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = lambda run: judged(run, peak=3.7, spread=0.05)
    spec = golden_spec(tmp_path, "sampler.tolerance=0.01")
    with pytest.raises(ConfigError, match=r"sampler\.tolerance: got 0\.01; expected at least"):
        drive(spec)
    assert len(cluster.jobs) == 7
