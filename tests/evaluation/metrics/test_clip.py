# pyright: basic

from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.encoders import ClipEncoders
from evaluation.metrics.clip import ClipImage, ClipText
from tests.contracts.metric import PictureMetricContract
from tests.evaluation.conftest import noise
from trainers.cache import Cache
from trainers.prompt import Prompt, Sample


@pytest.fixture
def encoders(tmp_path):
    return ClipEncoders(torch.device("cpu"), Cache(tmp_path / "cache"))


@pytest.fixture
def references(tmp_path) -> list[Path]:
    paths = [tmp_path / f"reference{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        noise(100 + seed).save(path)
    return paths


@pytest.fixture(params=["open_clip", "transformers"])
def folder(request, open_clip_folder, transformers_folder):
    return open_clip_folder if request.param == "open_clip" else transformers_folder


class TestClipText(PictureMetricContract):
    @pytest.fixture
    def metric(self, folder):
        return ClipText(model=folder)

    @pytest.fixture
    def broken(self, tmp_path):
        return ClipText(model=tmp_path / "nowhere")

    def test_it_is_the_raw_cosine_with_the_full_prompt(self, metric, folder, encoders, references, samples):
        encoder = encoders.clip(folder)
        images = encoder.embed_images([sample.image for sample in samples])
        prompts = encoder.embed_prompts([sample.prompt.text for sample in samples])
        cosines = [np.dot(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        np.testing.assert_allclose(metric.open(encoders, references).values(samples), cosines, atol=1e-6)

    def test_what_a_picture_is_to_show_goes_before_words(self, metric, encoders, references):
        scorer = metric.open(encoders, references)
        told, said = Prompt(text="a picture", shows="a red star"), Prompt(text="a red star")
        values = scorer.values([Sample(told, 0, noise(1)), Sample(said, 0, noise(1))])
        assert values[0] == pytest.approx(values[1], abs=1e-6)

    def test_a_negative_cosine_stays_negative(self, metric, folder, encoders, references, monkeypatch):
        encoder = encoders.clip(folder)
        opposite = -encoder.embed_images([noise(1)])
        monkeypatch.setattr(encoder, "embed_prompts", lambda _: opposite)
        scorer = metric.open(encoders, references)
        assert scorer.values([Sample(Prompt(text="its opposite"), 0, noise(1))]) == [pytest.approx(-1, abs=1e-5)]


class TestClipImage(PictureMetricContract):
    @pytest.fixture
    def metric(self, folder):
        return ClipImage(model=folder)

    @pytest.fixture
    def broken(self, tmp_path):
        return ClipImage(model=tmp_path / "nowhere")

    def test_it_is_the_mean_over_all_references(self, metric, folder, encoders, references, samples):
        encoder = encoders.clip(folder)
        images = encoder.embed_images([sample.image for sample in samples])
        pairs = images @ encoder.embed_references(references).T
        assert pairs.max(axis=1) != pytest.approx(pairs.mean(axis=1))
        np.testing.assert_allclose(metric.open(encoders, references).values(samples), pairs.mean(axis=1), atol=1e-6)

    def test_a_picture_is_as_near_as_can_be_to_itself(self, metric, encoders, references):
        scorer = metric.open(encoders, references[:1])
        assert scorer.values([Sample(Prompt(text="anything"), 0, noise(100))]) == [pytest.approx(1, abs=1e-5)]


def test_two_metrics_share_one_encoder(open_clip_folder, encoders, references, monkeypatch):
    text = ClipText(model=open_clip_folder).open(encoders, references)
    image = ClipImage(model=open_clip_folder).open(encoders, references)
    samples = [Sample(Prompt(text="a star"), 0, noise(1))]
    text.values(samples)
    encoder = encoders.clip(open_clip_folder)
    monkeypatch.setattr(encoder, "_compute_images", lambda _: pytest.fail("the picture was embedded a second time"))
    image.values(samples)
