"""IP-Adapter (Ye et al., 2023, arXiv:2308.06721): pictures, embeddings or labels beside the text in cross-attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator
from typing_extensions import override

from trainers.adapters.lora import LoraConfig
from trainers.batch import Stream
from trainers.data.pairs import Pair, PairsConfig, check_embedding, check_pairs
from trainers.data.transforms import find_size
from trainers.errors import ConfigError
from trainers.ip_adapter.vision import ImageEncoderConfig
from trainers.method import Method, MethodConfig, Trained
from trainers.streams import (
    STREAMS,
    AdaptersConfig,
    EmbedToToken,
    LabelToToken,
    Probability,
    StreamName,
    TokensConfig,
    check_heard,
    cross_attention,
)
from trainers.tuning import TunedConfig, export, load, tune_denoiser, tune_text_encoders
from trainers.unet import UnetConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from accelerate import Accelerator
    from jaxtyping import Float
    from torch import Tensor

    from trainers.backbone import Backbone, Condition, Model
    from trainers.batch import Batch
    from trainers.frozen import Frozen, Images, Texts
    from trainers.ip_adapter.model import IpAdapted, IpAdapter
    from trainers.prompt import Prompt


class IpAdapterConfig(TunedConfig):
    """Denoising loss on captioned pictures with an image embedding, a label vector, or both."""

    kind: Literal["ip_adapter"] = "ip_adapter"
    data: PairsConfig  # pyright: ignore[reportIncompatibleVariableOverride]  no other data has labels
    embed_to_token: EmbedToToken | None = None
    """The image stream; null is none."""
    label_to_token: LabelToToken | None = None
    """The label stream; null is none."""
    image_encoder: ImageEncoderConfig | None = None
    """What makes embeddings of pictures, once; null reads them from the files that the pairs name."""
    adapters: AdaptersConfig = AdaptersConfig()
    train_unet: bool = False
    """Train the UNet too: by `lora`, or every weight of it where `lora` is null."""
    lora: LoraConfig | None = None
    caption_dropout: Probability = 0.05
    """Probability that an example is shown without its caption."""
    joint_dropout: Probability = 0.05
    """Probability that an example is shown with nothing, whatever is dropped besides; as IP-Adapter's 5 % each."""

    @property
    @override
    def without_weak(self) -> str | None:
        return "an IP-Adapter"

    @property
    @override
    def loses_base(self) -> bool:
        return (self.train_unet and self.lora is None) or self.train_text_encoders

    @override
    def whole_networks(self) -> tuple[str, ...]:
        return tuple(name for name in super().whole_networks() if self.train_unet or name != "unet")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not isinstance(self.backbone, UnetConfig):
            raise ValueError("ip_adapter needs a UNet with cross-attention; expected a backbone of kind sd or sdxl")  # noqa: TRY004
        if not self.tokens:
            raise ValueError("there is nothing to hear; set embed_to_token, label_to_token or both")
        if self.image_encoder and not self.embed_to_token:
            raise ValueError("image_encoder without an image stream; set embed_to_token or remove it")
        if self.lora and not self.train_unet:
            raise ValueError("lora is of the UNet, which is frozen; set train_unet: true or remove lora")
        self._check_beginning()
        return self

    def _check_beginning(self) -> None:
        """Every stream begins silent, and must be able to begin to speak."""
        zero = self.adapters.zero_init
        if zero == "values" and not self.adapters.trainable:
            raise ValueError("adapters begin with zero values and are not trained: nothing would ever be heard")
        for name, config in self.tokens.items():
            if zero == "tokens" and not config.trainable:
                raise ValueError(
                    f"the {name} stream begins with zero tokens, and what makes them is not trained; train it, or set "
                    "adapters.zero_init: values"
                )

    @property
    def tokens(self) -> dict[StreamName, TokensConfig]:
        """The streams that there are."""
        found: dict[StreamName, TokensConfig | None] = {"image": self.embed_to_token, "label": self.label_to_token}
        return {name: config for name, config in found.items() if config}

    @override
    def check(self) -> None:
        super().check()
        self._layers()
        self.check_rows(self.data.rows())
        if self.image_encoder and self.embed_to_token:
            found, expected = self.image_encoder.num_features(), self.embed_to_token.in_features
            if found != expected:
                raise ConfigError(
                    f"train.embed_to_token.in_features is {expected}; image_encoder makes {found} numbers"
                )

    def check_rows(self, rows: list[Pair]) -> None:
        """Refuse rows that lack a label or an embedding, or have one of another length.

        Raises:
            DataError: Names file and row.
        """
        embedding = self.embed_to_token.in_features if self.embed_to_token and not self.image_encoder else None
        check_pairs(rows, self.label_to_token.in_features if self.label_to_token else None, embedding)

    @override
    def check_prompts(self, prompts: Iterable[Prompt], resolution: int) -> None:
        for prompt in prompts:
            check_heard(prompt, self.tokens, sees=self.image_encoder is not None)
            if prompt.embedding and self.embed_to_token:
                check_embedding(prompt.embedding, f"the prompt {str(prompt)!r}", self.embed_to_token.in_features)
            elif prompt.image:
                find_size(prompt.image, f"the prompt {str(prompt)!r}")

    @override
    def num_trainable(self) -> int:
        layers = self._layers()
        width = next(iter(layers.values()))[1]
        total = self.num_in_text_encoders() + (self.num_in_denoiser() if self.train_unet else 0)
        if self.adapters.trainable:
            layouts = self.adapters.layouts(list(layers), self.tokens)
            total += sum(2 * len(layout.owners) * layers[name][0] * width for name, layout in layouts.items())
        return total + sum(config.num_weights(width) for config in self.tokens.values() if config.trainable)

    def _layers(self) -> dict[str, tuple[int, int]]:
        """The UNet's cross-attention layers, after the rules about them were checked."""
        layers = cross_attention(self.backbone.weight_shapes()["unet"])
        self.adapters.layouts(list(layers), self.tokens)
        return layers

    @override
    def build(self, seed: int, cache: Path | None, accelerator: Accelerator) -> Method:
        from trainers.cache import Cache
        from trainers.frozen import Frozen, encode_images, encode_texts
        from trainers.ip_adapter.model import IpAdapter

        backbone = self.backbone.load(accelerator.device, self.frozen_dtype())
        frozen = Frozen(self.backbone, backbone, Cache(cache) if cache else None, accelerator)
        images = encode_images(frozen, self.data, held_out=self.validation is not None)
        rows = [row for row in (*images.split.train, *images.split.held_out) if isinstance(row, Pair)]
        self.check_rows(rows)
        texts = encode_texts(frozen, [None, *(row.prompt for row in rows)]) if self.text_is_frozen else None
        adapter = IpAdapter(backbone.denoiser, self.tokens, self.adapters, seed)
        tuned = tune_denoiser(backbone, self, seed) if self.train_unet else {}
        tuned |= tune_text_encoders(backbone, self, seed)
        model = self._adapted(backbone, adapter)
        return IpAdapterMethod(self, seed, model, tuned, Inputs(images, texts, self._vectors(frozen, rows)))

    @override
    def check_finished(self, folder: Path, *, weak: bool, any_size: bool = False) -> None:
        if self.train_unet:
            super().check_finished(folder, weak=weak, any_size=any_size)
        else:
            MethodConfig.check_finished(self, folder, weak=weak)

    @override
    def load_trained(self, folder: Path | None, accelerator: Accelerator) -> Model:
        from trainers.ip_adapter.model import IpAdapter

        backbone = self.backbone.load(accelerator.device, self.frozen_dtype())
        adapter = IpAdapter(backbone.denoiser, self.tokens, self.adapters, 0)
        if folder is not None:
            adapter.load(folder)
            if self.train_unet or not self.text_is_frozen:
                load(backbone, folder)
        adapter.requires_grad_(requires_grad=False).eval()
        return self._adapted(backbone, adapter)

    def _adapted(self, backbone: Backbone, adapter: IpAdapter) -> IpAdapted:
        from trainers.ip_adapter.model import IpAdapted

        encoder = self.image_encoder
        return IpAdapted(backbone, adapter, (lambda: encoder.load(backbone.device)) if encoder else None)

    def _vectors(self, frozen: Frozen, rows: list[Pair]) -> dict[StreamName, Float[Tensor, "n f"]]:
        """Each row's vector for every stream."""
        import torch

        from trainers.adapters.tokens import read_embedding
        from trainers.ip_adapter.vision import encode_pictures

        found: dict[StreamName, Tensor] = {}
        if config := self.embed_to_token:
            if self.image_encoder:
                found["image"] = encode_pictures(frozen, self.image_encoder, rows)
            else:
                files = [(row.embedding, row.where) for row in rows]
                found["image"] = torch.stack([read_embedding(f, where, config.in_features) for f, where in files if f])
        if self.label_to_token:
            found["label"] = torch.tensor([row.label for row in rows], dtype=torch.float32)
        return found


