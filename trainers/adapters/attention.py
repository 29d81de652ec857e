"""Cross-attention with streams of extra tokens beside the text (IP-Adapter, Ye et al., 2023, arXiv:2308.06721).

With E the text's embeddings, E_s the tokens of stream s, w_s its scale and A scaled dot-product attention:

    out = to_out(A(q, k(E), v(E)) + sum_s w_s A(q, k_s(E_s), v_s(E_s)))

Nothing is kept between calls: tokens travel in the UNet's `cross_attention_kwargs`. A call without them is the stock
processor's.
"""

from collections.abc import Mapping
from typing import Any, cast

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from trainers.errors import ModelError
from trainers.streams import STREAMS, Layout, StreamName

TOKENS = "ip_hidden_states"
"""Name of the extra tokens, [image | label], in a call's `cross_attention_kwargs`."""
STRENGTHS = "ip_adapter_masks"
"""Name of each row's factor of all streams; 1 if it is left out. diffusers hands keyword arguments to every attention
layer and complains of those that a stock processor does not know, except of these two."""


class KeyValue(nn.Module):
    """Keys and values of one stream in one layer, without bias: zero tokens add nothing."""

    def __init__(self, to_k: Tensor, to_v: Tensor) -> None:
        super().__init__()
        self.to_k, self.to_v = (_linear(weight) for weight in (to_k, to_v))


class LayerStreams(nn.Module):
    """The streams of one layer: `image` and `label`, whichever has weights of its own."""

    def __init__(self, layout: Layout, to_k: Tensor, to_v: Tensor) -> None:
        super().__init__()
        self.layout = layout
        self.own = nn.ModuleDict({name: KeyValue(to_k, to_v) for name in layout.owners})

    def key_value(self, stream: StreamName) -> KeyValue:
        """What projects the tokens of `stream`."""
        return cast("KeyValue", self.own["image" if self.layout.shared else stream])


class AttentionStreams(nn.Module):
    """All layers' streams. The UNet does not own them: its weights stay what they are."""

    def __init__(self, unet: nn.Module, layouts: Mapping[str, Layout], lengths: Mapping[StreamName, int]) -> None:
        """Copies the text's keys and values of every layer in `layouts`.

        Args:
            unet: Before anything was added to it.
            layouts: By processor name.
            lengths: Number of tokens of each stream that there is.

        Raises:
            ModelError: A layer's processor is not the stock one.
        """
        super().__init__()
        self.names = tuple(layouts)
        self.lengths = dict(lengths)
        self.shapes = {name: _weights(unet, name)[0].shape for name in cross_attention_processors(unet)}
        """(channels, text width) of every cross-attention layer, also of those without streams, as diffusers counts."""
        self.layers = nn.ModuleList()
        for name, layout in layouts.items():
            self.layers.append(LayerStreams(layout, *_weights(unet, name)))

    def owned(self, stream: StreamName) -> dict[str, KeyValue]:
        """Keys and values that belong to `stream` alone, by processor name."""
        return {name: self.layer(name).key_value(stream) for name in self.names if stream in self.layer(name).own}

    def layer(self, name: str) -> LayerStreams:
        """The streams of the layer with this processor name."""
        return cast("LayerStreams", self.layers[self.names.index(name)])

    def install(self, unet: nn.Module) -> None:
        """Let the UNet's layers hear the streams; self-attention stays as it is."""
        for name in self.names:
            processor: Any = CrossAttention(self.layer(name), self.lengths)
            _attention(unet, name).set_processor(processor)

    def zero_values(self) -> None:
        """Make every stream silent, whatever its tokens are."""
        for stream in self.modules():
            if isinstance(stream, KeyValue):
                nn.init.zeros_(stream.to_v.weight)


