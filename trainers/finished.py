"""A finished adapter in a folder: is it one of this model's? Looked at without torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trainers.errors import ModelError
from trainers.pretrained import read_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trainers.tuning import TunedConfig

LORA_FILE = "pytorch_lora_weights.safetensors"
_DOWN = re.compile(r"\.lora(?:_A|\.down)\.weight$")
_UP = re.compile(r"\.lora(?:_B|\.up)\.weight$")

Shape = tuple[int, ...]


def check_finished(config: TunedConfig, folder: Path, *, any_size: bool = False) -> None:
    """Find out whether what lies in `folder` was trained as `config` says, on the model that it names.

    Args:
        config: The method, with its backbone and the size of its adapter.
        folder: As `Method.export` writes it: a LoRA file, or a folder for each network that was trained whole.
        any_size: Whether an adapter of another rank will do.

    Raises:
        ModelError: Something is missing, of another model, or of another rank.
    """
    denoiser, shapes = next((name, shapes) for name, shapes in config.backbone.weight_shapes().items() if name != "vae")
    if config.lora is None:
        _check_network(folder / denoiser, shapes)
        return
    file = folder / LORA_FILE
    if not file.is_file():
        raise ModelError(f"{folder}: no {LORA_FILE}; expected an adapter as training exports it")
    adapted = {
        name.removeprefix(f"{denoiser}."): shape for name, shape in read_shapes(file) if name.startswith(f"{denoiser}.")
    }
    _check_layers(file, adapted, shapes, None if any_size else config.lora.rank)


def _check_layers(file: Path, adapted: Mapping[str, Shape], shapes: Mapping[str, Shape], rank: int | None) -> None:
    down = {_DOWN.sub("", name): shape for name, shape in adapted.items() if _DOWN.search(name)}
    up = {_UP.sub("", name): shape for name, shape in adapted.items() if _UP.search(name)}
    if not down or down.keys() != up.keys():
        raise ModelError(
            f"{file}: holds no LoRA of this denoiser under diffusers' names; expected an adapter that was trained "
            "on the model of train.backbone"
        )
    for layer in down:
        size = (up[layer][0], down[layer][1])
        known = shapes.get(f"{layer}.weight")
        if known is None or known[:2] != size:
            has = f"which has {known[0]} x {known[1]} in this model" if known else "which this model does not have"
            raise ModelError(
                f"{file}: adapts {layer} of {size[0]} x {size[1]} numbers, {has}; expected an adapter that was "
                "trained on the model of train.backbone"
            )
        if rank is not None and down[layer][0] != rank:
            raise ModelError(
                f"{file}: has rank {down[layer][0]} and train.lora.rank is {rank}; set it to "
                f"{down[layer][0]}, or name another adapter"
            )


def _check_network(folder: Path, shapes: Mapping[str, Shape]) -> None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no weights; expected the whole network, because train.lora is null")
    found = {name: shape for file in files for name, shape in read_shapes(file)}
    if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        raise ModelError(
            f"{folder}: {wrong[0]} has the shape {found.get(wrong[0])}; expected {shapes.get(wrong[0])}, as in the "
            "model of train.backbone"
        )
