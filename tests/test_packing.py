"""Packed rows: every target once, examples apart, little fill, the same in every process."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from small_models import GPT2, STYLES, random_params
from small_tokenizers import GPT2 as GPT2_FILES
from small_tokenizers import WITHOUT_GPT2

from gptjax import forward, loss_fn
from gptjax.config import ModelConfig
from gptjax.data import Example, PackedLoader, packed_batches
from gptjax.data.packing import pack_rows
from gptjax.errors import UserError
from gptjax.loss import loss_sums
from gptjax.params import Params
from gptjax.pretrained.tokenizer_files import read_tokenizer

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTIONS = ROOT.parent / "shared" / "assets" / "tasks" / "instruct-rasbt"

KINDS = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
Piece = tuple[tuple[int, ...], tuple[float, ...]]


def draw_examples(rng: np.random.Generator, count: int, longest: int) -> list[Example]:
    """Examples of 2 to `longest` tokens, each with a target that counts."""
    examples = []
    for length in rng.integers(2, longest + 1, count):
        weights = rng.choice([0, 0.5, 1], length, p=[0.2, 0.2, 0.6])
        weights[1] = rng.choice([0.5, 1])
        examples.append(Example(rng.integers(0, 31, length), weights))
    return examples


def piece(tokens: np.ndarray, weights: np.ndarray) -> Piece:
    """An example as something to count: its tokens, and its targets' weights."""
    return tuple(tokens.tolist()), tuple(weights[1:].tolist())


def unpacked(batch: dict[str, np.ndarray]) -> list[list[Piece]]:
    """Reads the examples back out of each row, by its segments alone; checks the layout."""
    rows = []
    for b in range(len(batch["tokens"])):
        row = {name: values[b] for name, values in batch.items()}
        used = int((row["segment_ids"] > 0).sum())
        for values in row.values():
            assert (values[used:] == 0).all()
        found = []
        start = 0
        for segment in range(1, row["segment_ids"].max() + 1):
            (places,) = np.nonzero(row["segment_ids"] == segment)
            assert places.tolist() == list(range(start, start + len(places)))
            assert row["positions"][places].tolist() == list(range(len(places)))
            tokens, targets = row["tokens"][places], row["targets"][places]
            assert (tokens[1:] == targets[:-1]).all()
            weights = row["weights"][places].tolist()
            found.append(((*tokens.tolist(), int(targets[-1])), tuple(weights)))
            start += len(places)
        assert start == used
        rows.append(found)
    return rows


