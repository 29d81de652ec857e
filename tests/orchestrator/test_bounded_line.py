"""Golden section under bounds: closed forms, and through the controller, killed at random."""

# pyright: basic

import random
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from orchestrator.golden_section import GoldenSectionSampler
from orchestrator.line import Line, Point, point_of, sentences
from orchestrator.tables import best_trial
from orchestrator.views import trial_views
from tests.orchestrator.cluster import Cluster, drive
from tests.orchestrator.lines import SCALE, ask, golden_spec, scanned, study_of
from tests.orchestrator.studies import score
from trainers.rundir import RunDir, thaw


@given(peak=st.floats(-10, 10), one=st.floats(-10, 10), other=st.floats(-10, 10), steepness=st.floats(0.01, 100))
@settings(max_examples=200, deadline=None)
def test_under_a_bound_the_best_allowed_place_is_found(peak: float, one: float, other: float, steepness: float):
    low, high = sorted((one, other))

    def at(x: float) -> Point:
        return Point(x, -abs(x - peak), violation=steepness * max(0.0, low - x, x - high))

    points = [at(3.0)]
    while missing := (line := Line(-10, 10, 6, 30, 0.5, tuple(points))).missing():
        points.append(at(missing[0]))
    assert abs(line.best().x - min(max(peak, low), high)) <= 0.5 + 1e-9
    assert line.best().violation == min(point.violation for point in points)


def test_where_a_bound_cuts_off_the_peak_the_noise_ends_no_search():
    free = scanned(lambda x: -0.005 * (x - 6) ** 2, spread=0.05)
    cut = replace(free, points=tuple(replace(one, violation=max(0.0, one.x - 3.3)) for one in free.points))
    assert free.resolution() > 0.5
    assert cut.resolution() == 0
    assert cut.valley() is None
    assert "a bound is broken at 6: the best point is at the edge of what is allowed" in list(sentences(cut))[1]


def test_a_pruned_trial_is_worse_than_one_that_breaks_a_bound():
    study = study_of(GoldenSectionSampler())
    pruned, broken = ask(study)[0], ask(study)[0]
    pruned.set_constraint("oom", 1.0)
    study.tell(pruned, state=TrialState.PRUNED)
    for name, amount in {"clip_t.at_least": 3.0, "aesthetic.at_least": -5.0}.items():
        broken.set_constraint(name, amount)
    study.tell(broken, -100.0)
    worst, better = (point_of(trial, "x") for trial in study.get_trials())
    assert worst
    assert better
    assert better.violation == 3.0
    assert worst.rank < better.rank < Point(0, -1000).rank


def test_fidelity_is_maximised_as_far_as_text_allows(cluster: Cluster, tmp_path: Path):
    """Larger scales show the subject better and the text worse; the last place that keeps the bound is 2.75."""

    def behave(run: RunDir) -> None:
        scale = thaw(run.trial)["evaluate"]["guidance"]["scale"]
        score(run, clip_i=0.5 + 0.01 * scale, clip_t=0.3 - 0.02 * scale)

    cluster.behaviour = behave
    cluster.rng, cluster.crash = random.Random(0), 0.1
    objective = "objective={kind: constrained, maximise: {clip_i: 1}, subject_to: {clip_t: {at_least: 0.245}}}"
    spec = golden_spec(tmp_path, objective)
    study, _ = drive(spec)
    winner, _ = best_trial(spec, trial_views(spec, study))
    assert 0 <= 2.75 - winner.params[SCALE] < 0.2
    assert len(study.trials) <= 14
