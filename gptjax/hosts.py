"""The processes of one run: how they find each other, agree, and end together.

JAX's coordination service connects processes, but where one is missing or dies it aborts the others
with a stack trace that names nobody. So process 0 first calls the roll over TCP, at the address of
the coordinator, and the connections stay open while the run lasts: the kernel closes a dead
process's, and everyone hears at once who it was. JAX's heartbeats remain for one that hangs.
"""

import atexit
import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np

from gptjax.errors import UserError

Value = TypeVar("Value")

HEARTBEAT_TIMEOUT = 30
"""Seconds without a sign of life after which a process counts as dead."""

_NOTICE_SECONDS = 15.0
_ANSWER_SECONDS = 5.0
# How long a process that hears of another's error may take to come upon its own.
_GRACE_SECONDS = 2.0
_SHORT_MESSAGE = 256


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout: float = 300,
) -> None:
    """Makes this process one of a run's; to be called before JAX is used for anything else.

    What is not given comes from Slurm, Cloud TPU (GKE or a TPU VM) or Open MPI where the process
    was started by one of them. Does nothing where the process is alone, or JAX's distributed
    runtime was initialized before.

    Once it returns, a process that dies or fails ends the others too, within seconds, each with a
    line that names it and with a status other than 0.

    Args:
        coordinator: "HOST:PORT" of process 0, where every process can reach it.
        num_processes: how many processes there are.
        process_id: the number of this one, from 0.
        start_timeout: seconds to wait for all processes.

    Raises:
        UserError: if only some of the arguments are known or they are illegal, or if processes are
            missing at the end of the wait, which are named.
    """
    if jax.distributed.is_initialized():
        return
    asked = (coordinator, num_processes, process_id) != (None, None, None)
    coordinator, num_processes, process_id, local_devices = _detected(
        coordinator, num_processes, process_id, start_timeout
    )
    if num_processes == 1 or (not asked and None in (coordinator, num_processes, process_id)):
        return
    address = _checked(coordinator, num_processes, process_id)
    assert num_processes is not None
    assert process_id is not None
    links = (_call_roll if process_id == 0 else _answer_roll)(
        address, num_processes, process_id, start_timeout
    )
    _watch(process_id, links)
    # A signal asks for a stop at the same step everywhere by `StopVote`. JAX's own service would
    # take SIGTERM away from this process for good.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        local_device_ids=local_devices,
        initialization_timeout=max(30, int(start_timeout)),
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
    )


def are_several() -> bool:
    """Whether `initialize` made this process one of several."""
    return _run is not None


def is_main() -> bool:
    """Whether this process prints and writes files: it is process 0."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """What every process gave, in their order; they wait for each other here.

    Args:
        value: anything that JSON holds.
    """
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    # Few programs, since each size compiles one: short messages have one size, long ones a power
    # of two.
    first = np.zeros(_SHORT_MESSAGE, np.uint8)
    first[:4] = np.frombuffer(np.uint32(len(text)).tobytes(), np.uint8)
    room = _SHORT_MESSAGE - 4
    first[4 : 4 + min(room, len(text))] = np.frombuffer(text[:room], np.uint8)
    rows = _allgather(first)
    lengths = [int(np.frombuffer(row[:4].tobytes(), np.uint32)[0]) for row in rows]
    texts = [row[4:].tobytes() for row in rows]
    if max(lengths) > room:
        padded = np.zeros(1 << (max(lengths) - 1).bit_length(), np.uint8)
        padded[: len(text)] = np.frombuffer(text, np.uint8)
        texts = [row.tobytes() for row in _allgather(padded)]
    return [json.loads(text[:length]) for text, length in zip(texts, lengths, strict=True)]


def on_main(function: Callable[[], Value]) -> Value:
    """Calls a function on process 0 only; every process gets what it returns or raises.

    Args:
        function: returns something that JSON holds. It must not wait for other processes.

    Raises:
        UserError: where the function raises one.
        OSError: where it raises one.
    """
    if jax.process_count() == 1:
        return function()
    value, error = None, None
    if is_main():
        try:
            value = function()
        except (UserError, OSError) as raised:
            error = raised
    known = None if error is None else [isinstance(error, UserError), str(error)]
    value, known = gather([value, known])[0]
    if error is not None:
        raise error
    if known is not None:
        raise (UserError if known[0] else OSError)(known[1])
    return value


class StopVote:
    """Whether any process was asked to stop, with the same answer everywhere at the same step.

    A vote is a reduction that the devices do between two steps, and is read a step later: nobody
    waits for it.
    """

    def __init__(self) -> None:
        self._alone = jax.process_count() == 1
        if self._alone:
            return
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("device",))
        each = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("device"))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._any = jax.jit(lambda votes: votes.max(), in_shardings=each, out_shardings=whole)
        self._ballots = [
            jax.make_array_from_callback(
                (mesh.size,), each, lambda _, vote=vote: np.full(1, vote, np.int32)
            )
            for vote in (0, 1)
        ]
        self._pending: jax.Array | None = None

    def __call__(self, asked: bool) -> bool:
        """Votes, and gives the result of the vote before; alone, gives `asked` at once."""
        if self._alone:
            return asked
        before, self._pending = self._pending, self._any(self._ballots[asked])
        return before is not None and bool(before)


def fail(error: BaseException, status: int) -> NoReturn:
    """Ends a process with a status; if it is one of several, tells the others why."""
    if _run is None:
        sys.exit(status)
    _run.fail(error, status)


def leave_with_others() -> None:
    """Ends this process if another one's end is what made it fail, and says so.

    Collective operations raise as soon as a peer is gone, in a backend's own words. For a caught
    error that is not the user's.
    """
    if _run is not None:
        _run.leave_with_others()


# Finding each other.


def _detected(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float
) -> tuple[str | None, int | None, int | None, Any]:
    """The arguments, with what the cluster knows in place of None, and this process's devices."""
    # jax.distributed.initialize looks by the same function, but only when it is too late to call
    # the roll.
    from jax._src import clusters

    with warnings.catch_warnings():
        # Every pod of Kubernetes would be told to install its client.
        warnings.simplefilter("ignore")
        return clusters.ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, num_processes, process_id, None, None, int(timeout)
        )


