"""Reading ahead: the same stream with any workers, after any stop, and no process left behind."""

import gc
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
from processes import alive, all_end
from small_models import GPT2

from gptjax.config import preset
from gptjax.data import BatchLoader, Mixture, PackedLoader, prefetched
from gptjax.data.loader import Loader
from gptjax.data.position import DataPosition
from gptjax.data.prefetch import _pickled
from gptjax.errors import UserError
from gptjax.fitting import FitResult, fit

ROOT = Path(__file__).resolve().parents[1]
# Nor does a batch come by another way than was asked for, but where a test says so.
pytestmark = pytest.mark.filterwarnings("error:reading ahead")
GIVEN: dict[str, Any] = {"batch_size": 3, "context_length": 16}


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


def mapped(folder: Path, rng: np.random.Generator, count: int = 3000) -> np.memmap:
    path = folder / "tokens.bin"
    rng.integers(0, 99, count).astype(np.uint16).tofile(path)
    return np.memmap(path, np.uint16, "r")


def draw_loader(rng: np.random.Generator, folder: Path) -> Loader:
    """Windows of a memory map, packed examples, or both."""
    seed = int(rng.integers(99))
    windows = BatchLoader(mapped(folder, rng), seed=seed, **GIVEN)
    documents = [rng.integers(0, 99, n) for n in rng.integers(2, 18, 100)]
    packed = PackedLoader(documents, seed=seed, **GIVEN)
    mixture = Mixture([windows, packed], [2, 1], batch_size=5, seed=seed)
    return [windows, packed, mixture][rng.integers(3)]


@pytest.mark.parametrize(
    ("processes", "changes"), [(1, [0, 1, 2, 3, None]), (2, [0, 2, None])], ids=["batches", "rows"]
)
def test_stops_and_other_workers_give_one_stream(
    processes: int, changes: list[int | None], tmp_path: Path, rng: np.random.Generator
) -> None:
    """In any order of `changes`, None being the loader itself.

    Of several processes each reads its rows of each batch only.
    """
    loader = draw_loader(rng, tmp_path)
    saved = json.dumps(DataPosition(loader).save())
    position = 0
    for workers in rng.permutation(np.array(changes, object)):
        ahead = int(rng.integers(1, 5))
        source: Any = loader
        if workers is not None:
            source = prefetched(loader, workers=workers, ahead=ahead)
        data = DataPosition(source)
        data.restore(json.loads(saved))
        for _ in range(rng.integers(2, 25)):
            expected = loader[position]
            if processes == 1:
                assert same(data.next(), expected)
            else:
                part = source.rows(data.save()["position"], 1, 3)
                assert same(part, {name: values[1:3] for name, values in expected.items()})
                data.restore({"position": data.save()["position"] + 1})
            position += 1
        saved = json.dumps(data.save())
        assert json.loads(saved) == {"position": position}
        del source, data
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_any_order_of_positions(workers: int, tmp_path: Path, rng: np.random.Generator) -> None:
    loader = draw_loader(rng, tmp_path)
    ahead = prefetched(loader, workers=workers, ahead=3)
    # Steps forth, a look back, steps from there.
    for position in (5, 5, 6, 7, 7, 0, 1, 40, 3):
        assert same(ahead[position], loader[position])
    ahead.close()
    assert multiprocessing.active_children() == []
    assert same(ahead[4], loader[4])
    assert same(ahead[5], loader[5])
    ahead.close()
    assert (ahead.batch_size, ahead.tokens_per_batch) == (loader.batch_size, loader.batch_size * 16)


def test_one_look_begins_no_workers(tmp_path: Path, rng: np.random.Generator) -> None:
    ahead = prefetched(draw_loader(rng, tmp_path), workers=2)
    data = DataPosition(ahead)
    data.check(preset("char-gpt").replace(vocab_size=99, context_length=16), steps=5)
    data.next()
    ahead.rows(0, 0, 1)
    assert multiprocessing.active_children() == []


def test_batches_are_read_before_they_are_asked_for() -> None:
    read: list[int] = []

    class Recorded:
        def __getitem__(self, position: int) -> dict[str, np.ndarray]:
            read.append(position)
            return {"tokens": np.full((1, 1), position)}

    ahead = prefetched(Recorded(), ahead=3)
    assert not hasattr(ahead, "rows")
    for position in range(2):
        assert ahead[position]["tokens"] == position
    begin = time.perf_counter()
    while len(read) < 5 and time.perf_counter() - begin < 10:
        time.sleep(0.01)
    assert sorted(read) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 1])
