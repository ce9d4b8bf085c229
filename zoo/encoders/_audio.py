"""A recording to the log-mel spectrogram that an audio encoder reads, in torch alone."""

from __future__ import annotations

import math
import wave
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import ZooError
from zoo.types import ModalityInputs

FLOOR = 1e-6  # of the power: silence, and the padding behind short recordings, has a finite logarithm
MEAN, STD = -5.0, 4.0  # of the logarithm, in round numbers, over what is not padding in spoken digits at 8 kHz


class LogMel:
    """A recording to (mels, frames) float32: short-time Fourier transform, mel bands, logarithm. Nothing in it is random.

    Recordings start at time 0 and are cut, or padded with silence, to one length. The window is Hann's, of ``n_fft`` samples, centred on
    its frame. Values are ln(power + 1e-6), less a constant and divided by one, so that spectrograms keep their loudness.

    Args:
        sample_rate: In Hz; arrays are taken to have it, and files must.
        n_fft: Samples of a window.
        hop: Samples from one frame to the next.
        mels: Bands, as `filter_bank` says.
        seconds: Length of what is read.

    Raises:
        ZooError: If a band would be empty, or ``seconds`` hold no frame.
    """

    def __init__(self, *, sample_rate: int, n_fft: int, hop: int, mels: int, seconds: float) -> None:
        self.sample_rate, self.n_fft, self.hop, self.mels, self.seconds = sample_rate, n_fft, hop, mels, seconds
        self.samples = round(seconds * sample_rate)
        if self.samples < hop:
            raise ZooError(f"log-mel: {seconds:g} s at {sample_rate} Hz are {self.samples} samples, less than one hop of {hop}")
        empty = (filter_bank(sample_rate, n_fft, mels).amax(1) <= 0).nonzero().flatten().tolist()
        if empty:
            raise ZooError(
                f"log-mel: {len(empty)} of {mels} bands hold no frequency of a window of {n_fft} at {sample_rate} Hz:"
                " write fewer mels, or a larger n_fft"
            )

    @property
    def frames(self) -> int:
        """How many a recording has."""
        return 1 + self.samples // self.hop

    def __call__(self, thing: Any) -> ModalityInputs:
        """One recording: samples (T,) of floats in -1..1, or the bytes or the path of a WAV file.

        Raises:
            ZooError: If it has no samples, or others than finite ones, or is no such file.
        """
        name, samples = _samples(thing, self.sample_rate)
        if not samples.size:
            raise ZooError(f"{name}: no samples")
        if not np.isfinite(samples).all():
            raise ZooError(f"{name}: {int((~np.isfinite(samples)).sum())} of {samples.size} samples are NaN or infinite")
        clip = torch.from_numpy(np.array(samples[: self.samples], dtype=np.float32))
        clip = F.pad(clip, (0, self.samples - len(clip)))
        window = torch.hann_window(self.n_fft, device="cpu")
        spectrum = torch.stft(clip, self.n_fft, self.hop, window=window, center=True, pad_mode="constant", return_complex=True)
        power = spectrum.abs().square()  # (n_fft / 2 + 1, frames)
        bands = filter_bank(self.sample_rate, self.n_fft, self.mels) @ power  # (mels, frames)
        return ModalityInputs(((bands + FLOOR).log() - MEAN) / STD)

    def config(self) -> dict[str, Any]:
        """The arguments that make an equal processor."""
        return {
            "kind": "log_mel",
            "sample_rate": self.sample_rate,
            "n_fft": self.n_fft,
            "hop": self.hop,
            "mels": self.mels,
            "seconds": self.seconds,
        }


@cache
def filter_bank(sample_rate: int, n_fft: int, mels: int) -> Tensor:
    """(mels, n_fft // 2 + 1) float32 weights of triangular bands from 0 Hz to half the sample rate; not to be written into.

    Their corners are evenly spaced on HTK's mel scale, 2595 log10(1 + f / 700) (Young et al., The HTK book, 2006; O'Shaughnessy, 1987).
    Each rises from the centre of the one before to 1 at its own and falls to the centre of the next; areas are not made equal.
    """
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    # On the CPU by name: an encoder that is built on the meta device would leave its bands to all that come after it.
    corners = 700 * (10 ** (torch.linspace(0, top, mels + 2, dtype=torch.float64, device="cpu") / 2595) - 1)  # in Hz
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64, device="cpu") * sample_rate / n_fft
    low, centre, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return torch.minimum(rising, falling).clamp(min=0).float()


def _samples(thing: Any, sample_rate: int) -> tuple[str, np.ndarray]:
    """What a recording is called in messages, and its samples (T,)."""
    if isinstance(thing, np.ndarray):
        name = f"an array of shape {thing.shape} of {thing.dtype}"
        if thing.ndim != 1 or thing.dtype.kind != "f":
            raise ZooError(f"{name} is no recording: give one dimension of floats in -1..1 (of int16 samples, divide by 32768)")
        return name, thing
    if isinstance(thing, bytes):
        return _read(f"{len(thing)} bytes that start with {thing[:8]!r}", BytesIO(thing), sample_rate)
    if isinstance(thing, str | Path):
        return _read(str(thing), str(thing), sample_rate)
    raise ZooError(f"{type(thing).__name__} is no recording: give an array of samples, the bytes of a WAV file, or a path")


def _read(name: str, source: Any, sample_rate: int) -> tuple[str, np.ndarray]:
    """A WAV file of uncompressed samples, its channels averaged."""
    try:
        with wave.open(source, "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError, OSError) as e:
        raise ZooError(f"{name}: no WAV file of uncompressed samples that can be read ({e})") from e
    if rate != sample_rate:
        raise ZooError(f"{name}: {rate} Hz, and the encoder reads {sample_rate}: write sample_rate: {rate}, or convert the file")
    data = data[: len(data) // (width * channels) * width * channels]  # a file that was cut off ends inside a frame
    if width == 1:
        values = np.frombuffer(data, np.uint8).astype(np.float32) / 128 - 1  # eight bits alone have no sign
    else:
        wide = np.zeros((len(data) // width, 4), np.uint8)
        wide[:, 4 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
        values = wide.view("<i4")[:, 0].astype(np.float32) / 2**31
    return name, values.reshape(-1, channels).mean(1)
