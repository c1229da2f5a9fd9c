"""TurboSparse: run large language models on a fraction of their weights.

Importing the package has no effect and loads no torch; each stage is a module with one public
function of its name, for example ``from turbosparse.convert import convert``.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
