"""Which prompts, references and pictures belong to which subject: one folder is one subject, and never pooled.

Prompts come as plain lines, as `evaluation_prompts.json` (subjects x templates with `<subject>`), or as DreamBench's
`prompts_and_classes.txt`; all three are read as they are, and told apart by what is in them.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from trainers.errors import ConfigError, DataError
from trainers.prompt import Prompt, Request

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

_LIVE = ("cat", "dog")
"""DreamBench's classes of live subjects: nine of its thirty subjects (Ruiz et al., 2023, arXiv:2208.12242), and in the
file a class whose prompts put hats on it."""
_DREAMBENCH_HEADER = "subject_name,class"
_TEMPLATE = re.compile(r"^'(.+)'\.format\(unique_token, class_token\),?$", re.MULTILINE)
_VARIANT = re.compile(r"[ _-]?[a-z]{0,2}[0-9]*")
"""What may follow a subject's name: `2`, `cd`, `_7`. Longer endings are other words: a `cart` is no car."""
_NUMBER, _SEED = re.compile(r"^\d+[_-]"), re.compile(r"_(\d+)$")
MAX_SLUG = 40
"""Letters of a prompt that our own files' names keep."""
_MAX_NAME = 100
"""Letters of a prompt that other tools keep in a file's name."""


@dataclass(frozen=True)
class PromptBook:
    """Prompts, and whom they are about."""

    subjects: Mapping[str, tuple[Prompt, ...]]
    """By subject; empty if the prompts say nothing of subjects."""
    prompts: tuple[Prompt, ...] = ()
    """For every folder alike, if there are no subjects."""
    photos: Mapping[str, Prompt] = field(default_factory=dict[str, Prompt])
    """What a photo of each subject shows."""


@dataclass(frozen=True)
class Mapped:
    """A folder, the subject that it is taken for, and why."""

    folder: str
    subject: str
    rule: str
    """table, exact, spaces or variant."""


@dataclass(frozen=True)
class SubjectMap:
    """Folders that map to a subject, and the others, each with the reason."""

    mapped: tuple[Mapped, ...]
    unmapped: Mapping[str, str]


def read_book(path: Path, token: str | None = None) -> PromptBook:
    """Read a file of prompts.

    Args:
        path: Lines, `evaluation_prompts.json` or `prompts_and_classes.txt`.
        token: A rare word before the subject's name, if adapters were trained with one; scorers are not told it.

    Raises:
        DataError: The file is missing or holds no prompts.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a file of prompts") from error
    if text.lstrip().startswith("{"):
        return _read_templates(path, text, token)
    if _DREAMBENCH_HEADER in text:
        return _read_dreambench(path, text, token)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        raise DataError(f"{path}: no prompts; expected one a line")
    return PromptBook({}, tuple(Prompt(text=line) for line in dict.fromkeys(lines)))


def _read_templates(path: Path, text: str, token: str | None) -> PromptBook:
    try:
        content: Any = json.loads(text)
        subjects, templates = content["subjects"], content["prompts"]
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: got no JSON with `subjects` and `prompts` ({error}); expected both lists") from error
    if not subjects or not templates or not all(isinstance(item, str) for item in [*subjects, *templates]):
        raise DataError(f"{path}: expected lists of words in `subjects` and `prompts`, none of them empty")
    return _fill({name: (name, templates) for name in subjects}, lambda t, words: t.replace("<subject>", words), token)


def _read_dreambench(path: Path, text: str, token: str | None) -> PromptBook:
    table, _, prompts = text.partition("Prompts")
    objects, _, live = prompts.partition("Live Subject Prompts")
    rows = table.partition(_DREAMBENCH_HEADER)[2].split()
    classes = dict(cast("Iterable[tuple[str, str]]", (row for row in csv.reader(_lines(table)) if len(row) == 2)))
    panels = {"object": _TEMPLATE.findall(objects), "live": _TEMPLATE.findall(live)}
    if not rows or not all(panels.values()):
        raise DataError(f"{path}: expected DreamBench's table of subjects and its two lists of prompts")
    chosen = {name: (noun, panels["live" if noun in _LIVE else "object"]) for name, noun in classes.items()}

    def fill(template: str, words: str) -> str:
        return template.replace("{0} {1}", words)

    return _fill(chosen, fill, token)


def _lines(table: str) -> list[str]:
    return [line.strip() for line in table.partition(_DREAMBENCH_HEADER)[2].splitlines() if line.strip()]


def _fill(
    chosen: Mapping[str, tuple[str, Sequence[str]]], fill: Callable[[str, str], str], token: str | None
) -> PromptBook:
    def ask(template: str, noun: str) -> Prompt:
        shows = fill(template, noun)
        return Prompt(text=fill(template, f"{token} {noun}"), shows=shows) if token else Prompt(text=shows)

    prompts = {name: tuple(ask(template, noun) for template in templates) for name, (noun, templates) in chosen.items()}
    return PromptBook(prompts, photos={name: Prompt(text=f"a photo of a {noun}") for name, (noun, _) in chosen.items()})


def read_table(path: Path) -> dict[str, str]:
    """A file that says which folder is which subject: lines `folder,subject`, or a JSON object.

    Raises:
        DataError: It cannot be read, or says something of a folder twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("{"):
            return {str(folder): str(subject) for folder, subject in json.loads(text).items()}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected lines `folder,subject`") from error
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    if wrong := next((row for row in rows if len(row) != 2), None):
        raise DataError(f"{path}: got the line {','.join(wrong)!r}; expected `folder,subject`")
    rows = [row for row in rows if row != ["folder", "subject"]]
    if len({folder for folder, _ in rows}) < len(rows):
        raise DataError(f"{path}: a folder is listed twice; expected each once")
    return {folder: subject for folder, subject in rows}  # noqa: C416  pyright sees lists of any length