@dataclass(frozen=True)
class Inputs:
    """Frozen work: everything that is known of the examples, those that are trained on first."""

    images: Images
    texts: Texts | None
    """None while the text encoders train."""
    vectors: Mapping[StreamName, Float[Tensor, "n f"]]


class IpAdapterMethod(Method):
    """A model that hears streams of extra tokens, and the examples that teach it to."""

    def __init__(
        self, config: IpAdapterConfig, seed: int, model: IpAdapted, tuned: Mapping[str, Trained], inputs: Inputs
    ) -> None:
        from trainers.denoising import Denoising

        self.config, self.data, self.seed, self.backbone = config, config.data, seed, model.backbone
        self.batch_size = config.batch_size
        split = inputs.images.split
        self.examples, self.held_out, self.unreadable = split.train, split.held_out, split.unreadable
        self._model, self._tuned, self._inputs = model, tuned, inputs
        self._denoising = Denoising(model.backbone, inputs.images, config.loss, seed)

    @property
    @override
    def model(self) -> IpAdapted:
        return self._model

    @override
    def trained(self) -> Mapping[str, Trained]:
        parts = {name: Trained(network) for name, network in self._model.adapter.networks().items()}
        return {**self._tuned, **{name: part for name, part in parts.items() if part.parameters()}}

    @override
    def losses(self, batch: Batch) -> Float[Tensor, " b"]:
        noised = self._denoising.noised(batch)
        prediction = self._model.denoise(noised.x_t, noised.t, self.condition(batch))
        return self._denoising.losses(prediction, noised)

    def condition(self, batch: Batch) -> Condition:
        """What the denoiser is told about each row: caption, sizes and tokens, less what is dropped."""
        shown, inputs = self.shown(batch), self._inputs
        rows = list(batch.indices)
        prompts = [self.example(i).prompt if kept else None for i, kept in zip(rows, shown["caption"], strict=True)]
        text = inputs.texts.select(prompts) if inputs.texts else self.backbone.encode_prompts(prompts, together=True)
        condition = self.backbone.condition(text, [inputs.images.geometries[i] for i in rows])
        return self._model.adapter.tell(condition, {name: (x[rows], shown[name]) for name, x in inputs.vectors.items()})

    def shown(self, batch: Batch) -> dict[str, Tensor]:
        """Which rows are shown their caption, and each stream's vector; in validation all are."""
        import torch

        config = self.config
        rates = {"caption": config.caption_dropout}
        # Every stream has a number of its own, so that others do not depend on whether it is there.
        rates |= {name: config.tokens[name].dropout if name in config.tokens else 0.0 for name in STREAMS}
        rngs = self._denoising.rngs(batch, Stream.DROPOUT)
        drawn = torch.stack([torch.rand(len(rates) + 1, generator=rng) for rng in rngs])
        kept = drawn >= torch.tensor([*rates.values(), config.joint_dropout])
        if batch.levels is not None:
            kept = torch.ones_like(kept)
        return {name: kept[:, i] & kept[:, -1] for i, name in enumerate(rates)}

    @override
    def export(self, folder: Path) -> None:
        self._model.adapter.save(folder)
        if self._tuned:
            export(self.backbone, self._tuned, folder)
