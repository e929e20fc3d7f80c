"""Traces of a program on its device, and what they say: the costliest operations, by name.

Reads the files that `jax.profiler` writes, without TensorBoard.
"""

import collections
import contextlib
import heapq
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from gptjax.errors import UserError


@dataclass(frozen=True)
class Operation:
    """What the operations of one name cost in a trace.

    Attributes:
        name: of the operation in the compiled program, without its number, and in brackets what it
            computes at the end, as JAX names it.
        scope: the part of the model that it stands in, such as "attention/qkv", with "(backward)"
            or "(recomputed)" behind it; "" where the program is not known.
        seconds: on all devices together. Where several operations run at once the time counts for
            the one that started last, so that the operations add up to the time that a device is
            busy.
        share: of the time that the devices are busy, 0 to 1.
        count: how often they ran.
    """

    name: str
    scope: str
    seconds: float
    share: float
    count: int


@dataclass(frozen=True)
class Step:
    """One step of a trace, see `traced_step`.

    Attributes:
        number: of the step.
        seconds: of the clock, from its start on the host to its end.
        busy: seconds of them in which operations ran, the mean over devices.
    """

    number: int
    seconds: float
    busy: float


@dataclass(frozen=True)
class _Event:
    start: float
    end: float
    module: str
    name: str
    run: int | None


@dataclass(frozen=True)
class _Trace:
    devices: dict[str, list[_Event]]
    steps: list[tuple[int, float, float]]
    fills_gaps: bool
    """Whether an operation may go on after its event, as on a CPU."""


@contextlib.contextmanager
def trace(directory: str | Path, *programs: Any) -> Iterator[None]:
    """Records what the devices do meanwhile.

    On a GPU operations have their names only where they are launched one by one: set
    `XLA_FLAGS=--xla_gpu_enable_command_buffer=` before JAX starts.

    Args:
        directory: where the files go; made where it is not there. TensorBoard reads them too.
        programs: compiled programs (`jax.jit(f).lower(x).compile()`) that run meanwhile. Their text
            is stored beside the trace, and tells where in the model an operation stands.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    options = jax.profiler.ProfileOptions()
    # Calls of Python functions would be most of the events.
    options.python_tracer_level = 0
    with jax.profiler.trace(str(directory), profiler_options=options):
        yield
    for number, program in enumerate(programs):
        path = directory / f"program-{number}.hlo.txt"
        path.write_text(program.as_text(), encoding="utf-8")


def traced_step(number: int) -> Any:
    """A context for one step in a trace, which has to end when the devices are done with it."""
    return jax.profiler.StepTraceAnnotation("step", step_num=number)


def costliest(directory: str | Path, n: int | None = 10) -> list[Operation]:
    """The operations that took the most time, the first the longest.

    Operations of one name are counted together: those of a loop's turns, and those that differ in
    the number that the compiler gave them.

    Args:
        directory: as given to `trace`; of several traces in it the newest counts.
        n: how many; None is all.

    Raises:
        UserError: if there is no trace, or no operation of a device in it.
    """
    seconds: dict[tuple[str, str], float] = collections.defaultdict(float)
    counts: dict[tuple[str, str], int] = collections.Counter()
    read, names = _read(directory), _operation_names(directory)
    for events in read.devices.values():
        called = {(event.module, event.name) for event in events}
        known = {key: _described(*key, names) for key in called}
        for start, end, event in _segments(events, read.fills_gaps):
            seconds[known[event.module, event.name]] += end - start
        for event in events:
            counts[known[event.module, event.name]] += 1
    total = sum(seconds.values())
    ordered = sorted(seconds, key=lambda key: -seconds[key])[:n]
    return [
        Operation(*key, seconds[key] / 1e9, seconds[key] / total, counts[key]) for key in ordered
    ]


def by_part(operations: list[Operation]) -> dict[str, float]:
    """Seconds by the outermost scope, such as "attention", the largest first.

    What stands in no scope is "other".
    """
    seconds: dict[str, float] = collections.defaultdict(float)
    for operation in operations:
        part = operation.scope.partition(" (")[0].partition("/")[0]
        seconds[part or "other"] += operation.seconds
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def explained(directory: str | Path) -> list[Step]:
    """How much of each step's time the operations of the devices account for.

    On a CPU the runtime records when an operation is launched; what its threads do after that
    counts for it, until the next operation of the same run starts.

    Args:
        directory: as given to `trace`; it holds steps in `traced_step`.

    Raises:
        UserError: if there is no trace, no operation of a device or no step in it.
    """
    read = _read(directory)
    if not read.steps:
        raise UserError(f"no steps in the trace in {directory}: run them in profiling.traced_step")
    segments = [
        [(start, end) for start, end, _ in _segments(events, read.fills_gaps)]
        for events in read.devices.values()
    ]
    found = []
    for number, start, end in read.steps:
        inside = (
            max(0.0, min(end, until) - max(start, since))
            for device in segments
            for since, until in device
        )
        busy = sum(inside) / len(segments)
        found.append(Step(number, (end - start) / 1e9, busy / 1e9))
    return found


def _read(directory: str | Path) -> _Trace:
    paths = Path(directory).rglob("*.xplane.pb")
    newest = max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is None:
        raise UserError(f"no trace in {directory}: profiling.trace writes one")
    with warnings.catch_warnings():
        # jaxlib makes a type while it is read, of which Python 3.13 says that it has no module; as
        # an error, which a filter may make of it, that ends the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        return _parse(jax.profiler.ProfileData.from_file(str(newest)), directory)


def _parse(data: Any, directory: str | Path) -> _Trace:
    devices: dict[str, list[_Event]] = collections.defaultdict(list)
    processors: dict[str, list[_Event]] = collections.defaultdict(list)
    steps: list[tuple[int, float, float]] = []
    for plane in data.planes:
        on_device, on_host = (plane.name.startswith(kind) for kind in ("/device:", "/host:"))
        # A GPU's streams are the operations themselves; other lines sum them up. A TPU has one.
        has_streams = on_device and any(line.name.startswith("Stream") for line in plane.lines)
        for line in plane.lines:
            operations = line.name.startswith("Stream") if has_streams else line.name == "XLA Ops"
            if not (on_host or (on_device and operations)):
                continue
            for event in line.events:
                stats = dict(event.stats)
                if on_device:
                    devices[plane.name].append(_event(event, stats))
                elif "step_num" in stats:
                    steps.append((int(stats["step_num"]), event.start_ns, event.end_ns))
                elif "hlo_op" in stats:
                    device = f"CPU {stats.get('device_ordinal', 0)}"
                    processors[device].append(_event(event, stats))
    if not devices and not processors:
        raise UserError(f"no operation of a device in the trace in {directory}")
    # By what ran: where libtpu is installed, a trace has a plane of a device, which is empty.
    return _Trace(dict(devices or processors), sorted(steps), fills_gaps=not devices)


def _event(event: Any, stats: dict[str, Any]) -> _Event:
    name = str(stats.get("hlo_op", event.name))
    run = stats.get("run_id")
    return _Event(event.start_ns, event.end_ns, str(stats.get("hlo_module", "")), name, run)


def _segments(events: list[_Event], fills_gaps: bool) -> Iterator[tuple[float, float, _Event]]:
    """Times that do not overlap, and the event that each is counted for."""
    waiting = sorted(events, key=lambda event: (event.start, -event.end))
    running: list[tuple[float, int, _Event]] = []
    now, last = 0.0, None
    for number in range(len(waiting) + 1):
        until = waiting[number].start if number < len(waiting) else float("inf")
        while running and now < until:
            _, _, event = running[0]
            stop = min(event.end, until)
            if stop > now:
                yield now, stop, event
                now, last = stop, event
            if event.end <= now:
                heapq.heappop(running)
        if number == len(waiting):
            return
        event = waiting[number]
        if fills_gaps and last is not None and last.run == event.run and event.start > now:
            yield now, event.start, last
        now = max(now, event.start)
        # The latest start first; of two, the one inside the other.
        heapq.heappush(running, (-event.start, -number, event))


def _described(module: str, name: str, names: dict[tuple[str, str], str]) -> tuple[str, str]:
    """An operation's name and scope."""
    op_name = names.get((module, name)) or names.get(("", _flat(name)), "")
    scope, primitive = _scope(op_name)
    base = re.sub(r"[._]\d+$", "", name)
    return (f"{base} ({primitive})" if primitive and primitive not in base else base), scope