def test_other_data_by_position(workers: int, rng: np.random.Generator) -> None:
    import grain

    batches = [{"tokens": np.full((1, 2), n)} for n in range(7)]
    data = DataPosition(prefetched(batches, workers=workers))
    assert all(same(data.next(), batch) for batch in batches)
    with pytest.raises(UserError, match="train_data ended after 7 batches"):
        data.next()
    # Whose positions go round without end.
    dataset = grain.MapDataset.source(batches).map(lambda x: {"more": x["tokens"] + 1})
    ahead = prefetched(dataset, workers=workers)
    for position in range(5, 12):
        assert same(ahead[position], {"more": batches[position % 7]["tokens"] + 1})


class Broken:
    """Batches of which one cannot be read."""

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        if position == 3:
            raise UserError("batch 3 is gone: look for it")
        return {"tokens": np.full((1, 1), position)}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_loader_is_its_own(workers: int) -> None:
    ahead = prefetched(Broken(), workers=workers)
    for position in range(3):
        assert ahead[position]["tokens"] == position
    with pytest.raises(UserError, match=r"^batch 3 is gone: look for it$"):
        ahead[3]
    for position in (4, 5, 6):
        assert ahead[position]["tokens"] == position
    ahead.close()


def test_a_worker_that_dies_costs_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    loader = draw_loader(rng, tmp_path)
    ahead = prefetched(loader, workers=2, ahead=1)
    for position in range(3):
        assert same(ahead[position], loader[position])
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.warns(UserWarning, match=r"workers=2 ended by RuntimeError: .*read in the process"):
        batches = [ahead[position] for position in range(3, 12)]
    assert all(same(batch, loader[n]) for n, batch in enumerate(batches, 3))
    assert multiprocessing.active_children() == []
    for position in range(12, 20):
        assert same(ahead[position], loader[position])


def test_memory_maps_are_mapped_again(tmp_path: Path, rng: np.random.Generator) -> None:
    tokens = mapped(tmp_path, rng, 10**6)
    whole = np.asarray(tokens)
    for array in (tokens, whole, tokens[123:], whole[99:][1:], tokens[10:20].reshape(2, 5)):
        sent = _pickled(array)
        assert len(sent) < 1000
        assert (pickle.loads(sent) == array).all()
    offset = np.memmap(tmp_path / "tokens.bin", np.uint16, "r", offset=10000, shape=(5000,))
    assert (pickle.loads(_pickled(offset[7:])) == whole[5007:10000]).all()
    for array in (whole[::2], whole[::-1], whole[:0], whole + 1, np.arange(5)):
        assert (pickle.loads(_pickled(array)) == array).all()
    private = np.memmap(tmp_path / "tokens.bin", np.uint16, "c")
    private[:5] = 7
    assert (pickle.loads(_pickled(private)) == private).all()
    assert len(_pickled(BatchLoader(tokens[1:], **GIVEN))) < 1000


def test_a_dropped_reader_ends_its_workers(tmp_path: Path, rng: np.random.Generator) -> None:
    ahead = prefetched(draw_loader(rng, tmp_path), workers=2)
    for position in range(4):
        ahead[position]
    assert len(multiprocessing.active_children()) == 2
    gc.disable()
    try:
        del ahead
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


@pytest.mark.slow
def test_fit_goes_on_with_other_workers(tmp_path: Path, rng: np.random.Generator) -> None:
    documents = [rng.integers(0, 31, n) for n in rng.integers(2, 18, 100)]
    loader = PackedLoader(documents, batch_size=2, context_length=16)

    def run(name: str, data: Any, steps: int) -> FitResult:
        given: dict[str, Any] = {"steps": steps, "out": tmp_path / name, "progress": False}
        return fit(GPT2.replace(num_layers=1), optax.adam(1e-3), data, **given)

    straight = run("straight", loader, 8)
    assert run("stopped", prefetched(loader, workers=2), 3).summary != straight.summary
    run("stopped", prefetched(loader, workers=0), 5)
    resumed = run("stopped", prefetched(loader, workers=1), 8)
    assert resumed.summary["params_sha256"] == straight.summary["params_sha256"]


SCRIPT = """
import multiprocessing, sys, time
import numpy as np
from gptjax.data import BatchLoader, prefetched

if __name__ == "__main__":
    loader = BatchLoader(np.arange(5000), batch_size=2, context_length=8)
    ahead = prefetched(loader, workers=2)
    for position in range(5):
        ahead[position]
    print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
    if sys.argv[1] == "stay":
        sys.stdin.readline()
        for position in range(5, 40):
            assert (ahead[position]["tokens"] == loader[position]["tokens"]).all()
        print("read on", flush=True)
"""


