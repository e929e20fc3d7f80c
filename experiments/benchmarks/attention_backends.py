"""Checks every way of computing attention on the device here against plain attention, and times it.

    python experiments/benchmarks/attention_backends.py --json attention.json

On a GPU cuDNN's kernels are held to XLA's products, on a TPU the splash kernel: values and
gradients, with and without documents (of random lengths, and ids that come back), shared key heads,
windows, and several lengths and head widths. On a CPU there are only the products, which are held
to float64. A row is a case: how far it is off, and the milliseconds of forward and backward.
The exit status is 1 where a difference is too large.
"""

import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.attention import Backend, attention, choose_backend
from gptjax.command_line import configure_jax, parse_flags, run_command
from gptjax.errors import UserError

TOLERANCE = 0.02
"""Of bfloat16, in which both sides round, in other places: some tenths of a percent. A window that
is one key too long shows as more."""


@dataclass(frozen=True)
class Case:
    """The shapes of one comparison.

    Attributes:
        rows: B.
        length: T.
        heads: H.
        kv_heads: K.
        head_width: C.
        documents: how many each row has, of random lengths; 0 gives no ids at all.
        window: how many keys back a query sees; None is all.
    """

    rows: int
    length: int
    heads: int
    kv_heads: int
    head_width: int
    documents: int = 0
    window: int | None = None


CASES = (
    # GPT-2 124M, as it is trained, and with documents packed into its rows.
    Case(8, 1024, 12, 12, 64),
    Case(8, 1024, 12, 12, 64, documents=5),
    Case(4, 2048, 16, 4, 128),
    Case(4, 2048, 16, 4, 128, documents=9),
    Case(2, 4096, 16, 8, 128, documents=20),
    Case(2, 2048, 8, 1, 80, window=512),
    Case(2, 1026, 8, 2, 96, documents=7, window=100),
    Case(2, 1024, 4, 4, 256),
    Case(1, 8192, 12, 12, 64),
    # Short texts, as evaluation sends them.
    Case(3, 34, 4, 2, 64),
    Case(3, 34, 4, 2, 64, documents=3),
    Case(3, 2, 4, 2, 64),
)
"""What is checked on an accelerator."""

SMALL = (
    Case(2, 64, 4, 2, 16),
    Case(2, 66, 3, 1, 8, documents=4),
    Case(1, 96, 2, 2, 8, window=20),
    Case(3, 34, 4, 2, 64),
    Case(3, 2, 4, 2, 64),
)
"""What is checked on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Checks and times the backends of attention.

    Attributes:
        turns: How often each is timed.
        seed: Of the inputs.
        json: A file to write the results to.
    """

    turns: int = 10
    seed: int = 0
    json: Path | None = None


