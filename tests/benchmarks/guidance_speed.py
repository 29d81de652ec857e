"""What a guidance evaluation costs: pictures in batches of one call a step, next to one picture at a time.

    python -m tests.benchmarks.guidance_speed FOLDER [--models sdxl sd sana] [--rounds 3] [--parts tables rows]

Pictures of one adapter are drawn in several ways, in turns, on one thread:

- ours: prompts are encoded once, a step is one call of all rows, a batch is decoded at once;
- one at a time: for each picture its prompt and the null prompt are encoded, every term that guidance combines is a
  call of its own to a model of its own (so no time goes into switching adapters), and one picture is decoded;
- stock: diffusers' pipeline with the adapter, called once for each picture; classifier-free guidance alone.

Then every kind of guidance draws in batches of several sizes. Last, weight-interpolated and classifier-free guidance
are compared at 16 rows by the processor's time, which other work on the machine changes little: in turns, in both
orders. The adapter's weights are random: time does not depend on them. FOLDER, which is not in the repository, keeps
what was measured of each model; the table of all of them goes to tests/benchmarks/results/guidance_speed.md.
"""

import argparse
import platform
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from trainers.adapters.lora import LoraConfig, add_lora, save_lora
from trainers.backbone import Backbone, Model, SchedulerName
from trainers.backbones.sana import SanaConfig
from trainers.backbones.sd import SdConfig
from trainers.backbones.sdxl import SdxlConfig
from trainers.guidance import AutoGuidance, ClassifierFree, Guidance, SamplingConfig, WeightInterpolated
from trainers.miniature.world import COLOURS
from trainers.pretrained import PretrainedConfig
from trainers.prompt import Prompt, Request
from trainers.sampling import generate, noise_rng
from trainers.version import WEAK, Lineage, Version

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
CONFIGS: Mapping[str, type[PretrainedConfig]] = {"sdxl": SdxlConfig, "sd": SdConfig, "sana": SanaConfig}
GUIDANCES: Mapping[str, Guidance] = {
    "cfg": ClassifierFree(scale=5.0),
    "wig, omega 0.3": WeightInterpolated(scale=5.0, omega=0.3),
    "autoguidance, weak checkpoint": AutoGuidance(scale=2.0, cfg_scale=5.0),
}
PROMPTS = [Prompt(text=f"a star on a {colour} background") for colour in COLOURS][:8]
REQUESTS = [Request(prompt, seed) for seed in range(4) for prompt in PROMPTS]
FEW = 3
"""Pictures that are drawn one at a time."""
BATCH = 16
BATCHES = (1, 8, 32)
STEPS = 10
STAGES = ("encode", "denoise", "decode", "all")
ROWS, ROUNDS_OF_ROWS = 16, 8


@dataclass
class Clock:
    """Seconds of the stages of one way of drawing."""

    num_pictures: int
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Take the time of a stage."""
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started


class Timed:
    """A model whose stages are timed."""

    def __init__(self, model: Model, clock: Clock) -> None:
        self._model, self._clock = model, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def prepare(self, *args: Any, **options: Any) -> Any:
        """As the model's."""
        with self._clock.stage("encode"):
            return self._model.prepare(*args, **options)

    def denoise(self, *args: Any) -> Any:
        """As the model's."""
        with self._clock.stage("denoise"):
            return self._model.denoise(*args)

    def decode(self, latents: Any) -> Any:
        """As the model's."""
        with self._clock.stage("decode"):
            return self._model.decode(latents)


def adapted(config: PretrainedConfig, seed: int) -> Backbone:
    """A model with an adapter of rank 8."""
    model = config.load(torch.device("cpu"), torch.float32)
    add_lora(model.denoiser, LoraConfig(rank=8), config.lora_targets, seed)
    for name, parameter in model.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
    model.denoiser.requires_grad_(requires_grad=False).eval()
    return model


