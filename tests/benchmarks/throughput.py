"""Training next to diffusers' example script of the same job: images per second, and where a step's time goes.

    git clone --depth 1 --branch v0.40.0 https://github.com/huggingface/diffusers FOLDER
    pip install datasets tensorboard        # what the scripts need besides this project
    python -m tests.benchmarks.throughput FOLDER/examples WORK [--steps 80]

Any version of the scripts will do that accepts the installed diffusers; they are run as they are, by their options.
(The committed numbers are of commit 58eb52c, which asks for 0.40.0.dev0 and is otherwise v0.40.0.) Both sides get the
same model folder, pictures, resolution, batch, steps, precision (float32), optimizer (AdamW, one rate), clipping, and
rank and places of LoRA. The scripts run at their defaults and, where they have options that save work (embeddings
computed before training, latents kept in memory), with those, too. A short run that is not counted fills our cache.
WORK keeps pictures, caches and what was measured: a run that was interrupted goes on.

All sides of a job are alive at once and take turns: one optimizer step each, while the others wait, so that whatever
else the machine does hits all alike. Steps are told apart by a hook of torch.optim, whoever wrote the loop; the first
ones are left out. Parts of a step are timed by wrapping classes that all sides use; "rest" is noise, loss, the loop,
progress and events. Results go to tests/benchmarks/results/throughput.md.
"""

# pyright: basic

import argparse
import functools
import hashlib
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PICTURES = ROOT / "studies" / "data" / "zog"
WEIGHTS = ROOT / "trainers" / "miniature" / "weights"
PROMPT = "a photo of a zog"
RESOLUTION, RANK, RATE, TOKENS = 64, 4, 1e-4, 300
SKIPPED = 10
"""Steps that are not counted: allocators, kernels and iterators are not yet warm."""
PARTS = ("read", "autoencoder", "text", "denoiser", "backward", "clip", "optimizer", "rest")


@dataclass(frozen=True)
class Job:
    """Something that a script of diffusers and a method of ours both do."""

    script: str
    """Below `examples`."""
    ours: Mapping[str, Any]
    """What is said of the method besides what all jobs share."""
    model: str
    options: Sequence[str]
    ways: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"as it is": ()})
    """Options of the script that do not change the job."""
    batch_sizes: Sequence[int] = (1, 4)


_SUBJECT = ("--instance_data_dir={pictures}", f"--instance_prompt={PROMPT}")
_ADAMW = ("--adam_weight_decay=0.01", "--max_grad_norm=1.0", "--lr_scheduler=constant", "--lr_warmup_steps=0")
JOBS = {
    "SDXL LoRA": Job(
        "text_to_image/train_text_to_image_lora_sdxl.py",
        {"kind": "sdxl_lora", "caption_dropout": 0.0},
        "sdxl",
        ("--train_data_dir={pictures}", "--caption_column=text"),
    ),
    "DreamBooth LoRA, SD": Job(
        "dreambooth/train_dreambooth_lora.py",
        {"kind": "dreambooth"},
        "sd",
        _SUBJECT,
        {"as it is": (), "its caches": ("--pre_compute_text_embeddings",)},
    ),
    "DreamBooth LoRA, SANA": Job(
        "dreambooth/train_dreambooth_lora_sana.py",
        {"kind": "dreambooth"},
        "sana",
        (*_SUBJECT, f"--max_sequence_length={TOKENS}", f"--lora_alpha={RANK}", "--lora_layers=to_q,to_k,to_v"),
        {"as it is": (), "its caches": ("--cache_latents",)},
        # The script embeds its prompt once, as one row, whatever the batch; its transformer then wants one picture.
        batch_sizes=(1,),
    ),
}


