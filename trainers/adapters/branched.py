"""Branched attention: inside the face a picture attends to a reference photo that is denoised beside it.

A *branched* forward pass of the UNet has more rows than pictures: first pictures without a reference, then R with one,
then their R references at the same noise level. In self-attention every row attends to itself as always; in the R
rows, what a query inside the face gathers is then moved, by a trained gate that begins at zero, towards what it gathers
from the tokens of its reference's face:

    O = O_b + sigma g M (O_f - O_b),    O_f = A(q(n), k(S), v(S)),
    S = f  or, with `ca_mixing_for_face`,  [f ; n inside the face],
    f = ((1 - rho) M_r r + rho M n) / ((1 - rho) M_r + rho M),  then (1 - alpha) f + alpha W_id e,  then f + G_face f

with queries q(n) of the noisy row n, reference r, face masks M of n and M_r of r, `pose_adapt_ratio` rho, `id_alpha`
alpha, identity e. Tokens outside the masks are excluded by minus infinity, not by zeros, so they take no share of the
softmax. All of this comes with each call (`Faces`); the processors remember nothing, and a call without it is the
stock processor's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from trainers.branching import BranchConfig


class Branch(nn.Module):
    """What one self-attention layer is given to train; float32."""

    def __init__(self, width: int, id_width: int, config: BranchConfig, *, last: bool) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.full((width,), config.gate))
        """Per channel."""
        self.id_to_hidden = nn.Linear(id_width, width, bias=False) if config.id_alpha > 0 else None
        self.face_adapter = nn.Linear(width, width, bias=False) if config.branch_adapters else None
        # No later layer looks at what the last one makes of the reference.
        self.ref_adapter = nn.Linear(width, width, bias=False) if config.branch_adapters and not last else None

    def reset(self, rng: torch.Generator) -> None:
        """Initial weights: adapters are zero, the identity's projection a tenth of a linear layer's default."""
        for module in (self.face_adapter, self.ref_adapter):
            if module is not None:
                nn.init.zeros_(module.weight)
        if self.id_to_hidden is not None:
            bound = 0.1 * self.id_to_hidden.in_features**-0.5
            drawn = torch.rand(self.id_to_hidden.weight.shape, generator=rng)
            self.id_to_hidden.weight.data.copy_((2 * drawn - 1) * bound)


@dataclass(frozen=True)
class Faces:
    """What one branched call is told. Its last 2 R rows are R pictures and, in the same order, their references."""

    mask: Float[Tensor, "r 1 h w"]
    """On the grid of the latents, 1 inside the picture's face."""
    reference_mask: Float[Tensor, "r 1 h w"]
    """The same of the references."""
    identity: Float[Tensor, "r id"]
    """What `id_to_hidden` projects."""
    text_mask: Bool[Tensor, "rows tokens"] | None = None
    """Tokens of its prompt that each row attends to; None is all of them."""
    scale: float = 1.0
    """Factor of all gates."""


