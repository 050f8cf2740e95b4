"""Files and sections that a page names are there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from kit.page_blocks import ROOT
from kit.pages import LOG, PAGES


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_there(page: str) -> None:
    """Those of a fixed place: under examples/, benchmarks/, scripts/, docs/, tests/ or src/."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:examples|benchmarks|scripts|docs|tests|src)/[\w./-]*)", text))
    named |= {
        str(Path(page).parent / link) for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    }
    assert page == LOG or [name for name in sorted(named) if not (ROOT / name).exists()] == []


def headings(page: str) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_section_that_a_page_points_to_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    # a link, so that this test sees it
    assert page == LOG or re.findall(r"README, \"|\(README:", text) == []
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
        target = os.path.normpath(Path(page).parent / link) if link else page
        assert anchor in headings(target), f"{page}: {link}#{anchor}"
