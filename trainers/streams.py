"""Which cross-attention layers hear which extra tokens, and what the tokens are made of; answers without torch."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from trainers.config import Config
from trainers.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from trainers.prompt import Prompt

StreamName = Literal["image", "label"]
STREAMS: tuple[StreamName, ...] = ("image", "label")
"""In the order of their tokens."""

Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]

_DIFFUSERS_TOKENS = 4
"""What diffusers expects of an IP-Adapter whose projector is one linear map."""
_SUFFIX = ".attn2.to_k.weight"


class TokensConfig(Config):
    """A vector becomes tokens of the text's width: a linear map, or two with a GELU between, and a LayerNorm if wanted.

    A row without a vector gets zero tokens. Keys and values have no bias, so its stream then adds exactly nothing.
    """

    bias: ClassVar[bool]
    """Whether vectors of zeros may become something else than zero tokens."""

    in_features: PositiveInt
    """Length of the vectors; data of any other length is an error."""
    num_tokens: Annotated[int, Field(ge=2)] = 4
    """Attention to a single token would not depend on its key."""
    hidden: PositiveInt | None = None
    """Width between two linear maps; null is a single one."""
    layer_norm: bool
    """Whether every token is normalised, as in IP-Adapter."""
    dropout: Probability = 0.05
    """Probability that an example is shown without its vector, so that guidance and missing inputs work."""
    trainable: bool = True

    def widths(self, width: int) -> list[int]:
        """Lengths of what comes before and after each linear map, for text embeddings of `width`."""
        return [self.in_features, *([self.hidden] if self.hidden else []), self.num_tokens * width]

    def num_weights(self, width: int) -> int:
        """How many numbers the projector has, for text embeddings of `width`."""
        linear = sum(a * b + self.bias * b for a, b in pairwise(self.widths(width)))
        return linear + (1 + self.bias) * width * self.layer_norm

    def description(self) -> dict[str, Any]:
        """Everything that a file of its weights depends on."""
        return self.model_dump(exclude={"trainable", "dropout"})


class EmbedToToken(TokensConfig):
    """Tokens of the image stream, from an embedding of a picture.

    Nothing in it has a bias: an embedding of zeros, which is what diffusers' pipelines take for no picture, becomes
    zero tokens.
    """

    bias: ClassVar = False

    layer_norm: bool = True

    @property
    def in_diffusers(self) -> bool:
        """Whether diffusers has a projector of this form."""
        if not self.layer_norm:
            return False
        return self.hidden % self.in_features == 0 if self.hidden else self.num_tokens == _DIFFUSERS_TOKENS


class LabelToToken(TokensConfig):
    """Tokens of the label stream, from a label vector. It has biases: a label of zeros is not the same as none."""

    bias: ClassVar = True

    layer_norm: bool = False


class LayerRule(Config):
    """What differs in some cross-attention layers; keys left out say nothing."""

    match: str
    """Shell pattern of processor names, such as `mid_block.*` or `up_blocks.0.*.transformer_blocks.1.attn2.processor`.
    """
    image_scale: Scale | None = None
    label_scale: Scale | None = None
    share_kv: bool | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.image_scale is None and self.label_scale is None and self.share_kv is None:
            raise ValueError(f"the rule for {self.match!r} changes nothing; set image_scale, label_scale or share_kv")
        return self


@dataclass(frozen=True)
class Layout:
    """The streams of one layer."""

    image: float
    """Weight of the image stream's output; 0 is no such stream in this layer, and no weights for it."""
    label: float
    shared: bool
    """Whether the label stream uses the image stream's keys and values."""

    @property
    def owners(self) -> tuple[StreamName, ...]:
        """Streams with keys and values of their own."""
        return ("image",) if self.shared else tuple(name for name in STREAMS if self.scale(name))

    def scale(self, stream: StreamName) -> float:
        """Weight of a stream's output."""
        return self.image if stream == "image" else self.label


