"""Do the learned scores say what the pixels say? Each metric's rank correlation with the pixel ground truth.

    python -m tests.benchmarks.proxies FOLDER [--studies runs/guidance_cfg-zog runs/guidance_cfg-wug]

Adapters of very different quality (rates 1e-4 to 3e-2, and the base) learn the subject `zog` and draw the same panel;
the trials of finished studies of guidance drew another one, with an adapter each at different scales. What is compared
with what:

- most metrics: how well object and background match what was asked for (`trainers/miniature/truth.py`);
- diversity: root mean square difference of the pixels of a prompt's two pictures;
- prior preservation, negative because lower is better: how well stars of the subject's class are still drawn.

Two questions: does the mean over a panel rank adapters, or scales, as the truth does, and does a value rank what they
drew for one prompt? Intervals (95 %) are a bootstrap of adapters and prompts together. What FOLDER has is not measured
again. Results: tests/benchmarks/results/proxies.md.
"""

# pyright: basic

import argparse
import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pydantic import TypeAdapter
from scipy.stats import rankdata

from evaluation.encoders import ClipEncoders
from evaluation.folders import Subject, score_subject
from evaluation.metric import Metric
from evaluation.records import read_records
from orchestrator.spec import TrialSpec
from tests.benchmarks.learnability import METRICS, RESULTS, WEIGHTS, Point, requested_truths, trial, wanted_scenes
from trainers.cache import Cache
from trainers.miniature.world import Scene, caption, subject
from trainers.prompt import Prompt, Request, Sample
from trainers.rundir import RunDir, thaw

SUBJECTS = [Point(0, 2, 1), *(Point(rate, 16, 100) for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2))]
_CLASS = [
    ("green", "red"),
    ("white", "blue"),
    ("orange", "black"),
    ("purple", "yellow"),
    ("red", "grey"),
    ("blue", "white"),
]
STARS = {caption(scene): scene for scene in (Scene(back, "star", "solid", colour) for colour, back in _CLASS)}
"""What the subject's class is asked to show: a zog is a star."""
_DINO = {"model": WEIGHTS / "dino"}
PRESERVED = "prior_preservation"
PROXIES: dict[str, dict[str, Any]] = METRICS | {
    "dino": {"kind": "dino", **_DINO},
    "preference": {
        "kind": "preference",
        "model": WEIGHTS / "preference",
        "checkpoint": WEIGHTS / "preference" / "preference.pt",
    },
    "diversity": {"kind": "diversity", **_DINO},
    PRESERVED: {"kind": PRESERVED, **_DINO},
}
OBJECTIVES: dict[str, dict[str, float]] = {
    "clip_i + clip_t + 0.1 aesthetic": {"clip_i": 1.0, "clip_t": 1.0, "aesthetic": 0.1},
    "0.6 clip_t + 0.04 aesthetic": {"clip_t": 0.6, "aesthetic": 0.04},
    "dino + clip_t": {"dino": 1.0, "clip_t": 1.0},
    "clip_t + preference": {"clip_t": 1.0, "preference": 1.0},
}
_BACKGROUND = re.compile(r" on an? (\w+) background")
_RESAMPLES = 1000


def subject_rows(point: Point, folder: Path) -> pd.DataFrame:
    """Every picture of an adapter of the subject: prompt, seed, truths and what the metrics say."""
    run, scenes = RunDir(folder / "run"), wanted_scenes("zog") | STARS
    judged = {"metrics": PROXIES, "class_prompts": list(STARS), "steps": 10}
    records = trial("zog", point, run, folder.parent / "cache", judged)
    pictures = {(one.prompt, one.seed): Image.open(run.path / one.file) for one in records}
    samples = (Sample(Prompt(text=prompt), seed, picture) for (prompt, seed), picture in pictures.items())
    truth, apart = requested_truths(samples, scenes), _distances(pictures)
    rows: list[dict[str, Any]] = []
    for one in records:
        values = {name: -value if name == PRESERVED else value for name, value in one.values.items()}
        key = {"prompt": one.prompt, "seed": one.seed, "of_class": one.prompt in STARS}
        rows.append({**key, "truth": truth[one.prompt, one.seed], "apart": apart[one.prompt], **values})
    return pd.DataFrame(rows)


