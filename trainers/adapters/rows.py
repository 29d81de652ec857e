"""One batch, several versions of an adapted network: each row with its own scale of one LoRA, or with a weaker LoRA.

With LoRA the weights between base and trained ones are W + scale (W' - W) = W + scale (alpha / rank) B A, exactly, so
a row of scale omega is a row of the interpolated network. A weak checkpoint of the same layers stands below the
trained one (A over A', B beside B'), and a row's other half is multiplied by 0. Either way a step stays one forward
pass; PEFT's own routing of rows (`adapter_names`) gathers and scatters them in every layer.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional
from typing_extensions import override

from trainers.errors import ModelError
from trainers.version import TRAINED, Version, Versions

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from trainers.backbone import Backbone

_NAME = "default"
"""PEFT's name of a model's only adapter."""


def adapted_rows(model: Backbone, wanted: Sequence[Version]) -> AdaptedRows | None:
    """Versions that share a batch, or None if this model's cannot.

    Raises:
        ModelError: A weak version is wanted and is not there.
    """
    if not stacks(model.networks):
        return None
    if not any(version.weak for version in wanted):
        return AdaptedRows(model.networks)
    if model.lineage is None:
        raise ModelError("guidance.weak: checkpoint with a model of unknown origin; expected a trial's adapter folder")
    return AdaptedRows(model.networks, read_weak(model.lineage.weak(), model.pipeline, model.networks))


class AdaptedRows(Versions):
    """The LoRA of some networks, whose versions can share a batch."""

    def __init__(self, networks: Mapping[str, nn.Module], weak: Mapping[str, Tensor] | None = None) -> None:
        """Prepare the layers; nothing is changed before `acting`.

        Args:
            networks: By pipeline component, with adapters of the plain kind (`stacks`).
            weak: A weaker version's tensors, as `read_weak` returns them; None if no row is to have it.
        """
        self._rows = _Rows()
        self._layers: list[tuple[Any, nn.Module, nn.Module]] = []
        for component, network in networks.items():
            for name, layer in lora_layers(network).items():
                down, up = layer.lora_A[_NAME], layer.lora_B[_NAME]
                downs, ups = [down.weight], [up.weight]
                if weak is not None:
                    downs.append(weak[f"{component}.{name}.lora_A.weight"].to(down.weight))
                    ups.append(weak[f"{component}.{name}.lora_B.weight"].to(up.weight))
                parts = (_Down(torch.cat(downs), self._rows), _Up(torch.cat(ups, dim=1)))
                self._layers.append((layer, *parts))
        self._stacked = weak is not None

    @property
    @override
    def mixes(self) -> bool:
        return True

    @override
    @contextmanager
    def acting(self, versions: Sequence[Version], repeats: int = 1) -> Generator[None]:
        factors = [self._factors(version) for version in versions]
        table = torch.tensor(factors).repeat_interleave(repeats, dim=0)
        self._rows.factors = {}
        self._rows.table = table
        own = [(layer, layer.lora_A[_NAME], layer.lora_B[_NAME]) for layer, _, _ in self._layers]
        try:
            for layer, down, up in self._layers:
                layer.lora_A[_NAME], layer.lora_B[_NAME] = down, up
            yield
        finally:
            for layer, down, up in own:
                layer.lora_A[_NAME], layer.lora_B[_NAME] = down, up

    def _factors(self, version: Version) -> list[float]:
        if not self._stacked:
            return [version.scale]
        return [0.0, version.scale] if version.weak else [version.scale, 0.0]


def stacks(networks: Mapping[str, nn.Module]) -> bool:
    """Whether all adapters are plain LoRA; DoRA's lengths belong to one version at a time."""
    layers = [layer for network in networks.values() for layer in lora_layers(network).values()]
    return bool(layers) and not any(layer.lora_magnitude_vector for layer in layers)


def read_weak(folder: Path, pipeline: Any, networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The LoRA tensors in `folder`, by component, layer and PEFT's name.

    Args:
        folder: What `Method.export` wrote for an earlier step of the same training.
        pipeline: diffusers' pipeline class.
        networks: The trained networks, by pipeline component.

    Raises:
        ModelError: The adapter is one of other layers or ranks.
    """
    unet = {"unet_config": cast("Any", networks["unet"]).config} if "unet" in networks else {}
    state = pipeline.lora_state_dict(folder, return_lora_metadata=True, **unet)[0]
    state = {_peft_name(key): value for key, value in state.items()}
    expected = {
        f"{component}.{name}.{key}.weight": module[_NAME].weight.shape
        for component, network in networks.items()
        for name, layer in lora_layers(network).items()
        for key, module in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
    }
    if {name: value.shape for name, value in state.items()} != expected:
        raise ModelError(f"{folder}: other layers or another rank than the adapter beside it; expected an earlier step")
    return state


def _peft_name(key: str) -> str:
    """A tensor's name as PEFT has it; diffusers writes denoisers' in one way and text encoders' in another."""
    names = {".lora_linear_layer.": ".lora.", ".lora.down.": ".lora_A.", ".lora.up.": ".lora_B."}
    for theirs, peft in names.items():
        key = key.replace(theirs, peft)
    return key


def lora_layers(network: nn.Module) -> dict[str, Any]:
    """The adapted layers, by name."""
    from peft.tuners.lora import LoraLayer

    modules: dict[str, Any] = dict(cast("Any", network).named_modules())
    return {name: module for name, module in modules.items() if isinstance(module, LoraLayer)}


class _Rows:
    """What all layers are told of the rows of the batch at hand."""

    def __init__(self) -> None:
        self.table = torch.tensor([[TRAINED.scale]])
        """A row an example; a column for each of the stacked adapters."""
        self.factors: dict[tuple[Any, ...], Tensor] = {}

    def like(self, hidden: Tensor) -> Tensor:
        """Factors that multiply `hidden`, whose last axis holds the ranks of one adapter after the other."""
        rank = hidden.shape[-1] // self.table.shape[1]
        key = (rank, hidden.ndim, hidden.dtype, hidden.device)
        if key not in self.factors:
            table = self.table.repeat_interleave(rank, dim=1).to(hidden)
            self.factors[key] = table.view(len(table), *[1] * (hidden.ndim - 2), -1)
        return self.factors[key]


class _Down(nn.Module):
    """Down-projections of all stacked adapters, weighted row by row."""

    def __init__(self, weight: Tensor, rows: _Rows) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self._rows = rows

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.linear(x, self.weight)
        return hidden * self._rows.like(hidden)


class _Up(nn.Module):
    """Up-projections of all stacked adapters."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight)
