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
# Enlarged by whole factors until a cell is at least this wide; that is, with captions of several
# words below it.
_CELL, _CELL_OF_WORDS = 48, 96
_APART = 10  # pixels more between groups
_LETTERS = 13  # pixels: the height of a line of captions
_LINES = 4  # of a caption at most


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
        48 pixels wide, or 96 if captions have several words.
      captions: a text below each image, in as many lines as it needs, at most four.
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
    texts = [] if captions is None else [str(text) for text in captions]
    cell = _CELL_OF_WORDS if any(" " in text for text in texts) else _CELL
    scale = scale or max(1, -(-cell // width))
    images = np.broadcast_to(images, (count, height, width, 3))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)

    step_x = width * scale + GAP
    texts = [_lines(text, width * scale) for text in texts]
    step_y = height * scale + GAP + _LETTERS * max(map(len, texts), default=0)
    rows = -(-count // columns)
    apart = [_APART * (group > 1) * (x // group) for x in range(columns)]
    width_x = columns * step_x + apart[-1] + GAP
    canvas = np.full((rows * step_y + GAP, width_x, 3), BACKGROUND, np.uint8)
    places = [divmod(n, columns) for n in range(count)]
    corners = [(GAP + y * step_y, GAP + x * step_x + apart[x]) for y, x in places]
    for image, (y, x) in zip(images, corners):
        canvas[y : y + height * scale, x : x + width * scale] = image
    below = [(y + height * scale, x + width * scale // 2) for y, x in corners]
    return _write(canvas, texts, below) if texts else canvas


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


def _font() -> Any:
    """DejaVu Sans, which comes with matplotlib: Pillow's own has no accents."""
    import matplotlib
    from PIL import ImageFont

    folder = pathlib.Path(matplotlib.get_data_path())
    return ImageFont.truetype(folder / "fonts" / "ttf" / "DejaVuSans.ttf", 9)


def _lines(text: str, width: int) -> list[str]:
    """The words of a text in lines of at most `width` pixels; "…" stands for what is cut off."""
    font, lines = _font(), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], " ".join(lines[_LINES - 1 :])]
    return [_cut(line, width, font) for line in lines]


def _cut(line: str, width: int, font: Any) -> str:
    while len(line) > 1 and font.getlength(line) > width:
        line = line.rstrip("…")[:-1] + "…"
    return line


def _write(
    canvas: np.ndarray, texts: Sequence[Sequence[str]], places: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Writes the lines of each text, centered, below (y, x)."""
    from PIL import Image, ImageDraw

    picture, font = Image.fromarray(canvas), _font()
    draw = ImageDraw.Draw(picture)
    for lines, (y, x) in zip(texts, places):
        for i, line in enumerate(lines):
            at = (x, y + 1 + i * _LETTERS)
            draw.text(at, line, fill=(90, 90, 90), font=font, anchor="ma")
    return np.asarray(picture)
