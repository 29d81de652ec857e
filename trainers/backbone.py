"""The interface of a pretrained denoiser with its autoencoder and text encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from typing_extensions import override

from trainers.batch import NEGATIVE_AESTHETIC, Geometry
from trainers.config import Choice
from trainers.errors import ModelError
from trainers.loss import Prediction
from trainers.version import TRAINED, Lineage, Version, Versions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch
    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from trainers.diffusion import NoiseProcess
    from trainers.prompt import Prompt


SchedulerName = Literal["ddim", "euler", "dpmpp_2m"]
"""Samplers whose only randomness is the initial noise: DDIM with eta 0, Euler, and DPM-Solver++(2M)."""


@dataclass(frozen=True)
class Moments:
    """What the autoencoder says about pictures: mean and log-variance of unscaled latents."""

    mean: Float[Tensor, "b c h w"]
    logvar: Float[Tensor, "b c h w"]


@dataclass(frozen=True)
class TextEmbeddings:
    """Prompts as the denoiser sees them."""

    hidden: Float[Tensor, "b tokens width"]
    """Hidden states of all text encoders, side by side."""
    pooled: Float[Tensor, "b pooled"] | None = None
    """Projected summary of the last text encoder, if the denoiser wants one."""
    mask: Int[Tensor, "b tokens"] | None = None
    """1 where a token is meant, 0 at padding, if the denoiser wants to know."""

    def select(self, indices: Sequence[int]) -> TextEmbeddings:
        """The rows at `indices`, in that order; a row may be repeated."""
        rows = list(indices)
        return TextEmbeddings(**{name: value[rows] for name, value in self.tensors().items()})

    @staticmethod
    def cat(parts: Sequence[TextEmbeddings]) -> TextEmbeddings:
        """All rows of `parts`, in order."""
        import torch

        columns = [part.tensors() for part in parts]
        return TextEmbeddings(**{name: torch.cat([column[name] for column in columns]) for name in columns[0]})

    def to(self, device: torch.device) -> TextEmbeddings:
        """The same on `device`."""
        return TextEmbeddings(**{name: value.to(device) for name, value in self.tensors().items()})

    def trimmed(self) -> TextEmbeddings:
        """Without the tokens that are padding in every row: a denoiser that is told the mask does not see them."""
        if self.mask is None:
            return self
        meant = self.mask.any(dim=0)
        return TextEmbeddings(self.hidden[:, meant], self.pooled, self.mask[:, meant])

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name."""
        named = {"hidden": self.hidden, "pooled": self.pooled, "mask": self.mask}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Condition:
    """Everything the denoiser is told besides x_t and t; one row an example."""

    text: TextEmbeddings
    sizes: Float[Tensor, "b numbers"] | None = None
    """What SDXL is told about sizes: original height and width, crop top and left, target height and width (the
    refiner: an aesthetic score instead of the last two)."""
    extra: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    """What a method's own attention processors are told, by argument name; each tensor has one row an example."""

    def select(self, indices: Sequence[int]) -> Condition:
        """The rows at `indices`, in that order; a row may be repeated."""
        rows = list(indices)
        sizes = None if self.sizes is None else self.sizes[rows]
        return Condition(self.text.select(rows), sizes, {name: value[rows] for name, value in self.extra.items()})

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """All rows of `parts`, in order."""
        import torch

        sizes = [part.sizes for part in parts if part.sizes is not None]
        return Condition(
            TextEmbeddings.cat([part.text for part in parts]),
            torch.cat(sizes) if sizes else None,
            {name: torch.cat([part.extra[name] for part in parts]) for name in parts[0].extra},
        )


class Model(ABC):
    """A denoiser that pictures can be drawn from: all that sampling needs to know."""

    device: torch.device
    lineage: Lineage | None = None
    """None is not known: adapters that are there have no weak version."""

    @property
    def text_is_adapted(self) -> bool:
        """Whether versions of this model read prompts differently."""
        return True

    def versions(self, wanted: Sequence[Version]) -> Versions:
        """Make versions of this model ready, in this order of preference: in one batch, one after the other.

        Raises:
            ModelError: There is no such version.
        """
        if any(version.weak for version in wanted):
            raise ModelError(
                f"guidance.weak: checkpoint with {type(self).__name__}; expected plain LoRA, whose weak version can "
                "be drawn with; set guidance.weak: base"
            )
        if self.lineage and self.lineage.whole:
            raise ModelError(
                f"guidance leads away from the base, and {type(self).__name__} has no way back to it from "
                f"{' and '.join(self.lineage.whole)}, whose every weight was trained; set guidance to kind cfg"
            )
        return _Scaled(self)

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a picture of height x width pixels."""

    @abstractmethod
    def prepare(
        self, prompts: Sequence[Prompt | None], height: int, width: int, *, negative: str | None = None
    ) -> Condition:
        """What the denoiser is told, one row a prompt; each prompt is encoded alone, without gradients.

        Args:
            prompts: None is no prompt, which guidance starts from.
            height: Of the pictures that are wanted, in pixels.
            width: Likewise.
            negative: Words to use where there is no prompt; null is what the stock pipeline does without any.

        Raises:
            ConfigError: A prompt says something that this model cannot be told.
        """

    @abstractmethod
    def denoise(
        self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"] | Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b c h w"]:
        """The network's raw output, under the caller's autocast; the noise process says what it means."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures, nominally in [-1, 1], float32 and not clipped, of scaled latents."""

    @abstractmethod
    def sampling_scheduler(self, name: SchedulerName) -> Any:
        """A new diffusers scheduler on this model's own betas and prediction type."""

    @abstractmethod
    def adapter_scale(self, scale: float) -> AbstractContextManager[None]:
        """Within the context all adapters, also those of the text encoders, act with weight `scale`."""


