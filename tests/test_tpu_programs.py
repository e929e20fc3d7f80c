"""The train step as TPUs would run it, by their compiler; and the readers of its program."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import xla_flags
from gptjax.config import ModelConfig, preset
from gptjax.errors import UserError
from gptjax.fitting import fit
from gptjax.model import forward
from gptjax.optimizer import OptimizerConfig
from gptjax.params import init_params
from gptjax.planning import Plan, choose_remat, compiled, meshes, plan, programs
from gptjax.planning.topology import Topology, parse_topology
from gptjax.sharding import MESH_AXES
from gptjax.training import make_train_step

ROOT = Path(__file__).parents[1]
AXES: dict[str, int] = dict.fromkeys(MESH_AXES, 1) | {"fsdp": 8}

HLO = """HloModule step, is_scheduled=true

%product (a: bf16[256,1600], b: bf16[1600,64]) -> bf16[256,64] {
  %a = bf16[256,1600]{1,0} parameter(0)
  %b = bf16[1600,64]{1,0} parameter(1)
  ROOT %dot.1 = bf16[256,64]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%cheap (c: bf16[256]) -> bf16[256] {
  %c = bf16[256]{0} parameter(0)
  ROOT %neg = bf16[256]{0} negate(%c)
}

%begin (y: bf16[8,300]) -> (bf16[8,300], bf16[64,300]) {
  %y = bf16[8,300]{1,0} parameter(0)
  %all-gather.4 = bf16[64,300]{1,0} all-gather(%y), channel_id=9, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %custom-call = (bf16[8,300], bf16[64,300]) custom-call(%all-gather.4), custom_call_target="AsyncCollectiveStart"
}

%end (y.2: bf16[8,300]) -> bf16[64,300] {
  %y.2 = bf16[8,300]{1,0} parameter(0)
  %all-gather.6 = bf16[64,300]{1,0} all-gather(%y.2), channel_id=9, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %custom-call.2 = bf16[64,300] custom-call(%all-gather.6), custom_call_target="AsyncCollectiveDone"
}

%turning (arg: (u32[], bf16[256,64])) -> pred[] {
  %bound = u32[]{:T(128)} constant(8)
  %arg = (u32[], bf16[256,64]) parameter(0)
  %turn = u32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %less = pred[] compare(%turn, %bound), direction=LT
}

%body (arg.2: (u32[], bf16[256,64])) -> (u32[], bf16[256,64]) {
  %two = u32[]{:T(128)} constant(2)
  %arg.2 = (u32[], bf16[256,64]) parameter(0)
  %now = u32[]{:T(128)} get-tuple-element(%arg.2), index=0
  %next = u32[]{:T(128)} add(%now, %two)
  %alone = (bf16[2,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %small = bf16[256]{0} fusion(%c), kind=kLoop, calls=%cheap
  %alone.done = bf16[16,4]{1,0} all-gather-done(%alone)
  %beside = (bf16[3,4]{1,0}, bf16[24,4]{1,0}) all-gather-start(%z), replica_groups=[1,8]<=[8], dimensions={0}
  %async-collective-start.1 = (bf16[8,300], bf16[64,300]) fusion(%y.9), kind=kCustom, calls=%begin
  %fused = bf16[256,64]{1,0} fusion(%a, %b), kind=kOutput, calls=%product
  %async-collective-done.1 = bf16[64,300]{1,0} fusion(%async-collective-start.1), kind=kCustom, calls=%end
  %beside.done = bf16[24,4]{1,0} all-gather-done(%beside)
  %waiting = bf16[32,4]{1,0} all-gather(%w), replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %t = (u32[], bf16[256,64]) tuple(%next, %fused)
}

ENTRY %main (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %table = bf16[50257,1600]{1,0} copy(%p)
  %logits = f32[2,256,50304]{2,1,0} copy(%p)
  %loop = (u32[], bf16[256,64]) while(%init), condition=%turning, body=%body
  ROOT %r = bf16[8,4]{1,0} copy(%p)
}
"""  # noqa: E501


def test_what_goes_on_beside_work() -> None:
    """Between a collective's start and its end there is a product, or there is none."""
    found = programs.read_collectives(HLO, AXES)
    overlapped = {c.shapes[0][0]: c.overlapped for c in found}
    assert overlapped == {16: False, 24: True, 64: True, 32: False}
    # A loop that moves its counter by two turns half as often as its bound says.
    assert {c.count for c in found} == {4}


def test_products_of_a_program() -> None:
    products = programs.read_products(HLO)
    assert products.flops == 4 * 2 * 256 * 1600 * 64
    # 1,600 summed elements take thirteen tiles of 128; 64 columns are streamed, in eights.
    assert products.tiled == 4 * 2 * 256 * 1664 * 64
    assert products.padding == pytest.approx(1 - 1600 / 1664)
    # The trace knows of the same tiles.
    x, y = jnp.ones((256, 1600)), jnp.ones((1600, 64))
    jaxpr = jax.make_jaxpr(jnp.matmul)(x, y)
    assert programs.count_flops(jaxpr, tile=128) == products.tiled / 4
    wide = programs.read_products(HLO, tile=256)
    assert wide.tiled == 4 * 2 * 256 * 1792 * 64


def test_cycles_of_a_program() -> None:
    """As the compiler notes them, in a loop as often as it turns; other compilers note none."""
    assert programs.count_cycles(HLO) is None
    noted = {"fusion(%a, %b)": 700, "%table = bf16[50257,1600]{1,0} copy(%p)": 30}
    text = HLO
    for operation, cycles in noted.items():
        cost = f'{operation}, backend_config={{"window_config":{{}},"estimated_cycles":"{cycles}"}}'
        assert text.count(operation) == 1
        text = text.replace(operation, cost)
    assert programs.count_cycles(text) == 4 * 700 + 30


def test_largest_array() -> None:
    assert programs.largest_array(HLO, {50304, 50257}, {1600}) == 2 * 256 * 50304 * 4
    assert programs.largest_array(HLO, {50304, 50257}, set()) == 50257 * 1600 * 2
    assert programs.largest_array(HLO, {77}, set()) == 0


def test_products_of_convolutions(rng: np.random.Generator) -> None:
    """As the TPU's compiler writes them: the places of a window that lie on the input."""
    for _ in range(8):
        batch, width, features = (int(n) for n in rng.integers(1, 6, 3))
        size, window, low, high, apart, base = (
            int(n) for n in (rng.integers(1, 6), *rng.integers(1, 5, 3), *rng.integers(1, 3, 2))
        )
        stride = int(rng.integers(1, 3))
        if base * (size - 1) + 1 + low + high < apart * (window - 1) + 1:
            continue
        x, kernel = jnp.ones((batch, size, width)), jnp.ones((window, width, features))
        out = jax.lax.conv_general_dilated(
            x, kernel, (stride,), [(low, high)], (base,), (apart,),
            dimension_numbers=("NHC", "HIO", "NHC"),
        )  # fmt: skip
        given, filled, result = (",".join(map(str, array.shape)) for array in (x, kernel, out))
        text = f"""HloModule m

ENTRY %main (x: f32[{given}], k: f32[{filled}]) -> f32[{result}] {{
  %x = f32[{given}]{{2,1,0}} parameter(0)
  %k = f32[{filled}]{{2,1,0}} parameter(1)
  ROOT %c = f32[{result}]{{2,1,0}} convolution(%x, %k), window={{size={window} stride={stride} pad={low}_{high} lhs_dilate={base} rhs_dilate={apart}}}, dim_labels=b0f_0io->b0f
}}
"""  # noqa: E501
        # Of ones, each output is the number of its products.
        assert programs.read_products(text).flops == 2 * float(jnp.sum(out))


def test_products_are_those_of_the_trace(rng: np.random.Generator) -> None:
    """A program compiled here, with a loop, against the walk over its trace."""
    m, k, n, turns = (int(x) for x in rng.integers(20, 90, 4))

    def program(x: jax.Array, y: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ c.T) @ c, None), x, None, length=turns)
        return jnp.einsum("bmk,bkn->bmn", jnp.stack([x, 2 * x]), jnp.stack([y, y + 1]))

    traced = jax.jit(program).trace(jnp.ones((m, k)), jnp.ones((k, n)))
    text: Any = traced.lower().compile().as_text()
    assert programs.read_products(text).flops == programs.count_flops(traced.jaxpr)


def small(**changes: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=512, context_length=64, embed_dim=64, num_heads=4, compute_dtype="float32"
    ).replace(**changes)


def test_program_does_not_grow_with_depth() -> None:
    """It is as long for 48 blocks as for 12, and its memory is linear in the batch."""

    def step(layers: int, batch: int) -> Plan:
        config = small(num_layers=layers, vocab_size=128)
        return plan(config, "local", batch=batch, mesh="data=1", remat="full")

    shallow = [step(12, batch) for batch in (16, 32, 48)]
    deep = step(48, 16)
    # Some constants are written otherwise.
    assert 100 < (deep.operations or 0) < 1.01 * (shallow[0].operations or 0)
    sizes = [made.peak_bytes_per_chip for made in shallow]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.05)


