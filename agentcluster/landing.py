"""Where a shipped package lands: makes it importable from memory in a scheduler that does not have it.

:mod:`agentcluster.shipping` sends this file's text ahead, and it is run there before there is an agentcluster: it
imports nothing of it.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping
from importlib import import_module
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any

PACKAGE = "agentcluster"


class FromMemory(InspectLoader, MetaPathFinder):
    """Finds and loads the modules of one package whose files, compressed, are in memory."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Return where a module is, or None when it is not ours."""
        name = self.file(fullname)
        return name and spec_from_loader(fullname, self, origin="shipped/" + name)

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
        Name of a file, such as ``agentcluster/plugin.py`` -> what is in it, compressed.
    version
        The package's version; here it has no metadata to ask.
    """
    if find_spec(PACKAGE) is None:
        sys.meta_path.append(FromMemory(files))
        vars(import_module(PACKAGE))["__version__"] = version
    return import_module(PACKAGE + ".plugin").AgentPlugin()
