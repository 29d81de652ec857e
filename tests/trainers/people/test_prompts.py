# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
import json

import pytest
import torch
from PIL import Image

from tests.contracts.method import weights
from tests.trainers.data.test_identity import write
from tests.trainers.photomakers import (  # noqa: F401, fixtures among them
    EVERYTHING,
    SIZES,
    checkpoint_fixture,
    face_folder_fixture,
    make_fixture,
    method_fixture,
    people_fixture,
    predict,
    prompt,
    shake,
    tensor,
)
from trainers.adapters.photomaker import Checkpoint, IdEncoder, write_checkpoint
from trainers.errors import ConfigError, DataError, ModelError
from trainers.faces.miniature import build_network, save_network
from trainers.prompt import Prompt


class TestPrompts:
    def test_an_embedding_made_before_takes_the_place_of_the_embedder(self, method, people, tmp_path):
        import numpy as np

        shake(method)
        np.save(tmp_path / "one.npy", tensor(6, seed=4).numpy())
        model = method.model
        told = prompt(people, embedding=tmp_path / "one.npy")
        given = predict(model, [told])
        model.faces = None
        assert torch.equal(predict(model, [told]), given)
        with pytest.raises(ConfigError, match=r"train\.faces"):
            predict(model, [prompt(people)])

    def test_an_embedding_of_another_length_is_named(self, method, people, tmp_path):
        import numpy as np

        np.save(tmp_path / "one.npy", tensor(512).numpy())
        with pytest.raises(DataError, match=r"one\.npy: the embedding of 1\.png has 512 numbers; expected 6"):
            method.model.prepare([prompt(people, embedding=tmp_path / "one.npy")], 64, 64)

    def test_without_a_box_the_face_is_looked_for(self, method, people):
        shake(method)
        found = method.model.faces.find(Image.open(people / "anna" / "1.png").convert("RGB"))
        looked = predict(method.model, [prompt(people, image_box=None)])
        image = prompt(people, image_box=found.box)
        assert looked.shape == predict(method.model, [image]).shape
        assert not torch.allclose(looked, predict(method.model, [prompt(people)]), atol=1e-4)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"box": None}, ConfigError, "set box"),
            ({"box": (0, 0, 65, 10)}, ConfigError, "not inside 64 x 64"),
            ({"label": (1.0,)}, ConfigError, r"photo\s+of a person"),
            ({"image": None}, ConfigError, r"photo\s+of a person"),
            ({"image": None, "box": None, "image_box": None}, ConfigError, r"photo\s+of a person"),
            (
                {"image_box": (0, 0, 97, 10)},
                DataError,
                r"1\.png: the box|image_box \(0, 0, 97, 10\) is not inside",
            ),
            ({"text": "a man in red"}, (ConfigError, DataError), "0 trigger words|stands 0 times"),
            ({"text": "a man img and a woman img"}, (ConfigError, DataError), "2 trigger words|stands 2 times"),
        ],
    )
    def test_what_cannot_be_drawn_is_an_error(self, method, people, changes, error, message):
        asked = [prompt(people, **changes)]
        for refuse in (method.model.prepare, lambda asked, *_: method.config.check_prompts(asked, 64)):
            with pytest.raises(error, match=message):
                refuse(asked, 64, 64)

    @pytest.mark.parametrize("name", ["image", "embedding", "more_images"])
    def test_a_file_that_is_not_there_is_found_before_training(self, make, people, name):
        gone = people / "gone.png"
        told = prompt(people, **{name: (gone,) if name == "more_images" else gone})
        with pytest.raises(DataError, match=r"the prompt 'a man img in red .*gone\.png"):
            make().check_prompts([told], 64)
        make().check_prompts([prompt(people), Prompt(text="a street")], 64)

    def test_without_an_embedder_a_face_must_be_known(self, make, people):
        with pytest.raises(ConfigError, match=r"set embedding and image_box, or train\.faces"):
            make(faces=None).check_prompts([prompt(people)], 64)

    def test_a_photo_without_a_face_is_an_error_that_names_it(self, method, people, monkeypatch):
        monkeypatch.setattr("trainers.faces.miniature.MiniatureFace.find", lambda self, image, box=None: None)
        with pytest.raises(DataError, match=r"anna/1\.png: no face found"):
            method.model.prepare([prompt(people)], 64, 64)

    def test_an_identity_is_pooled_from_all_photos_of_a_prompt(self, method, people):
        model, further = method.model, people / "anna" / "2.png"
        told = prompt(people)
        alone, both = (model.prepare([prompt(people, more_images=more)], 64, 64).extra for more in (None, (further,)))
        tokens = []
        for path, box in ((told.image, told.image_box), (further, None)):
            image = Image.open(path).convert("RGB")
            face = model.faces.find(image, box)
            tokens.append(model.identify(image, box or face.box, face.embedding))
        torch.testing.assert_close(alone["identity"], tokens[0].mean(1))
        torch.testing.assert_close(both["identity"], torch.cat(tokens, 1).mean(1))
        assert torch.equal(alone["latents"], both["latents"]), "branches look at the first alone"

    def test_pictures_of_other_shapes_can_be_drawn(self, method, people):
        shake(method)
        model = method.model
        condition = model.prepare([prompt(people)], 48, 96)
        x_t = tensor(1, *model.latent_shape(48, 96))
        with torch.no_grad():
            assert model.denoise(x_t, torch.tensor([100]), condition).shape == x_t.shape


