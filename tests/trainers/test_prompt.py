import pytest
import yaml
from pydantic import ValidationError

from trainers.config import Config
from trainers.prompt import Prompt
from trainers.rundir import freeze, thaw


class Panel(Config):
    prompts: tuple[Prompt, ...]


FULL = {
    "text": "a man img",
    "image": "/photos/anna/0.png",
    "label": [0.5, -1.0],
    "embedding": "/vectors/anna/0.npy",
    "box": [0, 0, 32, 40],
    "image_box": [8, 8, 60, 60],
}


def panel(text):
    return Panel.model_validate({"prompts": yaml.safe_load(text)}).prompts


def test_a_string_and_a_mapping_say_the_same():
    assert panel("[a red star]") == panel("[{text: a red star}]") == (Prompt(text="a red star"),)


def test_a_plain_prompt_is_written_as_a_string_and_any_other_as_a_mapping():
    told = panel(yaml.safe_dump(["a red star", FULL, {"text": "b", "label": [1]}]))
    dumped = Panel(prompts=told).model_dump(mode="json")["prompts"]
    assert dumped[0] == "a red star"
    assert {key: value for key, value in dumped[1].items() if key in FULL} == FULL
    assert dumped[2]["label"] == [1.0]


def test_prompts_come_back_from_a_frozen_trial(tmp_path):
    tree = {"prompts": ["a red star", "no: yes", FULL, {"text": "b", "label": [0.1]}]}
    told = Panel.model_validate(tree)
    text, digest = freeze(told.model_dump(mode="json"))
    (tmp_path / "trial.yaml").write_text(text)
    assert "- a red star\n" in text
    thawed = Panel.model_validate(thaw(tmp_path / "trial.yaml", digest))
    assert thawed == told
    assert freeze(thawed.model_dump(mode="json"))[1] == digest


def test_a_plain_prompt_is_named_by_its_words():
    assert str(Prompt(text="a red star")) == "a red star"


@pytest.mark.parametrize(
    "other",
    [
        {"image": "/photos/berta/0.png"},
        {"label": [0.5, -1.0000001]},
        {"embedding": "/vectors/anna/1.npy"},
        {"box": [0, 0, 32, 41]},
        {"image_box": [8, 8, 60, 61]},
        {"text": "a woman img"},
    ],
)
def test_prompts_that_differ_have_names_that_differ(other):
    assert str(Prompt.model_validate(FULL)) != str(Prompt.model_validate({**FULL, **other}))


@pytest.mark.parametrize("key", [key for key in FULL if key != "text"])
def test_every_detail_is_part_of_the_name(key):
    detailed = Prompt.model_validate({"text": "a man img", key: FULL[key]})
    assert not detailed.is_plain
    assert str(detailed) != "a man img"


def test_a_name_does_not_depend_on_where_files_lie_on_this_machine():
    moved = {key: f"/elsewhere{value}" if key in {"image", "embedding"} else value for key, value in FULL.items()}
    assert str(Prompt.model_validate(moved)) == str(Prompt.model_validate(FULL))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ""}, "at least 1 character"),
        ({"image": "photos/0.png"}, "expected a path that begins with"),
        ({"box": [5, 0, 5, 9]}, "left < right and top < bottom"),
        ({"image_box": [0, 9, 5, 3]}, "left < right and top < bottom"),
        ({"box": [0, 0, 5]}, "box"),
        ({"picture": "/a.png"}, "picture"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        Prompt.model_validate({**FULL, **changes})


def test_what_a_picture_shows_is_for_scorers_alone() -> None:
    prompt = Prompt(text="a picture", shows="a red star")
    assert prompt.is_plain
    assert str(prompt) == "a picture"
    assert Prompt.model_validate(prompt.model_dump()) == prompt
