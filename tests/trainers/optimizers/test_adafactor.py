import pytest
import torch

from tests.contracts.optimizer import OptimizerContract
from trainers.optimizers.adafactor import Adafactor


class TestAdafactor(OptimizerContract):
    @pytest.fixture
    def config(self):
        return Adafactor(lr=0.1)


def test_settings_are_passed_on():
    config = Adafactor(lr=0.5, weight_decay=0.1, decay_power=-0.7, clip=2.0, smallest_size=1e-2)
    group = config.build([{"params": [torch.nn.Parameter(torch.zeros(1))]}]).param_groups[0]
    expected = {"lr": 0.5, "weight_decay": 0.1, "beta2_decay": -0.7, "d": 2.0}
    assert group.items() >= expected.items()
    assert group["eps"][1] == 1e-2


def test_second_moments_take_a_row_and_a_column_each():
    weight = torch.nn.Parameter(torch.randn(6, 9))
    optimizer = Adafactor().build([{"params": [weight]}])
    weight.square().sum().backward()
    optimizer.step()
    assert sum(value.numel() for value in optimizer.state[weight].values()) == 6 + 9 + 1
