"""What must not change while a study goes on: all that its trials' values depend on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from orchestrator.complaints import shown
from trainers.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import optuna

    from orchestrator.database import Database
    from orchestrator.spec import StudySpec

log = logging.getLogger(__name__)

_IDENTITY = "identity"
_MAX_LISTED = 3


def check_identity(spec: StudySpec, study: optuna.Study, database: Database) -> None:
    """Refuse to go on with a study under other settings; a new one remembers them.

    Raises:
        StorageError: What was changed, and what to do.
    """
    now = _identity(spec)
    stored = study.user_attrs.get(_IDENTITY)
    if stored is None:
        study.set_user_attr(_IDENTITY, now)
        return
    try:  # what the stored study means to this version of the code: new keys have their defaults
        stored = _identity(spec.model_validate(spec.model_dump(mode="json") | {"warm_start": None} | stored))
    except ValidationError:
        log.debug("the stored study is not valid any more; it is compared as it was written")
    changed = differences(stored, now)
    if changed:
        advice = "undo the change, or give the study a new `name`"
        if any(key.startswith("search.") for key in changed):
            advice += f"; a new one takes over what this one has found by `warm_start: {{study: {spec.root}}}`"
        raise StorageError(
            f"{database}: got another study than the stored one: {listed(changed)}; expected the same trial, search, "
            f"warm_start, sampler, pruner and objective; {advice}"
        )


def differences(before: object, now: object) -> dict[str, str]:
    """Dotted path to `was … and is …`, for every leaf of two trees that differs."""
    old, new = dict(leaves(before)), dict(leaves(now))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return {key: f"was {_said(old, key)} and is {_said(new, key)}" for key in changed}


def listed(changed: dict[str, str]) -> str:
    """The first few differences, for people."""
    few = ", ".join(f"{key} {what}" for key, what in list(changed.items())[:_MAX_LISTED])
    return f"{few} and {len(changed) - _MAX_LISTED} more" if len(changed) > _MAX_LISTED else few


def _identity(spec: StudySpec) -> dict[str, Any]:
    tree = spec.model_dump(mode="json", include={"trial", "search", "warm_start", "sampler", "pruner", "objective"})
    for option in spec.sampler.ends_by:
        del tree["sampler"][option]
    return tree


def leaves(tree: object, above: str = "") -> Iterator[tuple[str, object]]:
    """Dotted path and value of everything in a tree that has nothing below it."""
    if isinstance(tree, dict) and tree:
        for key, value in cast("dict[str, object]", tree).items():
            yield from leaves(value, f"{above}.{key}" if above else key)
    else:
        yield above, tree


def _said(leaves: dict[str, object], key: str) -> str:
    return shown(leaves[key]) if key in leaves else "absent"