def _checked(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, int]:
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    unknown = [name for name, value in given.items() if value is None]
    if unknown:
        raise UserError(
            f"{' and '.join(unknown)} not given, and no Slurm, Cloud TPU or Open MPI here tells; "
            "give coordinator, num_processes and process_id together"
        )
    assert coordinator is not None
    assert num_processes is not None
    assert process_id is not None
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(
            f"process_id is {process_id} of num_processes {num_processes}; process ids are 0 to "
            "num_processes - 1"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"coordinator is {coordinator!r}; give HOST:PORT, the address of process 0 and a free "
            "port on it, such as 10.0.0.1:9876"
        )
    return host.strip("[]"), int(port)


class _Link:
    """A connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Of a machine that is gone nobody closes the connection: ask it whether it is there.
        for option, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
        self._connection = connection
        self._unread = b""

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: Any) -> None:
        """Sends; who is gone hears nothing."""
        with contextlib.suppress(OSError):
            self._connection.settimeout(_ANSWER_SECONDS)
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> Any:
        """The next message.

        Raises:
            OSError: if the connection ends, or nothing comes in that time.
        """
        end = time.monotonic() + seconds
        while b"\n" not in self._unread:
            self._connection.settimeout(max(0.01, end - time.monotonic()))
            more = self._connection.recv(4096)
            if not more:
                raise ConnectionError
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError:
            raise ConnectionError from None

    def is_open(self) -> bool:
        self._connection.setblocking(False)
        try:
            return bool(self._connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        self._connection.close()


def _call_roll(address: tuple[str, int], count: int, _: int, timeout: float) -> dict[int, _Link]:
    """Waits for all other processes; process 0's side."""
    host, port = address
    both = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
            backlog=count,
        )
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} ({error.strerror}); give a free port, the "
            "same to all processes"
        ) from None
    links: dict[int, _Link] = {}
    came: list[_Link] = []
    start = time.monotonic()
    notice = start + _NOTICE_SECONDS
    problem = None
    with server:
        while problem is None:
            # One that came and died is missing again.
            links = {process: link for process, link in links.items() if link.is_open()}
            if len(links) == count - 1:
                break
            missing = _names(process for process in range(1, count) if process not in links)
            now = time.monotonic()
            if now >= start + timeout:
                problem = (
                    f"{missing} of {count} did not come to {host}:{port} within {timeout:g} s; "
                    "see whether it runs and reaches this address, or allow a longer start"
                )
                break
            if now >= notice:
                print(f"waiting for {missing} of {count} …", file=sys.stderr, flush=True)
                notice = now + _NOTICE_SECONDS
            server.settimeout(max(0.01, min(notice, start + timeout) - now))
            try:
                link = _Link(server.accept()[0])
            except TimeoutError:
                continue
            try:
                hello = link.receive(_ANSWER_SECONDS)
                process, of = int(hello["process"]), int(hello["of"])
            except (OSError, KeyError, TypeError, ValueError):
                # Something else that looks at open ports.
                link.close()
                continue
            if of != count:
                problem = (
                    f"process {process} was told of {of} processes, but process 0 of {count}; "
                    "start all with the same number"
                )
            elif process in links and links[process].is_open():
                problem = f"two processes came as process {process}; give each its own number"
            came.append(link)
            links[process] = link
    for link in came:
        link.send({"problem": problem})
    if problem is not None:
        raise UserError(problem)
    return links


