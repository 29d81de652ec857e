"""What tests of PDMBooth share: sections of a study, and the rows that the loop would show."""

from trainers.batch import Batch

PRIOR = {"prompt": "a star", "count": 2, "steps": 2}
SIZE = (80, 64)
INVERTED = {"kind": "inverted", "steps": 4}
SECTIONS = {"instance": {}, "prior": PRIOR, "pdm": {"prompt": "a star", "weight": 0.5}}


def combination(*names):
    """The sections of a study in which these losses are used, and no other."""
    return {name: section if name in names else None for name, section in SECTIONS.items()}


def masks_in(folder):
    return {"kind": "folder", "path": str(folder / "masks")}


def only_picture(folder):
    """A subject of one picture, so that the first four rows are of all kinds."""
    for number in (1, 2):
        (folder / "subject" / f"{number}.png").unlink()


def batch_of(method, size, step=0):
    """The rows that the loop would show."""
    places = tuple(range(size))
    return Batch(step, places, tuple(method.pick(step, step * size + place) for place in places))
