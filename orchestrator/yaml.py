"""Study files: YAML 1.2 scalars, no duplicate keys, `extends:`, paths relative to the file that says them.

Later files win, mappings merge, lists and scalars replace, and a mapping that changes `kind` replaces the one below it.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from os import path as ospath
from pathlib import Path
from typing import Any, cast

import yaml

from trainers.errors import ConfigError

Tree = dict[str, Any]
Location = tuple[str | int, ...]

_ANCHORS = ("./", "../", "~/")
_SEARCH, _STAGES = "search", "stages"


@dataclass(frozen=True)
class Document:
    """A study as its files say it, and where each value was said."""

    tree: Tree
    origins: dict[Location, str] = field(default_factory=dict[Location, str])
    """Location in `tree` to `file:line`."""
    source: str = ""
    """The file that was asked for, as the user knows it."""

    def where(self, location: Location) -> str:
        """The `file:line` that says `location`, or its nearest parent."""
        for length in range(len(location), 0, -1):
            if (origin := self.origins.get(location[:length])) is not None:
                return origin
        return self.source


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema: `1e-4` is a number, `no` and `12:30` are strings."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever another version of YAML would not read as text: `1e5` is a number here, and `no` is not."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in yaml.SafeDumper.yaml_implicit_resolvers | _Loader.yaml_implicit_resolvers
}


def dump(tree: object) -> str:
    """`tree` as a study file, which means the same here and to every reader of YAML."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load(path: Path, sets: Iterable[str] = ()) -> Document:
    """Read `path` and, first, every file it extends; then apply each `dotted.path=value` of `sets`.

    Raises:
        ConfigError: A file cannot be read or is not valid YAML, a key is repeated, or `extends:` forms a cycle.
    """
    document = _load(Path(ospath.normpath(Path.cwd() / path)), ())
    for assignment in sets:
        document = assign(document, assignment)
    return document


def merge(base: Tree, override: Tree) -> Tree:
    """Deep merge; a mapping that changes `kind` replaces the one below it instead of merging."""
    out = dict(base)
    for key, value in override.items():
        old = out.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            below, above = cast("Tree", old), cast("Tree", value)
            changes_kind = "kind" in above and above["kind"] != below.get("kind")
            out[key] = above if changes_kind else merge(below, above)
        else:
            out[key] = value
    return out


def _load(path: Path, seen: tuple[Path, ...]) -> Document:
    name = _display(path)
    if path in seen:
        raise ConfigError(f"{name}: extends: forms a cycle: " + " -> ".join(p.name for p in (*seen, path)))
    reader = _Reader(name, path.parent)
    own = reader.read(_text(path, name))
    stages, origins = own.get(_STAGES), dict[Location, str]()
    for stage, tree in cast("Tree", stages).items() if isinstance(stages, dict) else ():
        if isinstance(tree, dict):
            at = (_STAGES, stage)
            below = _extended(cast("Tree", tree), at, reader, (*seen, path))
            own[_STAGES][stage] = merge(below.tree, cast("Tree", tree))
            origins |= {(*at, *location): origin for location, origin in below.origins.items()}
    below = _extended(own, (), reader, (*seen, path))
    return Document(merge(below.tree, own), {**below.origins, **origins, **reader.origins}, name)


def _extended(own: Tree, at: Location, reader: "_Reader", seen: tuple[Path, ...]) -> Document:
    """The files that `own`, at a place of the file last seen, extends; they are removed from it."""
    parents = own.pop("extends", [])
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in cast("list[object]", parents)):
        where = (*at, "extends")
        raise ConfigError(f"{reader.origins[where]}: {_dotted(where)}: got {parents!r}; expected a list of files")
    merged, origins = Tree(), dict[Location, str]()
    for parent in cast("list[str]", parents):
        below = _load(Path(ospath.normpath(reader.directory / Path(parent).expanduser())), seen)
        merged, origins = merge(merged, below.tree), {**origins, **below.origins}
    return Document(merged, origins)


