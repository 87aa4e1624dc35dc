# SPDX-License-Identifier: Apache-2.0
"""Reads the headers of image files: facts that Pillow does not return, such as the number of bits."""

import struct
from collections.abc import Iterator
from typing import NamedTuple

_JPEG2000_START = b"\xff\x4f\xff\x51"
_JPEGXL_START = b"\xff\x0a"
_CMYK = 12
_OPACITY, _SPOT_COLOR, _BLACK, _COLOR_FILTER = 0, 2, 4, 5  # kinds of extra channels of JPEG XL


class Jpeg2000Header(NamedTuple):
    """Facts from the header of a JPEG 2000 file.

    Attributes:
        bits: the numbers of bits of the components.
        signed: whether the numbers of a component are signed.
        components: number of components.
        channels: number of channels. They are the columns of the palette, or else the components.
        has_opacity: whether the last channel is defined as opacity.
        is_reordered: whether the channels of the colors are not in the order of the colors.
        is_cmyk: whether the colors are CMYK.
    """

    bits: set[int]
    signed: bool
    components: int
    channels: int
    has_opacity: bool
    is_reordered: bool
    is_cmyk: bool


def jpeg2000_header(view: memoryview) -> Jpeg2000Header:
    """Return the header of a JPEG 2000 file. Source: ITU-T T.800, annexes A.5.1 (SIZ) and I.5.3 (jp2h)."""
    content = bytes(view)
    start = content.index(_JPEG2000_START)
    boxes = content[:start]
    (components,) = struct.unpack_from(">H", view, start + 40)
    sizes = [view[start + 42 + 3 * number] for number in range(components)]
    palette = boxes.find(b"pclr")
    channels = boxes[palette + 6] if palette >= 0 else components
    entries: list[tuple[int, int, int]] = []  # channel, kind (0: color, 1: opacity), number of its color
    if (position := boxes.find(b"cdef")) >= 0:
        (count,) = struct.unpack_from(">H", boxes, position + 4)
        entries = [struct.unpack_from(">HHH", boxes, position + 6 + 6 * number) for number in range(count)]
    color = boxes.find(b"colr")
    is_cmyk = (
        color >= 0 and boxes[color + 4] == 1 and boxes[color + 7 : color + 11] == struct.pack(">I", _CMYK)
    )
    return Jpeg2000Header(
        bits={(size & 0x7F) + 1 for size in sizes},
        signed=any(size & 0x80 for size in sizes),
        components=components,
        channels=channels,
        has_opacity=any(kind == 1 and channel == channels - 1 for channel, kind, _ in entries),
        is_reordered=any(kind == 0 and number not in (0, channel + 1) for channel, kind, number in entries),
        is_cmyk=is_cmyk,
    )


class JpegxlHeader(NamedTuple):
    """Facts from the header of a JPEG XL file.

    Attributes:
        bits: number of bits per color.
        is_float: whether the colors are floating-point numbers.
        is_animated: whether the file may contain several frames.
        is_premultiplied: whether the colors are multiplied by the opacity.
        has_black: whether the file has the black channel of CMYK colors.
    """

    bits: int = 8
    is_float: bool = False
    is_animated: bool = False
    is_premultiplied: bool = False
    has_black: bool = False


class AvifHeader(NamedTuple):
    """Facts from the header of an AVIF file about its primary image.

    Attributes:
        bits: number of bits per color.
        aperture: the clean aperture: width, height, and the offset of its center, each as numerator and
            denominator; None if the whole image is shown.
    """

    bits: int
    aperture: tuple[int, ...] | None = None


def avif_header(view: memoryview) -> AvifHeader:
    """Return the header of an AVIF file.

    Sources: ISO/IEC 23008-12 (the boxes pitm and ipma), ISO/IEC 14496-12 (clap), AV1-ISOBMFF, section 2.3
    (av1C).
    """
    try:
        properties = _primary_properties(view)
    except (struct.error, LookupError):  # a file of another structure, such as an animation
        properties = {}
    aperture = properties.get(b"clap")
    found = None if aperture is None else struct.unpack_from(">IIIIiIiI", aperture)
    if b"av1C" in properties:
        return AvifHeader(_av1_bits(bytes(properties[b"av1C"])), found)
    if b"pixi" in properties:  # a grid of images
        return AvifHeader(properties[b"pixi"][5], found)
    content, bits, position = bytes(view), 8, -1
    while (position := content.find(b"av1C", position + 1)) >= 0 and position + 6 < len(content):
        bits = max(bits, _av1_bits(content[position + 4 :]))
    return AvifHeader(bits, found)


def _av1_bits(content: bytes) -> int:
    flags = content[2]
    return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10


