"""Weights drawn by name, the golden files that rest on them, and the tool that writes those."""

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from tests.golden_files import FOLDER, digest, golden
from tools import lavis_reference, torchscale_reference
from tools.named_weights import fingerprint, numbers, state, weight

CASES = [
    ("albef_lavis", "pretrain"),
    ("albef_lavis", "retrieval"),
    ("blip_lavis", "pretrain"),
    ("blip_lavis", "retrieval"),
    ("blip_lavis", "caption"),
]
TRAINED = [case for case in CASES if case[1] != "caption"]
ALL = [*CASES, *(("beit3_torchscale", name) for name in ("retrieval", "reasoning", "answering", "captioning", "pretraining"))]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # what is stored was rounded to float32 once, and is recomputed here in float32


def philox(name: str, count: int) -> list[float]:
    """Philox 4x64-10 of Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011, in Python's integers."""
    word = 2**64
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
    found: list[int] = []
    while len(found) < count:
        a, b, c, d = len(found) // 4 + 1, 0, 0, 0  # NumPy counts up before it draws
        low, high = seed % word, seed // word
        for _ in range(10):
            first, second = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
            a, b, c, d = second // word ^ b ^ low, second % word, first // word ^ d ^ high, first % word
            low, high = (low + 0x9E3779B97F4A7C15) % word, (high + 0xBB67AE8584CAA73B) % word
        found += [a, b, c, d]
    return [((value >> 11) / 2**52 - 1) * math.sqrt(3) for value in found[:count]]


class TestNamedWeights:
    @pytest.mark.parametrize("name", ["a", "text_encoder.encoder.layer.0.output.dense.weight", "字"])
    def test_they_are_philox(self, name):
        np.testing.assert_array_equal(numbers(name, (3, 3)).ravel(), philox(name, 9))

    def test_known_values(self):
        np.testing.assert_allclose(numbers("a", (3,)), [1.21984674, 0.71429178, 0.54245188], rtol=1e-8)

    def test_the_same_name_and_shape_give_the_same_numbers(self):
        np.testing.assert_array_equal(numbers("b", (4, 5)), numbers("b", (4, 5)))
        np.testing.assert_array_equal(numbers("b", (4, 5)).ravel()[:7], numbers("b", (7,)))
        assert np.abs(numbers("b", (20,)) - numbers("c", (20,))).min() > 0

    def test_they_have_mean_0_and_variance_1(self):
        drawn = numbers("many", (100, 1000))
        assert abs(drawn.mean()) < 0.01
        assert abs(drawn.std() - 1) < 0.01
        assert abs(np.corrcoef(drawn[0], drawn[1])[0, 1]) < 0.1

    def test_of_each_kind(self):
        assert weight("norm1.weight", (500,)).mean() == pytest.approx(1, abs=0.05)
        assert weight("norm1.weight", (500,)).std() == pytest.approx(0.25, abs=0.02)
        assert weight("norm1.bias", (500,)).mean() == pytest.approx(0, abs=0.05)
        assert weight("dense.weight", (50, 100)).std() == pytest.approx(0.1, abs=0.01)
        assert weight("proj.weight", (50, 3, 8, 8)).std() == pytest.approx(192**-0.5, rel=0.05)
        assert weight("pos_embed", (1, 17, 48)).std() == pytest.approx(48**-0.5, rel=0.05)
        assert 0.05 <= weight("temp", ()) <= 0.15
        np.testing.assert_allclose((weight("text_queue", (32, 64)) ** 2).sum(0), 1, rtol=1e-6)
        assert weight("idx_queue", (1, 3)).tolist() == [[-100, -100, -100]]
        assert weight("queue_ptr", (1,)).tolist() == [0]
        assert weight("position_ids", (1, 3)).tolist() == [[0, 1, 2]]

    def test_shared_parameters_have_one_value(self):
        made = state({"words.weight": (5, 4)}, {"head.weight": "words.weight"})
        np.testing.assert_array_equal(made["head.weight"], weight("words.weight", (5, 4)))

    def test_a_fingerprint_changes_with_anything(self):
        made = state({"a": (2, 3)})
        others = [{"b": made["a"]}, {"a": made["a"].T}, {"a": made["a"].astype(np.float64)}, {"a": np.nextafter(made["a"], 9)}]
        assert len({fingerprint(made), *map(fingerprint, others)}) == 5


