"""A whole study through SageMaker's stand-in: the controller and a job are killed, and the same command finishes it."""

# pyright: basic

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from orchestrator import inside
from orchestrator.launchers.sagemaker import SageMakerLauncher
from orchestrator.ledger import read_trials
from orchestrator.spec import load_study
from tests.contracts.launcher import wait_for
from tests.integration import controller_process
from tests.integration.test_resume import ROOT, check, finish, runs_of
from tests.orchestrator.sagemaker import LAUNCHER, running_s3, stand_in
from tests.orchestrator.studies import build_world

pytestmark = pytest.mark.cluster


def start(study_file: Path, containers: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "tests.integration.test_sagemaker", str(containers), "run", str(study_file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_a_study_through_sagemaker_survives_its_controller_and_its_jobs(tmp_path: Path) -> None:
    study_file, containers = build_world(tmp_path), tmp_path / "containers"
    containers.mkdir()
    tree = yaml.safe_load(study_file.read_text())
    tree["launcher"] = LAUNCHER
    tree["limits"] = {"trials": 4, "parallel": 2, "max_retries": 1}
    tree["sampler"] = {"kind": "random"}
    study_file.write_text(yaml.safe_dump(tree))
    (containers / "behaviour.txt").write_text("slow")
    with running_s3():
        first = start(study_file, containers)
        wait_for(lambda: sum(run.events.exists() for run in runs_of(study_file)) == 2)
        first.kill()
        first.communicate(timeout=60)
        (containers / "behaviour.txt").unlink()
        pids = [int(file.read_text()) for file in containers.glob("*/pid.txt")]
        assert len(pids) == 2
        for process in [psutil.Process(pids[0]), *psutil.Process(pids[0]).children(recursive=True)]:
            process.send_signal(signal.SIGKILL)
        finish(start(study_file, containers))
    check(study_file)


def test_a_whole_study_runs_inside_one_job_and_goes_on_after_it_was_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study_file, containers = build_world(tmp_path), tmp_path / "containers"
    containers.mkdir()
    tree = yaml.safe_load(study_file.read_text())
    study_file.write_text(yaml.safe_dump({**tree, "launcher": LAUNCHER, "limits": {"trials": 4, "parallel": 2}}))
    monkeypatch.setattr(inside, "MODULE", controller_process.__name__)
    monkeypatch.setattr(SageMakerLauncher, "_check_paths", lambda self, job: None)
    monkeypatch.setattr(SageMakerLauncher, "_client", SageMakerLauncher._client)  # is put back afterwards
    sets = ["launcher={kind: script, gpus: [], poll_seconds: 0.05}"]
    with running_s3():
        stand_in(containers)
        spec, _ = load_study(study_file)
        assert inside.advance(spec, sets) == "submitted"
        within = inside.run_dir(spec).path / "runs" / "t"
        wait_for(lambda: inside.advance(spec, sets) == "running" and list(within.glob("trials/*/result.json")))
        inside.cancel(spec)
        num_done = len(list(within.glob("trials/*/result.json")))
        assert inside.advance(spec, sets) == "submitted"
        wait_for(lambda: inside.advance(spec, sets) == "finished")
    inner, _ = load_study(inside.run_dir(spec).path / inside.FILE)
    trials = read_trials(inner)
    assert [trial.state for trial in trials] == ["COMPLETE"] * 4
    assert num_done < 4


if __name__ == "__main__":
    from orchestrator import controller
    from orchestrator.__main__ import main

    stand_in(Path(sys.argv[1]))
    SageMakerLauncher._check_paths = lambda self, job: None  # the stand-in's containers see this machine's files
    controller.WORKER = "tests.orchestrator.fake_worker"
    sys.exit(main(sys.argv[2:]))
