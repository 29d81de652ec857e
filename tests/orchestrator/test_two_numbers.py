"""Golden section of one number together with a grid of another: the best pair, found again after every interruption."""

# pyright: basic

import random
from collections.abc import Callable
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from orchestrator.drawing import DrawingSampler
from orchestrator.golden_section import CoordinateSampler, LineSampler, NestedSampler
from orchestrator.search import CategoricalParameter, FloatParameter, IntParameter

GRID = FloatParameter(low=0, high=1, step=0.25)
SPACE = {"omega": GRID, "scale": FloatParameter(low=-2, high=10)}
DEFAULTS = {"omega": 0.0, "scale": 5.0}
Surface = Callable[[float, float], float]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def study_of(sampler: LineSampler) -> optuna.Study:
    return optuna.create_study(direction="maximize", sampler=DrawingSampler(sampler, SPACE, [DEFAULTS]))


def ask(study: optuna.Study) -> tuple[optuna.Trial, dict[str, Any]]:
    trial = study.ask()
    return trial, {name: parameter.suggest(trial, name) for name, parameter in SPACE.items()}


def search(sampler: LineSampler, surface: Surface, seed: int = 0) -> optuna.Study:
    """To the end; now and then a trial fails, or the process is killed between ask and tell and asks again."""
    study, rng = study_of(sampler), random.Random(seed)
    while sampler.room(SPACE, study):
        trial, place = ask(study)
        if rng.random() < 0.2:
            again = optuna.Trial(study, trial._trial_id)
            assert {name: parameter.suggest(again, name) for name, parameter in SPACE.items()} == place
        if rng.random() < 0.1:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, surface(place["omega"], place["scale"]))
    return study


def places(study: optuna.Study) -> list[tuple[float, float]]:
    scored = [trial for trial in study.trials if trial.state is TrialState.COMPLETE]
    return [(trial.params["omega"], trial.params["scale"]) for trial in scored]


def entangled(omega: float, scale: float) -> float:
    """The best scale depends on omega; the best pair is (0.75, 7)."""
    return -abs(scale - (1 + 8 * omega)) - 3 * abs(omega - 0.75)


def separate(omega: float, scale: float) -> float:
    return -abs(scale - 3.3) - abs(omega - 0.5)


@pytest.mark.parametrize("seed", range(3))
def test_nested_finds_the_best_pair_where_one_number_depends_on_the_other(seed: int):
    study = search(NestedSampler(tolerance=0.3), entangled, seed)
    assert study.best_params["omega"] == 0.75
    assert study.best_params["scale"] == pytest.approx(7, abs=0.3)
    assert len(places(study)) == len(set(places(study))) <= NestedSampler().size(SPACE)


@pytest.mark.parametrize("seed", range(3))
def test_coordinate_finds_it_with_fewer_trials_where_the_numbers_do_not_depend_on_each_other(seed: int):
    study = search(CoordinateSampler(tolerance=0.3), separate, seed)
    assert study.best_params["omega"] == 0.5
    assert study.best_params["scale"] == pytest.approx(3.3, abs=0.3)
    assert len(places(study)) == len(set(places(study))) <= CoordinateSampler().size(SPACE)
    assert len(places(study)) < len(places(search(NestedSampler(tolerance=0.3), separate))) / 2


def test_coordinate_takes_the_grid_only_at_the_best_point_of_the_line():
    study = search(CoordinateSampler(tolerance=0.3), separate)
    line = [omega for omega, _ in places(study)[:-4]]
    assert line == [0.0] * len(line)
    assert [omega for omega, _ in places(study)[-4:]] == [0.25, 0.5, 0.75, 1.0]
    assert len({scale for _, scale in places(study)[-4:]}) == 1


def test_a_nested_search_scans_all_lines_at_the_same_time():
    sampler = NestedSampler()
    study = study_of(sampler)
    first, place = ask(study)
    study.tell(first, separate(**place))
    assert sampler.room(SPACE, study) == 5 * 6
    together = [ask(study)[1] for _ in range(5 * 6)]
    assert len({(place["omega"], place["scale"]) for place in together}) == 5 * 6
    assert sampler.room(SPACE, study) == 0


def test_notes_say_what_each_line_found():
    sampler = NestedSampler(tolerance=0.3)
    notes = sampler.notes(SPACE, search(sampler, entangled))
    assert all(any(note.startswith(f"scale at omega={value}:") for note in notes) for value in (0.0, 0.5, 1.0))


@pytest.mark.parametrize("sampler", [NestedSampler(), CoordinateSampler()])
@pytest.mark.parametrize(
    "space",
    [
        {}, {"x": GRID}, {"x": GRID, "y": IntParameter(low=1, high=2)}, {"x": SPACE["scale"], "y": SPACE["scale"]},
        {"x": GRID, "y": SPACE["scale"], "z": CategoricalParameter(choices=(1, 2))},
    ],
)  # fmt: skip
def test_two_parameters_are_searched_one_continuous_and_one_of_listed_values(sampler: LineSampler, space: Any):
    with pytest.raises(ValueError, match="expected two parameters"):
        sampler.size(space)
