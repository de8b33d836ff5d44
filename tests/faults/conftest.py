"""One sweep and one undisturbed run for all faults, and the table that the suite prints."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cluster
from tests.faults.trial import SETTINGS, Record, Trial
from tests.launch.small import make_sweep


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("faults"), (6,))


@pytest.fixture(scope="session")
def undisturbed(sweep: Path, cluster: Cluster) -> Record:
    """The same experiment, left in peace: two nodes, one job, one attempt."""
    trial = Trial(cluster, sweep, sweep.parent / "undisturbed")
    trial.submit()
    trial.wait_state("finished")
    assert len(trial.attempts) == 1
    return Record.of(trial.run, time.monotonic() - trial.began)


@pytest.fixture
def trial(sweep: Path, cluster: Cluster, undisturbed: Record, tmp_path: Path) -> Iterator[Callable[..., Trial]]:
    """Makes trials; what one of them leaves in the queue is cancelled."""
    made: list[Trial] = []

    def make(settings: dict[str, Any] | None = None, **site: Any) -> Trial:
        one = Trial(cluster, sweep, tmp_path / f"runs{len(made)}", {**SETTINGS, **(settings or {})}, site)
        made.append(one)
        return one

    yield make
    import subprocess

    subprocess.run("squeue -h -o %A | xargs -r scancel", shell=True, check=False)
