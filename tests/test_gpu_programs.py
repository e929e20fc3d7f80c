"""The train step as an H100 would run it, by JAX's CUDA plugin, without one.

What is checked is the compiled program: the kernels in it and the arrays that it keeps in memory.
"""

import importlib.util
import math
import re
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import sharding
from gptjax.attention import attention_backend
from gptjax.config import preset
from gptjax.float8 import matmul_float8
from gptjax.loss import LOGITS_AT_ONCE_GPU
from gptjax.optimizer import OptimizerConfig, make_optimizer
from gptjax.params import param_specs
from gptjax.planning.topology import compile_mesh, parse_topology
from gptjax.sharding import MESH_AXES
from gptjax.training import abstract_state, make_train_step

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="JAX's CUDA plugin, which compiles for GPUs, is not installed",
)

B, T = 8, 1024
CONFIG = preset("gpt2").replace(compute_dtype="bfloat16")
SMALL = CONFIG.replace(
    vocab_size=3000, context_length=256, num_layers=8, embed_dim=256, num_heads=4, num_kv_heads=2
)


class Instruction(NamedTuple):
    """One instruction of a program.

    Attributes:
        arrays: its results, as (dtype, dimensions).
        operation: such as "dot".
        operands: the names of its arguments.
        line: the whole.
    """

    arrays: list[tuple[str, tuple[int, ...]]]
    operation: str
    operands: list[str]
    line: str


def read_program(text: str) -> dict[str, Instruction]:
    """The instructions of all computations of a program, by their names."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)", line)
        if match is None:
            continue
        name, results, operation, operands = match.groups()
        arrays = [
            (dtype, tuple(int(size) for size in sizes.split(",") if size))
            for dtype, sizes in re.findall(r"\b(\w+)\[([\d,]*)\]", results)
        ]
        found[name] = Instruction(arrays, operation, re.findall(r"%([\w.-]+)", operands), line)
    return found


@cache
def program(axes: tuple[tuple[str, int], ...], *, packed: bool) -> dict[str, Instruction]:
    """The compiled train step: of GPT-2 on one H100, of a small model on a mesh of several."""
    sizes = dict.fromkeys(MESH_AXES, 1) | dict(axes)
    config = SMALL if axes else CONFIG
    mesh = compile_mesh(parse_topology(f"h100:{math.prod(sizes.values())}"), sizes)
    optimizer = make_optimizer(OptimizerConfig(), config, 100)
    ids = jax.ShapeDtypeStruct(
        (B, config.context_length), jnp.int32, sharding=sharding.batch_sharding(mesh)
    )
    batch = {"tokens": ids, "targets": ids}
    if packed:
        batch |= {"segment_ids": ids, "positions": ids}
    step: Any = make_train_step(config, optimizer, mesh)
    lowered = step.lower(abstract_state(config, optimizer, mesh), batch)
    backend = attention_backend(config, packed=packed, mesh=mesh)
    assert backend.name == "cudnn", backend.reason
    return read_program(lowered.compile().as_text())


def kernels(instructions: dict[str, Instruction]) -> list[str]:
    """The names of cuDNN's attention kernels in a program."""
    return sorted(
        target
        for instruction in instructions.values()
        for target in re.findall(r'custom_call_target="__cudnn\$fmha(\w+)"', instruction.line)
    )


@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_cudnns_and_keeps_no_scores(packed: bool) -> None:
    instructions = program((), packed=packed)
    softmax = "ScaleBiasSoftmax" if packed else "Softmax"
    # Each is there once, in the scan over the layers: the backward pass runs no forward kernel.
    assert kernels(instructions) == [softmax, f"{softmax}Backward"]
    pairs = [sizes for i in instructions.values() for _, sizes in i.arrays if sizes.count(T) >= 2]
    # Of the mask there is one for all heads, and not one for each layer.
    assert all(math.prod(sizes) <= B * T * T for sizes in pairs)
    assert bool(pairs) == packed


