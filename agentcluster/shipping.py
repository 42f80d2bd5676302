"""Shipping of this package to a scheduler that has only distributed: its sources travel in the plugin's pickle.

Where the pickle is loaded, the package becomes importable from memory; no file is written, and an installed
agentcluster is preferred. So objects that are pickled by name, such as errors, are the same on both sides. cloudpickle
could pickle the plugin by value, but then the scheduler would need the same version of Python, and its errors would
have classes that no client knows.

The text of this file runs where agentcluster is not installed: it imports the package only in :func:`shipped`.
"""

from __future__ import annotations

import functools
import pickle
import sys
import zlib
from collections.abc import Mapping
from importlib import import_module
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

PACKAGE = "agentcluster"

#: Expression that unpickling evaluates: it runs the text of this file, then calls its :func:`land`.
_RUN = "[exec(source, space), space['land'](files, version)][1]"


@functools.cache
def shipped() -> bytes:
    """Return a pickle that loads as a new plugin where distributed is installed; made once in a process.

    Returns
    -------
    bytes
        A pickle of an :class:`agentcluster.scheduler.plugin.AgentPlugin` and of the package's sources.
    """
    return pickle.dumps(_Shipment())


class _Shipment:
    """Object that is pickled in place of the plugin."""

    def __reduce__(self) -> tuple[object, ...]:
        import agentcluster

        root = Path(__file__).parent
        files = {
            path.relative_to(root.parent).as_posix(): zlib.compress(path.read_bytes())
            for pattern in ("*.py", "*.yaml")
            for path in sorted(root.rglob(pattern))
        }
        source = Path(__file__).read_text()
        return eval, (_RUN, {"source": source, "space": {}, "files": files, "version": agentcluster.__version__})


class FromMemory(InspectLoader, MetaPathFinder):
    """Finder and loader of the modules of one package from memory.

    Parameters
    ----------
    files
        Name of a file, such as ``agentcluster/config.py`` -> its compressed content.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the specification of a module; None when it is not in the package."""
        name = self.file(fullname)
        return spec_from_loader(fullname, self, origin="shipped/" + name) if name else None

    def file(self, fullname: str) -> str | None:
        """Return the name of a module's file, or None.

        Parameters
        ----------
        fullname
            Full name of the module.
        """
        stem = fullname.replace(".", "/")
        return next((name for name in (stem + "/__init__.py", stem + ".py") if name in self.files), None)

    def is_package(self, fullname: str) -> bool:
        """Return whether a module is a package."""
        return (self.file(fullname) or "").endswith("/__init__.py")

    def get_source(self, fullname: str) -> str:
        """Return the source of a module."""
        return self.get_data(self.file(fullname) or fullname).decode()

    def get_data(self, path: str) -> bytes:
        """Return the content of a file; its path begins like a module's ``__file__``, or with the package's name."""
        name = path[len("shipped/") :] if path.startswith("shipped/") else path
        if name not in self.files:
            raise FileNotFoundError(path)
        return zlib.decompress(self.files[name])

    def exec_module(self, module: ModuleType) -> None:
        """Run a module."""
        module.__file__ = module.__spec__.origin if module.__spec__ else None
        super().exec_module(module)


def land(files: Mapping[str, bytes], version: str) -> object:
    """Make the package importable, unless it is installed, and return its plugin.

    Parameters
    ----------
    files
        Name of a file, such as ``agentcluster/config.py`` -> its compressed content.
    version
        Version of the package, which has no metadata here.

    Returns
    -------
    AgentPlugin
        A new plugin.
    """
    if find_spec(PACKAGE) is None:
        sys.meta_path.append(FromMemory(files))
        vars(import_module(PACKAGE))["__version__"] = version
    plugin: object = import_module(PACKAGE + ".scheduler.plugin").AgentPlugin()
    return plugin
