"""Reading ahead of training, with Grain, in threads or in processes of its own.

Nothing of that is part of a position: batches are asked for by their number, as of the loader
itself, and a run may go on with other workers than it began with.
"""

import io
import multiprocessing
import operator
import os
import pickle
import signal
import sys
import threading
import warnings
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gptjax.data.loader import Batch
from gptjax.errors import UserError

# Which rows of every batch: None is all, else `[start, stop)`.
_Part = tuple[int, int] | None


def prefetched(loader: Any, *, workers: int = 0, ahead: int = 4) -> "Prefetched":
    """Reads a loader's batches before they are asked for.

    Args:
        loader: Batches by position, such as a `PackedLoader`, a list, or a `grain.MapDataset`.
        workers: Processes that read; 0 reads in threads of this one, which is enough where most of
            the time is spent waiting for a disk. Each process starts anew and imports the main
            script, whose work must therefore stand under `if __name__ == "__main__":`; it maps
            memory-mapped arrays again and is sent a copy of all else that the loader holds.
        ahead: Batches that each worker reads ahead, or this process.

    Returns:
        The same batches by position, as `gptjax.fit` takes them.

    Raises:
        UserError: An argument is not legal.
    """
    if not hasattr(loader, "__getitem__"):
        raise UserError(
            f"loader is a {type(loader).__name__}: give batches by position (loader[n]), for "
            "example a BatchLoader"
        )
    workers, ahead = operator.index(workers), operator.index(ahead)
    if workers < 0:
        raise UserError(f"workers is {workers}: give 0 or more")
    # As Python itself tells, but before a script goes through all its work again in a worker.
    if workers and getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            f"workers={workers}: each imports the main script, which begins its work by that; put "
            'it under if __name__ == "__main__":'
        )
    if ahead < 1:
        raise UserError(f"ahead is {ahead}: give 1 or more")
    kind = _PrefetchedRows if hasattr(loader, "rows") else Prefetched
    return kind(loader, workers, ahead)


class Prefetched:
    """A loader whose next batches are being read. See `prefetched`.

    Reading ahead begins where a second batch follows the first; a batch that does not follow is
    read when it is asked for. The workers end with the process, with `close`, or when the object
    is dropped.
    """

    def __init__(self, loader: Any, workers: int, ahead: int):
        self._loader = loader
        self._workers = workers
        self._ahead = ahead
        self._streams: dict[_Part, _Stream] = {}
        # At its end Python calls this while Grain still has what closing takes.
        weakref.finalize(self, _close, self._streams)

    def __getattr__(self, name: str) -> Any:
        """What the loader has beside batches, such as `batch_size`."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __getitem__(self, position: int) -> Batch:
        """Returns the batch at a position."""
        return self._get(operator.index(position), None)

    def close(self) -> None:
        """Ends the workers. They begin anew where batches are asked for again."""
        _close(self._streams)

    def _get(self, position: int, part: _Part) -> Batch:
        stream = self._streams.pop(part, None)
        if stream is not None and stream.next != position:
            stream.close()
            stream = None
        if stream is None:
            batch = _read(self._loader, position, part)
            self._streams[part] = _Stream(position + 1)
            return batch
        if stream.batches is None:
            source = _Source(self._loader, position, part)
            stream.batches = _read_ahead(source, self._workers, self._ahead)
        try:
            batch = next(stream.batches)
        except Exception as error:
            stream.close()
            # Where the loader is at fault, this raises its own error.
            batch = _read(self._loader, position, part)
            warnings.warn(
                f"reading ahead with workers={self._workers} ended by {type(error).__name__}: "
                f"{error}; batches are now read in the process that trains (a script that uses "
                'workers must do its work under if __name__ == "__main__":)',
                stacklevel=3,
            )
            self._workers = 0
            stream = _Stream(position)
        stream.next += 1
        self._streams[part] = stream
        return batch


class _PrefetchedRows(Prefetched):
    """Of a loader by whose rows several processes that train share a batch."""

    def rows(self, position: int, start: int, stop: int) -> Batch:
        """Returns rows `[start, stop)` of the batch at a position, and reads no others."""
        return self._get(operator.index(position), (start, stop))


@dataclass
class _Stream:
    """Batches that follow each other.

    Attributes:
        next: The position of the next one.
        batches: Grain's iterator of them, once there is a need for it.
    """

    next: int
    batches: Any = None

    def close(self) -> None:
        if self.batches is not None:
            self.batches.close()


def _close(streams: dict[_Part, _Stream]) -> None:
    while streams:
        streams.popitem()[1].close()


def _read(loader: Any, position: int, part: _Part) -> Batch:
    return loader[position] if part is None else loader.rows(position, *part)


@dataclass
class _Source:
    """A loader's batches from one on, as Grain takes and sends them."""

    loader: Any
    first: int
    part: _Part

    def __len__(self) -> int:
        # Without end, for Grain: where a loader has one, it raises IndexError.
        return 2**62

    def __getitem__(self, index: int) -> Batch:
        return _read(self.loader, self.first + index, self.part)

    def __reduce__(self) -> Any:
        return _unpickled, (_pickled((self.loader, self.first, self.part)),)


def _read_ahead(source: _Source, workers: int, ahead: int) -> Any:
    import grain
    from absl import flags

    batches = grain.MapDataset.source(source)
    if workers == 0:
        return iter(batches.to_iter_dataset(grain.ReadOptions(ahead, ahead)))
    if not flags.FLAGS.is_parsed():
        # Grain reads its options from absl's flags, which only absl's own scripts parse.
        flags.FLAGS.mark_as_parsed()
    # Batches come through pipes: in containers shared memory is often no more than 64 MB.
    options = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    in_worker = batches.to_iter_dataset(grain.ReadOptions(0, 0))
    in_worker = grain.experimental.WithOptionsIterDataset(in_worker, options)
    return iter(
        in_worker.mp_prefetch(
            grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead),
            worker_init_fn=_begin_worker,
        )
    )


def _begin_worker(index: int, count: int) -> None:
    """Lets a worker end when its parent does, and not before."""
    # A terminal sends Ctrl-C to all; the parent may want batches until it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _pickled(value: Any) -> bytes:
    import cloudpickle

    class Pickler(cloudpickle.Pickler):
        dispatch_table: ClassVar[Any] = {
            **cloudpickle.Pickler.dispatch_table,
            np.ndarray: _reduced,
            np.memmap: _reduced,
        }

    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def _unpickled(data: bytes) -> _Source:
    return _Source(*pickle.loads(data))


def _reduced(array: np.ndarray) -> Any:
    """Gives of a memory-mapped array where it is, not what it holds."""
    whole: Any = array
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    in_file = isinstance(whole, np.memmap) and whole.filename and whole.mode != "c"
    if not in_file or not array.flags.c_contiguous or not array.size:
        return array.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    offset = whole.offset + array.ctypes.data - whole.ctypes.data
    return np.memmap, (str(whole.filename), array.dtype, "r", offset, array.shape)
