"""Items a second of `encode` beside sentence-transformers, the same tower with the same weights in both. Target: at least its rate.

``pytest benchmarks/bench_encode.py``. The tower has the geometry of MiniLM-L6-H384 and random weights, which cost what others cost.
"""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks.beside import beside, keep
from zoo.models._encode import encode
from zoo.registry import make
from zoo.types import Batch, ModelOutput

pytestmark = pytest.mark.filterwarnings("default")  # of rivals, whose warnings are not ours to mend
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"word{i}" for i in range(2000)]
TEXTS, BATCH = 256, 32


class TitleProcessor:
    """The title of a row as the tower wants it."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, row):
        return {"text": self.inner(row["title"])}

    def keys(self):
        return ("title",)

    def sees(self, row):
        return bool(row.get("title"))


class TextTower(torch.nn.Module):
    """An encoder of the zoo with no more around it than `encode` asks for."""

    outputs = ("text",)

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.dim, self.processor = encoder, encoder.dim, TitleProcessor(encoder.processor)

    def forward(self, batch: Batch) -> ModelOutput:
        return ModelOutput({"text": self.encoder(batch.inputs["text"]).pooled})


def save_tower(folder: Path) -> None:
    """A random BERT and a tokenizer of whole words, in the hub's layout."""
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=512, **names).save_pretrained(folder)
    torch.manual_seed(0)
    words = len(SPECIAL + WORDS)
    config = BertConfig(vocab_size=words, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    BertModel(config).save_pretrained(folder)


def draw_texts(kind: str) -> list[str]:
    """Titles of 3 to 12 words, or texts whose lengths spread as those of notes do: a few are ten times as long as most."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(3, 13, TEXTS) if kind == "titles" else np.clip(draw.lognormal(3.2, 0.8, TEXTS), 2, 256).astype(int)
    return [" ".join(draw.choice(WORDS, length)) for length in lengths]


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Ours and theirs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tower")
    save_tower(folder)
    transformer = Transformer(str(folder))
    theirs = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean")], device="cpu")
    yield TextTower(make("encoder", {"name": "hf", "arch": str(folder)})), theirs
    torch.set_num_threads(threads)


@pytest.mark.benchmark(timer=time.process_time, group="encode")
@pytest.mark.parametrize("kind", ["titles", "uneven"])
def test_encode(benchmark, towers, kind):
    """The vectors are equal before anything is timed."""
    ours, theirs = towers
    texts = draw_texts(kind)
    rows = [{"title": text} for text in texts]

    def encode_ours():
        return encode(ours, rows, output="text", batch_size=BATCH, show_progress=False, normalize=True)

    def encode_theirs():
        return theirs.encode(texts, batch_size=BATCH, show_progress_bar=False, normalize_embeddings=True)

    np.testing.assert_allclose(encode_ours(), encode_theirs(), atol=1e-5)
    found = beside(benchmark, encode_ours, encode_theirs, rounds=3)
    packages = ("sentence-transformers", "torch", "transformers")
    keep(benchmark, f"encode {kind}", found, target=1.0, packages=packages, items=TEXTS, items_per_second=TEXTS / found.ours)
