"""Real shards, written by others: 2,547 figures of open textbooks, where they are at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from longclip.data.decode import square
from longclip.data.index import index_folder
from longclip.data.shards import open_dataset
from tests.data.forms import form

HERE = Path(os.environ.get("LONGCLIP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "openstax"
pytestmark = pytest.mark.skipif(not HERE.is_dir(), reason=f"no real shards at {HERE} (LONGCLIP_TEST_DATA names others)")


def test_all_pairs_are_found_and_readable(tmp_path: Path) -> None:
    """The folder is read-only: its index lies elsewhere. The counts are those of the data's own description."""
    done = index_folder(HERE, tmp_path / "index", workers=2)
    assert (done.samples, done.shards, done.skipped) == (2547, 7, {})
    assert len(open_dataset(tmp_path / "index" / "train-*.tar")) == 2246
    held_out = open_dataset(tmp_path / "index" / "val-*.tar")
    assert len(held_out) == 301
    for i in range(0, 301, 30):
        sample = held_out.read(0, i)
        assert sample.text.strip() and sample.fields["license"]
        assert square(sample.image, form(64), None).shape == (64, 64, 3)
    assert json.loads((tmp_path / "index" / "index.json").read_text())["root"] == str(HERE.resolve())
