"""Pictures from prompts: one (prompt, seed) gives one picture, whoever draws it.

The initial latents of (prompt, seed) come from a CPU generator of their own (`noise_rng`), so world size and batch size
change nothing but floating-point noise, and no two prompts share latents: standard errors are clustered by prompt, and
one unlucky latent in all prompts would be invisible to them. Within a denoiser call, rows stand term after term, each
with all pictures of the batch: with classifier-free guidance [null of every picture, prompt of every picture], the
layout of the stock pipeline.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from trainers.errors import NonFiniteError
from trainers.prompt import Prompt, Request, Sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from accelerate import Accelerator
    from jaxtyping import Float
    from torch import Tensor

    from trainers.backbone import Condition, Model
    from trainers.guidance import SamplingConfig
    from trainers.samples import SamplesConfig


def noise_rng(request: Request) -> torch.Generator:
    """The generator of a picture's initial latents; give it to a stock pipeline to draw the same picture."""
    words = np.frombuffer(hashlib.sha256(str(request.prompt).encode()).digest(), np.uint32)
    state = np.random.SeedSequence((request.seed, *words.tolist())).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def generate(model: Model, requests: Sequence[Request], config: SamplingConfig) -> Iterator[Sample]:
    """Draw the requested pictures, in order.

    Runs under the caller's autocast; latents and scheduler are fp32 throughout.

    Args:
        model: With whatever adapters are active.
        requests: A rank passes its own share, which may be empty.
        config: Resolution, steps, scheduler, guidance.

    Raises:
        NonFiniteError: A picture came out with NaN or infinite pixels.
    """
    sampler = _Sampler(model, config, [request.prompt for request in requests])
    for start in range(0, len(requests), config.batch_size):
        batch = requests[start : start + config.batch_size]
        for request, pixels in zip(batch, sampler.draw(batch), strict=True):
            yield Sample(request.prompt, request.seed, _to_image(pixels, request))


def draw_samples(model: Model, config: SamplesConfig, folder: Path, accelerator: Accelerator) -> None:
    """Draw a training's pictures into `folder`; processes share the work. Training's random numbers are not touched."""
    files = config.files()
    share = list(files)[accelerator.process_index :: accelerator.num_processes]
    folder.mkdir(parents=True, exist_ok=True)
    with accelerator.autocast():
        for sample in generate(model, share, config):
            name = files[Request(sample.prompt, sample.seed)]
            temporary = folder / f".{name}.tmp"
            sample.image.save(temporary, format="PNG")
            temporary.replace(folder / name)


class _Sampler:
    """A model, and what does not change from batch to batch."""

    def __init__(self, model: Model, config: SamplingConfig, prompts: Sequence[Prompt]) -> None:
        self._model = model
        self._config = config
        self._terms = [term for term in config.guidance.terms() if term.weight != 0]
        told = [None, *dict.fromkeys(prompts)]
        self._rows = {prompt: row for row, prompt in enumerate(told)}
        side = config.resolution
        self._conditions = model.prepare(told, side, side, negative=config.negative_prompt)

    @torch.no_grad()
    def draw(self, batch: Sequence[Request]) -> Float[Tensor, "b 3 h w"]:
        """Pictures nominally in [-1, 1]."""
        model, config = self._model, self._config
        scheduler = model.sampling_scheduler(config.scheduler)
        scheduler.set_timesteps(config.steps, device=model.device)
        condition = self._condition(batch)
        latents = self._initial_latents(batch) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x_t = torch.cat([_scaled(scheduler, latents, t)] * len(self._terms))
            parts = model.denoise(x_t, t.expand(len(x_t)), condition).float().chunk(len(self._terms))
            prediction = sum(term.weight * part for term, part in zip(self._terms, parts, strict=True))
            latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
        return model.decode(latents)

    def _condition(self, batch: Sequence[Request]) -> Condition:
        told = {
            "prompt": [self._rows[request.prompt] for request in batch],
            "null": [self._rows[None]] * len(batch),
        }
        return self._conditions.select([row for term in self._terms for row in told[term.condition]])

    def _initial_latents(self, batch: Sequence[Request]) -> Float[Tensor, "b c h w"]:
        shape = self._model.latent_shape(self._config.resolution, self._config.resolution)
        draws = [torch.randn(shape, generator=noise_rng(request)) for request in batch]
        return torch.stack(draws).to(self._model.device)


def _scaled(scheduler: Any, latents: Tensor, t: Tensor) -> Tensor:
    """What the denoiser sees of `latents`; flow schedulers have nothing to scale."""
    scale = getattr(scheduler, "scale_model_input", None)
    return latents if scale is None else scale(latents, t)


def _to_image(pixels: Float[Tensor, "3 h w"], request: Request) -> Image.Image:
    if not bool(pixels.isfinite().all()):
        raise NonFiniteError(
            f"the picture of {str(request.prompt)!r} with seed {request.seed} has NaN or infinite pixels: the adapter "
            "diverged, or the autoencoder overflowed (`vae_dtype: float32` avoids that)"
        )
    levels = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
