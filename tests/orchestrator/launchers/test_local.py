# pyright: basic
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from orchestrator.launcher import Job, JobId, JobState
from orchestrator.launchers import local
from orchestrator.launchers.local import LocalLauncher, gpu_bytes
from tests.contracts.launcher import LauncherContract, wait_for
from tests.integration.controller_process import ScriptLauncher
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


def test_a_job_that_is_becoming_torchrun_runs_and_can_be_cancelled(monkeypatch: pytest.MonkeyPatch, job: Job):
    """Between two programs a process has no environment: of 150 that were watched, 101 were seen without."""
    launcher = LocalLauncher()
    job_id = launcher.submit(job)
    environ, looks = psutil.Process.environ, list[int]()

    def none_at_first(process: psutil.Process) -> dict[str, str]:
        if process.pid != int(job_id.split(":")[0]):
            return environ(process)
        looks.append(process.pid)
        return environ(process) if len(looks) > 12 else {}

    monkeypatch.setattr(psutil.Process, "environ", none_at_first)
    assert launcher.poll(job_id) is JobState.RUNNING
    looks.clear()
    launcher.cancel(job_id)
    monkeypatch.undo()
    assert not processes(job)


def processes(job: Job) -> list[psutil.Process]:
    return list(local._processes(job.token))


def waiting(folder: Path, *options: str) -> Job:
    """`tests.orchestrator.waiting_worker` is the real worker's first lines."""
    return Job("tests.orchestrator.waiting_worker", (str(folder), *options), folder)


def ranks_of(folder: Path) -> list[int]:
    wait_for(lambda: len(list(folder.glob("pid*"))) == 2)
    return [int(file.name.removeprefix("pid")) for file in folder.glob("pid*")]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["torchrun", "rank"])
def test_nothing_survives_when_torchrun_or_a_rank_is_killed(tmp_path: Path, victim: str):
    launcher, job = LocalLauncher(gpus=(), num_processes=2), waiting(tmp_path)
    job_id = launcher.submit(job)
    ranks = ranks_of(tmp_path)
    os.kill(int(job_id.split(":")[0]) if victim == "torchrun" else ranks[0], signal.SIGKILL)
    wait_for(lambda: launcher.poll(job_id) is JobState.ENDED)
    wait_for(lambda: not any(map(psutil.pid_exists, ranks)))
    assert launcher.poll(job_id) is JobState.ENDED
    assert not processes(job)


CONTROLLER = """
import sys, time
from pathlib import Path
from orchestrator.launcher import Job
from orchestrator.launchers.local import LocalLauncher

kind, folder = sys.argv[1:]
launcher = LocalLauncher(gpus=(), num_processes=2, on_controller_death=kind)
launcher.submit(Job("tests.orchestrator.waiting_worker", (folder, "stubborn"), Path(folder)))
time.sleep(600)
"""


@pytest.mark.slow
def test_jobs_of_a_killed_controller_go_on_and_can_be_found_or_end_even_if_they_are_stubborn(tmp_path: Path):
    folders = {kind: tmp_path / kind for kind in ("adopt", "stop")}
    controllers = []
    for kind, folder in folders.items():
        folder.mkdir()
        controllers.append(subprocess.Popen([sys.executable, "-c", CONTROLLER, kind, str(folder)]))
    ranks = {kind: ranks_of(folder) for kind, folder in folders.items()}
    for controller in controllers:
        controller.kill()
        controller.wait()
    wait_for(lambda: not processes(waiting(folders["stop"])))
    launcher, job = LocalLauncher(gpus=()), waiting(folders["adopt"])
    assert set(ranks["adopt"]) < {process.pid for process in processes(job)}
    found = launcher.find(job)
    assert found is not None
    assert launcher.poll(found) is JobState.RUNNING
    launcher.cancel(found)
    assert not processes(job)


def test_a_job_that_stops_with_its_controller_does_not_stop_with_the_thread_that_started_it(tmp_path: Path):
    launcher, job = ScriptLauncher(gpus=(), on_controller_death="stop"), waiting(tmp_path)

    def start() -> None:
        launcher.submit(job)
        wait_for(lambda: list(tmp_path.glob("pid*")))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    time.sleep(0.5)  # a killed job would be gone by now
    found = launcher.find(job)
    assert found is not None
    launcher.cancel(found)
    assert not processes(job)


