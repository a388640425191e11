"""The tables of the pages are those of the results."""

from __future__ import annotations

import pytest

from benchmarks.render import BLOCK, PAGES, TABLES, markdown, rendered


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_the_results(page) -> None:
    text = page.read_text(encoding="utf-8")
    assert rendered(text) == text, "python benchmarks/render.py brings it up to date"


def test_each_table_is_shown_once() -> None:
    shown = [found[2] for page in PAGES for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(TABLES)


def test_a_number_that_was_changed_by_hand_is_noticed() -> None:
    page = PAGES[0].read_text(encoding="utf-8")
    row = markdown(TABLES["train_gpt"]()).splitlines()[2]
    forged = page.replace(row, row.replace("1.0", "1.9"))
    assert forged != page and rendered(forged) == page
    with pytest.raises(KeyError, match="no_such"):
        rendered("<!-- table no_such -->\n<!-- end of table -->")


def test_markdown() -> None:
    assert markdown((["a", ""], [["1", ""], ["", "2"]])) == "| a | |\n|---|---|\n| 1 | |\n| | 2 |\n"
