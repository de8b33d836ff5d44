"""What a validation error means to the person who typed the file: which key, what is wrong, what would be valid."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Set
from typing import Any

from pydantic import BaseModel, Tag
from pydantic_core import ErrorDetails

from longclip.experiment.schema import Experiment

Key = tuple[str, ...]
"""Path of a key: ``("train", "lr")``"""


def explain(error: ErrorDetails, root: type[BaseModel] = Experiment) -> tuple[Key, str]:
    """The key at fault and one line about it; ``root`` is what the file describes."""
    # The arms of a union are parts of pydantic's path, but not of the file's.
    arm = re.compile(r"(constrained-)?(int|float|str)$|literal\[|plain$|made up$|\w+ task$|tuple\[|dict\[")
    key = tuple(str(part) for part in error["loc"] if not arm.match(str(part)))
    tags = {str(part) for part in error["loc"]}
    ctx = error.get("ctx", {})
    if error["type"] == "longclip":
        return key + tuple(ctx["key"].split(".")), str(ctx["message"])
    if error["type"] == "extra_forbidden":
        return key, _unknown_key(key, root, tags)
    if error["type"] == "missing":
        return key, "missing"
    if error["type"] in ("model_type", "model_attributes_type"):
        return key, f"is a section of keys, not {error['input']!r}"
    what = error["msg"]
    return key, f"is {error['input']!r}; {what[0].lower()}{what[1:]}"


def _unknown_key(key: Key, root: type[BaseModel], tags: Set[str]) -> str:
    fields = list(_fields(key[:-1], root, tags))
    near = difflib.get_close_matches(key[-1], fields, 1, cutoff=0.6)
    elsewhere = [path for path in known_keys((), root) if path.rpartition(".")[2] == key[-1]]
    if near:
        return f"unknown key; did you mean {near[0]}?"
    if elsewhere:
        return f"unknown key here; did you mean {elsewhere[0]}?"
    return f"unknown key; valid here: {', '.join(fields)}"


def _section(annotation: Any, tags: Set[str] = frozenset()) -> type[BaseModel] | None:
    """The section that a field holds; of several kinds of sections the one whose tag is among ``tags``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    args = typing.get_args(annotation)
    if tags and any(isinstance(a, Tag) and a.tag not in tags for a in args):
        return None
    return next((s for a in args if (s := _section(a, tags))), None)


def _fields(path: Key, root: type[BaseModel] = Experiment, tags: Set[str] = frozenset()) -> dict[str, Any]:
    model: type[BaseModel] | None = root
    of_mapping = False
    for part in path:
        if part.isdigit() or of_mapping:  # the place in a list, or a name: the section describes what stands there
            of_mapping = False
            continue
        annotation = model.model_fields[part].annotation if model and part in model.model_fields else None
        of_mapping = typing.get_origin(annotation) is dict
        model = _section(annotation, tags)
    extra = {"extends": None, "sweep": None} if not path and root is Experiment else {}
    named = {info.alias or name: info for name, info in model.model_fields.items()} if model else {}
    return {**named, **extra}


def known_keys(path: Key = (), root: type[BaseModel] = Experiment) -> list[str]:
    """Dotted paths of all keys that an experiment, or what ``root`` describes, may hold."""
    keys = []
    for name, info in _fields(path, root).items():
        keys.append(".".join((*path, name)))
        if info is not None and _section(info.annotation):
            keys.extend(known_keys((*path, name), root))
    return keys
