"""A device's matrix rate, which utilization is measured against, its dtype, memory and cores."""

import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig

# Dense bfloat16 (V100, T4: float16) operations a second of one chip, from the vendors' data sheets,
# by what `device_kind` contains; the longer name first where one contains another.
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
}


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
    for kind, flops in _PEAK_FLOPS.items():
        if kind in device.device_kind:
            return flops * len(devices)
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
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return int(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )


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
    fast = device.platform == "tpu" or capability >= 8.0
    return jnp.dtype(jnp.bfloat16 if fast else jnp.float32)
