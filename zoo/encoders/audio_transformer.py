"""A transformer over patches of a log-mel spectrogram, in the base size of the papers and in a tiny one."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from zoo.config import Positive
from zoo.encoders._audio import LogMel
from zoo.errors import ZooError
from zoo.registry import register
from zoo.types import ModalityInputs, Tokens


class Size(NamedTuple):
    """Of a transformer, and of the spectrogram that it reads."""

    dim: int
    layers: int
    heads: int
    sample_rate: int = 8000
    n_fft: int = 256
    hop: int = 128
    mels: int = 32
    seconds: float = 1.0


SIZES = {
    "base": Size(768, 12, 12),
    "cav_mae": Size(768, 12, 12, sample_rate=16_000, n_fft=1024, hop=160, mels=128, seconds=10.23),  # 1024 frames, 10 ms apart
    "tiny": Size(64, 2, 4),
}


@register(
    "encoder",
    "audio_transformer",
    paper="Gong et al., AST: audio spectrogram transformer, 2021, https://arxiv.org/abs/2104.01778",
)
class AudioTransformer(nn.Module):
    """Patches of the spectrogram, positions that are learned, pre-norm attention blocks; ``pooled`` is the mean of the tokens.

    After AST, which pools by a class token and a distillation token, overlaps its patches by 6, and starts from a network of pictures;
    this one is drawn and not pretrained. The mean follows MLA (Zhang et al., 2024, https://arxiv.org/abs/2311.10707), whose encoder of
    audio is that of CAV-MAE (Gong et al., 2023, https://arxiv.org/abs/2210.07839): ``cav_mae`` is as large, on 128 bands, 1024 frames and
    patches of 16. Windows are of 64 ms, not 25: of a shorter one the lowest of so many bands hold nothing.

    Args:
        arch: A size by name: ``base`` is 768 wide, 12 blocks, 12 heads, on a second at 8 kHz; ``cav_mae`` on 10.23 s at 16 kHz.
        dim: Width of the tokens; None: that of ``arch``, as of all that follow but the patches.
        layers: Attention blocks.
        heads: Of each block; they divide ``dim``.
        patch: Side of a patch, in bands and in frames; what is left over at the end is padded with zeros.
        stride: From one patch to the next; None: ``patch``, so that none overlap.
        sample_rate: In Hz; that of the recordings.
        n_fft: Samples of a window.
        hop: Samples from one frame to the next.
        mels: Bands.
        seconds: What is longer is cut, what is shorter is padded.
    """

    def __init__(
        self,
        *,
        arch: Literal["base", "cav_mae", "tiny"] = "base",
        dim: Positive | None = None,
        layers: Positive | None = None,
        heads: Positive | None = None,
        patch: Positive = 16,
        stride: Positive | None = None,
        sample_rate: Positive | None = None,
        n_fft: Positive | None = None,
        hop: Positive | None = None,
        mels: Positive | None = None,
        seconds: Annotated[float, Field(gt=0)] | None = None,
    ) -> None:
        super().__init__()
        size = SIZES[arch]
        dim, layers, heads, stride = dim or size.dim, layers or size.layers, heads or size.heads, stride or patch
        mels = mels or size.mels
        if dim % heads or stride > patch:
            raise ZooError(f"audio_transformer: dim {dim} must be a multiple of heads {heads}, and stride {stride} at most patch {patch}")
        self.dim = dim
        self.processor = LogMel(
            sample_rate=sample_rate or size.sample_rate,
            n_fft=n_fft or size.n_fft,
            hop=hop or size.hop,
            mels=mels,
            seconds=seconds or size.seconds,
        )
        over = [-(side - patch) % stride if side > patch else patch - side for side in (mels, self.processor.frames)]
        down, along = (1 + (side + more - patch) // stride for side, more in zip((mels, self.processor.frames), over, strict=True))
        self.pad = nn.ZeroPad2d((0, over[1], 0, over[0]))
        self.patches = nn.Conv2d(1, dim, patch, stride)
        self.position = nn.Parameter(torch.randn(1, down * along, dim) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: ModalityInputs) -> Tokens:
        """Log-mel (B, F, T) to Tokens."""
        grid = self.patches(self.pad(x.values[:, None].to(self.position.dtype)))  # (B, D, F / stride, T / stride)
        tokens = grid.flatten(2).transpose(1, 2) + self.position  # (B, N, D)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Tokens(tokens, mask, tokens.mean(1), mask[:, 0])

    def portable(self) -> dict[str, Any]:
        """Nothing: it is always built from its settings alone."""
        return {}
