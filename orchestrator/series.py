"""A file that holds several studies: one for each subject, and stages that take what earlier ones have found."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from pydantic import Field, ValidationError

from orchestrator.complaints import config_error, did_you_mean
from orchestrator.foreach import ForEach, fill
from orchestrator.spec import StudySpec
from orchestrator.views import run_dir
from orchestrator.yaml import Document, Tree, assign, load, merge
from trainers.config import Config
from trainers.errors import ConfigError, DataError, StorageError
from trainers.rundir import read_json, thaw, write_atomically

WINNER = "winner.json"
"""In a study's folder, once it has ended, until it is run again."""
_BEFORE = ("name", "output", "foreach", "stages")
"""Keys of a file of stages that are not handed on to each of them."""
_ENDS: Any = {
    "limits": {"trials", "hours", "gpu_hours", "target", "patience"},
    "sampler": True,
    "confirm_seeds": True,
    "confirm_top": True,
}
"""What says when a study ends."""


class Winner(Config):
    """What a study that has ended hands on."""

    study: str
    trial: int | None
    """None: its objective has several values, so it has a front and no winner."""
    value: float | None
    params: dict[str, Any]
    ending: dict[str, Any] = Field(default_factory=dict[str, Any])
    """What said when it ends; under other words it may go on."""


class FromStudy(Config):
    """The `from_study:` section: what is taken from the winner of another study, which must have ended."""

    study: str
    """An earlier stage of the same file, or the folder of a study (`./../runs/hpo`)."""
    take: dict[str, str] | None = None
    """Path into the trial to the path of the winner's trial that it is taken from; null is all that was searched."""
    adapter: bool = False
    """Draw with the winner's adapter instead of training: `train` and `seed` are then the winner's, too."""


@dataclass(frozen=True)
class Member:
    """One study of a file."""

    document: Document
    stage: str = ""
    subject: str = ""
    source: FromStudy | None = None
    source_root: Path | None = None
    """The folder of the study that `source` names."""
    warm_root: Path | None = None
    """The folder of the earlier stage that `warm_start` names."""

    @property
    def name(self) -> str:
        """The study's."""
        return str(self.document.tree.get("name", ""))

    @property
    def waits_for(self) -> Path | None:
        """The study that has to end first."""
        return next((root for root in (self.source_root, self.warm_root) if root and not _has_ended(root)), None)

    def load(self) -> tuple[StudySpec, Document]:
        """The study, with what it takes from another one if that has ended, and as the file says it otherwise.

        Raises:
            ConfigError: What is wrong with it, in one line.
        """
        document = self.document
        if self.source and self.source_root and _has_ended(self.source_root):
            document = Document(_take(document.tree, self.source, self.source_root), document.origins, document.source)
        try:
            spec = StudySpec.model_validate(document.tree)
        except ValidationError as error:
            raise config_error(error, document, StudySpec) from error
        if spec.warm_start and self.warm_root and not _has_ended(self.warm_root):  # nothing is known of its trials
            spec = spec.model_copy(update={"warm_start": spec.warm_start.model_copy(update={"study": None})})
        return spec, document


@dataclass(frozen=True)
class Series:
    """All studies of a file, in the order in which they run."""

    name: str
    root: Path
    """Of what is said of all of them together."""
    members: tuple[Member, ...]
    is_single: bool
    """Whether the file is one study, without subjects and stages."""
    only: tuple[str, ...] = ()
    """Names, stages and subjects that are asked for; all of them must fit."""

    @property
    def chosen(self) -> tuple[Member, ...]:
        """The studies that are asked for."""
        return tuple(member for member in self.members if set(self.only) <= {member.name, member.stage, member.subject})


