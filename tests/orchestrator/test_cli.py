"""The command line in this process: bad input ends with one line and exit code 2, before any job starts."""

# pyright: basic

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from orchestrator import plan
from orchestrator.__main__ import main
from orchestrator.controller import Controller
from orchestrator.ledger import read_trials
from orchestrator.storage import controller_lock, open_study
from orchestrator.tables import short_names
from orchestrator.views import run_dir, trial_views
from tests.orchestrator.studies import TREE, build_world, load, score
from trainers.finished import LORA_FILE
from trainers.rundir import RunError

COMMANDS = ("run", "plan", "status", "best", "replay", "cancel", "submit", "move", "ui", "evaluate", "generate")


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Controller, "run", lambda self: pytest.fail("a job would have started"))
    return build_world(tmp_path)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    def answer(*argv: str) -> Answer:
        code = main(argv)
        said = capfd.readouterr()
        return Answer(code, said.out, said.err)

    return answer


def finish(folder: Path, *values: float) -> None:
    """Leave a study with scored trials behind."""
    spec = load(folder)
    with controller_lock(spec.root):
        study = open_study(spec)
        controller = Controller(spec, study)
        for value in values:
            trial = study.ask()
            params = {name: parameter.suggest(trial, name) for name, parameter in spec.search.items()}
            run = run_dir(spec.root, trial.number)
            trial.set_user_attr("sha256", controller._freeze(run, params))
            score(run, clip_t=value)
            study.tell(trial, value)


def refused(answer: Answer, *parts: str) -> None:
    assert answer.code == 2
    assert answer.err.count("\n") == 1, answer.err
    for part in ("error: ", *parts):
        assert part in answer.err, answer.err


