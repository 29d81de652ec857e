import pytest
import torch
from diffusers import DDPMScheduler
from pydantic import ValidationError

from trainers.diffusion import Diffusion
from trainers.errors import ConfigError
from trainers.loss import Debiased, LossConfig, MinSnr, Plain, Weighting

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
T = torch.tensor([0, 20, 300, 700, 999])


def errors(prediction, t=T):
    """Squared errors of noise, velocity and clean picture that are one and the same mistake at each timestep."""
    scheduler = DDPMScheduler(**BETAS)
    signal = scheduler.alphas_cumprod[t].double()
    x0, noise, wrong = (torch.randn(len(t), 4, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    alpha, sigma = (value.sqrt()[:, None] for value in (signal, 1 - signal))
    x_t = alpha * x0 + sigma * noise
    guessed = noise + 0.1 * wrong
    picture = (x_t - sigma * guessed) / alpha
    velocity = alpha * guessed - sigma * picture
    target = {"epsilon": (guessed, noise), "v_prediction": (velocity, alpha * noise - sigma * x0), "x0": (picture, x0)}
    guess, truth = target[prediction]
    return (guess - truth).square().mean(1)


def snr(prediction, t=T):
    return Diffusion.from_scheduler_config({**BETAS, "prediction_type": prediction}).snr(t).double()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weighs_mistakes_of_the_picture_by_the_smaller_of_snr_and_gamma(prediction):
    weighted = MinSnr(gamma=2.0).weights(snr(prediction), prediction) * errors(prediction)
    torch.testing.assert_close(weighted, snr(prediction).clamp(max=2.0) * errors("x0"), rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_debiased_weighs_mistakes_of_the_noise_by_one_over_the_root_of_snr(prediction):
    # SNR is below 1,000 from the second timestep on; before, the two ways of predicting are cut differently.
    t = T[1:]
    weighted = Debiased().weights(snr(prediction, t), prediction) * errors(prediction, t)
    torch.testing.assert_close(weighted, errors("epsilon", t) / snr(prediction, t).sqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weighting", [MinSnr(), Debiased(), Plain()], ids=lambda kind: kind.kind)
def test_weights_are_finite_at_every_timestep(weighting, prediction):
    weights = weighting.weights(snr(prediction, torch.arange(1000)), prediction)
    assert bool((weights.isfinite() & (weights > 0)).all())


@pytest.mark.parametrize("weighting", [MinSnr(), Debiased()], ids=lambda kind: kind.kind)
def test_weights_are_finite_where_no_signal_is_left(weighting):
    assert weighting.weights(torch.zeros(1), "v_prediction") == 0


def test_plain_weighs_nothing():
    assert torch.equal(Plain().weights(snr("epsilon"), "epsilon"), torch.ones(5).double())


@pytest.mark.parametrize("kind", Weighting.kinds())
def test_every_weighting_is_defined_for_diffusion_and_only_the_plain_one_for_flows(kind):
    loss = LossConfig.model_validate({"weighting": {"kind": kind}})
    loss.check("epsilon", 1000)
    loss.check("v_prediction", 1000)
    if kind == "plain":
        loss.check("flow", 1000)
    else:
        with pytest.raises(ConfigError, match="this model learns a flow"):
            loss.check("flow", 1000)


def test_a_band_beyond_the_models_timesteps_is_refused():
    LossConfig(timesteps=(0, 999)).check("epsilon", 1000)
    with pytest.raises(ConfigError, match="the last is 1000; expected at most 999"):
        LossConfig(timesteps=(0, 1000)).check("epsilon", 1000)


def test_a_band_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValidationError, match="expected the smaller one first"):
        LossConfig(timesteps=(200, 0))
