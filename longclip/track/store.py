"""An MLflow store: SQLite under one lease for all of it, or a server under one lease a run or sweep.

SQLite has one writer at a time: whoever opens it holds a lease, a lock file beside the database (never flock, which
shared file systems do not keep). On a server the lease is a folder's, so that what stands for it is created once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from longclip.errors import SiteError, UserError
from longclip.track.lease import Lease

T = TypeVar("T")

METRICS_A_CALL, PARAMS_A_CALL = 1000, 100  # MLflow's limits, as are the three below
PARAM_LENGTH, DIGEST_LENGTH, TAG_LENGTH = 6000, 36, 8000
SILENT = 50.0
"""Seconds after which who syncs with a server, and renews its lease at every request, counts as killed"""


@dataclass(frozen=True)
class Store:
    """An MLflow store that is open."""

    client: Any
    uri: str
    """without user and password"""
    artifacts: str | None
    """where experiments of this store keep their files; None where the server says"""
    held: Lease | None
    """the lease on all of it"""

    def holding(self, folder: Path) -> AbstractContextManager[Lease]:
        """The lease under which what stands for ``folder`` may be created and written."""
        return contextlib.nullcontext(self.held) if self.held else Lease(folder / ".mlflow.lock", SILENT)

    def run(self, run_id: str) -> Any | None:
        """The MLflow run of this id; None where it is not, or was deleted."""
        from mlflow.exceptions import MlflowException

        try:
            known = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return known if known.info.lifecycle_stage == "active" else None

    def experiment(self, name: str) -> str:
        """The id of the MLflow experiment called ``name``, created where there is none."""
        from mlflow.exceptions import MlflowException

        known = self.client.get_experiment_by_name(name)
        if known is None:
            try:
                return str(self.client.create_experiment(name, artifact_location=self.artifacts))
            except MlflowException as error:  # on a server, another run's sync may have been quicker
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                known = self.client.get_experiment_by_name(name)
        if known.lifecycle_stage != "active":
            raise SiteError(
                f"MLflow experiment {name!r} has been deleted in this store",
                f"mlflow experiments restore --experiment-id {known.experiment_id}, or set track.experiment",
            )
        return str(known.experiment_id)


@contextlib.contextmanager
def opened(uri: str) -> Iterator[Store]:
    """The store at ``uri``.

    Raises:
        UserError: ``uri`` is neither http(s) nor SQLite.
        SiteError: also out of the block: the store cannot be reached or written, or another writer does not let go.
    """
    database = _database(uri)
    shown = without_login(uri) if database is None else f"sqlite:///{database}"
    with patient(), as_site_error(shown, "the runs are untouched; longclip sync sends them later"):
        from mlflow import MlflowClient

        # After the import, which sets the level of its own loggers; alembic tells of every migration.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if database is None:
            yield Store(MlflowClient(tracking_uri=uri), shown, None, None)
            return
        database.parent.mkdir(parents=True, exist_ok=True)
        with Lease(database.with_name(f"{database.name}.lock")) as lease:
            # The first client of a fresh database creates its tables, which must not happen twice at once.
            # MLflow would put artifacts into the working folder.
            place = (database.parent / "mlartifacts").as_uri()
            yield Store(MlflowClient(tracking_uri=uri), shown, place, lease)


def key_of(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def log_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    """Adds parameters; one that is there with another value is an error of MLflow's."""
    from mlflow.entities import Param

    for part in parts(list(params.items()), PARAMS_A_CALL):
        client.log_batch(run_id, params=[Param(k, v) for k, v in part])


def parts(values: list[T], size: int) -> Iterator[list[T]]:
    return (values[i : i + size] for i in range(0, len(values), size))


def ms(seconds: float) -> int:
    return round(seconds * 1000)


def _database(uri: str) -> Path | None:
    """The file of an SQLite URI, None for a server. Raises UserError for anything else."""
    if uri.startswith(("http://", "https://")):
        return None
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    if not uri.startswith("sqlite:///") or not path:
        raise UserError(
            f"MLflow URI {without_login(uri)!r}: valid is http://HOST:PORT, https://HOST, or sqlite:///PATH/mlflow.db",
            "set tracking: in the site profile",
        )
    return Path(path).resolve()


def without_login(uri: str) -> str:
    """``uri`` as it may be shown: without user and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


@contextlib.contextmanager
def patient(seconds: int = 20) -> Iterator[None]:
    """Short patience with servers while it lasts, where the user has not said otherwise.

    One that does not answer in ``seconds``, twice, is given up; by default MLflow tries for a quarter of an hour.
    Telemetry stays off, and so do the links that MLflow prints to stdout, where a script may expect JSON.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    ours = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds)}
    ours = {k: v for k, v in ours.items() if k not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextlib.contextmanager
def as_site_error(shown: str, hint: str) -> Iterator[None]:
    """What goes wrong with the store that is ``shown`` so, as one line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:  # no boto3 for a server's artifacts
        lines = without_login(str(error)).strip().splitlines()
        what = lines[0] if lines else type(error).__name__
        raise SiteError(f"MLflow at {shown}: {what[:300]}", hint) from None
