"""Text of any size to a folder of token shards, by several processes and in bounded memory."""

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gptjax.data.corpus import (
    check_fraction,
    check_sides,
    check_text,
    check_tokenizer,
    cut_place,
    hash_split,
    make_tokenizer,
    new_hash,
    split_files,
)
from gptjax.data.encoding import Encoder, Piece, batches, cut_at_spaces
from gptjax.data.encoding_workers import Job, encode_jobs
from gptjax.data.sources import EMBEDDED, drop_empty, read_pieces
from gptjax.data.token_shards import (
    LOCK,
    MANIFEST,
    SPLITS,
    SplitWriter,
    clear_shards,
    holds_shards,
    write_manifest,
)
from gptjax.errors import UserError
from gptjax.tokenizer import Tokenizer

_JOB_CHARACTERS = 1 << 18
_WORTH_PROCESSES = 1 << 23
_DIGEST_BYTES = new_hash().digest_size


@dataclass(frozen=True)
class Tokenized:
    """What `tokenize` did.

    Attributes:
        folder: Where the shards are.
        documents: How many documents have text.
        tokens: How many ids were written, ends of documents included.
        text_bytes: UTF-8 bytes of the text.
        seconds: Of reading the source twice, encoding and writing.
        workers: How many processes encoded.
    """

    folder: Path
    documents: int
    tokens: int
    text_bytes: int
    seconds: float
    workers: int


