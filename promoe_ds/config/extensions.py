"""Files of a user's own: a router or a data set that is not part of this package."""

import importlib
import importlib.util
import sys
from pathlib import Path

from promoe_ds.errors import ConfigError


def import_extension(name: str) -> None:
    """Import a Python file or module, which registers what it holds; nothing the second time.

    What the file itself raises keeps its traceback.
    Raises: ConfigError if there is no such file or module.
    """
    path = Path(name)
    if path.suffix != ".py":
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(
                f"--import {name}: there is no such module: name a .py file, or install its package"
            ) from None
        return
    if not path.is_file():
        raise ConfigError(f"--import {name}: there is no such file in {Path.cwd()}")
    if path.stem in sys.modules:
        if getattr(sys.modules[path.stem], "__file__", None) == str(path.resolve()):
            return
        raise ConfigError(
            f"--import {name}: another module is called {path.stem} already: rename the file"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
