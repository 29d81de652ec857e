"""Checks of the members that draw: the saved folder is read back, listened to and drawn with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jaxtyping import Float
from torch import Tensor, nn

from trainers.miniature.quality import listening, obedience, scenes
from trainers.miniature.sana import INSTRUCTION, MAX_LENGTH, SanaDenoiser
from trainers.miniature.sana_training import velocity_errors
from trainers.miniature.sd import Latents, SdDenoiser, denoising_errors
from trainers.miniature.world import SIZE, Scene, caption

_GUIDANCE, _STEPS, _BATCH = 5.0, 20, 16


def load(folder: Path, **kinds: Any) -> dict[str, Any]:
    """Components of a folder by name, frozen, in single precision."""
    found: dict[str, nn.Module] = {
        name: kind.from_pretrained(folder / name, dtype=torch.float32, local_files_only=True)
        for name, kind in kinds.items()
    }
    return {name: network.eval().requires_grad_(False) for name, network in found.items()}


def check_sd(folder: Path, unseen: Latents, count: int) -> dict[str, float]:
    """`folder`/sd, drawn with by its stock pipeline and DDIM."""
    pipeline = _sd_pipeline(folder)
    model = SdDenoiser(pipeline.unet, pipeline.text_encoder, pipeline.tokenizer)
    return _check_sd(pipeline, model, unseen, count)


def check_v(folder: Path, unseen: Latents, count: int) -> dict[str, float]:
    """`folder`/sd_v in the pipeline of `folder`/sd, with its own scheduler."""
    pipeline = _sd_pipeline(folder)
    pipeline.unet = load(folder / "sd_v", unet=UNet2DConditionModel)["unet"]
    pipeline.scheduler = DDIMScheduler.from_pretrained(folder / "sd_v" / "scheduler")
    model = SdDenoiser(pipeline.unet, pipeline.text_encoder, pipeline.tokenizer, "v_prediction")
    return _check_sd(pipeline, model, unseen, count)


def _sd_pipeline(folder: Path) -> Any:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        folder / "sd", dtype=torch.float32, local_files_only=True, safety_checker=None
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return pipeline


def _check_sd(pipeline: Any, model: SdDenoiser, unseen: Latents, count: int) -> dict[str, float]:
    def errors(rows: Tensor, time: float, texts: Sequence[str]) -> Tensor:
        return denoising_errors(model, unseen.x0[rows], time, texts)

    heard = listening(errors, unseen.pictures).numbers()
    wanted = scenes(count, 1, portraits=0.15)
    return heard | obedience(drawn(pipeline, wanted), wanted)


def check_sana(folder: Path, unseen: Latents, count: int) -> dict[str, float]:
    """`folder`/sana, drawn with by its stock pipeline and scheduler; how close its latents are to the base's."""
    pipeline: Any = SanaPipeline.from_pretrained(folder / "sana", dtype=torch.float32, local_files_only=True)
    model = SanaDenoiser(pipeline.transformer, pipeline.text_encoder, pipeline.tokenizer)

    def errors(rows: Tensor, time: float, texts: Sequence[str]) -> Tensor:
        return velocity_errors(model, unseen.x0[rows], time, texts)

    heard = listening(errors, unseen.pictures).numbers()
    wanted = scenes(count, 1, portraits=0.15)
    options = {
        "use_resolution_binning": False,
        "complex_human_instruction": INSTRUCTION.split("\n"),
        "max_sequence_length": MAX_LENGTH,
    }
    found = heard | obedience(drawn(pipeline, wanted, **options), wanted)
    return found | _autoencoder(pipeline.vae, unseen)


@torch.no_grad()
def _autoencoder(vae: Any, unseen: Latents) -> dict[str, float]:
    x = unseen.pictures.pixels.float() / 127.5 - 1
    latents = vae.encode(x).latent
    error = (latents * vae.config.scaling_factor - unseen.x0).square().mean()
    rebuilt = (vae.decode(latents).sample - x).abs().mean() * 127.5
    return {"latent_error": round(float(error), 4), "rebuilt_error_of_255": round(float(rebuilt), 3)}


@torch.no_grad()
def drawn(pipeline: Any, wanted: Sequence[Scene], **options: Any) -> Float[Tensor, "n 3 64 64"]:
    """A picture in [-1, 1] for each scene's caption, each from its own seed."""
    pipeline.set_progress_bar_config(disable=True)
    parts: list[Tensor] = []
    for start in range(0, len(wanted), _BATCH):
        texts = [caption(scene) for scene in wanted[start : start + _BATCH]]
        made = pipeline(
            texts,
            num_inference_steps=_STEPS,
            guidance_scale=_GUIDANCE,
            height=SIZE,
            width=SIZE,
            output_type="pt",
            generator=[torch.Generator().manual_seed(start + k) for k in range(len(texts))],
            **options,
        )
        parts.append(made.images)
    return torch.cat(parts).float() * 2 - 1
