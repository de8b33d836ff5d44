"""longclip export, on a run that was trained at stage 3."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longclip.errors import UserError
from longclip.launch.export import choose
from longclip.model.clip import build
from longclip.model.packing import pack
from longclip.run.checkpoints import state_of
from longclip.run.folder import RunFolder
from longclip.train.checkpoint import load_weights
from tests.helpers import experiment, make_run
from tests.launch.small import longclip, make_sweep, the_run

EMBED = """
import re, sys
sys.modules["longclip"] = None  # importing it raises
import torch
code = re.search("```python\\n(.*?)```", open("README.md").read(), re.S)[1]
exec(code)
pixels = torch.linspace(-2, 2, 3 * 16 * 16).reshape(1, 3, 16, 16)
ids = torch.tensor([[1, 5, 6, 7, 2]])
torch.save([embed_images(pixels), embed_texts(ids, torch.ones_like(ids))], sys.argv[1])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    root = tmp_path_factory.mktemp("work")
    sweep = make_sweep(root, (9,))
    sets = ("train.samples=120", "engine.zero_stage=3", "slurm.tasks_per_node=1", "evaluate.every=2 steps")
    longclip("train", sweep / "ctx9.yaml", *(word for s in sets for word in ("--set", s)), cwd=root)
    return the_run(root / "runs", "ctx9")


@pytest.fixture(scope="module")
def exported(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    said = longclip("export", run.path, "--to", "out", cwd=folder)
    best = state_of(choose(run, "last"))["best"]["checkpoint"]
    assert f"wrote out ({best}, " in said
    return folder / "out"


def test_the_best_checkpoint_gives_its_embeddings_without_this_package(
    run: RunFolder, exported: Path, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-c", EMBED, str(tmp_path / "made.pt")], cwd=exported, check=True)
    best = state_of(choose(run, "last"))["best"]["checkpoint"]
    model = build(run.experiment().model, 1).eval()
    model.load_state_dict(load_weights(run.checkpoints / best))
    with torch.no_grad():
        ours = model(torch.linspace(-2, 2, 3 * 16 * 16).reshape(1, 3, 16, 16), pack([[1, 5, 6, 7, 2]]))
    for theirs, expected in zip(torch.load(tmp_path / "made.pt"), ours[:2], strict=True):
        torch.testing.assert_close(theirs, expected, atol=1e-6, rtol=0)


def test_the_card_says_what_is_known(run: RunFolder, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert f"# {run.name}\n" in card and "| window | 9 tokens |" in card
    assert re.search(r"\| test \| \|\n.*\n\| i2t_recall_at_1 \| [\d.]+ \|", card)
    assert f"| {run.identity()['data.train']} |" in card
    assert "Of the 96 pairs of data.train 96 were asked for theirs: not stated: 96." in card


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--format", "onnx"), 2, "--format onnx: valid is transformers or open_clip"),
        (("--format", "open_clip"), 2, "open_clip: no modernbert text tower pooled by mean"),
        (("--checkpoint", "newest"), 2, "--checkpoint newest: valid is best, last, or a step"),
        (("--checkpoint", "7777"), 2, "has no checkpoint step-00007777 (any more); there are step-"),
        (("--to", "."), 2, ".: is there already"),
    ],
)
def test_what_cannot_be_exported(run: RunFolder, words: tuple[str, ...], code: int, said: str, tmp_path: Path) -> None:
    assert said in longclip("export", run.path, *words, cwd=tmp_path, code=code)
    assert not list(tmp_path.iterdir())


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no checkpoint yet"):
        choose(make_run(tmp_path, experiment()), "best")
