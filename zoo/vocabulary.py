"""The words of models that read and write captions: text to ids and back, and the ids that have a role of their own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from importlib.resources import files
from itertools import accumulate
from typing import Any, Protocol

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from zoo.errors import ZooError

ROLES: Mapping[str, tuple[str, ...]] = {  # how vocabularies write a role, the first that is there counts
    "pad": ("[PAD]", "<pad>"),
    "start": ("[CLS]", "<s>"),
    "end": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),  # what stands for letters that it does not have
    "decode": ("[DEC]",),
    "encode": ("[ENC]",),
}
WORD = "\u2581"  # before SentencePiece's pieces that begin a word


class Pieces(Protocol):
    """What cuts texts into the pieces of a fixed list; it is pickled on the way to the data loader's workers."""

    size: int  # one more than the largest id
    own: int  # the same without the roles that were added behind its list
    roles: Mapping[str, int | None]  # by the names of `ROLES`

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with no special one added and none recognised inside it."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, none of which has a role."""

    def begins(self, ids: Sequence[int]) -> list[bool]:
        """Whether each id begins a word."""

    def digest(self) -> str:
        """Of all that decides `encode`."""


class Vocabulary:
    """Words of a fixed list, cut into its pieces.

    Args:
        name: For messages.
        pieces: What cuts texts.
        portable: What `portable` gives.
    """

    def __init__(self, name: str, pieces: Pieces, portable: Mapping[str, Any]) -> None:
        self.name, self._pieces, self._portable = name, pieces, dict(portable)

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return self._pieces.size

    @property
    def own(self) -> int:
        """The same without the roles that were added behind its list: what a model needs that neither writes nor reads as BLIP does."""
        return self._pieces.own

    @property
    def roles(self) -> Mapping[str, int | None]:
        """The ids of `ROLES`, None for those that it lacks."""
        return self._pieces.roles

    def role(self, name: str, wanted: str) -> int:
        """The id of a role.

        Args:
            name: Of `ROLES`.
            wanted: What needs it, for the message.

        Raises:
            ZooError: If this vocabulary has none.
        """
        found = self.roles[name]
        if found is None:
            has = ", ".join(role for role, i in self.roles.items() if i is not None)
            raise ZooError(
                f"{wanted}: the vocabulary {self.name!r} has no id for {name!r} (it has: {has}); "
                "write vocabulary: small, or the words of BERT"
            )
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with no special one added and none recognised inside it."""
        return self._pieces.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; those with a role, and those of no piece, are left out."""
        special = {i for i in self.roles.values() if i is not None}
        return self._pieces.decode([i for i in map(int, ids) if i not in special and 0 <= i < self.size])

    def words(self, ids: Sequence[int]) -> list[int]:
        """The number of the word that each id is a piece of, from 0."""
        starts = self._pieces.begins(ids)
        return [n - 1 for n in accumulate(i == 0 or starts[i] for i in range(len(ids)))]

    def config(self) -> dict[str, Any]:
        """Plain values that tell two vocabularies apart."""
        return {"name": self.name, "size": self.size, "words": self._pieces.digest()}

    def portable(self) -> dict[str, Any]:
        """The settings that rebuild it without a network."""
        return dict(self._portable)


class FastPieces:
    """A tokenizer of Hugging Face's tokenizers.

    Where it has BERT's start of a text, the two that BLIP adds behind the words are there too: ``decode``, then ``encode``.

    Args:
        serialized: The text of its ``tokenizer.json``.
    """

    def __init__(self, serialized: str) -> None:
        self._inner = Tokenizer.from_str(serialized)
        self._inner.no_truncation()
        self._inner.no_padding()
        vocabulary = self._inner.get_vocab()
        self.size = self.own = 1 + max(vocabulary.values())
        roles = {role: next((vocabulary[t] for t in names if t in vocabulary), None) for role, names in ROLES.items()}
        if roles["start"] is not None and roles["decode"] is None:
            roles |= {"decode": self.size, "encode": self.size + 1}
            self.size += 2
        self.roles: Mapping[str, int | None] = roles
        inside, first = ([i for piece, i in vocabulary.items() if piece.startswith(mark)] for mark in ("##", WORD))
        self._continues = {*inside} if len(inside) >= len(first) else {*vocabulary.values()} - {*first}

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        self._inner.encode_special_tokens = True  # pickling, on the way to a worker, forgets it
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return str(self._inner.decode([i for i in ids if i < self.own]))

    def begins(self, ids: Sequence[int]) -> list[bool]:
        """Whether each id begins a word: it is written without ``##``, or as SentencePiece writes what follows a space."""
        return [i not in self._continues for i in ids]

    def digest(self) -> str:
        """Of its list and of how it cuts."""
        return blake2b(json.dumps(sorted(self._inner.get_vocab().items())).encode(), digest_size=8).hexdigest()


