"""Pictures of samples: a grid of images as one uint8 array, and PNG files."""

import io
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdiff.errors import UserError

#: Gap between cells, in pixels of the picture, and the gray that shows there.
GAP = 2
BACKGROUND = 255
# Enlarged by whole factors until a cell is at least this wide.
_CELL = 48
_APART = 10  # pixels more between groups
_LETTERS = 13  # pixels: the height of a line of captions


class Drawing(NamedTuple):
    """How a run draws the pictures of its training.

    Attributes:
      draw: training state -> images `[N, H, W, C]`, on the devices of training.
      arranged: the fetched images -> the cells of the picture, row by row.
      columns: cells in a row.
    """

    draw: Callable[[Any], Any]
    arranged: Callable[[Any], Any]
    columns: int


def grid(
    images: Any,
    columns: int | None = None,
    scale: int | None = None,
    captions: Sequence[str] | None = None,
    group: int = 1,
) -> np.ndarray:
    """Images side by side, row by row, as one picture uint8 `[H', W', 3]`.

    Args:
      images: `[N, H, W, C]`, uint8 or float in [-1, 1] (clipped); C is 1 or 3.
      columns: images in a row; the square root of N, rounded up, unless given.
      scale: each pixel becomes scale x scale of them; by default the smallest that makes an image
        48 pixels wide.
      captions: a text below each image.
      group: so many columns belong together; a wider gap is left between groups.

    Raises:
      UserError: images of another shape, columns, scale or group below 1, or captions of another
        number.
    """
    images = np.asarray(images)
    if images.ndim != 4 or not len(images) or images.shape[-1] not in (1, 3):
        raise UserError(
            f"pictures: images are [N, H, W, 1 or 3] with N at least 1, given {images.shape}."
        )
    for name, value in {"columns": columns, "scale": scale, "group": group}.items():
        if value is not None and value < 1:
            raise UserError(f"pictures: {name}={value} given; it is at least 1.")
    if captions is not None and len(captions) != len(images):
        raise UserError(f"pictures: {len(captions)} captions for {len(images)} images.")
    if images.dtype != np.uint8:
        from jdiff.evaluation.features import to_uint8

        images = np.asarray(to_uint8(images))
    count, height, width, _ = images.shape
    columns = min(columns or int(np.ceil(np.sqrt(count))), count)
    scale = scale or max(1, -(-_CELL // width))
    images = np.broadcast_to(images, (count, height, width, 3))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)

    step_x = width * scale + GAP
    step_y = height * scale + GAP + (_LETTERS if captions is not None else 0)
    rows = -(-count // columns)
    apart = [_APART * (group > 1) * (x // group) for x in range(columns)]
    width_x = columns * step_x + apart[-1] + GAP
    canvas = np.full((rows * step_y + GAP, width_x, 3), BACKGROUND, np.uint8)
    places = [divmod(n, columns) for n in range(count)]
    corners = [(GAP + y * step_y, GAP + x * step_x + apart[x]) for y, x in places]
    for image, (y, x) in zip(images, corners):
        canvas[y : y + height * scale, x : x + width * scale] = image
    if captions is None:
        return canvas
    below = [(y + height * scale, x + width * scale // 2) for y, x in corners]
    return _write_captions(canvas, captions, below, width * scale)


def at_size(images: Any, height: int, width: int) -> np.ndarray:
    """Images `[N, h, w, C]` as `[N, height, width, C]`: each pixel is the nearest one."""
    images = np.asarray(images)
    rows = np.arange(height) * images.shape[1] // height
    columns = np.arange(width) * images.shape[2] // width
    return images[:, rows][:, :, columns]


def save(path: str | os.PathLike, image: Any) -> pathlib.Path:
    """Writes uint8 `[H, W, 1 or 3]` as a PNG file, whole or not at all; returns its path.

    Raises:
      UserError: the folder does not exist or cannot be written.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(to_png(image))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def to_png(image: Any) -> bytes:
    """uint8 `[H, W, 1 or 3]` as the bytes of a PNG file."""
    from PIL import Image

    image = np.asarray(image)
    image = image[..., 0] if image.shape[-1] == 1 else image
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", optimize=True)
    return file.getvalue()


def _write_captions(
    canvas: np.ndarray, captions: Sequence[str], places: list[tuple[int, int]], width: int
) -> np.ndarray:
    """Writes each text centered below (y, x), cut to `width` pixels."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(10)
    for text, (y, x) in zip(captions, places):
        text = str(text)
        while len(text) > 1 and draw.textlength(text, font) > width:
            text = text.rstrip("…")[:-1] + "…"
        draw.text((x, y + 1), text, fill=(90, 90, 90), font=font, anchor="ma")
    return np.asarray(picture)
