import pytest
import torch
from diffusers import optimization

from trainers.optim import Constant, Cosine, Linear, ScheduleConfig

ORACLES = {
    Constant: lambda optimizer, warmup, _: optimization.get_constant_schedule_with_warmup(optimizer, warmup),
    Linear: optimization.get_linear_schedule_with_warmup,
    Cosine: optimization.get_cosine_schedule_with_warmup,
}


@pytest.mark.parametrize("schedule", ORACLES, ids=lambda schedule: schedule.__name__)
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_schedule_with_warm_up_equals_diffusers(schedule, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = ORACLES[schedule](optimizer, warmup, 10)
    for step in range(10):
        assert schedule(warmup_steps=warmup).factor(step, 10) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()


def test_every_schedule_has_an_oracle():
    assert ScheduleConfig.kinds() == sorted(schedule.model_fields["kind"].default for schedule in ORACLES)


def test_a_schedule_says_whether_it_falls():
    for schedule in ORACLES:
        assert schedule.decays == (schedule().factor(99, 100) < 1), schedule


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_a_warm_up_that_never_ends_is_refused(make_config, kind):
    with pytest.raises(ValueError, match="warmup_steps is 6"):
        make_config(schedule={"kind": kind, "warmup_steps": 6})
