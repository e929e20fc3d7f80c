"""A plan as a table for the terminal."""

from typing import TYPE_CHECKING

from gptjax.reporting import duration, quantity

if TYPE_CHECKING:
    from gptjax.planning.planner import Plan

_GIB = 2**30


def plan_table(plan: "Plan") -> str:
    """The plan in lines of a name and what is known of it."""
    rows = [
        ("chips", f"{plan.chips} ({plan.topology})"),
        ("mesh", mesh_name(plan.mesh)),
        ("batch", _batch(plan)),
        ("remat", f"{plan.remat} ({plan.remat_reason})" if plan.remat_reason else plan.remat),
        ("parameters", quantity(plan.params)),
        ("", ""),
        ("memory a chip", _source(plan)),
    ]
    rows += [(f"  {name}", _gib(size)) for name, size in plan.memory.items()]
    if plan.compiled:
        rows.append(("  by the closed form", _gib(sum(plan.estimate.values()))))
    has = "" if plan.chip_bytes is None else f" of {_gib(plan.chip_bytes)}"
    rows.append(
        ("  peak", f"{_gib(plan.peak_bytes_per_chip)}{has}  {_verdict(plan.fits)}".rstrip())
    )
    rows += [
        ("", ""),
        ("FLOPs a token", f"{plan.flops_per_token:.3e} (formula)"),
        ("  as traced" if plan.compiled else "  with recomputation", _flops(plan)),
    ]
    if plan.xla_flops_per_token is not None:
        rows.append(("  by XLA", f"{plan.xla_flops_per_token:.3e} (corrected for loops)"))
    if plan.program_flops_per_token is not None:
        times = plan.program_flops_per_token / plan.stated_flops_per_token
        stated = f"{times:.3f} of formula and recomputation"
        rows.append(("  in the program", f"{plan.program_flops_per_token:.3e} ({stated})"))
    if plan.padding is not None and plan.added_padding is not None:
        split = f"{plan.padding:.1%}, of which by the mesh {plan.added_padding:.1%}"
        rows.append(("  in empty parts of tiles", split))
    if plan.cycles is not None:
        rows.append(("cycles, by the compiler", f"{plan.cycles:.3e} (without kernels and waiting)"))
    if plan.logits_bytes:
        rows.append(("largest logits at once", _gib(plan.logits_bytes)))
    overlapped, gathers, share = plan.loop_gathers
    if gathers:
        beside = f"{overlapped} of {gathers} beside computation, {share:.0%} of their bytes"
        rows.append(("gathers in loops", beside))
    rows += [("", ""), ("sent a chip and step", "")]
    sent = [
        (f"  {kind} over {axes}", f"{number / _GIB:9.3f} GiB")
        for kind, by_axes in plan.traffic.items()
        for axes, number in sorted(by_axes.items(), key=lambda item: -item[1])
        if number >= 2**20
    ]
    rows += sent or [("  nothing", "")]
    rows += [
        ("", ""),
        ("a step takes at least", seconds(plan.bounds.step)),
        ("  for computing", seconds(plan.bounds.compute)),
        ("  for memory", seconds(plan.bounds.memory)),
        ("  for the network", seconds(plan.bounds.network)),
        ("MFU to expect", f"{plan.mfu[0]:.0%} to {plan.mfu[1]:.0%} (published, see EXPECTED_MFU)"),
    ]
    if plan.tokens is not None:
        rows += _budget(plan)
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:{width}}{value}".rstrip() for name, value in rows)


def search_table(plans: "list[Plan]") -> str:
    """Plans side by side, one a line."""
    lines = [("", "mesh", "remat", "peak a chip", "step at least", "MFU at most")]
    for place, plan in enumerate(plans, 1):
        most = plan.flops_per_token * plan.batch * plan.context / plan.peak_flops
        lines.append(
            (
                f"{place}",
                mesh_name(plan.mesh),
                plan.remat,
                f"{_gib(plan.peak_bytes_per_chip).strip()}{'' if plan.fits else '  does not fit'}",
                seconds(plan.bounds.step),
                f"{most / plan.bounds.step:.0%}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def mesh_name(axes: dict[str, int]) -> str:
    """A mesh as the command line takes it: "fsdp=64,tensor=8"."""
    return ",".join(f"{axis}={size}" for axis, size in axes.items() if size > 1) or "data=1"


def seconds(number: float | None) -> str:
    """Seconds with three digits; "?" for None."""
    if number is None:
        return "?"
    return f"{number:,.3g} s" if number < 1e5 else f"{number:.2e} s"


def _batch(plan: "Plan") -> str:
    tokens = (
        f"{plan.batch} sequences of {plan.context} = {quantity(plan.batch * plan.context)} tokens"
    )
    return tokens + (f", in {plan.accumulate} microbatches" if plan.accumulate > 1 else "")


def _source(plan: "Plan") -> str:
    if plan.compiled:
        return f"the real step, compiled in {plan.compile_seconds:.0f} s"
    return plan.note


def _verdict(fits: bool | None) -> str:
    return {True: "fits", False: "DOES NOT FIT", None: ""}[fits]


def _flops(plan: "Plan") -> str:
    times = plan.hardware_flops_per_token / plan.flops_per_token
    return f"{plan.hardware_flops_per_token:.3e} ({times:.2f} times)"


def _budget(plan: "Plan") -> list[tuple[str, str]]:
    low, high = plan.mfu
    middle, bound = plan.days() or 0.0, plan.bound_days or 0.0
    hours = middle * 24 * plan.chips
    rows = [
        ("", ""),
        (f"{quantity(plan.tokens or 0)} tokens", _days(middle)),
        ("  between", f"{_days(plan.days(high) or 0.0)} and {_days(plan.days(low) or 0.0)}"),
        ("  never below", _days(bound)),
        ("  chip-hours", f"{hours:,.3g}" if hours < 100 else f"{hours:,.0f}"),
    ]
    if plan.price is not None:
        rows.append(("  cost", f"${hours * plan.price:,.0f} at ${plan.price:g} a chip and hour"))
    return rows


def _days(days: float) -> str:
    if days >= 1000:
        return f"{days / 365.25:,.0f} years"
    return f"{days:,.1f} days" if days >= 1 else duration(86_400 * days)


def _gib(size: float) -> str:
    return f"{size / _GIB:9.3f} GiB"
