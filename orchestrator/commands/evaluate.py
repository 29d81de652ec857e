"""`evaluate`: what pictures are worth, and whether one set is better than another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.command import out

if TYPE_CHECKING:
    from evaluation.folders import SubjectRecord
    from evaluation.metric import Encoders, Metric
    from orchestrator.sources import Found

TEXT = "Score a trial or folders of pictures; given two, say whether the second is better and how sure that is."
_SUMMARY, _RECORDS = "evaluation_summary.csv", "records.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("source", type=Path, metavar="A", help="a trial's directory, or pictures: a folder a subject")
    parser.add_argument("other", type=Path, metavar="B", nargs="?", help="the same of what A is compared with")
    parser.add_argument("--metrics", type=Path, metavar="FILE", help="a study, or a file with `metrics:`; else A's own")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="sets", help="change of FILE")
    parser.add_argument("--prompts", type=Path, help="lines, evaluation_prompts.json, or prompts_and_classes.txt")
    parser.add_argument("--subjects", type=Path, help="lines `folder,subject`, for folders whose name does not say it")
    parser.add_argument("--references", type=Path, help="real pictures: a folder for each folder that is judged")
    parser.add_argument("--token", help="the rare word before the subject in the prompts that were drawn")
    parser.add_argument("--photos", action="store_true", help="the pictures are photos; compare them with one another")
    parser.add_argument("--output", type=Path, default=Path("evaluation_results"), help="where results are written")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="embeddings that all evaluations share")


def run(options: argparse.Namespace) -> int:
    """Score, write, and compare."""
    from orchestrator.sources import Wanted, find_folders

    references = options.references and options.references.resolve()
    wanted = Wanted(options.prompts, options.subjects, references, options.token, options.photos)
    metrics = _metrics(options)
    for metric in metrics.values():
        metric.check()
    sources = {"A": options.source} | ({"B": options.other} if options.other else {})
    found = {name: find_folders(source.resolve(), wanted) for name, source in sources.items()}
    for one in found.values():
        _say(one)
    # Torch is loaded only now that all that can be wrong with names is known.
    encoders = _encoders(options.cache)
    records: dict[str, list[SubjectRecord]] = {}
    for name, one in found.items():
        folder = options.output / name if len(found) > 1 else options.output
        records[name] = _judge(one, metrics, encoders, folder)
    if options.other:
        _compare(records["A"], records["B"], metrics)
    return 0


def _metrics(options: argparse.Namespace) -> dict[str, Metric]:
    from orchestrator.sources import read_metrics, read_trial
    from trainers.errors import ConfigError

    if options.metrics:
        return read_metrics(options.metrics, options.sets)
    if options.sets:
        raise ConfigError("got --set without --metrics; expected the file that it changes")
    if (trial := read_trial(options.source)) is None:
        raise ConfigError(f"{options.source}: got no trial, so no metrics; name a study, or a file, with --metrics")
    return dict(trial.evaluate.metrics)


def _encoders(cache: Path) -> Encoders:
    import torch

    from evaluation.encoders import ClipEncoders
    from trainers.cache import Cache

    return ClipEncoders(torch.device("cuda" if torch.cuda.is_available() else "cpu"), Cache(cache))


def _say(found: Found) -> None:
    for line in found.mapped:
        out.print(f"taken for another name: {line}", soft_wrap=True, markup=False)
    for name, reason in found.left_out.items():
        out.print(f"left out: {name}: {reason}", style="yellow", soft_wrap=True, markup=False)


def _judge(found: Found, metrics: dict[str, Metric], encoders: Encoders, folder: Path) -> list[SubjectRecord]:
    from evaluation.folders import Subject, score_subject, summarise
    from evaluation.records import write_records
    from trainers.rundir import write_atomically

    records: list[SubjectRecord] = []
    for one in found.folders:
        records += score_subject(Subject(one.subject, one.pictures, one.references), metrics, encoders)
    text = summarise(records, list(metrics))
    write_records(folder / _RECORDS, records)
    write_atomically(folder / _SUMMARY, text)
    out.print(text.strip(), highlight=False, soft_wrap=True, markup=False)
    out.print(f"written: {folder / _SUMMARY}, {folder / _RECORDS}", soft_wrap=True)
    return records


def _compare(a: list[SubjectRecord], b: list[SubjectRecord], metrics: dict[str, Metric]) -> None:
    from evaluation.folders import subject_panel
    from evaluation.statistics import paired_difference

    for name, metric in metrics.items():
        difference = paired_difference(subject_panel(b, name), subject_panel(a, name))
        verdict = difference.verdict("B", "A", higher_is_better=metric.higher_is_better)
        out.print(f"{name}: {verdict}", soft_wrap=True, markup=False)
