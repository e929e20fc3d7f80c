"""How fast text becomes token shards, and how fast batches are read from them.

    python experiments/benchmarks/data.py --tokenizer FOLDER

FOLDER holds GPT-2's tokenizer.json, or vocab.json and merges.txt.
The text is the Python standard library's own source, or `--data`.
"""

import json
import resource
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from measuring import Column, Report

from gptjax.command_line import parse_flags, run_command
from gptjax.data import BatchLoader, load_corpus, read_documents
from gptjax.data.tokenizing import tokenize
from gptjax.errors import UserError
from gptjax.pretrained.tokenizer_files import read_tokenizer
from gptjax.tokenizer import BPETokenizer

LIBRARY_BATCH = 256


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        tokenizer: A folder with a BPE tokenizer.
        data: The text, as for `gptjax tokenize`; each document must fit in memory.
        workers: Numbers of processes.
        batch_size: Rows of the batches that are read.
        context_length: Tokens of a row.
        shard_tokens: Tokens of a file where there are several.
        batches: How many are read.
        json: A file to write the results to.
        png: A picture of megabytes a second.
    """

    tokenizer: str
    data: str | None = None
    workers: tuple[int, ...] = (1, 2)
    batch_size: int = 64
    context_length: int = 1024
    shard_tokens: int = 1 << 20
    batches: int = 500
    json: Path | None = None
    png: Path | None = None


def main() -> None:
    """Measures both."""
    settings = parse_flags(Settings, None, __doc__ or "", None)
    tokenizer = read_tokenizer(settings.tokenizer)
    if not isinstance(tokenizer, BPETokenizer):
        raise UserError(f"no BPE tokenizer in {settings.tokenizer!r}: give a folder with one")
    report = Report("From text to token shards", settings)
    reading = Report("Batches read at random places", settings)
    with tempfile.TemporaryDirectory() as folder:
        source = settings.data or standard_library(Path(folder) / "library.jsonl")
        add(report, "the library, its threads", *library_alone(tokenizer, source))
        for workers in settings.workers:
            started = cpu_seconds()
            done = tokenize(
                source,
                Path(folder) / "one",
                tokenizer=tokenizer,
                workers=workers,
                overwrite=True,
                progress=False,
            )
            label = f"gptjax, {workers} worker{'s' if workers > 1 else ''}"
            add(report, label, done.text_bytes, done.seconds, cpu_seconds() - started)
        report.show(COLUMNS)
        tokenize(
            source,
            Path(folder) / "several",
            tokenizer=tokenizer,
            progress=False,
            shard_tokens=settings.shard_tokens,
        )
        for name in ("one", "several"):
            rate = read_rate(Path(folder) / name, settings)
            tokens = rate * settings.batch_size * settings.context_length
            files = len(list((Path(folder) / name).glob("train-*.bin")))
            label = f"{files} file{'s' if files > 1 else ''}"
            reading.add(label, tokens_per_second=tokens, batches_per_second=rate)
    reading.show(COLUMNS)
    report.extra["reading"] = reading.rows
    report.save(settings.json, settings.png, "bytes_per_second")


COLUMNS = {
    "bytes": Column("MB", 1, 1e-6),
    "bytes_per_second": Column("MB/s", 1, 1e-6),
    "bytes_per_cpu_second": Column("MB a second of CPU", 1, 1e-6),
    "batches_per_second": Column("batches/s", 0),
}


def standard_library(path: Path) -> Path:
    """Writes the modules of the standard library as documents."""
    root = Path(sysconfig.get_path("stdlib"))
    with path.open("w", encoding="utf-8") as file:
        for module in sorted(root.rglob("*.py")):
            if "site-packages" not in module.parts:
                text = module.read_bytes().decode("utf-8", errors="ignore")
                file.write(json.dumps({"text": text}) + "\n")
    return path


def library_alone(tokenizer: BPETokenizer, source: str | Path) -> tuple[int, float, float]:
    """Bytes, seconds and CPU seconds of reading the documents and encoding them by threads."""
    text_bytes, started, cpu = 0, time.perf_counter(), cpu_seconds()
    batch: list[str] = []
    for text in read_documents(source):
        text_bytes += len(text.encode("utf-8"))
        batch.append(text)
        if len(batch) == LIBRARY_BATCH:
            tokenizer.encode_batch(batch)
            batch = []
    tokenizer.encode_batch(batch)
    return text_bytes, time.perf_counter() - started, cpu_seconds() - cpu


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def add(report: Report, label: str, text_bytes: int, seconds: float, cpu: float) -> None:
    """Adds a row."""
    rates = {"bytes_per_second": text_bytes / seconds, "bytes_per_cpu_second": text_bytes / cpu}
    report.add(label, bytes=text_bytes, seconds=seconds, **rates)


def read_rate(folder: Path, settings: Settings) -> float:
    """Batches a second, at random places."""
    loader = BatchLoader(
        load_corpus(folder).train,
        batch_size=settings.batch_size,
        context_length=settings.context_length,
    )
    loader[0]
    started = time.perf_counter()
    for position in range(settings.batches):
        loader[position]
    return settings.batches / (time.perf_counter() - started)


if __name__ == "__main__":
    run_command(main)
