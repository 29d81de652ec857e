# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportOperatorIssue=false
import json
from contextlib import nullcontext

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.trainers.conftest import draw
from trainers.batch import DataConfig
from trainers.data.buckets import BucketsConfig
from trainers.data.pairs import PairsConfig, check_pairs
from trainers.errors import DataError

HEADER = "image,caption,label,embedding\n"


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        draw(number).save(tmp_path / f"{number}.png")
        np.save(tmp_path / f"{number}.npy", np.full(3, number, np.float32))
    return tmp_path


def write(folder, text, name="pairs.csv"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return PairsConfig(path=folder / name, resolution=64)


def test_csv_and_jsonl_say_the_same(folder):
    table = HEADER + '0.png,"a zog, red",0 1.5 -2,0.npy\n1.png,a wug,1 0 0,1.npy\n'
    rows = [
        {"image": "0.png", "caption": "a zog, red", "label": [0, 1.5, -2], "embedding": "0.npy"},
        {"image": "1.png", "caption": "a wug", "label": [1, 0, 0], "embedding": "1.npy"},
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    first, second = write(folder, table).split().train, write(folder, lines, "pairs.jsonl").split().train
    for pair, other in zip(first, second, strict=True):
        assert (pair.key, pair.path, pair.prompt) == (other.key, other.path, other.prompt)
        assert (pair.label, pair.embedding) == (other.label, other.embedding)
    assert first[0].label == (0.0, 1.5, -2.0)
    assert first[0].prompt == "a zog, red"
    assert first[0].embedding == folder / "0.npy"


def test_it_is_a_kind_of_data(folder):
    config = write(folder, HEADER + "0.png,a zog,,\n")
    assert DataConfig.model_validate(config.model_dump()) == config


def test_columns_that_are_not_needed_may_be_left_out(folder):
    pair = write(folder, "caption,image\na zog,0.png\n").split().train[0]
    assert (pair.prompt, pair.label, pair.embedding) == ("a zog", None, None)


def test_paths_are_relative_to_the_table(folder):
    (folder / "tables").mkdir()
    config = write(folder, HEADER + "../0.png,a zog,,../0.npy\n", "tables/pairs.csv")
    pair = config.split().train[0]
    assert pair.path.samefile(folder / "0.png")
    assert pair.embedding.samefile(folder / "0.npy")


def test_a_mark_at_the_start_and_windows_line_ends_are_fine(folder):
    rows = write(folder, b"\xef\xbb\xbf" + (HEADER + "0.png,a zog,1,\n").replace("\n", "\r\n").encode()).rows()
    assert rows[0].label == (1.0,)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (HEADER + "0.png,a,,\nabsent.png,b,,\n", 3, "image 'absent.png' is no file"),
        (HEADER + "0.png,a,,\n,b,,\n", 3, "image '' is no file"),
        (HEADER + "0.png,a,,absent.npy\n", 2, "embedding 'absent.npy' is no file"),
        (HEADER + "0.png,a,,1.png\n", 2, "expected a file that ends in .npy or .safetensors"),
        (HEADER + "0.png,a,0 x,\n", 2, "label '0 x' is not a list of numbers"),
        (HEADER + "0.png,a,0 nan,\n", 2, "infinite or undefined"),
        (HEADER + "0.png,a,\n", 2, "expected 4 cells"),
        (HEADER + "0.png,a,,,\n", 2, "expected 4 cells"),
        ("image,label\n0.png,1\n", 2, "no caption"),
        ("image,caption,colour\n0.png,a,red\n", 2, "unknown column 'colour'"),
        (HEADER.encode() + b"0.png,a,,\n1.png,caf\xe9,,\n", 3, "not UTF-8"),
        (HEADER + '0.png,"a,,\n', 2, "not valid CSV"),
    ],
)
def test_a_bad_row_is_named(folder, text, line, message):
    with pytest.raises(DataError, match=rf"pairs\.csv, line {line}: .*{message}"):
        write(folder, text).check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "0.png", "caption": "a"}\n{"image": }', "line 2: not valid JSON"),
        ('\n["0.png", "a"]', "line 2: expected a mapping"),
        ('{"image": "0.png", "caption": 3}', "line 1: no caption"),
        ('{"image": 3, "caption": "a"}', "line 1: no image"),
        ('{"image": "0.png", "caption": "a", "label": 3}', "line 1: label 3 is not a list"),
        ('{"image": "0.png", "caption": "a", "embedding": 3}', "line 1: embedding 3 is no file"),
        ("", "no rows"),
    ],
)
def test_a_bad_line_is_named(folder, text, message):
    with pytest.raises(DataError, match=message):
        write(folder, text, "pairs.jsonl").check()


def test_a_missing_table_is_named(folder):
    with pytest.raises(DataError, match=r"absent\.csv: cannot be read"):
        PairsConfig(path=folder / "absent.csv", resolution=64).check()


def test_a_table_of_another_kind_is_refused(folder):
    with pytest.raises(DataError, match=r"expected a table of pairs in a \.csv or \.jsonl file"):
        write(folder, "", "pairs.txt").check()


