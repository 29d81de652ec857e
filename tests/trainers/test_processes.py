"""Two processes train what one does, whatever the method: one job of two runs all of them."""

# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportOperatorIssue=false

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.contracts.method import load_state
from tests.trainers.conftest import build_pictures
from tests.trainers.data.conftest import sample
from tests.trainers.data.test_identity import build_people
from tests.trainers.ip_adapters import EMBED, LABEL, write_pairs
from tests.trainers.models import build_sana
from tests.trainers.photomakers import checkpoint_fixture, face_folder_fixture  # noqa: F401, fixtures
from trainers.data.shards import write_shard
from trainers.method import MethodConfig
from trainers.rundir import RunDir
from trainers.train import build_accelerator, train

CASES = {
    "sdxl_lora": {"text_encoder_lora": {"rank": 2}, "gradient_checkpointing": True},
    # A batch that is no multiple of the processes, and everything that looks at training.
    "sdxl_lora looked at": {
        "batch_size": 5,
        "micro_batch_size": 2,
        "ema": {"decay": 0.9},
        "validation": {"every": 3, "draws": 3},
        "samples": {"every": 6, "prompts": ["a zog", "a dax", "a wug"], "resolution": 64, "steps": 2},
        "weak_fraction": 0.5,
    },
    # Three samples in one shard and two in the other.
    "sdxl_lora shards": {"data": "shards", "batch_size": 3, "validation": {"every": 3, "draws": 1}},
    "dreambooth": {"prior": {"prompt": "a star", "count": 3, "steps": 2}},
    "dreambooth sana": {"backbone": "sana"},
    # With two rows, one process has the subject's row alone and the other the row of matching.
    "pdmbooth": {"backbone": "sd", "pdm": {"prompt": "a star"}, "batch_size": 2},
    "ip_adapter": {"data": "pairs", "embed_to_token": EMBED, "label_to_token": LABEL, "joint_dropout": 0.5},
    # Often one process shows somebody and the other nobody.
    "photomaker": {
        "data": "identity",
        "photomaker": "checkpoint",
        "faces": "faces",
        "condition_dropout": 0.5,
        "train_id_encoder": True,
        "batch_size": 2,
    },
}

JOB = """
import sys
from pathlib import Path
import trainers.methods
from tests.trainers.test_processes import fingerprint
from trainers.method import MethodConfig
from trainers.rundir import RunDir
from trainers.train import build_accelerator, train

folder = Path(sys.argv[1])
for file in sorted(folder.glob("*.json")):
    config = MethodConfig.model_validate_json(file.read_text())
    accelerator = build_accelerator(config)
    run = RunDir(folder / file.stem / "two")
    result = train(config, run, 0, folder / file.stem / "cache", accelerator)
    (run.path / f"rank{accelerator.process_index}").write_text(fingerprint(result.method))
accelerator.end_training()
"""


def fingerprint(method):
    """The bits of everything that was trained."""
    values = [value for trained in method.trained().values() for value in trained.parameters().values()]
    return hashlib.sha256(b"".join(value.detach().numpy().tobytes() for value in values)).hexdigest()


def build_shards(folder):
    folder.mkdir()
    for name, numbers in {"train-0": range(3), "train-1": range(3, 5), "val-0": range(5, 7)}.items():
        write_shard(folder / f"{name}.tar", [sample(number) for number in numbers])
    mix = {"schedule": {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 6}}
    return {"kind": "shards", "train": f"{folder}/train-{{0..1}}.tar", "validation": f"{folder}/val-0.tar", "mix": mix}


@pytest.fixture(scope="module")
def places(tmp_path_factory, sdxl_folder, sd_folder, checkpoint, face_folder):
    """What cases name: models and data."""
    folder = tmp_path_factory.mktemp("world")
    build_people(folder / "people")
    pictures = str(build_pictures(folder / "pictures"))
    with pytest.MonkeyPatch.context() as patch:
        # Where it is remembered what shards hold.
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield named_places(folder, pictures, sdxl_folder, sd_folder) | {
            "photomaker": {"checkpoint": str(checkpoint)},
            "faces": {"faces": {"kind": "miniature", "path": str(face_folder)}},
        }


