"""Weights & Biases: a run for each trial, written to disk (`wandb sync` uploads it) or sent at once."""

import logging
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import PrivateAttr, model_validator
from typing_extensions import override

from orchestrator.progress import Progress, outcome, read_news
from orchestrator.tracker import FINAL_STATES, StudyView, Tracker, TrialView
from trainers.errors import ConfigError, TrackerError
from trainers.rundir import thaw, write_atomically

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

_COMPLETE = "complete.txt"
"""In a trial's folder: all of it was written, for the trial that started then."""


class WandbTracker(Tracker):
    """Writes curves, pictures, parameters and scores as runs of one project, grouped by study."""

    kind: Literal["wandb"] = "wandb"
    project: str | None = None
    """Null is the study's name."""
    entity: str | None = None
    """User or team; null is the default of the account."""
    mode: Literal["offline", "online"] = "offline"
    """`offline` writes to `wandb` in the study's folder and speaks to nobody; `online` needs WANDB_API_KEY."""

    _runs: "dict[int, tuple[Run, Progress]]" = PrivateAttr(default_factory=dict[int, Any])
    _finished: set[int] = PrivateAttr(default_factory=set[int])

    @model_validator(mode="after")
    def _is_installed(self) -> Self:
        if find_spec("wandb") is None:
            raise ValueError("needs Weights & Biases: pip install 'diffusion-tuning[wandb]'")
        return self

    @override
    def mirror(self, study: StudyView, trials: Sequence[TrialView]) -> None:
        from wandb.errors import Error

        for trial in trials:
            if trial.start is None or trial.number in self._finished:
                continue
            try:
                self._update(study, trial)
            except (OSError, Error) as error:
                self._runs.pop(trial.number, None)  # written anew
                where = study.root / "wandb"
                raise TrackerError(f"{where}: W&B is behind and will catch up ({error})") from error

    @override
    def serve(self, name: str, root: Path, port: int, say: Callable[[str], None]) -> None:
        folder = root / "wandb"
        if not folder.exists():
            raise ConfigError(f"{folder}: got no runs of study {name!r}; expected some; run the study first")
        if self.mode == "online":
            say(f"This study's pages: https://wandb.ai/{self.entity or '<you>'}/{self.project or name}")
        else:
            say(f"W&B shows runs on its server alone: `wandb sync {folder}/trial-*/wandb/offline-run-*` uploads them")

    def _update(self, study: StudyView, trial: TrialView) -> None:
        folder = study.root / "wandb" / f"trial-{trial.number:04d}"
        mark = f"{trial.start} {trial.state}\n"
        complete = folder / _COMPLETE
        if trial.number not in self._runs:
            if complete.exists() and complete.read_text(encoding="utf-8") == mark:
                self._finished.add(trial.number)
                return
            self._runs[trial.number] = (self._begin(study, trial, folder), Progress())
        run, progress = self._runs[trial.number]
        news = read_news(trial.run, progress)
        _log(run, [*news.points, *news.pictures])
        self._runs[trial.number] = (run, news.progress)
        if trial.state in FINAL_STATES:
            _end(run, study, trial)
            write_atomically(complete, mark)
            self._finished.add(trial.number)
            del self._runs[trial.number]

    def _begin(self, study: StudyView, trial: TrialView, folder: Path) -> "Run":
        """A new run; what an earlier process wrote to disk goes, because the run directory has all of it.

        Online, the server keeps what it has: steps that it knows are not taken twice.
        """
        import wandb

        logging.getLogger("wandb").setLevel(logging.WARNING)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        assert trial.start is not None
        settings = wandb.Settings(  # what a trial ran on is in its files; the controller's machine is beside the point
            silent=True,
            console="off",
            save_code=False,
            disable_git=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
        )
        return wandb.init(
            project=self.project or study.name,
            entity=self.entity,
            group=study.name,
            id=f"{study.name}-{trial.start:%Y%m%d%H%M%S}-{trial.number}",
            name=f"trial-{trial.number:04d}",
            config={"trial": thaw(trial.run.trial) if trial.run.trial.exists() else {}, "study": study.tags},
            dir=str(folder),
            mode=self.mode,
            resume="allow" if self.mode == "online" else None,
            reinit="create_new",
            settings=settings,
        )


def _log(run: "Run", news: Sequence[Any]) -> None:
    """Everything of one step goes out together, because W&B takes steps in order."""
    import wandb

    for step, found in groupby(sorted(news, key=lambda one: one.step), key=lambda one: one.step):
        entries = [(one.name, one.value if hasattr(one, "value") else wandb.Image(str(one.path))) for one in found]
        run.log(dict(entries), step=step)


def _end(run: "Run", study: StudyView, trial: TrialView) -> None:
    import wandb

    numbers: dict[str, Any] = {**outcome(study, trial)}
    if (trial.run.samples / "grid.png").is_file():
        numbers["samples"] = wandb.Image(str(trial.run.samples / "grid.png"))
    run.log(numbers)
    run.summary.update({"state": trial.state, "reason": trial.reason or ""})
    run.finish(exit_code=1 if trial.state == "FAIL" else 0)
