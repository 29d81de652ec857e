"""A random PhotoMaker on the tiny base, photos of two people, and what tests ask of them."""

import pytest
import torch

from tests.trainers.data.test_identity import FACE, build_people
from trainers.adapters.photomaker import Checkpoint, IdEncoder, IdSizes, write_checkpoint
from trainers.batch import Batch
from trainers.faces.miniature import build_network, save_network
from trainers.prompt import Prompt

FOUR = Batch(0, (0, 1, 2, 3), (0, 1, 2, 3))
WIDTH = 16 + 32
SIZES = IdSizes(
    hidden=8, mlp=12, layers=1, patch=8, image=16, projections=(5, 7), face=6, face_hidden=10, width=WIDTH, tokens=2,
    depth=1, inner=16, feedforward=20,
)  # fmt: skip
EVERYTHING = {
    "branch_adapters": True,
    "pose_adapt_ratio": 0.3,
    "ca_mixing_for_face": True,
    "face_embed_strategy": "id_embeds",
}


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session", name="checkpoint")
def checkpoint_fixture(tmp_path_factory):
    """A random PhotoMaker for the random base, its own LoRA included."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("photomaker") / "photomaker-v2.safetensors"
    place = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    lora = {f"{place}.lora_A.weight": tensor(2, WIDTH), f"{place}.lora_B.weight": tensor(32, 2, seed=1)}
    write_checkpoint(path, Checkpoint(IdEncoder(SIZES).state_dict(), lora))
    return path


@pytest.fixture(scope="session", name="face_folder")
def face_folder_fixture(tmp_path_factory):
    """A random face embedder that finds a face in every picture."""
    torch.manual_seed(1)
    network = build_network((4, 8), side=16, size=6)
    with torch.no_grad():
        network.answer.weight[6:] = 0
        network.answer.bias[6:] = torch.tensor([1.0, 0.25, 0.25, 0.75, 0.75])
    folder = tmp_path_factory.mktemp("face")
    save_network(folder, network)
    return folder


@pytest.fixture(name="people")
def people_fixture(tmp_path):
    build_people(tmp_path / "people")
    return tmp_path / "people"


@pytest.fixture(name="make")
def make_fixture(make_config, people, checkpoint, face_folder):
    def make(**changes):
        tree = {
            "kind": "photomaker",
            "data": {"kind": "identity", "path": str(people), "resolution": 64},
            "photomaker": str(checkpoint),
            "faces": {"kind": "miniature", "path": str(face_folder)},
        }
        return make_config(**{**tree, **changes})

    return make


@pytest.fixture(name="method")
def method_fixture(make, accelerator):
    return make().build(0, None, accelerator)


def shake(method):
    """Give everything that is trained a weight, as if it had been trained."""
    rng = torch.Generator().manual_seed(5)
    for name, trained in method.trained().items():
        if name != "id_encoder":
            for parameter in trained.parameters().values():
                parameter.data.normal_(0, 0.2, generator=rng)


def prompt(people, text="a man img in red", **changes):
    shown = {"image": people / "anna" / "1.png", "box": (20, 10, 50, 44), "image_box": tuple(FACE)}
    return Prompt(text=text, **{**shown, **changes})


def predict(model, prompts, times=(100, 100)):
    x_t = tensor(len(prompts), *model.latent_shape(64, 64), seed=3)
    with torch.no_grad():
        return model.denoise(x_t, torch.tensor(times[: len(prompts)]), model.prepare(prompts, 64, 64))
