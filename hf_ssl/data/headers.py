# SPDX-License-Identifier: Apache-2.0
"""Reads from the headers of image files how many bits their numbers have, where Pillow does not return it."""

import struct
from typing import NamedTuple

_JPEG2000_START = b"\xff\x4f\xff\x51"
_JPEGXL_START = b"\xff\x0a"
_CMYK = 12


class Jpeg2000Header(NamedTuple):
    """What the header of a JPEG 2000 file states: bits and signs of its components, and their meaning."""

    bits: set[int]
    signed: bool
    components: int
    has_opacity: bool
    is_cmyk: bool


def jpeg2000_header(view: memoryview) -> Jpeg2000Header:
    """Return the header of a JPEG 2000 file. Source: ITU-T T.800, annexes A.5.1 (SIZ) and I.5.3 (jp2h)."""
    content = bytes(view)
    start = content.index(_JPEG2000_START)
    boxes = content[:start]
    (components,) = struct.unpack_from(">H", view, start + 40)
    sizes = [view[start + 42 + 3 * number] for number in range(components)]
    has_opacity, position = False, boxes.find(b"cdef")
    if position >= 0:
        (count,) = struct.unpack_from(">H", boxes, position + 4)
        entries = [struct.unpack_from(">HHH", boxes, position + 6 + 6 * number) for number in range(count)]
        has_opacity = any(kind == 1 and channel == components - 1 for channel, kind, _ in entries)
    color = boxes.find(b"colr")
    is_cmyk = (
        color >= 0 and boxes[color + 4] == 1 and boxes[color + 7 : color + 11] == struct.pack(">I", _CMYK)
    )
    bits, signed = {(size & 0x7F) + 1 for size in sizes}, any(size & 0x80 for size in sizes)
    return Jpeg2000Header(bits, signed, components, has_opacity, is_cmyk)


class Depth(NamedTuple):
    """The numbers of an image: how many bits they have, and whether they are floating-point numbers."""

    bits: int
    is_float: bool = False


def avif_depth(view: memoryview) -> Depth:
    """Return the depth of the colors of an AVIF file. Source: AV1-ISOBMFF, section 2.3 (the box av1C)."""
    content, found, position = bytes(view), 8, -1
    while (position := content.find(b"av1C", position + 1)) >= 0 and position + 6 < len(content):
        flags = content[position + 6]
        found = max(found, 8 if not flags & 0x40 else 12 if flags & 0x20 else 10)
    return Depth(found)


def jpegxl_depth(view: memoryview) -> Depth:
    """Return the depth of a JPEG XL file. Source: ISO/IEC 18181-1, annexes on SizeHeader and ImageMetadata.

    Raises:
        ValueError: the file contains no start of an image.
    """
    content = bytes(view)
    if not content.startswith(_JPEGXL_START):  # a container: the boxes jxlc or jxlp hold the image
        boxes = (content.find(b"jxlc"), content.find(b"jxlp"))
        starts = [content.find(_JPEGXL_START, box) for box in boxes if box >= 0]
        content = content[min(starts, default=-1) :] if starts else b""
    bits = _Bits(content[2:])
    _skip_jpegxl_size(bits)
    if bits.read(1):  # all values are the defaults
        return Depth(8)
    if bits.read(1):
        bits.read(3)  # the orientation, which libjxl applies
        if bits.read(1):
            _skip_jpegxl_size(bits)
        if bits.read(1):
            _skip_jpegxl_preview(bits)
        if bits.read(1):
            _skip_jpegxl_animation(bits)
    if bits.read(1):
        return Depth(bits.choice((0, 32), (0, 16), (0, 24), (6, 1)), True)
    return Depth(bits.choice((0, 8), (0, 10), (0, 12), (6, 1)))


class _Bits:
    """Reads numbers from bytes, the lowest bit first."""

    def __init__(self, content: bytes) -> None:
        self.number = int.from_bytes(content[:64], "little")

    def read(self, count: int) -> int:
        value = self.number & ((1 << count) - 1)
        self.number >>= count
        return value

    def choice(self, *kinds: tuple[int, int]) -> int:
        """Return a number of one of four kinds (count of bits, number to add)."""
        count, offset = kinds[self.read(2)]
        return self.read(count) + offset


def _skip_jpegxl_size(bits: _Bits) -> None:
    small = bits.read(1)
    for is_width in (False, True):
        if is_width and bits.read(3):  # a ratio of width and height
            return
        if small:
            bits.read(5)
        else:
            bits.choice((9, 1), (13, 1), (18, 1), (30, 1))


def _skip_jpegxl_preview(bits: _Bits) -> None:
    kinds = ((0, 16), (0, 32), (5, 1), (9, 33)) if bits.read(1) else ((6, 1), (8, 65), (10, 321), (12, 1345))
    bits.choice(*kinds)
    if not bits.read(3):
        bits.choice(*kinds)


def _skip_jpegxl_animation(bits: _Bits) -> None:
    bits.choice((0, 100), (0, 1000), (10, 1), (30, 1))
    bits.choice((0, 1), (0, 1001), (8, 1), (10, 1))
    bits.choice((0, 0), (3, 0), (16, 0), (32, 0))
    bits.read(1)