class ClipPieces:
    """CLIP's byte pairs as open_clip ships them; its padding is id 0, which is the piece ``!`` too."""

    def __init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer  # open_clip takes seconds to import

        self._inner = SimpleTokenizer()
        self.size = self.own = int(self._inner.vocab_size)
        self.roles: Mapping[str, int | None] = {
            **dict.fromkeys(ROLES),
            "pad": 0,
            "start": self._inner.sot_token_id,
            "end": self._inner.eot_token_id,
            "decode": self._inner.sot_token_id,
        }

    def encode(self, text: str) -> list[int]:
        """Ids of a text, lower-cased and with its white space made even, as CLIP does."""
        ends = (self.roles["start"], self.roles["end"])  # which it recognises in a text only after it has changed case and entities
        return [i for i in self._inner.encode(text) if i not in ends]

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return str(self._inner.decode(ids)).strip()

    def begins(self, ids: Sequence[int]) -> list[bool]:
        """Whether each id begins a word: the one before it ended one."""
        ends = [self._inner.decoder[i].endswith("</w>") for i in ids]
        return [True, *ends[:-1]]

    def digest(self) -> str:
        """Of its list."""
        return blake2b(json.dumps(sorted(self._inner.encoder.items())).encode(), digest_size=8).hexdigest()


def make_vocabulary(spec: str | Mapping[str, Any]) -> Vocabulary:
    """A vocabulary by name.

    Args:
        spec: ``small``: 5,000 pieces of English and Chinese that ship with the zoo. ``clip``: the 49,408 pieces of CLIP (Radford et al.,
            2021, https://arxiv.org/abs/2103.00020). Else a repository or folder of a fast tokenizer, such as
            ``google-bert/bert-base-uncased``; or a mapping with ``name`` and ``serialized``, the text of a ``tokenizer.json``.

    Raises:
        ZooError: If it cannot be had, or has no padding.
    """
    name = spec if isinstance(spec, str) else str(spec.get("name", ""))
    if not isinstance(spec, str) and "serialized" in spec:
        return _fast(name, str(spec["serialized"]))
    if name == "small":
        return Vocabulary("small", FastPieces(_small()), {})
    if name == "clip":
        return Vocabulary("clip", ClipPieces(), {})
    return _fast(name, _fetched(name))


def is_shipped(spec: str | Mapping[str, Any]) -> bool:
    """Whether a vocabulary needs nothing from a hub."""
    return spec in ("small", "clip") or (not isinstance(spec, str) and ("serialized" in spec or spec.get("name") in ("small", "clip")))


def _fast(name: str, serialized: str) -> Vocabulary:
    pieces = FastPieces(serialized)
    if pieces.roles["pad"] is None:
        raise ZooError(f"vocabulary {name!r}: none of its words is {' or '.join(ROLES['pad'])}: name another one")
    return Vocabulary(name, pieces, {"serialized": serialized})


def _fetched(name: str) -> str:
    """The ``tokenizer.json`` of a repository or folder."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # takes seconds to import

    try:
        outer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as e:
        reason = str(e).strip().partition("\n")[0]
        raise ZooError(
            f"vocabulary {name!r} could not be loaded ({reason}): check the name, fetch it once with a network, name a local folder that "
            "has it, or write vocabulary: small or clip, which ship with the zoo"
        ) from e
    if not isinstance(outer, PreTrainedTokenizerFast):
        raise ZooError(f"vocabulary {name!r} has no tokenizer.json: convert it to a fast one")
    return outer.backend_tokenizer.to_str()


def _small() -> str:
    """BERT's way of cutting (Devlin et al., 2018, https://arxiv.org/abs/1810.04805) with the pieces that ship with the zoo."""
    pieces = files("zoo").joinpath("small_vocabulary.txt").read_text(encoding="utf-8").split("\n")
    inner = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces) if piece}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    return str(inner.to_str())
