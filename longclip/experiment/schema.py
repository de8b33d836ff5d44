"""What an experiment file may say: a frozen schema in two halves.

``model``, ``data`` and ``train`` decide the weights; they are the experiment's identity (see ``identity.py``).
``engine``, ``evaluate``, ``checkpoint``, ``slurm`` and ``track`` decide how, where and how often; they may be
changed while a run is under way, and the run continues.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from longclip.experiment import kinds
from longclip.experiment.durations import parse_interval, parse_time
from longclip.experiment.section import Section, bad
from longclip.experiment.template import template

IDENTITY = ("model", "data", "train")
"""Sections that decide the weights."""

DEEPSPEED_OURS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "engine.micro_batch",
    "gradient_accumulation_steps": "engine.micro_batch (it keeps all negatives; accumulation would not)",
    "managed_gradient_accumulation": "engine.micro_batch",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "train.lr, train.betas, train.eps, train.weight_decay",
    "scheduler": "train.schedule, train.warmup_steps",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision, in which gradients are accumulated too",
    "activation_checkpointing": "engine.activation_checkpointing",
    "compile": "engine.compile",
}
"""Keys of a DeepSpeed configuration that experiment fields already decide."""


Pair = Annotated[tuple[float, float], Field(strict=False)]
Frozen = Literal["all"] | Annotated[int, Field(ge=1)] | None
"""What of a tower keeps its initial weights: all of it (its head is trained), or its embeddings and lowest N layers"""


class ImageTower(Section):
    """Image side: ``tower`` (a hub id or a folder with weights) or ``config`` (drawn weights)."""

    tower: str | None = None
    config: dict[str, Any] | None = None
    pool: Literal["cls", "mean", "map"] = "cls"
    """``map`` is SigLIP's own: attention of one learned query over the patches"""
    head: Literal["linear", "mlp2"] = "linear"
    freeze: Frozen = None

    @model_validator(mode="after")
    def _source(self) -> ImageTower:
        _one_source(self.tower, self.config, kinds.IMAGE)
        if self.config is not None and (why := kinds.image_pool(self.config["model_type"], self.pool)):
            raise bad("pool", why)
        _layers(self.freeze, self.config)
        return self


class TextTower(Section):
    """Text side; ``tokenizer`` is a hub id or a folder, by default the tower's own."""

    tower: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    pool: Literal["cls", "mean", "last"] = "mean"
    """``last`` is CLIP's: the end-of-text token, with which its tokenizer ends every caption"""
    head: Literal["linear", "mlp2"] = "mlp2"
    positions: Literal["stretch", "interpolate"] | None = None
    """how a tower that ends before the window is extended to it; one that reaches it stays as it is"""
    keep: Annotated[int, Field(ge=0)] = kinds.KEEP
    """positions that ``stretch`` leaves as they are"""
    freeze: Frozen = None

    @model_validator(mode="after")
    def _source(self) -> TextTower:
        _one_source(self.tower, self.config, tuple(kinds.TEXT))
        if self.keep != kinds.KEEP and self.positions != "stretch":
            raise bad("keep", "is of no effect without 'positions: stretch'")
        if self.config is not None and (why := kinds.text_pool(self.config["model_type"], self.pool)):
            raise bad("pool", why)
        _layers(self.freeze, self.config)
        if self.tokenizer is None and self.tower is None:
            raise bad("tokenizer", "missing: a tower made from a config needs a tokenizer (a folder or a hub id)")
        return self


def _one_source(tower: str | None, config: dict[str, Any] | None, types: tuple[str, ...]) -> None:
    if (tower is None) == (config is None):
        raise bad(
            "tower",
            "give either 'tower' (a hub id or a folder with weights) or 'config' (a transformers configuration, "
            "weights are drawn)" + ("" if tower is None else "; both are set, and 'config: null' unsets one"),
        )
    if config is not None and config.get("model_type") not in types:
        raise bad("config.model_type", f"is {config.get('model_type')!r}; known here: {', '.join(types)}")


class Init(Section):
    """Weights to begin with, of a model with the same towers; positions are extended as ``model.text.positions`` says.

    ``from`` is ``run:NAME`` (as the run ended) or ``run:NAME@best`` (as its validation chose), a hub id, or a path:
    a run's folder, or one with ``weights.safetensors`` as a checkpoint has it.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    source: Annotated[str, Field(alias="from", min_length=1)]


def _layers(freeze: int | str | None, config: dict[str, Any] | None) -> None:
    """Towers from weights are asked when they are loaded (model/freeze.py)."""
    layers = (config or {}).get("num_hidden_layers")
    if isinstance(freeze, int) and isinstance(layers, int) and freeze > layers:
        raise bad("freeze", f"is {freeze}, but the tower has {layers} layers; at most {layers}, or all")


class Model(Section):
    """Two towers and one joint space. ``context_length`` is where the text is cut, special tokens included."""

    context_length: Annotated[int, Field(ge=4)]
    image: ImageTower
    text: TextTower
    embed_dim: Annotated[int, Field(ge=1)] = 512
    init: Init | None = None
    """by default the towers' own weights, and all else drawn"""

    @model_validator(mode="after")
    def _positions(self) -> Model:
        text = self.text
        if text.config is None:
            return self
        if why := kinds.too_short(text.config, self.context_length, text.positions, text.keep):
            raise bad("context_length", why)
        return self


