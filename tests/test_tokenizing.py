"""Token shards: written by any number of processes, whole or refused, in bounded memory."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from filelock import FileLock
from processes import all_end
from small_tokenizers import GPT2, TEXTS, WITHOUT_GPT2, fuzzed, llama_like

from gptjax.data import (
    BatchLoader,
    evaluation_batches,
    load_corpus,
    open_token_shards,
    read_documents,
    verify_token_shards,
)
from gptjax.data.token_shards import ShardedTokens
from gptjax.data.tokenizing import tokenize
from gptjax.errors import UserError
from gptjax.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
NASTY = "\ufeffcrlf\r\nlf\ncr\rnul\x00 \u2028\u0085 e\u0301 👩‍👧 中文\n\n"


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    return BPETokenizer.train(TEXTS * 3, 320)


def words(rng: np.random.Generator, count: int) -> list[str]:
    return [f"{n}: {rng.integers(10**9)} né\r\n " + "the cat sat. " * (n % 7) for n in range(count)]


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    path.write_bytes(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts))
    return path


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value), "an error is one line"
    return str(caught.value)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def ids_of(folder: Path) -> tuple[list[int], list[int]]:
    shards = open_token_shards(folder)
    return shards.train.tokens[:].tolist(), shards.validation.tokens[:].tolist()


def make_source(kind: str, tmp_path: Path, rng: np.random.Generator) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    if kind == "one text":
        (folder / "a.txt").write_bytes((NASTY + "".join(words(rng, 60))).encode())
    elif kind == "two texts":
        for name in ("a.txt", "b.md", "c.txt"):
            text = "" if name == "b.md" else NASTY + "".join(words(rng, 20))
            (folder / name).write_bytes(text.encode())
    elif kind == "records":
        texts = [*words(rng, 60), "", NASTY, *(fuzzed(rng, 60) for _ in range(20))]
        write_jsonl(folder / "a.jsonl", [*texts, texts[3]])
        (folder / "b.txt.gz").write_bytes(gzip.compress(NASTY.encode() * 9))
    elif kind == "split already":
        write_jsonl(folder / "train.jsonl", words(rng, 30))
        (folder / "val.txt").write_bytes(NASTY.encode() * 3)
    return folder


KINDS = ["one text", "two texts", "records", "split already"]


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces, jobs and characters are torn everywhere."""
    monkeypatch.setattr("gptjax.data.sources._PIECE_BYTES", 5)
    monkeypatch.setattr("gptjax.data.encoding._PIECE_CHARACTERS", 11)
    monkeypatch.setattr("gptjax.data.tokenizing._JOB_CHARACTERS", 64)


# What is written


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("tiny_pieces")
def test_shards_hold_what_load_corpus_makes_of_the_text(
    kind: str, tmp_path: Path, rng: np.random.Generator, trained: BPETokenizer
) -> None:
    source = make_source(kind, tmp_path, rng)
    for number, tokenizer in enumerate(["characters", "bytes", "bpe", trained, llama_like()]):
        options: dict[str, Any] = {"tokenizer": tokenizer, "validation_fraction": 0.3}
        options |= {"vocab_size": 300} if tokenizer == "bpe" else {}
        expected = load_corpus(source, **options)
        done = tokenize(source, tmp_path / str(number), shard_tokens=99, workers=1, **options)
        corpus = load_corpus(done.folder)
        assert corpus.tokenizer is not None
        assert expected.tokenizer is not None
        assert corpus.tokenizer.to_dict() == expected.tokenizer.to_dict()
        assert corpus.vocab_size == expected.vocab_size
        for found, wanted in (
            (corpus.train, expected.train),
            (corpus.validation, expected.validation),
        ):
            assert found.dtype == wanted.dtype
            assert found[:].tolist() == wanted[:].tolist()
        texts = [text for text in read_documents(source) if text]
        assert done.documents == len(texts)
        assert done.text_bytes == sum(len(text.encode()) for text in texts)
        assert done.tokens == len(corpus.train) + len(corpus.validation)
        verify_token_shards(done.folder)


