"""What a model family is: a mapping of config keys and of tensor names. See README.md here."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptjax.config import EXECUTION_FIELDS, Activation, ModelConfig, RopeScaling
from gptjax.errors import UserError
from gptjax.pretrained.mapping import Weight

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "squared_relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}

ACTIVATION_NAMES: dict[Activation, str] = {
    "gelu_tanh": "gelu_new",
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "squared_relu": "relu2",
    "silu": "silu",
    "tanh": "tanh",
}
"""What config.json calls each nonlinearity, where transformers has several names for one."""

# Keys that do not change the function: training, bookkeeping, other heads, and what older files
# say about generation.
_HARMLESS_TEXT = """
    architectures attention_dropout attn_implementation attn_pdrop auto_map bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout custom_pipelines
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout id2label
    initializer_range is_decoder is_llama_config keys_to_ignore_at_inference label2id
    length_penalty max_length max_sequence_length min_length model_max_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_past output_scores pad_token_id
    predict_special_tokens prefix pretraining_tp problem_type remove_invalid_values
    reorder_and_upcast_attn repetition_penalty resid_pdrop return_dict return_dict_in_generate
    sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16
    use_cache use_return_dict
"""
_HARMLESS = frozenset(_HARMLESS_TEXT.split())


@dataclass(frozen=True)
class Family:
    """How one family's files are read and written.

    Attributes:
        model_type: as in config.json.
        architecture: transformers' class, as config.json names it.
        read: from the values of config.json to a `ModelConfig`.
        write: back; keys that every family has (`model_type` and the like) are added elsewhere.
        weights: the tensors of a model.
        prefix: before all names but the head's, and left out by some files.
        buffers: ends of the names of tensors that hold no parameters, and are passed over.
    """

    model_type: str
    architecture: str
    read: Callable[["ConfigReader"], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    weights: Callable[[ModelConfig], list[Weight]]
    prefix: str
    buffers: tuple[str, ...] = ()


class ConfigReader:
    """The values of a config.json, each to be read or known as harmless.

    Args:
        values: what the file holds.
        where: it lies, for errors.
    """

    def __init__(self, values: dict[str, Any], where: str = "config.json"):
        self._values = values
        self._where = where
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; the default where it is missing or null."""
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; it must be there unless there is a default.

        Raises:
            UserError: if it is something else.
        """
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(key, value, "a whole number of at least 1")
        return value

    def number(self, key: str, default: float) -> float:
        """A number above 0.

        Raises:
            UserError: if it is something else.
        """
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self._wrong(key, value, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false.

        Raises:
            UserError: if it is something else.
        """
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """An object without its nulls; empty where the key is missing.

        Raises:
            UserError: if it is something else.
        """
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return {name: inner for name, inner in value.items() if inner is not None}

    def _wrong(self, key: str, value: Any, legal: str) -> UserError:
        return UserError(f"{key} of {self._where} is {value!r}; it must be {legal}")

    def only(self, key: str, *legal: Any) -> None:
        """Refuses a key whose value would change the function in a way that is not built.

        Raises:
            UserError: unless it is missing, null or one of the legal values.
        """
        value = self.get(key)
        if value is not None and value not in legal:
            raise UserError(
                f"{key}={value!r} in {self._where} is not supported; only "
                f"{' or '.join(map(repr, legal))} is"
            )

    def activation(self, key: str, default: str) -> Activation:
        """The nonlinearity by transformers' name.

        Raises:
            UserError: if there is none of that name here.
        """
        name = self.get(key, default)
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise UserError(
                f"{key}={name!r} in {self._where} is not supported; only "
                f"{', '.join(_ACTIVATIONS)} are"
            )
        return _ACTIVATIONS[name]

    def windowed_layers(self, layers: int) -> tuple[int, ...] | None:
        """The blocks that `layer_types` gives a sliding window; None where the key is missing.

        Raises:
            UserError: for kinds of attention that are not built, or another number of layers.
        """
        kinds = self.get("layer_types")
        if kinds is None:
            return None
        known = {"sliding_attention", "full_attention"}
        if (
            not isinstance(kinds, list)
            or len(kinds) != layers
            or any(kind not in known for kind in kinds)
        ):
            raise UserError(
                f"layer_types={kinds!r} in {self._where} is not supported; only {layers} times "
                f"{' or '.join(sorted(known))} is"
            )
        return tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")

    def rope(
        self,
        context_length: int,
        *,
        base_key: str = "rope_theta",
        base: float = 10_000.0,
        fraction_key: str = "partial_rotary_factor",
        fraction: float = 1.0,
    ) -> dict[str, Any]:
        """RoPE's fields of `ModelConfig`, from the older spelling and from `rope_parameters`.

        Args:
            context_length: the model's.
            base_key: where the family's older files keep the base.
            base: the base where none is said.
            fraction_key: where they keep the share of a head that is turned.
            fraction: that share where none is said.

        Raises:
            UserError: for a scaling or a key in it that is not built, or two values for one thing.
        """
        newer, older = self.mapping("rope_parameters"), self.mapping("rope_scaling")
        values = newer or older
        if any(isinstance(value, dict) for value in values.values()):
            raise UserError(f"rope_parameters of {self._where} differ by layer: not supported")
        same = newer | {"type": _rope_kind(newer)}
        if newer and any(same.get(name) != value for name, value in older.items()):
            raise UserError(
                f"rope_scaling {older} and rope_parameters {newer} of {self._where} disagree; "
                "remove the one that is wrong"
            )
        kind = _rope_kind(values)
        for key in ("type", "rope_type"):
            values.pop(key, None)
        fields: dict[str, Any] = {}
        for field, inner, outer, default in (
            ("rope_base", "rope_theta", base_key, base),
            ("rope_fraction", "partial_rotary_factor", fraction_key, fraction),
        ):
            inside, outside = values.pop(inner, None), self.get(outer)
            if None not in (inside, outside) and inside != outside:
                raise UserError(
                    f"{outer} is {outside} and rope_parameters say {inside} in {self._where}; "
                    "remove the one that is wrong"
                )
            given = [value for value in (inside, outside) if value is not None]
            value = given[0] if given else default
            if not isinstance(value, int | float) or not value > 0:
                raise self._wrong(outer, value, "a number above 0")
            fields[field] = float(value)
        original = self.get("original_max_position_embeddings")
        if kind == "default":
            _refuse_rope(self._where, kind, values)
            return fields
        renamed = {
            "factor": "factor",
            "original_max_position_embeddings": "original_context",
            "low_freq_factor": "low_frequency",
            "high_freq_factor": "high_frequency",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "truncate": "truncate",
            "attention_factor": "attention_factor",
        }
        known = {
            "linear": ["factor"],
            "llama3": list(renamed)[:4],
            "yarn": [*list(renamed)[:2], *list(renamed)[4:]],
        }
        if not isinstance(kind, str) or kind not in known:
            raise UserError(
                f"rope scaling {kind!r} in {self._where} is not supported; only "
                f"{', '.join(known)} are"
            )
        scaling = {renamed[key]: values.pop(key) for key in known[kind] if key in values}
        if kind == "yarn":
            values.pop("finetuned", None)  # Whether the model was trained on with it.
            mscale, all_dim = values.pop("mscale", None), values.pop("mscale_all_dim", None)
            if mscale and all_dim and "attention_factor" not in scaling:
                log = max(math.log(scaling.get("factor", 1.0)), 0.0)
                scaling["attention_factor"] = (0.1 * mscale * log + 1) / (0.1 * all_dim * log + 1)
        if kind == "linear":
            values.pop("original_max_position_embeddings", None)
        else:
            scaling.setdefault("original_context", original or context_length)
        _refuse_rope(self._where, kind, values)
        for name, value in scaling.items():
            if not isinstance(value, int | float):
                raise self._wrong(f"rope scaling's {name}", value, "a number")
        if "factor" not in scaling:
            raise UserError(f"rope scaling {kind!r} in {self._where} lacks its factor")
        return fields | {"rope_scaling": RopeScaling(**{"kind": kind}, **scaling)}

    def finish(self) -> None:
        """Refuses keys that nothing has read and that are not known as harmless.

        Raises:
            UserError: naming them. Null, false and empty values say that something is off.
        """
        unread = {
            key: value
            for key, value in self._values.items()
            if key not in self._read | _HARMLESS and not key.startswith("_") and value
        }
        if unread:
            listed = ", ".join(f"{key}={value!r}" for key, value in unread.items())
            raise UserError(
                f"{self._where} has keys that are not honoured and may change the model: {listed}; "
                "remove those that change nothing"
            )


