"""Machines to plan for: "v5p:8x8x8", "2xv5e:16x16", "h100:8", "cpu:28", "local"."""

import contextlib
import ctypes
import glob
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from gptjax.devices import CHIPS, Chip, find_chip, peak_flops
from gptjax.errors import UserError, nearest
from gptjax.sharding import MESH_AXES, make_mesh

TPUS = {"v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
"""TPUs that libtpu compiles for, and the dimensions of their torus."""

GPUS = ("h100", "h200", "b200", "a100", "a100-40gb")

CORE_FLOPS = 64 * 2e9
"""What is assumed of a CPU core: two 512-bit float32 multiply-add units (64 operations a cycle) at
2 GHz."""

_CUDA_TARGETS = {
    # What XLA's compiler asks of the card, from NVIDIA's H100 data sheet and compute capability
    # 9.0's entries in the CUDA programming guide.
    "h100": """
        gpu_device_info {
          threads_per_block_limit: 1024 threads_per_warp: 32
          shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
          shared_memory_per_core: 233472 threads_per_core_limit: 2048
          core_count: 132 fpus_per_core: 128
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: 3350000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
          device_memory_size: 80000000000
          cuda_compute_capability { major: 9 }
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }
        platform_name: "CUDA"
        dnn_version_info { major: 9 minor: 10 }
        runtime_version { major: 13 }
        device_description_str: "NVIDIA H100 80GB HBM3"
    """,
}


class CompilerMissingError(Exception):
    """This machine has no compiler for the chips; the message says why."""


@dataclass(frozen=True)
class Topology:
    """Chips, how many, and how they hang together.

    Attributes:
        name: as given.
        kind: the chip's name, a key of `CHIPS`; "cpu", or "local".
        platform: "tpu", "gpu" or "cpu".
        chip: one of them.
        chips: how many.
        linked: JAX devices that fast links join, one after another in the mesh.
        layout: what the compiler calls a slice's shape; "" where there is nothing to call it.
        slices: TPU slices, joined by the data-center network alone.
    """

    name: str
    kind: str
    platform: Literal["tpu", "gpu", "cpu"]
    chip: Chip
    chips: int
    linked: int
    layout: str = ""
    slices: int = 1

    @property
    def devices(self) -> int:
        """JAX devices, which a mesh is made of."""
        return self.chips * self.chip.devices

    @property
    def tile(self) -> int:
        """The width of the matrix unit: of a TPU's, from Google's pages of each (see `CHIPS`)."""
        return 256 if self.kind in ("v6e", "tpu7x") else 128


def parse_topology(name: str) -> Topology:
    """Reads a topology's name.

    Args:
        name: a TPU and the shape of its slice ("v5p:8x8x8"), after a number and "x" where there
            are several slices ("2xv5e:16x16"); a GPU and how many ("h100:64"); "cpu:28" for one
            machine of so many cores; "local" for the devices of this process.

    Raises:
        UserError: if it is none of these.
    """
    if name == "local":
        return _local()
    match = re.fullmatch(r"(?:(\d+)x)?([a-z][a-z0-9-]*):(\d+(?:x\d+)*)", name.lower())
    kinds = [*TPUS, *GPUS, "cpu"]
    if match is None:
        raise UserError(
            f"topology {name!r}; write CHIP:SHAPE, such as v5p:8x8x8, 2xv5e:16x16, h100:64, "
            f"cpu:28, or local; chips known: {', '.join(kinds)}"
        )
    slices, kind, layout = int(match[1] or 1), match[2], match[3]
    if kind not in kinds:
        raise UserError(f"topology {name!r}: unknown chip {kind!r}{nearest(kind, kinds)}")
    sides = [int(side) for side in layout.split("x")]
    if min(*sides, slices) < 1:
        raise UserError(f"topology {name!r} has no chips; each number is at least 1")
    if kind in TPUS:
        if len(sides) != TPUS[kind]:
            raise UserError(
                f"topology {name!r}: a slice of {kind} has {TPUS[kind]} dimensions, such as "
                f"{kind}:{'x'.join(['4'] * TPUS[kind])}"
            )
        chip, chips = CHIPS[kind], math.prod(sides)
        linked = chips * chip.devices
        return Topology(name, kind, "tpu", chip, chips * slices, linked, layout, slices)
    if len(sides) != 1 or slices != 1:
        raise UserError(f"topology {name!r}: of {kind} only the number counts, such as {kind}:8")
    if kind == "cpu":
        chip = Chip(f"CPU of {sides[0]} cores", CORE_FLOPS * sides[0])
        return Topology(name, kind, "cpu", chip, 1, 1)
    linked = min(sides[0], CHIPS[kind].linked or sides[0])
    if sides[0] % linked:
        raise UserError(f"topology {name!r}: hosts hold {linked} GPUs; give a multiple of {linked}")
    return Topology(
        name, kind, "gpu", CHIPS[kind], sides[0], linked, f"1x{sides[0] // linked}x{linked}"
    )


def _local() -> Topology:
    # Those that can be asked and measured; other processes have more of the kind.
    devices, count = jax.local_devices(), jax.device_count()
    first = devices[0]
    known = find_chip(first.device_kind)
    stats = first.memory_stats() or {}
    memory = stats.get("bytes_limit")
    if memory is None and first.platform == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
    chip = Chip(
        first.device_kind,
        peak_flops(devices) / len(devices),
        memory,
        None
        if known is None or known.memory_bandwidth is None
        else known.memory_bandwidth / known.devices,
        None
        if known is None or known.link_bandwidth is None
        else known.link_bandwidth / known.devices,
    )
    return Topology("local", "local", first.platform, chip, count, len(devices))


def abstract_mesh(axes: dict[str, int]) -> AbstractMesh:
    """A mesh of these axes without devices: enough to know what each would hold."""
    sizes = tuple(axes[axis] for axis in MESH_AXES)
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


_M_ARENA_MAX = -8  # In glibc's malloc.h.


def prepare_compiler(topology: Topology) -> None:
    """Sets the environment that libtpu reads when it is loaded, where it is not set.

    And on Linux, that all threads share one heap from then on: the compiler's would else each keep
    what they have freed, by up to half of what a program takes.

    To be called before JAX is used for the first time, if that is possible: JAX then loads it.
    """
    if topology.kind not in TPUS:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    # It shall not refuse to run beside another process that compiles.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
        # Where there is no TPU it shall not look for one, or complain of what it does not find.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")


def compile_mesh(topology: Topology, axes: dict[str, int]) -> Mesh:
    """A mesh of devices that a program can be compiled for, here or not.

    Raises:
        CompilerMissingError: if their compiler is not installed.
        UserError: if the compiler does not know the topology.
    """
    return make_mesh(**axes, devices=_devices(topology))


def _devices(topology: Topology) -> list[Any]:
    if topology.kind == "local":
        return list(jax.devices())
    if topology.platform == "tpu":
        return _described(topology, "tpu", _tpu_options(topology))
    if topology.kind in _CUDA_TARGETS:
        if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
            raise CompilerMissingError(
                'JAX\'s CUDA plugin is not installed (pip install "jax[cuda13]")'
            )
        target = _CUDA_TARGETS[topology.kind]
        return _described(topology, "cuda", {"target_config": target, "topology": topology.layout})
    raise CompilerMissingError(f"there is no compiler for {topology.name} without the machine")


def _tpu_options(topology: Topology) -> dict[str, Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise CompilerMissingError('libtpu is not installed (pip install "gptjax[plan]")')
    options: dict[str, Any] = {"topology_name": f"{topology.kind}:{topology.layout}"}
    sides = [int(side) for side in topology.layout.split("x")]
    if any(side % 2 for side in sides[:2]):
        # Hosts of four chips, 2 x 2, are the compiler's default.
        options["chips_per_host_bounds"] = [1, 1, 1]
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    return options


def _described(topology: Topology, platform: str, options: dict[str, Any]) -> list[Any]:
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(platform=platform, **options)
    except Exception as error:
        raise UserError(
            f"topology {topology.name!r} is refused by the compiler: {str(error).splitlines()[0]}"
        ) from error
    return list(description.devices)
