# pyright: basic
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from orchestrator.spec import TrialSpec
from orchestrator.trained import place_adapter, train_once, training_key
from tests.orchestrator.studies import load
from tests.trainers.conftest import accelerator_fixture, build_pictures, build_sdxl, short_training  # noqa: F401
from trainers.cache import Cache
from trainers.errors import ConfigError, ModelError
from trainers.rundir import RunDir

ROOT = Path(__file__).parents[2]
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture
def make_trial(tmp_path: Path, model: Path) -> Callable[..., TrialSpec]:
    """A short trial; keywords replace keys of `train`."""
    pictures = build_pictures(tmp_path / "pictures")

    def make(seed: int = 0, adapter: Path | None = None, guidance: Any = None, **changes: Any) -> TrialSpec:
        train = {**short_training(model, pictures), "batch_size": 2, "log_every": 1}
        evaluate = {
            "prompts": ["a zog"],
            "resolution": 64,
            "metrics": {"clip_t": {"kind": "clip_text", "model": "/clip"}},
            "guidance": guidance or {"kind": "cfg"},
        }
        tree = {"seed": seed, "train": {**train, **changes}, "evaluate": evaluate, "adapter": adapter and str(adapter)}
        return TrialSpec.model_validate(tree)

    return make


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def steps_of(*runs: RunDir) -> list[int]:
    return [event["step"] for run in runs for _, event in run.read_events() if event["event"] == "train"]


class TestKey:
    def test_what_training_depends_on_changes_it(self, make_trial, cache):
        trials = [make_trial(), make_trial(seed=1), make_trial(steps=7), make_trial(lora={"rank": 2})]
        assert len({training_key(trial, cache) for trial in trials}) == len(trials)

    def test_how_pictures_are_drawn_does_not(self, make_trial, cache):
        drawn = make_trial(guidance={"kind": "cfg", "scale": -3.0})
        assert training_key(make_trial(), cache) == training_key(drawn, cache)

    @pytest.mark.parametrize("name", ["1.png", "1.txt"])
    def test_a_file_whose_contents_change_changes_it(self, make_trial, cache, tmp_path, name):
        before = training_key(make_trial(), cache)
        (tmp_path / "pictures" / name).write_bytes((tmp_path / "pictures" / f"2{Path(name).suffix}").read_bytes())
        assert training_key(make_trial(), cache) != before

    def test_a_folder_that_is_moved_does_not(self, make_trial, cache, tmp_path):
        before = training_key(make_trial(), cache)
        moved = tmp_path / "elsewhere"
        (tmp_path / "pictures").rename(moved)
        data = {"kind": "folder", "path": str(moved), "resolution": 64}
        assert training_key(make_trial(data=data), cache) == before


class TestTraining:
    def test_is_done_once_and_later_trials_find_it(self, make_trial, tmp_path, accelerator):
        trial, runs = make_trial(weak_fraction=0.5), [RunDir(tmp_path / name) for name in ("first", "second")]
        first, second = (train_once(trial, run, tmp_path / "t", tmp_path / "cache", accelerator) for run in runs)
        assert first == second
        assert [steps_of(run) for run in runs] == [[1, 2, 3, 4, 5, 6], []]
        assert {str(file.relative_to(first)) for file in first.rglob("*.safetensors")} == {LORA, f"weak/{LORA}"}
        assert not (first.parent / "checkpoints").exists()

    def test_that_diverges_is_nothing_a_sampler_could_avoid(self, make_trial, tmp_path, accelerator):
        trial = make_trial(optimizer={"kind": "adamw", "lr": 1e30})
        with pytest.raises(ConfigError, match="all trials share diverged"):
            train_once(trial, RunDir(tmp_path / "run"), tmp_path / "t", tmp_path / "cache", accelerator)

    @pytest.mark.slow
    def test_killed_in_the_middle_is_taken_over_by_another_trial_and_waited_for_by_a_third(
        self, make_trial, tmp_path, accelerator
    ):
        trial = make_trial(steps=40)
        expected = train_once(trial, RunDir(tmp_path / "whole"), tmp_path / "other", tmp_path / "cache", accelerator)
        file, folder = tmp_path / "trial.json", tmp_path / "t"
        file.write_text(trial.model_dump_json())
        runs = [RunDir(tmp_path / name) for name in ("killed", "second", "third")]

        def start(run: RunDir) -> subprocess.Popen[bytes]:
            words = map(str, (file, run.path, folder, tmp_path / "cache"))
            command = [sys.executable, "-m", "tests.orchestrator.training_process", *words]
            return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)

        killed = start(runs[0])
        while len(list(folder.glob("*/checkpoints/*.pt"))) < 2:
            time.sleep(0.01)
        killed.kill()
        killed.wait()
        others = [start(run) for run in runs[1:]]
        assert [other.wait() for other in others] == [0, 0]
        before, *after = (steps_of(run) for run in runs)
        (went_on,) = (steps for steps in after if steps)
        assert 1 < went_on[0] <= before[-1] + 1
        assert went_on == list(range(went_on[0], 41))
        (found,) = folder.glob("*/adapter")
        ours, theirs = load_file(found / LORA), load_file(expected / LORA)
        assert all((ours[name] == theirs[name]).all() for name in theirs)


