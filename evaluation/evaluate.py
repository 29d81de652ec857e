"""A trained backbone's scores: draw the panel, judge every picture once, keep what was measured."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, product
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.encoders import ClipEncoders
from evaluation.grid import draw_grid
from evaluation.records import Record, panel, write_records
from evaluation.statistics import estimate
from evaluation.subjects import MAX_SLUG
from trainers.cache import Cache
from trainers.data.transforms import open_picture
from trainers.prompt import Prompt, Request, Sample
from trainers.rundir import Score
from trainers.sampling import generate

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Mapping, Sequence
    from pathlib import Path

    import torch
    from jaxtyping import Float
    from PIL import Image

    from evaluation.config import EvaluateConfig
    from evaluation.metric import Metric, Scorer
    from trainers.backbone import Model
    from trainers.batch import Source
    from trainers.rundir import RunDir

    Seen = Mapping[str, Float[np.ndarray, " k"]]
    """What each scorer remembers of a picture."""


@dataclass(frozen=True)
class Ranks:
    """The processes that share a panel, seen from one of them."""

    rank: int = 0
    world: int = 1
    gather: Callable[[list[Any]], list[Any]] = list
    """Everyone's items in one list, on every rank (`accelerate.utils.gather_object`)."""


def open_scorers(
    config: EvaluateConfig, references: Sequence[Source], device: torch.device, cache: Path
) -> dict[str, Scorer]:
    """Every metric with its models in memory, a model that several use once.

    Args:
        config: Names the metrics.
        references: Held-out pictures.
        device: Of the models.
        cache: Folder of embeddings that studies share.

    Raises:
        ModelError: A scoring model is missing or broken.
        DataError: A metric needs references and there are none, or one cannot be read.
    """
    encoders = ClipEncoders(device, Cache(cache))
    return {name: metric.open(encoders, references) for name, metric in config.metrics.items()}


def evaluate(
    model: Model,
    config: EvaluateConfig,
    scorers: Mapping[str, Scorer],
    run: RunDir,
    ranks: Ranks | None = None,
) -> dict[str, Score]:
    """Draw the panel with `model`, score it, and leave `samples/`, `grid.png` and `records.jsonl` in the run.

    Pictures go to ranks in turn, prompt after prompt. A batch is looked at as soon as it is drawn: whatever the size
    of the panel, no more than a batch of pictures is in memory, and none is read back to be judged. What an earlier
    attempt left behind is drawn again, so neither the number of ranks nor a crash changes a score by more than
    floating-point noise. Sampling runs under the caller's autocast; scoring is fp32 always.

    Args:
        model: With the trained adapter active.
        config: The panel and its metrics.
        scorers: What `open_scorers` opened for `config`.
        run: Seen by all ranks.
        ranks: One process by default.

    Returns:
        Each metric's score, on every rank.

    Raises:
        NonFiniteError: A picture came out with NaN or infinite pixels.
    """
    ranks = ranks or Ranks()
    files = name_files(config.all_prompts, config.seeds)
    share = dict(list(files.items())[ranks.rank :: ranks.world])
    panels = split_panel(files, config.class_prompts, config.metrics, scorers)
    seen = _draw(model, config, share, panels, run, ranks)
    with _stage(run, "score", ranks):
        records: list[Record] = []
        for one, found in zip(panels, seen, strict=True):
            records += judge(one, dict(ranks.gather(found)))
        if ranks.rank == 0:
            write_records(run.records, records)
            pictures = {(record.prompt, f"seed {record.seed}"): run.path / record.file for record in records}
            _save(draw_grid(pictures), run.samples / "grid.png")
    return {
        name: _summarise(panel(records, name), scorer.model, higher_is_better=config.metrics[name].higher_is_better)
        for name, scorer in scorers.items()
    }


def _draw(
    model: Model,
    config: EvaluateConfig,
    share: Mapping[Request, str],
    panels: Sequence[JudgedPanel],
    run: RunDir,
    ranks: Ranks,
) -> list[list[tuple[str, Seen]]]:
    """Draw a rank's share into the run; what is remembered of its pictures, for each panel."""
    seen: list[list[tuple[str, Seen]]] = [[] for _ in panels]
    drawn = generate(model, list(share), config)
    for _ in range(0, len(share), config.batch_size):
        with _stage(run, "sample", ranks):
            batch = list(islice(drawn, config.batch_size))
            for sample in batch:
                _save(sample.image, run.path / share[Request(sample.prompt, sample.seed)])
        with _stage(run, "score", ranks):
            for panel, found in zip(panels, seen, strict=True):
                found.extend(see(batch, panel))
    return seen


