"""The command `evaluate` on folders of pictures, with a small random CLIP; real photos where they are at hand."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from evaluation.evaluate import name_files
from evaluation.subjects import match_prompts, read_book
from orchestrator.__main__ import main
from orchestrator.sources import read_metrics
from tests.evaluation.conftest import build_dino, build_open_clip, noise
from trainers.errors import ConfigError

Command = Callable[..., tuple[int, str, str]]

PHOTOS = os.environ.get("DREAMBENCH")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two subjects of two prompts, their references, and what to measure with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.json").write_text(
        json.dumps({"subjects": ["cat", "duck toy"], "prompts": ["a <subject>", "a red <subject>"]})
    )
    for number, (folder, subject) in enumerate({"cat2": "cat", "duck_toy": "duck toy"}.items()):
        for root in ("good", "bad", "real"):
            (tmp_path / root / folder).mkdir(parents=True)
        noise(number).save(tmp_path / "real" / folder / "0.png")
        for place, words in enumerate((f"a {subject}", f"a red {subject}")):
            name = f"{place:04d}_{words}.png"
            noise(number).save(tmp_path / "good" / folder / name)
            noise(100 + 10 * number + place).save(tmp_path / "bad" / folder / name)
    return tmp_path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_open_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def evaluate(world: Path, clip: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    kinds = {"clip_i": "clip_image", "clip_t": "clip_text"}
    metrics = {name: {"kind": kind, "model": str(clip)} for name, kind in kinds.items()}
    (world / "metrics.yaml").write_text(yaml.safe_dump({"metrics": metrics}))

    def answer(*argv: str) -> tuple[int, str, str]:
        code = main(("evaluate", *argv, "--metrics", "metrics.yaml", "--output", "results"))
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return answer


GIVEN = ("--prompts", "prompts.json", "--references", "real")


def test_each_folder_is_a_line_of_the_summary_and_the_mean_of_its_records(
    evaluate: Command,
):
    code, out, _ = evaluate("bad", *GIVEN)
    rows = list(csv.DictReader(Path("results/evaluation_summary.csv").read_text().splitlines()))
    records = [json.loads(line) for line in Path("results/records.jsonl").read_text().splitlines()]
    assert code == 0
    assert "cat2 is 'cat'" in out
    assert list(rows[0]) == ["subject", "num_prompts", "CLIP-I", "CLIP-T"]
    assert [(row["subject"], row["num_prompts"]) for row in rows] == [("cat2", "2"), ("duck_toy", "2")]
    for row in rows:
        own = [record["values"]["clip_i"] for record in records if record["subject"] == row["subject"]]
        assert float(row["CLIP-I"]) == pytest.approx(np.mean(own), abs=1e-6)


def test_the_set_that_looks_like_its_references_is_better(evaluate: Command):
    code, out, _ = evaluate("bad", "good", *GIVEN)
    assert code == 0
    assert "clip_i: B is better than A" in out
    assert "pictures of 4 prompts" in out


def test_a_photo_is_not_compared_with_itself(evaluate: Command, world: Path):
    (world / "prompts.txt").write_text(
        "subject_name,class\ncat2,cat\nPrompts\n'a {0} {1}'.format(unique_token, class_token)\n"
        "Live Subject Prompts\n'a {0} {1}'.format(unique_token, class_token)\n"
    )
    noise(50).save(world / "real" / "cat2" / "1.png")
    code, out, _ = evaluate("real", "--prompts", "prompts.txt", "--photos")
    rows = list(csv.DictReader(Path("results/evaluation_summary.csv").read_text().splitlines()))
    assert code == 0
    assert "left out: duck_toy" in out
    assert [row["subject"] for row in rows] == ["cat2"]
    assert float(rows[0]["CLIP-I"]) < 0.999


def test_what_does_not_map_is_listed_and_the_rest_is_judged(evaluate: Command, world: Path):
    (world / "bad" / "vase").mkdir()
    noise(1).save(world / "bad" / "vase" / "0000_a_vase.png")
    noise(2).save(world / "bad" / "cat2" / "0002_a blue dog.png")
    (world / "bad" / "cat3").mkdir()
    (world / "real" / "duck_toy" / "0.png").unlink()
    code, out, _ = evaluate("bad", *GIVEN)
    assert code == 0
    assert "left out: cat3: no pictures in it" in out
    assert "left out: duck_toy: no pictures in" in out
    assert "left out: vase: no subject of that name" in out
    assert "left out: cat2/0002_a blue dog.png" in out


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("nothing there", "gone: no such folder"),
        ("empty", "empty: no pictures"),
        ("no prompts", "--prompts"),
        ("unmapped", "nothing can be judged: vase"),
        ("corrupt", "cannot be decoded"),
        ("no references", "got none"),
        ("of a class", "metric pres judges pictures of a trial's class_prompts"),
    ],
)
def test_bad_input_is_one_line(evaluate: Command, world: Path, capfd: pytest.CaptureFixture[str], how: str, part: str):
    (world / "empty").mkdir()
    (world / "other" / "vase").mkdir(parents=True)
    noise(1).save(world / "other" / "vase" / "a vase.png")
    if how == "corrupt":
        (world / "bad" / "cat2" / "0000_a cat.png").write_bytes(b"not a picture")
    if how == "of a class":
        tree = yaml.safe_load((world / "metrics.yaml").read_text())
        build_dino(world / "dino")
        tree["metrics"]["pres"] = {"kind": "prior_preservation", "model": str(world / "dino")}
        (world / "metrics.yaml").write_text(yaml.safe_dump(tree))
        capfd.readouterr()  # bars of the model that was saved
    source = {"nothing there": "gone", "empty": "empty", "unmapped": "other"}.get(how, "bad")
    given = {"no prompts": (), "no references": GIVEN[:2]}.get(how, GIVEN)
    code, _, err = evaluate(source, *given)
    assert code == 2
    assert err.count("\n") == 1, err
    assert part in err


@pytest.mark.skipif(not PHOTOS, reason="set DREAMBENCH to the folder of google/dreambooth's data set")
def test_every_folder_of_dreambench_has_a_line_of_the_summary(evaluate: Command):
    assert PHOTOS
    build_dino(Path("dino"))
    tree = yaml.safe_load(Path("metrics.yaml").read_text())
    tree["metrics"]["dino"] = {"kind": "dino", "model": "./dino"}
    Path("metrics.yaml").write_text(yaml.safe_dump(tree))
    code, out, _ = evaluate(PHOTOS, "--prompts", f"{PHOTOS}/prompts_and_classes.txt", "--photos")
    records = [json.loads(line) for line in Path("results/records.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader(Path("results/evaluation_summary.csv").read_text().splitlines()))
    assert code == 0
    assert "left out" not in out
    assert [row["subject"] for row in rows] == sorted(
        folder.name for folder in Path(PHOTOS).iterdir() if folder.is_dir()
    )
    assert list(rows[0]) == ["subject", "num_prompts", "CLIP-I", "CLIP-T", "DINO"]
    assert all(0 < float(row[column]) < 1 for row in rows for column in ("CLIP-I", "DINO"))
    assert {one["file"] for one in records} == {str(file) for file in Path(PHOTOS).resolve().glob("*/*.jpg")}


@pytest.mark.skipif(not PHOTOS, reason="set DREAMBENCH to the folder of google/dreambooth's data set")
def test_pictures_of_every_dreambench_prompt_are_found_again_by_their_names():
    assert PHOTOS
    for token in (None, "sks"):
        book = read_book(Path(PHOTOS) / "prompts_and_classes.txt", token)
        for prompts in book.subjects.values():
            files = [Path(file) for file in name_files(prompts, (0, 1)).values()]
            found, strange = match_prompts(files, prompts)
            assert not strange
            assert len(found) == len(files) == 50


HPO = Path(__file__).parents[2] / "studies" / "hpo.yaml"
SHORT = ("--draw", str(HPO), "--set", "evaluate.steps=1", "--set", "evaluate.seeds=[5]")


def test_the_untrained_model_is_drawn_with_and_scored_on_the_spot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(("evaluate", "base", "base", *SHORT, "--output", "found")) == 0
    printed = capfd.readouterr().out
    assert "A is the untrained model" in printed
    assert "clip_t: B is not clearly different from A: +0.0000" in printed
    for name in ("A", "B"):
        (row,) = csv.DictReader(Path("found", name, "evaluation_summary.csv").read_text().splitlines())
        records = [json.loads(line) for line in Path("found", name, "records.jsonl").read_text().splitlines()]
        assert (row["subject"], row["num_prompts"], len(records)) == ("panel", "8", 8)
        assert float(row["CLIP-T"]) == pytest.approx(np.mean([one["values"]["clip_t"] for one in records]), abs=1e-6)
        assert all(Path(one["file"]).is_file() for one in records)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (("nowhere", *SHORT), "expected an adapter"),
        (("base", *SHORT, "--prompts", "prompts.txt"), "got --prompts with --draw"),
        (("base", "--draw", "gone.yaml"), "no such file"),
    ],
)
def test_what_cannot_be_drawn_and_scored_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    part: str,
):
    monkeypatch.chdir(tmp_path)
    assert main(("evaluate", *argv)) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1, err
    assert part in err


@pytest.mark.parametrize("text", ["trial: null", "trial: 5", "trial: {evaluate: null}", "metrics: null"])
def test_a_file_without_metrics_is_refused_in_one_line(tmp_path: Path, text: str):
    file = tmp_path / "metrics.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"metrics\.yaml: metrics: .*; expected a mapping of names to metrics"):
        read_metrics(file, ())