@pytest.mark.parametrize("packed", [False, True])
def test_logits_are_never_whole(packed: bool) -> None:
    V = CONFIG.vocab_size
    instructions = program((), packed=packed)
    blocks = [
        math.prod(sizes)
        for i in instructions.values()
        for _, sizes in i.arrays
        if sizes and V <= sizes[-1] < V + 256
    ]
    assert V * B < max(blocks) <= LOGITS_AT_ONCE_GPU * 1.05 < B * T * V
    assert max(math.prod(sizes) for i in instructions.values() for _, sizes in i.arrays) < B * T * V


@pytest.mark.parametrize("packed", [False, True])
def test_matrix_products_read_no_float32(packed: bool) -> None:
    instructions = program((), packed=packed)
    products = [i for i in instructions.values() if i.operation == "dot"]
    assert len(products) > 10
    for product in products:
        for operand in product.operands:
            ((dtype, _),) = instructions[operand].arrays
            assert dtype == "bf16", product.line


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_tables_are_summed_in_float32(packed: bool) -> None:
    """Of positions too, where rows have their own; else each row of the table is written once."""
    scatters = [i for i in program((), packed=packed).values() if i.operation == "scatter"]
    of_tokens = [i for i in scatters if i.arrays[0][1] == (CONFIG.vocab_size, CONFIG.embed_dim)]
    assert len(of_tokens) == 1
    assert of_tokens[0].arrays[0][0] == "f32"
    assert len(scatters) == (1 if packed else 2)


def test_the_update_is_one_kernel_a_parameter() -> None:
    """Which reads gradient, moments and weight once and writes three of them."""
    count = len(jax.tree.leaves(param_specs(CONFIG), is_leaf=lambda x: hasattr(x, "shape")))
    fusions = [
        i
        for i in program((), packed=False).values()
        if i.operation == "fusion" and re.search(r'op_name="[^"]*/optimizer/', i.line)
    ]
    updates = [i for i in fusions if len(i.arrays) == 3]
    assert len(updates) == count
    # The norm of the gradient takes one or two for each, and some are of single numbers.
    assert len(fusions) <= 3 * count + 8


def test_each_device_of_a_mesh_runs_it_on_its_own_rows_and_heads() -> None:
    instructions = program((("data", 2), ("fsdp", 2), ("tensor", 2)), packed=True)
    assert kernels(instructions) == ["ScaleBiasSoftmax", "ScaleBiasSoftmaxBackward"]
    forward = next(i for i in instructions.values() if 'fmhaScaleBiasSoftmax"' in i.line)
    rows, heads = B // 4, SMALL.num_heads // 2
    assert forward.arrays[0][1] == (rows, heads, SMALL.context_length, SMALL.head_width)


def test_products_in_8_bit_floats_are_cublas_own(rng: np.random.Generator) -> None:
    """All three of a kernel. Which of cuBLAS and Triton runs, XLA finds out on the GPU."""
    mesh = compile_mesh(parse_topology("h100:1"), dict.fromkeys(MESH_AXES, 1))

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding.replicated(mesh))

    def product(x: jax.Array, kernel: jax.Array, grad: jax.Array):
        out, pull_back = jax.vjp(matmul_float8, x, kernel)
        return out, pull_back(grad)

    B, T, D, F = (int(size) * 64 for size in rng.integers(1, 9, size=4))
    with jax.set_mesh(mesh):
        lowered = jax.jit(product).lower(array(B, T, D), array(D, F), array(B, T, F))
    compiled = lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})
    targets = re.findall(r'custom_call_target="([^"]*)"', compiled.as_text())
    assert targets.count("__cublas$lt$matmul$f8") == 3
    # The two of the backward pass are added up in full float32.
    calls = [i for i in compiled.as_text().splitlines() if '"__cublas$lt$matmul$f8"' in i]
    assert sum('"operand_precision":["HIGHEST","HIGHEST"]' in call for call in calls) == 2


def test_stages_run_it_too() -> None:
    instructions = program((("data", 2), ("stage", 2)), packed=False)
    assert kernels(instructions) == ["Softmax", "SoftmaxBackward"]
