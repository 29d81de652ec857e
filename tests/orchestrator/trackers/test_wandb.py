# pyright: basic
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.tracker import Tracker
from orchestrator.trackers.wandb import WandbTracker
from tests.contracts.tracker import Curves, TrackerContract
from tests.orchestrator.views import FakeStudy
from trainers.errors import ConfigError

pytest.importorskip("wandb")


def chunks(file: Path) -> Iterator[bytes]:
    """W&B's files are LevelDB logs after seven bytes of their own: blocks of 32 KiB, and records cut at their ends."""
    content, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, part = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if part in {1, 4}:  # all of it, or its last piece
            yield record
            record = b""


def records(study: FakeStudy, number: int) -> Iterator[Any]:
    """What W&B wrote to disk about a trial."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    for file in (study.view.root / "wandb" / f"trial-{number:04d}").glob("wandb/offline-run-*/run-*.wandb"):
        yield from map(Record.FromString, chunks(file))


def history(study: FakeStudy, number: int) -> list[tuple[str, int, Any]]:
    found = []
    for record in records(study, number):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            found += [(name, items["_step"], value) for name, value in items.items() if not name.startswith("_")]
    return found


@pytest.mark.slow
class TestWandbTracker(TrackerContract):
    @pytest.fixture
    def tracker(self, monkeypatch: pytest.MonkeyPatch) -> Tracker:
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        return WandbTracker()

    def again(self, tracker: Tracker) -> Tracker:
        assert isinstance(tracker, WandbTracker)
        for run, _ in tracker._runs.values():
            run.finish()  # as W&B's service does when its process is gone
        return super().again(tracker)

    def curves(self, study: FakeStudy, number: int) -> Curves:
        found: Curves = {}
        for name, step, value in history(study, number):
            if isinstance(value, int | float):
                found.setdefault(name, []).append((step, value))
        return found

    def pictures(self, study: FakeStudy, number: int) -> list[tuple[str, int]]:
        pictures = [entry for entry in history(study, number) if entry[2] == "image-file"]
        return sorted((name.removesuffix("/_type"), step) for name, step, _ in pictures)

    def test_the_frozen_trial_is_the_run_s_config(self, tracker: Tracker, study: FakeStudy) -> None:
        study.complete(study.start())
        tracker.mirror(study.view, study.trials)
        runs = [record.run for record in records(study, 0) if record.WhichOneof("record_type") == "run"]
        config = {item.key: json.loads(item.value_json) for item in runs[-1].config.update}
        assert config["trial"]["train"]["optimizer"]["lr"] == 0.1
        assert (runs[-1].run_group, runs[-1].display_name, runs[-1].project) == ("zog", "trial-0000", "zog")


def test_runs_on_disk_are_shown_by_the_command_that_uploads_them(study: FakeStudy):
    said: list[str] = []
    with pytest.raises(ConfigError, match="run the study first"):
        WandbTracker().serve(study.name, study.view.root, 0, said.append)
    (study.view.root / "wandb").mkdir(parents=True)
    WandbTracker().serve(study.name, study.view.root, 0, said.append)
    assert "wandb sync" in said[0]
