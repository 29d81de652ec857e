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
from trainers.method import MethodConfig, Trained

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from accelerate import Accelerator
    from torch import nn

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
        return self

    @property
    def text_is_frozen(self) -> bool:
        """Whether prompts can be embedded once for all."""
        return not self.train_text_encoders and self.text_encoder_lora is None

    @override
    def num_trainable(self) -> int:
        return self.num_in_denoiser() + self.num_in_text_encoders()

    def num_in_denoiser(self) -> int:
        """How many numbers of the denoiser, or of its adapter, are trained."""
        shapes = self.backbone.weight_shapes()
        return _count(shapes[_networks(shapes)[0]], self.lora, self.backbone.lora_targets)

    def num_in_text_encoders(self) -> int:
        """How many numbers of the text encoders, or of their adapters, are trained."""
        if self.text_is_frozen:
            return 0
        shapes = self.backbone.weight_shapes()
        return sum(_count(shapes[name], self.text_encoder_lora, TEXT_TARGETS) for name in _networks(shapes)[1:])

    @override
    def load_trained(self, folder: Path | None, accelerator: Accelerator) -> Model:
        backbone = self.backbone.load(accelerator.device, self.frozen_dtype())
        if folder is not None:
            load(backbone, folder)
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
        _unfreeze(backbone.denoiser)
    else:
        add_lora(backbone.denoiser, config.lora, config.backbone.lora_targets, init_seed(seed, 0))
    return {next(iter(backbone.networks)): Trained(backbone.denoiser)}


def tune_text_encoders(backbone: Backbone, config: TunedConfig, seed: int) -> dict[str, Trained]:
    """The text encoders' part of `tune`."""
    names = list(backbone.networks)[1:]
    trained: dict[str, Trained] = {}
    for i, (name, layers) in enumerate(zip(names, backbone.text_layers, strict=True)):
        encoder = backbone.networks[name]
        if config.train_text_encoders:
            _unfreeze(encoder, layers)
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
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    whole = [name for name in backbone.networks if (folder / name / "config.json").is_file()]
    if not whole and not (folder / LORA_FILE).is_file():
        raise ModelError(
            f"{folder}: neither {LORA_FILE} nor a network's folder; expected the adapter of a finished trial"
        )
    for name in whole:
        files = sorted((folder / name).glob("*.safetensors"))
        state: dict[str, Any] = {key: value for file in files for key, value in load_file(file).items()}
        backbone.networks[name].load_state_dict(state)
    if (folder / LORA_FILE).is_file():
        load_lora(folder, backbone.pipeline, backbone.networks)


def _unfreeze(network: nn.Module, layers: int | None = None) -> None:
    """Train every weight, or those that the first `layers` transformer layers' output depends on."""
    network.float().requires_grad_(requires_grad=True)
    if layers is None:
        return
    for name, parameter in network.named_parameters():
        found = _LAYER.search(name)
        if (found and int(found[1]) >= layers) or (
            "final_layer_norm" in name and layers < cast("Any", network).config.num_hidden_layers
        ):
            parameter.requires_grad = False


def _networks(names: Iterable[str]) -> list[str]:
    """Components that can be trained: denoiser first."""
    return [name for name in names if name != "vae"]


def _count(shapes: Mapping[str, tuple[int, ...]], lora: LoraConfig | None, targets: tuple[str, ...]) -> int:
    """How many numbers of a network are trained."""
    import math

    if lora is None:
        return sum(math.prod(shape) for shape in shapes.values())
    endings = tuple(f".{target}.weight" for target in targets)
    return sum(lora.size(shape) for name, shape in shapes.items() if name.endswith(endings))
