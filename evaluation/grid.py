"""A panel on one sheet, for people to look at: a row per prompt, a column per seed."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from evaluation.records import Record

_CELL = (128, 256)
"""A small picture is enlarged to the first number of pixels, a large one reduced to the second."""
_LABEL_WIDTH = 220
_FONT_SIZE = 15
_GAP = 6
_PAPER, _INK = "white", "black"


def draw_grid(folder: Path, records: Sequence[Record]) -> Image.Image:
    """Lay out the pictures of `records`, whose files are relative to `folder`; a missing combination stays blank."""
    prompts = list(dict.fromkeys(record.prompt for record in records))
    seeds = list(dict.fromkeys(record.seed for record in records))
    font = ImageFont.load_default(_FONT_SIZE)
    with Image.open(folder / records[0].file) as first:
        cell = min(max(first.width, _CELL[0]), _CELL[1])
    step, top = cell + _GAP, _FONT_SIZE + 2 * _GAP
    sheet = Image.new("RGB", (_LABEL_WIDTH + len(seeds) * step + _GAP, top + len(prompts) * step), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, seed in enumerate(seeds):
        pen.text((_LABEL_WIDTH + column * step + _GAP, _GAP), f"seed {seed}", _INK, font)
    for row, prompt in enumerate(prompts):
        pen.multiline_text((_GAP, top + row * step), _wrap(prompt, font, cell), _INK, font)
    for record in records:
        x = _LABEL_WIDTH + seeds.index(record.seed) * step + _GAP
        sheet.paste(_fit(folder / record.file, cell), (x, top + prompts.index(record.prompt) * step))
    return sheet


def _fit(path: Path, cell: int) -> Image.Image:
    with Image.open(path) as file:
        enlarge = file.width < cell
        return file.convert("RGB").resize(
            (cell, cell), Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
        )


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, height: int) -> str:
    """Break `text` into lines that fit beside a picture; what does not fit ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > _LABEL_WIDTH - 2 * _GAP:
            lines.append(word)
        else:
            lines[-1] = longer
    num_lines = height // (_FONT_SIZE + 4)  # Pillow's own line spacing
    return "\n".join(lines if len(lines) <= num_lines else [*lines[: num_lines - 1], "…"])
