import pytest
import torch
from diffusers import DDIMScheduler

from trainers.diffusion import Diffusion
from trainers.errors import ConfigError
from trainers.matching.inversion import invert

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
X0 = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def process(prediction="epsilon"):
    return Diffusion.from_scheduler_config({**BETAS, "prediction_type": prediction})


def linear(process, slope=0.3):
    """A linear model that ignores time, whose inversion is exact in no single step."""
    return lambda x, _: slope * x


def gaussian(process, variance):
    """The best possible denoiser of pictures whose every value is normal with mean 0 and `variance`."""

    def predict(x, t):
        signal = process.alphas_cumprod[t].view(-1, 1, 1, 1)
        noise = (1 - signal).sqrt() * x / (signal * variance + 1 - signal)
        if process.prediction == "epsilon":
            return noise
        return (noise - (1 - signal).sqrt() * x) / signal.sqrt()

    return predict


def sample(predict, x, prediction, num_steps):
    """diffusers' own DDIM from the last timestep to the picture."""
    options = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler(**BETAS, **options, prediction_type=prediction)
    scheduler.set_timesteps(num_steps)
    seen = []
    for t in scheduler.timesteps:
        seen.append((int(t), x))
        x = scheduler.step(predict(x, t.view(1)), t, x).prev_sample
    return x, seen


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_there_and_back_is_the_picture(prediction):
    model = process(prediction)
    predict = linear(model)
    found = invert(predict, X0, model, 1000)
    back, seen = sample(predict, found.latents[-1:], prediction, 1000)
    torch.testing.assert_close(back, X0, atol=5e-3, rtol=5e-3)
    assert (seen[0][0], seen[-1][0]) == (999, 0)
    for t, x in seen:
        torch.testing.assert_close(found.latents[t : t + 1], x, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_normal_data_follows_the_closed_form_at_its_own_timestep(prediction):
    """Normal data keep their quantile along the probability flow: x_t = x_0 sqrt(a s² + 1 - a) / s."""
    model = process(prediction)
    found = invert(gaussian(model, 4.0), X0, model, 1000)
    signal = model.alphas_cumprod[found.timesteps].view(-1, 1, 1, 1)
    expected = X0 * (signal * 4.0 + 1 - signal).sqrt() / 2.0
    torch.testing.assert_close(found.latents, expected, atol=0.01, rtol=0.01)


@pytest.mark.parametrize(("steps", "first"), [(1000, 0), (100, 9), (4, 249)])
def test_steps_end_at_the_last_timestep(steps, first):
    model = process()
    found = invert(linear(model), X0, model, steps)
    assert found.timesteps.tolist() == list(range(first, 1000, 1000 // steps))
    assert found.latents.shape == (steps, 3, 4, 4)


def test_the_model_is_asked_at_the_timestep_that_a_latent_is_noised_to():
    model, asked = process(), []

    def predict(x, t):
        asked.append(int(t))
        return torch.zeros_like(x)

    found = invert(predict, X0, model, 10)
    assert asked == found.timesteps.tolist()
    # Without any noise in the answers a latent is the picture, dimmed.
    expected = model.alphas_cumprod[found.timesteps].sqrt().view(-1, 1, 1, 1) * X0
    torch.testing.assert_close(found.latents, expected)


def test_more_steps_come_closer():
    model = process()
    predict = gaussian(model, 0.25)
    errors = []
    for steps in (10, 100, 1000):
        last = invert(predict, X0, model, steps).latents[-1:]
        errors.append(float((sample(predict, last, "epsilon", steps)[0] - X0).abs().max()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_unequal_steps_are_refused():
    with pytest.raises(ConfigError, match="300 steps of inversion; expected a divisor of the model's 1000"):
        invert(linear(process()), X0, process(), 300)
