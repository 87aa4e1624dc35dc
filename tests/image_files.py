# SPDX-License-Identifier: Apache-2.0
"""Writers of PNG, TIFF, PNM, SGI and FITS files for tests, which use no image library: only struct, zlib and
numpy.

Sources: TIFF 6.0 (Adobe, 1992), RFC 2083 (PNG), the manual pages of netpbm (PGM, PPM), the SGI image file
format 1.00, FITS standard 4.0.
"""

import struct
import zlib
from collections.abc import Sequence

import numpy as np

JPEGXL_RGB16 = bytes.fromhex(
    "0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20"
    "000000096a786c6c0a0000002f6a786c63ff0a080000e007a0b810080201005c004b188b15420ad8388042f30144904266"
    "f3fb0b1c0fee0f"
)
"""A JPEG XL file of libjxl. 2 x 1 pixels: 0, 100, 4095 and 65535, 300, 7 of 16 bits."""
JPEGXL_GRAY12 = bytes.fromhex("ff0a084018142d020804010044004b188b15c26936c23492cd237dfdef4f01")
"""A JPEG XL file of libjxl. 2 x 3 pixels: 0, 100, 4095 and 4095, 0, 100 of 12 bits."""

_FORMATS = {"u": 1, "i": 2, "f": 3}


def packed(values: np.ndarray, bits: int) -> bytes:
    """Return rows of numbers (H, W) with `bits` bits each, highest bit first. A row fills whole bytes."""
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits(
        (values[..., None].astype(int) >> shifts & 1).reshape(len(values), -1), axis=1
    ).tobytes()


def tiff(
    values: np.ndarray,
    *,
    bits: int | None = None,
    photometric: int = 1,
    order: str = "<",
    planar: bool = False,
    compress: bool = False,
    extra: Sequence[int] = (),
    subfile: int | None = None,
) -> bytes:
    """Return a TIFF file with one strip, or with one strip for each plane.

    Args:
        values: (H, W) or (H, W, C) numbers.
        bits: bits of a number that fills no whole byte; None: those of the type.
        photometric: 0 white is zero, 1 black is zero, 2 RGB, 5 CMYK, 8 Lab.
        order: "<" little-endian, ">" big-endian.
        planar: whether each channel is stored separately.
        compress: whether to compress with Deflate (compression 8).
        extra: the tag ExtraSamples: 0 unspecified, 1 premultiplied, 2 transparency.
        subfile: the tag NewSubfileType: 1 is a preview. The tag SubIFDs then names another image.
    """
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    planes = [values[..., number] for number in range(channels)] if planar else [values]
    swapped = [plane.astype(plane.dtype.newbyteorder(order)) for plane in planes]
    strips = [plane.tobytes() if bits is None else packed(plane, bits) for plane in swapped]
    strips = [zlib.compress(strip) if compress else strip for strip in strips]
    depth = 8 * values.dtype.itemsize if bits is None else bits
    tags: dict[int, tuple[str, list[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [depth] * channels),
        259: ("H", [8 if compress else 1]),
        262: ("H", [photometric]),
        273: ("I", [0] * len(strips)),
        277: ("H", [channels]),
        278: ("I", [height]),
        279: ("I", [len(strip) for strip in strips]),
        284: ("H", [2 if planar else 1]),
        339: ("H", [_FORMATS[values.dtype.kind]] * channels),
    }
    if extra:
        tags[338] = "H", list(extra)
    if subfile is not None:
        tags |= {254: ("I", [subfile]), 330: ("I", [8])}
    later = 8 + 2 + 12 * len(tags) + 4  # values of more than four bytes come after the directory
    size = sum(len(numbers) * struct.calcsize(kind) for kind, numbers in tags.values())
    start = later + size + size % 2
    tags[273] = "I", [start + sum(map(len, strips[:number])) for number in range(len(strips))]
    directory, long = b"", b""
    for tag, (kind, numbers) in sorted(tags.items()):
        content = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(content) > 4:
            place = struct.pack(f"{order}I", later + len(long))
            long += content
        else:
            place = content.ljust(4, b"\0")
        directory += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[kind], len(numbers)) + place
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return (head + directory + bytes(4) + long).ljust(start, b"\0") + b"".join(strips)


def png(
    values: np.ndarray,
    *,
    bits: int | None = None,
    palette: bytes | None = None,
    before: Sequence[tuple[bytes, bytes]] = (),
    after: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """Return a PNG file of uint8 or uint16 numbers (H, W) or (H, W, C), with filter 0.

    Args:
        values: the numbers.
        bits: 1, 2 or 4 bits of a gray number; None: those of the type.
        palette: colors of three bytes; `values` are then their indices.
        before, after: further chunks before and after the pixels (name, content).
    """
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    depth = bits or 8 * values.dtype.itemsize
    kind = 3 if palette else {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    content = packed(values, bits) if bits else values.astype(values.dtype.newbyteorder(">")).tobytes()
    lines = np.frombuffer(content, np.uint8).reshape(height, -1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))]
    chunks += [(b"PLTE", palette), *before] if palette else before
    chunks += [(b"IDAT", zlib.compress(np.pad(lines, ((0, 0), (1, 0))).tobytes())), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def pnm(values: np.ndarray, maximum: int) -> bytes:
    """Return a PGM file of numbers (H, W), or a PPM file of numbers (H, W, 3).

    Args:
        values: the numbers.
        maximum: the number of white, which the file states.
    """
    height, width = values.shape[:2]
    kind = 5 if values.ndim == 2 else 6
    return (
        f"P{kind} {width} {height} {maximum}\n".encode()
        + values.astype(">u2" if maximum > 255 else "u1").tobytes()
    )


def sgi(values: np.ndarray) -> bytes:
    """Return an uncompressed SGI file of uint8 or uint16 numbers (H, W, C). The first row is the lowest."""
    height, width, channels = values.shape
    size = values.dtype.itemsize
    head = struct.pack(">HBBHHHHII", 474, 0, size, 3, width, height, channels, 0, 256**size - 1)
    return head.ljust(512, b"\0") + np.moveaxis(values[::-1], 2, 0).astype(f">u{size}").tobytes()


def fits(values: np.ndarray, *, zero: float = 0) -> bytes:
    """Return a FITS file of numbers (H, W), to which a reader adds `zero`. The first row is the lowest."""
    height, width = values.shape
    bits = 8 * values.dtype.itemsize * (-1 if values.dtype.kind == "f" else 1)
    cards = {"SIMPLE": "T", "BITPIX": bits, "NAXIS": 2, "NAXIS1": width, "NAXIS2": height, "BZERO": zero}
    head = "".join(f"{name:8}= {value!s:>20}".ljust(80) for name, value in cards.items()) + "END"
    content = values[::-1].astype(values.dtype.newbyteorder(">")).tobytes()
    return head.ljust(2880).encode() + content.ljust(-(-len(content) // 2880) * 2880, b"\0")
