# pyright: basic
from pathlib import Path

import pytest
from pydantic import ValidationError

from orchestrator.tracker import Tracker
from orchestrator.trackers.tensorboard import TensorboardTracker
from tests.contracts.tracker import Curves, TrackerContract
from tests.orchestrator.views import FakeStudy
from trainers.errors import ConfigError, TrackerError

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def opened(study: FakeStudy, number: int):
    """TensorBoard's own reading of a trial's folder."""
    folder = study.view.root / "tensorboard" / study.name / f"trial-{number:04d}"
    found = accumulators.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return found.Reload() if folder.exists() else found


class TestTensorboardTracker(TrackerContract):
    @pytest.fixture
    def tracker(self) -> Tracker:
        return TensorboardTracker()

    def curves(self, study: FakeStudy, number: int) -> Curves:
        found = opened(study, number)
        return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}

    def pictures(self, study: FakeStudy, number: int) -> list[tuple[str, int]]:
        found = opened(study, number)
        return sorted((tag, e.step) for tag in found.Tags()["images"] for e in found.Images(tag))


def test_parameters_stand_beside_the_state_for_the_page_that_compares_trials(study: FakeStudy):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]

    study.complete(study.start())
    study.end(study.start(), "FAIL", reason="oom")
    TensorboardTracker().mirror(study.view, study.trials)
    found = []
    for number in (0, 1):
        contents = opened(study, number).PluginTagToContent("hparams")
        begin, end = (
            HParamsPluginData.FromString(contents[f"_hparams_/session_{edge}_info"]) for edge in ("start", "end")
        )
        rate = begin.session_start_info.hparams["train.optimizer.lr"].number_value
        found.append((rate, end.session_end_info.status))
    assert found == [(0.1, 1), (0.01, 2)]  # SUCCESS and FAILURE


def test_a_full_disk_is_caught_up_with(study: FakeStudy, monkeypatch: pytest.MonkeyPatch):
    run = study.start()
    study.train(run, 10)
    tracker = TensorboardTracker()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(TrackerError, match="No space left"):
            tracker.mirror(study.view, study.trials)
    tracker.mirror(study.view, study.trials)
    assert [e.step for e in opened(study, 0).Scalars("train/loss")] == [10]


def test_a_study_without_files_has_no_pages(study: FakeStudy):
    with pytest.raises(ConfigError, match="run the study first"):
        TensorboardTracker().serve(study.name, study.view.root, 0, print)


def test_without_tensorboard_the_study_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orchestrator.trackers.tensorboard.find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"diffusion-tuning\[tensorboard\]"):
        TensorboardTracker()
