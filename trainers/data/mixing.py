"""Which classes a stream of examples shows, from all alike to as often as the data has them."""

from __future__ import annotations

import bisect
import csv
import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt
from typing_extensions import override

from trainers.config import Choice, Config, LocalPath
from trainers.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

Share = Annotated[float, Field(ge=0, le=1)]

_STREAM = 1
"""Keeps these random numbers apart from every other use of the seed."""


class Blend(Choice):
    """Family of `schedule` sections: lambda by optimizer step, from 0 (all classes alike) to 1 (as the data)."""

    @abstractmethod
    def at(self, step: int) -> float:
        """Lambda at an optimizer step."""


class ConstantBlend(Blend):
    """The same at every step."""

    kind: Literal["constant"] = "constant"
    value: Share

    @override
    def at(self, step: int) -> float:
        return self.value


class RampBlend(Blend):
    """From `start` to `end`, and `end` from then on."""

    start: Share = 0.0
    end: Share = 1.0
    steps: PositiveInt
    """Optimizer steps from `start` to `end`."""

    @override
    def at(self, step: int) -> float:
        return self.start + (self.end - self.start) * self.ease(min(step, self.steps) / self.steps)

    @abstractmethod
    def ease(self, progress: float) -> float:
        """How far the way is gone when `progress` of the steps are; both from 0 to 1."""


class LinearBlend(RampBlend):
    """Along a line."""

    kind: Literal["linear"] = "linear"

    @override
    def ease(self, progress: float) -> float:
        return progress


class CosineBlend(RampBlend):
    """Along half a cosine: slow at both ends."""

    kind: Literal["cosine"] = "cosine"

    @override
    def ease(self, progress: float) -> float:
        return 0.5 * (1 - math.cos(math.pi * progress))


class MixConfig(Config):
    """How often the classes of a long-tailed data set are shown.

    With q(s) the frequency of class s in the data, K the number of classes and lambda in [0, 1], the target is
    p(s) = (1 - lambda) / K + lambda q(s): a candidate of class s, drawn from the data, is accepted with a probability
    proportional to p(s) / q(s), and the first that is accepted is shown. Examples whose class is not in the table, or
    that name none, together count as one more class, whose q is their share of the examples.
    """

    field: str = "species_list"
    """Metadata field with an example's classes: a list, or names with commas between them."""
    table: LocalPath | None = None
    """CSV with a class in its first column and its frequency in `fraction`; null counts the examples."""
    choose: Literal["random", "first"] = "random"
    """Which class an example of several counts as, whenever it is a candidate."""
    schedule: Blend

    def frequencies(self) -> dict[str, float]:
        """The q of each class in the table, of sum 1; empty without a table.

        Raises:
            DataError: The table is missing, or not a table of positive frequencies.
        """
        return {} if self.table is None else _read_table(self.table)


def _read_table(path: Path) -> dict[str, float]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or [])
            rows = list(reader)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a CSV file") from error
    if "fraction" not in names[1:]:
        raise DataError(f"{path}: columns are {names}; expected the class's name first and, after it, 'fraction'")
    found: dict[str, float] = {}
    for number, row in enumerate(rows, start=2):
        name, text = (row[names[0]] or "").strip(), row["fraction"]
        try:
            fraction = float(text)
        except (TypeError, ValueError):
            fraction = math.nan
        if not name or name in found or not 0 <= fraction < math.inf:
            raise DataError(
                f"{path}: line {number}: got class {name!r} with fraction {text!r}; expected a new class and a number "
                "that is not negative"
            )
        found[name] = fraction
    total = sum(found.values())
    if not total:
        raise DataError(f"{path}: no class has a positive fraction; expected some")
    return {name: fraction / total for name, fraction in found.items() if fraction}


class Mixer:
    """The classes of a list of examples, ready to be drawn from.

    Whether the first accepted of an endless stream of candidates is example i has a probability proportional to i's
    acceptance. That law is drawn from directly: no candidate is drawn in vain, however small acceptance is.
    """

    def __init__(self, config: MixConfig, classes: Sequence[tuple[str, ...]]) -> None:
        import numpy as np

        self._schedule = config.schedule
        groups: dict[tuple[str, ...], list[int]] = {}
        for index, names in enumerate(classes):
            groups.setdefault(names[:1] if config.choose == "first" else names, []).append(index)
        self._order = np.concatenate([np.array(indices) for indices in groups.values()])
        self._sizes = np.array([len(indices) for indices in groups.values()])
        self._starts = np.cumsum(self._sizes) - self._sizes
        table = config.frequencies()
        # Of each group's candidates, the share that counts as each class.
        parts = [_parts(names, table) for names in groups]
        self.frequencies = _frequencies(parts, self._sizes / len(classes), table)
        column = {name: number for number, name in enumerate(self.frequencies)}
        self._rows = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        self._columns = np.array([column[name] for part in parts for name in part])
        self._parts = np.array([share for part in parts for share in part.values()])
        self._drawn: tuple[float, list[float]] = (math.nan, [])

    def targets(self, blend: float) -> dict[str, float]:
        """The p of each class at a lambda; the class of those that are not listed is called ""."""
        uniform = 1 / len(self.frequencies)
        return {name: (1 - blend) * uniform + blend * q for name, q in self.frequencies.items()}

    def pick(self, seed: int, step: int, position: int) -> int:
        """Index of the example at `position` of the stream, at optimizer step `step`."""
        import numpy as np

        rng = np.random.default_rng(np.random.SeedSequence((seed, position), spawn_key=(_STREAM,)))
        which, inside = float(rng.random()), float(rng.random())
        edges = self._edges(self._schedule.at(step))
        group = min(bisect.bisect_right(edges, which * edges[-1]), len(edges) - 1)
        return int(self._order[self._starts[group] + int(inside * self._sizes[group])])

    def _edges(self, blend: float) -> list[float]:
        """Cumulated acceptance of the groups."""
        import numpy as np

        if self._drawn[0] != blend:
            ratios = np.array(list(self.targets(blend).values())) / np.array(list(self.frequencies.values()))
            acceptance = np.bincount(self._rows, self._parts * ratios[self._columns], len(self._sizes))
            self._drawn = (blend, np.cumsum(self._sizes * acceptance).tolist())
        return self._drawn[1]


def _parts(names: tuple[str, ...], table: Mapping[str, float]) -> dict[str, float]:
    counted = [name if not table or name in table else "" for name in names or ("",)]
    return {name: counted.count(name) / len(counted) for name in counted}


def _frequencies(
    parts: Sequence[Mapping[str, float]], shares: np.ndarray, table: Mapping[str, float]
) -> dict[str, float]:
    observed: dict[str, float] = {}
    for part, share in zip(parts, shares, strict=True):
        for name, fraction in part.items():
            observed[name] = observed.get(name, 0.0) + float(share) * fraction
    if not table:
        return observed
    unlisted = observed.get("", 0.0)
    if len(observed) == 1 and unlisted:
        raise DataError(f"no example's class is in the table of {len(table)} classes (the first: {next(iter(table))})")
    return {name: q * (1 - unlisted) for name, q in table.items()} | ({"": unlisted} if unlisted else {})
