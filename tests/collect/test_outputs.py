"""The files: a CSV with the right types, JSON that any program reads, LaTeX that compiles."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longclip.collect.collect import Options, collect
from longclip.collect.compare import compare
from longclip.collect.gather import gather
from longclip.collect.latex import escape, latex
from longclip.collect.references import Reference
from longclip.run.folder import RunFolder
from tests.collect.planted import scored_run
from tests.helpers import add_attempt, experiment, make_run, train
from tests.launch.small import longclip

HOSTILE = '[a_b] & 5% of $x^2 #1 {~} \\ "q" <α, é, 漢> | ±'


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 runs with two learning rates, one unfinished, and a quotation with every sign that could break a table."""
    root = tmp_path_factory.mktemp("outputs")
    runs = [scored_run(root, w, 0.4 + w / 5120, 0, {"train.lr": lr}, lr=lr) for w, lr in ((77, 1e-3), (512, 1e-3))]
    asked = experiment(512, name="ctx512_lr2e-3_s0", lr=2e-3)
    late = make_run(root, asked, axes={"model.context_length": 512, "train.lr": 2e-3, "train.seed": 0})
    train(add_attempt(late, 0), 0, 300, 60, val={300: 0.1})
    quoted = Reference(name=HOSTILE, source=HOSTILE, window=None, task="test", metrics={"t2i_recall_at_1": 0.5})
    collect([*runs, late], root / "out", Options(references=(quoted,), goal=0.2))
    return root / "out"


def test_a_csv_reads_back_with_the_right_types(written: Path) -> None:
    table = pd.read_csv(written / "table.csv", dtype_backend="numpy_nullable").set_index("run")
    assert list(table.index) == ["ctx77_lr1e-3_s0", "ctx512_lr1e-3_s0", "ctx512_lr2e-3_s0", HOSTILE]
    kinds = table.dtypes.astype(str)
    for name in (
        "context_length",
        "evaluated_at",
        "seeds",
        "test_samples",
        "samples_to",
        "samples_to_goal",
        "samples",
        "total",
    ):
        assert kinds[name] == "Int64", name
    for name in (
        "train.lr",
        "waste",
        "i2t_recall_at_1",
        "i2t_recall_at_1_low",
        "delta_i2t_recall_at_1_high",
        "hours",
        "area",
    ):
        assert kinds[name] == "Float64", name
    for name in ("kind", "task", "state", "path"):
        assert pd.api.types.is_string_dtype(table[name].dtype), name
    assert table.loc["ctx512_lr2e-3_s0", "i2t_recall_at_1"] is pd.NA
    assert table.loc["ctx77_lr1e-3_s0", "waste"] == 0.4, "full precision"
    plain = pd.read_csv(written / "table.csv").set_index("run")
    assert plain["i2t_recall_at_1"].dtype == float and plain["seeds"].dtype == int
    assert plain.loc[HOSTILE, "source"] == HOSTILE


def test_json_has_every_run_and_no_nan(written: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads((written / "table.json").read_text(), parse_constant=refuse)
    assert [line["kind"] for line in found["lines"]] == ["measured"] * 3 + ["reported"]
    assert [run["name"] for run in found["runs"]] == ["ctx77_lr1e-3_s0", "ctx512_lr1e-3_s0", "ctx512_lr2e-3_s0"]
    cell = found["lines"][0]["scores"]["i2t_recall_at_1"]
    assert cell["low"] < cell["value"] < cell["high"] and cell["spread"] is None
    assert found["runs"][2]["val"] == [[300, 0.1]]


def test_markdown_tables_have_as_many_cells_as_columns(written: Path) -> None:
    lines = [line for line in (written / "table.md").read_text().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex: apt-get install texlive-latex-recommended")
def test_latex_compiles(written: Path, tmp_path: Path) -> None:
    table = (written / "table.tex").read_text()
    assert r"\toprule" in table and r"\textbf{" in table and r"{\scriptsize [" in table
    head = r"\documentclass{article}\usepackage{booktabs,graphicx}\usepackage[T1]{fontenc}\begin{document}"
    signs = escape("".join(map(chr, range(32, 0x250))))
    (tmp_path / "paper.tex").write_text(f"{head}\n{table}\n{signs}\n\\end{{document}}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:].decode("latin-1")
    log = (tmp_path / "paper.log").read_text("latin-1")
    assert "Missing character" not in log and "Overfull" not in log.partition("paper.aux")[0]


def test_a_name_is_no_option_of_the_line_before(tmp_path: Path) -> None:
    """LaTeX reads on after a line's end, and after a rule: [2em] would be a space, and a star vanish."""
    run = scored_run(tmp_path, 77, 0.4)
    quoted = [Reference(name=name, source="s", window=None, task="test", metrics={"accuracy": 0.5}) for name in NAMES]
    made = latex(compare(gather([run]), references=quoted)).splitlines()
    assert [line.partition(" & ")[0] for line in made if line.endswith(r"reported, not measured & s \\")] == [
        "{}[12] theirs",
        "{}*ours",
        "plain",
    ]


NAMES = ("[12] theirs", "*ours", "plain")


@given(st.text())
def test_no_sign_of_latex_is_left_bare(text: str) -> None:
    made = escape(text)
    assert made.isascii() or all("\u00c0" <= c <= "\u00ff" for c in made if not c.isascii())
    bare = re.sub(r"\\[&%$#_{}]|\\text\w+\{\}|\$\\\w+\$|\$-\$|\{\\ttfamily U\+[0-9A-F]{4,6}\}", "", made)
    assert not set(bare) & set("&%$#_{}\\^")


def test_the_command_compares_and_refuses(tmp_path: Path) -> None:
    runs = [scored_run(tmp_path / "runs", w, 0.4 + w / 5120) for w in (77, 512)]
    (tmp_path / "experiments" / "tiny").mkdir(parents=True)
    (tmp_path / "experiments" / "tiny" / "references.yaml").write_text(
        "rows: [{name: theirs, source: a paper, metrics: {i2t_recall_at_1: 0.9}}]\n"
    )
    said = longclip("collect", "tiny", "--runs", "runs", "--no-sync", "--goal", "0.4", cwd=tmp_path)
    assert "reported, not measured" in said and "samples to 40" in said
    assert "wrote results/tiny/{table.csv,table.md,table.tex,table.json,report.html,curves.png," in said
    scored_run(tmp_path / "runs", 256, 0.5, weight_decay=0.1)
    refused = longclip("collect", "tiny", "--runs", "runs", "--no-sync", cwd=tmp_path, code=2)
    assert "ctx256_s0: undeclared difference: train.weight_decay is 0.1, elsewhere the default" in refused
    assert "--allow-differences" in refused
    wrong = longclip("collect", "tiny", "--runs", "runs", "--no-sync", "--best-over", "train.lr", cwd=tmp_path, code=2)
    assert wrong.startswith("error:")
    assert isinstance(runs[0], RunFolder)
