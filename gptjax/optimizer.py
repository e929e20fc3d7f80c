"""Optimizers and schedules from one small config, through optax."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax

from gptjax.adapters import Trainable, trainable_specs
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.params import Params, ParamSpec, is_spec

if TYPE_CHECKING:
    import optax


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
        name: "adamw" (Loshchilov & Hutter 2019), or "muon" (Jordan et al. 2024): the blocks'
            matrices by orthogonalized momentum, everything else by AdamW.
        learning_rate: AdamW's peak learning rate.
        matrix_learning_rate: Muon's peak learning rate, for matrices.
        schedule: after the warm-up: "constant"; "cosine" down over all remaining steps; or "wsd"
            (warmup-stable-decay, Hu et al. 2024), constant and then linear down over the last
            `decay_fraction` of all steps.
        warmup_steps: steps of linear warm-up; step n of w takes n / (w + 1) of the peak.
        decay_fraction: share of all steps in which "wsd" decays.
        final_fraction: share of the peak at which "cosine" and "wsd" end.
        beta1: decay rate of AdamW's first moment.
        beta2: decay rate of AdamW's second moment.
        epsilon: AdamW's epsilon.
        momentum: Muon's momentum (Nesterov).
        weight_decay: decoupled decay of embeddings and matrices (not of gains and biases), times
            the learning rate.
        clip_norm: gradients of a larger global norm are scaled down to it; None means no clipping.
        ema_decay: decay rate of an exponential moving average of the weights, kept beside them and
            used for evaluation and samples; None keeps none.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    matrix_learning_rate: float = 0.02
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        for name in ("decay_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; from 0 to 1")
        for name in ("learning_rate", "matrix_learning_rate", "weight_decay", "warmup_steps"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise UserError(f"{name} is {value}; finite and at least 0")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-serializable values."""
        return dataclasses.asdict(self)


def make_schedule(config: OptimizerConfig, peak: float, steps: int) -> "optax.Schedule":
    """The learning rate as a function of the number of updates made before (0 for the first).

    Args:
        config: the optimizer's config.
        peak: the learning rate after the warm-up.
        steps: length of the whole run in updates.
    """
    import optax

    warmup = config.warmup_steps
    rest = max(steps - warmup, 1)
    final = peak * config.final_fraction
    match config.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
        case "wsd":
            decay = max(min(round(steps * config.decay_fraction), rest), 1)
            after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
    if warmup == 0:
        return after
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
    config: OptimizerConfig, model: ModelConfig, steps: int, trainable: Trainable | None = None
) -> "optax.GradientTransformation":
    """The optax transformation of a config, for one model and a run of `steps` updates.

    Args:
        config: how parameters are updated.
        model: the model.
        steps: length of the whole run in updates.
        trainable: what is trained; None is everything.

    Returns:
        An optax transformation, with the schedules inside.
    """
    import optax

    specs = trainable_specs(model, trainable)
    decayed = jax.tree.map(lambda spec: spec.kind != "vector", specs, is_leaf=is_spec)
    adamw = optax.adamw(
        make_schedule(config, config.learning_rate, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    if config.name == "adamw":
        update = adamw
    else:
        muon = optax.contrib.muon(
            make_schedule(config, config.matrix_learning_rate, steps),
            beta=config.momentum,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=lambda params: _matrix_axes(specs, params),
        )
        labels = jax.tree.map(
            lambda spec: "muon" if spec.kind == "matrix" else "adamw", specs, is_leaf=is_spec
        )
        update = optax.partition({"muon": muon, "adamw": adamw}, labels)
    if config.clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _matrix_axes(specs: Params, params: Any) -> Any:
    """Which axes of each matrix are contracted and which are put out; the rest is a stack."""
    import optax

    def axes(spec: ParamSpec, param: Any) -> Any:
        if isinstance(param, optax.MaskedNode):
            return param
        first_output = spec.stack + spec.fan_in
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(spec.stack, first_output)), tuple(range(first_output, len(spec.shape)))
        )

    return jax.tree.map(axes, specs, params, is_leaf=is_spec)
