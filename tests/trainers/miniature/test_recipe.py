import hashlib
import json
from pathlib import Path

import pytest
import torch

from evaluation.encoders import ClipEncoders
from trainers.backbones.sdxl import SdxlConfig
from trainers.cache import Cache
from trainers.miniature import recipe
from trainers.miniature.world import caption, subject

WEIGHTS = Path(recipe.__file__).parent / "weights"


@pytest.mark.slow
def test_a_shortened_recipe_makes_a_whole_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["recipe", str(tmp_path), "--fraction", "0.001"])
    recipe.main()
    config = SdxlConfig(path=tmp_path / "sdxl")
    config.check()
    backbone = config.load(torch.device("cpu"), torch.float32)
    assert backbone.latent_shape(64, 64) == (12, 8, 8)
    encoder = ClipEncoders(torch.device("cpu"), Cache(tmp_path / "cache")).clip(tmp_path / "clip")
    assert encoder.embed_prompts(["a zog"]).shape == (1, 64)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert {"sdxl/unet/diffusion_pytorch_model.safetensors", "aesthetic.safetensors"} <= manifest["sha256"].keys()


def test_photos_come_with_captions(tmp_path: Path) -> None:
    scenes = recipe.subject_scenes("zog")[:3]
    recipe.save_photos(tmp_path, scenes, seed=0)
    assert (tmp_path / "00.txt").read_text().strip() == caption(subject("zog", "blue"))
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_the_weights_that_ship_are_those_of_the_manifest() -> None:
    manifest = json.loads((WEIGHTS / "manifest.json").read_text())
    files = {str(path.relative_to(WEIGHTS)): path for path in WEIGHTS.rglob("*") if path.is_file()}
    del files["manifest.json"]
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == manifest["sha256"]


def test_the_weights_that_ship_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 60e6