def _rope_kind(values: dict[str, Any]) -> str:
    return values.get("rope_type", values.get("type", "default"))


def _refuse_rope(where: str, kind: str, rest: dict[str, Any]) -> None:
    if rest:
        raise UserError(f"rope scaling {kind!r} in {where} has keys that are not honoured: {rest}")


def rope_keys(config: ModelConfig) -> dict[str, Any]:
    """RoPE in both spellings of config.json, so that older and newer readers agree."""
    scaling: dict[str, Any] = {}
    if config.rope_scaling is not None:
        own = config.rope_scaling
        scaling = {"rope_type": own.kind, "factor": own.factor}
        if own.kind != "linear":
            scaling["original_max_position_embeddings"] = own.original_context
        if own.kind == "llama3":
            scaling |= {
                "low_freq_factor": own.low_frequency,
                "high_freq_factor": own.high_frequency,
            }
        if own.kind == "yarn":
            scaling |= {
                "beta_fast": own.beta_fast,
                "beta_slow": own.beta_slow,
                "truncate": own.truncate,
                "attention_factor": own.magnitude,
            }
    parameters = {"rope_type": "default"} | scaling | {"rope_theta": config.rope_base}
    keys: dict[str, Any] = {"rope_theta": config.rope_base, "rope_parameters": parameters}
    return keys | ({"rope_scaling": scaling} if scaling else {})


