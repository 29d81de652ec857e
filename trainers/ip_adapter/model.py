"""Conditioners and streams of one UNet, and the model that hears them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

from trainers.adapters.attention import STRENGTHS, TOKENS, AttentionStreams, cross_attention_processors
from trainers.adapters.tokens import TokenConditioner, read_embedding, stack
from trainers.backbone import Backbone, Condition
from trainers.batch import init_seed
from trainers.data.transforms import open_picture
from trainers.ip_adapter.files import IMAGE_FILE, STREAMS_FILE, read_tensors, write_tensors
from trainers.ip_adapter.vision import ImageEncoder
from trainers.prompt import Prompt
from trainers.streams import STREAMS, AdaptersConfig, EmbedToToken, StreamName, TokensConfig, check_heard
from trainers.wrapped import Wrapped

CONDITIONERS: Mapping[StreamName, str] = {"image": "embed_to_token", "label": "label_to_token"}
"""What makes each stream's tokens."""

Vectors = Mapping[StreamName, tuple[Float[Tensor, "b f"], Bool[Tensor, " b"]]]
"""Each stream's vectors, and which rows have one."""

_FIRST_NETWORK = 10  # seeds of initial weights are numbered; those below are of the model's own networks


class IpAdapter(nn.Module):
    """Everything that is added to a frozen UNet. It changes nothing before it is trained."""

    def __init__(
        self, unet: nn.Module, tokens: Mapping[StreamName, TokensConfig], adapters: AdaptersConfig, seed: int
    ) -> None:
        """Adds nothing yet; see `AttentionStreams.install`.

        Args:
            unet: As it was loaded.
            tokens: The streams that there are.
            adapters: Which layers hear them.
            seed: Determines the conditioners' initial weights.

        Raises:
            ConfigError: As `AdaptersConfig.layouts`.
        """
        super().__init__()
        names = cross_attention_processors(unet)
        layouts = adapters.layouts(names, tokens)
        device, width = next(unet.parameters()).device, cast("Any", unet).config.cross_attention_dim
        self.streams = AttentionStreams(unet, layouts, {name: config.num_tokens for name, config in tokens.items()})
        self.conditioners = nn.ModuleDict()
        for i, name in enumerate(STREAMS):
            if name in tokens:
                rng = torch.Generator().manual_seed(init_seed(seed, _FIRST_NETWORK + i))
                self.conditioners[name] = TokenConditioner(tokens[name], width, rng).to(device)
        if adapters.zero_init == "values":
            self.streams.zero_values()
        else:
            for name in self.conditioners:
                self.conditioner(cast("StreamName", name)).zero_tokens()
        self.streams.requires_grad_(adapters.trainable)
        for name, config in tokens.items():
            self.conditioner(name).requires_grad_(config.trainable)

    def conditioner(self, stream: StreamName) -> TokenConditioner:
        """What makes the tokens of `stream`."""
        return cast("TokenConditioner", self.conditioners[stream])

    def networks(self) -> dict[str, nn.Module]:
        """Its parts, by the name that a study gives them."""
        parts: dict[str, nn.Module] = {CONDITIONERS[name]: self.conditioner(name) for name in self.stream_names}
        return {"adapters": self.streams, **parts}

    @property
    def stream_names(self) -> list[StreamName]:
        """The streams that there are, in the order of their tokens."""
        return [name for name in STREAMS if name in self.conditioners]

    def tell(self, condition: Condition, vectors: Vectors) -> Condition:
        """Add every row's tokens, [image | label], to what the denoiser is told."""
        device = next(self.parameters()).device
        parts: list[Tensor] = []
        for name in self.stream_names:
            x, present = vectors[name]
            parts.append(self.conditioner(name)(x.to(device), present.to(device)))
        return replace(condition, extra={**condition.extra, TOKENS: torch.cat(parts, dim=1)})

    def save(self, folder: Path) -> None:
        """Write all weights, the image stream for diffusers if that has such a projector; files are replaced whole."""
        files = {IMAGE_FILE: dict[str, Tensor](), STREAMS_FILE: dict[str, Tensor]()}
        for name in self.stream_names:
            if self._in_diffusers(name):
                files[IMAGE_FILE] |= _diffusers_state(self)
            else:
                files[STREAMS_FILE] |= self._state(name)
        for file, tensors in files.items():
            if tensors:
                write_tensors(folder / file, tensors, self._description())

    def load(self, folder: Path) -> None:
        """Read all weights.

        Raises:
            ModelError: A file is missing, or of an adapter with other streams than this one.
        """
        for name in self.stream_names:
            if self._in_diffusers(name):
                _load_diffusers_state(self, read_tensors(folder / IMAGE_FILE, self._description()))
            else:
                state = read_tensors(folder / STREAMS_FILE, self._description())
                with torch.no_grad():
                    for key, tensor in self._state(name).items():
                        tensor.copy_(state[key])

    def _in_diffusers(self, stream: StreamName) -> bool:
        config = self.conditioner(stream).config
        return isinstance(config, EmbedToToken) and config.in_diffusers

    def _state(self, stream: StreamName) -> dict[str, Tensor]:
        """The weights of one stream themselves, by name."""
        conditioner = self.conditioner(stream).state_dict(prefix=f"{CONDITIONERS[stream]}.")
        layers = {f"{stream}.{name}": owned for name, owned in self.streams.owned(stream).items()}
        return conditioner | {
            k: v for name, owned in layers.items() for k, v in owned.state_dict(prefix=f"{name}.").items()
        }

    def _description(self) -> str:
        """What a file's weights mean, without any path."""
        tokens = {name: self.conditioner(name).config.description() for name in self.stream_names}
        layouts = {name: self.streams.layer(name).layout for name in self.streams.names}
        layers = {name: [layout.image, layout.label, layout.shared] for name, layout in layouts.items()}
        return json.dumps({"tokens": tokens, "layers": layers}, sort_keys=True)


