"""`foreach:` in a study file: one folder is one subject, with an adapter and an optimisation of its own."""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field, PositiveInt
from typing_extensions import override

from evaluation.subjects import empty_folders, map_folders, read_book, read_table, subject_folders
from trainers.config import Choice, Config, LocalPath
from trainers.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from evaluation.subjects import PromptBook
    from trainers.prompt import Prompt

_PHOTO = "a photo of a "
"""How the books of prompts begin what a photo of a subject shows; its class follows."""


@dataclass(frozen=True)
class Subject:
    """What a study is repeated for."""

    name: str
    words: Mapping[str, str]
    """What `{subject}`, `{folder}` and `{class}` stand for."""
    prompts: Sequence[Prompt] = field(default=())
    """Its panel, if that comes from a file."""

    @property
    def slug(self) -> str:
        """The name as part of a study's; a hash stands for words without Latin letters. Empty for signs alone."""
        latin = re.sub(r"[^a-z0-9_-]+", "-", self.name.lower()).strip("-_")
        if self.name.isascii() or re.search(r"[a-z]", latin):
            return latin
        return f"{latin}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}".strip("-")


class Subjects(Choice):
    """Family of `foreach.subject:` sections."""

    @abstractmethod
    def list(self) -> tuple[Subject, ...]:
        """All subjects, in order.

        Raises:
            ConfigError, DataError: There are none, or nothing is known of one.
        """


class NamedSubjects(Subjects):
    """Names; `{subject}` stands for them in the study."""

    kind: Literal["names"] = "names"
    names: tuple[str, ...] = Field(min_length=1)

    @override
    def list(self) -> tuple[Subject, ...]:
        words = {name: {"{subject}": name, "{class}": name.replace("_", " ")} for name in self.names}
        return tuple(Subject(name, words[name]) for name in self.names)


class FolderSubjects(Subjects):
    """The folders of pictures inside a folder; a file of prompts may say what each is asked to show."""

    kind: Literal["folders"] = "folders"
    path: LocalPath
    only: tuple[str, ...] | None = None
    """These folders alone; null takes all of them."""
    without: tuple[str, ...] = ()
    """Folders to leave out."""
    prompts: LocalPath | None = None
    """`evaluation_prompts.json`, DreamBench's `prompts_and_classes.txt`, or lines; null leaves prompts to the study."""
    table: LocalPath | None = None
    """Lines `folder,subject`, for folders whose name does not say which subject of the prompts they are."""
    token: str | None = None
    """The rare word before the class in prompts, if adapters learn one; scorers are not told it."""
    max_prompts: PositiveInt | None = None
    """So many of each subject's prompts, evenly spread over the file; null takes all."""

    @override
    def list(self) -> tuple[Subject, ...]:
        folders = subject_folders(self.path)
        names = sorted([*folders, *empty_folders(self.path)])
        if strange := [name for name in (*(self.only or ()), *self.without) if name not in names]:
            raise ConfigError(
                f"foreach.subject: got the folder {strange[0]!r}; expected one of {', '.join(names)} in {self.path}"
            )
        wanted = [name for name in names if name not in self.without and (self.only is None or name in self.only)]
        if empty := [name for name in wanted if name not in folders]:
            raise ConfigError(
                f"foreach.subject: got no pictures in {', '.join(empty)} of {self.path}; expected some in each folder, "
                "or its name in `without`"
            )
        if not wanted:
            raise ConfigError(f"foreach.subject: got no folder of {self.path} that is left; expected at least one")
        book = read_book(self.prompts, self.token) if self.prompts else None
        mapped = self._mapped(wanted, book)
        return tuple(
            Subject(
                name,
                {"{subject}": name, "{folder}": str(folders[name]), "{class}": _class(mapped[name], book)},
                self._panel(book.subjects.get(mapped[name], book.prompts)) if book else (),
            )
            for name in wanted
        )

    def _mapped(self, folders: Sequence[str], book: PromptBook | None) -> dict[str, str]:
        """Each folder's subject of the book."""
        if book is None or not book.subjects:
            return {name: name for name in folders}
        found = map_folders(folders, book.subjects, read_table(self.table) if self.table else None)
        if found.unmapped:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in found.unmapped.items())
            raise ConfigError(
                f"foreach.subject: got folders that are no subject of {self.prompts}: {reasons}; name them in `table`, "
                "or in `without`"
            )
        return {one.folder: one.subject for one in found.mapped}

    def _panel(self, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
        count = len(prompts) if self.max_prompts is None else min(self.max_prompts, len(prompts))
        return tuple(prompts[place * len(prompts) // count] for place in range(count))


def _class(subject: str, book: PromptBook | None) -> str:
    if book is not None and subject in book.photos:
        return book.photos[subject].text.removeprefix(_PHOTO)
    return subject.replace("_", " ")


class ForEach(Config):
    """What one file is repeated for."""

    subject: Subjects

    def list(self) -> tuple[Subject, ...]:
        """All subjects.

        Raises:
            ConfigError, DataError: As `Subjects.list`; or a name says nothing, or those of two would be one.
        """
        found = self.subject.list()
        if nameless := [subject.name for subject in found if not subject.slug]:
            raise ConfigError(f"foreach.subject: got the name {nameless[0]!r}; expected a letter or a digit in it")
        twice = [slug for slug, count in Counter(subject.slug for subject in found).items() if count > 1]
        if twice:
            raise ConfigError(
                f"foreach.subject: got two subjects that are called {twice[0]!r}; expected names that differ"
            )
        return found


def fill(tree: Any, subject: Subject) -> Any:
    """The study of one subject: its words stand in every text, its prompts in the panel.

    Raises:
        ConfigError: Both the file of prompts and the study have a panel.
    """
    filled = _replaced(tree, subject.words)
    trial = filled.setdefault("trial", {})
    evaluate: object = cast("dict[str, Any]", trial).setdefault("evaluate", {}) if isinstance(trial, dict) else None
    if subject.prompts and isinstance(evaluate, dict):  # whatever else it is, the study's own check refuses
        if "prompts" in evaluate:
            raise ConfigError(
                "trial.evaluate.prompts: got prompts in the study and in foreach.subject.prompts; remove one of the two"
            )
        evaluate["prompts"] = [prompt.model_dump(mode="json") for prompt in subject.prompts]
    return filled


def _replaced(tree: Any, words: Mapping[str, str]) -> Any:
    if isinstance(tree, dict):
        return {key: _replaced(value, words) for key, value in cast("dict[str, Any]", tree).items()}
    if isinstance(tree, list):
        return [_replaced(value, words) for value in cast("list[Any]", tree)]
    if isinstance(tree, str):
        for word, text in words.items():
            tree = tree.replace(word, text)
    return tree
