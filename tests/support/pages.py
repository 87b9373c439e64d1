"""What the tests of the documentation share: the scripts that write its pages and images, as modules."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
sys.path.append(str(REPOSITORY / "scripts"))


def script(name: str) -> ModuleType:
    """`scripts/<name>.py`."""
    return importlib.import_module(name)