class IpAdapted(Wrapped[Backbone]):
    """A backbone whose prompts may carry a picture, an embedding or a label; without any they are the backbone's."""

    def __init__(self, backbone: Backbone, adapter: IpAdapter, encoder: Callable[[], ImageEncoder] | None) -> None:
        """Installs the adapter.

        Args:
            backbone: Whose UNet the adapter was made for.
            adapter: Its streams.
            encoder: Loads what turns prompts' pictures into embeddings, if there is such a thing.
        """
        super().__init__(backbone)
        self.adapter, self._encoder = adapter, encoder
        adapter.streams.install(backbone.denoiser)

    @override
    @torch.no_grad()
    def prepare(
        self, prompts: Sequence[Prompt | None], height: int, width: int, *, negative: str | None = None
    ) -> Condition:
        words = [None if prompt is None else Prompt(text=prompt.text) for prompt in prompts]
        condition = self.backbone.prepare(words, height, width, negative=negative)
        names = self.adapter.stream_names
        tokens: dict[StreamName, TokensConfig] = {name: self.adapter.conditioner(name).config for name in names}
        for prompt in prompts:
            if prompt is not None:
                check_heard(prompt, tokens, sees=self._encoder is not None)
        labels = [None if prompt is None else prompt.label for prompt in prompts]
        vectors: Vectors = {
            name: stack(labels if name == "label" else self._embeddings(prompts), self._length(name))
            for name in self.adapter.stream_names
        }
        return self.adapter.tell(condition, vectors)

    @override
    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if self.scale != 1:
            strengths = torch.full((len(x_t),), self.scale, device=self.device)
            condition = replace(condition, extra={**condition.extra, STRENGTHS: strengths})
        return self.backbone.denoise(x_t, t, condition)

    def _length(self, stream: StreamName) -> int:
        return self.adapter.conditioner(stream).config.in_features

    def _embeddings(self, prompts: Sequence[Prompt | None]) -> list[Tensor | None]:
        encoder: ImageEncoder | None = None
        found: list[Tensor | None] = []
        for prompt in prompts:
            if prompt is not None and prompt.embedding:
                found.append(read_embedding(prompt.embedding, f"the prompt {str(prompt)!r}", self._length("image")))
            elif prompt is not None and prompt.image and self._encoder:
                encoder = encoder or self._encoder()
                found.append(encoder.embed(open_picture(prompt.image)))
            else:
                found.append(None)
        return found


def _diffusers_state(adapter: IpAdapter) -> dict[str, Tensor]:
    """The image stream under diffusers' names: scales go into the values, layers without it get zeros.

    Keys and values are numbered 1, 3, 5 … in the order of the UNet's processors, of which every second one is of
    cross-attention. diffusers' projectors have biases; ours are zero.
    """
    conditioner, streams = adapter.conditioner("image"), adapter.streams
    state = {f"image_proj.{name}": tensor for name, tensor in _projector(conditioner).items()}
    for name in [name for name in state if name.endswith(".weight")]:
        state[name.removesuffix("weight") + "bias"] = torch.zeros(len(state[name]))
    owned = streams.owned("image")
    for i, (name, shape) in enumerate(streams.shapes.items()):
        if name in owned:
            key, value = owned[name].to_k.weight, owned[name].to_v.weight * streams.layer(name).layout.image
        else:
            key, value = torch.zeros(shape), torch.zeros(shape)
        state[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"] = key
        state[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"] = value
    return state


def _load_diffusers_state(adapter: IpAdapter, state: dict[str, Tensor]) -> None:
    streams = adapter.streams
    owned = streams.owned("image")
    with torch.no_grad():
        for name, tensor in _projector(adapter.conditioner("image")).items():
            tensor.copy_(state[f"image_proj.{name}"])
        for i, name in enumerate(streams.shapes):
            if name in owned:
                owned[name].to_k.weight.copy_(state[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"])
                value = state[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"]
                owned[name].to_v.weight.copy_(value / streams.layer(name).layout.image)


def _projector(conditioner: TokenConditioner) -> dict[str, Tensor]:
    """The image conditioner's weights as diffusers' ImageProjection or IPAdapterFaceIDImageProjection calls them."""
    state = conditioner.state_dict()
    return state if conditioner.config.hidden else {name.replace("proj.0.", "proj."): w for name, w in state.items()}