def _distances(pictures: Mapping[tuple[str, int], Image.Image]) -> dict[str, float]:
    """How far the two pictures of each prompt are apart."""
    found: dict[str, list[np.ndarray]] = {}
    for (prompt, _), picture in pictures.items():
        found.setdefault(prompt, []).append(np.asarray(picture, np.float32))
    return {prompt: float(np.sqrt(np.mean((one - other) ** 2))) for prompt, (one, other) in found.items()}


def study_rows(root: Path, cache: Path) -> pd.DataFrame:
    """Every picture of the trials of a study of one subject, likewise."""
    encoders = ClipEncoders(torch.device("cpu"), Cache(cache))
    metrics = TypeAdapter(dict[str, Metric]).validate_python(
        {name: one for name, one in PROXIES.items() if name != PRESERVED}
    )
    tables: list[pd.DataFrame] = []
    for run in (RunDir(path) for path in sorted((root / "trials").iterdir())):
        if not run.result.exists():
            continue
        frozen = TrialSpec.model_validate(thaw(run.trial))
        prompts = {str(prompt): prompt for prompt in frozen.evaluate.prompts}
        files = {Request(prompts[one.prompt], one.seed): run.path / one.file for one in read_records(run.records)}
        data = frozen.train.data
        drawn = Subject(data.model_dump()["path"].name, files, data.split().held_out)
        pictures = {(str(one.prompt), one.seed): Image.open(file).copy() for one, file in files.items()}
        scenes = {text: subject(drawn.name, _BACKGROUND.findall(text)[0]) for text in prompts}
        samples = (Sample(Prompt(text=prompt), seed, picture) for (prompt, seed), picture in pictures.items())
        truth, apart = requested_truths(samples, scenes), _distances(pictures)
        rows = [
            {"prompt": one.prompt, "seed": one.seed, "of_class": False, "truth": truth[one.prompt, one.seed],
             "apart": apart[one.prompt], **one.values}
            for one in score_subject(drawn, metrics, encoders)
        ]  # fmt: skip
        tables.append(pd.DataFrame(rows).assign(adapter=run.path.name))
    return pd.concat(tables)


def collect(folder: Path, points: Iterable[tuple[str, Callable[[Path], pd.DataFrame]]]) -> pd.DataFrame:
    """All points' rows, those that are known from FOLDER's files."""
    tables: list[pd.DataFrame] = []
    for name, measure in points:
        file = folder / f"{name}.csv"
        if not file.is_file():
            with tempfile.TemporaryDirectory(dir=folder) as work:
                measure(Path(work) / "run").to_csv(file, index=False)
            print(f"measured {name}", flush=True)
        tables.append(pd.read_csv(file).assign(adapter=name))
    return pd.concat(tables)


def ranks_agree(values: np.ndarray, truth: np.ndarray) -> float:
    """Spearman's correlation; NaN if either says the same of all."""
    a, b = rankdata(values), rankdata(truth)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else float("nan")


def correlations(table: pd.DataFrame, metric: str, against: str) -> tuple[str, str]:
    """Of adapters by their panel means, and of one prompt's pictures by different adapters; with intervals."""
    values, truth = (
        table.pivot_table(name, "adapter", "prompt", dropna=False).to_numpy() for name in (metric, against)
    )
    rng = np.random.default_rng(0)

    def adapters(rows: np.ndarray, columns: np.ndarray) -> float:
        found, real = values[np.ix_(rows, columns)], truth[np.ix_(rows, columns)]
        return ranks_agree(np.nanmean(found, axis=1), real.mean(axis=1))

    def pictures(rows: np.ndarray, columns: np.ndarray) -> float:
        each = [
            ranks_agree(values[rows, column][defined], truth[rows, column][defined])
            for column in columns
            if (defined := ~np.isnan(values[rows, column])).sum() > 2
        ]
        return float(np.nanmean(each))

    def interval(what: Callable[[np.ndarray, np.ndarray], float]) -> str:
        rows, columns = (np.arange(count) for count in values.shape)
        drawn = [what(rng.choice(rows, len(rows)), rng.choice(columns, len(columns))) for _ in range(_RESAMPLES)]
        low, high = np.nanquantile(drawn, (0.025, 0.975))
        return f"{what(rows, columns):+.2f} ({low:+.2f} to {high:+.2f})"

    return interval(adapters), interval(pictures)


