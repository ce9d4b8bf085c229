"""Videos as lists and folders of frames: which are taken, what shorter ones weigh, and what is wrong with a broken one."""

from io import BytesIO

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from zoo.collate import stack
from zoo.errors import ZooError
from zoo.registry import make, register
from zoo.types import ModalityInputs, Tokens

TINY = {"name": "frames", "image": {"name": "tiny_image", "dim": 16, "layers": 1, "heads": 2, "image_size": 8}}


def grey(level):
    return Image.new("L", (8, 8), level)


def file(level):
    out = BytesIO()
    grey(level).save(out, "PNG")
    return out.getvalue()


def levels(x):
    """The grey value of each frame, 0..255."""
    return ((x.values[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().int().tolist()


def encoder(**settings):
    return make("encoder", {**TINY, **settings}).eval()


@pytest.mark.parametrize(
    "length, frames, taken",
    [(1, 3, [0]), (2, 3, [0, 1]), (3, 3, [0, 1, 2]), (4, 3, [0, 2, 3]), (9, 3, [1, 4, 7]), (10, 3, [1, 5, 8]), (10, 1, [5])],
)
def test_frames_in_the_middle_of_equal_stretches(length, frames, taken):
    process = encoder(frames=frames).processor
    assert levels(process([grey(i) for i in range(length)])) == taken
    assert levels(process(tuple(file(i) for i in range(length)))) == taken


def test_a_folder_is_read_by_the_numbers_in_its_names(tmp_path):
    for i in (1, 2, 9, 10, 11):
        (tmp_path / f"clip{i}.png").write_bytes(file(i))
    (tmp_path / ".DS_Store").write_bytes(b"not looked at")
    process = encoder(frames=5).processor
    assert levels(process(tmp_path)) == levels(process(str(tmp_path))) == [1, 2, 9, 10, 11]
    assert levels(process([tmp_path / "clip9.png", str(tmp_path / "clip2.png")])) == [9, 2], "a list is in order as it is"


def test_frames_that_are_not_taken_are_not_opened(tmp_path):
    (tmp_path / "0.png").write_bytes(b"broken")
    for i in range(1, 9):
        (tmp_path / f"{i}.png").write_bytes(file(i))
    assert levels(encoder().processor(tmp_path)) == [1, 4, 7]


def test_pooled_is_the_mean_of_the_frames_that_are_there():
    built = encoder()
    videos = [[grey(10), grey(200)], [grey(50)], [grey(5), grey(90), grey(250), grey(30)]]
    x = stack([{"video": built.processor(v)} for v in videos])["video"]
    assert x.mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    out = built(x)
    for row, video in enumerate(videos):
        one_by_one = torch.stack([built.image(ModalityInputs(v[None])).pooled[0] for v in built.processor(video).values])
        torch.testing.assert_close(out.pooled[row], one_by_one.mean(0), rtol=1e-5, atol=1e-5)  # float32, other batch sizes
        torch.testing.assert_close(out.tokens[row, : len(one_by_one)], one_by_one, rtol=1e-5, atol=1e-5)


def test_what_is_behind_the_mask_changes_nothing_and_moves_no_statistics():
    built = make("encoder", "frames", image="image_resnet:tiny")
    x = torch.randn(2, 3, 3, 28, 28)
    garbage = x.clone()
    mask = torch.tensor([[True, True, True], [True, False, False]])
    garbage[~mask] = torch.nan
    outs, states = [], []
    for values in (x, garbage):
        fresh = make("encoder", "frames", image="image_resnet:tiny")
        fresh.load_state_dict(built.state_dict())
        out = fresh.train()(ModalityInputs(values, mask))
        out.pooled.pow(2).sum().backward()
        outs.append([out.pooled, *(p.grad for p in fresh.parameters())])
        states.append(fresh.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert all(g.isfinite().all() for g in outs[1])


def test_rows_without_a_video_between_rows_with_one():
    built = encoder()
    samples = [{"video": built.processor([grey(1)])}, {}, {"video": built.processor([grey(2), grey(3)])}]
    x = stack(samples)["video"]
    assert x.present.tolist() == [True, False, True]
    assert x.mask.tolist() == [[True, False], [False, False], [True, True]]
    assert built(x).pooled[1].tolist() == [0.0] * 16


@pytest.mark.parametrize(
    "thing, says",
    [
        ([], "a list of 0: no frames"),
        (3, "int is no video: give a list of pictures, or a folder of their files"),
        (grey(0), "Image is no video: give a list"),
        (b"abc", "bytes is no video"),
        ("clips/one.mp4", r"clips/one\.mp4 is no folder: a video is read as a list of pictures, or as a folder of their files"),
        ([grey(0), b"oops"], r"frame 2 of 2: 4 bytes that start with b'oops': no image that can be decoded"),
        ([grey(0), None], "frame 2 of 2: NoneType is no image"),
        ([grey(0), np.zeros((8, 8))], "frame 2 of 2: ndarray is no image: give a PIL image"),
    ],
)
def test_what_is_no_video(thing, says):
    with pytest.raises(ZooError, match=says):
        encoder().processor(thing)


def test_broken_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ZooError, match=rf"{tmp_path}: no frames"):
        encoder().processor(tmp_path)
    (tmp_path / "1.jpg").write_bytes(file(1)[:40])
    with pytest.raises(ZooError, match=r"frame 1 of 1: .*1\.jpg: no image that can be decoded"):
        encoder().processor(tmp_path)


def test_encoders_that_give_no_picture_or_do_not_pool(own_registry):
    with pytest.raises(ZooError, match=r"what it names as image gives \(1,\), not \(3, H, W\): name an image encoder"):
        make("encoder", "frames", image="tiny_text").processor(["word"])

    class Bare(torch.nn.Module):
        """Pools nothing."""

        def __init__(self):
            super().__init__()
            self.dim, self.processor = 3, None

        def forward(self, x):
            return Tokens(x.values.flatten(2).mT, torch.ones(len(x.values), 64, dtype=torch.bool), None, torch.ones(len(x.values)).bool())

    register("encoder", "fake_bare")(Bare)
    with pytest.raises(ZooError, match="encoder 'frames': the image encoder 'fake_bare' does not pool: name one that does"):
        make("encoder", "frames", image="fake_bare")(ModalityInputs(torch.zeros(1, 2, 3, 8, 8)))


def test_an_encoder_with_weights_from_elsewhere_is_rebuilt_without_them(tmp_path):
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), tmp_path / "w.safetensors")
    spec = {"name": "timm:test_vit", "image_size": 32}
    built = make("encoder", "frames", image={**spec, "pretrained": str(tmp_path / "w.safetensors")})
    assert built.portable() == {"image": {**spec, "pretrained": False}}
    assert built.processor.config() == make("encoder", "frames", **built.portable()).processor.config()
    assert built.processor.config()["image"]["size"] == 32
    assert encoder().portable() == {}
