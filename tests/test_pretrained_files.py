"""Weight files as they are found: whole, damaged, foreign, malicious, on many devices."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hub_cache import lay_out_cache
from small_models import GPT2, random_params

from gptjax.errors import UserError
from gptjax.model import Model, forward
from gptjax.params import flat, init_params
from gptjax.pretrained import hub, huggingface
from gptjax.pretrained.families import family_of, read_config
from gptjax.pretrained.family import canonical
from gptjax.pretrained.huggingface import save_pretrained
from gptjax.pretrained.loading import load
from gptjax.tokenizer import BPETokenizer, CharTokenizer

LLAMA = GPT2.replace(
    num_kv_heads=2,
    mlp_dim=48,
    position="rope",
    norm="rmsnorm",
    activation="silu",
    gated_mlp=True,
    use_bias=False,
    tie_embeddings=False,
)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@pytest.fixture
def gpt2(tmp_path: Path, rng: np.random.Generator) -> Path:
    return saved(GPT2, tmp_path / "gpt2", rng)


@pytest.fixture
def sharded(tmp_path: Path, rng: np.random.Generator) -> Path:
    directory = saved(LLAMA, tmp_path / "llama", rng, max_shard_size="20KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    return directory


def saved(config: Any, directory: Path, rng: np.random.Generator, **options: Any) -> Path:
    save_pretrained(Model(config, random_params(config, rng)), directory, **options)
    return directory


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def change_tensors(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = safetensors.numpy.load_file(directory / SINGLE)
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / SINGLE)


def refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The message of a refusal before anything is allocated."""

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("the fault should be found before anything is allocated")

    monkeypatch.setattr(huggingface, "import_params", too_late)
    with pytest.raises(UserError) as error:
        load(directory)
    message = str(error.value)
    assert "\n" not in message
    return message


def assert_same_params(one: Any, other: Any) -> None:
    assert flat(one).keys() == flat(other).keys()
    for path, leaf in flat(one).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(flat(other)[path]), path)


# Faults


@pytest.mark.parametrize("share", [0.5, 0.999, 0.01, 0.0])
def test_a_truncated_file(gpt2: Path, monkeypatch: Any, share: float) -> None:
    whole = (gpt2 / SINGLE).read_bytes()
    (gpt2 / SINGLE).write_bytes(whole[: int(len(whole) * share)])
    message = refused(gpt2, monkeypatch)
    assert "incomplete" in message
    assert str(gpt2 / SINGLE) in message
    assert "download" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4f\nsize 548105171\n", "LFS"),
        (b"\n  <!DOCTYPE html>\n<html><body>404</body></html>" + b" " * 500, "web page"),
        (b"PK\x03\x04" + bytes(1000), "pickle"),
        (b"\xff" * 1000, "not a safetensors file"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00[1, 2]" + b" " * 1000, "not a safetensors file"),
    ],
    ids=["lfs", "html", "zip", "noise", "no object"],
)
def test_another_file_under_the_name(
    gpt2: Path, monkeypatch: Any, content: bytes, words: str
) -> None:
    (gpt2 / SINGLE).write_bytes(content)
    assert words in refused(gpt2, monkeypatch)


