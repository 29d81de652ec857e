import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.encoders import ClipEncoder, ClipEncoders
from tests.evaluation.conftest import CONTEXT, build_open_clip, build_tokenizer, noise
from trainers.cache import Cache
from trainers.errors import DataError, ModelError

CPU = torch.device("cpu")
PROMPT = "a red star on a blue background"


@pytest.fixture
def encoders(tmp_path):
    return ClipEncoders(CPU, Cache(tmp_path / "cache"))


@pytest.fixture(params=["open_clip", "transformers"])
def folder(request, open_clip_folder, transformers_folder):
    return open_clip_folder if request.param == "open_clip" else transformers_folder


def test_open_clip_embeddings_are_open_clips_own(encoders, open_clip_folder):
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{open_clip_folder}")
    tokens = build_tokenizer()([PROMPT], padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
    image = noise(0, (90, 70))
    with torch.no_grad():
        expected_image = model.eval().encode_image(preprocess(image)[None], normalize=True).numpy()
        expected_text = model.encode_text(tokens, normalize=True).numpy()
    encoder = encoders.clip(open_clip_folder)
    np.testing.assert_allclose(encoder.embed_images([image]), expected_image, atol=1e-6)
    np.testing.assert_allclose(encoder.embed_prompts([PROMPT]), expected_text, atol=1e-6)


def test_transformers_embeddings_are_clip_models_own(encoders, transformers_folder):
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(transformers_folder).eval()
    processor = CLIPImageProcessorPil.from_pretrained(transformers_folder)
    tokens = build_tokenizer()([PROMPT], padding=True, return_tensors="pt")
    image = noise(0, (90, 70))
    with torch.no_grad():
        out = model(**tokens, pixel_values=processor(images=image, return_tensors="pt").pixel_values)
    encoder = encoders.clip(transformers_folder)
    np.testing.assert_allclose(encoder.embed_images([image]), out.image_embeds.numpy(), atol=1e-6)
    np.testing.assert_allclose(encoder.embed_prompts([PROMPT]), out.text_embeds.numpy(), atol=1e-6)


def test_an_open_clip_folder_without_a_tokenizer_reads_prompts_as_openai_does(encoders, tmp_path):
    import open_clip

    folder = build_open_clip(tmp_path / "laion", own_tokenizer=False)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.no_grad():
        expected = model.eval().encode_text(open_clip.SimpleTokenizer()([PROMPT], CONTEXT), normalize=True)
    np.testing.assert_allclose(encoders.clip(folder).embed_prompts([PROMPT]), expected.numpy(), atol=1e-6)


def test_embeddings_are_unit_vectors_in_single_precision_even_under_autocast(encoders, folder):
    encoder = encoders.clip(folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = encoder.embed_images([noise(1), noise(2)])
        prompts = encoder.embed_prompts([PROMPT, "other"])
    assert images.dtype == prompts.dtype == np.float32
    assert images.shape == prompts.shape == (2, encoder.width)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([images, prompts]), axis=1), 1, atol=1e-6)
    outside = ClipEncoders(CPU, encoder._cache).clip(folder).embed_images([noise(1), noise(2)])
    np.testing.assert_array_equal(images, outside)


@pytest.fixture
def calls(monkeypatch):
    """How many pictures each pass through an image tower held."""
    sizes = []
    original = ClipEncoder._compute_images

    def counted(self, images):
        sizes.append(len(images))
        return original(self, images)

    monkeypatch.setattr(ClipEncoder, "_compute_images", counted)
    return sizes


def test_a_picture_is_embedded_once_however_often_it_is_asked_for(encoders, folder, calls):
    encoder = encoders.clip(folder)
    first = encoder.embed_images([noise(1), noise(2), noise(1)])
    again = encoders.clip(folder).embed_images([noise(2), noise(3)])
    assert calls == [2, 1]
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(again[0], first[1])


def test_pictures_with_equal_bytes_and_another_shape_are_different(encoders, folder, calls):
    image = noise(1, (64, 32))
    turned = Image.frombytes("RGB", (32, 64), image.tobytes())
    encoders.clip(folder).embed_images([image, turned])
    assert calls == [2]


