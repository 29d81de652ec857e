# pyright: basic
from dataclasses import replace
from datetime import timedelta
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.display import Display, seconds_left
from tests.orchestrator.views import MORNING, FakeStudy


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def study(tmp_path: Path) -> FakeStudy:
    return FakeStudy(tmp_path)


def console(*, terminal: bool) -> Console:
    return Console(file=StringIO(), force_terminal=terminal, width=120, color_system=None, legacy_windows=False)


def written(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_without_a_terminal_every_change_of_state_is_one_line(study: FakeStudy) -> None:
    screen = console(terminal=False)
    with Display(screen, now=lambda: MORNING) as display:
        first = study.start()
        display.update(study.view, study.trials)
        display.update(study.view, study.trials)
        study.complete(first, 0.25)
        second = study.start()
        display.update(study.view, study.trials)
        study.end(second, "PRUNED", reason="oom: 猫")
        display.update(study.view, study.trials)
    assert written(screen).splitlines() == [
        "zog: 0 of 3 trials, 1 running",
        "trial 0 started: lr=0.1",
        "trial 0 complete: 0.25; best so far: trial 0 with 0.25 (lr=0.1)",
        "trial 1 started: lr=0.01",
        "trial 1 pruned: oom: 猫",
    ]


def test_a_trial_of_a_study_without_a_search_has_the_defaults(study: FakeStudy) -> None:
    screen = console(terminal=False)
    study.start()
    study.trials[0] = replace(study.trials[0], params={})
    with Display(screen, now=lambda: MORNING) as display:
        display.update(study.view, study.trials)
    assert "trial 0 started: the defaults" in written(screen)


def test_without_a_terminal_progress_is_said_now_and_then(study: FakeStudy) -> None:
    screen, clock = console(terminal=False), Clock()
    with Display(screen, clock, lambda: MORNING) as display:
        run = study.start()
        display.update(study.view, study.trials)
        run.append("stage", stage="train", state="start")
        study.train(run, 20)
        display.update(study.view, study.trials)
        clock.seconds = 31
        display.update(study.view, study.trials)
        display.update(study.view, study.trials)
    assert written(screen).splitlines()[2:] == [
        "zog: 0 of 3 trials, 1 running | trial 0: train, step 20 of 30, loss 0.05"
    ]


def test_a_resumed_study_does_not_repeat_what_was_said_before(study: FakeStudy) -> None:
    study.complete(study.start(), 0.5)
    study.end(study.start(), "FAIL", reason="data")
    screen = console(terminal=False)
    with Display(screen, now=lambda: MORNING) as display:
        display.update(study.view, study.trials)
    assert written(screen) == "zog: 1 of 3 trials, 1 failed, about 0:10:00 left\n"


def test_a_terminal_shows_jobs_the_best_trial_and_the_time_left(study: FakeStudy) -> None:
    study.complete(study.start(), 0.5)
    study.complete(study.start(), 0.25)
    run = study.start()
    run.append("stage", stage="train", state="start")
    study.train(run, 10)
    screen = console(terminal=True)
    with Display(screen, now=lambda: MORNING + timedelta(minutes=22)) as display:
        display.update(study.view, study.trials)
    shown = written(screen)
    assert "2 of 3 trials, 1 running, about 0:03:00 left" in shown
    assert "best: trial 0 with 0.5 (lr=0.1)" in shown
    assert "trial 2 (lr=0.001): train, step 10 of 30, loss 0.1" in shown


def test_a_job_that_has_not_begun_to_train_shows_its_stage(study: FakeStudy) -> None:
    screen = console(terminal=True)
    with Display(screen) as display:
        run = study.start()
        display.update(study.view, study.trials)
        run.append("stage", stage="load", state="start")
        display.update(study.view, study.trials)
    assert "trial 0 (lr=0.1): start" in written(screen)
    assert "trial 0 (lr=0.1): load" in written(screen)


def test_what_breaks_a_bound_is_not_the_best(study: FakeStudy) -> None:
    study.complete(study.start(), 0.5)
    study.complete(study.start(), 0.25)
    study.trials[0] = replace(study.trials[0], violations={"clip_t.at_least": 0.1}, reason="breaks clip_t.at_least")
    screen = console(terminal=True)
    with Display(screen) as display:
        display.update(study.view, study.trials)
    assert "best: trial 1" in written(screen)


def test_of_several_values_the_front_is_shown(study: FakeStudy) -> None:
    for values in ([0.5, 0.1], [0.4, 0.0], [0.1, 0.5]):
        study.complete(study.start())
        study.trials[-1] = replace(study.trials[-1], values=values)
    screen = console(terminal=True)
    with Display(screen) as display:
        display.update(replace(study.view, value_names=("fidelity", "text")), study.trials)
    assert "best: front of 2: trials 0, 2" in written(screen)


def test_the_time_left_counts_trials_that_run_side_by_side(study: FakeStudy) -> None:
    study.complete(study.start())
    study.start()
    study.start()
    begun = MORNING + timedelta(minutes=20)
    assert seconds_left(study.view, study.trials, begun) == pytest.approx((2 * 300 - 300 - 0) / 2)


def test_a_running_trial_that_is_late_does_not_make_the_time_left_negative(study: FakeStudy) -> None:
    study.complete(study.start())
    study.num_trials = 2
    study.start()
    assert seconds_left(study.view, study.trials, MORNING + timedelta(hours=9)) == 0


def test_there_is_no_time_left_to_tell_before_the_first_trial_ended(study: FakeStudy) -> None:
    study.start()
    assert seconds_left(study.view, study.trials, MORNING) is None
