import os
import signal
from pathlib import Path

import psutil
import pytest

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
