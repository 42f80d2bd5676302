"""Modes are parsed where they enter the scheduler: each call that takes one refuses what no mode has."""

from __future__ import annotations

import pytest
from distributed import Client, Scheduler

from agentcluster import Agent, dask_setup
from agentcluster.errors import ConfigError
from agentcluster.model import Hardware, Mode
from agentcluster.requests import AdaptiveRequest, NodeRegistration
from agentcluster.wire import spoken, to_wire

WRONG = Mode("uniform", {"nthread": 2})
#: The same option in two of its forms.
TEXT, PARSED = Mode("auto-cpu", {"resources": "A=1"}), Mode("auto-cpu", {"resources": {"A": 1.0}})


def registration(**modes: Mode) -> dict[str, object]:
    request = NodeRegistration("n", "tcp://127.0.0.1:9", Hardware("host", 2, 2**30), **modes)
    return {"registration": to_wire(request), **spoken()}


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("register_node", registration(mode=WRONG)),
        ("register_node", registration(fallback=WRONG)),
        ("set_provision_mode", {"mode": WRONG.name, "config": WRONG.config}),
        ("set_provision_mode", {"nodes": {"n": to_wire(WRONG)}}),
        ("reprovision_nodes", {"mode": WRONG.name, "config": WRONG.config}),
        ("adapt_nodes", {"asked": to_wire(AdaptiveRequest(modes=(WRONG,)))}),
    ],
    ids=["own mode", "fallback", "default", "mode of a node", "reprovision", "adapt"],
)
async def test_a_mode_with_an_unknown_option_is_refused(
    scheduler: Scheduler, client: Client, call: str, arguments: dict[str, object]
) -> None:
    await dask_setup(scheduler)
    with pytest.raises(ConfigError, match="unknown option 'nthread'"):
        await getattr(client.scheduler, call)(**arguments)
    assert not scheduler.extensions["agentcluster"].registry.nodes


async def test_inside_the_scheduler_modes_have_one_form(scheduler: Scheduler, client: Client) -> None:
    await dask_setup(scheduler)
    registry = scheduler.extensions["agentcluster"].registry
    await client.scheduler.set_provision_mode(
        mode=TEXT.name, config=TEXT.config, nodes={"other": to_wire(TEXT)}, bare=["n"]
    )
    assert registry.default == registry.wanted["other"] == PARSED
    async with Agent(scheduler.address, name="n", mode=TEXT.name, config=dict(TEXT.config)) as agent:
        await agent.provisioned()
        assert registry.nodes["n"].own_mode == registry.nodes["n"].plan.mode == PARSED
