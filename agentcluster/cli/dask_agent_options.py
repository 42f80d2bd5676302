"""Options of ``dask-agent``: sections of its help, options of ``dask cuda worker``, specifications of ``dask spec``.

The options of ``dask worker`` come from the installed distributed, those of ``dask cuda worker`` from the installed
dask-cuda, which is imported only when a command line needs it.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import click
import dask
import yaml
from distributed.cli.dask_worker import main as dask_worker

from agentcluster.agent.options import take_scheduler
from agentcluster.errors import ConfigError, one_line
from agentcluster.modes.options import OptionPath, parse_json, shown

#: Parameter name -> value, as click parsed the command line.
Values: TypeAlias = dict[str, Any]

#: Whether the parameter of that name is on the command line.
IsGiven: TypeAlias = Callable[[str], bool]

# -- the help ----------------------------------------------------------------------------------------------------------

#: Parameters of ``dask worker`` that dask-agent defines itself.
OURS = ("listen_address", "version")

#: Options of ``dask worker`` that all workers of the host get, whatever their mode.
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

#: Parameters that choose the first workers -> the option as the user types it.
FLAGS = {
    "mode": "--mode",
    "mode_config": "--config",
    "spec": "--spec",
    "spec_file": "--spec-file",
    "n_workers": "--nworkers",
    "nthreads": "--nthreads",
    "memory_limit": "--memory-limit",
}
#: Parameters that are options of the first mode -> their names there.
SHAPE = {"n_workers": "nworkers", "nthreads": "nthreads", "memory_limit": "memory_limit"}

#: Sections of ``--help`` -> their parameters; options of ``dask worker`` that are not here come last.
SECTIONS = {
    "First workers": ("mode", "mode_config", "spec", "spec_file", *SHAPE, "nanny", "worker_class"),
    "Scheduler and node": ("scheduler_file", "standby", "name", "labels", "death_timeout", "scheduler_sni"),
    "Addresses and ports": (
        *("host", "interface", "protocol", "listen_address", "contact_address", "worker_port", "nanny_port"),
        *("dashboard", "dashboard_address"),
    ),
    "Encryption": ("credentials", "tls_ca_file", "tls_cert", "tls_key", "insecure"),
    "All workers, in every mode": (
        *("resources", "local_directory", "preload", "preload_argv", "preload_nanny"),
        *("lifetime", "lifetime_stagger", "lifetime_restart"),
    ),
}


class DaskAgentCommand(click.Command):
    """The command, with its help in sections, options of a preload, and those of dask-cuda where they are needed.

    Notes
    -----
    The command's function gets one more argument, :data:`CUDA_ARGUMENT`: the options of ``dask cuda worker`` that were
    given, as keyword arguments of ``CUDAWorker``.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters, with those of dask-cuda when this command line needs them."""
        return [*super().get_params(ctx), *ctx.meta.get(CUDA_ARGUMENT, ())]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in sections."""
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        rows = {each.name: row for each in options if (row := each.get_help_record(ctx))}
        for title, section in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([rows.pop(name) for name in section if name in rows])
        with formatter.section("Other options"):
            formatter.write_dl(list(rows.values()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse a command line; unknown options are left to a preload, when one is given."""
        ctx.ignore_unknown_options = any(arg.partition("=")[0] == "--preload" for arg in args)
        if _needs_dask_cuda(args, self.params):
            ctx.meta[CUDA_ARGUMENT] = _loaded()[0]
        try:
            left = super().parse_args(ctx, args[:])
        except click.NoSuchOption as error:
            raise _explained(error, args) from None
        except (ImportError, SyntaxError, ValueError) as error:
            if not (modules := ctx.params.get("preload")) or not _is_of_import(error):
                raise
            raise click.UsageError(
                f"--preload {', '.join(map(repr, modules))}: {type(error).__name__}: {one_line(error)}", ctx
            ) from error
        names = [str(parameter.name) for parameter in ctx.meta.get(CUDA_ARGUMENT, ())]
        options = {name: ctx.params.pop(name) for name in names if name in ctx.params}
        given = functools.partial(is_given, ctx)
        mode = ctx.params.get("mode")
        if mode == CUDA_MODE:
            options |= {name: ctx.params[name] for name in SHARED}
        else:
            _refuse(filter(given, options), mode, ctx)
        options = {name: value for name, value in options.items() if given(name)}
        # The other options keep their defaults, which CUDAWorker has itself.
        ctx.params[CUDA_ARGUMENT] = {name: value for name, value in options.items() if name not in _CONFIGURED}
        ctx.meta[_CONFIG] = {_CONFIGURED[name]: value for name, value in options.items() if name in _CONFIGURED}
        return left

    def invoke(self, ctx: click.Context) -> object:
        """Run the command with the configuration that dask-cuda's options set.

        Workers of the agent are still forked from its warm server: this is only the configuration that they see.
        """
        with dask.config.set(ctx.meta.get(_CONFIG, {})):
            return super().invoke(ctx)


def _is_of_import(error: Exception) -> bool:
    """Return whether an error says that there is no module of a name, or no Python in it."""
    return isinstance(error, ImportError | SyntaxError) or str(error) == "Empty module name"


def is_given(ctx: click.Context, name: str) -> bool:
    """Return whether a parameter is on the command line.

    Parameters
    ----------
    ctx
        Context of the command.
    name
        Name of the parameter.

    Returns
    -------
    bool
        False when the parameter has its default.
    """
    return ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


# -- options of dask cuda worker ---------------------------------------------------------------------------------------

#: Mode that the options of ``dask cuda worker`` belong to.
CUDA_MODE = "auto-gpu"

#: Name of the argument with the options of ``dask cuda worker``.
CUDA_ARGUMENT = "cuda_worker"

#: Parameters of ``dask worker`` that are deprecated there, and still used by ``dask cuda worker``.
SHARED = ("dashboard_prefix",)

#: Options that ``dask cuda worker`` sets in dask's configuration, and does not pass to ``CUDAWorker`` -> the key.
_CONFIGURED = {"multiprocessing_method": "distributed.worker.multiprocessing-method"}

_CONFIG = "cuda_worker.config"

_EXTRA = 'pip install "agentcluster[gpu-cu13]" (CUDA 13) or "agentcluster[gpu-cu12]" (CUDA 12)'


@functools.cache
def _loaded() -> tuple[tuple[click.Parameter, ...], str | None]:
    """Import dask-cuda; return the options that only ``dask cuda worker`` has, or the reason why there are none."""
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


def _needs_dask_cuda(arguments: Sequence[str], known: Iterable[click.Parameter]) -> bool:
    """Return whether a command line has an unknown long option, or asks for the help of the mode."""
    flags = {*_flags(known), "--help"}
    given = [argument.partition("=")[0] for argument in _before_dashes(arguments)]
    return any(flag.startswith("--") and flag not in flags for flag in given) or (
        "--help" in given and _has_cuda_mode(arguments)
    )


def _has_cuda_mode(arguments: Sequence[str]) -> bool:
    """Return whether a command line gives the mode of the options."""
    before = _before_dashes(arguments)
    return f"--mode={CUDA_MODE}" in before or ("--mode", CUDA_MODE) in itertools.pairwise(before)


def _before_dashes(arguments: Sequence[str]) -> list[str]:
    """Return the arguments before ``--``; those after it belong to a preload."""
    arguments = list(arguments)
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _flags(known: Iterable[click.Parameter]) -> list[str]:
    return [flag for parameter in known for flag in (*parameter.opts, *parameter.secondary_opts)]


def _refuse(names: Iterable[str], mode: str | None, ctx: click.Context) -> None:
    """Refuse options of ``dask cuda worker`` on the command line of another mode."""
    for name in names:
        flag = "/".join(_flags(parameter for parameter in _loaded()[0] if parameter.name == name))
        remedy = f"give --mode {CUDA_MODE} with it"
        if mode in ("auto", "mixed"):
            remedy = f'give it as {{"gpu": {{"{name}": …}}}} in --config'
        given = "no --mode was given" if mode is None else f"--mode {mode!r} was given"
        raise click.UsageError(f"{flag} is an option of mode {CUDA_MODE!r}, and {given}; {remedy}", ctx)


def _explained(error: click.NoSuchOption, arguments: Sequence[str]) -> click.UsageError:
    """Return an error about an unknown option, with the reason why the options of dask-cuda are missing."""
    why = _loaded()[1] if _has_cuda_mode(arguments) else None
    if why is None:
        return error
    return click.UsageError(f"{error.format_message()} Those of 'dask cuda worker' are not known: {why}.", error.ctx)


# -- specifications of dask spec ---------------------------------------------------------------------------------------

#: Paths of the scheduler's class, which ``dask spec`` also starts.
_SCHEDULERS = ("dask.distributed.Scheduler", "distributed.Scheduler", "distributed.scheduler.Scheduler")


def names_scheduler(spec: object) -> bool:
    """Return whether a specification is that of a scheduler, which ``dask spec`` starts.

    Parameters
    ----------
    spec
        The content that :func:`read_spec` returned.
    """
    return isinstance(spec, dict) and spec.get("cls") in _SCHEDULERS


def with_spec(options: Values, found: object) -> Values:
    """Take the specification of the workers into the options.

    Parameters
    ----------
    options
        All options of the command line.
    found
        The content that :func:`read_spec` returned.

    Returns
    -------
    dict
        The options, with the specification as ``spec`` (None when neither was given); the scheduler and the name that
        it has are options of the node.

    Raises
    ------
    ConfigError
        For a class that is not a worker, and a value that is given twice.
    """
    options = {**options, "spec": found}
    if not isinstance(found, dict):
        return options
    for entry in (found, *found.values()):
        if isinstance(entry, dict) and entry.get("cls") in _SCHEDULERS:
            raise ConfigError(
                f"the spec has {entry['cls']} among others, and an agent runs workers; a scheduler is started by a "
                f"spec of its own"
            )
    if "cls" not in found:
        return options
    key = "opts" if "opts" in found else "options"
    if not isinstance(found.get(key), dict):
        return options
    own = dict(found[key])
    options["spec"] = {**found, key: own}
    if isinstance(own.get("nanny"), bool):  # an option of `dask worker`, for which the spec has the class
        del own["nanny"]
    for option, value in (("scheduler", take_scheduler(own)), ("name", own.pop("name", None))):
        if value is not None and options[option] not in (None, value):
            raise ConfigError(f"{option} is given twice, as {options[option]!r} and in the spec as {value!r}; give one")
        options[option] = options[option] if value is None else value
    return options


def read_spec(options: Values) -> object:
    """Return the content of ``--spec`` or ``--spec-file``; a file may be a pipe, which can be read once.

    Parameters
    ----------
    options
        All options of the command line.

    Returns
    -------
    object
        None when neither was given.

    Raises
    ------
    ConfigError
        For text that is not JSON, a file that cannot be read, and both of them.
    """
    if options["spec"] is not None and options["spec_file"] is not None:
        raise ConfigError("--spec and --spec-file cannot be given together; give exactly one of them")
    if options["spec_file"] is not None:
        try:
            with open(options["spec_file"]) as file:
                found: object = yaml.safe_load(file)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"--spec-file {options['spec_file']!r} cannot be read: {one_line(error)}") from error
        if found is None:
            raise ConfigError(f"--spec-file {options['spec_file']!r} is empty; it needs workers, as for `dask spec`")
        return found
    return from_json("--spec", options["spec"]) if options["spec"] is not None else None


def from_json(option: str, text: str) -> Values:
    """Parse the JSON object that an option was given.

    Parameters
    ----------
    option
        The option, for messages.
    text
        Its value.

    Returns
    -------
    dict
        The object.

    Raises
    ------
    ConfigError
        When `text` is not a JSON object.
    """
    found = parse_json(OptionPath(option, of=""), text)
    if not isinstance(found, dict):
        raise ConfigError(f"{option}: expected a JSON object, got {shown(text)}")
    return found