def named_places(folder, pictures, sdxl_folder, sd_folder):
    return {
        "backbone": {
            "sdxl": {"kind": "sdxl", "path": str(sdxl_folder)},
            "sd": {"kind": "sd", "path": str(sd_folder)},
            "sana": {"kind": "sana", "path": str(build_sana(folder / "sana")), "instruction": ""},
        },
        "data": {
            "folder": {"kind": "folder", "path": pictures, "holdout": 2},
            "shards": build_shards(folder / "shards"),
            "pairs": {"kind": "pairs", "path": str(write_pairs(folder / "pairs"))},
            "identity": {"kind": "identity", "path": str(folder / "people")},
        },
    }


def build_config(name, places):
    case = {"backbone": "sdxl", "data": "folder", **CASES[name]}
    named = {key: places[key][value] if key in places else value for key, value in case.items()}
    # Without such an eps Adam makes whole steps of tiny gradients, whose signs are rounding.
    optimizer = {"kind": "adamw", "lr": 1e-2, "eps": 1e-4}
    short = {"optimizer": optimizer, "steps": 6, "batch_size": 4, "checkpoint_every": 6}
    tree = {"kind": name.split()[0], **short, "log_every": 1, **named}
    return MethodConfig.model_validate({**tree, "data": {**tree["data"], "resolution": 64}})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, places):
    """Each case's training by one process and by two; the cache of the second is cold, too."""
    from accelerate.state import AcceleratorState

    import trainers.methods  # noqa: F401, registers the kinds

    folder = tmp_path_factory.mktemp("runs")
    configs = {name: build_config(name, places) for name in CASES}
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config.model_dump(mode="json")))
    (folder / "job.py").write_text(JOB)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    job = subprocess.Popen([sys.executable, *launcher, str(folder / "job.py"), str(folder)], env=environment)
    try:
        for name, config in configs.items():
            train(config, RunDir(folder / name / "one"), 0, None, build_accelerator(config))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        code = job.wait(timeout=500)
    assert code == 0
    return {name: (RunDir(folder / name / "one"), RunDir(folder / name / "two")) for name in CASES}


def events(run, kind):
    return [event for _, event in run.read_events() if event["event"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
class TestTwoProcesses:
    def test_have_equal_weights_in_the_end(self, runs, name):
        first, second = ((runs[name][1].path / f"rank{rank}").read_text() for rank in (0, 1))
        assert first == second

    def test_have_the_losses_of_one(self, runs, name):
        for kind in ("train", "validation"):
            alone, together = (events(run, kind) for run in runs[name])
            assert [event["step"] for event in alone] == [event["step"] for event in together]
            for i, (a, b) in enumerate(zip(alone, together, strict=True)):
                # The first step's are of equal weights.
                assert b["loss"] == pytest.approx(a["loss"], rel=1e-5 if kind == "train" and i == 0 else 1e-4)
        assert len(events(runs[name][1], "validation")) == (2 if "validation" in CASES[name] else 0)

    def test_have_the_weights_and_averages_of_one(self, runs, name):
        one, two = (load_state(run) for run in runs[name])
        for key, value in one["parameters"].items():
            torch.testing.assert_close(two["parameters"][key], value, atol=1e-4, rtol=1e-3, msg=key)
        for a, b in zip(one["averages"] or [], two["averages"] or [], strict=True):
            torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-3)

    def test_draw_and_export_everything_once(self, runs, name):
        one, two = runs[name]
        for event in events(two, "samples"):
            assert [(two.path / file).is_file() for file in event["files"]] == [True] * 3
        files = [
            {path.relative_to(run.path) for folder in (run.samples, run.adapter) for path in folder.rglob("*")}
            for run in (one, two)
        ]
        assert files[0] == files[1]
        assert (two.adapter / "weak").is_dir() == ("weak_fraction" in CASES[name])


def test_every_method_is_among_them():
    assert {name.split()[0] for name in CASES} == {*MethodConfig.kinds()}
