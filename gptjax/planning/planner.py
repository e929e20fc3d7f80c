"""The plan of a training run: will it fit, how long does it take, what moves where."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gptjax.config import ModelConfig, Remat
from gptjax.devices import compute_dtype
from gptjax.errors import UserError
from gptjax.params import count_params, flops_per_token
from gptjax.planning import meshes
from gptjax.planning.compiled import CompiledStep, compile_step
from gptjax.planning.estimate import (
    EXPECTED_MFU,
    Bounds,
    Layout,
    Traffic,
    estimate_memory,
    estimate_traffic,
    hardware_flops,
    memory_seconds,
    network_seconds,
)
from gptjax.planning.programs import Collective, bytes_by_kind
from gptjax.planning.topology import Topology, parse_topology, prepare_compiler

if TYPE_CHECKING:
    import optax

DAY = 86_400
TRIES = 4
"""Steps that a plan compiles at most until one fits."""


class LoopGathers(NamedTuple):
    """The all-gathers inside a program's loops, and how many of them go on beside computation."""

    overlapped: int
    """How many do."""
    number: int
    """How many there are."""
    share: float
    """Of the bytes that they send in a step, what those send that do, 0 to 1."""


@dataclass(frozen=True)
class Plan:
    """What is to be expected of a training run. Bytes are per chip, at the peak of a step.

    Attributes:
        topology: as given.
        chips: how many.
        mesh: axis -> size, in JAX devices.
        batch: sequences a step.
        context: tokens a sequence.
        accumulate: microbatches.
        remat: what the backward pass recomputes.
        remat_reason: why, where it was chosen here.
        params: parameters of the model.
        compiled: whether the step was compiled for these chips; otherwise all is by closed forms.
        note: why it was not compiled, or what the compiler refused; "" otherwise.
        compile_seconds: how long tracing and compiling took.
        memory: bytes by what for: as `estimate_memory` has it, or where the step is compiled
            "parameters" and "optimizer" exactly and "activations", all the rest.
        estimate: bytes by the closed form alone, whether compiled or not.
        peak_bytes_per_chip: their sum, or the compiler's peak.
        chip_bytes: what the chip has; None if not known.
        flops_per_token: of the model, forward and backward, by the formula that MFU refers to.
        hardware_flops_per_token: of the step as it is traced, recomputation included.
        xla_flops_per_token: by XLA's cost analysis, which counts the body of a loop once, corrected
            for that; None where there is none.
        program_flops_per_token: of the compiled program's matrix products, its kernels' included;
            None where they are not in its text.
        stated_flops_per_token: `flops_per_token` and what the policy recomputes, by the formula.
        padding: see `CompiledStep`; None as for `program_flops_per_token`.
        added_padding: see `CompiledStep`; None as for `program_flops_per_token`.
        logits_bytes: see `CompiledStep`, on a device.
        operations: see `CompiledStep`.
        cycles: see `CompiledStep`.
        traffic: bytes that a chip sends in a step: kind of collective -> mesh axes -> bytes.
        collectives: the compiled program's, see `Collective`.
        bounds: seconds of a step at least.
        mfu: lowest and highest model FLOPs utilization to be expected, see `EXPECTED_MFU`; the
            bounds cut it off.
        tokens: the budget, or None.
        price: dollars a chip and hour, or None.
        peak_flops: of all chips, a second.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    batch: int
    context: int
    accumulate: int
    remat: str
    remat_reason: str
    params: int
    compiled: bool
    note: str
    compile_seconds: float
    memory: dict[str, int]
    estimate: dict[str, int]
    peak_bytes_per_chip: int
    chip_bytes: int | None
    flops_per_token: float
    hardware_flops_per_token: float
    xla_flops_per_token: float | None
    program_flops_per_token: float | None
    stated_flops_per_token: float
    padding: float | None
    added_padding: float | None
    logits_bytes: int | None
    operations: int | None
    cycles: int | None
    traffic: dict[str, dict[str, float]]
    bounds: Bounds
    mfu: tuple[float, float]
    tokens: float | None
    price: float | None
    peak_flops: float
    collectives: tuple[Collective, ...] = field(default=(), repr=False)

    @property
    def loop_gathers(self) -> LoopGathers:
        """All-gathers of a megabyte and more inside loops."""
        found = [c for c in self.collectives if c.in_loop and c.kind == "all-gather"]
        found = [c for c in found if c.bytes >= 2**20]
        beside = [c for c in found if c.overlapped]
        sent, beside_sent = (sum(c.sent for c in some) for some in (found, beside))
        return LoopGathers(len(beside), len(found), beside_sent / sent if sent else 0.0)

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the chip's memory; None if that is not known."""
        return None if self.chip_bytes is None else self.peak_bytes_per_chip <= self.chip_bytes

    def days(self, mfu: float | None = None) -> float | None:
        """Days for the budget of tokens; None without one.

        Args:
            mfu: model FLOPs utilization; None is the middle of what is to be expected.
        """
        if self.tokens is None:
            return None
        mfu = sum(self.mfu) / 2 if mfu is None else mfu
        return self.tokens * self.flops_per_token / (self.peak_flops * mfu) / DAY

    @property
    def bound_days(self) -> float | None:
        """Days for the budget if every step took no longer than its bound."""
        if self.tokens is None:
            return None
        return self.tokens / (self.batch * self.context) * self.bounds.step / DAY

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-serializable values; times and costs as `days` has them."""
        days, (low, high) = self.days(), self.mfu
        hours = None if days is None else days * 24 * self.chips
        left_out = ("bounds", "collectives", "peak_flops", "mfu")
        values = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if entry.name not in left_out
        }
        return values | {
            "fits": self.fits,
            "loop_gathers_overlapped": self.loop_gathers.overlapped,
            "loop_gathers": self.loop_gathers.number,
            "loop_gathers_share": self.loop_gathers.share,
            "batch_tokens": self.batch * self.context,
            "compute_seconds_bound": self.bounds.compute,
            "memory_seconds_bound": self.bounds.memory,
            "network_seconds_bound": self.bounds.network,
            "step_seconds_bound": self.bounds.step,
            "mfu_expected": [low, high],
            "days": days,
            "days_expected": None if days is None else [self.days(high), self.days(low)],
            "days_bound": self.bound_days,
            "chip_hours": hours,
            "cost": None if hours is None or self.price is None else hours * self.price,
        }


def plan(
    config: ModelConfig,
    topology: str = "local",
    *,
    batch: int,
    mesh: str | Mapping[str, int] = "auto",
    optimizer: "optax.GradientTransformation | None" = None,
    tokens: float | None = None,
    accumulate: int = 1,
    remat: Remat | Literal["auto"] = "auto",
    price: float | None = None,
    compile: bool = True,
) -> Plan:
    """Plans a training run: compiles its real train step for chips that need not be there.

    Compilation is done in this process, since an optimizer is made of functions, which do not
    travel to another; the compiler takes the memory of a program, not of the model's arrays.

    Args:
        config: the model. Where `compute_dtype` is "auto", it is taken to be bfloat16 but for CPUs.
        topology: see `parse_topology`.
        batch: sequences of the model's whole context a step.
        mesh: see `mesh_axes`; "auto" chooses (`choose_mesh`), and where the
            compiler finds that the choice does not fit, tries the next.
        optimizer: any optax transformation; None is AdamW.
        tokens: the budget that days are told for.
        accumulate: microbatches.
        remat: what the backward pass recomputes; "auto" is `config.remat` where the model fits so
            by the closed form, and otherwise the first of "dots", "full" and "offload" with which
            it does (`choose_remat`); what the compiler finds not to fit is tried with the next.
        price: dollars a chip and hour.
        compile: False leaves it at the closed forms.

    Returns:
        The plan. Where there is no compiler for the chips, it is by closed forms, and says so. A
        program that does not fit is a plan too, with `fits` False.

    Raises:
        UserError: if the topology, the mesh or the batch is illegal; nothing is compiled then.
    """
    target = parse_topology(topology)
    prepare_compiler(target)
    _check_numbers(batch=batch, accumulate=accumulate, tokens=tokens, price=price)
    config = _resolved(config, target)
    optimizer = meshes.default_optimizer(config) if optimizer is None else optimizer
    chosen = meshes.choices(
        config,
        target,
        batch,
        mesh,
        optimizer,
        accumulate,
        only=None if remat == "auto" else remat,
    )
    made: list[Plan] = []
    for choice in chosen:
        reason = choice.reason if remat == "auto" else ""
        for candidate in _near(choice.candidates, target)[: TRIES - len(made)]:
            made.append(_plan(candidate.layout, target, optimizer, tokens, price, compile, reason))
            if not made[-1].compiled or made[-1].fits is not False:
                return made[-1]
        if len(made) >= TRIES:
            break
    return min(made, key=lambda plan: plan.peak_bytes_per_chip)


def search(
    config: ModelConfig,
    topology: str,
    *,
    batch: int,
    optimizer: "optax.GradientTransformation | None" = None,
    tokens: float | None = None,
    accumulate: int = 1,
    price: float | None = None,
    most: int = 6,
) -> list[Plan]:
    """Compiles the most promising meshes and rematerialization policies.

    Args:
        config: as for `plan`; its `remat` is not looked at.
        topology: as for `plan`.
        batch: as for `plan`.
        optimizer: as for `plan`.
        tokens: as for `plan`.
        accumulate: as for `plan`.
        price: as for `plan`.
        most: how many are compiled at most.

    Returns:
        The plans, the best first: those that fit, by the bound of their step and then by memory.

    Raises:
        UserError: as `plan`.
    """
    target = parse_topology(topology)
    prepare_compiler(target)
    _check_numbers(batch=batch, accumulate=accumulate, tokens=tokens, price=price)
    config = _resolved(config, target)
    optimizer = meshes.default_optimizer(config) if optimizer is None else optimizer
    by_policy = [
        meshes.rank_meshes(config.replace(remat=policy), target, batch, optimizer, accumulate)
        for policy in ("none", "dots", "full")
    ]
    # A policy by turns, each with its next mesh.
    turns = [ranked[place] for place in range(most) for ranked in by_policy if place < len(ranked)]
    plans = [
        _plan(candidate.layout, target, optimizer, tokens, price, True)
        for candidate in _near(turns, target)[:most]
    ]
    return sorted(plans, key=lambda p: (p.fits is False, p.bounds.step, p.peak_bytes_per_chip))


def _near(candidates: list[meshes.Candidate], target: Topology) -> list[meshes.Candidate]:
    """Those that may fit, estimates being what they are; if there is none, the first."""
    room = target.chip.memory or math.inf
    near = [candidate for candidate in candidates if candidate.bytes_per_chip <= 1.5 * room]
    return near or candidates[:1]


def _resolved(config: ModelConfig, target: Topology) -> ModelConfig:
    """The configuration with a compute dtype: the default device's is not the target's."""
    if config.compute_dtype != "auto":
        return config
    if target.kind == "local":
        return config.replace(compute_dtype=compute_dtype(config).name)
    return config.replace(compute_dtype="float32" if target.platform == "cpu" else "bfloat16")


def _check_numbers(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} is {value}; a finite number above 0")


def _plan(
    layout: Layout,
    target: Topology,
    optimizer: "optax.GradientTransformation",
    tokens: float | None,
    price: float | None,
    compile: bool,
    remat_reason: str = "",
) -> Plan:
    config, chip = layout.config, target.chip
    estimate = {name: size * chip.devices for name, size in estimate_memory(layout).items()}
    step_tokens = layout.batch * config.context_length
    compiled = CompiledStep(note="closed form, as asked for")
    if compile:
        compiled = compile_step(layout, target, optimizer)
    hardware = compiled.flops or hardware_flops(layout)
    found: list[Traffic] | list[Collective] = estimate_traffic(layout, target.linked)
    memory, peak = estimate, sum(estimate.values())
    if compiled.collectives is not None:
        found = compiled.collectives
        by_kind = bytes_by_kind(found)
    else:
        by_kind = {"estimate": {part.axes[0]: part.sent for part in found}}
    if compiled.peak is not None:
        peak = compiled.peak * chip.devices
        state = {name: estimate[name] for name in ("parameters", "optimizer")}
        memory = state | {"activations": max(peak - sum(state.values()), 0)}
    peak_flops = chip.flops * target.chips
    bounds = Bounds(
        hardware / peak_flops, memory_seconds(layout, target), network_seconds(found, target)
    )
    flops = flops_per_token(config)
    most = flops * step_tokens / peak_flops / bounds.step
    low, high = EXPECTED_MFU[target.platform]
    return Plan(
        topology=target.name,
        chips=target.chips,
        mesh=layout.axes,
        batch=layout.batch,
        context=config.context_length,
        accumulate=layout.accumulate,
        remat=config.remat,
        remat_reason=remat_reason,
        params=count_params(config),
        compiled=compiled.peak is not None,
        note=compiled.note,
        compile_seconds=compiled.seconds,
        memory=memory,
        estimate=estimate,
        peak_bytes_per_chip=peak,
        chip_bytes=chip.memory,
        flops_per_token=flops,
        hardware_flops_per_token=hardware / step_tokens,
        xla_flops_per_token=(
            None if compiled.xla_flops is None else compiled.xla_flops / step_tokens
        ),
        program_flops_per_token=(
            None if compiled.program_flops is None else compiled.program_flops / step_tokens
        ),
        stated_flops_per_token=hardware_flops(layout) / step_tokens,
        padding=compiled.padding,
        added_padding=compiled.added_padding,
        logits_bytes=compiled.logits_bytes,
        operations=compiled.operations,
        cycles=compiled.cycles,
        traffic={
            kind: {axes: sent * chip.devices for axes, sent in by_axes.items()}
            for kind, by_axes in by_kind.items()
        },
        collectives=tuple(compiled.collectives or ()),
        bounds=bounds,
        mfu=(min(low, most), min(high, most)),
        tokens=tokens,
        price=price,
        peak_flops=peak_flops,
    )
