"""The shape of a model: one frozen, hashable dataclass, and presets by name."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from gptjax.errors import UserError, nearest

Position = Literal["learned", "rope"]
Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu_tanh", "gelu", "quick_gelu", "relu", "squared_relu", "silu", "tanh"]
RopeKind = Literal["linear", "llama3", "yarn"]
Init = Literal["gpt2", "modern"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
CacheDtype = Literal["auto", "int8"]
Remat = Literal["none", "dots", "full", "offload", "auto"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_literals(config: "ModelConfig | RopeScaling") -> None:
    for field in dataclasses.fields(config):
        legal = getattr(field.type, "__args__", ())
        value = getattr(config, field.name)
        if getattr(field.type, "__origin__", None) is Literal and value not in legal:
            raise UserError(f"{field.name} is {value!r}{nearest(str(value), legal)}")


def _check_keys(fields: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for name in fields:
        if name not in known:
            raise UserError(f"unknown field {name!r} of ModelConfig{nearest(name, known)}")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE's frequencies are changed to reach beyond the context that a model was trained on.

    Attributes:
        kind: "linear" divides all by `factor` (Chen et al. 2023); "llama3" divides those of long
            wavelengths only, with a smooth passage (Grattafiori et al. 2024, section 3.4.1 names
            it; the formula is that of Meta's published code); "yarn" divides those that turn
            rarely within `original_context` (Peng et al. 2023, section 3.2).
        factor: how much longer the context becomes.
        original_context: the context trained on, in tokens; "linear" does not need it.
        low_frequency: llama3: wavelengths above `original_context / low_frequency` are divided.
        high_frequency: llama3: wavelengths below `original_context / high_frequency` stay.
        beta_fast: yarn: frequencies of more turns than this stay.
        beta_slow: yarn: frequencies of fewer turns than this are divided.
        truncate: yarn: whether the bounds of the passage are rounded to whole dimensions.
        attention_factor: yarn: multiplies queries and keys after the rotation; None is
            `0.1 ln(factor) + 1`.

    Raises:
        UserError: if a field is out of range.
    """

    kind: RopeKind
    factor: float
    original_context: int | None = None
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _check_literals(self)
        _require(self.factor > 0, f"rope_scaling.factor is {self.factor}; above 0")
        _require(
            self.kind == "linear" or (self.original_context or 0) >= 1,
            f"rope_scaling of kind {self.kind!r} needs original_context, the context trained on",
        )
        _require(
            self.kind != "llama3" or self.high_frequency > self.low_frequency,
            f"rope_scaling.high_frequency {self.high_frequency} must exceed "
            f"low_frequency {self.low_frequency}",
        )

    @property
    def magnitude(self) -> float:
        """What multiplies queries and keys after the rotation."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer. The defaults are GPT-2 124M exactly as published.

    Hashable, so it goes through `jax.jit` as a static argument.

    Attributes:
        vocab_size: V, number of token ids.
        context_length: longest sequence in tokens.
        num_layers: L, number of blocks.
        embed_dim: D, width of the residual stream.
        num_heads: H, query heads.
        num_kv_heads: K, key and value heads; None means `num_heads`. Fewer is grouped-query
            attention (Ainslie et al. 2023).
        head_dim: C, width of a head; None means `embed_dim / num_heads`.
        mlp_dim: F, hidden width of the feed-forward layer; None means `4 * embed_dim`.
        position: "learned" vectors added to the embedding, or "rope" (Su et al. 2021).
        rope_base: base of RoPE's geometric sequence of wavelengths.
        rope_fraction: share of each head's width that RoPE turns, from its start (GPT-NeoX).
        rope_scaling: see `RopeScaling`; None leaves the frequencies as they are.
        norm: "layernorm" or "rmsnorm" (Zhang & Sennrich 2019), before each sublayer.
        norm_gain: whether norms learn a gain for each channel.
        norm_eps: added to the variance or mean square.
        qk_norm: RMS-normalize queries and keys by head (Dehghani et al. 2023).
        activation: the feed-forward nonlinearity. "squared_relu" is So et al. 2021.
        gated_mlp: multiply the activated branch with a second linear one (Shazeer 2020);
            with "silu" this is SwiGLU.
        use_bias: biases in linear layers and in LayerNorm. The three that follow say otherwise of
            one kind of linear layer.
        tie_embeddings: use the token embedding as the output matrix.
        embedding_norm: normalize the embedding before the first block.
        qkv_bias: biases of queries, keys and values; None means `use_bias`.
        out_bias: bias of the attention's output; None means `use_bias`.
        mlp_bias: biases of the feed-forward layer; None means `use_bias`.
        num_experts: E, feed-forward layers among which a router chooses for each token, each of
            width `mlp_dim` (Shazeer et al. 2017); None is one for all tokens.
        experts_per_token: how many the router chooses; their outputs are summed, weighted by the
            router's probabilities. None is left out and none is full: every choice is computed.
        shared_experts: how many more there are that every token goes through (Dai et al. 2024).
        normalize_gates: divide the chosen experts' probabilities by their sum.
        parallel_blocks: attention and feed-forward layer both read the block's input, and both are
            added to it (Wang & Komatsuzaki 2021), where they else follow each other.
        attention_scale: multiplies the products of queries and keys; None means `1 / √head_dim`.
        inverse_layer_scale: divide these products by the block's number, from 1, too.
        sliding_window: how many tokens a query sees, itself included (Beltagy et al. 2020); None
            is all before it.
        windowed_layers: the blocks, from 0, that `sliding_window` holds for; None means all.
        logit_softcap: bound logits smoothly by `cap * tanh(logits / cap)` (Gemma 2).
        dropout: rate after the embedding, in the attention probabilities and after each sublayer.
        init: "gpt2" draws N(0, 0.02²) with residual outputs scaled by 1/√(2L); "modern" draws a
            unit-variance embedding, 1/√fan-in matrices, and zero residual outputs and head.
        compute_dtype: dtype of matrix work; "auto" is bfloat16 where the chip has it.
        float8: train with products of the blocks' kernels in 8-bit floats, see `gptjax.float8`; for
            an H100 or newer, and widths of thousands. Evaluation, generation and a run that is
            loaded multiply in the compute dtype.
        cache_dtype: dtype of the keys and values kept in generation: "auto" is the compute dtype,
            "int8" has one scale for each token and head.
        remat: what the backward pass recomputes: "none"; "dots" keeps only matrix products;
            "full" keeps only block inputs; "offload" keeps these in the host's memory. "auto" is
            the first of these four that fits into the device's memory by the plan: `fit` and
            `gptjax plan` choose it, by batch, mesh and optimizer (`gptjax.planning.choose_remat`).
        scan_unroll: blocks laid out in a row per scan iteration; None chooses (all of them in a
            shallow model, up to 6, on a CPU up to 12 where nothing is recomputed, which XLA then
            schedules better; one otherwise, so that compile time does not grow with depth).
            Blocks in a row save no memory by `remat` on a CPU.
        pipeline_microbatches: parts that a batch passes through the stages of a mesh in, a divisor
            of each device's rows. None is the largest up to four times the number of stages, with
            which a fifth of the time at most is spent filling and emptying them.

    The last six say how the model is computed and change no value beyond rounding, so a
    checkpoint continues under other settings of them (`EXECUTION_FIELDS`).

    Raises:
        UserError: if a field is out of range or two fields contradict each other.
    """

    vocab_size: int = 50257
    context_length: int = 1024
    num_layers: int = 12
    embed_dim: int = 768
    num_heads: int = 12
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    position: Position = "learned"
    rope_base: float = 10_000.0
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    norm: Norm = "layernorm"
    norm_gain: bool = True
    norm_eps: float = 1e-5
    qk_norm: bool = False
    activation: Activation = "gelu_tanh"
    gated_mlp: bool = False
    use_bias: bool = True
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    mlp_bias: bool | None = None
    num_experts: int | None = None
    experts_per_token: int = 2
    shared_experts: int = 0
    normalize_gates: bool = True
    parallel_blocks: bool = False
    attention_scale: float | None = None
    inverse_layer_scale: bool = False
    sliding_window: int | None = None
    windowed_layers: tuple[int, ...] | None = None
    tie_embeddings: bool = True
    embedding_norm: bool = False
    logit_softcap: float | None = None
    dropout: float = 0.0
    init: Init = "gpt2"
    compute_dtype: ComputeDtype = "auto"
    float8: bool = False
    cache_dtype: CacheDtype = "auto"
    remat: Remat = "none"
    scan_unroll: int | None = None
    pipeline_microbatches: int | None = None

    def __post_init__(self) -> None:
        _check_literals(self)
        for name in ("vocab_size", "context_length", "num_layers", "embed_dim", "num_heads"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; at least 1")
        for name in (
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
            "num_experts",
            "sliding_window",
            "scan_unroll",
            "pipeline_microbatches",
        ):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} is {value}; at least 1, or None")
        if self.head_dim is None:
            _require(
                self.embed_dim % self.num_heads == 0,
                f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}; "
                f"choose num_heads from {_divisors(self.embed_dim)} or set head_dim",
            )
        _require(
            self.num_heads % self.kv_heads == 0,
            f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.kv_heads}; "
            f"choose num_kv_heads from {_divisors(self.num_heads)}",
        )
        _require(
            self.position != "rope" or (self.rope_width % 2 == 0 and self.rope_width > 0),
            f"RoPE would turn {self.rope_width} of the {self.head_width} channels of a head, which "
            "is odd or none; it rotates pairs, so change head_dim or rope_fraction",
        )
        _require(
            0.0 < self.rope_fraction <= 1.0,
            f"rope_fraction is {self.rope_fraction}; above 0 and at most 1",
        )
        for layer in self.windowed_layers or ():
            _require(
                0 <= layer < self.num_layers,
                f"windowed_layers names block {layer} of {self.num_layers}; they count from 0",
            )
        _require(
            self.num_experts is None or 1 <= self.experts_per_token <= self.num_experts,
            f"experts_per_token is {self.experts_per_token}; from 1 to num_experts, which is "
            f"{self.num_experts}",
        )
        _require(
            self.shared_experts >= 0 and (self.shared_experts == 0 or self.num_experts is not None),
            f"shared_experts is {self.shared_experts}; at least 0, and 0 without num_experts",
        )
        _require(
            not self.float8 or self.num_experts is None,
            "float8 is for the kernels of dense blocks; set it to False, or num_experts to None",
        )
        _require(0.0 <= self.dropout < 1.0, f"dropout is {self.dropout}; from 0 up to, not 1")
        _require(
            self.logit_softcap is None or self.logit_softcap > 0,
            f"logit_softcap is {self.logit_softcap}; positive, or None for no cap",
        )

    @property
    def kv_heads(self) -> int:
        """K, with the default resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """C, with the default resolved."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_width(self) -> int:
        """F, with the default resolved."""
        return 4 * self.embed_dim if self.mlp_dim is None else self.mlp_dim

    @property
    def rope_width(self) -> int:
        """Channels of each head that RoPE turns."""
        return int(self.head_width * self.rope_fraction)

    def has_bias(self, layer: Literal["qkv", "out", "mlp"]) -> bool:
        """Whether a kind of linear layer has biases, with the default resolved."""
        own = getattr(self, f"{layer}_bias")
        return self.use_bias if own is None else own

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed.

        Raises:
            UserError: if a field is unknown (the nearest is named) or the result is illegal.
        """
        _check_keys(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-serializable values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            UserError: if a field is unknown; the nearest known name is given.
        """
        _check_keys(fields)
        fields = dict(fields)
        # JSON knows neither tuples nor dataclasses.
        if isinstance(fields.get("rope_scaling"), dict):
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        if fields.get("windowed_layers") is not None:
            fields["windowed_layers"] = tuple(fields["windowed_layers"])
        return cls(**fields)


