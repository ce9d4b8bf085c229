"""The rules by which plug-ins and a model's joints are matched."""

from itertools import permutations

import pytest

from zoo.errors import ZooError
from zoo.joints import compose
from zoo.registry import register

pytestmark = pytest.mark.usefixtures("own_registry", "_fakes")
OFFERS = {"arrange": "fake_early", "combine": None, "schedule": "fake_joint"}


@pytest.fixture
def _fakes(own_registry):
    def combine(names, dim, *, bias: bool = False): ...

    def plain(): ...

    for name in ("fake_gate", "fake_sum", "fake_entropy", "fake_variance"):
        register("fusion", name, joints=("combine",))(combine)
    for name in ("fake_early", "fake_micl"):
        register("fusion", name, joints=("arrange",))(plain)
    register("fusion", "fake_joint", joints=("schedule",))(plain)
    register("fusion", "fake_alternating", joints={"schedule": None, "combine": "fake_entropy"})(plain)
    register("fusion", "fake_arranged", joints={"arrange": None, "combine": "fake_variance"})(plain)
    register("fusion", "fake_early_entropy", joints={"arrange": None, "combine": "fake_entropy"})(plain)
    register("fusion", "fake_experts", joints=("trunk",))(plain)
    register("fusion", "fake_all", joints=("arrange", "combine"))(plain)
    register("fusion", "fake_late", joints=("combine",), needs=("logits",))(combine)
    register("fusion", "fake_shared", joints=("schedule",), needs=("head", "classes"))(plain)


@pytest.mark.parametrize("nothing", [None, []])
def test_unfilled_joints_take_the_models_default(nothing):
    assert compose(nothing, "m", OFFERS) == (("fake_early", {}), None, None, ("fake_joint", {}))


@pytest.mark.parametrize("spec", ["fake_gate", ["fake_gate"], ("fake_gate",), {"name": "fake_gate"}])
def test_a_fusion_is_a_name_a_mapping_or_a_list(spec):
    assert compose(spec, "m", OFFERS).combine == ("fake_gate", {})


def test_keywords_travel_with_the_name():
    assert compose({"name": "fake_gate", "bias": True}, "m", OFFERS).combine == ("fake_gate", {"bias": True})


def test_a_plug_in_that_brings_another_fills_two_joints():
    composed = compose("fake_alternating", "m", OFFERS)
    assert (composed.schedule, composed.combine) == (("fake_alternating", {}), ("fake_entropy", {}))


def test_a_plug_in_may_fill_two_joints_itself():
    composed = compose("fake_all", "m", OFFERS)
    assert (composed.arrange, composed.combine) == (("fake_all", {}), ("fake_all", {}))


@pytest.mark.parametrize("fusion", list(permutations(["fake_alternating", {"name": "fake_gate", "bias": True}, "fake_micl"])))
def test_named_wins_over_brought_along_in_any_order(fusion):
    composed = compose(fusion, "m", OFFERS)
    assert composed == (("fake_micl", {}), None, ("fake_gate", {"bias": True}), ("fake_alternating", {}))


def test_naming_what_comes_along_gives_it_keywords():
    composed = compose(["fake_alternating", {"name": "fake_entropy", "bias": True}], "m", OFFERS)
    assert composed.combine == ("fake_entropy", {"bias": True})


@pytest.mark.parametrize("fusion", list(permutations(["fake_gate", "fake_sum"])))
def test_two_named_for_one_joint(fusion):
    with pytest.raises(ZooError, match=f"fusions '{fusion[0]}' and '{fusion[1]}' both fill the joint 'combine': name one of them"):
        compose(fusion, "m", OFFERS)


@pytest.mark.parametrize("fusion", list(permutations(["fake_alternating", "fake_arranged"])))
def test_two_that_bring_different_ones_along_need_a_word(fusion):
    with pytest.raises(ZooError, match=r"'fake_(entropy|variance)' and 'fake_(entropy|variance)' both fill the joint 'combine'"):
        compose(fusion, "m", OFFERS)
    assert compose([*fusion, "fake_sum"], "m", OFFERS).combine == ("fake_sum", {})


def test_two_that_bring_the_same_one_along_agree():
    assert compose(["fake_alternating", "fake_early_entropy"], "m", OFFERS).combine == ("fake_entropy", {})


def test_a_joint_that_the_model_lacks():
    with pytest.raises(ZooError) as e:
        compose("fake_experts", "m", {"combine": None})
    message = str(e.value)
    assert message.startswith("fusion 'fake_experts' acts at the joint 'trunk', which model 'm' does not have (it has: combine)")
    fit = message.partition("fusions that fit it: ")[2].split(", ")
    assert {"fake_gate", "fake_sum"} <= set(fit)
    assert not {"fake_experts", "fake_alternating", "fake_early"} & set(fit)
    assert "\n" not in message


def test_a_thing_that_the_model_lacks():
    with pytest.raises(ZooError) as e:
        compose("fake_shared", "m", OFFERS, gives=("logits", "classes"))
    message = str(e.value)
    assert message.startswith("fusion 'fake_shared' needs of a model: one linear head that all modalities share, which 'm' does not have;")
    fit = message.partition("fusions that fit it: ")[2].split(", ")
    assert {"fake_late", "fake_gate"} <= set(fit)
    assert "fake_shared" not in fit
    with pytest.raises(ZooError, match="needs of a model: one linear head that all modalities share, rows of known class, which"):
        compose("fake_shared", "m", OFFERS)


def test_who_gives_what_is_needed_gets_it():
    composed = compose(["fake_shared", "fake_late"], "m", OFFERS, gives=("logits", "head", "classes"))
    assert (composed.schedule, composed.combine) == (("fake_shared", {}), ("fake_late", {}))


def test_a_model_without_joints():
    with pytest.raises(ZooError, match=r"\(it has: none\); fusions that fit it: none"):
        compose("fake_gate", "m", {})


def test_all_faults_at_once():
    with pytest.raises(ZooError) as e:
        compose(["fake_experts", "fake_gate", "fake_sum"], "m", OFFERS)
    assert "'trunk'" in str(e.value)
    assert "'combine'" in str(e.value)


def test_an_unknown_fusion():
    with pytest.raises(ZooError, match="no fusion named 'fake_gatee'; did you mean 'fake_gate'"):
        compose("fake_gatee", "m", OFFERS)