class TestChecks:
    def test_a_good_configuration_passes(self, make):
        make().check()

    def test_captions_are_read_before_anything_starts(self, make, people):
        index = json.loads((people / "index.json").read_text())
        index["anna/0.png"]["text"] = "a man"
        write(people, index)
        with pytest.raises(DataError, match=r"index\.json: 'anna/0\.png'"):
            make().check()

    def test_a_missing_checkpoint_names_its_path(self, make, tmp_path):
        with pytest.raises(ModelError, match=r"train\.photomaker"):
            make(photomaker=str(tmp_path / "nothing.bin")).check()

    def test_some_source_of_embeddings_is_needed(self, make):
        with pytest.raises(ConfigError, match=r"train\.faces"):
            make(faces=None).check()

    def test_a_checkpoint_of_another_size_is_an_error(self, make, accelerator, tmp_path):
        from dataclasses import replace

        torch.manual_seed(0)
        write_checkpoint(tmp_path / "p.safetensors", Checkpoint(IdEncoder(replace(SIZES, width=32)).state_dict(), {}))
        with pytest.raises(ModelError, match="32 numbers"):
            make(photomaker=str(tmp_path / "p.safetensors")).build(0, None, accelerator)

    def test_a_face_embedder_of_another_length_is_an_error(self, make, accelerator, tmp_path):
        torch.manual_seed(1)
        save_network(tmp_path / "other", build_network((4, 8), side=16, size=7))
        faces = {"kind": "miniature", "path": str(tmp_path / "other")}
        with pytest.raises(ModelError, match=r"embeddings of 7 numbers, and train\.photomaker expects 6"):
            make(faces=faces).build(0, None, accelerator)

    @pytest.mark.parametrize(
        "changes", [{"lora": None}, {"text_encoder_lora": {"rank": 2}}, {"train_text_encoders": True}]
    )
    def test_only_adapters_of_the_unet_are_trained(self, make, changes):
        with pytest.raises(ValueError, match="adapters of the UNet alone"):
            make(**changes)

    def test_the_announced_number_of_trainable_weights_is_never_too_low(self, make, accelerator):
        config = make(branches=EVERYTHING)
        counted = sum(value.numel() for value in weights(config.build(0, None, accelerator)).values())
        assert counted <= config.num_trainable() <= counted * 1.3
