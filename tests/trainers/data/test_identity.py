# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

import trainers.data  # noqa: F401, registers the kinds
from trainers.batch import DataConfig, Geometry
from trainers.data.identity import IdentityConfig, check_people, find_trigger, others
from trainers.errors import DataError

WHITE = (255, 255, 255)
FACE = [20, 10, 52, 42]
ENTRY = {"text": "a woman img in red", "face_crop": FACE, "body_crop": [0, 0, 96, 64], "orig_image_size": [64, 96]}


def photo(number, size=(96, 64), box=FACE):
    image = Image.new("RGB", size, (10 * number, 40, 90))
    image.paste(WHITE, tuple(box))
    return image


def build_people(folder, people=("anna", "berta"), count=3, **changes):
    """`count` photos of each person in a subfolder, and their index."""
    index = {}
    for who, name in enumerate(people):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            file = f"{name}/{i}.png"
            photo(5 * who + i).save(folder / file)
            index[file] = {**ENTRY, **changes}
    write(folder, index)
    return index


def write(folder, index):
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def config(folder, **changes):
    return TypeAdapter(DataConfig).validate_python(
        {"kind": "identity", "path": str(folder), "resolution": 64, **changes}
    )


@pytest.fixture
def index(tmp_path):
    return build_people(tmp_path)


def bright(pixels):
    """Bounding box of what is white."""
    ys, xs = np.nonzero((pixels[0] > 0.9).all(0).numpy())
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def test_every_photo_comes_once_as_it_is_and_once_mirrored(tmp_path, index):
    split = config(tmp_path).split()
    assert len(split.train) == 12
    assert [example.path.name for example in split.train[:6]] == ["0.png", "1.png", "2.png"] * 2
    assert [example.framing.mirrored for example in split.train] == [False] * 6 + [True] * 6
    assert len({example.key for example in split.train}) == 12
    assert split.held_out == ()
    assert len(config(tmp_path, mirror=False).split().train) == 6


def test_the_box_is_where_the_face_is(tmp_path, index):
    data = config(tmp_path)
    for example in data.split().train:
        picture = data.read(example)
        assert picture.pixels.shape == (1, 3, 64, 64)
        assert bright(picture.pixels) == example.box


def test_a_mirrored_photo_is_the_other_way_round(tmp_path, index):
    data = config(tmp_path)
    examples = data.split().train
    plain, mirrored = (data.read(examples[i]).pixels for i in (0, 6))
    left, _, right, _ = examples[0].box
    assert examples[6].box[::2] == (64 - right, 64 - left)
    assert torch.equal(mirrored, plain.flip(-1))


def test_a_face_at_the_edge_is_kept_in_sight(tmp_path):
    for i in range(2):
        photo(i, (200, 64), (150, 10, 199, 50)).save(tmp_path / f"{i}.png")
    write(tmp_path, {f"{i}.png": {"text": "a man img", "face_crop": [150, 10, 199, 50]} for i in range(2)})
    data = config(tmp_path)
    example = data.split().train[0]
    assert bright(data.read(example).pixels) == example.box == (15, 10, 64, 50)


def test_one_photo_of_two_people_is_cut_around_each_and_cached_as_two(tmp_path, index):
    for name in ("anna/0.png", "berta/0.png"):
        photo(0, (200, 64)).save(tmp_path / name)
    write(tmp_path, {**index, "berta/0.png": {**ENTRY, "face_crop": [150, 10, 190, 50]}})
    data = config(tmp_path, mirror=False)
    anna, berta = (one for one in data.split().train if one.path.name == "0.png")
    assert data.read(anna).geometry.crop != data.read(berta).geometry.crop
    assert anna.key != berta.key


@pytest.mark.parametrize(
    "change", [{"face_crop": [22, 10, 54, 42]}, {"body_crop": [0, 0, 48, 32]}, {"orig_image_size": [128, 192]}]
)
def test_what_the_index_says_of_a_photo_is_part_of_its_key_and_not_of_what_is_held_out(tmp_path, index, change):
    before = config(tmp_path, holdout=2).split()
    write(tmp_path, {name: {**entry, **change} for name, entry in index.items()})
    after = config(tmp_path, holdout=2).split()
    for old, new in ((before.train, after.train), (before.held_out, after.held_out)):
        assert [one.path for one in old] == [one.path for one in new]
        assert not {one.key for one in old} & {one.key for one in new}