LEAST_SHARE = 1e-4
"""of the pairs that a source may be given; the schedule of sources counts in steps of this (data/order.py)"""
MOST_SOURCES = 16
"""a process keeps a few dozen shards open for each, of some thousand files that the system lets it open"""


class Source(Section):
    """One of several training datasets. Of the pairs seen it gives ``weight`` over the sum of the weights."""

    name: str
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class Mix(Section):
    """Two texts for an image: ``long`` with probability ``p_long``, else ``short``, drawn for each sample and epoch.

    Validation and test see ``long``.
    """

    short: str
    long: str
    p_long: Annotated[float, Field(ge=0, le=1)] = 0.5

    @model_validator(mode="after")
    def _templates(self) -> Mix:
        for key in ("short", "long"):
            _check_template(key, getattr(self, key))
        return self


def _plain(value: Any) -> str:
    return "plain" if isinstance(value, str) else "made up"


class Data(Section):
    """Datasets: a name that the site profile knows, or a path (``./``, ``../``, ``/``) to indexed shards."""

    train: Annotated[
        Annotated[str, Tag("plain")] | Annotated[tuple[Source, ...], Field(strict=False), Tag("made up")],
        Discriminator(_plain),
    ]
    """one dataset, or a list of several with weights"""
    val: str
    test: str | None = None
    text: Annotated[Annotated[str, Tag("plain")] | Annotated[Mix, Tag("made up")], Discriminator(_plain)] = "txt"
    """``txt`` for the sample's text member, or the name of a field of its JSON member; or a template over such names,
    ``"{txt} {image_context}"``; or a mix of two of these"""
    shuffle_sentences: bool = False
    """a text's sentences in an order drawn for each sample and epoch; not in validation and test"""

    @property
    def sources(self) -> tuple[Source, ...]:
        return (Source(name=self.train),) if isinstance(self.train, str) else self.train

    @model_validator(mode="after")
    def _check(self) -> Data:
        if not 1 <= len(self.sources) <= MOST_SOURCES:
            raise bad("train", f"names {len(self.sources)} datasets; valid are 1 to {MOST_SOURCES}")
        names = [source.name for source in self.sources]
        whole = sum(source.weight for source in self.sources)
        for i, source in enumerate(self.sources):
            if source.name in names[:i]:
                raise bad(
                    f"train.{i}.name", f"{source.name!r} is given twice; give it once, with the sum of the weights"
                )
            if source.weight / whole < LEAST_SHARE:
                raise bad(
                    f"train.{i}.weight",
                    f"is {source.weight:g} of {whole:g}; below {LEAST_SHARE:g} of the sum is too little",
                )
        if isinstance(self.text, str):
            _check_template("text", self.text)
        return self


def _check_template(key: str, text: str) -> None:
    try:
        template(text)
    except ValueError as error:
        raise bad(
            key, f"is {text!r}: {error}; valid is a field's name, or a template such as '{{txt}} {{title}}'"
        ) from None


class Train(Section):
    """The recipe. Length is ``samples`` or ``epochs``; a step always sees ``global_batch`` pairs at once."""

    samples: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    global_batch: Annotated[int, Field(ge=2)]
    loss: Literal["contrastive", "sigmoid"] = "contrastive"
    precision: Literal["fp32", "bf16"] = "bf16"
    lr: Annotated[float, Field(gt=0, le=10)]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    betas: Pair = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.2
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    crop_scale: Pair = (0.9, 1.0)
    """area of the random crop, as a share of the image; [1, 1] crops nothing"""
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _length(self) -> Train:
        if (self.samples is None) == (self.epochs is None):
            raise bad("samples", "give either 'samples' or 'epochs'" + ("" if self.samples is None else ", not both"))
        if not all(0 <= b < 1 for b in self.betas):
            raise bad("betas", f"are {list(self.betas)}; each must be at least 0 and below 1")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise bad("crop_scale", f"is {list(self.crop_scale)}; valid is [low, high] with 0 < low <= high <= 1")
        return self


