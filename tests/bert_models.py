"""ALBEF and BLIP as small as LAVIS was run for the golden files, on weights of another program, for the tests of parity."""

import json
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn

from zoo.collate import stack
from zoo.encoders._image import ImageProcessor
from zoo.encoders.timm import TimmEncoder
from zoo.fusions.cross_attention import CrossAttention
from zoo.fusions.joint import Joint
from zoo.models._bert import Size
from zoo.models._bert_keys import entries_of, spelling_of, to_ours, to_theirs
from zoo.models._pictures import CaptionProcessor, PictureTextProcessor
from zoo.models.albef import Albef
from zoo.models.blip import Blip
from zoo.types import Batch, ModalityInputs
from zoo.vocabulary import make_vocabulary

PIXELS, PATCH, LOOKS = 32, 8, 48
SIZE = Size(64, 4, 4, 12, 40, 32, 0.0, 0.02, "", {}, hidden=128)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a the red blue green cat dog bird sits on roof two of b c d e".split()]  # noqa: SIM905


def tiny_vision(width=LOOKS):
    norm = partial(nn.LayerNorm, eps=1e-6)
    vit = VisionTransformer(PIXELS, PATCH, num_classes=0, embed_dim=width, depth=3, num_heads=4, norm_layer=norm)
    processor = ImageProcessor(PIXELS)
    return TimmEncoder(vit, "a ViT", processor, layer=-1, keep_cls=True, final_norm=True, pool="cls", portable={})


def vocabulary(words=WORDS):
    inner = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer, inner.decoder = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )
    return make_vocabulary({"name": "words", "serialized": json.dumps(json.loads(inner.to_str()))})


def albef(words=WORDS, first=2, **settings):
    vision, known = tiny_vision(), vocabulary(words)
    processor = PictureTextProcessor(vision.processor, CaptionProcessor(known, SIZE.length))
    joint = CrossAttention(SIZE.layers, first)
    return Albef(vision, SIZE, len(words), joint, known, Joint(["image", "text"], 32, 0), processor, SIZE.dim, **settings).eval()


def blip(words=WORDS, looks=LOOKS, **settings):
    vision, known = tiny_vision(looks), vocabulary(words)
    processor = PictureTextProcessor(vision.processor, CaptionProcessor(known, SIZE.length))
    return Blip(
        vision, SIZE, known.size, CrossAttention(SIZE.layers, 0), known, Joint(["image", "text"], 32, 0), processor, SIZE.dim, **settings
    ).eval()


def loaded(model, theirs, table=None):
    """Their weights in our model; what they lack becomes zeros. The table, and what it lacks."""
    table = entries_of(spelling_of(theirs), theirs) if table is None else table
    mapped = to_ours(theirs, table)
    own = model.state_dict()
    missing = sorted(own.keys() - mapped.state.keys())
    model.load_state_dict({**{name: torch.zeros_like(own[name]) for name in missing}, **mapped.state})
    return table, missing, mapped


def gradients_as_theirs(model, table):
    """Of every parameter, by their names; zeros where there is none."""
    ours = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return to_theirs({entry.ours: ours[entry.ours] for entry in table if entry.ours in ours}, table)


def batch_of(image, ids, mask):
    return Batch({"image": ModalityInputs(image), "text": ModalityInputs(ids, mask.bool())})


def some_texts(lengths, count):
    """(B, N) ids of texts of these lengths: [CLS] words [SEP] padding; and the mask."""
    N = max(lengths)
    mask = torch.arange(N) < torch.tensor(lengths)[:, None]
    texts = torch.randint(5, count, (len(lengths), N))
    texts[:, 0] = 2
    texts[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 3
    return texts.masked_fill(~mask, 0), mask


def rows(model, *given):
    """A batch of raw rows."""
    return Batch(stack([model.processor(row) for row in given]))


def closest(found, wanted, relative, least=1e-6):
    """Equal up to ``relative`` of the largest number that is wanted, or of ``least`` where all are smaller."""
    found, wanted = found.detach(), wanted.detach().to(found.dtype)
    torch.testing.assert_close(found, wanted, rtol=0, atol=relative * max(least, float(wanted.abs().max())))
