# SPDX-License-Identifier: Apache-2.0
"""Reads mutated images, tars and Parquet files in processes with limits, and counts what happens by format.

`python tests/weekly/file_mutations.py --count 10000 --output training/results/reliability.json`

The program makes small files, and changes, removes, repeats or cuts some of their bytes. A child process
reads each file with hf_ssl. It must return pixels, or raise BrokenImage or UserError, which users see as one
sentence. With the extra `scientific`, it also reads lossless images with tifffile or imagecodecs, and
compares the pixels of 8 bits. No mutated file is stored. A mutant is a function of its format and number, so
that it can be made again.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent))  # image_files, also in the child process

from image_files import JPEGXL_GRAY12, JPEGXL_RGB16, png, pnm, tiff

MEMORY = 8 << 30
SECONDS = 900  # for a batch, with the start of Python
BATCH = 1000
EXPECTED = ("pixels", "broken", "rejected")


def seeds() -> dict[str, bytes]:
    """Return one small file of each format."""
    return images() | {"tar": tar(), "tar, stream": tar(), "parquet": parquet(), "parquet, stream": parquet()}


def four_images() -> list[bytes]:
    return [png(np.full((8, 8, 3), number, np.uint8)) for number in range(4)]


def tar() -> bytes:
    """Return a WebDataset of four images and classes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, content in enumerate(four_images()):
            for ending, part in (("png", content), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(part)
                archive.addfile(member, io.BytesIO(part))
    return file.getvalue()


def parquet() -> bytes:
    """Return a table of four images and classes in two row groups."""
    rows = [{"bytes": content, "path": None} for content in four_images()]
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": rows, "label": list(range(4))}), file, row_group_size=2)
    return file.getvalue().to_pybytes()


def images() -> dict[str, bytes]:
    gray = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16)
    color = np.stack([gray, gray[::-1], gray.T.reshape(12, 16)], -1)
    deep = gray.astype(np.uint16) * 257

    def encoded(kind: str, **options: Any) -> bytes:
        file = io.BytesIO()
        PIL.Image.fromarray(color).save(file, kind, **options)
        return file.getvalue()

    return {
        "png": png(color),
        "png 4": png(gray % 16, bits=4),
        "png 16": png(deep),
        "tiff": tiff(color, photometric=2),
        "tiff 16": tiff(deep),
        "tiff 16 planes": tiff(color.astype(np.uint16) * 257, photometric=2, planar=True),
        "tiff deflate": tiff(color, photometric=2, compress=True),
        "pgm 16": pnm(deep, 65535),
        "jpeg": encoded("JPEG"),
        "webp": encoded("WEBP", lossless=True),
        "gif": encoded("GIF"),
        "bmp": encoded("BMP"),
        "jpeg 2000": encoded("JPEG2000"),
    } | images_of_extras(color.astype(np.uint16) * 4)


def images_of_extras(color: np.ndarray) -> dict[str, bytes]:
    """Return files of more than 8 bits of the formats that need the extras `formats` and `scientific`.

    Args:
        color: numbers of 10 bits (H, W, 3) uint16.
    """
    found = {}
    with suppress(ImportError):
        from imagecodecs import avif_encode

        found["avif 10"] = bytes(avif_encode(color, level=100, bitspersample=10))
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401

        found |= {"jpeg xl 16": JPEGXL_RGB16, "jpeg xl 12": JPEGXL_GRAY12}
    with suppress(ImportError):
        import pillow_heif

        file = io.BytesIO()
        size = color.shape[1], color.shape[0]
        pillow_heif.from_bytes("RGB;16", size, (color << 6).tobytes()).save(file)
        found["heic 10"] = file.getvalue()
    return found


def mutant(content: bytes, number: int) -> bytes:
    """Return a changed copy of a file. The number determines the change."""
    generator = np.random.default_rng(number)
    data = bytearray(content)
    for _ in range(int(generator.integers(1, 4))):
        start = int(generator.integers(0, max(1, len(data))))
        length = int(generator.integers(1, 9))
        kind = int(generator.integers(0, 5))
        if kind < 2:
            changed = slice(start, start + length)
            data[changed] = generator.bytes(len(data[changed]))
        elif kind == 2:
            del data[start : start + length]
        elif kind == 3:
            data[start:start] = data[start : start + length]
        else:
            del data[start:]
    return bytes(data)


def other_pixels(name: str, content: bytes) -> np.ndarray | None:
    """Return the pixels (H, W, C) that tifffile or imagecodecs read; None if they read none of 8 bits."""
    import imagecodecs
    import tifffile

    try:
        if name.startswith("tiff"):
            values = tifffile.imread(io.BytesIO(content))
        else:
            values = {"png": imagecodecs.png_decode, "webp": imagecodecs.webp_decode}[name](content)
    except Exception:
        return None
    values = values[..., None] if values.ndim == 2 else values
    return values if values.dtype == np.uint8 and values.ndim == 3 and values.shape[2] in (1, 3) else None


