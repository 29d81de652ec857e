from pathlib import Path

import pytest
import torch

from trainers.adapters.photomaker import IdEncoder, read_checkpoint
from trainers.faces.miniature import build_network, save_network
from trainers.miniature.photomaker import build_id_encoder, train_photomaker

SDXL = Path(__file__).parents[3] / "trainers" / "miniature" / "weights" / "sdxl"


@pytest.mark.slow
def test_a_short_training_writes_a_checkpoint_in_the_published_layout(tmp_path):
    from trainers.miniature.portraits import crowd, save_people

    torch.manual_seed(0)
    network = build_network()
    with torch.no_grad():
        network.answer.weight[64] = 0
        network.answer.bias[64] = 1.0  # a face in every picture
    save_network(tmp_path / "face", network)
    (tmp_path / "sdxl").symlink_to(SDXL)
    save_people(tmp_path / "people", crowd(4, 0), 2, 0)
    train_photomaker(tmp_path, tmp_path / "people", tmp_path / "photomaker.safetensors", steps=2, seed=0)
    found = read_checkpoint(tmp_path / "photomaker.safetensors")
    encoder = IdEncoder.load(found.id_encoder, tmp_path)
    assert (encoder.sizes.face, encoder.sizes.width) == (64, 128)
    assert any(name.startswith("unet.") and name.endswith("lora.up.weight") for name in found.lora_weights)
    before = build_id_encoder(64, 128, 0).state_dict()
    changed = {
        name.split(".")[0]
        for name, value in encoder.state_dict().items()
        if not torch.equal(value, before[name].half().float())
    }
    assert {"vision_model", "qformer_perceiver", "fuse_module"} <= changed
