"""The interface of a pretrained denoiser with its autoencoder and text encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainers.config import Choice

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch
    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from trainers.batch import Geometry
    from trainers.diffusion import NoiseProcess


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
    """Penultimate hidden states of all text encoders, side by side."""
    pooled: Float[Tensor, "b pooled"]
    """Projected summary of the last text encoder."""

    def select(self, indices: Sequence[int]) -> TextEmbeddings:
        """The rows at `indices`, in that order; a row may be repeated."""
        rows = list(indices)
        return TextEmbeddings(self.hidden[rows], self.pooled[rows])

    @staticmethod
    def cat(parts: Sequence[TextEmbeddings]) -> TextEmbeddings:
        """All rows of `parts`, in order."""
        import torch

        return TextEmbeddings(torch.cat([part.hidden for part in parts]), torch.cat([part.pooled for part in parts]))


@dataclass(frozen=True)
class Condition:
    """Everything the denoiser is told besides x_t and t; one row an example."""

    hidden: Float[Tensor, "b tokens width"]
    pooled: Float[Tensor, "b pooled"]
    time_ids: Float[Tensor, "b 6"]
    """Original height and width, crop top and left, target height and width."""

    def select(self, indices: Sequence[int]) -> Condition:
        """The rows at `indices`, in that order; a row may be repeated."""
        rows = list(indices)
        return Condition(self.hidden[rows], self.pooled[rows], self.time_ids[rows])

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """All rows of `parts`, in order."""
        import torch

        return Condition(
            torch.cat([part.hidden for part in parts]),
            torch.cat([part.pooled for part in parts]),
            torch.cat([part.time_ids for part in parts]),
        )


class Backbone(ABC):
    """A pretrained model, frozen when it is loaded."""

    denoiser: nn.Module
    vae: nn.Module
    text_encoders: tuple[nn.Module, ...]
    device: torch.device
    dtype: torch.dtype
    """Of the denoiser's and the text encoders' frozen weights; the autoencoder has its own."""
    process: NoiseProcess

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a picture of height x width pixels."""

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

    def encode_null(self) -> TextEmbeddings:
        """One row: no prompt at all."""
        return self.encode_prompts([None])

    @abstractmethod
    def condition(self, text: TextEmbeddings, geometries: Sequence[Geometry]) -> Condition:
        """Join embeddings and sizes, row by row."""

    @abstractmethod
    def denoise(
        self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"] | Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b c h w"]:
        """The network's raw output, under the caller's autocast; see `process` for what it means."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures, nominally in [-1, 1], float32 and not clipped, of scaled latents."""

    @abstractmethod
    def sampling_scheduler(self, name: SchedulerName) -> Any:
        """A new diffusers scheduler on this model's own betas and prediction type."""

    @abstractmethod
    def load_adapter(self, folder: Path) -> None:
        """Add a trained adapter, frozen and active.

        Raises:
            ModelError: There is none in `folder`.
        """

    @abstractmethod
    def adapter_scale(self, scale: float) -> AbstractContextManager[None]:
        """Within the context all adapters, also those of the text encoders, act with weight `scale`."""


class BackboneConfig(Choice):
    """Where a pretrained model is, and how to load it."""

    @property
    @abstractmethod
    def downscale(self) -> int:
        """Pixels per latent, along each axis."""

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
    def text_files(self) -> tuple[Path, ...]:
        """Files that determine what `encode_prompts` returns while the text encoders are frozen."""