class Contest:
    """One model of the family, and the ways of drawing with it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.config = CONFIGS[name].model_validate({"path": ROOT / "trainers" / "miniature" / "weights" / name})
        self.scheduler: SchedulerName = self.config.schedulers[0]
        self.model, self.weak = adapted(self.config, 0), adapted(self.config, 1)
        networks = [{next(iter(one.networks)): one.denoiser} for one in (self.model, self.weak)]
        for place, network in zip((folder, folder / "weak"), networks, strict=True):
            save_lora(place, self.model.pipeline, network)
        self.model.lineage = Lineage(folder)
        self._stack = ExitStack()
        self._apart: dict[Version, Backbone] = {WEAK: self.weak}
        self.pipeline: Any = self.model.pipeline.from_pretrained(
            self.config.path, local_files_only=True, torch_dtype=torch.float32
        )
        self.pipeline.load_lora_weights(folder)
        self.pipeline.set_progress_bar_config(disable=True)

    def sampling(self, guidance: Guidance, batch_size: int) -> SamplingConfig:
        """How pictures are drawn."""
        return SamplingConfig(
            resolution=64, steps=STEPS, scheduler=self.scheduler, guidance=guidance, batch_size=batch_size
        )

    def ours(self, guidance: Guidance, batch_size: int, num_pictures: int) -> Clock:
        """Batches, through the project's own sampler."""
        clock = Clock(num_pictures)
        with clock.stage("all"):
            timed: Any = Timed(self.model, clock)
            list(generate(timed, REQUESTS[:num_pictures], self.sampling(guidance, batch_size)))
        return clock

    @torch.no_grad()
    def alone(self, guidance: Guidance) -> Clock:
        """One picture at a time; every term is a call of its own."""
        clock, model = Clock(FEW), self.model
        with clock.stage("all"):
            for request in REQUESTS[:FEW]:
                with clock.stage("encode"):
                    null, prompt = (model.prepare([told], 64, 64) for told in (None, request.prompt))
                scheduler = model.sampling_scheduler(self.scheduler)
                scheduler.set_timesteps(STEPS)
                latents = torch.randn(1, *model.latent_shape(64, 64), generator=noise_rng(request))
                latents = latents * scheduler.init_noise_sigma
                for t in scheduler.timesteps:
                    x_t, prediction = scheduler.scale_model_input(latents, t), torch.zeros_like(latents)
                    for term in guidance.terms():
                        with clock.stage("denoise"):
                            told = prompt if term.condition == "prompt" else null
                            prediction += term.weight * self._version(term.version).denoise(x_t, t[None], told)
                    latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
                with clock.stage("decode"):
                    model.decode(latents)
        return clock

    def stock(self) -> Clock:
        """diffusers' pipeline, one picture a call."""
        clock, options = Clock(FEW), dict[str, Any]()
        if isinstance(self.config, SanaConfig):
            instruction = self.config.instruction_text.split("\n")
            options = {"complex_human_instruction": instruction, "use_resolution_binning": False}
        with clock.stage("all"):
            for request in REQUESTS[:FEW]:
                self.pipeline(
                    str(request.prompt), num_inference_steps=STEPS, guidance_scale=5.0, height=64, width=64,
                    generator=noise_rng(request), **options,
                )  # fmt: skip
        return clock

    def _version(self, version: Version) -> Backbone:
        """A model of its own for each version."""
        if version == Version():
            return self.model
        if version not in self._apart:
            self._apart[version] = adapted(self.config, 0)
            self._stack.enter_context(self._apart[version].adapter_scale(version.scale))
        return self._apart[version]


