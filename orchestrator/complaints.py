"""What is wrong with a study file, in one line: where, got, expected, and the nearest thing that would be right."""

import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Any, Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.yaml import Document, Location
from trainers.config import Choice
from trainers.errors import ConfigError

_MAX_LISTED = 12
_MAX_SHOWN = 60


def config_error(error: ValidationError, document: Document, model: type[BaseModel]) -> ConfigError:
    """The problem that matters most of those that pydantic found in `document`.

    Misspelt keys come first: what else is wrong is often their consequence.
    """
    location, message = complaint(error, document, model)
    dotted = ".".join(map(str, location)) or "top level"
    return ConfigError(f"{document.where(location)}: {dotted}: {message}")


def complaint(error: ValidationError, document: Document, model: type[BaseModel]) -> tuple[Location, str]:
    """Where the first problem that pydantic found in `document` is, and what it is."""
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    names_absent = first["type"] in {"missing", "extra_forbidden"}
    location = _in_document(first["loc"], document.tree, names_absent=names_absent)
    if _has_unknown_kind(first) and (*location, "kind") in document.origins:
        location = (*location, "kind")
    return location, _complaint(first, document, location, model)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that ends a message: the nearest of `known`, or all of them if there are few."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(names[:_MAX_LISTED])}{', …' if len(names) > _MAX_LISTED else ''}"


def shown(value: object) -> str:
    """`value` as a message shows it, shortened."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"


def _complaint(problem: ErrorDetails, document: Document, location: Location, model: type[BaseModel]) -> str:
    message = " ".join(problem["msg"].removeprefix("Value error, ").split())
    if problem["type"] == "extra_forbidden":
        owner = _type_at(model, document.tree, location[:-1])
        fields = owner.model_fields if isinstance(owner, type) and issubclass(owner, BaseModel) else {}
        return f"got an unknown key; expected one that exists: {did_you_mean(str(location[-1]), fields)}"
    if problem["type"] == "missing":
        return "got nothing; expected a value, there is no default"
    if _has_unknown_kind(problem):
        return _unknown_kind(message, problem["input"])
    if problem["type"] == "value_error":
        return message
    if problem["type"] == "model_type":
        return f"got {shown(problem['input'])}; expected a mapping"
    return f"got {shown(problem['input'])}; expected {message.removeprefix('Input should be ')}"


def _has_unknown_kind(problem: ErrorDetails) -> bool:
    return problem["msg"].startswith("Value error, unknown kind")


def _unknown_kind(message: str, given: object) -> str:
    known = message.partition("expected one of ")[2]
    kind = cast("Mapping[str, object]", given).get("kind") if isinstance(given, dict) else given
    near = difflib.get_close_matches(str(kind), known.split(", "), n=1, cutoff=0.5)
    got = f"got unknown kind {kind!r}" if kind is not None else "got no `kind`"
    return f"{got}; expected one of {known}" + (f"; did you mean {near[0]!r}?" if near else "")


def _in_document(loc: Location, tree: object, *, names_absent: bool) -> Location:
    """`loc` without the parts that name alternatives of a type and not keys of the file."""
    location, node = list[str | int](), tree
    for index, part in enumerate(loc):
        is_absent = names_absent and index == len(loc) - 1
        if isinstance(node, dict) and (part in node or is_absent):
            location.append(part)
            node = cast("dict[str | int, object]", node).get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(cast("list[object]", node)):
            location.append(part)
            node = cast("list[object]", node)[part]
        elif not isinstance(node, dict | list) and index == 0:
            location.append(part)
    return tuple(location)


def _type_at(annotation: Any, node: object, location: Location) -> Any:
    """The type that `location` below `node` must have, choosing among kinds by what the file says."""
    for candidate in _alternatives(annotation):
        concrete = _concrete(candidate, node)
        if not location:
            return concrete
        part, child = location[0], _child(node, location[0])
        if isinstance(concrete, type) and issubclass(concrete, BaseModel):
            if (entry := concrete.model_fields.get(str(part))) is not None:
                return _type_at(entry.annotation, child, location[1:])
        elif get_origin(concrete) in {dict, tuple, list}:
            arguments = get_args(concrete)
            return _type_at(arguments[1] if get_origin(concrete) is dict else arguments[0], child, location[1:])
    return None


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) in {Union, types.UnionType}:
        return [a for a in get_args(annotation) if a is not type(None)]
    return [annotation]


def _concrete(annotation: Any, node: object) -> Any:
    if not (isinstance(annotation, type) and issubclass(annotation, Choice) and isinstance(node, dict)):
        return cast("Any", annotation)
    kind = cast("dict[str, object]", node).get("kind")
    return next(
        (c for c in _descendants(annotation) if "kind" in c.model_fields and c.model_fields["kind"].default == kind),
        annotation,
    )


def _descendants(cls: type[Choice]) -> Iterable[type[Choice]]:
    for below in cls.__subclasses__():
        yield below
        yield from _descendants(below)


def _child(node: object, part: str | int) -> object:
    if isinstance(node, dict):
        return cast("dict[str | int, object]", node).get(part)
    if isinstance(node, list) and isinstance(part, int):
        return cast("list[object]", node)[part]
    return None
