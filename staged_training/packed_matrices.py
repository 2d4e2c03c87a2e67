"""Which matrices the parameters of a model hold: experts, and projections that lie side by side in one parameter.

An optimizer that treats a matrix as one thing has to know where it ends; to AdamW it makes no difference.
"""

import dataclasses

from torch import Tensor

from attention.delta_layer import DeltaLayer
from attention.kind import AttentionLayer
from attention.latent import LatentAttention
from attention.lightning import LightningAttention
from attention.mamba2 import Mamba2, mamba_widths
from attention.mixed import MixedAttention
from attention.projection import Projection
from attention.short_conv import ShortConvolution
from attention.softmax import SoftmaxAttention
from lm.model import LanguageModel

# By the last part of their name, because experts that are spread over processes are of another class.
GATE_AND_UP, ALONE = ("w_gate_up_EDF2", "w_gate_up_DF2"), ("w_down_EFD", "w_down_FD", "latent_in_DL", "latent_out_LD")
ROUTER = ("weight_ED", "null_weight_ZD")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """Matrices side by side along the dimension of their outputs, all of them once per expert where there are experts.

    Attributes:
        out_dim: -2 for weights [out, in] (y = W x), -1 for [in, out] (y = x W).
        widths: outputs of each matrix; they add up to the parameter's size in that dimension.
    """

    out_dim: int
    widths: tuple[int, ...]

    def split(self, parameter: Tensor) -> list[Tensor]:
        """A view [experts or 1, rows, columns] of each matrix."""
        stacked = parameter if parameter.dim() == 3 else parameter[None]
        return list(stacked.split(self.widths, dim=self.out_dim))


def packed_matrices(model: LanguageModel, *, routers: bool) -> dict[str, Packing]:
    """What each parameter that holds matrices is made of, by its name.

    Embedding and head are lists of vectors, one per token, and the short convolution's weights lists of filters, one
    per channel: no matrices in this sense.

    Args:
        routers: those of the routers too.
    """
    found: dict[str, Packing] = {}
    for path, module in model.named_modules():
        if isinstance(module, AttentionLayer) and (widths := _inner_widths(module)):
            found[f"{path}.to_inner.weight"] = Packing(out_dim=-2, widths=widths)
        elif isinstance(module, Projection):
            found.setdefault(f"{path}.weight", Packing(out_dim=-2, widths=(module.out_features,)))
    for path, parameter in model.named_parameters():
        name, n_out = path.rpartition(".")[2], parameter.shape[-1]
        if name in GATE_AND_UP:
            # Without gates there is one matrix.
            gated = getattr(model.get_submodule(path.rpartition(".")[0]), "gated", True)
            found[path] = Packing(out_dim=-1, widths=(n_out // 2, n_out // 2) if gated else (n_out,))
        elif name in ALONE:
            found[path] = Packing(out_dim=-1, widths=(n_out,))
        elif name in ROUTER and routers:
            found[path] = Packing(out_dim=-2, widths=(parameter.shape[0],))
    return found


def _inner_widths(layer: AttentionLayer) -> tuple[int, ...]:
    """Outputs of each map that a layer's `to_inner` computes: queries, keys, values, gates. None of a layer of another
    kind than these, whose projections are taken for one matrix each."""
    H, K, V = layer.config.linear_shape
    linear = [H * K, H * K, H * V]
    if isinstance(layer, SoftmaxAttention):
        widths = layer.widths
    elif isinstance(layer, LightningAttention):
        widths = [*linear, H * V]
    elif isinstance(layer, DeltaLayer):
        widths = [*layer.config.conv_widths, *layer.widths[1:]]
    elif isinstance(layer, MixedAttention):
        J, K, V = layer.linear_shape
        widths = [*layer.widths[:4], J * K, J * K, J * V, layer.widths[5]]
    elif isinstance(layer, Mamba2):
        widths = [*mamba_widths(layer.config), *layer.widths[1:]]
    elif isinstance(layer, LatentAttention | ShortConvolution):
        widths = layer.widths
    else:
        widths = []
    return tuple(width for width in widths if width)
