"""What attention is computed by and why, and that all its ways are the same attention."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax.attention
from gptjax import cudnn_attention as cudnn
from gptjax import doctor
from gptjax.attention import Backend, attention, attention_backend, choose_backend
from gptjax.config import ModelConfig, preset
from gptjax.planning.topology import abstract_mesh
from gptjax.sharding import MESH_AXES, make_mesh

HALF = jnp.bfloat16


class Machine:
    """Stands for a machine that is not here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def has(self, platform: str, capability: float | None = None, plugin: bool = True) -> None:
        """What attention is to believe that it is compiled for."""
        set_to = self.monkeypatch.setattr
        set_to(gptjax.attention, "platform", lambda: platform)
        set_to(cudnn, "_compute_capability", lambda: capability)
        set_to(cudnn.importlib.util, "find_spec", lambda name: object() if plugin else None)
        set_to(jax, "device_count", lambda: 1)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("platform", "capability", "shape", "dtype", "options", "name", "words"),
    [
        ("cpu", None, (2, 128, 4, 64), HALF, {}, "plain", "no attention kernel for a cpu"),
        ("gpu", 9.0, (2, 128, 4, 64), HALF, {}, "cudnn", "takes these shapes"),
        ("gpu", 8.0, (2, 130, 4, 128), jnp.float16, {}, "cudnn", "takes these shapes"),
        ("gpu", 9.0, (2, 128, 4, 64), HALF, {"windowed": True}, "cudnn", "takes"),
        ("gpu", 9.0, (2, 128, 4, 256), HALF, {}, "cudnn", "takes"),
        ("gpu", 8.9, (2, 128, 4, 256), HALF, {}, "plain", "multiples of 8 up to 128, not 256"),
        ("gpu", None, (2, 128, 4, 136), HALF, {}, "plain", "up to 128, not 136"),
        ("gpu", 9.0, (2, 128, 4, 60), HALF, {}, "plain", "multiples of 8 up to 256, not 60"),
        ("gpu", 9.0, (2, 127, 4, 64), HALF, {}, "plain", "even lengths, not 127"),
        ("gpu", 9.0, (2, 128, 4, 64), jnp.float32, {}, "plain", "not float32"),
        ("gpu", 7.5, (2, 128, 4, 64), jnp.float16, {}, "plain", "this GPU has 7.5"),
        ("gpu", 9.0, (2, 128, 4, 64), HALF, {"dropout": True}, "plain", "are dropped"),
        ("gpu", 9.0, (2, 128, 4, 64), HALF, {"itself": False}, "plain", "slots of a cache"),
        ("tpu", None, (2, 256, 4, 64), jnp.float32, {}, "splash", "takes these shapes"),
        ("tpu", None, (2, 192, 4, 64), HALF, {}, "plain", "multiples of 128, not 192"),
        ("tpu", None, (2, 256, 4, 64), HALF, {"windowed": True}, "plain", "each layer's own"),
        ("tpu", None, (2, 256, 4, 64), HALF, {"dropout": True}, "plain", "are dropped"),
    ],
)
def test_a_backend_is_chosen_and_says_why(
    machine: Machine,
    platform: str,
    capability: float | None,
    shape: tuple[int, int, int, int],
    dtype: Any,
    options: dict[str, bool],
    name: str,
    words: str,
) -> None:
    machine.has(platform, capability)
    backend = choose_backend(shape, 2, dtype, **options)
    assert backend.name == name
    assert words in backend.reason
    assert "\n" not in backend.reason


def test_without_the_plugin_there_is_no_kernel(machine: Machine) -> None:
    machine.has("gpu", 9.0, plugin=False)
    backend = choose_backend((2, 128, 4, 64), 4, HALF)
    assert backend.name == "plain"
    assert "plugin is not installed" in backend.reason


