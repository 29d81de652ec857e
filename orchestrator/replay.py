"""Running a frozen trial once more, to see whether it gives the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from orchestrator.controller import WORKER
from orchestrator.ending import run_to_end
from orchestrator.launcher import Job, Launcher
from orchestrator.spec import StudySpec
from trainers.errors import ConfigError, LaunchError
from trainers.rundir import RunDir, recorded_hash, thaw, write_atomically

if TYPE_CHECKING:
    from trainers.rundir import Score

STUDY_FILE = "study.yaml"


@dataclass(frozen=True)
class Replay:
    """Scores of a trial and of its repetition."""

    run: RunDir
    """The repetition."""
    before: Mapping[str, Score]
    after: Mapping[str, Score]
    changed_versions: Mapping[str, tuple[str, str]]
    """What differs between the code and libraries of the two, by name."""

    @property
    def is_equal(self) -> bool:
        """Whether every score has the same mean, bit for bit."""
        return {name: score.mean for name, score in self.before.items()} == {
            name: score.mean for name, score in self.after.items()
        }


def replay(folder: Path) -> Replay:
    """Run the frozen trial of `folder` again in a new directory and wait for its result.

    Raises:
        ConfigError: `folder` holds no finished trial, or its `trial.yaml` was edited.
        LaunchError: The repetition ended without a result.
    """
    original = RunDir(folder.resolve())
    before = original.read_result()
    if before is None or not original.trial.exists():
        raise ConfigError(f"{folder}: got a folder without trial.yaml and result.json; expected a scored trial")
    thaw(original.trial)
    root = original.path.parents[1]
    launcher, shares = _launcher(root)
    run = _new_folder(root, original)
    write_atomically(run.trial, original.trial.read_text(encoding="utf-8"))
    digest = recorded_hash(run.trial)
    anew = ("--trained", str(run.path / "trained")) if shares else ()
    words = (str(run.path), "--sha256", digest, "--cache", str(root.parent / "cache"), *anew)
    run_to_end(launcher, Job(WORKER, words, run.path))
    after = run.read_result()
    if after is None:
        error = run.read_error()
        got = f"{error.reason}: {error.message}" if error else "a job that ended without a result"
        raise LaunchError(f"{run.path}: got {got}; expected scores; see {run.log}")
    names = sorted(before.versions.keys() & after.versions.keys())
    versions = {name: (before.versions[name], after.versions[name]) for name in names}
    changed = {name: pair for name, pair in versions.items() if pair[0] != pair[1]}
    return Replay(run, before.scores, after.scores, changed)


def _launcher(root: Path) -> tuple[Launcher, bool]:
    """The study's own, and whether its trials share a training.

    Results are bit-equal only for the same number of processes; a shared training is repeated apart from the trials'.
    """
    path = root / STUDY_FILE
    if not path.exists():
        raise ConfigError(f"{path}: got no such file; expected the study that the trial belongs to")
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Launcher.model_validate(tree["launcher"]), StudySpec.model_validate(tree).shares_training


def _new_folder(root: Path, original: RunDir) -> RunDir:
    folder = root / "replays"
    endings = [path.name.rpartition("-")[2] for path in folder.glob(f"{original.path.name}-*")]
    last = max((int(ending) for ending in endings if ending.isdecimal()), default=0)
    run = RunDir(folder / f"{original.path.name}-{last + 1}")
    run.path.mkdir(parents=True)
    return run