def map_folders(folders: Iterable[str], subjects: Iterable[str], table: Mapping[str, str] | None = None) -> SubjectMap:
    """Find each folder's subject: by the given table, else by name.

    In this order: equal names; names equal but for case, underscores, dashes and spaces; a subject's name with a short
    ending (`cat2`, `dogcd`), the longest such name. Two subjects that fit equally well are none.

    Raises:
        ConfigError: The table names a subject that has no prompts.
    """
    known, table = list(subjects), table or {}
    if strange := [subject for subject in table.values() if subject not in known]:
        raise ConfigError(f"the table names the subject {strange[0]!r}; expected one of {', '.join(known)}")
    mapped: list[Mapped] = []
    unmapped: dict[str, str] = {}
    for folder in folders:
        if folder in table:
            mapped.append(Mapped(folder, table[folder], "table"))
            continue
        rule, found = _find(folder, known)
        if len(found) == 1:
            mapped.append(Mapped(folder, found[0], rule))
        else:
            unmapped[folder] = _why_not(folder, found, known)
    return SubjectMap(tuple(mapped), unmapped)


def _find(folder: str, known: Sequence[str]) -> tuple[str, list[str]]:
    if folder in known:
        return "exact", [folder]
    if found := [subject for subject in known if _letters(subject) == _letters(folder)]:
        return "spaces", found
    name = _spaced(folder)
    starts = [
        subject
        for subject in known
        if name.startswith(_spaced(subject)) and _VARIANT.fullmatch(name[len(_spaced(subject)) :])
    ]
    longest = max((len(subject) for subject in starts), default=0)
    return "variant", [subject for subject in starts if len(subject) == longest]


def _why_not(folder: str, found: Sequence[str], known: Sequence[str]) -> str:
    if found:
        return f"fits {' and '.join(map(repr, found))} equally well"
    begins = [subject for subject in known if _spaced(subject).startswith(_spaced(folder))]
    near = begins or get_close_matches(_spaced(folder), known, n=1)
    return f"no subject of that name; is it {near[0]!r}? Then say so in a table" if near else "no subject of that name"


def _spaced(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.lower())).strip()


def _letters(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower())


def list_pictures(folder: Path) -> tuple[Path, ...]:
    """Picture files directly inside `folder`, by name; none if there is no such folder."""
    if not folder.is_dir():
        return ()
    names = (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    return tuple(sorted(names))


def subject_folders(root: Path) -> dict[str, Path]:
    """Folders of pictures inside `root`; if there are none, `root` itself.

    Raises:
        DataError: There are no pictures in either.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected pictures, or a folder of pictures for each subject")
    below = {folder.name: folder for folder in _below(root) if list_pictures(folder)}
    if not below and not list_pictures(root):
        raise DataError(f"{root}: no pictures ({', '.join(SUFFIXES)}), nor folders of them; expected some to judge")
    return below or {root.name: root}


def empty_folders(root: Path) -> tuple[str, ...]:
    """Names of the folders inside `root` that hold no pictures, though others do; hidden ones do not count."""
    empty = [folder.name for folder in _below(root) if not list_pictures(folder)]
    return tuple(empty) if len(empty) < len(_below(root)) else ()


def _below(root: Path) -> list[Path]:
    return [folder for folder in sorted(root.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]


def match_prompts(files: Sequence[Path], prompts: Sequence[Prompt]) -> tuple[dict[Request, Path], list[Path]]:
    """What each picture was asked to show, by the words in its name (`0003_a_red_dog.png`, `0003_a-red-dog_7.png`).

    The number in front does not matter; one at the end is the seed, else pictures of a prompt count from 0.

    Returns:
        Pictures by prompt and seed, and those whose name is no prompt's, or that of more than one.
    """
    named: dict[str, dict[Prompt, None]] = {}
    for prompt in prompts:
        for words in {prompt.text, prompt.shows or prompt.text}:
            for key in {_key(words), _key(words[:_MAX_NAME]), _key(words)[:MAX_SLUG].strip("-")}:
                named.setdefault(key, {})[prompt] = None
    found: dict[Request, Path] = {}
    strange: list[Path] = []
    for file in files:
        words = _NUMBER.sub("", file.stem)
        seed = _SEED.search(words)
        fitting = list(named.get(_key(words), ()))
        if not fitting and seed:
            fitting = list(named.get(_key(words[: seed.start()]), ()))
        else:
            seed = None
        if len(fitting) != 1:
            strange.append(file)
            continue
        taken = {request.seed for request in found if request.prompt == fitting[0]}
        place = int(seed[1]) if seed else next(n for n in range(len(files)) if n not in taken)
        found[Request(fitting[0], place)] = file
    return found, strange


def _key(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
