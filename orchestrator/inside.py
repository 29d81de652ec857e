"""A whole study as one job of its launcher: a controller there, and trials on the devices of that machine."""

from collections.abc import Iterable
from typing import Literal

from orchestrator.launcher import Job, JobId, JobState
from orchestrator.spec import StudySpec, load_study
from orchestrator.yaml import dump
from trainers.rundir import RunDir, read_json, write_atomically

MODULE = "orchestrator"
FILE = "study.yaml"
_ID = "job_id.txt"

Standing = Literal["submitted", "queued", "running", "finished"]


def run_dir(spec: StudySpec) -> RunDir:
    """The job's folder; its study is `study.yaml` there, and what that writes in `runs`."""
    return RunDir(spec.root / "job")


def advance(spec: StudySpec, sets: Iterable[str]) -> Standing:
    """Submit the job, unless it lives or its study has ended, and fetch what it has written.

    Raises:
        ConfigError: `sets` do not fit the study.
        LaunchError: The launcher cannot be asked.
    """
    run, launcher = run_dir(spec), spec.launcher.alone()
    known = run.path / _ID
    if known.exists():
        state = launcher.poll(JobId(known.read_text(encoding="utf-8")))
        if state is not JobState.ENDED:
            return "queued" if state is JobState.QUEUED else "running"
    _write(spec, sets)
    if _has_ended(run):
        return "finished"
    write_atomically(known, launcher.submit(_job(run)))
    return "submitted"


def cancel(spec: StudySpec) -> None:
    """End the job; it goes on when it is submitted again. Raises LaunchError."""
    known = run_dir(spec).path / _ID
    if known.exists():
        spec.launcher.alone().cancel(JobId(known.read_text(encoding="utf-8")))


def _job(run: RunDir) -> Job:
    return Job(MODULE, ("run", str(run.path / FILE)), run.path)


def _write(spec: StudySpec, sets: Iterable[str]) -> None:
    """The study as it is run there: its own launcher is this machine's."""
    ranks = spec.launcher.num_processes
    changes = {"launcher": {"kind": "local", "num_processes": ranks}, "output": "./runs", "storage": None}
    path = run_dir(spec).path / FILE
    write_atomically(path, dump({**spec.model_dump(mode="json"), **changes}))
    inner, _ = load_study(path, sets)
    tree = {**inner.model_dump(mode="json"), "output": "./runs"}
    write_atomically(path, dump(tree))


def _has_ended(run: RunDir) -> bool:
    from orchestrator.front import front
    from orchestrator.ledger import has_study, read_trials
    from orchestrator.series import WINNER, Winner, ending

    inner, _ = load_study(run.path / FILE)
    if not (inner.root / "study.db").exists() or not has_study(inner):
        return False
    trials = read_trials(inner)
    if front(trials):
        winner = read_json(inner.root / WINNER, Winner)
        return winner is not None and winner.ending == ending(inner)
    counted = [trial for trial in trials if trial.state in {"COMPLETE", "PRUNED"}]
    return len(counted) >= inner.num_trials  # and nobody who could win