def load_series(path: Path, sets: Sequence[str] = ()) -> Series:
    """Read a study file, whether it holds one study or several.

    A change of a file with stages is made to each of them, unless it begins with stages, foreach, name or output.

    Raises:
        ConfigError: What is wrong with it, in one line.
        DataError: The subjects' folders or prompts cannot be read.
    """
    plain = load(path)
    own = sets if "stages" not in plain.tree else [text for text in sets if re.split(r"[.=]", text)[0] in _BEFORE]
    document = load(path, own)
    later = [text for text in sets if text not in own]
    members = tuple(_members(document, _Place(), later))
    tree = document.tree
    if not ("foreach" in tree or "stages" in tree):
        spec, _ = members[0].load()
        return Series(spec.name, spec.root, members, is_single=True)
    output = Path(str(tree.get("output", Path.cwd() / "runs")))
    return Series(str(tree.get("name", "")), output / str(tree.get("name", "")), members, is_single=False)


def write_winner(root: Path, winner: Winner) -> None:
    """Say that the study in `root` has ended, and with what."""
    write_atomically(root / WINNER, winner.model_dump_json(indent=2) + "\n")


def ending(spec: StudySpec) -> dict[str, Any]:
    """What says when the study ends."""
    return spec.model_dump(mode="json", include=_ENDS)


def read_winner(root: Path) -> Winner:
    """What the study in `root` hands on.

    Raises:
        ConfigError: It has not ended, or the file is damaged.
    """
    try:
        winner = read_json(root / WINNER, Winner)
    except StorageError as error:
        raise ConfigError(f"{error}, or run that study again, which writes it anew") from error
    if winner is None:
        raise ConfigError(f"from_study.study: got no {WINNER} in {root}; expected a study that has ended; run it first")
    return winner


@dataclass(frozen=True)
class _Place:
    """Where in its file a study stands."""

    stage: str = ""
    subject: str = ""
    roots: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """Folders of earlier stages that are one study."""


def _members(document: Document, place: _Place, sets: Sequence[str] = ()) -> Iterator[Member]:
    tree = document.tree
    if tree.get("foreach") is not None:
        rest = {key: value for key, value in tree.items() if key != "foreach"}
        for one in _subjects(document):
            filled = {**fill(rest, one), "name": f"{_name(document)}-{one.slug}"}
            own = Document(filled, document.origins, document.source)
            yield from _members(own, replace(place, subject=one.name), sets)
    elif "stages" in tree:
        yield from _stages(document, sets, place.subject)
    else:
        yield _member(document, place)


def _subjects(document: Document) -> Sequence[Any]:
    try:
        found = ForEach.model_validate(document.tree["foreach"])
    except ValidationError as error:
        below = {at[1:]: where for at, where in document.origins.items() if at[:1] == ("foreach",)}
        own = Document(document.tree["foreach"], below, document.where(("foreach",)))
        raise config_error(error, own, ForEach) from error
    try:
        return found.list()
    except (ConfigError, DataError) as error:
        raise ConfigError(f"{document.where(('foreach', 'subject'))}: {error}") from error


def _name(document: Document) -> str:
    """What the studies' names begin with."""
    name = document.tree.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"{document.where(('name',))}: name: got {name!r}; expected a text")
    return name


def _stages(document: Document, sets: Sequence[str], subject: str) -> Iterator[Member]:
    stages = document.tree["stages"]
    if not isinstance(stages, dict) or not stages:
        raise ConfigError(f"{document.where(('stages',))}: stages: got {stages!r}; expected studies by name")
    common = {key: value for key, value in document.tree.items() if key != "stages"}
    name = _name(document)
    roots: dict[str, Path] = {}
    for stage, tree in cast("dict[str, Any]", stages).items():
        if not isinstance(tree, dict):
            raise ConfigError(f"{document.where(('stages', stage))}: stages.{stage}: got {tree!r}; expected a mapping")
        kept = {key: common[key] for key in ("output",) if key in common}
        full = {**merge(common, cast("Tree", tree)), **kept, "name": f"{name}-{stage}"}
        below = {at[2:]: where for at, where in document.origins.items() if at[:2] == ("stages", stage)}
        full.pop("stages", None)
        own = Document(full, {**document.origins, **below}, document.source)
        for change in sets:
            own = assign(own, change)
        members = list(_members(own, _Place(stage, subject, dict(roots))))
        if len(members) == 1:
            roots[stage] = Path(str(full.get("output", Path.cwd() / "runs"))) / members[0].name
        yield from members


