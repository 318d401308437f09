"""README's figures are those of the pages of results."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README[README.index("## Figures\n") : README.index("\n## ", README.index("## Figures\n") + 1)]
PAGES = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "benchmarks" / "results").glob("*.md"))
FIGURE = re.compile(r"[+-]?\d[\d,]*\.\d+(?: ± \d+\.\d+)?")


def figures(text: str) -> list[str]:
    """Numbers with a decimal point, with their errors."""
    return sorted(set(FIGURE.findall(" ".join(text.split()))))


def test_there_are_figures_and_what_does_not_hold_comes_first() -> None:
    assert len(figures(SECTION)) > 20
    assert SECTION.index("does not hold") < SECTION.index("±")


def test_no_figure_is_left_to_be_filled_in() -> None:
    assert not re.findall(r"\b[A-Z]+-TIME\b|\bTODO\b|\bTBD\b", README)


@pytest.mark.parametrize("figure", figures(SECTION))
def test_every_figure_is_in_a_page_of_results(figure: str) -> None:
    pattern = rf"(?<![\d.,+-]){re.escape(figure)}(?![\d])"
    assert re.search(pattern, PAGES), f"{figure} is in no page of benchmarks/results"


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http|#)([^)#]+)", SECTION))
def test_every_page_that_is_linked_is_there(link: str) -> None:
    assert (ROOT / link).is_file()
