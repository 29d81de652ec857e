"""What scoring costs with scoring models of real size, on real photos.

    python -m tests.benchmarks.photos DREAMBENCH FOLDER

DREAMBENCH is the folder of google/dreambooth's data set. The models have the real ones' layouts and shapes, and random
weights: seconds and memory are real, scores mean nothing. Each is scored by the command line, in a process of its own.
What FOLDER has is not measured again. Results: tests/benchmarks/results/photos.md.
"""

# pyright: basic

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.benchmarks.learnability import RESULTS, ROOT
from tests.evaluation.conftest import build_tokenizer

Build = Callable[[Path], dict[str, str]]
_PIXELS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3, "rescale_factor": 1 / 255}
_NORM = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_SMALL: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12}
_FEW = 2
"""Folders that the large models see."""


@dataclass(frozen=True)
class Cost:
    """Of one process."""

    seconds: float
    """Of the processor."""
    peak_gib: float
    subjects: int
    """Lines of the summary."""


def dino(folder: Path) -> dict[str, str]:
    """DINO v1's ViT-S/16 (Caron et al., 2021, arXiv:2104.14294), as facebook/dino-vits16 has it."""
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(**_SMALL, intermediate_size=1536), add_pooling_layer=False).save_pretrained(folder)
    kind = {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}}
    (folder / "preprocessor_config.json").write_text(json.dumps(_PIXELS | _NORM | kind))
    return {"kind": "dino", "model": str(folder)}


def dino_timm(folder: Path) -> dict[str, str]:
    """The same as timm/vit_small_patch16_224.dino has it."""
    import timm
    from safetensors.torch import save_file

    folder.mkdir()
    name = "vit_small_patch16_224"
    settings = {
        "tag": "dino",
        "input_size": [3, 224, 224],
        "num_classes": 0,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }
    config = {"architecture": name, "num_classes": 0, "num_features": 384, "global_pool": "token"}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": settings}))
    save_file(timm.create_model(name, num_classes=0).state_dict(), folder / "model.safetensors")
    return {"kind": "dino", "model": str(folder)}


def dinov2(folder: Path) -> dict[str, str]:
    """DINOv2's ViT-S/14 (Oquab et al., 2023, arXiv:2304.07193), as facebook/dinov2-small has it."""
    from transformers import Dinov2Config, Dinov2Model

    Dinov2Model(Dinov2Config(**_SMALL, image_size=518, patch_size=14)).save_pretrained(folder)
    kind = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "do_center_crop": True}
    kind |= {"crop_size": {"height": 224, "width": 224}}
    (folder / "preprocessor_config.json").write_text(json.dumps(_PIXELS | _NORM | kind))
    return {"kind": "dino", "model": str(folder)}


def clip(folder: Path) -> dict[str, str]:
    """CLIP's ViT-L/14 (Radford et al., 2021, arXiv:2103.00020), as openai/clip-vit-large-patch14 has it."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    large: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    text: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    config = CLIPConfig(
        text_config=CLIPTextConfig(**text, num_hidden_layers=12).to_dict(),
        vision_config=CLIPVisionConfig(**large, num_hidden_layers=24, patch_size=14, image_size=224).to_dict(),
        projection_dim=768,
    )
    CLIPModel(config).save_pretrained(folder)
    build_tokenizer(77).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return {"kind": "clip_image", "model": str(folder)}


def preference(folder: Path) -> dict[str, str]:
    """HPSv2.1's ViT-H/14 (Wu et al., 2023, arXiv:2306.09341): open_clip's tower, and a checkpoint of it."""
    import open_clip

    folder.mkdir()
    name = "ViT-H-14"
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": open_clip.get_model_config(name)}))
    model = open_clip.create_model(name, precision="fp16")
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return {"kind": "preference", "model": str(folder), "checkpoint": str(folder / "HPS_v2.1_compressed.pt")}


def score(photos: Path, book: Path, metric: dict[str, str], folder: Path) -> Cost:
    """The command `evaluate --photos`, and what it took."""
    (folder / "metrics.yaml").write_text(yaml.safe_dump({"metrics": {"score": metric}}))
    words = ["evaluate", photos, "--photos", "--prompts", book, "--metrics", folder / "metrics.yaml"]
    words += ["--output", folder / "results", "--cache", folder / "cache"]
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{metric['kind']}: evaluate ended with {status}")
    rows = list(csv.DictReader((folder / "results" / "evaluation_summary.csv").read_text().splitlines()))
    return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20, len(rows))


def main() -> None:
    """Build, score, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dreambench", type=Path)
    parser.add_argument("folder", type=Path, help="where measurements are kept")
    arguments = parser.parse_args()
    photos = arguments.dreambench.resolve()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    book = photos / "prompts_and_classes.txt"
    lines = [
        "# Scoring real photos with models of real size",
        "",
        f"`python -m tests.benchmarks.photos DREAMBENCH FOLDER` on {platform.machine()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread, CPU, fp32, random weights in the layouts of the named models.",
        "Each photo is compared with the others of its folder (`preference`: with its prompt); seconds are of one",
        "core, start-up included.",
        "",
        "| model | photos | subjects | seconds | peak memory |",
        "| --- | --: | --: | --: | --: |",
    ]
    with tempfile.TemporaryDirectory() as name:
        few = Path(name) / "few"
        for one in sorted(one for one in photos.iterdir() if one.is_dir())[:_FEW]:
            shutil.copytree(one, few / one.name)
        shown: tuple[tuple[str, Build, Path], ...] = (
            ("DINO ViT-S/16 (transformers)", dino, photos),
            ("DINO ViT-S/16 (timm)", dino_timm, photos),
            ("DINOv2 ViT-S/14 (transformers)", dinov2, photos),
            ("CLIP ViT-L/14 (transformers)", clip, few),
            ("HPSv2.1 ViT-H/14 (open_clip)", preference, few),
        )
        for title, build, source in shown:
            known = arguments.folder / f"{build.__name__}.txt"
            if not known.exists():
                work = Path(name) / build.__name__
                work.mkdir()
                cost = score(source, book, build(work / "model"), work)
                shutil.rmtree(work)
                count = len(list(source.glob("*/*.jpg")))
                cells = (count, cost.subjects, f"{cost.seconds:.0f}", f"{cost.peak_gib:.1f} GiB")
                known.write_text(f"| {title} | {' | '.join(map(str, cells))} |", encoding="utf-8")
            lines.append(known.read_text(encoding="utf-8"))
            print(lines[-1], flush=True)
    (RESULTS / "photos.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
