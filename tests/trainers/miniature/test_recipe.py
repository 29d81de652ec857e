import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.encoders import ClipEncoders
from trainers.adapters.photomaker import read_checkpoint
from trainers.backbones.sana import SanaConfig
from trainers.backbones.sd import SdConfig
from trainers.backbones.sdxl import SdxlConfig
from trainers.cache import Cache
from trainers.faces.miniature import MiniatureFaceConfig
from trainers.miniature import recipe
from trainers.miniature.world import caption, subject

WEIGHTS = Path(recipe.__file__).parent / "weights"


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    """The recipe's command line; returns the manifest."""
    monkeypatch.setattr("sys.argv", ["recipe", str(folder), "--fraction", "0.0005", *options])
    recipe.main()
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
def test_a_shortened_recipe_makes_a_whole_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = run(tmp_path, monkeypatch)
    assert list(manifest["stages"]) == list(recipe.STAGES)
    assert manifest["sha256"] == recipe.hashes(tmp_path)
    started = manifest["stages"]["photomaker"]["started_from"]
    assert started["face/model.safetensors"] == manifest["sha256"]["face/model.safetensors"]
    assert manifest["stages"]["sana"]["quality"]["wrong_over_right"] > 0
    cpu, latents = torch.device("cpu"), (12, 8, 8)
    for config in (
        SdxlConfig(path=tmp_path / "sdxl"),
        SdxlConfig(path=tmp_path / "sdxl", denoiser=tmp_path / "refiner"),
        SdConfig(path=tmp_path / "sd"),
        SdConfig(path=tmp_path / "sd", denoiser=tmp_path / "sd_v", scheduler=tmp_path / "sd_v"),
        SanaConfig(path=tmp_path / "sana", max_sequence_length=48),
    ):
        config.check()
        assert config.load(cpu, torch.float32).latent_shape(64, 64) == latents
    MiniatureFaceConfig(path=tmp_path / "face").open(cpu)
    assert read_checkpoint(tmp_path / "photomaker.safetensors").lora_weights
    encoder = ClipEncoders(cpu, Cache(tmp_path / "cache")).clip(tmp_path / "clip")
    assert encoder.embed_prompts(["a zog"]).shape == (1, 64)


def test_a_single_member_is_made_from_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sdxl").symlink_to(WEIGHTS / "sdxl")
    (tmp_path / "manifest.json").write_text(json.dumps({"stages": {"sdxl": {"seed": 5}}}))
    manifest = run(tmp_path, monkeypatch, "--only", "refiner")
    assert manifest["stages"]["sdxl"] == {"seed": 5}
    assert manifest["stages"]["refiner"]["steps"] == {"refiner": recipe.STEPS["refiner"]}
    assert "refiner/unet/diffusion_pytorch_model.safetensors" in manifest["sha256"]
    assert not list(tmp_path.glob("*.ckpt"))
    assert SdxlConfig(path=tmp_path / "sdxl", denoiser=tmp_path / "refiner").stage == "refiner"


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
    assert sum(path.lstat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 60e6


@pytest.mark.parametrize("name", ["sd", "sd_v", "sana"])
def test_members_that_ship_know_right_captions_from_wrong_ones(name: str) -> None:
    quality = json.loads((WEIGHTS / "manifest.json").read_text())["stages"][name]["quality"]
    assert quality["wrong_over_right"] > 1.5
    assert quality["whole"] > 0.5


def test_judges_are_made_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = run(tmp_path, monkeypatch, "--only", "dino", "preference")
    assert set(manifest["stages"]) == {"dino", "preference"}
    assert not list(tmp_path.glob("*.ckpt"))
    encoders = ClipEncoders(torch.device("cpu"), Cache(tmp_path / "cache"))
    assert encoders.dino(tmp_path / "dino").width == 96
    assert encoders.clip(tmp_path / "preference", tmp_path / "preference" / "preference.pt").width == 48


def test_judges_that_ship_agree_with_the_drawings() -> None:
    stages = json.loads((WEIGHTS / "manifest.json").read_text())["stages"]
    assert stages["dino"]["quality"]["auc_others"] > 0.85
    assert stages["preference"]["quality"]["good_over_ruined"] > 0.8
    assert stages["preference"]["quality"]["good_over_wrong"] > 0.8
