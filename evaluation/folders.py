"""Scores of pictures that lie in folders, whoever made them: one folder, one subject, one line of the summary."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evaluation.evaluate import score
from evaluation.records import Record, panel
from evaluation.statistics import estimate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from evaluation.metric import Encoders, Metric, Scorer
    from trainers.batch import Source
    from trainers.prompt import Request

_BATCH = 16
"""Pictures that are embedded together."""


@dataclass(frozen=True)
class Subject:
    """Pictures of one subject."""

    name: str
    pictures: Mapping[Request, Path]
    """Absolute paths."""
    references: Sequence[Source] = ()
    """Real pictures of it. None of `pictures` is compared with itself."""


class SubjectRecord(Record):
    """What was measured on one picture of a subject; `file` is absolute."""

    subject: str


def score_subject(subject: Subject, metrics: Mapping[str, Metric], encoders: Encoders) -> list[SubjectRecord]:
    """Judge each picture once; what `encoders` have seen before is not computed again.

    Raises:
        ModelError: A scoring model is missing or broken.
        DataError: A metric needs references and there are none, or a picture cannot be read.
    """
    shared = {name: metric.open(encoders, subject.references) for name, metric in metrics.items()}
    own = {request for request, file in subject.pictures.items() if file in subject.references}
    records: dict[Request, Record] = {}
    others = {request: str(file) for request, file in subject.pictures.items() if request not in own}
    if others:
        records |= dict(zip(others, _score(others, shared), strict=True))
    for request in own:
        file = subject.pictures[request]
        without = [source for source in subject.references if source != file]
        scorers = {
            name: metric.open(encoders, without) if metric.needs_references else shared[name]
            for name, metric in metrics.items()
        }
        records[request] = _score({request: str(file)}, scorers)[0]
    return [SubjectRecord(subject=subject.name, **dict(records[request])) for request in subject.pictures]


def _score(files: Mapping[Request, str], scorers: Mapping[str, Scorer]) -> list[Record]:
    from pathlib import Path

    return score(Path("/"), files, scorers, _BATCH)


def subject_panel(records: Sequence[SubjectRecord], metric: str) -> dict[tuple[str, int], float]:
    """One metric's value for each (subject and prompt, seed): equal prompts of two subjects are two prompts."""
    return {(f"{one.subject}: {one.prompt}", one.seed): one.values[metric] for one in records}


def summarise(records: Sequence[SubjectRecord], metrics: Sequence[str]) -> str:
    """`evaluation_summary.csv`: each subject's number of prompts and mean of each metric.

    A metric's column is its name in capitals (`clip_i` is `CLIP-I`); undefined is empty.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["subject", "num_prompts", *(name.upper().replace("_", "-") for name in metrics)])
    for subject in dict.fromkeys(record.subject for record in records):
        own = [record for record in records if record.subject == subject]
        means = [estimate(panel(own, name)) for name in metrics]
        cells = [f"{found.mean:.6f}" if found.num_samples else "" for found in means]
        table.writerow([subject, len({record.prompt for record in own}), *cells])
    return text.getvalue()
