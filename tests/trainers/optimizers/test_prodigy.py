import pytest
import torch

from tests.contracts.optimizer import OptimizerContract, build, take
from trainers.errors import ConfigError
from trainers.optimizers.prodigy import Prodigy


class TestProdigy(OptimizerContract):
    @pytest.fixture
    def config(self):
        return Prodigy(d0=1e-3)


def test_settings_are_passed_on():
    config = Prodigy(
        lr=0.5, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3, d0=1e-4, d_coef=2.0, bias_correction=True,
        safeguard_warmup=True,
    )  # fmt: skip
    group = config.build([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.5}]).param_groups[0]
    expected = {
        "lr": 0.5, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "d0": 1e-4, "d_coef": 2.0,
        "use_bias_correction": True, "safeguard_warmup": True, "decouple": True,
    }  # fmt: skip
    assert group.items() >= expected.items()


def test_the_rate_in_effect_is_the_one_it_found():
    config = Prodigy(d0=1e-3)
    weights, optimizer = build(config)
    assert config.rate(optimizer.param_groups[0]) == 1e-3
    take(weights, optimizer, 20)
    assert config.rate(optimizer.param_groups[0]) > 1e-2


def test_groups_of_different_rates_are_refused():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (1.0, 0.3)]
    with pytest.raises(ConfigError, match=r"one learning rate for all networks, and their lr_scale are \[0\.3, 1\.0\]"):
        Prodigy().build(groups)
