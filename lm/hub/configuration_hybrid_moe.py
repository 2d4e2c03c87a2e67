"""Configuration of an exported hybrid-attention mixture-of-experts model. Needs transformers and nothing else: the file
travels with the weights."""

from typing import Any

from transformers import PreTrainedConfig

# What a layer keeps in transformers' cache, by its letter; a layer that reads another's keys and values keeps nothing.
CACHED = {
    **{"F": "full_attention", "S": "sliding_attention", "R": "moe", "r": "moe"},
    **dict.fromkeys("LGKD", "linear_attention"),
    **{"A": "full_attention", "M": "hybrid", "C": "conv"},
}


class HybridMoEConfig(PreTrainedConfig):
    """A decoder whose blocks mix attention of several kinds with experts.

    Attributes:
        blocks: one description per block, lowest first: "letter" of its attention, "norm" ("pre", "post", "sandwich"),
            "source" (the block whose keys and values it reads; itself unless its letter is R or r), "attention",
            "experts" and "router" with their sizes and options.
        norm_eps: added to the mean square in the norms over the residual stream.
        unit_offset: their weights are what the scale has beyond one.
        compute_dtype: of activations; parameters are cast to it as they enter a product, the residual stream is fp32.
    """

    model_type = "hybrid_moe_lab"
    keys_to_ignore_at_inference = ("past_key_values", "cache")

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 128,
        blocks: list[dict[str, Any]] | None = None,
        norm_eps: float = 1e-5,
        unit_offset: bool = False,
        compute_dtype: str = "float32",
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.blocks = list(blocks or [])
        self.norm_eps, self.unit_offset, self.compute_dtype = norm_eps, unit_offset, compute_dtype
        # What transformers' cache and tools ask a configuration for follows from the blocks.
        self.num_hidden_layers = len(self.blocks)
        self.layer_types = [CACHED[block["letter"]] for block in self.blocks]
        softmax = next((block["attention"] for block in self.blocks if block["letter"] in "FSAM"), None)
        self.num_attention_heads = softmax["n_heads"] if softmax else 1
        self.num_key_value_heads = softmax["n_kv_heads"] if softmax else 1
        windows = [block["attention"]["window"] for block in self.blocks if block["letter"] == "S"]
        self.sliding_window = windows[0] if windows else None
        for derived in ("num_hidden_layers", "layer_types", "num_attention_heads", "num_key_value_heads"):
            kwargs.pop(derived, None)
        kwargs.pop("sliding_window", None)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
