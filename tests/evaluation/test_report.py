"""The small panel that is scored while a trial trains."""

# pyright: basic

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from evaluation.config import ReportConfig
from evaluation.evaluate import Ranks
from evaluation.metric import PictureScorer
from evaluation.report import Reporter
from trainers.prompt import Sample
from trainers.rundir import RunDir

METHOD: Any = SimpleNamespace(model=None, backbone=SimpleNamespace(device=None), held_out=())


class Length(PictureScorer):
    """A scorer: how many letters the prompt has, and nothing for the word nobody knows."""

    model = "letters"

    def values(self, samples: list[Sample]) -> list[float]:
        return [math.nan if "nobody" in str(s.prompt) else len(str(s.prompt)) + s.seed for s in samples]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is asked of the sampler."""
    asked: list[tuple[str, int]] = []

    def generate(model: Any, requests: Any, config: Any) -> Any:
        for request in requests:
            asked.append((str(request.prompt), request.seed))
            yield Sample(request.prompt, request.seed, Image.new("RGB", (8, 8)))

    monkeypatch.setattr("trainers.sampling.generate", generate)
    return asked


def reporter(run: RunDir, ranks: Ranks, **report: int) -> Reporter:
    config: Any = SimpleNamespace(
        prompts=("aa", "nobody", "cccc", "d"), seeds=(0, 2, 4), metrics={"letters": SimpleNamespace(of_class=False)}
    )
    made = Reporter(ReportConfig(every=10, **report), config, run, run.path, ranks, nullcontext)
    scorers: Any = {"letters": Length()}
    made._scorers = scorers
    return made


def test_it_draws_the_first_prompts_and_seeds_and_reports_each_prompts_mean(tmp_path, drawn):
    run = RunDir(tmp_path)
    reporter(run, Ranks(), prompts=3, seeds=2).look(METHOD, 20)
    assert drawn == [(prompt, seed) for prompt in ("aa", "nobody", "cccc") for seed in (0, 2)]
    ((_, event),) = run.read_events()
    assert (event["event"], event["step"]) == ("report", 20)
    assert event["prompts"] == {"letters": [3.0, None, 5.0]}
    assert event["scores"] == {"letters": 4.0}


def test_ranks_share_the_panel_and_one_of_them_reports(tmp_path, drawn):
    run, gathered = RunDir(tmp_path), []

    def gather(rows: list[Any]) -> list[Any]:
        gathered.extend(rows)
        return gathered

    for rank in (2, 1, 0):
        reporter(run, Ranks(rank, 3, gather), prompts=3, seeds=2).look(METHOD, 20)
    assert len(drawn) == len(set(drawn)) == 6
    assert [event["prompts"] for _, event in run.read_events()] == [{"letters": [3.0, None, 5.0]}]


def test_it_is_due_at_multiples_of_every(tmp_path):
    assert [step for step in range(1, 31) if reporter(RunDir(tmp_path), Ranks()).due(step)] == [10, 20, 30]
