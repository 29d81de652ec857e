# pyright: basic
import itertools
import math
from collections.abc import Mapping
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from pydantic import ValidationError

from orchestrator.drawing import DrawingSampler
from orchestrator.search import (
    CategoricalParameter,
    FloatParameter,
    GridSampler,
    GuidanceScaleParameter,
    IntParameter,
    Parameter,
    QmcSampler,
    RandomSampler,
    Sampler,
    TpeSampler,
    Value,
)

PARAMETERS = [
    FloatParameter(low=1e-4, high=1e-2, log=True),
    FloatParameter(low=-1, high=3),
    GuidanceScaleParameter(),
    FloatParameter(low=0.1, high=0.7, step=0.2),
    FloatParameter(low=0, high=2 / 3, step=1 / 3),
    FloatParameter(low=1 / 3, high=2 / 3, step=1 / 3),
    IntParameter(low=1, high=128, log=True),
    IntParameter(low=100, high=500, step=100),
    CategoricalParameter(choices=(2, "two", None, False)),
]
SPACE: Mapping[str, Parameter] = {
    "lr": FloatParameter(low=1e-4, high=1e-2, log=True),
    "rank": CategoricalParameter(choices=(4, 8, 16)),
    "steps": IntParameter(low=100, high=400, step=100),
}
GRID: Mapping[str, Parameter] = {"rank": SPACE["rank"], "steps": SPACE["steps"]}
DEFAULTS: Mapping[str, Value] = {"lr": 1e-3, "rank": 8, "steps": 300}


def study_of(sampler: Sampler, space: Mapping[str, Parameter] = SPACE) -> optuna.Study:
    defaults = {name: DEFAULTS[name] for name in space}
    return optuna.create_study(direction="maximize", sampler=DrawingSampler(sampler, space, [defaults]))


def ask(study: optuna.Study, space: Mapping[str, Parameter] = SPACE) -> tuple[optuna.Trial, dict[str, Value]]:
    trial = study.ask()
    return trial, {name: parameter.suggest(trial, name) for name, parameter in space.items()}


def run(study: optuna.Study, count: int, space: Mapping[str, Parameter] = SPACE) -> list[dict[str, Value]]:
    """Ask and score `count` trials; the best learning rate is 2e-3."""
    asked: list[dict[str, Value]] = []
    for _ in range(count):
        trial, params = ask(study, space)
        lr = params.get("lr", 1.0)
        study.tell(trial, -abs(math.log(float(lr or 0) / 2e-3)))
        asked.append(params)
    return asked


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize("parameter", PARAMETERS, ids=lambda p: f"{p.kind}-{p.grid() is None}")
@given(fraction=st.floats(0, 1, exclude_max=True))
@settings(max_examples=50, deadline=None)
def test_every_fraction_is_a_value_that_the_search_can_reach(parameter: Parameter, fraction: float):
    value = parameter.at(fraction)
    assert parameter.contains(value)
    distribution = parameter.distribution()
    assert distribution._contains(distribution.to_internal_repr(value))


@pytest.mark.parametrize("parameter", PARAMETERS, ids=lambda p: f"{p.kind}-{p.grid() is None}")
def test_corners_and_grids_can_be_reached(parameter: Parameter):
    for value in (*parameter.corners(), *(parameter.grid() or ())):
        assert parameter.contains(value)
    assert parameter.at(0.0) == pytest.approx(parameter.corners()[0])


def test_grids_hold_the_numbers_that_people_write():
    assert list(FloatParameter(low=0.1, high=0.7, step=0.2).grid() or ()) == [0.1, 0.3, 0.5, 0.7]
    assert list(IntParameter(low=100, high=300, step=100).grid()) == [100, 200, 300]


def test_equal_parts_of_the_unit_interval_get_equally_many_whole_numbers():
    parameter = IntParameter(low=3, high=7)
    assert [parameter.at((index + 0.5) / 5) for index in range(5)] == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("value", [True, "8", None, 7, 99, 550, 150])
