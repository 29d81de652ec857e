import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from trainers.diffusion import Diffusion
from trainers.errors import ModelError
from trainers.loss import MinSnr

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def process(**changes):
    return Diffusion.from_scheduler_config({**BETAS, "prediction_type": "epsilon", **changes})


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_training_betas_do_not_depend_on_the_sampler_a_folder_ships(scheduler):
    config = scheduler(**BETAS).config
    torch.testing.assert_close(
        Diffusion.from_scheduler_config(config).alphas_cumprod, DDPMScheduler(**BETAS).alphas_cumprod
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_target_equal_the_stock_schedulers(prediction_type):
    oracle = DDPMScheduler(**BETAS, prediction_type=prediction_type)
    x0, noise, t = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3), torch.tensor([0, 1, 500, 998, 999])
    ours = process(prediction_type=prediction_type)
    torch.testing.assert_close(ours.add_noise(x0, noise, t), oracle.add_noise(x0, noise, t))
    expected = noise if prediction_type == "epsilon" else oracle.get_velocity(x0, noise, t)
    torch.testing.assert_close(ours.target(x0, noise, t), expected)


@pytest.mark.parametrize(("prediction_type", "shift"), [("epsilon", 0), ("v_prediction", 1)])
def test_min_snr_weights_equal_the_papers_formula(prediction_type, shift):
    t = torch.arange(1000)
    snr = compute_snr(DDPMScheduler(**BETAS), t)
    weight = MinSnr().weights(process(prediction_type=prediction_type).snr(t), prediction_type)
    torch.testing.assert_close(weight, torch.minimum(snr, torch.tensor(5.0)) / (snr + shift))


def test_min_snr_weight_is_finite_where_no_signal_is_left():
    zero = process(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert zero.alphas_cumprod[-1] == 0
    assert MinSnr().weights(zero.snr(torch.tensor([999])), "v_prediction") == 0
    assert MinSnr().weights(process(rescale_betas_zero_snr=True).snr(torch.tensor([999])), "epsilon") == 1


def test_a_flow_model_is_refused_by_name():
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler"):
        Diffusion.from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
