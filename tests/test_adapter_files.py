"""Adapters in PEFT's layout, against PEFT on transformers."""

import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, seeded_model

from gptjax.adapters import LoRA, join_params, merge_params, split_params, trainable_specs
from gptjax.data import BatchLoader
from gptjax.errors import UserError
from gptjax.fitting import fit
from gptjax.layouts import LowRank
from gptjax.model import Model, forward
from gptjax.optimizer import OptimizerConfig
from gptjax.params import Params, flat, param_specs
from gptjax.pretrained.adapter_files import load_adapter, lora_of, save_adapter
from gptjax.pretrained.huggingface import save_pretrained
from gptjax.pretrained.loading import load

NAMES = ("gpt2", "neox", "llama-biases", "qwen3")
EVERY_MODULE = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def drawn(model: Model, lora: LoRA, rng: np.random.Generator) -> Params:
    return jax.tree.map(
        lambda spec: jnp.asarray(rng.normal(0, 0.2, spec.shape), jnp.float32),
        trainable_specs(model.config, lora),
        is_leaf=lambda x: not isinstance(x, dict),
    )


def adapted(model: Model, trained: Params, lora: LoRA) -> Model:
    return replace(model, params=join_params(trained, model.params, lora))


def matrices(model: Model) -> tuple[str, ...]:
    specs = flat(param_specs(model.config))
    return tuple(path for path, spec in specs.items() if spec.kind == "matrix")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model, _ = seeded_model(CASES[name])
    targets = tuple(str(path) for path in rng.permutation(matrices(model))[: rng.integers(1, 5)])
    lora = LoRA(int(rng.integers(1, 5)), float(rng.uniform(1, 20)), targets)
    trained = drawn(model, lora, rng)
    save_adapter(adapted(model, trained, lora), tmp_path)
    read = load_adapter(tmp_path, model)
    wanted = join_params(trained, model.params, lora)
    assert set(lora_of(read.params).targets) == set(targets)
    assert lora_of(read.params).scale == pytest.approx(lora.scale)
    for path, leaf in flat(merge_params(read.params)).items():
        np.testing.assert_allclose(leaf, flat(merge_params(wanted))[path], atol=1e-5, err_msg=path)
    # A kernel of a module with others has the rank that it was trained with.
    for path, leaf in flat(read.params).items():
        if isinstance(leaf, LowRank):
            assert leaf.down.shape[-1] == lora.rank, path


def test_a_run_becomes_an_adapter(tmp_path: Path, rng: np.random.Generator, command: Any) -> None:
    model, _ = seeded_model(CASES["gpt2"])
    save_pretrained(model, tmp_path / "base")
    data = BatchLoader(rng.integers(0, 97, 1000), batch_size=2, context_length=32)
    lora = LoRA(2, 4.0, ("blocks.attention.query", "blocks.mlp.up"))
    result = fit(
        model.config,
        OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        data,
        steps=4,
        out=tmp_path / "run",
        params=model.params,
        trainable=lora,
        base=tmp_path / "base",
        progress=False,
    )
    status, _, error = command(
        "gptjax", "convert", tmp_path / "run", tmp_path / "adapter", "--adapter", True
    )
    assert (status, error) == (0, "")
    # The folder names its base, so that it loads by itself, merged.
    for path, leaf in flat(load(tmp_path / "adapter").params).items():
        np.testing.assert_allclose(leaf, flat(result.params)[path], atol=1e-6, err_msg=path)
    status, _, error = command(
        "gptjax", "convert", tmp_path / "base", tmp_path / "none", "--adapter", True
    )
    assert status == 2
    assert "no low-rank additions" in error
    # Training goes on from an adapter.
    again = load_adapter(tmp_path / "adapter", model)
    more = fit(
        model.config,
        OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        data,
        steps=1,
        out=tmp_path / "more",
        params=again.params,
        trainable=lora_of(again.params),
        progress=False,
    )
    trained, _ = split_params(again.params, lora_of(again.params), model.config, jax.random.key(0))
    for path, leaf in flat(more.state.params).items():
        assert 0 < np.abs(leaf - flat(trained)[path]).max() < 0.02, path


