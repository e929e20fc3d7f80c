"""nanoGPT's checkpoints: the same function, and nothing in the file runs."""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from commands import Command
from small_tokenizers import chat_like

from gptjax.model import forward
from gptjax.pretrained.loading import load
from gptjax.pretrained.tokenizer_files import write_tokenizer
from gptjax.tokenizer import CharTokenizer

torch: Any = pytest.importorskip("torch", reason="PyTorch, which nanoGPT is written in, is missing")

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n"
ALPHABET = "".join(sorted(set(TEXT)))
ARGUMENTS: dict[str, Any] = {
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 32,
    "block_size": 24,
    "bias": True,
    "vocab_size": len(ALPHABET),
    "dropout": 0.2,
}


def nanogpt_tensors(arguments: dict[str, Any], rng: np.random.Generator) -> OrderedDict[str, Any]:
    """The state dict of nanoGPT's GPT(GPTConfig(**arguments)), drawn at random."""
    width, vocab = arguments["n_embd"], arguments["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocab, width),
        "transformer.wpe.weight": (arguments["block_size"], width),
    }
    for layer in range(arguments["n_layer"]):
        block = f"transformer.h.{layer}."
        shapes |= {
            f"{block}ln_1.weight": (width,),
            f"{block}ln_1.bias": (width,),
            f"{block}attn.c_attn.weight": (3 * width, width),
            f"{block}attn.c_attn.bias": (3 * width,),
            f"{block}attn.c_proj.weight": (width, width),
            f"{block}attn.c_proj.bias": (width,),
            f"{block}ln_2.weight": (width,),
            f"{block}ln_2.bias": (width,),
            f"{block}mlp.c_fc.weight": (4 * width, width),
            f"{block}mlp.c_fc.bias": (4 * width,),
            f"{block}mlp.c_proj.weight": (width, 4 * width),
            f"{block}mlp.c_proj.bias": (width,),
        }
    shapes |= {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}
    tensors = OrderedDict(
        (name, torch.from_numpy(rng.normal(0, 0.2, shape).astype(np.float32)))
        for name, shape in shapes.items()
        if arguments["bias"] or not name.endswith(".bias")
    )
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    return tensors


def nanogpt_logits(
    tensors: OrderedDict[str, Any], arguments: dict[str, Any], tokens: np.ndarray, gelu: str
) -> np.ndarray:
    """What nanoGPT computes: GPT-2 of torch's own layers."""
    functional = torch.nn.functional
    width, heads = arguments["n_embd"], arguments["n_head"]

    def norm(x: Any, name: str) -> Any:
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        return functional.layer_norm(x, (width,), weight, bias, 1e-5)

    def linear(x: Any, name: str) -> Any:
        return functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    ids = torch.from_numpy(tokens)
    rows, length = ids.shape
    x = tensors["transformer.wte.weight"][ids] + tensors["transformer.wpe.weight"][:length]
    for layer in range(arguments["n_layer"]):
        block = f"transformer.h.{layer}"
        mixed = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        query, key, value = (
            part.view(rows, length, heads, -1).transpose(1, 2) for part in mixed.split(width, 2)
        )
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        seen = seen.transpose(1, 2).reshape(rows, length, width)
        x = x + linear(seen, f"{block}.attn.c_proj")
        hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        hidden = functional.gelu(hidden, approximate=gelu)
        x = x + linear(hidden, f"{block}.mlp.c_proj")
    return functional.linear(norm(x, "transformer.ln_f"), tensors["lm_head.weight"]).numpy()


def write_checkpoint(
    path: Path, tensors: OrderedDict[str, Any], arguments: dict[str, Any], **more: Any
) -> Path:
    values = {
        "model": tensors,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(5)}}},
        "model_args": arguments,
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "learning_rate": 1e-3, "compile": True},
    }
    torch.save(values | more, path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path, rng: np.random.Generator) -> Path:
    return write_checkpoint(tmp_path / "ckpt.pt", nanogpt_tensors(ARGUMENTS, rng), ARGUMENTS)


def write_meta(path: Path) -> Path:
    """As data/shakespeare_char/prepare.py writes it."""
    stoi = {character: place for place, character in enumerate(ALPHABET)}
    itos = dict(enumerate(ALPHABET))
    path.write_bytes(pickle.dumps({"vocab_size": len(ALPHABET), "itos": itos, "stoi": stoi}))
    return path


