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
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mixres.batch import Batch, Sample
from mixres.data.cache import Cache, DamagedEntry
from mixres.data.collate import collate
from mixres.data.plan import Layout, Microbatch, Plan, Rounding
from mixres.errors import UserError, WorkError

_SIGNAL_WAIT_S = 5.0


def samples_of(microbatch: Microbatch, read: Callable[[int], Sample]) -> list[Sample]:
    """The samples as this microbatch trains them: with the empty prompt where the plan drops the caption."""
    samples = zip(microbatch.indices, map(read, microbatch.indices), strict=True)
    return [sample.without_caption() if i in microbatch.dropped else sample for i, sample in samples]


@dataclass(frozen=True)
class MicrobatchDataset(Dataset[Batch | WorkError]):
    """Maps a `Microbatch` of the plan to the `Batch` of its samples.

    A damaged or missing entry comes back as the error, not raised: a worker's exception would arrive as a traceback.
    """

    cache: Cache
    keys: Sequence[str]
    names: Sequence[str]
    layout: Layout
    rounding: Rounding = Rounding()  # noqa: RUF009 - an immutable pair of ones

    def __getitem__(self, microbatch: Microbatch) -> Batch | WorkError:
        try:
            samples = samples_of(microbatch, lambda i: self.cache.read(self.keys[i], name=self.names[i]))
        except (DamagedEntry, FileNotFoundError) as error:
            return WorkError(f"{error}: run the same command again")
        except (UserError, WorkError) as error:
            return WorkError(str(error))
        except OSError as error:
            where = f"{error.filename or self.cache}: cannot be read ({error.strerror or error})"
            return WorkError(f"{where}: run the same command again")
        indices, weights, _ = microbatch
        return collate(samples, indices=indices, weights=weights, layout=self.layout, rounding=self.rounding)


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
    return _raised(iter(loader), closing)  # the workers start here, not at the first batch


def _unchanged(result: Any) -> Any:
    return result


def _as_bytes(result: Any) -> bytes:
    return pickle.dumps(result)


def _raised(results: Iterator[Batch | WorkError | bytes], closing: Any) -> Iterator[Batch]:
    close = functools.partial(setattr, closing, "value", 1)
    atexit.register(close)  # runs before multiprocessing's own, which terminates the workers and waits for them
    try:
        for result in results:
            if isinstance(result, bytes):
                result = pickle.loads(result)
            if isinstance(result, WorkError):
                raise result
            yield result.pin_memory() if torch.cuda.is_available() else result
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
