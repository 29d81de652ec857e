import json
import shutil

import pytest

from evaluation.clip_folder import read_clip_folder
from trainers.errors import ModelError


def test_an_open_clip_folder_is_recognised(open_clip_folder):
    folder = read_clip_folder(open_clip_folder)
    assert (folder.form, folder.width, folder.weights.name) == ("open_clip", 16, "open_clip_model.safetensors")
    assert "tokenizer.json" in {path.name for path in folder.files}


def test_a_transformers_folder_is_recognised(transformers_folder):
    folder = read_clip_folder(transformers_folder)
    assert (folder.form, folder.width, folder.weights.name) == ("transformers", 16, "model.safetensors")


def test_a_folder_of_both_forms_is_open_clips(transformers_folder, open_clip_folder, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(transformers_folder, both)
    shutil.copytree(open_clip_folder, both, dirs_exist_ok=True)
    assert read_clip_folder(both).weights.name == "open_clip_model.safetensors"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match="nowhere: no such folder; expected a CLIP model"):
        read_clip_folder(tmp_path / "nowhere")


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"neither open_clip_config\.json nor config\.json"):
        read_clip_folder(tmp_path)


@pytest.mark.parametrize(
    ("form", "file", "message"),
    [
        ("open_clip", "open_clip_model.safetensors", "weights missing; expected open_clip_model.safetensors or"),
        ("open_clip", "tokenizer.json", "tokenizer .* missing; expected vocab.json"),
        ("transformers", "model.safetensors", "weights missing; expected model.safetensors or pytorch_model.bin"),
        ("transformers", "preprocessor_config.json", "image preprocessing missing"),
        ("transformers", "tokenizer.json", "tokenizer .* missing"),
    ],
)
def test_a_missing_file_is_named(form, file, message, open_clip_folder, transformers_folder, tmp_path):
    source = open_clip_folder if form == "open_clip" else transformers_folder
    shutil.copytree(source, tmp_path / "clip")
    (tmp_path / "clip" / file).unlink()
    with pytest.raises(ModelError, match=message):
        read_clip_folder(tmp_path / "clip")


def test_weights_of_the_other_form_are_no_substitute(open_clip_folder, tmp_path):
    shutil.copytree(open_clip_folder, tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_model.safetensors").rename(tmp_path / "clip" / "model.safetensors")
    with pytest.raises(ModelError, match="weights missing"):
        read_clip_folder(tmp_path / "clip")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "`model_cfg` is missing"),
        ('{"model_cfg": {"text_cfg": {}}}', "needs `embed_dim` and `text_cfg`"),
    ],
)
def test_a_broken_open_clip_config_is_named(content, message, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        read_clip_folder(tmp_path)


def test_one_tower_alone_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    with pytest.raises(ModelError, match="model_type is 'clip_text_model', expected 'clip'"):
        read_clip_folder(tmp_path)
