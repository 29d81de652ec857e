"""A whole study through a real Ray: the controller and a job are killed, and the same command finishes it."""

# pyright: basic

from pathlib import Path

import pytest
import yaml

from tests.contracts.launcher import wait_for
from tests.integration.test_resume import check, finish, jobs, runs_of, start
from tests.orchestrator.ray_cluster import running_cluster
from tests.orchestrator.studies import build_world

pytestmark = pytest.mark.cluster


def test_a_study_through_ray_survives_its_controller_and_its_jobs(tmp_path: Path) -> None:
    study_file = build_world(tmp_path)
    behaviour = tmp_path / "runs" / "t" / "behaviour.txt"
    behaviour.parent.mkdir(parents=True)
    behaviour.write_text("slow")
    with running_cluster() as address:
        tree = yaml.safe_load(study_file.read_text())
        tree["launcher"] = {"kind": "ray", "address": address, "cpus": 2, "poll_seconds": 0.2}
        tree["limits"] = {"trials": 4, "parallel": 2, "max_retries": 1}
        tree["sampler"] = {"kind": "random"}
        study_file.write_text(yaml.safe_dump(tree))
        first = start(study_file)
        wait_for(lambda: sum(run.events.exists() for run in runs_of(study_file)) == 2)
        first.kill()
        first.communicate(timeout=60)
        behaviour.unlink()
        ranks = [job for job in jobs(study_file) if "torch.distributed.run" not in job.cmdline()]
        assert len(ranks) == 2  # they outlived their controller
        ranks[0].kill()
        finish(start(study_file))
    check(study_file)
