"""What a traced or compiled program does: its matrix products, collectives and largest arrays."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply)=%?([\w.\-]+)")
_CALLED_MANY = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_COLLECTIVE = re.compile(
    r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) "
    r"(ragged-all-to-all|all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)"
    r"(-start)?\((.*)$"
)
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_ELEMENT = re.compile(r"= [su]32\[\]\S* get-tuple-element\(.*\), index=(\d+)")
_ADDED = re.compile(r"= [su]32\[\]\S* add\(%([\w.\-]+), %([\w.\-]+)\)")
_DEFINED = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ([a-z]\w*)\[([\d,]*)\]")
_PRODUCT = re.compile(r" (convolution|dot)\(%?([\w.\-]+), %?([\w.\-]+)\)(.*)$")
_KERNEL = re.compile(r"custom_call_target=\"(tpu_custom_call|__cublas|__cudnn|__triton)")


@dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program.

    Attributes:
        kind: one of `KINDS`.
        axes: the mesh axes that it runs along.
        dtype: of its largest array, as XLA writes it ("bf16").
        shapes: of the arrays when they are whole: what an all-gather puts out, what the others
            take in. Per device.
        bytes: of these arrays together.
        count: how often a step runs it.
        in_loop: whether a loop holds it.
        sent: bytes that each device sends in a step, by the ring algorithm, which sends the least.
        local: how many of the devices that take part are joined by fast links.
        size: how many devices take part.
        scope: the place in the model, as JAX's name scopes have it.
        overlapped: whether it goes on beside matrix products or kernels: it is started and ended by
            operations of their own, and the schedule has some between them.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    count: int
    in_loop: bool
    sent: float
    local: int
    size: int
    scope: str
    overlapped: bool = False


def read_collectives(
    text: str, axes: Mapping[str, int], linked: int | None = None
) -> list[Collective]:
    """The collectives of a compiled program, loops accounted for.

    Args:
        text: the optimized HLO (`compiled.as_text()`).
        axes: mesh axis -> size, in the order of the mesh that the program was compiled for.
        linked: how many devices, one after another in the mesh, fast links join; None is all.

    Returns:
        One entry for each operation in the program's text. Those in a loop count as often as the
        loop turns.
    """
    computations = _computations(text)
    times, in_loop = _executions(computations)
    schedule = _Schedule(computations)
    linked = math.prod(axes.values()) if linked is None else linked
    found = []
    for name, lines in computations.items():
        # Products that a collective goes on beside, started elsewhere, name it again.
        if name not in times or "async_collective_fusion" in name:
            continue
        for at, line in enumerate(lines):
            match = _COLLECTIVE.match(line)
            if match is None:
                continue
            kind = match[2].removeprefix("ragged-")
            # Compiled for a TPU, a reduce-scatter is an all-reduce inside a fusion of this name.
            fused = kind == "all-reduce" and "all-reduce-scatter" in name
            kind = "reduce-scatter" if fused else kind
            arrays = [
                (dtype, tuple(int(n) for n in sizes.split(",") if n))
                for dtype, sizes in _SHAPE.findall(match[1])
            ]
            starts = match[3] is not None and kind != "all-reduce"
            if starts:
                # What goes in and what comes out, and for a permutation two counters.
                arrays = [array for array in arrays if array[0] != "u32" or array[1]]
                half = len(arrays) // 2
                arrays = arrays[:half] if kind == "reduce-scatter" else arrays[half:]
            group = _first_group(line, kind, math.prod(axes.values()))
            size = 2 if kind == "collective-permute" else len(group)
            if size < 2:
                continue
            if kind == "reduce-scatter" and not fused and not starts:
                arrays = [(dtype, _grown(shape, line, size)) for dtype, shape in arrays]
            sizes = [_bytes(*array) for array in arrays]
            whole = sum(sizes)
            share = {"all-reduce": 2 * (size - 1) / size, "collective-permute": 1.0}
            op_name = re.search(r'op_name="([^"]*)"', line)
            found.append(
                Collective(
                    kind=kind,
                    axes=_spanned(group, axes),
                    dtype=arrays[int(np.argmax(sizes))][0],
                    shapes=tuple(shape for _, shape in arrays),
                    bytes=round(whole),
                    count=times[name],
                    in_loop=in_loop[name],
                    sent=whole * times[name] * share.get(kind, (size - 1) / size),
                    local=sum(member // linked == group[0] // linked for member in group),
                    size=size,
                    scope=op_name[1] if op_name else "",
                    overlapped=schedule.overlapped(name, at),
                )
            )
    return found


class _Schedule:
    """The order of a compiled program's operations, and which of them are long."""

    def __init__(self, computations: dict[str, list[str]]) -> None:
        self._computations = computations
        self._working: dict[str, bool] = {}
        # Where each computation stands: the fusions that start a collective hold it inside.
        self._callers: dict[str, tuple[str, int]] = {}
        for name, lines in computations.items():
            for at, line in enumerate(lines):
                for _, called in _CALLED.findall(line):
                    self._callers.setdefault(called, (name, at))

    def overlapped(self, name: str, at: int) -> bool:
        """Whether work stands between the start and the end of a collective."""
        lines = self._computations[name]
        line = lines[at]
        if "-start(" in line:
            own = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) =", line)
            assert own is not None
            ends = re.compile(rf"-done\(%?{re.escape(own[1])}\b")
            return self._work_before(name, at, lambda later: ends.search(later) is not None)
        if any('custom_call_target="AsyncCollectiveStart"' in other for other in lines):
            channel = re.search(r"channel_id=\d+\b", line)
            caller = self._callers.get(name)
            if channel is None or caller is None:
                return False

            def is_end(later: str) -> bool:
                inner = [other for n in self._called(later) for other in self._computations[n]]
                return any('custom_call_target="AsyncCollectiveDone"' in o for o in inner) and any(
                    channel[0] in re.findall(r"channel_id=\d+\b", other) for other in inner
                )

            return self._work_before(*caller, is_end)
        return False

    def _work_before(self, name: str, start: int, is_end: Callable[[str], bool]) -> bool:
        worked = False
        for line in self._computations[name][start + 1 :]:
            if is_end(line):
                return worked
            worked = worked or self._works(line)
        # What ends in another computation, as in the next turn of a loop, goes on all that time.
        return worked

    def _works(self, line: str) -> bool:
        """Whether an operation is, or holds, a product of matrices or a kernel."""
        if _PRODUCT.search(line) or _KERNEL.search(line):
            return True
        return any(self._holds_work(called) for called in self._called(line))

    def _holds_work(self, name: str) -> bool:
        if name not in self._working:
            self._working[name] = False
            lines = self._computations.get(name, [])
            self._working[name] = any(self._works(line) for line in lines)
        return self._working[name]

    def _called(self, line: str) -> list[str]:
        return [called for _, called in _CALLED.findall(line) if called in self._computations]


