"""The command `generate` on the miniature family."""

# pyright: basic

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from orchestrator.__main__ import main
from orchestrator.spec import load_study
from orchestrator.yaml import load
from trainers.method import MethodConfig
from trainers.rundir import RunDir, freeze, write_atomically

STUDY = Path(__file__).parents[2] / "studies" / "hpo.yaml"
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
        (("trial", "--prompts", "nowhere.txt"), "expected prompts, one a line"),
        (("trial", "--set", "evaluate.guidanze.scale=3"), "did you mean 'guidance'"),
        ((".",), "expected a trial's directory"),
        (("trial", "--base", "--seeds", "3", "-1"), "--seeds -1; expected whole numbers from 0"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is_loaded(
    trial: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], message: str
):
    monkeypatch.setattr(MethodConfig, "load_trained", lambda *_: pytest.fail("a model was loaded"))
    assert message in refusal(capfd, *argv)


def test_drawing_asks_for_no_training_data(trial: Path):
    gone = ("--set", "train.data.path=./gone", "--set", "evaluate.steps=1")
    assert main(("generate", str(trial), "--base", "--prompt", "a star", "--seeds", "3", *gone, "--output", "x")) == 0


def test_an_edited_trial_is_refused(trial: Path, capfd: pytest.CaptureFixture[str]):
    tree = load(trial / "trial.yaml").tree
    (trial / "trial.yaml").write_text(yaml.safe_dump(tree))
    assert "trial.yaml" in refusal(capfd, str(trial), "--base", *FEW)
