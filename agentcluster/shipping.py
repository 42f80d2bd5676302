"""Ship this package to a scheduler that has only distributed: its sources travel inside the plugin's pickle.

Where the pickle is loaded the package becomes importable from memory; nothing is written there, and an installed
agentcluster is preferred. So what is pickled by name, errors among it, is the same there as here. cloudpickle could
carry the plugin by value, but then the scheduler would need the very same Python, and each error that it raises would
be of a class that no client knows.

The text of this file is sent ahead and run where there is no agentcluster: it imports the package only in
:func:`shipped`, which runs where the package is.
"""

from __future__ import annotations

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
from typing import Any

PACKAGE = "agentcluster"

#: Expression that unpickling evaluates: define :func:`land` from this file's text, then call it.
_RUN = "[exec(source, space), space['land'](files, version)][1]"


def shipped() -> bytes:
    """Return a pickle that loads as a new plugin wherever distributed is installed.

    Returns
    -------
    bytes
        A pickle of an :class:`agentcluster.scheduler.plugin.AgentPlugin` and of the package's sources.
    """
    return pickle.dumps(_Shipment())


class _Shipment:
    """The object that is pickled in place of the plugin."""

    def __reduce__(self) -> tuple[Any, ...]:
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
    """Finds and loads the modules of one package whose files, compressed, are in memory."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return where a module is, or None when it is not ours."""
        name = self.file(fullname)
        return spec_from_loader(fullname, self, origin="shipped/" + name) if name else None

    def file(self, fullname: str) -> str | None:
        """Return the name of the file that a module is in, or None."""
        stem = fullname.replace(".", "/")
        return next((name for name in (stem + "/__init__.py", stem + ".py") if name in self.files), None)

    def is_package(self, fullname: str) -> bool:
        return (self.file(fullname) or "").endswith("/__init__.py")

    def get_source(self, fullname: str) -> str:
        return self.get_data(self.file(fullname) or fullname).decode()

    def get_data(self, path: str) -> bytes:
        """Return what is in a file; its path begins like a module's ``__file__``, or with the package's name."""
        name = path[len("shipped/") :] if path.startswith("shipped/") else path
        if name not in self.files:
            raise FileNotFoundError(path)
        return zlib.decompress(self.files[name])

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = module.__spec__.origin if module.__spec__ else None
        super().exec_module(module)


def land(files: Mapping[str, bytes], version: str) -> Any:
    """Make the package importable here, unless it is, and return its plugin.

    Parameters
    ----------
    files
        Name of a file, such as ``agentcluster/config.py`` -> what is in it, compressed.
    version
        The package's version; here it has no metadata to ask.
    """
    if find_spec(PACKAGE) is None:
        sys.meta_path.append(FromMemory(files))
        vars(import_module(PACKAGE))["__version__"] = version
    return import_module(PACKAGE + ".scheduler.plugin").AgentPlugin()
