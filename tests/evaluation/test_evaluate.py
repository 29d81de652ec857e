# pyright: basic
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.config import EvaluateConfig
from evaluation.evaluate import Ranks, evaluate, name_files, open_scorers
from evaluation.metric import PromptScorer
from evaluation.metrics import clip
from evaluation.records import read_records
from tests.evaluation.conftest import noise
from tests.trainers.conftest import build_sdxl
from trainers.backbones.sdxl import SdxlConfig
from trainers.errors import DataError, ModelError
from trainers.prompt import Prompt, Request
from trainers.rundir import RunDir

PROMPTS = ["a red star", "a ring on a blue background", "a zog"]
SEEDS = [0, 7]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = build_sdxl(tmp_path_factory.mktemp("models") / "sdxl")
    return SdxlConfig(path=folder).load(torch.device("cpu"), torch.float32)


@pytest.fixture
def config(open_clip_folder, transformers_folder, head_file):
    return EvaluateConfig.model_validate(
        {
            "prompts": PROMPTS, "seeds": SEEDS, "resolution": 64, "steps": 2, "batch_size": 4,
            "guidance": {"kind": "cfg", "scale": 3.0},
            "metrics": {
                "clip_t": {"kind": "clip_text", "model": str(transformers_folder)},
                "clip_i": {"kind": "clip_image", "model": str(open_clip_folder)},
                "aesthetic": {"kind": "aesthetic", "model": str(open_clip_folder), "head": str(head_file)},
            },
        }
    )  # fmt: skip


@pytest.fixture
def references(tmp_path):
    paths = [tmp_path / f"reference{seed}.png" for seed in range(2)]
    for seed, path in enumerate(paths):
        noise(100 + seed).save(path)
    return paths


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def judge(backbone, config, references, run, cache, ranks=None):
    return evaluate(backbone, config, open_scorers(config, references, backbone.device, cache), run, ranks)


def values_of(run):
    return [[record.values[name] for name in ("clip_t", "clip_i", "aesthetic")] for record in read_records(run.records)]


def on_ranks(world, backbone, config, references, run, cache):
    """The scores on each rank; ranks are threads that exchange what they gather."""
    scorers = open_scorers(config, references, backbone.device, cache)  # not by threads: transformers cannot
    barrier, items = threading.Barrier(world, timeout=60), {}

    def gather_on(rank):
        def gather(own):
            items[rank] = own
            barrier.wait()
            everything = [one for peer in range(world) for one in items[peer]]
            barrier.wait()
            return everything

        return gather

    with ThreadPoolExecutor(world) as pool:
        ranks = [Ranks(rank, world, gather_on(rank)) for rank in range(world)]
        return list(pool.map(lambda one: evaluate(backbone, config, scorers, run, one), ranks))


def test_every_picture_of_the_panel_is_kept_with_what_was_measured_on_it(backbone, config, references, run, tmp_path):
    judge(backbone, config, references, run, tmp_path / "cache")
    records = read_records(run.records)
    assert [(record.prompt, record.seed) for record in records] == [(p, s) for p in PROMPTS for s in SEEDS]
    for record in records:
        assert set(record.values) == {"clip_t", "clip_i", "aesthetic"}
        with Image.open(run.path / record.file) as picture:
            assert (picture.size, picture.mode) == ((64, 64), "RGB")
    files = {path.name for path in run.samples.iterdir()}
    assert files == {"grid.png"} | {record.file.removeprefix("samples/") for record in records}


def test_scores_are_means_over_prompts_of_what_the_records_hold(backbone, config, references, run, tmp_path):
    scores = judge(backbone, config, references, run, tmp_path / "cache")
    for place, name in enumerate(("clip_t", "clip_i", "aesthetic")):
        by_prompt = np.array(values_of(run))[:, place].reshape(len(PROMPTS), len(SEEDS)).mean(axis=1)
        assert scores[name].mean == pytest.approx(by_prompt.mean())
        assert scores[name].standard_error == pytest.approx(by_prompt.std(ddof=1) / math.sqrt(len(PROMPTS)))
        assert (scores[name].num_samples, scores[name].num_undefined) == (6, 0)
        assert scores[name].higher_is_better
    assert scores["clip_t"].model.startswith("tiny-clip@")
    assert scores["aesthetic"].model.startswith(scores["clip_i"].model + "+head@")


def test_a_value_can_be_found_again_from_the_picture_file(backbone, config, references, run, tmp_path):
    from evaluation.encoders import ClipEncoders
    from trainers.cache import Cache

    judge(backbone, config, references, run, tmp_path / "cache")
    encoder = ClipEncoders(torch.device("cpu"), Cache(tmp_path / "other")).clip(config.metrics["clip_i"].model)
    for record in read_records(run.records):
        with Image.open(run.path / record.file) as picture:
            cosines = encoder.embed_images([picture.copy()]) @ encoder.embed_references(references).T
        assert record.values["clip_i"] == pytest.approx(float(cosines.mean()), abs=1e-5)


def test_two_ranks_measure_what_one_does(backbone, config, references, run, tmp_path):
    alone = judge(backbone, config, references, RunDir(tmp_path / "alone"), tmp_path / "cache")
    scores, others = on_ranks(2, backbone, config, references, run, tmp_path / "cache")
    assert scores == others
    assert len(read_records(run.records)) == 6
    np.testing.assert_allclose(values_of(run), values_of(RunDir(tmp_path / "alone")), atol=1e-3)
    assert {path.name for path in run.samples.iterdir()} == {
        path.name for path in (tmp_path / "alone/samples").iterdir()
    }
    for name, score in scores.items():
        assert score.mean == pytest.approx(alone[name].mean, abs=1e-3)
        assert score.num_samples == alone[name].num_samples


