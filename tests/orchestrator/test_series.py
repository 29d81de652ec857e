"""A file that holds several studies: subjects, stages, and what they take from one another."""

# pyright: basic

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from PIL import Image

from orchestrator.__main__ import main
from orchestrator.controller import Controller
from orchestrator.series import WINNER, Winner, load_series
from orchestrator.spec import load_study
from orchestrator.storage import read_study
from orchestrator.views import run_dir
from tests.orchestrator.cluster import Cluster, fail_with
from tests.orchestrator.studies import build_pictures, build_world, score, write_safetensors
from trainers.errors import ConfigError
from trainers.rundir import RunDir, thaw

SCALE = "evaluate.guidance.scale"
GUIDED: dict[str, Any] = {
    "extends": ["./study.yaml"],
    "name": "g",
    "trial": {"evaluate": {"guidance": {"kind": "cfg", "scale": 5.0}}},
    "search": {
        "train.optimizer.lr": None,
        "train.lora.rank": None,
        SCALE: {"kind": "float", "low": -2.0, "high": 10.0},
    },
    "sampler": {"kind": "golden_section"},
    "limits": {"trials": 8},
}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    build_world(tmp_path)
    for name in ("cat2", "dog", "red_robot"):
        build_pictures(tmp_path / "photos" / name)
    (tmp_path / "prompts.json").write_text(
        json.dumps({"subjects": ["cat", "dog", "red robot"], "prompts": [f"a <subject> {n}" for n in range(4)]})
    )
    return tmp_path


@pytest.fixture
def write(world: Path) -> Callable[..., Path]:
    """A file of several studies, beside the plain one that it extends."""

    def write(tree: dict[str, Any], **changes: Any) -> Path:
        path = world / "several.yaml"
        path.write_text(yaml.safe_dump({**tree, **changes}, sort_keys=False))
        return path

    return write