class _Scaled(Versions):
    """Versions of any model, one after the other, by its adapters' scale."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @property
    @override
    def mixes(self) -> bool:
        return False

    @override
    def acting(self, versions: Sequence[Version], repeats: int = 1) -> AbstractContextManager[None]:
        (version,) = versions
        return nullcontext() if version == TRAINED else self._model.adapter_scale(version.scale)


class Backbone(Model):
    """A pretrained model, frozen when it is loaded."""

    denoiser: nn.Module
    vae: nn.Module
    text_encoders: tuple[nn.Module, ...]
    dtype: torch.dtype
    """Of the denoiser's frozen weights; the autoencoder and the text encoders have their own."""
    process: NoiseProcess
    pipeline: Any
    """diffusers' pipeline class, which saves and loads LoRA files of this model."""

    @property
    @abstractmethod
    def networks(self) -> Mapping[str, nn.Module]:
        """What can be trained, by the name that a pipeline's folder gives it: denoiser first, then text encoders."""

    @property
    @override
    def text_is_adapted(self) -> bool:
        whole = self.lineage.whole if self.lineage else ()
        trained = any(self.networks[name] is not self.denoiser for name in whole)
        return trained or any(hasattr(encoder, "peft_config") for encoder in self.text_encoders)

    @abstractmethod
    def untrained(self, name: str) -> nn.Module:
        """One of `networks` once more, on the CPU and as it was before it was trained."""

    def rest(self, busy: Sequence[nn.Module]) -> None:
        """Let the autoencoder and text encoders wait in host memory, except those that are `busy`.

        They come back to their devices when something is to be encoded or decoded.
        """
        for network in (self.vae, *self.text_encoders):
            if all(network is not one for one in busy):
                network.to("cpu")

    @abstractmethod
    def encode_image(self, pixels: Float[Tensor, "1 3 h w"]) -> Moments:
        """Moments of ONE picture in [-1, 1], so that they never depend on a batch; float32, on `device`."""

    @abstractmethod
    def sample_latents(self, moments: Moments, noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Latents drawn from `moments` with standard normal `noise`, scaled to what the denoiser expects."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str | None], *, together: bool = False) -> TextEmbeddings:
        """Embed prompts: one forward pass each and no gradients, so that a row never depends on its neighbours.

        Args:
            prompts: At least one. None is no prompt at all, as the stock pipeline has it when no negative prompt is
                given: what conditioning dropout leaves in training, and guidance starts from in sampling.
            together: One forward pass for all, with gradients and under the caller's autocast: for training encoders.
        """

    @abstractmethod
    def condition(self, text: TextEmbeddings, geometries: Sequence[Geometry]) -> Condition:
        """Join embeddings and sizes, row by row."""

    @override
    def prepare(
        self, prompts: Sequence[Prompt | None], height: int, width: int, *, negative: str | None = None
    ) -> Condition:
        for prompt in prompts:
            if prompt is not None:
                prompt.check_plain()
        texts = self.encode_prompts([negative if prompt is None else prompt.text for prompt in prompts])
        wanted = Geometry.whole(height, width)
        poor = replace(wanted, aesthetic=NEGATIVE_AESTHETIC)
        return self.condition(texts, [poor if prompt is None else wanted for prompt in prompts])


class BackboneConfig(Choice):
    """Where a pretrained model is, and how to load it."""

    denoiser_name: ClassVar[str]
    """The denoiser's name in the model's folder and in `Backbone.networks`."""
    lora_targets: ClassVar[tuple[str, ...]]
    """The denoiser's layers that adapters are added to."""
    trains_text: ClassVar[bool] = True
    """Whether trained text encoders can be saved in a file that diffusers loads."""
    schedulers: ClassVar[tuple[SchedulerName, ...]] = get_args(SchedulerName)
    """The samplers that pictures can be drawn with."""

    @property
    @abstractmethod
    def downscale(self) -> int:
        """Sides of pictures are multiples of this many pixels: a latent's, or a token's of several latents."""

    @property
    @abstractmethod
    def prediction(self) -> Prediction:
        """What the denoiser predicts."""

    @property
    @abstractmethod
    def num_timesteps(self) -> int:
        """Number of training timesteps."""

    @property
    @abstractmethod
    def text_layers(self) -> Mapping[str, int]:
        """The text encoders that can be trained, by the name that `Backbone.networks` gives them.

        Each with the number of its layers, from the first, that the denoiser sees the work of: the last may go unused.
        """

    @abstractmethod
    def check(self) -> None:
        """Find what is wrong with the model's folder, without torch.

        Raises:
            ModelError: A component is missing or of another kind.
        """

    @abstractmethod
    def load(self, device: torch.device, dtype: torch.dtype) -> Backbone:
        """Read the weights, frozen and in evaluation mode.

        Raises:
            ModelError: As `check`.
        """

    @abstractmethod
    def weight_shapes(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """Shapes of all weights, by network and name, as the files' headers say."""

    @abstractmethod
    def image_files(self) -> tuple[Path, ...]:
        """Files that determine what `encode_image` returns."""

    @abstractmethod
    def denoiser_files(self) -> tuple[Path, ...]:
        """Files that determine the untrained denoiser."""

    @abstractmethod
    def text_files(self) -> tuple[Path, ...]:
        """Files that determine what `encode_prompts` returns while the text encoders are frozen."""

    @property
    @abstractmethod
    def text_options(self) -> tuple[str, ...]:
        """What determines it besides files and the denoiser's precision."""