class BranchedSelfAttention:
    """Self-attention in which R rows look at the R rows after them; see the module's text."""

    def __init__(self, stock: Any, branch: Branch, config: BranchConfig) -> None:
        self.stock, self.branch, self.config = stock, branch, config

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "rows length width"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        faces: Faces | None = None,
    ) -> Tensor:
        """Attention of a layer; without `faces` the stock one."""
        if faces is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        out = self._attend(attn, hidden_states, faces)
        out = attn.to_out[1](attn.to_out[0](out))
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor

    def _attend(self, attn: Any, hidden: Tensor, faces: Faces) -> Float[Tensor, "rows length width"]:
        """Everything before the output projection."""
        query, key, value = attn.to_q(hidden), attn.to_k(hidden), attn.to_v(hidden)
        out = _attention(attn, query, key, value)
        count = len(faces.mask)
        rows, behind = slice(len(hidden) - 2 * count, len(hidden) - count), slice(len(hidden) - count, None)
        picture, references = out[rows], out[behind]
        own = _Own(query[rows], hidden[rows], key[rows], value[rows])
        if self.config.train_branch_mode == "ref_only":
            picture, own = picture.detach(), own.detach()
        inside, reference_inside = (tokens_inside(mask, hidden.shape[1]) for mask in (faces.mask, faces.reference_mask))
        source, allowed = self._source(own.hidden, hidden[behind], (inside, reference_inside), faces.identity)
        if source is None:
            face_key, face_value = key[behind], value[behind]
        else:
            face_key, face_value = attn.to_k(source), attn.to_v(source)
        if self.config.ca_mixing_for_face:
            face_key, face_value = torch.cat([face_key, own.key], 1), torch.cat([face_value, own.value], 1)
            allowed = torch.cat([allowed, inside], 1)
        face = _attention(attn, own.query, face_key, face_value, allowed)
        opened = faces.scale * self.branch.gate.to(out.dtype) * inside[:, :, None]
        picture = picture + opened * (face - picture)
        if self.branch.ref_adapter is not None:
            references = references + _apply(self.branch.ref_adapter, references)
        return torch.cat([out[: rows.start], picture, references])

    def _source(
        self, picture: Tensor, reference: Tensor, inside: tuple[Tensor, Tensor], identity: Tensor
    ) -> tuple[Float[Tensor, "r length width"] | None, Bool[Tensor, "r length"]]:
        """The module text's f, None if it is the reference as it is, and which of its tokens count."""
        config, branch = self.config, self.branch
        source, allowed = reference, inside[1]
        if (rho := config.pose_adapt_ratio) > 0:
            own = rho * inside[0][:, :, None].to(picture.dtype)
            other = (1 - rho) * inside[1][:, :, None].to(picture.dtype)
            weight = own + other
            source = (own * picture + other * reference) / torch.where(weight > 0, weight, 1)
            allowed = weight[:, :, 0] > 0
        if branch.id_to_hidden is not None:
            projected = _apply(branch.id_to_hidden, identity).to(source.dtype)[:, None]
            source = (1 - config.id_alpha) * source + config.id_alpha * projected
        if branch.face_adapter is not None:
            source = source + _apply(branch.face_adapter, source)
        return (None if source is reference else source), allowed


@dataclass(frozen=True)
class _Own:
    """What the R pictures' own rows bring to their faces."""

    query: Tensor
    hidden: Tensor
    key: Tensor
    value: Tensor

    def detach(self) -> _Own:
        """The same values; no gradients through them."""
        return _Own(self.query.detach(), self.hidden.detach(), self.key.detach(), self.value.detach())


