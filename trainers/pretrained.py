"""Model folders in diffusers' layout, looked at without torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, Field, TypeAdapter
from typing_extensions import override

from trainers.backbone import BackboneConfig
from trainers.config import LocalPath
from trainers.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch
    from torch import nn

Precision = Literal["float32", "bfloat16", "float16"]
Device = Annotated[str, Field(pattern=r"^(cpu|mps|(cuda|xpu)(:\d+)?)$")]

_STEMS = {"text_encoder": "model", "text_encoder_2": "model"}
_DIFFUSERS_STEM = "diffusion_pytorch_model"
_VARIANTS = ("fp16", "bf16")
"""Precisions that weight files are named after where a folder has no others."""


class PretrainedConfig(BackboneConfig):
    """A local folder as `save_pretrained` of a diffusers pipeline writes it; components may come from elsewhere."""

    denoiser_name: ClassVar[str] = "unet"
    component_classes: ClassVar[Mapping[str, str]] = {}
    """diffusers' class of components that come in several."""

    path: LocalPath
    denoiser: LocalPath | None = None
    """Another denoiser: its own folder, or one that holds it."""
    vae: LocalPath | None = None
    """Another autoencoder: its own folder, or one that holds `vae/`."""
    scheduler: LocalPath | None = None
    """Another scheduler configuration: its own folder, or one that holds `scheduler/`."""
    vae_dtype: Precision = "float32"
    """Precision of the autoencoder. The original SDXL autoencoder overflows in float16."""
    text_encoder_dtype: Precision | None = None
    """Precision of the text encoders; null is the trial's `precision`."""
    vae_device: Device | None = None
    """Where the autoencoder computes, as torch spells it (`cpu`, `cuda:1`); null is where training happens."""
    text_encoder_device: Device | None = None
    """Where the text encoders compute; null is where training happens."""

    @property
    def text_encoder_names(self) -> tuple[str, ...]:
        """The text encoders' names in the folder."""
        return ("text_encoder",)

    @property
    def tokenizer_names(self) -> tuple[str, ...]:
        """The name of each text encoder's tokenizer."""
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoder_names)

    @property
    def networks(self) -> tuple[str, ...]:
        """Every component with weights."""
        return (self.denoiser_name, "vae", *self.text_encoder_names)

    @property
    @override
    def num_timesteps(self) -> int:
        return self.scheduler_config().get("num_train_timesteps", 1000)  # diffusers' default

    @override
    def check(self) -> None:
        if not self.path.is_dir():
            raise ModelError(
                f"{self.path}: no such folder; expected a model of kind {self.kind_name} as diffusers saves"
            )
        if not (self.path / "model_index.json").is_file():
            raise ModelError(
                f"{self.path}: no model_index.json; expected a model of kind {self.kind_name} as diffusers saves"
            )
        self.model_index()
        self.scheduler_config()
        for name in self.networks:
            self._check_network(name)
        for file in (file for name in self.tokenizer_names for file in self.tokenizer_files(name)):
            if file.suffix == ".json":
                read_json(file)

    @property
    def kind_name(self) -> str:
        """What a study calls this kind."""
        return str(type(self).model_fields["kind"].default)

    @override
    def weight_shapes(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        files = {name: self.weight_files(name) for name in self.networks}
        return {
            name: {key: shape for file in parts if file.suffix == ".safetensors" for key, shape in read_shapes(file)}
            for name, parts in files.items()
        }

    @override
    def image_files(self) -> tuple[Path, ...]:
        return self._network_files("vae")

    @override
    def text_files(self) -> tuple[Path, ...]:
        networks = (file for name in self.text_encoder_names for file in self._network_files(name))
        tokenizers = (file for name in self.tokenizer_names for file in self.tokenizer_files(name))
        return (self.path / "model_index.json", *networks, *tokenizers)

    @property
    @override
    def text_options(self) -> tuple[str, ...]:
        return (str(self.text_encoder_dtype), str(self.text_encoder_device))

    @override
    def denoiser_files(self) -> tuple[Path, ...]:
        return self._network_files(self.denoiser_name)

    def folder(self, component: str) -> Path:
        """Where a component lies."""
        elsewhere = {self.denoiser_name: self.denoiser, "vae": self.vae, "scheduler": self.scheduler}.get(component)
        if elsewhere is None:
            return self.path / component
        return elsewhere / component if (elsewhere / component).is_dir() else elsewhere

    def variant(self, component: str) -> str | None:
        """`fp16` or `bf16` if the component comes in that precision only.

        Raises:
            ModelError: It does not come in any.
        """
        return self._weights(component)[0]

    def component_config(self, component: str) -> dict[str, Any]:
        """A component's `config.json`."""
        return read_json(self.folder(component) / "config.json")

    def setting(self, component: str, key: str) -> Any:
        """What a component's `config.json` says about `key`.

        Raises:
            ModelError: It says nothing.
        """
        config = self.component_config(component)
        if key not in config:
            raise ModelError(f"{self.folder(component)}/config.json: no {key}; expected the {component} of a pipeline")
        return config[key]

    def scheduler_config(self) -> dict[str, Any]:
        """The folder's `scheduler_config.json`."""
        return read_json(self.folder("scheduler") / "scheduler_config.json")

    def model_index(self) -> dict[str, Any]:
        """The folder's `model_index.json`."""
        return read_json(self.path / "model_index.json")

    def weight_files(self, component: str) -> tuple[Path, ...]:
        """The files that hold a component's weights."""
        return self._weights(component)[1]

    def _weights(self, component: str) -> tuple[str | None, tuple[Path, ...]]:
        folder, stem = self.folder(component), _STEMS.get(component, _DIFFUSERS_STEM)
        for variant in (None, *_VARIANTS):
            if files := _weights(folder, ".".join(filter(None, (stem, variant, "safetensors")))):
                return variant, files
        others = "".join(f", nor {stem}.{variant}.safetensors" for variant in _VARIANTS)
        advice = "pickles are not loaded, save it as safetensors" if any(folder.glob("*.bin")) else "is it complete?"
        raise ModelError(f"{folder}: no {stem}.safetensors{others}; {advice}")

    def tokenizer_files(self, component: str) -> tuple[Path, ...]:
        """The files that determine a tokenizer."""
        folder = self.path / component
        names = {file.name for file in folder.iterdir()} if folder.is_dir() else set[str]()
        whole = {"tokenizer.json", "tokenizer.model", "spiece.model"} & names
        if not whole and not {"vocab.json", "merges.txt"} <= names:
            raise ModelError(f"{folder}: no tokenizer.json, nor vocab.json and merges.txt; is the download complete?")
        if "tokenizer_config.json" not in names:
            raise ModelError(f"{folder}: no tokenizer_config.json; is the download complete?")
        return tuple(folder / name for name in sorted(names) if name.endswith((".json", ".txt", ".model")))

    def load_tokenizer(self, cls: Any, component: str, **options: Any) -> Any:
        """A text encoder's tokenizer, as transformers' class `cls` reads it.

        Raises:
            ModelError: Its files are not what that class writes.
        """
        folder = self.path / component
        try:
            return cls.from_pretrained(folder, local_files_only=True, **options)
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            problem = str(error).partition("\n")[0]
            raise ModelError(
                f"{folder}: {cls.__name__} cannot read this tokenizer ({problem}); download it again"
            ) from error

    def load_network(self, cls: Any, component: str, dtype: torch.dtype, device: torch.device) -> Any:
        """A component's weights, frozen and in evaluation mode."""
        model = cls.from_pretrained(
            self.folder(component),
            dtype=dtype,
            local_files_only=True,
            variant=self.variant(component),
            use_safetensors=True,
        )
        return model.requires_grad_(False).eval().to(device)

    def load_again(self, network: nn.Module, component: str) -> nn.Module:
        """A component as the folder has it, on the CPU and in the precision of `network`, which it became."""
        import torch

        return self.load_network(type(network), component, next(network.parameters()).dtype, torch.device("cpu"))

    def _check_network(self, component: str) -> None:
        found, expected = self.component_config(component).get("_class_name"), self.component_classes.get(component)
        if expected not in (None, found):
            raise ModelError(f"{self.folder(component)}/config.json: _class_name is {found!r}, expected {expected!r}")
        for file in self.weight_files(component):
            if file.suffix == ".safetensors":
                read_header(file)

    def _network_files(self, component: str) -> tuple[Path, ...]:
        return (self.folder(component) / "config.json", *self.weight_files(component))


def _pipeline_of(folder: Path) -> str:
    """What else a model folder is, if it says so."""
    try:
        name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f" of train.backbone.kind, and model_index.json says {name}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder.

    Raises:
        ModelError: It is missing or broken.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected a whole model folder{_pipeline_of(path.parent.parent)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(content).__name__}; download it again")
    return cast("dict[str, Any]", content)


def _weights(folder: Path, name: str) -> tuple[Path, ...]:
    """The weight file `name`, or its index and shards; empty if neither is there.

    Raises:
        ModelError: Some shards are missing.
    """
    if (folder / name).is_file():
        return (folder / name,)
    stem, _, variant = name.removesuffix(".safetensors").partition(".")
    index = folder / ".".join(filter(None, [stem, "safetensors.index", variant, "json"]))
    if not index.is_file():
        return ()
    try:
        listed = _SHARDS.validate_python(read_json(index).get("weight_map"))
    except ValueError as error:
        raise ModelError(f"{index}: got no weight_map from names to files; download it again") from error
    shards = tuple(folder / shard for shard in sorted(set(listed.values())))
    missing = [shard for shard in shards if not shard.is_file()]
    if len(missing) == len(shards):
        # Whoever fetches one precision gets the index of the other, too.
        return ()
    if missing:
        raise ModelError(f"{missing[0]}: no such file, but {index.name} lists it; is the download complete?")
    return (index, *shards)


class _Tensor(BaseModel):
    """What a safetensors file's header says of one."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_TENSORS, _SHARDS = TypeAdapter(dict[str, _Tensor]), TypeAdapter(dict[str, str])


def read_header(file: Path) -> dict[str, _Tensor]:
    """What the header of a whole safetensors file says of its numbers: a length, then JSON.

    Raises:
        ModelError: It has no such header, or its end is missing.
    """
    found = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(min(length, found)))
            tensors = _TENSORS.validate_python({name: header[name] for name in header if name != "__metadata__"})
        except (ValueError, TypeError, RecursionError) as error:
            raise ModelError(f"{file}: not a safetensors file; download it again") from error
    expected = 8 + length + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if found < expected:
        raise ModelError(f"{file}: {found} bytes, expected {expected}; download it again")
    return tensors


def read_shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight in a safetensors file; old text encoders also list positions, which are not."""
    for name, tensor in read_header(file).items():
        if "F" in tensor.dtype:
            yield name, tensor.shape
