"""``dask-agent``, also ``dask agent``: one host's agent, started by hand or by anything that starts ``dask worker``."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from dask.config import get as dask_config
from dask.system import CPU_COUNT
from distributed.cli.dask_worker import main as dask_worker
from distributed.comm.addressing import get_address_host_port
from distributed.compatibility import asyncio_run
from distributed.config import get_loop_factory
from distributed.proctitle import enable_proctitle_on_children, enable_proctitle_on_current
from distributed.utils import import_term

from agentcluster.agent.agent import Agent
from agentcluster.agent.logs import log_to_stderr, quiet_ends
from agentcluster.agent.options import LIKE_DASK_WORKER, PORT_OPTIONS, read_scheduler_file, slots
from agentcluster.agent.systemd import Notifier
from agentcluster.cli import dask_agent_options as cuda
from agentcluster.cli import dask_agent_options as spec
from agentcluster.cli.dask_agent_options import FLAGS, FOR_WORKERS, OURS, SECTIONS, SHAPE
from agentcluster.errors import AgentClusterError, ConfigError, one_line, suggest
from agentcluster.model import Mode
from agentcluster.modes import names, parse
from agentcluster.units import parse_seconds

logger = logging.getLogger("agentcluster.cli")


def _from_dask_worker() -> list[click.Parameter]:
    return [parameter for parameter in dask_worker.params if parameter.name not in OURS]


class _Command(cuda.Command):
    """Leaves options that it does not know to a preload, where one is given; shows its help in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        rows = {each.name: row for each in options if (row := each.get_help_record(ctx))}
        for title, section in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([rows.pop(name) for name in section if name in rows])
        with formatter.section("Other options"):
            formatter.write_dl(list(rows.values()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.ignore_unknown_options = any(arg.partition("=")[0] == "--preload" for arg in args)
        return super().parse_args(ctx, args)


@click.command(
    name="agent",
    cls=_Command,
    params=_from_dask_worker(),
    epilog="Without any option that says what runs it has the mode that was set for the scheduler's nodes; when none "
    "was set it starts what `dask worker` would: one worker with all threads. On SIGTERM it has the data of its "
    "workers moved to others before it ends, on SIGINT it ends at once.",
)
@click.option("--mode", default=None, help="What runs here first, one of: auto-cpu, auto-gpu, auto, mixed, …")
@click.option("--config", "mode_config", default=None, help="Options of the mode, as JSON.")
@click.option("--spec", default=None, help="Workers as `dask spec` takes them, as JSON; implies --mode spec.")
@click.option("--spec-file", default=None, type=click.Path(dir_okay=False), help="The same, from a YAML or JSON file.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="By which nodes are chosen, as in rack=a.")
@click.option(
    "--standby", is_flag=True, help="Join no scheduler: wait to be adopted by AgentCluster(hosts=['tcp://…'])."
)
@click.option(
    "--listen-address",
    default=None,
    help="Where the worker listens, when it is one, such as tcp://0.0.0.0:9000. In standby: where the agent does.",
)
@click.version_option(package_name="agentcluster")
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Run this host's agent.

    It joins the scheduler at SCHEDULER (an address such as tcp://10.0.0.1:8786), starts the workers of its first mode,
    and changes them when a client asks the scheduler to.
    """
    notify = Notifier()
    log_to_stderr()
    quiet_ends()
    enable_proctitle_on_current()
    enable_proctitle_on_children()
    try:
        arguments = _arguments(options, lambda name: _given(context, name))
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


class _Refused(click.ClickException):
    """A start that cannot be, said as ``dask worker`` says it."""

    def show(self, file: Any = None) -> None:
        click.echo(f"dask-agent: Failed to launch worker. {self.message}", err=True)


def _write_pid_file(path: str) -> None:
    try:
        Path(path).write_text(str(os.getpid()))
    except OSError as error:
        raise ConfigError(f"--pid-file {path!r} cannot be written: {error.strerror}") from None
    atexit.register(Path(path).unlink, missing_ok=True)


def _given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _arguments(options: dict[str, Any], given: Any) -> dict[str, Any]:
    """Return the keyword arguments of :class:`Agent` that the options mean."""
    options = spec.with_spec(options)
    scheduler = _scheduler(options)
    options = {**options, **_places(options)}
    mode = _mode(options, given)
    _check_ports(options, mode)
    security = {
        key: options[option]
        for key, option in (
            ("tls_ca_file", "tls_ca_file"),
            ("tls_worker_cert", "tls_cert"),
            ("tls_worker_key", "tls_key"),
        )
        if options[option] is not None
    }
    arguments = {
        "scheduler": scheduler,
        "lasting": options["standby"] or None,
        "name": _number(options["name"]),
        "mode": mode,
        "security": security,
        "death_timeout": parse_seconds("--death-timeout", options["death_timeout"])
        if options["death_timeout"]
        else None,
        "resources": _resources(options["resources"]) if options["resources"] else None,
        "labels": _labels(options["labels"]) or None,
        "worker_class": _worker_class(options["worker_class"]) if given("worker_class") else None,
        "listen_address": options.get("worker_listen_address"),
        **{key: options[key] if options[key] not in ((), "") else None for key in FOR_WORKERS if key in options},
    }
    if options["standby"] and options["listen_address"]:
        arguments.update(_listen(options["listen_address"], options))
    return {key: value for key, value in arguments.items() if value is not None}


def _worker_class(name: str) -> str:
    try:
        import_term(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--worker-class {name!r} cannot be imported: {error}; give it as module.Class") from None
    return name


def _resources(text: str) -> Any:
    try:
        return parse("auto-cpu", {"resources": text}).config["resources"]
    except ConfigError:
        raise ConfigError(f"--resources {text!r}: give amounts by name, such as 'GPU=2 MEM=10e9'") from None


def _labels(given: Iterable[str]) -> dict[str, str]:
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"--label {text!r}: give a key and a value, such as rack=a")
        found[key] = value
    return found


def _scheduler(options: dict[str, Any]) -> str | None:
    scheduler, file = options["scheduler"], options["scheduler_file"]
    if options["standby"]:
        if scheduler is not None or file is not None:
            raise ConfigError(f"--standby joins no scheduler, so {scheduler or file!r} cannot be given with it")
        return None
    if scheduler is not None and file is not None:
        raise ConfigError(f"the scheduler is given twice, as {scheduler!r} and --scheduler-file {file!r}; give one")
    if file is not None:
        timeout = options["death_timeout"]
        return read_scheduler_file(file, None if timeout is None else parse_seconds("--death-timeout", timeout))
    scheduler = scheduler or dask_config("scheduler-address", None)
    if scheduler is None:
        raise ConfigError("no scheduler: give its address (dask-agent tcp://HOST:8786), --scheduler-file, or --standby")
    return str(scheduler)


def _places(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that say where workers listen, in the form that all workers take."""
    address, contact = options["listen_address"], options["contact_address"]
    if options["standby"]:
        return {}
    if contact and not address:
        raise ConfigError("--contact-address cannot go without --listen-address: it is how others reach that")
    if not address:
        return {}
    if options["n_workers"] not in (None, "1"):
        raise ConfigError("--listen-address cannot go with --nworkers above 1: it is where one worker listens")
    if options["worker_port"]:
        raise ConfigError("--listen-address cannot go with --worker-port: both say where to listen")
    listen = _listen(address, options)
    if contact:
        _split("--contact-address", contact)
    return {
        "host": listen["listen_host"],
        "worker_port": str(listen["port"]),
        "contact_address": contact or address,
        "worker_listen_address": address,
    }


def _listen(address: str, options: dict[str, Any]) -> dict[str, Any]:
    if options["host"] or options["interface"]:
        raise ConfigError("--listen-address cannot go with --host or --interface: both say where to listen")
    protocol, host, port = _split("--listen-address", address)
    # host and protocol are those of the workers as well; they are reached otherwise than at the agent's 0.0.0.0
    return {"listen_host": f"{protocol}://{host}" if protocol else host, "port": port}


def _split(option: str, address: str) -> tuple[str, str, int]:
    protocol, _, rest = address.rpartition("://")
    if rest.startswith(":"):
        rest = f"0.0.0.0{rest}"
    try:
        host, port = get_address_host_port(f"{protocol or 'tcp'}://{rest}", strict=True)
    except ValueError as error:
        raise ConfigError(f"{option} {address!r}: {error}; such as tcp://0.0.0.0:8790") from None
    return protocol, f"[{host}]" if ":" in host else host, port


def _mode(options: dict[str, Any], given: Any) -> Mode | None:
    """Return the first mode that was given by hand; None leaves it to the scheduler, or to who adopts this agent."""
    if options["standby"]:
        for option in FLAGS:
            if given(option):
                raise ConfigError(f"{FLAGS[option]} cannot go with --standby: the cluster that adopts says what runs")
        return None
    name, workers = options["mode"], options["spec"]
    if name is not None and name not in names():
        raise ConfigError(f"--mode {name!r}: unknown mode; {suggest(name, names())}")
    config = spec.from_json("--config", options["mode_config"]) if options["mode_config"] else {}
    shape = {key: options[option] for option, key in SHAPE.items() if given(option)}
    if workers is not None:
        if name not in (None, "spec"):
            raise ConfigError(f"--spec says what runs, so --mode {name!r} cannot be given with it")
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
    return parse(name, {**config, **options[cuda.ARGUMENT], **{key: _number(value) for key, value in shape.items()}})


def _check_ports(options: dict[str, Any], mode: Mode | None) -> None:
    """Refuse ranges with fewer ports than workers here, as ``dask worker`` does: before a scheduler is asked."""
    count = mode.config.get("nworkers") if mode is not None and mode.name == LIKE_DASK_WORKER.name else None
    given = {key: options[key] for key in PORT_OPTIONS if options[key] is not None}
    ports = slots(given)
    if ports is not None and isinstance(count, int) and ports < count:
        ranges = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in given.items())
        raise ConfigError(f"Not enough ports in range {ranges} for {count} workers: there are ports for {ports}")


def _without_nanny(mode: str, options: dict[str, Any], shape: dict[str, Any]) -> Mode:
    """Return the mode that runs one worker in the agent's own process; what is reprovisioned later has nannies."""
    if mode != LIKE_DASK_WORKER.name:
        raise ConfigError(f"--no-nanny cannot go with mode {mode!r}: it is for one worker in mode auto-cpu")
    if _number(shape.pop("nworkers", 1)) != 1:
        raise ConfigError("--no-nanny cannot go with --nworkers above 1: the worker runs in the agent's process")
    settings = {"nthreads": CPU_COUNT, **{key: _number(value) for key, value in shape.items()}}
    return parse("spec", {"spec": {"cls": options["worker_class"], "opts": settings}})


def _number(value: Any) -> Any:
    try:
        return int(value)
    except (TypeError, ValueError):
        return value


async def _run(arguments: dict[str, Any], notify: Notifier) -> None:
    ended, hurry = asyncio.Event(), asyncio.Event()

    def end(number: signal.Signals, *events: asyncio.Event) -> None:
        logger.info("Received signal %s (%d)", number.name, number)
        for event in events:
            event.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, end, signal.SIGTERM, ended)
    loop.add_signal_handler(signal.SIGINT, end, signal.SIGINT, ended, hurry)
    agent = Agent(**arguments)
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


async def _live(agent: Agent, notify: Notifier) -> None:
    await agent
    if agent.scheduler_address is None:
        click.echo(f"Standing by at {agent.address}", err=True)
        notify(f"Listens at {agent.address} for a cluster to adopt it", state="READY")
    else:
        mode = await agent.provisioned()
        notify(f"Node {agent.node_name} of {agent.scheduler_address}, began with {mode}", state="READY")
    await agent.finished()


if __name__ == "__main__":
    main()
