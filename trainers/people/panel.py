"""A validation set of references x prompts as prompts: `python -m trainers.people.panel PHOTOS PROMPTS -o FILE`.

The file that it writes is a fragment for `extends:` of a study; the study's `seeds` are the third factor.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from trainers.errors import DataError
from trainers.prompt import Box, Prompt

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_HOLE = "<class>"


@dataclass(frozen=True)
class PanelFiles:
    """Where the parts of a validation set lie."""

    photos: Path
    """A folder of reference photos, one of each person; their stems are the people's names."""
    prompts: Path
    """A text file with a prompt a line, in which `<class>` stands for the person."""
    classes: Path
    """JSON: name to class word, such as man."""
    boxes: Path
    """JSON: where the face is to be drawn, under `{first ten letters of the prompt}_{name}.png` (if no two prompts
    begin alike), under `{whole prompt}_{name}.png`, or under the name for all of a person's prompts."""
    photo_boxes: Path | None = None
    """JSON: name to where the face is in the photo; None leaves that to the method's face embedder."""
    embeddings: Path | None = None
    """Face embeddings of the photos by name, made before."""
    trigger: str = "img"
    """Word that follows the class word."""


def read_panel(files: PanelFiles) -> tuple[Prompt, ...]:
    """Every prompt with every photo, photo after photo.

    A box is a list of four numbers, or a mapping that has one as `face_crop_new` or `face_crop_old`.

    Raises:
        DataError: A file is missing, or has nothing on somebody; the message names the file and the entry.
    """
    photos = sorted(file for file in _listed(files.photos) if file.suffix.lower() in _SUFFIXES)
    texts = [line.strip() for line in _read(files.prompts).splitlines() if line.strip()]
    if not photos or not texts:
        raise DataError(f"{files.photos}: {len(photos)} photos, {files.prompts}: {len(texts)} prompts; expected some")
    for text in texts:
        if text.count(_HOLE) != 1:
            raise DataError(f"{files.prompts}: {text!r}: expected {_HOLE} once")
    classes, boxes = _object(files.classes), _object(files.boxes)
    photo_boxes = _object(files.photo_boxes) if files.photo_boxes else {}
    prompts: list[Prompt] = []
    for photo in photos:
        word = classes.get(photo.stem)
        if not isinstance(word, str) or not word:
            raise DataError(f"{files.classes}: no class word for {photo.stem!r}; expected one, such as man")
        found = photo_boxes.get(photo.stem)
        if files.photo_boxes and found is None:
            raise DataError(f"{files.photo_boxes}: no box for {photo.stem!r}")
        told = [text.replace(_HOLE, f"{word} {files.trigger}") for text in texts]
        prompts += [
            Prompt(
                text=text,
                image=photo.absolute(),
                image_box=None if found is None else _box(found, f"{files.photo_boxes}: {photo.stem!r}"),
                box=_wanted(files.boxes, boxes, (text, photo.stem), told),
                embedding=files.embeddings and files.embeddings.absolute(),
            )
            for text in told
        ]
    return tuple(prompts)


def _wanted(path: Path, boxes: dict[str, Any], of: tuple[str, str], texts: list[str]) -> Box:
    text, name = of
    short = text[:10]
    alone = sum(other.startswith(short) for other in texts) == 1
    keys = [f"{text}_{name}.png", *([f"{short}_{name}.png"] if alone else []), name]
    for key in keys:
        if key in boxes:
            return _box(boxes[key], f"{path}: {key!r}")
    raise DataError(f"{path}: no box for {text!r} with {name!r}; expected one of {', '.join(map(repr, keys))}")


def _box(found: Any, where: str) -> Box:
    held = cast("dict[str, Any]", found) if isinstance(found, dict) else {"face_crop_new": found}
    corners = held.get("face_crop_new", held.get("face_crop_old"))
    if not isinstance(corners, list) or len(cast("list[Any]", corners)) != 4:
        raise DataError(f"{where}: got {found!r}; expected left, top, right, bottom")
    try:
        left, top, right, bottom = (round(float(corner)) for corner in cast("list[Any]", corners))
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: got {found!r}; expected four numbers") from error
    return left, top, right, bottom


def _object(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(tree, dict):
        raise DataError(f"{path}: expected a JSON object")
    return cast("dict[str, Any]", tree)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _listed(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected photos")
    return list(folder.iterdir())


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    import yaml

    parser = argparse.ArgumentParser(prog="python -m trainers.people.panel", description=__doc__)
    for name in ("photos", "prompts"):
        parser.add_argument(name, type=Path)
    for name in ("--classes", "--boxes", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--photo-boxes", type=Path)
    parser.add_argument("--embeddings", type=Path)
    parser.add_argument("--trigger", default="img")
    given = vars(parser.parse_args(arguments))
    output: Path = given.pop("output")
    prompts = [prompt.model_dump(mode="json", exclude_none=True) for prompt in read_panel(PanelFiles(**given))]
    tree = {"trial": {"evaluate": {"prompts": prompts}}}
    output.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")


if __name__ == "__main__":
    main()
