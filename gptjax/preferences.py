"""Direct preference optimization: pairs of completions of which one is preferred."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import ModelConfig
from gptjax.data.loader import Batch, Loader, check_seed, check_shape, epoch_places
from gptjax.data.packing import Example
from gptjax.errors import UserError
from gptjax.experts import Routing, routing_losses
from gptjax.loss import LossOptions, target_weights, token_nll
from gptjax.model import hidden_states, unembedding
from gptjax.params import Params
from gptjax.sharding import place_batch

_REJECTED = "rejected_"
_REFERENCE = "reference_nll"


class Preference(NamedTuple):
    """Two answers to one prompt, the prompt included, whose weights count the answers' tokens."""

    chosen: Example
    """The one that is preferred."""
    rejected: Example
    """The other."""


@dataclass(frozen=True)
class DPO:
    """The objective of Rafailov et al. 2023, equation 7, for `fit` and `make_train_step`.

    -log σ(β · ((log π(chosen) - log π_ref(chosen)) - (log π(rejected) - log π_ref(rejected)))),
    averaged over pairs. The reference is the model that training starts from; what it says of the
    data is computed once, by `PreferenceLoader.with_reference`.

    A batch is one of `PreferenceLoader`. Metrics: `loss`, `accuracy`, the share of pairs whose
    preferred answer gained more than the other, and `margin`, the mean of the term in parentheses
    times β.

    Attributes:
        beta: how hard the model is held to the reference.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"beta is {self.beta}; above 0")

    def __call__(
        self,
        params: Params,
        batch: dict[str, jax.Array],
        config: ModelConfig,
        *,
        options: LossOptions,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The sums over pairs, see `loss.Objective`."""
        if _REFERENCE not in batch:
            raise UserError(
                "the batches have no log-probabilities of the reference; give those of "
                "PreferenceLoader(...).with_reference(params, config)"
            )
        if options.z_loss:
            raise UserError(f"z_loss is {options.z_loss}, which DPO does not have; set it to 0")
        nll_2BT, weights_2BT, references_2BT, routing = _both(
            params, batch, config, options=options, dropout_key=dropout_key
        )
        gains_B2 = jnp.sum((references_2BT - nll_2BT) * weights_2BT, axis=-1).reshape(-1, 2)
        # A pair of which an answer has no tokens, as in the filling of a batch, does not count.
        counts_B = jnp.all(jnp.sum(weights_2BT, axis=-1).reshape(-1, 2) > 0, axis=-1)
        margin_B = self.beta * (gains_B2[:, 0] - gains_B2[:, 1])
        loss = jnp.sum(jnp.where(counts_B, -jax.nn.log_sigmoid(margin_B), 0))
        sums = {
            "nll": loss,
            "tokens": jnp.sum(weights_2BT),
            "targets": jnp.sum(counts_B, dtype=jnp.float32),
            "accuracy": jnp.sum((margin_B > 0) & counts_B, dtype=jnp.float32),
            "margin": jnp.sum(jnp.where(counts_B, margin_B, 0)),
        }
        objective = loss
        if routing is not None:
            balance, z = routing_losses(routing)
            pairs = sums["targets"]
            objective += pairs * (options.balance_loss * balance + options.router_z_loss * z)
            sums |= {"balance_loss": pairs * balance, "router_z_loss": pairs * z}
        return objective, jax.tree.map(jax.lax.stop_gradient, sums)


def _both(
    params: Params,
    batch: dict[str, jax.Array],
    config: ModelConfig,
    *,
    options: LossOptions,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, Routing | None]:
    """Cross-entropies, weights and references of chosen and rejected answers in turn, `[2B, T]`.

    In turn, so that rows that are split over devices stay where they are. And what routers did.
    """

    def interleaved(chosen_BT: jax.Array, rejected_BT: jax.Array) -> jax.Array:
        both = jnp.stack([chosen_BT, rejected_BT], axis=1)
        return both.reshape(-1, *chosen_BT.shape[1:])

    names = ("tokens", "targets", "weights")
    tokens, targets, weights = (interleaved(batch[n], batch[_REJECTED + n]) for n in names)
    hidden = hidden_states(params, tokens, config, dropout_key=dropout_key)
    nll = token_nll(
        hidden.x_BTD,
        unembedding(params, config),
        jnp.maximum(targets, 0),
        config.logit_softcap,
        options,
    )
    weights = target_weights({"targets": targets, "weights": weights})
    reference = jnp.zeros_like(nll)
    if _REFERENCE in batch:
        reference = interleaved(batch[_REFERENCE], batch[_REJECTED + _REFERENCE])
    return nll, weights, reference, hidden.routing


