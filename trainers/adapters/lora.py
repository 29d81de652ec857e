"""Low-rank adaptation (Hu et al., 2021, arXiv:2106.09685) with PEFT, in the files that diffusers loads."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any, cast
from weakref import WeakKeyDictionary

from pydantic import Field, PositiveFloat, PositiveInt

from trainers.config import Config
from trainers.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for."""

PEFT_FILE = "adapter_model.safetensors"
"""The name that PEFT looks for."""

_NAME = "default"
"""PEFT's name of a model's only adapter."""

_LENGTHS, _LENGTHS_OF_TRANSFORMERS = "lora_magnitude_vector", "lora_magnitude_vector.weight"
"""PEFT's name of what DoRA trains beside LoRA, and the only one under which transformers does not pass it over."""

_INVISIBLE = 1e-6
"""Of a weight's length: below the rounding of what is summed with it in float32."""

_trained: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]] = WeakKeyDictionary()
"""Up-projection and lengths of the DoRA layers whose scale is not 1 at present."""


class LoraConfig(Config):
    """W x becomes W x + (alpha / rank) B A x in every attention projection; B is zero at first."""

    rank: PositiveInt = 8
    alpha: PositiveFloat | None = None
    """Null follows `rank`, so that the factor is 1."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an element of x on the low-rank path. Masks depend on how a batch is divided."""
    rank_stabilized: bool = False
    """Whether the factor is alpha / sqrt(rank), so that higher ranks learn as fast (Kalajdzievski, 2023,
    arXiv:2312.03732)."""
    dora: bool = False
    """Whether the length of each row of W + (alpha / rank) B A is trained by itself (Liu et al., 2024,
    arXiv:2402.09353). A step takes longer."""

    def size(self, shape: tuple[int, ...]) -> int:
        """How many numbers the adapter of a linear layer of `shape` (out, in) has."""
        return self.rank * sum(shape) + (shape[0] if self.dora else 0)


class TextEncoderLoraConfig(LoraConfig):
    """LoRA of both text encoders."""

    lr_scale: PositiveFloat = 0.3
    """Their learning rate is the optimizer's times this."""


