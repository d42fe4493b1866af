"""Variables of Python files that users write: their own data sets and algorithms."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from wearfleet_protos.errors import ConfigError

__all__ = ["is_user_file", "variable_of"]


def is_user_file(name: str) -> bool:
    """Whether a name given on the command line is the path of a Python file."""
    return Path(name).suffix == ".py"


def variable_of(path: Path, variable: str) -> object:
    """Execute a file and take one of its variables; a file that did not change is executed once a process.

    Args:
        path: of the file.
        variable: its name.

    Returns:
        Its value, None when there is no such variable.

    Raises:
        ConfigError: no such file.
    """
    if not path.is_file():
        raise ConfigError(f"file {path} does not exist")
    return getattr(_module(path.resolve()), variable, None)


def _module(path: Path) -> ModuleType:
    """The file as a module under a name of its own, known to the import system (dataclasses and pickle look there)."""
    stamp = path.stat().st_mtime_ns
    name = f"wearfleet_user_file_{abs(hash((str(path), stamp))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"file {path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
