"""Scripts beside the package, as modules."""

import importlib.util
from pathlib import Path


ROOT = Path(__file__).parents[1]


def loaded(path: str):
    """The module in a file of the repository."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