def test_a_mesh_is_respected(machine: Machine) -> None:
    machine.has("gpu", 9.0)
    one = dict.fromkeys(MESH_AXES, 1)
    with jax.sharding.use_abstract_mesh(abstract_mesh(one | {"data": 2, "tensor": 2})):
        assert choose_backend((2, 128, 4, 64), 2, HALF).name == "cudnn"
        for shape, kv_heads, words in (
            ((3, 128, 4, 64), 2, "3 rows do not divide over 2 parts"),
            ((2, 128, 4, 64), 1, "1 heads do not divide over 2 parts"),
        ):
            backend = choose_backend(shape, kv_heads, HALF)
            assert backend.name == "plain"
            assert words in backend.reason
    with jax.sharding.use_abstract_mesh(abstract_mesh(one | {"stage": 2})):
        assert choose_backend((2, 128, 4, 64), 2, HALF).name == "cudnn"
        for mask in ("windowed", "packed"):
            backend = choose_backend((2, 128, 4, 64), 2, HALF, **{mask: True})
            assert backend.name == "plain"
            assert "a mesh with stages" in backend.reason
    with jax.sharding.use_abstract_mesh(abstract_mesh(one | {"data": 2, "context": 2})):
        assert choose_backend((2, 128, 4, 64), 2, jnp.float32).name == "ring"
        assert choose_backend((2, 128, 4, 64), 2, HALF, dropout=True).name == "plain"


def test_a_models_backend(machine: Machine) -> None:
    machine.has("gpu", 9.0)
    config = preset("gpt2").replace(compute_dtype="bfloat16")
    assert attention_backend(config) == Backend("cudnn", "cuDNN's flash kernel takes these shapes")
    assert attention_backend(config, 1023).name == "plain"
    assert "float32" in attention_backend(config, dtype=jnp.float32).reason
    dropped = config.replace(dropout=0.1)
    assert attention_backend(dropped).name == "plain"
    assert attention_backend(dropped, training=False).name == "cudnn"
    machine.has("tpu")
    assert attention_backend(config).name == "splash"
    windowed = config.replace(sliding_window=512)
    assert attention_backend(windowed).name == "plain"
    assert attention_backend(windowed.replace(sliding_window=1024)).name == "splash"
    assert attention_backend(config, mesh=make_mesh(data=-1)).name == "splash"


def test_the_doctor_tells_it_of_accelerators_alone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not [line for line in doctor.examine() if line.startswith("attention")]
    machine.has("gpu", 9.0)
    lines = list(doctor._attention_lines())
    told = [name for line in lines for name in line.split(":")[0].partition("for ")[2].split(", ")]
    assert sorted(told) == sorted(gptjax.config.PRESETS)
    assert all(line.startswith("attention   ") for line in lines)


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible_BTT: np.ndarray) -> np.ndarray:
    """Attention in float64, one head at a time."""
    B, T, H, C = q.shape
    out = np.zeros(q.shape)
    for b in range(B):
        for h in range(H):
            head = h // (H // k.shape[2])
            scores = q[b, :, h].astype(np.float64) @ k[b, :, head].T / math.sqrt(C)
            scores = np.where(visible_BTT[b] & np.tri(T, dtype=bool), scores, -np.inf)
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[b, :, h] = p / p.sum(axis=-1, keepdims=True) @ v[b, :, head]
    return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (3, 1)])
