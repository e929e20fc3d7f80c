"""Which mesh: candidates, and the choice by the closed forms."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptjax.config import ModelConfig
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
from gptjax.sharding import MESH_AXES

if TYPE_CHECKING:
    import optax

FILL = 0.9
"""Share of the memory that an estimate may fill."""


@dataclass(frozen=True)
class Candidate:
    """A mesh with what the closed forms say of it."""

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
