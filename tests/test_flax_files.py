"""Weights of transformers' Flax classes: as those wrote them, as found, damaged, in memory.

The folders in flax_checkpoints were written, and their logits computed, by FlaxGPT2LMHeadModel,
FlaxLlamaForCausalLM and FlaxMistralForCausalLM of transformers 4.55.4 (jax 0.6.2, flax 0.10.6, a
CPU), random weights. Larger ones are laid out here by the rules that those had.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from commands import Command
from family_cases import CASES, GPT2, seeded_model
from flax.traverse_util import flatten_dict, unflatten_dict
from hub_cache import lay_out_cache

import gptjax
from gptjax.errors import UserError
from gptjax.model import Model, forward
from gptjax.pretrained import flax_files, huggingface
from gptjax.pretrained.flax_files import from_flax_params, to_flax_params
from gptjax.pretrained.huggingface import save_pretrained
from gptjax.pretrained.loading import load

WRITTEN = Path(__file__).with_name("flax_checkpoints")
SINGLE = "flax_model.msgpack"
INDEX = "flax_model.msgpack.index.json"
FLAX_CASES = [
    *("gpt2", "gpt2-gelu", "gpt2-untied", "gpt2-inner-eps"),
    *("llama", "llama-tied-wide-heads", "llama-one-kv-head", "mistral-no-window"),
]
FORWARD = jax.jit(forward, static_argnums=2)


def logits_of(model: Model, tokens: np.ndarray) -> np.ndarray:
    config = model.config.replace(compute_dtype="float32")
    return np.asarray(FORWARD(model.params, jnp.asarray(tokens), config))


def assert_same(one: Any, other: Any) -> None:
    ours, theirs = flatten_dict(one, sep="/"), flatten_dict(other, sep="/")
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_array_equal(np.asarray(values), np.asarray(theirs[name]), name)


def write(directory: Path, tree: Any, values: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SINGLE).write_bytes(flax.serialization.to_bytes(tree))
    (directory / "config.json").write_text(json.dumps(values))
    return directory


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Model]:
    """A GPT-2 in a folder of its own, as Flax had it, and as it is here."""
    model, _ = seeded_model(GPT2)
    return write(tmp_path / "flax", to_flax_params(model), GPT2), model


# What was written by the classes themselves


@pytest.mark.parametrize("name", sorted(path.name for path in WRITTEN.iterdir()))
def test_what_the_classes_wrote(name: str) -> None:
    expected = np.load(WRITTEN / name / "expected.npz")
    got = logits_of(load(WRITTEN / name), expected["tokens"])
    assert np.abs(got - expected["logits"]).max() <= 2e-5 * np.abs(expected["logits"]).max()


@pytest.mark.parametrize("name", ["gpt2", "llama-sharded"])
def test_the_tree_is_theirs_again(name: str) -> None:
    theirs: dict[Any, Any] = {}
    for path in (WRITTEN / name).glob("*.msgpack"):
        theirs |= flatten_dict(flax.serialization.msgpack_restore(path.read_bytes()))
    assert_same(to_flax_params(load(WRITTEN / name)), unflatten_dict(theirs))


# Against transformers


def flax_tree(model: Any) -> dict[str, Any]:
    """The parameters of a model of PyTorch, as the Flax class of its family named and laid them."""
    tree = {}
    for name, tensor in model.state_dict().items():
        *modules, leaf = name.split(".")
        values = tensor.numpy()
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if leaf == "weight" and modules[-1] in {"wte", "wpe", "embed_tokens"}:
            leaf = "embedding"
        elif leaf == "weight" and modules[-1] in {"ln_1", "ln_2", "ln_f"}:
            leaf = "scale"
        elif leaf == "weight" and "norm" not in modules[-1]:
            leaf, values = "kernel", np.swapaxes(values, 0, 1).copy()
        tree[(*modules, leaf)] = values
    return unflatten_dict(tree)


@pytest.mark.parametrize("case", FLAX_CASES)
def test_logits_are_those_of_transformers(
    case: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    torch: Any = pytest.importorskip("torch", reason="PyTorch, which is compared with, is missing")
    transformers: Any = pytest.importorskip("transformers", reason="transformers is missing")
    values = CASES[case]
    config = transformers.AutoConfig.for_model(**{"bos_token_id": 1, "eos_token_id": 2} | values)
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = rng.normal(0, 0.15, parameter.shape).astype(np.float32)
            parameter.add_(torch.from_numpy(noise))
    model = load(write(tmp_path, flax_tree(theirs), values))
    tokens = rng.integers(0, model.config.vocab_size, (2, 40))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(logits_of(model, tokens) - expected).max() <= 2e-5 * np.abs(expected).max()
    assert_same(to_flax_params(model), flax_tree(theirs))


# How arrays lie in a file


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes(small: tuple[Path, Model], dtype: str) -> None:
    directory, model = small
    tree = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), to_flax_params(model))
    write(directory, tree, GPT2)
    found = load(directory)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), model.params)
    assert_same(found.params, jax.tree.map(lambda x: x.astype(np.float32), rounded))
    assert set(found.dtypes.values()) == {dtype}


def test_an_array_in_pieces(small: tuple[Path, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """As Flax writes those of more than 1 GiB."""
    directory, model = small
    whole = (directory / SINGLE).read_bytes()
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
    write(directory, to_flax_params(model), GPT2)
    assert (directory / SINGLE).read_bytes() != whole
    assert_same(load(directory).params, model.params)


def test_values_stay_in_the_file_until_they_are_used(small: tuple[Path, Model]) -> None:
    tensors = flax_files.open_directory(small[0])
    for name in ("transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"):
        values = tensors[name].read()
        while isinstance(values.base, np.ndarray) and not isinstance(values, np.memmap):
            values = values.base
        assert isinstance(values, np.memmap), name


def test_variables_with_the_name_of_their_collection(small: tuple[Path, Model]) -> None:
    directory, model = small
    write(directory, {"params": to_flax_params(model)}, GPT2)
    assert_same(load(directory).params, model.params)


def test_the_base_model_alone(small: tuple[Path, Model]) -> None:
    """FlaxGPT2Model has no head, and its names no prefix."""
    directory, model = small
    write(directory, to_flax_params(model)["transformer"], GPT2)
    assert_same(load(directory).params, model.params)


# Which files are read


def test_safetensors_come_first(small: tuple[Path, Model], tmp_path: Path) -> None:
    directory, model = small
    other = jax.tree.map(lambda x: x + 1, model.params)
    save_pretrained(Model(model.config, other, source=GPT2), directory)
    assert (directory / SINGLE).is_file()
    assert_same(load(directory).params, other)


@pytest.mark.parametrize("alone", [True, False])
def test_a_repository_on_the_hub(
    small: tuple[Path, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """Its msgpack files are asked for only where there are no others."""
    directory, model = small
    import huggingface_hub

    asked: list[list[str]] = []
    real = huggingface_hub.snapshot_download

    def download(name: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return real(name, cache_dir=str(tmp_path / "home" / "hub"), **options)

    if not alone:
        save_pretrained(model, directory)
    lay_out_cache("someone/old", directory, tmp_path / "home")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same(load("someone/old").params, model.params)
    assert any("msgpack" in pattern for patterns in asked for pattern in patterns) == alone


def test_the_command_converts(small: tuple[Path, Model], tmp_path: Path, command: Command) -> None:
    directory, model = small
    status, out, error = command("gptjax", "convert", directory, tmp_path / "new")
    assert status == 0, out + error
    assert (tmp_path / "new" / "model.safetensors").is_file()
    assert_same(load(tmp_path / "new").params, model.params)


def test_a_file_by_its_own_name(small: tuple[Path, Model]) -> None:
    with pytest.raises(UserError, match="give its folder"):
        load(small[0] / SINGLE)


# Shards


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    shutil.copytree(WRITTEN / "llama-sharded", tmp_path / "sharded")
    return tmp_path / "sharded"


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "flax_model-00002-of-00002.msgpack").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 2 weight files: flax_model-00002"):
        load(sharded)


@pytest.mark.parametrize("escape", ["../outside.msgpack", "/outside.msgpack", "a\\..\\..\\x"])
def test_a_shard_outside(sharded: Path, escape: str) -> None:
    shutil.copy(sharded / "flax_model-00001-of-00002.msgpack", sharded.parent / "outside.msgpack")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], escape)
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside its directory"):
        load(sharded)


def test_a_shard_without_what_the_index_says(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model/norm/more"] = "flax_model-00001-of-00002.msgpack"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="model/norm/more"):
        load(sharded)


# Damage


def refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The message of a refusal before anything is allocated."""

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("the fault should be found before anything is allocated")

    monkeypatch.setattr(huggingface, "import_params", too_late)
    with pytest.raises(UserError) as error:
        load(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("share", [0.999, 0.6, 0.001, 0.0])
def test_a_truncated_file(
    small: tuple[Path, Model], monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    path = small[0] / SINGLE
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    message = refused(small[0], monkeypatch)
    assert "incomplete" in message or "empty" in message
    assert "download it again" in message


def packed(value: Any) -> bytes:
    data = msgpack.packb(value)
    assert data is not None
    return data


def deep(levels: int) -> bytes:
    return b"\x81\xa1a" * levels + b"\xc0"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4f\nsize 5\n", "LFS"),
        (b"<!DOCTYPE html><html></html>" + b" " * 300, "web page"),
        (b"\x80\x04\x95" + bytes(500), "no tree"),  # A pickle's beginning, as an empty map.
        (b"\x93\x01\x02\x03", "no tree"),
        (packed({"a": [1, 2]}), "no tree"),
        (packed({"a": msgpack.ExtType(2, b"xyz")}), "no tree"),
        (packed({1: 2}), "no tree"),
        (packed({"a": 1}) + b"\x00", "no tree"),
        (deep(5000), "no tree"),
        (b"\x81\xa1a" + b"\x91" * 100_000 + b"\xc0", "no tree"),
        (b"\xdf\xff\xff\xff\xff", "incomplete"),
        (b"\x81\xdd\xff\xff\xff\xff" + bytes(50), "no tree"),
    ],
)
def test_something_else(
    small: tuple[Path, Model], monkeypatch: pytest.MonkeyPatch, content: bytes, words: str
) -> None:
    (small[0] / SINGLE).write_bytes(content)
    assert words in refused(small[0], monkeypatch)


