"""PhotoMaker v2 (Li et al., 2023, arXiv:2312.04461): photos of a person become words of a prompt.

The identity encoder turns each photo, with what a face embedder says of it, into a few tokens; where a prompt says
"a man img", the class word's embedding is repeated once per token, and each copy is fused with its token. The state
dictionary has the published checkpoint's layout, and all sizes come from its shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from trainers.errors import ModelError
from trainers.framing import grow_to_square

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from jaxtyping import Bool, Float
    from PIL import Image

# What CLIP's pictures are normalised by (Radford et al., 2021, arXiv:2103.00020).
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class IdSizes:
    """Sizes of an identity encoder; the defaults are the published ones."""

    hidden: int = 1024
    """Width of the vision tower, CLIP's ViT-L/14."""
    mlp: int = 4096
    layers: int = 24
    patch: int = 14
    image: int = 224
    """Pixels on each side of what the tower sees."""
    projections: tuple[int, int] = (768, 1280)
    face: int = 512
    """Numbers that the face embedder gives."""
    face_hidden: int = 2048
    width: int = 2048
    """Of the tokens, and of the text embeddings that they are fused with."""
    tokens: int = 2
    """Per photo."""
    depth: int = 4
    inner: int = 2048
    """All heads of the perceiver's attention together."""
    feedforward: int = 8192

    @property
    def heads(self) -> int:
        """Of the vision tower: CLIP's have 64 channels each."""
        return max(1, self.hidden // 64)

    @property
    def perceiver_heads(self) -> int:
        """Of the perceiver: 128 channels each."""
        return max(1, self.inner // 128)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> IdSizes:
        """The sizes of a state dictionary.

        Raises:
            KeyError: It is not an identity encoder's.
        """
        shape = {name: tuple(value.shape) for name, value in state.items()}
        embeddings, perceiver = "vision_model.embeddings", "qformer_perceiver"
        patch = shape[f"{embeddings}.patch_embedding.weight"][-1]
        width = shape[f"{perceiver}.token_norm.weight"][0]
        face_hidden, face = shape[f"{perceiver}.token_proj.0.weight"]
        resampler = f"{perceiver}.perceiver_resampler.layers"
        return cls(
            hidden=shape[f"{embeddings}.class_embedding"][0],
            mlp=shape["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
            layers=_count(shape, "vision_model.encoder.layers."),
            patch=patch,
            image=round((shape[f"{embeddings}.position_embedding.weight"][0] - 1) ** 0.5) * patch,
            projections=(shape["visual_projection.weight"][0], shape["visual_projection_2.weight"][0]),
            face=face,
            face_hidden=face_hidden,
            width=width,
            tokens=shape[f"{perceiver}.token_proj.2.weight"][0] // width,
            depth=_count(shape, f"{resampler}."),
            inner=shape[f"{resampler}.0.0.to_q.weight"][0],
            feedforward=shape[f"{resampler}.0.1.1.weight"][0],
        )


class IdEncoder(nn.Module):
    """Photos and face embeddings to tokens, and tokens into prompts."""

    def __init__(self, sizes: IdSizes) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        self.sizes = sizes
        self.vision_model = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=sizes.hidden,
                intermediate_size=sizes.mlp,
                num_hidden_layers=sizes.layers,
                num_attention_heads=sizes.heads,
                patch_size=sizes.patch,
                image_size=sizes.image,
            )
        )
        # Only version 1 used the pooled projections; they are part of the layout.
        self.visual_projection = nn.Linear(sizes.hidden, sizes.projections[0], bias=False)
        self.visual_projection_2 = nn.Linear(sizes.hidden, sizes.projections[1], bias=False)
        self.qformer_perceiver = _Perceiver(sizes)
        self.fuse_module = _Fuse(sizes.width)

    @classmethod
    def load(cls, state: Mapping[str, Tensor], where: Path) -> IdEncoder:
        """The encoder of a checkpoint's `id_encoder`, frozen and in evaluation mode.

        Raises:
            ModelError: The tensors are not those of an identity encoder of version 2.
        """
        # Files of older transformers carry a buffer that only counts.
        state = {name: value for name, value in state.items() if not name.endswith("embeddings.position_ids")}
        try:
            encoder = cls(IdSizes.of(state))
            encoder.load_state_dict(dict(state))
        except (KeyError, RuntimeError) as error:
            raise ModelError(f"{where}: not a PhotoMaker v2 identity encoder ({error}); download it again") from error
        return encoder.requires_grad_(requires_grad=False).eval()

    def tokens(self, pixels: Float[Tensor, "n 3 s s"], faces: Float[Tensor, "n face"]) -> Float[Tensor, "n k width"]:
        """Each photo's tokens.

        Args:
            pixels: From `face_pixels`.
            faces: The face embedder's vectors, not normalised.
        """
        seen = cast("Any", self.vision_model)(pixel_values=pixels).last_hidden_state
        return self.qformer_perceiver(faces, seen)

    def fuse(
        self,
        hidden: Float[Tensor, "b length width"],
        tokens: Float[Tensor, "b k width"],
        mask: Bool[Tensor, "b length"],
    ) -> Float[Tensor, "b length width"]:
        """Text embeddings whose class words carry an identity; `hidden` itself is not changed.

        Args:
            hidden: Of prompts whose class word stands `k` times.
            tokens: Of all photos of each row's person, one after the other.
            mask: Where the class word stands: in k places of a row, or in none (such a row stays as it is).

        Raises:
            ValueError: A row has another number of places.
        """
        counts: set[int] = set(cast("list[int]", mask.sum(1).tolist()))
        if not counts <= {0, tokens.shape[1]}:
            raise ValueError(f"class words stand in {sorted(counts)} places; expected {tokens.shape[1]}, or none")
        fused = self.fuse_module(hidden[mask], tokens[mask.any(1)].flatten(0, 1))
        return hidden.masked_scatter(mask[:, :, None], fused.to(hidden.dtype))


def identity_features(tokens: Float[Tensor, "b k width"]) -> Float[Tensor, "b width"]:
    """One vector for a person: the mean of all tokens of all photos."""
    return tokens.mean(1)


class _Perceiver(nn.Module):
    """A face embedding as queries that look at the vision tower's tokens."""

    def __init__(self, sizes: IdSizes) -> None:
        super().__init__()
        self.num_tokens = sizes.tokens
        first = nn.Linear(sizes.face, sizes.face_hidden)
        self.token_proj = nn.Sequential(first, nn.GELU(), nn.Linear(sizes.face_hidden, sizes.tokens * sizes.width))
        self.token_norm = nn.LayerNorm(sizes.width)
        self.perceiver_resampler = _Resampler(sizes)

    def forward(self, faces: Tensor, seen: Tensor) -> Tensor:
        queries = self.token_norm(self.token_proj(faces).unflatten(1, (self.num_tokens, -1)))
        return queries + self.perceiver_resampler(queries, seen)


class _Resampler(nn.Module):
    def __init__(self, sizes: IdSizes) -> None:
        super().__init__()
        width = sizes.width
        self.proj_in = nn.Linear(sizes.hidden, width)
        self.proj_out = nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.ModuleList([_PerceiverAttention(width, sizes.inner, sizes.perceiver_heads), _feedforward(sizes)])
            for _ in range(sizes.depth)
        )

    def forward(self, queries: Tensor, seen: Tensor) -> Tensor:
        seen = self.proj_in(seen)
        for layer in self.layers:
            attention, feedforward = cast("nn.ModuleList", layer)
            queries = queries + attention(queries, seen)
            queries = queries + feedforward(queries)
        return self.norm_out(self.proj_out(queries))


