# SPDX-License-Identifier: Apache-2.0
"""Formats of image files: which ones are read, and what the messages say about the others."""

import io
import json
import sys
import types
from importlib import machinery

import numpy as np
import PIL.features
import PIL.Image
import pytest
from image_files import png
from messages import mentions, missing

from hf_ssl.data import DataConfig, formats, open_source, readers
from hf_ssl.data.decode import BrokenImage, EncodedImage, decode, size_in_header
from hf_ssl.data.decoded import decoded_rows
from hf_ssl.data.inspection import common_size
from hf_ssl.data.labeled_splits import unlabeled_images
from hf_ssl.errors import UserError

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
JXL = b"\xff\x0a\x00\x10"
needs_avif = pytest.mark.skipif(not PIL.features.check("avif"), reason="needs a Pillow with AVIF")


def save(path, kind="PNG", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (16, 12), (200, 30, 30)).save(path, kind, **options)


def frames(path, kind, count=3, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    # different pictures, because Pillow joins equal frames
    first, *rest = (PIL.Image.new("RGB", (16, 16), (80 * i, 255 - 80 * i, 0)) for i in range(count))
    first.save(path, kind, save_all=True, append_images=rest, **options)


def test_files_without_an_ending_are_read_if_they_begin_like_an_image(tmp_path):
    for name, kind in (("photo1", "PNG"), ("photo2", "JPEG"), ("photo3", "TIFF"), ("x.gif", "GIF")):
        save(tmp_path / name, kind)
    (tmp_path / "LICENSE").write_text("text")
    source = open_source(DataConfig(path=str(tmp_path)))
    assert source.num_rows == 4
    assert (source.count.total, dict(source.count.unread)) == (4, {})


@pytest.mark.parametrize(("ending", "kind"), [("avif", "AVIF"), ("mpo", "MPO")])
def test_formats_of_pillow_are_read(ending, kind, tmp_path):
    if kind == "AVIF" and not PIL.features.check("avif"):
        pytest.skip("Pillow without AVIF")
    save(tmp_path / f"a.{ending}", kind)
    source = open_source(DataConfig(path=str(tmp_path)))
    assert source.num_rows == 1 and common_size(source, 3) == (12, 16)


def test_images_with_an_unknown_ending_are_counted(tmp_path):
    for name in ("a.png", "b.unknown", "c.unknown", "d.0", "e.1"):
        save(tmp_path / name, "PNG")
    (tmp_path / "notes.unknown2").write_text("no image")
    text = str(open_source(DataConfig(path=str(tmp_path))).count)
    assert missing(text, "1 of 5 ", "4 (unknown endings such as .", "rename") == []


@pytest.mark.parametrize(("ending", "kind"), [("heic", "HEIF"), ("jxl", "JXL")])
def test_formats_of_plugins_are_read(ending, kind, tmp_path):
    if f".{ending}" not in formats.READABLE:
        pytest.skip("needs the extra formats")
    save(tmp_path / "a.png")
    save(tmp_path / f"b.{ending}", kind, lossless=True)
    source = open_source(DataConfig(path=str(tmp_path)))
    assert source.num_rows == 2 and common_size(source, 3) == (12, 16)


@pytest.fixture(scope="module")
def without_plugins(forks, tmp_path_factory):
    """The messages about HEIC and JPEG XL in a process without the plug-ins."""
    folder = tmp_path_factory.mktemp("plugins")
    save(folder / "photos" / "a.png")
    for ending in ("HEIC", "JXL"):
        (folder / "photos" / f"b.{ending}").write_bytes(b"x")
    (folder / "heic").write_bytes(HEIC)
    code = f"""
import json, sys
sys.modules["pillow_heif"] = sys.modules["pillow_jxl"] = None
from pathlib import Path
from hf_ssl.data import DataConfig, open_source
from hf_ssl.data.decode import BrokenImage, EncodedImage, decode, size_in_header

def message(function, *arguments):
    try:
        function(*arguments)
    except BrokenImage as error:
        return str(error)

heic = Path("heic").read_bytes()
count = open_source(DataConfig(path="photos")).count
print(json.dumps({{
    "heic": [message(decode, heic, 3), message(size_in_header, EncodedImage(heic, None)),
             message(size_in_header, EncodedImage(None, "heic"))],
    "jxl": [message(decode, {JXL!r}, 3)],
    "count": [count.total, dict(count.unread), str(count)],
}}))
"""
    done = forks.run("transformers", code, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_files_of_a_format_without_a_plugin_are_counted(without_plugins):
    total, unread, text = without_plugins["count"]
    assert total == 3 and sorted(unread.values()) == [1, 1]
    for package in ("pillow-heif", "pillow-jxl-plugin"):
        assert any(package in reason and "hf_ssl[formats]" in reason for reason in unread)
    assert text.startswith("1 of 3 image files")


@pytest.mark.parametrize(("kind", "package"), [("heic", "pillow-heif"), ("jxl", "pillow-jxl-plugin")])
def test_encoded_bytes_of_a_format_without_a_plugin_name_it(without_plugins, kind, package):
    assert all(package in message for message in without_plugins[kind])


def test_a_metadata_file_beside_formats_that_datasets_does_not_know(tmp_path):
    """`datasets` (5.2) would choose the loader of the metadata file, by the endings."""
    for number in range(3):
        save(tmp_path / f"{number}.mpo", "MPO")
        save(tmp_path / f"photo{number}", "PNG")
    (tmp_path / "metadata.csv").write_text("file_name,kind\n0.mpo,x\nphoto1,y\n")
    source = open_source(DataConfig(path=str(tmp_path)))
    assert source.num_rows == 2 and common_size(source, 3) == (12, 16)
    assert source.dataset["kind"][:] == ["x", "y"] and source.count.total == 6


@needs_avif
def test_caches_do_not_keep_images_that_an_earlier_installation_could_not_read(tmp_path, write_parquet):
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (255, 255, 255)).save(file, "AVIF")
    write_parquet(tmp_path / "train.parquet", [file.getvalue(), png(np.zeros((8, 8, 3), np.uint8))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PIL.Image, "ID", [name for name in PIL.Image.ID if name != "AVIF"])
        patch.setattr(readers, "READABLE", frozenset({".png"}))
        source = open_source(DataConfig(path=str(tmp_path)))
        assert list(decoded_rows(source, 3, "memmap").broken) == [0]
        fingerprint = unlabeled_images(DataConfig(path=str(tmp_path)), "train").fingerprint
    source = open_source(DataConfig(path=str(tmp_path)))
    found = decoded_rows(source, 3, "memmap")
    assert not found.broken and found.pixels[0].min() > 250
    assert unlabeled_images(DataConfig(path=str(tmp_path)), "train").fingerprint != fingerprint


def test_installed_plugins_are_registered(monkeypatch):
    calls = []
    heif = types.SimpleNamespace(
        register_heif_opener=lambda: calls.append("heif"), __spec__=machinery.ModuleSpec("pillow_heif", None)
    )
    jxl = types.SimpleNamespace(__spec__=machinery.ModuleSpec("pillow_jxl", None))
    monkeypatch.setitem(sys.modules, "pillow_heif", heif)
    monkeypatch.setitem(sys.modules, "pillow_jxl", jxl)
    assert {".heic", ".heif", ".hif", ".jxl"} <= formats._register_plugins()
    assert calls == ["heif"]

    def fail():
        raise OSError("a library is missing")

    heif.register_heif_opener = fail
    assert ".heic" not in formats._register_plugins()


def test_a_folder_of_images_that_cannot_be_read_names_the_cause(tmp_path):
    (tmp_path / "a.cr2").write_bytes(b"x")
    with pytest.raises(UserError, match=mentions("data.path", tmp_path, ".cr2", "camera")):
        open_source(DataConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match=mentions("data.path", ".cr2", "camera")):
        open_source(DataConfig(path=str(tmp_path / "a.cr2")))


def test_an_image_above_the_limit_of_pillow(monkeypatch, tmp_path):
    save(tmp_path / "a.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 50)  # the image has 192 pixels
    with pytest.raises(BrokenImage, match=mentions(100, "smaller", "tiles")):
        decode((tmp_path / "a.png").read_bytes(), 3)
    with pytest.raises(UserError, match=mentions("data.path", tmp_path / "a.png", 100, "tiles")):
        common_size(open_source(DataConfig(path=str(tmp_path))), 3)


def test_pages_and_frames_that_are_not_read_are_reported(tmp_path, caplog):
    for name, kind in (("a.tif", "TIFF"), ("b.gif", "GIF"), ("c.webp", "WEBP"), ("d.png", "PNG")):
        frames(tmp_path / name, kind)
    # These further images are no other pictures.
    frames(tmp_path / "e.jpg", "MPO")
    save(tmp_path / "f.ico", "ICO", sizes=[(16, 12), (8, 6)])
    save(tmp_path / "g.tif", "TIFF")
    common_size(open_source(DataConfig(path=str(tmp_path))), 3)
    assert "4 of 7 inspected images" in caplog.text


def test_the_first_page_and_the_largest_icon_are_read(tmp_path):
    frames(tmp_path / "a.tif", "TIFF")
    pixels = decode((tmp_path / "a.tif").read_bytes(), 3)
    assert pixels[:, 0, 0].tolist() == [0, 255, 0]
    PIL.Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / "b.ico", sizes=[(16, 16), (32, 32)])
    assert decode((tmp_path / "b.ico").read_bytes(), 3).shape == (3, 32, 32)


def test_signatures():
    found = {}
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP"):
        file = io.BytesIO()
        PIL.Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file, kind)
        found[kind] = formats._kind(file.getvalue()[:16])
    assert found == {"PNG": ".png", "JPEG": ".jpg", "GIF": ".gif", "TIFF": ".tif", "WEBP": ".webp"}
    assert formats._kind(HEIC[:16]) == ".heic" and formats._kind(b"\0\0\0\x18ftypavif") == ".avif"
    assert formats._kind(b"\0\0\0\x18ftypmp42") is None and formats._kind(b"RIFF\0\0\0\0WAVE") is None
    assert formats._kind(b"") is None


OTHER_FILES = {
    "OpenEXR": b"v/1\x01\x02",
    "DICOM": bytes(128) + b"DICM",
    "Radiance": b"#?RADIANCE\n",
    "JPEG XR": b"II\xbc\x01",
    "JPEG": b"\xff\xd8\xff\xf7",
    "SVG": b"<svg/>",
    "PDF": b"%PDF-1.7",
    "NumPy": b"\x93NUMPY\x01",
    "camera": b"\0\0\0\x18ftypcrx \0\0",
    "video": b"\0\0\0\x18ftypmp42\0\0",
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\n",
    "ZIP": b"PK\x03\x04",
    "PNG": b"hello",
}


@needs_avif
def test_a_damaged_avif_file_is_no_video():
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(file, "AVIF")
    with pytest.raises(BrokenImage) as error:
        decode(file.getvalue()[:200], 3)
    assert not missing(str(error.value), "check the file") and "video" not in str(error.value)


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_that_is_no_image_is_named(name, tmp_path):
    (tmp_path / "file").write_bytes(OTHER_FILES[name])
    for stored in (EncodedImage(OTHER_FILES[name], None), EncodedImage(None, str(tmp_path / "file"))):
        with pytest.raises(BrokenImage, match=mentions("not an image", name)) as error:
            decode(stored.read(), 3)
        assert ";" in str(error.value) and len(str(error.value)) < 200
        with pytest.raises(BrokenImage, match=mentions("not an image", name)):
            size_in_header(stored)
