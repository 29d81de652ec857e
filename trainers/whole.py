"""Versions of a pretrained model: rows of one batch where LoRA alone was trained, sets of weights that take turns else.

A network whose every weight was trained has no scale that leads back to its base. Each version of it is a set of
weights of its own, W + scale (W' - W) number by number; predictions are made one version after the other.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from typing_extensions import override

from trainers.adapters.rows import adapted_rows, lora_layers
from trainers.errors import ModelError
from trainers.version import TRAINED, Versions

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import Tensor, nn

    from trainers.backbone import Backbone
    from trainers.version import Lineage, Version

log = logging.getLogger(__name__)

_MIB = 2**20


def own_versions(model: Backbone, wanted: Sequence[Version]) -> Versions | None:
    """The versions of a model that are made of its own networks' weights, or None if there are no such versions.

    Raises:
        ModelError: A weak version is wanted and is not there.
    """
    rows = adapted_rows(model, wanted)
    if model.lineage is None or not model.lineage.whole:
        return rows
    if rows is None and any(version.weak for version in wanted) and any(map(lora_layers, model.networks.values())):
        return None  # of adapters that have no weak version
    return WholeVersions(model, model.lineage, wanted, rows)


class WholeVersions(Versions):
    """Sets of weights that take turns; adapters that were trained beside them go along."""

    def __init__(self, model: Backbone, lineage: Lineage, wanted: Sequence[Version], rows: Versions | None) -> None:
        """Read and compute all weights but the trained ones.

        Args:
            model: What was trained.
            lineage: Says which of its networks were trained whole.
            wanted: Each version but the trained one takes these networks' memory once more.
            rows: Versions of the other networks' plain LoRA; None if there is none.

        Raises:
            ModelError: A weak version is wanted and is not there, or is of another model.
        """
        self._model, self._rows = model, rows
        others = [version for version in wanted if version != TRAINED]
        self._weights = {version: _weights(model, lineage, version) for version in others}
        size = sum(tensor.nbytes for weights in self._weights.values() for _, tensor in weights)
        log.info("guidance keeps %.0f MiB more: other weights of %s", size / _MIB, ", ".join(lineage.whole))

    @property
    @override
    def mixes(self) -> bool:
        return False

    @override
    @contextmanager
    def acting(self, versions: Sequence[Version], repeats: int = 1) -> Generator[None]:
        (version,) = versions
        weights = self._weights.get(version, [])
        trained = [parameter.data for parameter, _ in weights]
        try:
            for parameter, other in weights:
                parameter.data = other
            with self._adapters_acting(version):
                yield
        finally:
            for (parameter, _), data in zip(weights, trained, strict=True):
                parameter.data = data

    def _adapters_acting(self, version: Version) -> AbstractContextManager[None]:
        if version == TRAINED:
            return nullcontext()
        return self._rows.acting([version]) if self._rows else self._model.adapter_scale(version.scale)


def read_network(network: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The weights that `save_pretrained` wrote of a network like this one; its own reader knows what it has renamed.

    Raises:
        ModelError: There are none, or they are of another model.
    """
    cls = cast("Any", type(network))
    try:
        found: dict[str, Tensor] = cls.from_pretrained(folder, local_files_only=True, use_safetensors=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise _foreign(folder, cls) from error
    if {key: value.shape for key, value in found.items()} != {k: v.shape for k, v in network.state_dict().items()}:
        raise _foreign(folder, cls)
    return found


def _foreign(folder: Path, cls: Any) -> ModelError:
    return ModelError(
        f"{folder}: not the weights of this model's {cls.__name__}; expected those of a trial of the same model"
    )


@torch.no_grad()
def _weights(model: Backbone, lineage: Lineage, version: Version) -> list[tuple[nn.Parameter, Tensor]]:
    """Every parameter of the networks that were trained whole, and what it is in a version."""
    found: list[tuple[nn.Parameter, Tensor]] = []
    for name in lineage.whole:
        network = model.networks[name]
        end = read_network(network, lineage.weak() / name) if version.weak else dict(network.named_parameters())
        weights = end if version.scale == 1 else _between(model.untrained(name), end, version.scale)
        found += [(own, weights[key].detach().to(own)) for key, own in network.named_parameters()]
    return found


def _between(base: nn.Module, end: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """W + scale (W' - W), by name."""
    start = dict(base.named_parameters())
    return {key: torch.lerp(value.float(), end[key].to(value.device).float(), scale) for key, value in start.items()}