def all_rows(loader: PackedLoader, epochs: int = 1) -> list[list[list[Piece]]]:
    """The rows of each epoch, read batch by batch."""
    per_epoch = round(loader.batches_per_epoch * loader.batch_size)
    batches = (loader[n] for n in range(-(-epochs * per_epoch // loader.batch_size)))
    rows = [row for batch in batches for row in unpacked(batch)]
    return [rows[e * per_epoch : (e + 1) * per_epoch] for e in range(epochs)]


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


def test_each_epoch_has_each_example_once_in_the_same_rows(rng: np.random.Generator) -> None:
    for shuffle in (True, True, True, True, False):
        context = int(rng.integers(1, 40))
        examples = draw_examples(rng, int(rng.integers(1, 120)), context + 1)
        given = Counter(piece(e.tokens, e.weights) for e in examples)
        loader = PackedLoader(
            examples,
            batch_size=int(rng.integers(1, 9)),
            context_length=context,
            seed=int(rng.integers(99)),
            shuffle=shuffle,
        )
        epochs = all_rows(loader, 3)
        for rows in epochs:
            assert Counter(itertools.chain(*rows)) == given
            assert Counter(map(tuple, rows)) == Counter(map(tuple, epochs[0]))
        if not shuffle:
            assert epochs[0] == epochs[1] == epochs[2]
        elif len({tuple(row) for row in epochs[0]}) > 8:
            assert epochs[0] != epochs[1] != epochs[2]


def test_shapes_and_kinds(rng: np.random.Generator) -> None:
    loader = PackedLoader(draw_examples(rng, 50, 13), batch_size=5, context_length=12)
    for position in (0, 3, 10**9):
        batch = loader[position]
        assert {values.shape for values in batch.values()} == {(5, 12)}
        assert batch.pop("weights").dtype == np.float32
        assert {values.dtype for values in batch.values()} == {np.dtype(np.int32)}
        assert batch.keys() == {"tokens", "targets", "segment_ids", "positions"}
    assert loader.tokens_per_batch == 60


def test_rows_are_those_of_the_batch_and_no_others_are_read(rng: np.random.Generator) -> None:
    examples = draw_examples(rng, 60, 17)

    class Counted:
        def __init__(self):
            self.read: list[int] = []

        def __len__(self) -> int:
            return len(examples)

        def __getitem__(self, index: int) -> Example:
            self.read.append(index)
            return examples[index]

    counted = Counted()
    given: dict[str, Any] = {"batch_size": 7, "context_length": 16, "seed": 5}
    lengths = np.array([len(e.tokens) for e in examples], np.uint16)
    loader = PackedLoader(counted, lengths=lengths, **given)
    assert counted.read == []
    plain = PackedLoader(examples, **given)
    for position in range(12):
        whole = loader[position]
        assert same(whole, plain[position])
        cuts = [0, *sorted(rng.choice(np.arange(1, 7), 2, replace=False)), 7]
        counted.read.clear()
        parts = [loader.rows(position, *cut) for cut in itertools.pairwise(cuts)]
        assert len(counted.read) == whole["segment_ids"].max(axis=1).sum()
        joined = {name: np.concatenate([part[name] for part in parts]) for name in whole}
        assert same(joined, whole)
    with pytest.raises(UserError, match="position is -1"):
        loader[-1]


def test_a_batch_depends_on_the_position_alone(rng: np.random.Generator) -> None:
    examples = draw_examples(rng, 400, 17)

    def fresh(seed: int = 3) -> PackedLoader:
        return PackedLoader(examples, batch_size=5, context_length=16, seed=seed)

    straight = [fresh()[n] for n in range(80)]
    one = fresh()
    for position in rng.permutation(80):
        assert same(one[position], straight[position])
    # Another seed packs and orders otherwise.
    rows = {tuple(row) for row in all_rows(one)[0]}
    others = {tuple(row) for row in all_rows(fresh(seed=4))[0]}
    assert len(rows & others) < len(rows) / 2


@pytest.mark.parametrize("largest", [1 << 18, 0], ids=["list", "keyed"])
def test_the_same_in_another_process(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, hashlib, numpy as np\n"
        "import gptjax.data.loader as loader\n"
        "from gptjax.data.packing import PackedLoader\n"
        "loader._LARGEST_PERMUTATION = int(sys.argv[1])\n"
        "lengths = np.random.RandomState(0).randint(2, 18, 5000)\n"
        "documents = [np.arange(i, i + n) for i, n in enumerate(lengths)]\n"
        "packed = PackedLoader(documents, batch_size=3, context_length=16, seed=7)\n"
        "batch = packed[1234]\n"
        "print(hashlib.sha256(b''.join(v.tobytes() for v in batch.values())).hexdigest())\n"
        "bad = {'tensorflow', 'torch', 'jax'} & set(sys.modules)\n"
        "assert not bad or int(sys.argv[1]) == 0, bad\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(largest)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77"},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    monkeypatch.setattr("gptjax.data.loader._LARGEST_PERMUTATION", largest)
    lengths = np.random.RandomState(0).randint(2, 18, 5000)
    documents = [np.arange(i, i + n) for i, n in enumerate(lengths)]
    batch = PackedLoader(documents, batch_size=3, context_length=16, seed=7)[1234]
    digest = hashlib.sha256(b"".join(v.tobytes() for v in batch.values())).hexdigest()
    assert out.strip() == digest


def test_each_row_is_as_full_as_it_can_be(rng: np.random.Generator) -> None:
    """Of what the rows before leave: the largest, and the best that goes with it."""
    for _ in range(100):
        capacity = int(rng.integers(1, 60))
        kinds = rng.integers(1, capacity + 1, rng.choice([2, 4, 60]))
        sizes = rng.choice(kinds, rng.integers(1, 150))
        row_of = pack_rows(sizes, capacity)
        left = Counter(sizes.tolist())
        for row in range(row_of.max() + 1):
            found = sizes[row_of == row]
            largest = max(left.elements())
            assert largest in found
            sums = {largest}
            for size in (left - Counter([largest])).elements():
                sums |= {total + size for total in sums if total + size <= capacity}
            assert found.sum() == max(sums)
            left -= Counter(found.tolist())
        assert not left
    # Two of four equal ones, neither one nor all.
    assert pack_rows(np.array([4, 20, 4, 11, 4, 4]), 39).tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["lognormal", "uniform", "short", "two sizes"])
@pytest.mark.parametrize("context", [512, 1024, 4096])
def test_rows_are_nearly_full(rng: np.random.Generator, kind: str, context: int) -> None:
    lengths = {
        "lognormal": rng.lognormal(5.5, 1.0, 20000),
        "uniform": rng.uniform(2, context + 2, 20000),
        "short": rng.lognormal(3, 0.5, 20000),
        "two sizes": rng.choice([context / 2, context / 8], 20000),
    }[kind]
    lengths = np.clip(lengths.astype(int), 2, context + 1)
    unread = np.empty((20000, 0), np.int32)
    loader = PackedLoader(unread, batch_size=8, context_length=context, lengths=lengths)
    assert loader.fill_rate >= 0.98
    rows = round(loader.batches_per_epoch * 8)
    assert loader.fill_rate == pytest.approx((lengths - 1).sum() / (rows * context))


@pytest.mark.skipif(
    not INSTRUCTIONS.is_dir(), reason="instruct-rasbt is not in ../shared/assets/tasks"
)
@pytest.mark.skipif(not GPT2_FILES.is_dir(), reason=WITHOUT_GPT2)
def test_instructions_fill_rows() -> None:
    tokenizer = read_tokenizer(GPT2_FILES)
    assert tokenizer is not None
    records = json.loads((INSTRUCTIONS / "instruction-data.json").read_text(encoding="utf-8"))
    texts = ["\n\n".join([r["instruction"], r["input"], r["output"]]) for r in records]
    documents = [np.array(tokenizer.encode(text)) for text in texts]
    for context in (256, 512, 1024):
        batches = packed_batches(documents, batch_size=1, context_length=context)
        filled = np.concatenate([batch["segment_ids"][0] > 0 for batch in batches])
        assert filled.sum() == sum(len(d) - 1 for d in documents)
        assert filled.mean() >= 0.98
        loader = PackedLoader(documents, batch_size=1, context_length=context)
        assert loader.fill_rate == pytest.approx(filled.mean())


def test_a_million_examples_take_seconds(rng: np.random.Generator) -> None:
    class Documents:
        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, index: int) -> np.ndarray:
            return np.full(lengths[index], index % 50000)

    lengths = np.clip(rng.lognormal(5.5, 1.0, 10**6).astype(int), 2, 1025)
    begin = time.perf_counter()
    loader = PackedLoader(Documents(), batch_size=8, context_length=1024, lengths=lengths)
    assert time.perf_counter() - begin < 5
    assert loader.fill_rate > 0.999
    for position in rng.integers(0, 10**6, 20):
        loader[position]
    held = sum(x.nbytes for x in vars(loader).values() if isinstance(x, np.ndarray))
    assert held <= 8 * 10**6 + 8 * loader.batches_per_epoch * 8


def loss_sum(params: Params, batch: dict[str, Any], config: ModelConfig) -> jax.Array:
    return loss_sums(params, batch, config)[0]


@STYLES
def test_the_loss_of_packed_examples_is_the_sum_of_each_alone(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    params = random_params(config, rng)
    examples = draw_examples(rng, 40, 9)
    packed = list(packed_batches(examples, batch_size=5, context_length=config.context_length))
    assert max(batch["segment_ids"].max() for batch in packed) > 2
    # Alone in a row, and told of no segments; what follows an example is nothing to it.
    alone = {name: np.zeros((len(examples), 16), kind) for name, kind in KINDS.items()}
    for b, example in enumerate(examples):
        here = (b, slice(len(example.tokens) - 1))
        alone["tokens"][here] = example.tokens[:-1]
        alone["targets"][here] = example.tokens[1:]
        alone["weights"][here] = example.weights[1:]
    gradient = jax.jit(jax.value_and_grad(loss_sum), static_argnums=2)

    def totals(batches: list[dict[str, np.ndarray]]) -> tuple[Any, Params]:
        with jax.default_matmul_precision("highest"):
            results = [gradient(params, batch, config) for batch in batches]
        return jax.tree.map(lambda *x: np.sum(np.array(x, np.float64), axis=0), *results)

    loss, grads = totals(packed)
    rows = [{name: x[b : b + 5] for name, x in alone.items()} for b in range(0, 40, 5)]
    expected, expected_grads = totals(rows)
    assert expected > 0
    assert loss == pytest.approx(float(expected), rel=1e-6)
    norm = sum(np.sum(np.square(x)) for x in jax.tree.leaves(expected_grads))
    off = jax.tree.map(lambda a, b: np.sum(np.square(a - b)), grads, expected_grads)
    assert sum(jax.tree.leaves(off)) <= 1e-12 * norm


@STYLES
def test_an_example_is_nothing_to_the_others_of_its_row(
    config: ModelConfig, rng: np.random.Generator
) -> None:
    config = config.replace(num_layers=1)
    params = random_params(config, rng)
    first, second, third = (Example(rng.integers(0, 31, n), np.ones(n)) for n in (5, 4, 7))
    changed = Example((second.tokens + 7) % 31, np.ones(4))
    given: dict[str, Any] = {"batch_size": 1, "context_length": 16}
    (before,) = packed_batches([first, second, third], **given)
    (after,) = packed_batches([first, changed, third], **given)
    (segment,) = set(before["segment_ids"][before["tokens"] != after["tokens"]])
    others = before["segment_ids"] != segment
    assert len(set(before["segment_ids"][others])) == 3
    # No target of the others is one of its tokens.
    for name in before:
        assert (before[name] == after[name])[others].all()

    @jax.jit
    def logits(batch: dict[str, Any]) -> jax.Array:
        apart = {name: batch[name] for name in ("positions", "segment_ids")}
        return forward(params, batch["tokens"], config, **apart)

    same_logits = np.asarray(logits(before) == logits(after)).all(axis=-1)
    assert (same_logits == others).all()


def test_documents_count_whole(rng: np.random.Generator) -> None:
    documents = [rng.integers(0, 60000, n).astype(np.uint16) for n in rng.integers(2, 20, 50)]
    given = Counter(piece(d, np.ones(len(d))) for d in documents)
    for kind in (documents, [d.tolist() for d in documents]):
        loader = PackedLoader(kind, batch_size=3, context_length=19)
        assert Counter(itertools.chain(*all_rows(loader)[0])) == given


def test_what_is_too_long(rng: np.random.Generator) -> None:
    examples = draw_examples(rng, 40, 60)
    given: dict[str, Any] = {"batch_size": 4, "context_length": 16}
    too_long = [e for e in examples if len(e.tokens) > 17]
    first = next(i for i, e in enumerate(examples) if len(e.tokens) > 17)
    with pytest.raises(
        UserError,
        match=rf"example {first} has {len(examples[first].tokens)} tokens, more than the 17 .*16 "
        rf"\({len(too_long)} of 40",
    ):
        PackedLoader(examples, **given)

    cut = PackedLoader(examples, long="cut", **given)
    expected = Counter(piece(e.tokens[:17], e.weights[:17]) for e in examples)
    assert Counter(itertools.chain(*all_rows(cut)[0])) == expected
    assert (cut.cut, cut.dropped) == (len(too_long), 0)

    with pytest.warns(
        UserWarning, match=rf"left out: 0 of fewer .* {len(too_long)} of more than 17"
    ):
        drop = PackedLoader(examples, long="drop", **given)
    expected = Counter(piece(e.tokens, e.weights) for e in examples if len(e.tokens) <= 17)
    assert Counter(itertools.chain(*all_rows(drop)[0])) == expected
    assert (drop.cut, drop.dropped) == (0, len(too_long))
    assert drop.fill_rate == pytest.approx(
        sum(len(t) - 1 for t, _ in expected.elements()) / (16 * len(all_rows(drop)[0]))
    )


@pytest.mark.parametrize("known", [False, True])
def test_a_split_document_counts_each_target_once(rng: np.random.Generator, known: bool) -> None:
    # Token n follows n - 1 in document n // 1000 only, so pieces say where they are from.
    lengths = [*rng.integers(2, 90, 30), 17, 18, 33, 34]
    examples = [
        Example(1000 * i + np.arange(n), rng.choice([0.5, 1, 2], n)) for i, n in enumerate(lengths)
    ]
    loader = PackedLoader(
        examples,
        batch_size=3,
        context_length=16,
        long="split",
        lengths=np.array(lengths) if known else None,
    )
    targets = Counter()
    for tokens, weights in itertools.chain(*all_rows(loader)[0]):
        assert len(tokens) <= 17
        assert (np.diff(tokens) == 1).all()
        for target, weight in zip(tokens[1:], weights, strict=True):
            assert weight == examples[target // 1000].weights[target % 1000]
            targets[target] += 1
    expected = [1000 * i + t for i, n in enumerate(lengths) for t in range(1, n)]
    assert targets == Counter(expected)


def test_evaluation_has_each_example_once(rng: np.random.Generator) -> None:
    for _ in range(20):
        context, batch_size = (int(n) for n in rng.integers(1, 12, 2))
        examples = draw_examples(rng, int(rng.integers(1, 60)), context + 1)
        batches = list(packed_batches(examples, batch_size=batch_size, context_length=context))
        for batch in batches:
            assert {values.shape for values in batch.values()} == {(batch_size, context)}
        rows = [row for batch in batches for row in unpacked(batch)]
        found = Counter(itertools.chain(*rows))
        assert found == Counter(piece(e.tokens, e.weights) for e in examples)
        empty = [row == [] for row in rows]
        assert sum(empty) < batch_size
        assert not any(empty[: len(rows) - sum(empty)])


def test_nothing_to_learn_is_a_warning_and_no_nan(rng: np.random.Generator) -> None:
    config = GPT2.replace(num_layers=1)
    tokens = rng.integers(0, 31, 9)
    masked = [Example(tokens, np.eye(1, 9)[0])] * 3
    with pytest.warns(UserWarning, match="3 of 3 examples have no target that counts: nothing"):
        loader = PackedLoader(masked, batch_size=2, context_length=16)
    params = random_params(config, rng)
    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnums=2)
    (loss, metrics), grads = gradient(params, loader[0], config)
    assert loss == metrics["tokens"] == 0
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(grads))
    late = Example(tokens, np.eye(1, 9, 8)[0])
    both = [late, Example(tokens, tokens + 1)]
    with pytest.warns(UserWarning, match=r"1 of 2 .* no target .* among their first 5 tokens"):
        PackedLoader(both, batch_size=1, context_length=4, long="cut")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PackedLoader([late], batch_size=1, context_length=8)


def test_short_documents_are_left_out(rng: np.random.Generator) -> None:
    documents = [np.arange(n) for n in (0, 5, 1, 3, 0)]
    message = r"3 of 5 examples are left out: 3 of fewer than 2 tokens, 0 of more than 9"
    with pytest.warns(UserWarning, match=message):
        loader = PackedLoader(documents, batch_size=1, context_length=8)
    assert loader.dropped == 3
    assert loader.fill_rate == 6 / 8


def test_errors(rng: np.random.Generator) -> None:
    examples = draw_examples(rng, 5, 9)
    given: dict[str, Any] = {"batch_size": 2, "context_length": 8}
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "there are no examples"),
        (iter(examples), {}, "examples are a list_iterator: give a list"),
        ([np.arange(1)], {}, "none of 1 examples has 2 to 9 tokens"),
        ([np.arange(10)], {"long": "drop"}, r"none of 1 .*lengths are 10 to 10"),
        (examples, {"long": "trim"}, "long is 'trim': give 'error'"),
        (examples, {"batch_size": 0}, "batch_size is 0"),
        (examples, {"context_length": 0}, "context_length is 0"),
        (examples, {"seed": -1}, "seed is -1"),
        (examples, {"lengths": np.arange(4)}, r"lengths are int64 of shape \(4,\) for 5"),
        (examples, {"lengths": np.ones(5)}, "lengths are float64"),
    ]
    for bad, change, message in cases:
        for build in (PackedLoader, packed_batches):
            if build is packed_batches and "seed" in change:
                continue
            with pytest.raises(UserError, match=message) as caught:
                build(bad, **given | change)
            assert "\n" not in str(caught.value)
    loader = PackedLoader([np.arange(5)], lengths=np.array([4]), **given)
    with pytest.raises(UserError, match="example 0 gives 5 tokens where 4 were counted"):
        loader[0]
    loader = PackedLoader([np.array([3, -100, 2])], **given)
    with pytest.raises(UserError, match=r"tokens hold id -100: .* the weight 0"):
        loader[0]
    for tokens, weights, message in [
        ([1], [1], "an example of 1 tokens has none to predict"),
        ([1, 2], [1], r"2 tokens and weights of shape \(1,\)"),
        ([1, 2], [0, -1], "weights from -1.0 to 0.0"),
        ([1, 2], [0, np.nan], "weights from nan"),
        ([1, 2], [0, np.inf], "to inf"),
        ([1.0, 2], [0, 1], "give a 1-D array of integer ids"),
        ([[1, 2]], [[0, 1]], "give a 1-D array of integer ids"),
        ([-100, 2], [0, 1], "tokens hold id -100"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            Example(np.array(tokens), np.array(weights))
        assert "\n" not in str(caught.value)