class CrossAttention:
    """Processor of one cross-attention layer."""

    def __init__(self, streams: LayerStreams, lengths: Mapping[StreamName, int]) -> None:
        self.streams = streams
        self.lengths = lengths
        self._plain = AttnProcessor2_0()

    def __call__(  # noqa: PLR0913, PLR0917  diffusers' signature
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "b pixels c"],
        encoder_hidden_states: Float[Tensor, "b text width"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_hidden_states: Float[Tensor, "b tokens width"] | None = None,
        ip_adapter_masks: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b pixels c"]:
        """Attend to the text, and to the extra tokens if there are any."""
        if ip_hidden_states is None:
            return self._plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        assert encoder_hidden_states is not None
        network = cast("Any", attn)
        query = _heads(network.to_q(hidden_states), attn)
        out = _attend_to_text(query, network, encoder_hidden_states, attention_mask)
        for stream, tokens in self._split(ip_hidden_states):
            if not (scale := self.streams.layout.scale(stream)):
                continue
            heard = scale * self._attend_to(stream, tokens, query, attn)
            if ip_adapter_masks is not None:
                heard = heard * ip_adapter_masks.to(query.dtype)[:, None, None]
            out = out + heard
        out = network.to_out[1](network.to_out[0](out))
        if network.residual_connection:
            out = out + hidden_states
        return out / network.rescale_output_factor

    def _attend_to(self, stream: StreamName, tokens: Tensor, query: Tensor, attn: Attention) -> Tensor:
        source = self.streams.key_value(stream)
        key, value = (_heads(layer(tokens).to(query.dtype), attn) for layer in (source.to_k, source.to_v))
        return _attend(query, key, value, None)

    def _split(self, tokens: Tensor) -> list[tuple[StreamName, Tensor]]:
        names: list[StreamName] = [name for name in STREAMS if self.lengths.get(name)]
        lengths = [self.lengths[name] for name in names]
        if tokens.shape[1] != sum(lengths):
            raise ValueError(f"{TOKENS} has {tokens.shape[1]} tokens; expected {sum(lengths)} ({self.lengths})")
        return list(zip(names, cast("list[Tensor]", tokens.split(lengths, dim=1)), strict=True))


def cross_attention_processors(unet: nn.Module) -> tuple[str, ...]:
    """Names of all cross-attention processors, in the order in which diffusers counts them."""
    return tuple(name for name in cast("Any", unet).attn_processors if name.endswith("attn2.processor"))


def _attention(unet: nn.Module, name: str) -> Attention:
    attention = cast("Attention", unet.get_submodule(name.removesuffix(".processor")))
    if not isinstance(attention.processor, (AttnProcessor2_0, CrossAttention)):
        raise ModelError(f"{name} is {type(attention.processor).__name__}; expected diffusers' AttnProcessor2_0")
    return attention


def _weights(unet: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """What makes keys and values of the text in one layer."""
    attention = _attention(unet, name)
    to_k, to_v = (cast("nn.Linear", layer).weight.detach() for layer in (attention.to_k, attention.to_v))
    return to_k, to_v


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    linear.weight.data.copy_(weight)
    return linear


def _heads(x: Float[Tensor, "b n c"], attn: Any) -> Float[Tensor, "b heads n d"]:
    return x.view(*x.shape[:2], attn.heads, -1).transpose(1, 2)


def _attend_to_text(query: Tensor, attn: Any, text: Tensor, mask: Tensor | None) -> Float[Tensor, "b n c"]:
    """The stock processor's part; the mask is of the text alone, extra tokens are never masked."""
    rows, tokens = text.shape[:2]
    bias: Tensor | None = None
    if mask is not None:
        bias = cast("Tensor", attn.prepare_attention_mask(mask, tokens, rows)).view(rows, attn.heads, -1, tokens)
    if attn.norm_cross:
        text = cast("Tensor", attn.norm_encoder_hidden_states(text))
    return _attend(query, _heads(attn.to_k(text), attn), _heads(attn.to_v(text), attn), bias)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Float[Tensor, "b n c"]:
    heads = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return heads.transpose(1, 2).flatten(2).to(query.dtype)
