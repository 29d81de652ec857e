"""One trial's training, from its configuration to an adapter on disk."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainers.loop import Watch, fit
from trainers.memory import peak_bytes
from trainers.method import Method, MethodConfig
from trainers.rundir import RunDir
from trainers.version import Lineage

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class TrainResult:
    """A trained method and what it cost."""

    method: Method
    """Ready to sample from: its backbone carries the trained adapters, in evaluation mode."""
    seconds: dict[str, float]
    """Wall-clock seconds of the stages: load, train."""
    peak_bytes: int


def build_accelerator(config: MethodConfig) -> "Accelerator":
    """Device, precision and peers for training `config`; once per process."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    # Frozen networks are alike everywhere already, and nothing that is trained has buffers.
    parallel = DistributedDataParallelKwargs(broadcast_buffers=False)
    precision = "no" if config.precision == "fp32" else config.precision
    return Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[parallel])


def train(
    config: MethodConfig,
    run: RunDir,
    seed: int,
    cache: Path | None,
    accelerator: "Accelerator",
    *,
    watch: Watch | None = None,
) -> TrainResult:
    """Train from the run's newest checkpoint, or from the start, and export the adapter.

    Args:
        config: What to train, and how.
        run: Gets events, checkpoints and the adapter.
        seed: Determines initial weights, order, noise, timesteps and dropout.
        cache: Folder of frozen work shared by all trials; None computes everything anew.
        accelerator: From `build_accelerator`.
        watch: Sees the method while it is trained.

    Raises:
        ModelError, DataError, ConfigError, CheckpointError, NonFiniteError: See `trainers.errors`.
    """
    main = accelerator.is_main_process
    seconds: dict[str, float] = {}
    with _Stage("load", run if main else None, seconds):
        method = config.build(seed, cache, accelerator)
    if main:
        unreadable = [str(path) for path in method.unreadable]
        run.append("data", train=len(method.examples), held_out=len(method.held_out), unreadable=unreadable)
    # Also pictures of a model in training may be led away from its base.
    method.remember(Lineage(run.adapter, config.whole_networks()))
    with _Stage("train", run if main else None, seconds):
        fit(method, config, run, accelerator, watch)
        if main:
            method.export(run.adapter)
        accelerator.wait_for_everyone()
    return TrainResult(method, seconds, peak_bytes(accelerator.device))


def restore(config: MethodConfig, run: RunDir, seed: int, cache: Path | None, accelerator: "Accelerator") -> Method:
    """The method with the weights of the run's newest checkpoint, as they would be judged; nothing is trained.

    Args:
        config: As the run trains.
        run: Has checkpoints; it may still be running.
        seed: As the run's.
        cache: As for `train`.
        accelerator: From `build_accelerator`.

    Raises:
        ModelError, DataError, CheckpointError: See `trainers.errors`.
    """
    method = config.build(seed, cache, accelerator)
    fit(method, config.model_copy(update={"steps": 0}), run, accelerator)  # which leaves no step to take
    return method


class _Stage:
    """Reports when a stage begins and ends, and takes its time."""

    def __init__(self, name: str, run: RunDir | None, seconds: dict[str, float]) -> None:
        self._name, self._run, self._seconds = name, run, seconds

    def __enter__(self) -> None:
        self._clock = time.monotonic()
        if self._run:
            self._run.append("stage", stage=self._name, state="start")

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = time.monotonic() - self._clock
        if self._run:
            self._run.append("stage", stage=self._name, state="end")