def canonical(config: ModelConfig) -> ModelConfig:
    """The same function with every default resolved, and without what only training looks at."""
    plain = ModelConfig()
    windowed = config.sliding_window is not None and config.sliding_window < config.context_length
    layers = range(config.num_layers) if config.windowed_layers is None else config.windowed_layers
    scaling = config.rope_scaling
    if scaling is not None:
        scaling = dataclasses.replace(
            scaling,
            original_context=None if scaling.kind == "linear" else scaling.original_context,
            attention_factor=scaling.magnitude if scaling.kind == "yarn" else None,
        )
    rope = config.position == "rope"
    return config.replace(
        num_kv_heads=config.kv_heads,
        head_dim=config.head_width,
        mlp_dim=config.mlp_width,
        rope_base=config.rope_base if rope else plain.rope_base,
        rope_fraction=config.rope_width / config.head_width if rope else 1.0,
        rope_scaling=scaling if rope else None,
        use_bias=config.use_bias and config.norm == "layernorm",
        qkv_bias=config.has_bias("qkv"),
        out_bias=config.has_bias("out"),
        mlp_bias=config.has_bias("mlp"),
        sliding_window=config.sliding_window if windowed else None,
        windowed_layers=tuple(sorted(set(layers))) if windowed else None,
        dropout=0.0,
        init=plain.init,
        **{name: getattr(plain, name) for name in EXECUTION_FIELDS},
    )


def differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """The fields in which two canonical configs differ, as "name one, not other"."""
    mine, theirs = one.to_dict(), other.to_dict()
    return [f"{name}={mine[name]!r}" for name in mine if mine[name] != theirs[name]]
