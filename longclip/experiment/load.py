"""From YAML files to experiments: ``extends``, ``sweep``, ``${env:NAME}`` and ``--set``, with line numbers throughout.

Every value remembers the file and line that said it, so that a mistake found after merging is reported where it
was typed.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from longclip.errors import ExperimentError, Mistake, UserError
from longclip.experiment import sweep as sweeps
from longclip.experiment.explain import Key, explain
from longclip.experiment.identity import natural
from longclip.experiment.schema import Experiment

PATHS: tuple[Key, ...] = (
    ("data", "train"),
    ("data", "val"),
    ("data", "test"),
    ("model", "image", "tower"),
    ("model", "text", "tower"),
    ("model", "text", "tokenizer"),
    ("model", "init", "from"),
)
"""Values that may be paths; a path is taken relative to the file that says it."""

REFERENCES = "references.yaml"
"""Beside experiments: figures that papers report (collect/references.py); no experiment"""

M = TypeVar("M", bound=BaseModel)

_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
SECRET = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|API_?KEY", re.IGNORECASE)
"""Names of environment variables whose values are written nowhere"""


@dataclass(frozen=True)
class Origin:
    """Where a value was written; ``line`` 0 stands for the command line."""

    file: Path | None
    line: int

    def __str__(self) -> str:
        return "--set" if self.file is None else f"{_shown(self.file)}:{self.line}"


@dataclass(frozen=True)
class Loaded:
    """An experiment, and what is known of where it came from."""

    experiment: Experiment
    file: Path
    sweep: str
    """name of the sweep: the folder that holds the file"""
    axes: dict[str, Any] = field(default_factory=dict)
    """what ``sweep:`` varies, by dotted key"""


@dataclass
class _Tree:
    """Values, and where each was written."""

    values: dict[str, Any]
    origins: dict[Key, Origin]

    def origin(self, key: Key, file: Path) -> Origin:
        """The nearest known origin: of the key itself, else of the section that holds it."""
        for length in range(len(key), 0, -1):
            if found := self.origins.get(key[:length]):
                return found
            if below := [o for k, o in self.origins.items() if k[:length] == key[:length]]:
                return below[0]
        return Origin(file, 1)


def load(paths: list[Path], overrides: list[str] | None = None) -> list[Loaded]:
    """All experiments of ``paths`` (files, or folders whose ``*.yaml`` do not start with ``_``), overridden by
    ``a.b=value`` settings.

    Raises:
        ExperimentError: with every mistake of every file, each with file, line and key.
    """
    loaded: list[Loaded] = []
    mistakes: list[Mistake] = []
    for file in _files(paths):
        try:
            loaded.extend(_load_file(file, overrides or []))
        except ExperimentError as error:
            mistakes.extend(error.mistakes)
    by_name: dict[tuple[str, str], Path] = {}
    for one in loaded:
        key = (one.sweep, one.experiment.name)
        if key in by_name:
            mistakes.append(
                Mistake(_shown(one.file), "name", f"{one.experiment.name!r} is also the name in {_shown(by_name[key])}")
            )
        by_name[key] = one.file
    if mistakes:
        raise ExperimentError(list(dict.fromkeys(mistakes)))
    return loaded


def _shown(file: Path) -> str:
    """The path as the user would type it: relative to the current folder where that is shorter."""
    try:
        relative = os.path.relpath(file)
    except ValueError:
        return str(file)
    return relative if len(relative) < len(str(file)) else str(file)


def _files(paths: list[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(
                (p for p in path.glob("*.yaml") if not p.name.startswith("_") and p.name != REFERENCES),
                key=lambda p: natural(p.name),
            )
            if not found:
                raise UserError(f"{path}: no experiment in this folder (*.yaml, not starting with _)")
            files.extend(found)
        elif path.is_file():
            if path.name.startswith("_"):
                raise UserError(f"{path}: files that start with _ are bases, not runs", f"ls {path.parent}/*.yaml")
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return list(dict.fromkeys(f.resolve() for f in files))


def _load_file(file: Path, overrides: list[str]) -> list[Loaded]:
    tree = _read(file, ())
    settings = [key for text in overrides for key in _override(tree, text)]
    _substitute_env(tree)
    sweep = tree.values.pop("sweep", None)
    tree.values.setdefault("name", file.stem)
    if sweep is None:
        _resolve_paths(tree)
        return [Loaded(_validate(tree, file), file, file.parent.name)]
    return [
        Loaded(_validate(variant, file), file, file.parent.name, axes)
        for variant, axes in _variants(tree, sweep, file, settings)
    ]


# ---- reading -----------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """safe_load, with YAML 1.2's numbers: 1.1 reads ``5e-4`` as a string, and the time limit ``12:00:00`` as 43200."""


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?\d[\d_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(\d[\d_]*(\.\d*)?([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    """Zeros in front are decimal, as in YAML 1.2: 1.1 reads ``010`` as eight, and nothing in ``08``."""
    digits = str(node.value).replace("_", "")
    return int(digits) if digits.lstrip("+-").isdecimal() else int(loader.construct_yaml_int(node))


_Loader.add_constructor(_INT, _int)


def _read(file: Path, chain: tuple[Path, ...]) -> _Tree:
    """The tree of a file merged over that of its ``extends``."""
    if file in chain:
        names = " -> ".join(p.name for p in (*chain[chain.index(file) :], file))
        raise ExperimentError([Mistake(f"{_shown(chain[-1])}", "extends", f"goes in a circle: {names}")])
    tree = _parse(file)
    parent = tree.values.pop("extends", None)
    if parent is None:
        return tree
    where = tree.origins[("extends",)]
    if not isinstance(parent, str):
        raise ExperimentError([Mistake(str(where), "extends", "is the path of one other file")])
    base = (file.parent / parent).resolve()
    if not base.is_file():
        near = difflib.get_close_matches(base.name, [p.name for p in base.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ExperimentError([Mistake(str(where), "extends", f"no such file: {parent}{hint}")])
    below = _read(base, (*chain, file))
    _merge(below, tree, ())
    return below


def _parse(file: Path) -> _Tree:
    """The tree of one file as it stands."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError([Mistake(_shown(file), "", f"cannot be read: {error}")]) from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        origins: dict[Key, Origin] = {}
        values = {} if node is None else _build(loader, node, (), file, origins)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ExperimentError([Mistake(f"{_shown(file)}:{line}", "", f"not valid YAML: {error.problem}")]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date, an alias of itself
        raise ExperimentError([Mistake(_shown(file), "", f"not valid YAML: {error}")]) from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise ExperimentError([Mistake(f"{_shown(file)}:1", "", "valid is a mapping of keys to values")])
    return _Tree(values, origins)


def _build(loader: _Loader, node: yaml.Node, path: Key, file: Path, origins: dict[Key, Origin]) -> Any:
    """Plain values of a YAML node; fills ``origins``, refuses duplicate keys."""
    if path:
        origins.setdefault(path, Origin(file, node.start_mark.line + 1))
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        result: dict[str, Any] = {}
        own = [(k, v) for k, v in node.value if k.tag != "tag:yaml.org,2002:merge"]
        for key_node, _ in own:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise ExperimentError(
                    [
                        Mistake(
                            f"{_shown(file)}:{line}", ".".join((*path, key)), f"given twice; first on line {seen[key]}"
                        )
                    ]
                )
            seen[key] = line
        loader.flatten_mapping(node)
        for key_node, value_node in node.value:
            key = str(key_node.value)
            origins[(*path, key)] = Origin(file, key_node.start_mark.line + 1)
            result[key] = _build(loader, value_node, (*path, key), file, origins)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*path, str(i)), file, origins) for i, item in enumerate(node.value)]
    return loader.construct_object(node, deep=True)


def _merge(below: _Tree, above: _Tree, path: Key) -> None:
    """Lays ``above`` over ``below``: mappings are merged, everything else is replaced."""

    def lay(under: dict[str, Any], over: dict[str, Any], path: Key) -> None:
        for key, value in over.items():
            here = (*path, key)
            if isinstance(value, dict) and isinstance(under.get(key), dict):
                lay(under[key], value, here)
                continue
            under[key] = value
            for known in [k for k in below.origins if k[: len(here)] == here]:
                del below.origins[known]
            below.origins.update({k: o for k, o in above.origins.items() if k[: len(here)] == here})

    lay(below.values, above.values, path)


def _override(tree: _Tree, text: str) -> list[str]:
    """Applies ``a.b=value``; the value is YAML. The dotted keys that it gives values to."""
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ExperimentError([Mistake("--set", text, "is not of the form key.path=value")])
    loader = _Loader(value)
    try:
        node = loader.get_single_node()
        parsed = None if node is None else _build(loader, node, path, Path("--set"), {})
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ExperimentError([Mistake("--set", key, f"{value!r} is not valid YAML")]) from None
    finally:
        loader.dispose()
    _put(tree, path, parsed, Origin(None, 0))
    return [".".join(leaf) for leaf, _ in _leaves(parsed, path)]


def _put(tree: _Tree, path: Key, value: Any, origin: Origin) -> None:
    at = tree.values
    for part in path[:-1]:
        if not isinstance(at.get(part), dict):
            at[part] = {}
        at = at[part]
    at[path[-1]] = value
    for known in [k for k in tree.origins if k[: len(path)] == path]:
        del tree.origins[known]
    tree.origins[path] = origin


# ---- values that refer to something ------------------------------------------------------------------------------


def _leaves(values: Any, path: Key = ()) -> Iterator[tuple[Key, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(values, list):
        for i, value in enumerate(values):
            yield from _leaves(value, (*path, str(i)))
    else:
        yield path, values


def _set_leaf(values: Any, path: Key, value: Any) -> None:
    for part in path[:-1]:
        values = values[int(part)] if isinstance(values, list) else values[part]
    if isinstance(values, list):
        values[int(path[-1])] = value
    else:
        values[path[-1]] = value


def _substitute_env(tree: _Tree) -> None:
    """Replaces ``${env:NAME}``. Secrets have no place in an experiment: it is copied into every run's record."""
    mistakes = []
    for path, value in list(_leaves(tree.values)):
        if not isinstance(value, str) or "${" not in value:
            continue
        where, dotted = str(tree.origin(path, Path())), ".".join(path)
        for name in _ENV.findall(value):
            if SECRET.search(name):
                mistakes.append(
                    Mistake(
                        where, dotted, f"${{env:{name}}} looks like a secret; set it in the job's environment instead"
                    )
                )
            elif name not in os.environ:
                mistakes.append(Mistake(where, dotted, f"the environment variable {name} is not set"))
        if "${" in _ENV.sub("", value):
            mistakes.append(Mistake(where, dotted, f"{value!r}: the only substitution is ${{env:NAME}}"))
        text = _ENV.sub(lambda m: os.environ.get(m[1], ""), value)
        # `seed: ${env:SEED}` is a number if the variable holds one.
        _set_leaf(tree.values, path, _scalar(text) if _ENV.fullmatch(value) else text)
    if mistakes:
        raise ExperimentError(mistakes)


def _scalar(text: str) -> Any:
    """A number, a bool or the text itself, as YAML would read it in the variable's place."""
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        if tag not in (_INT, _FLOAT, "tag:yaml.org,2002:bool"):
            return text
        return loader.construct_object(yaml.ScalarNode(tag, text))
    finally:
        loader.dispose()


def _resolve_paths(tree: _Tree) -> None:
    for path, value in list(_leaves(tree.values)):
        one_of_several = path[:2] == ("data", "train") and path[3:] == ("name",)
        file = path[:2] == ("evaluate", "suites") and len(path) == 3  # never a name
        may_be = (path in PATHS or one_of_several) and str(value).startswith((".", "/", "~"))
        if (may_be or file) and isinstance(value, str):
            origin = tree.origin(path, Path.cwd() / "-")
            folder = origin.file.parent if origin.file else Path.cwd()
            _set_leaf(tree.values, path, os.path.normpath(folder / Path(value).expanduser()))


# ---- sweeps ------------------------------------------------------------------------------------------------------


def _variants(tree: _Tree, sweep: Any, file: Path, settings: Sequence[str]) -> Iterator[tuple[_Tree, dict[str, Any]]]:
    """One tree per point of ``sweep:`` (experiment/sweep.py), named by what varies. ``settings``: what --set has set,
    which a point would replace without a word."""
    found = sweeps.points(sweep, lambda key: str(tree.origin(key, file)))
    mistakes = [
        Mistake(
            "--set",
            key,
            f"{varied} varies in the sweep ({tree.origin(('sweep', *place), file)}), whose values would replace it; "
            f"--set 'sweep={{grid: {{{varied}: [...]}}}}' replaces the whole sweep, --set sweep=null leaves it out",
        )
        for key in settings
        for varied, place in found[0][1].items()
        if f"{key}.".startswith(f"{varied}.")
    ]
    if mistakes:
        raise ExperimentError(mistakes)
    prefix = tree.values["name"]
    prefix = "" if prefix == file.stem else f"{prefix}_"
    named = sweeps.names([axes for axes, _ in found], list(sweep.get("grid") or ()))
    for (axes, places), name in zip(found, named, strict=True):
        variant = _Tree(_copy(tree.values), dict(tree.origins))
        for key, value in axes.items():
            _put(variant, tuple(key.split(".")), _copy(value), tree.origin(("sweep", *places[key]), file))
        _resolve_paths(variant)
        variant.values["name"] = prefix + name
        yield variant, axes


def _copy(values: Any) -> Any:
    if isinstance(values, dict):
        return {k: _copy(v) for k, v in values.items()}
    return [_copy(v) for v in values] if isinstance(values, list) else values


# ---- validation --------------------------------------------------------------------------------------------------


def _validate(tree: _Tree, file: Path) -> Experiment:
    return _as(Experiment, tree, file)


def read_as(model: type[M], file: Path, **defaults: Any) -> M:
    """Another kind of file (a site profile), told of its mistakes like an experiment; ``defaults`` lie under it.

    Raises:
        ExperimentError: with every mistake, each with its line and the nearest valid key.
    """
    tree = _parse(file)
    tree.values = {**defaults, **tree.values}
    return _as(model, tree, file)


def _as(model: type[M], tree: _Tree, file: Path) -> M:
    try:
        return model.model_validate(tree.values)
    except ValidationError as error:
        found = [explain(e, model) for e in error.errors(include_url=False)]
        raise ExperimentError([Mistake(str(tree.origin(k, file)), ".".join(k), what) for k, what in found]) from None
