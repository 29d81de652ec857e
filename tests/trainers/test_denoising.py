from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from trainers.backbone import Moments
from trainers.batch import Batch, Geometry, Split
from trainers.denoising import Denoising
from trainers.diffusion import Diffusion
from trainers.errors import ConfigError
from trainers.flow import Flow
from trainers.frozen import Images
from trainers.loss import Debiased, LossConfig, MinSnr, Plain

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ROWS = 200


def diffusion(prediction_type="epsilon"):
    return Diffusion.from_scheduler_config({**BETAS, "prediction_type": prediction_type})


def denoising(process, **loss):
    """Over two pictures of nothing, on 4 x 4 latents of three channels."""
    backbone = SimpleNamespace(
        process=process, device=torch.device("cpu"), sample_latents=lambda moments, _: moments.mean
    )
    moments = Moments(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    images = Images(Split((), ()), moments, (Geometry.whole(32, 32),) * 2)
    return Denoising(backbone, images, LossConfig(**loss), seed=0)


def batch(levels=None):
    return Batch(5, tuple(range(ROWS)), tuple(row % 2 for row in range(ROWS)), levels)


@pytest.mark.parametrize(
    ("weighting", "of_x0"),
    [
        (Plain(), lambda snr: snr),
        (MinSnr(gamma=5.0), lambda snr: snr.clamp(max=5)),
        (Debiased(), lambda snr: snr.sqrt()),
    ],
    ids=["plain", "min_snr", "debiased"],
)
def test_weighted_errors_of_noise_are_the_papers_errors_of_the_picture(weighting, of_x0):
    """In terms of x0 an error of noise is SNR times as large; the papers say what is left of that."""
    t = torch.tensor([20, 100, 300, 600, 999])
    snr = compute_snr(DDPMScheduler(**BETAS), t)
    x0, noise, guess = torch.randn(3, 5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    signal = diffusion().alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = signal.sqrt() * x0 + (1 - signal).sqrt() * noise
    predicted = (x_t - signal.sqrt() * guess) / (1 - signal).sqrt()
    errors = (predicted - noise).square().mean(dim=(1, 2, 3))
    expected = of_x0(snr) * (guess - x0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(weighting.weights(snr, "epsilon") * errors, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("weighting", [MinSnr(gamma=5.0), Debiased()], ids=["min_snr", "debiased"])
def test_a_model_of_velocity_is_weighed_as_the_same_model_of_noise(weighting):
    t = torch.tensor([20, 100, 300, 600, 999])
    process = diffusion("v_prediction")
    snr = process.snr(t)
    x0, noise, guess = torch.randn(3, 5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    signal = process.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = process.add_noise(x0, noise, t)
    of_noise = (x_t - signal.sqrt() * guess) / (1 - signal).sqrt()
    of_velocity = signal.sqrt() * of_noise - (1 - signal).sqrt() * guess
    noise_loss = (of_noise - noise).square().mean(dim=(1, 2, 3)) * weighting.weights(snr, "epsilon")
    velocity_loss = (of_velocity - process.target(x0, noise, t)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(velocity_loss * weighting.weights(snr, "v_prediction"), noise_loss, atol=1e-4, rtol=2e-3)


def test_debiased_weights_do_not_grow_where_hardly_any_noise_is_left():
    weights = Debiased().weights(torch.tensor([1e3, 1e6]), "epsilon")
    assert weights[0] == weights[1] == pytest.approx(1000**-0.5)


@pytest.mark.parametrize("weighting", [MinSnr(), Debiased()])
def test_a_flow_is_not_weighed_by_signal_to_noise_ratios(weighting):
    with pytest.raises(ConfigError, match=r"expected \{kind: plain\}"):
        weighting.check("flow")


def test_a_noise_offset_shifts_each_channel_by_a_constant_of_its_own():
    plain, shifted = denoising(diffusion()).noised(batch()), denoising(diffusion(), noise_offset=0.5).noised(batch())
    shift = shifted.noise - plain.noise
    torch.testing.assert_close(shift, shift.mean(dim=(2, 3), keepdim=True).expand_as(shift), atol=1e-5, rtol=0)
    constants = shift[:, :, 0, 0]
    # 600 draws: the deviation of their deviation is 0.5 / sqrt(1200).
    assert float(constants.std()) == pytest.approx(0.5, abs=0.06)
    assert abs(float(constants.mean())) < 0.08
    assert abs(float(torch.corrcoef(constants.T)[0, 1])) < 0.25
    assert torch.equal(shifted.t, plain.t)
    torch.testing.assert_close(shifted.target, shifted.noise)


@pytest.mark.parametrize("band", [None, (0, 199), (300, 309)])
@pytest.mark.parametrize("process", [diffusion(), Flow(3.0)], ids=["diffusion", "flow"])
def test_even_levels_are_the_timesteps_that_training_draws_and_each_once(process, band):
    first, last = band or (0, 999)
    count = last - first + 1
    levels = [(i + 0.5) / count for i in range(count)]
    expected = torch.stack([process.timestep(torch.tensor(i)) for i in range(first, last + 1)])
    assert torch.equal(torch.stack([process.t_at(level, band) for level in levels]), expected)
    drawn = {float(process.draw_t(torch.Generator().manual_seed(seed), band)) for seed in range(400)}
    assert drawn <= set(expected.tolist())
    assert count > 10 or len(drawn) == count


def test_in_validation_timesteps_are_given_and_nothing_is_dropped():
    levels = tuple((row + 0.5) / ROWS for row in range(ROWS))
    judged, trained = denoising(diffusion()), batch()
    assert judged.noised(batch(levels)).t.tolist() == [int(level * 1000) for level in levels]
    assert torch.equal(judged.noised(batch(levels)).noise, judged.noised(trained).noise)
    assert all(judged.kept(batch(levels), 1.0))
    assert not any(judged.kept(trained, 1.0))
    assert 0.55 < sum(judged.kept(trained, 0.3)) / ROWS < 0.85
