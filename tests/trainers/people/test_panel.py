import json

import pytest
import yaml
from PIL import Image
from pydantic import TypeAdapter

from trainers.errors import DataError
from trainers.people.panel import PanelFiles, main, read_panel
from trainers.prompt import Prompt


@pytest.fixture
def files(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("berta.png", "anna.jpg", "notes.txt"):
        if name.endswith("txt"):
            (tmp_path / "photos" / name).write_text("")
        else:
            Image.new("RGB", (64, 64)).save(tmp_path / "photos" / name)
    (tmp_path / "prompts.txt").write_text("a photo of a <class> in red\n\nthe <class> at sea\n")
    for name, tree in {
        "classes": {"anna": "woman", "berta": "girl"},
        "boxes": {
            "anna": [1, 2, 30, 40],
            "the girl i_berta.png": {"face_crop_old": [5, 5, 9, 9.4]},
            "berta": [0, 0, 8, 8],
        },
        "photo_boxes": {"anna": {"face_crop_new": [3, 3, 9, 9], "face_crop_old": [0, 0, 1, 1]}, "berta": [1, 1, 2, 2]},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    paths = {name: tmp_path / f"{name}.json" for name in ("classes", "boxes", "photo_boxes")}
    return PanelFiles(tmp_path / "photos", tmp_path / "prompts.txt", **paths)


def test_every_prompt_comes_with_every_photo(files):
    prompts = read_panel(files)
    assert [(prompt.image.name, prompt.text) for prompt in prompts] == [
        ("anna.jpg", "a photo of a woman img in red"),
        ("anna.jpg", "the woman img at sea"),
        ("berta.png", "a photo of a girl img in red"),
        ("berta.png", "the girl img at sea"),
    ]
    assert len({str(prompt) for prompt in prompts}) == 4


def test_boxes_are_those_of_the_prompt_or_else_of_the_person(files):
    prompts = read_panel(files)
    assert [prompt.box for prompt in prompts] == [(1, 2, 30, 40), (1, 2, 30, 40), (0, 0, 8, 8), (5, 5, 9, 9)]
    assert [prompt.image_box for prompt in prompts] == [(3, 3, 9, 9)] * 2 + [(1, 1, 2, 2)] * 2


def test_a_short_name_that_two_prompts_share_is_not_used(files):
    files.prompts.write_text("the <class> at sea\nthe <class> at home\n")
    assert read_panel(files)[2].box == (0, 0, 8, 8)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("classes", '{"anna": "woman"}', "no class word for 'berta'"),
        ("boxes", '{"anna": [1, 2, 3, 4]}', "no box for .* with 'berta'"),
        ("boxes", '{"anna": [1, 2, 3], "berta": [0, 0, 1, 1]}', "'anna': got"),
        ("boxes", '{"anna": [1, 2, 3, "x"], "berta": [0, 0, 1, 1]}', "'anna': got"),
        ("photo_boxes", "{}", "no box for 'anna'"),
        ("boxes", "[]", "JSON object"),
        ("boxes", "", "not JSON"),
        ("prompts", "a man\n", "expected <class> once"),
        ("prompts", "", "0 prompts"),
    ],
)
def test_what_is_missing_is_an_error_that_names_the_file(files, file, content, message):
    path = getattr(files, file)
    path.write_text(content)
    with pytest.raises(DataError, match=f"{path}.*{message}"):
        read_panel(files)


def test_the_command_writes_a_fragment_of_a_study(files, tmp_path):
    options = [f"--{name}={getattr(files, name)}" for name in ("classes", "boxes")]
    main([str(files.photos), str(files.prompts), *options, f"--output={tmp_path / 'panel.yaml'}"])
    tree = yaml.safe_load((tmp_path / "panel.yaml").read_text())
    prompts = TypeAdapter(tuple[Prompt, ...]).validate_python(tree["trial"]["evaluate"]["prompts"])
    assert [prompt.box for prompt in prompts] == [prompt.box for prompt in read_panel(files)]
    assert {prompt.image_box for prompt in prompts} == {None}