def add_lora(
    network: nn.Module, config: LoraConfig, targets: tuple[str, ...], seed: int, layers: int | None = None
) -> None:
    """Add a trainable float32 adapter to a frozen network in place; it changes nothing before it is trained.

    The network is left in evaluation mode, its adapter included.

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
        use_rslora=config.rank_stabilized,
        use_dora=config.dora,
        target_modules=list(targets),
        **first,
    )
    cast("Any", network).add_adapter(lora)
    # PEFT's dropout would be at work until training has set the mode of the network, which is frozen and evaluated.
    network.eval()
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "lora_" not in name:
            continue
        parameter.data = parameter.data.float()
        if "lora_A" in name:
            # Gaussian with deviation 1 / rank, as diffusers' own trainers begin.
            parameter.data.copy_(torch.randn(parameter.shape, generator=rng) / config.rank)
        parameter.requires_grad = True
    if config.dora:
        for layer in _layers(network):
            # PEFT rounds lengths to the base's precision and divides by those in float32: not a no-op.
            _magnitude(layer).data = layer.get_base_layer().weight.float().norm(dim=1)


def save_lora(folder: Path, pipeline: Any, networks: Mapping[str, nn.Module]) -> None:
    """Write the adapters of `networks`, by pipeline component, as one file that `load_lora_weights` reads.

    The file carries PEFT's configuration, alpha included. It is replaced atomically.
    """
    import peft
    from diffusers.utils import state_dict_utils

    arguments: dict[str, Any] = {}
    accepted = inspect.signature(pipeline.save_lora_weights).parameters
    for name, network in networks.items():
        layers = peft.get_peft_model_state_dict(network, save_embedding_layers=False)
        if name.startswith("text_encoder"):
            layers = {key.replace(_LENGTHS, _LENGTHS_OF_TRANSFORMERS): value for key, value in layers.items()}
        arguments[f"{name}_lora_layers"] = state_dict_utils.convert_state_dict_to_diffusers(layers)
        arguments[f"{name}_lora_adapter_metadata"] = _describe(network)
    assert arguments.keys() <= accepted.keys(), (
        f"{pipeline.__name__} does not save {arguments.keys() - accepted.keys()}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = f".{LORA_FILE}.tmp.safetensors"
    pipeline.save_lora_weights(folder, weight_name=temporary, **arguments)
    (folder / temporary).replace(folder / LORA_FILE)


def load_lora(folder: Path, pipeline: Any, networks: Mapping[str, nn.Module]) -> None:
    """Add the adapter in `folder`, frozen and active, to the networks it was trained for.

    Args:
        folder: What `save_lora` wrote, or any file of that name that diffusers loads.
        pipeline: diffusers' pipeline class.
        networks: The denoiser and then the text encoders, by pipeline component.

    Raises:
        ModelError: There is no adapter file.
    """
    if not (folder / LORA_FILE).is_file():
        raise ModelError(f"{folder}: no {LORA_FILE}; expected the adapter of a finished trial")
    denoiser, *encoders = networks
    unet = {"unet_config": cast("Any", networks["unet"]).config} if denoiser == "unet" else {}
    state, *alphas, metadata = pipeline.lora_state_dict(folder, return_lora_metadata=True, **unet)
    shared: dict[str, Any] = {"adapter_name": "default", "metadata": metadata}
    if alphas:
        shared["network_alphas"] = alphas[0]
    getattr(pipeline, f"load_lora_into_{denoiser}")(state, **{denoiser: networks[denoiser]}, **shared)
    for name in encoders:
        if any(key.startswith(f"{name}.") for key in state):
            pipeline.load_lora_into_text_encoder(state, text_encoder=networks[name], prefix=name, **shared)
    for network in networks.values():
        network.requires_grad_(requires_grad=False).eval()


def merge_text_lora(encoder: nn.Module, folder: Path, pipeline: Any, name: str) -> None:
    """Add an adapter to a frozen text encoder's weights, for good.

    Args:
        encoder: The pipeline's component `name`.
        folder: What PEFT's `save_pretrained` wrote, or what `save_lora` wrote.
        pipeline: diffusers' pipeline class.
        name: As the file of `save_lora` calls the encoder.

    Raises:
        ModelError: There is no adapter for it in `folder`.
    """
    import copy

    import peft
    import torch
    from peft.tuners.lora import LoraLayer

    # PEFT changes a copy, so that nothing of it stays in the encoder.
    adapted: Any = copy.deepcopy(encoder).float()
    try:
        expected = _load_text_lora(adapted, folder, pipeline, name)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{folder}: cannot be merged into this model's {name} ({error})") from error
    loaded = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if loaded.keys() != expected.keys() or not all(torch.equal(loaded[key], expected[key].float()) for key in expected):
        raise ModelError(f"{folder}: has other layers than {name}; expected an adapter of this model's {name}")
    weights = encoder.state_dict()
    for path, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
            weights[f"{path}.weight"].copy_(layer.get_base_layer().weight)


def _load_text_lora(encoder: nn.Module, folder: Path, pipeline: Any, name: str) -> dict[str, Tensor]:
    """Add the adapter in `folder` to `encoder`; its tensors, as PEFT calls them."""
    from diffusers.utils import state_dict_utils
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    if (folder / PEFT_FILE).is_file():
        cast("Any", encoder).load_adapter(str(folder), adapter_name=_NAME)
        state: dict[str, Any] = load_file(folder / PEFT_FILE)
        return {key.removeprefix("base_model.model."): value for key, value in state.items()}
    state, alphas, metadata = pipeline.lora_state_dict(folder, return_lora_metadata=True)
    own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    if not own:
        raise ValueError("there is none; expected an adapter that was trained with text encoders")
    options = {"network_alphas": alphas, "adapter_name": _NAME, "metadata": metadata, "prefix": name}
    pipeline.load_lora_into_text_encoder(state, text_encoder=encoder, **options)
    named = cast("Any", state_dict_utils).convert_state_dict_to_peft(
        state_dict_utils.convert_state_dict_to_diffusers(own)
    )
    return {key.replace(_LENGTHS_OF_TRANSFORMERS, _LENGTHS): value for key, value in named.items()}


def set_lora_scale(networks: Iterable[nn.Module], scale: float) -> None:
    """Have all adapters act with weight `scale`: weights become W + scale (W' - W), where W' are the trained ones."""
    for network in networks:
        for layer in _layers(network):
            if layer.lora_magnitude_vector:
                _blend_dora(layer, scale)
            else:
                layer.set_scale(_NAME, scale)


def _blend_dora(layer: Any, scale: float) -> None:
    """Make a DoRA layer W + scale (W' - W), which PEFT's own scale does not: at 0 it keeps the trained lengths.

    With r the ratio of trained to actual lengths, W' = r (W + f B A), rows by rows. The blend is
    k (W + f (scale r / k) B A) with k = 1 + scale (r - 1): again such a layer, of another B and other lengths.
    """
    import torch

    up, down, magnitude = layer.lora_B[_NAME].weight, layer.lora_A[_NAME].weight, _magnitude(layer)
    up.data, magnitude.data = _trained.pop(layer, (up.data, magnitude.data))
    if scale == 1:
        return
    _trained[layer] = up.data, magnitude.data
    weight, factor = layer.get_base_layer().weight.float(), layer.scaling[_NAME]

    def lengths(up: Tensor) -> Tensor:
        return (weight + factor * up @ down.float()).norm(dim=1)

    with torch.no_grad():
        ratio = magnitude.float() / lengths(up.float())
        kept = 1 + scale * (ratio - 1)
        # A row that the blend takes out of W altogether is left with an invisible rest of it.
        kept = torch.where(kept.abs() < _INVISIBLE, _INVISIBLE, kept)
        blended = up.float() * (scale * ratio / kept)[:, None]
        up.data, magnitude.data = blended.to(up.dtype), (kept * lengths(blended)).to(magnitude.dtype)


def _layers(network: nn.Module) -> Iterator[Any]:
    from peft.tuners.lora import LoraLayer

    return (layer for layer in network.modules() if isinstance(layer, LoraLayer))


def _magnitude(layer: Any) -> nn.Parameter:
    return layer.lora_magnitude_vector[_NAME].weight


def _describe(network: nn.Module) -> dict[str, Any]:
    """PEFT's configuration of the network's adapter, without this machine's paths and always in one order."""
    config = cast("Any", network).peft_config[_NAME].to_dict()
    return {**config, "base_model_name_or_path": None, "target_modules": sorted(config["target_modules"])}
