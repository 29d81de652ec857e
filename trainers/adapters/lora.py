"""Low-rank adaptation (Hu et al., 2021, arXiv:2106.09685) with PEFT, in the files that diffusers loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field, PositiveFloat, PositiveInt

from trainers.config import Config
from trainers.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")

_FILE = "pytorch_lora_weights.safetensors"


class LoraConfig(Config):
    """W x becomes W x + (alpha / rank) B A x in every attention projection; B is zero at first."""

    rank: PositiveInt = 8
    alpha: PositiveFloat | None = None
    """Null follows `rank`, so that the factor is 1."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an element of x on the low-rank path. Masks depend on how a batch is divided."""


class TextEncoderLoraConfig(LoraConfig):
    """LoRA of both text encoders."""

    lr_scale: PositiveFloat = 0.3
    """Their learning rate is the optimizer's times this."""


def add_lora(
    network: nn.Module, config: LoraConfig, targets: tuple[str, ...], seed: int, layers: int | None = None
) -> None:
    """Add a trainable float32 adapter to a frozen network in place; it changes nothing before it is trained.

    Args:
        network: From diffusers or transformers.
        config: Size of the adapter.
        targets: Names of the linear layers to adapt.
        seed: Determines the initial weights, on every device alike.
        layers: Adapt the first so many transformer layers; default all.
    """
    import peft
    import torch

    first: dict[str, Any] = {}
    if layers is not None:
        first = {"layers_to_transform": list(range(layers)), "layers_pattern": "layers"}
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=cast("int", config.rank if config.alpha is None else config.alpha),
        lora_dropout=config.dropout,
        target_modules=list(targets),
        **first,
    )
    cast("Any", network).add_adapter(lora)
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "lora_" not in name:
            continue
        parameter.data = parameter.data.float()
        if "lora_A" in name:
            # Gaussian with deviation 1 / rank, as diffusers' own trainers begin.
            parameter.data.copy_(torch.randn(parameter.shape, generator=rng) / config.rank)
        parameter.requires_grad = True


def save_lora(folder: Path, networks: Mapping[str, nn.Module]) -> None:
    """Write the adapters of `networks`, by pipeline component, as one file that `load_lora_weights` reads.

    The file carries PEFT's configuration, alpha included. It is replaced atomically.
    """
    import diffusers
    import peft
    from diffusers.utils import state_dict_utils

    pipeline: Any = diffusers.StableDiffusionXLPipeline  # pyright: ignore[reportPrivateImportUsage]
    arguments: dict[str, Any] = {}
    for name, network in networks.items():
        layers = peft.get_peft_model_state_dict(network, save_embedding_layers=False)
        arguments[f"{name}_lora_layers"] = state_dict_utils.convert_state_dict_to_diffusers(layers)
        arguments[f"{name}_lora_adapter_metadata"] = _describe(network)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = f".{_FILE}.tmp.safetensors"
    pipeline.save_lora_weights(folder, weight_name=temporary, **arguments)
    (folder / temporary).replace(folder / _FILE)


def load_lora(folder: Path, networks: Mapping[str, nn.Module]) -> None:
    """Add the adapter in `folder`, frozen and active, to the networks it was trained for.

    Args:
        folder: What `save_lora` wrote, or any file of that name that diffusers loads.
        networks: `unet` and the text encoders, by pipeline component.

    Raises:
        ModelError: There is no adapter file.
    """
    import diffusers

    if not (folder / _FILE).is_file():
        raise ModelError(f"{folder}: no {_FILE}; expected the adapter of a finished trial")
    pipeline: Any = diffusers.StableDiffusionXLPipeline  # pyright: ignore[reportPrivateImportUsage]
    unet = cast("Any", networks["unet"])
    state, alphas, metadata = pipeline.lora_state_dict(folder, unet_config=unet.config, return_lora_metadata=True)
    shared = {"network_alphas": alphas, "adapter_name": "default", "metadata": metadata}
    pipeline.load_lora_into_unet(state, unet=unet, **shared)
    for name, network in networks.items():
        if any(key.startswith(f"{name}.") for key in state) and name != "unet":
            pipeline.load_lora_into_text_encoder(state, text_encoder=network, prefix=name, **shared)
    for network in networks.values():
        network.requires_grad_(requires_grad=False).eval()


def _describe(network: nn.Module) -> dict[str, Any]:
    """PEFT's configuration of the network's adapter, without this machine's paths and always in one order."""
    config = cast("Any", network).peft_config["default"].to_dict()
    return {**config, "base_model_name_or_path": None, "target_modules": sorted(config["target_modules"])}