def test_references_and_prompts_are_embedded_once_per_cache(folder, tmp_path, calls, monkeypatch):
    noise(5).save(tmp_path / "a.png")
    first = ClipEncoders(CPU, Cache(tmp_path / "cache")).clip(folder)
    references, prompts = first.embed_references([tmp_path / "a.png"]), first.embed_prompts([PROMPT])
    monkeypatch.setattr(ClipEncoder, "_compute_prompt", lambda *_: pytest.fail("a cached prompt was computed again"))
    (tmp_path / "a.png").rename(tmp_path / "renamed.png")
    second = ClipEncoders(CPU, Cache(tmp_path / "cache")).clip(folder)
    np.testing.assert_array_equal(second.embed_references([tmp_path / "renamed.png"]), references)
    np.testing.assert_array_equal(second.embed_prompts([PROMPT]), prompts)
    assert calls == [1]


def test_references_of_another_model_are_not_taken_from_the_cache(folder, tmp_path, open_clip_folder):
    noise(5).save(tmp_path / "a.png")
    cache = Cache(tmp_path / "cache")
    other = build_open_clip(tmp_path / open_clip_folder.name, seed=1)
    ours = ClipEncoders(CPU, cache).clip(folder).embed_references([tmp_path / "a.png"])
    theirs = ClipEncoders(CPU, cache).clip(other).embed_references([tmp_path / "a.png"])
    assert np.abs(ours - theirs).max() > 0.01


def test_references_are_decoded_as_training_pictures_are(encoders, folder, tmp_path):
    picture = noise(5)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    encoder = encoders.clip(folder)
    upright = encoder.embed_images([picture.transpose(Image.Transpose.ROTATE_270)])
    np.testing.assert_allclose(encoder.embed_references([tmp_path / "turned.png"]), upright, atol=1e-6)


def test_an_unreadable_reference_is_named(encoders, folder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"bad\.png"):
        encoders.clip(folder).embed_references([tmp_path / "bad.png"])


def test_the_model_is_named_by_its_contents(open_clip_folder, tmp_path):
    cache = Cache(tmp_path / "cache")
    name, _, digest = ClipEncoders(CPU, cache).clip(open_clip_folder).model.partition("@")
    assert name == "tiny-open-clip"
    assert len(digest) == 12
    copy = tmp_path / "elsewhere" / "tiny-open-clip"
    shutil.copytree(open_clip_folder, copy)
    assert ClipEncoders(CPU, cache).clip(copy).model == f"{name}@{digest}"
    config = copy / "open_clip_config.json"
    config.write_text(config.read_text().replace('"mean": [0.5', '"mean": [0.4'))
    assert ClipEncoders(CPU, cache).clip(copy).model != f"{name}@{digest}"


def test_a_prompt_that_does_not_fit_is_reported(encoders, folder, caplog):
    with caplog.at_level(logging.WARNING, logger="evaluation.encoders"):
        encoders.clip(folder).embed_prompts([PROMPT])
        encoders.clip(folder).embed_prompts(["x" * (CONTEXT - 2)])
        assert "tokens of the prompt" not in caplog.text
        encoders.clip(folder).embed_prompts(["x" * (CONTEXT - 1)])
    assert f"reads the first {CONTEXT} of {CONTEXT + 1} tokens of the prompt" in caplog.text


def test_weights_that_do_not_fit_their_config_are_refused(encoders, open_clip_folder, tmp_path):
    shutil.copytree(open_clip_folder, tmp_path / "clip")
    config = tmp_path / "clip" / "open_clip_config.json"
    config.write_text(config.read_text().replace('"embed_dim": 16', '"embed_dim": 24'))
    with pytest.raises(ModelError, match="open_clip cannot load this folder"):
        encoders.clip(tmp_path / "clip")


def test_truncated_weights_are_refused(encoders, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "clip")
    weights = next((tmp_path / "clip").glob("*model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load this folder"):
        encoders.clip(tmp_path / "clip")


def test_missing_tensors_are_never_replaced_by_random_ones(encoders, transformers_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(transformers_folder, tmp_path / "clip")
    weights = tmp_path / "clip" / "model.safetensors"
    state = load_file(weights)
    state.pop("visual_projection.weight")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing, the first is visual_projection\.weight"):
        encoders.clip(tmp_path / "clip")
