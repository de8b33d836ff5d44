"""From the bytes of an image to the square of pixels that a tower sees.

Evaluation decodes exactly. Training, whose crops are drawn anyway, has large JPEGs decoded at 1/2, 1/4 or 1/8 of their
size (libjpeg does so inside its inverse DCT), as long as the crop still has at least the pixels that are asked for.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch.nn.functional import interpolate

from longclip.data.shards import IMAGE_FORMATS, MAX_PIXELS
from longclip.model.towers import Pixels

WHOLE = 2**16
"""pixels (width x height) up to which an image is never decoded at reduced size: there is no time to be won"""


def square(data: bytes, form: Pixels, crop: tuple[float, ...] | None) -> NDArray[np.uint8]:
    """A decoded RGB image in the ``form`` that the tower wants, not yet normalised: [size, size, 3].

    Without ``crop`` the middle square, as CLIP's evaluation, or the whole image, as ``form`` says; else a
    random-resized crop, ``(scale_low, scale_high, *4 uniforms)``: area drawn from the scale, aspect from 3/4 to 4/3 (as
    torchvision's RandomResizedCrop), clipped to the image.

    Raises:
        ValueError: the bytes are not an image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as opened:
            whole = opened.size
            if whole[0] * whole[1] > MAX_PIXELS:
                raise ValueError(f"more than {MAX_PIXELS // 10**6} MPixel")
            if opened.mode[0] in "IF":  # Pillow would clip to 0..255: a radiograph of 12 bits turns white
                raise ValueError(
                    f"more than 8 bits a pixel (mode {opened.mode}); save it with 8, in the window you mean"
                )
            box = _box(*whole, crop, form.whole)
            factor = 1 if crop is None else _factor(opened, box, form.size)
            if factor > 1:
                # Image.draft takes the largest reduction that leaves at least this: exactly `factor`.
                opened.draft(None, (opened.width // factor, opened.height // factor))
            opened.load()
            image = opened if opened.mode == "RGB" else opened.convert("RGB")  # convert copies even RGB
    except MemoryError:
        raise
    except UnidentifiedImageError:  # whose message holds an address in memory
        raise ValueError(f"not a readable image (of none of the formats {', '.join(IMAGE_FORMATS)})") from None
    except Exception as error:  # the bytes are in memory, so this is the image's fault; decoders raise nearly anything
        raise ValueError(f"not a readable image ({error})") from None
    if factor == 1:
        return _resized(image, box, form)
    # The same filter as Pillow's, to a rounding of 1 in 255, five times as fast; but its boxes are of whole pixels.
    left, top, right, bottom = (int(x) // factor for x in _snapped(box, factor, whole))
    part = torch.from_numpy(np.asarray(image)[None, top:bottom, left:right].copy())
    resized = interpolate(part.permute(0, 3, 1, 2), (form.size, form.size), mode=form.resample, antialias=True)
    return resized.permute(0, 2, 3, 1)[0].numpy()


def square_of(pixels: NDArray[np.uint8], form: Pixels) -> NDArray[np.uint8]:
    """As :func:`square` without a crop, of pixels: grey [h, w] or [h, w, 1], RGB [h, w, 3]."""
    grey = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    image = Image.fromarray(np.ascontiguousarray(grey)).convert("RGB")
    return _resized(image, _box(*image.size, None, form.whole), form)


def _resized(image: Image.Image, box: tuple[float, float, float, float], form: Pixels) -> NDArray[np.uint8]:
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    return np.asarray(image.resize((form.size, form.size), filters[form.resample], box=box))


def _box(
    width: int, height: int, crop: tuple[float, ...] | None, squeezed: bool = False
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what is cut out, in pixels of the whole image."""
    if crop is None and squeezed:
        return 0.0, 0.0, float(width), float(height)
    if crop is None:
        side = min(width, height)
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2
    low, high, area, aspect, left, top = crop
    ratio = float(np.exp(np.log(4 / 3) * (2 * aspect - 1))) if (low, high) != (1.0, 1.0) else width / height
    pixels = width * height * (low + (high - low) * area)
    w, h = min(width, (pixels * ratio) ** 0.5), min(height, (pixels / ratio) ** 0.5)
    x, y = left * (width - w), top * (height - h)
    return x, y, x + w, y + h


def _factor(image: Image.Image, box: tuple[float, float, float, float], size: int) -> int:
    """By how much a JPEG may be reduced: to a crop of ``size`` pixels or more each way."""
    if image.format != "JPEG" or image.width * image.height <= WHOLE:
        return 1
    for factor in (8, 4, 2):
        left, top, right, bottom = _snapped(box, factor, image.size)
        if min(right - left, bottom - top) >= size * factor:
            return factor
    return 1


def _snapped(box: tuple[float, float, float, float], factor: int, whole: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box moved to the nearest multiples of ``factor``, at which reduced pixels begin and end.

    A reduced pixel covers ``factor`` x ``factor`` pixels from the upper left corner on, so the box so moved cuts the
    reduced image where it cuts the whole one. (At the right and lower edge of an image whose size is no multiple, the
    encoder's padding fills the last pixel; it is left out.)
    """
    left, top, right, bottom = (
        min(round(x / factor), side // factor) * factor for x, side in zip(box, (*whole, *whole), strict=True)
    )
    return left, top, right, bottom
