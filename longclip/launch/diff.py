"""Two runs, two experiment files, or one of each: which keys differ, and whether that makes them different runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longclip.errors import UserError
from longclip.experiment.identity import REFERENCES, TRAIN, differences, flatten, identity, references
from longclip.experiment.load import load
from longclip.experiment.schema import Experiment
from longclip.launch.resolve import resolve
from longclip.launch.site import Site
from longclip.run.folder import find_runs

Differences = dict[str, tuple[Any, Any]]
"""By dotted key the two values; None where there is none"""


@dataclass(frozen=True)
class Side:
    """One of the two that are compared."""

    label: str
    experiment: Experiment
    identity: dict[str, Any]
    """of a run as it was made, of a file as a submit from here would make it"""
    unknown: dict[str, str] = field(default_factory=dict)
    """references whose content cannot be seen from here, and why"""


@dataclass(frozen=True)
class Comparison:
    """What differs between ``a`` and ``b``."""

    a: str
    b: str
    identity: Differences
    """what makes them different runs"""
    rest: Differences
    """what a run may be continued with"""
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "same_run": not self.identity}

    def lines(self) -> Iterator[str]:
        """For people; the first line is the answer."""
        count = len(self.identity)
        if count:
            yield f"different runs: {count} key{'s decide' if count > 1 else ' decides'} the weights"
        else:
            yield "same run: nothing that decides the weights differs"
        yield f"  a: {self.a}"
        yield f"  b: {self.b}"
        for title, group in (
            ("these make it another run:", self.identity),
            ("these do not decide the weights:", self.rest),
        ):
            if group:
                yield title
                yield from (f"  {key}: {_shown(a)} -> {_shown(b)}" for key, (a, b) in group.items())
        yield from (f"! {note}" for note in self.notes)


def compare(a: str, b: str, site: Site) -> Comparison:
    """Each of ``a`` and ``b`` is an experiment file, or whatever means one run under the site's runs.

    Raises:
        UserError: one is neither, or more than one run or experiment.
    """
    ours, theirs = _side(a, site), _side(b, site)
    flat_a, flat_b = (flatten(s.experiment.model_dump(mode="json")) | references(s.experiment) for s in (ours, theirs))
    ids = [dict(ours.identity), dict(theirs.identity)]
    # Content that one side cannot see says nothing about the other's: then names are all there is.
    blind = {key: why for s in (ours, theirs) for key, why in s.unknown.items()}
    for facts, flat in zip(ids, (flat_a, flat_b), strict=True):
        facts.update({key: flat[key] for key in blind if flat.get(key) is not None})
    decisive = differences(*ids)
    values = differences(flat_a, flat_b)
    rest = {key: pair for key, pair in values.items() if key not in decisive}
    # Identity leaves defaults out, and holds hashes for names: both sides' values say more.
    shown = {key: (_value(key, ids[0], flat_a), _value(key, ids[1], flat_b)) for key in decisive}
    notes = tuple(f"{key}: compared by name only: {why}" for key, why in sorted(blind.items()))
    return Comparison(ours.label, theirs.label, shown, rest, notes)


def _side(target: str, site: Site) -> Side:
    file = Path(target)
    if file.suffix in (".yaml", ".yml") and file.is_file():
        loaded = load([file])
        if len(loaded) != 1:
            names = ", ".join(one.experiment.name for one in loaded[:6])
            raise UserError(f"{target}: is a sweep of {len(loaded)} experiments ({names}, ...); name a run of it")
        experiment = loaded[0].experiment
        resolved = resolve(experiment, site)
        unknown = {key: "not here" for key, pin in resolved.pins.items() if pin.startswith("unresolved:")}
        unknown |= {key: p.message for p in resolved.problems for key in unknown if p.message.startswith(f"{key}: ")}
        unknown = {key: why.removeprefix(f"{key}: ") for key, why in unknown.items() if key in references(experiment)}
        return Side(str(file), experiment, identity(experiment, resolved.pins), unknown)
    found = find_runs(site.runs, target)
    if len(found) != 1:
        raise UserError(f"{target}: is {len(found)} runs: {', '.join(r.name for r in found[:6])}; name one")
    (run,) = found
    return Side(f"{run.sweep}/{run.name}", run.experiment(), run.identity())


def _value(key: str, facts: dict[str, Any], flat: dict[str, Any]) -> Any:
    """A reference is shown by its name and what it holds, everything else by its value."""
    value = flat.get(key, facts.get(key))  # shares of sources are in identity only
    refers = key in REFERENCES or key.startswith(f"{TRAIN}.")
    if refers and value is not None and facts.get(key) not in (value, None):
        return f"{value} (content {str(facts.get(key))[:12]})"
    return value


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
