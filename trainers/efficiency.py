"""What changes a step's speed and memory and not its mathematics."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

from trainers.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Generator

    from accelerate import Accelerator
    from torch import nn

    from trainers.method import Method

AttentionKernel = Literal["auto", "flash", "efficient", "cudnn", "math"]
"""torch's implementations of scaled dot-product attention; auto lets torch choose for each shape."""

_BLOCK = "TransformerBlock"
"""How diffusers' names of the repeated part of a denoiser end."""


def checkpoint_activations(method: Method) -> None:
    """Keep no activations inside the blocks of the denoiser and of trained text encoders: compute them twice."""
    denoiser, *encoders = method.backbone.networks.values()
    cast("Any", denoiser).enable_gradient_checkpointing()
    trained = [one.network for one in method.trained().values()]
    for encoder in encoders:
        if any(encoder is network for network in trained):
            network = cast("Any", encoder)
            # transformers changed the name in 5.2x and warns about the old one.
            enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
            enable({"use_reentrant": False})


def compile_blocks(denoiser: nn.Module) -> None:
    """Compile the denoiser's transformer blocks, each at its first forward pass; equal blocks are compiled once.

    Raises:
        ConfigError: It has none.
    """
    blocks = [module for module in denoiser.modules() if type(module).__name__.endswith(_BLOCK)]
    if not blocks:
        raise ConfigError(f"train.compile_blocks: {type(denoiser).__name__} has no transformer blocks; set it to false")
    for block in blocks:
        block.compile()


@contextmanager
def attention_by(kernel: AttentionKernel) -> Generator[None]:
    """Within the context all attention is computed by `kernel`, or fails."""
    if kernel == "auto":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    with sdpa_kernel(backends[kernel]):
        yield


def check_precision(precision: str, accelerator: Accelerator) -> None:
    """Make sure that gradients of float16, most of which would vanish, are scaled.

    Raises:
        ConfigError: Nothing scales them.
    """
    if precision == "fp16" and accelerator.scaler is None:
        raise ConfigError(
            "train.precision is fp16, whose gradients are scaled on accelerators alone, and this is a "
            f"{accelerator.device.type}; set it to bf16 or fp32"
        )


def check_attention(method: Method, kernel: AttentionKernel, accelerator: Accelerator) -> None:
    """Try `kernel` on one example: whether it serves depends on device, precision, masks and widths.

    Raises:
        ConfigError: It does not.
    """
    import warnings

    import torch

    from trainers.batch import Batch

    if kernel == "auto":
        return
    example = Batch(0, (0,), (method.pick(0, 0),))
    try:
        with torch.no_grad(), accelerator.autocast(), attention_by(kernel), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch lists what every kernel lacks
            method.losses(example)
    except RuntimeError as error:
        if "kernel" not in str(error) and "viable backend" not in str(error):
            raise
        raise ConfigError(
            f"train.attention: {kernel} cannot compute this model's attention on {accelerator.device} in this "
            "precision; set it to auto"
        ) from error
