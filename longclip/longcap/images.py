"""A figure's file -> one JPEG: found by the href that the article gives, decoded within bounds, encoded at most once.

A JPEG that is already grey or RGB, upright and small enough keeps its bytes: encoding it again would only lose detail.
Everything else (TIFF, PNG, GIF, WebP, BMP; CMYK, palette, 16 bit, transparent, rotated by EXIF) is encoded once, at
QUALITY, without metadata. The same file and the same Pillow give the same bytes.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""Pillow's own bound; decoded, such an image takes 256 MiB"""
MAX_BYTES = 512 << 20
QUALITY = 95
EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".gif", ".webp", ".bmp")
"""in order of preference: beside a figure's .jpg, PMC keeps its thumbnail as .gif"""
REASONS = ("missing", "zero bytes", "too large", "not an image", "too many pixels", "truncated", "broken")

# Nothing that runs a program (EPS runs Ghostscript) or that has no pixels of its own.
_FORMATS = ("JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP")
_PREFIX = re.compile(r"(?:journal\.)?(?:p[a-z]{3}\.\d{7}\.|elife-\d{5,6}-)")
_VERSION = re.compile(r"-v\d{1,2}$")


class BadImage(ValueError):
    """A file that gives no picture. ``reason`` is one of REASONS, to count by; ``detail`` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class EncodedImage:
    jpeg: bytes
    width: int
    height: int
    phash: int
    """64 bits; copies of a picture differ in few of them"""


# From href to file


def listing(folder: Path) -> dict[str, Path]:
    """The files directly in ``folder``, by name: what ``find`` looks among. No link that leads out of the folder."""
    root = folder.resolve()
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            inside = not entry.is_symlink() or path.resolve().is_relative_to(root)
            if inside and entry.is_file():
                found[entry.name] = path
    return dict(sorted(found.items()))


def find(href: str, files: Mapping[str, Path]) -> Path | None:
    """The file that ``href`` means among ``files``, or None.

    Only the href's last component counts, so that no path, URL or "info:doi/..." leads anywhere else. Tried in turn:
    the name as it stands; the same stem with another image extension or none; either without regard to case; and as
    PLOS and eLife rename them (``journal.pone.0093988.g001`` is ``g001.png``, ``elife-30274-fig1`` is
    ``elife-30274-fig1-v2.tif``), where just one stem among ``files`` fits.
    """
    names = exact_names(href)
    for name in names:
        if (path := files.get(name)) is not None:
            return path
    if not names:
        return None
    stem = _stem(names[0])
    stems: dict[str, list[str]] = {}
    for other in files:
        stems.setdefault(_stem(other).casefold(), []).append(other)
    wanted = stem.casefold()
    fitting = [wanted] if wanted in stems else [s for s in stems if _same(s, wanted) and _is_image(stems[s])]
    if len(fitting) != 1:
        return None
    same = [other for other in stems[fitting[0]] if _rank(other) <= len(EXTENSIONS)]
    return files[min(same, key=lambda other: (_rank(other), other))] if same else None


def exact_names(href: str) -> list[str]:
    """The file names that ``href`` may mean to the letter: its own, and its stem with any image's extension or none."""
    bare = href.strip()
    if "://" in bare:
        bare = bare.split("#")[0].split("?")[0]
    name = unquote(bare).replace("\\", "/").rpartition("/")[2]
    if name in ("", ".", ".."):
        return []
    return [name, *(_stem(name) + form for extension in (*EXTENSIONS, "") for form in (extension, extension.upper()))]


def _stem(name: str) -> str:
    # Not Path.stem: the .g001 of "pone.0093988.g001" is no extension.
    base, _, extension = name.rpartition(".")
    known = (*EXTENSIONS, ".svg", ".eps", ".pdf", ".ps", ".ai", ".xml", ".nxml")
    return base if base and f".{extension.lower()}" in known else name


def _rank(name: str) -> int:
    extension = name[len(_stem(name)) :].lower()
    if not extension:
        return len(EXTENSIONS)
    return EXTENSIONS.index(extension) if extension in EXTENSIONS else len(EXTENSIONS) + 1


def _is_image(names: list[str]) -> bool:
    return any(_rank(name) <= len(EXTENSIONS) for name in names)


