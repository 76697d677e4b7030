"""A configuration that knows which of its fields were read.

What a configuration asks for and nobody reads would change the score in silence. So an architecture
reads through `Fields`, and `refuse_unread` then names every field that is left: it must have been
read, be on the lists below, or say nothing (`None`, or empty).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...errors import CheckpointError

# No score reads them, whatever they say.
_NO_SCORE = frozenset(
    {
        # of the file, and of who wrote it
        "architectures", "model_type", "_name_or_path", "name_or_path", "transformers_version",
        "unsloth_version", "unsloth_fixed", "_attn_implementation_autoset",
        # of weights at rest: the server's own dtype decides, and every tensor's name is checked
        "dtype", "torch_dtype", "initializer_range", "tie_word_embeddings",
        # of the labels; `head_of` has counted them
        "id2label", "label2id", "problem_type",
        # of training and generation: there is one prefill, and no cache
        "use_cache", "cache_implementation", "pretraining_tp", "keys_to_ignore_at_inference",
        # of what a call returns beside the hidden states, and of how one is computed in pieces
        "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
        # of the logits of a vocabulary, which is never computed
        "final_logit_softcapping",
    }
)  # fmt: skip
# Token ids, which the template and the tokenizer write; dropouts, which are off in evaluation.
_NO_SCORE_NAMES = re.compile(r".*_token_ids?|.*dropout|.*_pdrop")
# They turn off what is not computed here.
_OFF: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_mrope": (False,),
    "torchscript": (False,),
    "use_bfloat16": (False,),
    "tf_legacy_loss": (False,),
    "is_decoder": (False, True),  # of transformers < 5; decoders are causal either way
}
_MISSING = object()


class Fields:
    """A view of a configuration, or of a mapping in one, that notes what is read.

    It reads like what it shows: `fields.name`, and of a mapping `fields["name"]`, `fields.get`.

    Args:
        shown: transformers' configuration, or a mapping.
        path: of `shown` in its file, with a dot behind it; empty for the whole.
    """

    def __init__(self, shown: Any, path: str = "") -> None:
        self._shown = shown
        self._path = path
        self._read: set[str] = set()
        self._nested: dict[str, Fields] = {}

    def __getattr__(self, name: str) -> Any:
        """Return a configuration's field; `AttributeError` if it has no such field."""
        if name.startswith("__"):
            raise AttributeError(name)
        name = getattr(self._shown, "attribute_map", {}).get(name, name)
        return self._note(name, getattr(self._shown, name))

    def __getitem__(self, name: str) -> Any:
        """Return a mapping's value; `CheckpointError` if it is not there."""
        value = self.get(name, _MISSING)
        if value is _MISSING:
            raise CheckpointError(f"config.json: {self._path}{name} is missing")
        return value

    def __contains__(self, name: str) -> bool:
        """Return True if a mapping has a value of that name."""
        return name in self._shown

    def get(self, name: str, default: Any = None) -> Any:
        """Return a mapping's value, or the default."""
        return self._note(name, self._shown.get(name, default))

    @property
    def text(self) -> Fields:
        """The language model's part, which is the whole of a text model's."""
        if getattr(self._shown, "text_config", None) is None:
            return self
        part = self.text_config
        assert isinstance(part, Fields)
        return part

    def ignore(self, *names: str) -> None:
        """Count fields as read: the architecture's own class in transformers reads them nowhere."""
        self._read.update(names)

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Names and values that say something and that nothing has read."""
        shown = self._shown if isinstance(self._shown, Mapping) else self._shown.to_dict()
        for name, value in shown.items():
            if name in self._nested:
                yield from self._nested[name].unread()
            elif name not in self._read and not _says_nothing(name, value):
                yield self._path + name, value

    def refuse_unread(self, file: str, reader: str) -> None:
        """Raise `CheckpointError` that names what nothing has read.

        Args:
            file: which holds the fields.
            reader: what should have read them.
        """
        left = ", ".join(f"{name} = {value!r}" for name, value in self.unread())
        if left:
            raise CheckpointError(
                f"{file}: {left}: not supported for {reader}, where nothing reads it, so scores "
                "could be wrong; a field that is known to change no score can be deleted there"
            )

    def _note(self, name: str, value: Any) -> Any:
        self._read.add(name)
        if not isinstance(value, Mapping) and not hasattr(value, "to_dict"):
            return value
        if name not in self._nested:
            self._nested[name] = Fields(value, f"{self._path}{name}.")
        return self._nested[name]


def only(name: str, values: Iterable[Any], supported: Iterable[Any]) -> None:
    """Raise `CheckpointError` for a value of a configuration's field that is not supported."""
    for value in values:
        if value not in supported:
            known = ", ".join(map(repr, supported))
            raise CheckpointError(f"config.json: {name} {value!r} is not supported, only {known}")


def _says_nothing(name: str, value: Any) -> bool:
    if value is None or value in ([], {}, ()):
        return True
    return (
        name in _NO_SCORE
        or _NO_SCORE_NAMES.fullmatch(name) is not None
        or value in _OFF.get(name, ())
    )