def test_a_value_off_the_grid_is_not_contained(value: Any):
    assert not IntParameter(low=100, high=500, step=100).contains(value)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("float", {"low": 2, "high": 1}), ("float", {"low": 1, "high": 1}),
        ("float", {"low": 0, "high": 1, "log": True}),
        ("float", {"low": 1, "high": 2, "log": True, "step": 0.1}), ("float", {"low": 0, "high": 1, "step": 0.3}),
        ("float", {"low": 0, "high": math.inf}), ("float", {"low": math.nan, "high": 1}),
        ("int", {"low": 2, "high": 1}), ("int", {"low": 0, "high": 8, "log": True}),
        ("int", {"low": 1, "high": 8, "log": True, "step": 2}), ("int", {"low": 0, "high": 5, "step": 2}),
        ("categorical", {"choices": []}), ("categorical", {"choices": [1, 1.0]}),
        ("categorical", {"choices": [True, 1]}),
    ],
)  # fmt: skip
def test_a_range_that_is_none_is_refused(kind: str, values: dict[str, Any]):
    with pytest.raises(ValidationError):
        Parameter.model_validate({"kind": kind, **values})


SAMPLERS = [TpeSampler(startup_trials=4), RandomSampler(), QmcSampler()]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.kind)
def test_a_restart_before_every_value_changes_nothing(sampler: Sampler):
    whole = run(study_of(sampler), 10)
    study = study_of(sampler)
    for number in range(10):
        trial = study.ask()
        for name in SPACE:
            study.sampler = study_of(sampler).sampler
            again = optuna.Trial(study, trial._trial_id)
            assert SPACE[name].suggest(again, name) == whole[number][name]
        study.tell(trial, -abs(math.log(float(whole[number]["lr"] or 0) / 2e-3)))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.kind)
def test_the_first_trial_is_the_defaults_and_none_is_repeated(sampler: Sampler):
    asked = run(study_of(sampler), 12)
    assert asked[0] == DEFAULTS
    assert len({params["lr"] for params in asked}) == 12


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.kind)
def test_another_seed_is_another_search(sampler: Sampler):
    other = sampler.model_copy(update={"seed": 1})
    assert run(study_of(sampler), 3)[1:] != run(study_of(other), 3)[1:]


def test_tpe_comes_closer_to_the_optimum_than_chance():
    def late_distance(sampler: Sampler) -> float:
        asked = run(study_of(sampler), 40)[20:]
        return sum(abs(math.log(float(params["lr"] or 0) / 2e-3)) for params in asked)

    wins = sum(late_distance(TpeSampler(seed=s)) < late_distance(RandomSampler(seed=s)) for s in range(3))
    assert wins == 3


def test_tpe_keeps_running_trials_apart():
    study = study_of(TpeSampler(startup_trials=4))
    run(study, 12)
    together = [ask(study)[1]["lr"] for _ in range(4)]
    assert len(set(together)) == 4


def test_tpe_learns_from_trials_that_broke_a_constraint():
    study = study_of(TpeSampler(startup_trials=4))
    for _ in range(40):
        trial, params = ask(study)
        if float(params["lr"] or 0) > 1e-3:
            trial.set_constraint("nan", 1.0)
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, float(params["lr"] or 0))
    late = study.trials[20:]
    assert sum(trial.state is TrialState.PRUNED for trial in late) < len(late) / 2


def test_qmc_fills_every_part_of_the_space_alike():
    space = {"lr": SPACE["lr"]}
    asked = run(study_of(QmcSampler(), space), 17, space)[1:]  # the first is the defaults
    places = sorted(int(16 * math.log(float(p["lr"] or 0) / 1e-4) / math.log(100)) for p in asked)
    assert places == list(range(16))


def test_a_grid_asks_for_every_point_once_and_for_failed_ones_last():
    study = study_of(GridSampler(), GRID)
    points = set(itertools.product([4, 8, 16], [100, 200, 300, 400]))
    assert GridSampler().size(GRID) == len(points)
    asked = [tuple(params.values()) for params in run(study, 5, GRID)]
    trial, failed = ask(study, GRID)
    study.tell(trial, state=TrialState.FAIL)
    asked += [tuple(params.values()) for params in run(study, 7, GRID)]
    assert asked[0] == (8, 300)
    assert set(asked) == points
    assert asked[-1] == tuple(failed.values())


def test_a_grid_needs_an_end():
    with pytest.raises(ValueError, match="got lr without `step`"):
        GridSampler().size(SPACE)
    with pytest.raises(ValueError, match="at most 100000"):
        GridSampler().size({"a": IntParameter(low=1, high=1000), "b": IntParameter(low=1, high=1000)})
