"""From articles to a result, as tools/longcap-mini does it: shards, two epochs on either text, a table."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.small import environment, longclip
from tests.longcap.test_build import REAL, needs_real

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@needs_real
def test_from_articles_to_a_table(tmp_path: Path) -> None:
    data = tmp_path / "data" / "longcap-mini"
    shutil.copytree(ROOT / "experiments" / "longcap-mini", tmp_path / "experiments" / "longcap-mini")
    train = [sys.executable, str(ROOT / "tools" / "wordpiece.py"), str(REAL), str(data / "tokenizer")]
    subprocess.run(train, check=True, env=environment(), timeout=120)
    options = ("--tokenizer", data / "tokenizer", "--val", "0.2", "--test", "0.2")
    longclip("longcap", "build", REAL, data / "shards", *options, cwd=tmp_path)
    longclip("submit", "experiments/longcap-mini", "--on", "local", cwd=tmp_path, timeout=600)
    longclip("collect", "longcap-mini", "--no-sync", cwd=tmp_path)
    with open(tmp_path / "results" / "longcap-mini" / "table.csv", newline="") as file:
        rows = {row["data.text"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"txt", "long_caption"}
    assert {row["state"] for row in rows.values()} == {"finished"}
    assert float(rows["txt"]["waste"]) >= float(rows["long_caption"]["waste"]) == 0, "the budget is the window"
