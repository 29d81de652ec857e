"""Every shipped study with one mistake in it: an error in one line that says where, never a traceback."""

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.series import load_series
from trainers.errors import ConfigError

STUDIES = [
    study
    for study in sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))
    if study.stem != "dreambench"  # its folders do not ship, and that they are absent is said first
]
HPO = next(study for study in STUDIES if study.stem == "hpo")
EVERY = 13
"""One mistake in so many is tried; all of them take three minutes."""

Location = tuple[Any, ...]


class Mistake(NamedTuple):
    name: str
    location: Location
    tree: dict[str, Any]


def _places(node: Any, at: Location = ()) -> Iterator[tuple[Location, Any]]:
    listed = cast("list[Any]", node) if isinstance(node, list) else []
    below = cast("dict[Any, Any]", node) if isinstance(node, dict) else dict(enumerate(listed))
    for key, value in below.items():
        yield (*at, key), value
        yield from _places(value, (*at, key))


def _with(tree: dict[str, Any], at: Location, value: object, *, key: str | None = None) -> dict[str, Any]:
    """`tree` with `value` at `at`; or with what is there under another `key`."""
    tree = copy.deepcopy(tree)
    owner: Any = tree
    for part in at[:-1]:
        owner = owner[part]
    owner[at[-1] if key is None else key] = value if key is None else owner.pop(at[-1])
    return tree


def _misspelt(word: str) -> str:
    return word[:-2] + word[:-3:-1] if len(word) > 1 and word[-1] != word[-2] else word + "x"


def mistakes(tree: dict[str, Any]) -> Iterator[Mistake]:
    """Everything that is certainly wrong, at every place of a study."""
    for at, value in _places(tree):
        key = at[-1]
        if isinstance(key, str) and at[:-1] != ("trial", "evaluate", "metrics"):  # users name those as they like
            yield Mistake("a misspelt key", at, _with(tree, at, None, key=_misspelt(key)))
        if isinstance(value, dict):
            yield Mistake("an unknown key", at, _with(tree, (*at, "surprise"), 1))
            yield Mistake("a number for a mapping", at, _with(tree, at, 7))
            yield Mistake("a list for a mapping", at, _with(tree, at, []))
        else:
            yield Mistake("a mapping for a value", at, _with(tree, at, {"nonsense": 1}))
        if isinstance(value, list):
            yield Mistake("an empty list", at, _with(tree, at, []))
        if isinstance(value, str):
            yield Mistake("a number for a text", at, _with(tree, at, 3))
        if isinstance(value, str) and key == "kind":
            yield Mistake("an unknown kind", at, _with(tree, at, _misspelt(value)))
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield Mistake("a text for a number", at, _with(tree, at, "many"))
            yield Mistake("a list for a number", at, _with(tree, at, [value, value]))
            yield Mistake("no number", at, _with(tree, at, float("nan")))


def written(folder: Path, study: Path, tree: dict[str, Any]) -> Path:
    """`tree` as a file whose relative paths mean what they mean in `study`."""
    text = yaml.safe_dump(tree, sort_keys=False)
    for prefix in ("../", "./"):
        text = text.replace(f" {prefix}", f" {os.path.normpath(study.parent / prefix)}/")
    (path := folder / study.name).write_text(text)
    return path


def _named(location: Location, message: str) -> bool:
    """Whether the message says where: below `stages`, a stage is a study of its own."""
    section = location[2:] if location[0] == "stages" else location
    return len(section) < 2 or any(str(part) in message for part in section[:2])


def read(path: Path) -> None:
    """Every study of a file, as `run` and `plan` do first."""
    for member in load_series(path).members:
        member.load()


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.stem)
def test_one_mistake_ends_in_one_line_that_says_where_and_what_is_expected(tmp_path: Path, study: Path):
    tree = yaml.safe_load(study.read_text())
    tried = list(itertools.islice(mistakes(tree), len(study.stem) % EVERY, None, EVERY))
    assert tried
    for mistake in tried:
        with pytest.raises(ConfigError) as raised:
            read(written(tmp_path, study, mistake.tree))
        message = str(raised.value)
        assert "\n" not in message, (mistake.name, mistake.location)
        assert ".yaml" in message.partition(":")[0], message
        assert "expected" in message, message
        assert _named(mistake.location, message), (mistake.location, message)


_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
_TREES = st.recursive(
    _SCALARS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused_in_one_line(tmp_path: Path, data: st.DataObject):
    study = data.draw(st.sampled_from(STUDIES))
    tree = yaml.safe_load(study.read_text())
    at = data.draw(st.sampled_from([at for at, _ in _places(tree)]))
    path = written(tmp_path, study, _with(tree, at, data.draw(_TREES)))
    message = ""
    try:
        read(path)
    except ConfigError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1, message


def test_a_message_that_quotes_control_characters_is_still_one_line(tmp_path: Path):
    tree = yaml.safe_load(HPO.read_text())
    with pytest.raises(ConfigError, match=r"trial\.train\.\\r\\x1b\[2J: got an unknown key; expected one") as raised:
        read(written(tmp_path, HPO, _with(tree, ("trial", "train", "\r\x1b[2J"), None)))
    assert str(raised.value).isprintable()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.sampled_from("ab:-[]{}\"'#&*!|>%@`?, \n\t\u2028é\x00"), max_size=60))
def test_any_text_is_read_or_refused_in_one_line(tmp_path: Path, text: str):
    (path := tmp_path / "study.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        read(path)
    assert len(str(raised.value).splitlines()) == 1, str(raised.value)


@pytest.mark.slow
def test_the_command_line_says_a_mistake_in_one_line_and_starts_nothing(tmp_path: Path):
    tried = list(itertools.islice(mistakes(yaml.safe_load(HPO.read_text())), 3, None, 17))[:15]
    assert len(tried) == 15

    def call(numbered: tuple[int, Mistake]) -> subprocess.CompletedProcess[str]:
        (folder := tmp_path / str(numbered[0])).mkdir()
        command = [sys.executable, "-m", "orchestrator", "run", str(written(folder, HPO, numbered[1].tree))]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    with ThreadPoolExecutor(2) as pool:
        for answer in pool.map(call, enumerate(tried)):
            assert answer.returncode == 2
            assert answer.stderr.startswith("error: ")
            assert answer.stderr.count("\n") == 1
            assert answer.stdout == ""
    assert not any(tmp_path.rglob("study.db"))
