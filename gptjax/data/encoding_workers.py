"""Encoding by several processes, in the order of the text and in bounded memory."""

import collections
import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

import numpy as np

from gptjax.data.encoding import Encoder, Piece
from gptjax.errors import UserError
from gptjax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Job:
    """Pieces to encode, and where they begin for an error to name.

    Attributes:
        pieces: What is encoded, in order.
        document: The number of the first document in it, from 0.
        character: Where in that document the job begins.
    """

    pieces: list[Piece]
    document: int
    character: int

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        texts = (text for text, _ in self.pieces)
        return sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts)


def encode_jobs(
    encoder: Encoder, jobs: Iterable[Job], workers: int, advance: Callable[[int], None]
) -> Generator[tuple[np.ndarray, list[int], list[bool]], None, None]:
    """Yields for each job, in order, all ids, how many are of each piece, and which end documents.

    No more jobs are under way than keep the workers busy, so that memory is bounded.

    Args:
        encoder: What encodes.
        jobs: What there is to encode.
        workers: Processes; 1 is this one.
        advance: Is told the UTF-8 bytes of each job that is done.
    """
    with contextlib.ExitStack() as stack:
        if workers == 1:
            encoded = ((job, _encode_job(encoder, job)) for job in jobs)
        else:
            pool = stack.enter_context(_Pool(encoder.tokenizer, workers))
            encoded = pool.in_order(jobs)
        for job, (ids, lengths) in encoded:
            yield ids, lengths, [ends for _, ends in job.pieces]
            advance(job.text_bytes)


def _encode_job(encoder: Encoder, job: Job) -> tuple[np.ndarray, list[int]]:
    try:
        arrays = encoder.encode([text for text, _ in job.pieces])
    except UserError as error:
        raise UserError(
            f"in the text from character {job.character} of document {job.document} on: {error}"
        ) from error
    return np.concatenate(arrays), [len(ids) for ids in arrays]


class _Pool:
    """Processes that encode, each served by a thread.

    The standard pools start processes that import the caller's script again, and these live on
    when the first process is killed. These import gptjax only, and end with their standard input.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int):
        try:
            self._tokenizer = pickle.dumps(tokenizer)
        except Exception as error:  # Pickle's own, or whatever the tokenizer raises.
            raise _not_sent(tokenizer, error) from error
        self._kind = tokenizer
        self._workers = workers
        self._threads = ThreadPoolExecutor(workers)
        self._local = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            with process, contextlib.suppress(BrokenPipeError):
                process.communicate()

    def in_order(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, tuple[np.ndarray, list[int]]]]:
        """Yields jobs with what was encoded."""
        under_way = collections.deque()
        for job in jobs:
            under_way.append((job, self._threads.submit(self._encode, job)))
            if len(under_way) == 3 * self._workers:
                job, future = under_way.popleft()
                yield job, future.result()
        for job, future in under_way:
            yield job, future.result()

    def _encode(self, job: Job) -> tuple[np.ndarray, list[int]]:
        try:
            if not hasattr(self._local, "pipes"):
                self._local.pipes = self._begin()
            jobs, results = self._local.pipes
            pickle.dump(job, jobs)
            jobs.flush()
            found = pickle.load(results)
        except (EOFError, BrokenPipeError) as error:
            raise UserError(
                "a worker process ended before its time: give fewer workers if memory ran out"
            ) from error
        if isinstance(found, Exception):
            raise found
        return found

    def _begin(self) -> tuple[IO[bytes], IO[bytes]]:
        """Starts a process and returns where jobs go and results come from."""
        process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import _serve; _serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                "TOKENIZERS_PARALLELISM": "false",  # The processes are the parallelism.
            },
            start_new_session=True,  # What to do about Ctrl-C is for the first process to say.
        )
        self._processes.append(process)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(self._tokenizer)
        process.stdin.flush()
        trouble = pickle.load(process.stdout)
        if trouble is not None:
            raise _not_sent(self._kind, trouble)
        return process.stdin, process.stdout


def _serve() -> None:
    """Encodes jobs from standard input until the first process closes it, or is no more."""
    jobs, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # Whatever else is printed must not come between.

    def send(result: object) -> None:
        pickle.dump(result, results)
        results.flush()

    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            encoder = Encoder(pickle.load(jobs))
        except Exception as error:  # Whatever the tokenizer raises.
            send(str(error))
            return
        send(None)
        while True:
            job = pickle.load(jobs)
            try:
                found = _encode_job(encoder, job)
            except Exception as error:  # It belongs to the first process.
                found = error
            send(found)


def _not_sent(tokenizer: Tokenizer, reason: object) -> UserError:
    return UserError(
        f"{type(tokenizer).__name__} cannot be sent to worker processes ({reason}): give workers=1"
    )