def test_who_it_is_comes_from_the_entry_or_else_the_subfolder(tmp_path, index):
    assert {example.identity for example in config(tmp_path).split().train} == {"anna", "berta"}
    write(tmp_path, {name: {**entry, "identity": "carla"} for name, entry in index.items()})
    assert {example.identity for example in config(tmp_path).split().train} == {"carla"}


def test_photos_in_no_subfolder_show_one_person(tmp_path):
    for i in range(3):
        photo(i).save(tmp_path / f"{i}.png")
    write(tmp_path, {f"{i}.png": ENTRY for i in range(3)})
    assert len({example.identity for example in config(tmp_path).split().train}) == 1


def test_the_reference_is_another_photo_of_the_same_person(tmp_path, index):
    examples = config(tmp_path).split().train
    for i, example in enumerate(examples):
        found = others(examples, i, len(examples))
        assert len(found) == 4  # two photos, each also mirrored
        assert {examples[j].identity for j in found} == {example.identity}
        assert example.path not in {examples[j].path for j in found}


def test_held_out_photos_are_not_trained_on_and_leave_two_of_each_person(tmp_path, index):
    split = config(tmp_path, holdout=2).split()
    assert {example.identity for example in split.held_out} == {"anna", "berta"}
    assert not {example.path for example in split.held_out} & {example.path for example in split.train}
    assert len(split.train) == 8
    with pytest.raises(DataError, match="2 photos can be held out"):
        config(tmp_path, holdout=3).split()


def test_sizes_are_the_pictures_or_those_of_the_picture_it_was_cut_from(tmp_path, index):
    cut = {**ENTRY, "body_crop": [100, 50, 292, 178], "orig_image_size": [400, 600]}
    write(tmp_path, {**index, "anna/1.png": cut, "anna/2.png": {"text": "a woman img", "face_crop": FACE}})
    data = config(tmp_path)
    whole, part, plain = (data.read(example).geometry for example in data.split().train[:3])
    assert plain == Geometry((64, 96), (0, 16), (64, 64))
    assert whole == plain
    assert part == Geometry((400, 600), (25, 66), (64, 64))  # 192 pixels of the larger picture became 96


def test_boxes_belong_to_the_upright_photo(tmp_path):
    for i in range(2):
        exif = Image.Exif()
        exif[274] = 6  # to be turned a quarter clockwise
        photo(i).rotate(90, expand=True).save(tmp_path / f"{i}.jpg", exif=exif, quality=100)
    write(tmp_path, {f"{i}.jpg": ENTRY for i in range(2)})
    data = config(tmp_path)
    example = data.split().train[0]
    assert example.framing.original == (64, 96)
    found = bright(data.read(example).pixels)
    assert all(abs(a - b) <= 1 for a, b in zip(found, example.box, strict=True))


def test_the_box_of_a_tiny_face_has_pixels(tmp_path, index):
    write(tmp_path, {name: {**ENTRY, "face_crop": [50, 20, 51, 21]} for name in index})
    left, top, right, bottom = config(tmp_path, min_face=1).split().train[0].box
    assert right > left
    assert bottom > top


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"face_crop": [20, 10, 120, 42]}, "face_crop is .* in a picture 96 wide and 64 high"),
        ({"face_crop": [-1, 10, 20, 42]}, "face_crop is"),
        ({"face_crop": [20, 10, 20, 42]}, "face_crop is"),
        ({"face_crop": [52, 10, 20, 42]}, "face_crop is"),
        ({"face_crop": [20, 10, 42]}, "face_crop"),
        ({"face_crop": None}, "face_crop"),
        ({"text": None}, "text"),
        ({"orig_image_size": [0, 5]}, "orig_image_size"),
    ],
)
def test_a_bad_entry_is_an_error_that_names_file_and_photo(tmp_path, index, change, message):
    write(tmp_path, {**index, "anna/1.png": {**ENTRY, **change}})
    with pytest.raises(DataError, match=rf"index\.json: 'anna/1\.png': {message}"):
        config(tmp_path).check()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a man in red", "0 times"),
        ("a man img and a woman img", "2 times"),
        ("img is a man", "does not follow the class word"),
        ("The person, img wearing red", "does not follow the class word"),
        ("a man imgs", "0 times"),
        ("a man img in red", None),
        ("a man img, in red", None),
    ],
)
def test_a_caption_names_its_person_once_after_the_class_word(tmp_path, index, text, complaint):
    found = find_trigger(text, "img")
    assert found is None if complaint is None else complaint in found
    write(tmp_path, {**index, "berta/0.png": {**ENTRY, "text": text}})
    if complaint is None:
        config(tmp_path).check_captions("img")
    else:
        with pytest.raises(DataError, match=r"index\.json: 'berta/0\.png': .*img"):
            config(tmp_path).check_captions("img")