def test_offsets_that_overlap(gpt2: Path, monkeypatch: Any) -> None:
    raw = (gpt2 / SINGLE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    text = json.dumps(header).encode()
    (gpt2 / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    assert "damaged" in refused(gpt2, monkeypatch)


def test_missing_shards_are_all_listed(sharded: Path, monkeypatch: Any) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    for shard in (shards[0], shards[2]):
        shard.unlink()
    message = refused(sharded, monkeypatch)
    assert f"2 of {len(shards)}" in message
    assert shards[0].name in message
    assert shards[2].name in message
    assert shards[1].name not in message


def test_a_shard_without_its_tensors(sharded: Path, monkeypatch: Any) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    shutil.copy(shards[1], shards[0])
    assert f"{shards[0].name} lacks tensors" in refused(sharded, monkeypatch)


def test_wrong_missing_and_unknown_tensors_are_all_listed(gpt2: Path, monkeypatch: Any) -> None:
    def change(tensors: dict[str, Any]) -> None:
        del tensors["transformer.h.1.ln_1.bias"]
        tensors["transformer.h.0.mlp.c_fc.weight"] = np.zeros((32, 5), np.float32)
        tensors["transformer.h.7.ln_1.bias"] = np.zeros(32, np.float32)

    change_tensors(gpt2, change)
    message = refused(gpt2, monkeypatch)
    for words in (
        "missing transformer.h.1.ln_1.bias [32]",
        "transformer.h.0.mlp.c_fc.weight is [32, 5], not [32, 128]",
        "unknown transformer.h.7.ln_1.bias [32]",
    ):
        assert words in message


def test_a_tied_head_may_be_there(gpt2: Path, monkeypatch: Any) -> None:
    without = load(gpt2)

    def add(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()

    change_tensors(gpt2, add)
    assert_same_params(load(gpt2).params, without.params)

    def contradict(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"][-1, -1] += 1e-3

    change_tensors(gpt2, contradict)
    message = refused(gpt2, monkeypatch)
    assert "lm_head.weight and transformer.wte.weight differ" in message
    assert "tie_word_embeddings" in message
    change_json(gpt2 / "config.json", lambda values: values.update(tie_word_embeddings=False))
    monkeypatch.undo()
    untied = load(gpt2)
    assert not np.array_equal(untied.params["head"]["kernel"], untied.params["embed"]["tokens"])


def test_an_untied_head_must_be_there(gpt2: Path, monkeypatch: Any) -> None:
    change_json(gpt2 / "config.json", lambda values: values.update(tie_word_embeddings=False))
    assert "missing lm_head.weight" in refused(gpt2, monkeypatch)


class Exploit:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_read(gpt2: Path, monkeypatch: Any, name: str) -> None:
    touched = gpt2 / "touched"
    (gpt2 / SINGLE).unlink()
    (gpt2 / name).write_bytes(pickle.dumps(Exploit(touched)))
    message = refused(gpt2, monkeypatch)
    assert name in message
    assert "save_pretrained" in message
    assert name in refused(gpt2 / name, monkeypatch)
    (gpt2 / name).rename(gpt2 / SINGLE)
    refused(gpt2, monkeypatch)
    assert not touched.exists()


@pytest.mark.parametrize("escape", ["../other/x.safetensors", "a/../../x", "{absolute}", "..\\x"])
def test_an_index_cannot_point_outside(
    sharded: Path, tmp_path: Path, monkeypatch: Any, escape: str
) -> None:
    outside = tmp_path / "other" / "x.safetensors"
    outside.parent.mkdir()
    shutil.copy(sorted(sharded.glob("model-*.safetensors"))[0], outside)
    name = escape.format(absolute=outside)

    def point(values: dict[str, Any]) -> None:
        first = next(iter(values["weight_map"]))
        values["weight_map"][first] = name

    change_json(sharded / INDEX, point)
    assert "outside its directory" in refused(sharded, monkeypatch)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("activation_function", "mish", ["activation_function='mish'", "gelu_new"]),
        ("add_cross_attention", True, ["add_cross_attention=True"]),
        ("router_aux_loss", 0.5, ["router_aux_loss=0.5", "not honoured"]),
        ("model_type", "gpt3", ["'gpt3'", "did you mean 'gpt2'"]),
        ("model_type", None, ["None", "supported"]),
        ("quantization_config", {"bits": 4}, ["quantized"]),
        ("n_layer", "two", ["n_layer", "'two'"]),
        ("n_head", 5, ["num_heads 5"]),
    ],
)
def test_gpt2_config_keys(
    gpt2: Path, monkeypatch: Any, key: str, value: Any, words: list[str]
) -> None:
    change_json(gpt2 / "config.json", lambda values: values.update({key: value}))
    message = refused(gpt2, monkeypatch) if value is not None else _refused_config(gpt2, key)
    for word in words:
        assert word in message


def _refused_config(directory: Path, key: str) -> str:
    values = json.loads((directory / "config.json").read_text())
    with pytest.raises(UserError) as error:
        read_config(values, "config.json")
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'", "linear", "yarn"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["'longrope'"]),
        ({"rope_scaling": {"type": "linear"}}, ["lacks its factor"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_medium": 3}}, ["beta_medium"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["disagree"]),
        ({"rope_theta": 3.0}, ["rope_theta is 3.0", "10000.0"]),
        ({"hidden_act": "xielu"}, ["hidden_act='xielu'"]),
        ({"model_type": "mistral", "layer_types": ["chunked"] * 2}, ["layer_types"]),
    ],
)
def test_llama_config_keys(
    sharded: Path, monkeypatch: Any, changes: dict[str, Any], words: list[str]
) -> None:
    def change(values: dict[str, Any]) -> None:
        values.update(changes)
        scaling = changes.get("rope_scaling")
        if scaling is not None and words != ["disagree"]:
            del values["rope_parameters"]
        if "model_type" in changes:
            for key in ("attention_bias", "mlp_bias"):
                del values[key]

    change_json(sharded / "config.json", change)
    message = refused(sharded, monkeypatch)
    for word in words:
        assert word in message


def test_broken_json(gpt2: Path) -> None:
    (gpt2 / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        load(gpt2)


def test_a_directory_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checkpoint"):
        load(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match="no folder of a model"):
        load(tmp_path / "x.txt")


def test_a_tokenizer_of_another_model(gpt2: Path) -> None:
    from gptjax.pretrained.tokenizer_files import write_tokenizer

    write_tokenizer(CharTokenizer("".join(map(chr, range(40, 80)))), gpt2)
    with pytest.raises(UserError, match=r"40 tokens .* vocabulary of 31"):
        load(gpt2)


def test_an_added_token_beyond_the_vocabulary_does_no_harm(gpt2: Path) -> None:
    import tokenizers

    from gptjax.pretrained.tokenizer_files import write_tokenizer

    library = tokenizers.Tokenizer(
        tokenizers.models.BPE({chr(97 + n): n for n in range(26)}, [], fuse_unk=False)
    )
    library.add_special_tokens([f"<{n}>" for n in range(6)])
    write_tokenizer(BPETokenizer(library, None), gpt2)
    tokenizer = load(gpt2).tokenizer
    assert tokenizer is not None
    assert tokenizer.vocab_size == 32 == GPT2.vocab_size + 1


def test_weights_without_a_tokenizer_that_cannot_be_read(gpt2: Path) -> None:
    (gpt2 / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    with pytest.raises(UserError, match=r"tokenizer=False"):
        load(gpt2)
    assert load(gpt2, tokenizer=False).tokenizer is None


def test_json_that_is_a_pointer(gpt2: Path) -> None:
    (gpt2 / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4")
    with pytest.raises(UserError, match="git lfs pull"):
        load(gpt2)


# The hub


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["config.json", "pytorch_model.bin"], "pickled weights alone"),
        (["a.Q4_K.gguf", "README.md"], r"hf download someone/model a\.Q4_K\.gguf"),
        (["adapter_config.json", "adapter_model.bin"], "pickled weights alone"),
        (["README.md"], "no safetensors"),
    ],
)
def test_a_repository_without_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], words: str
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: files)
    with pytest.raises(UserError, match=words):
        load("someone/model")


