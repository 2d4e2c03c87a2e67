"""A published config.json, read so that no field of it goes unnoticed: each is read by the family's adapter, or listed
as one that makes no difference here, or refused by name."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")
MISSING = object()

# What says how a model was made, stored or served, and nothing about what it computes.
WITHOUT_EFFECT = frozenset(
    {
        *("architectures", "model_type", "transformers_version", "_name_or_path", "auto_map", "use_cache"),
        *("initializer_range", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("output_router_logits", "output_hidden_states", "output_attentions", "return_dict", "id2label", "label2id"),
        *("problem_type", "chunk_size_feed_forward", "is_encoder_decoder", "_attn_implementation"),
        *("_experts_implementation", "pretraining_tp", "is_decoder", "torchscript", "use_bfloat16"),
    }
)


class Fields:
    """The fields of a config.json.

    Args:
        values: as the file has them.
        place: what errors call the file.
        aliases: other names that a field may have, by the name it is read under.
    """

    def __init__(
        self, values: Mapping[str, Any], place: str, aliases: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        self.values, self.place, self.aliases = values, place, aliases or {}
        self._read: set[str] = set()

    def get(self, name: str, kind: type[Value], default: Any = MISSING) -> Value:
        """The value of a field; `default` where it is missing or null.

        Raises:
            ValueError: for a value of another type, or a missing field without default; names place and field.
        """
        names = (name, *self.aliases.get(name, ()))
        self._read.update(names)
        found = next((self.values[known] for known in names if self.values.get(known) is not None), None)
        if found is None:
            if default is MISSING:
                raise ValueError(f"{self.place}: {name} is missing; legal: a value of type {kind.__name__}")
            return default
        # JSON has one kind of number.
        value = float(found) if kind is float and type(found) is int else found
        if type(value) is not kind:
            raise ValueError(f"{self.place}: {name} = {found!r}; legal: a value of type {kind.__name__}")
        return value  # pyright: ignore[reportReturnType]

    def only(self, name: str, *legal: Any) -> None:
        """Refuses a field that has another value than these; a missing one, or null, is the first of them.

        Raises:
            ValueError: naming place, field, value and what is legal.
        """
        self._read.update((name, *self.aliases.get(name, ())))
        value = self.values.get(name)
        if value is not None and value not in legal:
            raise ValueError(f"{self.place}: {name} = {value!r} is not supported; legal: {', '.join(map(repr, legal))}")

    def part(self, name: str) -> "Fields | None":
        """The fields of an object inside; None where there is none, or null."""
        self._read.add(name)
        inner = self.values.get(name)
        if inner is not None and not isinstance(inner, Mapping):
            raise ValueError(f"{self.place}: {name} = {inner!r}; legal: an object")
        return None if inner is None else Fields(inner, f"{self.place}: {name}")

    def done(self, without_effect: Iterable[str] = WITHOUT_EFFECT) -> None:
        """Refuses fields that nobody has read, apart from those without effect.

        Raises:
            ValueError: naming place and fields.
        """
        unknown = sorted(self.values.keys() - self._read - set(without_effect))
        if unknown:
            shown = ", ".join(f"{name} = {self.values[name]!r}" for name in unknown)
            raise ValueError(f"{self.place}: {shown}: nothing here knows what that means, so it is not ignored")
