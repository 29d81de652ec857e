"""Pictures on one sheet, for people to look at: a row per prompt, a column per seed or contestant."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_CELL = (128, 256)
"""A small picture is enlarged to the first number of pixels, a large one reduced to the second."""
_LABEL_WIDTH = 220
_FONT_SIZE = 15
_GAP = 6
_PAPER, _INK = "white", "black"


def draw_grid(pictures: Mapping[tuple[str, str], Path]) -> Image.Image:
    """Lay out picture files by the labels of their row and column; a missing combination stays blank."""
    rows = list(dict.fromkeys(row for row, _ in pictures))
    columns = list(dict.fromkeys(column for _, column in pictures))
    font = ImageFont.load_default(_FONT_SIZE)
    with Image.open(next(iter(pictures.values()))) as first:
        cell = min(max(first.width, _CELL[0]), _CELL[1])
    step, top = cell + _GAP, _FONT_SIZE + 2 * _GAP
    sheet = Image.new("RGB", (_LABEL_WIDTH + len(columns) * step + _GAP, top + len(rows) * step), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for x, label in enumerate(columns):
        pen.text((_LABEL_WIDTH + x * step + _GAP, _GAP), label, _INK, font)
    for y, label in enumerate(rows):
        pen.multiline_text((_GAP, top + y * step), _wrap(label, font, cell), _INK, font)
    for (row, column), file in pictures.items():
        place = (_LABEL_WIDTH + columns.index(column) * step + _GAP, top + rows.index(row) * step)
        sheet.paste(_fit(file, cell), place)
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
