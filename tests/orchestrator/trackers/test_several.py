from pathlib import Path

import pytest

from orchestrator.trackers.several import SeveralTrackers
from orchestrator.trackers.tensorboard import TensorboardTracker
from tests.orchestrator.cluster import Cluster, spec_of
from tests.orchestrator.views import FakeStudy
from trainers.errors import TrackerError

pytest.importorskip("tensorboard")


def test_a_list_in_a_study_file_is_several_trackers(cluster: Cluster, tmp_path: Path):
    spec = spec_of(tmp_path, "tracker=[{kind: none}, {kind: tensorboard}]")
    assert isinstance(spec.tracker, SeveralTrackers)
    assert [tracker.model_dump()["kind"] for tracker in spec.tracker.trackers] == ["none", "tensorboard"]
    assert type(spec).model_validate(spec.model_dump(mode="json")) == spec


def test_one_that_is_down_does_not_keep_the_others_back(cluster: Cluster, study: FakeStudy):
    spec = spec_of(study.output, "tracker=[{kind: broken}, {kind: tensorboard}]")
    study.complete(study.start())
    with pytest.raises(TrackerError, match="the store is down"):
        spec.tracker.mirror(study.view, study.trials)
    assert (study.view.root / "tensorboard" / study.name / "trial-0000" / "complete.txt").exists()


def test_an_empty_list_is_no_tracker(cluster: Cluster, tmp_path: Path):
    with pytest.raises(Exception, match="tracker"):
        spec_of(tmp_path, "tracker=[]")


def test_a_kind_that_does_not_exist_is_named_in_its_place(cluster: Cluster, tmp_path: Path):
    with pytest.raises(Exception, match=r"unknown kind 'tensorbord'.*did you mean"):
        spec_of(tmp_path, "tracker=[{kind: tensorbord}]")


def test_the_first_one_is_shown(study: FakeStudy):
    tracker = SeveralTrackers(trackers=(TensorboardTracker(), TensorboardTracker()))
    said: list[str] = []
    with pytest.raises(Exception, match="run the study first"):
        tracker.serve(study.name, study.view.root, 0, said.append)
    assert said == ["Showing tensorboard; `--set tracker.kind=tensorboard` shows tensorboard."]
