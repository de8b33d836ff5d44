"""README: its console snippets are run and print what it says, its files exist, its links hold."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.launch.small import longclip

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "slurm" / "README.md"])


def snippets() -> list[tuple[str, str]]:
    """``(command, expected output)`` of every ```console block."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


@pytest.mark.parametrize(("command", "output"), snippets())
def test_snippet(command: str, output: str) -> None:
    program, *words = shlex.split(command)
    assert program == "longclip"
    assert longclip(*words, cwd=ROOT, code=2 if output.startswith("error") else 0).strip() == output.strip()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_every_verb_is_in_the_readme_and_no_other() -> None:
    table = (ROOT / "README.md").read_text().split("| verb |")[1].split("\n\n")[0]
    named = {
        word.split()[0]
        for cell in re.findall(r"^\| (`[^|]+`) \|", table, re.M)
        for word in re.findall(r"`([^`]+)`", cell)
    }
    shown = longclip("--help", cwd=ROOT)
    commands = set(re.findall(r"^│ (\w+) ", shown.split("Commands")[1], re.M))
    assert named == commands
