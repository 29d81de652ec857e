"""What pictures are drawn with: a trial's adapter or what it has so far, another adapter, or the untrained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.sources import read_trial
from orchestrator.spec import load_study
from trainers.errors import ConfigError
from trainers.rundir import RunDir

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from accelerate import Accelerator

    from orchestrator.spec import TrialSpec
    from trainers.backbone import Model
    from trainers.prompt import Prompt


@dataclass(frozen=True)
class Origin:
    """A model that can be drawn with."""

    trial: TrialSpec
    """Method, model, and how pictures are drawn."""
    adapter: Path | None = None
    """What was trained; None is the model before training, unless there is a checkpoint."""
    checkpoint: RunDir | None = None
    """A run that has nothing but checkpoints so far."""

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Find out, without torch, whether everything is there and fits, and the prompts can be drawn.

        Raises:
            ModelError: The model is incomplete, or the adapter is of another one.
            ConfigError: Guidance asks for what checkpoints do not have; or as `check_prompts`.
            DataError: As `check_prompts`.
        """
        train, evaluate = self.trial.train, self.trial.evaluate
        train.backbone.check()
        evaluate.check_model(train.backbone)
        train.check_prompts(prompts, evaluate.resolution)
        if self.adapter is not None:
            train.check_finished(self.adapter, weak=evaluate.guidance.needs_weak, any_size=True)
        if self.checkpoint is not None and evaluate.guidance.needs_weak:
            raise ConfigError(
                f"{self.checkpoint.path}: guidance leads away from a weak version, which a checkpoint does not have; "
                "set evaluate.guidance.kind=cfg, or wait for the end of training"
            )

    def load(self, accelerator: Accelerator) -> tuple[Model, str]:
        """The model, ready to draw with, and what it is in words.

        Raises:
            ModelError: Nothing of this method is in the adapter's folder.
            CheckpointError: There are checkpoints and none is intact.
        """
        train = self.trial.train
        if self.checkpoint is None:
            what = f"the adapter in {self.adapter}" if self.adapter else "the untrained model"
            return train.load_trained(self.adapter, accelerator), what
        from trainers.train import restore

        cache = self.checkpoint.path.parents[2] / "cache"
        method = restore(train, self.checkpoint, self.trial.seed, cache if cache.is_dir() else None, accelerator)
        return method.model, f"the newest checkpoint of {self.checkpoint.path}"


def find_origin(source: Path, sets: Sequence[str], adapter: Path | None = None, *, base: bool = False) -> Origin:
    """What `source` is drawn with.

    Args:
        source: A trial's directory, or a study file, whose model is untrained.
        sets: Changes `dotted.path=value` of the trial; its file stays as it is.
        adapter: An adapter's folder to take instead of the trial's.
        base: Whether to draw with the untrained model.

    Raises:
        ConfigError: It is neither a trial nor a study, or has nothing to draw with.
    """
    folder = source.resolve()
    if (trial := read_trial(folder, sets)) is None:
        if folder.is_dir():
            raise ConfigError(f"{source}: got no trial.yaml in this folder; expected a trial's directory or a study")
        study, _ = load_study(source, [f"trial.{change}" for change in sets])
        return Origin(study.trial, adapter and adapter.resolve())
    if adapter is not None or base:
        return Origin(trial, adapter and adapter.resolve())
    return _of_run(trial, RunDir(folder))


def _of_run(trial: TrialSpec, run: RunDir) -> Origin:
    """The adapter; while training goes on, the newest snapshot, or else the newest checkpoint."""
    if run.adapter.is_dir() and [path.name for path in run.adapter.iterdir()] != ["weak"]:  # which is there before it
        return Origin(trial, run.adapter)
    if snapshots := sorted((run.path / "snapshots").glob("step-*")):
        return Origin(trial, snapshots[-1])
    if any(run.checkpoints.glob("step-*.pt")):
        return Origin(trial, checkpoint=run)
    raise ConfigError(
        f"{run.path}: got neither an adapter nor a checkpoint; expected one: wait for the first checkpoint, or draw "
        "with the untrained model (`--base`)"
    )
