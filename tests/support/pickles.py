"""A pickle that leaves a mark where it is opened."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def payload(mark: Path) -> bytes:
    """Makes the folder `mark` when it is unpickled, which is tried once here."""
    pickled = pickle.dumps(Payload(mark))
    pickle.loads(pickled)
    mark.rmdir()
    return pickled
