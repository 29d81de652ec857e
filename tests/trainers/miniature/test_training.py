import pytest
import torch

from trainers.miniature import training
from trainers.miniature.training import Schedule, train


def trained(path, steps, monkeypatch, stop=None):
    """A linear layer's weights after training, which may be interrupted right after a checkpoint."""
    monkeypatch.setattr(training, "_SAVE_EVERY", 4)
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    done = []

    def loss(words):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(words.random())
        return (layer(torch.randn(5, 3)) - done[-1]).square().mean()

    try:
        train("layer", (layer,), loss, Schedule(steps, 3, path))
    except KeyboardInterrupt:
        assert path.exists()
    return layer


def test_training_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    whole = trained(tmp_path / "a.ckpt", 10, monkeypatch)
    trained(tmp_path / "b.ckpt", 10, monkeypatch, stop=6)
    resumed = trained(tmp_path / "b.ckpt", 10, monkeypatch)
    assert torch.equal(whole.weight, resumed.weight)


def test_training_leaves_frozen_weights_and_no_checkpoint(tmp_path, monkeypatch):
    layer = trained(tmp_path / "a.ckpt", 8, monkeypatch)
    assert not layer.weight.requires_grad
    assert not layer.training
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [0, 1])
def test_each_step_is_seeded_by_itself(tmp_path, seed):
    drawn = []
    layer = torch.nn.Linear(1, 1)

    def loss(words):
        drawn.append((float(torch.rand(())), words.random()))
        return layer(torch.ones(1)).sum()

    for name in ("a", "b"):
        train("layer", (layer,), loss, Schedule(2, seed, tmp_path / name))
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]
