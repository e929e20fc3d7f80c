"""Sources, the split into train and validation, and token files."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from gptjax.data import load_corpus, read_documents, read_tokens, write_tokens
from gptjax.data.sources import read_pieces
from gptjax.errors import UserError
from gptjax.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer

ROOT = Path(__file__).resolve().parents[1]
SHAKESPEARE = ROOT.parent / "shared" / "assets" / "text" / "tinyshakespeare" / "input.txt"
NASTY = "\ufeffcrlf\r\nlf\ncr\rnul\x00 \u2028\u0085 e\u0301 👩‍👧 中文\n\n"


def words(rng: np.random.Generator, count: int) -> list[str]:
    return [f"document {n}: {rng.integers(10**9)} né\r\n" for n in range(count)]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_bytes(b"".join(json.dumps({"id": 1, key: t}).encode() + b"\n" for t in texts))
    return path


def write_parquet(path: Path, texts: list, key: str = "text") -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": list(range(len(texts))), key: texts}), path, row_group_size=7)
    return path


def error_of(call, *args, **kwargs) -> str:
    def run() -> None:
        result = call(*args, **kwargs)
        if hasattr(result, "__next__"):
            list(result)

    with pytest.raises(UserError) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message, "an error is one line"
    return message


def sides(source, **kwargs) -> tuple[list[str], list[str]]:
    """Returns the documents of both sides, read back from byte tokens."""
    corpus = load_corpus(source, tokenizer="bytes", **kwargs)
    both = []
    for tokens in (corpus.train, corpus.validation):
        parts = np.split(tokens, np.flatnonzero(tokens == 256) + 1)
        both.append([ByteTokenizer().decode(p) for p in parts if len(p)])
    return both[0], both[1]


# Files


def test_text_round_trips_exactly(tmp_path: Path) -> None:
    for name in ("a.txt", "a.md", "a.unknown", "b"):
        (tmp_path / name).write_bytes(NASTY.encode())
        assert list(read_documents(tmp_path / name)) == [NASTY]
    for name in ("c.txt.gz", "c.jsonl.gz"):
        data = NASTY if "txt" in name else json.dumps({"text": NASTY})
        (tmp_path / name).write_bytes(gzip.compress(data.encode()))
        assert list(read_documents(str(tmp_path / name))) == [NASTY]
    texts = [NASTY, "", "plain", NASTY * 2]
    assert list(read_documents(write_jsonl(tmp_path / "d.jsonl", texts))) == texts
    assert list(read_documents(write_parquet(tmp_path / "e.parquet", texts))) == texts
    raw = "\ufeff" + "\n\n".join(json.dumps({"body": t}, ensure_ascii=False) for t in texts)
    (tmp_path / "f.jsonl").write_bytes(raw.encode())
    assert list(read_documents(tmp_path / "f.jsonl", text_key="body")) == texts


def test_zstd_and_gzip_of_several_parts(tmp_path: Path, rng: np.random.Generator) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    zstd = pyarrow.Codec("zstd")
    texts = words(rng, 2000)
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    for suffix, pack in (
        (".zst", lambda data: zstd.compress(data, asbytes=True)),
        (".gz", gzip.compress),
    ):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        # Cut inside a line, as by `split -b`.
        data = b"".join(lines)
        packed = pack(data[:31_337]) + pack(data[31_337:])
        (folder / f"a.jsonl{suffix}").write_bytes(packed)
        (folder / f"b.txt{suffix}").write_bytes(pack(NASTY.encode()) + pack(NASTY.encode()))
        (folder / f"c.md{suffix}").write_bytes(pack(b""))
        (folder / f"ignored.csv{suffix}").write_bytes(pack(b"1,2"))
        assert list(read_documents(folder)) == [*texts, NASTY * 2, ""]
        path = folder / f"a.jsonl{suffix}"
        kind = {".gz": "gzip", ".zst": "zstd"}[suffix]
        # All ones behind the header are no kind of block.
        no_block = packed[:10] + b"\xff" * 8 + packed[18:]
        for damaged in (packed[:-9], packed[:1000], no_block, b"plain text, not packed"):
            path.write_bytes(damaged)
            assert f"a.jsonl{suffix}' is no complete {kind} file" in error_of(read_documents, path)


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 1 << 20])
def test_text_in_pieces_is_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr("gptjax.data.sources._PIECE_BYTES", piece_bytes)
    (tmp_path / "a.txt").write_bytes(NASTY.encode())
    (tmp_path / "b.txt").write_bytes(b"")
    assert list(read_documents(tmp_path)) == [NASTY, ""]
    pieces = list(read_pieces(tmp_path / "a.txt"))
    assert "".join(text for text, _ in pieces) == NASTY
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert (len(pieces) > 10) == (piece_bytes < 7)
    good = "é中👩".encode()
    for bad, place in ((b"\xff after", 9), (b"\xe4\xb8 after", 9), (b"a\xc3", 10)):
        (tmp_path / "a.txt").write_bytes(good + bad)
        expected = f"a.txt' is not UTF-8 at byte {place} (0x{(good + bad)[place]:02x})"
        assert expected in error_of(read_documents, tmp_path / "a.txt")


def test_a_line_of_json_may_not_be_endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptjax.data.sources.LONGEST_LINE", 40)
    path = tmp_path / "a.jsonl"
    longest = json.dumps({"text": "x" * 28}) + "\n"
    assert len(longest) == 41
    path.write_text(longest[:-2] + "}")
    assert list(read_documents(path)) == ["x" * 28]
    path.write_text(longest * 2)
    message = error_of(read_documents, path)
    assert "a.jsonl:1: a line of more than 40 bytes" in message
    assert "text file" in message
    path.write_text('{"text": "a"}\n' + longest)
    assert "a.jsonl:2: a line of more than 40 bytes" in error_of(read_documents, path)


def test_folders_and_patterns_are_read_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("z.txt", "a.md", "b/m.txt", "b/ignored.py", ".hidden/x.txt", "b/.y.txt"):
        (tmp_path / name).write_text(name)
    write_jsonl(tmp_path / "c.jsonl", ["one", "two"])
    assert list(read_documents(tmp_path)) == ["a.md", "b/m.txt", "one", "two", "z.txt"]
    assert list(read_documents(tmp_path / "*.txt")) == ["z.txt"]
    assert list(read_documents(f"{tmp_path}/**/*.txt")) == ["b/m.txt", "z.txt"]
    assert list(read_documents(f"{tmp_path}/b/*.py")) == ["b/ignored.py"]


def test_parquet_in_many_batches(tmp_path: Path, rng: np.random.Generator) -> None:
    texts = words(rng, 3000)
    assert list(read_documents(write_parquet(tmp_path / "a.parquet", texts))) == texts


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\nbroken')
    assert next(read_documents(path)) == "first"


def test_errors_name_file_and_place(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes("é".encode() + b"abc\xff")
    assert "bad.txt' is not UTF-8 at byte 5 (0xff)" in error_of(read_documents, bad)
    lines = tmp_path / "bad.jsonl"
    good = b'{"text": "a"}\n'
    for content, expected in (
        (good * 2 + b"{oops}\n", "bad.jsonl:3: not JSON"),
        (good + b"[1]\n", "bad.jsonl:2: a list"),
        (good + b'{"body": 1, "id": 2}\n', "bad.jsonl:2: no 'text'; there is body, id"),
        (good + b'\n{"text": 5}\n', "bad.jsonl:3: 'text' is int, not text"),
        (good + b'{"text": null}\n', "bad.jsonl:2: 'text' is NoneType"),
        (good + b'{"text": "\\ud800"}\n', "bad.jsonl:2: 'text' holds half of a surrogate"),
        (good + b'{"text": "\xff"}\n', "is not UTF-8 at byte 24 (0xff)"),
        (b"\xef\xbb\xbf" + b'{"text": "\xff"}\n', "is not UTF-8 at byte 13 (0xff)"),
    ):
        lines.write_bytes(content)
        assert expected in error_of(read_documents, lines)
    table = write_parquet(tmp_path / "t.parquet", ["a", None])
    assert "t.parquet, row 1: 'text' is NoneType" in error_of(read_documents, table)
    assert "no 'body'; there is id, text" in error_of(read_documents, table, text_key="body")
    whole = table.read_bytes()
    table.write_bytes(whole[: len(whole) // 2])
    assert "t.parquet' is no complete Parquet file" in error_of(read_documents, table)
    packed = tmp_path / "p.txt.gz"
    packed.write_bytes(gzip.compress(NASTY.encode() * 50)[:-20])
    assert "no complete gzip file" in error_of(read_documents, packed)
    packed.write_bytes(b"plain")
    assert "no complete gzip file" in error_of(read_documents, packed)


def test_missing_sources(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("x")
    (tmp_path / "other.csv").write_text("x")
    # At once, not at the first document.
    with pytest.raises(UserError, match=r"did you mean 'input\.txt'"):
        read_documents(tmp_path / "inptu.txt")
    assert "did you mean 'embedded'" in error_of(read_documents, "embeded")
    assert "does not exist either" in error_of(read_documents, tmp_path / "no" / "a.txt")
    assert "no file matches" in error_of(read_documents, f"{tmp_path}/*.jsonl")
    assert "remote" in error_of(read_documents, "gs://bucket/a.txt")
    (tmp_path / "input.txt").unlink()
    message = error_of(read_documents, tmp_path)
    assert "holds no text: it has .csv" in message
    assert ".parquet" in message
    (tmp_path / "a.bin").write_bytes(b"xx")
    assert "holds tokens, not text" in error_of(read_documents, tmp_path / "a.bin")


def test_a_path_may_be_named_like_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").mkdir()
    for name in ("train.txt", "val.txt"):
        (tmp_path / "embedded" / name).write_text("mine")
    assert list(read_documents(Path("embedded"))) == ["mine", "mine"]
    assert load_corpus(Path("embedded")).tokenizer == CharTokenizer("eimn")
    monkeypatch.setattr("gptjax.data.sources.embedded_documents", lambda: iter(["abba"]))
    assert list(read_documents("embedded")) == ["abba"]
    assert load_corpus("embedded").tokenizer == CharTokenizer("ab")


# The documentation inside Python


@pytest.fixture(scope="module")
def embedded() -> list[str]:
    return list(read_documents("embedded"))


def test_embedded_is_real_text(embedded: list[str]) -> None:
    assert sum(map(len, embedded)) > 10**6
    assert len(set(embedded)) == len(embedded) > 300
    assert all(len(text) > 80 and text.endswith("\n") for text in embedded)
    # A topic; and a docstring of a module, a class and a method that importing would not change.
    assert any('The "if" statement' in text for text in embedded)
    whole = "\n".join(embedded)
    for part in (json.__doc__, json.JSONDecoder.__doc__, json.JSONDecoder.raw_decode.__doc__):
        assert part is not None
        assert part.strip().splitlines()[0] in whole
    document = next(text for text in embedded if "JSON (JavaScript Object Notation)" in text)
    assert "Serialize ``obj``" in document, "one document a module"


def test_embedded_imports_nothing_of_what_it_reads() -> None:
    code = (
        "import sys; from gptjax.data import read_documents;"
        "heavy = {'grain', 'pyarrow', 'tokenizers', 'tensorflow_datasets', 'tensorflow', 'torch'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "before = set(sys.modules); texts = list(read_documents('embedded'));"
        "own = ('pydoc_data', '_sysconfigdata');"
        "new = {n for n in set(sys.modules) - before if not n.startswith(own)};"
        "assert not new, new; import hashlib;"
        "print(hashlib.sha256(repr(texts).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77"}
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    here = hashlib.sha256(repr(list(read_documents("embedded"))).encode()).hexdigest()
    assert out.stdout.strip() == here


def test_embedded_documents_of_a_small_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    topics = type(sys)("pydoc_data.topics")
    topics.topics = {"if": "y" * 90, "short": "z"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", topics)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    kept = "Kept." * 20
    for name, text in {
        "b/short.py": "Short.",
        "c.py": kept,
        "d_copy.py": kept,
        "site-packages/a.py": kept + "a",
        "test/b.py": kept + "b",
        "b/tests/c.py": kept + "c",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'"""{text}"""')
    (tmp_path / "nested.py").write_text(
        "if True:\n    def f():\n"
        "        '''First.\n\n        second\n          third\n        '''\n"
        f"        class A:\n            '{kept}'\n            x = 'not a docstring'\n"
    )
    assert list(read_documents("embedded")) == [
        "y" * 90 + "\n",
        kept + "\n",
        f"First.\n\nsecond\n  third\n\n{kept}\n",
    ]


def test_embedded_without_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert "no .py files" in error_of(read_documents, "embedded")
    (tmp_path / "broken.py").write_text("def (")
    assert "broken.py' (" in error_of(read_documents, "embedded")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "needs pydoc_data.topics" in error_of(read_documents, "embedded")


# TensorFlow data sets, without TensorFlow


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Defines small builders; returns an empty data_dir."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")

    class GptjaxFables(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")
        BUILDER_CONFIGS: ClassVar = [
            tfds.core.BuilderConfig(name="short"),
            tfds.core.BuilderConfig(name="long"),
        ]

        def _info(self):
            features = {"text": tfds.features.Text(), "number": np.int64}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(600), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for n in range(count):
                yield n, {"text": f"{self.builder_config.name} {n} {NASTY}", "number": n}

    class GptjaxNeedsTensorflow(GptjaxFables):
        BUILDER_CONFIGS: ClassVar = []

        def _split_generators(self, dl_manager):
            raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    class GptjaxOffline(GptjaxNeedsTensorflow):
        def _split_generators(self, dl_manager):
            raise ConnectionError("Max retries exceeded with url: /data.txt")

    return tmp_path_factory.mktemp("tfds")


def test_tfds_reads_and_prepares_without_tensorflow(
    tfds_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorflow_datasets as tfds

    loaded = "tensorflow" in sys.modules
    builder = tfds.builder("gptjax_fables/short", data_dir=tfds_dir)
    builder.download_and_prepare(file_format="array_record")
    expected = Counter(f"short {n} {NASTY}" for n in range(600))
    for spelled in ("gptjax_fables", "gptjax_fables:1.2.0", "gptjax_fables/short@train"):
        assert Counter(read_documents(f"tfds:{spelled}", data_dir=tfds_dir)) == expected
    part = list(read_documents("tfds:gptjax_fables@train[:10%]", data_dir=tfds_dir))
    assert len(set(part)) == 60
    assert set(part) < set(expected)
    # Not prepared yet, and found by the environment variable.
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tfds_dir))
    test = list(read_documents("tfds:gptjax_fables/long:1.2.0@test"))
    assert sorted(test) == [f"long {n} {NASTY}" for n in range(3)]
    assert ("tensorflow" in sys.modules) == loaded, "TensorFlow was imported"


def test_tfds_errors_tell_the_way_out(tfds_dir: Path) -> None:
    def message(spelled: str, **kwargs) -> str:
        return error_of(read_documents, spelled, data_dir=tfds_dir, **kwargs)

    for name in ("gptjax_needs_tensorflow", "gptjax_offline"):
        text = message(f"tfds:{name}")
        assert "pip install tensorflow" in text
        assert f"tfds build {name} --file_format=array_record --data_dir={tfds_dir}" in text
        assert "TFDS_DATA_DIR" in text
    assert "Max retries" in text
    assert "did you mean 'gptjax_fables'" in message("tfds:gptjax_fable")
    assert "'trian'" in message("tfds:gptjax_fables@trian")
    assert "9.9.9" in message("tfds:gptjax_fables:9.9.9")
    assert "is incomplete" in message("tfds:")
    assert "is incomplete" in message("tfds:gptjax_fables@")
    assert "no 'body'; there is number, text" in message("tfds:gptjax_fables@test", text_key="body")
    assert "not text" in message("tfds:gptjax_fables@test", text_key="number")


# The split


def test_a_single_document_is_cut_by_characters(tmp_path: Path, rng: np.random.Generator) -> None:
    text = "".join(rng.choice(list("abc é中\n\r"), 1237))
    (tmp_path / "input.txt").write_bytes(text.encode())
    for fraction in (0.1, 0.25, 0.001):
        corpus = load_corpus(tmp_path / "input.txt", validation_fraction=fraction)
        cut = int(1237 * (1 - fraction))
        tokenizer = corpus.tokenizer
        assert isinstance(tokenizer, CharTokenizer)
        assert tokenizer.decode(corpus.train) == text[:cut]
        assert tokenizer.decode(corpus.validation) == text[cut:]
        assert tokenizer.alphabet == "".join(sorted(set(text)))
        assert corpus.vocab_size == len(set(text))
        assert corpus.train.dtype == np.uint16


@pytest.mark.skipif(
    not SHAKESPEARE.is_file(), reason="tiny Shakespeare is not in ../shared/assets/text"
)
def test_tiny_shakespeare_splits_as_nanogpt_does() -> None:
    corpus = load_corpus(SHAKESPEARE)
    assert (len(corpus.train), len(corpus.validation)) == (1_003_854, 111_540)
    assert corpus.vocab_size == 65
    assert corpus.tokenizer is not None
    assert corpus.tokenizer.decode(corpus.train[:14]) == "First Citizen:"


def test_documents_split_by_their_text_alone(tmp_path: Path, rng: np.random.Generator) -> None:
    texts = words(rng, 400)
    train, validation = sides(write_jsonl(tmp_path / "a.jsonl", texts))
    assert Counter(train + validation) == Counter(texts)
    assert 15 <= len(validation) <= 75, "about a tenth"
    shuffled = [texts[n] for n in rng.permutation(400)]
    again = sides(write_jsonl(tmp_path / "b.jsonl", shuffled))
    assert set(again[0]) == set(train)
    assert set(again[1]) == set(validation)
    assert again[0] == [t for t in shuffled if t in set(train)], "the order within a side is kept"
    more = sides(write_jsonl(tmp_path / "c.jsonl", texts + words(rng, 100)))
    # Only the smallest hash can have moved, by giving way to a smaller one.
    assert len(set(validation) - set(more[1])) + len(set(train) - set(more[0])) <= 2
    half = sides(tmp_path / "a.jsonl", validation_fraction=0.5)
    assert set(validation) <= set(half[1])
    assert 150 <= len(half[1]) <= 250


def test_copies_never_lie_on_both_sides(tmp_path: Path, rng: np.random.Generator) -> None:
    texts = [*words(rng, 50) * 4, "", ""]
    train, validation = sides(write_jsonl(tmp_path / "a.jsonl", texts), validation_fraction=0.4)
    assert not set(train) & set(validation)
    assert Counter(train + validation) == Counter(texts[:-2])


def test_few_documents_still_fill_both_sides(tmp_path: Path, rng: np.random.Generator) -> None:
    for _ in range(30):
        texts = [*words(rng, int(rng.integers(2, 4))), ""]
        path = write_jsonl(tmp_path / "a.jsonl", texts)
        for fraction in (0.001, 0.999):
            corpus = load_corpus(path, tokenizer="bytes", validation_fraction=fraction)
            assert len(corpus.train)
            assert len(corpus.validation)


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    assert "has 0 documents with text" in error_of(load_corpus, tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("x")
    message = error_of(load_corpus, tmp_path / "a.txt")
    assert "has 1 characters" in message
    assert "0 for train and 1 for validation" in message
    same = write_jsonl(tmp_path / "b.jsonl", ["same", "same", "same", ""])
    assert "3 documents with text, all the same" in error_of(load_corpus, same)
    for fraction in (0, 1, -0.1, 2):
        assert "between 0 and 1" in error_of(load_corpus, same, validation_fraction=fraction)


@pytest.mark.parametrize("name", ["validation", "val"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_folder_that_is_split_already(tmp_path: Path, name: str, kind: str) -> None:
    for stem, text in (("train", "aab"), (name, "bcc"), ("test", "zzz")):
        path = tmp_path / f"{stem}.{kind}"
        if kind == "txt":
            path.write_text(text)
        else:
            {"jsonl": write_jsonl, "parquet": write_parquet}[kind](path, [text])
    corpus = load_corpus(tmp_path)
    assert corpus.tokenizer == CharTokenizer("abc")
    assert corpus.train.tolist() == [0, 0, 1]
    assert corpus.validation.tolist() == [1, 2, 2]
    (tmp_path / "train.md").write_text("more")
    assert "keep one" in error_of(load_corpus, tmp_path)


def test_a_split_folder_needs_text_on_both_sides(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abc")
    (tmp_path / "val.txt").write_text("")
    assert "1 train and 0 validation documents" in error_of(load_corpus, tmp_path)


# Tokenizers


def test_bpe_learns_from_train_alone(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("the cat sat on the mat. " * 50)
    (tmp_path / "val.txt").write_text("zqzq the " * 200)
    corpus = load_corpus(tmp_path, tokenizer="bpe", vocab_size=265)
    tokenizer = corpus.tokenizer
    assert isinstance(tokenizer, BPETokenizer)
    assert tokenizer.vocab_size == 265
    assert len(tokenizer.encode("zqzq")) == 4
    assert len(tokenizer.encode(" the")) == 1
    assert tokenizer.decode(corpus.validation) == "zqzq the " * 200
    (tmp_path / "folder").mkdir()
    library = tokenizer.to_dict()["json"]
    (tmp_path / "folder" / "tokenizer.json").write_text(library)
    for given in (tokenizer, tmp_path / "folder", str(tmp_path / "folder")):
        again = load_corpus(tmp_path, tokenizer=given)
        assert (again.train == corpus.train).all()
        assert again.vocab_size == 265


def test_tokenizers_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 9)
    a = tmp_path / "a.txt"
    assert "did you mean 'characters'" in error_of(load_corpus, a, tokenizer="character")
    assert "bpe, bytes, characters" in error_of(load_corpus, a, tokenizer="word_pieces_42")
    assert "is for tokenizer='bpe'" in error_of(load_corpus, a, vocab_size=99)
    assert "needs tokenizer.json" in error_of(load_corpus, a, tokenizer=tmp_path)
    message = error_of(load_corpus, a, tokenizer=CharTokenizer("tex"))
    assert "' ' (U+0020) at position 4" in message


# Token files


@pytest.mark.parametrize("vocab_size", [300, 65536, 65537, 2**32])
def test_token_files_round_trip(tmp_path: Path, rng: np.random.Generator, vocab_size: int) -> None:
    tokens = rng.integers(0, vocab_size, 1000)
    tokens[:2] = 0, vocab_size - 1
    path = write_tokens(tmp_path / "new" / "a.v1", tokens, vocab_size, ByteTokenizer())
    folder = tmp_path / "new"
    assert path == folder / "a.v1.bin"
    width = 2 if vocab_size <= 65536 else 4
    assert path.read_bytes() == tokens.astype(f"<u{width}").tobytes()
    assert json.loads((folder / "a.v1.json").read_text()) == {
        "dtype": f"uint{8 * width}",
        "count": 1000,
        "vocab_size": vocab_size,
        "tokenizer": {"kind": "bytes"},
    }
    assert sorted(p.name for p in folder.iterdir()) == ["a.v1.bin", "a.v1.json"]
    for name in ("a.v1", "a.v1.bin"):
        again = read_tokens(folder / name, vocab_size)
        assert isinstance(again, np.memmap)
        assert (again == tokens).all()
    corpus = load_corpus(path)
    assert (corpus.train == tokens[:900]).all()
    assert (corpus.validation == tokens[900:]).all()
    assert corpus.tokenizer == ByteTokenizer()
    assert corpus.vocab_size == vocab_size
    assert isinstance(corpus.train, np.memmap)


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_a_folder_of_token_files_as_nanogpt_writes_it(tmp_path: Path, validation: str) -> None:
    np.arange(90, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(50, dtype=np.uint16).tofile(tmp_path / f"{validation}.bin")
    (tmp_path / "meta.pkl").write_bytes(b"not read")
    (tmp_path / "input.txt").write_text("not read")
    corpus = load_corpus(tmp_path)
    assert corpus.train.tolist() == list(range(90))
    assert len(corpus.validation) == 50
    assert corpus.tokenizer is None
    assert corpus.vocab_size == 90
    assert load_corpus(tmp_path, vocab_size=100).vocab_size == 100
    assert load_corpus(tmp_path, tokenizer="bytes").tokenizer == ByteTokenizer()
    message = error_of(load_corpus, tmp_path, vocab_size=60)
    assert "id 60 at position 60" in message
    assert "vocabulary of 60" in message
    assert "id 3 at position 3" in error_of(load_corpus, tmp_path, tokenizer=CharTokenizer("abc"))
    assert "tokenizer='bpe' is trained on text" in error_of(load_corpus, tmp_path, tokenizer="bpe")


def test_ids_that_wrap_are_refused(tmp_path: Path) -> None:
    """A vocabulary above 65,536 in uint16: what was written has lost its high bits."""
    path = write_tokens(tmp_path / "a", np.arange(90), 65536, ByteTokenizer())
    assert len(read_tokens(path, 65536)) == 90
    message = error_of(read_tokens, path, 65537)
    assert "holds uint16 tokens, in which ids from 65,536 on wrap" in message
    assert "65,537" in message
    sidecar = tmp_path / "a.json"
    values = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(values | {"vocab_size": 65537}))
    for call in (read_tokens, load_corpus):
        assert "ids from 65,536 on wrap" in error_of(call, path)
    sidecar.unlink()
    assert load_corpus(path, vocab_size=65536).vocab_size == 65536
    assert "ids from 65,536 on wrap" in error_of(load_corpus, path, vocab_size=65537)


def test_token_files_with_their_tokenizer(tmp_path: Path) -> None:
    tokenizer = CharTokenizer("abc")
    for name in ("train", "val"):
        write_tokens(tmp_path / name, np.array([0, 1, 2]), 3, tokenizer)
    for given in ("characters", tokenizer):
        corpus = load_corpus(tmp_path, tokenizer=given)
        assert corpus.tokenizer == tokenizer
        assert corpus.vocab_size == 3
    assert "another tokenizer than 'bytes'" in error_of(load_corpus, tmp_path, tokenizer="bytes")
    assert "says 3" in error_of(load_corpus, tmp_path, vocab_size=4)
    write_tokens(tmp_path / "val", np.array([0, 1, 2]), 3, CharTokenizer("abd"))
    assert "different tokenizers" in error_of(load_corpus, tmp_path)
    (tmp_path / "val.bin").unlink()
    shutil.copy(tmp_path / "train.bin", tmp_path / "val.txt")
    assert "either both or neither" in error_of(load_corpus, tmp_path)


def test_token_files_are_written_and_checked_in_chunks(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptjax.data.token_files._CHUNK", 7)
    tokens = rng.integers(0, 50, 45)
    assert (read_tokens(write_tokens(tmp_path / "a", tokens, 50), 50) == tokens).all()
    tokens[38] = 50
    assert "id 50 at position 38" in error_of(write_tokens, tmp_path / "b", tokens, 50)


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path: Path) -> None:
    class DiskFull(ByteTokenizer):
        def to_dict(self) -> dict:
            raise OSError("No space left on device")

    write_tokens(tmp_path / "a", np.arange(9), 300)
    with pytest.raises(OSError, match="No space"):
        write_tokens(tmp_path / "a", np.arange(5), 70000, DiskFull())
    assert read_tokens(tmp_path / "a").tolist() == list(range(9))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.json"]


def test_token_files_refuse_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    tokens = np.array([1, 70000])
    message = error_of(write_tokens, path, tokens, 65536)
    assert "id 70000 at position 1" in message
    assert "vocabulary of 65536" in message
    assert "id -1" in error_of(write_tokens, path, np.array([-1]), 10)
    assert "1-D" in error_of(write_tokens, path, tokens[None], 70001)
    assert "float64" in error_of(write_tokens, path, tokens / 2, 70001)
    assert f"1 to {2**32}" in error_of(write_tokens, path, tokens, 2**32 + 1)
    assert "at least the tokenizer's" in error_of(
        write_tokens, path, tokens[:1], 9, ByteTokenizer()
    )
    assert not list(tmp_path.iterdir()), "nothing is left of a refused file"
    assert "no token file" in error_of(read_tokens, path)
    write_tokens(path, tokens, 70001)
    whole = (tmp_path / "a.bin").read_bytes()
    for cut in (1, 4):
        (tmp_path / "a.bin").write_bytes(whole[:-cut])
        assert f"has {8 - cut} bytes, uint32 tokens need 8" in error_of(read_tokens, path)
    for broken in ("{", "[]", '{"dtype": "float32", "count": 1}', '{"dtype": "uint16"}'):
        (tmp_path / "a.bin").write_bytes(whole[:-1])
        (tmp_path / "a.json").write_text(broken)
        assert "does not describe a token file" in error_of(read_tokens, path)
    (tmp_path / "a.json").unlink()
    assert "a multiple of 2" in error_of(read_tokens, path)
    (tmp_path / "a.bin").write_bytes(b"")
    assert "has 0 bytes" in error_of(load_corpus, tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes(b"\x01\x00")
    assert "0 train and 1 validation tokens" in error_of(load_corpus, tmp_path / "a.bin")
