"""A trained model as folders that others load without this package.

``transformers``: CLIP's towers, pooled and projected as CLIP does it, are a ``CLIPModel``. No class of transformers
holds any other pair: ``VisionTextDualEncoderModel`` projects its towers' ``pooler_output``, which passes a tanh for
BERT and ViT and is not there for ModernBERT, so neither mean pooling nor the plain first token fits it. There each
tower is saved as transformers does it, with its tokenizer or image processor, and the heads beside them:

    image/             config.json model.safetensors preprocessor_config.json
    text/              config.json model.safetensors, the tokenizer
    heads.safetensors  image.*, text.*, log_scale; in its metadata how the towers are pooled
    README.md          the model card, with the lines that put them together (recipe.py)

``open_clip``: its layout for a local folder or the hub; see ``to_openclip.py``.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from longclip.errors import UserError
from longclip.experiment import kinds
from longclip.experiment.schema import Model
from longclip.model import recipe
from longclip.model.clip import DualEncoder
from longclip.model.to_openclip import config_of, weights_of
from longclip.model.towers import Pixels, pixels_of


def write_transformers(folder: Path, model: DualEncoder, spec: Model, tokenizer: str) -> str:
    """Writes all but the card; ``spec`` has folders of this machine. Returns the lines of Python that use it."""
    words = _tokenizer(spec, tokenizer)
    if kinds.TEXT[model.text.trunk.config.model_type].padding_first:
        _check_padding(model, words)
    processor = _processor(pixels_of(spec.image))
    if (whole := _clip(model, spec, words.eos_token_id)) is not None:
        _quietly(whole.save_pretrained, folder)
        words.save_pretrained(folder)
        _write(folder / "preprocessor_config.json", processor)
        return recipe.of_clip(spec)
    for side in ("image", "text"):
        _quietly(getattr(model, side).trunk.save_pretrained, folder / side)
    words.save_pretrained(folder / "text")
    _write(folder / "image" / "preprocessor_config.json", processor)
    heads: dict[str, Tensor] = {
        f"{side}.{name}": tensor
        for side in ("image", "text")
        for name, tensor in getattr(model, side).head.state_dict().items()
    }
    alone = {name: p.detach() for name, p in model.named_parameters() if "." not in name}  # temperature, bias
    # What neither configuration nor shapes tell; launch/models.py reads it.
    pools = {"image_pool": spec.image.pool, "text_pool": spec.text.pool}
    save_file({**heads, **alone}, folder / "heads.safetensors", {"format": "pt", **pools})
    return recipe.of_towers(model, spec)


def _clip(model: DualEncoder, spec: Model, eos: int | None) -> CLIPModel | None:
    """The model as transformers' ``CLIPModel``, if it is one.

    That one pools its text at the first end-of-text token, which here is the last token of a caption: the same where
    the tokenizer has such a token (id 2 means something else to transformers, for old checkpoints).
    """
    image, text = model.image.trunk, model.text.trunk
    made = image.config.model_type, text.config.model_type, spec.image.pool, spec.text.pool
    heads = {spec.image.head, spec.text.head}
    if made != ("clip_vision_model", "clip_text_model", "cls", "last") or heads != {"linear"} or eos in (None, 2):
        return None
    if model.bias is not None:
        return None
    config = CLIPConfig(
        vision_config=image.config.to_dict(),
        text_config={**text.config.to_dict(), "eos_token_id": eos},
        projection_dim=spec.embed_dim,
    )
    whole = CLIPModel(config)
    whole.vision_model.load_state_dict(image.state_dict())
    whole.text_model.load_state_dict(text.state_dict())
    whole.visual_projection.load_state_dict(model.image.head.state_dict())
    whole.text_projection.load_state_dict(model.text.head.state_dict())
    whole.logit_scale.data = model.log_scale.detach().reshape(())
    return whole


def write_openclip(folder: Path, model: DualEncoder, spec: Model, tokenizer: str, name: str) -> str:
    """Writes open_clip's two files, and the text tower's config and tokenizer.

    ``name`` is the path that ``folder/text`` will have. Returns the lines of Python that
    use them. Raises UserError where open_clip has no such towers.
    """
    words = _tokenizer(spec, tokenizer)
    config = config_of(model, spec, pixels_of(spec.image), name, words.eos_token_id)
    if not kinds.TEXT[model.text.trunk.config.model_type].causal:  # which never sees what comes behind
        _check_padding(model, words)
    _quietly(model.text.trunk.config.save_pretrained, folder / "text")
    words.save_pretrained(folder / "text")
    _write(folder / "open_clip_config.json", config)
    save_file(weights_of(model, spec), folder / "open_clip_model.safetensors")
    return recipe.OPEN_CLIP


def _tokenizer(spec: Model, source: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    tokenizer.model_max_length = spec.context_length
    return tokenizer


def _check_padding(model: DualEncoder, tokenizer: Any) -> None:
    """Others tell padding, and RoBERTa its positions, by the tower's id of it; here a caption's length says it."""
    theirs, ours = model.text.trunk.config.pad_token_id, tokenizer.pad_token_id
    if theirs != ours:
        raise UserError(
            f"the tokenizer pads with {ours}, the text tower takes {theirs} for padding: others would err",
            "a tower and a tokenizer that belong together",
        )


def _processor(pixels: Pixels) -> dict[str, Any]:
    """Evaluation's preprocessing in the words of transformers: the whole image, or its middle square; normalised."""
    square = {"height": pixels.size, "width": pixels.size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if pixels.whole else {"shortest_edge": pixels.size},
        "resample": {"bilinear": 2, "bicubic": 3}[pixels.resample],
        "do_center_crop": not pixels.whole,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _quietly(save: Any, folder: Path) -> None:
    """transformers draws a progress bar even for one small file."""
    with contextlib.redirect_stderr(io.StringIO()):
        save(folder)