def with_memory(name: str, gib: float) -> Topology:
    parsed = parse_topology(name)
    chip = dataclasses.replace(parsed.chip, memory=int(gib * 2**30))
    return dataclasses.replace(parsed, chip=chip)


def test_more_is_recomputed_for_more_rows() -> None:
    config = preset("gpt2").replace(remat="auto")
    chip = parse_topology("v6e:1x1")
    chosen = []
    for batch in (8, 16, 32, 64, 128, 256):
        policy = choose_remat(config, chip, batch=batch)
        chosen.append(policy)
        made = plan(config, "v6e:1x1", batch=batch, compile=False)
        assert made.remat == policy
        assert made.peak_bytes_per_chip <= meshes.FILL * (made.chip_bytes or 0)
        # The one before it in the list does not fit.
        if policy != "none":
            less = meshes.POLICIES[meshes.POLICIES.index(policy) - 1]
            more = plan(config, "v6e:1x1", batch=batch, remat=less, compile=False)
            assert more.peak_bytes_per_chip > meshes.FILL * (more.chip_bytes or 0)
            assert less in made.remat_reason
    places = [meshes.POLICIES.index(policy) for policy in chosen]
    assert places == sorted(places)
    assert {"none", "dots", "full"} <= set(chosen)
    # By how much memory there is, too; and where none is enough, everything is recomputed.
    by_memory = [choose_remat(config, with_memory("v6e:1x1", gib), batch=64) for gib in (99, 31, 1)]
    assert by_memory == ["none", "dots", "full"]


