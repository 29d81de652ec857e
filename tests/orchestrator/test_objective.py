# pyright: basic
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna import create_study
from optuna.study import StudyDirection
from optuna.trial import create_trial

from orchestrator.front import front
from orchestrator.objective import (
    Bound,
    ClipAestheticObjective,
    ConstrainedObjective,
    MetricObjective,
    Objective,
    ParetoObjective,
    WeightedObjective,
)
from orchestrator.tracker import TrialView
from trainers.rundir import RunDir, Score


def score(mean: float, *, higher_is_better: bool = True) -> Score:
    return Score(mean=mean, standard_error=0.0, num_samples=1, model="m", higher_is_better=higher_is_better)


def test_a_single_score_is_its_mean():
    assert MetricObjective(name="a").values({"a": score(0.3), "b": score(9)}) == (0.3,)


def test_a_score_that_should_be_low_counts_negatively():
    scores = {"a": score(0.3), "distance": score(2.0, higher_is_better=False)}
    assert MetricObjective(name="distance").values(scores) == (-2.0,)
    assert WeightedObjective(weights={"a": 10, "distance": 0.5}).values(scores) == pytest.approx((2.0,))


def test_the_preset_is_the_published_one():
    scores = {"clip_t": score(0.3), "aesthetic": score(5.5)}
    assert ClipAestheticObjective().values(scores) == pytest.approx((0.6 * 0.3 + 0.4 * 5.5 / 10,))


def test_several_values_stand_in_the_order_of_their_names():
    objective = ParetoObjective(objectives={"fidelity": {"a": 1}, "text": {"b": 2, "distance": 1}})
    scores = {"a": score(0.3), "b": score(0.25), "distance": score(0.1, higher_is_better=False)}
    assert dict(zip(objective.names, objective.values(scores), strict=True)) == {"fidelity": 0.3, "text": 0.4}
    assert objective.scores_needed() == ("a", "b", "distance")


def test_bounds_say_how_far_they_are_broken():
    bound = Bound(at_least=0.25, at_most=0.5, below_base=0.125)
    assert bound.violations(score(0.125), score(0.5)) == {"at_least": 0.125, "at_most": -0.375, "below_base": 0.25}
    low = Bound(below_base=1).violations(score(7.0, higher_is_better=False), score(5.0, higher_is_better=False))
    assert low == {"below_base": 1.0}


def test_a_bounded_score_is_needed_and_its_bounds_are_named():
    objective = ConstrainedObjective(maximise={"a": 1.0}, subject_to={"b": Bound(at_most=1.0)})
    assert objective.scores_needed() == ("a", "b")
    assert objective.violations({"a": score(0), "b": score(3.0)}, {}) == {"b.at_most": 2.0}
    assert not objective.needs_base
    assert ParetoObjective(objectives={"x": {"a": 1}, "y": {"b": 1}}, subject_to={"a": Bound(below_base=0)}).needs_base


@pytest.mark.parametrize("kind", Objective.kinds())
def test_every_kind_needs_no_score_but_those_it_names(kind: str):
    trees = {
        "metric": {"name": "a"},
        "weighted": {"weights": {"a": 1}},
        "clip_aesthetic": {},
        "constrained": {"maximise": {"a": 1}, "subject_to": {"b": {"at_least": 0}}},
        "pareto": {"objectives": {"x": {"a": 1}, "y": {"b": 1}}},
    }
    objective = Objective.model_validate({"kind": kind, **trees[kind]})
    scores = dict.fromkeys(objective.scores_needed(), score(1.0))
    assert len(objective.values(scores)) == len(objective.names)
    objective.violations(scores, {})


def view(number: int, values: list[float]) -> TrialView:
    return TrialView(number, "COMPLETE", {}, values, None, RunDir(Path("gone")), None, None)


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=30))
def test_the_front_is_optunas(points: list[tuple[int, int, int]]):
    study = create_study(directions=[StudyDirection.MAXIMIZE] * 3)
    study.add_trials([create_trial(values=[float(v) for v in point]) for point in points])
    ours = front([view(number, [float(v) for v in point]) for number, point in enumerate(points)])
    assert {trial.number for trial in ours} == {trial.number for trial in study.best_trials}


def test_the_front_of_one_value_begins_with_the_first_of_the_best():
    rng = random.Random(0)
    values = [rng.choice([0.25, 0.5, 0.75]) for _ in range(20)]
    assert front([view(n, [value]) for n, value in enumerate(values)])[0].number == values.index(0.75)
