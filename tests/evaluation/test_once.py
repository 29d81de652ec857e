"""Nothing is looked at twice: a picture is embedded once per encoder, references and prompts once per cache."""

# pyright: basic

import hashlib
import shutil
from collections import Counter

import pytest
import torch

from evaluation.embedding import PictureEncoder
from evaluation.encoders import ClipEncoder, ClipEncoders
from evaluation.folders import Subject, score_subject
from evaluation.metrics.aesthetic import Aesthetic
from evaluation.metrics.clip import ClipImage, ClipText
from evaluation.metrics.dino import Dino
from evaluation.metrics.diversity import Diversity
from tests.evaluation.conftest import noise
from trainers.cache import Cache
from trainers.data import transforms
from trainers.prompt import Prompt, Request

PROMPTS = [Prompt(text=text) for text in ("a star", "a ring", "a zog")]


class Counts:
    """What was done how often."""

    def __init__(self) -> None:
        self.decoded, self.embedded, self.prompts = Counter(), Counter(), Counter()


@pytest.fixture
def counts(monkeypatch):
    found = Counts()
    read, embed, tell = transforms.open_picture, PictureEncoder._compute_images, ClipEncoder._compute_prompt

    def open_picture(source):
        found.decoded[source.name] += 1
        return read(source)

    def compute_images(self, images):
        found.embedded.update((self.model, hashlib.sha256(image.tobytes()).hexdigest()) for image in images)
        return embed(self, images)

    def compute_prompt(self, prompt):
        found.prompts[self.model, prompt] += 1
        return tell(self, prompt)

    monkeypatch.setattr("evaluation.evaluate.open_picture", open_picture)
    monkeypatch.setattr(transforms, "open_picture", open_picture)
    monkeypatch.setattr(PictureEncoder, "_compute_images", compute_images)
    monkeypatch.setattr(ClipEncoder, "_compute_prompt", compute_prompt)
    return found


@pytest.fixture
def metrics(open_clip_folder, dino_folder, head_file):
    return {
        "clip_t": ClipText(model=open_clip_folder),
        "clip_i": ClipImage(model=open_clip_folder),
        "aesthetic": Aesthetic(model=open_clip_folder, head=head_file),
        "dino": Dino(model=dino_folder),
        "diversity": Diversity(model=dino_folder),
    }


def save(folder, names, first):
    folder.mkdir()
    files = [folder / name for name in names]
    for place, file in enumerate(files):
        noise(first + place).save(file)
    return files


def drawn(folder, first):
    """Six pictures of three prompts."""
    files = save(folder, [f"{first + place}.png" for place in range(6)], first)
    return {Request(PROMPTS[place // 2], place % 2): file for place, file in enumerate(files)}


def judge(subject, metrics, cache):
    score_subject(subject, metrics, ClipEncoders(torch.device("cpu"), Cache(cache)))


def test_five_metrics_of_two_encoders_look_at_a_picture_once_each(tmp_path, counts, metrics):
    references = save(tmp_path / "real", ["a.png", "b.png"], 100)
    judge(Subject("zog", drawn(tmp_path / "drawn", 0), references), metrics, tmp_path / "cache")
    assert len(counts.embedded) == 2 * (6 + 2)
    assert set(counts.embedded.values()) == {1}
    assert [counts.decoded[f"{place}.png"] for place in range(6)] == [1] * 6
    assert sorted(counts.prompts.values()) == [1] * 3


def test_the_next_trial_looks_at_its_own_pictures_alone(tmp_path, counts, metrics):
    references = save(tmp_path / "real", ["a.png", "b.png"], 100)
    judge(Subject("zog", drawn(tmp_path / "first", 0), references), metrics, tmp_path / "cache")
    before = Counter(counts.decoded), Counter(counts.embedded), Counter(counts.prompts)
    copies = [shutil.copy(file, tmp_path / f"copy_of_{file.name}") for file in references]
    judge(Subject("zog", drawn(tmp_path / "next", 50), copies), metrics, tmp_path / "cache")
    assert set((counts.decoded - before[0]).elements()) == {f"{50 + place}.png" for place in range(6)}
    assert len(counts.embedded - before[1]) == 2 * 6
    assert not counts.prompts - before[2]


def test_photos_that_are_compared_with_one_another_are_embedded_once(tmp_path, counts, metrics):
    photos = save(tmp_path / "photos", [f"{place}.png" for place in range(4)], 0)
    pictures = {Request(Prompt(text="a photo of a star"), place): file for place, file in enumerate(photos)}
    judge(Subject("star", pictures, photos), metrics, tmp_path / "cache")
    assert len(counts.embedded) == 2 * 4
    assert set(counts.embedded.values()) == {1}
