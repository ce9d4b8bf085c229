"""Text to ids: bytes and hashed words that need no files, and the tokenizers of published language models.

None of them recognises a special token inside a text: what a user writes is text, whatever it looks like.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

from zoo.errors import ZooError

log = logging.getLogger("zoo")
ROLES = ("pad", "bos", "image_start", "image_end", "compressed")
FILE = "zoo_tokenizer.json"
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0002fa1f"
_PIECE = re.compile(rf"[{_CJK}]|\d+|[^\W\d_{_CJK}]+|(?:_|[^\w\s])+")  # a CJK character, a number, a word, a run of marks
KNOWN: dict[str, tuple[str, ...]] = {  # how published tokenizers write a role, the first that is there counts
    "pad": ("<|endoftext|>", "[PAD]", "<pad>", "<unk>"),
    "image_start": ("<img>", "<|vision_start|>"),
    "image_end": ("</img>", "<|vision_end|>"),
    "compressed": ("<|extra_0|>", "<IMG_EMB>"),
}


class ByteTokenizer:
    """The bytes of UTF-8 as the first 256 ids, special tokens after them; it fits any vocabulary of 261 rows or more."""

    vocab_size = 256 + len(ROLES)
    roles: Mapping[str, int | None] = {role: 256 + i for i, role in enumerate(ROLES)}

    def encode(self, text: str) -> list[int]:
        """One id a byte; a lone surrogate becomes ``?``."""
        return list(text.encode("utf-8", "replace"))

    def config(self) -> dict[str, Any]:
        """What tells it from others."""
        return {"kind": "bytes"}

    def portable(self) -> dict[str, Any]:
        """All that `restored` needs to make an equal one."""
        return {"kind": "bytes"}

    def save(self, folder: Path) -> None:
        """Write it into ``folder``, which then can be named as ``tokenizer=``."""
        _save(self, folder)


class WordTokenizer:
    """Lower-cased words, numbers, runs of marks and single CJK characters, each hashed to a row; nothing is learned or stored.

    The hashing trick: Weinberger et al., Feature hashing for large scale multitask learning, 2009,
    https://arxiv.org/abs/0902.2206. We hash without a sign, since two words of one row share an embedding, not a count.

    Args:
        vocab_size: Rows, special tokens included; at least 6.

    Raises:
        ZooError: If there are fewer.
    """

    def __init__(self, vocab_size: int) -> None:
        if vocab_size <= len(ROLES):
            raise ZooError(f"a word tokenizer of {vocab_size} rows has no room for words: write a vocab_size above {len(ROLES)}")
        self.vocab_size = vocab_size
        self.roles: Mapping[str, int | None] = {role: i for i, role in enumerate(ROLES)}

    def encode(self, text: str) -> list[int]:
        """One id a piece. CRC-32 is the same in every process, unlike Python's own hash."""
        rows = self.vocab_size - len(ROLES)
        return [len(ROLES) + crc32(piece.encode("utf-8", "replace")) % rows for piece in _PIECE.findall(text.lower())]

    def config(self) -> dict[str, Any]:
        """What tells it from others."""
        return {"kind": "words", "vocab_size": self.vocab_size}

    def portable(self) -> dict[str, Any]:
        """All that `restored` needs to make an equal one."""
        return self.config()

    def save(self, folder: Path) -> None:
        """Write it into ``folder``, which then can be named as ``tokenizer=``."""
        _save(self, folder)


