"""The families of published models that llama.cpp knows: the one list of what can be written for it."""

from foundation.serialize import nearest
from lm.config import ModelConfig
from lm.gguf_files.architecture import Architecture, dense_layers
from lm.gguf_files.latent import LATENT
from lm.gguf_files.recurrent import RECURRENT
from lm.gguf_files.softmax import SOFTMAX

ARCHITECTURES: dict[str, Architecture] = {**SOFTMAX, **RECURRENT, **LATENT}


def architecture_of(model_type: str, model: ModelConfig, place: str) -> Architecture:
    """The architecture of a family, for a model that it can compute.

    Raises:
        ValueError: for a family without one, and for what of the model it has not; names it.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(f"{place}: no GGUF file of {model_type} can be written; {nearest(model_type, ARCHITECTURES)}")
    found = ARCHITECTURES[model_type]
    if len(dense_layers(model)) == model.n_layers:
        if found.without_experts is None:
            raise ValueError(f"{place}: llama.cpp's {found.name} has no model without experts; legal: one with some")
        found = found.without_experts
    if wrong := found.check(model):
        raise ValueError(f"{place}: llama.cpp's {found.name} has no {'; no '.join(wrong)}")
    return found