class BranchedCrossAttention:
    """Cross-attention in which each row attends to its own prompt, less the tokens that a mask takes away."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "rows length width"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        faces: Faces | None = None,
    ) -> Tensor:
        """Attention of a layer; without a `text_mask` the stock one."""
        if faces is not None and faces.text_mask is not None:
            bias = torch.zeros(faces.text_mask.shape, dtype=hidden_states.dtype, device=hidden_states.device)
            attention_mask = bias.masked_fill(~faces.text_mask, float("-inf"))[:, None]
        return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class Branches(nn.Module):
    """What all self-attention layers of a UNet are given to train, by layer."""

    def __init__(self, layers: dict[str, Branch]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({_spell(name): branch for name, branch in layers.items()})

    def close(self) -> None:
        """Shut all gates: pictures are drawn as if there were no branches."""
        for branch in self.layers.values():
            nn.init.zeros_(cast("Branch", branch).gate)


def install(unet: nn.Module, config: BranchConfig, id_width: int, seed: int) -> Branches:
    """Give a UNet branched processors in place of its own; calls without `Faces` do what they did before.

    Args:
        unet: diffusers' `UNet2DConditionModel`.
        config: What the branches do.
        id_width: Of the identity that calls bring.
        seed: Determines initial weights.
    """
    network = cast("Any", unet)
    names = [name.removesuffix(".processor") for name in network.attn_processors]
    layers = {name: network.get_submodule(name) for name in names}
    inner = sorted((name for name in names if name.endswith("attn1")), key=_stage)
    rng = torch.Generator().manual_seed(seed)
    branches: dict[str, Branch] = {}
    for name in inner if config.branched_self else ():
        layer = layers[name]
        branch = Branch(layer.query_dim, id_width, config, last=name == inner[-1])
        branch.reset(rng)
        branches[name] = branch.to(layer.to_q.weight.device)
        layer.set_processor(BranchedSelfAttention(layer.processor, branches[name], config))
    for name, layer in layers.items():
        if name.endswith("attn2") and config.branched_self:
            layer.set_processor(BranchedCrossAttention(layer.processor))
    return Branches(branches)


def unreached(unet: nn.Module, config: BranchConfig) -> tuple[str, ...]:
    """Projections whose adapters no gradient need reach: with `ref_only`, the queries of the last self-attention layer.

    The reference's are not used again, and the picture's are detached.
    """
    if config.train_branch_mode != "ref_only":
        return ()
    names = [name.removesuffix(".processor") for name in cast("Any", unet).attn_processors]
    return (max((name for name in names if name.endswith("attn1")), key=_stage) + ".to_q",)


def box_mask(box: tuple[int, int, int, int], picture: tuple[int, int], grid: tuple[int, int]) -> Float[Tensor, "1 h w"]:
    """1 in every cell of a grid that a box touches: it is rounded outward, so that a small face has a cell.

    Args:
        box: Left, top, right, bottom in pixels, inside the picture and not empty.
        picture: Height and width in pixels.
        grid: Height and width in cells.
    """
    mask = torch.zeros(1, *grid)
    (height, width), (rows, columns) = picture, grid
    left, right = box[0] * columns // width, -(-box[2] * columns // width)
    top, bottom = box[1] * rows // height, -(-box[3] * rows // height)
    mask[:, top:bottom, left:right] = 1
    return mask


def tokens_inside(mask: Float[Tensor, "r 1 h w"], length: int) -> Bool[Tensor, "r length"]:
    """A mask on the grid of a layer that has `length` tokens: a token is inside if any of its cells is.

    Raises:
        ValueError: No halving of the mask's grid has so many tokens.
    """
    rows, columns = mask.shape[-2:]
    while rows * columns > length and rows * columns > 1:
        rows, columns = -(-rows // 2), -(-columns // 2)
    if rows * columns != length:
        raise ValueError(f"a layer of {length} tokens is no halving of a grid of {tuple(mask.shape[-2:])} cells")
    return nn.functional.adaptive_max_pool2d(mask, (rows, columns)).flatten(1) > 0


def _attention(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, allowed: Bool[Tensor, "r keys"] | None = None
) -> Tensor:
    """Softmax attention of a layer's heads, back in one row of channels; a row without keys sees all of them."""
    count, length, width = query.shape
    bias = None
    if allowed is not None:
        # Such a row's face is empty too, so what it gathers is not used; without this it would be NaN.
        bias = (allowed | ~allowed.any(1, keepdim=True))[:, None, None]
    split = (part.view(count, -1, attn.heads, width // attn.heads).transpose(1, 2) for part in (query, key, value))
    query, key, value = split
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return out.transpose(1, 2).reshape(count, length, width).to(query.dtype)


def _apply(linear: nn.Linear, x: Tensor) -> Tensor:
    """A float32 map of what may be in lower precision."""
    return linear(x.to(linear.weight.dtype)).to(x.dtype)


def _stage(name: str) -> tuple[int, list[int | str]]:
    """Sorts a UNet's layers by when they run."""
    parts = name.split(".")
    place = ("down_blocks", "mid_block", "up_blocks").index(parts[0])
    return place, [int(part) if part.isdigit() else part for part in parts[1:]]


def _spell(name: str) -> str:
    """A layer's name as a key of a ModuleDict, which has no dots."""
    return name.replace(".", "/")
