"""Documents, as strings, from where they lie: files, TFDS, or the Python that is running."""

import ast
import codecs
import contextlib
import difflib
import glob
import gzip
import importlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from gptjax.errors import UserError

EMBEDDED = "embedded"
TFDS_PREFIX = "tfds:"
_PACKED_SUFFIXES = (".gz", ".zst")
_PLAIN_SUFFIXES = (".txt", ".md", ".jsonl")
TEXT_SUFFIXES = (
    *_PLAIN_SUFFIXES,
    ".parquet",
    *(plain + packed for packed in _PACKED_SUFFIXES for plain in _PLAIN_SUFFIXES),
)
LONGEST_LINE = 1 << 28
"""The most bytes of a line of JSON, which must be in memory to be read."""

_PIECE_BYTES = 1 << 20

_SHORTEST_EMBEDDED = 80
_NOT_DOCUMENTATION = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_TFDS_BATCH = 256


def read_documents(
    source: str | Path,
    *,
    text_key: str = "text",
    data_dir: str | Path | None = None,
) -> Iterator[str]:
    """Yields the documents of a source one after another, exactly as they are stored.

    No more than one text file, one JSON line or one batch of records is in memory at a time;
    `read_pieces` does not even hold a text file.

    Args:
        source: One of
            `"embedded"`: the documentation inside every Python, see `embedded_documents`;
            a file, a folder (read recursively, in sorted order) or a glob pattern. `.jsonl` and
            `.parquet` hold a document a record; anything else is UTF-8 text and one document.
            `.gz` and `.zst` are unpacked. In a folder only `TEXT_SUFFIXES` are read;
            `"tfds:NAME"`, `"tfds:NAME/CONFIG:VERSION"`, each with an optional `@SPLIT` such as
            `@train[:10%]` (default `@train`): a TensorFlow data set, without TensorFlow.
        text_key: The field of a record that holds its text.
        data_dir: Where TFDS keeps prepared data; by default `TFDS_DATA_DIR` or TFDS' own.

    Raises:
        UserError: At once where the source is missing; while iterating where it cannot be read
            (not UTF-8, no such field, broken file, a line of JSON above `LONGEST_LINE`), naming
            file and place.
    """
    return join_pieces(read_pieces(source, text_key=text_key, data_dir=data_dir))


def read_pieces(
    source: str | Path,
    *,
    text_key: str = "text",
    data_dir: str | Path | None = None,
) -> Iterator[tuple[str, bool]]:
    """Yields the documents of a source in pieces, so that a text file need not be in memory.

    Args:
        source: As in `read_documents`.
        text_key: Likewise.
        data_dir: Likewise.

    Returns:
        Some text of a document, and whether the document ends with it. Text files come in pieces
        cut anywhere between two characters, what is stored as a record comes whole.

    Raises:
        UserError: As `read_documents` does.
    """
    if source == EMBEDDED:
        return _as_pieces(embedded_documents())
    if isinstance(source, str) and source.startswith(TFDS_PREFIX):
        documents = _tfds_documents(source.removeprefix(TFDS_PREFIX), text_key, data_dir)
        return _as_pieces(documents)
    return _file_pieces(find_files(source), text_key)


def join_pieces(pieces: Iterable[tuple[str, bool]]) -> Iterator[str]:
    """Yields whole documents."""
    held: list[str] = []
    for text, ends in pieces:
        held.append(text)
        if ends:
            yield "".join(held)
            held = []


