"""What every optimizer must do; each kind's own test inherits this."""

import io

import pytest
import torch

from trainers.errors import ConfigError

RATE_STEPS = 40


def build(config, seed=0):
    """A least-squares problem of two weight matrices in two groups, and an optimizer for them."""
    rng = torch.Generator().manual_seed(seed)
    weights = [torch.nn.Parameter(torch.randn(8, 8, generator=rng)) for _ in range(2)]
    groups = [{"params": [weight], "lr": config.lr, "peak": config.lr} for weight in weights]
    return weights, config.build(groups)


def loss_of(weights):
    return sum((weight - 0.5).square().mean() for weight in weights)


def take(weights, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(weights).backward()
        optimizer.step()


class OptimizerContract:
    """Subclasses provide the fixture `config`, with a rate that moves weights of unit size within 40 steps."""

    @pytest.fixture
    def config(self):
        raise NotImplementedError

    def test_it_goes_downhill(self, config):
        weights, optimizer = build(config)
        before = loss_of(weights).item()
        take(weights, optimizer, RATE_STEPS)
        judged = config.judged(optimizer) or weights
        assert loss_of(judged).item() < 0.8 * before

    def test_saved_state_goes_on_bit_for_bit(self, config):
        whole, optimizer = build(config)
        take(whole, optimizer, 3)
        buffer = io.BytesIO()
        torch.save({"weights": [weight.data for weight in whole], "optimizer": optimizer.state_dict()}, buffer)
        take(whole, optimizer, 3)

        resumed, other = build(config, seed=1)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        for weight, value in zip(resumed, state["weights"], strict=True):
            weight.data.copy_(value)
        other.load_state_dict(state["optimizer"])
        take(resumed, other, 3)
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))

    def test_it_follows_the_rate_of_each_group(self, config):
        weights, optimizer = build(config)
        before = [weight.detach().clone() for weight in weights]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        take(weights, optimizer, 2)
        assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
        assert config.rate(optimizer.param_groups[0]) == 0

    def test_judged_weights_are_new_tensors_and_leave_the_trained_ones_alone(self, config):
        weights, optimizer = build(config)
        take(weights, optimizer, 3)
        before = [weight.detach().clone() for weight in weights]
        judged = config.judged(optimizer)
        assert (judged is not None) == config.averages
        for value in judged or []:
            assert not value.requires_grad
            value.zero_()
        assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))

    def test_a_missing_package_is_named_before_anything_is_built(self, config, monkeypatch):
        if config.package is None:
            config.check()
            return
        monkeypatch.setattr("trainers.optim.find_spec", lambda _: None)
        for attempt in (config.check, lambda: build(config)):
            with pytest.raises(ConfigError, match=f"{config.package} is not installed; install the extra 'optimizers'"):
                attempt()
