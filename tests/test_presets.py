"""The models of the paper at their real sizes: parameters of the presets, and the default model on a laptop."""

import logging
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo.errors import ZooError
from zoo.recipe import load_recipe, recipes

BASE = ["mqwen_base", "mtomato_base", "mqwen_bigg"]
META = {
    "mqwen_base": {"backbone": {"name": "qwen", "size": "qwen1_7b_chat", "device": "meta"}, "vision": "clip_vit_b16"},
    "mtomato_base": {"backbone": {"name": "llama", "size": "7b", "device": "meta"}, "vision": "clip_vit_b16"},
    "mqwen_bigg": {
        "backbone": {"name": "qwen", "size": "qwen1_7b_chat", "device": "meta"},
        "vision": {"name": "open_clip_vit_bigg_14", "device": "meta"},
    },
}


class TestPresets:
    def test_there_are_presets(self):
        assert {f"notellm2/{name}" for name in BASE} <= set(recipes())

    @pytest.mark.parametrize("name", BASE)
    def test_parameters_are_the_published_ones(self, name):
        with torch.device("meta"):
            model = zoo.build_from(f"notellm2/{name}", fusion=["micl", "gated_late"], **META[name])
        count = {part: sum(p.numel() for p in m.parameters()) for part, m in model.named_children()}
        wide = name == "mqwen_bigg"
        connector = {part: sum(p.numel() for p in m.parameters()) for part, m in model.connector.named_children()}
        assert model.connector.query_tokens.numel() == (24_576 if wide else 12_288)
        assert sorted(connector.values()) == sorted(
            [pytest.approx(142.87e6 if wide else 49.62e6, abs=5e3), pytest.approx(23.08e6 if wide else 19.93e6, abs=5e3)],
            key=lambda a: a.expected,
        )
        assert count["late"] == (6_815_744 if wide else 3_145_728)
        assert count["combine"] == 33_554_432
        assert count["project"] == 262_144
        assert count["backbone"] == pytest.approx(6.6e9 if name == "mtomato_base" else 7.1e9, rel=0.05)
        assert model.spec["dim"] == 64
        assert model.processor.config()["note"]["max_tokens"] == 140

    @pytest.mark.parametrize("name", BASE)
    def test_as_shipped_they_are_the_base_variant(self, name):
        model = load_recipe(f"notellm2/{name}").model
        assert (model["fusion"], model["backbone"]["pretrained"], model["vision"]["pretrained"]) == ("early", True, True)

    @pytest.mark.parametrize("name", BASE)
    def test_without_a_hub_the_error_says_what_to_do(self, name):
        with pytest.raises(ZooError, match=r"(?s)(Qwen/Qwen1.5-7B-Chat|meta-llama/Llama-2-7b-hf).*fetch it once with a network"):
            zoo.build_from(f"notellm2/{name}")


def memory(which: str) -> int:
    """Bytes, as Linux tells: VmRSS that are held, VmHWM the most since the mark was set back."""
    return int(re.search(rf"{which}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.slow
def test_the_default_model_runs_offline_on_a_laptop(caplog):
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the tests before this one in the same process
    before = memory("VmRSS")
    start = time.process_time()  # not the clock: other tests run beside this one
    with caplog.at_level(logging.WARNING, logger="zoo"):
        model = zoo.build("notellm2", backbone="qwen")
    built = time.process_time() - start
    assert [r.getMessage() for r in caplog.records if "read as bytes" in r.getMessage()] == [
        "qwen 0.5b has random weights: its texts are read as bytes (write tokenizer: a repository or folder, for its own)"
    ]
    rows = [{"title": "红色的鞋", "image": Image.new("RGB", (20, 24), "red")}, {"title": "only text"}]
    with pytest.warns(UserWarning, match="random weights that nothing was trained or loaded into") as seen:
        x = model.encode(rows)
    assert len(seen) == 1
    np.testing.assert_array_equal(model.encode(rows), x)  # a second warning would be an error
    assert x.shape == (2, 64)
    assert sum(p.numel() * p.element_size() for p in model.parameters()) < 2.7e9  # with CLIP, Q-Former and gate
    assert built < 20
    assert memory("VmHWM") - before < 4.5e9
