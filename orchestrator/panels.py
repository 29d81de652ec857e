"""A trial's objective, prompt by prompt: what its noise, and comparisons with other trials, are computed from.

Of several values, this is the first.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from evaluation.records import read_records
from trainers.rundir import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import optuna

    from evaluation.records import Record
    from orchestrator.spec import StudySpec
    from trainers.rundir import RunDir

log = logging.getLogger(__name__)

PROMPT_VALUES = "prompt_values"
"""Attribute of a scored trial: the objective of each prompt, in the panel's order; null is undefined."""
NOTES = "sampler_notes"
"""Attribute of a study: what its beginning and its sampler have to say."""
NOTES_FILE = "search.txt"
"""The same for people, in the study's folder."""


def prompt_values(spec: StudySpec, run: RunDir) -> list[float | None]:
    """The objective's mean over each prompt's pictures, in the panel's order; None if no picture has a value.

    Trials draw the same (prompt, seed) pairs, so that values of two trials are paired. A run that kept no record of its
    pictures has none.
    """
    if not run.records.exists():
        return []
    values: dict[str, list[float]] = {}
    for (prompt, _), value in picture_values(spec, read_records(run.records)).items():
        values.setdefault(prompt, []).extend([] if math.isnan(value) else [value])
    return [math.fsum(found) / len(found) if found else None for found in values.values()]


def say_notes(study: optuna.Study, root: Path, notes: Sequence[str]) -> None:
    """Log what the sampler has to say, once, and keep it for others in the study and in its folder."""
    known: list[str] = study.user_attrs.get(NOTES, [])
    if list(notes) != known:
        study.set_user_attr(NOTES, list(notes))
        write_atomically(root / NOTES_FILE, "".join(f"{note}\n" for note in notes))
        for note in notes:
            if note not in known:
                log.info("%s", note)


def picture_values(spec: StudySpec, records: Sequence[Record]) -> dict[tuple[str, int], float]:
    """The objective's first value of every picture by (prompt, seed); its mean over the panel is the trial's.

    A score that some prompts alone have (those of a subject's class) counts there for all: a panel of which they are a
    fifth weighs it five times. Pictures that the objective says nothing of are left out.
    """
    parts, signs = list(spec.objective.parts().values()), spec.trial.evaluate.higher_is_better
    prompts = {name: {record.prompt for record in records if name in record.values} for name in parts[0]}
    nothing = {name: 0.0 for part in parts for name in part}
    count = len(set[str]().union(*prompts.values()))
    values: dict[tuple[str, int], float] = {}
    for record in records:
        measured = [name for name in prompts if name in record.values]
        if measured:
            shares = {name: record.values[name] * (count / len(prompts[name])) for name in measured}
            values[record.prompt, record.seed] = spec.objective.sample_values(nothing | shares, signs)[0]
    return values