class PreferenceLoader(Loader):
    """Batches of pairs by position, in an order of its own for each epoch.

    A batch has `tokens`, `targets` and `weights` `[B, T]` of the preferred answers, and the same of
    the others as `rejected_tokens` and so on: row by row a pair. With a reference also
    `reference_nll` and `rejected_reference_nll`, `[B, T]` float32.
    """

    def __init__(
        self,
        pairs: Sequence[Preference],
        *,
        batch_size: int,
        context_length: int,
        seed: int = 0,
        shuffle: bool = True,
    ):
        """Takes the pairs.

        Args:
            pairs: at least one; each answer of at most `context_length` + 1 tokens.
            batch_size: B, pairs a batch.
            context_length: T.
            seed: of the order, not negative.
            shuffle: False gives the pairs in order, every epoch the same.

        Raises:
            UserError: if there are none, one is too long, or an argument is not legal.
        """
        check_seed(seed)
        if not len(pairs):
            raise UserError("there are no preference pairs; give at least one")
        check_shape(batch_size, context_length)
        silent = sum(not all(answer.weights[1:].any() for answer in pair) for pair in pairs)
        if silent:
            warnings.warn(
                f"{silent} of {len(pairs)} pairs have an answer without a token that counts, and "
                "count nothing",
                stacklevel=2,
            )
        for number, pair in enumerate(pairs):
            longest = max(len(answer.tokens) for answer in pair)
            if longest > context_length + 1:
                raise UserError(
                    f"pair {number} has an answer of {longest} tokens with its prompt; the context "
                    f"holds {context_length} and the last one's target: raise it or leave it out"
                )
        self.pairs = pairs
        self.batch_size = batch_size
        self.context_length = context_length
        self.seed = seed
        self.shuffle = shuffle
        self._reference: list[tuple[np.ndarray, np.ndarray]] | None = None

    @property
    def batches_per_epoch(self) -> float:
        """How many batches hold every pair once; seldom whole."""
        return len(self.pairs) / self.batch_size

    def read(self, rows: np.ndarray) -> Batch:
        """Returns the pairs of these global numbers, 0 or more each, in their order.

        Returns:
            A batch whose arrays are `[n, T]`.
        """
        places, _ = epoch_places(rows, len(self.pairs), self.seed if self.shuffle else None)
        return self._batch(places.tolist(), len(rows))

    def in_order(self) -> Iterator[Batch]:
        """Yields every pair once, in batches of one shape filled up with pairs of no weight.

        Yields:
            A batch whose arrays are `[B, T]`.
        """
        for start in range(0, len(self.pairs), self.batch_size):
            end = min(start + self.batch_size, len(self.pairs))
            yield self._batch(range(start, end), self.batch_size)

    def with_reference(
        self,
        params: Params,
        config: ModelConfig,
        mesh: Mesh | None = None,
        *,
        options: LossOptions = LossOptions(),
    ) -> "PreferenceLoader":
        """The same with what a model says of every pair, which `DPO` compares with.

        Held for each token of a row: 8 bytes a pair and token of the context.

        Args:
            params: the reference's, usually those that training starts from.
            config: the model.
            mesh: over which the parameters lie and pairs are split, one process's; None is the
                default device.
            options: how logits are computed.

        Returns:
            A loader of the same pairs in the same order.
        """
        new = PreferenceLoader(
            self.pairs,
            batch_size=self.batch_size,
            context_length=self.context_length,
            seed=self.seed,
            shuffle=self.shuffle,
        )
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in self.in_order():
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                nll = _read_both(params, place_batch(batch, mesh), config, options)
            nll = np.asarray(nll)
            found += zip(nll[0::2], nll[1::2], strict=True)
        new._reference = found[: len(self.pairs)]
        return new

    def _batch(self, places: Sequence[int], rows: int) -> Batch:
        batch, shape = {}, (rows, self.context_length)
        for side, prefix in enumerate(("", _REJECTED)):
            tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
            weights = np.zeros(shape, np.float32)
            for row, place in enumerate(places):
                answer = self.pairs[place][side]
                length = len(answer.tokens) - 1
                tokens[row, :length] = answer.tokens[:-1]
                targets[row, :length] = answer.tokens[1:]
                weights[row, :length] = answer.weights[1:]
            batch |= {f"{prefix}tokens": tokens, f"{prefix}targets": targets}
            batch[f"{prefix}weights"] = weights
            if self._reference is not None:
                reference = np.zeros(shape, np.float32)
                reference[: len(places)] = [self._reference[place][side] for place in places]
                batch[prefix + _REFERENCE] = reference
        return batch


@partial(jax.jit, static_argnames=("config", "options"))
def _read_both(
    params: Params, batch: dict[str, Any], config: ModelConfig, options: LossOptions
) -> jax.Array:
    return _both(params, batch, config, options=options)[0]