def _flat(name: str) -> str:
    # A kernel is named after its operation, where it is not named by the library that it is from.
    return re.sub(r"\W", "_", name)


def _operation_names(directory: str | Path) -> dict[tuple[str, str], str]:
    """What the stored programs say of their operations: (module, operation) -> JAX's name."""
    names: dict[tuple[str, str], str] = {}
    for path in sorted(Path(directory).glob("program-*.hlo.txt")):
        names |= _program_names(path.read_text(encoding="utf-8"))
    return names


_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = ")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_OP_NAME = re.compile(r'op_name="([^"]+)"')
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")


def _program_names(text: str) -> dict[tuple[str, str], str]:
    module = re.match(r"HloModule ([\w.-]+)", text)
    inside: dict[str, list[str]] = collections.defaultdict(list)
    own: dict[str, str] = {}
    called: dict[str, str] = {}
    computation = ""
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            if op_name := _OP_NAME.search(line):
                own[found[1]] = op_name[1]
                inside[computation].append(op_name[1])
            elif callee := _CALLED.search(line):
                called[found[1]] = callee[1]
        elif found := _COMPUTATION.match(line):
            computation = found[1]
    for name, callee in called.items():
        if inside[callee]:
            # What most of the fused operations are.
            own[name] = collections.Counter(inside[callee]).most_common(1)[0][0]
    names = {(module[1] if module else "", name): op_name for name, op_name in own.items()}
    return names | {("", _flat(name)): op_name for name, op_name in own.items()}


# What JAX's transformations and control flow add to a name.
_TRANSFORMED = re.compile(r"^(?:jvp|transpose|vmap|shmap_body|custom_jvp|custom_vjp)\((.*)\)$")
_CONTROL = re.compile(
    r"^(?:|p?jit\b.*|closed_call|core_call|eval_jaxpr|while|body|cond|branch_\d+\w*|scan|shard_map"
    r"|checkpoint|remat\d*|rematted_computation|custom_\w+|.*->.*)$"
)


def _scope(op_name: str) -> tuple[str, str]:
    """The model's part in a name such as "jit(step)/transpose(jvp())/mlp/dot_general", and the op.

    ("mlp (backward)", "dot_general").
    """
    if "(" in op_name and ":" in op_name:
        # A collective for many.
        return "several", ""
    # Of operations merged into one the first.
    parts = op_name.partition(";")[0].split("/")
    scope = []
    for part in parts[:-1]:
        while found := _TRANSFORMED.match(part):
            part = found[1]
        if not _CONTROL.match(part):
            scope.append(part)
    kind = ""
    if "rematted_computation" in parts:
        kind = " (recomputed)"
    elif "transpose(" in op_name:
        kind = " (backward)"
    primitive = "" if _CONTROL.match(parts[-1]) else parts[-1]
    return "/".join(scope) + kind if scope else "", primitive
