# pyright: basic

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evaluation.encoders import ClipEncoders
from evaluation.metrics.preference import Preference
from tests.contracts.metric import PictureMetricContract
from tests.evaluation.conftest import build_open_clip, noise
from trainers.cache import Cache
from trainers.errors import ModelError


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A folder whose own weights are gone, and HPSv2.1-like weights from another seed."""
    folder = build_open_clip(tmp_path_factory.mktemp("preference") / "tower", seed=5)
    state = load_file(folder / "open_clip_model.safetensors")
    torch.save({"state_dict": state}, folder / "HPS.pt")
    (folder / "open_clip_model.safetensors").unlink()
    return folder


@pytest.fixture
def encoders(tmp_path):
    return ClipEncoders(torch.device("cpu"), Cache(tmp_path / "cache"))


class TestPreference(PictureMetricContract):
    @pytest.fixture
    def references(self):
        return []

    @pytest.fixture
    def metric(self, tower):
        return Preference(model=tower, checkpoint=tower / "HPS.pt")

    @pytest.fixture
    def broken(self, tower):
        return Preference(model=tower, checkpoint=tower / "nothing.pt")

    def test_it_is_the_raw_cosine_by_the_checkpoint(self, metric, encoders, samples, tmp_path):
        stock = encoders.clip(build_open_clip(tmp_path / "same", seed=5))
        images = stock.embed_images([sample.image for sample in samples])
        prompts = stock.embed_prompts([sample.prompt.text for sample in samples])
        np.testing.assert_allclose(metric.open(encoders, []).values(samples), (images * prompts).sum(1), atol=1e-6)


def test_the_same_folder_with_and_without_a_checkpoint_are_two_models(encoders, tower, tmp_path):
    folder = build_open_clip(tmp_path / "clip", seed=1)
    plain, other = encoders.clip(folder), encoders.clip(folder, tower / "HPS.pt")
    assert plain.model != other.model
    assert other.model.startswith("HPS@")
    assert np.abs(plain.embed_images([noise(1)]) - other.embed_images([noise(1)])).max() > 0.01


def test_a_checkpoint_of_another_model_is_refused_by_name(encoders, tower, tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(ModelError, match=r"other\.pt"):
        encoders.clip(tower, tmp_path / "other.pt")


def test_a_checkpoint_needs_an_open_clip_folder(transformers_folder, tower):
    with pytest.raises(ModelError, match="open_clip_config"):
        Preference(model=transformers_folder, checkpoint=tower / "HPS.pt").check()


def test_weights_that_a_checkpoint_replaces_at_once_are_no_reason_to_warn(tower, encoders, caplog):
    encoders.clip(tower, tower / "HPS.pt")
    assert "initialized randomly" not in caplog.text
