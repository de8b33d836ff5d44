"""Which file a href means, and what becomes of it: one JPEG, or one named refusal."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longclip.longcap.images import REASONS, BadImage, EncodedImage, encode, find, listing

RED, WHITE = (200, 30, 30), (255, 255, 255)


def picture(size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Smooth, not symmetric: JPEG changes it little, and a rotation shows."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    rgb = np.stack([x * 255 / size[0], y * 255 / size[1], 255 * ((x > size[0] / 2) & (y < size[1] / 2))], axis=-1)
    return Image.fromarray(rgb.astype(np.uint8))


def bits(one: int, other: int) -> int:
    """In how many two hashes differ."""
    return (one ^ other).bit_count()


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(encoded: EncodedImage) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded.jpeg)).convert("RGB")).astype(int)


# Which file


@pytest.mark.parametrize(
    ("href", "files", "expected"),
    [
        ("fig1.jpg", "fig1.jpg fig1.tif", "fig1.jpg"),
        ("fig1.tif", "fig1.jpg fig1.tif", "fig1.tif"),
        ("fig1.tif", "fig1.gif fig1.jpg", "fig1.jpg"),
        ("030213v1_fig1", "030213v1_fig1.jpg 030213v1_fig10.jpg", "030213v1_fig1.jpg"),
        ("pone.0093988.g001", "pone.0093988.g001.gif pone.0093988.g001.jpg", "pone.0093988.g001.jpg"),
        ("fig1.jpg", "fig1", "fig1"),
        ("FIG1.TIF", "fig1.jpg", "fig1.jpg"),
        ("fig1", "Fig1.JPG", "Fig1.JPG"),
        ("images/fig%201.png?size=large", "fig 1.png", None),
        ("https://x.org/images/fig%201.png?size=large#x", "fig 1.png", "fig 1.png"),
        ("images\\fig1.png", "fig1.png", "fig1.png"),
        ("info:doi/10.1371/journal.pone.0093988.g001", "pone.0093988.g001.png", "pone.0093988.g001.png"),
        ("info:doi/10.1371/journal.pone.0093988.g001", "g001.png g002.png", "g001.png"),
        ("pone.0093988.g001", "pone.0000001.g001.png", None),
        ("elife-30274-fig1", "elife-30274-fig1-v2.tif elife-30274-fig1-figsupp1-v2.tif", "elife-30274-fig1-v2.tif"),
        ("elife-30274-fig1.tif", "fig1.jpg", "fig1.jpg"),
        ("fig1", "elife-00001-fig1.jpg elife-00002-fig1.jpg", None),
        ("supp_fig1.jpg", "fig1.jpg", None),
        ("fig1", "fig1.xml fig1.pdf", None),
        ("fig1.svg", "fig1.svg fig1.png", "fig1.svg"),
        ("", "fig1.jpg", None),
        ("..", "fig1.jpg", None),
    ],
)  # fmt: skip
def test_a_href_means_one_file(tmp_path: Path, href: str, files: str, expected: str | None) -> None:
    names = [files] if files == "fig 1.png" else files.split()
    for name in names:
        (tmp_path / name).touch()
    found = find(href, listing(tmp_path))
    assert found == (None if expected is None else tmp_path / expected)


def test_no_href_and_no_link_leads_out_of_the_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
    (outside / "secret.jpg").touch()
    (inside / "real.jpg").touch()
    (inside / "linked.jpg").symlink_to(outside / "secret.jpg")
    (inside / "again.jpg").symlink_to("real.jpg")
    (inside / "gone.jpg").symlink_to("nowhere.jpg")
    (inside / "folder.jpg").mkdir()
    files = listing(inside)
    assert set(files) == {"real.jpg", "again.jpg"}
    for href in (
        "../out/secret.jpg",
        str(outside / "secret.jpg"),
        f"file://{outside}/secret.jpg",
        "linked",
        "folder.jpg",
    ):
        assert find(href, files) is None


# What becomes of it


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_jpeg_keeps_its_bytes(mode: str) -> None:
    data = saved(picture().convert(mode), "JPEG", quality=80)
    image = encode(data)
    assert (image.jpeg, image.width, image.height) == (data, 96, 64)


@pytest.mark.parametrize(
    "data",
    [
        saved(picture(), "PNG"),
        saved(picture(), "TIFF"),
        saved(picture(), "TIFF", compression="tiff_lzw", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
        saved(picture().convert("RGBA"), "PNG"),
        saved(picture(), "WEBP", lossless=True),
        saved(picture(), "BMP"),
        saved(picture().convert("CMYK"), "TIFF"),
        saved(picture().convert("CMYK"), "JPEG", quality=95),
    ],
    ids=["png", "tiff", "pages", "rgba", "webp", "bmp", "cmyk-tiff", "cmyk-jpeg"],
)
def test_other_forms_become_the_same_picture(data: bytes) -> None:
    image = encode(data)
    assert image.jpeg != data and (image.width, image.height) == (96, 64)
    assert np.abs(pixels(image) - np.asarray(picture()).astype(int)).mean() < 4
    assert image.jpeg == encode(data).jpeg
    assert bits(image.phash, encode(saved(picture(), "PNG")).phash) <= 4


def test_palette_transparency_and_animation() -> None:
    red = Image.new("RGBA", (32, 32), (*RED, 255))
    red.paste((0, 0, 0, 0), (0, 0, 16, 32))
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, *RED])
    palette.paste(0, (0, 0, 16, 32))
    films = saved(Image.new("RGB", (32, 32), RED), "GIF", save_all=True, append_images=[Image.new("RGB", (32, 32))])
    for data in (saved(red, "PNG"), saved(palette, "PNG", transparency=0), saved(palette, "GIF", transparency=0)):
        seen = pixels(encode(data))
        assert np.abs(seen[:, :12] - WHITE).max() < 8 and np.abs(seen[:, 20:] - RED).max() < 12
    assert np.abs(pixels(encode(films)) - RED).max() < 12
    assert np.abs(pixels(encode(saved(Image.new("1", (32, 32), 1), "TIFF"))) - WHITE).max() == 0


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_shown_by_their_full_range(kind: str) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    seen = pixels(encode(saved(Image.fromarray(ramp.astype(np.uint16)), kind)))[..., 0]
    assert np.abs(seen - ramp / 257).max() < 6
    floats = pixels(encode(saved(Image.fromarray((ramp / 65535 - 0.5).astype(np.float32)), "TIFF")))[..., 0]
    assert np.abs(floats - ramp / 257).max() < 6


def test_a_photograph_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    data = saved(picture(), "JPEG", exif=exif, quality=95)
    image = encode(data)
    assert image.jpeg != data and (image.width, image.height) == (64, 96)
    assert np.abs(pixels(image) - np.rot90(np.asarray(picture()).astype(int), -1)).mean() < 4


def header(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


NOISE = saved(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"<html>404 Not Found</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (header(60_000, 60_000), "too many pixels"),
        (header(12_000, 12_000), "too many pixels"),
        (header(64, 64), "truncated"),
        (NOISE[: len(NOISE) // 2], "truncated"),
        (saved(picture(), "PNG")[:200], "truncated"),
        (saved(picture(), "TIFF")[:2000], "truncated"),
    ],
    ids=["empty", "text", "eps", "svg", "3.6-gigapixels", "144-megapixels", "short-data", "jpeg", "png", "tiff"],
)
def test_what_is_no_picture_is_refused_by_name(data: bytes, reason: str) -> None:
    began = time.monotonic()
    with pytest.raises(BadImage) as refused:
        encode(data)
    assert refused.value.reason == reason and reason in REASONS
    assert time.monotonic() - began < 10


def test_a_missing_file_and_a_bound_of_ones_own(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="missing"):
        encode(tmp_path / "none.jpg")
    with pytest.raises(BadImage, match="too many pixels: 96 x 64, at most 6000"):
        encode(saved(picture(), "PNG"), max_pixels=6000)
    (tmp_path / "a.jpg").write_bytes(NOISE)
    assert encode(tmp_path / "a.jpg").jpeg == NOISE


# Duplicates


def test_copies_are_near_and_other_pictures_far() -> None:
    one = picture((640, 480))
    other = one.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    small = one.resize((200, 150))
    hashes = [encode(saved(image, "JPEG", quality=60)).phash for image in (one, small, other)]
    assert bits(hashes[0], hashes[1]) <= 4
    assert bits(hashes[0], hashes[2]) >= 16
    assert encode(saved(Image.new("RGB", (50, 50), RED), "PNG")).phash == 0
    assert all(0 <= phash < 2**64 for phash in hashes)
