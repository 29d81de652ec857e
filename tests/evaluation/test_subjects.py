import json
from pathlib import Path

import pytest

from evaluation.subjects import list_pictures, map_folders, match_prompts, read_book, read_table
from trainers.errors import ConfigError, DataError
from trainers.prompt import Prompt, Request

SUBJECTS = ("cat", "cat statue", "elephant statue", "duck toy", "teddy bear", "dog", "can", "backpack")
DREAMBENCH = """\
Classes

subject_name,class
rc_car,toy
dog2,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


def found(folder: str, **table: str) -> tuple[str, str] | str:
    result = map_folders([folder], SUBJECTS, table)
    return result.unmapped[folder] if result.unmapped else (result.mapped[0].subject, result.mapped[0].rule)


@pytest.mark.parametrize(
    ("folder", "subject", "rule"),
    [
        ("cat", "cat", "exact"),
        ("cat_statue", "cat statue", "spaces"),
        ("Cat-Statue", "cat statue", "spaces"),
        ("teddybear", "teddy bear", "spaces"),
        ("cat2", "cat", "variant"),
        ("dog7", "dog", "variant"),
        ("dogcd", "dog", "variant"),
        ("dog_cd", "dog", "variant"),
        ("cat_statue2", "cat statue", "variant"),
        ("duck_toy3", "duck toy", "variant"),
    ],
)
def test_a_folder_is_taken_for_the_subject_that_its_name_says(folder: str, subject: str, rule: str):
    assert found(folder) == (subject, rule)


@pytest.mark.parametrize("folder", ["candle", "catalogue", "backpack_dog", "doghouse", "clock", "fancy_boot", "2cat"])
def test_another_word_is_no_variant(folder: str):
    assert isinstance(found(folder), str)


def test_half_a_name_is_listed_with_the_whole_one():
    assert "'elephant statue'" in found("elephant")


def test_the_given_table_comes_first():
    assert found("cat2", cat2="dog") == ("dog", "table")


def test_a_table_cannot_name_a_subject_without_prompts():
    with pytest.raises(ConfigError, match="'cow'; expected one of cat"):
        found("cat2", cat2="cow")


def test_two_subjects_that_fit_equally_well_are_none():
    result = map_folders(["red_cat"], ["red cat", "red-cat"])
    assert "equally well" in result.unmapped["red_cat"]


def test_folders_of_one_subject_stay_apart():
    assert [one.folder for one in map_folders(["dog", "dog2", "dog7"], ["dog"]).mapped] == ["dog", "dog2", "dog7"]


def test_templates_are_filled_with_the_subject_and_a_rare_word_is_not_told_to_scorers(tmp_path: Path):
    path = tmp_path / "evaluation_prompts.json"
    path.write_text(json.dumps({"subjects": ["duck toy"], "prompts": ["a <subject> in snow", "a red <subject>"]}))
    assert [prompt.text for prompt in read_book(path).subjects["duck toy"]] == ["a duck toy in snow", "a red duck toy"]
    told = read_book(path, "sks").subjects["duck toy"][0]
    assert (told.text, told.shows) == ("a sks duck toy in snow", "a duck toy in snow")


def test_dreambenchs_file_puts_hats_on_live_subjects_alone(tmp_path: Path):
    path = tmp_path / "prompts_and_classes.txt"
    path.write_text(DREAMBENCH)
    book = read_book(path)
    assert [prompt.text for prompt in book.subjects["dog2"]] == ["a dog in the jungle", "a dog wearing a red hat"]
    assert [prompt.text for prompt in book.subjects["rc_car"]] == ["a toy in the jungle", "a cube shaped toy"]
    assert book.photos["rc_car"].text == "a photo of a toy"
    assert read_book(path, "sks").subjects["rc_car"][1].text == "a cube shaped sks toy"


def test_lines_are_prompts_for_every_folder(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("# mine\na zog\n\na red zog\na zog\n")
    assert [prompt.text for prompt in read_book(path).prompts] == ["a zog", "a red zog"]


@pytest.mark.parametrize("content", ["", "{}", '{"subjects": [], "prompts": ["a"]}', "subject_name,class\na,b\n"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: str):
    (tmp_path / "prompts").write_text(content)
    with pytest.raises(DataError, match="expected"):
        read_book(tmp_path / "prompts")


@pytest.mark.parametrize("content", ["folder,subject\nfelix,cat\nrex,dog\n", '{"felix": "cat", "rex": "dog"}'])
def test_a_table_is_lines_or_an_object(tmp_path: Path, content: str):
    (tmp_path / "table").write_text(content)
    assert read_table(tmp_path / "table") == {"felix": "cat", "rex": "dog"}


def test_a_table_says_everything_once(tmp_path: Path):
    (tmp_path / "table").write_text("felix,cat\nfelix,dog\n")
    with pytest.raises(DataError, match="twice"):
        read_table(tmp_path / "table")


def test_a_picture_shows_the_prompt_that_its_name_says():
    long = "a dog " + "very " * 40 + "far away"
    prompts = [Prompt(text="a sks dog", shows="a dog"), Prompt(text="a red dog, 2"), Prompt(text=long)]
    names = ["0041_a dog", "0003_a-red-dog-2_7", "a_red_dog_2", "0009_" + long[:100], "0001_a_cat", "00"]
    pictures, strange = match_prompts([Path(f"{name}.png") for name in names], prompts)
    assert {request: path.stem for request, path in pictures.items()} == {
        Request(prompts[0], 0): names[0],
        Request(prompts[1], 7): names[1],
        Request(prompts[1], 0): names[2],
        Request(prompts[2], 0): names[3],
    }
    assert [path.stem for path in strange] == names[4:]


def test_a_name_that_fits_two_prompts_fits_none():
    pictures, strange = match_prompts([Path("a_dog.png")], [Prompt(text="a dog"), Prompt(text="A dog!")])
    assert (pictures, len(strange)) == ({}, 1)


def test_hidden_files_and_texts_are_no_pictures(tmp_path: Path):
    for name in ("b.JPG", "a.png", ".c.png", "a.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_pictures(tmp_path)] == ["a.png", "b.JPG"]
