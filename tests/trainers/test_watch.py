"""Who watches a training sees what will be judged, and leaves no trace."""

import torch

from tests.contracts.method import weights
from trainers.loop import fit
from trainers.rundir import RunDir


class Watch:
    def __init__(self):
        self.seen = []

    def due(self, step):
        return step % 2 == 0

    def look(self, method, step):
        self.seen.append((step, any(trained.network.training for trained in method.trained().values())))
        torch.rand(3)


def test_whoever_watches_sees_networks_in_evaluation_mode_and_changes_nothing(make_config, accelerator, tmp_path):
    config, watch = make_config(), Watch()
    alone, watched = config.build(0, None, accelerator), config.build(0, None, accelerator)
    fit(alone, config, RunDir(tmp_path / "alone"), accelerator)
    fit(watched, config, RunDir(tmp_path / "watched"), accelerator, watch)
    assert watch.seen == [(step, False) for step in range(2, config.steps, 2)]
    for name, weight in weights(alone).items():
        assert torch.equal(weight, weights(watched)[name])