def outcome(name: str, content: bytes, compare: bool) -> tuple[str, str | None]:
    """Return what happened ("pixels", "broken" or "error TYPE") and how the other reader compares.

    The second value is "equal", "different", "only hf_ssl", "only the other", "neither" or None.
    """
    from hf_ssl.data.decode import BrokenImage, EncodedImage, decode, size_in_header
    from hf_ssl.data.value_range import deep_samples

    image, found, pixels = EncodedImage(content, None), "pixels", None
    for read in (
        lambda: size_in_header(image),
        lambda: decode(content, 3, (0, 1000)),
        lambda: decode(content, 3),
    ):
        try:
            pixels, found = read(), "pixels"
        except BrokenImage:
            pixels, found = None, "broken"
        except Exception as error:
            return f"error {type(error).__name__}", None
    deep_samples([image])
    pixels = None if pixels is None else pixels.permute(1, 2, 0).numpy()
    if not compare or name not in ("png", "tiff", "tiff deflate", "webp"):
        return found, None
    other = other_pixels(name, content)
    if pixels is None or other is None:
        states = {(True, False): "only the other", (False, True): "only hf_ssl", (True, True): "neither"}
        return found, states[pixels is None, other is None]
    return found, "equal" if np.array_equal(pixels, np.broadcast_to(other, pixels.shape)) else "different"


def table_outcome(name: str, content: bytes, folder: Path) -> str:
    """Return what happened with a tar or a Parquet file: "pixels", "broken", "rejected" or "error TYPE".

    Args:
        name: "tar" or "parquet"; with ", stream" the file is read as a stream.
        content: the file.
        folder: where it is written; `datasets` has its cache there too.
    """
    from hf_ssl.data.config import DataConfig
    from hf_ssl.data.images import EncodedRows
    from hf_ssl.data.sources import open_source
    from hf_ssl.data.stream import StreamShards
    from hf_ssl.errors import UserError

    kind, _, stream = name.partition(", ")
    file = folder / f"data.{kind}"
    file.write_bytes(content)
    try:
        source = open_source(DataConfig(path=str(file)), streaming=bool(stream), labels=True)
        if stream:
            shards = StreamShards(source, 4)
            blocks = [block for shard in range(shards.count) for block in shards.blocks(shard)]
            states = {image_state(image) for block in blocks for image in block.images}
        else:
            rows = EncodedRows(source, 3)
            states = {"broken"} if rows.read(np.arange(len(rows)))[1] else {"pixels"}
            np.asarray(source.dataset.with_format(None)[source.label_column])
    except UserError as error:
        if "\n" in str(error) or len(str(error)) > 600:
            return "error message"
        return "rejected"
    except Exception as error:
        return f"error {type(error).__name__}"
    return "broken" if "broken" in states else "pixels"


def image_state(image: Any) -> str:
    from hf_ssl.data.decode import BrokenImage, decode

    try:
        decode(image.read(), 3)
    except BrokenImage:
        return "broken"
    return "pixels"


def child(name: str, first: int, last: int) -> None:
    """Decode the mutants of one format, and print one line for each."""
    from hf_ssl.data.readers import can_read_all

    warnings.simplefilter("ignore")
    content, compare = seeds()[name], can_read_all()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder  # before the first import of `datasets`

        def found(data: bytes) -> tuple[str, str | None]:
            return (
                outcome(name, data, compare)
                if name in images()
                else (table_outcome(name, data, Path(folder)), None)
            )

        state, _ = found(content)  # imports everything before the limits hold
        assert state == "pixels", (name, state)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for number in range(first, last):
            print(json.dumps([number, *found(mutant(content, number))]), flush=True)


def results(name: str, count: int) -> Iterator[tuple[int, str, str | None]]:
    """Yield the number, the outcome and the comparison of each mutant. A crash ends one child process."""
    number = 0
    while number < count:
        last = min(count, number + BATCH)
        command = [sys.executable, __file__, "--child", name, str(number), str(last)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            output = done.stdout
        except subprocess.TimeoutExpired as error:
            output = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        for line in output.splitlines():
            found, state, comparison = json.loads(line)
            yield found, state, comparison
            number = found + 1
        if number < last:
            yield number, "crash", None
            number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="mutants of all formats together")
    parser.add_argument("--output", type=Path, help="JSON file; its key mutated_files is replaced")
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        name, first, last = arguments.child
        child(name, int(first), int(last))
        return
    names = list(seeds())
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    listed: list[str] = []
    for name in names:
        for number, state, comparison in results(name, -(-arguments.count // len(names))):
            counts[name][state] += 1
            if comparison is not None:
                counts[name][f"compared: {comparison}"] += 1
            if state not in EXPECTED or comparison not in (None, "equal", "neither"):
                listed.append(f"{name} {number}: {state}, {comparison}")
    report = {
        "mutants": sum(sum(v for k, v in each.items() if ":" not in k) for each in counts.values()),
        "formats": {name: dict(each) for name, each in counts.items()},
        "listed": listed,
    }
    print(json.dumps(report, indent=1))
    if arguments.output:
        stored = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        arguments.output.write_text(json.dumps(stored | {"mutated_files": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
