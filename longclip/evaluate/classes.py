"""What a suite says about one classification task: the images, the classes, and how these are put into words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from longclip.experiment.section import Section, bad

Names = Annotated[tuple[str, ...], Field(strict=False)]

TAKES = {
    "shards": ("label", "candidates"),
    "images": (),
    "medmnist": ("split",),
    "hdf5": ("labels", "image", "label"),
    "parquet": ("image", "label", "candidates"),
    "csv": ("labels", "image", "label", "candidates"),
}
"""Reader -> which of the keys that describe a file are of effect with it"""
_DESCRIBE = ("labels", "split", "image", "label", "candidates")


class Classification(Section):
    """Images are told apart by the texts that they are closest to.

    Either ``classes`` are the same for all images, or every image has its own ``candidates`` (closed-set VQA).
    """

    kind: Literal["classification"]
    reader: Literal["shards", "images", "medmnist", "hdf5", "parquet", "csv"]
    data: Annotated[str, Field(min_length=1)]
    """shards or image folder, ``.npz``, ``.h5``, ``.csv``, or parquet (a file, a folder, ``FOLDER/test-*.parquet``)"""
    labels: str | None = None
    """the file with the labels, where that is another: hdf5 (as PCam), or a CSV whose image paths start at ``data``"""
    split: Literal["train", "val", "test"] = "test"
    """medmnist: of which arrays"""
    image: str | None = None
    """column (parquet, csv) or array (hdf5) of the images; default ``image``, of hdf5 ``x``"""
    label: Names = ()
    """column, array, or field of the JSON member (``a.b.0`` goes into mappings and lists); default ``label``, of hdf5
    ``y``. Of several labels: one that holds a list, or one for each class that holds 0 or 1"""
    candidates: str | None = None
    """column or field that holds the image's own list of texts; ``label`` is then the right one, or its place in it"""
    classes: dict[str, Names] = Field(default_factory=dict)
    """name in the data, or in the order of the data's numbers -> its wordings; a list of names: worded as named"""
    templates: Names = ("{}",)
    """sentences with ``{}`` for the wording. A class is the mean of all its sentences' unit features, unit again"""
    negative: Names = ()
    """templates for an image without the class (``multi_label``): it scores by how much closer it is to the positive"""
    multi_label: bool = False
    """an image may have any number of the classes"""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        """A single text for a list of one, a list of classes for classes worded as they are named."""
        if not isinstance(values, Mapping):
            return values
        full = dict(values)
        for key in ("label", "templates", "negative"):
            if isinstance(full.get(key), str):
                full[key] = (full[key],)
        classes = full.get("classes")
        if isinstance(classes, (list, tuple)):
            full["classes"] = {}
            for name in classes:
                if not isinstance(name, str):
                    raise bad("classes", f"holds {name!r}, which is not text; put it in quotes")
                if name in full["classes"]:
                    raise bad("classes", f"names {name!r} twice")
                full["classes"][name] = (name,)
        elif isinstance(classes, Mapping):
            full["classes"] = {n: (w,) if isinstance(w, str) else w for n, w in classes.items()}
        return full

    @model_validator(mode="after")
    def _check(self) -> Classification:
        takes = TAKES[self.reader]
        for key in _DESCRIBE:
            if key in self.model_fields_set and key not in takes:
                raise bad(
                    key, f"is of no effect with reader: {self.reader}; of effect there: {', '.join(takes) or '-'}"
                )
        if self.reader == "shards" and not self.label:
            raise bad("label", "missing: the field of the JSON member that holds the label, as facts.0")
        self._classes()
        for key in ("templates", "negative"):
            for template in getattr(self, key):
                if template.count("{}") != 1 or template.count("{") + template.count("}") != 2:
                    raise bad(key, f"holds {template!r}; valid is a sentence with {{}} once, where the class stands")
        if not self.templates:
            raise bad("templates", "is empty; at least one sentence with {} for the class")
        return self

    def _classes(self) -> None:
        if (self.candidates is None) == (not self.classes):
            raise bad("classes", "give either 'classes', or 'candidates' where every image has its own")
        if self.multi_label and (self.candidates is not None or self.reader == "images"):
            raise bad("multi_label", "takes classes, and a reader other than images (a folder is one class)")
        if self.negative and not self.multi_label:
            raise bad("negative", "is of effect with multi_label: true only")
        if self.classes and len(self.classes) < (1 if self.multi_label else 2):
            raise bad("classes", f"names {len(self.classes)}; at least two")
        if len(self.label) > 1 and not (self.multi_label and len(self.label) == len(self.classes)):
            raise bad("label", f"names {len(self.label)}; one, or with multi_label one for each of the classes")
        seen: dict[frozenset[str], str] = {}
        for name, wordings in self.classes.items():
            if not wordings or not all(w.strip() for w in wordings):
                raise bad(f"classes.{name}", "has no wording")
            other = seen.setdefault(frozenset(wordings), name)
            if other != name:
                raise bad(f"classes.{name}", f"is worded as {other} is: no text could tell them apart")

    def columns(self) -> tuple[str, tuple[str, ...]]:
        """Where the image and the labels stand, defaults filled in."""
        image, label = ("x", "y") if self.reader == "hdf5" else ("image", "label")
        return self.image or image, self.label or (label,)
