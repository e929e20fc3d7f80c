"""A device's matrix rate, which utilization is measured against, its dtype, memory and cores."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig


@dataclass(frozen=True)
class Chip:
    """What a vendor's data sheet says of one chip. None is what it does not say.

    Attributes:
        kind: what JAX's `device_kind` of it contains.
        flops: dense bfloat16 (V100, T4: float16) operations a second.
        memory: bytes that a program may use.
        memory_bandwidth: bytes a second between the chip and this memory.
        link_bandwidth: bytes a second that it sends over all its fast links together (a TPU's
            interconnect, NVLink), one way.
        network_bandwidth: its share, one way, of the network between TPU slices or GPU hosts.
        linked: chips that the fast links join; None is a whole TPU slice.
        devices: how many JAX devices it is.
    """

    kind: str
    flops: float
    memory: int | None = None
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None
    network_bandwidth: float | None = None
    linked: int | None = None
    devices: int = 1


_GIB = 2**30
CHIPS = {
    # Google, docs.cloud.google.com/tpu/docs/{v3, v4, v5e, v5p, v6e, tpu7x}; half of the
    # bidirectional link bandwidth is one way. The memory is what the TPU compiler says it has for a
    # program (libtpu 0.0.42), slightly below the data sheet's.
    "v3": Chip("TPU v3", 123e12, devices=2),
    "v4": Chip("TPU v4", 275e12),
    "v5e": Chip("TPU v5 lite", 197e12, int(15.75 * _GIB), 819e9, 200e9, 25e9 / 8),
    "v5p": Chip("TPU v5", 459e12, int(95.74 * _GIB), 2765e9, 600e9, 50e9 / 8),
    "v6e": Chip("TPU v6 lite", 918e12, int(31.25 * _GIB), 1638e9, 400e9, 100e9 / 8),
    "tpu7x": Chip("TPU7x", 2307e12, int(2 * 94.75 * _GIB), 7380e9, 600e9, 100e9 / 8, devices=2),
    # NVIDIA's data sheets of the SXM modules; the network is that of the DGX system of 8.
    "h200": Chip("H200", 989e12, int(141e9), 4.8e12, 450e9, 400e9 / 8, linked=8),
    "h100": Chip("H100", 989e12, int(80e9), 3.35e12, 450e9, 400e9 / 8, linked=8),
    "b200": Chip("B200", 2250e12, int(180e9), 8e12, 900e9, 400e9 / 8, linked=8),
    "a100": Chip("A100", 312e12, int(80e9), 2.039e12, 300e9, 200e9 / 8, linked=8),
    "a100-40gb": Chip("A100-SXM4-40GB", 312e12, int(40e9), 1.555e12, 300e9, 200e9 / 8, linked=8),
    "l40s": Chip("L40S", 362e12),
    "l4": Chip("L4", 121e12),
    "v100": Chip("V100", 125e12),
    "t4": Chip("T4", 65e12),
}
"""Chips by the names that `gptjax.plan` knows them by."""


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a JAX device, or None for a CPU and chips that are not known here."""
    found = [chip for chip in CHIPS.values() if chip.kind in device_kind]
    # The longest name, where one contains another.
    return max(found, key=lambda chip: len(chip.kind), default=None)


def cores_as_devices(most: int = 16) -> None:
    """Makes each core of a CPU a device, to be called before JAX is used for the first time.

    XLA runs one program's small operations on one core each; as data-parallel replicas
    (`gptjax.sharding.data_mesh`) the cores are all busy. Does nothing where the number of CPU
    devices is already set (`jax_num_cpu_devices`, or `--xla_force_host_platform_device_count` in
    `XLA_FLAGS`), and nothing to accelerators.

    Args:
        most: devices to make at most.

    Raises:
        RuntimeError: by JAX, if it has been used already.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if jax.config.jax_num_cpu_devices > 0:  # pyright: ignore[reportAttributeAccessIssue]
        return
    # Those that this process may run on, where the system tells: a container can have fewer.
    tell = getattr(os, "sched_getaffinity", None)
    cores = len(tell(0)) if tell else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", min(cores, most))


def peak_flops(devices: Sequence[Any]) -> float:
    """The matrix rate of JAX devices together, in floating-point operations a second.

    By the data sheet for accelerators that are known here, otherwise (a CPU) measured with a
    float32 product of two 1,024-wide matrices, which takes some tens of milliseconds. All cores
    take part in it, whether they are one device or several.
    """
    device = devices[0]
    chip = find_chip(device.device_kind)
    if chip is not None:
        return chip.flops / chip.devices * len(devices)
    width = 1024
    x = jax.device_put(jnp.ones((width, width)), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * width**3 / best


def peak_bytes(compiled: Any) -> int | None:
    """The most memory in use on one device so far, in bytes.

    Where the backend keeps no count (a CPU), what the compiled program needs by XLA's own
    analysis: arguments, outputs and temporaries, less what is aliased. None if neither is known.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return program_bytes(compiled)


def program_bytes(compiled: Any) -> int | None:
    """What a compiled program needs on a device by XLA's analysis; None where there is none."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return int(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def has_nvidia() -> bool:
    """Whether this machine has an NVIDIA GPU, whatever JAX makes of it."""
    return Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists()


def has_tpu() -> bool:
    """Whether this machine has a TPU, whatever JAX makes of it."""
    if any(Path("/dev").glob("accel[0-9]*")) or os.environ.get("COLAB_TPU_ADDR"):
        return True
    # Newer TPU machines offer their chips through vfio, as Google's PCI devices.
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    google = any(vendor.read_text().strip() == "0x1ae0" for vendor in vendors)
    return google and any(Path("/dev/vfio").glob("[0-9]*"))


def describe(devices: Sequence[Any]) -> str:
    """JAX devices in a few words, such as "1 × NVIDIA H100 (gpu)"."""
    return f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform})"


def compute_dtype(config: ModelConfig) -> Any:
    """The dtype of matrix work: as configured, or bfloat16 where the default device is fast in it.

    A TPU is, and an NVIDIA GPU from compute capability 8.0 (Ampere) on; a T4 and CPUs are not.
    """
    if config.compute_dtype != "auto":
        return jnp.dtype(config.compute_dtype)
    device = jax.devices()[0]
    capability = float(getattr(device, "compute_capability", 0) or 0)
    fast = platform() == "tpu" or (platform() == device.platform and capability >= 8.0)
    return jnp.dtype(jnp.bfloat16 if fast else jnp.float32)


def platform() -> str:
    """What is compiled for, "cpu", "gpu" or "tpu": the mesh in force, or the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        return jax.default_backend()
    name = str(device.platform)
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def materialized(x: jax.Array) -> jax.Array:
    """Keeps XLA's CPU backend from computing a value again in each of its users.

    It fuses a cheap elementwise producer into every consumer, and so recomputes the residual
    stream's whole sum, and its gradient's, in each block. Elsewhere this is the identity.
    """
    return jax.lax.optimization_barrier(x) if platform() == "cpu" else x
