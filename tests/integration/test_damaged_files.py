"""Every file of a model folder, damaged in every way a download can be: an error in one line that names the file."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluation.encoders import ClipEncoders
from evaluation.metric import Metric
from evaluation.metrics.clip import ClipText
from evaluation.metrics.dino import Dino
from evaluation.metrics.preference import Preference
from trainers.backbones.sana import SanaConfig
from trainers.backbones.sdxl import SdxlConfig
from trainers.cache import Cache
from trainers.errors import ModelError
from trainers.pretrained import PretrainedConfig

WEIGHTS = Path(__file__).parents[2] / "trainers" / "miniature" / "weights"
EVERY = 3
"""One damaged file in so many is tried; all of them take a minute."""
CPU = torch.device("cpu")

Damage = Callable[[bytes], bytes | None]

DAMAGES: dict[str, Damage] = {
    "missing": lambda _: None,
    "empty": lambda _: b"",
    "cut in half": lambda content: content[: len(content) // 2],
    "a page that says the file is not found": lambda _: b"\xff\x00<html>404 Not Found</html>" * 20,
    "JSON of another shape": lambda _: b"[]",
    "a header of another shape": lambda _: b"\x0c\0\0\0\0\0\0\0" + b'{"name": []}',
}


def _backbone(config: type[PretrainedConfig]) -> Callable[[Path, Path], None]:
    def use(folder: Path, _: Path) -> None:
        model = config.model_validate({"path": folder})
        model.check()
        model.load(CPU, torch.float32)

    return use


def _metric(make: Callable[[Path], Metric]) -> Callable[[Path, Path], None]:
    def use(folder: Path, cache: Path) -> None:
        metric = make(folder)
        metric.check()
        Image.new("RGB", (64, 64)).save(reference := cache.with_name("reference.png"))
        metric.open(ClipEncoders(CPU, Cache(cache)), [reference])

    return use


USES = {
    "sdxl": _backbone(SdxlConfig),
    "sana": _backbone(SanaConfig),
    "clip": _metric(lambda folder: ClipText(model=folder)),
    "dino": _metric(lambda folder: Dino(model=folder)),
    "preference": _metric(lambda folder: Preference(model=folder, checkpoint=folder / "preference.pt")),
}
OPTIONAL = {"instruction.txt"}
"""Any text is an instruction, and no file is the stock pipeline's."""
NOT_NEEDED = {("clip", "tokenizer_config.json"), ("preference", "tokenizer_config.json")}
"""open_clip reads `tokenizer.json` alone where this one is absent."""


def damaged() -> Iterator[tuple[str, Path, str]]:
    """Model, file, and what happened to it."""
    for name in USES:
        for file in sorted(path for path in (WEIGHTS / name).rglob("*") if path.is_file()):
            for damage in DAMAGES:
                of_suffix = {"JSON": ".json", "a he": ".safetensors"}.get(damage[:4], file.suffix)
                if file.name in OPTIONAL or file.suffix != of_suffix:
                    continue
                if damage != "missing" or (name, file.name) not in NOT_NEEDED:
                    yield name, file.relative_to(WEIGHTS / name), damage


@pytest.mark.parametrize(("model", "file", "damage"), list(itertools.islice(damaged(), 0, None, EVERY)))
def test_a_damaged_file_of_a_model_is_named_in_one_line(tmp_path: Path, model: str, file: Path, damage: str):
    folder = tmp_path / model
    shutil.copytree(WEIGHTS / model, folder, copy_function=lambda source, to: Path(to).symlink_to(source))
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if (rest := DAMAGES[damage](content)) is not None:
        (folder / file).write_bytes(rest)
    with pytest.raises(ModelError) as raised:
        USES[model](folder, tmp_path / "cache")
    message = str(raised.value)
    assert "\n" not in message
    assert file.name in message


def test_a_folder_of_another_model_is_called_by_its_name() -> None:
    with pytest.raises(ModelError, match=r"model_index\.json says StableDiffusionPipeline"):
        SanaConfig(path=WEIGHTS / "sd").check()