def test_the_mask_given_to_cudnn_is_that_of_plain_attention(
    H: int,
    K: int,
    window: int | None,
    packed: bool,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values and gradients, XLA's attention standing for the kernel, with its mask and causality.

    Documents need not be contiguous: ids come back after others.
    """
    ours = jax.nn.dot_product_attention

    def stand_in(*inputs: Any, implementation: str, **options: Any) -> jax.Array:
        assert implementation == "cudnn"
        assert options["is_causal"]
        return ours(*inputs, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    B, T, C = 2, 22, 8
    shapes = ((B, T, H, C), (B, T, K, C), (B, T, K, C), (B, T, H, C))
    q, k, v, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    segments = jnp.asarray(rng.integers(0, 3, (B, T)), jnp.int32) if packed else None
    reach = None if window is None else jnp.int32(window)

    def by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = cudnn.cudnn_attention(q, k, v, window=reach, segments=segments)
        return jnp.sum(out * g), out

    def by_xla(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attention(q, k, v, window=reach, query_segments=segments, key_segments=segments)
        return jnp.sum(out * g), out

    grads, out = jax.jit(jax.grad(by_cudnn, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    expected_grads, expected = jax.jit(jax.grad(by_xla, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    slots = np.arange(T)
    visible = np.ones((B, T, T), bool)
    if segments is not None:
        visible &= np.asarray(segments)[:, :, None] == np.asarray(segments)[:, None, :]
    if window is not None:
        visible &= slots[None, :] > slots[:, None] - window
    exact = reference(np.asarray(q), np.asarray(k), np.asarray(v), visible)
    np.testing.assert_allclose(out, exact, atol=2e-5)
    np.testing.assert_allclose(expected, exact, atol=2e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, atol=5e-5)


def test_of_the_kernel_only_its_results_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the mask nor anything of its size is there between the passes."""
    monkeypatch.setattr(cudnn, "is_kernel", lambda *_, **__: False)
    ours = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *inputs, implementation, **options: ours(*inputs, implementation="xla", **options),
    )
    T = 64
    q = jnp.ones((1, T, 1, 8))

    def pulled_back(q: jax.Array) -> Any:
        segments = jnp.zeros((1, T), jnp.int32)
        return jax.vjp(lambda q: cudnn.cudnn_attention(q, q, q, segments=segments), q)[1]

    kept = jax.tree.leaves(jax.eval_shape(pulled_back, q))
    assert kept
    assert max(leaf.size for leaf in kept) <= T * 8


def test_dispatch_calls_what_was_chosen(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    q = jnp.asarray(rng.normal(size=(1, 8, 2, 8)), jnp.float32)
    segments = jnp.zeros((1, 8), jnp.int32)
    called = []
    for name in ("ring", "splash", "cudnn"):
        monkeypatch.setattr(
            gptjax.attention,
            f"{name}_attention",
            lambda q, *_, name=name, **__: called.append(name) or q,
        )
    names: tuple[Any, ...] = ("ring", "splash", "cudnn", "plain")
    for name in names:
        monkeypatch.setattr(
            gptjax.attention, "choose_backend", lambda *_, name=name, **__: Backend(name, "chosen")
        )
        out = attention(q, q, q, query_segments=segments, key_segments=segments)
        assert bool((out == q).all()) == (name != "plain")
    assert called == ["ring", "splash", "cudnn"]


def test_attention_asks_with_what_it_was_given(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    asked: list[dict[str, Any]] = []

    def choose(*_: Any, **options: Any) -> Backend:
        asked.append(options)
        return Backend("plain", "")

    monkeypatch.setattr(gptjax.attention, "choose_backend", choose)
    q = jnp.asarray(rng.normal(size=(1, 8, 2, 8)), jnp.float32)
    key = jax.random.split(jax.random.key(0), 1)
    ids = jnp.zeros((1, 8), jnp.int32)
    attention(q, q, q)
    attention(q, q, q, dropout=0.5, dropout_key=key, window=jnp.int32(3))
    attention(q, q, q, dropout=0.0, dropout_key=key, query_segments=ids, key_segments=ids)
    attention(q[:, :3], q, q)
    attention(q, q, q, query_slots=jnp.arange(8))
    attention(q, q, q, query_segments=ids, key_segments=ids + 0)
    names = ("itself", "windowed", "packed", "dropout")
    assert [tuple(options[name] for name in names) for options in asked] == [
        (True, False, False, False),
        (True, True, False, True),
        (True, False, True, False),
        (False, False, False, False),
        (False, False, False, False),
        (False, False, True, False),
    ]


def test_a_config_decides_its_windows(machine: Machine) -> None:
    """As `layer_traits` has them: a window as long as the context is none."""
    from gptjax.model import layer_traits

    machine.has("tpu")
    for window in (None, 16, 64, 128):
        config = ModelConfig(
            vocab_size=7, context_length=128, num_layers=2, embed_dim=16, num_heads=2
        ).replace(sliding_window=window)
        plain = attention_backend(config, 128).name == "plain"
        assert plain == (layer_traits(config).window is not None)