def test_a_full_disk_is_not_called_a_missing_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="No space left"):
        load("someone/model")


OFFLINE = """
import sys
import numpy as np
import gptjax
try:
    model = gptjax.load(sys.argv[1])
except gptjax.UserError as error:
    print("refused:", error)
else:
    print("sum", float(np.abs(np.asarray(model.params["embed"]["tokens"])).sum()))
"""


def offline(name: str, home: Path) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return done.stdout


def test_the_hubs_cache_offline(sharded: Path, tmp_path: Path) -> None:
    lay_out_cache("someone/small-llama", sharded, tmp_path / "home")
    total = float(np.abs(np.asarray(load(sharded).params["embed"]["tokens"])).sum())
    assert offline("someone/small-llama", tmp_path / "home").startswith("sum")
    assert float(offline("someone/small-llama", tmp_path / "home").split()[1]) == total
    message = offline("someone/other", tmp_path / "home")
    assert message.startswith("refused: someone/other does not exist here")
    assert "hf download someone/other" in message


def test_a_gated_and_an_unknown_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None)
    for kind, words in (
        (errors.GatedRepoError, "terms"),
        (errors.RepositoryNotFoundError, "hub has no"),
        (errors.RevisionNotFoundError, "revision 'v9'"),
        (errors.LocalEntryNotFoundError, "cannot be reached"),
    ):

        def fail(*_: Any, kind: Any = kind, **__: Any) -> None:
            raise kind("no", response=response) if "Local" not in kind.__name__ else kind("no")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(UserError, match=words):
            hub.find("someone/model", "v9")


