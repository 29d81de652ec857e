import pytest
import torch

from tests.contracts.optimizer import OptimizerContract
from trainers.optimizers.adamw import AdamW


class TestAdamW(OptimizerContract):
    @pytest.fixture
    def config(self):
        return AdamW(lr=0.1)


def test_adamw_passes_its_settings_on():
    config = AdamW(lr=0.5, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3)
    group = config.build([{"params": [torch.nn.Parameter(torch.zeros(1))]}]).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.5, 0.1, (0.8, 0.9), 1e-3)


@pytest.mark.parametrize("change", [{"lr": 0}, {"betas": [0.9, 1.0]}, {"weight_decay": -1}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match="Input should be"):
        AdamW.model_validate(change)