def test_needs_of_a_method_are_checked_row_by_row(folder):
    rows = write(folder, HEADER + "0.png,a,0 1,0.npy\n1.png,b,0 1 2,1.npy\n2.png,c,,\n").rows()
    check_pairs(rows, None, None)
    check_pairs(rows[:1], 2, 3)
    for part, label, embedding, message in (
        (rows[:2], 2, 3, "line 3: the label has 3 numbers; expected 2"),
        (rows[2:], 2, None, "line 4: no label"),
        (rows, None, 3, "line 4: no embedding"),
        (rows[:1], None, 4, r"line 2: .*0\.npy has shape \(3,\); expected 4"),
    ):
        with pytest.raises(DataError, match=message):
            check_pairs(part, label, embedding)


@pytest.mark.parametrize(("tensors", "good"), [(1, True), (2, False)])
def test_headers_of_safetensors_are_looked_at_too(folder, tensors, good):
    save_file({str(i): np.zeros((1, 3), np.float32) for i in range(tensors)}, folder / "0.safetensors")
    rows = write(folder, HEADER + "0.png,a,,0.safetensors\n").rows()
    with nullcontext() if good else pytest.raises(DataError, match="line 2"):
        check_pairs(rows, None, 3)


@pytest.mark.parametrize("name", ["0.npy", "0.safetensors"])
def test_an_embedding_that_is_rubbish_is_named(folder, name):
    (folder / name).write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"line 2: .*cannot be read"):
        check_pairs(write(folder, HEADER + f"0.png,a,,{name}\n").rows(), None, 3)


def test_held_out_pictures_are_trained_on_in_no_row(folder):
    text = HEADER + "".join(f"{number}.png,{word},,\n" for number in range(4) for word in "ab")
    config = write(folder, text).model_copy(update={"holdout": 2})
    split = config.split()
    held_out = {pair.key for pair in split.held_out}
    assert len(held_out) == len(split.held_out) == 2
    assert len(split.train) == 4
    assert held_out.isdisjoint(pair.key for pair in split.train)


def test_another_table_may_say_what_to_judge_by(folder):
    write(folder, HEADER + "2.png,c,1 2,2.npy\n3.png,d,3 4,3.npy\n", "judged.csv")
    config = write(folder, HEADER + "0.png,a,,\n1.png,b,,\n").model_copy(update={"holdout_path": folder / "judged.csv"})
    config.check()
    split = config.split()
    assert [pair.prompt for pair in split.train] == ["a", "b"]
    assert [pair.label for pair in split.held_out] == [(1, 2), (3, 4)]
    assert [pair.prompt for pair in config.rows()] == ["a", "b", "c", "d"]


def test_a_bad_row_to_judge_by_is_named(folder):
    write(folder, HEADER + "absent.png,c,,\n", "judged.csv")
    config = write(folder, HEADER + "0.png,a,,\n").model_copy(update={"holdout_path": folder / "judged.csv"})
    with pytest.raises(DataError, match=r"judged\.csv, line 2: image 'absent.png'"):
        config.split()


def test_two_ways_to_hold_out_exclude_each_other(folder):
    with pytest.raises(ValueError, match="exclude each other"):
        PairsConfig(path=folder / "a.csv", resolution=64, holdout=1, holdout_path=folder / "b.csv")


def test_validation_needs_something_held_out(folder):
    with pytest.raises(ValueError, match=r"set data\.holdout"):
        PairsConfig(path=folder / "a.csv", resolution=64).check_validation()
    PairsConfig(path=folder / "a.csv", resolution=64, holdout=1).check_validation()


def test_more_held_out_than_there_are_pictures_is_an_error(folder):
    config = write(folder, HEADER + "0.png,a,,\n0.png,b,,\n").model_copy(update={"holdout": 1})
    with pytest.raises(DataError, match="1 pictures and holdout is 1"):
        config.check()


def test_a_broken_picture_is_not_held_out_but_reported(folder):
    (folder / "1.png").write_bytes(b"rubbish")
    text = HEADER + "".join(f"{number}.png,a,,\n" for number in range(4))
    config = write(folder, text).model_copy(update={"holdout": 3})
    with pytest.raises(DataError, match="after 1 that cannot be decoded"):
        config.split()
    with pytest.raises(DataError, match=r"1\.png"):
        config.model_copy(update={"strict": True}).check()


def test_pictures_may_keep_their_shapes(folder):
    draw(9, (64, 96)).save(folder / "0.png")
    config = write(folder, HEADER + "0.png,a,1,\n1.png,b,2,\n0.png,c,3,\n")
    shaped = config.model_copy(update={"buckets": BucketsConfig(step=16)})
    rows, square = shaped.split().train, config.split().train
    assert [(row.prompt, row.label, row.size) for row in rows] == [
        ("a", (1.0,), (80, 48)),
        ("b", (2.0,), (64, 64)),
        ("c", (3.0,), (80, 48)),
    ]
    assert [shaped.read(row).pixels.shape[2:] for row in rows] == [row.size for row in rows]
    assert rows[0].key == rows[2].key != square[0].key
    steps = [{rows[shaped.pick(rows, 0, step, 2 * step + place, 2)].size for place in range(2)} for step in range(9)]
    assert all(len(sizes) == 1 for sizes in steps)


def test_a_picture_is_read_as_a_square(folder):
    config = write(folder, HEADER + "0.png,a,,\n")
    picture = config.read(config.split().train[0])
    assert picture.pixels.shape == (1, 3, 64, 64)
    assert picture.geometry.original == (64, 80)
