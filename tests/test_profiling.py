"""Traces: names of operations, their shares, and how much of a step they explain."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import profiling
from gptjax.errors import UserError
from gptjax.profiling import _Event, _program_names, _scope, _segments

CONFIG = gptjax.ModelConfig(
    vocab_size=64, context_length=64, num_layers=3, embed_dim=128, num_heads=4, scan_unroll=1
)
STEPS = 3


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of a few train steps."""
    folder = tmp_path_factory.mktemp("trace")
    optimizer = gptjax.make_optimizer(gptjax.OptimizerConfig(), CONFIG, 10)
    state = gptjax.init_state(CONFIG, optimizer, jax.random.key(0))
    tokens = np.random.default_rng().integers(64, size=(8, 65)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    compiled = gptjax.make_train_step(CONFIG, optimizer).lower(state, batch).compile()
    state, _ = compiled(state, batch)
    jax.block_until_ready(state)
    with profiling.trace(folder, compiled):
        for number in range(STEPS):
            with profiling.traced_step(number):
                state, _ = compiled(state, batch)
                jax.block_until_ready(state)
    return folder


def test_operations_are_named_by_the_parts_of_the_model(traced: Path):
    every = profiling.costliest(traced, None)
    shares = [operation.share for operation in every]
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    assert every[:10] == profiling.costliest(traced)
    parts = profiling.by_part(every)
    assert sum(parts.values()) == pytest.approx(sum(operation.seconds for operation in every))
    assert {"attention", "mlp", "loss", "optimizer"} <= set(parts)
    # Nothing that multiplies matrices is without a part.
    assert all(operation.scope for operation in every if "dot_general" in operation.name)
    products = [o for o in every if o.scope == "mlp (backward)" and "dot_general" in o.name]
    # Each of a block's two matrices is in two products, in every block and step.
    assert sum(operation.count for operation in products) == 4 * CONFIG.num_layers * STEPS
    assert not any(operation.name[-1].isdigit() for operation in every)


def test_a_trace_explains_its_steps(traced: Path):
    steps = profiling.explained(traced)
    assert [step.number for step in steps] == list(range(STEPS))
    for step in steps:
        assert 0 < step.busy <= step.seconds
    # Other load on the machine comes between a step's start and its first operation.
    assert max(step.busy / step.seconds for step in steps) > 0.3
    busy = sum(step.busy for step in steps)
    everything = sum(operation.seconds for operation in profiling.costliest(traced, None))
    assert busy == pytest.approx(everything, rel=0.02)


def test_what_is_not_there_is_said(tmp_path: Path):
    for function in (profiling.costliest, profiling.explained):
        with pytest.raises(UserError, match="no trace in"):
            function(tmp_path)
    x = jnp.ones((64, 64))
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    with profiling.trace(tmp_path, product):
        jax.block_until_ready(product(x, x))
    with pytest.raises(UserError, match="no steps"):
        profiling.explained(tmp_path)
    assert profiling.costliest(tmp_path)[0].share == pytest.approx(1, abs=0.5)


def test_time_is_counted_once(rng: np.random.Generator):
    starts = rng.integers(0, 200, 40)
    ends = starts + rng.integers(1, 60, 40)
    pairs = zip(starts, ends, strict=True)
    events = [_Event(float(a), float(b), "m", f"op.{n}", 0) for n, (a, b) in enumerate(pairs)]
    owners: dict[int, _Event] = {}
    for begin, end, event in _segments(events, fills_gaps=False):
        for moment in range(int(begin), int(end)):
            assert moment not in owners
            owners[moment] = event
    for moment in range(300):
        running = [event for event in events if event.start <= moment < event.end]
        if not running:
            assert moment not in owners
        else:
            # The one that started last has it.
            assert owners[moment].start == max(event.start for event in running)


def test_what_goes_on_after_an_operation_counts_for_it():
    first = _Event(0, 10, "m", "a", 1)
    second = dataclasses.replace(first, start=30, end=40, name="b")
    other_run = dataclasses.replace(first, start=60, end=70, name="c", run=2)
    events = [other_run, second, first]
    found = [(a, b, event.name) for a, b, event in _segments(events, fills_gaps=True)]
    assert found == [(0, 10, "a"), (10, 30, "a"), (30, 40, "b"), (60, 70, "c")]
    found = [(a, b, event.name) for a, b, event in _segments(events, fills_gaps=False)]
    assert found == [(0, 10, "a"), (30, 40, "b"), (60, 70, "c")]


@pytest.mark.parametrize(
    ("op_name", "scope", "primitive"),
    [
        ("jit(step)/jvp(embed)/gather", "embed", "gather"),
        # As JAX 0.12 has it.
        ("jit(step)/jvp()/eval_jaxpr/mlp/add", "mlp", "add"),
        ("jit(step)/jvp()/closed_call/attention/qkv/dot_general", "attention/qkv", "dot_general"),
        (
            "jit(step)/transpose(jvp())/while/body/closed_call/mlp/dot_general",
            "mlp (backward)",
            "dot_general",
        ),
        (
            "jit(step)/transpose(jvp())/while/body/closed_call/checkpoint/rematted_computation"
            "/attention/scores/...ns,...sc->...nc/dot_general",
            "attention/scores (recomputed)",
            "dot_general",
        ),
        ("jit(step)/optimizer/jit(clip)/max;jit(step)/mul", "optimizer", "max"),
        ("jit(step)/jvp()/while", "", ""),
        ("jit(step)/(a/reduce_sum:b/reduce_sum)", "several", ""),
        ("", "", ""),
    ],
)
def test_names_of_jax_become_parts_of_the_model(op_name: str, scope: str, primitive: str):
    assert _scope(op_name) == (scope, primitive)


def test_a_fusion_without_a_name_has_that_of_what_it_does():
    names = _program_names(
        """HloModule jit_step, is_scheduled=true

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %a.1 = f32[2]{0} add(%p, %p), metadata={op_name="jit(step)/mlp/add" stack_frame_id=3}
  %b.1 = f32[2]{0} multiply(%a.1, %p), metadata={op_name="jit(step)/loss/mul"}
  ROOT %c.1 = f32[2]{0} add(%b.1, %p), metadata={op_name="jit(step)/mlp/add"}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %loop_fusion.7 = f32[2]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %dot.2 = f32[2]{0} negate(%loop_fusion.7), metadata={op_name="jit(step)/loss/neg"}
}
"""
    )
    assert names["jit_step", "loop_fusion.7"] == "jit(step)/mlp/add"
    assert names["jit_step", "dot.2"] == "jit(step)/loss/neg"
    # As a kernel on a GPU is called.
    assert names["", "loop_fusion_7"] == "jit(step)/mlp/add"


def gpu_trace(folder: Path) -> None:
    """A trace as one of a GPU is laid out: streams, lines that sum them up, the host's steps."""

    def stat(number: int, text: str) -> str:
        return f'stats {{ metadata_id: {number} str_value: "{text}" }}'

    def event(kind: int, start: int, length: int, *stats: str) -> str:
        # Picoseconds, of which the reader makes nanoseconds.
        times = f"offset_ps: {start * 1000} duration_ps: {length * 1000}"
        return f"events {{ metadata_id: {kind} {times} {' '.join(stats)} }}"

    module = stat(2, "jit_step")
    gemm = event(1, 100, 50, stat(1, "custom-call.4"), module)
    fusion = event(2, 140, 30)
    copy = event(3, 300, 10)
    names = ["nvjet_tst_128x8", "loop_add_fusion_2", "MemcpyD2H", "step", "long"]
    kinds = " ".join(
        f'event_metadata {{ key: {n} value {{ id: {n} name: "{name}" }} }}'
        for n, name in enumerate(names, 1)
    )
    keys = " ".join(
        f'stat_metadata {{ key: {n} value {{ id: {n} name: "{name}" }} }}'
        for n, name in enumerate(["hlo_op", "hlo_module", "step_num"], 1)
    )
    step = event(4, 90, 100, "stats { metadata_id: 3 int64_value: 7 }")
    text = f"""
        planes {{ name: "/device:GPU:0" {kinds} {keys}
          lines {{ id: 1 name: "Stream #1(Compute)" {gemm} {fusion} }}
          lines {{ id: 2 name: "Stream #2(MemcpyD2H)" {copy} }}
          lines {{ id: 3 name: "XLA Modules" {event(5, 0, 1000)} }} }}
        planes {{ name: "/host:CPU" {kinds} {keys} lines {{ id: 9 name: "python" {step} }} }}
    """
    binary = jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
    (folder / "host.xplane.pb").write_bytes(binary)
    (folder / "program-0.hlo.txt").write_text(
        """HloModule jit_step, is_scheduled=true

ENTRY %main (x: f32[2]) -> f32[2] {
  %custom-call.4 = f32[2] custom-call(%x), metadata={op_name="jit(step)/jvp()/mlp/dot_general"}
  %loop_add_fusion.2 = f32[2] fusion(%x), metadata={op_name="jit(step)/optimizer/add"}
}
"""
    )


def test_a_gpu_is_read_by_its_streams(tmp_path: Path):
    gpu_trace(tmp_path)
    found = {o.name: (o.scope, o.seconds) for o in profiling.costliest(tmp_path)}
    assert found == {
        "custom-call (dot_general)": ("mlp", pytest.approx(40e-9)),
        "loop_add_fusion": ("optimizer", pytest.approx(30e-9)),
        "MemcpyD2H": ("", pytest.approx(10e-9)),
    }
    [step] = profiling.explained(tmp_path)
    # The gap before and after is no operation's on a GPU.
    assert (step.number, step.seconds, step.busy) == (
        7,
        pytest.approx(100e-9),
        pytest.approx(70e-9),
    )