def test_a_job_has_its_cores_for_itself(tmp_path: Path):
    core = min(os.sched_getaffinity(0))
    launcher, job = ScriptLauncher(gpus=(), cpus_per_trial=1), replace(waiting(tmp_path), devices=(core,))
    launcher.check()
    job_id = launcher.submit(job)
    wait_for(lambda: len(processes(job)) == 2)  # the job and its child
    assert [process.cpu_affinity() for process in processes(job)] == [[core]] * 2
    assert {process.environ()["OMP_NUM_THREADS"] for process in processes(job)} == {
        os.environ.get("OMP_NUM_THREADS", "1")
    }
    assert core not in (launcher.free_devices() or ())
    launcher.cancel(job_id)
    assert core in (LocalLauncher(cpus_per_trial=len(os.sched_getaffinity(0))).free_devices() or (core,))


def test_a_trial_waits_until_enough_cores_are_no_other_jobs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    launcher = LocalLauncher(cpus_per_trial=2)
    assert launcher.free_devices() == (0, 1)
    environment = {"TRIAL_TOKEN": "another study's", "TRIAL_CORES": "0,2"}
    with subprocess.Popen(["/bin/sleep", "600"], env=environment) as job:
        assert launcher.free_devices() == (1, 3)
        assert LocalLauncher(cpus_per_trial=3).free_devices() is None
        job.kill()
    assert launcher.free_devices() == (0, 1)


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


def test_devices_that_the_controller_may_not_use_are_given_to_no_job(memory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert LocalLauncher(gpus_per_trial=1).free_devices() == (2,)
    assert LocalLauncher(gpus=(0, 3), gpus_per_trial=1).free_devices() == (0,)
    with pytest.raises(LaunchError, match="got 3; expected at most"):
        LocalLauncher(gpus_per_trial=3).check()


def test_a_device_that_shares_the_machines_memory_is_none_of_those_with_memory_of_their_own(memory: Path):
    memory.write_text("0, 300, 16384\n1, [N/A], [N/A]\n")
    assert list(gpu_bytes()) == [0]


def test_two_studies_that_look_at_once_do_not_get_the_same_device(memory: Path, tmp_path: Path):
    memory.write_text("".join(f"{index}, 300, 16384\n" for index in range(40, 44)))
    (tmp_path / "behaviour.txt").write_text("hang")
    folders = [tmp_path / "trials" / name for name in "abcdef"]
    for folder in folders:
        folder.mkdir(parents=True)
    launcher = ScriptLauncher(gpus_per_trial=1)
    jobs = [Job("tests.orchestrator.fake_worker", (str(folder),), folder) for folder in folders]
    with ThreadPoolExecutor(len(jobs)) as threads:
        started = [job_id for job_id in threads.map(launcher.begin, jobs) if job_id]
    try:
        given = [psutil.Process(int(job_id.partition(":")[0])).environ()["CUDA_VISIBLE_DEVICES"] for job_id in started]
    finally:
        for job_id in started:
            launcher.cancel(job_id)
    assert sorted(given) == ["40", "41", "42", "43"]


def test_a_job_sees_the_devices_that_it_was_given(job: Job):
    environment = LocalLauncher(gpus=(0, 1, 2), gpus_per_trial=1)._environment(replace(job, devices=(2,)))
    assert environment["CUDA_VISIBLE_DEVICES"] == "2"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"gpus": (0, 1), "gpus_per_trial": 3}, "expected at most so many"),
        ({"gpus_per_trial": 1, "num_processes": 2}, "expected at most one a GPU"),
        ({"gpus_per_trial": 1, "cpus_per_trial": 1}, "expected one of them"),
    ],
)
def test_more_than_there_can_be_is_refused(options: dict[str, Any], problem: str):
    with pytest.raises(ValidationError, match=problem):
        LocalLauncher.model_validate(options)


def test_devices_that_are_not_there_are_refused(memory: Path):
    with pytest.raises(LaunchError, match=r"gpus_per_trial: got 5; expected at most as many as nvidia-smi lists .* 4"):
        LocalLauncher(gpus_per_trial=5).check()


def test_more_cores_than_there_are_are_refused():
    with pytest.raises(LaunchError, match="cpus_per_trial: got 100000; expected at most as many as this process may"):
        LocalLauncher(cpus_per_trial=100_000).check()
