"""TensorBoard's event files, written directly: records of protocol buffers of five messages.

A library that writes them in a thread loses what a full disk refuses, and may import more than the
rest of a training run. The formats: tensorflow's event.proto, summary.proto and TFRecord.
"""

import io
import pathlib
import socket
import struct
import time
from typing import Any

#: Seconds between moments at which TensorBoard can see what was written.
FLUSH = 30.0


class Events:
    """One event file, opened for appending to a folder; errors of the disk are raised here."""

    def __init__(self, folder: pathlib.Path, purge: int | None = None):
        """Args:
        folder: made if it is not there.
        purge: from this step on, what earlier files of the folder hold does not count.
        """
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._file = (folder / name).open("wb")
        self._flushed = time.monotonic()
        self._write(_text(3, "brain.Event:2"))
        if purge is not None:  # a session that starts at this step
            self._write(_integer(2, purge) + _message(7, _integer(1, 1)))
        self._file.flush()

    def scalar(self, step: int, name: str, value: float) -> None:
        """A number of a curve."""
        self._summary(step, name, struct.pack("<Bf", 2 << 3 | 5, value))

    def image(self, step: int, name: str, image: Any) -> None:
        """A picture uint8 `[H, W, C]`."""
        from PIL import Image

        height, width, channels = image.shape
        png = io.BytesIO()
        Image.fromarray(image[..., 0] if channels == 1 else image).save(png, "PNG")
        size = _integer(1, height) + _integer(2, width) + _integer(3, channels)
        self._summary(step, name, _message(4, size + _message(4, png.getvalue())))

    def close(self) -> None:
        """Writes what is left."""
        self._file.close()

    def _summary(self, step: int, name: str, value: bytes) -> None:
        value = _message(1, _text(1, name) + value)
        self._write(_integer(2, step) + _message(5, value))
        if time.monotonic() - self._flushed > FLUSH:
            self._file.flush()
            self._flushed = time.monotonic()

    def _write(self, event: bytes) -> None:
        """A record: length, its checksum, an event with the time now, its checksum."""
        event = struct.pack("<Bd", 1 << 3 | 1, time.time()) + event
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked(length) + event + _masked(event))


def crc32c(data: bytes) -> int:
    """CRC-32 with Castagnoli's polynomial, which the standard library does not have."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _entry(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


_TABLE = [_entry(byte) for byte in range(256)]


def _masked(data: bytes) -> bytes:
    """TFRecord's form of the checksum: rotated, and moved by a constant."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out + bytes([number]))


def _integer(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())
