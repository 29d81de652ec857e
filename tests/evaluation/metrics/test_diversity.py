# pyright: basic

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine

from evaluation.encoders import ClipEncoders
from evaluation.metrics.diversity import Diversity
from tests.contracts.metric import MetricContract
from tests.evaluation.conftest import noise
from trainers.cache import Cache
from trainers.prompt import Prompt, Sample

STAR, RING, ALONE = (Prompt(text=text) for text in ("a star", "a ring", "a moon"))


@pytest.fixture
def encoders(tmp_path):
    return ClipEncoders(torch.device("cpu"), Cache(tmp_path / "cache"))


class TestDiversity(MetricContract):
    @pytest.fixture
    def metric(self, dino_folder):
        return Diversity(model=dino_folder)

    @pytest.fixture
    def broken(self, tmp_path):
        return Diversity(model=tmp_path / "nowhere")

    @pytest.fixture
    def references(self):
        return []

    def test_a_prompts_mean_is_the_mean_distance_over_all_its_pairs(self, metric, dino_folder, encoders):
        drawn = [(STAR, 0, 1), (RING, 0, 2), (STAR, 1, 3), (STAR, 2, 4), (RING, 1, 5)]
        values = metric.open(encoders, []).values([Sample(prompt, seed, noise(n)) for prompt, seed, n in drawn])
        for prompt in (STAR, RING):
            rows = [row for row, one in enumerate(drawn) if one[0] == prompt]
            found = encoders.dino(dino_folder).embed_images([noise(drawn[row][2]) for row in rows])
            expected = np.mean([cosine(a, b) for a, b in combinations(found.astype(np.float64), 2)])
            assert np.mean([values[row] for row in rows]) == pytest.approx(expected, abs=1e-6)

    def test_equal_pictures_have_none_and_a_picture_alone_is_undefined(self, metric, encoders):
        samples = [Sample(STAR, 0, noise(1)), Sample(ALONE, 0, noise(2)), Sample(STAR, 1, noise(1))]
        values = metric.open(encoders, []).values(samples)
        np.testing.assert_allclose(values, [0, np.nan, 0], atol=1e-6)
