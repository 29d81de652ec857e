"""What the repository promises about its own files."""

import ast
import re
from pathlib import Path

import pytest

from orchestrator.series import load_series
from orchestrator.spec import StudySpec

ROOT = Path(__file__).parents[1]
PACKAGES = ("orchestrator", "evaluation", "trainers")
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 50
FOREIGN = ("/" + "root/", "/" + "work/", "TO" + "DO", "FIX" + "ME")
"""Paths of somebody's machine, and promises."""


def files(*patterns: str) -> list[Path]:
    """Files of the repository, without what is installed or generated."""
    found = {path for pattern in patterns for path in ROOT.glob(pattern)}
    for top in (*PACKAGES, "studies", "tests", ".github", ".ci"):
        found |= {path for pattern in patterns for path in (ROOT / top).rglob(pattern)}
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


MODULES = files("*.py")
ELSEWHERE = {
    "dreambench.yaml": (
        "foreach.subject={kind: names, names: [dog]}",
        "trial.train.data.path=/dog",
        "trial.evaluate.prompts=[a dog]",
    )
}
"""What stands in for folders that are not in the repository."""
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


def test_every_link_of_every_page_leads_somewhere() -> None:
    dead: list[str] = []
    for page in files("*.md"):
        links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        local = [link for link in links if "://" not in link and not link.startswith(("#", "mailto:"))]
        dead += [f"{name(page)}: {link}" for link in local if not (page.parent / link.partition("#")[0]).exists()]
    assert dead == []


def mapped() -> set[str]:
    """Paths in README's file map; names after the first of a row stand in the same folder."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Files")[2].partition("\n## ")[0]
    found: set[str] = set()
    for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", row)
        found |= {first, *(str(Path(first).parent / other) + ("/" if other.endswith("/") else "") for other in others)}
    return found


def test_the_file_map_names_nothing_that_is_not_there() -> None:
    assert [path for path in sorted(mapped()) if not (ROOT / path).exists()] == []


def test_the_file_map_names_every_module() -> None:
    names = mapped()
    folders = tuple(path for path in names if path.endswith("/") and path.count("/") > 1)
    modules = [
        name(path) for path in MODULES if path.relative_to(ROOT).parts[0] in PACKAGES and path.name != "__init__.py"
    ]
    assert [path for path in modules if path not in names and not path.startswith(folders)] == []


def test_every_file_fits_its_budget() -> None:
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {path: length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_every_function_of_the_packages_fits_its_budget() -> None:
    long: list[str] = []
    for path in MODULES:
        if path.relative_to(ROOT).parts[0] in PACKAGES:
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
            long += [
                f"{name(path)}: {f.name}" for f in functions if (f.end_lineno or 0) - f.lineno >= MAX_FUNCTION_LINES
            ]
    assert long == []


@pytest.mark.parametrize("path", STUDIES, ids=name)
def test_a_study_loads_and_survives_a_round_trip(path: Path) -> None:
    for member in load_series(path, ELSEWHERE.get(path.name, ())).members:
        spec, _ = member.load()
        assert StudySpec.model_validate(spec.model_dump(mode="json")).model_dump() == spec.model_dump()


def test_every_file_speaks_of_the_project_alone() -> None:
    texts = files("*.py", "*.md", "*.yaml", "*.yml", "*.toml", "*.txt", "*.json", "*.csv", "*.log", "Makefile", "run")
    found = {name(path): [word for word in FOREIGN if word in path.read_text(encoding="utf-8")] for path in texts}
    assert {path: words for path, words in found.items() if words} == {}


def test_every_dependency_has_an_exact_version() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = set(re.findall(r'^  "([A-Za-z0-9_.-]+)>=', project, flags=re.MULTILINE))
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    plain = {re.sub(r"[-_.]+", "-", package).lower() for package in pinned}
    assert {"torch", "torchvision"} <= wanted
    assert {package for package in wanted if re.sub(r"[-_.]+", "-", package).lower() not in plain} == set()
