r"""Training steps against open_clip 3.3.0: same towers, shards, batches, text and optimizer, the whole program each.

    pip install --no-deps --target open_clip open_clip_torch==3.3.0 \
        webdataset==0.2.86 braceexpand ftfy regex wcwidth
    python tools/bench/openclip.py open_clip

Ours is ``longclip train`` in one process: DeepSpeed, its loader, its packed text. Theirs is open_clip_train.main: its
WebDataset pipeline, its CLIP and ClipLoss, its loop. Both read the same shards with one loader worker, take captions of
the published lengths through the same tokenizer, and step torch's AdamW in fp32 on one thread; the towers are OpenAI's
CLIP in small, of the same shapes. A step is timed from one return of AdamW.step to the next, so it holds everything:
waiting for data, both passes, the loss, clipping, the optimizer. Each configuration is a process of its own, the
programs take turns, and medians over the rounds are compared. Memory is the growth of the process's peak over what it
held once everything was imported; loader workers are not in it, on either side.

open_clip imports torchvision, which the CPU build of torch lacks. A stand-in satisfies the imports; of it only the
random crop, ToTensor and Normalize do anything, in Pillow and torch. Model, loss, loop and loader are open_clip's own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader import photograph
from PIL import Image
from text_tower import processor

SIZE, PATCH, WIDTH, LAYERS, HEADS, JOINT = 224, 32, 256, 4, 4, 256
WORDS = 1000
LR, BETAS, EPS, DECAY, CLIP, WARMUP = 1e-4, (0.9, 0.98), 1e-6, 0.2, 1.0, 10
WARM = 2
"""steps that are not counted: buffers are made, and the loader's first batches are waited for"""


# ---- what both read ----------------------------------------------------------------------------------------------