def test_names_that_are_no_repository() -> None:
    for name in ("runs/nothing-here", "./nothing", "a b/c", "x/y/z", "model.gguf", "a/b.bin"):
        with pytest.raises(UserError, match="does not exist"):
            hub.find(name)


# What loads


def test_other_spellings_of_the_names(gpt2: Path) -> None:
    model = load(gpt2)

    def change(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            mask = np.tril(np.ones((1, 1, 16, 16), np.uint8))
            tensors[f"h.{layer}.attn.bias"] = mask
            tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)

    change_tensors(gpt2, change)
    assert_same_params(load(gpt2).params, model.params)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_small_dtypes_go_and_come_bit_for_bit(gpt2: Path, tmp_path: Path, dtype: Any) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].astype(dtype)

    change_tensors(gpt2, change)
    name = np.dtype(dtype).name
    change_json(gpt2 / "config.json", lambda values: values.update(dtype=name))
    model = load(gpt2)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model.params))
    save_pretrained(model, tmp_path / "again")
    before = safetensors.numpy.load_file(gpt2 / SINGLE)
    after = safetensors.numpy.load_file(tmp_path / "again" / SINGLE)
    for tensor, values in before.items():
        assert after[tensor].dtype == values.dtype
        assert after[tensor].tobytes() == values.tobytes()
    half = load(gpt2, dtype="bfloat16")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(half.params))


