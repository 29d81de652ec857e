"""kill -9 at random moments: real controllers, real SQLite, real jobs. The same command then finishes the study."""

# pyright: basic

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml

from orchestrator.launcher import Job
from orchestrator.spec import load_study
from orchestrator.storage import read_study
from tests.contracts.launcher import wait_for
from tests.integration.controller_process import ScriptLauncher
from tests.orchestrator.fake_worker import STEPS
from tests.orchestrator.studies import build_world
from trainers.rundir import RunDir, thaw

ROOT = Path(__file__).parents[2]
TRIALS = 4

pytestmark = pytest.mark.slow


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    path = build_world(tmp_path)
    tree = yaml.safe_load(path.read_text())
    tree["launcher"] = {"kind": "script", "gpus": [], "poll_seconds": 0.02}
    tree["limits"] = {"trials": TRIALS, "parallel": 2, "max_retries": 20}
    tree["sampler"] = {"kind": "random"}
    path.write_text(yaml.safe_dump(tree))
    return path


def start(
    study_file: Path, *arguments: str, command: str = "run", die_after: str | None = None
) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    fate = ["--die-after", die_after] if die_after else []
    words = [sys.executable, "-m", "tests.integration.controller_process", *fate, command, str(study_file), *arguments]
    return subprocess.Popen(words, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()


def runs_of(study_file: Path) -> list[RunDir]:
    return [RunDir(path) for path in sorted((study_file.parent / "runs" / "t" / "trials").glob("*"))]


def jobs(study_file: Path) -> list[psutil.Process]:
    """Live jobs of the study, whoever started them."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if "tests.orchestrator.fake_worker" in command and any(str(study_file.parent) in word for word in command):
            found.append(process)
    return found


def check(study_file: Path) -> None:
    """Exactly the wanted trials, each trained once from start to end, with the parameters that were asked for."""
    spec, _ = load_study(study_file, ["launcher={kind: local}"])
    trials = read_study(spec).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * TRIALS
    for trial, run in zip(trials, runs_of(study_file), strict=True):
        frozen = thaw(run.trial, trial.user_attrs["sha256"])
        assert frozen["train"]["optimizer"]["lr"] == trial.params["train.optimizer.lr"] == trial.value
        steps = [(event["step"], event["pid"]) for _, event in run.read_events()]
        by_job = Counter(pid for _, pid in steps)
        assert [step for step, _ in steps][-1] == STEPS
        repeated = len(steps) - len({step for step, _ in steps})
        assert repeated < len(by_job), "two jobs trained the same trial at once"
    assert not jobs(study_file)


@pytest.mark.parametrize("place", ["ask", "freeze", "submit", "tell"])
def test_a_controller_killed_between_two_steps_of_a_trial_goes_on(study_file: Path, place: str):
    once = ("--set", "limits.max_retries=0", "--set", "limits.parallel=1")
    doomed = start(study_file, *once, die_after=place)
    doomed.communicate(timeout=120)
    assert doomed.returncode == -signal.SIGKILL
    finish(start(study_file, *once))
    check(study_file)


def test_a_job_that_outlived_its_controller_is_adopted(study_file: Path):
    behaviour = study_file.parent / "runs" / "t" / "behaviour.txt"
    behaviour.parent.mkdir(parents=True)
    behaviour.write_text("hang")
    controller = start(study_file, "--set", "limits.parallel=1")
    wait_for(lambda: jobs(study_file))
    controller.kill()
    controller.communicate(timeout=120)
    (job,) = jobs(study_file)
    controller = start(study_file, "--set", "limits.parallel=1")
    time.sleep(5)  # long enough to have submitted another one
    assert [found.pid for found in jobs(study_file)] == [job.pid]
    behaviour.unlink()
    job.kill()
    finish(controller)
    check(study_file)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_controller_leaves_no_job_and_goes_on_later(study_file: Path, sign: signal.Signals):
    behaviour = study_file.parent / "runs" / "t" / "behaviour.txt"
    behaviour.parent.mkdir(parents=True)
    behaviour.write_text("hang")
    controller = start(study_file)
    wait_for(lambda: len(jobs(study_file)) == 2)
    controller.send_signal(sign)
    _, err = controller.communicate(timeout=120)
    assert controller.returncode == 130, err.decode()
    assert b"the same command goes on from here" in err
    assert not jobs(study_file)
    behaviour.unlink()
    finish(start(study_file, "--set", "limits.max_retries=0"))
    check(study_file)


def test_a_second_ctrl_c_leaves_no_job_either(study_file: Path):
    behaviour = study_file.parent / "runs" / "t" / "behaviour.txt"
    behaviour.parent.mkdir(parents=True)
    behaviour.write_text("stubborn")  # so that ending them takes a while
    controller = start(study_file)
    wait_for(lambda: len(list(behaviour.parent.glob("trials/*/pid"))) == 2)
    for _ in range(2):
        controller.send_signal(signal.SIGINT)
        time.sleep(0.5)
    controller.communicate(timeout=120)
    assert controller.returncode == 130
    assert not jobs(study_file)


def test_jobs_that_stop_with_a_killed_controller_are_not_lost(study_file: Path):
    stop = ("--set", "launcher.on_controller_death=stop", "--set", "limits.max_retries=0")
    behaviour = study_file.parent / "runs" / "t" / "behaviour.txt"
    behaviour.parent.mkdir(parents=True)
    behaviour.write_text("hang")
    controller = start(study_file, *stop)
    wait_for(lambda: len(jobs(study_file)) == 2)
    controller.kill()
    controller.communicate(timeout=120)
    wait_for(lambda: not jobs(study_file))
    behaviour.unlink()
    finish(start(study_file, *stop))
    check(study_file)


@pytest.mark.parametrize("controller_lives", [True, False])
def test_cancel_ends_jobs_and_controller_and_the_study_goes_on_later(study_file: Path, *, controller_lives: bool):
    behaviour = study_file.parent / "runs" / "t" / "behaviour.txt"
    behaviour.parent.mkdir(parents=True)
    behaviour.write_text("hang")
    controller = start(study_file)
    wait_for(lambda: len(jobs(study_file)) == 2)
    replay = behaviour.parent / "replays" / "0000-1"
    replay.mkdir(parents=True)
    ScriptLauncher(gpus=()).submit(Job("tests.orchestrator.fake_worker", (str(replay),), replay))
    wait_for(lambda: len(jobs(study_file)) == 3)
    if not controller_lives:
        controller.kill()
    finish(start(study_file, command="cancel"))
    controller.communicate(timeout=120)
    assert controller.returncode == (130 if controller_lives else -signal.SIGKILL)
    assert not jobs(study_file)
    behaviour.unlink()
    finish(start(study_file, "--set", "limits.max_retries=0"))
    check(study_file)


def test_a_second_controller_is_refused_while_the_first_works(study_file: Path):
    behaviour = study_file.parent / "runs" / "t" / "behaviour.txt"
    behaviour.parent.mkdir(parents=True)
    behaviour.write_text("hang")
    first = start(study_file)
    wait_for(lambda: jobs(study_file))
    second = start(study_file)
    _, err = second.communicate(timeout=120)
    assert second.returncode == 2
    assert f"process {first.pid} on" in err.decode().replace("\n", " ")
    first.terminate()
    first.communicate(timeout=120)
    assert not jobs(study_file)