def test_more_ranks_than_pictures_is_no_error(backbone, config, references, run, tmp_path):
    few = config.model_copy(update={"prompts": (Prompt(text=PROMPTS[0]),), "seeds": (0,)})
    found = on_ranks(2, backbone, few, references, run, tmp_path / "cache")
    assert [scores["clip_t"].num_samples for scores in found] == [1, 1]


def test_what_a_crash_left_behind_changes_nothing(backbone, config, references, run, tmp_path):
    judge(backbone, config, references, run, tmp_path / "cache")
    first = run.records.read_bytes(), (run.samples / "grid.png").read_bytes()
    run.records.unlink()
    next(run.samples.glob("0001*")).write_bytes(b"half a pict")
    next(run.samples.glob("0002*")).unlink()
    judge(backbone, config, references, run, tmp_path / "cache")
    assert (run.records.read_bytes(), (run.samples / "grid.png").read_bytes()) == first


def with_class(config, dino_folder):
    metrics = {"pres": {"kind": "prior_preservation", "model": str(dino_folder)}}
    metrics["diversity"] = {"kind": "diversity", "model": str(dino_folder)}
    tree = config.model_dump(mode="json")
    tree["metrics"] |= metrics
    return EvaluateConfig.model_validate(tree | {"class_prompts": ["a ring"]})


def test_pictures_of_the_class_are_judged_by_its_metric_and_by_no_other(
    backbone, config, dino_folder, references, run, tmp_path
):
    scores = judge(backbone, with_class(config, dino_folder), references, run, tmp_path / "cache")
    records = read_records(run.records)
    assert [(one.prompt, one.seed) for one in records] == [(p, s) for p in [*PROMPTS, "a ring"] for s in SEEDS]
    for record in records:
        judges = {"pres"} if record.prompt == "a ring" else {"clip_t", "clip_i", "aesthetic", "diversity"}
        assert set(record.values) == judges
    assert {name: score.num_samples for name, score in scores.items()} == {
        "clip_t": 6, "clip_i": 6, "aesthetic": 6, "diversity": 6, "pres": 2,
    }  # fmt: skip
    assert not any(score.num_undefined for score in scores.values())
    assert not scores["pres"].higher_is_better


def test_ranks_that_share_a_prompt_still_measure_its_diversity(
    backbone, config, dino_folder, references, run, tmp_path
):
    config = with_class(config, dino_folder)
    alone = judge(backbone, config, references, RunDir(tmp_path / "alone"), tmp_path / "cache")
    found = on_ranks(3, backbone, config, references, run, tmp_path / "cache")
    for scores in found:
        assert scores["diversity"].num_undefined == 0
        assert scores["diversity"].mean == pytest.approx(alone["diversity"].mean, abs=1e-3)
        assert scores["pres"].mean == pytest.approx(alone["pres"].mean, abs=1e-3)


def test_what_was_drawn_is_looked_at_batch_by_batch_and_never_read_back(
    backbone, config, references, run, tmp_path, monkeypatch
):
    counts, look = [], PromptScorer.look

    def looking(self, samples):
        counts.append(len(samples))
        assert len(list(run.samples.iterdir())) == sum(counts)
        return look(self, samples)

    monkeypatch.setattr(PromptScorer, "look", looking)
    monkeypatch.delattr("evaluation.evaluate.open_picture")
    judge(backbone, config, references, run, tmp_path / "cache")
    assert counts == [4, 2]


def test_stages_are_events(backbone, config, references, run, tmp_path):
    judge(backbone, config, references, run, tmp_path / "cache")
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert {event["event"] for event in events} == {"stage"}
    stages = [(event["stage"], event["state"]) for event in events]
    batch = [("sample", "start"), ("sample", "end"), ("score", "start"), ("score", "end")]
    assert stages == [*batch, *batch, *batch[2:]]


def test_undefined_values_are_counted_and_never_replaced(backbone, config, references, run, tmp_path, monkeypatch):
    original = PromptScorer.values

    def values(self, samples):
        found = original(self, samples)
        return [
            math.nan if sample.prompt.text == "a zog" else value for sample, value in zip(samples, found, strict=True)
        ]

    monkeypatch.setattr(PromptScorer, "values", values)
    score = judge(backbone, config, references, run, tmp_path / "cache")["clip_t"]
    assert (score.num_samples, score.num_undefined) == (4, 2)
    assert score.mean == pytest.approx(np.nanmean(np.array(values_of(run))[:, 0]))


def test_a_missing_scoring_model_is_known_before_anything_is_drawn(backbone, config, references, run, tmp_path):
    metrics = {"clip_t": clip.ClipText(model=tmp_path / "nowhere")}
    with pytest.raises(ModelError, match="nowhere"):
        judge(backbone, config.model_copy(update={"metrics": metrics}), references, run, tmp_path / "cache")
    assert not run.path.exists()


def test_missing_references_are_known_before_anything_is_drawn(backbone, config, run, tmp_path):
    with pytest.raises(DataError, match="held-out"):
        judge(backbone, config, [], run, tmp_path / "cache")
    assert not run.path.exists()


def test_file_names_tell_prompt_and_seed_and_never_collide():
    long = "A photo of ONE very long-winded prompt, which goes on & on; and on"
    files = name_files([Prompt(text=text) for text in ("a star", long, long + "!", "星")], [0, 12])
    assert files[Request(Prompt(text="a star"), 12)] == "samples/0000_a-star_12.png"
    assert files[Request(Prompt(text=long), 0)] == "samples/0001_a-photo-of-one-very-long-winded-prompt-w_0.png"
    assert files[Request(Prompt(text="星"), 0)] == "samples/0003__0.png"
    assert len(set(files.values())) == 8