def _text(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{name}: got {str(reason).lower()}; expected a readable YAML file") from error


def _display(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@dataclass
class _Reader:
    """Turns one YAML text into a tree, noting the line of every value."""

    name: str
    directory: Path
    below: Location = ()
    """Where the text belongs, for messages."""
    origins: dict[Location, str] = field(default_factory=dict[Location, str])

    def read(self, text: str) -> Tree:
        tree = self.value(text)
        if tree is None:
            return {}
        if not isinstance(tree, dict):
            raise ConfigError(f"{self.name}: got {type(tree).__name__}; expected a mapping at the top level")
        return cast("Tree", tree)

    def value(self, text: str) -> object:
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            return None if node is None else self._convert(loader, node, self.below, ())
        except yaml.MarkedYAMLError as error:
            where = self._at(error.problem_mark) if error.problem_mark else self.name
            raise ConfigError(f"{where}: got {error.problem or error.context}; expected valid YAML") from error
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"{self.name}: got {' '.join(str(error).split())}; expected valid YAML") from error

    def _convert(self, loader: _Loader, node: yaml.Node, where: Location, above: tuple[yaml.Node, ...]) -> Any:
        if node in above:
            raise ConfigError(
                f"{self._at(node.start_mark)}: {_dotted(where)}: got an alias of itself; expected a finite tree"
            )
        self.origins.setdefault(where, self._at(node.start_mark))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(loader, node, where, above)
        if isinstance(node, yaml.SequenceNode):
            return [self._convert(loader, n, (*where, i), (*above, node)) for i, n in enumerate(node.value)]
        return self._scalar(loader, node, where)

    def _mapping(
        self, loader: _Loader, node: yaml.MappingNode, where: Location, above: tuple[yaml.Node, ...]
    ) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if not isinstance(key_node, yaml.ScalarNode) or key in tree:
                first = f"; the first is on line {lines[key]}" if key in tree else ""
                problem = "a repeated key" if key in tree else "a key that is no scalar"
                at = f"{self._at(key_node.start_mark)}: {_dotted((*where, key))}"
                raise ConfigError(f"{at}: got {problem}; expected each key once{first}")
            lines[key] = key_node.start_mark.line + 1
            self.origins[*where, key] = self._at(key_node.start_mark)
            tree[key] = self._convert(loader, value_node, (*where, key), (*above, node))
        return tree

    def _scalar(self, loader: _Loader, node: Any, where: Location) -> object:
        if node.tag.endswith(":int") and node.value.lstrip("+-").isdigit():
            value: object = int(node.value)  # not YAML 1.1's octal: 010 is ten
        elif node.tag.endswith(":int"):
            value = int(node.value, 0)
        else:
            value = cast("object", loader.construct_object(node))
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(
                f"{self._at(node.start_mark)}: {_dotted(where)}: got {node.value}; expected a finite number"
            )
        return self._anchored(value) if isinstance(value, str) else value

    def _anchored(self, text: str) -> str:
        if not text.startswith(_ANCHORS) and text not in {".", "..", "~"}:
            return text
        return ospath.normpath(self.directory / Path(text).expanduser())

    def _at(self, mark: yaml.Mark) -> str:
        return self.name if self.below else f"{self.name}:{mark.line + 1}"


_PASSWORD = re.compile(r"(?<=:)[^:@/\s]+(?=@)|(?<=password=)[^&\s]+")
"""In an address; it was typed, and is not repeated."""


def assign(document: Document, assignment: str) -> Document:
    """The document with one `dotted.path=value` applied.

    Raises:
        ConfigError: It is written in another way.
    """
    name = f"--set {_PASSWORD.sub('…', assignment)}"
    dotted, separator, text = assignment.partition("=")
    if not separator or not all(dotted.split(".")):
        raise ConfigError(f"{name}: got {assignment!r}; expected dotted.path=value, for example trial.seed=1")
    location = _locate(document.tree, dotted)
    value = _Reader(name, Path.cwd(), location).value(text)
    tree: Any = value
    for part in reversed(location):
        tree = {part: tree}
    origins = {at: origin for at, origin in document.origins.items() if at[: len(location)] != location}
    return Document(merge(document.tree, tree), {**origins, location: name}, document.source)


def _locate(tree: Tree, dotted: str) -> tuple[str, ...]:
    """Split `dotted` into keys; keys that themselves hold dots (those of `search:`) are recognised."""
    parts, location, node = dotted.split("."), tuple[str, ...](), cast("object", tree)
    while parts:
        below = cast("Tree", node) if isinstance(node, dict) else {}
        lengths = range(len(parts), 0, -1)
        default = len(parts) if location[-1:] == (_SEARCH,) else 1
        length = next((n for n in lengths if ".".join(parts[:n]) in below), default)
        key, parts = ".".join(parts[:length]), parts[length:]
        location, node = (*location, key), below.get(key)
    return location


def _dotted(location: Location) -> str:
    return ".".join(map(str, location)) or "top level"
