"""TurboSparse: run large language models on a fraction of their weights.

Importing the package has no effect; `load` opens a packed folder and needs no torch. Each stage is
a module with one public function of its name: ``from turbosparse.convert import convert``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turbosparse.engine.api import Model, load

__version__ = "0.1.0"

__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Model", "load"):
        from turbosparse.engine import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
