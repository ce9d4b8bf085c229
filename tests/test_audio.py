"""From a recording to a spectrogram, against values worked by hand, and the encoders that read it or a small picture."""

import struct
import wave
from io import BytesIO

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from zoo.encoders._audio import FLOOR, MEAN, STD, LogMel, filter_bank
from zoo.errors import ZooError
from zoo.registry import make
from zoo.types import ModalityInputs

SETTINGS = {"sample_rate": 8000, "n_fft": 256, "hop": 128, "mels": 32, "seconds": 0.5}


def log_mel(**settings):
    return LogMel(**{**SETTINGS, **settings})


def power(values):
    return (values * STD + MEAN).exp() - FLOOR


def wav(samples, *, rate=8000, width=2, channels=1):
    file = BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(samples)
    return file.getvalue()


# The filter bank


def test_filter_bank_by_hand():
    """Two bands at 2800 Hz: 1400 Hz are 2595 log10(3) = 1238.13 mel, a third of them 412.71 and two thirds 825.42.

    Back in Hz the corners are 700 (3^(k/3) - 1): 0, 309.57, 756.06, 1400; bins of a window of 8 are 350 Hz apart.
    """
    one, two = 700 * (3 ** (1 / 3) - 1), 700 * (3 ** (2 / 3) - 1)
    assert (round(one, 2), round(two, 2)) == (309.57, 756.06)
    first = [0, (two - 350) / (two - one), (two - 700) / (two - one), 0, 0]
    second = [0, (350 - one) / (two - one), (700 - one) / (two - one), (1400 - 1050) / (1400 - two), 0]
    torch.testing.assert_close(filter_bank(2800, 8, 2), torch.tensor([first, second]), rtol=0, atol=1e-6)  # float32


