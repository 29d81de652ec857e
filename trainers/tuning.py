"""What of a pretrained model is trained: adapters, or every weight of some networks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Self, cast

from pydantic import model_validator
from typing_extensions import override

from trainers.adapters.lora import (
    LORA_FILE,
    TEXT_TARGETS,
    LoraConfig,
    TextEncoderLoraConfig,
    add_lora,
    load_lora,
    save_lora,
)
from trainers.batch import init_seed
from trainers.errors import ModelError
from trainers.finished import check_finished
from trainers.method import MethodConfig, Trained
from trainers.version import Lineage

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from accelerate import Accelerator

    from trainers.backbone import Backbone, Model

_LAYER = re.compile(r"\.layers\.(\d+)\.")


class TunedConfig(MethodConfig):
    """A method that trains the denoiser and, if wanted, the text encoders."""

    lora: LoraConfig | None = LoraConfig()
    """Of the denoiser; null trains every weight of it."""
    text_encoder_lora: TextEncoderLoraConfig | None = None
    """Null leaves the text encoders as they are; their work is then done once and cached."""
    train_text_encoders: bool = False
    """Train every weight of the text encoders that the denoiser depends on, at the optimizer's own rate."""

    @model_validator(mode="after")
    def _text_encoders_are_trained_in_one_way(self) -> Self:
        if self.train_text_encoders and self.text_encoder_lora:
            raise ValueError("train_text_encoders and text_encoder_lora exclude each other; remove one of them")
        if not self.text_is_frozen and not self.backbone.trains_text:
            option = "train_text_encoders" if self.train_text_encoders else "text_encoder_lora"
            raise ValueError(f"{option}: diffusers has no file for the trained text encoder of this model; remove it")
        if self.text_encoder_lora:
            self.optimizer.check_rates({1.0, self.text_encoder_lora.lr_scale})
        return self

    @property
    def text_is_frozen(self) -> bool:
        """Whether prompts can be embedded once for all."""
        return not self.train_text_encoders and self.text_encoder_lora is None

    @property
    @override
    def without_weak(self) -> str | None:
        return "DoRA" if any(lora and lora.dora for lora in (self.lora, self.text_encoder_lora)) else None

    @override
    def whole_networks(self) -> tuple[str, ...]:
        encoders = tuple(self.backbone.text_layers) if self.train_text_encoders else ()
        return (self.backbone.denoiser_name, *encoders) if self.lora is None else encoders

    @override
    def num_trainable(self) -> int:
        return self.num_in_denoiser() + self.num_in_text_encoders()

    def num_in_denoiser(self) -> int:
        """How many numbers of the denoiser, or of its adapter, are trained."""
        shapes = self.backbone.weight_shapes()
        return _count(shapes[self.backbone.denoiser_name], self.lora, self.backbone.lora_targets)

    def num_in_text_encoders(self) -> int:
        """How many numbers of the text encoders, or of their adapters, are trained."""
        if self.text_is_frozen:
            return 0
        total, shapes = 0, self.backbone.weight_shapes()
        for name, layers in self.backbone.text_layers.items():
            used = {key: shapes[name][key] for key in _used(shapes[name], layers)}
            total += _count(used, self.text_encoder_lora, TEXT_TARGETS)
        return total

    @override
    def check_finished(self, folder: Path, *, weak: bool, any_size: bool = False) -> None:
        super().check_finished(folder, weak=weak)
        for part in (folder, folder / "weak") if weak else (folder,):
            check_finished(self, part, any_size=any_size)

    @override
    def load_trained(self, folder: Path | None, accelerator: Accelerator) -> Model:
        backbone = self.backbone.load(accelerator.device, self.frozen_dtype())
        if folder is not None:
            load(backbone, folder)
        backbone.lineage = Lineage(folder, self.whole_networks())
        return backbone


def tune(backbone: Backbone, config: TunedConfig, seed: int) -> dict[str, Trained]:
    """Make trainable, in float32, what `config` says; adapters change nothing before they are trained.

    Returns:
        Networks to optimise, by pipeline component.
    """
    return tune_denoiser(backbone, config, seed) | tune_text_encoders(backbone, config, seed)


def tune_denoiser(backbone: Backbone, config: TunedConfig, seed: int) -> dict[str, Trained]:
    """The denoiser's part of `tune`."""
    if config.lora is None:
        backbone.denoiser.float().requires_grad_(requires_grad=True)
        backbone.dtype = next(backbone.denoiser.parameters()).dtype
    else:
        add_lora(backbone.denoiser, config.lora, config.backbone.lora_targets, init_seed(seed, 0))
    return {next(iter(backbone.networks)): Trained(backbone.denoiser)}


def tune_text_encoders(backbone: Backbone, config: TunedConfig, seed: int) -> dict[str, Trained]:
    """The text encoders' part of `tune`."""
    trained: dict[str, Trained] = {}
    for i, (name, layers) in enumerate(config.backbone.text_layers.items()):
        encoder = backbone.networks[name]
        if config.train_text_encoders:
            weights = dict(encoder.float().named_parameters())
            for key in _used(weights, layers):
                weights[key].requires_grad = True
            trained[name] = Trained(encoder)
        elif lora := config.text_encoder_lora:
            add_lora(encoder, lora, TEXT_TARGETS, init_seed(seed, i + 1), layers)
            trained[name] = Trained(encoder, lora.lr_scale)
    return trained


def export(backbone: Backbone, trained: Mapping[str, Trained], folder: Path) -> None:
    """Write what was trained as diffusers loads it: one LoRA file, and a folder for every network trained whole."""
    adapted = {name: one.network for name, one in trained.items() if hasattr(one.network, "peft_config")}
    if adapted:
        save_lora(folder, backbone.pipeline, adapted)
    for name in trained.keys() - adapted.keys():
        cast("Any", trained[name].network).save_pretrained(folder / name, safe_serialization=True)


def load(backbone: Backbone, folder: Path) -> None:
    """Bring `backbone` to what `export` wrote, frozen.

    Raises:
        ModelError: Nothing in `folder` is of this model.
    """
    from trainers.whole import read_network

    whole = [name for name in backbone.networks if (folder / name / "config.json").is_file()]
    if not whole and not (folder / LORA_FILE).is_file():
        raise ModelError(
            f"{folder}: neither {LORA_FILE} nor a network's folder; expected the adapter of a finished trial"
        )
    for name in whole:
        backbone.networks[name].load_state_dict(read_network(backbone.networks[name], folder / name))
    if (folder / LORA_FILE).is_file():
        load_lora(folder, backbone.pipeline, backbone.networks)


def _used(names: Collection[str], layers: int) -> list[str]:
    """The weights of a text encoder that the output of its first `layers` layers depends on."""
    layer = {name: int(match[1]) for name in names if (match := _LAYER.search(name))}
    if layers > max(layer.values(), default=0):
        return list(names)
    return [name for name in names if layer.get(name, 0) < layers and "final_layer_norm" not in name]


def _count(shapes: Mapping[str, tuple[int, ...]], lora: LoraConfig | None, targets: tuple[str, ...]) -> int:
    """How many numbers of a network are trained."""
    import math

    if lora is None:
        return sum(math.prod(shape) for shape in shapes.values())
    endings = tuple(f".{target}.weight" for target in targets)
    return sum(lora.size(shape) for name, shape in shapes.items() if name.endswith(endings))
