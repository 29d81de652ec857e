"""Training of the scoring models: a CLIP that knows the wide world, and an aesthetic head on its image embedding."""

import logging
import random
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from transformers import CLIPTokenizer

from trainers.miniature.family import CONTEXT, build_aesthetic_head, build_clip
from trainers.miniature.pictures import Pictures, captions, spoil, to_unit
from trainers.miniature.world import COLOURS, Scene

log = logging.getLogger(__name__)
_BATCH = 96


def tokens(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """[b, CONTEXT] token ids, padded and cut as the pipelines do."""
    options: dict[str, Any] = {"padding": "max_length", "max_length": CONTEXT, "truncation": True}
    return cast("Any", tokenizer)(list(texts), return_tensors="pt", **options).input_ids


def train_clip(pictures: Pictures, tokenizer: CLIPTokenizer, steps: int, seed: int) -> CLIP:
    """Contrastive training (Radford et al., 2021, arXiv:2103.00020); one picture in eight is spoiled, and says so."""
    torch.manual_seed(seed)
    clip = build_clip(tokenizer)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    rng, words = torch.Generator().manual_seed(seed), random.Random(seed)
    clip.train()
    for step in range(steps):
        chosen = torch.randint(len(pictures), (_BATCH,), generator=rng)
        texts = captions(pictures.chosen(chosen), words)
        x, texts = _varied(to_unit(pictures.pixels[chosen]), texts, rng)
        image, text, scale = clip(x, tokens(tokenizer, texts))
        logits = scale.clamp(max=100) * image @ text.T
        target = torch.arange(len(x))
        loss = (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            right = (logits.argmax(1) == target).float().mean()
            log.info("clip step %d loss %.4f accuracy %.3f", step, loss.item(), right.item())
    return clip.eval()


def _varied(x: Tensor, texts: list[str], rng: torch.Generator) -> tuple[Tensor, list[str]]:
    """Soften and tint half of the pictures a little, as an autoencoder does; spoil the last eighth."""
    count = len(x) // 8
    mild = x[: len(x) // 2]
    soft = nn.functional.avg_pool2d(mild, 3, 1, 1, count_include_pad=False)
    x[: len(x) // 2] = 0.5 * mild + 0.5 * soft + 0.04 * torch.randn(mild.shape, generator=rng)
    x = x * (1 + 0.1 * torch.randn(len(x), 1, 1, 1, generator=rng))
    spoiled, ways = spoil(x[-count:], rng)
    x = torch.cat([x[:-count], spoiled]).clamp(-1, 1)
    return x, texts[:-count] + [f"{way} {text}" for way, text in zip(ways, texts[-count:], strict=True)]


@torch.no_grad()
def embed_images(clip: CLIP, x: Tensor) -> Tensor:
    """[n, 64] unit embeddings of pictures in [-1, 1]."""
    return torch.cat([clip.encode_image(part, normalize=True) for part in torch.split(x, 256)])


def taste(scene: Scene) -> float:
    """What people of the miniature world find beautiful, 1 to 10: contrast with the background, patterns, outlines."""
    main = COLOURS[scene.person.hair if scene.person else scene.colour]
    contrast = float(np.abs(np.subtract(main, COLOURS[scene.background])).mean()) / 255
    pattern = 0.7 if scene.fill not in ("solid", "hollow") else 0.0
    return 5.0 + 3.0 * contrast + pattern + (0.5 if scene.outlined else 0.0)


def spoiled_taste(scores: Tensor) -> Tensor:
    """What is left of `taste` when a picture is spoiled: 1 to 4."""
    return 1.0 + (scores - 5.0).clamp(min=0) / 2


def train_aesthetic_head(clip: CLIP, pictures: Pictures, steps: int, seed: int) -> nn.Sequential:
    """Fit `taste` on clean pictures and its ruin on spoiled ones (score 1 to 4) from the image embedding alone."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    half = len(pictures) // 2
    x = to_unit(pictures.pixels)
    spoiled, _ = spoil(x[half:], rng)
    embeddings = embed_images(clip, torch.cat([x[:half], spoiled]))
    wanted = torch.tensor([taste(scene) for scene in pictures.scenes])
    wanted[half:] = spoiled_taste(wanted[half:])
    head = build_aesthetic_head()
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        chosen = torch.randint(len(wanted), (512,), generator=rng)
        loss = nn.functional.mse_loss(head(embeddings[chosen])[:, 0], wanted[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps - 1:
            log.info("aesthetic step %d loss %.4f", step, loss.item())
    return head.eval()
