"""Command ``dask-agent``, also ``dask agent``: the agent of a host, with the command line of ``dask worker``."""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import os
import signal
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import IO, Any

import click
from dask.config import get as dask_config
from dask.system import CPU_COUNT
from distributed.cli.dask_spec import main as dask_spec
from distributed.cli.dask_worker import main as dask_worker
from distributed.compatibility import asyncio_run
from distributed.config import get_loop_factory
from distributed.proctitle import enable_proctitle_on_children, enable_proctitle_on_current
from distributed.utils import import_term

from agentcluster.agent.agent import Agent
from agentcluster.agent.logs import log_to_stderr, quiet_ends
from agentcluster.agent.options import LIKE_DASK_WORKER, PORT_OPTIONS, read_scheduler_file, scheduler_address, slots
from agentcluster.agent.systemd import Notifier
from agentcluster.cli.dask_agent_options import (
    CUDA_ARGUMENT,
    FLAGS,
    FOR_WORKERS,
    OURS,
    SHAPE,
    DaskAgentCommand,
    IsGiven,
    Values,
    from_json,
    is_given,
    names_scheduler,
    read_spec,
    with_spec,
)
from agentcluster.cli.standby import Standby
from agentcluster.errors import AgentClusterError, ConfigError, one_line, suggest
from agentcluster.model import Mode
from agentcluster.modes import names, parse
from agentcluster.modes.options import KEYWORDS, OptionPath, once
from agentcluster.requests import check_label, check_name
from agentcluster.security import connection_args, credentials_of_options
from agentcluster.units import parse_seconds, split_address

logger = logging.getLogger("agentcluster.cli")