def run_script(tmp_path: Path, *given: str) -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(path), *given],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ["returns", "killed"])
def test_workers_end_with_the_process(end: str, tmp_path: Path) -> None:
    with run_script(tmp_path, "leave" if end == "returns" else "stay") as process:
        try:
            assert process.stdout is not None
            workers = [int(pid) for pid in process.stdout.readline().split()]
            assert len(workers) == 2
            if end == "killed":
                assert all(map(alive, workers))
                process.kill()
            out, err = process.communicate(timeout=60)
            assert out == ""
            # Python itself tells of semaphores that a killed process leaves to be removed.
            assert err == "" or end == "killed"
            assert process.returncode == (0 if end == "returns" else -signal.SIGKILL)
            assert all_end(workers)
        finally:
            process.kill()


def test_a_script_that_begins_at_once_is_told(tmp_path: Path) -> None:
    """Its workers refuse to go through it again; it reads by itself."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.replace('if __name__ == "__main__"', "if True"))
    done = subprocess.run(
        [sys.executable, str(path), "leave"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "\n"
    assert "UserError: workers=2: each imports the main script" in done.stderr
    assert "UserWarning: reading ahead with workers=2 ended by RuntimeError" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals a group of processes")
def test_control_c_leaves_workers_to_a_run_that_saves(tmp_path: Path) -> None:
    """A terminal interrupts all processes; here the first has its own way to stop."""
    with run_script(tmp_path, "stay") as process:
        try:
            assert process.stdout is not None
            for pid in process.stdout.readline().split():
                os.kill(int(pid), signal.SIGINT)
            time.sleep(0.5)
            out, err = process.communicate("\n", timeout=60)
            assert (out, err) == ("read on\n", "")
        finally:
            process.kill()


def test_a_grain_pipeline_of_ones_own(tmp_path: Path, rng: np.random.Generator) -> None:
    """Records of a file, encoded, packed by Grain, with a position that JSON holds."""
    import grain
    from array_record.python.array_record_module import ArrayRecordWriter

    path = str(tmp_path / "text.array_record")
    writer = ArrayRecordWriter(path, "group_size:1")
    for length in rng.integers(3, 60, 200):
        writer.write(bytes(rng.integers(97, 123, length, dtype=np.uint8)))
    writer.close()

    def encode(record: bytes) -> dict[str, np.ndarray]:
        ids = np.frombuffer(record, np.uint8).astype(np.int32)
        return {"tokens": ids[:-1], "targets": ids[1:]}

    def batch(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        segments = row["tokens_segment_ids"]
        return {
            "tokens": row["tokens"],
            "targets": row["targets"],
            "segment_ids": segments,
            "positions": row["tokens_positions"],
            "weights": (segments > 0).astype(np.float32),
        }

    def pipeline() -> DataPosition:
        source: Any = grain.sources.ArrayRecordDataSource([path])
        examples = grain.MapDataset.source(source).seed(3).shuffle().repeat().map(encode)
        rows = grain.experimental.FirstFitPackIterDataset(
            examples.to_iter_dataset(),
            length_struct={"tokens": 64, "targets": 64},
            num_packing_bins=4,
        )
        return DataPosition(iter(rows.map(batch).batch(3)))

    straight = pipeline()
    straight.check(preset("char-gpt").replace(vocab_size=128, context_length=64), steps=9)
    batches = [straight.next() for _ in range(9)]
    stop = int(rng.integers(1, 9))
    stopped = pipeline()
    for _ in range(stop):
        stopped.next()
    resumed = pipeline()
    resumed.restore(json.loads(json.dumps(stopped.save())))
    for expected in batches[stop:]:
        assert same(resumed.next(), expected)


def test_errors() -> None:
    loader = BatchLoader(np.arange(100), **GIVEN)
    cases: list[tuple[Any, dict[str, int], str]] = [
        (loader, {"workers": -1}, "workers is -1: give 0 or more"),
        (loader, {"ahead": 0}, "ahead is 0: give 1 or more"),
        (iter([]), {}, "loader is a list_iterator: give batches by position"),
    ]
    for given, change, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            prefetched(given, **change)
        assert "\n" not in str(caught.value)
    for workers in (0, 1):
        with pytest.raises(UserError, match="position is -1"):
            prefetched(loader, workers=workers)[-1]
