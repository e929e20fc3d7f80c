"""Which mesh, and what the backward pass recomputes: the choice by the closed forms."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptjax.config import ModelConfig, Remat
from gptjax.errors import UserError
from gptjax.planning.estimate import (
    Layout,
    estimate_memory,
    estimate_traffic,
    hardware_flops,
    lay_out,
    network_seconds,
)
from gptjax.planning.topology import Topology, parse_topology
from gptjax.sharding import MESH_AXES, mesh_axes

if TYPE_CHECKING:
    import optax

FILL = 0.9
"""Share of the memory that an estimate may fill."""

POLICIES: tuple[Remat, ...] = ("none", "dots", "full", "offload")
"""What the backward pass recomputes, from nothing on; each needs less memory than the one before.
"offload" computes what "full" does, and waits for the host beside."""


@dataclass(frozen=True)
class Candidate:
    """A mesh with what the closed forms say of it.

    Attributes:
        layout: the mesh and what lies where.
        bytes_per_chip: of memory, by the closed form.
        seconds: of a step, at least.
        fits: whether that is within the chip's memory.
    """

    layout: Layout
    bytes_per_chip: int
    seconds: float
    fits: bool


def choose_mesh(
    config: ModelConfig,
    topology: str | Topology = "local",
    *,
    batch: int,
    optimizer: "optax.GradientTransformation | None" = None,
    accumulate: int = 1,
    eval_batch: int | None = None,
) -> dict[str, int]:
    """The sizes of the mesh axes for a model, chosen by the closed form of its memory.

    Plain replicas where the model fits on each chip. Otherwise, of the meshes that fill at most
    nine tenths of the memory, the one whose step takes the least time by its bounds; of several
    within an eighth of that, the one that needs the least memory. Where nothing fits, the
    smallest. Traffic over fsdp and data is taken to go on beside the computation, that over tensor,
    context and expert to wait for it.

    Args:
        config: the model.
        topology: see `parse_topology`; "local" is the devices of this process.
        batch: sequences a step.
        optimizer: any optax transformation; None is AdamW.
        accumulate: microbatches.
        eval_batch: rows of other batches that must divide over the mesh too.

    Returns:
        Mesh axis -> size, for `make_mesh(**axes)`.

    Raises:
        UserError: if no mesh divides the batch and the model.
    """
    if isinstance(topology, str):
        topology = parse_topology(topology)
    ranked = rank_meshes(config, topology, batch, optimizer, accumulate, eval_batch)
    return ranked[0].layout.axes


def rank_meshes(
    config: ModelConfig,
    topology: Topology,
    batch: int,
    optimizer: "optax.GradientTransformation | None" = None,
    accumulate: int = 1,
    eval_batch: int | None = None,
) -> list[Candidate]:
    """The meshes that divide model and batch, the best first; see `choose_mesh`.

    Args:
        config: the model.
        topology: the chips.
        batch: sequences a step.
        optimizer: any optax transformation; None is AdamW.
        accumulate: microbatches that a batch is split into.
        eval_batch: sequences of a batch of evaluation, which must divide too.

    Raises:
        UserError: if there are none.
    """
    optimizer = default_optimizer(config) if optimizer is None else optimizer
    found = []
    refused: UserError | None = None
    for axes in _factorizations(config, topology, batch):
        try:
            layout = lay_out(config, topology, axes, batch, optimizer, accumulate)
        except UserError as error:
            refused = error
            continue
        if eval_batch is not None and eval_batch % layout.parts("batch"):
            continue
        if config.context_length % layout.parts("residual") == 0:
            found.append(rate(layout, topology))
    if not found:
        raise UserError(
            f"no mesh of {topology.devices} devices divides the model and a batch of {batch} "
            f"sequences{'' if refused is None else f': {refused}'}"
        )
    fastest = min((c.seconds for c in found if c.fits), default=0.0)

    def order(candidate: Candidate) -> tuple[float, ...]:
        if not candidate.fits:
            return (3, candidate.bytes_per_chip)
        if candidate.layout.axes["data"] == topology.devices:
            return (0, candidate.seconds)
        if candidate.seconds <= 1.125 * fastest:
            return (1, candidate.bytes_per_chip)
        return (2, candidate.seconds)

    return sorted(found, key=order)


@dataclass(frozen=True)
class Choice:
    """A rematerialization policy with the meshes that it is for.

    Attributes:
        remat: the policy.
        reason: why, in a few words.
        candidates: meshes, the best first; one where the mesh was given.
    """

    remat: Remat
    reason: str
    candidates: list[Candidate]


def choose_remat(
    config: ModelConfig,
    topology: str | Topology = "local",
    *,
    batch: int,
    mesh: str | Mapping[str, int] | None = None,
    optimizer: "optax.GradientTransformation | None" = None,
    accumulate: int = 1,
) -> Remat:
    """The first of none, dots, full and offload with which a train step fits, by the closed form.

    Args:
        config: the model.
        topology: see `parse_topology`; "local" is the devices of this process.
        batch: sequences a step.
        mesh: see `sharding.mesh_axes`; None is one device, "auto" any that holds it.
        optimizer: any optax transformation; None is AdamW.
        accumulate: microbatches.

    Returns:
        The policy: "none" where the memory is not known or the devices are a CPU's cores, whose
        memory other work shares; "full" where nothing fits.

    Raises:
        UserError: if the batch or the model does not divide over the mesh.
    """
    return next(choices(config, topology, batch, mesh, optimizer, accumulate)).remat


def choices(
    config: ModelConfig,
    topology: str | Topology,
    batch: int,
    mesh: str | Mapping[str, int] | None,
    optimizer: "optax.GradientTransformation | None" = None,
    accumulate: int = 1,
    eval_batch: int | None = None,
    only: Remat | None = None,
) -> Iterator[Choice]:
    """Policies and meshes from the best on: `choose_remat`'s, then those that need less memory.

    Args:
        config: the model; where its `remat` is not "auto", that comes first.
        topology: as for `choose_remat`.
        batch: as for `choose_remat`.
        mesh: as for `choose_remat`.
        optimizer: as for `choose_remat`.
        accumulate: as for `choose_remat`.
        eval_batch: as for `choose_mesh`.
        only: this policy, whether it fits or not.
    """
    if isinstance(topology, str):
        topology = parse_topology(topology)
    optimizer = default_optimizer(config) if optimizer is None else optimizer
    first = 0 if config.remat == "auto" else POLICIES.index(config.remat)
    # The closed form cannot tell of a cut of memory that is not there.
    policies = POLICIES[first:3] if topology.platform == "cpu" else POLICIES[first:]
    found: list[Choice] = []
    fits = False
    for policy in (only,) if only else policies or (config.remat,):
        wanted = config.replace(remat=policy)
        if mesh == "auto":
            ranked = rank_meshes(wanted, topology, batch, optimizer, accumulate, eval_batch)
        else:
            axes = mesh_axes("data=1" if mesh is None else mesh, _count(mesh, topology))
            layout = lay_out(wanted, topology, axes, batch, optimizer, accumulate)
            ranked = [rate(layout, topology)]
        found.append(Choice(policy, _reason(ranked[0], topology, found), ranked))
        on_cpu = topology.kind == "local" and topology.platform == "cpu"
        fits = fits or on_cpu or ranked[0].fits or only is not None
        if fits:
            yield found[-1]
    if not fits:
        # Where nothing does, all is recomputed, and nothing is kept elsewhere.
        yield from found[min(len(found) - 1, max(0, 2 - first)) :]


def _count(mesh: str | Mapping[str, int] | None, topology: Topology) -> int:
    """The devices of a mesh, which need not be all where its sizes are known."""
    if mesh is None:
        return 1
    if isinstance(mesh, str) or topology.kind != "local" or -1 in mesh.values():
        return topology.devices
    return math.prod(mesh.values())


def _reason(best: Candidate, topology: Topology, before: list[Choice]) -> str:
    """Why a policy is tried after others."""
    room = topology.chip.memory
    if room is None:
        return "the device's memory is not known"
    if topology.kind == "local" and topology.platform == "cpu":
        return "on a CPU nothing is recomputed"
    gib = 2**30
    needs = f"{best.bytes_per_chip / gib:.1f} of {room / gib:.1f} GiB by the closed form"
    others = [f"{c.remat} needs {c.candidates[0].bytes_per_chip / gib:.1f}" for c in before]
    return ", ".join([needs, *others])


def rate(layout: Layout, topology: Topology) -> Candidate:
    """What the closed forms say of a layout."""
    held = sum(estimate_memory(layout).values()) * topology.chip.devices
    traffic = estimate_traffic(layout, topology.linked)
    beside = [part for part in traffic if part.axes[0] in ("data", "fsdp")]
    waiting = [part for part in traffic if part not in beside]
    compute = hardware_flops(layout) / (topology.chips * topology.chip.flops)
    seconds = max(compute, network_seconds(beside, topology) or 0.0)
    seconds += network_seconds(waiting, topology) or 0.0
    room = topology.chip.memory
    return Candidate(layout, held, seconds, room is None or held <= FILL * room)


def default_optimizer(config: ModelConfig) -> "optax.GradientTransformation":
    """AdamW as `OptimizerConfig` has it."""
    from gptjax.optimizer import OptimizerConfig, make_optimizer

    return make_optimizer(OptimizerConfig(), config, steps=1)


def _factorizations(
    config: ModelConfig, topology: Topology, batch: int
) -> Iterator[dict[str, int]]:
    """Meshes over data, fsdp, tensor, context and expert, within reason."""
    experts = 1 if config.num_experts is None else config.num_experts
    for tensor, context, expert in itertools.product(_divisors(topology.devices), repeat=3):
        rest, odd = divmod(topology.devices, tensor * context * expert)
        # Activations that more devices sum than a host or a side of the torus has cost too much;
        # splitting sequences serves where there are fewer of them than devices.
        if odd or tensor > 32 or experts % expert or (context > 1 and rest * context <= batch):
            continue
        for data in _divisors(rest):
            if data % topology.slices == 0:
                sizes = {"data": data, "fsdp": rest // data, "tensor": tensor, "context": context}
                yield {axis: sizes.get(axis, 1) for axis in MESH_AXES} | {"expert": expert}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
