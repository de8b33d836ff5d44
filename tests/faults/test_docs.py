"""docs/faults.md names a test for every fault, and every test of a fault."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "faults.md"
_NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def defined_in(file: str) -> set[tuple[str, str]]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {(file, n.name) for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


def faults() -> list[list[str]]:
    """The cells of every row, headings left out."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] != "what happens" and set(row[0]) != {"-"}]


def test_every_fault_is_told_in_full_and_names_tests_that_exist() -> None:
    rows = faults()
    assert len(rows) > 20
    for row in rows:
        assert len(row) == 5 and all(row), row
        named = set(_NAMED.findall(row[4]))
        assert named, row
        assert named <= {test for file, _ in named for test in defined_in(file)}, row


def test_every_test_of_a_fault_is_on_the_page() -> None:
    named = {test for row in faults() for test in _NAMED.findall(row[4])}
    there = defined_in("faults/test_fast.py") | defined_in("faults/test_full.py")
    assert there - named == set()
