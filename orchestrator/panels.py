"""A trial's objective, prompt by prompt: what its noise, and comparisons with other trials, are computed from.

Of several values, this is the first.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evaluation.records import read_records

if TYPE_CHECKING:
    from orchestrator.spec import StudySpec
    from trainers.rundir import RunDir

PROMPT_VALUES = "prompt_values"
"""Attribute of a scored trial: the objective of each prompt, in the panel's order; null is undefined."""
NOTES = "sampler_notes"
"""Attribute of a study: what its sampler has to say."""
NOTES_FILE = "search.txt"
"""The same for people, in the study's folder."""


def prompt_values(spec: StudySpec, run: RunDir) -> list[float | None]:
    """The objective's mean over each prompt's pictures, in the panel's order; None if no picture has a value.

    Trials draw the same (prompt, seed) pairs, so that values of two trials are paired. A run that kept no record of its
    pictures has none.
    """
    if not run.records.exists():
        return []
    signs = spec.trial.evaluate.higher_is_better
    values: dict[str, list[float]] = {}
    for record in read_records(run.records):
        value = spec.objective.sample_values(record.values, signs)[0]
        values.setdefault(record.prompt, []).extend([] if math.isnan(value) else [value])
    return [math.fsum(found) / len(found) if found else None for found in values.values()]
