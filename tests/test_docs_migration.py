"""The pages for users of other libraries: their code runs from top to bottom, and what they name is there."""

import re
from importlib import import_module
from pathlib import Path

import open_clip
import pytest
import torch

import zoo
from zoo.models.notellm2 import NoteLLM2

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("from_sentence_transformers", "from_open_clip")}
OTHERS = {"encode_image", "encode_text", "add_adapter"}  # what the other libraries' models have
TINY = {
    "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 2, "vocab_size": 1024},
    "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
    "connector": {"name": "attention_pool", "num_queries": 2},
    "dim": 16,
    "language": "en",
}


def run(page, replaced=()):
    """A block may use what an earlier one made."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    assert blocks
    made = {}
    for block in blocks:
        for old, new in replaced:
            block = block.replace(old, new)
        exec(block, made)
    return made


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """What the pages call ``runs/demo``, in the current folder."""
    model = zoo.build("notellm2", **TINY)
    model.trained = True
    zoo.save(model, tmp_path / "runs/demo")
    monkeypatch.chdir(tmp_path)


def test_from_sentence_transformers(demo, capsys):
    made = run("from_sentence_transformers")
    said = capsys.readouterr().out.splitlines()
    assert said == ["(3, 3)", "(2,)", "(16,) 3", "['note', 'visual']", "{'fusion': 'micl+gated_late', 'text': 'title'}"]
    assert made["vectors"].dtype == "float32"


def test_from_open_clip(tmp_path, capsys):
    """With a tower and a language model of the same kinds, small enough, and nothing to fetch."""
    tower = '{"image_size": 28, "layers": 2, "width": 64, "head_width": 16, "patch_size": 14}'
    words = '{"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}'
    (tmp_path / "tiny-page.json").write_text(f'{{"embed_dim": 24, "vision_cfg": {tower}, "text_cfg": {words}}}')
    open_clip.add_model_config(tmp_path / "tiny-page.json")
    small = [("ViT-B-32/laion2b_s34b_b79k", "tiny-page"), ('"size": "0.5b", "pretrained": True', '"size": "tiny"')]
    with pytest.warns(UserWarning, match="random weights"):
        made = run("from_open_clip", small)
    assert capsys.readouterr().out == "(3, 64)\n"
    assert not torch.tensor(made["vectors"]).isnan().any()


def test_the_parts_that_download_nothing():
    found = dict(re.findall(r'`(vision|backbone)="([^"]+)"', PAGES["from_open_clip"].partition("```python")[0]))
    assert found == {"vision": "open_clip:ViT-B-32", "backbone": "tiny_lm"}
    with torch.device("meta"):
        zoo.build("notellm2", **found, connector="qformer", fusion=["micl", "gated_late"], language="en")


def test_the_tag_of_the_page_exists():
    (name, tag) = re.search(r'vision="open_clip:([\w-]+)/(\w+)"', PAGES["from_open_clip"]).groups()
    assert tag in open_clip.list_pretrained_tags_by_model(name)


@pytest.mark.parametrize("page", PAGES)
def test_the_names_of_the_tables_are_there(page):
    commands = set(re.findall(r"`zoo (\w+)[^`]*`", PAGES[page]))
    known = {command.name or command.callback.__name__ for command in import_module("zoo.cli").app.registered_commands}
    assert commands <= known
    named = set(re.findall(r"`model\.(\w+)\(", PAGES[page])) - OTHERS
    assert named <= set(dir(NoteLLM2))
    assert {"encode"} <= named
    links = re.findall(r"\]\(([^)#]+)", PAGES[page])
    assert links
    assert not [link for link in links if "://" not in link and not (ROOT / "docs" / link).exists()]