class TestFiles:
    def test_they_are_small(self):
        stored = sorted(FOLDER.glob("*.safetensors"))
        assert [file.stem for file in stored] == sorted({file for file, _ in ALL})
        assert sum(file.stat().st_size for file in stored) < 350_000

    @pytest.mark.parametrize("file, name", ALL)
    def test_the_state_is_the_one_that_the_library_was_given(self, file, name):
        case = golden(file, name)
        assert fingerprint({name: value.numpy() for name, value in case.state.items()}) == case.case["fingerprint"]

    @pytest.mark.parametrize("file, name", TRAINED)
    def test_teachers_differ_from_students(self, file, name):
        made = golden(file, name).state
        twins = [entry for entry in made if entry.split(".")[0].endswith("_m") and not entry.endswith("position_ids")]
        assert len(twins) > 80
        assert all(not torch.equal(made[entry], made[entry.replace("_m.", ".", 1)]) for entry in twins)

    @pytest.mark.parametrize("file, name", TRAINED)
    def test_losses_follow_from_logits(self, file, name):
        case = golden(file, name)
        itm = F.cross_entropy(case["itm_logits"], torch.tensor([1] * 4 + [0] * 8))
        torch.testing.assert_close(itm, case["loss_itm"], **CLOSE)
        if case["sim_i2t"].shape == case["targets_i2t"].shape:  # BLIP's retrieval overwrites its logits before it tells them
            both = [-(case[f"targets_{way}"] * F.log_softmax(case[f"sim_{way}"], dim=1)).sum(1).mean() for way in ("i2t", "t2i")]
            torch.testing.assert_close(sum(both) / 2, case["loss_itc"], **CLOSE)
        parts = [value for entry, value in case.arrays.items() if entry.startswith("loss_")]
        torch.testing.assert_close(sum(parts), case["loss"], **CLOSE)

    @pytest.mark.parametrize("name, loss", [("pretrain", "loss_lm"), ("caption", "loss")])
    def test_blip_smooths_and_shifts(self, name, loss):
        case = golden("blip_lavis", name)
        found = F.cross_entropy(case["lm_logits"][:, :-1].flatten(0, 1), case["lm_labels"][:, 1:].flatten(), label_smoothing=0.1)
        torch.testing.assert_close(found, case[loss], **CLOSE)

    def test_albef_mixes_words_and_its_teacher(self):
        case = golden("albef_lavis", "pretrain")
        there = case["mlm_labels"] != -100
        student = F.log_softmax(case["mlm_logits"][there], dim=-1)
        soft = -(case["mlm_logits_m"].softmax(-1) * student).sum(-1).mean()
        torch.testing.assert_close(0.6 * F.nll_loss(student, case["mlm_labels"][there]) + 0.4 * soft, case["loss_mlm"], **CLOSE)

    @pytest.mark.parametrize("file", ["albef_lavis", "blip_lavis"])
    def test_vision_tokens_are_those_of_timm(self, file):
        """Another implementation on the same weights and pictures: both are as LAVIS had them."""
        case = golden(file, "pretrain")
        tower = VisionTransformer(**case.told["vision"], num_classes=0, global_pool="")
        made = {name.removeprefix("visual_encoder."): value for name, value in case.state.items() if name.startswith("visual_encoder.")}
        tower.load_state_dict(made)
        tower.eval()
        image = case.inputs["image"]
        seen = tower(image)
        torch.testing.assert_close(seen, case["image_embeds"], rtol=0, atol=2e-5)
        assert (tower(image.roll(1, 0)) - case["image_embeds"]).abs().max() > 0.1

    def test_a_digest_tells_gradients_apart(self):
        gradient = torch.from_numpy(numbers("some gradient", (6, 4)))
        assert digest("a", gradient) == pytest.approx(
            (float(gradient.norm()), float((gradient * torch.from_numpy(numbers("gradient of a", (6, 4)))).sum()))
        )
        assert abs(digest("a", gradient)[1] - digest("a", gradient.roll(1, 0))[1]) > 0.1
        assert abs(digest("a", gradient)[1] - digest("b", gradient)[1]) > 0.1

    @pytest.mark.parametrize("file, name", ALL)
    def test_gradients_are_of_every_trained_parameter(self, file, name):
        case = golden(file, name)
        found = case.gradients("loss")
        assert set(found) <= set(case.state)
        assert not [entry for entry in found if entry.endswith(("queue", "ptr", "position_ids"))]
        whole = {
            entry.removeprefix("gradient/"): value
            for entry, value in case.arrays.items()
            if entry.startswith("gradient/") and value.dim() < 2
        }
        assert whole
        for entry, value in whole.items():
            assert digest(entry, value) == pytest.approx(found[entry], rel=1e-5, abs=1e-6)