def test_on_a_cpu_nothing_is_recomputed() -> None:
    assert choose_remat(small(remat="auto", num_layers=96), batch=4096) == "none"
    assert choose_remat(small(remat="auto"), "cpu:28", batch=8) == "none"


def test_what_is_given_is_where_the_choice_begins() -> None:
    config = preset("gpt2").replace(remat="full")
    assert choose_remat(config, "v6e:1x1", batch=8) == "full"
    assert plan(config, "v6e:1x1", batch=8, compile=False).remat == "full"
    made = plan(config, "v6e:1x1", batch=8, remat="dots", compile=False)
    assert (made.remat, made.remat_reason) == ("dots", "")


def test_auto_is_refused_where_it_was_not_chosen() -> None:
    config = small(num_layers=2, remat="auto")
    params = init_params(config.replace(remat="none"), jax.random.key(0))
    with pytest.raises(UserError, match="choose_remat"):
        make_train_step(config, optax.sgd(0.1))
    # Without a gradient there is nothing to choose.
    tokens = jnp.zeros((1, 8), jnp.int32)
    np.testing.assert_array_equal(
        forward(params, tokens, config), forward(params, tokens, config.replace(remat="none"))
    )


def test_a_run_records_its_choice(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fit` resolves "auto", says what it took, and takes it again when it goes on."""
    config = small(num_layers=2, context_length=32, remat="auto")
    ids = rng.integers(0, 512, (4, 8, 33)).astype(np.int32)
    batches = [{"tokens": rows[:, :-1], "targets": rows[:, 1:]} for rows in ids]

    def run(steps: int, out: str) -> Any:
        return fit(
            config, OptimizerConfig(learning_rate=1e-3), batches, steps=steps, out=tmp_path / out,
            progress=False,
        )  # fmt: skip

    def recorded(out: str) -> str:
        return json.loads((tmp_path / out / "config.json").read_text())["model"]["remat"]

    # A device that holds what "full" needs, and no more.
    wanted = config.replace(remat="full")
    layout = meshes.lay_out(
        wanted, parse_topology("h100:1"), dict.fromkeys(MESH_AXES, 1), 8,
        meshes.default_optimizer(wanted),
    )  # fmt: skip
    need = sum(meshes.estimate_memory(layout).values()) / meshes.FILL / 2**30
    monkeypatch.setattr(meshes, "parse_topology", lambda name: with_memory("h100:1", need * 1.001))
    chosen = run(1, "chosen")
    assert recorded("chosen") == "full"
    again = run(2, "chosen")
    assert recorded("chosen") == "full"
    assert chosen.summary["steps"] == 1
    assert again.summary["val_loss"] is None


def test_the_plan_compiles_with_the_flags_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    target = parse_topology("v5e:2x4")
    monkeypatch.setattr(xla_flags, "TPU", {"--xla_tpu_some": "true", "--xla_tpu_other": "3"})
    monkeypatch.setattr(xla_flags, "known_flags", lambda flags, library: flags)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_other=4")
    # What is set by hand is set already.
    assert compiled._options(target) == {"xla_tpu_some": "true"}
    assert compiled._options(parse_topology("h100:8")) is None


def compiled_target(name: str) -> dict[str, Any]:
    """A row of the benchmark's table, made in a process of its own."""
    script = (
        "import json; from tpu_programs import compiled_row; "
        f"print('ROW' + json.dumps(compiled_row({name!r}, 'auto')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT / "experiments" / "benchmarks",
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("ROW")[2])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl", "llama3-8b"])
def test_lines(name: str) -> None:
    """GPT-2 on one v6e, its largest on eight v5e, Llama 3 8B on 32 v5p.

    No products but those stated, no padding, gathers beside work: a v5p would wait for each without
    the flags.
    """
    row = compiled_target(name)
    assert row["compiled"]
    assert row["fits"]
    # Attention's kernel computes its scores again in the backward pass, which is no policy's.
    assert 0.97 < row["program_flops_per_token"] / row["stated_flops_per_token"] <= 1.08
    assert row["logits_share"] <= 0.5
    # A width of 1,600 is twelve tiles and a half, which no layout of it mends.
    assert row["padding"] <= (0.025 if name == "gpt2-xl" else 0.001)
    assert row["added_padding"] <= 0.005
    # None is waited for: twelve are left in each of the larger two.
    assert row["loop_gathers"] == row["loop_gathers_overlapped"]
    assert (row["loop_gathers"] > 0) == (row["chips"] > 1)
    # One product for queries, keys and values, and what is laid out anew for it, made XL 1.43e9; an
    # activation that joins two products into one, 1.25e9.
    assert row["cycles"] <= {"gpt2": 1.38e8, "gpt2-xl": 1.22e9, "llama3-8b": 2.67e9}[name]
