"""Parameters as a nested dict, declared once.

The tree of `ParamSpec`s is the single declaration that everything else is read from:
initialization, shardings, decay masks, restoring checkpoints, importing weights.
"""

import dataclasses
import hashlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax import sharding
from gptjax.config import ModelConfig

Params = dict[str, Any]
"""A nested dict of arrays, keyed by strings."""

# A leaf on many processes is hashed piece by piece, for no host need have room for the whole.
_PIECE_BYTES = 1 << 26


@dataclass(frozen=True)
class ParamSpec:
    """What is to be known of one parameter.

    Attributes:
        shape: its dimensions.
        axes: the logical name of each dimension (see `sharding.RULES`).
        init: how it starts; "normal" draws from N(0, std²).
        std: standard deviation for "normal".
        kind: "embedding", "matrix", "vector", or "router" for a matrix that stays in float32 in
            every form of the parameters. Matrices may be orthogonalized by an optimizer; weight
            decay acts on all but vectors.
        fan_in: for a matrix, how many of the dimensions after the stack are contracted.
        stack: how many dimensions in front only count matrices: the layers, and experts.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Literal["normal", "zeros", "ones"]
    std: float = 0.0
    kind: Literal["embedding", "matrix", "router", "vector"] = "vector"
    fan_in: int = 0
    stack: int = 1


def param_specs(config: ModelConfig) -> Params:
    """The tree of `ParamSpec`s of a model.

    The blocks' parameters are stacked: their first dimension, "layers", is what the model scans
    over.

    Returns:
        A nested dict as `init_params` makes it, with a `ParamSpec` in place of each array.
    """
    D, H, K, C = config.embed_dim, config.num_heads, config.kv_heads, config.head_width
    F, L, V = config.mlp_width, config.num_layers, config.vocab_size
    modern = config.init == "modern"

    def matrix(shape, axes, fan_in=1, residual_output=False, experts=()):
        init, stack = "normal", {"layers": L, **dict(experts)}
        if modern:
            std = 1 / math.sqrt(math.prod(shape[:fan_in]))
            init = "zeros" if residual_output else "normal"
        else:
            # Radford et al. 2019, section 2.3: outputs added to the residual stream start smaller,
            # by the root of their number.
            std = 0.02 / math.sqrt(2 * L) if residual_output else 0.02
        return ParamSpec(
            (*stack.values(), *shape), (*stack, *axes), init, std, "matrix", fan_in, len(stack)
        )

    def bias(shape, axes, experts=()):
        stack = {"layers": L, **dict(experts)}
        return ParamSpec((*stack.values(), *shape), (*stack, *axes), "zeros")

    def norm(stacked=True, width=D, axis="embed"):
        shape, axes = ((L, width), ("layers", axis)) if stacked else ((width,), (axis,))
        specs = {}
        if config.norm_gain:
            specs["scale"] = ParamSpec(shape, axes, "ones")
        if config.use_bias and config.norm == "layernorm":
            specs["bias"] = ParamSpec(shape, axes, "zeros")
        return specs

    attention: Params = {
        "query": matrix((D, H, C), ("embed", "heads", "head")),
        "key": matrix((D, K, C), ("embed", "kv_heads", "head")),
        "value": matrix((D, K, C), ("embed", "kv_heads", "head")),
        "out": matrix((H, C, D), ("heads", "head", "embed"), fan_in=2, residual_output=True),
    }

    def feed_forward(F, experts=()):
        inner: Params = {
            "up": matrix((D, F), ("embed", "mlp"), experts=experts),
            "down": matrix((F, D), ("mlp", "embed"), residual_output=True, experts=experts),
        }
        if config.gated_mlp:
            inner["gate"] = matrix((D, F), ("embed", "mlp"), experts=experts)
        if config.has_bias("mlp"):
            inner["up_bias"] = bias((F,), ("mlp",), experts)
            inner["down_bias"] = bias((D,), ("embed",), experts)
            if config.gated_mlp:
                inner["gate_bias"] = bias((F,), ("mlp",), experts)
        return inner

    if config.num_experts is None:
        mlp = feed_forward(F)
    else:
        E = config.num_experts
        mlp = feed_forward(F, [("experts", E)])
        mlp["router"] = dataclasses.replace(matrix((D, E), ("embed", "router")), kind="router")
        if config.shared_experts:
            mlp["shared"] = feed_forward(config.shared_experts * F)
    if config.has_bias("qkv"):
        attention["query_bias"] = bias((H, C), ("heads", "head"))
        attention["key_bias"] = bias((K, C), ("kv_heads", "head"))
        attention["value_bias"] = bias((K, C), ("kv_heads", "head"))
    if config.has_bias("out"):
        attention["out_bias"] = bias((D,), ("embed",))
    if config.qk_norm and config.norm_gain:
        attention["query_norm"] = {"scale": ParamSpec((L, C), ("layers", "head"), "ones")}
        attention["key_norm"] = {"scale": ParamSpec((L, C), ("layers", "head"), "ones")}

    embed_std = 1.0 if modern else 0.02
    embed: Params = {
        "tokens": ParamSpec((V, D), ("vocab", "table"), "normal", embed_std, "embedding")
    }
    if config.position == "learned":
        embed["positions"] = ParamSpec(
            (config.context_length, D), ("context", "table"), "normal", embed_std, "embedding"
        )
    specs: Params = {
        "embed": embed,
        "blocks": {
            "attention_norm": norm(),
            "attention": attention,
            "mlp_norm": norm(),
            "mlp": mlp,
        },
        "final_norm": norm(stacked=False),
    }
    if config.embedding_norm:
        specs["embed"]["norm"] = norm(stacked=False)
    if not config.tie_embeddings:
        # Zero starts at the uniform guess, whatever the width.
        init = "zeros" if modern else "normal"
        specs["head"] = {"kernel": ParamSpec((V, D), ("vocab", "table"), init, 0.02, "embedding")}
    return specs


def init_params(config: ModelConfig, key: jax.Array, mesh: Mesh | None = None) -> Params:
    """Draws the parameters of a model, float32, each straight into its place on the mesh.

    Args:
        config: the model.
        key: a JAX random key.
        mesh: where the parameters shall lie; None is the default device.

    Returns:
        A nested dict of arrays in the shapes of `param_specs(config)`. The values depend neither
        on the mesh nor on which other parameters the model has: each has a stream of its own.
    """
    shardings = None if mesh is None else param_shardings(config, mesh)
    return draw_params(param_specs(config), key, shardings)


def draw_params(specs: Params, key: jax.Array, shardings: Params | None = None) -> Params:
    """Draws what a tree of `ParamSpec`s declares, as `init_params` does."""

    def draw(path: tuple[Any, ...], spec: ParamSpec) -> jax.Array:
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, jnp.float32)
        if spec.init == "ones":
            return jnp.ones(spec.shape, jnp.float32)
        stream = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return spec.std * jax.random.normal(stream, spec.shape, jnp.float32)

    def init() -> Params:
        return jax.tree_util.tree_map_with_path(draw, specs, is_leaf=is_spec)

    return jax.jit(init, out_shardings=shardings)()


def abstract_params(config: ModelConfig, mesh: Mesh | None = None) -> Params:
    """The parameters' shapes, dtypes and (with a mesh) shardings, without any arrays."""
    return abstract_of(param_specs(config), None if mesh is None else param_shardings(config, mesh))