def name_files(prompts: Sequence[Prompt], seeds: Sequence[int]) -> dict[Request, str]:
    """Every picture of a panel, prompt after prompt, and its file relative to the run directory."""
    files: dict[Request, str] = {}
    for (place, prompt), seed in product(enumerate(prompts), seeds):
        words = re.sub(r"[^a-z0-9]+", "-", str(prompt).lower())[:MAX_SLUG].strip("-")
        files[Request(prompt, seed)] = f"samples/{place:04d}_{words}_{seed}.png"
    return files


@dataclass(frozen=True)
class JudgedPanel:
    """Pictures, and the scorers that judge all of them together."""

    files: Mapping[Request, str]
    scorers: Mapping[str, Scorer]


def split_panel(
    files: Mapping[Request, str],
    class_prompts: Collection[Prompt],
    metrics: Mapping[str, Metric],
    scorers: Mapping[str, Scorer],
) -> list[JudgedPanel]:
    """What is judged by the metrics of the subject, and what by those of its class; without a part that is empty."""
    found: list[JudgedPanel] = []
    for of_class in (False, True):
        own = {one: file for one, file in files.items() if (one.prompt in class_prompts) is of_class}
        judges = {name: scorer for name, scorer in scorers.items() if metrics[name].of_class is of_class}
        if own and judges:
            found.append(JudgedPanel(own, judges))
    return found


def look(folder: Path, panel: JudgedPanel, batch_size: int) -> list[tuple[str, Seen]]:
    """Read each picture once, in batches; its file, and what each scorer remembers of it.

    Raises:
        DataError: A picture cannot be read.
    """
    found: list[tuple[str, Seen]] = []
    requests = list(panel.files)
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        samples = [Sample(one.prompt, one.seed, open_picture(folder / panel.files[one])) for one in batch]
        found += see(samples, panel)
    return found


def see(samples: Sequence[Sample], panel: JudgedPanel) -> list[tuple[str, Seen]]:
    """The file of each of these pictures that belongs to the panel, and what each scorer remembers of it."""
    own = [sample for sample in samples if Request(sample.prompt, sample.seed) in panel.files]
    columns = {name: scorer.look(own) for name, scorer in panel.scorers.items()} if own else {}
    return [
        (panel.files[Request(sample.prompt, sample.seed)], {name: column[row] for name, column in columns.items()})
        for row, sample in enumerate(own)
    ]


def judge(panel: JudgedPanel, seen: Mapping[str, Seen]) -> list[Record]:
    """Every picture's record, in the panel's order, of what was `seen` on it by whomever."""
    requests = list(panel.files)
    columns = {
        name: scorer.judge(requests, np.stack([seen[file][name] for file in panel.files.values()]))
        for name, scorer in panel.scorers.items()
    }
    return [
        Record(
            prompt=str(request.prompt),
            seed=request.seed,
            file=panel.files[request],
            values={name: column[row] for name, column in columns.items()},
        )
        for row, request in enumerate(requests)
    ]


def _summarise(values: Mapping[tuple[str, int], float], model: str, *, higher_is_better: bool) -> Score:
    found = estimate(values)
    return Score(
        mean=found.mean,
        standard_error=found.standard_error,
        num_samples=found.num_samples,
        num_undefined=found.num_undefined,
        model=model,
        higher_is_better=higher_is_better,
    )


@contextmanager
def _stage(run: RunDir, stage: str, ranks: Ranks) -> Generator[None]:
    if ranks.rank == 0:
        run.append("stage", stage=stage, state="start")
    yield
    if ranks.rank == 0:
        run.append("stage", stage=stage, state="end")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    # Lossless at every level; level 1 is several times quicker than the default for a little more disk.
    image.save(temporary, format="PNG", compress_level=1)
    temporary.replace(path)
