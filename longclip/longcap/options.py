"""What a build is asked for: all that decides its bytes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from longclip import __version__
from longclip.errors import UserError

_LICENSES = ("CC0", "CC BY", "CC BY-SA", "CC BY-ND", "CC BY-NC", "CC BY-NC-SA", "CC BY-NC-ND", "Public Domain")
_UNVERSIONED = ("other", "unknown")

Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class Options(BaseModel):
    """The options of ``longclip longcap build``. A build that was begun with others is refused, never mixed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokenizer: str | None = None
    """what counts the budget; without, words do"""
    budget: Annotated[int, Field(ge=16)] = 512
    """most tokens of a long caption, special tokens included"""
    licenses: tuple[str, ...] = ()
    """"CC BY" (any version), "CC BY 4.0", ..., "unknown"; empty: all"""
    val: Share = 0.01
    test: Share = 0.01
    """shares of articles"""
    shard_size: Annotated[int, Field(ge=1)] = 10_000
    """most samples of a shard"""
    against: tuple[str, ...] = ()
    """evaluation images that must not occur: folders of images, or indexed shards"""
    distance: Annotated[int, Field(ge=0, le=16)] = 4
    """bits of 64 in which the hashes of two pictures that count as one may differ"""
    seed: int = 0

    def allows(self, license: str) -> bool:
        """Whether an article under ``license`` ("CC BY 4.0", "other", "unknown") is wanted."""
        return not self.licenses or any(license == name or license.startswith(f"{name} ") for name in self.licenses)


def mistake(error: ValidationError) -> UserError:
    """The first thing that is wrong with the values of ``Options``, by the name that it has on the command line."""
    first = error.errors()[0]
    option = str(first["loc"][0]).replace("_", "-")
    given = f"{first['input']:g}" if isinstance(first["input"], float) else first["input"]
    return UserError(f"--{option} {given}: {first['msg'][:1].lower()}{first['msg'][1:]}")


def license_names(text: str) -> tuple[str, ...]:
    """``"CC BY, cc0"`` -> ``("CC BY", "CC0")``. Raises UserError for what is no licence's name."""
    known = {name.lower(): name for name in (*_LICENSES, *_UNVERSIONED)}
    names = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"(.*?)( \d\.\d)?", part)
        name = known.get(found[1].lower()) if found else None
        if name is None or (found and found[2] and name in _UNVERSIONED):
            valid = ", ".join((*_LICENSES, *_UNVERSIONED))
            raise UserError(
                f"--licenses: no licence is called {part!r}", f"valid is {valid}; a version may follow: CC BY 4.0"
            )
        names.append(name + ((found and found[2]) or ""))
    return tuple(sorted(set(names)))


def versions() -> dict[str, str]:
    """What decides bytes besides the options: this package's builder and the libraries below it."""
    from lxml import etree
    from PIL import features

    sources = sorted([*Path(__file__).parent.glob("*.py"), Path(__file__).parents[1] / "data" / "shards.py"])
    code = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:8]
    known = {name: version(name) for name in ("lxml", "numpy", "pillow", "tokenizers", "webdataset")}
    known["lxml"] += f" (libxml2 {'.'.join(map(str, etree.LIBXML_VERSION))})"
    known["pillow"] += f" (jpeg {features.version('libjpeg_turbo') or features.version('jpg')})"
    return {"longclip": f"{__version__} (builder {code})", **known}


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """``seed was 0, is 1`` for everything that is not the same."""
    changed = (k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k))
    return [f"{k} was {json.dumps(theirs.get(k))}, is {json.dumps(ours.get(k))}" for k in changed]
