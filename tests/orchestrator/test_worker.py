# pyright: basic
import errno
import fcntl
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from orchestrator import worker
from orchestrator.spec import load_study
from tests.orchestrator.studies import score
from trainers.errors import CheckpointError, ConfigError, DataError, ModelError, NonFiniteError
from trainers.prompt import Sample
from trainers.rundir import RunDir, RunError, RunResult, freeze

ROOT = Path(__file__).parents[2]


def work(run: RunDir, *failures: str, rank: int = 0, world: int = 1) -> int:
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / "failure.txt").write_text("\n".join(failures))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": str(world)}
    command = [
        sys.executable,
        "-m",
        "tests.orchestrator.failing_worker",
        str(run.path),
        "--sha256",
        "x",
        "--cache",
        "/c",
    ]
    with run.log.open("a") as log:
        return subprocess.run(command, env=environment, cwd=ROOT, stdout=log, stderr=log, check=False).returncode


def error_of(run: RunDir) -> RunError:
    return RunError.model_validate_json(run.error.read_text())


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "0000")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NonFiniteError("x"), "nan"),
        (DataError("x"), "data"),
        (ConfigError("x"), "config"),
        (ModelError("x"), "model"),
        (CheckpointError("x"), "checkpoint"),
        (MemoryError(), "oom"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "oom"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), "oom"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (OSError(errno.EDQUOT, "quota"), "disk"),
        (RuntimeError("Error while serializing: IoError(Os { code: 28, kind: StorageFull })"), "disk"),
        (OSError(errno.ENOENT, "gone"), "crash"),
        (KeyError("x"), "crash"),
        (ConnectionError("Connection reset by peer"), "crash"),
    ],
)
def test_every_failure_has_its_reason(error: Exception, reason: str):
    assert worker._reason(error) == reason


def test_a_rank_that_only_lost_its_peer_knows_no_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert worker._reason(RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer")) is None
    assert worker._reason(RuntimeError("CUDA out of memory")) == "oom"


def test_a_failure_is_written_down_with_its_last_step_and_logged_with_its_traceback(run: RunDir):
    code = work(run, '0 run.append("train", step=7, loss=1.0); {}["missing"]')
    assert code == 1
    error = error_of(run)
    assert (error.reason, error.message, error.step) == ("crash", "KeyError: 'missing'", 7)
    assert "Traceback" in run.log.read_text()
    own = (run.path / "logs" / "rank0.txt").read_text()
    assert "Traceback" in own
    assert "working with x" in own
    assert "working with x" not in run.log.read_text()
    assert not list(run.path.glob(".reserve*"))


def test_the_rank_that_failed_first_is_the_cause(run: RunDir):
    late = '0 time.sleep(0.01); raise RuntimeError("a consequence")'
    assert work(run, '1 raise DataError("picture 3 is broken")', rank=1, world=2) == 1
    assert error_of(run).message == "picture 3 is broken"
    assert work(run, '1 raise DataError("picture 3 is broken")', late, rank=1, world=2) == 1
    run.error.unlink()
    assert work(run, late, rank=0, world=2) == 1
    assert error_of(run) == RunError(reason="data", message="picture 3 is broken")


def test_a_job_whose_rank_was_killed_is_lost_and_not_wrong(run: RunDir):
    assert work(run, '0 raise RuntimeError("gloo/transport: Connection closed by peer")', world=2) == 1
    assert not run.error.exists()


def test_a_run_that_another_job_works_on_is_left_alone(run: RunDir):
    run.path.mkdir()
    with (run.path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert work(run, '0 raise DataError("it started")') == worker._NOT_OURS
    assert not run.error.exists()


def test_a_run_that_has_its_result_is_left_alone(run: RunDir):
    run.path.mkdir()
    score(run)
    assert work(run, '0 raise DataError("it started")') == worker._NOT_OURS
    assert not run.error.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_still_has_room_for_the_reason(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False, capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this machine does not allow mounting")
    try:
        run = RunDir(disk / "0000")
        assert work(run, '0 (run.path / "fill").write_bytes(bytes(2**21))') == 1
        assert error_of(run).reason == "disk"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_scoring_models_are_opened_once_for_a_trials_reports_and_its_end(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import torch

    from evaluation import encoders

    cpu = torch.device("cpu")
    method = SimpleNamespace(
        model=SimpleNamespace(device=cpu),
        backbone=SimpleNamespace(device=cpu),
        held_out=(ROOT / "studies" / "data" / "zog" / "00.png",),
    )
    alone = {"process_index": 0, "num_processes": 1, "is_main_process": True, "device": cpu}
    accelerator = SimpleNamespace(**alone, autocast=nullcontext, end_training=lambda: None)
    opened: list[Path] = []

    class Counted(encoders.OpenClipEncoder):
        def __init__(self, folder: Any, *others: Any) -> None:
            opened.append(folder.path)
            super().__init__(folder, *others)

    def train(*_: Any, watch: Any) -> SimpleNamespace:
        watch.look(method, 1)
        watch.look(method, 2)
        return SimpleNamespace(method=method, peak_bytes=0)

    def generate(_: Any, requests: Any, __: Any) -> Any:
        return (Sample(one.prompt, one.seed, Image.new("RGB", (64, 64), (one.seed, 0, 0))) for one in requests)

    monkeypatch.setattr(encoders, "OpenClipEncoder", Counted)
    monkeypatch.setattr("trainers.train.build_accelerator", lambda _: accelerator)
    monkeypatch.setattr("trainers.train.train", train)
    monkeypatch.setattr("trainers.sampling.generate", generate)
    monkeypatch.setattr("evaluation.evaluate.generate", generate)
    study, _ = load_study(ROOT / "studies" / "hpo.yaml", ["trial.report={every: 1, prompts: 1, seeds: 2}"])
    text, sha256 = freeze(study.trial.model_dump(mode="json"))
    run.path.mkdir()
    run.trial.write_text(text)
    worker._work(run, sha256, tmp_path / "cache", None)
    assert [path.name for path in opened] == ["clip"]
    assert [event["event"] for _, event in run.read_events()][:2] == ["report", "report"]
    assert set(RunResult.model_validate_json(run.result.read_text()).scores) == set(study.trial.evaluate.metrics)