class TestFinishedAdapter:
    @pytest.fixture
    def adapter(self, make_trial, tmp_path, accelerator) -> Path:
        trial = make_trial(steps=2, weak_fraction=0.5)
        return train_once(trial, RunDir(tmp_path / "run"), tmp_path / "t", tmp_path / "cache", accelerator)

    def check(self, trial: TrialSpec) -> None:
        assert trial.adapter
        trial.train.check_finished(trial.adapter, weak=trial.evaluate.guidance.needs_weak)

    def test_of_this_model_is_taken_with_its_weak_version(self, make_trial, adapter):
        self.check(make_trial(adapter=adapter))
        self.check(make_trial(adapter=adapter, guidance={"kind": "autoguidance"}))

    def test_without_a_weak_version_is_refused_where_guidance_needs_one(self, make_trial, adapter):
        (adapter / "weak" / LORA).unlink()
        self.check(make_trial(adapter=adapter))
        with pytest.raises(ModelError, match="weak"):
            self.check(make_trial(adapter=adapter, guidance={"kind": "autoguidance"}))

    def test_of_another_rank_is_refused(self, make_trial, adapter):
        with pytest.raises(ModelError, match=r"has rank 4 and train\.lora\.rank is 8"):
            self.check(make_trial(adapter=adapter, lora={"rank": 8}))

    @pytest.mark.parametrize(
        "change",
        [
            lambda name, value: (name.replace("unet.", "transformer."), value),
            lambda name, value: (name.replace("attn1", "attn9"), value),
            lambda name, value: (name, value.repeat(2, 2)),
        ],
    )
    def test_of_another_family_is_refused(self, make_trial, adapter, change):
        state = load_file(adapter / LORA)
        save_file(dict(change(name, value) for name, value in state.items()), adapter / LORA)
        with pytest.raises(ModelError, match="trained on the model"):
            self.check(make_trial(adapter=adapter))

    def test_that_is_cut_is_refused(self, make_trial, adapter):
        content = (adapter / LORA).read_bytes()
        (adapter / LORA).write_bytes(content[: len(content) // 2])
        with pytest.raises(ModelError, match="bytes, expected"):
            self.check(make_trial(adapter=adapter))

    def test_that_is_missing_is_refused(self, make_trial, tmp_path):
        with pytest.raises(ModelError, match="gone: no such folder"):
            self.check(make_trial(adapter=tmp_path / "gone"))

    def test_lies_in_the_trial_too_and_costs_no_disk(self, adapter, tmp_path):
        for _ in range(2):
            place_adapter(adapter, tmp_path / "trial" / "adapter")
        for name in (LORA, f"weak/{LORA}"):
            assert (tmp_path / "trial" / "adapter" / name).samefile(adapter / name)


class TestStudy:
    GUIDANCE = ("search=null", 'search={"evaluate.guidance.scale": {kind: float, low: 1.0, high: 9.0}}')

    def test_shares_training_if_its_search_leaves_training_alone(self, tmp_path):
        assert not load(tmp_path).shares_training
        assert load(tmp_path, *self.GUIDANCE).shares_training
        assert not load(tmp_path, *self.GUIDANCE, "trial.adapter=./a").shares_training

    def test_with_an_adapter_cannot_search_how_to_train(self, tmp_path):
        with pytest.raises(ConfigError, match="trained already"):
            load(tmp_path, "trial.adapter=./a")

    def test_with_one_training_for_all_has_nothing_to_prune(self, tmp_path):
        with pytest.raises(ConfigError, match=r"trial\.report"):
            load(tmp_path, *self.GUIDANCE, "trial.report={every: 50}")

    def test_without_a_search_has_one_trial(self, tmp_path):
        study = load(tmp_path, "search=null")
        assert (study.num_trials, study.defaults()) == (1, {})

    def test_does_not_search_a_path_that_is_null(self, tmp_path):
        assert list(load(tmp_path, "search.train.lora.rank=null").search) == ["train.optimizer.lr"]