class TestTool:
    def test_an_environment_that_holds_its_packages_is_left_alone(self, tmp_path, monkeypatch):
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something ran"))
        (tmp_path / ".lavis").write_text("\n".join((*lavis_reference.PINNED, *lavis_reference._borrowed())))
        assert lavis_reference.build(tmp_path) == tmp_path / "bin" / "python"

    def test_a_later_python_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "version_info", (3, 12, 1))
        with pytest.raises(SystemExit, match=r"wheels up to Python 3\.11, and this is .*: run this with a Python 3\.11"):
            lavis_reference.build(tmp_path / "env")

    @pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="is refused before")
    def test_a_folder_of_something_else_is_left_alone(self, tmp_path):
        (tmp_path / "mine").write_text("kept")
        with pytest.raises(SystemExit, match=r"holds something else: give --env a folder that is not there, such as \.venv-lavis"):
            lavis_reference.build(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["mine"]

    @pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="is refused before")
    def test_an_interpreter_without_torch_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lavis_reference, "_borrowed", lambda: [str(tmp_path)])
        with pytest.raises(SystemExit, match=r"lacks torch, torchvision, numpy, .* run this with the Python that `make venv` filled"):
            lavis_reference.build(tmp_path / "env")

    def test_pip_that_fails_is_told(self):
        with pytest.raises(SystemExit, match=r"pip could not install \(exit status 3\)"):
            lavis_reference._run([sys.executable, "-c", "raise SystemExit(3)"], "pip could not install")

    def test_lavis_that_fails_is_told(self, tmp_path):
        with pytest.raises(SystemExit, match="LAVIS failed, see above"):
            lavis_reference.write(Path("/bin/false"), tmp_path)

    @pytest.mark.slow
    def test_lavis_says_the_same_again(self, tmp_path):
        python = Path(__file__).parents[1] / ".venv-lavis" / "bin" / "python"
        if not python.exists():
            pytest.skip("there is no .venv-lavis: `make golden` makes it")
        lavis_reference.write(python, tmp_path)
        for stored in FOLDER.glob("*_lavis.safetensors"):
            kept, made = (load_file(folder / stored.name) for folder in (FOLDER, tmp_path))
            torch.testing.assert_close(made, kept, rtol=1e-5, atol=1e-5)


class TestToolOfTorchscale:
    def test_an_environment_that_holds_its_packages_is_left_alone(self, tmp_path, monkeypatch):
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something ran"))
        (tmp_path / ".torchscale").write_text("\n".join((*torchscale_reference.PINNED, *torchscale_reference._borrowed())))
        assert torchscale_reference.build(tmp_path) == tmp_path / "bin" / "python"

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path):
        (tmp_path / "mine").write_text("kept")
        with pytest.raises(SystemExit, match=r"holds something else: give --env a folder that is not there, such as \.venv-torchscale"):
            torchscale_reference.build(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["mine"]

    def test_an_interpreter_without_torch_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torchscale_reference, "_borrowed", lambda: [str(tmp_path)])
        with pytest.raises(SystemExit, match=r"lacks torch, timm, .* run this with the Python that `make venv` filled"):
            torchscale_reference.build(tmp_path / "env")

    def test_what_fails_is_told(self, tmp_path):
        with pytest.raises(SystemExit, match=r"pip could not install \(exit status 3\)"):
            torchscale_reference._run([sys.executable, "-c", "raise SystemExit(3)"], "pip could not install")
        with pytest.raises(SystemExit, match="torchscale failed, see above"):
            torchscale_reference.write(Path("/bin/false"), tmp_path)

    @pytest.mark.slow
    def test_torchscale_says_the_same_again(self, tmp_path):
        python = Path(__file__).parents[1] / ".venv-torchscale" / "bin" / "python"
        if not python.exists():
            pytest.skip("there is no .venv-torchscale: `make golden` makes it")
        torchscale_reference.write(python, tmp_path)
        kept, made = (load_file(folder / "beit3_torchscale.safetensors") for folder in (FOLDER, tmp_path))
        torch.testing.assert_close(made, kept, rtol=1e-5, atol=1e-5)
