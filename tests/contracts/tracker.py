"""What every tracker that keeps something must do."""

from dataclasses import replace

import pytest
from PIL import Image

from orchestrator.tracker import Tracker
from tests.orchestrator.views import FakeStudy

Curves = dict[str, list[tuple[int, float]]]


class TrackerContract:
    """Inherit, and give the fixture `tracker` and the methods that read what it kept."""

    def curves(self, study: FakeStudy, number: int) -> Curves:
        """Points of trial `number`: name to (step, value), in order."""
        raise NotImplementedError

    def pictures(self, study: FakeStudy, number: int) -> list[tuple[str, int]]:
        """Name and step of the pictures of trial `number`, sorted."""
        raise NotImplementedError

    def again(self, tracker: Tracker) -> Tracker:
        """The same tracker in a new process."""
        return type(tracker).model_validate(tracker.model_dump())

    def test_curves_reports_and_pictures_of_a_trial_are_there(self, tracker: Tracker, study: FakeStudy) -> None:
        run = study.start()
        study.train(run, 10)
        run.append("validation", step=10, loss=0.75)
        run.append("report", step=10, scores={"clip_t": 0.25, "clip_i": None}, prompts={"clip_t": [0.25]})
        folder = run.samples / "step-0000010"
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(folder / "00_0.png")
        run.append("samples", step=10, files=["samples/step-0000010/00_0.png"])
        tracker.mirror(study.view, study.trials)
        study.train(run, 20)
        study.complete(run, 0.5)
        tracker.mirror(study.view, study.trials)
        curves = self.curves(study, 0)
        assert curves["train/loss"] == [(10, pytest.approx(0.1)), (20, pytest.approx(0.05))]
        assert curves["validation/loss"] == [(10, 0.75)]
        assert curves["report/clip_t"] == [(10, 0.25)]
        assert "report/clip_i" not in curves
        assert [value for _, value in curves["objective"]] == [0.5]
        assert [value for _, value in curves["clip_t/clip-0123456789ab"]] == [0.5]
        assert ("samples/00_0", 10) in self.pictures(study, 0)
        assert [name for name, _ in self.pictures(study, 0)].count("samples") == 1

    def test_a_controller_that_was_killed_repeats_nothing(self, tracker: Tracker, study: FakeStudy) -> None:
        finished, running = study.start(), study.start()
        study.train(finished, 10)
        study.complete(finished)
        study.train(running, 10)
        tracker.mirror(study.view, study.trials)
        study.train(running, 20)
        study.train(running, 10)  # a lost job repeats what it said
        study.train(running, 30)
        other = self.again(tracker)
        other.mirror(study.view, study.trials)
        study.complete(running)
        other.mirror(study.view, study.trials)
        self.again(tracker).mirror(study.view, study.trials)
        assert [step for step, _ in self.curves(study, 1)["train/loss"]] == [10, 20, 30]
        assert [step for step, _ in self.curves(study, 0)["train/loss"]] == [10]
        assert len(self.curves(study, 1)["objective"]) == 1

    def test_a_trial_that_waits_is_not_mirrored_yet(self, tracker: Tracker, study: FakeStudy) -> None:
        study.start()
        study.trials[0] = replace(study.trials[0], state="WAITING", start=None)
        tracker.mirror(study.view, study.trials)
        assert self.curves(study, 0) == {}

    def test_it_survives_a_study_file(self, tracker: Tracker) -> None:
        assert Tracker.model_validate(tracker.model_dump(mode="json")) == tracker

    def test_a_trial_that_failed_before_it_was_frozen_is_kept_as_such(self, tracker: Tracker, study: FakeStudy) -> None:
        run = study.start()
        run.trial.unlink()
        study.end(run, "FAIL", reason="disk")
        tracker.mirror(study.view, study.trials)
        self.again(tracker).mirror(study.view, study.trials)
        assert "objective" not in self.curves(study, 0)
