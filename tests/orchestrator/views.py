"""A study's files as a controller and its jobs leave them, without running either."""

# pyright: basic

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from orchestrator.tracker import StudyView, TrialView
from trainers.rundir import RunDir, RunResult, Score, freeze, write_atomically

MORNING = datetime(2026, 3, 1, 8, 0, tzinfo=UTC)
MODEL = "clip@0123456789ab"


@dataclass
class FakeStudy:
    """Writes run directories and gives the views that a controller would build from them."""

    output: Path
    name: str = "zog"
    num_trials: int = 3
    trials: list[TrialView] = field(default_factory=list)

    @property
    def view(self) -> StudyView:
        return StudyView(
            name=self.name,
            root=self.output / self.name,
            study_yaml=f"name: {self.name}\n",
            tags={"version.commit": "c0ffee+changes", "version.torch": "2.15.0", "config_sha256": "c0de"},
            num_trials=self.num_trials,
        )

    def start(self, **config: Any) -> RunDir:
        """Ask and freeze one more trial; its parameter is the learning rate."""
        number = len(self.trials)
        run = RunDir(self.output / self.name / "trials" / f"{number:04d}")
        rate = 10.0 ** -(number + 1)
        tree = {"seed": 0, "train": {"kind": "sdxl_lora", "optimizer": {"lr": rate}, "steps": 30, **config}}
        write_atomically(run.trial, freeze(tree)[0])
        begin = MORNING + timedelta(minutes=10 * number)
        params = {"train.optimizer.lr": rate}
        self.trials.append(TrialView(number, "RUNNING", params, None, None, run, begin, None))
        return run

    def train(self, run: RunDir, step: int, **values: float) -> None:
        run.append("train", step=step, **{"loss": 1.0 / step, "lr": 1e-3, "grad_norm": 0.5, **values})

    def complete(self, run: RunDir, value: float = 0.3, **scores: float) -> None:
        """Write everything a finished job leaves, and tell the value."""
        run.samples.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 32), (200, 30, int(250 * value))).save(run.samples / "grid.png")
        run.adapter.mkdir(exist_ok=True)
        (run.adapter / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
        run.records.write_text('{"prompt": "a zog"}\n', encoding="utf-8")
        measured = {
            name: Score(mean=mean, standard_error=0.01, num_samples=8, model=MODEL)
            for name, mean in (scores or {"clip_t": value}).items()
        }
        seconds = {"train": 12.0, "sample": 3.0}
        run.write(
            run.result, RunResult(scores=measured, seconds=seconds, peak_bytes=1000, versions={"torch": "2.15.0"})
        )
        self.end(run, "COMPLETE", values=[value])

    def end(self, run: RunDir, state: str, values: list[float] | None = None, reason: str | None = None) -> None:
        number = int(run.path.name)
        old = self.trials[number]
        assert old.start is not None
        end = old.start + timedelta(minutes=5)
        self.trials[number] = TrialView(number, state, old.params, values, reason, run, old.start, end)