@pytest.fixture
def jobs(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Jobs end at once, with what the parameters are worth and a picture."""

    def behave(run: RunDir) -> None:
        trial = thaw(run.trial)
        picture = run.samples / "0000_a-zog_0.png"
        picture.parent.mkdir(parents=True)
        Image.new("RGB", (16, 16), (trial["train"]["lora"]["rank"], 0, 0)).save(picture)
        run.adapter.mkdir(exist_ok=True)
        rank, layer = trial["train"]["lora"]["rank"], "unet.down.attn1.to_q"
        shapes = {f"{layer}.lora_A.weight": (rank, 16), f"{layer}.lora_B.weight": (16, rank)}
        write_safetensors(run.adapter / "pytorch_lora_weights.safetensors", shapes)
        score(run, clip_t=-0.01 * (trial["evaluate"]["guidance"]["scale"] - 3) ** 2 - trial["train"]["optimizer"]["lr"])

    cluster.behaviour = behave
    return cluster


def names(path: Path, *sets: str) -> list[str]:
    return [member.name for member in load_series(path, sets).members]


FOLDERS = {"subject": {"kind": "folders", "path": "./photos", "prompts": "./prompts.json"}}


class TestForeach:
    def panel(self, world: Path) -> None:
        tree = yaml.safe_load((world / "study.yaml").read_text())
        del tree["trial"]["evaluate"]["prompts"]
        (world / "study.yaml").write_text(yaml.safe_dump(tree))

    def test_every_folder_is_a_study_with_its_own_pictures_and_prompts(self, world, write):
        self.panel(world)
        data = {
            "kind": "folder",
            "path": "{folder}",
            "instance_prompt": "a sks {class}",
            "resolution": 64,
            "holdout": 1,
        }
        path = write(GUIDED, foreach=FOLDERS | {}, trial={**GUIDED["trial"], "train": {"data": data}})
        specs = [member.load()[0] for member in load_series(path).members]
        assert [spec.name for spec in specs] == ["g-cat2", "g-dog", "g-red_robot"]
        folders: Any = [spec.trial.train.data for spec in specs]
        assert [folder.path.name for folder in folders] == ["cat2", "dog", "red_robot"]
        assert [folder.instance_prompt for folder in folders] == [
            "a sks cat",
            "a sks dog",
            "a sks red robot",
        ]
        assert [str(spec.trial.evaluate.prompts[1]) for spec in specs] == ["a cat 1", "a dog 1", "a red robot 1"]
        assert len({spec.cache for spec in specs}) == 1

    def test_so_many_prompts_are_taken_evenly(self, world, write):
        self.panel(world)
        path = write(GUIDED, foreach={"subject": {**FOLDERS["subject"], "max_prompts": 2, "token": "sks"}})
        spec, _ = load_series(path).members[1].load()
        assert [(prompt.text, prompt.shows) for prompt in spec.trial.evaluate.prompts] == [
            ("a sks dog 0", "a dog 0"),
            ("a sks dog 2", "a dog 2"),
        ]

    def test_names_are_subjects_too(self, write):
        path = write(GUIDED, foreach={"subject": {"kind": "names", "names": ["zog", "wug"]}})
        assert names(path) == ["g-zog", "g-wug"]
        assert names(path, "foreach.subject.names=[dax]") == ["g-dax"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"path": "./nowhere"}, r"several\.yaml:\d+: .*nowhere: no such folder"),
            ({"only": ["bird"]}, "got the folder 'bird'; expected one of cat2, dog, red_robot"),
            ({"without": ["cat2", "dog", "red_robot"]}, "no folder of .* that is left"),
            ({"prompts": "./gone.json"}, "gone.json: cannot be read"),
            ({}, "got prompts in the study and in foreach.subject.prompts"),
            ({"kind": "files"}, "foreach|kind"),
        ],
    )
    def test_what_is_wrong_is_said_in_one_line(self, write, change, message):
        path = write(GUIDED, foreach={"subject": {**FOLDERS["subject"], **change}})
        with pytest.raises(ConfigError, match=message):
            load_series(path)

    def test_a_folder_without_prompts_is_listed_and_not_passed_over(self, world, write):
        self.panel(world)
        build_pictures(world / "photos" / "teapot")
        path = write(GUIDED, foreach=FOLDERS)
        with pytest.raises(
            ConfigError, match=r"teapot: no subject of that name.*name them in `table`, or in `without`"
        ):
            load_series(path)
        assert len(names(path, "foreach.subject.without=[teapot]")) == 3

    def test_a_folder_without_pictures_is_listed_and_not_passed_over(self, world, write):
        self.panel(world)
        for name in ("cat3", ".thumbnails"):
            (world / "photos" / name).mkdir()
        path = write(GUIDED, foreach=FOLDERS)
        with pytest.raises(ConfigError, match=r"got no pictures in cat3 of .*or its name in `without`"):
            load_series(path)
        assert names(path, "foreach.subject.without=[cat3]") == names(
            path, "foreach.subject.only=[cat2, dog, red_robot]"
        )


class TestStages:
    TREE: ClassVar[dict[str, Any]] = {
        "name": "tune",
        "output": "./runs",
        "stages": {
            "search": {"extends": ["./study.yaml"], "limits": {"trials": 3}},
            "full": {"extends": ["./study.yaml"], "from_study": {"study": "search"}, "search": None,
                     "trial": {"train": {"steps": 900}}},
            "guidance": {**GUIDED, "from_study": {"study": "full", "adapter": True}},
        },
    }  # fmt: skip

    def test_extend_files_of_their_own_and_have_the_files_name(self, write):
        path = write(self.TREE)
        assert names(path) == ["tune-search", "tune-full", "tune-guidance"]
        assert [member.load()[0].num_trials for member in load_series(path).members] == [3, 1, 8]

    def test_are_changed_one_by_one_or_all_at_once(self, write):
        path = write(self.TREE)
        sets = ("stages.full.trial.train.steps=70", "trial.train.batch_size=2", "name=other")
        specs = [member.load()[0] for member in load_series(path, sets).members]
        assert [spec.trial.train.steps for spec in specs] == [300, 70, 300]
        assert [spec.trial.train.batch_size for spec in specs] == [2, 2, 2]
        assert specs[0].name == "other-search"

    def test_are_repeated_for_each_subject(self, write):
        path = write(self.TREE, foreach={"subject": {"kind": "names", "names": ["a", "b"]}})
        assert names(path)[::3] == ["tune-a-search", "tune-b-search"]
        sources = [member.source_root.name for member in load_series(path).members if member.source_root]
        assert sources == ["tune-a-search", "tune-a-full", "tune-b-search", "tune-b-full"]

    @pytest.mark.parametrize(
        ("section", "message"),
        [
            ({"study": "serch"}, r"several\.yaml:\d+: from_study\.study: got 'serch'.*did you mean 'search'"),
            ({"study": "search", "takes": {}}, "from_study.*takes|unknown key"),
        ],
    )
    def test_that_take_from_nobody_are_refused(self, write, section, message):
        path = write(self.TREE)
        tree = yaml.safe_load(path.read_text())
        tree["stages"]["full"]["from_study"] = section
        with pytest.raises(ConfigError, match=message):
            load_series(write(tree))

    def warm(self, write: Callable[..., Path], start: dict[str, Any], **search: Any) -> Path:
        """The search, and a stage with a wider one that begins with `start`."""
        wide = {"extends": ["./study.yaml"], "limits": {"trials": 5}, "sampler": {"kind": "random"},
                "search": {"train.optimizer.lr": {"kind": "float", "low": 1e-4, "high": 1.0, "log": True}},
                "warm_start": start}  # fmt: skip
        return write(self.TREE, stages={"search": {**self.TREE["stages"]["search"], **search}, "wide": wide})

    @pytest.mark.parametrize("values", [{}, {"b": {"clip_t": 2.0}}])
    def test_take_over_trials_of_an_earlier_one_once_it_has_ended(self, write, jobs, capfd, values):
        several = {"kind": "pareto", "objectives": {"a": {"clip_t": 1.0}, **values}}
        path = self.warm(write, {"study": "search"}, **({"objective": several} if values else {}))
        sets = ("--set", "launcher={kind: fake, poll_seconds: 1e-6}")
        assert main(["plan", str(path)]) == 0
        assert "waits for" in capfd.readouterr().out
        assert main(["run", str(path), "--only", "wide", *sets]) == 2
        assert "tune-search, which has not ended" in capfd.readouterr().err
        assert main(["run", str(path), *sets]) == 0
        assert len(jobs.jobs) == 3 + 2
        search, wide = (read_study(member.load()[0]).trials for member in load_series(path).members)
        assert [trial.params for trial in wide[:3]] == [trial.params for trial in search]
        assert main(["run", str(path), *sets]) == 0
        assert len(jobs.jobs) == 3 + 2

    @pytest.mark.parametrize(
        ("start", "message"),
        [
            ({"study": "serch"}, r"several\.yaml:\d+: warm_start\.study: got 'serch'.*did you mean 'search'"),
            ({"study": "search", "bst": 2}, "warm_start.bst: got an unknown key"),
            ({"study": "search", "best": 0}, "warm_start.best: got 0"),
            ({"study": 3}, "warm_start.study: got 3"),
        ],
    )
    def test_that_begin_with_nothing_are_refused_before_any_has_run(self, write, start, message):
        with pytest.raises(ConfigError, match=message):
            _ = [member.load() for member in load_series(self.warm(write, start)).members]

    def test_take_no_winner_of_a_front(self, write, jobs, capfd):
        several = {"kind": "pareto", "objectives": {"a": {"clip_t": 1.0}, "b": {"clip_t": 2.0}}}
        stages = {**self.TREE["stages"], "search": {**self.TREE["stages"]["search"], "objective": several}}
        sets = ("--set", "launcher={kind: fake, poll_seconds: 1e-6}")
        assert main(["run", str(write(self.TREE, stages=stages)), *sets]) == 2
        assert "has several values and so a front and no winner" in capfd.readouterr().err

    def test_a_file_of_several_is_no_single_study(self, write):
        with pytest.raises(ConfigError, match="stages: got a file of several studies"):
            load_study(write(self.TREE))

    def test_run_to_the_end_and_each_takes_what_the_one_before_it_found(self, world, write, jobs, capfd):
        path = write(self.TREE)
        sets = ("--set", "launcher={kind: fake, poll_seconds: 1e-6}")
        assert main(["plan", str(path)]) == 0
        planned = capfd.readouterr().out
        assert [planned.count(text) for text in ("waits for", "search space", "nothing is trained")] == [2, 2, 1]
        assert main(["run", str(path), *sets]) == 0
        search, full, guidance = (member.load()[0] for member in load_series(path).members)
        winner = json.loads((search.root / WINNER).read_text())
        assert full.trial.train.optimizer.lr == winner["params"]["train.optimizer.lr"]
        assert (full.trial.train.steps, full.num_trials) == (900, 1)
        assert guidance.trial.adapter == run_dir(full.root, 0).adapter
        assert guidance.trial.train == full.trial.train
        best = json.loads((guidance.root / WINNER).read_text())
        assert best["params"][SCALE] == pytest.approx(3, abs=0.7)
        rows = list(csv.DictReader((world / "runs" / "tune" / "summary-guidance.csv").read_text().splitlines()))
        assert [(row["study"], float(row["scale"])) for row in rows] == [("tune-guidance", best["params"][SCALE])]
        assert (world / "runs" / "tune" / "strip-guidance.png").stat().st_size

        count = len(jobs.jobs)
        assert main(["run", str(path), *sets]) == 0
        assert len(jobs.jobs) == count
        capfd.readouterr()
        for command in ("status", "best", "plan"):
            assert main([command, str(path), "--only", "guidance"]) == 0
            out = capfd.readouterr().out
            assert ("tune-guidance" in out, "tune-search" in out) == (True, False)

    def test_one_that_fails_stops_those_that_need_it_and_no_others(self, world, write, jobs, capfd):
        good, broken = jobs.behaviour, fail_with("data", "picture 3 is broken")
        jobs.behaviour = lambda run: broken(run) if "-b-full" in str(run.path) else good(run)
        path = write(self.TREE, foreach={"subject": {"kind": "names", "names": ["a", "b"]}})
        code = main(
            ["run", str(path), "--set", "launcher={kind: fake, poll_seconds: 1e-6}", "--set", "limits.trials=2"]
        )
        assert code == 2
        ended = [member.name for member in load_series(path).members if (member.load()[0].root / WINNER).exists()]
        assert ended == ["tune-a-search", "tune-a-full", "tune-a-guidance", "tune-b-search"]
        *before, last = capfd.readouterr().err.splitlines()
        assert "2 of 6 studies that have not ended, for the reasons above: tune-b-full, tune-b-guidance" in last
        assert any(line.startswith("tune-b-full: ") and "picture 3 is broken" in line for line in before)


@pytest.mark.parametrize("wrong", [7, "x", [1]])
def test_a_trial_that_is_no_mapping_is_refused_for_subjects_too(world: Path, write: Callable[..., Path], wrong: Any):
    (member, *_) = load_series(write({"name": "g", "foreach": FOLDERS, "trial": wrong})).members
    with pytest.raises(ConfigError, match="expected a mapping"):
        member.load()


def test_a_winner_that_is_gone_or_broken_is_refused(world: Path, write: Callable[..., Path]):
    root = world / "runs" / "t"
    root.mkdir(parents=True)
    path = write(GUIDED, from_study={"study": "./runs/t"})
    for text, message in (
        ("{}", "study: Field required; .* run that study again"),
        (Winner(study="t", trial=3, value=1, params={}).model_dump_json(), "no .*0003"),
    ):
        (root / WINNER).write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_series(path)


def test_a_missing_folder_or_adapter_of_any_subject_is_reported_before_anything_starts(
    world, write, monkeypatch, capfd
):
    monkeypatch.setattr(Controller, "run", lambda self: pytest.fail("a job would have started"))
    subjects = {"subject": {"kind": "names", "names": ["cat2", "gone"]}}
    data = {"kind": "folder", "path": "./photos/{subject}", "resolution": 64, "holdout": 1}
    path = write(GUIDED, foreach=subjects, trial={**GUIDED["trial"], "train": {"data": data}})
    assert main(["run", str(path)]) == 2
    assert "gone: no such folder" in capfd.readouterr().err
    adapters = {**GUIDED["trial"], "adapter": "./adapters/{subject}"}
    assert main(["run", str(write(GUIDED, foreach=subjects, trial=adapters))]) == 2
    assert "trial.adapter" in (err := capfd.readouterr().err)
    assert "adapters/cat2: no such folder" in err


def test_a_plain_study_takes_parameters_from_a_folder(world, write, jobs):
    sets = ("--set", "launcher={kind: fake, poll_seconds: 1e-6}")
    assert main(["run", str(world / "study.yaml"), *sets]) == 0
    took = {"train.optimizer.lr": "train.optimizer.lr"}
    path = write(GUIDED, from_study={"study": "./runs/t", "take": took})
    (member,) = load_series(path).members
    winner = json.loads((world / "runs" / "t" / WINNER).read_text())
    assert member.load()[0].trial.train.optimizer.lr == winner["params"]["train.optimizer.lr"]
    assert main(["run", str(path), *sets]) == 0
    assert len(read_study(member.load()[0]).trials) == 8
