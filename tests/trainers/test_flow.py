import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from trainers.flow import Flow


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_equals_the_stock_schedulers_at_every_timestep_of_its_table(shift):
    oracle, ours = FlowMatchEulerDiscreteScheduler(shift=shift), Flow(shift)
    t = oracle.timesteps
    x0, noise = torch.randn(2, len(t), 4, 3, 3)
    torch.testing.assert_close(ours.add_noise(x0, noise, t), oracle.scale_noise(x0, t, noise))


def test_the_target_leads_from_the_picture_to_the_noise():
    flow, t = Flow(3.0), torch.tensor([1.0, 400.0, 1000.0])
    x0, noise = torch.randn(2, 3, 4, 3, 3)
    x_t, sigma = flow.add_noise(x0, noise, t), (t / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t - sigma * flow.target(x0, noise, t), x0)
    torch.testing.assert_close(x_t + (1 - sigma) * flow.target(x0, noise, t), noise)


def test_every_timestep_of_the_table_is_drawn_equally_often():
    flow = Flow(3.0, num_timesteps=4)
    rng = torch.Generator().manual_seed(0)
    drawn = torch.stack([flow.draw_t(rng) for _ in range(4000)])
    table = FlowMatchEulerDiscreteScheduler(num_train_timesteps=4, shift=3.0).timesteps
    counts = torch.stack([torch.isclose(drawn, t).sum() for t in table])
    assert counts.sum() == 4000
    # Four deviations of a binomial count: sqrt(4000 / 4 * 3 / 4) = 27.
    assert (counts - 1000).abs().max() < 4 * 27


def test_a_band_counts_from_the_least_noisy_timestep():
    table = FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps.flip(0)
    for seed in range(20):
        t = Flow(3.0).draw_t(torch.Generator().manual_seed(seed), (10, 12))
        assert torch.isclose(t, table[10:13]).any()


def test_the_signal_to_noise_ratio_is_that_of_variances():
    torch.testing.assert_close(Flow(1.0).snr(torch.tensor([250.0, 500.0, 1000.0])), torch.tensor([9.0, 1.0, 0.0]))
