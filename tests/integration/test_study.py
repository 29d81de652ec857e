"""The main job from end to end, with nothing replaced: an untrained miniature family, torchrun, SQLite, MLflow."""

# pyright: basic

import json
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import yaml

from orchestrator.__main__ import main
from orchestrator.confirm import Confirmation
from trainers.miniature import recipe

STUDY = Path(__file__).parents[2] / "studies" / "hpo.yaml"

CANARY = "ca9a2b" * 6 + "bird"
"""As long as a key of W&B's."""
SECRETS = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default study, made short, on a family of models that learned nothing."""
    folder = tmp_path_factory.mktemp("study")
    recipe.make_generator(folder, seed=0, fraction=0.0005)
    recipe.make_scorers(folder, seed=0, fraction=0.0005)
    tree = yaml.safe_load(STUDY.read_text())
    train, evaluate = tree["trial"]["train"], tree["trial"]["evaluate"]
    train["backbone"]["path"] = str(folder / "sdxl")
    train["data"]["path"] = str(STUDY.parent / "data" / "zog")
    train["steps"] = 20
    evaluate |= {"steps": 2, "seeds": [0]}
    for metric in evaluate["metrics"].values():
        metric["model"] = str(folder / "clip")
    evaluate["metrics"]["aesthetic"]["head"] = str(folder / "aesthetic.safetensors")
    del tree["search"]["train.steps"]
    tree |= {"output": str(folder / "runs"), "confirm_seeds": 1, "limits": {"trials": 2}}
    tree["tracker"] = [{"kind": "mlflow"}, {"kind": "tensorboard"}, {"kind": "wandb"}]
    (folder / "hpo.yaml").write_text(yaml.safe_dump(tree))
    return folder / "hpo.yaml"


@pytest.fixture(scope="module")
def root(study: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as environment:
        for name in SECRETS:
            environment.setenv(name, CANARY)
        assert main(["run", str(study)]) == 0
        yield study.parent / "runs" / "hpo"


def test_every_trial_has_scores_pictures_and_an_adapter(root: Path) -> None:
    for number in range(2):
        run = root / "trials" / f"{number:04d}"
        result = json.loads((run / "result.json").read_text())
        assert set(result["scores"]) == {"clip_t", "clip_i", "aesthetic"}
        assert set(result["seconds"]) >= {"start", "load", "train", "sample", "score"}
        assert (run / "samples" / "grid.png").exists()
        assert (run / "adapter" / "pytorch_lora_weights.safetensors").exists()


def test_the_winner_is_written_down_and_was_compared_on_fresh_seeds(root: Path) -> None:
    best = yaml.safe_load((root / "best_params.yaml").read_text())
    (file,) = (root / "confirm").glob("*/confirmation.json")
    found = Confirmation.model_validate_json(file.read_text())
    assert found.winner == best["trial"] == found.standings[0].trial
    assert [one.name for one in found.standings[2:]] == ["base"]
    assert {one.trial for one in found.standings[:2]} == {0, 1}
    assert found.num_samples == 8
    assert len(file.with_name("confirmation.csv").read_text().splitlines()) == 4
    assert file.with_name("comparison.png").exists()


def test_running_a_finished_study_again_starts_nothing(root: Path, study: Path) -> None:
    before = sorted(path.name for path in (root / "trials").iterdir())
    assert main(["run", str(study)]) == 0
    assert sorted(path.name for path in (root / "trials").iterdir()) == before


def test_mlflow_has_one_run_for_each_trial_below_the_studys(root: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{root.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("hpo")
    assert experiment
    runs = client.search_runs([experiment.experiment_id], "tags.trial LIKE '%'")
    assert sorted(run.data.tags["trial"] for run in runs) == ["0", "1"]
    assert all("version.torch" in run.data.tags and "torch" not in run.data.tags for run in runs)
    assert all("train.optimizer.lr" in " ".join(run.data.params) for run in runs)


def test_secrets_of_the_environment_are_in_no_file_database_or_tracker(root: Path) -> None:
    files = [path for path in root.parent.rglob("*") if path.is_file()]
    kept = {"study.db", "mlflow.db", "log.txt", "trial.yaml", "result.json", "events.jsonl"}
    assert kept <= {path.name for path in files}
    assert {".wandb"} <= {path.suffix for path in files}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_a_trial_run_again_gives_the_same_scores(root: Path) -> None:
    assert main(["replay", str(root / "trials" / "0000")]) == 0
