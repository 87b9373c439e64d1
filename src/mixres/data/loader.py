"""The plan's microbatches of one rank, read from the cache and collated ahead of the step that needs them.

Promise: the data position is the step number alone; workers change the time things take, nothing else. Cost: one
cache read per sample and step, in `workers` processes beside the training.

Batches come through pipes as bytes. Torch would pass them in shared memory, and waits for ever where /dev/shm is full:
a container has 64 MB there by default.
"""

import atexit
import functools
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawValue
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from mixres.batch import Batch, Sample, TextEmbeds
from mixres.data.cache import Cache, DamagedEntry
from mixres.data.collate import collate
from mixres.data.plan import Layout, Microbatch, Plan, Rounding
from mixres.errors import UserError, WorkError

_SIGNAL_WAIT_S = 5.0


def samples_of(microbatch: Microbatch, read: Callable[[int], Sample]) -> list[Sample]:
    """The samples as this microbatch trains them: with the empty prompt where the plan drops the caption."""
    samples = zip(microbatch.indices, map(read, microbatch.indices), strict=True)
    return [sample.without_caption() if i in microbatch.dropped else sample for i, sample in samples]


class Texts(Protocol):
    """Where embeddings come from that the cache does not hold."""

    def inputs(self, index: int, *, dropped: bool) -> Any:
        """What is embedded of a sample, or of its controls with the empty prompt; read in any process.

        Raises:
            WorkError: it is not what it was.
        """

    def embed(self, inputs: Any) -> TextEmbeds:
        """The embeddings, in the process that has the text encoder. Raises as `inputs`."""


class Read(NamedTuple):
    """The samples of a microbatch before they are collated, and what is still to be embedded of each."""

    microbatch: Microbatch
    samples: list[Sample]
    inputs: list[Any]


@dataclass(frozen=True)
class MicrobatchDataset(Dataset["Batch | Read | WorkError"]):
    """Maps a `Microbatch` of the plan to the `Batch` of its samples; with `texts`, to what `batch_of` makes one of.

    A damaged or missing entry comes back as the error, not raised: a worker's exception would arrive as a traceback.
    """

    cache: Cache
    keys: Sequence[str]
    names: Sequence[str]
    layout: Layout
    rounding: Rounding = Rounding()  # noqa: RUF009 - an immutable pair of ones
    texts: Texts | None = None  # where the cache holds none

    def __getitem__(self, microbatch: Microbatch) -> Batch | Read | WorkError:
        inputs: list[Any] = []
        try:
            samples = samples_of(microbatch, lambda i: self.cache.read(self.keys[i], name=self.names[i]))
            if self.texts:
                inputs = [self.texts.inputs(i, dropped=i in microbatch.dropped) for i in microbatch.indices]
        except (DamagedEntry, FileNotFoundError) as error:
            return WorkError(f"{error}: run the same command again")
        except (UserError, WorkError) as error:
            return WorkError(str(error))
        except OSError as error:
            where = f"{error.filename or self.cache}: cannot be read ({error.strerror or error})"
            return WorkError(f"{where}: run the same command again")
        read = Read(microbatch, samples, inputs)
        return read if self.texts else self.batch_of(read)

    def batch_of(self, read: Read) -> Batch:
        """The batch, its prompts embedded where that is to be done.

        Raises:
            WorkError: it cannot be done.
        """
        (indices, weights, _), samples, inputs = read
        if self.texts:
            samples = [sample.embedded(self.texts.embed(own)) for sample, own in zip(samples, inputs, strict=True)]
        return collate(samples, indices=indices, weights=weights, layout=self.layout, rounding=self.rounding)

    def batch(self, microbatch: Microbatch) -> Batch:
        """The batch of a microbatch that no worker reads.

        Raises:
            WorkError: a cache entry is damaged or missing, or a control has changed.
        """
        return self.finished(self[microbatch])

    def finished(self, found: Batch | Read | WorkError) -> Batch:
        """The batch of what a worker has found. Raises as `batch`."""
        if isinstance(found, WorkError):
            raise found
        return self.batch_of(found) if isinstance(found, Read) else found


def microbatch_loader(
    dataset: MicrobatchDataset, plan: Plan, *, rank: int, first: int, last: int, workers: int
) -> Iterator[Batch]:
    """Batches of `rank` for optimizer steps `first` to `last` - 1, one microbatch after the other.

    Raises:
        WorkError: from the iterator, where a cache entry is damaged or missing, or a worker has died.
    """
    closing = RawValue("b", 0)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        sampler=(microbatch for step in range(first, last) for microbatch in plan.step(step).ranks[rank]),
        num_workers=workers,
        collate_fn=_as_bytes if workers else _unchanged,
        worker_init_fn=functools.partial(_ignore_signals_until_close, closing),
        generator=torch.Generator(),  # its own: an iterator draws a seed from the global one, which dropout uses
    )
    return _finished(iter(loader), dataset.finished, closing)  # the workers start here, not at the first batch


def _unchanged(result: Any) -> Any:
    return result


def _as_bytes(result: Any) -> bytes:
    return pickle.dumps(result)


def _finished(
    results: Iterator[Batch | Read | WorkError | bytes],
    finished: Callable[[Batch | Read | WorkError], Batch],
    closing: Any,
) -> Iterator[Batch]:
    close = functools.partial(setattr, closing, "value", 1)
    atexit.register(close)  # runs before multiprocessing's own, which terminates the workers and waits for them
    try:
        for result in results:
            if isinstance(result, bytes):
                result = pickle.loads(result)
            batch = finished(result)
            yield batch.pin_memory() if torch.cuda.is_available() else batch
    except (EOFError, ConnectionError) as error:
        # The signal of a worker's death comes soon after its connection ends, and torch raises here.
        time.sleep(_SIGNAL_WAIT_S)
        what = f"data.num_workers: a process of the loader ended as it handed over a batch ({type(error).__name__})"
        raise WorkError(f"{what}: run the same command again; where memory is short, lower it") from error
    finally:
        del results  # ends the workers now: a traceback may hold this frame for long
        close()
        atexit.unregister(close)


def _ignore_signals_until_close(closing: Any, worker: int) -> None:
    """A launcher signals every process; the workers must outlast the step that is being finished, and only that."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.value else None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
