"""What submit will do with each experiment, and why: from records and the scheduler's word, changing nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longclip.errors import LongclipError, UserError
from longclip.experiment.identity import differences, identity, uid
from longclip.experiment.load import Loaded
from longclip.experiment.schema import Experiment
from longclip.launch.resolve import Resolved, resolve
from longclip.launch.site import Site
from longclip.launch.status import CONTINUES, UNDER_WAY, statuses
from longclip.run import lineage
from longclip.run.attempts import attempts_of
from longclip.run.folder import RunFolder, runs_of


@dataclass(frozen=True)
class Plan:
    """What submit will do with one experiment."""

    experiment: Experiment
    axes: Mapping[str, Any]
    resolved: Resolved
    identity: dict[str, Any]
    run: RunFolder
    action: str
    """new, resume, or left alone"""
    why: str
    attempts: list[tuple[Any, ...]] = field(default_factory=list)
    """those that the decision knew of, as :func:`known_attempts` gives them"""
    canary: bool = False
    """this is no run of the sweep, but tries out the shape of some (launch/canary.py)"""
    held_by: Mapping[str, str] | None = None
    """the canary that the run waits for: ``canary`` (folder, from the run's) and ``job``"""

    @property
    def queues(self) -> bool:
        return self.action != "left alone"


def plan(loaded: Sequence[Loaded], site: Site, retry: bool = False) -> list[Plan]:
    """Decides for every experiment; changes nothing. ``retry`` also continues runs that ended badly.

    Raises:
        UserError: two experiments are the same run, or a run folder belongs to another experiment.
    """
    drafts: list[tuple[Loaded, Resolved, dict[str, Any], RunFolder]] = []
    for one in _parents_first(loaded):
        resolved = resolve(one.experiment, site, [(run, facts) for _, _, facts, run in drafts])
        facts = identity(one.experiment, resolved.pins)
        run = RunFolder(site.runs / one.sweep / f"{one.experiment.name}-{uid(facts)}")
        drafts.append((one, resolved, facts, run))
    seen: dict[tuple[str, str], Loaded] = {}
    for one, _, _, run in drafts:
        twin = seen.setdefault((run.sweep, run.uid), one)
        if twin is not one:
            raise UserError(
                f"{one.file} ({one.experiment.name}) and {twin.file} ({twin.experiment.name}) are the same experiment: "
                "nothing that decides the weights differs"
            )
    # Before anything else is read of the runs: what happens from here on, submit sees as a difference.
    attempts = {run.path: known_attempts(run) for _, _, _, run in drafts}
    existing = []
    for _, _, facts, run in drafts:
        if run.exists():
            run.check(facts)
            existing.append(run)
    elsewhere = {r.parent.path: r.parent for _, r, _, _ in drafts if r.parent is not None and r.parent.exists()}
    for run in existing:
        elsewhere.pop(run.path, None)
    known, words = statuses([*existing, *elsewhere.values()])
    states = {s.run.path: s for s in known}
    grown = {run.sweep for _, _, _, run in drafts if run.path not in states}
    others = {sweep: [(r, r.identity()) for r in runs_of(site.runs, sweep)] for sweep in grown}
    plans = []
    for one, resolved, facts, run in drafts:
        if run.path not in states:
            action, why = "new", _nearest(run, facts, others[run.sweep])
        else:
            state = states[run.path]
            action, why = _decide(state.state, state.note, state.samples, retry and words.complete)
        plans.append(Plan(one.experiment, one.axes, resolved, facts, run, action, why, attempts[run.path]))
    queued = {p.run.path for p in plans if p.queues}
    for each in plans:
        parent = each.resolved.parent
        if each.queues and parent is not None and parent.path not in queued and not lineage.has_begun(each.run):
            theirs = states.get(parent.path)
            if theirs is None or theirs.state not in (*UNDER_WAY, "finished"):
                told = "was never queued" if theirs is None else f"is {theirs.state} at {theirs.samples:,} samples"
                each.resolved.problems.append(
                    UserError(f"{lineage.KEY}: {parent.name} {told}", f"submit or longclip retry {parent.name} first")
                )
            elif theirs.state == "finished" and each.experiment.model.init is not None:
                try:  # before the queue: its last checkpoint may have been pruned
                    lineage.origin(parent.path, each.experiment.model.init.source)
                except LongclipError as error:
                    each.resolved.problems.append(error)
    return plans


def _parents_first(loaded: Sequence[Loaded]) -> list[Loaded]:
    """The order in which runs that begin from others of the same submit can be queued; else as they were.

    Raises UserError where they begin from each other.
    """
    by_name = {one.experiment.name: one for one in loaded}
    done: list[Loaded] = []

    def add(one: Loaded, above: tuple[Loaded, ...]) -> None:
        if any(one is other for other in done):
            return
        if any(one is other for other in above):
            circle = " <- ".join(other.experiment.name for other in (*above, one))
            raise UserError(f"{lineage.KEY}: {circle}: none of these can begin")
        init = one.experiment.model.init
        parent = by_name.get(str(lineage.run_name(init.source)).rpartition("/")[2]) if init else None
        if parent is not None:
            add(parent, (*above, one))
        done.append(one)

    for one in loaded:
        add(one, ())
    return done


def known_attempts(run: RunFolder) -> list[tuple[Any, ...]]:
    """What changes in a run's record when somebody else submits it, or its job goes on."""
    return [(a.number, a.submitted is not None, a.job, a.ended is not None) for a in attempts_of(run)]


def _decide(state: str, note: str, samples: int, retry: bool) -> tuple[str, str]:
    if state == "waiting":
        return "new", "was not queued yet"
    if state in ("finished", "queued", "running"):
        return "left alone", f"{state} ({note})"
    if state == "unknown":
        return "left alone", note
    if state in CONTINUES or retry:
        return "resume", f"{state} at {samples:,} samples ({note})" if note else f"{state} at {samples:,} samples"
    return "left alone", f"{state}: {note}; longclip retry continues it"


def _nearest(run: RunFolder, facts: dict[str, Any], others: Sequence[tuple[RunFolder, dict[str, Any]]]) -> str:
    """Which of the sweep's runs (with their identities) differs in the fewest keys, and in which."""
    best: tuple[RunFolder, dict[str, tuple[Any, Any]]] | None = None
    for other, theirs in others:
        if other.name == run.name:  # another submit has made it in this moment
            continue
        differs = differences(theirs, facts)
        if best is None or len(differs) < len(best[1]):
            best = (other, differs)
    if best is None or len(best[1]) > 3:
        return ""
    if not best[1]:
        raise UserError(
            f"{run.name}: is the same experiment as {best[0].name}, under another name: nothing that decides the "
            "weights differs",
            f"name: {best[0].label}",
        )
    what = ", ".join(f"{k} {_short(a)}->{_short(b)}" for k, (a, b) in best[1].items())
    return f"= {best[0].name} but {what}"


def _short(value: Any) -> str:
    text = "default" if value is None else str(value)
    return text if len(text) <= 16 else text[:12]


def problems(plans: Sequence[Plan]) -> list[LongclipError]:
    """All that stands in the way of queuing, each once."""
    found = [p for plan in plans if plan.queues for p in plan.resolved.problems]
    return list({(type(p), p.message): p for p in found}.values())
