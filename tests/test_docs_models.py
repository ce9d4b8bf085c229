"""The pages from_lavis, notellm1_against_notellm2 and image_text run as they stand; the Chinese README has the code of the English."""

import json
import re
from pathlib import Path

import pytest
import yaml

from zoo.models._notes import LANGUAGES, QUESTIONS
from zoo.recipe import load_recipe, recipes

ROOT = Path(__file__).parents[1]
PAGES = ("from_lavis", "notellm1_against_notellm2", "image_text")


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def run(name):
    made = {}
    for block in re.findall(r"^```python\n(.*?)^```", page(f"docs/{name}.md"), re.MULTILINE | re.DOTALL):
        exec(block, made)
    return made


def test_from_lavis(capsys):
    run("from_lavis")
    assert capsys.readouterr().out == "(3, 64) (3, 3)\n"


def test_image_text():
    made = run("image_text")
    assert made["model"].trunk.blocks[0].cross is None
    assert made["model"].trunk.blocks[1].cross is not None
    for block in re.findall(r"^```yaml\n(.*?)^```", page("docs/image_text.md"), re.MULTILINE | re.DOTALL):
        load_recipe("albef/emoji_en", *(f"{key}={json.dumps(value)}" for key, value in yaml.safe_load(block).items()))


def test_notellm1_against_notellm2(capsys):
    made = run("notellm1_against_notellm2")
    assert capsys.readouterr().out == "('note',) ('note', 'visual')\n"
    made["objective1"].bind(made["notellm1"])
    made["objective2"].bind(made["notellm2"])
    assert (made["objective1"].weight, made["objective1"].contrast.alpha, made["objective2"].alpha) == (0.01, 9.0, 9)


def test_the_prompts_of_the_page_are_those_of_the_model():
    words, questions = LANGUAGES["zh"], QUESTIONS["zh"]
    said = page("docs/notellm1_against_notellm2.md")
    assert f"{words.compress}<IMG_EMB>{words.close}{words.note}" in said
    assert all(f"`{words.close}{question}`" in said for question in questions.values())


@pytest.mark.parametrize("name", PAGES)
def test_recipes_and_pages_that_are_named_are_there(name):
    said = page(f"docs/{name}.md")
    assert set(re.findall(r"[` ]((?:notellm2|clip|albef|blip|coca|vlmo|beit_3|visual_tokenizer)/\w+)", said)) <= set(recipes())
    assert all((ROOT / "docs" / link).exists() for link in re.findall(r"\]\(([\w.]+\.md)", said))


def test_the_chinese_readme_has_the_code_and_the_figures_of_the_english_one():
    english, chinese = page("README.md"), page("README.zh.md")
    blocks = re.findall(r"^```.*?^```", english, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    assert blocks == re.findall(r"^```.*?^```", chinese, re.MULTILINE | re.DOTALL)
    figures = r"\.\d{3} \[\.\d{3}, \.\d{3}\]"
    assert re.findall(figures, english) == re.findall(figures, chinese)
    assert english.count("\n## ") == chinese.count("\n## ")
