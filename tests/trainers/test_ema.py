import pytest
import torch
from diffusers.training_utils import EMAModel

from trainers.ema import EmaConfig


@pytest.mark.parametrize("power", [None, 2 / 3, 1.0])
def test_the_average_equals_that_of_diffusers(power):
    rng = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size, generator=rng)) for size in ((3, 4), (5,))]
    warmup = {} if power is None else {"use_ema_warmup": True, "power": power}
    oracle = EMAModel(weights, decay=0.7, **warmup)
    averages = [weight.detach().clone() for weight in weights]
    for step in range(40):
        for weight in weights:
            weight.data += torch.randn(weight.shape, generator=rng)
        oracle.step(weights)
        EmaConfig(decay=0.7, warmup_power=power).update(averages, weights, step)
        for ours, theirs in zip(averages, oracle.shadow_params, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_with_power_one_the_average_is_the_mean_of_all_steps():
    values = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    average = [torch.zeros(6)]
    for step, value in enumerate(values):
        EmaConfig(decay=0.999, warmup_power=1.0).update(average, [value], step)
    torch.testing.assert_close(average[0], values.mean(0))


@pytest.mark.parametrize("change", [{"decay": 0}, {"decay": 1}, {"warmup_power": 0}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match="Input should be"):
        EmaConfig.model_validate(change)
