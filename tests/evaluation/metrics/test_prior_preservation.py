# pyright: basic

from itertools import product

import numpy as np
import pytest
import torch

from evaluation.encoders import ClipEncoders
from evaluation.metrics.prior_preservation import PriorPreservation
from tests.contracts.metric import PictureMetricContract
from tests.evaluation.conftest import noise
from trainers.cache import Cache
from trainers.prompt import Prompt, Sample


class TestPriorPreservation(PictureMetricContract):
    @pytest.fixture
    def metric(self, dino_folder):
        return PriorPreservation(model=dino_folder)

    @pytest.fixture
    def broken(self, tmp_path):
        return PriorPreservation(model=tmp_path / "nowhere")

    @pytest.fixture
    def encoders(self, tmp_path):
        return ClipEncoders(torch.device("cpu"), Cache(tmp_path / "cache"))

    @pytest.fixture
    def references(self, tmp_path):
        paths = [tmp_path / f"reference{seed}.png" for seed in range(3)]
        for seed, path in enumerate(paths):
            noise(100 + seed).save(path)
        return paths

    def test_its_mean_is_over_all_pairs_of_class_pictures_and_real_ones(
        self, metric, dino_folder, encoders, references
    ):
        drawn = [noise(seed) for seed in (1, 2)]
        values = metric.open(encoders, references).values([Sample(Prompt(text="a dog"), 0, one) for one in drawn])
        tower, real = encoders.dino(dino_folder), [noise(100 + seed) for seed in range(3)]
        pairs = [tower.embed_images([a])[0] @ tower.embed_images([b])[0] for a, b in product(drawn, real)]
        assert np.mean(values) == pytest.approx(np.mean(pairs), abs=1e-6)

    def test_a_model_that_draws_the_subject_for_its_class_is_worse(self, metric, encoders, references):
        samples = [Sample(Prompt(text="a dog"), 0, noise(seed)) for seed in (100, 7)]
        forgot, kept = metric.open(encoders, references[:1]).values(samples)
        assert forgot == pytest.approx(1, abs=1e-5)
        assert kept < forgot
        assert not metric.higher_is_better