@click.command(
    name="agent",
    cls=DaskAgentCommand,
    params=[parameter for parameter in dask_worker.params if parameter.name not in OURS],
    epilog="Without options for the first workers, the node gets the mode that was set for the scheduler's nodes, and "
    "otherwise one worker with all threads, as `dask worker` starts it. On SIGTERM the data of the workers is moved to "
    "other nodes before the agent ends; so it is on Ctrl-C (SIGINT), and a second one ends it at once.",
)
@click.option("--mode", default=None, help="Mode of the first workers, such as auto-cpu, auto-gpu, mixed or none.")
@click.option("--config", "mode_config", default=None, metavar="JSON", help="Options of the mode.")
@click.option(
    "--spec",
    default=None,
    metavar="JSON",
    help="Specification of the workers, as for `dask spec`; implies --mode spec.",
)
@click.option(
    "--spec-file",
    default=None,
    type=click.Path(dir_okay=False),
    help="YAML or JSON file with the specification; implies --mode spec.",
)
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="KEY=VALUE",
    help="Label of the node, by which it can be selected, such as rack=a; repeatable.",
)
@click.option(
    "--standby",
    is_flag=True,
    help="Join no scheduler, but wait until a cluster adopts the agent: AgentCluster(hosts=['tcp://…']).",
)
@click.option(
    "--listen-address",
    default=None,
    metavar="ADDRESS",
    help="Address at which the worker listens, if there is one worker, such as tcp://0.0.0.0:9000. With --standby: "
    "address at which the agent listens; without TLS it is on this machine alone.",
)
@click.option(
    "--credentials",
    default=None,
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Folder that `agentcluster credentials` wrote, in place of --tls-ca-file, --tls-cert and --tls-key.",
)
@click.option(
    "--insecure",
    is_flag=True,
    help="With --standby: listen without TLS where others can connect; any of them can run code as this user.",
)
@click.version_option(package_name="agentcluster")
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Run the agent of this host.

    The agent joins the scheduler at SCHEDULER (an address such as tcp://10.0.0.1:8786), starts the workers of its first
    mode, and changes them when a client asks the scheduler to.
    """
    notify = Notifier()
    try:
        spec = read_spec(options)
        if names_scheduler(spec):
            _run_scheduler(context, options, spec)
            return
    except ConfigError as error:
        raise _Refused(str(error)) from error
    log_to_stderr()
    quiet_ends()
    enable_proctitle_on_current()
    enable_proctitle_on_children()
    try:
        arguments = _arguments(options, spec, partial(is_given, context))
        if options["pid_file"]:
            _write_pid_file(options["pid_file"])
    except ConfigError as error:
        raise _Refused(str(error)) from error
    try:
        asyncio_run(_run(arguments, notify), loop_factory=get_loop_factory())
    except (AgentClusterError, OSError, TimeoutError) as error:
        click.echo(f"dask-agent: {one_line(error)}", err=True)
        if isinstance(error, TimeoutError):
            logger.info("Timed out starting worker")
            # As `dask worker`, and as `dask cuda worker`.
            sys.exit(0 if (mode := arguments.get("mode")) is not None and mode.name == "auto-gpu" else 1)
        sys.exit(1)
    finally:
        logger.info("End worker")


def _run_scheduler(context: click.Context, options: Values, spec: object) -> None:
    """Start a scheduler, as the command does whose place this one may have taken."""
    known = [str(parameter.name) for parameter in context.command.params if parameter.name in options]
    if others := [name for name in known if name not in ("spec", "spec_file") and is_given(context, name)]:
        raise ConfigError(f"{', '.join(others)} cannot be given with a spec of a scheduler: its opts are all it has")
    run = dask_spec.callback
    assert run is not None
    run(args=(), spec=json.dumps(spec), spec_file=None)


class _Refused(click.ClickException):
    """A command line that cannot be used; its message is that of ``dask worker``."""

    def show(self, file: IO[str] | None = None) -> None:
        click.echo(f"dask-agent: Failed to launch worker. {self.message}", err=True)


def _write_pid_file(path: str) -> None:
    """Write the process id to a file, which is removed at exit."""
    try:
        Path(path).write_text(str(os.getpid()))
    except OSError as error:
        raise ConfigError(f"--pid-file {path!r} cannot be written: {error.strerror}") from None
    atexit.register(Path(path).unlink, missing_ok=True)


def _arguments(options: Values, spec: object, given: IsGiven) -> Values:
    """Return keyword arguments of :class:`Agent` for the options of the command line."""
    options = with_spec(options, spec)
    for key in FOR_WORKERS:
        if key in KEYWORDS and options[key] not in (None, "", ()):
            KEYWORDS[key](OptionPath(f"--{key.replace('_', '-')}", of=""), options[key])
    if options["name"] is not None:
        check_name("node", str(options["name"]))
    scheduler = _scheduler(options)
    options = {**options, **_addresses(options)}
    mode = _mode(options, given)
    _check_ports(options, mode)
    files = {
        key: options[option]
        for key, option in (
            ("tls_ca_file", "tls_ca_file"),
            ("tls_worker_cert", "tls_cert"),
            ("tls_worker_key", "tls_key"),
        )
        if options[option] is not None
    }
    security = credentials_of_options(options["credentials"], files, "worker")
    connection_args(security, scheduler)
    arguments = {
        "scheduler": scheduler,
        "name": _as_number(options["name"]),
        "mode": mode,
        "security": security,
        "death_timeout": _death_timeout(options),
        "resources": _resources(options["resources"]) if options["resources"] else None,
        "labels": _labels(options["labels"]) or None,
        "worker_class": _worker_class(options["worker_class"]) if given("worker_class") else None,
        "listen_address": options.get("worker_listen_address"),
        **{key: options[key] if options[key] not in ((), "") else None for key in FOR_WORKERS if key in options},
    }
    if not given("dashboard_address"):  # dask's default is every address, the agent's depends on its credentials
        arguments["dashboard_address"] = None
    if options["standby"] and options["listen_address"] is not None:
        arguments.update(_listen(options["listen_address"], options))
    if options["insecure"]:
        if not options["standby"]:
            raise ConfigError(
                "--insecure cannot be given without --standby: it is about the port of an agent in standby"
            )
        arguments["insecure"] = True
    return {key: value for key, value in arguments.items() if value is not None}


def _death_timeout(options: Values) -> float | None:
    timeout = options["death_timeout"]
    return parse_seconds("--death-timeout", timeout) if timeout else None


def _worker_class(name: str) -> str:
    """Check that a worker class can be imported."""
    try:
        found = import_term(name)
    except (ImportError, AttributeError, ValueError, UnicodeError) as error:
        raise ConfigError(f"--worker-class {name!r} cannot be imported: {error}; give it as module.Class") from None
    if not isinstance(found, type):
        raise ConfigError(f"--worker-class {name!r} is no class; give it as module.Class")
    return name


def _resources(text: str) -> dict[str, float]:
    """Parse abstract resources."""
    try:
        return dict(parse("auto-cpu", {"resources": text}).config["resources"])
    except ConfigError:
        raise ConfigError(f"--resources {text!r}: give amounts by name, such as 'GPU=2 MEM=10e9'") from None


def _labels(texts: Iterable[str]) -> dict[str, str]:
    """Parse labels of the node."""

    def parsed(text: str) -> tuple[str, str]:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"--label {text!r}: give a key and a value, such as rack=a")
        check_label(key, value)
        return key, value

    return once("--label", map(parsed, texts))


def _scheduler(options: Values) -> str | None:
    """Return the address of the scheduler; None in standby."""
    scheduler, file = options["scheduler"], options["scheduler_file"]
    if options["standby"]:
        if scheduler is not None or file is not None:
            raise ConfigError(f"--standby joins no scheduler, so {scheduler or file!r} cannot be given with it")
        return None
    if scheduler is not None and file is not None:
        raise ConfigError(f"the scheduler is given twice, as {scheduler!r} and --scheduler-file {file!r}; give one")
    if file is not None:
        return read_scheduler_file(file, _death_timeout(options))
    scheduler = scheduler or dask_config("scheduler-address", None)
    if scheduler is None:
        raise ConfigError(
            "no scheduler: give its address (dask-agent tcp://HOST:8786), --scheduler-file, or --standby; or exactly "
            "one of --spec and --spec-file that has it"
        )
    return scheduler_address(scheduler)


def _addresses(options: Values) -> Values:
    """Return the options of addresses in the form that all workers take."""
    address, contact = options["listen_address"], options["contact_address"]
    if options["standby"]:
        return {}
    if contact and address is None:
        raise ConfigError("--contact-address cannot be given without --listen-address: others reach it there")
    if address is None:
        return {}
    if options["n_workers"] not in (None, "1"):
        raise ConfigError("--listen-address cannot be given with --nworkers above 1: it is the address of one worker")
    if options["worker_port"]:
        raise ConfigError("--listen-address cannot be given with --worker-port: both set the port of the worker")
    listen = _listen(address, options)
    if contact:
        _split("--contact-address", contact)
    return {
        "host": listen["listen_host"],
        "worker_port": str(listen["port"]),
        "contact_address": contact or address,
        "worker_listen_address": address,
    }


def _listen(address: str, options: Values) -> Values:
    """Return the host and the port of ``--listen-address``."""
    if options["host"] or options["interface"]:
        raise ConfigError("--listen-address cannot be given with --host or --interface: both set the address")
    protocol, host, port = _split("--listen-address", address)
    # Not as host and protocol: workers have those as well, and are not reached at the agent's 0.0.0.0.
    return {"listen_host": f"{protocol}://{host}" if protocol else host, "port": port}


def _split(option: str, address: str) -> tuple[str, str, int]:
    """Split an address into protocol, host and port."""
    protocol, _, rest = address.rpartition("://")
    if rest.startswith(":"):
        rest = f"0.0.0.0{rest}"
    try:
        host, port = split_address(f"{protocol or 'tcp'}://{rest}")
    except ValueError as error:
        raise ConfigError(f"{option} {address!r}: {error}; such as tcp://0.0.0.0:8790") from None
    return protocol, f"[{host}]" if ":" in host else host, port


def _mode(options: Values, given: IsGiven) -> Mode | None:
    """Return the mode of the first workers; None leaves it to the scheduler, or to the adopting cluster."""
    if options["standby"]:
        for option in FLAGS:
            if given(option):
                raise ConfigError(
                    f"{FLAGS[option]} cannot be given with --standby: the adopting cluster chooses the workers"
                )
        return None
    name, workers = options["mode"], options["spec"]
    if name is not None and name not in names():
        raise ConfigError(f"--mode {name!r}: unknown mode; {suggest(name, names())}")
    config = from_json("--config", options["mode_config"]) if options["mode_config"] is not None else {}
    shape = {key: options[option] for option, key in SHAPE.items() if given(option)}
    if workers is not None:
        if name not in (None, "spec"):
            raise ConfigError(f"--spec implies --mode spec, so --mode {name!r} cannot be given with it")
        name, config = "spec", {"spec": workers, **config}
    if name is None:
        if not config and not shape and options["nanny"]:
            return None
        name, config = LIKE_DASK_WORKER.name, {**LIKE_DASK_WORKER.config, **config}
    if not options["nanny"]:
        return _without_nanny(name, options, shape)
    if shape.get("nworkers") == "auto":
        del shape["nworkers"]
        config.pop("nworkers", None)
    return parse(name, {**config, **options[CUDA_ARGUMENT], **{key: _as_number(value) for key, value in shape.items()}})


def _check_ports(options: Values, mode: Mode | None) -> None:
    """Refuse ranges with fewer ports than workers before anything starts, as ``dask worker`` does."""
    count = mode.config.get("nworkers") if mode is not None and mode.name == LIKE_DASK_WORKER.name else None
    given = {key: options[key] for key in PORT_OPTIONS if options[key] is not None}
    ports = slots(given)
    if ports is not None and isinstance(count, int) and ports < count:
        ranges = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in given.items())
        raise ConfigError(f"Not enough ports in range {ranges} for {count} workers: there are ports for {ports}")


def _without_nanny(mode: str, options: Values, shape: Values) -> Mode:
    """Return the mode with one worker in the agent's process; workers of later modes have nannies."""
    if mode != LIKE_DASK_WORKER.name:
        raise ConfigError(f"--no-nanny cannot be given with mode {mode!r}: it is for one worker in mode auto-cpu")
    if _as_number(shape.pop("nworkers", 1)) != 1:
        raise ConfigError("--no-nanny cannot be given with --nworkers above 1: the worker runs in the agent's process")
    settings = {"nthreads": CPU_COUNT, **{key: _as_number(value) for key, value in shape.items()}}
    return parse("spec", {"spec": {"cls": options["worker_class"], "opts": settings}})


def _as_number(value: object) -> object:
    """Return a whole number for the text of one; another value as it is."""
    try:
        return int(value) if isinstance(value, str | int) else value
    except ValueError:
        return value


async def _run(arguments: Values, notify: Notifier) -> None:
    """Run an agent until it ends, or a signal comes."""
    ended, hurry = asyncio.Event(), asyncio.Event()

    def end(number: signal.Signals) -> None:
        logger.info("Received signal %s (%d)", number.name, number)
        if number == signal.SIGINT and ended.is_set():
            hurry.set()
        elif number == signal.SIGINT:
            logger.info("Moving the data of the workers to other nodes; Ctrl-C again ends at once")
        ended.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    agent = Agent(**arguments) if "scheduler" in arguments else Standby(**arguments)
    work = asyncio.ensure_future(_live(agent, notify))
    over = asyncio.ensure_future(ended.wait())
    try:
        await asyncio.wait([work, over], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        notify(f"Node {agent.node_name} ends", state="STOPPING")
        if ended.is_set():
            await agent.retire(hurry)
        for task in (work, over):
            task.cancel()
        await asyncio.gather(work, over, return_exceptions=True)
        await agent.close(reason="signal" if ended.is_set() else "end")


async def _live(agent: Agent | Standby, notify: Notifier) -> None:
    """Start an agent, announce that it is ready, and wait for its end."""
    await agent
    if isinstance(agent, Standby):
        click.echo(f"Standing by at {agent.address}", err=True)
        notify(f"Listens at {agent.address} for a cluster to adopt it", state="READY")
    else:
        notify(f"Node {agent.node_name} of {agent.scheduler_address}, began with {agent.first_mode}", state="READY")
    await agent.finished()


if __name__ == "__main__":
    main()