def test_somebody_with_one_photo_is_an_error_that_names_them(tmp_path, index):
    write(tmp_path, {name: entry for name, entry in index.items() if name not in {"berta/0.png", "berta/1.png"}})
    with pytest.raises(DataError, match="usable photos of 'berta' to train on: 1; expected at least 2"):
        config(tmp_path).check()


def test_mirrored_copies_are_no_second_photo(tmp_path, index):
    examples = config(tmp_path).split().train
    anna = tuple(example for example in examples if example.path.parent.name == "anna" and example.path.name == "0.png")
    assert len(anna) == 2
    with pytest.raises(DataError, match="to train on: 1"):
        check_people(anna, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "not JSON"),
        ("{}", "not empty"),
        ("[]", "JSON object"),
        ('{"a": 1, "a": 2}', "'a' is"),
    ],
)
def test_an_index_that_is_none_is_an_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match=rf"index\.json: .*{message}"):
        config(tmp_path).check()


def test_a_photo_that_is_missing_is_an_error(tmp_path, index):
    (tmp_path / "anna" / "1.png").unlink()
    with pytest.raises(DataError, match=r"'anna/1\.png': no such file"):
        config(tmp_path).check()


def test_a_photo_that_is_rubbish_is_left_out_and_counted_unless_the_data_is_strict(tmp_path, index):
    (tmp_path / "anna" / "1.png").write_bytes(b"rubbish")
    split = config(tmp_path).split()
    assert [path.name for path in split.unreadable] == ["1.png"]
    assert len(split.train) == 10
    with pytest.raises(DataError, match=r"'anna/1\.png': not a picture"):
        config(tmp_path, strict=True).check()


def test_a_face_of_a_few_pixels_is_left_out_and_counted_unless_the_data_is_strict(tmp_path, index):
    index["anna/1.png"]["face_crop"] = [20, 10, 28, 18]
    write(tmp_path, index)
    split = config(tmp_path).split()
    assert [path.name for path in split.unreadable] == ["1.png"]
    assert len(split.train) == 10
    message = r"index\.json: 'anna/1\.png': the face is 8 x 8 pixels large at resolution 64; expected at least 16"
    with pytest.raises(DataError, match=message):
        config(tmp_path, strict=True).check()
    assert len(config(tmp_path, min_face=8).split().train) == 12


def test_how_large_a_face_is_counts_after_resizing(tmp_path, index):
    """Every face is 32 pixels large in photos 64 pixels high."""
    assert len(config(tmp_path, resolution=32, min_face=16).split().train) == 12
    with pytest.raises(DataError, match="the face is 16 x 16"):
        config(tmp_path, resolution=32, min_face=17, strict=True).check()


def test_an_index_that_is_not_utf8_is_named_with_its_line(tmp_path, index):
    lines = (tmp_path / "index.json").read_text().replace("}, ", "},\n").encode().split(b"\n")
    lines[2] = lines[2].replace(b"in red", b"in caf\xe9")
    (tmp_path / "index.json").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"index\.json, line 3: not UTF-8 text"):
        config(tmp_path).check()


def test_the_index_may_lie_elsewhere(tmp_path, index):
    (tmp_path / "index.json").rename(tmp_path / "other.json")
    assert len(config(tmp_path, index=str(tmp_path / "other.json")).split().train) == 12


def test_the_kind_is_registered():
    assert "identity" in DataConfig.kinds()
    assert IdentityConfig.model_fields["kind"].default == "identity"
