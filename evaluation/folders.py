"""Scores of pictures that lie in folders, whoever made them: one folder, one subject, one line of the summary."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from evaluation.evaluate import judge, look, split_panel
from evaluation.metric import PictureScorer, Scorer
from evaluation.records import Record, panel
from evaluation.statistics import estimate
from trainers.prompt import Prompt, Request, Sample

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from evaluation.metric import Encoders, Metric
    from trainers.batch import Source

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
    class_prompts: Collection[Prompt] = ()
    """Prompts among those of `pictures` that name its class and not it."""


class SubjectRecord(Record):
    """What was measured on one picture of a subject; `file` is absolute."""

    subject: str


def score_subject(subject: Subject, metrics: Mapping[str, Metric], encoders: Encoders) -> list[SubjectRecord]:
    """Judge each picture once; what `encoders` have seen before is not computed again.

    Raises:
        ModelError: A scoring model is missing or broken.
        DataError: A metric needs references and there are none, or a picture cannot be read.
    """
    scorers = {name: _open(metric, subject, encoders) for name, metric in metrics.items()}
    files = {request: str(file) for request, file in subject.pictures.items()}
    records: list[Record] = []
    for one in split_panel(files, subject.class_prompts, metrics, scorers):
        records += judge(one, dict(look(Path("/"), one, _BATCH)))
    return [SubjectRecord(subject=subject.name, **dict(record)) for record in records]


def _open(metric: Metric, subject: Subject, encoders: Encoders) -> Scorer:
    """A scorer that compares none of the pictures with itself."""
    shared = metric.open(encoders, subject.references)
    if not metric.needs_references:
        return shared
    own = {request: file for request, file in subject.pictures.items() if file in subject.references}
    without = {
        request: metric.open(encoders, [source for source in subject.references if source != file])
        for request, file in own.items()
    }
    return _LeaveOneOut(shared, without) if without else shared


class _LeaveOneOut(PictureScorer):
    """Compares pictures that are references themselves with the others."""

    def __init__(self, shared: Scorer, without: Mapping[Request, Scorer]) -> None:
        self.model = shared.model
        self._shared, self._without = shared, without

    @override
    def values(self, samples: Sequence[Sample]) -> list[float]:
        return [
            self._without.get(Request(sample.prompt, sample.seed), self._shared).values([sample])[0]
            for sample in samples
        ]


def subject_panel(records: Sequence[SubjectRecord], metric: str) -> dict[tuple[str, int], float]:
    """One metric's value for each (subject and prompt, seed): equal prompts of two subjects are two prompts."""
    return {(f"{one.subject}: {one.prompt}", one.seed): one.values[metric] for one in records if metric in one.values}


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