@pytest.mark.parametrize("sample_rate, n_fft, mels", [(8000, 256, 32), (16000, 512, 64), (16000, 1024, 128)])
def test_between_the_outer_centres_the_bands_add_up_to_one(sample_rate, n_fft, mels):
    bank = filter_bank(sample_rate, n_fft, mels)
    assert bank.shape == (mels, n_fft // 2 + 1)
    top = 2595 * np.log10(1 + sample_rate / 2 / 700)
    first, last = (700 * (10 ** (top * k / (mels + 1) / 2595) - 1) for k in (1, mels))
    bins = torch.arange(n_fft // 2 + 1) * sample_rate / n_fft
    inside = (bins >= first) & (bins <= last)
    torch.testing.assert_close(bank[:, inside].sum(0), torch.ones(int(inside.sum())), rtol=0, atol=1e-5)  # float32


def test_bands_are_real_numbers_where_the_network_is_not():
    """A bank that nobody asked for before, made by an encoder of the meta device, serves the next one."""
    settings = {"sample_rate": 8000, "n_fft": 250, "hop": 125, "mels": 30}
    with torch.device("meta"):
        built = make("encoder", "audio_resnet:tiny", **settings)
        assert built.processor(np.ones(800)).values.isfinite().all()
    assert built.first.weight.is_meta
    assert make("encoder", "audio_resnet:tiny", **settings).processor(np.ones(800)).values.isfinite().all()


def by_numpy(sound, sample_rate, n_fft, hop, mels, seconds):
    """The spectrogram once more, from its definition: frame by frame, band by band, in float64."""
    samples = round(seconds * sample_rate)
    padded = np.concatenate([np.zeros(n_fft // 2), sound[:samples], np.zeros(max(samples - len(sound), 0) + n_fft)])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    power = np.stack([np.abs(np.fft.rfft(window * padded[t : t + n_fft])) ** 2 for t in range(0, samples + 1, hop)], 1)
    hertz = np.fft.rfftfreq(n_fft, 1 / sample_rate)
    corners = [700 * (10 ** (m / 2595) - 1) for m in np.linspace(0, 2595 * np.log10(1 + sample_rate / 1400), mels + 2)]
    bands = [np.interp(hertz, corners[m : m + 3], [0, 1, 0], 0, 0) @ power for m in range(mels)]
    return (np.log(np.stack(bands) + FLOOR) - MEAN) / STD


# The spectrogram


@pytest.mark.parametrize("samples", [3000, 9000])
@pytest.mark.parametrize("sample_rate, n_fft, hop, mels", [(8000, 256, 128, 32), (8000, 250, 100, 20), (16000, 1024, 160, 128)])
def test_equals_the_definition(sample_rate, n_fft, hop, mels, samples):
    sound = np.random.uniform(-1, 1, samples) * np.linspace(0, 1, samples)
    settings = {"sample_rate": sample_rate, "n_fft": n_fft, "hop": hop, "mels": mels, "seconds": 0.5}
    found, expected = log_mel(**settings)(sound).values.double(), torch.from_numpy(by_numpy(sound, **settings))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)  # float32 of powers up to 1e4, beside a floor of 1e-6


def test_a_tone_has_the_power_of_its_window():
    """A cosine of amplitude a on bin k: |X_k| = a / 2 * sum of the window, which is n_fft / 2 for Hann's, and half of it beside."""
    a, k, n = 0.5, 32, 256
    tone = a * np.cos(2 * np.pi * k / n * np.arange(4000))
    values = log_mel()(tone).values
    assert values.shape == (32, 1 + 4000 // 128)
    assert values.dtype == torch.float32
    expected = filter_bank(8000, n, 32)[:, k - 1 : k + 2] @ torch.tensor([0.25, 1.0, 0.25]) * (a / 2 * n / 2) ** 2
    torch.testing.assert_close(power(values)[:, 10], expected, rtol=1e-3, atol=1e-2)


def test_short_recordings_are_padded_with_silence_and_long_ones_cut():
    sound = np.random.uniform(-1, 1, 6000).astype(np.float32)
    process = log_mel()
    short, long = process(sound[:1000]).values, process(sound).values
    assert short.shape == long.shape == (32, process.frames)
    torch.testing.assert_close(short[:, 10:], torch.full((32, process.frames - 10), (np.log(FLOOR) - MEAN) / STD).float())
    assert torch.equal(long, process(sound[:4000]).values)
    assert torch.equal(process(sound[:1]).values.isfinite(), torch.ones(32, process.frames, dtype=torch.bool))


def test_twice_as_loud_is_four_times_the_power():
    sound = np.random.uniform(-0.4, 0.4, 4000)
    torch.testing.assert_close(power(log_mel()(2 * sound).values), 4 * power(log_mel()(sound).values), rtol=1e-3, atol=1e-4)


# Files


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_every_width_are_the_same_sound(width, tmp_path):
    levels = [0.0, 0.5, -0.5, -1.0, 0.25]
    whole = [int(x * 2 ** (8 * width - 1)) for x in levels]
    data = bytes(w + 128 for w in whole) if width == 1 else b"".join(struct.pack("<i", w << (32 - 8 * width))[4 - width :] for w in whole)
    file = wav(data, width=width)
    expected = log_mel()(np.array(levels)).values
    torch.testing.assert_close(log_mel()(file).values, expected)
    (tmp_path / "a.wav").write_bytes(file)
    assert torch.equal(log_mel()(tmp_path / "a.wav").values, log_mel()(file).values)
    assert torch.equal(log_mel()(str(tmp_path / "a.wav")).values, log_mel()(file).values)


def test_channels_are_averaged():
    both = np.array([[1000, 3000], [-8000, 0]], "<i2")
    assert torch.equal(log_mel()(wav(both.tobytes(), channels=2)).values, log_mel()(both.mean(1) / 32768).values)


def test_a_file_that_was_cut_off_is_read_up_to_there():
    file = wav(np.arange(500, dtype="<i2").tobytes())
    assert torch.equal(log_mel()(file[: 44 + 801]).values, log_mel()(np.arange(400) / 32768).values)


@pytest.mark.parametrize(
    "thing, says",
    [
        (np.zeros(0), r"an array of shape \(0,\) of float64: no samples"),
        (np.array([0.0, np.nan, np.inf]), r"an array of shape \(3,\) of float64: 2 of 3 samples are NaN or infinite"),
        (np.zeros((2, 3)), r"an array of shape \(2, 3\) of float64 is no recording: give one dimension of floats in -1\.\.1"),
        (np.zeros(3, np.int16), r"of int16 is no recording: .*divide by 32768"),
        (3, "int is no recording: give an array of samples, the bytes of a WAV file, or a path"),
        (
            b"ID3 and more",
            r"12 bytes that start with b'ID3 and ': no WAV file of uncompressed samples that can be read \(file does not start",
        ),
        (b"", r"0 bytes that start with b'': no WAV file"),
        ("not/there.wav", r"not/there\.wav: no WAV file of uncompressed samples that can be read \(.*No such file"),
        (wav(b""), "no samples"),
        (wav(b"\0\0", rate=44100), r"44100 Hz, and the encoder reads 8000: write sample_rate: 44100, or convert the file"),
    ],
)
def test_what_is_no_recording(thing, says):
    with pytest.raises(ZooError, match=says):
        log_mel()(thing)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"mels": 128}, r"\d+ of 128 bands hold no frequency of a window of 256 at 8000 Hz: write fewer mels, or a larger n_fft"),
        ({"seconds": 0.01}, r"0\.01 s at 8000 Hz are 80 samples, less than one hop of 128"),
    ],
)
def test_settings_that_leave_nothing_to_hear(settings, says):
    with pytest.raises(ZooError, match=says):
        log_mel(**settings)


# Encoders


def test_the_resnet18_of_the_papers_is_torchvisions_over_one_channel():
    """The same weights, in order, give the same feature map."""
    torch.manual_seed(0)
    ours, theirs = make("encoder", "audio_resnet:resnet18").eval(), resnet18()
    theirs.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    del theirs.fc
    theirs.eval()
    values, names = list(ours.state_dict().values()), list(theirs.state_dict())
    assert len(values) == len(names)
    theirs.load_state_dict(dict(zip(names, values, strict=True)))
    x = torch.randn(2, 1, 32, 63)
    with torch.no_grad():
        stem = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(stem))))
        out = ours(ModalityInputs(x[:, 0]))
    assert ours.dim == 512
    assert expected.std() > 0.01
    torch.testing.assert_close(out.tokens, expected.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)  # float32
    torch.testing.assert_close(out.pooled, expected.mean((2, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["audio_resnet:tiny", "image_resnet"])
def test_batch_norm_looks_at_other_rows_in_training_alone(name):
    built = make("encoder", name)
    x = torch.randn(4, 32, 63) if name.startswith("audio") else torch.randn(4, 3, 28, 28)
    whole, part = (built.train()(ModalityInputs(x[:n])).pooled[:2] for n in (4, 2))
    assert not torch.allclose(whole, part, atol=1e-3)
    whole, part = (built.eval()(ModalityInputs(x[:n])).pooled[:2] for n in (4, 2))
    torch.testing.assert_close(whole, part, rtol=1e-4, atol=1e-5)


def test_sizes_by_name_and_by_number():
    assert make("encoder", "audio_resnet:tiny").dim == 32
    assert make("encoder", "audio_resnet:tiny", layers=[1, 1, 1], width=8).dim == 32
    assert make("encoder", "image_resnet", layers=[1, 2], width=8).dim == 16
    assert make("encoder", "audio_transformer:tiny", dim=32).dim == 32
    assert len(make("encoder", {"name": "audio_transformer", "arch": "tiny", "layers": 1}).blocks) == 1
    with torch.device("meta"):
        base = make("encoder", "audio_transformer", sample_rate=16000, n_fft=512, hop=160, mels=64, seconds=10.0)
    assert (base.dim, len(base.blocks)) == (768, 12)
    assert base.position.shape == (1, 4 * 63, 768)  # 64 bands, 1001 frames
    with pytest.raises(ZooError, match=r"arch: 'huge': input should be 'resnet18' or 'tiny'"):
        make("encoder", "audio_resnet:huge")
    with pytest.raises(ZooError, match="dim 30 must be a multiple of heads 4, and stride 16 at most patch 16"):
        make("encoder", "audio_transformer:tiny", dim=30)
    with pytest.raises(ZooError, match="stride 20 at most patch 16"):
        make("encoder", "audio_transformer:tiny", stride=20)


@pytest.mark.parametrize("patch, stride, tokens", [(16, None, 8), (16, 10, 3 * 6), (40, None, 2), (8, 8, 32)])
def test_patches_reach_the_end_of_the_spectrogram(patch, stride, tokens):
    built = make("encoder", "audio_transformer:tiny", patch=patch, stride=stride).eval()
    x = torch.randn(1, 32, 63)
    changed = x.clone()
    changed[0, -1, -1] += 1
    one, other = built(ModalityInputs(x)), built(ModalityInputs(changed))
    assert one.tokens.shape == (1, tokens, 64)
    assert not torch.equal(one.pooled, other.pooled)
