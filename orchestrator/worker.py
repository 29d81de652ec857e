"""Inside a job, on every rank: a frozen trial becomes scores, or the reason why not.

    torchrun --standalone --nproc-per-node N -m orchestrator.worker RUN_DIR --sha256 HASH --cache FOLDER
    srun --ntasks N python -m orchestrator.worker RUN_DIR --sha256 HASH --cache FOLDER

The exit code means nothing. `result.json` is success, `error.json` a failure that a retry would repeat, and neither
means that the job was lost and should be submitted again.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import fcntl
import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import psutil

from orchestrator.lead import die_with_parent
from orchestrator.provenance import versions
from orchestrator.ranks import name_ranks
from orchestrator.spec import TrialSpec
from trainers.config import Config
from trainers.errors import CheckpointError, ConfigError, DataError, ModelError, NonFiniteError, StoppedError
from trainers.rundir import RunDir, RunError, RunResult, thaw

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from accelerate import Accelerator

    from evaluation.config import EvaluateConfig
    from evaluation.metric import Scorer
    from evaluation.report import Reporter
    from trainers.backbone import Model
    from trainers.batch import Example
    from trainers.rundir import Score

log = logging.getLogger(__name__)

_NOT_OURS = 3
"""Exit code for a run directory that another job works on, or that has its result."""
_STOPPED = 4
"""Exit code for training that was told to end: neither a result nor an error, so it is started again."""
_RESERVE_BYTES = 2**16
"""Kept free on the disk for saying that it is full."""
_OURS = ("orchestrator", "trainers", "evaluation", "__main__")
"""Whose sentences `log.txt` holds; warnings are held whoever gives them."""

Reason = Literal["oom", "nan", "data", "config", "model", "checkpoint", "disk", "crash"]

_REASONS: tuple[tuple[type[Exception], Reason], ...] = (
    (NonFiniteError, "nan"),
    (DataError, "data"),
    (ConfigError, "config"),
    (ModelError, "model"),
    (CheckpointError, "checkpoint"),
    (MemoryError, "oom"),
)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
_DISK_FULL = ("no space left on device", "disk quota exceeded", "code: 28")
_PEER_IS_GONE = ("gloo/transport", "connection closed by peer", "connection reset by peer", "broken pipe", "nccl")


@dataclass(frozen=True)
class Subject:
    """What is judged."""

    model: Model
    """With the trained adapter active."""
    held_out: Sequence[Example]
    """Real pictures that nothing was trained on."""


class _RankError(Config):
    """A rank's own failure; the first in time is the job's."""

    time: float
    """Seconds since 1970."""
    error: RunError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank of one trial."""
    parser = argparse.ArgumentParser(prog="orchestrator.worker", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--sha256", required=True, help="hash that trial.yaml must have")
    parser.add_argument("--cache", required=True, type=Path, help="folder of frozen work that studies share")
    parser.add_argument("--trained", type=Path, help="folder of trainings that trials share; else each trains")
    parser.add_argument("--untrained", action="store_true", help="train nothing: score the model as it is")
    options = parser.parse_args(argv)
    die_with_parent(os.getppid())  # of torchrun, or it would keep the device for ever
    name_ranks(os.environ)
    run, rank = RunDir(options.run_dir), int(os.environ.get("RANK", "0"))
    lock = _acquire(run) if rank == 0 else None
    if rank == 0 and (lock is None or run.result.exists() or run.error.exists()):
        return _NOT_OURS
    _rank_error_file(run, rank).unlink(missing_ok=True)
    _reserve(run, rank).write_bytes(b"\0" * _RESERVE_BYTES)
    _start_log(run, rank)
    try:
        if options.untrained:
            _measure(run, options.sha256, options.cache)
        else:
            _work(run, options.sha256, options.cache, options.trained)
    except StoppedError as stopped:
        log.info("rank %d: %s", rank, stopped)
        return _STOPPED
    except Exception as error:  # noqa: BLE001  the edge of the process: whatever happened is written down
        _record(run, rank, error)
        return 1
    finally:
        _reserve(run, rank).unlink(missing_ok=True)
    return 0


def _work(run: RunDir, sha256: str, cache: Path, trained: Path | None) -> None:
    """Train, sample, score and write the result."""
    spec = TrialSpec.model_validate(thaw(run.trial, sha256))
    from trainers.train import build_accelerator, train

    accelerator = build_accelerator(spec.train)
    seconds = _start_seconds()
    watch = None
    if trained or spec.adapter:
        subject = _finished(spec, run, cache, trained, accelerator)
    else:
        watch = _watch(spec, run, cache, accelerator) if spec.report else None
        method = train(spec.train, run, spec.seed, cache, accelerator, watch=watch).method
        subject = Subject(method.model, method.held_out)
    scorers = _scorers(spec, cache, subject, watch)
    scores = _evaluate(spec.evaluate, run, scorers, subject, accelerator)
    _finish(run, scores, seconds, accelerator)


def _measure(run: RunDir, sha256: str, cache: Path) -> None:
    """Sample and score the untrained model and write the result."""
    spec = TrialSpec.model_validate(thaw(run.trial, sha256))
    from trainers.train import build_accelerator

    accelerator = build_accelerator(spec.train)
    seconds = _start_seconds()
    model = spec.train.load_trained(None, accelerator)
    held_out = spec.train.data.split().held_out if spec.evaluate.needs_references else ()
    subject = Subject(model, held_out)
    scores = _evaluate(spec.evaluate, run, _scorers(spec, cache, subject, None), subject, accelerator)
    _finish(run, scores, seconds, accelerator)


def _start_seconds() -> dict[str, float]:
    return {"start": time.time() - psutil.Process(os.getppid()).create_time()}


def _finish(run: RunDir, scores: dict[str, Score], seconds: dict[str, float], accelerator: Accelerator) -> None:
    """Write the result, on the first rank."""
    from trainers.memory import peak_bytes

    if accelerator.is_main_process:
        result = RunResult(
            scores=scores,
            seconds=seconds | stage_seconds(run),
            peak_bytes=peak_bytes(accelerator.device),
            versions=versions(),
        )
        run.write(run.result, result)
    accelerator.end_training()


def _finished(spec: TrialSpec, run: RunDir, cache: Path, trained: Path | None, accelerator: Accelerator) -> Subject:
    """What another trial, or somebody else, has trained, or what this one trains for all."""
    from orchestrator.trained import place_adapter, train_once

    folder = spec.adapter
    if folder is None:
        assert trained is not None
        folder = train_once(spec, run, trained, cache, accelerator)
    if accelerator.is_main_process:
        run.append("stage", stage="open", state="start")
        place_adapter(folder, run.adapter)
    # Whoever trained reads it again, too: what one trial is judged by, all are.
    model = spec.train.load_trained(folder, accelerator)
    held_out = spec.train.data.split().held_out if spec.evaluate.needs_references else ()
    if accelerator.is_main_process:
        run.append("stage", stage="open", state="end")
    return Subject(model, held_out)


def _watch(spec: TrialSpec, run: RunDir, cache: Path, accelerator: Accelerator) -> Reporter:
    """What scores the small panel while the trial trains."""
    from accelerate.utils import gather_object

    from evaluation.evaluate import Ranks
    from evaluation.report import Reporter

    assert spec.report is not None
    ranks = Ranks(accelerator.process_index, accelerator.num_processes, gather_object)
    return Reporter(spec.report, spec.evaluate, run, cache, ranks, accelerator.autocast)


def _scorers(spec: TrialSpec, cache: Path, subject: Subject, watch: Reporter | None) -> Mapping[str, Scorer]:
    """What judges the trial; models that scored its reports are not opened again."""
    from evaluation.evaluate import open_scorers

    if watch:
        return watch.scorers(subject.held_out, subject.model.device)
    return open_scorers(spec.evaluate, subject.held_out, subject.model.device, cache)


def _evaluate(
    config: EvaluateConfig, run: RunDir, scorers: Mapping[str, Scorer], subject: Subject, accelerator: Accelerator
) -> dict[str, Score]:
    """Score what was trained, on all ranks together."""
    from accelerate.utils import gather_object

    from evaluation.evaluate import Ranks, evaluate

    ranks = Ranks(accelerator.process_index, accelerator.num_processes, gather_object)
    with accelerator.autocast():
        return evaluate(subject.model, config, scorers, run, ranks)


def stage_seconds(run: RunDir) -> dict[str, float]:
    """Wall-clock seconds of the stages that were completed, over all attempts."""
    seconds: dict[str, float] = {}
    started: dict[str, float] = {}
    for _, event in run.read_events():
        if event["event"] == "stage" and event["state"] == "start":
            started[event["stage"]] = event["time"]
        elif event["event"] == "stage" and event["stage"] in started:
            passed = event["time"] - started.pop(event["stage"])
            seconds[event["stage"]] = seconds.get(event["stage"], 0.0) + passed
    return seconds


def _record(run: RunDir, rank: int, error: Exception) -> None:
    """Write down why this rank failed, and which rank failed first.

    Nothing is written if all that is known is that another rank is gone: either that rank wrote the cause, or it was
    killed, and then the job is lost and not wrong.
    """
    reason = _reason(error)
    log.error("rank %d failed (%s)", rank, reason or "another rank is gone", exc_info=error)
    if reason is None:
        return
    _reserve(run, rank).unlink(missing_ok=True)  # on a full disk, this is the room for what follows
    text = " ".join(str(error).split())
    message = f"{type(error).__name__}: {text}" if reason in {"crash", "oom", "disk"} else text
    failure = RunError(reason=reason, message=message, step=_last_step(run), peak_bytes=_peak_bytes())
    own = _RankError(time=time.time(), error=failure)
    run.write(_rank_error_file(run, rank), own)
    files = run.path.glob("logs/rank*.error.json")
    everyone = [_RankError.model_validate_json(file.read_text(encoding="utf-8")) for file in files]
    run.write(run.error, min(everyone, key=lambda known: known.time).error)


def _reason(error: Exception) -> Reason | None:
    """Why a rank failed; None if only because another one did."""
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    text = str(error).lower()
    if any(words in text for words in _OUT_OF_MEMORY):
        return "oom"
    if any(words in text for words in _DISK_FULL) or (
        isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
    ):
        return "disk"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and any(words in text for words in _PEER_IS_GONE):
        return None
    return "crash"


def _peak_bytes() -> int | None:
    if "torch" not in sys.modules:
        return None
    import torch

    from trainers.memory import peak_bytes

    return peak_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _last_step(run: RunDir) -> int | None:
    steps = [event["step"] for _, event in run.read_events() if event["event"] == "train"]
    return steps[-1] if steps else None


def _acquire(run: RunDir) -> TextIO | None:
    """The run's lock, held as long as the file is open; None if another job has it."""
    file = (run.path / "lock").open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _start_log(run: RunDir, rank: int) -> None:
    """Everything a rank prints goes to `logs/rank*.txt`; what it logs also goes to `log.txt`, which torchrun holds."""
    path = run.path / "logs" / f"rank{rank}.txt"
    path.parent.mkdir(exist_ok=True)
    shared = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", buffering=1)
    own = path.open("a", encoding="utf-8", buffering=1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(own.fileno(), stream.fileno())
    for_all, for_one = logging.StreamHandler(shared), logging.StreamHandler(own)
    for_all.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for_all.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith(_OURS))
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s",
        handlers=[for_all, for_one],
    )
    logging.captureWarnings(capture=True)
    faulthandler.enable(shared)


def _rank_error_file(run: RunDir, rank: int) -> Path:
    return run.path / "logs" / f"rank{rank}.error.json"


def _reserve(run: RunDir, rank: int) -> Path:
    return run.path / f".reserve{rank}"


if __name__ == "__main__":
    sys.exit(main())