def _member(document: Document, place: _Place) -> Member:
    tree = {key: value for key, value in document.tree.items() if key not in {"from_study", "foreach"}}
    tree, warm_root = _find_warm_start(tree, document, place)
    own = Document(tree, document.origins, document.source)
    section = document.tree.get("from_study")
    if section is None:
        return Member(own, place.stage, place.subject, warm_root=warm_root)
    where = document.where(("from_study",))
    try:
        source = FromStudy.model_validate(section)
    except ValidationError as error:
        below = {at[1:]: origin for at, origin in document.origins.items() if at[:1] == ("from_study",)}
        raise config_error(error, Document(section, below, where), FromStudy) from error
    root = _find_root(source.study, "from_study", document, place)
    return Member(own, place.stage, place.subject, source, root, warm_root)


def _find_warm_start(tree: Tree, document: Document, place: _Place) -> tuple[Tree, Path | None]:
    """The study with the folder of the stage that `warm_start` names, and that folder if it is a stage's."""
    section = tree.get("warm_start")
    name = cast("Tree", section).get("study") if isinstance(section, dict) else None
    if not isinstance(name, str):
        return tree, None  # which the study's own check refuses, if anything is wrong
    root = _find_root(name, "warm_start", document, place)
    found = {**tree, "warm_start": {**cast("Tree", section), "study": str(root)}}
    return found, root if name in place.roots else None


def _find_root(name: str, section: str, document: Document, place: _Place) -> Path:
    """The folder of an earlier stage, or of another study."""
    root = place.roots.get(name) or Path(name)
    if not root.is_absolute():
        raise ConfigError(
            f"{document.where((section, 'study'))}: {section}.study: got {name!r}; expected an earlier stage, or a "
            f"study's folder that begins with /, ~/, ./ or ../; {did_you_mean(name, place.roots)}"
        )
    return root


def _has_ended(root: Path) -> bool:
    return (root / WINNER).is_file()


def _take(tree: Tree, source: FromStudy, root: Path) -> Tree:
    """The study with the winner's values, and its adapter if that is wanted."""
    winner = read_winner(root)
    if winner.trial is None:
        raise ConfigError(
            f"from_study.study: got {root}, whose objective has several values and so a front and no winner; expected "
            "a study of one value, or `warm_start`, which takes over trials"
        )
    run = run_dir(root, winner.trial)
    if not run.trial.is_file():
        raise ConfigError(f"from_study.study: got no {run.trial}; expected the winner's trial, which {WINNER} names")
    frozen = thaw(run.trial)
    take = source.take
    if take is None:
        trained = ("train.", "seed") if source.adapter else ()
        take = {path: path for path in winner.params if not path.startswith(trained)}
    changes: Tree = {}
    if source.adapter:
        changes = {"train": frozen["train"], "seed": frozen["seed"], "adapter": str(run.adapter)}
    given: object = tree.get("trial") or {}
    if not isinstance(given, dict):
        return tree  # which the study's own check refuses
    trial = {**cast("Tree", given), **changes}
    for target, path in take.items():
        value = _value(frozen, path, run.trial)
        for key in reversed(target.split(".")):
            value = {key: value}
        trial = merge(trial, cast("Tree", value))
    return {**tree, "trial": trial}


def _value(frozen: Any, path: str, file: Path) -> Any:
    for key in path.split("."):
        if not isinstance(frozen, dict) or key not in frozen:
            raise ConfigError(
                f"from_study.take: got the path {path}, which {file} does not have; expected one that it has"
            )
        frozen = cast("Tree", frozen)[key]
    return frozen
