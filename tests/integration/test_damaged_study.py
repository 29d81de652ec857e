"""Every file of a study, damaged in every way a disk can: commands go on, or end in one line that names the file."""

# pyright: basic

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestrator import controller
from orchestrator.__main__ import main
from orchestrator.spec import load_study
from orchestrator.storage import read_study
from tests.integration.controller_process import ScriptLauncher  # noqa: F401  a kind of launcher
from tests.orchestrator.studies import build_world

TRIALS = 3
FILES = (
    *("study.db", "usage.json", "winner.json", "best_params.yaml", "study.yaml", "lock"),
    *(f"trials/0001/{name}" for name in ("trial.yaml", "result.json", "events.jsonl", "log.txt")),
)
DAMAGES = {
    "missing": None,
    "empty": lambda _: b"",
    "cut in half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "bytes of another file": lambda _: b"\xff\x00<html>404 Not Found</html>" * 20,
    "a hole in the middle": lambda content: content[: len(content) // 3] + b"\xff" * (len(content) // 3) + content[-9:],
    "JSON of another shape": lambda _: b"[]",
}
COMMANDS = (("status",), ("best",), ("plan",), ("cancel",), ("run", "--trials", str(TRIALS + 1)))
EVERY = 4
"""One case in so many is tried; all of them take four minutes."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that has ended."""
    study = build_world(tmp_path_factory.mktemp("world"))
    tree = yaml.safe_load(study.read_text())
    tree["launcher"] = {"kind": "script", "gpus": [], "poll_seconds": 0.02}
    tree["limits"] = {"trials": TRIALS}
    tree["sampler"] = {"kind": "random"}
    study.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "tests.integration.controller_process", "run", str(study)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    return study.parent


def values(study: Path) -> list[float | None]:
    return [trial.value for trial in read_study(load_study(study)[0]).trials[:TRIALS]]


@pytest.mark.parametrize("case", list(itertools.product(FILES, DAMAGES, COMMANDS))[::EVERY], ids=str)
def test_a_damaged_file_of_a_study_is_named_in_one_line_or_changes_nothing(
    finished: Path, tmp_path: Path, monkeypatch, capfd, case: tuple[str, str, tuple[str, ...]]
):
    file, damage, command = case
    before = values(finished / "study.yaml")
    whole = tmp_path / "whole"
    shutil.copytree(finished / "runs", whole)
    path = finished / "runs" / "t" / file
    content = path.read_bytes()
    path.unlink()
    if change := DAMAGES[damage]:
        path.write_bytes(change(content))
    monkeypatch.setattr(controller, "WORKER", "tests.orchestrator.fake_worker")
    capfd.readouterr()
    try:
        status = main([command[0], str(finished / "study.yaml"), *command[1:]])
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert status in {0, 2}
        assert len(said) == (status == 2)
        if status == 2:
            assert str(path.parent) in said[0]
        elif file != "study.db":  # without it nothing was run yet
            assert values(finished / "study.yaml") == before
    finally:
        shutil.rmtree(finished / "runs")
        shutil.copytree(whole, finished / "runs")
