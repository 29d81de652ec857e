"""TensorBoard (Abadi et al., 2016): event files in a folder, a run for each trial. TensorFlow is not needed."""

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import PrivateAttr, model_validator
from typing_extensions import override

from orchestrator.progress import Picture, Point, Progress, outcome, read_news
from orchestrator.server import HOST, choose_port, running
from orchestrator.tracker import FINAL_STATES, StudyView, Tracker, TrialView
from trainers.config import LocalPath
from trainers.errors import ConfigError, TrackerError
from trainers.rundir import write_atomically

_COMPLETE = "complete.txt"
"""In a trial's folder: all of it was written, for the trial that started then."""
_STATUS = {"COMPLETE": 1, "PRUNED": 1, "FAIL": 2}
"""Optuna's final states as hparams' SUCCESS and FAILURE."""


@dataclass
class _Log:
    """A trial's event file, and up to where the trial is in it."""

    file: Path
    progress: Progress = field(default_factory=Progress)


class TensorboardTracker(Tracker):
    """Writes curves, pictures, parameters and scores as TensorBoard's event files."""

    kind: Literal["tensorboard"] = "tensorboard"
    folder: LocalPath | None = None
    """Where; null is `tensorboard` in the study's folder. Studies that share one are shown side by side."""

    _logs: dict[int, _Log] = PrivateAttr(default_factory=dict[int, _Log])
    _finished: set[int] = PrivateAttr(default_factory=set[int])

    @model_validator(mode="after")
    def _is_installed(self) -> Self:
        if find_spec("tensorboard") is None:
            raise ValueError("needs TensorBoard: pip install 'diffusion-tuning[tensorboard]'")
        return self

    @override
    def mirror(self, study: StudyView, trials: Sequence[TrialView]) -> None:
        try:
            for trial in trials:
                if trial.start is not None and trial.number not in self._finished:
                    self._update(study, trial)
        except OSError as error:
            self._logs.clear()  # whatever was cut short is written anew
            folder = self._folder(study.root)
            raise TrackerError(f"{folder}: TensorBoard is behind and will catch up ({error})") from error

    @override
    def serve(self, name: str, root: Path, port: int, say: Callable[[str], None]) -> None:
        folder = self._folder(root)
        if not folder.exists():
            raise ConfigError(f"{folder}: got no event files of study {name!r}; expected some; run the study first")
        chosen = choose_port(port)
        if port not in (0, chosen):
            say(f"Port {port} is taken; using {chosen}.")
        address = f"http://{HOST}:{chosen}"
        server = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", HOST]
        with running([*server, "--port", str(chosen)], {}, address) as process:
            say(f"This study's pages: {address}\nCtrl-C ends the server.")
            process.wait()

    def _folder(self, root: Path) -> Path:
        return self.folder or root / "tensorboard"

    def _update(self, study: StudyView, trial: TrialView) -> None:
        folder = self._folder(study.root) / study.name / f"trial-{trial.number:04d}"
        mark = f"{trial.start} {trial.state}\n"
        if trial.number not in self._logs and _read(folder / _COMPLETE) == mark:
            self._finished.add(trial.number)
            return
        log = self._logs.get(trial.number)
        if log is None:
            log = self._logs[trial.number] = _begin(folder, trial)
        news = read_news(trial.run, log.progress)
        _append(log.file, [*map(_scalar, news.points), *map(_image, news.pictures)])
        log.progress = news.progress
        if trial.state in FINAL_STATES:
            _append(log.file, _outcome(study, trial, max(0, *log.progress.steps)))
            write_atomically(folder / _COMPLETE, mark)
            self._finished.add(trial.number)
            del self._logs[trial.number]


def _module(name: str) -> Any:
    """Part of TensorBoard, which has no types; imported when there is something to write."""
    return import_module(f"tensorboard.{name}")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


_Entry = tuple[float, int, Any]
"""Seconds since 1970, step, and what happened then."""


def _begin(folder: Path, trial: TrialView) -> _Log:
    """A new event file; what an earlier process wrote goes, because the run directory has all of it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    assert trial.start is not None
    log = _Log(folder / f"events.out.tfevents.{int(trial.start.timestamp())}.{socket.gethostname()}.{os.getpid()}")
    event = _module("compat.proto.event_pb2")

    _write(log.file, [event.Event(wall_time=trial.start.timestamp(), file_version="brain.Event:2")])
    return log


def _append(file: Path, entries: Iterable[_Entry]) -> None:
    event = _module("compat.proto.event_pb2")

    _write(file, [event.Event(wall_time=moment, step=step, summary=summary) for moment, step, summary in entries])


def _write(file: Path, events: Sequence[Any]) -> None:
    if not events:
        return
    with file.open("ab") as opened:  # not kept open: hundreds of trials may run
        writer = _module("summary.writer.record_writer").RecordWriter(opened)
        for event in events:
            writer.write(event.SerializeToString())


def _scalar(point: Point) -> _Entry:
    protos = _module("compat.proto.summary_pb2")

    return (
        point.time,
        point.step,
        protos.Summary(value=[protos.Summary.Value(tag=point.name, simple_value=point.value)]),
    )


def _image(picture: Picture) -> _Entry:
    from PIL import Image

    protos = _module("compat.proto.summary_pb2")

    with Image.open(picture.path) as opened:
        width, height = opened.size
    content = picture.path.read_bytes()
    image = protos.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
    return picture.time, picture.step, protos.Summary(value=[protos.Summary.Value(tag=picture.name, image=image)])


def _outcome(study: StudyView, trial: TrialView, step: int) -> list[_Entry]:
    """Final scores, the grid, and parameters beside the state, for the page that compares trials."""
    ended = trial.end or trial.start
    assert ended is not None
    moment = ended.timestamp()
    entries: list[_Entry] = []
    entries += [_scalar(Point(name, value, step, moment)) for name, value in outcome(study, trial).items()]
    grid = trial.run.samples / "grid.png"
    if grid.is_file():
        entries.append(_image(Picture("samples", grid, step, moment)))
    return entries + [(moment, 0, summary) for summary in _hparams(trial, moment)]


def _hparams(trial: TrialView, ended: float) -> list[Any]:
    protos, hparams = _module("compat.proto.summary_pb2"), _module("plugins.hparams.plugin_data_pb2")

    data = hparams.HParamsPluginData
    assert trial.start is not None
    begin = hparams.SessionStartInfo(start_time_secs=trial.start.timestamp())
    for name, value in trial.params.items():
        if isinstance(value, bool | str) or value is None:
            begin.hparams[name].string_value = str(value)
        else:
            begin.hparams[name].number_value = value
    end = hparams.SessionEndInfo(status=_STATUS[trial.state], end_time_secs=ended)
    contents = {
        "_hparams_/session_start_info": data(session_start_info=begin, version=0),
        "_hparams_/session_end_info": data(session_end_info=end, version=0),
    }
    summaries: list[Any] = []
    for tag, content in contents.items():
        plugin = protos.SummaryMetadata.PluginData(plugin_name="hparams", content=content.SerializeToString())
        summaries.append(
            protos.Summary(value=[protos.Summary.Value(tag=tag, metadata=protos.SummaryMetadata(plugin_data=plugin))])
        )
    return summaries
