"""Pictures from prompts: one (prompt, seed) gives one picture, whoever draws it.

The initial latents of (prompt, seed) come from a CPU generator of their own (`noise_rng`), so world size and batch size
change nothing but floating-point noise, and no two prompts share latents: standard errors are clustered by prompt, and
one unlucky latent in all prompts would be invisible to them. Within a denoiser call, rows stand term after term, each
with all pictures of the batch: with classifier-free guidance [null of every picture, prompt of every picture], the
layout of the stock pipeline.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from trainers.backbone import Condition
from trainers.errors import NonFiniteError
from trainers.guidance import Term
from trainers.prompt import Prompt, Request, Sample
from trainers.version import TRAINED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from accelerate import Accelerator
    from jaxtyping import Float
    from torch import Tensor

    from trainers.backbone import Model
    from trainers.guidance import SamplingConfig
    from trainers.samples import SamplesConfig
    from trainers.version import Version


_NOTHING = 1e-12
"""Weights that sum to nothing but rounding."""


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
        told = [None, *dict.fromkeys(prompts)]
        self._rows = {prompt: row for row, prompt in enumerate(told)}
        side, negative = config.resolution, config.negative_prompt
        # Also what is told outside the interval: the trained model's own reading of the prompts.
        guided = [term.version for term in self._calls(config.guidance.interval.start)]
        wanted = list(dict.fromkeys([*guided, TRAINED]))
        self._versions = model.versions(wanted) if wanted != [TRAINED] else None
        self._conditions: dict[Version, Condition] = {}
        if self._versions and model.text_is_adapted:
            for version in wanted:
                with self._versions.acting([version]):
                    self._conditions[version] = model.prepare(told, side, side, negative=negative)
        else:
            self._conditions = dict.fromkeys(wanted, model.prepare(told, side, side, negative=negative))

    def _calls(self, behind: float) -> tuple[Term, ...]:
        """What is called at a noise level; the versions of a model that was not trained are one and the same."""
        terms = self._config.guidance.calls(behind)
        lineage = self._model.lineage
        if lineage is None or lineage.folder is not None:
            return terms
        weights: dict[str, float] = {}
        for term in terms:
            weights[term.condition] = weights.get(term.condition, 0.0) + term.weight
        alike = (Term("null", weights.get("null", 0.0)), Term("prompt", weights.get("prompt", 0.0)))
        return tuple(term for term in alike if abs(term.weight) > _NOTHING)

    @torch.no_grad()
    def draw(self, batch: Sequence[Request]) -> Float[Tensor, "b 3 h w"]:
        """Pictures nominally in [-1, 1]."""
        model, config = self._model, self._config
        scheduler = model.sampling_scheduler(config.scheduler)
        scheduler.set_timesteps(config.steps, device=model.device)
        latents = self._initial_latents(batch) * scheduler.init_noise_sigma
        conditions: dict[tuple[Term, ...], Condition] = {}
        for t in scheduler.timesteps:
            terms = self._calls(max(0.0, 1 - (float(t) + 1) / scheduler.config.num_train_timesteps))
            if terms not in conditions:
                conditions[terms] = self._condition(terms, batch)
            x_t = torch.cat([scheduler.scale_model_input(latents, t)] * len(terms))
            parts = self._predict(terms, x_t, t.expand(len(x_t)), conditions[terms]).float().chunk(len(terms))
            prediction = sum(term.weight * part for term, part in zip(terms, parts, strict=True))
            latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
        return model.decode(latents)

    def _predict(self, terms: tuple[Term, ...], x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """One forward pass for all terms, or one for each version where they cannot share it."""
        model, versions = self._model, [term.version for term in terms]
        if self._versions is None or set(versions) == {TRAINED}:
            return model.denoise(x_t, t, condition)
        size = len(x_t) // len(terms)
        if self._versions.mixes:
            with self._versions.acting(versions, size):
                return model.denoise(x_t, t, condition)
        found = torch.empty_like(x_t)
        for version in dict.fromkeys(versions):
            rows = [i for i in range(len(x_t)) if versions[i // size] == version]
            with self._versions.acting([version]):
                found[rows] = model.denoise(x_t[rows], t[rows], condition.select(rows)).to(found)
        return found

    def _condition(self, terms: tuple[Term, ...], batch: Sequence[Request]) -> Condition:
        told = {
            "prompt": [self._rows[request.prompt] for request in batch],
            "null": [self._rows[None]] * len(batch),
        }
        if len({id(self._conditions[term.version]) for term in terms}) == 1:
            rows = [row for term in terms for row in told[term.condition]]
            return self._conditions[terms[0].version].select(rows)
        return Condition.cat([self._conditions[term.version].select(told[term.condition]) for term in terms])

    def _initial_latents(self, batch: Sequence[Request]) -> Float[Tensor, "b c h w"]:
        shape = self._model.latent_shape(self._config.resolution, self._config.resolution)
        draws = [torch.randn(shape, generator=noise_rng(request)) for request in batch]
        return torch.stack(draws).to(self._model.device)


def _to_image(pixels: Float[Tensor, "3 h w"], request: Request) -> Image.Image:
    if not bool(pixels.isfinite().all()):
        raise NonFiniteError(
            f"the picture of {str(request.prompt)!r} with seed {request.seed} has NaN or infinite pixels: the adapter "
            "diverged, or the autoencoder overflowed (`vae_dtype: float32` avoids that)"
        )
    levels = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
