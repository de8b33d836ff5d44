"""What every section of a YAML file is: strict and frozen, with errors that name their key."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not coerced, nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def bad(key: str, message: str) -> PydanticCustomError:
    """An error that names the key at fault, relative to the section whose validator raises it."""
    return PydanticCustomError("longclip", "{message}", {"key": key, "message": message})
