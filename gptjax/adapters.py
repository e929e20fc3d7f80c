"""Which parameters a run trains: all, some by their paths, or a low-rank addition to each of some.

The parameters of a model are taken apart into those that are trained and those that are not
(`split_params`) and put together again (`join_params`). The optimizer, gradients and checkpoints
know the former only.
"""

import dataclasses
import fnmatch
import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.config import ModelConfig
from gptjax.errors import UserError, nearest
from gptjax.layouts import LowRank, merge_low_rank
from gptjax.params import (
    Params,
    ParamSpec,
    draw_params,
    flat,
    nested,
    param_specs,
    spec_shardings,
)


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (Hu et al. 2021): a kernel W becomes W + alpha / rank · down · up.

    `down` starts random and `up` at zero, so that the model starts as it was.

    Attributes:
        rank: of the additions.
        alpha: scales them, by alpha / rank.
        targets: patterns (as of `fnmatch`) of the dotted paths of the blocks' matrices, such as
            "blocks.attention.*" or "blocks.mlp.down".
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("blocks.attention.query", "blocks.attention.value")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank is {self.rank}; at least 1")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise UserError(f"alpha is {self.alpha}; finite and above 0")

    @property
    def scale(self) -> float:
        """What the product of the two is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Only:
    """Trains some parameters as they are; the others are frozen.

    Attributes:
        patterns: (as of `fnmatch`) of the dotted paths of the parameters that are trained, such as
            "blocks.mlp.*" or "*norm*".
    """

    patterns: tuple[str, ...]


Trainable = LoRA | Only


def trainable_to_dict(trainable: Trainable | None) -> dict[str, Any] | None:
    """As JSON-serializable values."""
    if trainable is None:
        return None
    return {"kind": type(trainable).__name__, **dataclasses.asdict(trainable)}


def trainable_from_dict(values: dict[str, Any] | None) -> Trainable | None:
    """The inverse of `trainable_to_dict`, also of what JSON made of it."""
    if values is None:
        return None
    rest = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name != "kind"
    }
    return {"LoRA": LoRA, "Only": Only}[values["kind"]](**rest)


def trainable_specs(config: ModelConfig, trainable: Trainable | None) -> Params:
    """The tree of `ParamSpec`s of what is trained.

    Of `LoRA` each target has two, `down` `[*stack, *inputs, rank]` and `up` `[*stack, rank,
    *outputs]`, in the place of the kernel.

    Raises:
        UserError: if a pattern matches nothing, or one of `LoRA` no matrix of the blocks.
    """
    if trainable is None:
        return param_specs(config)
    specs = flat(param_specs(config))
    if isinstance(trainable, Only):
        return nested({path: specs[path] for path in _matching(trainable.patterns, specs)})
    chosen: dict[str, ParamSpec] = {}
    matrices = {path: spec for path, spec in specs.items() if spec.kind == "matrix"}
    for path in _matching(trainable.targets, matrices):
        spec = matrices[path]
        inputs = spec.stack + spec.fan_in
        stack = spec.shape[: spec.stack], spec.axes[: spec.stack]
        # The spread of PyTorch's linear layers, which PEFT starts from.
        std = 1 / math.sqrt(3 * math.prod(spec.shape[spec.stack : inputs]))
        chosen[f"{path}.down"] = dataclasses.replace(
            spec,
            shape=(*spec.shape[:inputs], trainable.rank),
            axes=(*spec.axes[:inputs], "rank"),
            init="normal",
            std=std,
        )
        chosen[f"{path}.up"] = dataclasses.replace(
            spec,
            shape=(*stack[0], trainable.rank, *spec.shape[inputs:]),
            axes=(*stack[1], "rank", *spec.axes[inputs:]),
            init="zeros",
            fan_in=1,
        )
    return nested(chosen)


def trainable_shardings(config: ModelConfig, trainable: Trainable | None, mesh: Mesh) -> Params:
    """The `NamedSharding` of everything that is trained.

    Raises:
        UserError: as `trainable_specs`, and if a dimension does not divide over its mesh axes.
    """
    return spec_shardings(trainable_specs(config, trainable), mesh)


def split_params(
    params: Params,
    trainable: Trainable | None,
    config: ModelConfig,
    key: jax.Array,
    mesh: Mesh | None = None,
) -> tuple[Params, Params | None]:
    """Takes parameters apart into those that are trained and those that are not.

    Args:
        params: a model's. Where they have low-rank additions already, as `join_params` and
            `load_adapter` give them, `LoRA` goes on with these.
        trainable: what is trained; None is everything.
        config: the model.
        key: random key from which additions are drawn.
        mesh: where additions shall lie; None is the default device.

    Returns:
        Both as nested dicts; the second is None where everything is trained.

    Raises:
        UserError: as `trainable_specs`, or if there are additions that do not fit.
    """
    specs = trainable_specs(config, trainable)
    frozen = frozen_params(params, trainable, config)
    if trainable is None:
        trained = merge_low_rank(params)
    elif isinstance(trainable, Only):
        trained = _common(merge_low_rank(params), specs)
    elif _has_additions(params):
        trained = _present(flat(params), flat(specs), trainable)
    else:
        trained = draw_params(specs, key, None if mesh is None else spec_shardings(specs, mesh))
    return trained, frozen


def frozen_params(
    params: Params, trainable: Trainable | None, config: ModelConfig
) -> Params | None:
    """What of a model's parameters is not trained; None where everything is.

    Raises:
        UserError: as `trainable_specs`.
    """
    if trainable is None:
        return None
    if isinstance(trainable, Only):
        return _without(merge_low_rank(params), trainable_specs(config, trainable))
    kernel = lambda x: x.kernel if isinstance(x, LowRank) else x  # noqa: E731
    return jax.tree.map(kernel, params, is_leaf=lambda x: isinstance(x, LowRank))


def join_params(trained: Params, frozen: Params | None, trainable: Trainable | None) -> Params:
    """A model's parameters from those that are trained and those that are not.

    Returns:
        With `LoRA` the targets are `LowRank`, which every function of this package takes as it
        takes arrays; `merge_params` makes arrays of them.
    """
    if frozen is None:
        return trained
    scale = trainable.scale if isinstance(trainable, LoRA) else 1.0

    def join(frozen: Any, trained: Any) -> Any:
        if not isinstance(frozen, dict):
            return LowRank(frozen, trained["down"], trained["up"], scale)
        both = {name: join(frozen[name], trained[name]) for name in frozen.keys() & trained.keys()}
        return frozen | trained | both

    return join(frozen, trained)


def merge_params(params: Params) -> Params:
    """The parameters with every low-rank addition added to its kernel, in float32.

    Args:
        params: as `join_params` gives them; what has no additions stays as it is.

    Returns:
        The tree that `init_params` makes.
    """
    return _merge(params) if _has_additions(params) else params


_merge = jax.jit(merge_low_rank)


def _has_additions(params: Params) -> bool:
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, LowRank))
    return any(isinstance(leaf, LowRank) for leaf in leaves)


def _common(tree: Params, other: Params) -> Params:
    """What of a tree another one has too."""
    return {
        name: _common(tree[name], part) if isinstance(tree[name], dict) else tree[name]
        for name, part in other.items()
    }


def _without(tree: Params, other: Params) -> Params:
    """What of a tree another one has not."""
    return {
        name: _without(part, other.get(name, {})) if isinstance(part, dict) else part
        for name, part in tree.items()
        if isinstance(part, dict) or name not in other
    }


def _present(leaves: dict[str, Any], specs: dict[str, ParamSpec], trainable: LoRA) -> Params:
    """The additions that parameters have already."""
    found: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if isinstance(leaf, LowRank):
            # The scale is the run's own.
            ratio = leaf.scale / trainable.scale
            found |= {f"{path}.down": leaf.down, f"{path}.up": leaf.up * ratio}
    shapes = {path: tuple(leaf.shape) for path, leaf in found.items()}
    wanted = {path: spec.shape for path, spec in specs.items()}
    if shapes != wanted:
        unlike = sorted(p for p in shapes.keys() | wanted.keys() if shapes.get(p) != wanted.get(p))
        raise UserError(
            f"the parameters have low-rank additions that are not those of {trainable}: "
            f"{', '.join(unlike)}; give the same rank and targets, or merge them first"
        )
    return nested(found)


def _matching(patterns: tuple[str, ...], specs: dict[str, Any]) -> list[str]:
    """The paths that any of the patterns matches, in the order of the declaration."""
    if isinstance(patterns, str):
        raise UserError(f"the patterns are the text {patterns!r}; give a tuple of texts")
    if not patterns:
        raise UserError(f"there are no patterns; give some of {', '.join(specs)}")
    for pattern in patterns:
        if not fnmatch.filter(specs, pattern):
            raise UserError(f"nothing to train matches {pattern!r}{nearest(pattern, list(specs))}")
    return [p for p in specs if any(fnmatch.fnmatchcase(p, pattern) for pattern in patterns)]
