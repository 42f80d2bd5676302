"""The options of ``dask cuda worker`` beyond those of ``dask worker``, for ``dask-agent --mode auto-gpu``.

They are read from dask-cuda's own command, so that one which dask-cuda gains is here too, and are handed on as that
command hands them on: as keywords of ``CUDAWorker``, which are options of the mode. Importing dask-cuda costs as much
as a third of the start of ``dask-agent``, so it is done only for a command line that has an option which nobody else
knows, or that asks for help about the mode.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click
import dask
from distributed.cli.dask_worker import main as dask_worker

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