def _same(one: str, other: str) -> bool:
    """Whether two stems name one figure: equal but for a journal's prefix that only one has, or a version."""
    prefixes = [found.group() if (found := _PREFIX.match(stem)) else "" for stem in (one, other)]
    a, b = (_VERSION.sub("", stem[len(prefix) :]) for stem, prefix in zip((one, other), prefixes, strict=True))
    p, q = (prefix.removeprefix("journal.") for prefix in prefixes)
    return bool(a) and a == b and (p == q or not p or not q)


# From file to JPEG


def encode(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> EncodedImage:
    """The picture in a file (the first, where there are several): a JPEG that is one as people see it stays as it is.

    Raises BadImage and nothing else, whatever the bytes are (a disk that fails stays an OSError). The header is read
    first: an image of more than ``max_pixels`` is never decoded.
    """
    data = _read(source) if isinstance(source, Path) else source
    if not data:
        raise BadImage("zero bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that Pillow finds odd; what cannot be decoded is an error
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise BadImage("too many pixels", str(error)) from None
        except UnidentifiedImageError:
            raise BadImage("not an image", f"begins with {data[:16]!r}") from None
        except Exception as error:
            raise BadImage("broken", repr(error)) from None
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage("too many pixels", f"{width} x {height}, at most {max_pixels}")
        try:
            return _encode(image, data)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise what they like on a file that lies
            text = str(error).lower()
            cut = isinstance(error, EOFError) or any(word in text for word in ("truncated", "broken data stream"))
            raise BadImage("truncated" if cut else "broken", repr(error)) from None


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadImage("too large", f"{path.stat().st_size} bytes, at most {MAX_BYTES}")
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise BadImage("missing", str(error)) from None


def _encode(image: Image.Image, data: bytes) -> EncodedImage:
    size = image.size
    upright = image.getexif().get(0x0112, 1) in (0, 1)
    if image.format == "JPEG" and image.mode in ("L", "RGB") and upright:
        # All its data is decoded, to see that it is whole, but at the smallest scale that leaves the hash alone.
        image.draft("L", (8 * _SIDE, 8 * _SIDE))
        return EncodedImage(data, *size, perceptual_hash(image))
    plain = _flat(ImageOps.exif_transpose(image))
    out = io.BytesIO()
    plain.save(out, "JPEG", quality=QUALITY)
    return EncodedImage(out.getvalue(), *plain.size, perceptual_hash(plain))


def _flat(image: Image.Image) -> Image.Image:
    """8 bits, grey or RGB, what was transparent on white."""
    mode = image.mode
    if mode in ("L", "RGB"):
        # PNG's transparent colour of an opaque mode
        return _on_white(image.convert("RGBA")) if "transparency" in image.info else image
    if mode == "1":
        return image.convert("L")
    if mode == "I" or mode == "F" or mode.startswith("I;16"):
        return _eight_bits(image)
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or (mode == "P" and "transparency" in image.info):
        return _on_white(image.convert("RGBA"))
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits by its full range, as a viewer shows it; of 32 bits, which has none, from lowest to highest."""
    grey: NDArray[Any] = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0.0, neginf=0.0)
    low, high = 0.0, 65535.0
    if image.mode == "F" or grey.min() < 0 or grey.max() > high:
        low, high = float(grey.min()), float(grey.max())
    scaled = (grey - low) * (255 / max(high - low, 1e-30))
    return Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8))


# Perceptual hash

_SIDE = 32
_NOISE = 32.0
"""a frequency counts as above the median by more than this: the rounding of 32 x 32 grey values makes about 10"""


@cache
def _cosines() -> NDArray[np.float64]:
    """[8, 32]: the lowest frequencies of a DCT-II"""
    k, x = np.arange(8)[:, None], np.arange(_SIDE)[None, :]
    return np.cos(np.pi * k * (2 * x + 1) / (2 * _SIDE))


def perceptual_hash(image: Image.Image) -> int:
    """64 bits: which of the 8 x 8 lowest frequencies of the grey 32 x 32 image lie above their median (pHash).

    Copies of 104 figures of open articles, reduced to 256 px and encoded again at quality 60, differed in at most 5
    bits from the figures; two figures in at least 8, mostly in about 32. An image of one colour has 0.
    """
    # No reducing_gap: its ragged edges cost copies up to 16 bits.
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.float64)
    cosines = _cosines()
    low = (cosines @ grey @ cosines.T).ravel()
    low[0] = 0.0  # brightness
    return int.from_bytes(np.packbits(low > np.median(low) + _NOISE).tobytes(), "big")