def random_segments(case: Case, rng: np.random.Generator) -> np.ndarray | None:
    """Document ids, `[B, T]` int32: contiguous in even rows; in odd ones an id may come back."""
    if case.documents == 0:
        return None
    starts = rng.integers(1, case.length, (case.rows, case.documents - 1))
    ids = np.sum(np.arange(case.length) >= starts[..., None], axis=1)
    ids[1::2] %= max(case.documents // 2, 1)
    return ids.astype(np.int32)


def check_backends(*, turns: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    """Checks and times attention on the default device.

    Args:
        turns: how often each is timed.
        seed: of the inputs.

    Returns:
        For each case a dict: `case` (its fields), `backend` and `reason` (see `Backend`), `against`
        ("plain" or "float64"), `error` and `gradient_error` (the norm of the difference as a share
        of the norm, of the worst gradient), `ok`, and the medians `milliseconds` and
        `plain_milliseconds` of forward and backward. Where plain attention does not fit, what is
        compared with it is None, and `ok` too. Where a case fails, `ok` is False and `reason` the
        error.
    """
    rng = np.random.default_rng(seed)
    on_cpu = jax.default_backend() == "cpu"
    results = []
    for case in SMALL if on_cpu else CASES:
        try:
            result = _check_exactly(case, rng) if on_cpu else _check(case, turns, rng)
        except Exception as error:  # A kernel may raise anything; the other cases are still told.
            result = _failed(case, error, jnp.float32 if on_cpu else jnp.bfloat16)
            result["against"] = "float64" if on_cpu else "plain"
        results.append(result)
    return results


def _inputs(case: Case, dtype: Any, rng: np.random.Generator) -> tuple[list[jax.Array], Any]:
    """Queries, keys, values, what the output is multiplied with; and the options of attention."""
    B, T, H, K, C = case.rows, case.length, case.heads, case.kv_heads, case.head_width
    shapes = ((B, T, H, C), (B, T, K, C), (B, T, K, C), (B, T, H, C))
    arrays = [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes]
    ids = random_segments(case, rng)
    segments = None if ids is None else jnp.asarray(ids)
    window = None if case.window is None else jnp.int32(case.window)
    return arrays, {"query_segments": segments, "key_segments": segments, "window": window}


def _both_passes(options: dict[str, Any], plain: bool) -> Callable[..., Any]:
    """A compiled function from the arrays to the output and the gradients."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        # Slots that are spelled out are what the kernels do not take, whatever they are.
        slots = jnp.arange(q.shape[1]) if plain else None
        out, pull_back = jax.vjp(lambda *x: attention(*x, query_slots=slots, **options), q, k, v)
        return out, pull_back(g)

    return jax.jit(both)


def _check(case: Case, turns: int, rng: np.random.Generator) -> dict[str, Any]:
    arrays, options = _inputs(case, jnp.bfloat16, rng)
    backend = _backend(case, jnp.bfloat16)
    result = _row(case, backend, "plain")
    kernel = _both_passes(options, plain=False)
    out, grads = jax.block_until_ready(kernel(*arrays))
    result["milliseconds"] = _milliseconds(kernel, arrays, turns)
    try:
        plain = _both_passes(options, plain=True)
        expected, expected_grads = jax.block_until_ready(plain(*arrays))
        result["plain_milliseconds"] = _milliseconds(plain, arrays, turns)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return result
    result["error"] = _difference(out, expected)
    result["gradient_error"] = float(np.max([*map(_difference, grads, expected_grads)]))
    # What is no number is within no tolerance.
    result["ok"] = result["error"] <= TOLERANCE and result["gradient_error"] <= TOLERANCE
    return result


def _check_exactly(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    """Plain attention in float32 against float64, the gradient by its definition."""
    (q, k, v, g), options = _inputs(case, jnp.float32, rng)
    result = _row(case, _backend(case, jnp.float32), "float64")
    out, grads = _both_passes(options, plain=False)(q, k, v, g)
    ids = options["query_segments"]
    slots = np.arange(case.length)
    visible = np.tri(case.length, dtype=bool)[None]
    if ids is not None:
        visible = visible & (np.asarray(ids)[:, :, None] == np.asarray(ids)[:, None, :])
    if case.window is not None:
        visible = visible & (slots > slots[:, None] - case.window)
    arrays = [np.asarray(x, float) for x in (q, k, v, g)]
    expected, expected_grads = exact_attention(arrays, visible)
    result["error"] = _difference(out, expected)
    result["gradient_error"] = float(np.max([*map(_difference, grads, expected_grads)]))
    result["ok"] = result["error"] <= 1e-5 and result["gradient_error"] <= 1e-5
    return result


def exact_attention(
    arrays: list[np.ndarray], visible: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Attention and its gradients in float64.

    Args:
        arrays: queries `[B, T, H, C]`, keys and values `[B, T, K, C]`, and the output's gradient.
        visible: `[B or 1, T, T]` bool, queries first.

    Returns:
        The output, and the gradients of q, k and v.
    """
    q, k, v, g = arrays
    groups, scale = q.shape[2] // k.shape[2], 1 / math.sqrt(q.shape[3])
    keys, values = (np.repeat(x, groups, axis=2) for x in (k, v))
    scores = np.where(visible[:, None], np.einsum("bthc,bshc->bhts", q, keys) * scale, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    grad_p = np.einsum("bthc,bshc->bhts", g, values)
    grad_scores = p * (grad_p - np.sum(p * grad_p, axis=-1, keepdims=True)) * scale

    def by_key_head(x: np.ndarray) -> np.ndarray:
        B, T, H, C = x.shape
        return x.reshape(B, T, H // groups, groups, C).sum(axis=3)

    grads = (
        np.einsum("bhts,bshc->bthc", grad_scores, keys),
        by_key_head(np.einsum("bhts,bthc->bshc", grad_scores, q)),
        by_key_head(np.einsum("bhts,bthc->bshc", p, g)),
    )
    return np.einsum("bhts,bshc->bthc", p, values), grads


def _backend(case: Case, dtype: Any) -> Backend:
    shape = (case.rows, case.length, case.heads, case.head_width)
    return choose_backend(shape, case.kv_heads, dtype, windowed=case.window is not None)


def _row(case: Case, backend: Backend, against: str) -> dict[str, Any]:
    measured = ("error", "gradient_error", "ok", "milliseconds", "plain_milliseconds")
    return {
        "case": asdict(case),
        "backend": backend.name,
        "reason": backend.reason,
        "against": against,
        **dict.fromkeys(measured),
    }


def _failed(case: Case, error: Exception, dtype: Any) -> dict[str, Any]:
    """The result of a case that raised."""
    backend = None
    with contextlib.suppress(Exception):
        backend = _backend(case, dtype)
    result = _row(case, backend or Backend("plain", ""), "")
    if backend is None:
        result["backend"] = "unknown"
    return result | {"ok": False, "reason": f"{type(error).__name__}: {error}"[:300]}


def _difference(got: Any, expected: Any) -> float:
    got, expected = (np.asarray(jnp.asarray(x, jnp.float32), np.float64) for x in (got, expected))
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def _milliseconds(function: Callable[..., Any], arrays: list[jax.Array], turns: int) -> float:
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def table(results: list[dict[str, Any]]) -> str:
    """The results of `check_backends`, a line a case."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    shape = ("B", "T", "H", "K", "C", "docs", "window")
    head = (*shape, "backend", "error", "gradients", "ms", "plain")
    rows = [
        (
            *(shown(value, "") for value in result["case"].values()),
            result["backend"],
            shown(result["error"], ".1e"),
            shown(result["gradient_error"], ".1e"),
            shown(result["milliseconds"], ".2f"),
            shown(result["plain_milliseconds"], ".2f"),
        )
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for row in (head, *rows)
    )


def main() -> None:
    """Prints the table, and the reason wherever no kernel is taken."""
    settings = parse_flags(Settings, Settings(), __doc__ or "")
    if settings.turns < 1:
        raise UserError(f"turns is {settings.turns}; at least 1")
    configure_jax()
    results = check_backends(turns=settings.turns, seed=settings.seed)
    print(table(results))
    raised = [row for row in results if row["ok"] is False and row["error"] is None]
    plain = [row for row in results if row["backend"] == "plain" and row not in raised]
    for reason in dict.fromkeys(row["reason"] for row in plain):
        print(f"plain: {reason}")
    for row in raised:
        print(f"failed: {row['case']}: {row['reason']}")
    if settings.json is not None:
        settings.json.write_text(json.dumps(results, indent=1) + "\n")
    far = [row["case"] for row in results if row["ok"] is False and row not in raised]
    if far:
        print(f"too far from {results[0]['against']}: {far}", file=sys.stderr)
    if far or raised:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