EXECUTION_FIELDS = frozenset(
    {"cache_dtype", "compute_dtype", "float8", "remat", "scan_unroll", "pipeline_microbatches"}
)
"""Fields of `ModelConfig` that change neither parameters nor the function computed."""

_MODERN: dict[str, Any] = {
    "position": "rope",
    "norm": "rmsnorm",
    "norm_gain": False,
    "qk_norm": True,
    "activation": "squared_relu",
    "use_bias": False,
    "tie_embeddings": False,
    "embedding_norm": True,
    "logit_softcap": 15.0,
    "init": "modern",
}

_LLAMA: dict[str, Any] = {
    "position": "rope",
    "norm": "rmsnorm",
    "activation": "silu",
    "gated_mlp": True,
    "use_bias": False,
    "tie_embeddings": False,
}

PRESETS: dict[str, ModelConfig] = {
    "gpt2": ModelConfig(),
    "gpt2-medium": ModelConfig(num_layers=24, embed_dim=1024, num_heads=16),
    "gpt2-large": ModelConfig(num_layers=36, embed_dim=1280, num_heads=20),
    "gpt2-xl": ModelConfig(num_layers=48, embed_dim=1600, num_heads=25),
    # Brown et al. 2020, table 2.1.
    "gpt3-175b": ModelConfig(num_layers=96, embed_dim=12288, num_heads=96, context_length=2048),
    # nanoGPT's two character-level Shakespeare models, and the modern recipe in the same shapes.
    "char-gpt": ModelConfig(
        vocab_size=65, context_length=64, num_layers=4, embed_dim=128, num_heads=4
    ),
    "char-gpt-large": ModelConfig(
        vocab_size=65, context_length=256, num_layers=6, embed_dim=384, num_heads=6
    ),
    "char-gpt-modern": ModelConfig(
        vocab_size=65, context_length=64, num_layers=4, embed_dim=128, num_heads=4, **_MODERN
    ),
    "char-gpt-large-modern": ModelConfig(
        vocab_size=65, context_length=256, num_layers=6, embed_dim=384, num_heads=6, **_MODERN
    ),
    # Touvron et al. 2023, table 1; Grattafiori et al. 2024, table 3.
    "llama2-7b": ModelConfig(
        vocab_size=32000,
        context_length=4096,
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        mlp_dim=11008,
        **_LLAMA,
    ),
    "llama3-8b": ModelConfig(
        vocab_size=128256,
        context_length=8192,
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=14336,
        rope_base=500_000.0,
        **_LLAMA,
    ),
}


def preset(name: str) -> ModelConfig:
    """Returns the configuration of that name, such as "gpt2" or "llama3-8b".

    Returns:
        A `ModelConfig`; change it by `replace`.

    Raises:
        UserError: if there is none; the nearest name is given.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]