@pytest.mark.parametrize(
    ("sets", "parts"),
    [
        (["trial.train.stpes=3"], ["trial.train.stpes: got an unknown key", "did you mean 'steps'?"]),
        (["launcher.kind=slrum"], ["got unknown kind 'slrum'; expected one of", "local"]),
        (["search.train.optimizer.lr.low=1"], ["search.train.optimizer.lr: got low 1.0, high 0.01"]),
        (["search.train.lora.rank.choices=[8, -1]"], ["got -1, which makes an invalid trial"]),
        (["search.train.lora.rnk={kind: int, low: 1, high: 2}"], ["got an unknown path", "train.lora.rank"]),
        (["trial.train.data.path=./gone"], ["study.yaml", "trial.train.data", "gone: no such folder"]),
        (["trial.train.backbone.path=./gone"], ["trial.train.backbone", "gone: no such folder"]),
        (["trial.evaluate.metrics.clip_t.model=./gone"], ["trial.evaluate", "metrics.clip_t", "gone: no such folder"]),
        (["trial.train.data.holdout=0"], ["trial.train.data", "got no held-out pictures"]),
        (["trial.train.data.resolution=60"], ["trial.train.data", "60", "multiples of 8"]),
        (
            ["trial.evaluate.prompts=[{text: a zog, label: [1, 2, 3]}]"],
            ["study.yaml", "trial.evaluate", "a zog (1 2 3)"],
        ),
        (["output=/proc/nowhere"], ["output", "expected a folder that can be written"]),
        (["launcher={kind: local, gpus: [7]}"], ["launcher.gpus", "got 7; expected"]),
        (["limits.trials=many"], ["limits.trials: got 'many'; expected"]),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_bad_values_are_refused(call: Any, world: Path, command: str, sets: list[str], parts: list[str]):
    arguments = [argument for assignment in sets for argument in ("--set", assignment)]
    refused(call(command, str(world), *arguments), *parts)


def damage(folder: Path, how: str) -> None:
    if how == "no pictures":
        for file in (folder / "pictures").glob("*.png"):
            file.unlink()
    elif how == "no caption":
        (folder / "pictures" / "2.txt").unlink()
    elif how == "no component":
        (folder / "sdxl" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    elif how == "no tokenizer":
        shutil.rmtree(folder / "sdxl" / "tokenizer_2")
    elif how == "no scoring weights":
        (folder / "clip" / "open_clip_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("no pictures", ["trial.train.data", "no pictures"]),
        ("no caption", ["trial.train.data", "1 of 4 pictures have no caption", "2.txt"]),
        ("no component", ["trial.train.backbone", "vae", "diffusion_pytorch_model.safetensors"]),
        ("no tokenizer", ["trial.train.backbone", "tokenizer_2"]),
        ("no scoring weights", ["trial.evaluate", "clip", "weights missing"]),
    ],
)
def test_missing_files_are_refused(call: Any, world: Path, how: str, parts: list[str]):
    damage(world.parent, how)
    refused(call("run", str(world)), "study.yaml:", *parts)


def test_a_duplicate_key_is_refused_with_its_line(call: Any, world: Path):
    world.write_text(world.read_text() + "name: again\n")
    refused(call("run", str(world)), "name: got a repeated key")


def test_a_missing_study_file_is_refused(call: Any, world: Path):
    refused(call("plan", "gone.yaml"), "gone.yaml: got no such file or directory")


def test_a_searched_path_that_does_not_exist_is_refused(call: Any, world: Path):
    choices = f"[{world.parent}/pictures, ./gone]"
    answer = call("run", str(world), "--set", f"search.train.data.path={{kind: categorical, choices: {choices}}}")
    refused(answer, "search.train.data.path", "gone: no such folder")


def test_too_little_disk_is_refused(call: Any, world: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20, 2**10))
    refused(call("run", str(world)), "got 1 KiB of free disk", "expected")
    assert "to compute" in call("plan", str(world)).out


def test_plan_shows_an_interval_that_was_not_told(call: Any, world: Path):
    search = "search={evaluate.guidance.scale: {kind: guidance_scale}}"
    assert "low=-10.0, high=10.0" in call("plan", str(world), "--set", search).out


def test_too_little_memory_is_refused(call: Any, world: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "_PROCESS_BYTES", 2**60)
    refused(call("run", str(world)), "of memory; expected", "fewer processes")


def test_gpus_are_those_that_nvidia_smi_lists(call: Any, world: Path, monkeypatch: pytest.MonkeyPatch):
    tool = world.parent / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0, 16384\necho 1, 16384\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{world.parent}:{os.environ['PATH']}")
    assert plan.gpu_bytes() == {0: 16384 * 2**20, 1: 16384 * 2**20}
    refused(call("plan", str(world), "--set", "launcher={kind: local, gpus: [0, 2]}"), "got 2; expected", "[0, 1]")
    refused(call("plan", str(world), "--set", "launcher={kind: local, num_processes: 3}"), "at most one a GPU")
    assert "device memory" in call("plan", str(world), "--set", "launcher={kind: local, gpus: [1]}").out


def test_a_changed_trial_in_an_existing_study_is_refused_and_named(call: Any, world: Path):
    finish(world.parent, 0.1)
    answer = call("run", str(world), "--set", "trial.train.steps=400", "--set", "search.train.optimizer.lr.high=0.02")
    refused(
        answer,
        "study.db",
        "search.train.optimizer.lr.high was 0.01 and is 0.02",
        "trial.train.steps was 300 and is 400",
    )


@pytest.mark.parametrize(
    "assignment", ["launcher={kind: local, num_processes: 2}", "limits.trials=1", "tracker.kind=none"]
)
def test_what_does_not_change_results_may_change(call: Any, world: Path, monkeypatch: Any, assignment: str):
    finish(world.parent, 0.1)
    monkeypatch.setattr(Controller, "run", lambda self: None)
    assert call("run", str(world), "--set", assignment).code == 0


def test_a_file_that_is_no_study_is_refused(call: Any, world: Path):
    folder = world.parent / "runs" / "t"
    folder.mkdir(parents=True)
    (folder / "study.db").write_text("something else entirely, and long enough to be looked at" * 50)
    refused(call("run", str(world)), "study.db", "expected a study's SQLite file")


def test_another_studys_file_is_refused(call: Any, world: Path):
    finish(world.parent, 0.1)
    (world.parent / "runs" / "t").rename(world.parent / "runs" / "other")
    refused(call("run", str(world), "--set", "name=other"), "got study 't'; expected 'other'")


def test_trials_without_their_storage_are_refused(call: Any, world: Path):
    finish(world.parent, 0.1)
    for file in (world.parent / "runs" / "t").glob("study.db*"):
        file.unlink()
    refused(call("run", str(world)), "study.db does not hold")


def test_a_second_controller_is_told_about_the_first(call: Any, world: Path):
    finish(world.parent, 0.1)
    with controller_lock(load(world.parent).root):
        refused(call("run", str(world)), f"process {os.getpid()} on {socket.gethostname()} since 20", "cancel")


@pytest.mark.parametrize("command", ["status", "best", "cancel"])
def test_a_study_that_was_never_run_is_refused(call: Any, world: Path, command: str):
    refused(call(command, str(world)), "study.db: got no study 't'", "python -m orchestrator run")


def test_plan_shows_the_first_trial_the_search_space_and_what_it_takes(call: Any, world: Path):
    answer = call("plan", str(world), "--trials", "5")
    assert answer.code == 0
    for part in ("lr: 0.001", "train.lora.rank", "choices=(4, 8, 16)", "5 of 5 trials", "1 x clip_t", "time: unknown",
                 "disk: at most", "memory of each process"):  # fmt: skip
        assert part in answer.out, answer.out
    assert not (world.parent / "runs").exists()


def test_plan_measures_when_trials_have_finished(call: Any, world: Path):
    finish(world.parent, 0.1, 0.2)
    answer = call("plan", str(world))
    assert "6 of 8 trials" in answer.out
    assert "time: 6 s a trial so far" in answer.out
    assert "the largest finished one" in answer.out


def test_status_shows_every_trial(call: Any, world: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orchestrator.command.out.width", 200)
    finish(world.parent, 0.1, 0.2)
    answer = call("status", str(world))
    assert answer.code == 0
    for part in ("2 of 8 trials", "complete", "0.2000±0.0100", "0.6000±0.0100", " lr ", " rank ", "0.001"):
        assert part in answer.out, answer.out


def test_what_is_shown_is_what_optuna_stored(world: Path):
    finish(world.parent, 0.1, -0.2)
    spec = load(world.parent)
    with controller_lock(spec.root):
        study = open_study(spec)
        controller = Controller(spec, study)
        controller._fail(study.ask(), RunError(reason="oom", message="20 GiB"))
        controller._fail(study.ask(), RunError(reason="data", message="gone"))
        study.ask()
        stored, shown = trial_views(spec, study), read_trials(spec)
    assert [replace(view, params={}) for view in shown] == [replace(view, params={}) for view in stored]
    assert [view.params for view in shown[:2]] == [view.params for view in stored[:2]]
    assert [view.state for view in shown] == ["COMPLETE", "COMPLETE", "PRUNED", "FAIL", "RUNNING"]


def test_parameters_are_named_by_as_few_words_as_tell_them_apart():
    assert short_names(["train.optimizer.lr", "train.lora.rank", "train.text_encoder_lora.rank", "seed"]) == [
        "lr", "lora.rank", "text_encoder_lora.rank", "seed",
    ]  # fmt: skip


def test_best_writes_the_winner(call: Any, world: Path):
    finish(world.parent, 0.1, 0.3, 0.2, 0.3)
    best = run_dir(load(world.parent).root, 1)
    answer = call("best", str(world))
    assert answer.code == 0
    assert "trial 1 is best: value 0.3" in answer.out
    assert f"generate {best.path}" in answer.out
    assert "load_lora_weights" not in answer.out  # there is no such file
    best.adapter.mkdir()
    (best.adapter / LORA_FILE).touch()
    assert "load_lora_weights" in call("best", str(world)).out
    content = yaml.safe_load((world.parent / "runs" / "t" / "best_params.yaml").read_text())
    assert content["trial"] == 1
    assert content["scores"]["clip_t"] == {"mean": 0.3, "standard_error": 0.01}
    assert content["adapter"].endswith("runs/t/trials/0001/adapter")
    assert set(content["params"]) == set(TREE["search"])


def test_best_of_a_study_without_scores_is_refused(call: Any, world: Path):
    finish(world.parent)
    refused(call("best", str(world)), "got no scored trial")


def test_replay_of_something_else_is_refused(call: Any, world: Path):
    refused(call("replay", str(world.parent)), "expected a scored trial")


def test_replay_of_an_edited_trial_is_refused(call: Any, world: Path):
    finish(world.parent, 0.1)
    trial = world.parent / "runs" / "t" / "trials" / "0000"
    (trial / "trial.yaml").write_text((trial / "trial.yaml").read_text() + "x: 1\n")
    refused(call("replay", str(trial)), "must not be edited")


def test_ui_of_a_study_without_tracker_is_refused(call: Any, world: Path):
    refused(call("ui", str(world)), "tracker")


def test_other_versions_are_warned_about_and_remembered(
    call: Any, world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    finish(world.parent, 0.1)
    monkeypatch.setattr("orchestrator.storage.versions", lambda: {"python": "4.0", "commit": "unknown"})
    finish(world.parent, 0.2)
    assert "the study goes on under other versions than before: python" in caplog.text
    from orchestrator.storage import read_study
    from orchestrator.views import study_view

    spec = load(world.parent)
    assert study_view(spec, read_study(spec)).tags["resumed_under_other_versions"] == "1"


def test_help_teaches_every_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert "--set trial.train.steps=500" in text


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["plan", "study.yaml"], ["status", "study.yaml"], ["best", "study.yaml"], ["plan", "gone.yaml"]],
)
def test_nothing_but_a_job_imports_torch(world: Path, arguments: list[str]):
    finish(world.parent, 0.1)
    code = (
        "import sys, json\nfrom orchestrator.__main__ import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'mlflow', 'accelerate', 'peft'}\n"
        "print(json.dumps(sorted(heavy & set(sys.modules))), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stderr.splitlines()[-1]) == []
