"""DreamBooth on photos: class pictures, a weak version, jobs killed with -9. DREAMBENCH names a copy of the data set.

Only that the machinery holds on real files is checked: the miniature model has never seen a photo.
"""

# pyright: basic

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from orchestrator.launcher import Job, JobState
from orchestrator.launchers.local import LocalLauncher
from orchestrator.spec import TrialSpec
from trainers.adapters.lora import LORA_FILE
from trainers.rundir import RunDir, freeze, write_atomically

DREAMBENCH = os.environ.get("DREAMBENCH")
WEIGHTS = Path(__file__).parents[2] / "trainers" / "miniature" / "weights"
CLASS_PICTURES, OWN = 40, 3
SECONDS = 300

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        DREAMBENCH is None,
        reason="set DREAMBENCH to the folder `dataset` of github.com/google/dreambooth to train on photos",
    ),
]


def build_trial(subject: str, kind: str, folder: Path) -> TrialSpec:
    """Some steps on a subject's photos; a few photos of another one of its class are what the user has of that."""
    tree = {
        "seed": 0,
        "train": {
            "kind": "dreambooth",
            "backbone": {"kind": "sd", "path": str(WEIGHTS / "sd")},
            "data": {
                "kind": "folder",
                "path": str(folder / subject),
                "resolution": 64,
                "instance_prompt": f"a photo of a sks {kind}",
                "holdout": 1,
            },
            "prior": {
                "prompt": f"a photo of a {kind}",
                "count": CLASS_PICTURES,
                "path": str(folder / "class"),
                "steps": 4,
            },
            "lora": {"rank": 4},
            "optimizer": {"kind": "adamw", "lr": 1e-3},
            "steps": 60,
            "batch_size": 4,
            "checkpoint_every": 10,
            "log_every": 5,
            "weak_fraction": 0.25,
        },
        "evaluate": {
            "prompts": [f"a photo of a sks {kind}"],
            "resolution": 64,
            "steps": 2,
            "scheduler": "ddim",
            "metrics": {"clip_i": {"kind": "clip_image", "model": str(WEIGHTS / "clip")}},
        },
    }
    return TrialSpec.model_validate(tree)


def prepare(subject: str, folder: Path) -> None:
    """Copy a subject's photos, and some of the next subject's as its class's."""
    assert DREAMBENCH
    photos = Path(DREAMBENCH) / subject
    shutil.copytree(photos, folder / subject)
    (folder / "class").mkdir()
    for photo in sorted((Path(DREAMBENCH) / "backpack").iterdir())[:OWN]:
        shutil.copy(photo, folder / "class" / photo.name)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def kill(run: RunDir) -> None:
    """End everything that works on a run, as a power cut would."""
    for process in psutil.process_iter():
        try:
            if str(run.path) in process.cmdline():
                process.kill()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue


def drawn(cache: Path) -> dict[str, int]:
    """Class pictures in the cache, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in cache.rglob("[0-9]*.png")}


def start(run: RunDir, spec: TrialSpec, cache: Path) -> Callable[[], bool]:
    """Launch a trial under torchrun; whether it has ended."""
    text, digest = freeze(spec.model_dump(mode="json"))
    write_atomically(run.trial, text)
    launcher = LocalLauncher(gpus=())
    arguments = (str(run.path), "--sha256", digest, "--cache", str(cache))
    job_id = launcher.submit(Job("orchestrator.worker", arguments, run.path))
    return lambda: launcher.poll(job_id) is JobState.ENDED


def die_when(happens: Callable[[], object], run: RunDir, spec: TrialSpec, cache: Path) -> None:
    """Start the job and kill it as soon as something has happened."""
    ended = start(run, spec, cache)
    wait_for(lambda: happens() or ended())
    assert not ended(), run.log.read_text()
    kill(run)
    wait_for(ended)
    assert not run.result.exists()
    assert not run.error.exists()


@pytest.mark.parametrize(
    ("subject", "kind", "while_drawing"), [("dog", "dog", True), ("cat", "cat", False), ("vase", "vase", False)]
)
def test_killed_jobs_end_with_the_weights_of_one_that_was_not(
    subject: str, kind: str, while_drawing: bool, tmp_path: Path
) -> None:
    prepare(subject, tmp_path)
    spec = build_trial(subject, kind, tmp_path)
    photos = {path: path.read_bytes() for path in tmp_path.rglob("*.jpg")}
    run, cache = RunDir(tmp_path / "run"), tmp_path / "cache"
    if while_drawing:
        die_when(lambda: len(drawn(cache)) >= 2, run, spec, cache)
        assert 2 <= len(drawn(cache)) < CLASS_PICTURES - OWN, "it was killed too late to show anything"
    before = drawn(cache)
    die_when(lambda: any(run.checkpoints.glob("step-*.pt")), run, spec, cache)
    after = drawn(cache)
    assert len(after) == CLASS_PICTURES - OWN, "as many as are missing"
    assert before.items() <= after.items(), "what was drawn is not drawn again"

    wait_for(start(run, spec, cache))
    assert run.result.exists(), run.log.read_text()
    assert "resuming after step" in run.log.read_text()
    assert drawn(cache) == after
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jpg")} == photos, "photos are only read"

    whole = RunDir(tmp_path / "whole")
    wait_for(start(whole, spec, cache))
    for name in (LORA_FILE, f"weak/{LORA_FILE}"):
        ours, theirs = load_file(run.adapter / name), load_file(whole.adapter / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), name
    full, weak = load_file(run.adapter / LORA_FILE), load_file(run.adapter / "weak" / LORA_FILE)
    assert any(not torch.equal(value, weak[key]) for key, value in full.items())