def packed_array(shape: Any, dtype: Any, values: bytes) -> bytes:
    return packed({"a": msgpack.ExtType(1, packed((shape, dtype, values)))})


THREE = {"0": msgpack.ExtType(1, packed(((3,), "float32", bytes(12))))}


@pytest.mark.parametrize(
    "content",
    [
        packed_array((2, 3), "float32", bytes(20)),
        packed_array((-2, -3), "float32", bytes(24)),
        packed_array((2**40, 2**40), "float32", bytes(24)),
        packed_array("no shape", "float32", bytes(24)),
        packed_array((2, 3), 7, bytes(24)),
        packed_array((True, 6), "float32", bytes(24)),
        packed({"a": msgpack.ExtType(1, packed(((2, 3), "float32")))}),
        packed({"a": msgpack.ExtType(3, packed(((6,), "float32", bytes(24))))}),
        packed({"a": msgpack.ExtType(1, packed(((6,), "float32", "x" * 24)))}),
        packed({"a": msgpack.ExtType(1, b"\xdd\xff\xff\xff\xff")}),
        packed({"a": msgpack.ExtType(1, b"\x93\xdd\xff\xff\xff\xff")}),
        packed({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {}}}),
        packed({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": THREE}}),
    ],
)
def test_an_array_that_is_none(
    small: tuple[Path, Model], monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    (small[0] / SINGLE).write_bytes(content)
    message = refused(small[0], monkeypatch)
    assert "no tree of arrays" in message or "incomplete" in message


def test_random_damage_is_refused_or_only_changes_values(
    small: tuple[Path, Model], rng: np.random.Generator
) -> None:
    whole = np.frombuffer((small[0] / SINGLE).read_bytes(), np.uint8)
    # Where the structure is: bytes of names and headers are spread among the values.
    names = [whole.tobytes().find(name) for name in (b"wte", b"attn", b"kernel", b"float32")]
    for _ in range(300):
        content = whole.copy()
        near = int(rng.choice(names)) + int(rng.integers(-12, 24))
        content[max(near, 0)] = rng.integers(256)
        (small[0] / SINGLE).write_bytes(content.tobytes())
        with contextlib.suppress(UserError):
            for tensor in flax_files.open_directory(small[0]).values():
                if not isinstance(tensor.dtype, str):
                    assert tensor.read().shape == tensor.shape


def test_integers_are_no_weights(
    small: tuple[Path, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, model = small
    tree = to_flax_params(model)
    tree["transformer"]["ln_f"]["scale"] = np.ones(48, np.int8)
    write(directory, tree, GPT2)
    assert "dtype int8" in refused(directory, monkeypatch)


def test_tensors_of_another_model(small: tuple[Path, Model], monkeypatch: Any) -> None:
    directory, model = small
    tree = to_flax_params(model)
    del tree["transformer"]["h"]["2"]["ln_1"]["scale"]
    tree["transformer"]["h"]["0"]["attn"]["c_attn"]["kernel"] = np.zeros((48, 144), np.float32)
    write(directory, tree, GPT2)
    message = refused(directory, monkeypatch)
    assert "missing transformer.h.2.ln_1.weight" in message
    assert "transformer.h.0.attn.c_attn.weight is [144, 48], not [48, 144]" in message


# Trees in memory


def test_a_tree_in_memory(small: tuple[Path, Model], rng: np.random.Generator) -> None:
    _, model = small
    tree = flax.core.freeze(jax.tree.map(jnp.asarray, to_flax_params(model)))
    for given in (tree, {"params": tree}):
        found = gptjax.from_flax_params(given, GPT2 | {"transformers_version": "4.55.4"})
        assert found.config == model.config
        assert_same(found.params, model.params)


def test_a_tree_that_is_none() -> None:
    with pytest.raises(UserError, match="wte of the parameters is a str"):
        from_flax_params({"transformer": {"wte": "embedding"}}, GPT2)
    with pytest.raises(UserError, match="missing transformer"):
        from_flax_params({}, GPT2)
    with pytest.raises(UserError, match="'gptj' in the config given is not supported"):
        from_flax_params({}, {"model_type": "gptj"})


def test_a_family_without_a_flax_class() -> None:
    model, _ = seeded_model(CASES["qwen3"])
    with pytest.raises(UserError, match="no Flax class of qwen3"):
        gptjax.to_flax_params(model)


def test_a_tree_onto_many_devices_and_in_bfloat16(small: tuple[Path, Model]) -> None:
    _, model = small
    mesh = gptjax.make_mesh(data=-1)
    found = from_flax_params(to_flax_params(model), GPT2, mesh, dtype=jnp.bfloat16)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    assert_same(found.params, narrow)