@dataclass(frozen=True)
class Products:
    """The matrix products of a compiled program on one device, in floating-point operations.

    Attributes:
        flops: of their real dimensions.
        tiled: as the matrix unit does them: it takes whole tiles of the dimension that is summed
            over and of one of the others, and whole groups of eight of the third.
    """

    flops: float
    tiled: float

    @property
    def padding(self) -> float:
        """The share of the matrix unit's work that is on the empty part of tiles, 0 to 1."""
        return 1 - self.flops / self.tiled if self.tiled else 0.0


def read_products(text: str, tile: int = 128) -> Products:
    """The matrix products of a compiled program, loops by their length.

    Kernels, whose products the compiler does not see, are not in it.

    Args:
        text: the optimized HLO (`compiled.as_text()`).
        tile: the width of the matrix unit.
    """
    computations = _computations(text)
    times, _ = _executions(computations)
    flops = tiled = 0.0
    for name, lines in computations.items():
        if name not in times:
            continue
        shapes: dict[str, tuple[int, ...]] = {}
        for line in lines:
            defined = _DEFINED.match(line)
            if defined is None:
                continue
            shapes[defined[1]] = tuple(int(n) for n in defined[3].split(",") if n)
            product = _PRODUCT.search(line)
            if product is None:
                continue
            sides = shapes[product[2]], shapes[product[3]]
            size = _dot_size if product[1] == "dot" else _convolution_size
            repeats, rows, columns, summed = size(product[4], *sides, shapes[defined[1]])
            whole = _whole_tiles(rows, columns, summed, tile)
            flops += 2.0 * times[name] * repeats * rows * columns * summed
            tiled += 2.0 * times[name] * repeats * whole
    return Products(flops, tiled)


