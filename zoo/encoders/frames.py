"""Video as frames: an image encoder looks at a few frames of each row, and the row is what they are on average."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.config import EncoderSpec, Positive, split_spec
from zoo.errors import ZooError
from zoo.pictures import frames_in, middles
from zoo.registry import make, register
from zoo.types import ModalityInputs, Processor, Tokens


class FrameProcessor:
    """A video to (M, 3, H, W) float32, M of its frames in their order. Nothing in it is random.

    Of a video of more frames those at the `middles` are taken, of a shorter one all.

    Args:
        image: Of the frames: one picture to (3, H, W).
        frames: M at most.
    """

    def __init__(self, image: Processor, frames: int) -> None:
        self.image, self.frames = image, frames

    def __call__(self, thing: Any) -> ModalityInputs:
        """One video: a list of pictures (PIL images, bytes or paths), or a folder of their files, by the numbers in their names.

        Raises:
            ZooError: If it is neither, has no frames, or one that is taken is no picture.
        """
        name, found = _listed(thing)
        if not found:
            raise ZooError(f"{name}: no frames")
        return ModalityInputs(torch.stack([self._picture(found, i) for i in middles(len(found), self.frames)]))

    def _picture(self, found: Sequence[Any], i: int) -> torch.Tensor:
        try:
            values = self.image(found[i]).values
        except ZooError as e:
            raise ZooError(f"frame {i + 1} of {len(found)}: {e}") from e
        if values.ndim != 3:
            raise ZooError(f"encoder 'frames': what it names as image gives {tuple(values.shape)}, not (3, H, W): name an image encoder")
        return values

    def config(self) -> dict[str, Any]:
        """What decides its result."""
        return {"kind": "frames", "frames": self.frames, "image": self.image.config()}


def _listed(thing: Any) -> tuple[str, Sequence[Any]]:
    """What a video is called in messages, and its frames."""
    if isinstance(thing, list | tuple):
        return f"a {type(thing).__name__} of {len(thing)}", thing
    if not isinstance(thing, str | Path):
        raise ZooError(f"{type(thing).__name__} is no video: give a list of pictures, or a folder of their files")
    if not Path(thing).is_dir():
        raise ZooError(f"{thing} is no folder: a video is read as a list of pictures, or as a folder of their files, one for each frame")
    return str(thing), frames_in(Path(thing))


@register(
    "encoder",
    "frames",
    paper="Peng et al., Balanced multimodal learning via on-the-fly gradient modulation, 2022, https://arxiv.org/abs/2203.15332",
)
class Frames(nn.Module):
    """An image encoder over the frames of a video: a token is what it pools of one frame, ``pooled`` is their mean.

    A mask leaves out the places that a shorter video does not fill. In training as later the same frames are taken; the papers' random
    crops and flips are not made.

    Args:
        image: The image encoder.
        frames: Of each video, evenly spaced.
    """

    def __init__(self, *, image: EncoderSpec = "image_resnet:resnet18", frames: Positive = 3) -> None:
        super().__init__()
        self._spec = image
        self.image = make("encoder", image)
        self.dim: int = self.image.dim
        self.processor = FrameProcessor(self.image.processor, frames)

    def forward(self, x: ModalityInputs) -> Tokens:
        """Frames (B, M, 3, H, W) and their mask (B, M) to Tokens."""
        real = x.mask if x.mask is not None else torch.ones(x.values.shape[:2], dtype=torch.bool, device=x.values.device)
        pooled = self.image(ModalityInputs(x.values[real])).pooled  # (I, D) of I real frames
        if pooled is None:
            raise ZooError(f"encoder 'frames': the image encoder {split_spec(self._spec)[0]!r} does not pool: name one that does")
        tokens = pooled.new_zeros(*real.shape, self.dim).index_put((real,), pooled)  # (B, M, D)
        mean = tokens.sum(1) / real.sum(1, keepdim=True).clamp(min=1)  # (B, D)
        return Tokens(tokens, real, mean, torch.ones_like(real[:, 0]))

    def portable(self) -> dict[str, Any]:
        """The settings that rebuild the image encoder without a network."""
        own = self.image.portable()
        if not own:
            return {}
        name, given = split_spec(self._spec)
        return {"image": {"name": name, **given, **own}}
