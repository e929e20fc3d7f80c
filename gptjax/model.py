"""A GPT as a pure function of parameters and tokens. Read from top to bottom.

Shapes are in the names: B batch, T tokens, S key slots, D model width, H query heads, K key heads,
C head width, F hidden width, V vocabulary, L layers. `x_BTD` is `[B, T, D]`.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from gptjax.activations import activate
from gptjax.attention import attention, kernel_results, row_bernoulli
from gptjax.config import ModelConfig
from gptjax.devices import compute_dtype, materialized, platform
from gptjax.errors import UserError
from gptjax.experts import Routing, mixture
from gptjax.float8 import InFloat8, in_float8, matmul_float8
from gptjax.layouts import (
    Int8,
    LowRank,
    OutputsFirst,
    cast_kernel,
    join_qkv,
    merge_low_rank,
    split_scale,
    to_int8,
)
from gptjax.params import Params, is_spec, param_specs
from gptjax.pipeline import pipelined
from gptjax.sharding import axis_parts, constrain, on_each_device, scattered_sum, summed

if TYPE_CHECKING:
    from gptjax.tokenizer import Tokenizer


FEW_ROWS = 64
"""Up to so many rows a CPU is faster with the kernel on the left (`matmul_outputs_first`)."""
AHEAD_BYTES = 2**29
"""The most that a TPU holds of kernels that are gathered before the loop over blocks."""


@dataclass(frozen=True)
class Model:
    """A model in use: what `load` returns and text goes through."""

    config: ModelConfig
    """What the model is."""
    params: Params
    """As `init_params` makes them."""
    tokenizer: "Tokenizer | None" = None
    """None where none came with the weights."""
    generation: dict[str, Any] = field(default_factory=dict)
    """What Hugging Face's generation_config.json says, such as the ids that end a text."""
    source: dict[str, Any] = field(default_factory=dict)
    """The config.json that the weights came with, so that an export gives the same."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """The dtypes of the tensors that the weights came in, by their names."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The token ids that end a text: the tokenizer's, and those the weights came with."""
        given = self.generation.get("eos_token_id", self.source.get("eos_token_id"))
        ids = given if isinstance(given, list) else [given]
        own = None if self.tokenizer is None else self.tokenizer.eos_id
        return tuple(sorted({stop for stop in [*ids, own] if stop is not None}))


class LayerCache(NamedTuple):
    """Keys and values that one block has seen, each `[B, K, S, C]`: arrays, or both `Int8`."""

    keys: Any
    """Normalized and rotated, where the model does so."""
    values: Any
    """As they are projected."""


class Context(NamedTuple):
    """What every block of one forward pass shares."""

    rotation: tuple[jax.Array, jax.Array] | None
    """cos and sin of RoPE's angles, each `[B or 1, T, 1, C / 2]`."""
    segments_BT: jax.Array | None
    """The document of each token."""
    slots_BT: jax.Array | None
    """With a cache: the slot that each token is written to."""


class Hidden(NamedTuple):
    """What `hidden_states` returns."""

    x_BTD: jax.Array
    """The normalized output of the last block, in the compute dtype."""
    cache: tuple[LayerCache, ...] | None
    """The extended cache; None without one."""
    routing: Routing | None
    """What the routers of all blocks did, `[L, ...]`; None without experts."""


class Layer(NamedTuple):
    """What sets one block apart beside its weights; None where the model's blocks are all alike."""

    number: jax.Array
    """Of the block, from 0."""
    window: jax.Array | None
    """How many tokens a query sees, itself included."""
    query_scale: jax.Array | None
    """Multiplies the queries."""


