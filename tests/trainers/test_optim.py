import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup

from trainers.optim import AdamW, Cosine


@pytest.mark.parametrize("warmup", [0, 3])
def test_cosine_with_warm_up_equals_diffusers(warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = get_cosine_schedule_with_warmup(optimizer, warmup, 10)
    for step in range(10):
        assert Cosine(warmup_steps=warmup).factor(step, 10) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()


def test_a_warm_up_that_never_ends_is_refused(make_config):
    with pytest.raises(ValueError, match="warmup_steps is 6"):
        make_config(schedule={"kind": "cosine", "warmup_steps": 6})


def test_adamw_passes_its_settings_on():
    config = AdamW(lr=0.5, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3)
    group = config.build([{"params": [torch.nn.Parameter(torch.zeros(1))]}]).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.5, 0.1, (0.8, 0.9), 1e-3)


@pytest.mark.parametrize("change", [{"lr": 0}, {"betas": [0.9, 1.0]}, {"weight_decay": -1}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match="Input should be"):
        AdamW.model_validate(change)