class Probe:
    """Ends this process's turn after every optimizer step, and says what the step took."""

    def __init__(self, said: int) -> None:
        self._said = os.fdopen(said, "w", buffering=1)
        self._parts = defaultdict[str, float](float)
        self._inside = False
        self._began = time.perf_counter()

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Count what a method of a class takes; calls within a part belong to that part."""
        whole = getattr(owner, name)

        @functools.wraps(whole)
        def timed(*args: Any, **options: Any) -> Any:
            if self._inside:
                return whole(*args, **options)
            self._inside, started = True, time.perf_counter()
            try:
                return whole(*args, **options)
            finally:
                self._inside = False
                self._parts[part] += time.perf_counter() - started

        setattr(owner, name, timed)

    def install(self) -> None:
        """Wrap what both sides use."""
        import accelerate
        import diffusers
        import transformers
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
        from torch.utils.data import dataloader

        for name in ("UNet2DConditionModel", "SanaTransformer2DModel"):
            self.wrap(getattr(diffusers, name), "forward", "denoiser")
        for name in ("AutoencoderKL", "AutoencoderDC"):
            self.wrap(getattr(diffusers, name), "encode", "autoencoder")
        for name in ("CLIPTextModel", "CLIPTextModelWithProjection", "Gemma2Model"):
            self.wrap(getattr(transformers, name), "forward", "text")
        self.wrap(dataloader._BaseDataLoaderIter, "__next__", "read")
        self.wrap(accelerate.Accelerator, "backward", "backward")
        self.wrap(accelerate.Accelerator, "clip_grad_norm_", "clip")
        register_optimizer_step_pre_hook(self._before)
        register_optimizer_step_post_hook(self._after)

    def _before(self, *_: object) -> None:
        self._started = time.perf_counter()

    def _after(self, *_: object) -> None:
        now = time.perf_counter()
        self._parts["optimizer"] += now - self._started
        step = now - self._began
        rest = step - sum(self._parts.values())
        self._said.write(json.dumps({**dict.fromkeys(PARTS, 0.0), **self._parts, "rest": rest, "step": step}) + "\n")
        sys.stdin.readline()
        self._parts.clear()
        self._began = time.perf_counter()


def ours(job: Job, batch_size: int, steps: int, folder: Path) -> None:
    """Train with this project, through a cache that stays in `folder`."""
    from trainers.methods.dreambooth import DreamboothConfig
    from trainers.methods.sdxl_lora import SdxlLoraConfig
    from trainers.rundir import RunDir
    from trainers.train import build_accelerator, train

    single = {} if job.ours["kind"] == "sdxl_lora" else {"instance_prompt": PROMPT}
    told = {
        **job.ours,
        "backbone": {"kind": job.model, "path": WEIGHTS / job.model},
        "data": {"kind": "folder", "path": PICTURES, "resolution": RESOLUTION, **single},
        "lora": {"rank": RANK},
        "optimizer": {"kind": "adamw", "lr": RATE, "weight_decay": 0.01},
        "schedule": {"kind": "constant"},
        "steps": steps,
        "batch_size": batch_size,
        "checkpoint_every": steps,
    }
    config = (DreamboothConfig if single else SdxlLoraConfig).model_validate(told)
    with tempfile.TemporaryDirectory() as run:
        train(config, RunDir(Path(run)), 0, folder / "cache", build_accelerator(config))


def theirs(job: Job, way: str, batch_size: int, steps: int, paths: tuple[Path, Path]) -> None:
    """Run diffusers' script in this process; the second path has the pictures as it reads them."""
    examples, folder = paths
    pictures = folder / ("captioned" if job.model == "sdxl" else "pictures")
    with tempfile.TemporaryDirectory() as output:
        shared = {
            "pretrained_model_name_or_path": WEIGHTS / job.model,
            "output_dir": output,
            "resolution": RESOLUTION,
            "train_batch_size": batch_size,
            "max_train_steps": steps,
            "checkpointing_steps": 10 * steps,
            "learning_rate": RATE,
            "rank": RANK,
            "mixed_precision": "no",
            "seed": 0,
        }
        own = [option.format(pictures=pictures) for option in job.options]
        words = [f"--{name}={value}" for name, value in shared.items()]
        sys.argv = [job.script, *words, "--center_crop", *_ADAMW, *own, *job.ways[way]]
        runpy.run_path(str(examples / job.script), run_name="__main__")


def inside(words: Sequence[str], paths: tuple[Path, Path]) -> None:
    """One side, in this process."""
    name, way, batch_size, steps, said = words
    Probe(int(said)).install()
    if way == "ours":
        ours(JOBS[name], int(batch_size), int(steps), paths[1])
    else:
        theirs(JOBS[name], way, int(batch_size), int(steps), paths)


