"""Options of dask-agent."""

from __future__ import annotations

from distributed.cli.dask_worker import main as dask_worker

from agentcluster.cli.dask_agent import main


def test_it_has_the_options_of_dask_worker() -> None:
    ours = {name for parameter in main.params for name in parameter.opts}
    theirs = {name for parameter in dask_worker.params for name in parameter.opts}
    assert theirs <= ours