def tokenize(
    source: str | Path,
    destination: str | Path,
    *,
    tokenizer: str | Path | Tokenizer,
    vocab_size: int | None = None,
    validation_fraction: float = 0.1,
    text_key: str = "text",
    data_dir: str | Path | None = None,
    end_documents: bool = True,
    shard_tokens: int = 1 << 28,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Tokenized:
    """Writes the token ids of a source once, as memory-mapped shards for `load_corpus`.

    The ids, the split and the order are those of `load_corpus(source, …)`, whatever the number of
    workers. The source is read twice: first to check all of it and to hash the documents, which
    decides their side, then to encode them. Memory does not grow with the source, but for a record
    (see `gptjax.data.sources.LONGEST_LINE`), and for the longest document where the tokenizer is a
    BPE that is not known to cut text as GPT-2 does, which is then encoded whole.

    A run that is stopped leaves a folder without a manifest, which is refused by whatever reads
    it; the next run clears it and begins again.

    Args:
        source: Text, as in `read_documents`, or a folder with `train.*` and `validation.*`.
        destination: The folder to write, see `gptjax.data.token_shards`.
        tokenizer: As in `load_corpus`.
        vocab_size: As in `load_corpus`.
        validation_fraction: As in `load_corpus`.
        text_key: The field of a record that holds its text.
        data_dir: Where TFDS keeps prepared data.
        end_documents: Whether each document is followed by the tokenizer's eos id, where it has one
            and the split has more than one document.
        shard_tokens: How many tokens fill a shard; it ends with the document that fills it.
        workers: Processes that encode; 1 is this one. By default one for each core, or this one
            where there is little text.
        overwrite: Whether shards that are in the destination already are replaced.
        progress: Whether a terminal shows a bar.

    Returns:
        How many documents and tokens, and how long it took.

    Raises:
        UserError: The source cannot be read or split, the destination holds something else or is
            being written, or an argument is not legal.
    """
    started = time.perf_counter()
    check_fraction(validation_fraction)
    check_tokenizer(tokenizer, vocab_size)
    for name, value in (("workers", workers), ("shard_tokens", shard_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: give 1 or more")
    destination = Path(destination).expanduser()
    sources = split_files(source) or (source,)
    if source != EMBEDDED and holds_shards(Path(source)):
        raise UserError(f"{str(source)!r} holds tokens already: give the text they were made of")

    def read() -> list[Iterator[Piece]]:
        options = {"text_key": text_key, "data_dir": data_dir}
        return [drop_empty(read_pieces(each, **options)) for each in sources]

    with (
        _held(destination, overwrite),
        tempfile.TemporaryFile(dir=destination) as hashes,
        _progress_bar(progress) as bar,
    ):
        survey = _survey(read(), hashes, tokenizer == "characters", bar("reading", None))
        split = _split_of(survey, hashes, validation_fraction, str(source))

        def documents() -> Iterator[Piece]:
            pieces = itertools.chain.from_iterable(read())
            return pieces if split.cut is None else _cut_document(pieces, split.cut)

        if tokenizer == "bpe":
            train = _texts_of_train(cut_at_spaces(documents()), split.sides())
        else:
            train = iter(survey.alphabet)
        chosen = make_tokenizer(tokenizer, vocab_size, train, ())
        if workers is None:
            workers = _cores() if survey.text_bytes >= _WORTH_PROCESSES else 1
        clear_shards(destination)
        try:
            encoder = Encoder(chosen)
            end_id = chosen.eos_id if end_documents else None
            writers = [
                SplitWriter(destination, name, encoder.dtype, shard_tokens, end_id)
                for name in SPLITS
            ]
            jobs = _jobs(encoder.cut(documents()))
            advance = bar("tokenizing", survey.text_bytes)
            with contextlib.closing(encode_jobs(encoder, jobs, workers, advance)) as encoded:
                _write(writers, encoded, split.sides(), str(source))
            entries = [writer.close() for writer in writers]
            write_manifest(
                destination,
                dtype=encoder.dtype,
                tokenizer=chosen,
                source=str(source),
                end_id=end_id,
                splits=dict(zip(SPLITS, entries, strict=True)),
            )
        except BaseException:
            clear_shards(destination)
            raise
    return Tokenized(
        folder=destination,
        documents=sum(survey.documents),
        tokens=sum(writer.tokens for writer in writers),
        text_bytes=survey.text_bytes,
        seconds=time.perf_counter() - started,
        workers=workers,
    )


@contextlib.contextmanager
def _held(destination: Path, overwrite: bool) -> Iterator[None]:
    """Makes the folder this run's own, unless it holds what must stay."""
    import filelock

    if destination.exists() and not destination.is_dir():
        raise UserError(f"{str(destination)!r} is a file: give a folder")
    if (destination / MANIFEST).exists() and not overwrite:
        raise UserError(
            f"{str(destination)!r} holds token shards already: give another folder, or overwrite"
        )
    destination.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(destination / LOCK, timeout=0):
            clear_shards(destination, only_check=True)
            yield
    except filelock.Timeout as error:
        raise UserError(
            f"{str(destination)!r} is being written by another process: give another folder, or "
            "wait for it"
        ) from error


@dataclass
class _Survey:
    """What the first reading of a source tells."""

    documents: list[int] = field(default_factory=list)
    """By file of a source that is split already; else all."""
    characters: int = 0
    """Of the last document."""
    text_bytes: int = 0
    smallest: bytes = b"\xff" * _DIGEST_BYTES
    largest: bytes = b""
    alphabet: set[str] = field(default_factory=set)


def _survey(
    sources: Iterable[Iterable[Piece]],
    hashes: BinaryIO,
    wants_alphabet: bool,
    advance: Callable[[int], None],
) -> _Survey:
    survey = _Survey()
    for pieces in sources:
        survey.documents.append(0)
        hash_, characters = new_hash(), 0
        for text, ends in pieces:
            data = text.encode("utf-8")
            hash_.update(data)
            characters += len(text)
            survey.text_bytes += len(data)
            advance(len(data))
            if wants_alphabet:
                survey.alphabet.update(text)
            if ends:
                digest = hash_.digest()
                hashes.write(digest)
                survey.smallest = min(survey.smallest, digest)
                survey.largest = max(survey.largest, digest)
                survey.documents[-1] += 1
                survey.characters = characters
                hash_, characters = new_hash(), 0
    return survey


@dataclass(frozen=True)
class _Split:
    """Which side each document is on, in order; `cut` is where a single one becomes two."""

    sides: Callable[[], Iterator[bool]]
    cut: int | None = None


def _split_of(survey: _Survey, hashes: BinaryIO, fraction: float, source: str) -> _Split:
    if len(survey.documents) == 2:
        train, validation = survey.documents
        check_sides(train, validation, source)
        return _Split(lambda: (number >= train for number in range(train + validation)))
    [documents] = survey.documents
    check_text(documents, source)
    if documents == 1:
        return _Split(lambda: iter([False, True]), cut_place(survey.characters, fraction, source))
    rule = hash_split(survey.smallest, survey.largest, documents, fraction, source)

    def sides() -> Iterator[bool]:
        hashes.seek(0)
        while digest := hashes.read(_DIGEST_BYTES):
            yield rule.holds_out(digest)

    return _Split(sides)


def _cut_document(pieces: Iterable[Piece], place: int) -> Iterator[Piece]:
    """Ends a document after so many characters and begins another."""
    for text, ends in pieces:
        if 0 < place <= len(text):
            yield text[:place], True
            yield text[place:], ends
        else:
            yield text, ends
        place -= len(text)


def _texts_of_train(pieces: Iterable[Piece], sides: Iterator[bool]) -> Iterator[str]:
    begins, held_out = True, False
    for text, ends in pieces:
        if begins:
            held_out = next(sides, False)
        if not held_out:
            yield text
        begins = ends


def _jobs(pieces: Iterable[Piece]) -> Iterator[Job]:
    document, character = 1, 0
    for batch in batches(pieces, _JOB_CHARACTERS):
        yield Job(batch, document, character)
        for text, ends in batch:
            character += len(text)
            if ends:
                document, character = document + 1, 0


def _write(
    writers: Sequence[SplitWriter],
    encoded: Iterable[tuple[np.ndarray, list[int], list[bool]]],
    sides: Iterator[bool],
    source: str,
) -> None:
    side = None
    for ids, lengths, flags in encoded:
        start = 0
        for length, ends in zip(lengths, flags, strict=True):
            side = next(sides, None) if side is None else side
            if side is None:
                raise _changed(source)
            writers[side].add(ids[start : start + length], ends)
            start += length
            if ends:
                side = None
    if side is not None or next(sides, None) is not None:
        raise _changed(source)


def _changed(source: str) -> UserError:
    return UserError(
        f"source {source!r} has other documents than a moment ago: tokenize it when nothing writes "
        "to it"
    )


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@contextlib.contextmanager
def _progress_bar(show: bool) -> Iterator[Callable[[str, int | None], Callable[[int], None]]]:
    """Gives a function that begins a stage of so many bytes and returns one that advances it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (show and console.is_terminal),
    )

    def begin(stage: str, total: int | None) -> Callable[[int], None]:
        task = bar.add_task(stage, total=total)
        return lambda amount: bar.advance(task, amount)

    with bar:
        yield begin