def drop_empty(pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Leaves out the documents without text."""
    begun = False
    for text, ends in pieces:
        if text or begun:
            yield text, ends
        begun = not ends and (begun or bool(text))


def _as_pieces(documents: Iterable[str]) -> Iterator[tuple[str, bool]]:
    return ((text, True) for text in documents)


def find_files(source: str | Path) -> list[Path]:
    """Returns the files that a path, folder or glob pattern stands for, sorted.

    Raises:
        UserError: There is none.
    """
    name = str(source)
    if "://" in name:
        raise UserError(f"source {name!r} is remote: copy it to a local path and give that")
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = [p for p in path.rglob("*") if p.is_file() and not _is_hidden(p, path)]
        files = [p for p in inside if p.name.endswith(TEXT_SUFFIXES)]
        if not files:
            others = ", ".join(sorted({p.suffix or p.name for p in inside})[:8]) or "no files"
            raise UserError(
                f"folder {name!r} holds no text: it has {others}; legal are "
                f"{', '.join(TEXT_SUFFIXES)}"
            )
        return sorted(files)
    if glob.has_magic(name):
        files = sorted(Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file())
        if not files:
            raise UserError(f"no file matches {name!r}: check the pattern and the folder")
        return files
    raise UserError(f"no source {name!r}{_nearest_path(path)}")


def embedded_documents() -> Iterator[str]:
    """Yields the documentation inside this Python: text for a first model, with no download.

    One document for each topic of `pydoc_data.topics` and one for each module of the standard
    library: its docstrings, in the order of the source, joined by blank lines. Modules are parsed,
    never imported. Short and repeated documents are dropped; each ends with a newline. The text
    is the same for the same Python.

    Raises:
        UserError: This Python ships without its documentation or its sources.
    """
    library = Path(sysconfig.get_path("stdlib"))
    way_out = "use a Python with its standard library's .py files, or give a file as the source"
    try:
        # By name: pydoc_data is a detail of CPython and has no type stubs.
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise UserError(f"the source 'embedded' needs pydoc_data.topics: {way_out}") from error
    modules = []
    for folder, folders, names in os.walk(library):
        folders[:] = [f for f in folders if f not in _NOT_DOCUMENTATION]
        modules += [Path(folder, n) for n in names if n.endswith(".py")]
    if not modules:
        raise UserError(f"the source 'embedded' found no .py files in {str(library)!r}: {way_out}")
    return _worthwhile(_embedded_texts(topics, sorted(modules)))


def _embedded_texts(topics: Mapping[str, str], modules: Iterable[Path]) -> Iterator[str]:
    for topic in sorted(topics):
        yield topics[topic]
    for path in modules:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            raise UserError(
                f"the source 'embedded' cannot parse {str(path)!r} ({error}): repair this Python, "
                "or give a file as the source"
            ) from error
        yield "\n\n".join(_docstrings(tree))


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield text
    # Definitions hide under statements only, and most of a tree is expressions.
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _docstrings(child)


def _worthwhile(texts: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for text in texts:
        text = text.strip()
        if len(text) >= _SHORTEST_EMBEDDED and text not in seen:
            seen.add(text)
            yield text + "\n"


def _file_pieces(files: Iterable[Path], text_key: str) -> Iterator[tuple[str, bool]]:
    for path in files:
        packing, suffix = suffixes(path)
        if suffix == ".bin":
            raise UserError(
                f"{str(path)!r} holds tokens, not text: read it with load_corpus or read_tokens"
            )
        if suffix == ".parquet" and not packing:
            yield from _as_pieces(_parquet_documents(path, text_key))
            continue
        with open_unpacked(path) as file:
            if suffix == ".jsonl":
                yield from _as_pieces(_jsonl_documents(file, path, text_key))
            else:
                yield from _text_pieces(file, path)


def suffixes(path: Path) -> tuple[str, str]:
    """Returns how a file is packed (".gz", ".zst" or ""), and what is in it (such as ".jsonl")."""
    packing = path.suffix if path.suffix in _PACKED_SUFFIXES else ""
    return packing, Path(path.name.removesuffix(packing)).suffix


@contextlib.contextmanager
def open_unpacked(path: Path) -> Iterator[BinaryIO | gzip.GzipFile | io.BufferedReader]:
    """Opens a file to read the bytes that are packed in it.

    Raises:
        UserError: When it is read, where it is packed and damaged.
    """
    packing, _ = suffixes(path)
    try:
        with _open_bytes(path, packing) as file:
            yield file
    except (EOFError, zlib.error, OSError) as error:
        # What is wrong with the packed data has no number, as troubles of the system have.
        if not packing or (isinstance(error, OSError) and error.errno is not None):
            raise
        kind = {".gz": "gzip", ".zst": "zstd"}[packing]
        raise UserError(
            f"{str(path)!r} is no complete {kind} file ({error}): copy it again"
        ) from error


def _open_bytes(path: Path, packing: str) -> BinaryIO | gzip.GzipFile | io.BufferedReader:
    if packing == ".gz":
        return gzip.open(path)
    if packing == ".zst":
        import pyarrow

        path.open("rb").close()  # PyArrow's own error is no FileNotFoundError and the like.
        stream = pyarrow.input_stream(str(path), compression="zstd")
        return io.BufferedReader(cast(io.RawIOBase, stream), _PIECE_BYTES)
    return path.open("rb")


def _text_pieces(file: BinaryIO | gzip.GzipFile, path: Path) -> Iterator[tuple[str, bool]]:
    # Bytes are decoded here, for text mode would translate newlines.
    rest, offset = b"", 0
    while data := file.read(_PIECE_BYTES):
        data = rest + data
        text, used = _decode(data, path, offset, final=False)
        yield text, False
        rest, offset = data[used:], offset + used
    yield _decode(rest, path, offset)[0], True


def _jsonl_documents(file: BinaryIO | gzip.GzipFile, path: Path, text_key: str) -> Iterator[str]:
    return (_text_of(record, text_key, place) for record, place in jsonl_records(file, path))


def jsonl_records(
    file: BinaryIO | gzip.GzipFile, path: Path
) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a file with one a line, and where each is, for messages.

    Raises:
        UserError: A line is too long, no JSON or no object; names file and line.
    """
    offset = 0
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
        start, offset = offset, offset + len(line)
        if len(line) > LONGEST_LINE:
            raise UserError(
                f"{path}:{number}: a line of more than {LONGEST_LINE:,} bytes, the most that is "
                "read at once: split its text over several records, or store it as a text file, "
                "which may have any length"
            )
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            start, line = len(codecs.BOM_UTF8), line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        place = f"{path}:{number}"
        decoded, _ = _decode(line, path, start)
        try:
            record = json.loads(decoded)
        except ValueError as error:
            raise UserError(f"{place}: not JSON ({error}): give one object a line") from error
        if not isinstance(record, dict):
            raise UserError(f"{place}: a {type(record).__name__}: give one object a line")
        yield record, place


def _parquet_documents(path: Path, text_key: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                raise _no_key(text_key, names, str(path))
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                for value in batch.column(0):
                    yield _text_of({text_key: value.as_py()}, text_key, f"{path}, row {row}")
                    row += 1
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{str(path)!r} is no complete Parquet file ({str(error).splitlines()[0]}): "
            "copy it again"
        ) from error


def _tfds_documents(spelled: str, text_key: str, data_dir: str | Path | None) -> Iterator[str]:
    records = tfds_records(spelled, data_dir)
    return (_text_of(record, text_key, place) for record, place in records)


def tfds_records(
    spelled: str, data_dir: str | Path | None = None
) -> Iterator[tuple[dict[str, Any], str]]:
    """The records of a TFDS data set with all their fields, and where each is, for messages.

    Args:
        spelled: `NAME[/CONFIG][:VERSION][@SPLIT]`.
        data_dir: As in `read_documents`.

    Raises:
        UserError: At once, as `read_documents` does.
    """
    name, at, split = spelled.partition("@")
    if not name or (at and not split):
        raise UserError(
            f"source {TFDS_PREFIX + spelled!r} is incomplete: spell it "
            "'tfds:NAME[/CONFIG][:VERSION][@SPLIT]'"
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"source {TFDS_PREFIX + spelled!r} needs tensorflow-datasets ({error}): "
            "pip install tensorflow-datasets array_record importlib_resources"
        ) from error
    where = None if data_dir is None else str(Path(data_dir).expanduser().absolute())
    try:
        # array_record is the one format of TFDS that is read, and written, without TensorFlow.
        records = tfds.data_source(
            name,
            split=split or "train",
            data_dir=where,
            download_and_prepare_kwargs={"file_format": "array_record"},
        )
    except Exception as error:  # Builders are code of many authors and raise what they like.
        raise _tfds_error(name, split or "train", where, error) from error
    return _placed(records, TFDS_PREFIX + spelled)


def _placed(records: Any, place: str) -> Iterator[tuple[dict[str, Any], str]]:
    for start in range(0, len(records), _TFDS_BATCH):
        numbers = range(start, min(start + _TFDS_BATCH, len(records)))
        for number, record in zip(numbers, records.__getitems__(list(numbers)), strict=True):
            yield record, f"{place}, record {number}"


def _tfds_error(name: str, split: str, data_dir: str | None, error: Exception) -> UserError:
    import tensorflow_datasets as tfds

    what = f"cannot read {TFDS_PREFIX + name!r}, split {split!r}"
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    hint = ""
    if type(error).__name__ == "DatasetNotFoundError":
        plain = name.partition(":")[0].partition("/")[0]
        close = difflib.get_close_matches(plain, tfds.list_builders(with_community_datasets=False))
        hint = f"; did you mean {close[0]!r}?" if close else ""
    if isinstance(error, ImportError) and error.name == "importlib_resources":
        return UserError(
            f"{what}: TFDS itself needs importlib_resources: pip install importlib_resources"
        )
    if isinstance(error, ValueError) and "split" in reason.lower():
        return UserError(f"{what}: {reason}")
    again = " --overwrite" if isinstance(error, NotImplementedError) else ""  # Another format.
    directory = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return UserError(
        f"{what} ({type(error).__name__}: {reason}){hint}; prepare it once, with a network and in "
        "an environment that has TensorFlow: pip install tensorflow tensorflow-datasets && "
        f"tfds build {name} --file_format=array_record --data_dir={directory}{again}, then read it "
        f"here with data_dir={directory!r} (or TFDS_DATA_DIR)"
    )


def _text_of(record: Mapping[str, Any], text_key: str, place: str) -> str:
    if text_key not in record:
        raise _no_key(text_key, record, place)
    text = record[text_key]
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{place}: {text_key!r} is not UTF-8 at byte {error.start}: convert it to UTF-8"
            ) from error
    if not isinstance(text, str):
        raise UserError(
            f"{place}: {text_key!r} is {type(text).__name__}, not text: name a text field with "
            "text_key"
        )
    if not _is_encodable(text):
        raise UserError(
            f"{place}: {text_key!r} holds half of a surrogate pair, which is no character: "
            "repair or drop the record"
        )
    return text


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _no_key(text_key: str, present: Iterable[str], place: str) -> UserError:
    names = ", ".join(map(str, present)) or "nothing"
    return UserError(f"{place}: no {text_key!r}; there is {names}: name the field with text_key")


def _decode(data: bytes, path: Path, start: int, final: bool = True) -> tuple[str, int]:
    """Returns text and the bytes it took, all of them where they are the `final` ones."""
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{str(path)!r} is not UTF-8 at byte {start + error.start} "
            f"(0x{data[error.start]:02x}): convert it, for example with iconv -t UTF-8"
        ) from error


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _nearest_path(path: Path) -> str:
    if not path.parent.is_dir():
        return f": the folder {str(path.parent)!r} does not exist either"
    names = sorted(p.name for p in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, [*names, EMBEDDED], n=1, cutoff=0)
    return f"; did you mean {close[0]!r}?"
