"""How much training pruners save on the miniature world, and what that costs in quality.

    python -m tests.benchmarks.pruning

replays trials whose ends are known, in random orders, so many at a time, at the same speed; the study's own pruners
decide on what a controller would know at that moment. A pruned trial's place goes to the next one of the order. Three
sets of trials:

- two committed grids of rate and rank (results/learnability_zog.csv and _nuvo.csv): every setting was trained for a
  third of the steps, which is its report, and for all of them. They were trainings of their own, each with its own
  decay of the rate;
- a study (results/pruning_curves.csv) whose trials reported after one and two thirds, prompt by prompt, before the
  rate had fallen. It was run, and its reports collected, by

    python -m orchestrator run studies/hpo.yaml --trials 14 --set name=curves --set search.train.steps=null \\
      --set trial.train.steps=120 --set 'trial.report={every: 40, prompts: 8}' \\
      --set 'sampler={kind: random, seed: 0}' --set confirm_seeds=0
    python -m tests.benchmarks.pruning --collect runs/curves
"""

# pyright: basic

import argparse
import heapq
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from PIL import Image

from evaluation.records import read_records
from orchestrator.pruners import (
    AshaPruner,
    Curve,
    HyperbandPruner,
    MedianPruner,
    NoPruner,
    PercentilePruner,
    Pruner,
    WilcoxonPruner,
)
from trainers.miniature.pictures import to_unit
from trainers.miniature.truth import compare
from trainers.miniature.world import subject
from trainers.rundir import RunDir, thaw

_T = TypeVar("_T")
RESULTS = Path(__file__).parent / "results"
CURVES = RESULTS / "pruning_curves.csv"
WEIGHTS = {"clip_i": 1.0, "clip_t": 1.0, "aesthetic": 0.1}
"""The objective of studies/hpo.yaml."""
ORDERS, FEW = 2000, 400
"""Random orders; few where a test of every prompt makes each slow."""
THIRD, WHOLE = 1, 3
"""Steps are counted in thirds of a training."""
PRUNERS: dict[str, Pruner] = {
    "none": NoPruner(),
    "median": MedianPruner(),
    "median, 3 to start with": MedianPruner(startup_trials=3),
    "percentile 75": PercentilePruner(percentile=75),
    "percentile 25": PercentilePruner(percentile=25),
    "asha, eta 2": AshaPruner(min_steps=THIRD, eta=2),
    "asha, eta 3": AshaPruner(min_steps=THIRD, eta=3),
    "asha, eta 4": AshaPruner(min_steps=THIRD, eta=4),
    "hyperband, eta 2": HyperbandPruner(min_steps=THIRD, max_steps=WHOLE, eta=2),
    "hyperband, eta 3": HyperbandPruner(min_steps=THIRD, max_steps=WHOLE, eta=3),
}
BY_PROMPT: dict[str, Pruner] = {
    "wilcoxon, p 0.05": WilcoxonPruner(p=0.05),
    "wilcoxon": WilcoxonPruner(),
    "wilcoxon, p 0.3": WilcoxonPruner(p=0.3),
}
"""Where reports are known prompt by prompt."""


@dataclass(frozen=True)
class Known:
    """A trial whose end is known."""

    curve: Curve
    truth: float
    """Of its end, by pixels."""


@dataclass(frozen=True)
class Outcome:
    """Of one order of the trials."""

    saved: float
    """Share of all training that was not done."""
    loss: float
    """The best trial's value minus that of the best one that was finished."""
    truth: float
    """The same trials' difference by pixel truth."""


def read_grid(name: str) -> list[Known]:
    """Every rate and rank that was trained for a third of the steps and for all of them."""
    rows = pd.read_csv(RESULTS / f"learnability_{name}.csv")
    rows["value"] = rows[list(WEIGHTS)].mul(pd.Series(WEIGHTS)).sum(axis=1)
    trained = rows.query("rate > 0")
    first, last = sorted(trained["steps"].unique())
    ends = trained.query("steps == @last")
    both = trained.query("steps == @first").merge(ends, on=["rate", "rank"], suffixes=("", "_end"))
    assert last == WHOLE * first
    return [
        Known(Curve(number, {THIRD: row["value"]}, final=row["value_end"]), row["truth_end"])
        for number, row in enumerate(both.to_dict("records"))
    ]


def collect(study: Path) -> None:
    """Write down what the trials of a finished study of zog reported, prompt by prompt, and how they ended."""
    rows = [one for folder in sorted((study / "trials").iterdir()) for one in _told(RunDir(folder))]
    pd.DataFrame(rows).to_csv(CURVES, index=False, float_format="%.6g")


def _told(run: RunDir) -> Iterator[dict[str, float]]:
    train, result = thaw(run.trial)["train"], run.read_result()
    assert result is not None
    trial = {"trial": int(run.path.name), "rate": train["optimizer"]["lr"], "rank": train["lora"]["rank"]}
    for _, event in run.read_events():
        if event["event"] == "report":
            third = WHOLE * event["step"] // train["steps"]
            for prompt, values in enumerate(zip(*(event["prompts"][name] for name in WEIGHTS), strict=True)):
                yield trial | {"third": third, "prompt": prompt, "value": _objective(values)}
    final = _objective([result.scores[name].mean for name in WEIGHTS])
    yield trial | {"third": WHOLE, "value": final, "truth": fmean(_truths(run))}