def assert_same_logits(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_the_same_function(
    tmp_path: Path,
    rng: np.random.Generator,
    command: Command,
    bias: bool,
    compiled: bool,
    activation: str,
) -> None:
    arguments = ARGUMENTS | {"bias": bias}
    tensors = nanogpt_tensors(arguments, rng)
    saved = OrderedDict((("_orig_mod." if compiled else "") + n, t) for n, t in tensors.items())
    path = write_checkpoint(tmp_path / "ckpt.pt", saved, arguments)
    status, out, error = command(
        "convert_nanogpt", path, tmp_path / "new", "--activation", activation
    )
    assert status == 0, error
    assert "parameters, after 250 steps" in out
    tokens = rng.integers(0, len(ALPHABET), (2, 24))
    gelu = "none" if activation == "gelu" else "tanh"
    expected = nanogpt_logits(tensors, arguments, tokens, gelu)
    model = load(tmp_path / "new")
    config = model.config.replace(compute_dtype="float32")
    assert_same_logits(np.asarray(forward(model.params, jnp.asarray(tokens), config)), expected)


def test_transformers_opens_it(tmp_path: Path, rng: np.random.Generator, command: Command) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="transformers is missing")
    arguments = ARGUMENTS | {"bias": False, "vocab_size": 64}
    tensors = nanogpt_tensors(arguments, rng)
    path = write_checkpoint(tmp_path / "ckpt.pt", tensors, arguments)
    assert command("convert_nanogpt", path, tmp_path / "new")[0] == 0
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    tokens = rng.integers(0, 64, (2, 24))
    with torch.no_grad():
        got = opened(torch.from_numpy(tokens)).logits.numpy()
    assert_same_logits(got, nanogpt_logits(tensors, arguments, tokens, "none"))


def test_masks_and_narrow_tensors(
    tmp_path: Path, rng: np.random.Generator, command: Command
) -> None:
    """Without PyTorch 2's attention nanoGPT has a causal mask in each block."""
    tensors = nanogpt_tensors(ARGUMENTS, rng)
    narrow = OrderedDict((name, tensor.bfloat16()) for name, tensor in tensors.items())
    narrow["lm_head.weight"] = narrow["transformer.wte.weight"]
    for layer in range(3):
        narrow[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24)
    path = write_checkpoint(tmp_path / "ckpt.pt", narrow, ARGUMENTS)
    assert command("convert_nanogpt", path, tmp_path / "new")[0] == 0
    got = np.asarray(load(tmp_path / "new").params["embed"]["tokens"])
    np.testing.assert_array_equal(got, narrow["transformer.wte.weight"].float().numpy())


# Tokens


@pytest.mark.parametrize("source", ["meta", "text"])
def test_characters(checkpoint: Path, tmp_path: Path, command: Command, source: str) -> None:
    given = write_meta(tmp_path / "meta.pkl")
    if source == "text":
        given = tmp_path / "input.txt"
        given.write_text(TEXT, encoding="utf-8")
    status, _, error = command(
        "convert_nanogpt", checkpoint, tmp_path / "new", f"--{source}", given
    )
    assert status == 0, error
    assert load(tmp_path / "new").tokenizer == CharTokenizer(ALPHABET)


def test_a_tokenizer_smaller_than_a_padded_vocabulary(
    tmp_path: Path, rng: np.random.Generator, command: Command
) -> None:
    tokenizer = chat_like()
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tokenizer, tmp_path / "tokenizer")
    arguments = ARGUMENTS | {"vocab_size": tokenizer.vocab_size + 7}
    path = write_checkpoint(tmp_path / "ckpt.pt", nanogpt_tensors(arguments, rng), arguments)
    status, _, error = command(
        "convert_nanogpt", path, tmp_path / "new", "--tokenizer", tmp_path / "tokenizer"
    )
    assert status == 0, error
    status, _, error = command("gptjax", "generate", tmp_path / "new", "a", "--max-new-tokens", "9")
    assert status == 0, error


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_tokenizer_of_another_model(
    tmp_path: Path, rng: np.random.Generator, command: Command, extra: int
) -> None:
    arguments = ARGUMENTS | {"vocab_size": len(ALPHABET) + extra}
    path = write_checkpoint(tmp_path / "ckpt.pt", nanogpt_tensors(arguments, rng), arguments)
    meta = write_meta(tmp_path / "meta.pkl")
    status, _, error = command("convert_nanogpt", path, tmp_path / "new", "--meta", meta)
    assert status == 2
    assert f"has {len(ALPHABET)} tokens" in error
    assert not (tmp_path / "new").exists()