class HubTokenizer:
    """The fast tokenizer of a published language model.

    Args:
        serialized: The text of its ``tokenizer.json``.
        roles: Ids of the roles it has. A missing ``compressed`` is added as a new special token: in Qwen's vocabulary its id
            falls on a spare row of the embedding.
    """

    def __init__(self, serialized: str, roles: Mapping[str, int | None]) -> None:
        from tokenizers import AddedToken, Tokenizer

        self._inner = Tokenizer.from_str(serialized)
        self._inner.no_truncation()
        self._inner.no_padding()
        found = {role: next((i for t in names if (i := self._inner.token_to_id(t)) is not None), None) for role, names in KNOWN.items()}
        chosen = {**dict.fromkeys(ROLES), **found, **roles}
        if chosen["compressed"] is None:
            token = KNOWN["compressed"][0]
            self._inner.add_special_tokens([AddedToken(token, special=True, normalized=False)])
            chosen["compressed"] = self._inner.token_to_id(token)
        self.roles: Mapping[str, int | None] = chosen
        self.vocab_size: int = max(self._inner.get_vocab_size(), *(1 + i for i in chosen.values() if i is not None))

    @classmethod
    def fetched(cls, source: str, roles: Mapping[str, int | None] | None = None) -> HubTokenizer:
        """From a repository of the hub or a folder.

        Raises:
            ZooError: If there is none, or it is not a fast one.
        """
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        try:
            outer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as e:
            reason = str(e).strip().partition("\n")[0]
            raise ZooError(
                f"no tokenizer at {source} ({reason}): check the name, fetch it once with a network, name a local folder,"
                " or write tokenizer: bytes"
            ) from e
        if not isinstance(outer, PreTrainedTokenizerFast):
            raise ZooError(f"the tokenizer at {source} has no tokenizer.json: convert it to a fast one, or write tokenizer: bytes")
        own = {"bos": outer.bos_token_id, "pad": outer.pad_token_id}
        return cls(outer.backend_tokenizer.to_str(), {k: v for k, v in {**own, **(roles or {})}.items() if v is not None})

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone. A special token that is spelled out in it is text."""
        self._inner.encode_special_tokens = True  # pickling, on the way to a worker, forgets it
        plain = text.encode("utf-8", "replace").decode()  # a lone surrogate is no text for Rust
        return list(self._inner.encode(plain, add_special_tokens=False).ids)

    def config(self) -> dict[str, Any]:
        """What tells it from others: a digest of its vocabulary."""
        vocabulary = json.dumps(sorted(self._inner.get_vocab().items())).encode()
        return {"kind": "hub", "vocabulary": blake2b(vocabulary, digest_size=8).hexdigest(), "roles": dict(self.roles)}

    def portable(self) -> dict[str, Any]:
        """All that `restored` needs to make an equal one: megabytes, for a large vocabulary."""
        return {"kind": "hub", "serialized": self._inner.to_str(), "roles": dict(self.roles)}

    def save(self, folder: Path) -> None:
        """Write it into ``folder``, which then can be named as ``tokenizer=``."""
        _save(self, folder)


class PortableTokenizer(Protocol):
    """A `zoo.types.Tokenizer` that can be carried along with weights."""

    vocab_size: int
    roles: Mapping[str, int | None]

    def encode(self, text: str) -> list[int]:
        """See `zoo.types.Tokenizer`."""

    def config(self) -> dict[str, Any]:
        """See `zoo.types.Tokenizer`."""

    def portable(self) -> dict[str, Any]:
        """Plain values that `restored` makes an equal one of."""

    def save(self, folder: Path) -> None:
        """Write it into a folder."""


def restored(saved: Mapping[str, Any]) -> PortableTokenizer:
    """The tokenizer whose `portable` this is.

    Raises:
        ZooError: If it is none's.
    """
    match saved:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "words", "vocab_size": int(rows)}:
            return WordTokenizer(rows)
        case {"kind": "hub", "serialized": str(text), "roles": dict(roles)}:
            return HubTokenizer(text, roles)
    raise ZooError(f"{str(dict(saved))[:80]} is no saved tokenizer: name bytes, a repository or a folder")


def named(name: str, roles: Mapping[str, int | None] | None = None) -> PortableTokenizer:
    """The tokenizer of a name that a user writes: ``bytes``, a repository, or a folder, of ours or of transformers.

    Raises:
        ZooError: If there is none.
    """
    if name == "bytes":
        return ByteTokenizer()
    own = Path(name) / FILE
    return restored(json.loads(own.read_text())) if own.is_file() else HubTokenizer.fetched(name, roles)


def choose(
    model: str,
    given: str | Mapping[str, Any] | None,
    source: str | None,
    roles: Mapping[str, int | None] | None = None,
    *,
    quiet: bool = False,
) -> PortableTokenizer:
    """The tokenizer of a language model: the one that was asked for, else that of its weights, else bytes.

    Args:
        model: For the line that says that bytes are used.
        given: What the user wrote: a name, a saved one, or nothing.
        source: Repository or folder whose tokenizer belongs to the weights; None for random ones.
        roles: Ids that its files do not name.
        quiet: Leave that line out, for a model that is only looked at.

    Raises:
        ZooError: If it cannot be had.
    """
    if isinstance(given, Mapping):
        return restored(given)
    if given is not None or source is not None:
        return named(str(given or source), roles)
    if not quiet:
        log.warning("%s has random weights: its texts are read as bytes (write tokenizer: a repository or folder, for its own)", model)
    return ByteTokenizer()


def _save(tokenizer: PortableTokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(tokenizer.portable()))
