"""TensorBoard's files: read back by the protocol buffers of a library that TensorBoard reads."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from jdiff.training import events


def records(path):
    """The events of a file; both checksums of each are compared."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        for part, crc in (
            (data[:8], data[8:12]),
            (data[12 : 12 + length], data[12 + length :][:4]),
        ):
            rotated = (struct.unpack("<I", crc)[0] - 0xA282EAD8) & 0xFFFFFFFF
            assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == events.crc32c(part)
        found.append(proto.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_the_checksum_is_that_of_rfc_3720():
    assert events.crc32c(b"123456789") == 0xE3069283
    assert events.crc32c(bytes(32)) == 0x8A9136AA


def test_what_is_written_is_what_the_library_reads(tmp_path):
    image = np.arange(5 * 300 * 3, dtype=np.uint8).reshape(5, 300, 3)
    file = events.Events(tmp_path / "tb", purge=300)
    file.scalar(300, "train/loss", 0.25)
    file.image(2**40, "samples", image)
    file.image(2, "grey", image[..., :1])
    file.close()
    (path,) = (tmp_path / "tb").glob("events.out.tfevents.*")
    first, session, scalar, colour, grey = records(path)
    assert first.file_version == "brain.Event:2" and first.wall_time > 1.6e9
    assert (session.step, session.session_log.status) == (300, 1)  # START
    (value,) = scalar.summary.value
    assert (scalar.step, value.tag, value.simple_value) == (300, "train/loss", 0.25)
    (value,) = colour.summary.value
    assert (colour.step, value.tag) == (2**40, "samples")
    assert (value.image.height, value.image.width, value.image.colorspace) == (5, 300, 3)
    picture = Image.open(io.BytesIO(value.image.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(picture), image)
    assert grey.summary.value[0].image.colorspace == 1
