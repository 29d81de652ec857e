"""A whole study through a real Slurm: the controller and a job are killed, and the same command finishes it."""

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.contracts.launcher import wait_for
from tests.integration.test_resume import check, finish, runs_of, start
from tests.orchestrator.slurm import running_cluster
from tests.orchestrator.studies import build_world

pytestmark = pytest.mark.slow


def test_a_study_through_slurm_survives_its_controller_and_its_jobs(tmp_path: Path) -> None:
    study_file = build_world(tmp_path)
    tree = yaml.safe_load(study_file.read_text())
    tree["launcher"] = {"kind": "slurm", "start": "srun", "poll_seconds": 0.2}
    tree["limits"] = {"trials": 4, "parallel": 2, "max_retries": 1}
    tree["sampler"] = {"kind": "random"}
    study_file.write_text(yaml.safe_dump(tree))
    behaviour = tmp_path / "runs" / "t" / "behaviour.txt"
    behaviour.parent.mkdir(parents=True)
    behaviour.write_text("slow")
    with running_cluster():
        first = start(study_file)
        wait_for(lambda: sum(run.events.exists() for run in runs_of(study_file)) == 2)
        first.kill()
        first.communicate(timeout=60)
        behaviour.unlink()
        listed = ["squeue", "--me", "--noheader", "--states=running", "--format=%i"]
        job, *others = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split()
        subprocess.run(["scancel", "--signal=KILL", job], check=True)
        finish(start(study_file))
    assert len(others) == 1  # the two jobs outlived their controller; the other one was adopted
    check(study_file)
