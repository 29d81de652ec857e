"""Training of the preference model: a small CLIP that ranks pictures of one prompt, in HPSv2.1's layout.

As in HPSv2 (Wu et al., 2023, arXiv:2306.09341) two pictures of a prompt are shown, and the one that people prefer is
to have the larger cosine with the prompt. The people of the miniature world prefer a picture to a half ruined one, that
to a ruined one, and a picture of what was asked for to one that is wrong in a single attribute. A contrastive loss over
prompts, which HPSv2 has behind it when it starts from a trained CLIP, is learned beside it.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from transformers import CLIPTokenizer

from trainers.miniature.family import CONTEXT, build_tokenizer
from trainers.miniature.members import Making, Quality
from trainers.miniature.pictures import Pictures, altered, captions, spoil, to_unit, wide
from trainers.miniature.scorers import tokens
from trainers.miniature.training import Schedule, train
from trainers.miniature.world import SIZE, caption, draw, random_placement

CHECKPOINT = "preference.pt"
STEPS = 700
"""Optimizer steps."""
_PICTURES, _CHECKED = 4000, 256
_BATCH = 32
_SCALE = 20.0
"""Of cosines in the loss; CLIP's reaches 100, which few steps do not bear."""
_CONFIG: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": SIZE, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "width": 48, "heads": 3, "layers": 2, "hf_tokenizer_name": "./"},
}


def build_preference(vocabulary: int) -> CLIP:
    """Both towers."""
    text: dict[str, Any] = {**_CONFIG["text_cfg"], "vocab_size": vocabulary}
    return CLIP(_CONFIG["embed_dim"], CLIPVisionCfg(**_CONFIG["vision_cfg"]), CLIPTextCfg(**text))


@dataclass(frozen=True)
class Choices:
    """Scenes, a good picture of each, and one that is wrong in a single attribute."""

    good: Pictures
    wrong: Tensor
    """[n, 3, 64, 64] bytes."""

    @classmethod
    def among(cls, good: Pictures, seed: int) -> "Choices":
        """Draw the wrong ones."""
        rngs = [random.Random(f"wrong/{seed}/{place}") for place in range(len(good))]
        drawn = [
            draw(altered(s, r, background=True), random_placement(r)) for s, r in zip(good.scenes, rngs, strict=True)
        ]
        return cls(
            good, torch.from_numpy(np.stack([np.asarray(one) for one in drawn])).permute(0, 3, 1, 2).contiguous()
        )

    def show(self, chosen: Tensor, rng: torch.Generator) -> Float[Tensor, "4 b 3 64 64"]:
        """Pictures in [-1, 1], the best first: good, half ruined, ruined; and the wrong one."""
        good, wrong = to_unit(self.good.pixels[chosen]), to_unit(self.wrong[chosen])
        ruined, _ = spoil(good, rng)
        share = torch.rand(len(good), 1, 1, 1, generator=rng) * 0.4 + 0.2
        return torch.stack([good, (1 - share) * good + share * ruined, ruined, wrong])


def train_preference(choices: Choices, tokenizer: CLIPTokenizer, schedule: Schedule) -> CLIP:
    """Learn what is preferred."""
    torch.manual_seed(schedule.seed)
    model: Any = build_preference(len(tokenizer))

    def loss(rng: random.Random) -> Tensor:
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        chosen = torch.randint(len(choices.good), (_BATCH,), generator=generator)
        texts = captions(choices.good.chosen(chosen), rng)
        shown = choices.show(chosen, generator)
        x = (shown + 0.05 * torch.randn(shown.shape, generator=generator)).clamp(-1, 1)
        image: Tensor = model.encode_image(x.flatten(0, 1), normalize=True)
        text: Tensor = model.encode_text(tokens(tokenizer, texts), normalize=True)
        cosines: Tensor = _SCALE * (image.reshape(4, *text.shape) * text).sum(-1)
        better, worse = torch.stack([cosines[0], cosines[1], cosines[0]]), torch.stack([*cosines[1:]])
        preferred = nn.functional.softplus(worse - better).mean()
        return preferred + _contrast(_SCALE * image[: len(text)] @ text.T)

    train("preference", (model,), loss, schedule)
    return model


def _contrast(logits: Float[Tensor, "b b"]) -> Tensor:
    target = torch.arange(len(logits))
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


def save_preference(folder: Path, model: CLIP, tokenizer: CLIPTokenizer) -> None:
    """Save the config that open_clip reads, the tokenizer, and the weights as HPSv2.1's file has them."""
    folder.mkdir(parents=True, exist_ok=True)
    text: dict[str, Any] = {**_CONFIG["text_cfg"], "vocab_size": len(tokenizer)}
    config = {
        "model_cfg": {**_CONFIG, "text_cfg": text},
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "longest",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / CHECKPOINT)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def preference_quality(folder: Path, tokenizer: CLIPTokenizer, choices: Choices, seed: int) -> dict[str, float]:
    """How often the saved model agrees with the people of the miniature world on scenes it has not seen.

    Returns:
        Shares of prompts for which the good picture is preferred to the ruined, the half ruined and the wrong one, the
        half ruined one to the ruined one, and the prompt's own picture to the good ones of all other prompts.
    """
    model: Any = build_preference(len(tokenizer)).eval()
    state = torch.load(folder / CHECKPOINT, weights_only=True)["state_dict"]
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    texts: Sequence[str] = [caption(scene) for scene in choices.good.scenes]
    shown = choices.show(torch.arange(len(texts)), torch.Generator().manual_seed(seed))
    image: Tensor = model.encode_image(shown.flatten(0, 1), normalize=True)
    text: Tensor = model.encode_text(tokens(tokenizer, texts), normalize=True)
    cosines: Tensor = (image.reshape(4, *text.shape) * text).sum(-1)
    good, half, ruined, wrong = cosines.unbind()
    first = (image[: len(text)] @ text.T).argmax(0) == torch.arange(len(text))
    found = {
        "good_over_ruined": good > ruined,
        "good_over_half": good > half,
        "half_over_ruined": half > ruined,
        "good_over_wrong": good > wrong,
        "first_of_all": first,
    }
    return {name: round(float(value.float().mean()), 4) for name, value in found.items()}


def make_preference(making: Making) -> Quality:
    """`preference/`: a CLIP that was taught what people prefer, in the layout of HPSv2.1, from nothing."""
    seed, tokenizer = making.seed + 4, build_tokenizer()
    choices = Choices.among(wide(making.count(_PICTURES), seed), seed)
    unseen = Choices.among(wide(making.count(_CHECKED), seed + 5), seed + 5)
    model = train_preference(choices, tokenizer, making.schedule("preference", STEPS, 2e-3))
    save_preference(making.folder / "preference", model, tokenizer)
    return preference_quality(making.folder / "preference", tokenizer, unseen, seed + 5)