class _PerceiverAttention(nn.Module):
    """Queries attend to what is seen and to themselves."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, queries: Tensor, seen: Tensor) -> Tensor:
        queries = self.norm2(queries)
        key, value = self.to_kv(torch.cat([self.norm1(seen), queries], 1)).chunk(2, -1)
        split = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.to_q(queries), key, value))
        out = nn.functional.scaled_dot_product_attention(*split)
        return self.to_out(out.transpose(1, 2).flatten(2))


def _feedforward(sizes: IdSizes) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(sizes.width),
        nn.Linear(sizes.width, sizes.feedforward, bias=False),
        nn.GELU(),
        nn.Linear(sizes.feedforward, sizes.width, bias=False),
    )


class _Fuse(nn.Module):
    """A class word's embedding and an identity token become one embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp1 = _Mlp(2 * width, width)
        self.mlp2 = _Mlp(width, width)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, words: Float[Tensor, "n width"], tokens: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        mixed = self.mlp1(torch.cat([words, tokens], -1)) + words
        return self.layer_norm(self.mlp2(mixed) + mixed)


class _Mlp(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(width_in)
        self.fc1 = nn.Linear(width_in, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(self.layernorm(x))))


@dataclass(frozen=True)
class Checkpoint:
    """The two parts of a PhotoMaker file."""

    id_encoder: dict[str, Tensor]
    lora_weights: dict[str, Tensor]
    """Of the UNet, under the names that `load_lora_weights` of diffusers takes; may be empty."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Read `photomaker-v2.bin`, or a safetensors file with the same tensors under dotted names.

    Raises:
        ModelError: The file is missing or has other parts.
    """
    import pickle
    import zipfile

    from safetensors import SafetensorError
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    parts: dict[str, dict[str, Tensor]] = {"id_encoder": {}, "lora_weights": {}}
    try:
        if path.suffix == ".safetensors":
            for name, value in load_file(path).items():
                part, _, rest = name.partition(".")
                parts.setdefault(part, {})[rest] = value
        elif not zipfile.is_zipfile(path):
            raise ModelError(f"{path}: missing, or not a file that torch saved; expected a PhotoMaker v2 checkpoint")
        else:
            parts |= torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); expected a PhotoMaker v2 checkpoint") from error
    if parts.keys() != {"id_encoder", "lora_weights"} or not parts["id_encoder"]:
        raise ModelError(f"{path}: holds {sorted(parts)}; expected id_encoder and lora_weights of PhotoMaker v2")
    return Checkpoint(parts["id_encoder"], parts["lora_weights"])


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as safetensors; replaces the file atomically."""
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    parts = {"id_encoder": checkpoint.id_encoder, "lora_weights": checkpoint.lora_weights}
    tensors = {f"{part}.{name}": value.contiguous() for part, held in parts.items() for name, value in held.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


def fuse_lora(unet: nn.Module, weights: Mapping[str, Tensor], pipeline: type) -> None:
    """Add PhotoMaker's own LoRA to a UNet's weights for good, so that what is trained later is a change of PhotoMaker.

    Args:
        unet: Changed in place; without adapters of its own.
        weights: A checkpoint's `lora_weights`; none change nothing.
        pipeline: diffusers' pipeline class of the model, which knows how to read them.
    """
    if not weights:
        return
    loader, network = cast("Any", pipeline), cast("Any", unet)
    state, alphas = loader.lora_state_dict(dict(weights), unet_config=network.config)
    loader.load_lora_into_unet(state, network_alphas=alphas, unet=network, adapter_name="photomaker")
    network.fuse_lora(adapter_names=["photomaker"])
    network.unload_lora()
    network.requires_grad_(requires_grad=False)


def face_pixels(image: Image.Image, box: tuple[int, int, int, int], size: int) -> Float[Tensor, "1 3 s s"]:
    """A person's face as the identity encoder's vision tower wants it.

    Args:
        image: RGB.
        box: The face. It is grown to a square and by a fifth, as far as the picture reaches.
        size: Pixels on each side.
    """
    import numpy as np
    from PIL import Image, ImageOps

    face = ImageOps.fit(image.crop(grow_to_square(box, image.size)), (size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(face, np.float32) / 255)
    return ((pixels - torch.tensor(_MEAN)) / torch.tensor(_STD)).permute(2, 0, 1)[None]


def _count(shapes: Mapping[str, object], prefix: str) -> int:
    """How many numbered layers stand under a prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})
