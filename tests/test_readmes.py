# SPDX-License-Identifier: Apache-2.0
"""The READMEs: generated parts are up to date, the first one is short, and links lead to files."""

import re
from dataclasses import fields

import pytest
import transformers
from test_architecture import ROOT

from hf_ssl.evaluation.protocols import PROTOCOLS, load_protocol
from hf_ssl.methods import METHODS
from hf_ssl.views import ViewSettings
from training.update_readmes import PARTS, READMES, updated

CONSTRAINTS = (ROOT / "constraints.txt").read_text()
ALL = [*READMES, "CONTRIBUTING.md", "spaces/README.md", "model_cards/README.md"]


@pytest.mark.parametrize("name", READMES)
def test_generated_parts_are_up_to_date(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "<!-- begin " in text
    if transformers.__version__ != re.search(r"^transformers==(.*)$", CONSTRAINTS, re.MULTILINE)[1]:
        text = re.sub(r"<!-- begin arguments -->.*<!-- end arguments -->", "", text, flags=re.DOTALL)
    assert updated(text) == text, "run python -m training.update_readmes"


def test_every_part_and_every_method_is_shown() -> None:
    text = "".join((ROOT / name).read_text() for name in READMES)
    assert {part for part in PARTS if f"<!-- begin {part} -->" in text} == set(PARTS)
    assert all(f"| [{method.title}](" in text for method in METHODS.values())


def test_the_table_of_protocols_has_every_setting() -> None:
    lines = {line.split(" | ")[0].strip("| `"): line for line in PARTS["protocols"]().splitlines()[2:]}
    assert lines.keys() == PROTOCOLS.keys()
    for name, line in lines.items():
        keys = [field.name for field in fields(load_protocol(name).Config)]
        assert re.findall(r"`(\w+)`", line) == [name, *keys]
    assert "`epochs` 100, `batch_size` 256, `standardize` false" in lines["linear"]
    assert "`labels_per_class` [1, 5, 10], `draws` 20" in lines["few_label_knn"]
    assert "`neighbors` null, `temperatures` [0.07, 0.1]" in lines["knn"]
    assert "`strengths` 45 values from 1e-06 to 100000" in lines["logistic_regression"]


def test_the_table_of_the_augmentation_has_every_setting() -> None:
    section = (ROOT / "training/README.md").read_text().split("## Augmentation\n")[1].split("\n## ")[0]
    assert {item.name for item in fields(ViewSettings)} <= set(re.findall(r"`(\w+)`", section))


def test_an_outdated_part_is_replaced() -> None:
    text = "before\n<!-- begin methods -->\noutdated\n<!-- end methods -->\nafter\n"
    assert "outdated" not in updated(text) and "SimCLR" in updated(text)
    assert updated(text).startswith("before\n") and updated(text).endswith("\nafter\n")


def test_the_readme_has_at_most_200_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("name", ALL)
def test_links_lead_to_files(name: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text())
    missing = [
        link for link in links if "://" not in link and not (ROOT / name).parent.joinpath(link).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("name", ALL)
def test_links_lead_to_headings(name: str) -> None:
    """Names of headings as GitHub makes them: lower case, without punctuation, and spaces become dashes."""
    missing = []
    for file, heading in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", (ROOT / name).read_text()):
        target = (ROOT / name).parent / file if file else ROOT / name
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        if heading not in {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}:
            missing.append(f"{file}#{heading}")
    assert missing == []