def _objective(values: Sequence[float]) -> float:
    return sum(weight * value for weight, value in zip(WEIGHTS.values(), values, strict=True))


def _truths(run: RunDir) -> Iterator[float]:
    for record in read_records(run.records):
        background = record.prompt.rpartition(" on a ")[2].removesuffix(" background")
        pixels = torch.from_numpy(np.array(Image.open(run.path / record.file).convert("RGB"))).permute(2, 0, 1)
        yield compare(to_unit(pixels[None]), subject("zog", background))[0].whole


def read_curves() -> list[Known]:
    """The study's trials."""
    found: list[Known] = []
    told = pd.read_csv(CURVES)
    for number in sorted(told["trial"].unique()):
        rows = told.query("trial == @number")
        (end,) = rows.query("third == @WHOLE").to_dict("records")
        panels = {third: rows.query("third == @third")["value"].tolist() for third in range(THIRD, WHOLE)}
        reports = {third: fmean(values) for third, values in panels.items()}
        found.append(Known(Curve(number, reports, panels, end["value"]), end["truth"]))
    return found


def replay(trials: Sequence[Known], pruner: Pruner, parallel: int) -> Outcome:
    """One study in which trials are taken in this order; at equal times the earlier one comes first."""
    stops = [0, *sorted(trials[0].curve.reports), WHOLE]
    known = {number: Curve(number) for number in range(len(trials))}
    waiting, clock, now, trained = list(known), list[tuple[int, int, int]](), 0, 0
    while waiting or clock:
        while waiting and len(clock) < parallel:
            heapq.heappush(clock, (now + stops[1], waiting.pop(0), 1))
        now, number, stop = heapq.heappop(clock)
        whole, step = trials[number].curve, stops[stop]
        trained += step - stops[stop - 1]
        if step == WHOLE:
            known[number] = replace(known[number], final=whole.final)
            continue
        known[number] = Curve(number, _until(step, whole.reports), _until(step, whole.panels))
        if not pruner.prunes(known[number], [other for other in known.values() if other is not known[number]]):
            heapq.heappush(clock, (now + stops[stop + 1] - step, number, stop + 1))
    finished = [trial for number, trial in enumerate(trials) if known[number].final is not None]
    best, found = (max(some, key=lambda trial: trial.curve.final or 0.0) for some in (trials, finished))
    loss = (best.curve.final or 0.0) - (found.curve.final or 0.0)
    return Outcome(1 - trained / (WHOLE * len(trials)), loss, best.truth - found.truth)


def _until(step: int, told: Mapping[int, _T]) -> dict[int, _T]:
    return {at: value for at, value in told.items() if at <= step}


def row(name: str, trials: Sequence[Known], pruner: Pruner, parallel: int, orders: int) -> str:
    rng = random.Random(0)
    found = [replay(rng.sample(trials, len(trials)), pruner, parallel) for _ in range(orders)]
    losses = sorted(one.loss for one in found)
    saved, kept = fmean(one.saved for one in found), fmean(loss == 0 for loss in losses)
    truth = fmean(one.truth for one in found)
    return (
        f"| {name} | {parallel} | {saved:.0%} | {kept:.0%} | {fmean(losses):.4f} | {losses[int(0.95 * orders)]:.4f} | "
        f"{truth:+.3f} |"
    )


def table(title: str, trials: Sequence[Known], pruners: Mapping[str, Pruner]) -> list[str]:
    ends = pd.Series([trial.curve.final for trial in trials])
    reports = pd.Series([trial.curve.reports[THIRD] for trial in trials])
    orders = FEW if pruners.keys() & BY_PROMPT.keys() else ORDERS
    place = int((reports > reports[ends.idxmax()]).sum()) + 1
    return [
        f"## {title}: {len(trials)} trials",
        "",
        f"The objective at the ends: best {ends.max():.4f}, median {ends.median():.4f}, worst {ends.min():.4f}.",
        f"Rank correlation of the first report with the end: {reports.rank().corr(ends.rank()):.2f}; the best at the",
        f"end is number {place} of {len(trials)} by its first report.",
        "",
        "| pruner | at a time | training saved | best kept | mean loss | at most, in 95 % | mean loss of truth |",
        "| --- | --: | --: | --: | --: | --: | --: |",
        *(row(name, trials, pruner, parallel, orders) for parallel in (1, 4) for name, pruner in pruners.items()),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, help="first write down the reports of this study")
    if study := parser.parse_args().collect:
        collect(study)
    lines = [
        "# What pruning saves",
        "",
        f"`python -m tests.benchmarks.pruning`: trials whose ends are known, replayed in {ORDERS} random orders",
        f"(those of the study in {FEW}; the script says which trials, and how). Loss is of the objective of",
        "studies/hpo.yaml: the best trial's minus the best finished one's. The last column is the same two",
        "trials' difference by pixel truth (0 to 1), which no pruner sees; below 0 is luck. The grids have one",
        "report, after a third of the training, and only its mean over prompts, so `wilcoxon` cannot judge",
        "them; the study's trials have two reports, after one and two thirds.",
        "",
        *table("zog, grid", read_grid("zog"), PRUNERS),
        *table("nuvo, grid", read_grid("nuvo"), PRUNERS),
        *table("zog, study with reports", read_curves(), PRUNERS | BY_PROMPT),
    ]
    text = "\n".join(lines).rstrip() + "\n"
    (RESULTS / "pruning.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