# Nothing runs


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, witness: Path):
        self._witness = witness

    def __reduce__(self) -> Any:
        return Path.write_text, (self._witness, "it ran")


@pytest.mark.parametrize("place", ["config", "model"])
@pytest.mark.parametrize("old_format", [True, False])
def test_code_in_a_checkpoint(
    tmp_path: Path, rng: np.random.Generator, command: Command, place: str, old_format: bool
) -> None:
    witness = tmp_path / "witness"
    tensors: Any = nanogpt_tensors(ARGUMENTS, rng)
    values = {"model": tensors, "model_args": ARGUMENTS, "config": {}}
    values[place] = {**values[place], "more": Runs(witness)}
    torch.save(values, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=not old_format)
    status, _, error = command("convert_nanogpt", tmp_path / "ckpt.pt", tmp_path / "new")
    assert status == 2
    assert "is not read, since reading it would run code" in error.replace("\n", " ")
    assert not witness.exists()
    assert not (tmp_path / "new").exists()
    # The witness works: unpickled without care, it is written.
    torch.load(tmp_path / "ckpt.pt", weights_only=False)
    assert witness.exists()


def test_code_in_meta(checkpoint: Path, tmp_path: Path, command: Command) -> None:
    witness = tmp_path / "witness"
    meta = tmp_path / "meta.pkl"
    meta.write_bytes(pickle.dumps({"itos": {0: "a"}, "more": Runs(witness)}))
    status, _, error = command("convert_nanogpt", checkpoint, tmp_path / "new", "--meta", meta)
    assert status == 2
    assert "could run code" in error
    assert not witness.exists()
    pickle.loads(meta.read_bytes())
    assert witness.exists()


# Mistakes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_args": None}, "lacks model and model_args"),
        ({"model": {"a": 1}}, "more than tensors"),
        ({"model_args": ARGUMENTS | {"n_layer": 2}}, "unknown transformer.h.2."),
        ({"model_args": ARGUMENTS | {"n_layer": 4}}, "missing transformer.h.3."),
        ({"model_args": ARGUMENTS | {"n_head": 5}}, "num_heads 5"),
        ({"model_args": {"n_layer": 3}}, "n_embd"),
        ({"model_args": ARGUMENTS | {"n_kv_head": 2}}, "n_kv_head=2"),
    ],
)
def test_what_is_no_checkpoint_of_nanogpt(
    checkpoint: Path, tmp_path: Path, command: Command, change: dict[str, Any], words: str
) -> None:
    values = torch.load(checkpoint, weights_only=True)
    torch.save(values | change, checkpoint)
    status, _, error = command("convert_nanogpt", checkpoint, tmp_path / "new")
    assert status == 2
    assert words in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_damaged_checkpoint(
    checkpoint: Path, tmp_path: Path, command: Command, share: float
) -> None:
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(len(whole) * share)])
    status, _, error = command("convert_nanogpt", checkpoint, tmp_path / "new")
    assert status == 2
    assert str(checkpoint) in error.replace("\n", "")


def test_an_argument_too_many_and_a_full_folder(
    checkpoint: Path, tmp_path: Path, command: Command
) -> None:
    text = tmp_path / "input.txt"
    text.write_text(TEXT)
    both = ("--text", text, "--meta", text)
    assert "give one of them" in command("convert_nanogpt", checkpoint, tmp_path / "new", *both)[2]
    assert "is not empty" in command("convert_nanogpt", checkpoint, tmp_path)[2]
    missing = command("convert_nanogpt", tmp_path / "no.pt", tmp_path / "new")[2]
    assert "no.pt does not exist" in missing.replace("\n", "")


def test_without_pytorch(
    checkpoint: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    status, _, error = command("convert_nanogpt", checkpoint, tmp_path / "new")
    assert status == 2
    assert "pip install torch" in error.replace("\n", " ")
