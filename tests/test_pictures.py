import io

import numpy as np
import pytest
from PIL import Image

from jdiff import pictures
from jdiff.errors import UserError

GAP = pictures.GAP


def test_every_pixel_has_its_place():
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 3)).astype(np.uint8)
    picture = pictures.grid(images, columns=2, scale=3)
    assert picture.dtype == np.uint8
    assert picture.shape == (3 * (9 + GAP) + GAP, 2 * (12 + GAP) + GAP, 3)
    seen = np.zeros(picture.shape[:2], bool)
    for n in range(5):
        row, column = divmod(n, 2)
        for y in range(9):
            for x in range(12):
                at = GAP + row * (9 + GAP) + y, GAP + column * (12 + GAP) + x
                np.testing.assert_array_equal(picture[at], images[n, y // 3, x // 3])
                seen[at] = True
    assert seen.sum() == 5 * 9 * 12
    assert np.all(picture[~seen] == pictures.BACKGROUND)


def test_one_channel_is_gray_and_floats_are_clipped_and_rounded():
    values = np.asarray([-3.0, -1.0, -0.998, 0.0, 0.5, 1.0, 3.0], np.float32)
    images = values[:, None, None, None]
    picture = pictures.grid(images, columns=7, scale=1)
    row = picture[GAP, GAP :: 1 + GAP][:7]
    assert (row == row[:, :1]).all()
    assert row[:, 0].tolist() == [0, 0, 0, 128, 191, 255, 255]


def test_uint8_is_drawn_as_it_is():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    picture = pictures.grid(images, scale=1)
    np.testing.assert_array_equal(picture[GAP:-GAP, GAP:-GAP, 0], images[0, ..., 0])


@pytest.mark.parametrize("width,scale", [(8, 6), (28, 2), (32, 2), (48, 1), (64, 1), (1, 48)])
def test_small_images_are_enlarged(width, scale):
    picture = pictures.grid(np.zeros((1, width, width, 1), np.uint8))
    assert picture.shape[0] == width * scale + 2 * GAP


@pytest.mark.parametrize("count,columns", [(1, 1), (2, 2), (9, 3), (10, 4), (64, 8)])
def test_columns_by_default_make_a_square(count, columns):
    picture = pictures.grid(np.zeros((count, 48, 48, 1), np.uint8))
    assert picture.shape[1] == columns * (48 + GAP) + GAP


def test_groups_stand_apart():
    images = np.random.default_rng(0).integers(0, 200, (12, 4, 4, 1)).astype(np.uint8)
    plain = pictures.grid(images, columns=6, scale=2)
    apart = pictures.grid(images, columns=6, scale=2, group=3)
    wide = plain.shape[1] // 2 + GAP // 2  # the first three columns and the gap after them
    np.testing.assert_array_equal(apart[:, :wide], plain[:, :wide])
    np.testing.assert_array_equal(apart[:, wide - plain.shape[1] :], plain[:, wide:])
    between = apart[:, wide : wide + apart.shape[1] - plain.shape[1]]
    assert between.shape[1] > GAP and (between == pictures.BACKGROUND).all()


def test_another_size_takes_the_nearest_pixel():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3)).astype(np.uint8)
    larger = pictures.at_size(images, 12, 12)
    np.testing.assert_array_equal(larger, images.repeat(3, 1).repeat(2, 2))
    np.testing.assert_array_equal(pictures.at_size(larger, 4, 6), images)
    assert pictures.at_size(images, 5, 5).shape == (2, 5, 5, 3)


def test_captions_leave_the_images_alone():
    images = np.full((4, 8, 8, 1), 7, np.uint8)
    plain = pictures.grid(images, columns=2)
    written = pictures.grid(images, columns=2, captions=["a", "b", "averyveryverylongname", ""])
    assert written.shape[0] > plain.shape[0] and written.shape[1] == plain.shape[1]
    assert (written == 7).all(-1).sum() == (plain == 7).all(-1).sum()
    assert (written[50 + GAP : 60] < 200).any()  # letters below the first row


def test_captions_of_several_words_have_as_many_lines_as_they_need():
    images = np.full((2, 8, 8, 3), 7, np.uint8)
    draw = lambda text: pictures.grid(images, columns=2, captions=[text, ""])
    ink = lambda canvas: np.flatnonzero((canvas[100:] < 200).any((1, 2)))  # below cells of 96
    one, two, many = map(draw, ("a red", "a red fox in the deep snow", "word " * 40))
    assert one.shape[1] == two.shape[1] == 2 * (96 + GAP) + GAP
    line = ink(one).max() - ink(one).min()
    assert ink(two).max() - ink(two).min() > 1.5 * line
    assert many.shape[0] - one.shape[0] == 3 * (two.shape[0] - one.shape[0])  # four at most
    middle = GAP + 96 + GAP // 2
    assert (many[100:, middle:] == pictures.BACKGROUND).all()  # cut off, not over the next cell


@pytest.mark.parametrize(
    "shape,options,message",
    [
        ((4, 8, 8), {}, r"\[N, H, W, 1 or 3\]"),
        ((0, 8, 8, 1), {}, "N at least 1"),
        ((4, 8, 8, 2), {}, r"\(4, 8, 8, 2\)"),
        ((4, 8, 8, 1), {"columns": 0}, "columns=0"),
        ((4, 8, 8, 1), {"scale": 0}, "scale=0"),
        ((4, 8, 8, 1), {"captions": ["a"]}, "1 captions for 4 images"),
    ],
)
def test_mistakes(shape, options, message):
    with pytest.raises(UserError, match=message):
        pictures.grid(np.zeros(shape, np.uint8), **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_saved_picture_reads_back(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (9, 11, channels)).astype(np.uint8)
    path = pictures.save(tmp_path / "x.png", image)
    with Image.open(path) as read:
        np.testing.assert_array_equal(np.asarray(read).reshape(image.shape), image)
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]
    assert Image.open(io.BytesIO(pictures.to_png(image))).format == "PNG"


def test_a_picture_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="x.png cannot be written"):
        pictures.save(tmp_path / "missing" / "x.png", np.zeros((2, 2, 3), np.uint8))


def test_letters_with_accents_are_told_apart():
    drawn = [pictures.grid(np.zeros((1, 8, 8, 3), np.uint8), captions=[c]) for c in "éñøчΩ"]
    assert len({picture.tobytes() for picture in drawn}) == 5