def abstract_of(specs: Params, shardings: Params | None = None) -> Params:
    """Shapes, dtypes and shardings of what a tree of `ParamSpec`s declares, without any arrays."""

    def shape(spec: ParamSpec, place: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=place)

    trees = [specs] + ([] if shardings is None else [shardings])
    return jax.tree.map(shape, *trees, is_leaf=is_spec)


def param_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """The `NamedSharding` of every parameter.

    Raises:
        UserError: if a dimension does not divide over its mesh axes.
    """
    return spec_shardings(param_specs(config), mesh)


def spec_shardings(specs: Params, mesh: Mesh) -> Params:
    """The `NamedSharding` of everything that a tree of `ParamSpec`s declares, as of parameters."""

    def place(path: tuple[Any, ...], spec: ParamSpec) -> jax.sharding.NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return sharding.named_sharding(mesh, spec.axes, spec.shape, name)

    return jax.tree_util.tree_map_with_path(place, specs, is_leaf=is_spec)


def count_params(config: ModelConfig) -> int:
    """The number of parameters, without allocating any.

    Returns:
        All of them, experts that are not chosen too; a tied head counts once.
    """
    return count_specs(param_specs(config))


def count_specs(specs: Params) -> int:
    """The number of parameters that a tree of `ParamSpec`s declares."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs, is_leaf=is_spec))


def flops_per_token(config: ModelConfig, context: int | None = None) -> float:
    """Floating-point operations that training spends on one token, forward and backward.

    Six a weight that takes part in a token's matrix products, and `12 · L · H · C · T` for
    attention scores and values over a full context of T tokens, causality not deducted (the
    convention of Chowdhery et al. 2022, appendix B, by which MFU is compared).

    Args:
        config: the model.
        context: T; None is the model's context length.
    """
    specs = jax.tree.leaves(param_specs(config), is_leaf=is_spec)
    chosen = 1.0 if config.num_experts is None else config.experts_per_token / config.num_experts
    weights = sum(
        math.prod(spec.shape) * (chosen if "experts" in spec.axes else 1)
        for spec in specs
        if spec.kind in ("matrix", "router")
    )
    weights += config.vocab_size * config.embed_dim
    length = config.context_length if context is None else context
    attention = 12 * config.num_layers * config.num_heads * config.head_width * length
    return 6.0 * weights + attention


def params_sha256(params: Params) -> str:
    """A hash of parameters: of their paths and float32 values, in the order of the paths.

    With several processes all of them must call this.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        for part in _on_host(leaf):
            digest.update(np.ascontiguousarray(np.asarray(part, np.float32)).tobytes())
    return digest.hexdigest()


def _on_host(leaf: Any) -> Iterator[Any]:
    """An array, in pieces along its first axis where it lies on several processes' devices."""
    if getattr(leaf, "is_fully_addressable", True) or leaf.ndim == 0:
        yield leaf
        return
    from jax.experimental import multihost_utils

    rows = max(1, _PIECE_BYTES * leaf.shape[0] // leaf.nbytes)
    for start in range(0, leaf.shape[0], rows):
        yield multihost_utils.process_allgather(leaf[start : start + rows], tiled=True)


def flat(tree: Params) -> dict[str, Any]:
    """The leaves of a nested dict by their paths, dotted: "blocks.mlp.up".

    Whatever is no dict is a leaf, also what stands for an array and holds several.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: not isinstance(x, dict))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def nested(leaves: dict[str, Any]) -> Params:
    """The inverse of `flat`."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *outer, last = path.split(".")
        node = tree
        for name in outer:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def is_spec(node: Any) -> bool:
    """Whether a node of the tree is a `ParamSpec`, for `jax.tree` functions."""
    return isinstance(node, ParamSpec)
