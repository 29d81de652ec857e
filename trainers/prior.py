"""Pictures of a subject's class, which keep training from forgetting it (Ruiz et al., 2023, arXiv:2208.12242)."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt

from trainers.backbone import SchedulerName
from trainers.batch import Example
from trainers.config import Config, LocalPath
from trainers.data.folder import FolderConfig
from trainers.errors import ConfigError
from trainers.guidance import ClassifierFree, Guidance, SamplingConfig
from trainers.rundir import name_temporary

if TYPE_CHECKING:
    from trainers.backbone import BackboneConfig
    from trainers.batch import DataConfig
    from trainers.frozen import Frozen, Images


class PriorConfig(Config):
    """Pictures of the class: a folder's, and as many more as are missing, drawn by the untrained model."""

    prompt: Annotated[str, Field(min_length=1)]
    """What they show, such as "a photo of a dog"."""
    weight: NonNegativeFloat = 1.0
    """Factor of the class's loss."""
    count: PositiveInt = 100
    """How many there are to be."""
    path: LocalPath | None = None
    """A folder of pictures to use first. Nothing is ever written there: what is drawn lies in the cache."""
    steps: PositiveInt = 25
    """Denoiser calls per drawn picture."""
    scheduler: SchedulerName = "dpmpp_2m"
    guidance: Guidance = ClassifierFree()
    batch_size: PositiveInt = 4
    """Pictures drawn at once."""

    def check(self, data: DataConfig, backbone: BackboneConfig) -> None:
        """Find what is wrong before anything is loaded.

        Raises:
            DataError: The folder has no pictures.
            ConfigError: Training pictures are not square.
            ModelError: The model cannot draw with the scheduler.
        """
        height, width = data.size
        if height != width:
            raise ConfigError(f"train.prior: training pictures are {height} x {width}; expected square ones")
        self._sampling(height).check_model(backbone)
        if self.path is not None:
            self._reader(self.path, height).check()

    def encode(self, frozen: Frozen, resolution: int) -> Images:
        """The class's pictures as the denoiser needs them; what is missing is drawn by `frozen`'s untrained model."""
        from trainers.frozen import encode_examples, encode_images

        own = encode_images(frozen, self._reader(self.path, resolution)) if self.path else None
        count = min(self.count, len(own.split.train)) if own else 0
        if own and count == self.count:
            return own.first(count)
        with tempfile.TemporaryDirectory() as scratch:
            folder = frozen.cache.folder(self._key(frozen, resolution)) if frozen.cache else Path(scratch)
            files = [folder / f"{seed:04d}.png" for seed in range(self.count - count)]
            self._draw(frozen, resolution, files)
            examples = [Example(hashlib.sha256(file.read_bytes()).hexdigest(), file, self.prompt) for file in files]
            drawn = encode_examples(frozen, self._reader(folder, resolution), examples)
        return own.joined(drawn) if own else drawn

    def _draw(self, frozen: Frozen, resolution: int, files: list[Path]) -> None:
        """Draw the files that do not exist; every process its share."""
        from trainers.frozen import told
        from trainers.prompt import Prompt, Request
        from trainers.sampling import generate

        accelerator = frozen.accelerator
        # Whose a picture is depends on its seed alone: another trial may draw some between two processes' looks.
        rank, world = (accelerator.process_index, accelerator.num_processes) if frozen.cache else (0, 1)
        share = [seed for seed in range(rank, len(files), world) if not files[seed].exists()]
        requests = [Request(Prompt(text=self.prompt), seed) for seed in share]
        with accelerator.autocast():
            drawn = generate(frozen.backbone, requests, self._sampling(resolution))
            for sample in told(drawn, "class pictures", len(share)):
                file = files[sample.seed]
                temporary = name_temporary(file)
                sample.image.save(temporary, format="PNG")
                temporary.replace(file)
        accelerator.wait_for_everyone()

    def _sampling(self, resolution: int) -> SamplingConfig:
        return SamplingConfig(
            resolution=resolution,
            steps=self.steps,
            scheduler=self.scheduler,
            guidance=self.guidance,
            batch_size=self.batch_size,
        )

    def _key(self, frozen: Frozen, resolution: int) -> str:
        """Everything that determines what is drawn, save for the number of the picture."""
        from trainers.cache import digest

        model_config = frozen.config
        files = (*model_config.denoiser_files(), *model_config.text_files(), *model_config.image_files())
        sampling = self._sampling(resolution).model_dump_json(exclude={"batch_size"})
        config = frozen.backbone.sampling_scheduler(self.scheduler).config
        # What diffusers notes for itself stands in another order in every process.
        noise = str(sorted(item for item in config.items() if not item[0].startswith("_")))
        model = frozen.describe(files, frozen.backbone.dtype)
        return digest("class", self.prompt, sampling, noise, model, *model_config.text_options)

    def _reader(self, folder: Path, resolution: int) -> FolderConfig:
        return FolderConfig(path=folder, resolution=resolution, instance_prompt=self.prompt)
