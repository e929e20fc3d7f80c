"""Where in its data a run is."""

from functools import partial
from typing import Any

import jax
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.sharding import UnreadBatch


class DataPosition:
    """Batches in order, with a position that JSON holds.

    The position is that of whole batches, whatever the number of processes: what comes next does
    not depend on how many there are. Where there are several, each reads its own rows only of data
    that has `rows(position, start, stop)` and `batch_size`, as a `BatchLoader` has; of other data
    each reads all.

    Args:
        data: batches by position (`data[n]`), or an iterator with `get_state` and `set_state`, or
            an iterable of which one can be had.

    Raises:
        UserError: if it is none of these.
    """

    def __init__(self, data: Any):
        self._indexed = hasattr(data, "__getitem__")
        if not self._indexed and not hasattr(data, "__next__"):
            if not hasattr(data, "__iter__"):
                raise UserError(
                    f"train_data is a {type(data).__name__}; give batches by position "
                    "(data[n]), or an iterator of batches with get_state and set_state"
                )
            data = iter(data)
        if not self._indexed and not hasattr(data, "get_state"):
            raise UserError(
                f"train_data is a {type(data).__name__} without get_state and set_state, so a "
                "stopped run could not resume exactly; give batches by position (data[n])"
            )
        self._data = data
        self._position = 0
        self._before: Any = None

    def check(self, config: ModelConfig, steps: int) -> dict[str, np.ndarray]:
        """Looks at one batch before anything is compiled.

        Args:
            config: the model that the batches are for.
            steps: how many batches are needed.

        Returns:
            The batch.

        Raises:
            UserError: if it does not fit the model, or batches by position are too few.
        """
        state = self.save()
        batch = {name: np.asarray(value) for name, value in self._read().items()}
        self.restore(state)
        for name in ("tokens", "targets"):
            if name not in batch:
                raise UserError(f"batches hold {sorted(batch)}, but need {name!r}")
        T, V = batch["tokens"].shape[1], config.vocab_size
        if config.context_length < T:
            raise UserError(
                f"batches have {T} tokens a row, but the model's context is "
                f"{config.context_length}; cut shorter rows or raise context_length"
            )
        for name in (name for name in batch if name.endswith(("tokens", "targets"))):
            largest = int(batch[name].max())
            if largest >= V:
                raise UserError(
                    f"{name} hold id {largest}, but the model's vocab_size is {V}; set vocab_size "
                    "to the tokenizer's"
                )
        if isinstance(self._data, list | tuple) and len(self._data) < steps:
            raise UserError(
                f"train_data has {len(self._data)} batches, but {steps} steps need one each; give "
                "more, or fewer steps"
            )
        return batch

    def next(self) -> dict[str, Any] | UnreadBatch:
        """The next batch.

        Raises:
            UserError: if there is none.
        """
        self._before = self.save()
        if jax.process_count() == 1 or not hasattr(self._data, "rows"):
            return self._read()
        read = partial(self._data.rows, self._position)
        self._position += 1
        return UnreadBatch(self._data.batch_size, read)

    def _read(self) -> dict[str, Any]:
        try:
            batch = self._data[self._position] if self._indexed else next(self._data)
        except (IndexError, StopIteration):
            raise UserError(
                f"train_data ended after {self._position} batches; repeat it, or take fewer steps"
            ) from None
        self._position += 1
        return batch

    def save(self) -> Any:
        """The position of the batch that `next` gives."""
        if self._indexed:
            return {"position": self._position}
        state = self._data.get_state()
        state = state.decode() if isinstance(state, bytes) else state
        return {"position": self._position, "state": state}

    def save_before(self) -> Any:
        """The position of the batch that `next` gave last."""
        return self._before

    def restore(self, saved: Any) -> None:
        """Continues from a saved position."""
        self._position = saved["position"]
        if not self._indexed:
            state = saved["state"]
            was_bytes = isinstance(self._data.get_state(), bytes)
            self._data.set_state(state.encode() if was_bytes else state)