def test_documents_are_views_of_what_was_encoded(
    tmp_path: Path, rng: np.random.Generator, trained: BPETokenizer
) -> None:
    texts = words(rng, 80)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    for ends in (True, False):
        folder = tmp_path / str(ends)
        options: dict[str, Any] = {"validation_fraction": 0.5, "end_documents": ends}
        tokenize(source, folder, tokenizer=trained, shard_tokens=200, **options)
        shards = open_token_shards(folder)
        tail = [trained.eos_id] if ends else []
        expected = {tuple(trained.encode(text) + tail) for text in texts}
        found = [*shards.train.documents, *shards.validation.documents]
        assert len(shards.train.documents) + len(shards.validation.documents) == 80
        assert {tuple(ids.tolist()) for ids in found} == expected
        for ids in found:
            owner = ids
            while owner is not None and not isinstance(owner, np.memmap):
                owner = owner.base
            assert isinstance(owner, np.memmap), "no copy"
        documents = shards.train.documents
        assert documents[-1].tolist() == documents[len(documents) - 1].tolist()
        assert [d.tolist() for d in documents[2:5]] == [documents[n].tolist() for n in (2, 3, 4)]
        with pytest.raises(IndexError):
            documents[len(documents)]
        assert isinstance(shards.train.tokens, ShardedTokens)
        sizes = [shard["bytes"] // 2 for shard in shards.manifest["splits"]["train"]["shards"]]
        longest = max(len(ids) for ids in found)
        assert all(200 <= size < 200 + longest for size in sizes[:-1])


def test_the_layout_is_what_the_docstring_says(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["abc", "de", "fgh", "ij"])
    tokenize(source, tmp_path / "out", tokenizer="bytes", validation_fraction=0.001)
    folder = tmp_path / "out"
    names = ["manifest.json", "train-00000.bin", "train.index"]
    names += ["validation-00000.bin", "validation.index"]
    assert sorted(p.name for p in folder.iterdir() if p.name != ".lock") == names
    train = np.fromfile(folder / "train-00000.bin", "<u2")
    offsets = np.fromfile(folder / "train.index", "<u8")
    assert offsets[0] == 0
    assert [train[int(end) - 1] for end in offsets[1:]] == [256] * 3
    assert offsets[-1] == len(train)
    # A split of one document has nothing to set apart.
    assert len(np.fromfile(folder / "validation-00000.bin", "<u2")) in (2, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["dtype"] == "uint16"
    assert manifest["vocab_size"] == 257
    assert manifest["end_id"] == 256
    assert manifest["source"] == str(source)
    assert manifest["splits"]["train"]["documents"] == 3
    assert manifest["splits"]["train"]["tokens"] == len(train)


class Wide(ByteTokenizer):
    """Bytes with ids that need 32 bits."""

    @property
    def vocab_size(self) -> int:
        return 70_001

    @property
    def eos_id(self) -> int:
        return 70_000


def test_a_vocabulary_above_16_bits_is_written_as_32(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["abc", "de", "fgh"])
    tokenize(source, tmp_path / "out", tokenizer=Wide())
    tokens = open_token_shards(tmp_path / "out").train.tokens
    assert tokens.dtype == np.uint32
    assert tokens[len(tokens) - 1] == 70_000
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["dtype"] = "uint16"
    for split in manifest["splits"].values():
        split["tokens"] *= 2
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    message = error_of(open_token_shards, tmp_path / "out")
    assert "holds uint16 tokens, in which ids from 65,536 on wrap" in message
    assert "70,001" in message


# Workers


def test_the_number_of_workers_changes_nothing(
    tmp_path: Path, rng: np.random.Generator, trained: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptjax.data.tokenizing._JOB_CHARACTERS", 500)
    source = tmp_path / "source"
    source.mkdir()
    write_jsonl(source / "a.jsonl", words(rng, 300))
    (source / "b.txt").write_bytes(NASTY.encode() * 200)
    folders = [tmp_path / f"{workers} workers" for workers in (1, 2, 3)]
    for workers, folder in enumerate(folders, 1):
        done = tokenize(source, folder, tokenizer=trained, shard_tokens=1000, workers=workers)
        assert done.workers == workers
    one, *others = map(files_of, folders)
    assert len(one) > 6
    for other in others:
        assert other == one


def test_workers_that_cannot_be(tmp_path: Path, rng: np.random.Generator) -> None:
    class Local(ByteTokenizer):
        pass

    class Remote(ByteTokenizer):
        def __reduce__(self):
            return exec, ("raise ValueError('not here')",)

    source = write_jsonl(tmp_path / "a.jsonl", words(rng, 20))
    out = tmp_path / "out"
    message = error_of(tokenize, source, out, tokenizer=Local(), workers=2)
    assert "Local cannot be sent to worker processes" in message
    assert "workers=1" in message
    message = error_of(tokenize, source, out, tokenizer=Remote(), workers=2)
    assert "Remote cannot be sent to worker processes (not here)" in message
    assert tokenize(source, out, tokenizer=Local(), workers=1).documents == 20
    for name in ("workers", "shard_tokens"):
        assert f"{name} is 0" in error_of(tokenize, source, out, tokenizer="bytes", **{name: 0})


FRAIL = """
import os
from gptjax.tokenizer import ByteTokenizer

class Frail(ByteTokenizer):
    def __reduce__(self):
        return Frail, ()

    @property
    def vocab_size(self):
        if "GPTJAX_TEST_END" in os.environ and os.environ["TOKENIZERS_PARALLELISM"] == "false":
            os._exit(9)
        return 257

"""


def test_a_worker_that_dies_is_told(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", words(rng, 20)), tmp_path / "out"
    (tmp_path / "frail_tokenizer.py").write_text(FRAIL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    frail = __import__("frail_tokenizer").Frail()
    assert tokenize(source, out, tokenizer=frail, workers=2).documents == 20
    monkeypatch.setenv("GPTJAX_TEST_END", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    message = error_of(tokenize, source, out, tokenizer=frail, workers=2, overwrite=True)
    assert "a worker process ended before its time" in message
    assert not [p.name for p in out.iterdir() if p.name != ".lock"]


def run_python(script: Path, *args: object) -> str:
    done = subprocess.run(
        [sys.executable, script, *map(str, args)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Interruptions


SLOW = """
import time

class Slow:
    vocab_size, eos_id, bos_id = 257, 256, None

    def encode(self, text):
        print("this is no result")
        time.sleep(0.01)
        return list(text.encode())

    def to_dict(self):
        return {"kind": "bytes"}
"""

SCRIPT = """
import sys
from gptjax.data.tokenizing import tokenize
from slow_tokenizer import Slow

# No `if __name__`: the workers do not import this.
tokenize(sys.argv[1], sys.argv[2], tokenizer=Slow(), workers=2)
"""


def test_a_kill_leaves_what_is_refused_and_then_replaced(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    texts = [text + "x" * 20_000 for text in words(rng, 3000)]
    source, out = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out"
    (tmp_path / "slow_tokenizer.py").write_text(SLOW)
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", source, out],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not (out / "train-00000.bin").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        assert "is being written by another process" in error_of(
            tokenize, source, out, tokenizer="bytes"
        )
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        children = [int(child) for path in tasks for child in path.read_text().split()]
        assert len(children) == 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    for call in (open_token_shards, verify_token_shards, load_corpus):
        message = error_of(call, out)
        assert "has no manifest.json" in message
        assert "repeat gptjax tokenize" in message
    assert all_end(children), "workers outlive their parent"
    tokenize(source, out, tokenizer="bytes", workers=1)
    tokenize(source, tmp_path / "again", tokenizer="bytes", workers=1)
    assert files_of(out) == files_of(tmp_path / "again")


def test_an_error_in_the_middle_leaves_nothing(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptjax.data.tokenizing._JOB_CHARACTERS", 50)
    source = write_jsonl(tmp_path / "a.jsonl", [*words(rng, 30), "zzz Ω"])
    letters = CharTokenizer.from_text([*words(rng, 5), "0123456789z"])
    message = error_of(tokenize, source, tmp_path / "out", tokenizer=letters)
    assert "in the text from character 0 of document 31 on: character 'Ω'" in message
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name != ".lock"]


def test_a_source_that_changes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for change in (1, -1):
        counts = iter((5, 5 + change))
        monkeypatch.setattr(
            "gptjax.data.tokenizing.read_pieces",
            lambda *_, counts=counts, **__: iter(
                [(f"text {n}", True) for n in range(next(counts))]
            ),
        )
        message = error_of(tokenize, tmp_path, tmp_path / "out", tokenizer="bytes")
        assert "has other documents than a moment ago" in message


def test_a_destination_with_something_in_it(tmp_path: Path, rng: np.random.Generator) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", words(rng, 9)), tmp_path / "out"

    def run(**kwargs):
        return tokenize(source, out, tokenizer="bytes", **kwargs)

    out.write_text("mine")
    assert "is a file: give a folder" in error_of(run)
    out.unlink()
    out.mkdir()
    (out / "notes.md").write_text("mine")
    assert "holds other files (notes.md)" in error_of(run)
    assert [p.name for p in out.iterdir()] == ["notes.md", ".lock"] or (out / "notes.md").exists()
    (out / "notes.md").unlink()
    run()
    before = files_of(out)
    assert "holds token shards already" in error_of(run)
    # A source that cannot be read does not cost what is there.
    source.write_bytes(b"{")
    assert "not JSON" in error_of(run, overwrite=True)
    assert files_of(out) == before
    write_jsonl(source, ["other", "texts", "here"])
    run(overwrite=True)
    assert len(open_token_shards(out).train.documents) < 4
    with FileLock(out / ".lock"):
        assert "being written by another process" in error_of(run, overwrite=True)
    assert "holds tokens already" in error_of(tokenize, out, tmp_path / "2", tokenizer="bytes")


# Reading


def test_tokens_of_several_shards_read_as_one(
    tmp_path: Path, rng: np.random.Generator, trained: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", words(rng, 60))
    tokenize(source, tmp_path / "many", tokenizer=trained, shard_tokens=100)
    tokenize(source, tmp_path / "one", tokenizer=trained)
    many, one = (load_corpus(tmp_path / name).train for name in ("many", "one"))
    assert isinstance(many, ShardedTokens)
    assert isinstance(one, np.memmap)
    assert len(many) == len(one) == many.shape[0]
    for _ in range(200):
        start, stop = rng.integers(-len(one) - 5, len(one) + 5, 2)
        assert many[start:stop].tolist() == one[start:stop].tolist()
        place = int(rng.integers(-len(one), len(one)))
        assert many[place] == one[place]
    assert many[:7].tolist() == one[:7].tolist()
    with pytest.raises(IndexError):
        many[len(one)]
    assert "a step of 2" in error_of(lambda: many[::2])
    cut: dict[str, Any] = {"batch_size": 3, "context_length": 17, "document_separator": 0}
    for shuffle in (True, False):
        loaders = [BatchLoader(tokens, shuffle=shuffle, **cut) for tokens in (many, one)]
        for position in range(40):
            for name, array in loaders[0][position].items():
                assert (array == loaders[1][position][name]).all()
    for a, b in zip(*(evaluation_batches(tokens, **cut) for tokens in (many, one)), strict=True):
        assert all((a[name] == b[name]).all() for name in b)
    message = error_of(BatchLoader, many, batch_size=1, context_length=len(one))
    assert f"{len(one)} tokens are too few for a context_length of {len(one)}" in message

    def refuse(*_: object) -> None:
        raise AssertionError("opening reads nothing")

    monkeypatch.setattr(ShardedTokens, "__getitem__", refuse)
    BatchLoader(many, **cut)
    evaluation_batches(many, **cut)


def test_the_tokenizer_of_shards(tmp_path: Path, rng: np.random.Generator) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", words(rng, 9)), tmp_path / "out"
    tokenize(source, out, tokenizer="bytes")
    for given in ("characters", "bpe", "bytes", ByteTokenizer()):
        assert load_corpus(out, tokenizer=given).tokenizer == ByteTokenizer()
    # What scripts pass along by default.
    assert load_corpus(out, tokenizer="bpe", vocab_size=1024).vocab_size == 257
    assert load_corpus(str(out), vocab_size=257).vocab_size == 257
    assert "says 257" in error_of(load_corpus, out, vocab_size=300)
    assert "another tokenizer" in error_of(load_corpus, out, tokenizer=CharTokenizer("abc"))


def changed(manifest: dict, *path: str, value: Any) -> dict:
    copy = json.loads(json.dumps(manifest))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


def test_damage_is_found(tmp_path: Path, rng: np.random.Generator) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", words(rng, 40)), tmp_path / "out"
    tokenize(source, out, tokenizer="bytes", shard_tokens=500)
    whole = files_of(out)
    manifest = json.loads(whole["manifest.json"])
    names = [name for name in whole if name.endswith((".bin", ".index"))]
    assert len(names) > 4
    for name in names:
        data = bytearray(whole[name])
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (out / name).write_bytes(data)
        open_token_shards(out)
        message = error_of(verify_token_shards, out)
        assert message.startswith(f"{name} in ")
        (out / name).write_bytes(whole[name][:-2])
        for call in (open_token_shards, load_corpus, verify_token_shards):
            message = error_of(call, out)
            assert f"{name}' has {len(whole[name]) - 2:,} bytes" in message
            assert f"says {len(whole[name]):,}" in message
        (out / name).unlink()
        assert f"{name}' is missing" in error_of(open_token_shards, out)
        (out / name).write_bytes(whole[name])
    for damaged in (
        whole["manifest.json"][:-30].decode(),
        "[]",
        json.dumps(changed(manifest, "format", value="other")),
        json.dumps(changed(manifest, "dtype", value="float32")),
        json.dumps(changed(manifest, "splits", "validation", value=None)),
        json.dumps(changed(manifest, "splits", "train", "tokens", value=3)),
        json.dumps(changed(manifest, "splits", "train", "documents", value=3)),
        json.dumps(changed(manifest, "splits", "train", "shards", value=[])),
        json.dumps(changed(manifest, "vocab_size", value=None)),
        json.dumps(changed(manifest, "tokenizer", value=None)),
    ):
        (out / "manifest.json").write_text(damaged)
        assert "manifest.json' is damaged" in error_of(open_token_shards, out)
        assert "manifest.json' is damaged" in error_of(load_corpus, out)
    (out / "manifest.json").write_text(json.dumps(changed(manifest, "version", value=2)))
    assert "update gptjax" in error_of(open_token_shards, out)
    (out / "manifest.json").unlink()
    assert "not complete" in error_of(load_corpus, out)
    assert "no folder" in error_of(open_token_shards, tmp_path / "none")
    shutil.copytree(out, tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").write_bytes(whole["manifest.json"])
    verify_token_shards(tmp_path / "copy")


# Bad text


@pytest.mark.usefixtures("tiny_pieces")
def test_text_that_cannot_be_split_or_read(tmp_path: Path) -> None:
    path, out = tmp_path / "a.txt", tmp_path / "out"

    def message(**kwargs) -> str:
        found = error_of(tokenize, path, out, **{"tokenizer": "bytes", **kwargs})
        assert not [p.name for p in out.glob("*") if p.name != ".lock"]
        return found

    path.write_bytes(b"")
    assert "0 documents with text" in message()
    path.write_bytes(b"x")
    assert "0 for train and 1 for validation" in message()
    good = "é中👩".encode() * 3
    for bad, offset in ((b"\xff", 27), (b"\xe4\xb8", 27), (b"a\xc3", 28)):
        path.write_bytes(good + bad + (b" " if offset == 27 else b""))
        assert f"a.txt' is not UTF-8 at byte {offset} (0x{bad[-1 if offset > 27 else 0]:02x})" in (
            message()
        )
    path.write_bytes(good)
    assert "between 0 and 1" in message(validation_fraction=1.0)
    assert "did you mean 'bytes'" in message(tokenizer="byte")
    assert "is for tokenizer='bpe'" in message(vocab_size=300)
    path = write_jsonl(tmp_path / "b.jsonl", ["same"] * 4)
    assert "4 documents with text, all the same" in message()
    path = tmp_path / "none.txt"
    assert "no source" in message()
    path = tmp_path / "split"
    path.mkdir()
    (path / "train.txt").write_text("abc")
    (path / "val.txt").write_text("")
    assert "1 train and 0 validation documents" in message()


# Memory

MEASURE = """
import re, sys
from pathlib import Path
from gptjax.data.tokenizing import tokenize
from gptjax.tokenizer import BPETokenizer

def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) / 1024

small, large, out, workers = sys.argv[1:]
tokenizer = BPETokenizer.train(["the cat sat on the mat "] * 3, 270)
peaks = []
for number, source in enumerate((small, large)):
    tokenize(source, f"{out}{number}", tokenizer=tokenizer, workers=int(workers))
    peaks.append(peak())
print(*peaks)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["one line", "records", "packed"])
def test_memory_is_flat_in_the_size_of_the_text(
    kind: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    if kind == "packed":
        pytest.importorskip("pyarrow")
    some = [f"word{n} " for n in rng.integers(0, 3000, 300_000)]
    text = "".join(some)
    paths = []
    for number, times in enumerate((2, 20)):
        path = tmp_path / f"{number}.{'jsonl' if kind == 'records' else 'txt'}"
        with path.open("w") as file:
            for n in range(times):
                if kind == "records":
                    for start in range(0, len(text), 5000):
                        record = {"text": f"{n} {text[start : start + 5000]}"}
                        file.write(json.dumps(record) + "\n")
                else:
                    file.write(text)
        if kind == "packed":
            import pyarrow

            packed = path.with_name(path.name + ".zst")
            with pyarrow.output_stream(str(packed), compression="zstd") as stream:
                stream.write(path.read_bytes())
            path = packed
        paths.append(path)
    if kind == "one line":
        assert paths[1].stat().st_size > 40e6
    (tmp_path / "measure.py").write_text(MEASURE)
    workers = 2 if kind == "packed" else 1
    printed = run_python(tmp_path / "measure.py", *paths, tmp_path / "out", workers)
    small, large = map(float, printed.split())
    print(f"{kind}: peak {small:.0f} MB, then {large:.0f} MB")
    assert large - small < 12, "36 MB more text"


# The command


def test_tokenize_from_the_command_line(
    command: Command, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", words(rng, 50)), tmp_path / "out"
    size = sum(len(text.encode()) for text in read_documents(source))
    arguments = ("--tokenizer", "bytes", "--validation-fraction", 0.5)
    status, printed, _ = command("gptjax", "tokenize", source, out, *arguments)
    assert status == 0
    tokens = size + 50
    assert f"50 documents are {tokens:,} tokens in {out}: " in printed
    assert f"{tokens / size:.3f} tokens a byte" in printed
    assert "with 1 worker" in printed
    assert "reading" not in printed, "no bar where there is no terminal"
    status, _, error = command("gptjax", "tokenize", source, out)
    assert status == 2
    assert "holds token shards already" in error
    monkeypatch.setenv("FORCE_COLOR", "1")
    arguments = (
        "--overwrite",
        "--validation-fraction",
        0.5,
        "--bpe-vocab-size",
        280,
        "--shard-tokens",
        300,
    )
    status, printed, _ = command("gptjax", "tokenize", source, out, *arguments)
    assert status == 0
    assert "reading" in printed
    assert "tokenizing" in printed
    shards = open_token_shards(out)
    assert shards.vocab_size == 280
    assert isinstance(shards.train.tokens, ShardedTokens)
    status, _, error = command("gptjax", "tokenize", tmp_path / "b.jsonl", tmp_path / "out2")
    assert status == 2
    assert "did you mean 'a.jsonl'" in error
    assert "tokenize" in command("gptjax", "--help")[1]


@pytest.mark.skipif(not GPT2.is_dir(), reason=WITHOUT_GPT2)
def test_words_are_looked_up_with_the_vocabulary_of_gpt2(tmp_path: Path) -> None:
    library = sorted(Path(os.__file__).parent.glob("*.py"))[::8]
    texts = [path.read_bytes().decode("utf-8") for path in library]
    assert sum(map(len, texts)) > 200_000
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    tokenize(source, tmp_path / "out", tokenizer=GPT2, workers=1, end_documents=False)
    shards = open_token_shards(tmp_path / "out")
    tokenizer: Tokenizer = shards.tokenizer
    expected = {tuple(tokenizer.encode(text)) for text in texts}
    found = [*shards.train.documents, *shards.validation.documents]
    assert {tuple(ids.tolist()) for ids in found} == expected
