"""Every kind of broken experiment file costs one clear message: file, line, key, and what would be right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from longclip.errors import ExperimentError, UserError
from longclip.experiment.load import load

GOOD = """\
name: good
model:
  context_length: 77
  image: {config: {model_type: vit}}
  text:
    config: {model_type: modernbert, max_position_embeddings: 512}
    tokenizer: ./tok
data: {train: ./train, val: ./val}
train:
  samples: 1000
  global_batch: 16
  precision: fp32
  lr: 5e-4
engine:
  zero_stage: 2
slurm:
  tasks_per_node: 2
"""

Edit = Callable[[str], str]


def swap(old: str, new: str) -> Edit:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return edit


def add(text: str) -> Edit:
    return lambda good: good + text


BROKEN: dict[str, tuple[Edit, str]] = {
    "unknown section": (add("trian: {}\n"), "bad.yaml:18: trian: unknown key; did you mean train?"),
    "misspelt key": (swap("  lr:", "  lrr:"), "bad.yaml:13: train.lrr: unknown key; did you mean lr?"),
    "missing key": (swap("  lr: 5e-4\n", ""), "bad.yaml:9: train.lr: missing"),
    "key in the wrong section": (
        add("  betas: [0.9, 0.95]\n"),
        "bad.yaml:18: slurm.betas: unknown key here; did you mean train.betas?",
    ),
    "key that exists nowhere": (
        swap("zero_stage: 2", "zero_stage: 2\n  turbo: true"),
        "bad.yaml:16: engine.turbo: unknown key; valid here: zero_stage, micro_batch",
    ),
    "string for a number": (
        swap("global_batch: 16", "global_batch: many"),
        "bad.yaml:11: train.global_batch: is 'many'; input should be a valid integer",
    ),
    "quoted number": (
        swap("length: 77", "length: '77'"),
        "bad.yaml:3: model.context_length: is '77'; input should be a valid integer",
    ),
    "yes for a number": (
        swap("global_batch: 16", "global_batch: yes"),
        "bad.yaml:11: train.global_batch: is True; input should be a valid integer",
    ),
    "value for a section": (
        swap("engine:\n  zero_stage: 2", "engine: fast"),
        "bad.yaml:14: engine: is a section of keys, not 'fast'",
    ),
    "ZeRO stage 4": (
        swap("zero_stage: 2", "zero_stage: 4"),
        "bad.yaml:15: engine.zero_stage: is 4; input should be 0, 1, 2 or 3",
    ),
    "bf16 at stage 0": (
        lambda t: t.replace("fp32", "bf16").replace("zero_stage: 2", "zero_stage: 0"),
        "bad.yaml:15: engine.zero_stage: is 0 with train.precision bf16",
    ),
    "unknown precision": (
        swap("fp32", "fp16"),
        "bad.yaml:12: train.precision: is 'fp16'; input should be 'fp32' or 'bf16'",
    ),
    "negative learning rate": (
        swap("lr: 5e-4", "lr: -5e-4"),
        "bad.yaml:13: train.lr: is -0.0005; input should be greater than 0",
    ),
    "beta of 1": (
        swap("lr: 5e-4", "lr: 5e-4\n  betas: [0.9, 1.0]"),
        "bad.yaml:14: train.betas: are [0.9, 1.0]; each must be at least 0 and below 1",
    ),
    "one beta": (swap("lr: 5e-4", "lr: 5e-4\n  betas: [0.9]"), "bad.yaml:14: train.betas.1: missing"),
    "crop scale turned round": (
        swap("lr: 5e-4", "lr: 5e-4\n  crop_scale: [1.0, 0.5]"),
        "bad.yaml:14: train.crop_scale: is [1.0, 0.5]; valid is [low, high] with 0 < low <= high <= 1",
    ),
    "window above the positions": (
        swap("length: 77", "length: 1024"),
        "bad.yaml:3: model.context_length: is 1024, but the text tower has 512 positions",
    ),
    "batch that does not divide": (
        swap("global_batch: 16", "global_batch: 15"),
        "bad.yaml:11: train.global_batch: is 15, which does not divide among 2 ranks; nearest that do: 14, 16",
    ),
    "micro batch that does not divide": (
        swap("zero_stage: 2", "zero_stage: 2\n  micro_batch: 3"),
        "bad.yaml:16: engine.micro_batch: is 3, which does not divide the 8 pairs that each of 2 ranks holds; "
        "nearest that do: 2, 4; or auto, all 8 at once",
    ),
    "micro batch above the share": (
        swap("zero_stage: 2", "zero_stage: 2\n  micro_batch: 16"),
        "bad.yaml:16: engine.micro_batch: is 16, which does not divide the 8 pairs that each of 2 ranks holds; "
        "nearest that do: 8; or auto, all 8 at once",
    ),
    "plain accumulation": (
        swap("zero_stage: 2", "zero_stage: 2\n  deepspeed: {gradient_accumulation_steps: 2}"),
        "bad.yaml:16: engine.deepspeed.gradient_accumulation_steps: is decided by engine.micro_batch (it keeps all",
    ),
    "more layers to freeze than there are": (
        swap("{config: {model_type: vit}}", "{config: {model_type: vit, num_hidden_layers: 3}, freeze: 4}"),
        "bad.yaml:4: model.image.freeze: is 4, but the tower has 3 layers; at most 3, or all",
    ),
    "a word that freezes nothing": (
        swap("{config: {model_type: vit}}", "{config: {model_type: vit}, freeze: lower}"),
        "bad.yaml:4: model.image.freeze: is 'lower'; input should be 'all'",
    ),
    "loss that nobody knows": (
        swap("lr: 5e-4", "lr: 5e-4\n  loss: siglip"),
        "bad.yaml:14: train.loss: is 'siglip'; input should be 'contrastive' or 'sigmoid'",
    ),
    "samples and epochs": (
        swap("samples: 1000", "samples: 1000\n  epochs: 2"),
        "bad.yaml:10: train.samples: give either 'samples' or 'epochs', not both",
    ),
    "neither samples nor epochs": (
        swap("  samples: 1000\n", ""),
        "bad.yaml:9: train.samples: give either 'samples' or 'epochs'",
    ),
    "tower and config": (
        swap("image: {", "image: {tower: a/b, "),
        "bad.yaml:4: model.image.tower: give either 'tower' (a hub id or a folder with weights) or 'config'",
    ),
    "neither tower nor config": (
        swap("{config: {model_type: vit}}", "{}"),
        "bad.yaml:4: model.image.tower: give either",
    ),
    "unknown model type": (
        swap("model_type: vit", "model_type: vitt"),
        "bad.yaml:4: model.image.config.model_type: is 'vitt'; known here: clip_vision_model, siglip_vision_model, vit",
    ),
    "config without tokenizer": (
        swap("    tokenizer: ./tok\n", ""),
        "bad.yaml:5: model.text.tokenizer: missing: a tower made from a config needs a tokenizer",
    ),
    "duplicate key": (
        swap("  lr: 5e-4", "  lr: 5e-4\n  lr: 3e-4"),
        "bad.yaml:14: train.lr: given twice; first on line 13",
    ),
    "DeepSpeed key that is ours": (
        swap("zero_stage: 2", "zero_stage: 2\n  deepspeed: {gradient_clipping: 5}"),
        "bad.yaml:16: engine.deepspeed.gradient_clipping: is decided by train.grad_clip",
    ),
    "ZeRO stage by the back door": (
        swap("zero_stage: 2", "zero_stage: 2\n  deepspeed: {zero_optimization: {stage: 3}}"),
        "bad.yaml:16: engine.deepspeed.zero_optimization.stage: is decided by engine.zero_stage",
    ),
    "compiled layers that ZeRO 3 cuts up": (
        swap("zero_stage: 2", "zero_stage: 3\n  compile: true"),
        "bad.yaml:16: engine.compile: not with zero_stage 3, which gathers weights within the layers; valid is false",
    ),
    "compiled layers that are checkpointed": (
        swap("zero_stage: 2", "activation_checkpointing: true\n  compile: true"),
        "bad.yaml:16: engine.compile: not with activation_checkpointing, "
        "inside which torch does not compile packed text; valid is false",
    ),
    "interval without unit": (
        add("evaluate: {every: '500'}\n"),
        "bad.yaml:18: evaluate.every: is '500'; valid is a number with one of epoch, samples, steps",
    ),
    "interval in minutes where samples are meant": (
        add("evaluate: {every: 5 min}\n"),
        "bad.yaml:18: evaluate.every: is '5 min'; valid is a number with one of epoch, samples, steps",
    ),
    "no such time": (add("  time: soon\n"), "bad.yaml:18: slurm.time: is 'soon'; valid is hours:minutes:seconds"),
    "no time at all": (add("  time: '00:00:00'\n"), "bad.yaml:18: slurm.time: is '00:00:00', which is no time at all"),
    "tasks that are not GPUs": (
        add("  gpus_per_node: 4\n"),
        "bad.yaml:17: slurm.tasks_per_node: is 2 with 4 GPUs; one task per GPU",
    ),
    "name that is no folder": (
        swap("name: good", "name: ../up"),
        "bad.yaml:1: name: is '../up'; string should match pattern",
    ),
    "missing base": (
        add("extends: _bas.yaml\n"),
        "bad.yaml:18: extends: no such file: _bas.yaml; did you mean _base.yaml?",
    ),
    "extends in a circle": (
        add("extends: _circle.yaml\n"),
        "_circle.yaml: extends: goes in a circle: bad.yaml -> _circle.yaml -> bad.yaml",
    ),
    "unset environment variable": (
        swap("./train", "'${env:NO_SUCH_VARIABLE}'"),
        "bad.yaml:8: data.train: the environment variable NO_SUCH_VARIABLE is not set",
    ),
    "secret in an experiment": (
        swap("./train", "'${env:MLFLOW_TRACKING_TOKEN}'"),
        "bad.yaml:8: data.train: ${env:MLFLOW_TRACKING_TOKEN} looks like a secret",
    ),
    "unknown substitution": (
        swap("./train", "'${HOME}/train'"),
        "bad.yaml:8: data.train: '${HOME}/train': the only substitution is ${env:NAME}",
    ),
    "broken YAML": (swap("data: {train: ./train", "data: {train: [./train"), "bad.yaml:8: not valid YAML: "),
    "an impossible date": (swap("./train", "2024-13-45"), "bad.yaml: not valid YAML: month must be in 1..12"),
    "an alias of itself": (swap("data: {", "data: &d {test: *d, "), "bad.yaml: not valid YAML: "),
    "autocast by the back door": (
        swap("zero_stage: 2", "zero_stage: 2\n  deepspeed: {torch_autocast: {enabled: true}}"),
        "bad.yaml:16: engine.deepspeed.torch_autocast: is decided by train.precision",
    ),
    "a list": (lambda _: "- a\n- b\n", "bad.yaml:1: valid is a mapping of keys to values"),
    "grid of nothing": (
        add("sweep: {grid: {train.lr: []}}\n"),
        "bad.yaml:18: sweep.grid.train.lr: is a list of at least",
    ),
    "unknown kind of sweep": (add("sweep: {random: 3}\n"), "bad.yaml:18: sweep: valid is 'grid: {dotted.key: [value"),
    "sweep over an unknown key": (
        add("sweep: {grid: {train.lrr: [1e-3]}}\n"),
        "bad.yaml:18: train.lrr: unknown key; did you mean lr?",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_message(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit, expected = BROKEN[kind]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "s3cret")
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    (tmp_path / "_base.yaml").write_text("train: {seed: 1}\n")
    (tmp_path / "_circle.yaml").write_text("extends: bad.yaml\n")
    (tmp_path / "bad.yaml").write_text(edit(GOOD))
    with pytest.raises(ExperimentError) as caught:
        load([Path("bad.yaml")])
    assert expected in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_the_unbroken_file_loads(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    assert load([tmp_path / "good.yaml"])[0].experiment.name == "good"


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD.replace("  lr:", "  lrr:").replace("zero_stage: 2", "zero_stage: 9"))
    (tmp_path / "b.yaml").write_text(GOOD.replace("samples: 1000", "samples: none"))
    with pytest.raises(ExperimentError) as caught:
        load([tmp_path])
    assert len(caught.value.mistakes) == 4  # lrr unknown, lr missing, stage 9; samples


def test_mistake_in_a_base_names_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "_base.yaml").write_text(GOOD.replace("zero_stage: 2", "zero_stage: 7"))
    (tmp_path / "arm.yaml").write_text("extends: _base.yaml\nname: arm\n")
    with pytest.raises(ExperimentError, match=r"_base.yaml:15: engine.zero_stage"):
        load([Path("arm.yaml")])


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.lr", "--set: train.lr: is not of the form key.path=value"),
        ("train.lrr=1", "--set: train.lrr: unknown key; did you mean lr?"),
        ("train.lr=fast", "--set: train.lr: is 'fast'; input should be a valid number"),
        ("train.lr=[1", "--set: train.lr: '[1' is not valid YAML"),
        ("nowhere.x=1", "--set: nowhere: unknown key"),
    ],
)
def test_override(setting: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    with pytest.raises(ExperimentError) as caught:
        load([tmp_path / "good.yaml"], [setting])
    assert expected in str(caught.value)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        load([tmp_path / "absent.yaml"])
    with pytest.raises(UserError, match="no experiment in this folder"):
        load([tmp_path])
    (tmp_path / "_base.yaml").write_text(GOOD)
    with pytest.raises(UserError, match="start with _ are bases"):
        load([tmp_path / "_base.yaml"])


def test_two_files_of_one_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(GOOD)
    with pytest.raises(ExperimentError, match="name: 'good' is also the name in"):
        load([tmp_path])
