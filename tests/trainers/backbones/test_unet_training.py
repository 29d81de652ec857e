"""Training steps of UNets next to ones written out as in diffusers' `train_text_to_image*.py`."""

# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportOperatorIssue=false

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from trainers.batch import Batch, Stream, example_rng
from trainers.data.transforms import open_picture

FOUR = Batch(7, (0, 1, 2, 3), (0, 1, 2, 3))
ZERO = {"zero_terminal_snr": True}


def drawn(stream, *shape):
    """What is drawn for each row of the batch."""
    return torch.stack([torch.randn(shape, generator=example_rng(0, FOUR.step, p, stream)) for p in FOUR.places])


def crop_of(path):
    """Size, and where a centred square of 64 pixels begins, as the example works them out."""
    image = open_picture(path)
    size = (image.height, image.width)
    return size, [max(0, round((side * 64 / min(size) - 64) / 2.0)) for side in size]


def predict(pipeline, examples, noisy, timesteps):
    """The example's call of the UNet."""
    prompts = [example.prompt for example in examples]
    if isinstance(pipeline, diffusers.StableDiffusionPipeline):
        hidden, _ = pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
        return pipeline.unet(noisy, timesteps, hidden, return_dict=False)[0]
    hidden, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    crops = [crop_of(example.path) for example in examples]
    time_ids = torch.tensor([[*original, *corner, 64.0, 64.0] for original, corner in crops])
    added = {"text_embeds": pooled, "time_ids": time_ids}
    return pipeline.unet(noisy, timesteps, hidden, added_cond_kwargs=added, return_dict=False)[0]


def weigh(losses, scheduler, timesteps, loss):
    """`--snr_gamma`, or debiased estimation (Yu et al., 2023, eq. 12)."""
    weighting = loss.get("weighting", {"kind": "plain"})
    if weighting["kind"] == "plain":
        return losses
    snr = compute_snr(scheduler, timesteps)
    velocity = scheduler.config.prediction_type == "v_prediction"
    if weighting["kind"] == "debiased":
        assert not velocity
        return losses / snr.sqrt()
    return losses * torch.minimum(snr, torch.full_like(snr, weighting["gamma"])) / (snr + velocity)


@pytest.mark.parametrize(
    ("folder", "backbone", "loss"),
    [
        ("sdxl_folder", {}, {}),
        ("sdxl_folder", {}, {"weighting": {"kind": "min_snr", "gamma": 5.0}, "noise_offset": 0.1}),
        ("v_prediction_folder", {}, {"weighting": {"kind": "min_snr", "gamma": 5.0}}),
        ("sd_folder", {"kind": "sd"}, {"weighting": {"kind": "debiased"}, "timesteps": [50, 999]}),
        ("sd_folder", {"kind": "sd"}, {"noise_offset": 0.05}),
        ("sd_v_folder", {"kind": "sd"}, {}),
        ("sd_v_folder", {"kind": "sd", **ZERO}, {"weighting": {"kind": "min_snr", "gamma": 1.0}}),
    ],
)
def test_losses_equal_the_examples(make_config, accelerator, request, folder, backbone, loss):
    path = request.getfixturevalue(folder)
    config = make_config(kind="dreambooth", backbone={"kind": "sdxl", "path": str(path), **backbone}, loss=loss)
    method = config.build(0, None, accelerator)
    options = {"safety_checker": None} if "kind" in backbone else {}
    pipeline = method.backbone.pipeline.from_pretrained(path, local_files_only=True, **options)
    rescaled = {"rescale_betas_zero_snr": True} if ZERO.items() <= backbone.items() else {}
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, **rescaled)
    examples = method.examples[:4]
    timesteps = method._denoising.noised(FOUR).t
    with torch.no_grad():
        posterior = pipeline.vae.encode(torch.cat([method.data.read(one).pixels for one in examples])).latent_dist
        shape = posterior.mean.shape[1:]
        latents = (posterior.mean + posterior.std * drawn(Stream.VAE, *shape)) * pipeline.vae.config.scaling_factor
        noise = drawn(Stream.NOISE, *shape) + loss.get("noise_offset", 0.0) * drawn(Stream.OFFSET, shape[0], 1, 1)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        losses = (predict(pipeline, examples, noisy, timesteps) - target).square().mean((1, 2, 3))
        expected = weigh(losses, scheduler, timesteps, loss)
        torch.testing.assert_close(method.losses(FOUR), expected, atol=1e-6, rtol=1e-5)
