from pathlib import Path

import pytest
import yaml

from orchestrator.yaml import dump, load, merge
from trainers.errors import ConfigError


def write(folder: Path, text: str, name: str = "s.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-.5e+3", -500.0), ("1.", 1.0), ("300", 300), ("010", 10), ("-7", -7),
        ("0x1F", 31), ("0o17", 15), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"), ("'1e-4'", "1e-4"), ("1_000", "1_000"), ("e5", "e5"), (".", "."),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: object):
    found = load(write(tmp_path, f"a: [{text}]" if text else "a:")).tree["a"]
    found = found[0] if isinstance(found, list) else found
    if value == ".":
        value = str(tmp_path)
    assert found == value
    assert type(found) is type(value)


def test_paths_are_relative_to_the_file_that_says_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    write(tmp_path, "base: {path: ./data}\nhome: ~/models", "below/base.yaml")
    path = write(tmp_path, "extends: [below/base.yaml]\nown: ../other\nprompt: a.b/c")
    assert load(path).tree == {
        "base": {"path": str(tmp_path / "below" / "data")},
        "home": "/home/someone/models",
        "own": str(tmp_path.parent / "other"),
        "prompt": "a.b/c",
    }


def test_later_files_win_mappings_merge_and_lists_replace(tmp_path: Path):
    write(tmp_path, "a: {x: 1, y: [1, 2]}\nb: 1", "one.yaml")
    write(tmp_path, "a: {x: 2, z: 3}", "two.yaml")
    path = write(tmp_path, "extends: [one.yaml, two.yaml]\na: {y: [3]}")
    assert load(path).tree == {"a": {"x": 2, "y": [3], "z": 3}, "b": 1}


def test_a_changed_kind_replaces_what_is_below():
    below = {"guidance": {"kind": "cfg", "scale": 3}}
    assert merge(below, {"guidance": {"kind": "wig", "omega": 1}}) == {"guidance": {"kind": "wig", "omega": 1}}
    assert merge(below, {"guidance": {"kind": "cfg", "scale": 4}}) == {"guidance": {"kind": "cfg", "scale": 4}}
    assert merge(below, {"guidance": {"scale": 5}}) == {"guidance": {"kind": "cfg", "scale": 5}}


def test_every_value_knows_the_line_that_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a:\n  x: 1\n  y: 2", "one.yaml")
    document = load(write(tmp_path, "extends: [one.yaml]\n\na:\n  x: 3"), ["a.z=4"])
    assert document.where(("a", "x")) == "s.yaml:4"
    assert document.where(("a", "y")) == "one.yaml:3"
    assert document.where(("a", "z")) == "--set a.z=4"
    assert document.where(("nowhere",)) == "s.yaml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"s\.yaml:3: a: got a repeated key; expected each key once; the first is on line 1"),
        ("a: {b: 1, b: 2}", r"s\.yaml:1: a\.b: got a repeated key"),
        ("a: [1", r"s\.yaml:\d: got .*; expected valid YAML"),
        ("a: \t b: c", r"expected valid YAML"),
        ("- 1", r"s\.yaml: got list; expected a mapping at the top level"),
        ("a: .inf", r"s\.yaml:1: a: got \.inf; expected a finite number"),
        ("a: 1e999", r"s\.yaml:1: a: got 1e999; expected a finite number"),
        ("a: &x [*x]", r"s\.yaml:1: a.*got an alias of itself"),
        ("a: !!python/name:os.system x", r"expected valid YAML"),
        ("? [1]\n: 2", r"s\.yaml:1: .*got a key that is no scalar"),
        ("extends: base.yaml", r"s\.yaml:1: extends: got 'base.yaml'; expected a list of files"),
        ("extends: [gone.yaml]", r"gone\.yaml: got no such file or directory; expected a readable YAML file"),
        ("a: \x07", r"s\.yaml: got .*; expected valid YAML"),
    ],
)
def test_bad_yaml_is_located_in_one_line(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        load(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path):
    path = tmp_path / "s.yaml"
    path.write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="got not utf-8 text"):
        load(path)


def test_a_cycle_of_extends_is_named(tmp_path: Path):
    write(tmp_path, "extends: [b.yaml]", "a.yaml")
    write(tmp_path, "extends: [a.yaml]", "b.yaml")
    with pytest.raises(ConfigError, match=r"cycle: a\.yaml -> b\.yaml -> a\.yaml"):
        load(tmp_path / "a.yaml")


def test_an_empty_file_is_an_empty_mapping(tmp_path: Path):
    assert load(write(tmp_path, "# nothing")).tree == {}


def test_set_replaces_one_value_with_the_same_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "a: {x: 1, y: 2}\nl: [1]", "below/s.yaml")
    assert load(path, ["a.x=1e-4", "l=[2, no]", "p=./here", "n.m=", "a.k=a=b"]).tree == {
        "a": {"x": 1e-4, "y": 2, "k": "a=b"},
        "l": [2, "no"],
        "p": str(tmp_path / "here"),
        "n": {"m": None},
    }


def test_set_understands_the_dotted_keys_of_search(tmp_path: Path):
    path = write(tmp_path, "search:\n  train.lr: {kind: float, low: 1}")
    assert load(path, ["search.train.lr.low=2", "search.train.lora.rank={kind: int}"]).tree == {
        "search": {"train.lr": {"kind": "float", "low": 2}, "train.lora.rank": {"kind": "int"}}
    }


@pytest.mark.parametrize("assignment", ["a", "=1", "a..b=1", ".a=1"])
def test_a_set_without_path_and_value_is_refused(tmp_path: Path, assignment: str):
    with pytest.raises(ConfigError, match=r"expected dotted\.path=value"):
        load(write(tmp_path, "a: 1"), [assignment])


def test_a_bad_value_of_set_names_the_assignment(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--set a=\[1: got .*; expected valid YAML"):
        load(write(tmp_path, "a: 1"), ["a=[1"])


@pytest.mark.parametrize("value", ["1e5", "1e-4", "0o17", "no", "12:30", "0x1f", "null", "", "2026-01-01", 1e-5, 12])
def test_what_is_written_is_read_as_it_was_here_and_by_every_reader(tmp_path: Path, value: object):
    (tmp_path / "study.yaml").write_text(dump({"value": value}))
    assert load(tmp_path / "study.yaml").tree == {"value": value}
    assert yaml.safe_load((tmp_path / "study.yaml").read_text()) == {"value": value}


def test_a_message_masks_the_password_of_an_address_that_it_quotes():
    assert str(ConfigError("storage: got ['postgresql://me:secret@host/db']")) == (
        "storage: got ['postgresql://me:***@host/db']"
    )