def test_tensors_keep_the_dtypes_that_they_came_in(gpt2: Path, tmp_path: Path) -> None:
    """Whatever config.json says, and each its own."""

    def change(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if tensors[name].ndim == 2:
                tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    change_tensors(gpt2, change)
    change_json(gpt2 / "config.json", lambda values: values.update(dtype="float16"))
    save_pretrained(load(gpt2), tmp_path / "again")
    before = safetensors.numpy.load_file(gpt2 / SINGLE)
    after = safetensors.numpy.load_file(tmp_path / "again" / SINGLE)
    for tensor, values in before.items():
        assert after[tensor].dtype == values.dtype
        assert after[tensor].tobytes() == values.tobytes()
    one, other = (path / "config.json" for path in (gpt2, tmp_path / "again"))
    assert json.loads(one.read_text()) == json.loads(other.read_text())


def test_weights_that_were_changed_lose_nothing(gpt2: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float16)

    change_tensors(gpt2, change)
    model = load(gpt2)
    tuned = dataclasses.replace(model, params=jax.tree.map(lambda x: x + 1e-5, model.params))
    save_pretrained(tuned, tmp_path / "tuned")
    assert_same_params(load(tmp_path / "tuned").params, tuned.params)
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["dtype"] == "float32"


def test_an_export_leaves_nothing_of_another_tokenizer(gpt2: Path) -> None:
    (gpt2 / "chat_template.jinja").write_text("STALE")
    model = load(gpt2)
    tokenizer = BPETokenizer.train(["abc"], 257)
    config = model.config.replace(vocab_size=257)
    params = random_params(config, np.random.default_rng(0))
    save_pretrained(Model(config, params, tokenizer), gpt2)
    again = load(gpt2).tokenizer
    assert isinstance(again, BPETokenizer)
    assert again.chat_template is None


def test_quantized_integers_are_refused(gpt2: Path, monkeypatch: Any) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("c_fc.weight"):
                tensors[name] = tensors[name].astype(np.int8)

    change_tensors(gpt2, change)
    assert "of dtype I8" in refused(gpt2, monkeypatch)


def test_what_is_loaded_does_not_change_with_the_file(gpt2: Path) -> None:
    model = load(gpt2)
    before = jax.tree.map(lambda leaf: np.array(leaf), model.params)
    with (gpt2 / SINGLE).open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 8)
        file.write(b"\x55" * (size - size // 8))
    assert_same_params(model.params, before)


def test_an_export_takes_the_place_of_one_in_shards(sharded: Path, rng: Any) -> None:
    model = Model(LLAMA, random_params(LLAMA, rng))
    save_pretrained(model, sharded)
    assert [path.name for path in sharded.glob("model*")] == [SINGLE]
    assert_same_params(load(sharded).params, model.params)
    save_pretrained(model, sharded, max_shard_size="0.02MB")
    assert not (sharded / SINGLE).exists()
    assert_same_params(load(sharded).params, model.params)
    index = json.loads((sharded / INDEX).read_text())
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert index["metadata"]["total_size"] == held


def test_export_refuses_what_no_family_has(tmp_path: Path, rng: Any) -> None:
    config = GPT2.replace(qk_norm=True)
    with pytest.raises(UserError, match="qk_norm=True"):
        save_pretrained(Model(config, random_params(config, rng)), tmp_path)
    model = Model(GPT2, random_params(GPT2, rng))
    with pytest.raises(UserError, match="float61"):
        save_pretrained(model, tmp_path, dtype="float61")
    with pytest.raises(UserError, match="max_shard_size"):
        save_pretrained(model, tmp_path, max_shard_size="much")


def test_a_trained_model_with_its_characters(tmp_path: Path, rng: Any) -> None:
    tokenizer = CharTokenizer("".join(map(chr, range(60, 91))))
    model = Model(GPT2, random_params(GPT2, rng), tokenizer)
    save_pretrained(model, tmp_path)
    again = load(tmp_path)
    assert_same_params(again.params, model.params)
    assert canonical(again.config) == canonical(model.config)
    assert again.tokenizer is not None
    assert again.tokenizer.encode("ABBA") == tokenizer.encode("ABBA")


def test_the_family_of_a_preset() -> None:
    from gptjax.config import preset

    assert family_of(preset("gpt2-xl")).model_type == "gpt2"
    assert family_of(preset("llama3-8b")).model_type == "llama"


# Many devices, little memory

MESH = """
import sys
import jax, numpy as np
import gptjax
jax.config.update("jax_num_cpu_devices", 8)
from gptjax.params import flat, param_shardings
mesh = gptjax.make_mesh(data=2, fsdp=2, tensor=2)
one, many = gptjax.load(sys.argv[1]), gptjax.load(sys.argv[1], mesh)
places = flat(param_shardings(one.config, mesh))
for path, leaf in flat(many.params).items():
    assert leaf.sharding == places[path], (path, leaf.sharding, places[path])
    assert np.array_equal(np.asarray(leaf), np.asarray(flat(one.params)[path])), path
assert any(not place.is_fully_replicated for place in places.values())
print("same")
"""


def test_onto_a_mesh(tmp_path: Path, rng: np.random.Generator) -> None:
    for config in (GPT2.replace(vocab_size=32), LLAMA.replace(vocab_size=32)):
        directory = saved(config, tmp_path / "model", rng)
        done = subprocess.run(
            [sys.executable, "-c", MESH, str(directory)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.stdout == "same\n", done.stderr


MEMORY = """
import sys, threading, time
import jax
import gptjax

def anonymous():
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024

gptjax.load(sys.argv[2])  # Everything imported and warm.
base, peak, running = anonymous(), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
model = gptjax.load(sys.argv[1])
jax.block_until_ready(model.params)
running = False
watcher.join()
print(peak - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_peak_memory(tmp_path: Path, rng: np.random.Generator, gpt2: Path, family: str) -> None:
    """At most the model, its largest tensor and a tenth of the model, in anonymous memory."""
    shape = {"embed_dim": 768, "num_heads": 12, "num_layers": 12, "context_length": 1024}
    config = GPT2.replace(**shape, vocab_size=50257)
    if family == "llama":
        config = LLAMA.replace(**shape, vocab_size=50257, num_kv_heads=12, mlp_dim=2048)
    params = init_params(config, jax.random.key(0))
    save_pretrained(Model(config, params), tmp_path / "large")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = 50257 * 768 * 4
    del params
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "large"), str(gpt2)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    beyond = int(done.stdout) - size
    print(f"model {size / 1e6:.0f} MB, beyond it {beyond / 1e6:.0f} MB")
    assert beyond <= largest + size / 10


def test_forward_is_that_of_the_model_saved(sharded: Path, rng: Any) -> None:
    tokens = jnp.asarray(rng.integers(0, 31, (2, 16)))
    model = load(sharded)
    again = load(sharded, dtype="float32")
    np.testing.assert_array_equal(
        forward(model.params, tokens, model.config), forward(again.params, tokens, again.config)
    )
