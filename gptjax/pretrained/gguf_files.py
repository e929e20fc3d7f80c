"""GGUF files (llama.cpp's format): read by the `gguf` package, shown as Hugging Face's layout."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import UserError, nearest
from gptjax.pretrained.json_files import refuse_other_content
from gptjax.pretrained.mapping import Tensor
from gptjax.pretrained.tokenizer_files import tokenizer_from_gguf
from gptjax.tokenizer import Tokenizer


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in a mapped GGUF file, dequantized when it is read.

    Attributes:
        name: in the file.
        data: the mapped bytes.
        kind: of quantization, the `gguf` package's.
        shape: in Hugging Face's order of dimensions.
        rearrange: from llama.cpp's order of heads to Hugging Face's.
    """

    name: str
    data: np.ndarray
    kind: Any
    shape: tuple[int, ...]
    rearrange: Callable[[np.ndarray], np.ndarray]

    def read(self) -> np.ndarray:
        """The values in Hugging Face's order of dimensions and heads.

        Quantized ones come out as float16: their scales are, so that it holds what they say to
        well below the error of their quantization, in half the room.

        Raises:
            UserError: if the `gguf` package cannot dequantize this kind.
        """
        import gguf

        try:
            values = gguf.dequantize(self.data, self.kind)
        except NotImplementedError as error:
            raise UserError(
                f"tensor {self.name} is quantized as {self.kind.name}, which the gguf package "
                "cannot dequantize; give a file in another quantization, such as Q8_0"
            ) from error
        if self.kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16):
            values = as_float16(values, exactly=False)
        return self.rearrange(values)

    @property
    def dtype(self) -> np.dtype:
        """Of what is read, but for values too large for it."""
        full = self.kind.name in ("F32", "BF16")
        return np.dtype(np.float32 if full else np.float16)


