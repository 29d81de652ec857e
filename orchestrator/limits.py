"""The `limits:` section: when a study ends, and what it may use until then."""

from typing import Self

from pydantic import Field, FiniteFloat, PositiveFloat, model_validator

from trainers.config import Config


class Limits(Config):
    """Every limit holds for the whole study, however often it is stopped and run again, and may be changed then.

    Where one is reached no trial is started any more; those that run are finished.
    """

    trials: int = Field(default=20, ge=1)
    """Trials that count: those that were scored, pruned, or ran out of memory or finite numbers."""
    parallel: int = Field(default=1, ge=1)
    """Jobs at the same time. They share the launcher's devices."""
    max_retries: int = Field(default=2, ge=0)
    """Resubmissions of a trial whose job was lost; it resumes from its last checkpoint."""
    hours: PositiveFloat | None = None
    """Time during which the study is worked on; time between two runs does not count."""
    gpu_hours: PositiveFloat | None = None
    """Time of its jobs x processes of each; on a CPU too."""
    target: FiniteFloat | None = None
    """A value of the objective that is good enough."""
    patience: int | None = Field(default=None, ge=1)
    """Trials that count, one after another, of which none is better than all before (or comes onto the front)."""
    disk_gib: PositiveFloat | None = None
    """What checkpoints of ended trials may fill; those of the worst are deleted first. Adapters and pictures stay."""
    keep: int = Field(default=1, ge=1)
    """Best trials whose checkpoints are never deleted; with several values the front's are kept too."""
    pinned: tuple[int, ...] = ()
    """Numbers of other trials whose checkpoints are never deleted."""

    @property
    def judge_results(self) -> bool:
        """Whether what trials have found is looked at."""
        return not (self.target is None and self.patience is None and self.disk_gib is None)

    @model_validator(mode="after")
    def _what_is_kept_could_be_deleted(self) -> Self:
        if self.disk_gib is None and self.model_fields_set & {"keep", "pinned"} and (self.keep > 1 or self.pinned):
            raise ValueError("got keep or pinned without disk_gib; expected all, because nothing is deleted without it")
        return self
