# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: what a person does, and what must not happen meanwhile."""

import io
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SECONDS_TO_DELETE = 120


@pytest.fixture
def opened(browser: Any, served: dict[str, Any]) -> Iterator[Callable[..., Any]]:
    """Opens a Space; afterwards nobody else's server was asked, and nothing failed in the browser."""
    contexts, elsewhere, errors = [], [], []

    def open_page(kind: str, viewport: dict[str, int] = DESKTOP) -> Any:
        context = browser.new_context(viewport=viewport)
        contexts.append(context)
        address = served[kind].address
        context.on(
            "request",
            lambda request: (
                None if request.url.startswith((address, "data:", "blob:")) else elsewhere.append(request.url)
            ),
        )
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        # A listener from the start: Playwright does not await its order to catch file choosers, and one that
        # opens right after it (a key pressed at once) would be missed.
        page.on("filechooser", lambda chooser: None)
        page.goto(address)
        page.wait_for_selector(".answer .neighbors li")
        page.get_by_role("button", name="Upload a photo").wait_for()  # the controls appear one by one
        page.locator("#example-9").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert (elsewhere, errors) == ([], [])


def picture(kind: str = "PNG", side: int = 60) -> bytes:
    values = np.random.default_rng(5).integers(0, 256, (side, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def upload(page: Any, file: Path) -> None:
    """As a person does: press the button and choose a file."""
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload a photo").click()
    chooser.value.set_files(file)


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def captions(page: Any, selector: str) -> list[str]:
    return page.locator(f"{selector} figcaption").all_text_contents()


def wait_for_query(page: Any, caption: str) -> None:
    page.locator(".query figcaption", has_text=caption).wait_for()


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_first_sight(opened: Callable[..., Any]) -> None:
    page = opened("vit")
    assert page.title() == page.get_by_role("heading", level=1).inner_text() == "Digits by a vit"
    assert captions(page, ".query") == ["Example: 0"]
    found = captions(page, ".neighbors")
    assert len(found) == 12 and all(re.fullmatch(r"\d · \d\.\d\d", caption) for caption in found)
    similarities = [caption.split()[-1] for caption in found]
    assert similarities == sorted(similarities, reverse=True)
    names = ["All heads", "Through all layers", "60 % of the attention", "Alike parts, alike colors"]
    assert captions(page, ".attention") == [*names, "Head 1", "Head 2", "Head 3"]
    images = page.locator(".answer img")
    widths = images.evaluate_all("images => images.map(image => image.naturalWidth)")
    assert len(widths) == 1 + 12 + 7 and min(widths) > 0
    assert all(images.evaluate_all("images => images.map(image => image.alt)"))
    assert page.locator("text=Traceback").count() == 0


def test_examples_by_keyboard(opened: Callable[..., Any]) -> None:
    page = opened("vit")
    page.keyboard.press("Tab")
    focused = "() => document.activeElement.textContent.trim()"
    assert page.evaluate(focused) == "Upload a photo"
    outline = "() => getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    with page.expect_file_chooser():
        page.keyboard.press("Enter")
    for expected in ("0", "1", "2"):
        page.keyboard.press("Tab")
        assert page.evaluate(focused) == expected
        assert page.evaluate(outline) == "solid"
    page.keyboard.press("Enter")
    wait_for_query(page, "Example: 2")
    assert len(captions(page, ".neighbors")) == 12


def test_an_uploaded_photo_is_answered_and_deleted(
    opened: Callable[..., Any], served: dict[str, Any], tmp_path: Path
) -> None:
    page, scratch = opened("vit"), served["vit"].scratch
    before = set(files_below(scratch))
    for kind in ("PNG", "JPEG"):
        upload(page, written(tmp_path, f"holiday.{kind.lower()}", picture(kind)))
        wait_for_query(page, "Your picture")
        assert len(captions(page, ".neighbors")) == 12 and len(captions(page, ".attention")) == 7
        assert set(files_below(scratch)) == before, "an upload, or something made of it, stayed"
        page.locator("#example-1").click()
        wait_for_query(page, "Example: 1")
    assert not [path for path in scratch.rglob("*") if "holiday" in path.name]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        pytest.param(
            b"<html><body>404</body></html>",
            "This file is not a picture that can be read.",
            id="html",
            marks=pytest.mark.slow,
        ),
        pytest.param(picture("JPEG")[:-400], "This picture is damaged or incomplete.", id="cut"),
        pytest.param(
            picture(side=2),
            "Please choose one that is at most 20 times as long as wide.",
            id="line",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_broken_file_gets_a_friendly_sentence(
    opened: Callable[..., Any], served: dict[str, Any], tmp_path: Path, data: bytes, text: str
) -> None:
    page, scratch = opened("vit"), served["vit"].scratch
    before = set(files_below(scratch))
    upload(page, written(tmp_path, "photo.jpg", data))
    problem = page.get_by_role("alert").filter(has_text=text)
    problem.wait_for()
    assert "Traceback" not in page.inner_text("body") and "/" not in problem.inner_text()
    assert set(files_below(scratch)) == before
    page.locator("#example-3").click()  # and the page goes on
    wait_for_query(page, "Example: 3")


def test_a_large_file_is_refused_and_not_kept(
    opened: Callable[..., Any], served: dict[str, Any], tmp_path: Path
) -> None:
    page, scratch = opened("vit"), served["vit"].scratch
    before = set(files_below(scratch))
    upload(page, written(tmp_path, "large.png", bytes(21 * 2**20)))
    page.get_by_text(re.compile("maximum allowed size")).first.wait_for()
    end = time.monotonic() + SECONDS_TO_DELETE
    while set(files_below(scratch)) != before and time.monotonic() < end:
        time.sleep(0.05)
    assert set(files_below(scratch)) == before


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("resnet", "This encoder is a ResNet, which has no attention."),
        ("parts", "This encoder consists of one narrow encoder for each color view."),
    ],
)
def test_an_encoder_without_attention_says_so(opened: Callable[..., Any], kind: str, reason: str) -> None:
    page = opened(kind)
    page.locator("#example-5").click()
    wait_for_query(page, "Example: 5")
    assert len(captions(page, ".neighbors")) == 12 and captions(page, ".attention") == []
    assert f"{reason} A single encoder of the ViT family" in page.inner_text(".attention")


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_phones_need_no_sideways_scrolling(opened: Callable[..., Any], kind: str) -> None:
    page = opened(kind, PHONE)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"]
    right = "elements => Math.max(...elements.map(element => element.getBoundingClientRect().right))"
    assert page.locator("button, figure, p, h1, h2").evaluate_all(right) <= PHONE["width"]
    page.locator("#example-4").click()
    wait_for_query(page, "Example: 4")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"]
