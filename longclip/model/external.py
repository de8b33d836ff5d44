"""Models of other forms as a :class:`DualEncoder`: the reverse of ``export.py``."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPModel
from transformers.utils import logging

from longclip.errors import UserError
from longclip.experiment.schema import Model
from longclip.model.clip import DualEncoder


def load(folder: Path, form: str, spec: Model, loss: str) -> DualEncoder:
    """The model in a folder, in fp32; ``form``, ``spec`` and ``loss`` as launch/models.py tells them.

    Raises UserError where the weights are not of that shape.
    """
    logging.disable_progress_bar()  # of loading, which takes seconds
    try:
        if form == "clip":
            return _clip(folder, spec)
        model = DualEncoder(spec, loss=loss)
        heads = load_file(folder / "heads.safetensors")
        own = {n: p for n, p in model.state_dict().items() if ".head." in f".{n}" or "." not in n}
        named = {n.replace(".head.", "."): n for n in own}
        model.load_state_dict({**model.state_dict(), **{named[n]: t for n, t in heads.items()}})
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{folder}: its weights are not those of its configuration: {error}") from None
    return model


@torch.no_grad()
def _clip(folder: Path, spec: Model) -> DualEncoder:
    whole = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    model = DualEncoder(spec, weights=False)
    model.image.trunk.load_state_dict(whole.vision_model.state_dict())
    model.text.trunk.load_state_dict(whole.text_model.state_dict())
    model.image.head.load_state_dict(whole.visual_projection.state_dict())
    model.text.head.load_state_dict(whole.text_projection.state_dict())
    model.log_scale.copy_(whole.logit_scale.reshape(1))
    return model
