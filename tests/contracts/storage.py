"""What every database of studies must do."""

# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from orchestrator import moving
from orchestrator.controller import Controller
from orchestrator.database import open_database
from orchestrator.ledger import has_study, read_trials
from orchestrator.moving import move_study
from orchestrator.spec import StudySpec
from orchestrator.storage import open_study, read_study
from orchestrator.views import trial_views
from tests.contracts.launcher import wait_for
from tests.orchestrator.studies import load
from trainers.errors import StorageError
from trainers.rundir import RunError

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from orchestrator.storage import open_study
from tests.orchestrator.studies import load
open_study(load(Path(sys.argv[1]), *sys.argv[2:]))
print("open", flush=True)
time.sleep(float(sys.stdin.readline()))
"""


def opened_elsewhere(folder: Path, *sets: str) -> "subprocess.Popen[str]":
    """Another process opens the study, and goes on living for as many seconds as it is told."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *sets], env=environment, text=True, **pipes)


def contents(study: optuna.Study) -> list[str]:
    """Of its trials, as text: undefined numbers are not equal otherwise."""
    return [
        repr((t.number, t.state, t.values, t.params, sorted(t.user_attrs.items()), t.constraints)) for t in study.trials
    ]


class StorageContract:
    """Inherit, and give the fixtures `url`, of a database that does not exist or is empty, and `other_url`."""

    @pytest.fixture
    def spec(self, tmp_path: Path, url: str) -> StudySpec:
        return load(tmp_path, f"storage={url}")

    def test_a_study_opened_again_is_as_it_was_left(self, spec: StudySpec):
        study = open_study(spec)
        trial = study.ask()
        trial.set_user_attr("note", {"text": "猫", "numbers": [1, 2.5]})
        study.tell(trial, 0.25)
        close(study)
        again = read_study(spec)
        assert [t.values for t in again.trials] == [[0.25]]
        assert again.trials[0].user_attrs["note"] == {"text": "猫", "numbers": [1, 2.5]}
        close(again)

    def test_what_is_read_without_optuna_is_what_it_stored(self, spec: StudySpec):
        assert not has_study(spec)
        study = open_study(spec)
        study.tell(study.ask(), -0.5)
        Controller(spec, study)._fail(study.ask(), RunError(reason="oom", message="20 GiB"))
        bounded = study.ask()
        bounded.set_constraint("clip_t.at_least", 0.125)
        bounded.set_constraint("clip_t.at_most", -0.5)
        study.tell(bounded, 0.75)
        study.ask()
        stored, shown = trial_views(spec, study), read_trials(spec)
        close(study)
        assert has_study(spec)
        assert [view.violations for view in shown] == [{}, {}, {"clip_t.at_least": 0.125}, {}]
        assert shown[2].reason == "breaks clip_t.at_least by 0.125"
        assert [replace(view, params={}) for view in shown] == [replace(view, params={}) for view in stored]

    def test_studies_of_one_database_do_not_see_one_another(self, spec: StudySpec):
        other = spec.model_copy(update={"name": "other"})
        for each, value in ((spec, 0.25), (other, 0.5)):
            study = open_study(each)
            study.tell(study.ask(), value)
            close(study)
        assert [view.values for view in read_trials(spec)] == [[0.25]]
        assert [view.values for view in read_trials(other)] == [[0.5]]

    def test_tables_of_an_unknown_version_are_refused_with_what_to_do(self, spec: StudySpec):
        close(open_study(spec))
        engine = sqlalchemy.create_engine(open_database(spec.database_url).url)
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("UPDATE alembic_version SET version_num = 'v99'"))
        engine.dispose()
        with pytest.raises(StorageError, match=r"another version; .*optuna"):
            open_study(spec)

    def test_a_study_whose_folder_is_elsewhere_is_refused(self, spec: StudySpec):
        study = open_study(spec)
        study.ask().set_user_attr("sha256", "00")
        close(study)
        with pytest.raises(StorageError, match="1 started trials, none of which"):
            open_study(spec)

    def test_trials_that_the_database_does_not_know_are_refused(self, spec: StudySpec):
        (spec.root / "trials").mkdir(parents=True)
        with pytest.raises(StorageError, match="does not hold"):
            open_study(spec)

    def test_a_study_moves_whole_and_its_old_database_lets_go(self, spec: StudySpec, other_url: str):
        study = open_study(spec)
        first, _, third = study.ask(), study.ask(), study.ask()
        study.tell(first, 0.25)
        Controller(spec, study)._fail(third, RunError(reason="nan", message="loss"))
        study.ask().set_user_attr("undefined", math.nan)  # as the reports of a trial whose score has no value
        identity = study.user_attrs
        before = contents(study)
        close(study)
        assert move_study(spec, other_url) == 4
        moved = spec.model_copy(update={"storage": other_url})
        again = open_study(moved)
        assert contents(again) == before
        assert identity.items() <= again.user_attrs.items()
        close(again)
        assert not has_study(spec)
        with pytest.raises(StorageError, match="one that can be moved"):
            move_study(spec, other_url)

    def test_a_move_cut_short_is_refused_by_run_and_begun_anew_by_move(
        self, spec: StudySpec, other_url: str, monkeypatch: pytest.MonkeyPatch
    ):
        study = open_study(spec)
        study.tell(study.ask(), 0.25)
        study.tell(study.ask(), 0.5)
        close(study)
        moved = spec.model_copy(update={"storage": other_url})
        with monkeypatch.context() as patch:
            patch.setattr(optuna.Study, "add_trials", lambda self, trials: self.add_trial(trials[0]) or 1 / 0)
            with pytest.raises(ZeroDivisionError):
                move_study(spec, other_url)
        with pytest.raises(StorageError, match="interrupted"):
            open_study(moved)
        assert move_study(spec, other_url) == 2
        assert [view.values for view in read_trials(moved)] == [[0.25], [0.5]]

    def test_a_move_that_was_killed_after_the_copy_goes_on(
        self, spec: StudySpec, other_url: str, monkeypatch: pytest.MonkeyPatch
    ):
        study = open_study(spec)
        study.tell(study.ask(), 0.25)
        close(study)
        move = moving._move
        moved = spec.model_copy(update={"storage": other_url})
        with monkeypatch.context() as patch:
            patch.setattr(moving, "_move", lambda *given: move(*given) and 1 / 0)
            with pytest.raises(ZeroDivisionError):
                move_study(spec, other_url)
        assert has_study(spec)
        assert move_study(spec, other_url) == 1
        assert not has_study(spec)
        assert [view.values for view in read_trials(moved)] == [[0.25]]

    def test_a_study_does_not_move_onto_another(self, spec: StudySpec, other_url: str):
        close(open_study(spec))
        close(open_study(spec.model_copy(update={"storage": other_url})))
        with pytest.raises(StorageError, match="already"):
            move_study(spec, other_url)

    @pytest.mark.slow
    def test_two_processes_may_open_a_new_database_at_once(self, tmp_path: Path, url: str):
        load(tmp_path)
        processes = [opened_elsewhere(tmp_path, f"storage={url}", f"name={name}") for name in ("one", "two")]
        answers = [process.communicate("0\n", timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], answers
        assert sorted(open_database(url).studies()) == ["one", "two"]


def close(study: optuna.Study) -> None:
    """As the end of a process does it."""
    storage = study._storage
    backend = getattr(storage, "_backend", storage)
    backend.remove_session()
    backend.engine.dispose()


def wait_until_open(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    wait_for(lambda: process.stdout.readline() == "open\n")
