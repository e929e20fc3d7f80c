"""All model families, by the `model_type` of their config.json."""

from gptjax.config import ModelConfig
from gptjax.errors import UserError, nearest
from gptjax.pretrained import gpt2, gpt_neox, llama, mistral, qwen
from gptjax.pretrained.family import ConfigReader, Family, canonical, differences

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        gpt2.FAMILY,
        gpt_neox.FAMILY,
        llama.FAMILY,
        mistral.FAMILY,
        qwen.QWEN2,
        qwen.QWEN3,
    )
}


def read_config(values: dict, where: str) -> tuple[Family, ModelConfig]:
    """The family and the model that the values of a config.json describe.

    Raises:
        UserError: if the family is not known, or a key would change the model and is not honoured.
    """
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"model_type {kind!r} in {where} is not supported{nearest(str(kind), FAMILIES)} "
            f"(supported: {', '.join(sorted(FAMILIES))})"
        )
    if values.get("quantization_config"):
        raise UserError(
            f"{where} says that the weights are quantized (quantization_config); give the "
            "repository of the unquantized ones"
        )
    family = FAMILIES[kind]
    reader = ConfigReader(values, where)
    config = family.read(reader)
    reader.finish()
    return family, config


def family_of(config: ModelConfig, prefer: str | None = None) -> Family:
    """The family in whose layout a model can be written.

    Args:
        config: the model.
        prefer: the family to try first.

    Raises:
        UserError: if no family has all that the model has; says what stands in the way.
    """
    wanted = canonical(config)
    obstacles = {}
    first = [FAMILIES[prefer]] if prefer in FAMILIES else []
    for family in [*first, *FAMILIES.values()]:
        written = canonical(family.read(ConfigReader(family.write(config))))
        # What a family writes and reads back is the model itself, or lacks what it cannot say.
        missing = differences(wanted, written)
        if not missing:
            return family
        obstacles[family.model_type] = missing
    nearest_type = min(obstacles, key=lambda name: len(obstacles[name]))
    raise UserError(
        "no layout of Hugging Face's fits this model; the nearest, "
        f"{nearest_type}, has no {', '.join(obstacles[nearest_type])}"
    )
