"""XLA's flags that pay, in one place: commands and scripts set them, an import never.

Most of what NVIDIA once advised to set for GPUs is XLA's default by now. These were looked at, too,
and left as they are (the defaults are those of jaxlib 0.11.0):

- CUDA graphs (`xla_gpu_enable_command_buffer`): recorded by default from 5 kernels on, fusions and
  calls of cuBLAS and cuDNN alike, so that a step of decoding is launched as one. What is not by
  default is the loop around it (`+WHILE`), which would save a look at its condition a token.
- Triton's matrix products (`xla_gpu_enable_triton_gemm`): on, and the autotuner
  (`xla_gpu_autotune_level`) takes cuBLAS where that is faster. Its findings are kept on disk by
  JAX's compilation cache, so that the next run does not measure again.
- Sizes from which collectives are joined (`xla_gpu_*_combine_threshold_bytes`, 30 MB): larger ones
  wait longer for what they overlap with; the best depends on the model and the network.
- Loops with collectives are unrolled by two already (`xla_gpu_enable_while_loop_unrolling`).
- Determinism (`xla_gpu_deterministic_ops`): slower; for who needs it.
"""

import importlib.util
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from gptjax.devices import has_nvidia, has_tpu

GPU: dict[str, str] = {
    # Collectives start as early and end as late as their arguments allow, and other kernels run
    # meanwhile. Source: JAX's "GPU performance tips"; NVIDIA's JAX image sets it. For Hopper XLA
    # does it unasked, for an A100 it does not: there most collectives of an FSDP step have no
    # kernel beside them without it. The program of one GPU stays the same.
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
    # The weights of the next block of a scan are gathered, and the gradients of the last one
    # summed, while one is at work; scattered sums are by default. Source: NVIDIA's "Tips for
    # High-Performance LLMs with JAX and XLA", on FSDP. On eight H100s it doubles the kernels that
    # a gather has beside it, in the same memory.
    "--xla_gpu_enable_pipelined_all_gather": "true",
    "--xla_gpu_enable_pipelined_all_reduce": "true",
}
"""Of XLA's GPU compiler, by `XLA_FLAGS`, where JAX's CUDA plugin is installed."""

TPU: dict[str, str] = {
    # Products of split weights are not made part by part, as the parts come round: a part of a
    # width that does not fill the matrix unit (200 of GPT-2 XL over 8 chips, 192 of GPT-3 over 64)
    # wastes up to a third of it. Larger operands, activations of a tensor group, still are.
    "--xla_jf_spmd_threshold_for_windowed_einsum_mib": "256",
    # Gathers go on beside products, which a v5e's compiler does by default and a v5p's does not: of
    # the fourteen then in the loops of Llama 3 8B on 32 v5p twelve did, and none without; now all
    # twelve do. Left out are, with figures of that time,
    # - gathering the next block's weights ahead of their block
    #   (`--xla_tpu_enable_ici_ag_pipelining`, `--xla_tpu_enable_ag_backward_pipelining`): it holds
    #   another block's weights (GPT-3 on 512 v5p 12.86 GiB instead of 11.96), and hid fewer, nine
    #   of fifteen of GPT-2 XL on eight v5e instead of twelve. Nor did carrying them through the
    #   scan help, with a backward pass by hand: they waited one by one, or were copied into one;
    # - gathers beside attention's kernel
    #   (`--xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call`): it hid one more of
    #   GPT-2 XL's, but the compiler for a v5p, whose chips have two cores, ends the process in the
    #   kernel's backward pass (libtpu 0.0.42).
    "--xla_enable_async_all_gather": "true",
    "--xla_tpu_enable_async_collective_fusion": "true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "--xla_tpu_overlap_compute_collective_tc": "true",
}
"""Of libtpu, by `LIBTPU_INIT_ARGS`."""


def set_flags(*platforms: Literal["gpu", "tpu"]) -> None:
    """Adds what pays to `XLA_FLAGS` and `LIBTPU_INIT_ARGS`, before JAX starts a device.

    What is set there already stays and wins. A flag that an installed XLA does not know would end
    the process, so that those are left out; see `known_flags`.

    Args:
        platforms: whose flags; none are those of the accelerators that are here, if any. To compile
            for one that is not, name it.
    """
    here = {"gpu": has_nvidia(), "tpu": has_tpu()}
    wanted = platforms or [platform for platform, is_here in here.items() if is_here]
    if "gpu" in wanted:
        # jaxlib reads the same variable, and stumbles over the same flags.
        known = known_flags(known_flags(GPU, _cuda_library()), _library("jaxlib", "libjax_common"))
        _extend("XLA_FLAGS", known)
    if "tpu" in wanted:
        _extend("LIBTPU_INIT_ARGS", missing_tpu_flags())


def missing_tpu_flags() -> dict[str, str]:
    """Of `TPU`, what the installed libtpu knows and `LIBTPU_INIT_ARGS` does not set."""
    return _unset("LIBTPU_INIT_ARGS", known_flags(TPU, _library("libtpu", "libtpu")))


def _unset(variable: str, flags: Mapping[str, str]) -> dict[str, str]:
    given = os.environ.get(variable, "").split()
    if given and not given[0].startswith("-"):
        return {}  # XLA reads the flags from a file of this name.
    named = {word.partition("=")[0] for word in given}
    return {name: value for name, value in flags.items() if name not in named}


def _extend(variable: str, flags: Mapping[str, str]) -> None:
    added = [f"{name}={value}" for name, value in _unset(variable, flags).items()]
    if added:
        os.environ[variable] = " ".join([*os.environ.get(variable, "").split(), *added])


def known_flags(flags: Mapping[str, str], library: Path | None) -> dict[str, str]:
    """Those of the flags that a compiled XLA reads.

    XLA lists them nowhere that could be read without ending the process, but its library holds the
    name of each as a string of its own.

    Args:
        flags: name -> value; names begin with two dashes.
        library: the file of the library; None knows none.
    """
    if library is None:
        return {}
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        return {
            name: value
            for name, value in flags.items()
            if held.find(b"\0" + name.removeprefix("--").encode() + b"\0") >= 0
        }


def _cuda_library() -> Path | None:
    """XLA's library in JAX's CUDA plugin."""
    found = (_library(f"jax_plugins.xla_cuda{n}", "xla_cuda_plugin") for n in (12, 13))
    return next(filter(None, found), None)


def _library(package: str, name: str) -> Path | None:
    """The file of a package's library; None where there is none."""
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return None
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).with_name(f"{name}.so")
    return file if file.is_file() else None
