import pytest
import torch
from PIL import Image

from tests.contracts.face import FaceContract
from trainers.errors import ModelError
from trainers.faces.miniature import MiniatureFaceConfig, build_network, load_network, save_network


def bright_is_a_face(folder):
    """Random weights, except that a bright picture has a face in its middle and a dark one has none."""
    torch.manual_seed(0)
    network = build_network((4, 8), side=16, size=6)
    with torch.no_grad():
        network.answer.weight[6:] = 0
        network.answer.bias[7:] = torch.tensor([0.25, 0.25, 0.75, 0.75])
        # Without normalisation, and with all weights alike, brightness adds up.
        for block in network.seen[:2]:
            block[1] = torch.nn.Identity()
            block[0].weight.fill_(0.01)
            block[0].bias.zero_()
        network.answer.weight[6] = 1.0
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("face")


class TestMiniature(FaceContract):
    @pytest.fixture
    def config(self, folder):
        torch.manual_seed(0)
        save_network(folder, build_network((4, 8), side=16, size=6))
        return MiniatureFaceConfig(path=folder)

    @pytest.fixture
    def embedder(self, folder):
        from trainers.faces.miniature import MiniatureFace

        return MiniatureFace(bright_is_a_face(folder))

    @pytest.fixture
    def person(self):
        image = Image.new("RGB", (40, 40), (200, 200, 200))
        image.paste((255, 255, 255), (10, 10, 30, 30))
        return image

    @pytest.fixture
    def box(self):
        return (10, 10, 30, 30)

    @pytest.fixture
    def nobody(self):
        return Image.new("RGB", (40, 40), (0, 0, 0))

    def test_a_box_is_where_it_looks(self, embedder, person):
        whole, pointed = embedder.find(person), embedder.find(person, (10, 10, 30, 30))
        assert whole.box == (10, 10, 30, 30)
        assert pointed.box == (13, 13, 27, 27)  # the middle half of 6 .. 34

    def test_it_is_read_back(self, config, folder):
        embedder = config.open(torch.device("cpu"))
        assert embedder.size == 6
        assert {file.name for file in config.files()} == {"config.json", "model.safetensors"}
        network = load_network(folder)
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}

    def test_files_that_do_not_fit_are_an_error(self, config, folder, tmp_path):
        (tmp_path / "config.json").write_text('{"widths": [4, 8], "side": 16, "size": 9}')
        (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        with pytest.raises(ModelError, match=str(tmp_path)):
            load_network(tmp_path)