def objectives(panels: Mapping[str, pd.DataFrame]) -> list[str]:
    """How sums of scores rank panels, and what the truth has where a sum is the largest."""
    lines = [
        "Sums of scores: the rank correlation of panels, and the truth of the panel that the sum likes best, next to",
        "the largest truth there is.",
        "",
        f"| objective | {' | '.join(panels)} |",
        f"| --- |{' --- |' * len(panels)}",
    ]
    for name, weights in OBJECTIVES.items():
        cells: list[str] = []
        for table in panels.values():
            means: dict[str, np.ndarray] = {
                column: table.pivot_table(column, "adapter").to_numpy()[:, 0] for column in (*weights, "truth")
            }
            order, truth = sum(weight * means[metric] for metric, weight in weights.items()), means["truth"]
            chosen = truth[np.argmax(order)]
            cells.append(f"{ranks_agree(np.asarray(order), truth):+.2f}; {chosen:.3f} of {truth.max():.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where measurements are kept")
    parser.add_argument("--studies", nargs="*", type=Path, default=[], help="folders of finished studies of guidance")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    studies: dict[str, pd.DataFrame] = {}
    for root in arguments.studies:
        file = folder / f"study-{root.name}.csv"
        if not file.is_file():
            study_rows(root, folder / "cache").to_csv(file, index=False)
            print(f"measured {root.name}", flush=True)
        studies[root.name] = pd.read_csv(file)
    adapters = collect(
        folder,
        ((f"zog-{p.rate:g}-{p.rank}-{p.steps}", lambda work, p=p: subject_rows(p, work)) for p in SUBJECTS),
    )
    write(adapters, studies)


def write(adapters: pd.DataFrame, studies: Mapping[str, pd.DataFrame]) -> None:
    """The table: a row a metric and panel."""
    plain = [name for name in PROXIES if name not in {"diversity", PRESERVED}]
    parts = [("adapters of zog", adapters.query("not of_class"), [*plain, "diversity"])]
    parts.append(("adapters of zog, stars", adapters.query("of_class"), [PRESERVED]))
    parts += [(f"scales of {name.rpartition('-')[2]}", table, [*plain, "diversity"]) for name, table in studies.items()]
    lines = [
        "# Learned scores against pixel truth",
        "",
        f"`python -m tests.benchmarks.proxies FOLDER --studies …` on {platform.machine()}, torch {torch.__version__};",
        "the script says what is compared. Spearman's rank correlations with the truth, with 95 % intervals (bootstrap",
        "of adapters and prompts together). Panels: their means. Pictures: what different adapters drew for one prompt",
        "(means over its seeds), averaged over prompts.",
        "",
        "| metric | of | number | panels | pictures of one prompt |",
        "| --- | --- | --: | --: | --: |",
    ]
    for what, table, metrics in parts:
        for metric in metrics:
            against = "apart" if metric == "diversity" else "truth"
            name = f"-{metric}" if metric == PRESERVED else metric
            count = f"{table.adapter.nunique()} x {table.prompt.nunique()} prompts"
            lines.append(f"| {' | '.join((name, what, count, *correlations(table, metric, against)))} |")
    lines.append("")
    for what, table, _ in parts:
        means = table.groupby("adapter").truth.mean()
        lines.append(f"- {what}: a truth of {means.min():.3f} to {means.max():.3f}.")
    lines += ["", *objectives({what: table for what, table, metrics in parts if PRESERVED not in metrics})]
    (RESULTS / "proxies.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
