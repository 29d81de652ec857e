import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import psutil
import pytest
from pydantic import ValidationError

from orchestrator.launcher import Job, JobId, JobState
from orchestrator.launchers.slurm import SlurmLauncher
from orchestrator.ranks import first_host, name_ranks
from tests.contracts.launcher import LauncherContract, first_trial, wait_for
from tests.orchestrator.fake_worker import STEPS
from tests.orchestrator.slurm import running_cluster
from trainers.errors import LaunchError
from trainers.rundir import RunDir

Start = Literal["torchrun", "srun"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    with running_cluster() as folder:
        yield folder


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return first_trial(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
class TestSlurmLauncher(LauncherContract):
    @pytest.fixture(params=["torchrun", "srun"])
    def launcher(self, request: pytest.FixtureRequest) -> SlurmLauncher:
        return SlurmLauncher(start=request.param, poll_seconds=0.2)

    @pytest.fixture
    def unknown_id(self) -> JobId:
        return JobId("999999:0123456789abcdef")

    def test_submitting_twice_starts_one_job(self, launcher: SlurmLauncher, job: Job):
        held = launcher.model_copy(update={"options": {"hold": ""}})
        first = held.submit(job)
        other = SlurmLauncher.model_validate(held.model_dump())
        assert other.submit(job) == first
        assert other.poll(first) is JobState.QUEUED
        other.cancel(first)
        assert launcher.poll(first) is JobState.ENDED

    def test_an_id_that_was_given_to_another_job_has_ended(self, launcher: SlurmLauncher, job: Job):
        held = launcher.model_copy(update={"options": {"hold": ""}})
        number = held.submit(job).partition(":")[0]
        stale = JobId(f"{number}:0123456789abcdef")
        assert launcher.poll(stale) is JobState.ENDED
        launcher.cancel(stale)
        found = launcher.find(job)
        assert found is not None
        launcher.cancel(found)

    def test_a_secret_of_the_controller_does_not_reach_a_job(
        self, launcher: SlurmLauncher, job: Job, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("WANDB_API_KEY", "canary-7361")
        (job.run_dir.parents[1] / "behaviour.txt").write_text("hang")
        job_id = launcher.submit(job)
        wait_for((job.run_dir / "pid").exists)
        environment = psutil.Process(int((job.run_dir / "pid").read_text())).environ()
        launcher.cancel(job_id)
        assert environment["TRIAL_TOKEN"] == job.token
        assert "canary-7361" not in str(environment)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_job_that_makes_room_for_an_urgent_one_goes_on_from_its_checkpoint(job: Job):
    (job.run_dir.parents[1] / "behaviour.txt").write_text("slow")
    launcher = SlurmLauncher(poll_seconds=0.2)
    run = RunDir(job.run_dir)
    job_id = launcher.submit(job)
    wait_for(run.events.exists)
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(urgent, check=True, capture_output=True)
    wait_for(lambda: launcher.poll(job_id) is JobState.QUEUED)
    assert not run.result.exists()
    number = job_id.partition(":")[0]
    subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], check=True)  # else in two minutes
    wait_for(lambda: launcher.poll(job_id) is JobState.ENDED)
    assert run.result.exists(), run.log.read_text()
    steps = [event["step"] for _, event in run.read_events()]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    assert len(steps) - len(set(steps)) <= 1  # the one that was cut short
    assert len({event["pid"] for _, event in run.read_events()}) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("start", ["torchrun", "srun"])
def test_ranks_on_two_nodes_find_one_another(tmp_path: Path, start: Start):
    launcher = SlurmLauncher(start=start, num_nodes=2, num_processes=2, poll_seconds=0.2)
    job_id = launcher.submit(Job("tests.orchestrator.adding_worker", (str(tmp_path),), tmp_path))
    wait_for(lambda: launcher.poll(job_id) is JobState.ENDED)
    found = sorted(path.read_text() for path in tmp_path.glob("rank*.txt"))
    assert found == ["4 ranks, sum 10"] * 4, (tmp_path / "log.txt").read_text()


@pytest.mark.usefixtures("cluster")
def test_what_slurm_does_not_accept_is_said_before_a_study_starts():
    with pytest.raises(LaunchError, match=r"launcher: sbatch said: .*invalid partition.*nowhere"):
        SlurmLauncher(options={"partition": "nowhere"}).check()


def test_without_slurm_the_study_is_refused_with_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="expected Slurm's commands on PATH"):
        SlurmLauncher().check()


@pytest.mark.parametrize("patience", [0, 1])
def test_an_absent_controller_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int):
    """The first answer is what squeue says when slurmctld is away."""
    squeue = tmp_path / "squeue"
    away = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    squeue.write_text(f'#!/bin/sh\nif [ -e {tmp_path}/asked ]; then echo "7|RUNNING|trial-abc"; exit 0; fi\n'
                      f'echo > {tmp_path}/asked; echo "{away}" >&2; exit 1\n')  # fmt: skip
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    launcher = SlurmLauncher(patience_minutes=patience, poll_seconds=0.01)
    if patience:
        assert launcher.poll(JobId("7:abc")) is JobState.RUNNING
    else:
        with pytest.raises(LaunchError, match="Unable to contact"):
            launcher.poll(JobId("7:abc"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"job-name": "mine"}, "that the launcher does not set itself"),
        ({"--gres": "gpu:1"}, "without its dashes"),
    ],
)
def test_options_that_would_break_a_job_are_refused(options: dict[str, str | int], message: str):
    with pytest.raises(ValidationError, match=message):
        SlurmLauncher(options=options)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[08-11,40],login1", "gpu08"),
        ("n[3]-ib,n4", "n3-ib"),
        ("rack2-n[1,7]", "rack2-n1"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str):
    assert first_host(nodes) == host


def test_ranks_that_torchrun_named_are_left_alone():
    step = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}
    environment = {**step, "RANK": "3"}
    name_ranks(environment)
    assert environment == {**step, "RANK": "3"}
    batch = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}  # a batch script is no step
    environment = dict(batch)
    name_ranks(environment)
    assert environment == batch