def _boxes(view: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the kind and the content of each box."""
    start = 0
    while start + 8 <= len(view):
        size, kind = struct.unpack_from(">I4s", view, start)
        head = 8
        if size == 1:
            (size,), head = struct.unpack_from(">Q", view, start + 8), 16
        end = len(view) if size == 0 else start + size
        if end < start + head:
            return
        yield kind, view[start + head : end]
        start = end


def _primary_properties(view: memoryview) -> dict[bytes, memoryview]:
    """Return the properties of the primary image of a HEIF file: kind -> content."""
    meta = dict(_boxes(dict(_boxes(view))[b"meta"][4:]))  # without its version
    primary = struct.unpack_from(">H" if meta[b"pitm"][0] == 0 else ">I", meta[b"pitm"], 4)[0]
    inside = dict(_boxes(meta[b"iprp"]))
    known, links = list(_boxes(inside[b"ipco"])), inside[b"ipma"]
    item, wide = (">I" if links[0] else ">H"), bool(links[3] & 1)
    (count,) = struct.unpack_from(">I", links, 4)
    position, found = 8, {}
    for _ in range(count):
        (number,) = struct.unpack_from(item, links, position)
        position += struct.calcsize(item)
        length = links[position]
        position += 1
        for _ in range(length):
            # The highest bit states whether a reader must support the property.
            place = struct.unpack_from(">H", links, position)[0] & 0x7FFF if wide else links[position] & 0x7F
            position += 2 if wide else 1
            if number == primary and 0 < place <= len(known):
                kind, content = known[place - 1]
                found[kind] = content
    return found


def jpegxl_header(view: memoryview) -> JpegxlHeader:
    """Return the header of a JPEG XL file.

    Source: ISO/IEC 18181-1, annexes on SizeHeader and ImageMetadata.
    """
    content = bytes(view)
    if not content.startswith(_JPEGXL_START):  # a container: the boxes jxlc or jxlp contain the image
        boxes = (content.find(b"jxlc"), content.find(b"jxlp"))
        starts = [content.find(_JPEGXL_START, box) for box in boxes if box >= 0]
        content = content[min(starts, default=0) :]
    bits = _Bits(content[2:])
    _skip_jpegxl_size(bits)
    if bits.read(1):  # all values are the defaults
        return JpegxlHeader()
    is_animated = False
    if bits.read(1):
        bits.read(3)  # the orientation, which libjxl applies
        if bits.read(1):
            _skip_jpegxl_size(bits)
        if bits.read(1):
            _skip_jpegxl_preview(bits)
        if bits.read(1):
            is_animated = True
            _skip_jpegxl_animation(bits)
    depth, is_float = _jpegxl_depth(bits)
    bits.read(1)  # whether 16 bits are enough for decoding
    is_premultiplied = has_black = False
    for _ in range(bits.choice((0, 0), (0, 1), (4, 2), (12, 1))):
        kind, multiplied = _jpegxl_channel(bits)
        is_premultiplied |= multiplied
        has_black |= kind == _BLACK
    return JpegxlHeader(depth, is_float, is_animated, is_premultiplied, has_black)


def _jpegxl_depth(bits: "_Bits") -> tuple[int, bool]:
    """Return the number of bits, and whether the numbers are floating-point numbers."""
    if not bits.read(1):
        return bits.choice((0, 8), (0, 10), (0, 12), (6, 1)), False
    depth = bits.choice((0, 32), (0, 16), (0, 24), (6, 1))
    bits.read(4)  # bits of the exponent
    return depth, True


def _jpegxl_channel(bits: "_Bits") -> tuple[int, bool]:
    """Return the kind of an extra channel, and whether the colors are multiplied by it."""
    if bits.read(1):  # opacity of 8 bits
        return _OPACITY, False
    kind = bits.choice((0, 0), (0, 1), (4, 2), (6, 18))
    _jpegxl_depth(bits)
    bits.choice((0, 0), (0, 3), (0, 4), (3, 1))
    bits.read(8 * bits.choice((0, 0), (4, 0), (5, 16), (10, 48)))  # its name
    if kind == _SPOT_COLOR:
        bits.read(64)
    elif kind == _COLOR_FILTER:
        bits.choice((0, 1), (2, 0), (4, 3), (8, 19))
    return kind, kind == _OPACITY and bool(bits.read(1))


class _Bits:
    """Reads numbers from bytes, the lowest bit first."""

    def __init__(self, content: bytes) -> None:
        self.number = int.from_bytes(content[:1024], "little")

    def read(self, count: int) -> int:
        value = self.number & ((1 << count) - 1)
        self.number >>= count
        return value

    def choice(self, *kinds: tuple[int, int]) -> int:
        """Read a number whose first two bits select one of four encodings (count of bits, number to add)."""
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