def forward(
    params: Params,
    tokens_BT: jax.Array,
    config: ModelConfig,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Next-token logits of a batch of sequences.

    Args:
        params: as `init_params` makes them.
        tokens_BT: `[B, T]` int32 token ids below `config.vocab_size`.
        config: the model.
        positions: `[B, T]` int32, the place of each token in its document; None counts from 0.
        segment_ids: `[B, T]` int32, the document of each token in a packed row. Tokens see only
            their own document; pass `positions` that restart with each.
        dropout_key: random key for training with dropout; None means none.

    Returns:
        `[B, T, V]` float32 logits; those at t predict the token at t + 1.

    Raises:
        UserError: if T exceeds the model's context length.
    """
    hidden = hidden_states(
        params,
        tokens_BT,
        config,
        positions=positions,
        segment_ids=segment_ids,
        dropout_key=dropout_key,
    )
    return unembed(params, hidden.x_BTD, config)


def hidden_states(
    params: Params,
    tokens_BT: jax.Array,
    config: ModelConfig,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    cache: tuple[LayerCache, ...] | None = None,
    slots: jax.Array | None = None,
) -> Hidden:
    """The normalized output of the last block, `[B, T, D]`, from which logits are read.

    Args:
        params: as in `forward`; `params["blocks"]` may be a tuple of single blocks instead of
            stacked ones (`unstack_blocks`).
        tokens_BT: as in `forward`.
        config: as in `forward`.
        positions: as in `forward`.
        segment_ids: as in `forward`.
        dropout_key: as in `forward`.
        cache: what each block has seen before; the new keys and values are written into it.
        slots: `[B, T]` int32, with a cache: the slot of each token, which is its position too.

    Returns:
        The hidden states `[B, T, D]`, the extended cache, and what the routers did.

    Raises:
        UserError: if T exceeds the model's context length.
    """
    T = tokens_BT.shape[1]
    if T > config.context_length:
        raise UserError(
            f"sequence of {T} tokens, but the model's context is {config.context_length}; "
            "shorten it or raise context_length"
        )
    if positions is None:
        positions = jnp.arange(T)[None] if slots is None else slots
    dtype = compute_dtype(config)
    embed_keys = keys_B = None
    if dropout_key is not None and config.dropout > 0:
        # One for each row: what is dropped then does not depend on which rows go together.
        rows = jnp.arange(tokens_BT.shape[0])
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(dropout_key, rows)
        embed_keys = _fold_in(keys_B, config.num_layers)

    with jax.named_scope("embed"):
        x_BTD = embed(params["embed"], tokens_BT, positions, config, dtype)
        x_BTD = dropout(x_BTD, config.dropout, embed_keys)
        x_BTD = constrain(x_BTD, "batch", "residual", "width")
    rotation = rope_rotation(positions, config) if config.position == "rope" else None
    context = Context(rotation, segment_ids, slots)
    x_BTD, cache, routing = run_blocks(params["blocks"], x_BTD, context, config, keys_B, cache)
    with jax.named_scope("final_norm"):
        return Hidden(normalize(x_BTD, params["final_norm"], config), cache, routing)


def run_blocks(
    blocks: Params | tuple[Params, ...],
    x_BTD: jax.Array,
    context: Context,
    config: ModelConfig,
    keys_B: jax.Array | None,
    cache: tuple[LayerCache, ...] | None,
) -> Hidden:
    """Applies the blocks in turn: scanned where they are stacked, one by one in a tuple.

    Under a mesh with stages they are scanned by stage.

    Args:
        blocks: `params["blocks"]`, stacked or a tuple.
        x_BTD: the embedded tokens, `[B, T, D]`.
        context: what all blocks share.
        config: the model.
        keys_B: random keys of the rows; None means no dropout.
        cache: what each block has seen before; None is nothing.

    Returns:
        What the last block puts out, `[B, T, D]`, not yet normalized; the extended cache; and what
        the routers did.
    """
    L = config.num_layers
    layers = layer_traits(config)
    if isinstance(blocks, tuple):
        extended, routings = [], []
        for layer, params in enumerate(blocks):
            layer_cache = None if cache is None else cache[layer]
            traits = jax.tree.map(lambda values, layer=layer: values[layer], layers)
            x_BTD, layer_cache, routing = _traced_once(
                params, x_BTD, context, config, traits, keys_B, layer_cache
            )
            extended.append(layer_cache)
            routings.append(routing)
        routing = jax.tree.map(lambda *layers: jnp.stack(layers), *routings)
        return Hidden(x_BTD, None if cache is None else tuple(extended), routing)

    # Cast before the loop, so that what is gathered over a mesh inside it is in the small dtype.
    def cast(spec: Any, w: Any) -> Any:
        if spec.kind == "router":
            return w
        if spec.kind == "vector":
            # Whole, in one gather for all blocks. A TPU's compiler lets one gather go on beside a
            # product: a gain's in the loop would keep a kernel's waiting.
            w = constrain(w, *(None if axis == "embed" else axis for axis in spec.axes))
        w = cast_kernel(w, x_BTD.dtype)
        # What reads a text with a cache goes on block by block, which is in the compute dtype.
        float8 = config.float8 and cache is None and spec.kind == "matrix"
        return in_float8(w) if float8 else w

    stacked: Params = jax.tree.map(cast, param_specs(config)["blocks"], blocks, is_leaf=is_spec)
    key = stacked["attention"]["key"]
    if _gathers_by_product() and isinstance(key, jax.Array) and key.nbytes <= AHEAD_BYTES:
        # The gather of what a block multiplies with first has no product before it in the loop.
        key = constrain(key, "layers", None, "kv_heads", "head")
        stacked = {**stacked, "attention": {**stacked["attention"], "key": key}}

    def scan(layers: Any, x_BTD: jax.Array, shared: tuple[Context, jax.Array | None]):
        context, keys_B = shared

        def body(x_BTD: jax.Array, layer: tuple[Params, Layer, LayerCache | None]):
            params, traits, layer_cache = layer
            x_BTD = checkpoint_name(x_BTD, "block_input")
            x_BTD, *rest = block(params, x_BTD, context, config, traits, keys_B, layer_cache)
            return x_BTD, rest

        unroll = scan_unroll(config) if cache is None else 1
        return jax.lax.scan(rematerialized(body, config), x_BTD, layers, unroll=unroll)

    if axis_parts("layers") > 1 and cache is None:
        stages = (stacked, layers, None)
        x_BTD, (_, routing) = pipelined(scan, stages, x_BTD, (context, keys_B), config)
        return Hidden(x_BTD, None, routing)
    caches = None if cache is None else jax.tree.map(lambda *layers: jnp.stack(layers), *cache)
    x_BTD, (caches, routing) = scan((stacked, layers, caches), x_BTD, (context, keys_B))
    if caches is None:
        return Hidden(x_BTD, None, routing)
    extended = tuple(jax.tree.map(lambda x, i=i: x[i], caches) for i in range(L))
    return Hidden(x_BTD, extended, routing)


def _gathers_by_product() -> bool:
    """Whether a TPU's compiler can let each kernel's gather go on beside the product before it.

    Under a tensor axis, too, it makes loops of the products, with gathers of activations.
    """
    return platform() == "tpu" and axis_parts("embed") > 1 and axis_parts("mlp") == 1


def layer_traits(config: ModelConfig) -> Layer:
    """The `Layer` of every block, each field `[L]` or None."""
    L, C = config.num_layers, config.head_width
    window = query_scale = None
    if config.sliding_window is not None and config.sliding_window < config.context_length:
        windowed = range(L) if config.windowed_layers is None else config.windowed_layers
        window = np.full(L, config.context_length, np.int32)
        window[list(windowed)] = config.sliding_window
    if config.attention_scale is not None or config.inverse_layer_scale:
        # Relative to what `attention` multiplies with.
        scale = 1.0 if config.attention_scale is None else config.attention_scale * math.sqrt(C)
        number = np.arange(1, L + 1) if config.inverse_layer_scale else np.ones(L)
        query_scale = (scale / number).astype(np.float32)
    return Layer(np.arange(L, dtype=np.int32), window, query_scale)  # pyright: ignore[reportArgumentType]


def block(
    params: Params,
    x_BTD: jax.Array,
    context: Context,
    config: ModelConfig,
    layer: Layer,
    keys_B: jax.Array | None = None,
    cache: LayerCache | None = None,
) -> tuple[jax.Array, LayerCache | None, Routing | None]:
    """One Transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Parallel blocks read the same x in both.

    Args:
        params: of this block.
        x_BTD: the residual stream, `[B, T, D]`.
        context: what all blocks share.
        config: the model.
        layer: what sets this block apart.
        keys_B: random keys of the rows; None means no dropout.
        cache: what it has seen before; None is nothing.

    Returns:
        The residual stream after it, `[B, T, D]`; the extended cache; and what the router did.
    """
    keys: Any = (None, None, None)
    if keys_B is not None:
        keys_B3 = jax.vmap(lambda key: jax.random.split(key, 3))(_fold_in(keys_B, layer.number))
        keys = [keys_B3[:, n] for n in range(3)]
    routing = None
    with jax.named_scope("attention"):
        h_BTD = normalize(x_BTD, params["attention_norm"], config)
        h_BTD, cache = self_attention(
            params["attention"], h_BTD, context, config, layer, keys[0], cache
        )
        h_BTD = constrain(h_BTD, "batch", "residual", "width")
        mlp_input_BTD = x_BTD
        x_BTD = x_BTD + dropout(h_BTD, config.dropout, keys[1])
        if not config.parallel_blocks:
            mlp_input_BTD = x_BTD
    with jax.named_scope("mlp"):
        h_BTD = normalize(mlp_input_BTD, params["mlp_norm"], config)
        if config.num_experts is None:
            h_BTD = mlp(params["mlp"], h_BTD, config)
        else:
            h_BTD, routing = expert_mlp(params["mlp"], h_BTD, config)
        h_BTD = constrain(h_BTD, "batch", "residual", "width")
        x_BTD = x_BTD + dropout(h_BTD, config.dropout, keys[2])
    return constrain(x_BTD, "batch", "residual", "width"), cache, routing


# In a tuple of blocks each would be traced by itself, which takes longer than the compilation where
# that is cached. XLA sees the same program: it inlines the calls.
_traced_once = partial(jax.jit, static_argnames="config")(block)


def self_attention(
    params: Params,
    x_BTD: jax.Array,
    context: Context,
    config: ModelConfig,
    layer: Layer,
    dropout_key: jax.Array | None,
    cache: LayerCache | None,
) -> tuple[jax.Array, LayerCache | None]:
    """Queries, keys and values from x, attention among them, and the output projection.

    Args:
        params: of the attention.
        x_BTD: its normalized input, `[B, T, D]`.
        context: what all blocks share.
        config: the model.
        layer: what sets this block apart.
        dropout_key: random keys of the rows; None means no dropout.
        cache: what the block has seen before; None is nothing.

    Returns:
        `[B, T, D]`, and the extended cache.
    """
    with jax.named_scope("qkv"):
        q_BTHC, k_BTKC, v_BTKC = queries_keys_values(params, x_BTD, context, config, layer)

    k_BSKC, v_BSKC = k_BTKC, v_BTKC
    if cache is not None:
        assert context.slots_BT is not None
        with jax.named_scope("cache"):
            cache = write_cache(cache, k_BTKC, v_BTKC, context.slots_BT)
            k_BSKC, v_BSKC = (c.astype(q_BTHC.dtype).swapaxes(1, 2) for c in cache)
    with jax.named_scope("scores"):
        out_BTHC = attention(
            q_BTHC,
            k_BSKC,
            v_BSKC,
            window=layer.window,
            query_slots=context.slots_BT,
            query_segments=context.segments_BT,
            key_segments=context.segments_BT,
            dropout=config.dropout,
            dropout_key=dropout_key,
        )
    with jax.named_scope("out"):
        return linear(out_BTHC, params["out"], params.get("out_bias"), inputs=2), cache


def queries_keys_values(
    params: Params, x_BTD: jax.Array, context: Context, config: ModelConfig, layer: Layer
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What attention is given: `project_qkv`, normalized, rotated and scaled as the model says.

    Args:
        params: of the attention.
        x_BTD: its normalized input, `[B, T, D]`.
        context: what all blocks share.
        config: the model.
        layer: what sets this block apart.

    Returns:
        Queries `[B, T, H, C]`, keys and values `[B, T, K, C]`.
    """
    q_BTHC, k_BTKC, v_BTKC = project_qkv(params, x_BTD, config)
    if config.qk_norm:
        q_BTHC = rms_norm(q_BTHC, params.get("query_norm", {}).get("scale"), config.norm_eps)
        k_BTKC = rms_norm(k_BTKC, params.get("key_norm", {}).get("scale"), config.norm_eps)
    if context.rotation is not None:
        q_BTHC = rotate(q_BTHC, *context.rotation)
        k_BTKC = rotate(k_BTKC, *context.rotation)
    if layer.query_scale is not None:
        q_BTHC = q_BTHC * jnp.asarray(layer.query_scale, q_BTHC.dtype)
    q_BTHC = constrain(q_BTHC, "batch", "sequence", "heads", "head")
    k_BTKC = constrain(k_BTKC, "batch", "sequence", "kv_heads", "head")
    v_BTKC = constrain(v_BTKC, "batch", "sequence", "kv_heads", "head")
    return q_BTHC, k_BTKC, v_BTKC


def project_qkv(
    params: Params, x_BTD: jax.Array, config: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[B, T, H, C]`, keys and values `[B, T, K, C]`."""
    B, T, _ = x_BTD.shape
    H, K, C = config.num_heads, config.kv_heads, config.head_width
    names = ("query", "key", "value")
    if "qkv" not in params and (platform() == "tpu" or axis_parts("embed") > 1):
        # Each gradient is scattered over devices as it comes, where parts of a joined one would
        # first be summed everywhere, and each kernel's gather has the product before it to go on
        # beside. A TPU would lay out the joined result anew for attention's kernel, and for its
        # own product the gradients that come from there.
        q, k, v = (linear(x_BTD, params[name], params.get(f"{name}_bias")) for name in names)
        return q, k, v
    adapted = {name: x for name, x in params.items() if isinstance(x, LowRank) and name in names}
    params = params | {name: x.kernel for name, x in adapted.items()}
    if "qkv" in params:
        kernel, bias = params["qkv"], params.get("qkv_bias")
    else:
        kernel, bias = join_qkv(params, config)
    qkv_BTKNC = linear(x_BTD, kernel, bias)
    qkv_BTKNC = constrain(qkv_BTKNC, "batch", "sequence", "kv_heads", None, "head")
    # A split, whose gradient is one concatenation; three slices would be padded and added.
    q, k, v = jax.lax.split(qkv_BTKNC, (H // K, 1, 1), axis=3)
    parts = {"query": q.reshape(B, T, H, C)}
    parts |= {"key": k.reshape(B, T, K, C), "value": v.reshape(B, T, K, C)}
    for name, kernel in adapted.items():
        parts[name] = parts[name] + low_rank_product(x_BTD, kernel)
    return parts["query"], parts["key"], parts["value"]


def mlp(params: Params, x_BTD: jax.Array, config: ModelConfig) -> jax.Array:
    """The feed-forward layer, gated or plain."""
    if "gate_up" in params:
        both_BT2F = linear(x_BTD, params["gate_up"], params.get("gate_up_bias"))
        gate_BTF, h_BTF = both_BT2F[:, :, 0], both_BT2F[:, :, 1]
    else:
        gate_BTF = None
        if config.gated_mlp:
            gate_BTF = linear(x_BTD, params["gate"], params.get("gate_bias"))
        h_BTF = linear(x_BTD, params["up"], params.get("up_bias"))
    h_BTF = activate(h_BTF, config) if gate_BTF is None else activate(gate_BTF, config) * h_BTF
    if _gathers_by_product():
        # Else the product before becomes part of the next one, whose kernel's gather then has
        # nothing to go on beside.
        h_BTF = jax.lax.optimization_barrier(h_BTF)
    h_BTF = constrain(h_BTF, "batch", "sequence", "mlp")
    return linear(h_BTF, params["down"], params.get("down_bias"))


def expert_mlp(params: Params, x_BTD: jax.Array, config: ModelConfig) -> tuple[jax.Array, Routing]:
    """The feed-forward layers that a router chooses, and those that every token goes through."""
    # Grouped products take whole kernels.
    h_BTD, routing = mixture(merge_low_rank(params), x_BTD, config)
    if "shared" in params:
        h_BTD = h_BTD + mlp(params["shared"], x_BTD, config)
    return h_BTD, routing


def linear(x: jax.Array, kernel: Any, bias: jax.Array | None, inputs: int = 1) -> jax.Array:
    """x · kernel + bias over the last `inputs` dimensions of x and the inputs of the kernel.

    The kernel is an array, `[*inputs, *outputs]`, in one of the forms of `layouts`, or `InFloat8`.

    Args:
        x: `[..., *inputs]`.
        kernel: `[*inputs, *outputs]`, or in another form.
        bias: `[*outputs]`, or None.
        inputs: how many dimensions are multiplied out.
    """
    if isinstance(kernel, LowRank):
        return linear(x, kernel.kernel, bias, inputs) + low_rank_product(x, kernel, inputs)
    outer, width = x.shape[: x.ndim - inputs], math.prod(x.shape[x.ndim - inputs :])
    if isinstance(kernel, OutputsFirst):
        weights, scale = split_scale(kernel.kernel, x.dtype)
        outputs = weights.shape[: weights.ndim - inputs]
        out = matmul_outputs_first(x.reshape(*outer, width), weights.reshape(-1, width))
    elif isinstance(kernel, InFloat8):
        scale, outputs = None, kernel.shape[inputs:]
        weights = kernel.kernel.astype(x.dtype)
        out = matmul_float8(x.reshape(*outer, width), as_matrix(weights, inputs))
    else:
        weights, scale = split_scale(kernel, x.dtype)
        outputs = weights.shape[inputs:]
        out = matmul(x.reshape(*outer, width), as_matrix(weights, inputs))
    if scale is not None:
        out = out * along_last(scale, out)
    # Rematerialization does not look into a custom_vjp for products: it goes by this name.
    out = checkpoint_name(out, "product")
    out = out.reshape(*outer, *outputs)
    return out if bias is None else out + along_last(bias.astype(x.dtype), out)


def as_matrix(kernel: jax.Array, inputs: int) -> jax.Array:
    """A kernel `[*inputs, *outputs]` as a matrix `[I, O]`.

    On a TPU whose devices gather it, nothing is to undo that. The compiler would else make a
    product for each head, whose width need not fill the matrix unit, and gather a kernel twice, in
    the shapes that the forward and the backward pass have.
    """
    if platform() == "tpu" and axis_parts("embed") > 1 and kernel.ndim > 2:
        return _fixed_matrix(kernel, inputs)
    return kernel.reshape(math.prod(kernel.shape[:inputs]), -1)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _fixed_matrix(kernel: jax.Array, inputs: int) -> jax.Array:
    """Fixed for the compiler, but for the gradient, which is scattered as it comes."""
    return jax.lax.optimization_barrier(kernel.reshape(math.prod(kernel.shape[:inputs]), -1))


def _fixed_matrix_forward(kernel: jax.Array, inputs: int):
    return _fixed_matrix(kernel, inputs), jnp.empty((*kernel.shape, 0), kernel.dtype)


def _fixed_matrix_backward(inputs: int, like: jax.Array, grad_IO: jax.Array):
    return (grad_IO.reshape(like.shape[:-1]),)


_fixed_matrix.defvjp(_fixed_matrix_forward, _fixed_matrix_backward)


def low_rank_product(x: jax.Array, kernel: LowRank, inputs: int = 1) -> jax.Array:
    """What the addition to a kernel adds to its product: scale · (x · down) · up."""
    low = linear(x, kernel.down, None, inputs)
    return kernel.scale * linear(low, kernel.up, None)


def matmul_outputs_first(x: jax.Array, kernel_OI: jax.Array, dtype: Any = None) -> jax.Array:
    """`[..., I]` times the transpose of `[O, I]`, for few rows of x on a CPU.

    The kernel stands on the left, which is the order that XLA's CPU backend is fast in. The
    barriers keep it from turning that round.
    """
    x_IN = materialized(x.reshape(-1, x.shape[-1]).T)
    out_ON = jax.lax.dot(kernel_OI, x_IN, preferred_element_type=dtype)
    return materialized(out_ON).T.reshape(*x.shape[:-1], -1)


def along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Gives a gain or bias the rank of x, so that no rank is promoted silently."""
    return vector.reshape((1,) * (x.ndim - vector.ndim) + vector.shape)


def matmul(x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """`[..., I]` times `[I, O]`."""
    return _matmul_cpu(x, kernel_IO) if platform() == "cpu" else _matmul(x, kernel_IO)


def _matmul(x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, kernel_IO, (((x.ndim - 1,), (0,)), ((), ())))


@jax.custom_vjp
def _matmul_cpu(x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """The same, with its gradients as two plain products of matrices.

    What JAX derives contracts the kernel's gradient in an order that XLA's CPU backend transposes
    the large operand for, with all the work that made it fused into the transposition.
    """
    return _matmul(x, kernel_IO)


def _matmul_forward(x: jax.Array, kernel_IO: jax.Array):
    return _matmul(x, kernel_IO), (x, kernel_IO)


def _matmul_backward(residuals: tuple[jax.Array, jax.Array], grad: jax.Array):
    x, kernel_IO = residuals
    x_NI = x.reshape(-1, kernel_IO.shape[0])
    grad_NO = materialized(grad.reshape(-1, kernel_IO.shape[1]))
    grad_x = jax.lax.dot_general(grad_NO, kernel_IO, (((1,), (1,)), ((), ())))
    grad_kernel = jax.lax.dot_general(x_NI, grad_NO, (((0,), (0,)), ((), ())))
    return grad_x.reshape(x.shape), grad_kernel


_matmul_cpu.defvjp(_matmul_forward, _matmul_backward)


def normalize(x_BTD: jax.Array, params: Params, config: ModelConfig) -> jax.Array:
    """LayerNorm or RMSNorm over the width, in float32."""
    if config.norm == "rmsnorm":
        return materialized(rms_norm(x_BTD, params.get("scale"), config.norm_eps))
    x = x_BTD.astype(jnp.float32)
    x = standardize(x, config.norm_eps)
    if "scale" in params:
        x = x * along_last(params["scale"].astype(jnp.float32), x)
    if "bias" in params:
        x = x + along_last(params["bias"].astype(jnp.float32), x)
    return materialized(x.astype(x_BTD.dtype))


@jax.custom_vjp
def standardize(x: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / √(variance + eps) over the last dimension."""
    return _standardize_forward(x, eps)[0]


def _standardize_forward(x: jax.Array, eps: float):
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    x = materialized(x * inverse)
    return x, (x, inverse)


def _standardize_backward(residuals: tuple[jax.Array, jax.Array], grad: jax.Array):
    x, inverse = residuals
    mean = jnp.mean(grad, axis=-1, keepdims=True)
    slope = jnp.mean(grad * x, axis=-1, keepdims=True)
    return (grad - mean - x * slope) * inverse, None


standardize.defvjp(_standardize_forward, _standardize_backward)


def rms_norm(x: jax.Array, scale: jax.Array | None, eps: float) -> jax.Array:
    """x / √(mean(x²) + eps) · scale over the last dimension, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if scale is not None:
        x32 = x32 * along_last(scale.astype(jnp.float32), x32)
    return x32.astype(x.dtype)


def rope_rotation(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin of RoPE's angles (Su et al. 2021), each `[B or 1, T, 1, R / 2]` float32.

    R is `config.rope_width`. Scaled RoPE may make them longer than 1 (`RopeScaling.magnitude`).
    """
    frequencies = jnp.asarray(rope_frequencies(config), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    magnitude = 1.0 if config.rope_scaling is None else config.rope_scaling.magnitude
    return (cos, sin) if magnitude == 1 else (cos * magnitude, sin * magnitude)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """RoPE's frequencies in radians a token, `[R / 2]` float64, scaled as the model says."""
    R, base, scaling = config.rope_width, config.rope_base, config.rope_scaling
    frequencies = base ** (-np.arange(0, R, 2) / R)
    if scaling is None:
        return frequencies
    divided = frequencies / scaling.factor
    # `kept` says how much of each frequency stays undivided, from 0 to 1.
    if scaling.kind == "linear":
        return divided
    original = scaling.original_context
    assert original is not None
    turns = original * frequencies / (2 * math.pi)
    if scaling.kind == "llama3":
        low, high = scaling.low_frequency, scaling.high_frequency
        kept = np.clip((turns - low) / (high - low), 0, 1)
    else:

        def dimension(turns: float) -> float:
            """The pair, as a real number, whose frequency makes so many turns."""
            wavelength = original / (2 * math.pi * turns)
            return R * math.log(wavelength) / (2 * math.log(base))

        first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, R - 1)
        if first == last:
            last += 0.001
        kept = 1 - np.clip((np.arange(R // 2) - first) / (last - first), 0, 1)
    return frequencies * kept + divided * (1 - kept)


def rotate(x_BTHC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + R/2) of each head, the pairing of Llama's published weights.

    R is twice the last dimension of cos and sin; channels beyond it pass as they are.
    """
    half = cos.shape[-1]
    first, second, rest = jnp.split(x_BTHC.astype(jnp.float32), (half, 2 * half), axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    turned = jnp.concatenate([*parts, rest] if rest.shape[-1] else parts, axis=-1)
    return turned.astype(x_BTHC.dtype)


def embed(
    params: Params, tokens_BT: jax.Array, positions: jax.Array, config: ModelConfig, dtype: Any
) -> jax.Array:
    """Token vectors, with position vectors added where the model learns them: `[B, T, D]`.

    Args:
        params: `params["embed"]`.
        tokens_BT: `[B, T]` token ids.
        positions: `[B or 1, T]`, the place of each.
        config: the model.
        dtype: of the result.
    """
    table = params["tokens"]
    if isinstance(table, Int8):
        x_BTD = table[tokens_BT].astype(dtype)
    else:
        x_BTD: jax.Array = look_up(table, tokens_BT, dtype)  # pyright: ignore[reportAssignmentType]
    if config.position == "learned":
        if positions.shape[0] == tokens_BT.shape[0] > 1:
            # Each row has its own: what was said of tokens holds for them.
            place: jax.Array = look_up(params["positions"], positions, dtype)  # pyright: ignore[reportAssignmentType]
        else:
            place = constrain(params["positions"].astype(dtype), None, None)[positions]
        x_BTD = x_BTD + place
    return normalize(x_BTD, params["norm"], config) if config.embedding_norm else x_BTD


def unembed(params: Params, x_BTD: jax.Array, config: ModelConfig) -> jax.Array:
    """Float32 logits `[B, T, V]` of normalized hidden states."""
    with jax.named_scope("unembed"):
        V = config.vocab_size
        kernel_VD, scale_V = split_scale(_output_kernel(params, config), x_BTD.dtype)
        kernel_VD = split_vocabulary(kernel_VD)
        if platform() == "cpu" and x_BTD.shape[0] * x_BTD.shape[1] <= FEW_ROWS:
            logits_BTV = matmul_outputs_first(x_BTD, kernel_VD, jnp.float32)
        else:
            logits_BTV = jnp.einsum(
                "btd,vd->btv", x_BTD, kernel_VD, preferred_element_type=jnp.float32
            )
        logits_BTV = constrain(logits_BTV, "batch", "sequence", "vocab_parts")[..., :V]
        if scale_V is not None:
            logits_BTV = logits_BTV * along_last(scale_V.astype(jnp.float32), logits_BTV)
        return softcap(logits_BTV, config.logit_softcap)


def unembedding(params: Params, config: ModelConfig) -> jax.Array:
    """The output matrix, `[V, D]`, as it lies."""
    kernel = _output_kernel(params, config)
    return kernel.astype(jnp.float32) if isinstance(kernel, Int8) else kernel


def split_vocabulary(kernel_VD: jax.Array) -> jax.Array:
    """The output matrix with the vocabulary split over a tensor group, and each row whole.

    A vocabulary that does not divide is padded with rows of zeros, for the caller to mask.
    """
    parts = axis_parts("vocab_parts")
    if parts == 1:
        return constrain(kernel_VD, None, None)
    # In two steps, each of which is one exchange; at once it would be gathered whole.
    kernel_VD = constrain(kernel_VD, None, "columns")
    kernel_VD = jnp.pad(kernel_VD, ((0, -kernel_VD.shape[0] % parts), (0, 0)))
    return constrain(kernel_VD, "vocab_parts", None)


def _output_kernel(params: Params, config: ModelConfig) -> Any:
    return params["embed"]["tokens"] if config.tie_embeddings else params["head"]["kernel"]


def softcap(logits: jax.Array, cap: float | None) -> jax.Array:
    """Bounds logits by ±cap, smoothly; the identity for None."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """Zeroes elements at the rate and scales the rest up; the identity without keys."""
    if keys_B is None or rate == 0:
        return x
    return jnp.where(row_bernoulli(keys_B, 1 - rate, x.shape[1:]), x / (1 - rate), 0)


def _fold_in(keys_B: jax.Array, number: Any) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """Rows of the table in a dtype, with a gradient in float32 that is fast for small tables too.

    Over a mesh a device has some columns of every row, so that it looks up for itself: no table is
    whole anywhere, and no rows are summed over devices.
    """
    table_VD = constrain(table_VD.astype(dtype), None, "columns")
    return constrain(table_VD[tokens_BT], "batch", "sequence", "columns")


def _look_up_forward(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any):
    like = jnp.empty((table_VD.shape[0], 0), table_VD.dtype)
    return look_up(table_VD, tokens_BT, dtype), (tokens_BT, like)


def _look_up_backward(dtype: Any, residuals: tuple[jax.Array, jax.Array], grad_BTD: jax.Array):
    tokens_BT, like = residuals
    V = like.shape[0]
    mesh = jax.sharding.get_abstract_mesh()

    def table_gradient(tokens: jax.Array, grad: jax.Array) -> jax.Array:
        if V <= 1024:
            # A scatter runs row by row on a CPU, and on a GPU many rows wait for the same one; at
            # this size a product with one-hot rows is faster.
            one_hot = jax.nn.one_hot(tokens, V, dtype=grad.dtype)
            table = jnp.einsum("btv,btd->vd", one_hot, grad, preferred_element_type=jnp.float32)
        else:
            # In float32, which a GPU adds in memory in one instruction, where two bytes may take a
            # loop of compare and swap and would round every sum. GPT-2's vocabulary as a product
            # would be 77 million operations a token, a tenth of its whole step. Sorting the tokens
            # first would not help: XLA's kernel adds up equal ones before it writes only where
            # there are more tokens than rows.
            table = jnp.zeros((V, grad.shape[-1]), jnp.float32)
            table = table.at[tokens].add(grad.astype(jnp.float32))
        if not mesh.empty:
            table = scattered_sum(table, "fsdp", 1)
            table = summed(table, "data", "expert", "context")
        return table.astype(like.dtype)

    if not mesh.empty:
        # By hand, since the partitioner gathers all rows of all devices for a scatter.
        axes = [("batch", "sequence"), ("batch", "sequence", "columns")]
        table_gradient = on_each_device(table_gradient, axes, ("vocab", "table"))
    return table_gradient(tokens_BT, grad_BTD), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def write_cache(
    cache: LayerCache, k_BTKC: jax.Array, v_BTKC: jax.Array, slots_BT: jax.Array
) -> LayerCache:
    """Writes new keys and values into each row's own slots; slots past the end are dropped.

    Args:
        cache: of one block.
        k_BTKC: new keys, `[B, T, K, C]`.
        v_BTKC: new values, `[B, T, K, C]`.
        slots_BT: `[B, T]`, where each goes.
    """
    B, _, K, _ = k_BTKC.shape
    # All three are spelled out, heads too: with a slice for the heads and one row of one token, XLA
    # makes it an update of a slice, and then copies the whole cache in every decode step.
    places = (jnp.arange(B)[:, None, None], jnp.arange(K)[None, None], slots_BT[:, :, None])

    def write(old: Any, new_BTKC: jax.Array) -> Any:
        new = to_int8(new_BTKC, (3,)) if isinstance(old, Int8) else new_BTKC
        return jax.tree.map(lambda o, n: o.at[places].set(n.astype(o.dtype), mode="drop"), old, new)

    return LayerCache(write(cache.keys, k_BTKC), write(cache.values, v_BTKC))


def scan_unroll(config: ModelConfig) -> int:
    """Blocks per iteration of the scan over layers."""
    if config.scan_unroll is not None:
        return min(config.scan_unroll, config.num_layers)
    shallow = 6
    if platform() == "cpu":
        # It copies what the backward pass needs into the scan's stacks; without, GPT-2's step is a
        # seventh shorter. But of blocks in a row its compiler keeps what was to be computed again.
        shallow = 12 if config.remat in ("none", "auto") else 0
    return config.num_layers if config.num_layers <= shallow else 1


def rematerialized(body: Any, config: ModelConfig) -> Any:
    """The scan body under the configured rematerialization policy.

    A policy that has not been chosen yet ("auto") keeps everything: a forward pass alone keeps
    nothing anyhow, and `make_train_step` refuses it.
    """
    match config.remat:
        case "none" | "auto":
            return body
        case "dots":
            # And what the attention kernel gave, so that the backward pass repeats no product.
            products = jax.checkpoint_policies.save_only_these_names("product")
            policy = jax.checkpoint_policies.save_from_both_policies(products, kernel_results)
            return jax.checkpoint(body, policy=policy, prevent_cse=scan_unroll(config) > 1)
        case "full":
            return jax.checkpoint(body, prevent_cse=scan_unroll(config) > 1)
        case "offload":
            policy = jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=["block_input"],
                offload_src="device",
                offload_dst="pinned_host",
            )
            return jax.checkpoint(body, policy=policy, prevent_cse=scan_unroll(config) > 1)