def draw(folder: Path, samples: int) -> None:
    """``train`` and ``val`` shards, and a tokenizer of one token a word, its end of text the highest id as CLIP's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from longclip.data.index import index_folder
    from longclip.data.shards import Sample, write_shard
    from longclip.train.estimate import published

    ends = ["<end>", "<start>"]
    names = ["[PAD]", *(f"w{i}" for i in range(WORDS - 3)), *reversed(ends)]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(name, names.index(name)) for name in ends]
    )
    (folder / "tok").mkdir(parents=True)
    tokenizer.save(str(folder / "tok" / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "eos_token": "<end>"}
    (folder / "tok" / "tokenizer_config.json").write_text(json.dumps(said))

    rng = np.random.default_rng(0)
    pictures = [photograph(rng, 320, 240) for _ in range(32)]
    for part, count in (("train", samples), ("val", 16)):
        (folder / part).mkdir()
        lengths = rng.choice(published().lengths, count)
        texts = [" ".join(f"w{w}" for w in rng.integers(0, WORDS - 3, n - 2)) for n in lengths]
        write_shard(
            folder / part / "s-0000.tar",
            (Sample(f"{i:08}", pictures[i % len(pictures)], text, {}) for i, text in enumerate(texts)),
        )
        index_folder(folder / part)


# ---- the two programs, each in a process of its own ----------------------------------------------------------------


def timed() -> list[float]:
    """A list that will hold the time at which each step of AdamW returned."""
    times: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: Any, *args: Any, **more: Any) -> Any:
        result = step(self, *args, **more)
        times.append(time.perf_counter())
        return result

    torch.optim.AdamW.step = noted  # type: ignore[method-assign]
    return times


def ours(folder: Path, window: int, batch: int, steps: int) -> None:
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    import longclip.train.loop  # noqa: F401
    from longclip.cli import main

    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_act": "gelu",
    }
    image = {**shape, "model_type": "clip_vision_model", "image_size": SIZE, "patch_size": PATCH}
    text = {**shape, "model_type": "clip_text_model", "vocab_size": WORDS, "max_position_embeddings": window}
    ids = {"pad_token_id": 0, "bos_token_id": WORDS - 2, "eos_token_id": WORDS - 1}
    experiment = {
        "name": "ours",
        "model": {
            "context_length": window,
            "embed_dim": JOINT,
            "image": {"config": image, "pool": "cls", "head": "linear"},
            "text": {
                "config": {**text, **ids},
                "tokenizer": str(folder / "tok"),
                "pool": "last",
                "head": "linear",
            },
        },
        "data": {"train": str(folder / "train"), "val": str(folder / "val"), "text": "txt"},
        "train": {
            "samples": batch * steps,
            "global_batch": batch,
            "precision": "fp32",
            "lr": LR,
            "warmup_steps": WARMUP,
            "betas": list(BETAS),
            "eps": EPS,
            "weight_decay": DECAY,
            "grad_clip": CLIP,
            "crop_scale": [0.9, 1.0],
        },
        "engine": {"zero_stage": 0, "loader_workers": 1},
        "evaluate": {"every": "1000000 samples", "batch": 16},
        "checkpoint": {"every": "1000000 samples"},
    }
    file = folder / "ours.yaml"
    file.write_text(json.dumps(experiment))  # JSON is YAML
    sys.argv = ["longclip", "train", str(file), "--runs", tempfile.mkdtemp(dir=folder)]
    report(main)


def theirs(folder: Path, window: int, batch: int, steps: int) -> None:
    stand_in()
    import open_clip
    from open_clip_train import main as program

    config = {
        "embed_dim": JOINT,
        "vision_cfg": {
            "image_size": SIZE,
            "layers": LAYERS,
            "width": WIDTH,
            "patch_size": PATCH,
            "head_width": WIDTH // HEADS,
        },
        "text_cfg": {
            "context_length": window,
            "vocab_size": WORDS,
            "width": WIDTH,
            "heads": HEADS,
            "layers": LAYERS,
            "hf_tokenizer_name": str(folder / "tok"),
        },
    }
    (folder / "small.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "small.json")
    words = {
        "model": "small",
        "train-data": folder / "train" / "s-0000.tar",
        "train-num-samples": batch * steps,
        "dataset-type": "webdataset",
        "batch-size": batch,
        "workers": 1,
        "epochs": 1,
        "precision": "fp32",
        "device": "cpu",
        "lr": LR,
        "beta1": BETAS[0],
        "beta2": BETAS[1],
        "eps": EPS,
        "wd": DECAY,
        "warmup": WARMUP,
        "grad-clip-norm": CLIP,
        "logs": tempfile.mkdtemp(dir=folder),
        "zeroshot-frequency": 0,
        "save-frequency": 0,
    }
    arguments = [str(word) for key, value in words.items() for word in (f"--{key}", value)]
    report(lambda: program.main(arguments))


def stand_in() -> None:
    """What open_clip imports of torchvision, and no more than it uses."""

    class Compose:
        def __init__(self, transforms: list[Any]) -> None:
            self.transforms = transforms

        def __call__(self, image: Any) -> Any:
            for each in self.transforms:
                image = each(image)
            return image

    class RandomResizedCrop:
        def __init__(self, size: Any, scale: tuple[float, float], interpolation: Any) -> None:
            self.size, self.scale = size if isinstance(size, int) else size[0], scale

        def __call__(self, image: Image.Image) -> Image.Image:
            width, height = image.size
            for _ in range(10):
                area = width * height * random.uniform(*self.scale)
                ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
                w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
                if w <= width and h <= height:
                    break
            else:
                w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
            x, y = random.randint(0, width - w), random.randint(0, height - h)
            return image.crop((x, y, x + w, y + h)).resize((self.size, self.size), Image.Resampling.BICUBIC)

    class ToTensor:
        pass  # open_clip's own derives from it, and calls this:

    def to_tensor(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)

    class Normalize:
        def __init__(self, mean: Any, std: Any) -> None:
            self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))

        def __call__(self, image: torch.Tensor) -> torch.Tensor:
            return image.sub(self.mean).div_(self.std)

    class Unused:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

    class FrozenBatchNorm2d(torch.nn.Module):
        pass

    def module(name: str, **attributes: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        vars(made).update(attributes)
        sys.modules[name] = made
        return made

    functional = module("torchvision.transforms.functional", to_tensor=to_tensor)
    transforms = module(
        "torchvision.transforms",
        functional=functional,
        InterpolationMode=types.SimpleNamespace(BICUBIC="bicubic", BILINEAR="bilinear"),
        **dict.fromkeys(("Resize", "CenterCrop", "ColorJitter", "Grayscale"), Unused),
        **{each.__name__: each for each in (Compose, RandomResizedCrop, ToTensor, Normalize)},
    )
    misc = module("torchvision.ops.misc", FrozenBatchNorm2d=FrozenBatchNorm2d)
    ops = module("torchvision.ops", misc=misc)
    module("torchvision", transforms=transforms, ops=ops, datasets=module("torchvision.datasets"))


def report(program: Any) -> None:
    """Runs it; the last line says the seconds of each step and by how much the peak of memory grew, in bytes."""
    torch.set_num_threads(1)
    times = timed()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    try:
        program()
    except SystemExit as end:
        if end.code:
            raise
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps({"seconds": np.diff(times)[WARM - 1 :].tolist(), "grown": grown}))


# ---- the comparison ------------------------------------------------------------------------------------------------


def measure(side: str, folder: Path, open_clip: Path, window: int, batch: int, steps: int) -> tuple[float, float]:
    """Median seconds of a step, and MiB by which the peak of memory grew."""
    # The folder holds the older webdataset that open_clip asks for: it is only theirs to see.
    path = [str(Path(__file__).parents[2]), *([str(open_clip)] if side == "theirs" else [])]
    words = {"side": side, "folder": folder, "windows": window, "batch": batch, "steps": steps}
    done = subprocess.run(
        [sys.executable, __file__, str(open_clip), *(str(w) for k, v in words.items() for w in (f"--{k}", v))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{side} at {window} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    return statistics.median(said["seconds"]), said["grown"] / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("open_clip", type=Path, help="the folder that open_clip was installed into")
    parser.add_argument("--windows", type=int, nargs="+", default=[77, 154, 256, 512])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=7, help=f"of each process, the first {WARM} not counted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        {"ours": ours, "theirs": theirs}[asked.side](asked.folder, asked.windows[0], asked.batch, asked.steps)
        return

    print(f"machine: {processor()}, {os.cpu_count()} cores; torch {torch.__version__}, one thread, one loader worker")
    print(
        f"both towers {WIDTH} wide, {LAYERS} layers; images {SIZE} px in patches of {PATCH}; batch {asked.batch}; "
        f"{asked.steps - WARM} steps a process, median of {asked.rounds} processes; torchvision is a stand-in"
    )
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        draw(folder, asked.batch * asked.steps)
        for _ in range(asked.rounds):
            for window in asked.windows:
                for side in ("ours", "theirs"):
                    one = measure(side, folder, asked.open_clip, window, asked.batch, asked.steps)
                    found.setdefault((window, side), []).append(one)
    print(f"{'':7}{'samples/s':^27}{'growth of peak memory, MiB':^30}")
    print(f"{'window':7}{'ours':>8}{'open_clip':>11}{'ratio':>8}{'ours':>13}{'open_clip':>11}{'ratio':>8}")
    for window in asked.windows:
        (mine, my_memory), (other, memory) = (
            tuple(statistics.median(each) for each in zip(*found[window, side], strict=True))
            for side in ("ours", "theirs")
        )
        print(
            f"{window:<7}{asked.batch / mine:8.1f}{asked.batch / other:11.1f}{other / mine:8.2f}"
            f"{my_memory:13.0f}{memory:11.0f}{my_memory / memory:8.2f}",
            flush=True,
        )
    print("asked: at least 0.95 at 77, at least 2 at 512; memory ratio below 1 at every window")


if __name__ == "__main__":
    main()
