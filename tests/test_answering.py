"""NoteLLM-1's generation: what is asked and answered behind the compressed word, and that no embedding notices."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import zoo
from zoo.collate import PairCollate, RowCollate
from zoo.errors import ZooError
from zoo.gradcache import backward
from zoo.hub import load, save
from zoo.registry import make
from zoo.types import Pair

TINY = {
    "backbone": {"name": "tiny_lm", "dim": 32, "layers": 2, "heads": 2, "vocab_size": 300},
    "vision": {"name": "tiny_image", "dim": 16, "heads": 2, "layers": 1, "image_size": 16},
    "connector": {"name": "attention_pool", "num_queries": 3},
    "dim": 8,
}
VARIANTS = {
    "base": "early",
    "micl": "micl",
    "late": ["early", "gated_late"],
    "notellm2": ["micl", "gated_late"],
    "only_late": ["text_only", "gated_late"],
    "text": "text_only",
}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # padding reorders sums of float32, a few units in the last place a layer
ROWS = [
    {
        "title": "red shoes",
        "topic": ["walk", "run"],
        "content": "soft",
        "image": Image.new("RGB", (16, 16), "red"),
        "category": "shop@shoes",
    },
    {"title": "tea", "topic": "food"},
    {"image": Image.new("RGB", (16, 16), "blue"), "category": "sky"},
    {"title": "a long title of a note", "category": "books@new@cheap"},
]


def build(ask="category", fusion="micl", **given):
    model = zoo.build("notellm2", **{**TINY, "fusion": fusion, "ask": ask, **given})
    model.trained = True
    return model


def pairs_of(model):
    numbered = [{**row, "id": i} for i, row in enumerate(ROWS)]
    return PairCollate(model.processor)([Pair(numbered[0], numbered[1]), Pair(numbered[2], numbered[3])])


def said(model, row):
    """Question and answer of a row as text: bytes are spelled back, special tokens stand in brackets."""
    answer = model.processor(row)["answer"]
    roles = {i: f"<{role}>".encode() for role, i in model.processor.tokenizer.roles.items()}
    spell = lambda ids: b"".join(roles.get(i, bytes([i % 256])) for i in ids.tolist()).decode()  # noqa: E731
    return spell(answer.values[~answer.extra["said"]]), spell(answer.values[answer.extra["said"]])


BYTES = {"backbone": {**TINY["backbone"], "tokenizer": "bytes"}}


class TestWhatIsAsked:
    @pytest.mark.parametrize(
        "language, question, answer",
        [
            ("zh", "<compressed>”。生成笔记类目：", "shop，shoes。"),
            ("en", '<compressed>". Generate the note category: ', "shop, shoes."),
        ],
    )
    def test_category(self, language, question, answer):
        assert said(build(language=language, **BYTES), ROWS[0]) == (question, answer)

    @pytest.mark.parametrize(
        "language, question, answer",
        [
            ("zh", "<compressed>”。生成笔记1个话题：", "run。"),
            ("en", '<compressed>". Generate 1 topic of the note: ', "run."),
        ],
    )
    def test_topics(self, language, question, answer):
        assert said(build("topics", language=language, **BYTES), ROWS[0]) == (question, answer)

    def test_two_levels_count(self):
        assert said(build(language="en", **BYTES), ROWS[3])[1] == "books, new."

    def test_the_prompt_never_shows_the_category(self):
        asked, plain = build(), build(None)
        for row in ROWS:
            assert torch.equal(asked.processor(row)["text"].values, plain.processor(row)["text"].values)

    def test_the_topic_that_is_asked_for_is_not_in_the_prompt(self):
        asked, plain = build("topics"), build(None)
        left = {**ROWS[0], "topic": "walk"}
        assert torch.equal(asked.processor(ROWS[0])["text"].values, plain.processor(left)["text"].values)

    def test_the_only_text_of_a_note_is_not_held_out(self):
        inputs = build("topics").processor({"topic": "food"})
        assert "answer" not in inputs
        assert torch.equal(inputs["text"].values, build(None).processor({"topic": "food"})["text"].values)

    @pytest.mark.parametrize("ask, row", [("category", ROWS[1]), ("topics", ROWS[2]), ("topics", {"title": "a"}), (None, ROWS[0])])
    def test_who_cannot_answer_is_not_asked(self, ask, row):
        assert "answer" not in build(ask).processor(row)

    def test_a_category_that_is_no_text(self):
        with pytest.raises(ZooError, match="category 3 is a int, not text: write a string, or leave the key out"):
            build().processor({"title": "a", "category": 3})

    def test_it_is_part_of_the_preprocessing(self, tmp_path):
        again = load(save(build(), tmp_path))
        assert again.asks == "category"
        assert again.processor.config()["note"]["ask"] == "category"


class TestEmbedding:
    @pytest.mark.parametrize("fusion", VARIANTS.values(), ids=VARIANTS)
    def test_no_embedding_sees_question_or_answer(self, fusion):
        model = build(fusion=fusion)
        batch = pairs_of(model)
        assert batch.inputs["answer"].present.tolist() == [True, True, False, True]
        without = batch._replace(inputs={k: v for k, v in batch.inputs.items() if k != "answer"})
        asked, plain = model.train()(batch), model.train()(without)
        assert len(asked.labels["answer"]) > 0
        assert not plain.labels
        for name in model.outputs:
            torch.testing.assert_close(asked.embeddings[name], plain.embeddings[name], **CLOSE)
            assert torch.equal(asked.present[name], plain.present[name])
        for name, at in plain.aux.items():
            assert torch.equal(asked.aux[name], at)

    def test_nothing_is_asked_when_encoding(self):
        model = build().eval()
        assert not model(RowCollate(model.processor)(ROWS)).logits

    def test_the_answers_are_predicted_from_the_words_before_them(self):
        """Row by row, without padding, the logits of an answer are those of the whole sequence read as text."""
        model = build(fusion="early").train()
        out = model(RowCollate(model.processor)(ROWS))
        alone = [model(RowCollate(model.processor)([row])) for row in ROWS if "category" in row]
        torch.testing.assert_close(out.logits["answer"], torch.cat([o.logits["answer"] for o in alone]), rtol=1e-4, atol=1e-5)
        answers = [model.processor(row)["answer"] for row in ROWS if "category" in row]
        assert torch.equal(out.labels["answer"], torch.cat([a.values[a.extra["said"]] for a in answers]))


class Again(torch.nn.Module):
    """An objective that asks for another batch than its own."""

    def forward(self, model, batch):
        return model(batch._replace(ids=None))


class TestObjective:
    def test_the_weighted_mean(self):
        model = build().train()
        batch = pairs_of(model)
        loss = make("objective", {"name": "answering", "weight": 0.25})(model, batch)
        out = model(batch)
        plain = make("objective", "pair_infonce")(model, batch)
        answer = F.cross_entropy(out.logits["answer"], out.labels["answer"])
        torch.testing.assert_close(loss.total, (plain.total + 0.25 * answer) / 1.25)
        torch.testing.assert_close(loss.parts["loss_answer"], answer.detach())
        assert loss.parts.keys() == {*plain.parts, "loss_answer"}

    def test_one_forward_pass(self):
        model = build().train()
        passes = []
        model.register_forward_hook(lambda *_: passes.append(1))
        make("objective", "answering")(model, pairs_of(model))
        assert len(passes) == 1

    def test_a_batch_without_answers_has_none_of_it(self):
        model = build().train()
        rows = [{"id": i, "title": t} for i, t in enumerate("abcd")]
        batch = PairCollate(model.processor)([Pair(rows[0], rows[1]), Pair(rows[2], rows[3])])
        loss = make("objective", "answering")(model, batch)
        plain = make("objective", "pair_infonce")(model, batch)
        torch.testing.assert_close(loss.total, plain.total / 1.01)
        assert loss.parts["loss_answer"] == 0

    def test_answers_are_learned(self):
        model = build(fusion="text_only").train()
        objective = make("objective", {"name": "answering", "weight": 1.0})
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
        lost = []
        batch = pairs_of(model)
        for _ in range(15):
            loss = objective(model, batch)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            lost.append(float(loss.parts["loss_answer"]))
        assert lost[-1] < 0.5 * lost[0], lost

    def test_another_contrast(self):
        model = build(fusion="early").train()
        objective = make("objective", {"name": "answering", "contrast": {"name": "infonce", "log_scale": 1.0}})
        objective.bind(model)
        assert objective(model, pairs_of(model)).parts.keys() == {"scale", "loss_answer"}

    def test_a_model_that_is_asked_nothing(self):
        with pytest.raises(ZooError, match=r"this one is asked nothing: write model.ask: category, or topics"):
            make("objective", "answering").bind(build(None))

    def test_the_other_objective_is_bound_too(self):
        with pytest.raises(ZooError, match=r"pair_infonce.on: .*'nothing'"):
            make("objective", {"name": "answering", "contrast": {"name": "pair_infonce", "on": {"nothing": 1.0}}}).bind(build())

    def test_a_weight_of_nothing(self):
        with pytest.raises(ZooError, match=r"answering.weight: 0.0 leaves the answers out: write one above 0"):
            make("objective", {"name": "answering", "weight": 0.0})

    def test_a_contrast_that_runs_the_model_again(self):
        model = build().train()
        objective = make("objective", "answering")
        objective.contrast = Again()
        with pytest.raises(ZooError, match=r"answering.contrast: this objective runs the model on further inputs"):
            objective(model, pairs_of(model))

    def test_chunks_have_no_answers(self):
        model = build().train()
        with pytest.raises(ZooError, match=r"run.gradcache: this model gives logits \(answer\)"):
            backward(model, make("objective", "answering"), pairs_of(model), 2, lambda loss: loss.total.backward())


def data(place, columns):
    """Four notes, clicked by two users each."""
    (place / "set").mkdir(exist_ok=True)
    notes = {"note_id": [*"abcd"], "title": ["cat", "dog", "tea", "sea"], "topic": ["pets", "pets", None, "sky"]}
    clicks = {"user_id": [1, 2] * 4, "note_id": [n for n in "abcd" for _ in range(2)], "timestamp": [*range(8)]}
    pq.write_table(pa.table(notes), place / "set" / "notes.parquet")
    pq.write_table(pa.table(clicks), place / "set" / "clicks.parquet")
    return make("data", {"name": "notes", "folder": "set", "columns": columns, "mine": {"low": 0, "min_groups": 1}}, place)


class TestData:
    def test_a_category_comes_from_its_column(self, tmp_path):
        told = data(tmp_path, {"topic": None, "category": "topic"})
        assert told.notes[0]["category"] == "pets"
        assert "topic" not in told.notes[0]
        assert "category" not in told.notes[2]
        assert told.texts()[0] == "cat"
        assert "category" not in data(tmp_path, {}).notes[0]

    def test_a_column_that_is_not_there(self, tmp_path):
        with pytest.raises(ZooError, match="kind"):
            data(tmp_path, {"category": "kind"})
