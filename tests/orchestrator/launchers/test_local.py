# pyright: basic
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from orchestrator.launcher import Job, JobId, JobState
from orchestrator.launchers.local import LocalLauncher
from tests.contracts.launcher import LauncherContract, wait_for
from trainers.errors import LaunchError


@pytest.mark.slow
class TestLocalLauncher(LauncherContract):
    @pytest.fixture
    def launcher(self) -> LocalLauncher:
        return LocalLauncher(gpus=())

    @pytest.fixture
    def unknown_id(self) -> JobId:
        return JobId(f"{os.getpid()}:0123456789abcdef")  # a process that lives, and is not that job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job("tests.orchestrator.fake_worker", (str(tmp_path),), tmp_path)


def test_a_job_inherits_nothing_that_could_harm_it_or_leak(monkeypatch: pytest.MonkeyPatch, job: Job):
    harmful = "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID PET_NPROC_PER_NODE MLFLOW_RUN_ID"
    secret = "HF_TOKEN AWS_SECRET_ACCESS_KEY WANDB_API_KEY HTTPS_PROXY MLFLOW_TRACKING_PASSWORD"
    for name in (*harmful.split(), *secret.split()):
        monkeypatch.setenv(name, "1")
    environment = LocalLauncher()._environment(job)
    assert not {*harmful.split(), *secret.split()} & environment.keys()
    assert environment["PATH"] == os.environ["PATH"]
    assert environment["TRIAL_TOKEN"] == job.token


@pytest.mark.parametrize(("ranks", "threads"), [(1, 8), (2, 4), (3, 2), (16, 1)])
def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch, job: Job, ranks: int, threads: int):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert LocalLauncher(num_processes=ranks)._environment(job)["OMP_NUM_THREADS"] == str(threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert LocalLauncher(num_processes=ranks)._environment(job)["OMP_NUM_THREADS"] == "3"


def test_chosen_gpus_are_all_that_a_job_sees(monkeypatch: pytest.MonkeyPatch, job: Job):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert LocalLauncher()._environment(job)["CUDA_VISIBLE_DEVICES"] == "5"
    assert LocalLauncher(gpus=())._environment(job)["CUDA_VISIBLE_DEVICES"] == ""
    chosen = LocalLauncher(gpus=(2, 0))._environment(job)
    assert (chosen["CUDA_VISIBLE_DEVICES"], chosen["CUDA_DEVICE_ORDER"]) == ("2,0", "PCI_BUS_ID")


def test_a_job_in_a_folder_that_does_not_exist_cannot_start(tmp_path: Path):
    with pytest.raises(LaunchError, match="gone"):
        LocalLauncher().submit(Job("m", (), tmp_path / "gone"))


def test_the_token_of_a_run_directory_is_the_same_for_everyone(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    direct, linked = Job("m", (), tmp_path / "run"), Job("other", ("x",), tmp_path / "link")
    assert direct.token == linked.token != Job("m", (), tmp_path).token


@pytest.mark.slow
def test_ranks_die_with_torchrun_however_it_dies(tmp_path: Path):
    """`tests.orchestrator.waiting_worker` is the real worker's first lines."""
    launcher = LocalLauncher(gpus=(), num_processes=2)
    job_id = launcher.submit(Job("tests.orchestrator.waiting_worker", (str(tmp_path),), tmp_path))
    wait_for(lambda: len(list(tmp_path.glob("pid*"))) == 2)
    ranks = [psutil.Process(int(file.name.removeprefix("pid"))) for file in tmp_path.glob("pid*")]
    os.kill(int(job_id.split(":")[0]), signal.SIGKILL)
    wait_for(lambda: not any(r.is_running() and r.status() != psutil.STATUS_ZOMBIE for r in ranks))
    assert launcher.poll(job_id) is JobState.ENDED


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a stand-in for nvidia-smi says of four devices: index, mebibytes in use, mebibytes in all."""
    tool, said = tmp_path / "nvidia-smi", tmp_path / "memory.txt"
    tool.write_text(f'#!/bin/sh\ncase "$1" in *used*) cat {said};; *) sed "s/, [0-9]*,/,/" {said};; esac\n')
    tool.chmod(0o755)
    said.write_text("".join(f"{index}, 300, 16384\n" for index in range(4)))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return said


def test_a_trial_gets_devices_that_no_job_sees_and_whose_memory_is_back(memory: Path, tmp_path: Path):
    launcher = LocalLauncher(gpus_per_trial=2, num_processes=2)
    launcher.check()
    assert launcher.free_devices() == (0, 1)
    environment = {"TRIAL_TOKEN": "another study's", "CUDA_VISIBLE_DEVICES": "0"}
    with subprocess.Popen(["/bin/sleep", "600"], env=environment) as job:
        assert launcher.free_devices() == (1, 2)
        memory.write_text(memory.read_text().replace("2, 300", "2, 9000"))
        assert launcher.free_devices() == (1, 3)
        memory.write_text(memory.read_text().replace("3, 300", "3, 9000"))
        assert launcher.free_devices() is None
        job.kill()
    assert launcher.free_devices() == (0, 1)
    assert LocalLauncher().free_devices() == ()


def test_a_job_sees_the_devices_that_it_was_given(job: Job):
    environment = LocalLauncher(gpus=(0, 1, 2), gpus_per_trial=1)._environment(replace(job, devices=(2,)))
    assert environment["CUDA_VISIBLE_DEVICES"] == "2"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"gpus": (0, 1), "gpus_per_trial": 3}, "expected at most so many"),
        ({"gpus_per_trial": 1, "num_processes": 2}, "expected at most one a GPU"),
    ],
)
def test_more_than_there_can_be_is_refused(options: dict[str, Any], problem: str):
    with pytest.raises(ValidationError, match=problem):
        LocalLauncher.model_validate(options)


def test_devices_that_are_not_there_are_refused(memory: Path):
    with pytest.raises(LaunchError, match="gpus_per_trial: got 5; expected at most as many as nvidia-smi lists, 4"):
        LocalLauncher(gpus_per_trial=5).check()
