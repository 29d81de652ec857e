"""What is left of a trial that failed, wherever one looks."""

# pyright: basic

import errno
import os
import sqlite3
from pathlib import Path

import optuna
import pytest
from sqlalchemy.exc import OperationalError

from orchestrator.__main__ import main
from orchestrator.controller import Controller
from orchestrator.failures import StudyStoppedError, failure_file, note_failure, read_failure
from orchestrator.tables import failure_lines
from orchestrator.trackers.mlflow import MlflowTracker
from orchestrator.views import trial_views
from tests.orchestrator.cluster import Cluster, drive, spec_of, states
from tests.orchestrator.mlflow_store import child, opened
from tests.orchestrator.studies import load, score
from tests.orchestrator.views import FakeStudy
from trainers.errors import StorageError
from trainers.rundir import RunDir, RunError, write_atomically


def train_and_fail(run: RunDir) -> None:
    for step, peak in ((10, 2**30), (20, 3 * 2**29)):
        run.append("train", step=step, loss=1.0, peak_bytes=peak)
    run.log.write_text("".join(f"line {number}\n" for number in range(100)), encoding="utf-8")
    run.write(run.error, RunError(reason="oom", message="tried to allocate 1 GiB", step=20, peak_bytes=2**31))


def test_a_failure_keeps_what_was_known_of_it(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = lambda run: train_and_fail(run) if run.path.name == "0001" else score(run)
    spec = spec_of(tmp_path, "limits.trials=3")
    study, _ = drive(spec)
    assert states(study) == ["COMPLETE", "PRUNED", "COMPLETE"]
    trials = trial_views(spec, study)
    failure = read_failure(trials[1].run)
    assert failure is not None
    assert (failure.reason, failure.step, failure.peak_bytes, failure.jobs_lost) == ("oom", 20, 2**31, 0)
    assert failure.log_tail == tuple(f"line {number}" for number in range(80, 100))
    assert read_failure(trials[0].run) is None
    assert failure_lines(trials) == [
        "trial 1: oom after step 20, at most 2 GiB in use: tried to allocate 1 GiB",
        "    line 97",
        "    line 98",
        "    line 99",
    ]


def test_a_job_that_was_killed_is_known_by_what_it_logged(cluster: Cluster, tmp_path: Path):
    cluster.behaviour = lambda run: run.append("train", step=7, loss=1.0, peak_bytes=2**20)
    spec = spec_of(tmp_path, "limits.trials=1", "limits.max_retries=1")
    with pytest.raises(StudyStoppedError):
        drive(spec)
    failure = read_failure(RunDir(spec.root / "trials" / "0000"))
    assert failure is not None
    assert (failure.reason, failure.step, failure.peak_bytes, failure.jobs_lost) == ("lost", 7, 2**20, 2)


def test_only_the_last_failures_are_shown_and_the_rest_is_counted(study: FakeStudy):
    for _ in range(7):
        run = study.start()
        note_failure(run, "crash", "why", 0)
        study.end(run, "FAIL", reason="crash: why")
    lines = failure_lines(study.trials)
    assert lines[0].startswith("the last 5 of 7 failures")
    assert lines[1:] == [f"trial {number}: crash: why" for number in range(2, 7)]


def test_a_failure_stands_in_mlflow_with_its_step_and_memory(study: FakeStudy):
    run = study.start()
    study.train(run, 10, peak_bytes=2.0**20)
    note_failure(run, "lost", "the job ended", 3)
    study.end(run, "FAIL", reason="lost: the job ended")
    MlflowTracker().mirror(study.view, study.trials)
    found = child(study)
    assert (found.data.tags["reason"], found.data.tags["last_step"]) == ("lost: the job ended", "10")
    assert found.data.tags["jobs_lost"] == "3"
    assert found.data.metrics["peak_bytes"] == 2**20
    assert failure_file(run).name in {file.path for file in opened(study).list_artifacts(found.info.run_id)}


def test_a_database_that_goes_away_is_named_by_its_own_words(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def gone(*_: object, **__: object) -> None:
        cause = OperationalError("SELECT 1", {}, Exception("server closed the connection unexpectedly"))
        raise optuna.exceptions.StorageInternalError("An exception is raised during the commit.") from cause

    monkeypatch.setattr(Controller, "step", gone)
    with pytest.raises(StorageError, match="server closed the connection unexpectedly; expected to read and write"):
        drive(spec_of(tmp_path))


def test_a_full_disk_is_named_in_one_line_and_no_half_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    written = tmp_path / "best_params.yaml"
    monkeypatch.setattr("orchestrator.commands.best.run", lambda _: write_atomically(written, "content"))
    assert main(["best", "study.yaml"]) == 2
    assert "got No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_move_onto_a_full_disk_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    load(tmp_path)
    monkeypatch.setattr("orchestrator.moving.move_study", full)
    assert main(["move", str(tmp_path / "study.yaml"), "--to", f"sqlite:///{tmp_path}/other.db"]) == 2
    assert "got disk I/O error; expected to read and write the study" in capsys.readouterr().err
