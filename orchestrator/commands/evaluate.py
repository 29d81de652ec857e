"""`evaluate`: what pictures are worth, and whether one set is better than another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.command import add_sets, out

if TYPE_CHECKING:
    from collections.abc import Mapping

    from evaluation.folders import SubjectRecord
    from evaluation.metric import Encoders, Metric, Scorer
    from orchestrator.sources import Found

TEXT = "Score a trial or folders of pictures; given two, say whether the second is better and how sure that is."
_SUMMARY, _RECORDS = "evaluation_summary.csv", "records.jsonl"
_BASE = "base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    text = "a trial's directory, or pictures: a folder a subject; with --draw an adapter's folder, a trial, or `base`"
    parser.add_argument("source", type=Path, metavar="A", help=text)
    parser.add_argument("other", type=Path, metavar="B", nargs="?", help="the same of what A is compared with")
    parser.add_argument("--metrics", type=Path, metavar="FILE", help="a study, or a file with `metrics:`; else A's own")
    text = "draw the panel of this trial or study first, with A and B, and score it by its metrics"
    parser.add_argument("--draw", type=Path, metavar="SOURCE", help=text)
    text = "change of FILE, or of SOURCE, for example evaluate.seeds=[100,101]"
    add_sets(parser, text)
    parser.add_argument("--prompts", type=Path, help="lines, evaluation_prompts.json, or prompts_and_classes.txt")
    parser.add_argument("--subjects", type=Path, help="lines `folder,subject`, for folders whose name does not say it")
    parser.add_argument("--references", type=Path, help="real pictures: a folder for each folder that is judged")
    parser.add_argument("--token", help="the rare word before the subject in the prompts that were drawn")
    parser.add_argument("--photos", action="store_true", help="the pictures are photos; compare them with one another")
    parser.add_argument("--output", type=Path, default=Path("evaluation_results"), help="where results are written")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="embeddings that all evaluations share")


def run(options: argparse.Namespace) -> int:
    """Score, write, and compare."""
    records, metrics = _drawn(options) if options.draw else _found(options)
    if options.other:
        _compare(records["A"], records["B"], metrics)
    return 0


def _drawn(options: argparse.Namespace) -> tuple[dict[str, list[SubjectRecord]], dict[str, Metric]]:
    """Draw the panel with each of A and B, and score it."""
    from orchestrator.origin import find_origin
    from trainers.errors import ConfigError
    from trainers.rundir import RunDir

    given = ("metrics", "prompts", "subjects", "references", "token", "photos")
    if extra := [name for name in given if getattr(options, name)]:
        raise ConfigError(
            f"got --{extra[0]} with --draw; expected it from {options.draw} alone; change that with --set"
        )
    sources: dict[str, Path] = {"A": options.source} | ({"B": options.other} if options.other else {})
    origins = {
        name: find_origin(options.draw, options.sets, *_adapter(source), base=str(source) == _BASE)
        for name, source in sources.items()
    }
    trial = origins["A"].trial
    trial.evaluate.check()
    for origin in origins.values():
        origin.check(trial.evaluate.all_prompts)
    held_out = trial.train.data.split().held_out if trial.evaluate.needs_references else ()
    # Torch is loaded only now that all that can be wrong with names is known.
    from evaluation.evaluate import evaluate, open_scorers
    from evaluation.folders import SubjectRecord
    from evaluation.records import read_records
    from trainers.train import build_accelerator

    accelerator = build_accelerator(trial.train)
    records: dict[str, list[SubjectRecord]] = {}
    scorers: Mapping[str, Scorer] = {}
    for name, origin in origins.items():
        run = RunDir((options.output / name if len(origins) > 1 else options.output).resolve())
        model, what = origin.load(accelerator)
        scorers = scorers or open_scorers(trial.evaluate, held_out, model.device, options.cache)
        out.print(f"{name} is {what}", soft_wrap=True, markup=False)
        with accelerator.autocast():
            evaluate(model, trial.evaluate, scorers, run)
        found = [one.model_copy(update={"file": str(run.path / one.file)}) for one in read_records(run.records)]
        records[name] = [SubjectRecord(subject="panel", **dict(one)) for one in found]
        _write(records[name], trial.evaluate.metrics, run.path)
    return records, dict(trial.evaluate.metrics)


def _adapter(source: Path) -> tuple[Path, ...]:
    """The adapter's folder that A or B means, if it means one."""
    from trainers.rundir import RunDir

    if str(source) == _BASE:
        return ()
    return (RunDir(source).adapter if RunDir(source).trial.is_file() else source,)


def _found(options: argparse.Namespace) -> tuple[dict[str, list[SubjectRecord]], dict[str, Metric]]:
    """Score pictures that are there."""
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
        _check_classes(one, metrics)
    # Torch is loaded only now that all that can be wrong with names is known.
    encoders = _encoders(options.cache)
    records: dict[str, list[SubjectRecord]] = {}
    for name, one in found.items():
        folder = options.output / name if len(found) > 1 else options.output
        records[name] = _judge(one, metrics, encoders, folder)
    return records, metrics


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


def _check_classes(found: Found, metrics: dict[str, Metric]) -> None:
    from trainers.errors import ConfigError

    if of_class := [name for name, metric in metrics.items() if metric.of_class]:
        for folder in found.folders:
            if not folder.class_prompts:
                raise ConfigError(
                    f"metric {of_class[0]} judges pictures of a trial's class_prompts, and {folder.subject} has none; "
                    "expected a trial that has, or metrics without it"
                )


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
    from evaluation.folders import Subject, score_subject

    records: list[SubjectRecord] = []
    for one in found.folders:
        subject = Subject(one.subject, one.pictures, one.references, one.class_prompts)
        records += score_subject(subject, metrics, encoders)
    _write(records, metrics, folder)
    return records


def _write(records: list[SubjectRecord], metrics: Mapping[str, Metric], folder: Path) -> None:
    from evaluation.folders import summarise
    from evaluation.records import write_records
    from trainers.rundir import write_atomically

    text = summarise(records, list(metrics))
    write_records(folder / _RECORDS, records)
    write_atomically(folder / _SUMMARY, text)
    out.print(text.strip(), highlight=False, soft_wrap=True, markup=False)
    out.print(f"written: {folder / _SUMMARY}, {folder / _RECORDS}", soft_wrap=True)


def _compare(a: list[SubjectRecord], b: list[SubjectRecord], metrics: dict[str, Metric]) -> None:
    from evaluation.folders import subject_panel
    from evaluation.statistics import paired_difference

    for name, metric in metrics.items():
        difference = paired_difference(subject_panel(b, name), subject_panel(a, name))
        verdict = difference.verdict("B", "A", higher_is_better=metric.higher_is_better)
        out.print(f"{name}: {verdict}", soft_wrap=True, markup=False)
