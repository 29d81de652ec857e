import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from orchestrator.launcher import Job, JobId, JobState
from orchestrator.launchers.ray import RayLauncher
from tests.contracts.launcher import LauncherContract, first_trial, wait_for
from tests.orchestrator.ray_cluster import running_cluster
from trainers.errors import LaunchError
from trainers.rundir import RunDir


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running_cluster() as address:
        yield address


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return first_trial(tmp_path)


def said(job: Job) -> str:
    log = job.run_dir / "log.txt"
    return log.read_text() if log.exists() else "no log"


@pytest.mark.slow
def test_a_trial_runs_as_a_ray_job(job: Job) -> None:
    """The one that every change runs; the rest of this file says -m cluster."""
    with running_cluster(nodes=1) as address:
        launcher = RayLauncher(address=address, poll_seconds=0.2)
        launcher.check()
        job_id = launcher.submit(job)
        other = RayLauncher(address=address, poll_seconds=0.2)
        assert other.submit(job) == other.find(job) == job_id
        wait_for(lambda: other.poll(job_id) is JobState.ENDED)
        assert RunDir(job.run_dir).result.exists(), said(job)
        assert other.find(job) is None
        other.cancel(job_id)


@pytest.mark.cluster
class TestRayLauncher(LauncherContract):
    @pytest.fixture
    def launcher(self, address: str) -> RayLauncher:
        return RayLauncher(address=address, poll_seconds=0.2)

    @pytest.fixture
    def unknown_id(self) -> JobId:
        return JobId("trial-0123456789abcdef-1")

    def test_a_job_that_waits_longer_for_room_than_ray_does_runs_after_all(
        self, launcher: RayLauncher, job: Job, tmp_path: Path
    ):
        large = launcher.model_copy(update={"resources": {"head": 1}})
        folder = tmp_path / "other" / "trials" / "0000"
        folder.mkdir(parents=True)
        (folder.parents[1] / "behaviour.txt").write_text("hang")
        first = large.submit(Job("tests.orchestrator.fake_worker", (str(folder),), folder))
        wait_for((folder / "pid").exists)
        second = large.submit(job)
        assert second.endswith("-1")
        wait_for(lambda: large.poll(second) and large.find(job) not in {None, second})
        other = RayLauncher.model_validate(large.model_dump())
        assert other.poll(second) is JobState.QUEUED
        large.cancel(first)
        wait_for(lambda: other.poll(second) is JobState.ENDED)
        assert RunDir(job.run_dir).result.exists(), said(job)

    def test_a_secret_of_the_controller_does_not_reach_a_job(
        self, launcher: RayLauncher, job: Job, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("WANDB_API_KEY", "canary-7361")
        (job.run_dir.parents[1] / "behaviour.txt").write_text("hang")
        job_id = launcher.submit(job)
        wait_for((job.run_dir / "pid").exists)
        environment = psutil.Process(int((job.run_dir / "pid").read_text())).environ()
        launcher.cancel(job_id)
        assert environment["TRIAL_TOKEN"] == job.token
        assert "canary-7361" not in str(environment)

    def test_what_the_cluster_could_never_hold_is_refused(self, launcher: RayLauncher):
        large = launcher.model_copy(update={"cpus": 3})
        with pytest.raises(LaunchError, match=r"got 1 nodes with 3 CPU each; expected at most .*2 CPU"):
            large.check()
        large.model_copy(update={"autoscaled": True}).check()
        with pytest.raises(LaunchError, match="got 3 nodes with 1 CPU each"):
            launcher.model_copy(update={"num_nodes": 3}).check()

    def test_ranks_on_two_nodes_find_one_another(self, launcher: RayLauncher, tmp_path: Path):
        two = launcher.model_copy(update={"num_nodes": 2, "num_processes": 2, "cpus": 2})
        two.check()
        job = Job("tests.orchestrator.adding_worker", (str(tmp_path),), tmp_path)
        job_id = two.submit(job)
        wait_for(lambda: two.poll(job_id) is JobState.ENDED)
        assert sorted(path.read_text() for path in tmp_path.glob("rank*.txt")) == ["4 ranks, sum 10"] * 4, said(job)

    @pytest.mark.parametrize("politely", [True, False])
    def test_a_trial_of_two_nodes_ends_with_its_job(self, launcher: RayLauncher, tmp_path: Path, politely: bool):
        two = launcher.model_copy(update={"num_nodes": 2})
        job = Job("tests.orchestrator.waiting_worker", (str(tmp_path),), tmp_path)
        job_id = two.submit(job)
        wait_for(lambda: len(list(tmp_path.glob("pid*"))) == 2)
        assert two.poll(job_id) is JobState.RUNNING
        ranks = [psutil.Process(int(file.name.removeprefix("pid"))) for file in tmp_path.glob("pid*")]
        if politely:
            two.cancel(job_id)
            assert not any(is_alive(rank) for rank in ranks)
        else:
            drivers = [p for p in psutil.process_iter() if job_id in " ".join(p.cmdline()) and p.name() != "sh"]
            assert drivers
            for driver in drivers:
                driver.send_signal(signal.SIGKILL)
            wait_for(lambda: not any(is_alive(rank) for rank in ranks))
            wait_for(lambda: two.poll(job_id) is JobState.ENDED)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_an_address_where_nothing_answers_is_refused() -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'ray[default]'")
    with pytest.raises(LaunchError, match=r"launcher.address: got .*; expected the dashboard of a running Ray cluster"):
        RayLauncher(address="http://127.0.0.1:9").check()


def test_without_ray_the_study_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.job_submission", None)
    with pytest.raises(LaunchError, match=r"pip install 'diffusion-tuning\[ray\]'"):
        RayLauncher().check()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"gpus": 1, "num_processes": 2}, "at most one process a GPU"),
        ({"address": "ray://head:10001"}, "should match pattern"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        RayLauncher.model_validate(options)