def _answer_roll(
    address: tuple[str, int], count: int, process: int, timeout: float
) -> dict[int, _Link]:
    """Waits until process 0 has heard of all; another process's side."""
    end = time.monotonic() + timeout
    while True:
        left = end - time.monotonic()
        if left <= 0:
            raise UserError(
                f"process {process} of {count} heard nothing from process 0 at "
                f"{address[0]}:{address[1]} within {timeout:g} s; see whether process 0 runs and "
                "this address can be reached from here"
            )
        try:
            link = _Link(socket.create_connection(address, timeout=min(left, _ANSWER_SECONDS)))
        except OSError:
            time.sleep(0.2)
            continue
        link.send({"process": process, "of": count})
        try:
            # Somewhat longer than process 0 waits, which can name the missing ones.
            problem = link.receive(max(0.0, end - time.monotonic()) + _ANSWER_SECONDS)["problem"]
        except (OSError, KeyError, TypeError):
            # Not process 0, or the one of a run that just ended: this run's may yet come.
            link.close()
            time.sleep(0.2)
            continue
        if problem is not None:
            raise UserError(problem)
        return {0: link}


def _names(processes: Any) -> str:
    numbers = [str(process) for process in processes]
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(numbers)}"


# Ending together.


class _Watch:
    """Listens for the end of other processes, and tells them of this one's.

    Process 0 has a connection to each other one and passes on what it hears.
    """

    def __init__(self, process: int, links: dict[int, _Link]):
        self._process = process
        self._links = links
        self._leaving = threading.Event()
        self._heard = threading.Event()
        self._news = ""
        threading.Thread(target=self._listen, name="hosts", daemon=True).start()

    def _listen(self) -> None:
        waiting = selectors.DefaultSelector()
        for process, link in self._links.items():
            waiting.register(link, selectors.EVENT_READ, process)
        while waiting.get_map():
            for key, _ in waiting.select():
                process, link = key.data, self._links[key.data]
                try:
                    message = link.receive(_ANSWER_SECONDS)
                except OSError:
                    message = {"ended": process, "why": None}
                if message == "bye":
                    waiting.unregister(link)
                    continue
                self._end(message["ended"], message["why"])
                return

    def _end(self, process: int, why: str | None) -> None:
        for other, link in self._links.items():
            if other != process:
                link.send({"ended": process, "why": why})
        reason = "died" if why is None else f"failed ({why})"
        self._news = (
            f"error: process {process} {reason}, so process {self._process} ends; the same command "
            "resumes at the last checkpoint"
        )
        self._heard.set()
        if why is not None:
            # Every process may be about to come upon the same error, and tell more of it.
            self._leaving.wait(_GRACE_SECONDS)
        if not self._leaving.is_set():
            self._leave_for_news()

    def _leave_for_news(self) -> NoReturn:
        self._leaving.set()
        # Straight to the file: no lock that another thread may hold, and before JAX aborts.
        os.write(2, f"{self._news}\n".encode())
        _exit(1)

    def leave_with_others(self) -> None:
        if self._heard.wait(_GRACE_SECONDS):
            self._leave_for_news()

    def fail(self, error: BaseException, status: int) -> NoReturn:
        if not isinstance(error, UserError):
            self.leave_with_others()
        self._leaving.set()
        why = " ".join(str(error).split()) or type(error).__name__
        for link in self._links.values():
            link.send({"ended": self._process, "why": why[:2000]})
        _exit(status)

    def at_exit(self) -> None:
        # Python notes here an error that nobody caught.
        error = getattr(sys, "last_value", None)
        if error is not None:
            self.fail(error, 1)
        self._leaving.set()
        for link in self._links.values():
            link.send("bye")


_run: _Watch | None = None


def _watch(process: int, links: dict[int, _Link]) -> None:
    global _run
    _run = _Watch(process, links)
    atexit.register(_run.at_exit)


def _exit(status: int) -> NoReturn:
    """Ends at once: JAX would wait at exit for processes that will not come."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _allgather(row: np.ndarray) -> list[np.ndarray]:
    from jax.experimental import multihost_utils

    return list(np.asarray(multihost_utils.process_allgather(row)))