def _whole_tiles(rows: int, columns: int, summed: int, tile: int) -> int:
    """The multiplications of a product in whole tiles, one side held in the unit, one streamed."""
    either = min(_up(rows, 8) * _up(columns, tile), _up(rows, tile) * _up(columns, 8))
    return either * _up(summed, tile)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _dot_size(
    rest: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """How many products, and the rows, columns and summed elements of each."""
    named = {
        key: [int(n) for n in numbers.split(",") if n]
        for key, numbers in re.findall(r"\b([lr]hs_\w+_dims)=\{([\d,]*)\}", rest)
    }
    batch = named.get("lhs_batch_dims", [])
    contracted = named.get("lhs_contracting_dims", [])
    repeats = math.prod(left[n] for n in batch)
    summed = math.prod(left[n] for n in contracted)
    rows = math.prod(left) // max(repeats * summed, 1)
    return repeats, rows, math.prod(right) // max(repeats * summed, 1), summed


def _convolution_size(
    rest: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """The same of a convolution, which is how a TPU's compiler writes a product.

    What are several dimensions of a matrix are spatial ones here, with a window that reaches over
    them; only those of its places that lie on the input are computed.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    assert labels is not None
    inputs, kernel, outputs = labels[1], labels[2], labels[3]
    window = re.search(r"window=\{([^}]*)\}", rest)
    given = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(label for label in outputs if label.isdigit())
    repeats = 1
    for dimension, label in enumerate(spatial):
        of = {key: value.split("x")[dimension] for key, value in given.items()}
        low = int(of.get("pad", "0_0").split("_")[0])
        stride, base, apart = (
            int(of.get(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        reach = base * (left[inputs.index(label)] - 1)
        places = np.arange(out[outputs.index(label)])[:, None] * stride - low
        places = places + np.arange(right[kernel.index(label)])[None] * apart
        repeats *= int(np.sum((places >= 0) & (places <= reach) & (places % base == 0)))
    groups = re.search(r"(?:feature|batch)_group_count=(\d+)", rest)
    columns = out[outputs.index("f")]
    if groups is not None:
        repeats, columns = repeats * int(groups[1]), columns // int(groups[1])
    return repeats, out[outputs.index("b")], columns, right[kernel.index("i")]


def largest_array(text: str, one_of: set[int], none_of: set[int]) -> int:
    """Bytes of the largest array in a compiled program by the sizes of its dimensions.

    Args:
        text: the optimized HLO.
        one_of: sizes of which it has at least one.
        none_of: sizes of which it has none.
    """
    found = set(_SHAPE.findall(text))
    shaped = [(dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in found]
    fitting = [(d, s) for d, s in shaped if one_of & set(s) and not none_of & set(s)]
    return round(max((_bytes(*array) for array in fitting), default=0.0))


def count_operations(text: str) -> int:
    """How many operations a compiled program's text has."""
    return sum(len(lines) for lines in _computations(text).values())


def count_cycles(text: str) -> int | None:
    """How many cycles the TPU's compiler reckons that its operations take on a device.

    Kernels, which it does not see into, and collectives that nothing goes on beside are not in it.

    Args:
        text: the optimized HLO (`compiled.as_text()`).

    Returns:
        Cycles, loops by their length; None for other compilers, which note none.
    """
    computations = _computations(text)
    times, _ = _executions(computations)
    found = [
        times[name] * int(cycles)
        for name, lines in computations.items()
        if name in times
        for line in lines
        for cycles in re.findall(r'"estimated_cycles":"(\d+)"', line)
    ]
    return sum(found) if found else None


def bytes_by_kind(collectives: list[Collective]) -> dict[str, dict[str, float]]:
    """Bytes that a device sends in a step: kind -> mesh axes ("fsdp", "data × fsdp") -> bytes."""
    totals: dict[str, dict[str, float]] = {}
    for collective in collectives:
        of_kind = totals.setdefault(collective.kind, {})
        axes = " × ".join(collective.axes) or "unknown"
        of_kind[axes] = of_kind.get(axes, 0.0) + collective.sent
    return totals


def _computations(text: str) -> dict[str, list[str]]:
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith(" "):
            match = _COMPUTATION.match(line)
            if match:
                lines = computations.setdefault("ENTRY" if match[1] else match[2], [])
            continue
        lines.append(line)
    return computations


def _executions(computations: dict[str, list[str]]) -> tuple[dict[str, int], dict[str, bool]]:
    """How often a step runs each computation, and whether a loop holds it."""
    calls: dict[str, list[tuple[str, int]]] = {name: [] for name in computations}
    for name, lines in computations.items():
        for line in lines:
            # What an asynchronous operation computes is named where it starts and where it ends.
            if "-done(" in line or "async-update(" in line or "%async-collective-done" in line[:40]:
                continue
            single = _CALLED.findall(line)
            turns = _trip_count(line, dict(single), computations) if " while(" in line else 1
            many = [n for names in _CALLED_MANY.findall(line) for n in names.split(",")]
            single += [("calls", n.strip(" %")) for n in many]
            calls[name] += [(called, turns) for _, called in single if called in computations]
    times = {"ENTRY": 1}
    in_loop = {"ENTRY": False}
    for name in _callers_first(calls):
        for called, turns in calls[name]:
            times[called] = times.get(called, 0) + times[name] * turns
            in_loop[called] = in_loop.get(called, False) or in_loop[name] or turns > 1
    return times, in_loop


def _callers_first(calls: dict[str, list[tuple[str, int]]]) -> list[str]:
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name not in seen:
            seen.add(name)
            for called, _ in calls[name]:
                visit(called)
            order.append(name)

    visit("ENTRY")
    return order[::-1]


def _trip_count(line: str, called: dict[str, str], computations: dict[str, list[str]]) -> int:
    """How often a loop turns: as the compiler noted, or the bound in its condition."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    lines = list(computations.get(called.get("condition", ""), []))
    for inner in [n for text in lines for _, n in _CALLED.findall(text)]:
        lines += computations.get(inner, [])
    bounds = [
        int(n) for text in lines for n in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", text)
    ]
    step = _counter_step(lines, computations.get(called.get("body", ""), []))
    return -(-max(bounds, default=1) // step)


def _counter_step(condition: list[str], body: list[str]) -> int:
    """By how much a turn moves the counter that a loop's condition looks at; 1 if not seen.

    It is more where the compiler has put several turns into one.
    """
    counters = {n for line in condition for n in _ELEMENT.findall(line)}
    root = next((line for line in body if " ROOT " in f" {line}" and " tuple(" in line), "")
    elements = re.findall(r"%([\w.\-]+)", root.partition(" tuple(")[2].partition(")")[0])
    if len(counters) != 1 or int(min(counters)) >= len(elements):
        return 1
    name = elements[int(min(counters))]
    added = next((re.search(_ADDED, line) for line in body if f"%{name} = " in line), None)
    if added is None:
        return 1
    steps = [
        int(found[1])
        for line in body
        for operand in added.groups()
        if (found := re.match(rf"\s+%{re.escape(operand)} = [su]32\[\]\S* constant\((\d+)\)", line))
    ]
    return max([1, *steps])


def _grown(shape: tuple[int, ...], line: str, parts: int) -> tuple[int, ...]:
    """The shape that an operation has split along its dimension into parts."""
    dimension = re.search(r"dimensions=\{(\d+)\}", line)
    at = int(dimension[1]) if dimension else 0
    return (*shape[:at], shape[at] * parts, *shape[at + 1 :])


def _bytes(dtype: str, shape: tuple[int, ...]) -> float:
    bits = re.search(r"\d+", dtype)
    return _BYTES.get(dtype, int(bits[0]) / 8 if bits else 4) * math.prod(shape)


def _first_group(line: str, kind: str, devices: int) -> list[int]:
    """The devices, by their place in the mesh, of the first group of a collective."""
    if kind == "collective-permute":
        # Each device sends to one other; some may keep what they have.
        pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2])
        return next(([int(a), int(b)] for a, b in pairs if a != b), [])
    explicit = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if explicit:
        return [int(n) for n in explicit[1].split(",")]
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if tiled:
        groups = _iota(tiled[2], tiled[3]).reshape([int(n) for n in tiled[1].split(",")])
        return groups.reshape(groups.shape[0], -1)[0].tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", line)
    if named and ":" not in named[3]:
        names, sizes = zip(*re.findall(r"'([^']*)'=(\d+)", named[1]), strict=True)
        order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?", named[2] or "")
        ids = _iota(order[1], order[2]) if order else np.arange(devices)
        ids = ids.reshape([int(n) for n in sizes])
        along = [names.index(n) for n in re.findall(r"'([^']*)'", named[3])]
        ids = np.moveaxis(ids, along, range(len(along)))
        return ids.reshape(math.prod(ids.shape[: len(along)]), -1)[:, 0].tolist()
    return list(range(devices))


def _iota(sizes: str, order: str | None) -> np.ndarray:
    shape = [int(n) for n in sizes.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in order.split(",")]).ravel() if order else ids.ravel()


def _spanned(group: list[int], axes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the places of a group differ."""
    coordinates = np.unravel_index(group, list(axes.values()))
    return tuple(axis for axis, places in zip(axes, coordinates, strict=True) if np.ptp(places) > 0)


def count_flops(
    jaxpr: Any, *, loops_once: bool = False, kernels: bool = False, tile: int | None = None
) -> float:
    """Floating-point operations of the matrix products of a traced program, on all devices.

    Two for each multiplication and addition, loops by their length, recomputation included: what
    the hardware does. Of a branch the larger side counts.

    Args:
        jaxpr: a (closed) jaxpr.
        loops_once: count a loop's body as often as it stands in the program, as XLA's cost analysis
            does.
        kernels: count only what Pallas kernels do, which the compiler does not see. All blocks of
            their grids count, also those that a causal mask makes them skip: the formula that
            utilization refers to counts them too.
        tile: count, of products outside kernels, what a matrix unit of this width does: see
            `Products.tiled`.
    """
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general" and not kernels:
            (contracted, _), (batched, _) = params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            inner = math.prod(lhs[dimension] for dimension in contracted)
            out = math.prod(eqn.outvars[0].aval.shape)
            if tile is not None:
                repeats = math.prod(lhs[dimension] for dimension in batched)
                rows = math.prod(lhs) // max(repeats * inner, 1)
                columns = out // max(repeats * rows, 1)
                total += 2.0 * repeats * _whole_tiles(rows, columns, inner, tile)
                continue
            total += 2.0 * out * inner
            continue
        if name == "pallas_call" and tile is not None:
            continue
        outside = kernels and name != "pallas_call"
        parts = [
            count_flops(inner, loops_once=loops_once, kernels=outside, tile=tile)
            for inner in _inner_jaxprs(params)
        ]
        if not parts:
            continue
        if name == "cond":
            total += max(parts)
            continue
        repeats = 1
        if name == "scan":
            repeats = min(params["unroll"], params["length"]) if loops_once else params["length"]
        elif name == "shard_map":
            sizes = params["mesh"].shape
            repeats = math.prod(sizes[axis] for axis in params["newly_manual_axes"])
        elif name == "pallas_call":
            grid = params["grid_mapping"].grid
            repeats = math.prod(side for side in grid if isinstance(side, int))
        total += repeats * sum(parts)
    return total


def _inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item
