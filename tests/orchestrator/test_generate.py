"""The command `generate` on the miniature family."""

# pyright: basic

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from evaluation.subjects import match_prompts, read_book
from orchestrator.__main__ import main
from orchestrator.spec import load_study
from orchestrator.yaml import load
from trainers.method import MethodConfig
from trainers.rundir import RunDir, freeze, write_atomically

STUDY = Path(__file__).parents[2] / "studies" / "hpo.yaml"
BOOK = json.dumps({"subjects": ["cat", "duck toy"], "prompts": ["a <subject>", "a red <subject>"]})
FEW = ("--seeds", "3", "4", "--prompt", "a red star on a blue background", "--set", "evaluate.steps=2")


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trial's directory whose adapter is empty: it draws as the base does."""
    monkeypatch.chdir(tmp_path)
    spec, _ = load_study(STUDY)
    text, _ = freeze(spec.trial.model_dump(mode="json"))
    run = RunDir(tmp_path / "trial")
    write_atomically(run.trial, text)
    run.adapter.mkdir()
    return run.path


def pixels(folder: str, seed: int) -> np.ndarray:
    return np.asarray(Image.open(Path(folder) / f"0000_a-red-star-on-a-blue-background_{seed}.png"), np.int16)


def refusal(capfd: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(("generate", *argv)) == 2
    return capfd.readouterr().err


def test_a_prompt_is_drawn_once_with_each_seed_and_a_sheet_shows_all(trial: Path):
    assert main(("generate", str(STUDY), *FEW, "--output", "drawn")) == 0
    assert {path.name for path in Path("drawn").iterdir()} == {
        "0000_a-red-star-on-a-blue-background_3.png",
        "0000_a-red-star-on-a-blue-background_4.png",
        "grid.png",
    }
    assert np.abs(pixels("drawn", 3) - pixels("drawn", 4)).max() > 0


def test_how_pictures_are_drawn_can_be_changed_without_touching_the_trial(trial: Path):
    before = (trial / "trial.yaml").read_bytes()
    for name, scale in {"weak": 1, "strong": 6}.items():
        argv = ("generate", str(trial), "--base", *FEW, "--set", f"evaluate.guidance.scale={scale}", "--output", name)
        assert main(argv) == 0
    assert np.abs(pixels("weak", 3) - pixels("strong", 3)).max() > 8
    assert (trial / "trial.yaml").read_bytes() == before


def test_the_base_of_a_trial_is_the_studys_untrained_model(trial: Path):
    assert main(("generate", str(trial), "--base", *FEW, "--output", "trial_base")) == 0
    assert main(("generate", str(STUDY), *FEW, "--output", "study_base")) == 0
    assert np.abs(pixels("trial_base", 3) - pixels("study_base", 3)).max() <= 1


def test_an_adapters_folder_that_holds_none_is_refused(trial: Path, capfd: pytest.CaptureFixture[str]):
    assert "adapter" in refusal(capfd, str(trial), *FEW)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("nowhere",), "no such file"),
        (("trial", "--adapter", "nowhere"), "expected an adapter"),
        (("trial", "--base", "--scale", "0.5"), "without an adapter"),
        (("trial", "--prompts", "nowhere.txt"), "expected a file of prompts"),
        (("trial", "--prompts", "lines.txt", "--subject", "dog"), "names no subjects"),
        (("trial", "--prompts", "book.json"), "name one of cat, duck toy with --subject"),
        (("trial", "--prompts", "book.json", "--subject", "car"), "--subject car: no subject of that name"),
        (("trial", "--subject", "dog"), "without --prompts"),
        (("trial", "--prompt", ""), "got an empty --prompt"),
        (("waiting",), "neither an adapter nor a checkpoint"),
        (("trial", "--adapter", "foreign"), "which this model does not have"),
        (("trial", "--set", "evaluate.guidanze.scale=3"), "did you mean 'guidance'"),
        ((".",), "expected a trial's directory"),
        (("trial", "--base", "--seeds", "3", "-1"), "--seeds -1; expected whole numbers from 0"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is_loaded(
    trial: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], message: str
):
    monkeypatch.setattr(MethodConfig, "load_trained", lambda *_: pytest.fail("a model was loaded"))
    Path("lines.txt").write_text("a dog\n")
    Path("book.json").write_text(BOOK)
    shutil.copytree(trial, "waiting", ignore=shutil.ignore_patterns("adapter"))
    Path("foreign").mkdir()
    layer = "unet.mid_block.attentions.7.to_q.lora"
    matrices = {f"{layer}_A.weight": np.zeros((2, 8), np.float32), f"{layer}_B.weight": np.zeros((8, 2), np.float32)}
    save_file(matrices, "foreign/pytorch_lora_weights.safetensors")
    assert message in refusal(capfd, *argv)


def test_drawing_asks_for_no_training_data(trial: Path):
    gone = ("--set", "train.data.path=./gone", "--set", "evaluate.steps=1")
    assert main(("generate", str(trial), "--base", "--prompt", "a star", "--seeds", "3", *gone, "--output", "x")) == 0


def test_a_subjects_pictures_lie_in_its_folder_as_evaluate_reads_them(trial: Path):
    Path("book.json").write_text(BOOK)
    told = ("--prompts", "book.json", "--subject", "duck_toy", "--token", "zog", "--seeds", "0", "--set")
    assert main(("generate", str(trial), "--base", *told, "evaluate.steps=1", "--output", "drawn")) == 0
    files = sorted(Path("drawn/duck_toy").iterdir())
    assert [file.name for file in files] == ["0000_a-zog-duck-toy_0.png", "0001_a-red-zog-duck-toy_0.png"]
    found, strange = match_prompts(files, read_book(Path("book.json"), "zog").subjects["duck toy"])
    assert len(found) == 2
    assert not strange


@pytest.mark.slow
def test_a_running_trial_is_drawn_with_its_newest_checkpoint(trial: Path, capfd: pytest.CaptureFixture[str]):
    from trainers.train import build_accelerator, train

    short = {"steps": 4, "checkpoint_every": 2, "batch_size": 1, "schedule.warmup_steps": 0, "optimizer.lr": 0.01}
    sets = [f"trial.train.{name}={value}" for name, value in short.items()]
    spec, _ = load_study(STUDY, ["search=null", *sets])
    text, _ = freeze(spec.trial.model_dump(mode="json"))
    run = RunDir(Path("runs/hpo/trials/0000").resolve())
    write_atomically(run.trial, text)
    accelerator = build_accelerator(spec.trial.train)
    train(spec.trial.train, run, spec.trial.seed, None, accelerator)
    assert main(("generate", str(run.path), *FEW, "--output", "ended")) == 0
    run.adapter.rename("elsewhere")
    capfd.readouterr()
    assert main(("generate", str(run.path), *FEW, "--output", "running")) == 0
    assert "the newest checkpoint of" in capfd.readouterr().out.replace("\n", " ")
    assert np.abs(pixels("ended", 3) - pixels("running", 3)).max() <= 1
    assert main(("generate", str(run.path), "--base", *FEW, "--output", "base")) == 0
    assert np.abs(pixels("ended", 3) - pixels("base", 3)).max() > 8


def test_an_edited_trial_is_refused(trial: Path, capfd: pytest.CaptureFixture[str]):
    tree = load(trial / "trial.yaml").tree
    (trial / "trial.yaml").write_text(yaml.safe_dump(tree))
    assert "trial.yaml" in refusal(capfd, str(trial), "--base", *FEW)
