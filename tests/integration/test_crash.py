"""Random schedules of faults on real processes lose nothing: eight of those that `make crash` runs a hundred of."""

# pyright: basic

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_study_survives_a_random_schedule_of_faults(tmp_path: Path, seed: int):
    command = [sys.executable, "-m", "tests.integration.crash", "--seeds", str(seed), str(seed + 1)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*command, "--reports", str(tmp_path / "reports")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    (report,) = map(json.loads, (tmp_path / "reports").read_text().splitlines())
    assert report["problems"] == [], (report["faults"], done.stderr)
    assert report["jobs"] >= 4
