import pytest
import torch

from tests.contracts.optimizer import OptimizerContract, build, take
from trainers.optim import Constant, Cosine
from trainers.optimizers.schedule_free import ScheduleFree


class TestScheduleFree(OptimizerContract):
    @pytest.fixture
    def config(self):
        return ScheduleFree(lr=0.1)


def test_settings_are_passed_on():
    config = ScheduleFree(lr=0.5, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3)
    group = config.build([{"params": [torch.nn.Parameter(torch.zeros(1))]}]).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.5, 0.1, (0.8, 0.9), 1e-3)


@pytest.mark.parametrize("steps", [0, 7])
def test_the_judged_weights_are_those_of_the_packages_evaluation_mode(steps):
    config = ScheduleFree(lr=0.1)
    weights, optimizer = build(config)
    take(weights, optimizer, steps)
    judged = config.judged(optimizer)
    optimizer.eval()
    assert all(torch.equal(a, b) for a, b in zip(judged, weights, strict=True))


def test_with_one_rate_the_judged_weights_are_the_mean_of_the_fast_iterates():
    config = ScheduleFree(lr=0.1)
    weights, optimizer = build(config)
    iterates = []
    for _ in range(6):
        take(weights, optimizer, 1)
        iterates.append([optimizer.state[weight]["z"].clone() for weight in weights])
    for value, fast in zip(config.judged(optimizer), zip(*iterates, strict=True), strict=True):
        torch.testing.assert_close(value, torch.stack(fast).mean(0), atol=1e-5, rtol=1e-5)


def test_a_falling_schedule_is_refused():
    ScheduleFree().check_schedule(Constant(warmup_steps=3))
    with pytest.raises(ValueError, match="schedule_free averages in place of a falling"):
        ScheduleFree().check_schedule(Cosine())
