"""A video on one page: every 8th frame, line by line."""

import math
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from streamt1_jax.outputs import SOFTWARE, atomic_write

EVERY = 8  # frames: half a second
PAGE = 1600  # pixels, about, across
TILE = 208  # pixels, at most, of a frame across
GAP, HEAD = 2, 20  # pixels


def save_contact_sheet(
    frames: UInt8[np.ndarray, "T H W 3"], path: str | Path, *, title: str = "", every: int = EVERY
) -> None:
    """Writes a PNG of every `every`-th frame, from the first.

    Args:
        path: replaced, when the new picture is whole.
        title: a line above.

    Raises:
        BadInputError: a path that cannot be written.
    """
    from PIL import Image, ImageDraw
    from PIL.PngImagePlugin import PngInfo

    shrink = math.ceil(frames.shape[2] / TILE)
    tiles = [Image.fromarray(frame).reduce(shrink) for frame in frames[::every]]
    width, height = tiles[0].width + GAP, tiles[0].height + GAP
    columns = min(len(tiles), max(PAGE // width, 1))
    rows = math.ceil(len(tiles) / columns)
    page = Image.new("RGB", (columns * width + GAP, HEAD + rows * height + GAP), "white")
    ImageDraw.Draw(page).text((2 * GAP, 2 * GAP), title, fill="black")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        page.paste(tile, (GAP + column * width, HEAD + GAP + row * height))
    note = PngInfo()
    note.add_text("Software", SOFTWARE)
    with atomic_write(path) as temporary:
        page.save(temporary, format="PNG", pnginfo=note)
