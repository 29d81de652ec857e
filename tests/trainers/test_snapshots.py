"""Adapters of earlier steps, exported while training goes on."""

# pyright: basic, reportPrivateImportUsage=false

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from tests.contracts.method import InterruptionError, interrupt, weights
from trainers.adapters.lora import LORA_FILE
from trainers.loop import fit
from trainers.rundir import RunDir
from trainers.snapshots import SnapshotsConfig

FULL = {"kind": "dreambooth", "lora": None, "optimizer": {"kind": "adamw", "lr": 1e-3}}


def names(run):
    return sorted(path.name for path in run.snapshots.iterdir())


@pytest.fixture
def train(make_config, accelerator, tmp_path):
    def train(run, prepare=lambda method: None, **changes):
        config = make_config(**changes)
        method = config.build(0, None, accelerator)
        prepare(method)
        fit(method, config, RunDir(tmp_path / run), accelerator)
        return method, RunDir(tmp_path / run)

    return train


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every": 2}, [2, 4]),
        ({"every": 1, "keep": 2}, [4, 5]),
        ({"every": 2, "after": 2}, [4]),
        ({"every": 1, "after": 3, "keep": 9}, [4, 5]),
    ],
)
def test_folders_are_named_by_their_step_and_the_newest_stay(options, steps, tmp_path):
    config = SnapshotsConfig.model_validate(options)
    for step in range(1, 6):
        if config.due(step):
            config.write(lambda folder, step=step: (folder / "step").write_text(str(step)), tmp_path, step)
    assert {path.name: (path / "step").read_text() for path in tmp_path.iterdir()} == {
        f"step-{step:07d}": str(step) for step in steps
    }
    assert config.count(6) == len(steps)


def test_a_snapshot_is_what_diffusers_loads_of_that_step(train, sdxl_folder):
    history = {}

    def spy(method):
        method_losses = method.losses

        def noting(batch):
            history[batch.step] = weights(method)
            return method_losses(batch)

        method.losses = noting

    text = {"rank": 2, "alpha": 3.0}
    _, run = train("run", spy, snapshots={"every": 2}, text_encoder_lora=text)
    assert names(run) == ["step-0000002", "step-0000004"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, local_files_only=True)
    pipeline.load_lora_weights(run.snapshots / "step-0000004", adapter_name="default")
    loaded = {
        f"{name}.{key}": value
        for name in ("unet", "text_encoder", "text_encoder_2")
        for key, value in getattr(pipeline, name).named_parameters()
    }
    assert history[4]
    assert all(torch.equal(loaded[name], value) for name, value in history[4].items())
    assert not all(torch.equal(loaded[name], value) for name, value in history[2].items())


def test_a_model_that_is_trained_whole_has_snapshots_too(train, make_config, accelerator):
    _, run = train("run", snapshots={"every": 3}, **FULL)
    model = make_config(**FULL).load_trained(run.snapshots / "step-0000003", accelerator)
    assert not torch.equal(
        model.denoiser.conv_in.weight, make_config().load_trained(None, accelerator).denoiser.conv_in.weight
    )


def test_an_interrupted_run_ends_with_the_snapshots_of_one_that_was_not(train):
    _, whole = train("whole", snapshots={"every": 1, "keep": 3})
    with pytest.raises(InterruptionError):
        train("halves", lambda method: interrupt(method, 5), snapshots={"every": 1, "keep": 3})
    _, halves = train("halves", snapshots={"every": 1, "keep": 3})
    assert names(halves) == names(whole) == ["step-0000003", "step-0000004", "step-0000005"]
    for name in names(whole):
        ours, theirs = (load_file(run.snapshots / name / LORA_FILE) for run in (halves, whole))
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_snapshot_that_was_cut_short_is_made_again(tmp_path):
    (tmp_path / ".step-0000002.tmp").mkdir()
    (tmp_path / ".step-0000002.tmp" / "half").touch()
    SnapshotsConfig(every=2).write(lambda folder: (folder / "whole").touch(), tmp_path, 2)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "step-0000002",
        "step-0000002/whole",
    ]


@pytest.mark.parametrize("options", [{"every": 6}, {"every": 2, "after": 5}])
def test_snapshots_of_which_there_would_be_none_are_refused(make_config, options):
    with pytest.raises(ValueError, match="there is none; lower every or after"):
        make_config(snapshots=options)


def test_plan_counts_every_export(make_config):
    assert make_config(weak_fraction=0.5, snapshots={"every": 1, "keep": 3}).num_exports == 5
    assert make_config().num_exports == 1
