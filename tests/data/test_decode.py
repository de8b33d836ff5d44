"""Pixels: evaluation decodes exactly, training at reduced size cuts the very same place out."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from longclip.data import decode
from longclip.data.decode import square, square_of
from longclip.data.loader import Batch
from longclip.model.packing import pack
from longclip.model.towers import Pixels
from tests.data.forms import form

Box = tuple[float, float, float, float]


def jpeg(pixels: np.ndarray[Any, Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


def ramps(width: int, height: int) -> np.ndarray[Any, Any]:
    """Red grows from left to right, green from top to bottom: a pixel says where it was."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, np.full_like(x, 128)], axis=2).round().astype(np.uint8)


def exactly(data: bytes, size: int, box: Box, how: int = Image.Resampling.BICUBIC) -> np.ndarray[Any, Any]:
    """Pillow's own: the whole image decoded, the box cut out and resized."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((size, size), how, box=box))


def test_evaluation_is_exact_at_any_size() -> None:
    """No reduction, to the bit, however large the image."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8)
    data = jpeg(noise)
    assert np.array_equal(square(data, form(64), None), exactly(data, 64, (150, 0, 750, 600)))


def test_a_tower_that_knows_whole_images_sees_them_whole() -> None:
    data = jpeg(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    found = square(data, form(16, whole=True, resample="bilinear"), None)
    assert np.array_equal(found, exactly(data, 16, (0, 0, 90, 60), Image.Resampling.BILINEAR))


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(260, 700),
    height=st.integers(260, 700),
    size=st.sampled_from([32, 64, 112]),
    draws=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 4),
)
def test_a_reduced_crop_is_the_same_place(width: int, height: int, size: int, draws: tuple[float, ...]) -> None:
    """A shift of a tenth of a target pixel would show in the ramps."""
    crop = (0.5, 1.0, *draws)
    offsets = []
    for pixels in (ramps(width, height), 255 - ramps(width, height)):
        data = jpeg(pixels, subsampling=0)
        with Image.open(io.BytesIO(data)) as image:
            box = decode._box(width, height, crop)
            factor = decode._factor(image, box, size)
        snapped = decode._snapped(box, factor, (width, height))
        assert all(abs(a - b) < factor for a, b in zip(snapped, box, strict=True))
        found = square(data, form(size), crop).astype(int)
        want = exactly(data, size, snapped if factor > 1 else box).astype(int)
        assert np.abs(found - want).mean() < (1.0 if factor > 1 else 1e-9)
        offsets.append((found - want).mean((0, 1)))
    # A shift changes its sign with the slope; the half up to which libjpeg rounds every value does not.
    shift = np.abs(offsets[0] - offsets[1])[:2] / 2
    slope = 255 * np.array([(snapped[2] - snapped[0]) / width, (snapped[3] - snapped[1]) / height]) / size
    assert (shift <= 0.1 * slope).all()


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    size=st.integers(1, 400),
    draws=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 4),
)
def test_never_reduced_below_what_is_asked_for(width: int, height: int, size: int, draws: tuple[float, ...]) -> None:
    """And no further reduction would do."""
    image = Image.new("L", (1, 1))
    stream = io.BytesIO()
    image.save(stream, "JPEG")
    with Image.open(stream) as opened:
        opened._size = (width, height)  # the header's word is all that is looked at
        box = decode._box(width, height, (0.3, 1.0, *draws))
        factor = decode._factor(opened, box, size)
    left, top, right, bottom = decode._snapped(box, factor, (width, height))
    assert min(left, top) >= 0 and right <= width and bottom <= height
    if factor > 1:
        assert width * height > decode.WHOLE
        assert min(right - left, bottom - top) // factor >= size


@pytest.mark.parametrize(("factor", "side"), [(2, 640), (4, 1280), (8, 2560)])
def test_reduced_pixels_look_like_the_whole_ones(factor: int, side: int) -> None:
    """A photograph-like image: as near to the exact decode as JPEG itself is to the original."""
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    data = jpeg(np.asarray(coarse.resize((side, side * 3 // 4), Image.Resampling.BICUBIC)))
    crop = (0.9, 1.0, 0.2, 0.6, 0.4, 0.8)
    with Image.open(io.BytesIO(data)) as image:
        box = decode._box(*image.size, crop)
        assert decode._factor(image, box, 224) == factor
    found, want = square(data, form(224), crop).astype(int), exactly(data, 224, box).astype(int)
    assert np.abs(found - want).mean() < 1.5


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_kind_of_jpeg_is_reduced(mode: str, progressive: bool) -> None:
    image = Image.fromarray(ramps(640, 480)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95, progressive=progressive)
    crop = (1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    found, want = (
        square(stream.getvalue(), form(100), crop).astype(int),
        exactly(stream.getvalue(), 100, (0, 0, 640, 480)).astype(int),
    )
    assert found.shape == (100, 100, 3)
    assert np.abs(found - want).mean() < 1.5


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_deep_greys_are_refused(kind: type) -> None:
    """Rather than clipped at 255, which makes them white."""
    stream = io.BytesIO()
    Image.fromarray(np.arange(4096).reshape(64, 64).astype(kind)).save(stream, "TIFF")
    with pytest.raises(ValueError, match="more than 8 bits a pixel"):
        square(stream.getvalue(), form(16), None)


@pytest.mark.parametrize("shape", [(30, 41), (30, 41, 1), (41, 30, 3), (16, 16, 3), (16, 16)])
def test_pixels_are_seen_as_their_file_is(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(stream, "PNG")
    assert np.array_equal(square_of(pixels, form(16)), square(stream.getvalue(), form(16), None))


def test_images_are_normalised_as_the_tower_wants() -> None:
    """What the formula says, to the rounding of fp32, in the layout that convolutions like."""
    form = Pixels(6, (0.48, 0.45, 0.40), (0.26, 0.27, 0.28))
    pixels = torch.arange(2 * 6 * 6 * 3, dtype=torch.int64).remainder(256).to(torch.uint8).view(2, 6, 6, 3)
    batch = Batch(pixels, form, pack([[1], [1]]), torch.ones(2, dtype=torch.bool), (), 2, 0)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in (form.mean, form.std))
    found = batch.images(torch.device("cpu"))
    exact = (pixels.permute(0, 3, 1, 2).double() / 255 - mean) / std
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) <= 2 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert found.is_contiguous(memory_format=torch.channels_last)