class AdaptersConfig(Config):
    """Keys and values of extra tokens in every cross-attention layer (IP-Adapter, Ye et al., 2023, arXiv:2308.06721).

    Both start as copies of the text's, so that tokens mean from the first step what text embeddings mean.
    """

    image_scale: Scale = 1.0
    label_scale: Scale = 1.0
    share_ip_kv: bool = False
    """Whether the label stream uses the image stream's keys and values, in layers that have both."""
    layers: tuple[LayerRule, ...] = ()
    """Exceptions. Where several match, the last that says something about a key decides it."""
    zero_init: Literal["tokens", "values"] = "tokens"
    """What is zero at first, so that training begins at the base model: the last weights that make the tokens, or the
    values of all layers."""
    trainable: bool = True

    def layouts(self, processors: Sequence[str], streams: Iterable[StreamName]) -> dict[str, Layout]:
        """Each layer's streams, by processor name; layers without any are left out.

        Args:
            processors: Names of the UNet's cross-attention processors, in diffusers' order.
            streams: Those that there are at all.

        Raises:
            ConfigError: A rule matches no layer, speaks of a stream that does not exist, or a stream is off everywhere.
        """
        streams = set(streams)
        for place, rule in enumerate(self.layers):
            self._check(place, rule, processors, streams)
        found = {name: self._layout(name, streams) for name in processors}
        for stream in sorted(streams):
            if not any(layout.scale(stream) for layout in found.values()):
                raise ConfigError(
                    f"train.adapters: the {stream} stream has scale 0 in every layer; remove it or raise it"
                )
        return {name: layout for name, layout in found.items() if layout.image or layout.label}

    def _layout(self, name: str, streams: set[StreamName]) -> Layout:
        image, label, shared = self.image_scale, self.label_scale, self.share_ip_kv
        for rule in self.layers:
            if fnmatchcase(name, rule.match):
                image = image if rule.image_scale is None else rule.image_scale
                label = label if rule.label_scale is None else rule.label_scale
                shared = shared if rule.share_kv is None else rule.share_kv
        image, label = image * ("image" in streams), label * ("label" in streams)
        return Layout(image, label, shared and image > 0 and label > 0)

    def _check(self, place: int, rule: LayerRule, processors: Sequence[str], streams: set[StreamName]) -> None:
        where = f"train.adapters.layers.{place}: match {rule.match!r}"
        if not any(fnmatchcase(name, rule.match) for name in processors):
            raise ConfigError(f"{where} is no layer's name; there are {', '.join(processors)}")
        scales = {"image": rule.image_scale, "label": rule.label_scale}
        for stream, scale in scales.items():
            if scale is not None and stream not in streams:
                raise ConfigError(f"{where} sets {stream}_scale, but there is no {stream} stream; remove the key")
        if rule.share_kv and len(streams) < len(STREAMS):
            raise ConfigError(f"{where} sets share_kv, but there is only one stream; remove the key")


def check_heard(prompt: Prompt, tokens: Mapping[StreamName, TokensConfig], *, sees: bool) -> None:
    """Find out whether streams can hear what a prompt says besides words.

    Args:
        prompt: What a picture is to show.
        tokens: The streams that there are.
        sees: Whether pictures can be turned into embeddings.

    Raises:
        ConfigError: It says something that nothing hears.
        DataError: Its label is of another length.
    """
    heard = {"image": "image" in tokens, "embedding": "image" in tokens, "label": "label" in tokens}
    for name in type(prompt).model_fields.keys() - {"text", "shows"}:
        if getattr(prompt, name) is not None and not heard.get(name):
            raise ConfigError(f"the prompt {str(prompt)!r} says {name}, which this adapter does not hear; remove it")
    if prompt.image and not prompt.embedding and not sees:
        raise ConfigError(
            f"the prompt {str(prompt)!r} has an image, and the adapter was trained on embeddings from files; "
            "give its embedding, or set image_encoder"
        )
    if prompt.label is not None and len(prompt.label) != (expected := tokens["label"].in_features):
        raise DataError(f"the prompt {str(prompt)!r}: the label has {len(prompt.label)} numbers; expected {expected}")


def cross_attention(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Processor name and (channels, text width) of every cross-attention layer, from the shapes of a UNet's weights."""
    return {
        name.removesuffix(_SUFFIX) + ".attn2.processor": (shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(_SUFFIX)
    }
