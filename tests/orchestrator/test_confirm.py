# pyright: basic
from pathlib import Path

import pytest

from evaluation.records import Record
from orchestrator.confirm import _values, fresh_seeds
from orchestrator.objective import WeightedObjective
from orchestrator.spec import load_study
from trainers.rundir import Score

STUDY = Path(__file__).parents[2] / "studies" / "hpo.yaml"


def test_fresh_seeds_are_none_that_a_study_would_list() -> None:
    spec, _ = load_study(STUDY)
    assert not set(fresh_seeds(8)) & set(spec.trial.evaluate.seeds)
    assert len(set(fresh_seeds(8))) == 8


def test_the_mean_of_the_pictures_values_is_the_objectives_value() -> None:
    objective = WeightedObjective(weights={"a": 2.0, "b": 0.5})
    pictures = [{"a": 0.1, "b": 3.0}, {"a": 0.5, "b": 1.0}]
    up = {"a": True, "b": False}
    means = {
        name: Score(
            mean=sum(values[name] for values in pictures) / 2,
            standard_error=0.1,
            num_samples=2,
            model="m",
            higher_is_better=up[name],
        )
        for name in up
    }
    values = [objective.sample_values(picture, up)[0] for picture in pictures]
    assert sum(values) / 2 == pytest.approx(objective.values(means)[0])


def test_pictures_are_paired_by_prompt_and_seed() -> None:
    spec, _ = load_study(STUDY)
    values = dict.fromkeys(spec.trial.evaluate.metrics, 1.0)
    records = [Record(prompt="p", seed=seed, file="f", values=values) for seed in (3, 4)]
    assert set(_values(records, spec)) == {("p", 3), ("p", 4)}
