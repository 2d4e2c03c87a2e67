"""The families of published models that there are: the one list of adapters."""

from foundation.serialize import nearest
from lm.published import (
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    granitemoehybrid,
    kimi_linear,
    lfm2_moe,
    longcat_flash,
    minimax,
    nemotron_h,
    olmo_hybrid,
    olmoe,
    qwen3_moe,
    qwen3_next,
)
from lm.published.family import Family
from lm.published.wrapper import WRAPPERS

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        qwen3_moe.FAMILY,
        olmoe.FAMILY,
        qwen3_next.FAMILY,
        qwen3_next.QWEN3_5,
        gpt_oss.FAMILY,
        glm4_moe.FAMILY,
        olmoe.FLEX,
        deepseek_v3.FAMILY,
        deepseek_v3.LITE,
        kimi_linear.FAMILY,
        nemotron_h.FAMILY,
        granitemoehybrid.FAMILY,
        lfm2_moe.FAMILY,
        olmo_hybrid.FAMILY,
        longcat_flash.FAMILY,
        minimax.FAMILY,
    )
}


def family_of(values: object, place: str) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: for a model of another family, or what is no config; names the supported ones.
    """
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type not in FAMILIES:
        legal = (*FAMILIES, *WRAPPERS)
        raise ValueError(f"{place}: model_type = {model_type!r} is not supported; {nearest(str(model_type), legal)}")
    return FAMILIES[model_type]
