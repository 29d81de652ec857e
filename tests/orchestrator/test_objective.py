import pytest

from orchestrator.objective import ClipAestheticObjective, MetricObjective, Objective, WeightedObjective
from trainers.rundir import Score


def score(mean: float, *, higher_is_better: bool = True) -> Score:
    return Score(mean=mean, standard_error=0.0, num_samples=1, model="m", higher_is_better=higher_is_better)


def test_a_single_score_is_its_mean():
    assert MetricObjective(name="a").value({"a": score(0.3), "b": score(9)}) == 0.3


def test_a_score_that_should_be_low_counts_negatively():
    scores = {"a": score(0.3), "distance": score(2.0, higher_is_better=False)}
    assert MetricObjective(name="distance").value(scores) == -2.0
    assert WeightedObjective(weights={"a": 10, "distance": 0.5}).value(scores) == pytest.approx(2.0)


def test_the_preset_is_the_published_one():
    assert ClipAestheticObjective().value({"clip_t": score(0.3), "aesthetic": score(5.5)}) == pytest.approx(
        0.6 * 0.3 + 0.4 * 5.5 / 10
    )


@pytest.mark.parametrize("kind", Objective.kinds())
def test_every_kind_names_the_scores_it_needs(kind: str):
    trees = {"metric": {"name": "a"}, "weighted": {"weights": {"a": 1}}, "clip_aesthetic": {}}
    objective = Objective.model_validate({"kind": kind, **trees[kind]})
    with pytest.raises(KeyError):
        objective.value({})
