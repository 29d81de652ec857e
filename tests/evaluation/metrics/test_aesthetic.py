# pyright: basic

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from evaluation.encoders import ClipEncoders
from evaluation.metrics.aesthetic import Aesthetic, load_head
from tests.contracts.metric import PictureMetricContract
from tests.evaluation.conftest import save_head
from trainers.cache import Cache
from trainers.errors import ModelError

# Not ours to ship; looked for beside the checkout.
REAL_HEAD = Path(__file__).parents[4] / "shared" / "data" / "sac+logos+ava1-l14-linearMSE.pth"


class Predictor(nn.Module):
    """The published predictor's architecture, dropout included."""

    def __init__(self, widths=(768, 1024, 128, 64, 16, 1)):
        super().__init__()
        a, b, c, d, e, f = widths
        self.layers = nn.Sequential(
            nn.Linear(a, b), nn.Dropout(0.2), nn.Linear(b, c), nn.Dropout(0.2), nn.Linear(c, d), nn.Dropout(0.1),
            nn.Linear(d, e), nn.Linear(e, f),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


class TestAesthetic(PictureMetricContract):
    @pytest.fixture(params=["open_clip", "transformers"])
    def metric(self, request, open_clip_folder, transformers_folder, head_file):
        folder = open_clip_folder if request.param == "open_clip" else transformers_folder
        return Aesthetic(model=folder, head=head_file)

    @pytest.fixture
    def broken(self, open_clip_folder, tmp_path):
        return Aesthetic(model=open_clip_folder, head=tmp_path / "nowhere.safetensors")

    @pytest.fixture
    def encoders(self, tmp_path):
        return ClipEncoders(torch.device("cpu"), Cache(tmp_path / "cache"))

    @pytest.fixture
    def references(self):
        return []

    def test_it_is_the_head_on_the_unit_embedding(self, metric, encoders, references, samples, head_file):
        predictor = Predictor((16, 12, 8, 6, 4, 1)).eval()
        predictor.load_state_dict({name: torch.from_numpy(array) for name, array in load_file(head_file).items()})
        images = encoders.clip(metric.model).embed_images([sample.image for sample in samples])
        with torch.no_grad():
            expected = predictor(torch.from_numpy(images))[:, 0].numpy()
        np.testing.assert_allclose(metric.open(encoders, references).values(samples), expected, rtol=1e-5, atol=1e-5)

    def test_its_model_names_the_tower_and_the_head(self, metric, encoders, references):
        tower, _, head = metric.open(encoders, references).model.partition("+")
        assert tower == encoders.clip(metric.model).model
        assert head.startswith("head@")

    def test_a_head_of_another_width_is_refused_before_and_at_opening(self, metric, encoders, tmp_path):
        head = save_head(tmp_path / "wide.safetensors", (24, 12, 8, 6, 4, 1))
        wide = metric.model_copy(update={"head": head})
        message = "made for embeddings of 24 numbers; .* gives 16. Use the CLIP model that the head was fitted on"
        with pytest.raises(ModelError, match=message):
            wide.check()
        with pytest.raises(ModelError, match=message):
            wide.open(encoders, [])


@pytest.mark.skipif(not REAL_HEAD.exists(), reason="the published head is not on this machine")
def test_the_published_head_is_one_affine_map():
    predictor = Predictor().eval()
    predictor.load_state_dict(torch.load(REAL_HEAD, map_location="cpu", weights_only=True))
    x = nn.functional.normalize(torch.randn(256, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
    with torch.no_grad():
        expected = predictor(x)[:, 0].numpy()
    weight, bias = load_head(REAL_HEAD)
    np.testing.assert_allclose(x.numpy() @ weight + bias, expected, rtol=0, atol=2e-6)
    # Measured once on the published file; scores on the unit sphere lie within bias ± |weight|.
    assert np.linalg.norm(weight) == pytest.approx(17.9956, abs=1e-3)
    assert bias == pytest.approx(5.2366, abs=1e-3)


def test_a_pth_file_and_a_safetensors_file_are_the_same_head(tmp_path, head_file):
    tensors = {name: torch.from_numpy(array) for name, array in load_file(head_file).items()}
    torch.save(tensors, tmp_path / "head.pth")
    np.testing.assert_array_equal(load_head(tmp_path / "head.pth")[0], load_head(head_file)[0])
    assert load_head(tmp_path / "head.pth")[1] == load_head(head_file)[1]


def test_the_variant_with_activations_is_refused(tmp_path, open_clip_folder):
    widths = {0: (16, 12), 3: (12, 8), 6: (8, 6), 9: (6, 4), 11: (4, 1)}
    tensors = {f"layers.{i}.weight": np.zeros((b, a), np.float32) for i, (a, b) in widths.items()}
    tensors |= {f"layers.{i}.bias": np.zeros(b, np.float32) for i, (_, b) in widths.items()}
    save_file(tensors, tmp_path / "relu.safetensors")
    with pytest.raises(ModelError, match="this head has ReLUs between its layers"):
        Aesthetic(model=open_clip_folder, head=tmp_path / "relu.safetensors").check()
    with pytest.raises(ModelError, match="expected a linear one"):
        load_head(tmp_path / "relu.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.4.weight": None}, r"expected the tensors of a LAION aesthetic head .*; got layers\.0\.bias"),
        ({"layers.2.weight": (8, 11)}, r"layers\.2\.weight has shape \[8, 11\] .* expected \[8, 12\] and \[8\]"),
        ({"layers.7.weight": (2, 4), "layers.7.bias": (2,)}, r"layers\.7\.weight .* expected \[1, 4\] and \[1\]"),
        ({"layers.6.bias": (5,)}, r"layers\.6\.weight has shape \[4, 6\] and its bias \[5\]"),
    ],
)
def test_layers_that_do_not_fit_are_named(change, message, tmp_path, head_file):
    tensors = load_file(head_file)
    for name, shape in change.items():
        del tensors[name]
        if shape:
            tensors[name] = np.zeros(shape, np.float32)
    save_file(tensors, tmp_path / "changed.safetensors")
    with pytest.raises(ModelError, match=message):
        load_head(tmp_path / "changed.safetensors")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_broken_file_is_named(suffix, tmp_path):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(b"these are not weights")
    with pytest.raises(ModelError, match=f"broken{suffix}: cannot be read as weights"):
        load_head(path)


def test_a_pickle_that_holds_code_is_never_run(tmp_path):
    torch.save({"layers.0.weight": Path("/")}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match="cannot be read as weights"):
        load_head(tmp_path / "evil.pth")


def test_a_missing_file_is_named(tmp_path, open_clip_folder):
    with pytest.raises(ModelError, match=r"nowhere\.pth: no such file"):
        load_head(tmp_path / "nowhere.pth")
    with pytest.raises(ModelError, match=r"nowhere\.pth: no such file"):
        Aesthetic(model=open_clip_folder, head=tmp_path / "nowhere.pth").check()


def test_a_file_of_another_type_is_refused(tmp_path, open_clip_folder, head_file):
    shutil.copy(head_file, tmp_path / "head.bin")
    with pytest.raises(ModelError, match=r"ends in \.pth or \.safetensors"):
        Aesthetic(model=open_clip_folder, head=tmp_path / "head.bin").check()


def test_a_broken_safetensors_file_is_found_without_loading_it(tmp_path, open_clip_folder):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"these are not weights")
    with pytest.raises(ModelError, match=r"broken\.safetensors: cannot be read as weights"):
        Aesthetic(model=open_clip_folder, head=path).check()
