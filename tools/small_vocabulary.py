"""Make ``zoo/small_vocabulary.txt`` from the training texts of the emoji set: ``python tools/small_vocabulary.py DATA``."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZE = 5000


def main(root: Path) -> None:
    """Train word pieces on both languages of the training concepts, and write them one a line."""
    concepts = pq.read_table(root / "emoji_zh_en" / "concepts.parquet").to_pylist()  # type: ignore[no-untyped-call]
    texts = [row[key] for row in concepts if row["split"] == "train" for key in ("text_en", "text_zh")]
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=SPECIAL, min_frequency=1))
    pieces = sorted(inner.get_vocab().items(), key=lambda item: item[1])
    home = Path(__file__).parents[1] / "zoo" / "small_vocabulary.txt"
    home.write_text("\n".join(piece for piece, _ in pieces) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