def test_an_adapter_on_the_hub(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    model, _ = seeded_model(CASES["gpt2"])
    lora = LoRA(2, 4.0, ("blocks.attention.query",))
    wanted = adapted(model, drawn(model, lora, rng), lora)
    save_adapter(wanted, tmp_path / "all", base="someone/base")
    save_pretrained(model, tmp_path / "base")

    def snapshot(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        folder = tmp_path / {"someone/adapter": "all", "someone/base": "base"}[name]
        kept = tmp_path / name
        kept.mkdir(parents=True)
        for file in folder.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, kept)
        return str(kept)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    read = flat(load("someone/adapter").params)
    for path, leaf in flat(merge_params(wanted.params)).items():
        np.testing.assert_allclose(read[path], leaf, atol=1e-5, err_msg=path)


def damaged(folder: Path, changes: dict[str, Any]) -> None:
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_other_adapters_are_refused(
    changes: dict[str, Any], says: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    model, _ = seeded_model(CASES["llama"])
    save_adapter(adapted(model, drawn(model, LoRA(2), rng), LoRA(2)), tmp_path)
    damaged(tmp_path, changes)
    with pytest.raises(UserError, match=says):
        load_adapter(tmp_path, model)


def test_adapters_of_other_models_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    model, _ = seeded_model(CASES["llama"])
    save_adapter(adapted(model, drawn(model, LoRA(2), rng), LoRA(2)), tmp_path)
    wider, _ = seeded_model(CASES["llama-tied-wide-heads"])
    with pytest.raises(UserError, match=r"q_proj is \[2, 48\] and \[48, 2\].*\[96, rank\]"):
        load_adapter(tmp_path, wider)
    other, _ = seeded_model(CASES["gpt2"])
    with pytest.raises(UserError, match="not of this model's matrices"):
        load_adapter(tmp_path, other)
    shallow = seeded_model(CASES["llama"] | {"num_hidden_layers": 2})[0]
    with pytest.raises(UserError, match=r"layers\.2"):
        load_adapter(tmp_path, shallow)
    with pytest.raises(UserError, match="as base"):
        load(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="download the adapter again"):
        load_adapter(tmp_path, model)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickled"):
        load_adapter(tmp_path, model)


class TestPEFT:
    """PEFT itself, where it is installed."""

    @pytest.fixture(autouse=True)
    def libraries(self) -> None:
        self.torch: Any = pytest.importorskip("torch")
        self.transformers: Any = pytest.importorskip("transformers")
        self.peft: Any = pytest.importorskip("peft")

    def logits(self, model: Any, tokens: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            return model.eval()(self.torch.from_numpy(tokens)).logits.numpy()

    def opened(self, folder: Path) -> Any:
        return self.transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager"
        )

    @pytest.mark.parametrize("name", NAMES)
    def test_peft_opens_what_is_written(
        self, name: str, tmp_path: Path, rng: np.random.Generator
    ) -> None:
        model, tokens = seeded_model(CASES[name])
        save_pretrained(model, tmp_path / "base")
        targets = tuple(str(p) for p in rng.permutation(matrices(model))[: rng.integers(1, 6)])
        lora = LoRA(3, 7.0, targets)
        trained = drawn(model, lora, rng)
        save_adapter(
            adapted(model, trained, lora), tmp_path / "adapter", base=str(tmp_path / "base")
        )
        opened = self.peft.PeftModel.from_pretrained(
            self.opened(tmp_path / "base"), tmp_path / "adapter"
        )
        expected = self.logits(opened, tokens)
        params = join_params(trained, model.params, lora)
        got = np.asarray(forward(params, jnp.asarray(tokens), model.config))
        assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()
        plain = np.asarray(forward(model.params, jnp.asarray(tokens), model.config))
        assert np.abs(plain - expected).max() > 1e-2 * np.abs(expected).max()

    @pytest.mark.parametrize("patterns", [False, True], ids=["plain", "patterns"])
    @pytest.mark.parametrize("name", NAMES)
    def test_what_peft_writes_is_read(
        self, name: str, patterns: bool, tmp_path: Path, rng: np.random.Generator
    ) -> None:
        model, tokens = seeded_model(CASES[name])
        save_pretrained(model, tmp_path / "base")
        modules = EVERY_MODULE.get(name, EVERY_MODULE["llama"])
        options: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": modules}
        if patterns:
            options |= {
                "use_rslora": True,
                "layers_to_transform": [0, 2],
                "rank_pattern": {modules[0]: 5},
                "alpha_pattern": {modules[-1]: 11, modules[0]: 2},
            }
        peft_model = self.peft.get_peft_model(
            self.opened(tmp_path / "base"),
            self.peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2", **options),
        )
        with self.torch.no_grad():
            for path, parameter in peft_model.named_parameters():
                if "lora_" in path:
                    noise = rng.normal(0, 0.2, parameter.shape).astype(np.float32)
                    parameter.copy_(self.torch.from_numpy(noise))
        peft_model.save_pretrained(tmp_path / "adapter")
        expected = self.logits(peft_model, tokens)
        read = load_adapter(tmp_path / "adapter", model)
        for params in (read.params, load(tmp_path / "adapter").params):
            got = np.asarray(forward(params, jnp.asarray(tokens), model.config))
            assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()
