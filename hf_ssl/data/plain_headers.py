# SPDX-License-Identifier: Apache-2.0
"""Reads the headers of JPEG and WebP files that need no conversion, so that torchvision can decode them."""

import struct
from typing import TypeAlias

Shape: TypeAlias = tuple[int, int, int]
"""Channels, height and width."""


def plain_shape(data: memoryview) -> Shape | None:
    """Return the shape of a file that needs no conversion, from its header.

    Such a file is an 8-bit gray or RGB JPEG or WebP file without transparency and without EXIF or XMP data.
    The function returns None for all other files, also for damaged ones. Sources: ITU-T T.81 annex B (JPEG);
    RFC 9649 (WebP).
    """
    try:
        if data[:2] == b"\xff\xd8":
            return _jpeg_shape(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_shape(data)
    except (struct.error, IndexError):
        return None  # the file ends in the middle of its header
    return None


def _jpeg_shape(data: memoryview) -> Shape | None:
    shape = None
    position = 2
    while True:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill bytes before a marker
            position += 1
            continue
        if marker == 0xDA:  # start of the scan; the shape and the orientation come before it
            return shape
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker == 0xE1:  # EXIF or XMP data, which may contain the orientation
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            depth, height, width, channels = struct.unpack_from(">BHHB", data, position + 4)
            if marker not in (0xC0, 0xC1, 0xC2) or depth != 8 or channels not in (1, 3):
                return None  # lossless, arithmetic, 12-bit, or CMYK
            shape = (channels, height, width)
        position += 2 + length


def _webp_shape(data: memoryview) -> Shape | None:
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return 3, height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        if bits >> 28 & 1:  # the image uses transparency
            return None
        return 3, (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    return None
