# pyright: basic
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from orchestrator.held import HeldStorage


@pytest.fixture
def backend(tmp_path: Path) -> RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")


def seen(study: optuna.Study) -> list[tuple[object, ...]]:
    return [
        (t.number, t.state, t.values, t.params, t.user_attrs, t.intermediate_values, t.constraints)
        for t in study.get_trials(deepcopy=False)
    ]


def test_after_every_write_all_trials_are_as_the_database_has_them(backend: RDBStorage):
    study = optuna.create_study(storage=HeldStorage(backend), study_name="s", sampler=optuna.samplers.RandomSampler())
    fresh = optuna.load_study(storage=backend, study_name="s")
    first, second = study.ask(), study.ask()
    writes = [
        lambda: first.suggest_float("x", 0, 1),
        lambda: second.set_user_attr("note", [1, "two"]),
        lambda: first.report(0.5, 10),
        lambda: second.set_constraint("oom", 1.0),
        lambda: study.tell(first, 0.25),
        lambda: study.enqueue_trial({"x": 0.5}),
        lambda: study.ask({"x": FloatDistribution(0, 1)}),
        lambda: study.tell(second, state=TrialState.PRUNED),
    ]
    for write in writes:
        write()
        assert seen(study) == seen(fresh)


def test_a_trial_that_was_not_written_is_not_read_again(backend: RDBStorage, monkeypatch: pytest.MonkeyPatch):
    study = optuna.create_study(storage=HeldStorage(backend))
    running = [study.ask() for _ in range(20)]
    study.get_trials(deepcopy=False)
    read: list[int] = []
    build = RDBStorage._build_frozen_trial_from_trial_model
    monkeypatch.setattr(
        RDBStorage,
        "_build_frozen_trial_from_trial_model",
        lambda self, trial: read.append(trial.number) or build(self, trial),
    )
    study.get_trials(deepcopy=False)
    assert read == []
    running[3].set_user_attr("note", 1)
    study.get_trials(deepcopy=False)
    assert read == [3]


def test_a_study_that_is_opened_again_is_read_whole(backend: RDBStorage):
    study = optuna.create_study(storage=HeldStorage(backend), study_name="s")
    study.tell(study.ask(), 0.5)
    study.ask()
    again = optuna.load_study(storage=HeldStorage(backend), study_name="s")
    assert seen(again) == seen(study)
    assert [trial.state for trial in again.trials] == [TrialState.COMPLETE, TrialState.RUNNING]
