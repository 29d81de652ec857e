"""What one attention layer's query projection answers: the features that a matching loss compares."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeVar

from trainers.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from jaxtyping import Float
    from torch import Tensor, nn

T = TypeVar("T")

_WEIGHT = ".to_q.weight"


def attention_layers(weights: Iterable[str]) -> tuple[str, ...]:
    """Names of a denoiser's attention layers in the order in which they stand, from the names of its weights."""
    names = {name.removesuffix(_WEIGHT) for name in weights if name.endswith(_WEIGHT)}
    return tuple(sorted(names, key=_in_order))


def choose_layer(wanted: str | None, weights: Iterable[str]) -> str:
    """The layer called `wanted`; None is the last self-attention of the last upward block that has any.

    In Stable Diffusion 1 and 2 that is `up_blocks.3.attentions.2.transformer_blocks.0.attn1`, in SDXL's base
    `up_blocks.1.attentions.2.transformer_blocks.1.attn1`.

    Raises:
        ModelError: There is no such layer.
    """
    layers = attention_layers(weights)
    if wanted is None:
        own = [layer for layer in layers if layer.startswith("up_blocks.") and layer.endswith(".attn1")]
        if not own:
            raise ModelError("no self-attention in the upward blocks of the denoiser; name a layer to match queries at")
        return own[-1]
    if wanted not in layers:
        raise ModelError(
            f"{wanted!r} is not an attention layer of the denoiser; expected one of {len(layers)}, such as "
            f"{', '.join(layers[-2:])}"
        )
    return wanted


def call_with_queries(
    denoiser: nn.Module, layer: str, forward: Callable[[], T]
) -> tuple[T, Float[Tensor, "b tokens channels"]]:
    """Run `forward` once; its result, and the queries that it computed in `layer` (before heads are split).

    Only calls from inside `forward` are seen, and nothing stays behind: neither sampling nor the second forward pass of
    gradient checkpointing, which happens during the backward pass, can add to what is returned. The layer is called as
    always, with its adapters, so gradients of the queries reach them.

    Args:
        denoiser: A UNet.
        layer: One of its `attention_layers`.
        forward: Calls `denoiser` exactly once.

    Raises:
        ModelError: The layer's query projection was not called exactly once.
    """
    answers: list[Tensor] = []

    def note(_module: nn.Module, _arguments: object, answer: Tensor) -> None:
        answers.append(answer)

    handle = denoiser.get_submodule(f"{layer}.to_q").register_forward_hook(note)
    try:
        result = forward()
    finally:
        handle.remove()
    if len(answers) != 1:
        raise ModelError(
            f"the query projection of {layer} was called {len(answers)} times in one pass; expected once. Fused "
            "projections and compiled blocks hide it: switch them off, or name another layer"
        )
    return result, answers[0]


def _in_order(name: str) -> list[tuple[int, str]]:
    """Numbers by value, so that block 10 comes after block 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"[.]", name)]
