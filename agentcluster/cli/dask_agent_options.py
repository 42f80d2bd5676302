"""Which options of ``dask-agent`` mean what, and the order in which ``--help`` shows them."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click
import dask
import yaml
from distributed.cli.dask_worker import main as dask_worker

from agentcluster.agent.options import take_scheduler
from agentcluster.errors import ConfigError

#: Parameters of ``dask worker`` that mean more, or another thing, here.
OURS = ("listen_address", "version")

#: Options of ``dask worker`` that every worker gets as they are, whatever its mode.
FOR_WORKERS = (
    "host",
    "interface",
    "protocol",
    "local_directory",
    "scheduler_sni",
    "dashboard",
    "dashboard_address",
    "lifetime",
    "lifetime_stagger",
    "lifetime_restart",
    "preload",
    "preload_argv",
    "preload_nanny",
    "worker_port",
    "nanny_port",
    "contact_address",
)

#: The options that say what runs, as the user types them.
FLAGS = {
    "mode": "--mode",
    "mode_config": "--config",
    "spec": "--spec",
    "spec_file": "--spec-file",
    "n_workers": "--nworkers",
    "nthreads": "--nthreads",
    "memory_limit": "--memory-limit",
}
#: Options that are the first mode's -> their names there.
SHAPE = {"n_workers": "nworkers", "nthreads": "nthreads", "memory_limit": "memory_limit"}

#: The sections of ``--help``, and what each has; an option of ``dask worker`` that is new to us comes last.
SECTIONS = {
    "What runs here first": ("mode", "mode_config", "spec", "spec_file", *SHAPE, "nanny", "worker_class"),
    "Which scheduler": ("scheduler_file", "standby", "name", "labels", "death_timeout", "scheduler_sni"),
    "Where it listens": (
        *("host", "interface", "protocol", "listen_address", "contact_address", "worker_port", "nanny_port"),
        *("dashboard", "dashboard_address"),
    ),
    "Encryption": ("tls_ca_file", "tls_cert", "tls_key"),
    "For all workers, whatever runs": (
        *("resources", "local_directory", "preload", "preload_argv", "preload_nanny"),
        *("lifetime", "lifetime_stagger", "lifetime_restart"),
    ),
}


#: The mode that the options belong to.
MODE = "auto-gpu"

#: Parameters of ``dask worker`` that have no meaning there any more, and still have one for dask-cuda's command.
SHARED = ("dashboard_prefix",)

#: The argument that a :class:`Command`'s function gets.
ARGUMENT = "cuda_worker"

_CONFIG = "cuda_worker.config"

_EXTRA = 'pip install "agentcluster[gpu-cu13]" (CUDA 13) or "agentcluster[gpu-cu12]" (CUDA 12)'

#: Options that dask-cuda's command sets in dask's configuration instead of giving them to ``CUDAWorker`` -> the key.
_CONFIGURED = {"multiprocessing_method": "distributed.worker.multiprocessing-method"}


def parameters() -> list[click.Parameter]:
    """Return the options of ``dask cuda worker`` that ``dask worker`` does not have; none where there is no dask-cuda.

    Imports dask-cuda.
    """
    return list(_loaded()[0])


@functools.cache
def _loaded() -> tuple[tuple[click.Parameter, ...], str | None]:
    if importlib.util.find_spec("dask_cuda") is None:
        return (), f"dask-cuda is not installed here; run: {_EXTRA}"
    try:
        from dask_cuda.cli import worker
    except Exception as error:  # it loads libraries of CUDA, which may raise anything
        return (), f"dask-cuda cannot be imported here: {type(error).__name__}: {' '.join(str(error).split())}"
    flags = set(_flags(dask_worker.params))
    names = {parameter.name for parameter in dask_worker.params}
    return tuple(
        parameter
        for parameter in worker.params
        if isinstance(parameter, click.Option) and parameter.name not in names and flags.isdisjoint(_flags([parameter]))
    ), None


def _needed(arguments: Sequence[str], known: Iterable[click.Parameter]) -> bool:
    """Whether a command line has a long option that is not known, or asks for help about the mode.

    Parameters
    ----------
    arguments
        The command line, without the command.
    known
        The parameters that need no dask-cuda.
    """
    flags = {*_flags(known), "--help"}
    given = [argument.partition("=")[0] for argument in _before_dashes(arguments)]
    return any(flag.startswith("--") and flag not in flags for flag in given) or (
        "--help" in given and _asked(arguments)
    )


def _asked(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for the mode that the options belong to."""
    before = _before_dashes(arguments)
    return f"--mode={MODE}" in before or ("--mode", MODE) in itertools.pairwise(before)


def _before_dashes(arguments: Sequence[str]) -> list[str]:
    """Leave out what follows ``--``, which are a preload's own arguments."""
    arguments = list(arguments)
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _flags(known: Iterable[click.Parameter]) -> list[str]:
    return [flag for parameter in known for flag in (*parameter.opts, *parameter.secondary_opts)]


