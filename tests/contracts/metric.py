"""What every metric must do."""

# pyright: basic

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from evaluation.metric import Encoders, Metric
from trainers.errors import DataError, ModelError
from trainers.prompt import Prompt, Request, Sample


class MetricContract:
    """Inherit, and give the fixtures `metric`, `broken` (a model is missing), `encoders` and `references`."""

    @pytest.fixture
    def samples(self) -> list[Sample]:
        rng = np.random.default_rng(0)
        pictures = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(4)]
        return [Sample(Prompt(text=f"picture {i % 2}"), i // 2, picture) for i, picture in enumerate(pictures)]

    def test_the_files_it_needs_are_found(self, metric: Metric):
        metric.check()

    def test_a_missing_model_is_found_before_and_at_opening(
        self, broken: Metric, encoders: Encoders, references: Sequence[Path]
    ):
        with pytest.raises(ModelError):
            broken.check()
        with pytest.raises(ModelError):
            broken.open(encoders, references)

    def test_each_sample_has_one_plain_number(self, metric, encoders, references, samples):
        values = metric.open(encoders, references).values(samples)
        assert [type(value) for value in values] == [float] * len(samples)
        assert not any(math.isinf(value) for value in values)

    def test_pictures_may_be_seen_one_by_one_and_in_any_order(self, metric, encoders, references, samples):
        scorer = metric.open(encoders, references)
        seen = np.concatenate([scorer.look([sample]) for sample in reversed(samples)])[::-1]
        requests = [Request(sample.prompt, sample.seed) for sample in samples]
        np.testing.assert_allclose(scorer.judge(requests, seen), scorer.values(samples), rtol=0, atol=1e-5)

    def test_values_are_repeated_exactly(self, metric, encoders, references, samples):
        first = metric.open(encoders, references).values(samples)
        np.testing.assert_array_equal(metric.open(encoders, references).values(samples), first)

    def test_its_model_has_a_name_and_a_hash(self, metric, encoders, references):
        name, _, digest = metric.open(encoders, references).model.partition("@")
        assert name
        assert digest

    def test_it_does_not_invent_references(self, metric, encoders):
        if metric.needs_references:
            with pytest.raises(DataError, match="held-out"):
                metric.open(encoders, [])
        else:
            metric.open(encoders, [])

    def test_it_survives_a_study_file(self, metric):
        assert TypeAdapter(Metric).validate_python(metric.model_dump(mode="json")) == metric


class PictureMetricContract(MetricContract):
    """Of metrics whose value of a picture has nothing to do with other pictures."""

    def test_a_value_depends_on_its_own_sample_alone(self, metric, encoders, references, samples):
        scorer = metric.open(encoders, references)
        together = scorer.values(samples)
        alone = [scorer.values([sample])[0] for sample in reversed(samples)]
        np.testing.assert_allclose(together, alone[::-1], rtol=0, atol=1e-5)
