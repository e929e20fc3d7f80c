"""Configurations and meshes: what is counted, what is refused, and what the refusal says."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from small_models import GPT2, MODERN

from gptjax.config import EXECUTION_FIELDS, PRESETS, ModelConfig, preset
from gptjax.errors import UserError
from gptjax.params import count_params, init_params, param_shardings, param_specs
from gptjax.sharding import MESH_AXES, like_params, make_mesh


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama2-7b", 6_738_415_616),
        ("llama3-8b", 8_030_261_248),
    ],
)
def test_presets_have_the_published_sizes(name: str, count: int) -> None:
    assert count_params(preset(name)) == count


@pytest.mark.parametrize("config", [GPT2, MODERN, MODERN.replace(gated_mlp=True, norm_gain=True)])
def test_the_declaration_is_what_is_drawn(config: ModelConfig) -> None:
    params = init_params(config, jax.random.key(0))
    leaves = jax.tree.leaves(params)
    assert sum(leaf.size for leaf in leaves) == count_params(config)
    specs = jax.tree.leaves(param_specs(config), is_leaf=dataclasses.is_dataclass)
    for leaf, spec in zip(leaves, specs, strict=True):
        assert leaf.shape == spec.shape
        assert leaf.dtype == np.float32
        assert len(spec.axes) == len(spec.shape)
        if spec.init == "normal":
            assert np.std(np.asarray(leaf)) == pytest.approx(spec.std, rel=0.15)


def test_a_parameter_depends_on_the_key_and_its_name_alone() -> None:
    key = jax.random.key(3)
    plain, wider = init_params(GPT2, key), init_params(GPT2.replace(tie_embeddings=False), key)
    for path, leaf in jax.tree_util.tree_leaves_with_path(plain):
        other = dict(jax.tree_util.tree_leaves_with_path(wider))[path]
        np.testing.assert_array_equal(leaf, other)
    again = init_params(GPT2, jax.random.key(4))
    assert not np.array_equal(again["embed"]["tokens"], plain["embed"]["tokens"])
    query, key_ = plain["blocks"]["attention"]["query"], plain["blocks"]["attention"]["key"]
    assert not np.array_equal(query, key_)


def test_dicts_and_hashes() -> None:
    for config in PRESETS.values():
        assert ModelConfig.from_dict(config.to_dict()) == config
        assert hash(ModelConfig.from_dict(config.to_dict())) == hash(config)
    assert {field.name for field in dataclasses.fields(ModelConfig)} >= EXECUTION_FIELDS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 5}, ["embed_dim 32", "num_heads 5", "[1, 2, 4, 8, 16, 32]"]),
        ({"num_kv_heads": 3}, ["num_heads 4", "num_kv_heads 3", "[1, 2, 4]"]),
        ({"position": "rope", "head_dim": 7}, ["7", "odd"]),
        ({"num_layer": 3}, ["num_layer", "did you mean 'num_layers'"]),
        ({"norm": "rmsnrom"}, ["rmsnrom", "did you mean 'rmsnorm'"]),
        ({"activation": "swish!"}, ["swish!", "silu"]),
        ({"dropout": 1.0}, ["dropout", "1.0"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
        ({"logit_softcap": -1.0}, ["logit_softcap", "-1.0"]),
        ({"num_experts": 4, "experts_per_token": 5}, ["experts_per_token is 5", "is 4"]),
        ({"shared_experts": 1}, ["shared_experts is 1", "num_experts"]),
        ({"remat": "half"}, ["half", "full"]),
    ],
)
def test_illegal_configs_are_refused_by_name(changes: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        GPT2.replace(**changes)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    with pytest.raises(UserError):
        ModelConfig.from_dict(GPT2.to_dict() | changes)


def test_an_odd_width_is_no_matter_without_rope() -> None:
    assert GPT2.replace(head_dim=7).head_width == 7


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'char-gpt-modern'"):
        preset("char-gpt-moderm")


def test_meshes_that_do_not_fit_are_refused() -> None:
    one = jax.devices()[:1]
    with pytest.raises(UserError, match=r"data 2 × fsdp 3 makes 6 devices, but there are 1"):
        make_mesh(data=2, fsdp=3, devices=one)
    with pytest.raises(UserError, match="2 does not divide 1 devices"):
        make_mesh(data=2, fsdp=-1, devices=one)
    with pytest.raises(UserError, match="one may be -1"):
        make_mesh(data=-1, fsdp=-1, devices=one)
    with pytest.raises(UserError, match="at least 1"):
        make_mesh(data=0, devices=one)
    mesh = make_mesh(fsdp=-1, devices=one)
    assert mesh.axis_names == MESH_AXES
    assert mesh.size == 1


def abstract_mesh(**axes: int) -> AbstractMesh:
    return AbstractMesh(tuple(axes.get(name, 1) for name in MESH_AXES), MESH_AXES)


def test_a_dimension_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError) as error:
        param_shardings(GPT2.replace(embed_dim=36), abstract_mesh(fsdp=8))
    message = str(error.value)
    for word in ("blocks.attention", "'embed'", "36", "fsdp = 8", "[1, 2, 3, 4, 6, 9, 12, 18, 36]"):
        assert word in message
    with pytest.raises(UserError, match=r"heads' of size 4 .*tensor = 8.*\[1, 2, 4\]"):
        param_shardings(GPT2, abstract_mesh(tensor=8))
    with pytest.raises(UserError, match=r"'kv_heads' of size 2 .*tensor = 4.*\[1, 2\]"):
        param_shardings(GPT2.replace(num_kv_heads=2), abstract_mesh(tensor=4))
    with pytest.raises(UserError, match=r"'layers' of size 2 .*stage = 4"):
        param_shardings(GPT2, abstract_mesh(stage=4))
    with pytest.raises(UserError, match=r"'experts' of size 6 .*expert = 4"):
        param_shardings(GPT2.replace(num_experts=6), abstract_mesh(expert=4))


def test_every_matrix_is_split_over_fsdp_and_tensor() -> None:
    # The number of tokens, 31, divides by nothing.
    shardings = param_shardings(GPT2, abstract_mesh(fsdp=4, tensor=2))
    assert shardings["embed"]["tokens"].spec == PartitionSpec(None, ("tensor", "fsdp"))
    blocks = shardings["blocks"]
    assert blocks["attention"]["query"].spec == PartitionSpec("stage", "fsdp", "tensor", None)
    assert blocks["attention"]["out"].spec == PartitionSpec("stage", "tensor", None, "fsdp")
    assert blocks["mlp"]["down"].spec == PartitionSpec("stage", "tensor", "fsdp")


def test_trees_like_the_parameters_lie_like_them() -> None:
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, np.float32)
    params = {"a": {"w": shape(4, 2)}, "w": shape(3)}
    places = {"a": {"w": "A"}, "w": "W"}
    tree = (shape(), {"mu": params, "nu": params}, {"a": {"w": shape(4, 1)}}, [shape(3)])
    expected = ("other", {"mu": places, "nu": places}, {"a": {"w": "other"}}, ["other"])
    assert like_params(tree, params, places, "other") == expected