def prepare(folder: Path) -> None:
    """Lay out the pictures as the scripts read them."""
    lines: list[str] = []
    for layout in ("pictures", "captioned"):
        shutil.copytree(PICTURES, folder / layout, ignore=shutil.ignore_patterns("*.txt"), dirs_exist_ok=True)
    for picture in sorted(PICTURES.glob("*.png")):
        text = picture.with_suffix(".txt").read_text(encoding="utf-8").strip()
        lines.append(json.dumps({"file_name": picture.name, "text": text}))
    (folder / "captioned" / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


class Side:
    """A process that trains a step whenever it is told to."""

    def __init__(self, words: Sequence[str], arguments: argparse.Namespace) -> None:
        clock = time.monotonic()
        heard, said = os.pipe()
        command = [sys.executable, "-m", "tests.benchmarks.throughput", arguments.examples, arguments.folder]
        self._log = (arguments.folder / f"{words[1]}.txt").open("w")
        self._process = subprocess.Popen(
            [*command, "--inside", *words, str(said)], cwd=ROOT, pass_fds=(said,), text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(arguments.folder / "datasets")},
            stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        os.close(said)
        self._heard = os.fdopen(heard)
        self.steps = [self._hear()]
        self.before = time.monotonic() - clock
        """Seconds until the first step was taken."""

    def _hear(self) -> dict[str, float]:
        if line := self._heard.readline():
            return json.loads(line)
        sys.exit(Path(self._log.name).read_text()[-3000:])

    def take(self) -> None:
        """Let it take a step."""
        print(file=self._process.stdin, flush=True)
        self.steps.append(self._hear())

    def end(self) -> float:
        """Let it save and stop; the seconds of its work, from its start, less those that it waited."""
        clock = time.monotonic()
        self._process.communicate("\n")
        return self.before + sum(step["step"] for step in self.steps[1:]) + time.monotonic() - clock


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By job and batch size, and then by way: every step that counts, and the seconds of the whole."""
    file = arguments.folder / "measured.json"
    measured = json.loads(file.read_text()) if file.exists() else {}
    if not file.exists():
        prepare(arguments.folder)
    wanted = [(job, size) for job in arguments.jobs for size in JOBS[job].batch_sizes]
    for name, batch_size in [(job, size) for job, size in wanted if f"{job} | {size}" not in measured]:
        if not any(key.startswith(name) for key in measured):
            Side([name, "ours", "1", "1"], arguments).end()
        told = str(batch_size), str(arguments.steps)
        sides = {way: Side([name, way, *told], arguments) for way in ("ours", *JOBS[name].ways)}
        for _ in range(arguments.steps - 1):
            for side in sides.values():
                side.take()
        found = {way: {"whole": side.end(), "steps": side.steps[SKIPPED:]} for way, side in sides.items()}
        measured[f"{name} | {batch_size}"] = found
        file.write_text(json.dumps(measured))
    return measured


def report(measured: Mapping[str, Any], arguments: argparse.Namespace) -> list[str]:
    """The page."""
    import diffusers
    import torch

    files = [arguments.examples / job.script for job in JOBS.values()]
    scripts = ", ".join(f"`{file.name}` {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}" for file in files)
    return [
        "# Throughput of training",
        "",
        f"`python -m tests.benchmarks.throughput EXAMPLES WORK --steps {arguments.steps}` on {platform.machine()}, "
        f"{torch.get_num_threads()} thread, torch {torch.__version__}, diffusers {diffusers.__version__}, at a load of "
        f"{os.getloadavg()[2]:.0f} on {os.cpu_count()} processors. Scripts, by sha256: {scripts}.",
        "",
        "Miniature models, pictures of 64 pixels, float32, caches warm. In brackets: the worst and the best quarter of "
        "the run. Whole: seconds of the process with imports, loading and saving, which are not done in turns: what "
        "else the machine does may disturb one side alone.",
        "",
        "| job | batch | script | ours, images/s | theirs | ours / theirs | whole, ours | theirs |",
        "| --- | --: | --- | --: | --: | --: | --: | --: |",
        *(_compared(key, way, sides) for key, sides in measured.items() for way in sides if way != "ours"),
        "",
        "Milliseconds of a step. Removed: the share of the script's step that reads and encodes pictures and texts, "
        "which we do once, before training, for all trials. Our AdamW is torch's fused one; SANA's prompts come to its "
        "transformer without their padding.",
        "",
        "| job | batch | | " + " | ".join(PARTS) + " | step | removed |",
        "| --- | --: | --- |" + " --: |" * (len(PARTS) + 2),
        *(_parts(key, way, side["steps"]) for key, sides in measured.items() for way, side in sides.items()),
    ]


def _compared(key: str, way: str, sides: Mapping[str, Any]) -> str:
    mine, other = ([step["step"] for step in sides[name]["steps"]] for name in ("ours", way))
    batch, edges = int(key.split(" | ")[1]), [len(mine) * i // 4 for i in range(5)]
    quarters = [sum(other[a:b]) / sum(mine[a:b]) for a, b in pairwise(edges)]
    speeds = " | ".join(f"{batch * len(steps) / sum(steps):.1f}" for steps in (mine, other))
    ratio = f"{sum(other) / sum(mine):.2f} ({min(quarters):.2f}–{max(quarters):.2f})"
    return f"| {key} | {way} | {speeds} | {ratio} | {sides['ours']['whole']:.1f} | {sides[way]['whole']:.1f} |"


def _parts(key: str, way: str, steps: Sequence[Mapping[str, float]]) -> str:
    means = {name: 1000 * sum(step[name] for step in steps) / len(steps) for name in (*PARTS, "step")}
    removed = sum(means[name] for name in PARTS[:3]) / means["step"]
    return f"| {key} | {way} | {' | '.join(f'{value:.1f}' for value in means.values())} | {removed:.0%} |"


def main() -> None:
    """Measure every job and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", type=Path, help="diffusers' folder of example scripts")
    parser.add_argument("folder", type=Path, metavar="WORK", help="kept between runs; outside the repository")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--inside", nargs=5, metavar="WORD", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        inside(arguments.inside, (arguments.examples, arguments.folder))
        return
    if arguments.steps < 2 * SKIPPED:
        parser.error(f"--steps: expected at least {2 * SKIPPED}")
    arguments.examples, arguments.folder = arguments.examples.resolve(), arguments.folder.resolve()
    lines = report(measure(arguments), arguments)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "throughput.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
