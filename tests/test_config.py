"""A signature is the schema: what is converted, what is refused, and what the message says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from zoo.config import (
    EncoderSpec,
    Fault,
    Fraction,
    FusionSpec,
    Positive,
    check,
    check_spec,
    checked,
    described,
    part_kind,
    section_of,
    settings,
    split_spec,
)
from zoo.errors import ZooError, unknown


@dataclass(frozen=True, kw_only=True)
class Section:
    size: Positive = 1
    share: Fraction


class Tuned(BaseModel):
    size: int


def leaf(dim_in: int, dim_out: int, *, layers: Positive = 2, activation: Literal["gelu", "relu"] = "gelu"): ...


def arch(*, arch: str, layer: int = -1): ...


def whole(*, encoder: EncoderSpec = "leaf", fusion: FusionSpec = "leaf", spare: EncoderSpec | None = None, lr: float = 1.0): ...


def lookup(kind, name):
    stem, _, rest = name.partition(":")
    makers = {"leaf": leaf, "arch": arch}
    if stem not in makers:
        raise ZooError(unknown(kind, stem, makers))
    return makers[stem], {"arch": rest} if rest else {}


def found(maker, nested=False, **given):
    return {".".join(map(str, f.path)): f.says for f in check(maker, given, lookup, nested=nested)[1]}


class TestSpecs:
    @pytest.mark.parametrize("spec, split", [("a", ("a", {})), ({"name": "a", "x": 1}, ("a", {"x": 1})), ({"name": "a"}, ("a", {}))])
    def test_split(self, spec, split):
        assert split_spec(spec) == split

    @pytest.mark.parametrize("spec", [3, None, {"x": 1}, {"name": 3}, ["a"]])
    def test_what_names_no_part(self, spec):
        with pytest.raises(ZooError, match="names no part: write a name, or a mapping with 'name' and its keywords"):
            split_spec(spec)

    def test_kinds_of_parameters(self):
        assert part_kind(EncoderSpec) == part_kind(EncoderSpec | None) == "encoder"
        assert part_kind(FusionSpec) == "fusion"
        assert part_kind(str) is part_kind(None) is None
        assert section_of(tuple[Section, ...]) is Section
        assert section_of(tuple[Section, Section]) is section_of(list[int]) is None

    def test_settings_are_keyword_only(self):
        assert list(settings(leaf)) == ["layers", "activation"]


class TestValues:
    @pytest.mark.parametrize("written, value", [("1e-4", 1e-4), (1, 1.0), (0.5, 0.5)])
    def test_numbers(self, written, value):
        out, faults = check(whole, {"lr": written}, lookup)
        assert (out, faults) == ({"lr": value}, [])

    @pytest.mark.parametrize("section", [Section(share=0.5), {"share": 0.5}])
    def test_sections_become_their_class(self, section):
        def maker(*, one: Section, many: tuple[Section, ...] = ()): ...

        out, faults = check(maker, {"one": section, "many": [section, {"share": 1}]}, lookup)
        assert not faults
        assert out == {"one": Section(share=0.5), "many": (Section(share=0.5), Section(share=1.0))}

    def test_an_empty_section_means_its_defaults(self):
        @dataclass
        class Empty:
            size: int = 1

        def maker(*, section: Empty): ...

        assert check(maker, {"section": None}, lookup)[0] == {"section": Empty()}

    @pytest.mark.parametrize("hint, value", [(Tuned, {"size": 1}), (Path, "a"), (Any, object()), (type(lookup), lookup)])
    def test_other_types(self, hint, value):
        def maker(x): ...

        maker.__annotations__ = {"x": hint}
        assert check(maker, {"x": value}, lookup)[1] == []

    def test_no_annotation_takes_anything(self):
        def maker(x): ...

        assert check(maker, {"x": 3}, lookup) == ({"x": 3}, [])


class TestFaults:
    def test_all_at_once_with_their_keys(self):
        faults = found(whole, learning_rate=1, lr="fast", encoder={"name": "leaf", "layers": 0, "size": 1}, fusion=["leaf", "leav"])
        assert faults == {
            "learning_rate": "no keyword named 'learning_rate'; did you mean 'lr'? (have: encoder, fusion, lr, spare)",
            "lr": "'fast': input should be a valid number, unable to parse string as a number",
            "encoder.layers": "0: input should be greater than or equal to 1",
            "encoder.size": "no keyword named 'size' (have: activation, layers)",
            "fusion.1": "no fusion named 'leav'; did you mean 'leaf'? (have: arch, leaf)",
        }

    def test_choices(self):
        assert found(leaf, nested=True, activation="silu") == {"activation": "'silu': input should be 'gelu' or 'relu'"}

    def test_a_positional_parameter_is_no_setting(self):
        assert found(whole, encoder={"name": "leaf", "dim_in": 3}) == {"encoder.dim_in": "'dim_in' is not a setting: the model gives it"}

    def test_missing(self):
        assert found(leaf, layers=1) == {"": "'dim_out' is missing"}  # one key a place; both are listed:
        assert [f.says for f in check(leaf, {}, lookup)[1]] == ["'dim_in' is missing", "'dim_out' is missing"]
        assert found(leaf, nested=True) == {}
        assert found(whole, encoder="arch") == {"encoder": "'arch' is missing"}

    def test_a_name_that_carries_a_keyword(self):
        assert found(whole, encoder="arch:resnet18") == {}
        assert found(whole, encoder={"name": "arch:a", "arch": "b"}) == {"encoder.arch": "'arch' is already said by the name 'arch:a'"}

    def test_a_part_that_may_be_none(self):
        assert found(whole, spare=None) == {}
        assert found(whole, encoder=None) == {"encoder": "None: input should be a valid string"}

    def test_sections(self):
        def maker(*, one: Section, many: tuple[Section, ...] = ()): ...

        assert found(maker, one={"sise": 2}, many=[{"share": 2}, 5]) == {
            "one.sise": "no keyword named 'sise'; did you mean 'size'? (have: share, size)",
            "one": "'share' is missing",
            "many.0.share": "2: input should be less than or equal to 1",
            "many.1": "5: write a mapping, of size, share",
        }

    def test_the_entry_of_a_mapping_or_list_is_named(self):
        def maker(*, sizes: list[int] = (), rates: dict[str, float | Literal["off"]] = {}): ...  # noqa: B006

        assert list(found(maker, sizes=[1, "b"], rates={"x": "of"})) == ["sizes.1", "rates.x"]

    def test_a_spec_of_no_part(self):
        assert [f.path for f in check_spec("encoder", 5, lookup, ("model",))] == [("model",)]

    def test_described(self):
        assert described([Fault((), "x"), Fault(("a", 0), "y")]) == "x\na.0: y"

    def test_raised(self):
        assert checked(leaf, {"dim_in": 1, "dim_out": "2"}, "leaf", lookup) == {"dim_in": 1, "dim_out": 2}
        with pytest.raises(ZooError, match=r"^leaf: dim_in: 'x': input should be a valid integer"):
            checked(leaf, {"dim_in": "x", "dim_out": 2}, "leaf", lookup)
        with pytest.raises(ZooError, match=r"^leaf: 2 faults\n'dim_in' is missing\n'dim_out' is missing$"):
            checked(leaf, {}, "leaf", lookup)


class TestUnknown:
    @pytest.mark.parametrize(
        "got, have, message",
        [
            ("gatd_late", ["gated_late"], "no x named 'gatd_late'; did you mean 'gated_late'? (have: gated_late)"),
            ("learning_rate", ["lr"], "no x named 'learning_rate'; did you mean 'lr'? (have: lr)"),
            ("zzz", ["b", "a"], "no x named 'zzz' (have: a, b)"),
            ("zzz", [], "no x named 'zzz' (have: none)"),
        ],
    )
    def test_message(self, got, have, message):
        assert unknown("x", got, have) == message


@pytest.mark.parametrize("key", ["scale", "args", "kwargs"])
def test_what_takes_anything_names_no_settings(key):
    """As a class without an __init__ of its own, which shows that of nn.Module."""

    def anything(*args, **kwargs): ...

    assert found(anything, **{key: 1}) == {key: f"no keyword named {key!r} (have: none)"}
