import pytest
import torch

from trainers.errors import ConfigError, ModelError
from trainers.matching.losses import PdmConfig, query_losses
from trainers.matching.teacher import Trajectories


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


QUERIES, TARGETS = rand(2, 64, 6), rand(2, 64, 6, seed=1)
ONES = torch.ones(2, 1, 8, 8)
HALF = ONES.clone()
HALF[..., 4:, :] = 0


def test_a_full_mask_is_the_plain_mean_square():
    expected = (QUERIES - TARGETS).square().mean((1, 2))
    torch.testing.assert_close(query_losses(QUERIES, TARGETS, ONES), expected)


def test_equal_queries_have_no_loss_and_no_gradient():
    queries = QUERIES.clone().requires_grad_()
    loss = query_losses(queries, QUERIES, HALF)
    loss.sum().backward()
    assert loss.tolist() == [0, 0]
    assert not queries.grad.any()


def test_tokens_outside_the_mask_do_not_count():
    moved = QUERIES.clone()
    moved[:, 32:] += 100
    assert torch.equal(query_losses(moved, TARGETS, HALF), query_losses(QUERIES, TARGETS, HALF))
    inside = (QUERIES - TARGETS)[:, :32].square().mean((1, 2))
    torch.testing.assert_close(query_losses(QUERIES, TARGETS, HALF), inside)


def test_a_token_counts_by_its_share_of_the_mask():
    masks = torch.zeros(2, 1, 8, 8)
    masks[..., 0, 0], masks[..., 0, 1] = 1.0, 0.25
    errors = (QUERIES - TARGETS).square().mean(-1)
    expected = (errors[:, 0] + 0.25 * errors[:, 1]) / 1.25
    torch.testing.assert_close(query_losses(QUERIES, TARGETS, masks), expected)


def test_rows_do_not_see_one_another():
    whole = query_losses(QUERIES, TARGETS, HALF)
    alone = torch.cat([query_losses(QUERIES[i : i + 1], TARGETS[i : i + 1], HALF[:1]) for i in (1, 0)])
    torch.testing.assert_close(alone.flip(0), whole)


def test_a_layer_of_half_the_resolution_has_a_token_for_four_latents():
    masks = torch.zeros(2, 1, 8, 12)
    masks[:, :, :2, 2:4] = 1
    queries, targets = rand(2, 24, 6), rand(2, 24, 6, seed=1)
    expected = (queries - targets)[:, 1].square().mean(-1)
    torch.testing.assert_close(query_losses(queries, targets, masks), expected)


def test_an_odd_number_of_latents_is_rounded_up_as_unets_do():
    assert query_losses(rand(1, 4 * 5, 3), rand(1, 4 * 5, 3), torch.ones(1, 1, 7, 10)).tolist() == [0]


def test_tokens_that_are_no_grid_of_the_latents_are_an_error():
    with pytest.raises(ModelError, match="77 tokens for 8 x 8 latents"):
        query_losses(rand(1, 77, 3), rand(1, 77, 3), ONES[:1])


def test_half_precision_is_compared_in_float32():
    assert query_losses(QUERIES.half(), TARGETS.half(), ONES).dtype == torch.float32


def test_a_timestep_has_the_latents_that_are_noised_to_it():
    paths = Trajectories(torch.tensor([249, 499, 749, 999]), torch.arange(8.0).view(2, 4, 1, 1, 1))
    t = torch.tensor([999, 249, 499])
    assert paths.at([0, 1, 1], t).flatten().tolist() == [3, 4, 5]


def test_timesteps_are_moved_to_the_next_that_has_latents_and_stay_uniform():
    paths = Trajectories(torch.tensor([249, 499, 749, 999]), torch.zeros(1, 4, 1, 1, 1))
    moved = paths.snap(torch.arange(1000))
    assert moved.bincount()[[249, 499, 749, 999]].tolist() == [250] * 4
    assert (moved >= torch.arange(1000)).all()


@pytest.mark.parametrize("band", [(450, 700), (450, 698), (99, 99), (0, 999)])
def test_a_timestep_that_is_moved_stays_in_its_band(band):
    paths = Trajectories(torch.arange(99, 1000, 100), torch.zeros(1, 10, 1, 1, 1))
    inside = [t for t in range(99, 1000, 100) if band[0] <= t <= band[1]]
    moved = paths.snap(torch.arange(band[0], band[1] + 1), band)
    counts = torch.bincount(moved, minlength=1000)
    assert moved.unique().tolist() == inside
    assert int(counts[inside].max() - counts[inside].min()) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": (1200, 1300)}, "timesteps: the last is 1300; expected at most 999"),
        ({"target": {"kind": "inverted", "steps": 300}}, "steps is 300; expected a divisor"),
        ({"target": {"kind": "inverted", "steps": 10}, "timesteps": (0, 98)}, "none of 10 steps"),
        ({"target": {"kind": "inverted", "steps": 10}, "timesteps": (100, 198)}, "none of 10 steps"),
    ],
)
def test_timesteps_that_cannot_be_matched_are_found_before_training(changes, message):
    with pytest.raises(ConfigError, match=message):
        PdmConfig.model_validate(changes).check(1000)
    for band in ((99, 99), (0, 99), (100, 199), (998, 999)):
        PdmConfig.model_validate({"target": {"kind": "inverted", "steps": 10}, "timesteps": band}).check(1000)


def test_a_band_of_timesteps_begins_before_it_ends():
    with pytest.raises(ValueError, match="smaller one first"):
        PdmConfig(timesteps=(500, 100))
