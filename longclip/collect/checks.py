"""What makes rows not comparable: said in words, or refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longclip.collect.row import SEED, WINDOW, Row, count, state


@dataclass(frozen=True)
class Undeclared:
    """A field in which a run differs from the others of its sweep, and that no axis declares."""

    run: str
    field: str
    value: str
    usual: str
    """what most others have"""

    def __str__(self) -> str:
        return (
            f"{self.run}: undeclared difference: {self.field} is {self.value}, elsewhere {self.usual}; "
            "the window is not the only cause of what differs (declare it under sweep:, or leave the run out)"
        )


def differences(rows: Sequence[Row]) -> list[str]:
    """Warnings: what differs between rows of a sweep and was not declared, what is unfinished or unequal."""
    notes = [f"{r.name}: {note}" for r in rows for note in r.notes]
    return [*map(str, undeclared(rows)), *_mixed_code(rows), *_unfinished(rows), *_unequal(rows), *notes]


def undeclared(rows: Sequence[Row]) -> list[Undeclared]:
    """Seeds differ by what they are for, windows by what is compared; everything else is declared or named here."""
    found = []
    for sweep in dict.fromkeys(r.sweep for r in rows):
        ours = [r for r in rows if r.sweep == sweep]
        declared = {WINDOW, SEED, *(axis for r in ours for axis in r.axes)}
        facts = [{**r.identity, **({"data.test": r.test_hash} if r.test_hash else {})} for r in ours]
        for key in sorted({k for f in facts for k in f}):
            if any(key == axis or key.startswith(f"{axis}.") for axis in declared):
                continue
            # A run that was not tested yet does not differ in its test set.
            values = {r.name: f.get(key) for r, f in zip(ours, facts, strict=True) if key != "data.test" or key in f}
            usual = Counter(map(repr, values.values())).most_common(1)[0][0]
            found += [
                Undeclared(name, key, _short(value), _short_repr(usual))
                for name, value in values.items()
                if repr(value) != usual
            ]
    return found


def _mixed_code(rows: Sequence[Row]) -> list[str]:
    found = []
    for sweep in dict.fromkeys(r.sweep for r in rows):
        codes = {r.name: " then ".join(r.codes) for r in rows if r.sweep == sweep and r.codes}
        if len({code for r in rows if r.sweep == sweep for code in r.codes}) <= 1:
            continue
        usual = Counter(codes.values()).most_common(1)[0][0]
        others = [f"{name} {code}" for name, code in codes.items() if code != usual]
        rest = f"elsewhere {usual}" if others else f"{', '.join(codes)} {usual}"
        found.append(
            f"{sweep}: trained by more than one state of the code: {', '.join([*others, rest])}; "
            f"what changed is not declared (diff -r shows it, in {sweep}/code)"
        )
    return found


def _unfinished(rows: Sequence[Row]) -> list[str]:
    return [
        f"{r.name}: {state(r)}" + (f", {r.verdict}: {r.message}".rstrip(": ") if r.verdict else "")
        for r in rows
        if not r.finished
    ]


def _unequal(rows: Sequence[Row]) -> list[str]:
    seen = {r.name: r.samples for r in rows if r.finished}
    if len(set(seen.values())) <= 1:
        return []
    return ["runs saw unequal numbers of samples: " + ", ".join(f"{k} {count(v)}" for k, v in seen.items())]


def _short(value: Any) -> str:
    return "the default" if value is None else _short_repr(repr(value))


def _short_repr(text: str) -> str:
    return "the default" if text == "None" else text.strip("'")[:40]
