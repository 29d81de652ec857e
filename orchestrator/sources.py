"""What a command is pointed at: a study, a trial's directory, or a folder of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from pydantic import TypeAdapter, ValidationError

from evaluation.config import MetricName
from evaluation.metric import Metric
from evaluation.records import read_records
from evaluation.subjects import (
    empty_folders,
    list_pictures,
    map_folders,
    match_prompts,
    read_book,
    read_table,
    subject_folders,
)
from orchestrator.complaints import config_error
from orchestrator.spec import TrialSpec
from orchestrator.yaml import Document, load
from trainers.errors import ConfigError, DataError
from trainers.prompt import Prompt, Request
from trainers.rundir import RunDir, thaw

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from evaluation.subjects import PromptBook
    from trainers.batch import Source


@dataclass(frozen=True)
class Folder:
    """Pictures of one subject, and what to compare them with."""

    subject: str
    pictures: Mapping[Request, Path]
    references: Sequence[Source]
    class_prompts: Sequence[Prompt] = ()


@dataclass(frozen=True)
class Wanted:
    """What tells pictures' subjects, prompts and references, if the pictures themselves do not."""

    prompts: Path | None = None
    table: Path | None = None
    references: Path | None = None
    token: str | None = None
    photos: bool = False


@dataclass(frozen=True)
class Found:
    """Folders that can be judged, and the others, each with the reason."""

    folders: Sequence[Folder]
    left_out: Mapping[str, str]
    mapped: Sequence[str] = ()
    """Folders that were taken for a subject of another name."""


def read_trial(folder: Path, sets: Sequence[str] = ()) -> TrialSpec | None:
    """The frozen trial of a run directory; None if it is something else.

    Args:
        folder: A run directory.
        sets: Changes `dotted.path=value`; the file stays as it is.

    Raises:
        ConfigError: It was edited, this version of the project cannot read it, or the changes make no valid trial.
    """
    file = RunDir(folder).trial
    if not file.is_file():
        return None
    frozen = thaw(file)
    document = load(file, sets) if sets else Document(frozen)
    tree = {key: value for key, value in document.tree.items() if key != "sha256"}
    try:
        return TrialSpec.model_validate(tree)
    except ValidationError as error:
        if sets:
            raise config_error(error, document, TrialSpec) from error
        raise ConfigError(f"{file}: not a trial of this version ({error.errors()[0]['msg']}); run it again") from error


def read_metrics(path: Path, sets: Sequence[str]) -> dict[str, Metric]:
    """The metrics of a study, or of a file that holds `metrics:` alone.

    Raises:
        ConfigError: There are none, or one is not valid.
    """
    tree = load(path, sets).tree
    entries: Any = tree
    for key in ("metrics",) if "metrics" in tree else ("trial", "evaluate", "metrics"):
        entries = cast("dict[str, Any]", entries).get(key) if isinstance(entries, dict) else None
    try:
        return TypeAdapter(dict[MetricName, Metric]).validate_python(entries or None)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("metrics", *first["loc"])))
        raise ConfigError(f"{path}: {where}: {first['msg']}; expected a mapping of names to metrics") from error


def find_folders(source: Path, wanted: Wanted) -> Found:
    """Pictures below `source` by subject, prompt and seed.

    Raises:
        DataError: There are no pictures, no prompts, or none that anything is known of.
        ConfigError: The table of subjects names one that has no prompts.
    """
    if (trial := read_trial(source)) is not None:
        return Found([_of_trial(source, trial)], {})
    folders = subject_folders(source)
    empty = dict.fromkeys(empty_folders(source), "no pictures in it")
    if wanted.prompts is None:
        raise DataError(f"{source}: got pictures without prompts; name the file of prompts with --prompts")
    book = read_book(wanted.prompts, wanted.token)
    if not book.subjects:
        return _matched({name: (name, folder) for name, folder in folders.items()}, empty, book, wanted)
    found = map_folders(folders, book.subjects, read_table(wanted.table) if wanted.table else None)
    chosen = {one.folder: (one.subject, folders[one.folder]) for one in found.mapped}
    return _matched(chosen, {**empty, **found.unmapped}, book, wanted)


def _matched(
    chosen: Mapping[str, tuple[str, Path]], unmapped: Mapping[str, str], book: PromptBook, wanted: Wanted
) -> Found:
    ready: list[Folder] = []
    left_out = dict(unmapped)
    for name, (subject, folder) in chosen.items():
        files = list_pictures(folder)
        pictures, strange = _prompted(files, subject, book, photos=wanted.photos)
        left_out |= {f"{name}/{file.name}": "its name is no prompt's of this subject" for file in strange}
        references = _references(wanted, name, folder, count=len(chosen))
        if wanted.references and not references:
            left_out[name] = f"no pictures in {wanted.references / name} to compare it with"
        elif pictures:
            ready.append(Folder(name, pictures, references))
    if not ready:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise DataError(f"nothing can be judged: {reasons}")
    return Found(
        ready, left_out, [f"{name} is {subject!r}" for name, (subject, _) in chosen.items() if name != subject]
    )


def _prompted(
    files: Sequence[Path], subject: str, book: PromptBook, *, photos: bool
) -> tuple[dict[Request, Path], list[Path]]:
    if not photos:
        return match_prompts(files, book.subjects.get(subject, book.prompts))
    if subject not in book.photos:
        raise DataError("got --photos with prompts that name no subjects; expected a file that does")
    return {Request(book.photos[subject], place): file for place, file in enumerate(files)}, []


def _references(wanted: Wanted, name: str, folder: Path, *, count: int) -> tuple[Path, ...]:
    root = wanted.references
    if root is None:
        return list_pictures(folder) if wanted.photos else ()
    return list_pictures(root / name) or (list_pictures(root) if count == 1 else ())


def _of_trial(folder: Path, trial: TrialSpec) -> Folder:
    """A trial's own samples, and what it held out."""
    run = RunDir(folder)
    by_name = {str(prompt): prompt for prompt in trial.evaluate.all_prompts}
    pictures = {Request(by_name[one.prompt], one.seed): folder / one.file for one in read_records(run.records)}
    references = trial.train.data.split().held_out if trial.evaluate.needs_references else ()
    return Folder("trial", pictures, references, trial.evaluate.class_prompts)