class Engine(Section):
    """How the step is computed. None of it changes the result beyond rounding."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """pairs that a rank runs at once: all that it holds, or fewer, with gradients cached between two passes"""
    activation_checkpointing: bool = False
    compile: bool = False
    """the towers' layers, by torch: minutes before the first step, and a C++ compiler on the nodes; dropout draws
    other numbers"""
    text: Literal["packed", "padded"] = "packed"
    """``padded``: every caption padded to the window, as others do; the same result, for comparison"""
    loader_workers: Annotated[int, Field(ge=0)] = 2
    """processes that decode images, per rank"""
    hang_minutes: Annotated[float, Field(gt=0)] = 10
    """silence of all ranks after which the run counts as hung; longer where its own steps or saves take longer"""
    bad_limit: Annotated[float, Field(ge=0, le=1)] = 0.01
    """share of an attempt's samples that may be unusable; above it the run stops"""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """passed to DeepSpeed as it is; keys that this file decides elsewhere are refused"""

    @model_validator(mode="after")
    def _deepspeed(self) -> Engine:
        for key, ours in DEEPSPEED_OURS.items():
            if key in self.deepspeed:
                raise bad(f"deepspeed.{key}", f"is decided by {ours}; set that instead")
        if "stage" in (self.deepspeed.get("zero_optimization") or {}):
            raise bad("deepspeed.zero_optimization.stage", "is decided by engine.zero_stage; set that instead")
        if self.compile and self.zero_stage == 3:
            raise bad("compile", "not with zero_stage 3, which gathers weights within the layers; valid is false")
        if self.compile and self.activation_checkpointing:
            why = "inside which torch does not compile packed text"
            raise bad("compile", f"not with activation_checkpointing, {why}; valid is false")
        return self


class Evaluate(Section):
    """Retrieval on the validation set while training; the best checkpoint is chosen by it, and scored at the end."""

    every: str = "1 epoch"
    batch: Annotated[int, Field(ge=1)] = 256
    suites: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """files of further tasks (evaluate/suite.py) for the chosen checkpoint, besides the test set"""

    @model_validator(mode="after")
    def _every(self) -> Evaluate:
        parse_interval(self.every, "every", ("epoch", "samples", "steps"))
        return self


class Keep(Section):
    """How many checkpoints stay on disk."""

    last: Annotated[int, Field(ge=1)] = 2
    best: Annotated[int, Field(ge=1, le=1)] = 1


class Checkpoint(Section):
    """When the state is saved: every so many minutes, samples, steps or epochs, and always at the end."""

    every: str = "15min"
    keep: Keep = Field(default_factory=Keep)

    @model_validator(mode="after")
    def _every(self) -> Checkpoint:
        parse_interval(self.every, "every", ("min", "samples", "steps", "epoch"))
        return self


class Slurm(Section):
    """What one job asks for; what is left out comes from the site profile."""

    nodes: Annotated[int, Field(ge=1)] = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    tasks_per_node: Annotated[int, Field(ge=1)] | None = None
    """one task per GPU unless said otherwise; on machines without GPUs, the CPU ranks of a node"""
    cpus_per_task: Annotated[int, Field(ge=1)] | None = None
    mem_gb: Annotated[float, Field(gt=0)] | None = None
    time: str = "04:00:00"
    partition: str | None = None

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @model_validator(mode="after")
    def _check(self) -> Slurm:
        parse_time(self.time)
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise bad("tasks_per_node", f"is {self.tasks_per_node} with {self.gpus_per_node} GPUs; one task per GPU")
        return self


class Track(Section):
    """MLflow. ``experiment`` is the name shown there, by default the sweep's."""

    experiment: str | None = None


class Experiment(Section):
    """One run to be: everything that a file (with its bases, its sweep and ``--set``) says."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    model: Model
    data: Data
    train: Train
    engine: Engine = Field(default_factory=Engine)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    slurm: Slurm = Field(default_factory=Slurm)
    track: Track = Field(default_factory=Track)

    @model_validator(mode="after")
    def _arithmetic(self) -> Experiment:
        if self.train.precision == "bf16" and self.engine.zero_stage == 0:
            raise bad(
                "engine.zero_stage",
                "is 0 with train.precision bf16, which DeepSpeed gets wrong (a phantom first Adam step); "
                "use stage 1, 2 or 3, or precision fp32",
            )
        check_batch(self, self.slurm.ranks)
        return self


def check_batch(experiment: Experiment, ranks: int) -> int:
    """Pairs of the global batch that each of ``ranks`` processes holds.

    Raises a pydantic error where the batch does not divide among them, or a rank's share not into micro-batches.
    """
    batch = experiment.train.global_batch
    if batch % ranks:
        below, above = batch - batch % ranks, batch + ranks - batch % ranks
        raise bad(
            "train.global_batch",
            f"is {batch}, which does not divide among {ranks} ranks; nearest that do: {below}, {above}",
        )
    micro = experiment.engine.micro_batch
    share = batch // ranks
    if micro != "auto" and share % micro:
        below = max(n for n in range(1, min(micro, share) + 1) if share % n == 0)
        above = min(n for n in range(min(micro, share), share + 1) if share % n == 0)
        raise bad(
            "engine.micro_batch",
            f"is {micro}, which does not divide the {share} pairs that each of {ranks} ranks holds; "
            f"nearest that do: {', '.join(str(n) for n in sorted({below, above}))}; or auto, all {share} at once",
        )
    return share