def worker_options(options: Mapping[str, Any], given: Callable[[str], bool]) -> dict[str, Any]:
    """Return keywords of ``CUDAWorker``, as dask-cuda's command passes them.

    Parameters
    ----------
    options
        Name -> value, of the :func:`parameters` and of what :data:`SHARED` has.
    given
        Whether an option is on the command line: the others keep the default, which ``CUDAWorker`` has itself.
    """
    return {name: value for name, value in options.items() if given(name) and name not in _CONFIGURED}


def configuration(options: Mapping[str, Any], given: Callable[[str], bool]) -> dict[str, Any]:
    """Return what dask-cuda's command sets in dask's configuration for the options.

    The processes of an agent's workers are still forked from its warm server: this is what they find configured.
    """
    return {_CONFIGURED[name]: value for name, value in options.items() if given(name) and name in _CONFIGURED}


class Command(click.Command):
    """A command that has the options of dask-cuda where its command line needs them.

    The function gets those that were given as one more argument, :data:`ARGUMENT`: options of the mode, by name.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *ctx.meta.get(ARGUMENT, ())]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if _needed(args, self.params):
            ctx.meta[ARGUMENT] = parameters()
        try:
            left = super().parse_args(ctx, args[:])
        except click.NoSuchOption as error:
            raise _explained(error, args) from None
        names = [str(parameter.name) for parameter in ctx.meta.get(ARGUMENT, ())]
        options = {name: ctx.params.pop(name) for name in names if name in ctx.params}

        def given(name: str) -> bool:
            return ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT

        mode = ctx.params.get("mode")
        if mode == MODE:
            options |= {name: ctx.params[name] for name in SHARED}
        else:
            _refuse(filter(given, options), mode, ctx)
        ctx.params[ARGUMENT] = worker_options(options, given)
        ctx.meta[_CONFIG] = configuration(options, given)
        return left

    def invoke(self, ctx: click.Context) -> Any:
        with dask.config.set(ctx.meta.get(_CONFIG, {})):
            return super().invoke(ctx)


def _refuse(names: Iterable[str], mode: str | None, ctx: click.Context) -> None:
    """Refuse options that are on the command line of another mode."""
    for name in names:
        flag = "/".join(_flags(parameter for parameter in parameters() if parameter.name == name))
        remedy = f"give --mode {MODE} with it"
        if mode in ("auto", "mixed"):
            remedy = f'give it as {{"gpu": {{"{name}": …}}}} in --config'
        said = "no --mode was given" if mode is None else f"--mode {mode!r} was given"
        raise click.UsageError(f"{flag} is an option of mode {MODE!r}, and {said}; {remedy}", ctx)


def _explained(error: click.NoSuchOption, arguments: Sequence[str]) -> click.UsageError:
    """Return click's error about an option that is not known, which says why where dask-cuda is missing."""
    why = _loaded()[1] if _asked(arguments) else None
    if why is None:
        return error
    return click.UsageError(f"{error.format_message()} Those of 'dask cuda worker' are not known: {why}.", error.ctx)


#: Every path that leads to the class that ``dask spec`` also starts, and which is no worker.
_SCHEDULER = ("dask.distributed.Scheduler", "distributed.Scheduler", "distributed.scheduler.Scheduler")


def with_spec(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with the spec read, and with what it says of the whole node said by the node's own options.

    Parameters
    ----------
    options
        All options of the command line: parameter name -> value. The new ``spec`` is None where neither was given.

    Raises
    ------
    ConfigError
        For text that is not JSON, a file that cannot be read, a class that is no worker, and what is said twice.
    """
    found = _read(options)
    options = {**options, "spec": found}
    if not isinstance(found, dict):
        return options
    for entry in (found, *found.values()):
        if isinstance(entry, dict) and entry.get("cls") in _SCHEDULER:
            raise ConfigError(f"the spec has {entry['cls']}, and an agent runs workers; `dask spec` starts a scheduler")
    if "cls" not in found:
        return options
    key = "opts" if "opts" in found else "options"
    if not isinstance(found.get(key), dict):
        return options
    own = dict(found[key])
    options["spec"] = {**found, key: own}
    if isinstance(own.get("nanny"), bool):  # an option of `dask worker`; the class says it here
        del own["nanny"]
    for option, value in (("scheduler", take_scheduler(own)), ("name", own.pop("name", None))):
        if value is not None and options[option] not in (None, value):
            raise ConfigError(f"{option} is given twice, as {options[option]!r} and in the spec as {value!r}; give one")
        options[option] = options[option] if value is None else value
    return options


def _read(options: dict[str, Any]) -> Any:
    if options["spec"] and options["spec_file"]:
        raise ConfigError("--spec and --spec-file cannot be given together; give exactly one of them")
    if options["spec_file"]:
        try:
            with open(options["spec_file"]) as file:
                return yaml.safe_load(file)
        except (OSError, yaml.YAMLError) as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"--spec-file {options['spec_file']!r} cannot be read: {text}") from error
    return from_json("--spec", options["spec"]) if options["spec"] else None


def from_json(option: str, text: str) -> dict[str, Any]:
    """Return the JSON object that an option was given."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{option}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{option}: expected a JSON object, got {text!r}")
    return found