def measure(contests: Mapping[str, Callable[[], Clock]], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds a picture of every contestant's stages; they take turns."""
    found: dict[str, list[Clock]] = {name: [] for name in contests}
    for _ in range(rounds):
        for name, draw in contests.items():
            found[name].append(draw())
    return {
        name: {stage: median(1000 * clock.seconds[stage] / clock.num_pictures for clock in clocks) for stage in STAGES}
        for name, clocks in found.items()
    }


def compare(name: str, rounds: int) -> list[str]:
    """The tables of one model."""
    with TemporaryDirectory() as folder:
        contest = Contest(name, Path(folder))
        ways: dict[str, Callable[[], Clock]] = {}
        for kind, guidance in GUIDANCES.items():
            ways[f"{kind}: ours"] = partial(contest.ours, guidance, BATCH, BATCH)
            ways[f"{kind}: one at a time"] = partial(contest.alone, guidance)
        ways["cfg: stock"] = contest.stock
        apart = measure(ways, rounds)
        sizes = {
            f"{kind} {size}": partial(contest.ours, guidance, size, max(size, 8))
            for size in BATCHES
            for kind, guidance in GUIDANCES.items()
        }
        batched = measure(sizes, rounds)
    return [f"## {name}", "", *_ways(apart), "", *_sizes(batched)]


def compare_rows(name: str) -> str:
    """A line: what a row of its own scale costs, by the processor; medians, and of the ratio of each round."""
    cfg, wig = (GUIDANCES[kind] for kind in ("cfg", "wig, omega 0.3"))
    seconds: list[tuple[float, float]] = []
    with TemporaryDirectory() as folder:
        contest = Contest(name, Path(folder))
        for number in range(ROUNDS_OF_ROWS + 1):
            spent: dict[str, float] = {}
            for guidance in (cfg, wig) if number % 2 else (wig, cfg):
                started = time.process_time()
                contest.ours(guidance, ROWS // 2, ROWS // 2)
                spent[guidance.model_dump()["kind"]] = (time.process_time() - started) * 1000 / (ROWS // 2)
            seconds.append((spent["cfg"], spent["wig"]))
    counted = seconds[1:]  # the first warms up
    plain, own = (median(column) for column in zip(*counted, strict=True))
    ratios = sorted(theirs / ours for ours, theirs in counted)
    return f"| {name} | {plain:.0f} | {own:.0f} | {median(ratios):.3f} | {ratios[0]:.3f} to {ratios[-1]:.3f} |"


def _ways(apart: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = [
        "| guidance | way | pictures/s | ours is faster by | encoding, ms | denoiser, ms | decoding, ms | all, ms |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for name, spent in apart.items():
        kind, way = name.split(": ")
        ratio = "" if way == "ours" else f"{spent['all'] / apart[f'{kind}: ours']['all']:.2f}"
        cells = ["" if way == "stock" and stage != "all" else f"{spent[stage]:.1f}" for stage in STAGES]
        lines.append(f"| {kind} | {way} | {1000 / spent['all']:.2f} | {ratio} | " + " | ".join(cells) + " |")
    return lines


def _sizes(batched: Mapping[str, Mapping[str, float]]) -> list[str]:
    first, *others = GUIDANCES
    header = [f"{kind} / {first}" for kind in others]
    lines = [
        f"| pictures a batch | rows of {first} | {first}, ms a picture | " + " | ".join(header) + " |",
        "| --: | --: | --: |" + " --: |" * len(others),
    ]
    for size in BATCHES:
        plain = batched[f"{first} {size}"]["all"]
        ratios = [f"{batched[f'{kind} {size}']['all'] / plain:.2f}" for kind in others]
        lines.append(f"| {size} | {2 * size} | {plain:.1f} | " + " | ".join(ratios) + " |")
    return lines


def _rows(files: Sequence[Path]) -> list[str]:
    return [
        f"## {ROWS} rows, by the processor",
        "",
        f"Milliseconds of the processor a picture, medians of {ROUNDS_OF_ROWS} rounds in turns, in both orders.",
        "",
        "| model | cfg | wig, omega 0.3 | wig / cfg in a round, median | least to most |",
        "| --- | --: | --: | --: | --- |",
        *(file.read_text(encoding="utf-8").strip() for file in files if file.exists()),
    ]


def main() -> None:
    """Measure what is asked for, and write the tables of all that was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where what was measured is kept")
    parser.add_argument("--models", nargs="*", choices=tuple(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="*", choices=("tables", "rows"), default=["tables", "rows"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.models:
        if "tables" in arguments.parts:
            tables = "\n".join(compare(name, arguments.rounds))
            (arguments.folder / f"{name}.md").write_text(tables + "\n", encoding="utf-8")
        if "rows" in arguments.parts:
            (arguments.folder / f"{name}-rows.txt").write_text(compare_rows(name) + "\n", encoding="utf-8")
    measured = [arguments.folder / f"{name}.md" for name in CONFIGS]
    text = [
        "# Speed of guidance",
        "",
        f"`python -m tests.benchmarks.guidance_speed FOLDER --rounds {arguments.rounds}` on {platform.machine()}, one "
        f"thread, torch {torch.__version__}.",
        f"Pictures of 64 pixels, {STEPS} steps, LoRA of rank 8; medians of {arguments.rounds} rounds in turns. Times",
        f"are a picture's; ours in the first table of a model is in batches of {BATCH}. The script describes the ways.",
        "",
        *(file.read_text(encoding="utf-8") for file in measured if file.exists()),
        *_rows([arguments.folder / f"{name}-rows.txt" for name in CONFIGS]),
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "guidance_speed.md").write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
