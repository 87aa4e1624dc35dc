# SPDX-License-Identifier: Apache-2.0
"""Finds out from a file's header whether it is one of the plain kinds that need no conversion."""

import struct
from typing import NamedTuple


class Shape(NamedTuple):
    channels: int
    height: int
    width: int


def plain_shape(data: memoryview) -> Shape | None:
    """Shape of the pixels of an 8-bit grey or RGB JPEG or WebP file without transparency and metadata.

    None for everything else, damaged files included. Sources: ITU-T T.81 annex B; RFC 9649 (WebP).
    """
    try:
        if data[:2] == b"\xff\xd8":
            return _jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
    except (struct.error, IndexError):
        return None  # it ends in the middle of its header
    return None


def _jpeg(data: memoryview) -> Shape | None:
    shape = None
    position = 2
    while True:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill bytes before a marker
            position += 1
            continue
        if marker == 0xDA:  # the scan: whatever tells the shape and the orientation came before it
            return shape
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker == 0xE1:  # EXIF or XMP data, which may tell the orientation
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            depth, height, width, channels = struct.unpack_from(">BHHB", data, position + 4)
            if marker not in (0xC0, 0xC1, 0xC2) or depth != 8 or channels not in (1, 3):
                return None  # lossless, arithmetic, 12-bit, or CMYK
            shape = Shape(channels, height, width)
        position += 2 + length


def _webp(data: memoryview) -> Shape | None:
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Shape(3, height & 0x3FFF, width & 0x3FFF)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        if bits >> 28 & 1:  # it uses transparency
            return None
        return Shape(3, (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    return None
