"""What every launcher must do."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.launcher import Job, JobId, JobState, Launcher
from trainers.rundir import RunDir, freeze, write_atomically

SECONDS = 300


def wait_for(condition: Callable[[], object]) -> None:
    """Fail unless `condition` comes true; generous, because machines are shared."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def first_trial(folder: Path, **train: Any) -> Job:
    """The job of a study's first trial in `folder`: a frozen config, and a worker that needs no model."""
    run = RunDir(folder / "study" / "trials" / "0000")
    text, digest = freeze({"train": train or {"optimizer": {"lr": 0.25}}})
    write_atomically(run.trial, text)
    return Job("tests.orchestrator.fake_worker", (str(run.path), "--sha256", digest), run.path)


class LauncherContract:
    """Inherit, and give the fixtures `launcher` and `unknown_id`, an id in its form that was never given out."""

    @pytest.fixture
    def job(self, tmp_path: Path) -> Job:
        return first_trial(tmp_path)

    def test_jobs_can_run_here(self, launcher: Launcher):
        launcher.check()

    def test_a_job_runs_to_its_end_and_is_known_by_its_id_or_directory_alone(self, launcher: Launcher, job: Job):
        assert launcher.find(job) is None
        job_id = launcher.submit(job)
        other = type(launcher).model_validate(launcher.model_dump())
        assert other.poll(job_id) in {JobState.QUEUED, JobState.RUNNING}
        found = other.find(job)
        assert found is not None
        wait_for(lambda: launcher.poll(job_id) is JobState.ENDED)
        wait_for(lambda: other.poll(found) is JobState.ENDED)
        assert RunDir(job.run_dir).result.exists(), RunDir(job.run_dir).log.read_text()
        assert launcher.find(job) is None
        launcher.cancel(job_id)

    def test_cancelling_leaves_no_process_even_of_a_job_that_ignores_it(self, launcher: Launcher, job: Job):
        (job.run_dir.parents[1] / "behaviour.txt").write_text("stubborn")
        job_id = launcher.submit(job)
        wait_for(lambda: launcher.poll(job_id) and (job.run_dir / "pid").exists())
        pid = int((job.run_dir / "pid").read_text())
        wait_for(psutil.Process(pid).children)
        family = [psutil.Process(pid), *psutil.Process(pid).children()]
        launcher.cancel(job_id)
        assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
        assert launcher.poll(job_id) is JobState.ENDED
        assert launcher.find(job) is None

    def test_an_unknown_job_has_ended(self, launcher: Launcher, unknown_id: JobId):
        assert launcher.poll(unknown_id) is JobState.ENDED
        launcher.cancel(unknown_id)

    def test_it_survives_a_study_file(self, launcher: Launcher):
        assert Launcher.model_validate(launcher.model_dump(mode="json")) == launcher
