"""What a running study shows: a live panel on a terminal, plain lines elsewhere."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.front import front
from orchestrator.tracker import COUNTED_STATES, FINAL_STATES, StudyView, TrialView
from trainers.rundir import RunDir, thaw

_LINE_SECONDS = 30.0
_BAR_WIDTH = 30


@dataclass
class _Progress:
    """How far one job is, as its events say; read from where the last look ended."""

    run: RunDir
    offset: int = 0
    stage: str = "start"
    step: int | None = None
    loss: float | None = None
    num_steps: int | None = None

    def look(self) -> None:
        if self.num_steps is None and self.run.trial.exists():
            self.num_steps = thaw(self.run.trial)["train"]["steps"]
        for offset, event in self.run.read_events(self.offset):
            self.offset = offset
            if event["event"] == "stage":
                self.stage = event["stage"]
            elif event["event"] == "train":
                self.step, self.loss = event["step"], event["loss"]

    def __str__(self) -> str:
        if self.stage != "train" or self.step is None:
            return self.stage
        return f"train, step {self.step} of {self.num_steps}, loss {self.loss:.4g}"


@dataclass
class Display:
    """Shows a study while it runs; a controller's observer.

    The console should be the one that log lines go to: they then appear above the live panel.
    """

    console: Console
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    _live: Live | None = field(default=None, init=False)
    _states: dict[int, str] | None = field(default=None, init=False)
    _progress: dict[Path, _Progress] = field(default_factory=dict[Path, _Progress], init=False)
    _last_line: float = field(default=0.0, init=False)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, study: StudyView, trials: Sequence[TrialView]) -> None:
        """Show how things are now."""
        running = [trial for trial in trials if trial.state == "RUNNING"]
        self._progress = {t.run.path: self._progress.get(t.run.path) or _Progress(t.run) for t in running}
        for progress in self._progress.values():
            progress.look()
        if self._live is not None:
            self._live.update(self._panel(study, trials, running), refresh=True)
        else:
            self._print_changes(study, trials)
            self._print_progress(study, trials, running)

    def _panel(self, study: StudyView, trials: Sequence[TrialView], running: Sequence[TrialView]) -> Group:
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(study.num_trials, _num_counted(trials), width=_BAR_WIDTH)
        head.add_row(Text(study.name, style="bold"), bar, Text(_summary(study, trials, self.now())))
        lines = [Text(f"best: {_best(study, trials)}", style="green")] if front(trials) else []
        lines += [Text(self._job(trial)) for trial in running]
        return Group(head, *lines)

    def _job(self, trial: TrialView) -> str:
        return f"trial {trial.number} ({_params(trial)}): {self._progress[trial.run.path]}"

    def _print_changes(self, study: StudyView, trials: Sequence[TrialView]) -> None:
        if self._states is None:
            self._states = {trial.number: trial.state for trial in trials if trial.state in FINAL_STATES}
            self._last_line = self.clock()
            self._print(f"{study.name}: {_summary(study, trials, self.now())}")
        for trial in trials:
            if trial.state != "WAITING" and self._states.get(trial.number) != trial.state:
                self._states[trial.number] = trial.state
                self._print(_change(study, trial, trials))

    def _print_progress(self, study: StudyView, trials: Sequence[TrialView], running: Sequence[TrialView]) -> None:
        if self.clock() - self._last_line >= _LINE_SECONDS and running:
            self._last_line = self.clock()
            jobs = "; ".join(f"trial {trial.number}: {self._progress[trial.run.path]}" for trial in running)
            self._print(f"{study.name}: {_summary(study, trials, self.now())} | {jobs}")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _change(study: StudyView, trial: TrialView, trials: Sequence[TrialView]) -> str:
    name = f"trial {trial.number}"
    if trial.state == "RUNNING":
        return f"{name} started: {_params(trial)}"
    if trial.state == "COMPLETE":
        broken = f", {trial.reason}" if trial.reason else ""
        return f"{name} complete: {_values(trial)}{broken}; best so far: {_best(study, trials)}"
    return f"{name} {trial.state.lower()}" + (f": {trial.reason}" if trial.reason else "")


def _summary(study: StudyView, trials: Sequence[TrialView], now: datetime) -> str:
    states = Counter(trial.state for trial in trials)
    words = [f"{_num_counted(trials)} of {study.num_trials} trials"]
    words += [
        f"{states[state]} {word}" for state, word in (("RUNNING", "running"), ("FAIL", "failed")) if states[state]
    ]
    left = seconds_left(study, trials, now)
    if left is not None:
        words.append(f"about {timedelta(seconds=round(left))} left")
    return ", ".join(words)


def seconds_left(study: StudyView, trials: Sequence[TrialView], now: datetime) -> float | None:
    """Estimate from the median trial; None before the first has ended, and at the end."""
    took = [
        (trial.end - trial.start).total_seconds()
        for trial in trials
        if trial.state in COUNTED_STATES and trial.start and trial.end
    ]
    missing = study.num_trials - _num_counted(trials)
    if not took or missing <= 0:
        return None
    typical = median(took)
    elapsed = [(now - trial.start).total_seconds() for trial in trials if trial.state == "RUNNING" and trial.start]
    done = sum(min(seconds, typical) for seconds in elapsed)
    return (missing * typical - done) / max(1, len(elapsed))


def _num_counted(trials: Sequence[TrialView]) -> int:
    return sum(trial.state in COUNTED_STATES for trial in trials)


def _best(study: StudyView, trials: Sequence[TrialView]) -> str:
    won = front(trials)
    if won and len(study.value_names) > 1:
        return f"front of {len(won)}: trials {', '.join(str(trial.number) for trial in won)}"
    return f"trial {won[0].number} with {_values(won[0])} ({_params(won[0])})" if won else "none"


def _values(trial: TrialView) -> str:
    return ", ".join(f"{value:.6g}" for value in trial.values or [])


def _params(trial: TrialView) -> str:
    told = ", ".join(f"{path.rpartition('.')[2]}={_shown(value)}" for path, value in trial.params.items())
    return told or "the defaults"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