def as_float16(values: np.ndarray, *, exactly: bool = True) -> np.ndarray:
    """Values as float16 where that holds every one of them, or at least its size."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    fits = np.array_equal(half, values) if exactly else np.isfinite(half).all()
    return half if fits else values


@dataclass(frozen=True)
class Opened:
    """A GGUF file in the terms of Hugging Face's layout.

    Attributes:
        config: what config.json would say.
        generation: what generation_config.json would say.
        tensors: by Hugging Face's names.
        tokenizer: the one inside; None where it is not read.
    """

    config: dict[str, Any]
    generation: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None


_BLOCK_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_TOP_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")


def open_gguf(path: Path) -> Opened:
    """Opens a file: metadata read, tensors mapped.

    Raises:
        UserError: if it is no whole GGUF file, or holds a model of an architecture, a setting or a
            tokenizer that is not supported.
    """
    with path.open("rb") as file:
        start = file.read(64)
    refuse_other_content(path, start)
    if not start.startswith(b"GGUF"):
        raise UserError(f"{path} is not a GGUF file; download it again")
    try:
        reader = _reader(path)
    except Exception as error:  # The package raises whatever its parsing meets.
        raise UserError(f"{path} is incomplete or damaged ({error}); download it again") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UserError(
            f"{path} holds a model of architecture {architecture!r}, which is not supported"
            f"{nearest(str(architecture), _ARCHITECTURES)}"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # The package stores dimensions in the order of ggml, the fastest first.
    shapes = {name: tuple(int(n) for n in tensor.shape[::-1]) for name, tensor in tensors.items()}
    config = _config(path, architecture, fields, shapes, tensors)
    presented: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "rope_freqs.weight":
            continue  # Read into the config.
        new_name, rearrange, shape = _presented(architecture, name, shapes[name], config)
        presented[new_name] = QuantizedTensor(
            name, tensor.data, tensor.tensor_type, shape, rearrange
        )
    return Opened(config, _generation(fields), presented, tokenizer_from_gguf(fields))


def _reader(path: Path) -> Any:
    import gguf

    class Reader(gguf.GGUFReader):
        """Reads through a plain array: each of a million slices of a memmap takes twice as long."""

        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._plain = np.asarray(mapped)

    return Reader(path)


def _config(
    path: Path,
    architecture: str,
    fields: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    tensors: dict[str, Any],
) -> dict[str, Any]:
    read: set[str] = set()

    def get(key: str, default: Any = None) -> Any:
        read.add(f"{architecture}.{key}")
        return fields.get(f"{architecture}.{key}", default)

    def need(key: str) -> Any:
        value = get(key)
        if value is None:
            raise UserError(f"{path} lacks {architecture}.{key}; download it again")
        return value

    # Said elsewhere too, or of no effect.
    for key in ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned"):
        get(key)
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{path} lacks token_embd.weight; download it again")
    width, heads = need("embedding_length"), need("attention.head_count")
    ids = {
        f"{kind}_token_id": fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")
    }
    tied = "output.weight" not in shapes
    if architecture == "gpt2":
        config = {
            "vocab_size": embedding[0],
            "n_positions": need("context_length"),
            "n_embd": width,
            "n_layer": need("block_count"),
            "n_head": heads,
            "n_inner": need("feed_forward_length"),
            "layer_norm_epsilon": need("attention.layer_norm_epsilon"),
            "activation_function": "gelu_new",
        }
        get("rope.dimension_count")
    else:
        head_dim = get("attention.key_length", width // heads)
        config = {
            "vocab_size": embedding[0],
            "max_position_embeddings": need("context_length"),
            "hidden_size": width,
            "num_hidden_layers": need("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": need("feed_forward_length"),
            "rms_norm_eps": _rounded(need("attention.layer_norm_rms_epsilon")),
            "rope_theta": get("rope.freq_base", 10_000.0),
        }
        for key in ("attention.value_length", "rope.dimension_count"):
            if get(key, head_dim) != head_dim:
                raise UserError(
                    f"{architecture}.{key} of {path} is {get(key)}, but heads are {head_dim} "
                    "wide; that is not supported"
                )
        if scaling := _rope_scaling(path, architecture, get, config, tensors):
            config["rope_scaling"] = scaling
        if architecture == "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in shapes
            config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    if get("expert_count", 0):
        raise UserError(f"{path} holds a mixture of experts, which is not supported")
    if window := get("attention.sliding_window"):
        if architecture != "llama":
            raise UserError(f"{path} has a sliding window, which is not supported for it")
        config["sliding_window"] = window
        for key in ("attention_bias", "mlp_bias"):
            config.pop(key)
    # Zero and false say that something is off.
    rest = [
        key
        for key, value in fields.items()
        if key.startswith(architecture + ".") and key not in read and value
    ]
    if rest:
        raise UserError(
            f"{path} has metadata that are not honoured and may change the model: "
            + ", ".join(f"{key}={fields[key]!r}" for key in rest)
        )
    kind = "mistral" if "sliding_window" in config else architecture
    return {"model_type": kind, "dtype": "float16", "tie_word_embeddings": tied} | config | ids


def _rope_scaling(
    path: Path, architecture: str, get: Callable, config: dict[str, Any], tensors: dict[str, Any]
) -> dict[str, Any] | None:
    kind, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor")
    original = get("rope.scaling.original_context_length")
    attention_factor = get("rope.scaling.attn_factor")
    if factor is None:
        factor = get("rope.scale_linear")
        kind = "linear" if factor not in (None, 1.0) else kind
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor}
        scaling["original_max_position_embeddings"] = original
        return scaling | ({"attention_factor": attention_factor} if attention_factor else {})
    if kind != "none":
        raise UserError(f"rope scaling {kind!r} of {path} is not supported; linear and yarn are")
    if "rope_freqs.weight" not in tensors:
        return None
    # Llama 3's scaling is stored as what it divides each frequency by.
    divisors = np.asarray(tensors["rope_freqs.weight"].data, np.float64).ravel()
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    from gptjax.model import rope_frequencies
    from gptjax.pretrained.families import read_config

    trial = {"model_type": "llama", "rope_scaling": scaling} | config
    _, scaled = read_config(trial, str(path))
    expected = rope_frequencies(scaled.replace(rope_scaling=None)) / rope_frequencies(scaled)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UserError(f"the rope_freqs of {path} are not those of Llama 3: not supported")
    return scaling


def _rounded(value: float) -> float:
    """The decimal that a float32 was written for: 9.99999974e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _generation(fields: dict[str, Any]) -> dict[str, Any]:
    names = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    stops = {int(fields[name]) for name in names if fields.get(name) is not None}
    bos = fields.get("tokenizer.ggml.bos_token_id")
    found: dict[str, Any] = {} if bos is None else {"bos_token_id": bos}
    if stops:
        found["eos_token_id"] = sorted(stops) if len(stops) > 1 else stops.pop()
    return found


def _presented(
    architecture: str, name: str, shape: tuple[int, ...], config: dict[str, Any]
) -> tuple[str, Callable[[np.ndarray], np.ndarray], tuple[int, ...]]:
    """A tensor's name in Hugging Face's layout, how to rearrange it, and its shape there."""
    gpt2 = architecture == "gpt2"
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{(_TOP_GPT2 if gpt2 else _TOP_LLAMA).get(stem, stem)}.{kind}", _same, shape
    _, layer, part = stem.split(".", 2)
    blocks, prefix = (_BLOCK_GPT2, "transformer.h") if gpt2 else (_BLOCK_LLAMA, "model.layers")
    new_name = f"{prefix}.{layer}.{blocks.get(part, part)}.{kind}"
    if gpt2 and len(shape) == 2:
        return new_name, np.transpose, shape[::-1]
    if architecture == "llama" and part in ("attn_q", "attn_k"):
        key = "num_attention_heads" if part == "attn_q" else "num_key_value_heads"
        heads = config[key]

        def pairs_apart(values: np.ndarray) -> np.ndarray:
            """From channels (2i, 2i + 1) turned together to (i, i + C / 2)."""
            by_pair = values.reshape(heads, -1, 2, *values.shape[1:])
            return by_pair.swapaxes(1, 2).reshape(values.shape)

        return new_name, pairs_apart, shape
    return new_name, _same, shape


def _same(values: np.ndarray) -> np.ndarray:
    return values
