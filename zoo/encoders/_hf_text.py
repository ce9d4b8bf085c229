"""Texts to the ids of a tokenizer of the hub or of a folder, through tokenizers and transformers."""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from zoo.encoders._read import fetching
from zoo.errors import ZooError
from zoo.types import ModalityInputs


class HfTextProcessor:
    """A text to ids, with the special tokens that the encoder was trained with around it and none recognised inside it.

    Args:
        serialized: The text of its ``tokenizer.json``.
        max_length: Longer texts are cut.
    """

    def __init__(self, serialized: str, max_length: int) -> None:
        self._inner = Tokenizer.from_str(serialized)
        self._inner.no_padding()
        self._inner.enable_truncation(max_length)
        self.max_length = max_length

    @classmethod
    def fetched(cls, source: str, max_length: int) -> HfTextProcessor:
        """With the tokenizer of a repository or folder.

        Raises:
            ZooError: If there is none, or it is not a fast one.
        """
        with fetching(f"the tokenizer of {source}"):
            outer = AutoTokenizer.from_pretrained(source)
        if not isinstance(outer, PreTrainedTokenizerFast):
            raise ZooError(f"the tokenizer of {source} has no tokenizer.json: convert it to a fast one")
        return cls(outer.backend_tokenizer.to_str(), max_length)

    def __call__(self, thing: Any) -> ModalityInputs:
        """One text."""
        self._inner.encode_special_tokens = True  # pickling, on the way to a worker, forgets it
        return ModalityInputs(torch.tensor(self._inner.encode(str(thing)).ids))

    @property
    def rows(self) -> int:
        """How many a table of embeddings has for its ids."""
        return 1 + max(self._inner.get_vocab().values())

    def config(self) -> dict[str, Any]:
        """What tells two of them apart."""
        vocabulary = json.dumps(sorted(self._inner.get_vocab().items())).encode()
        return {"vocabulary": blake2b(vocabulary, digest_size=8).hexdigest(), "max_length": self.max_length}

    def serialized(self) -> str:
        """What makes an equal one."""
        return self._inner.to_str()
