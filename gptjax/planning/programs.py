"""What a traced or compiled program does: its matrix products and its collectives."""

import math
import re
from collections.abc import Iterator, Mapping
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
    linked = math.prod(axes.values()) if linked is None else linked
    found = []
    for name, lines in computations.items():
        # Products that a collective goes on beside, started elsewhere, name it again.
        if name not in times or "async_collective_fusion" in name:
            continue
        for line in lines:
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
                )
            )
    return found


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
    return max(bounds, default=1)


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


def count_flops(jaxpr: Any, *, loops_once: bool = False) -> float:
    """Floating-point operations of the matrix products of a traced program, on all devices.

    Two for each multiplication and addition, loops by their length, recomputation included: what
    the hardware does. Of a branch the larger side counts.

    Args:
        jaxpr: a (closed) jaxpr.
        loops_once: count a loop's body as often as it stands in the program, as XLA's cost analysis
            does.
    """
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            inner = math.prod(lhs[dimension] for dimension in contracted)
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * inner
            continue
        parts = [count_flops(inner, loops_once=loops_once) for inner in _inner_jaxprs(params)]
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
