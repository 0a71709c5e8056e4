"""The declaration of the rules. What is missing or contradicts itself is refused at import, by name."""

from dataclasses import replace

import pytest

from robustft_kernels.core.bases import ADAMW, NO_STEP, SGD, GroupSpec, hyper_of
from robustft_kernels.core.methods import LEARNED, METHOD_HYPER, METHODS, RULES, Rule, check_rules
from robustft_kernels.step import decide

SOUND = Rule("mine", pulls=True, compares=False, measures="squares", half="observe", reads=("radius",))
BY_ROWS = Rule("mine", pulls=True, compares=False, measures="magnitudes", by_rows=True, half="observe_rows")
LEARNING = replace(RULES["ftp"], name="mine")
PENALIZING = Rule("mine", pulls=False, surveys="largest_row", penalty="sign", half="keep")

UNSOUND = {
    "no word on whether it pulls": (replace(SOUND, pulls=None), "does not say whether it pulls"),
    "measured, without a half": (replace(SOUND, half=""), "must name the rule that makes its step over processes"),
    "measured by rows, without a half": (replace(BY_ROWS, half=""), "must name the rule that makes its step"),
    "surveyed, without a half": (replace(PENALIZING, half=""), "must name the rule that makes its step"),
    "no word on what it compares": (replace(SOUND, compares=None), "does not say whether it compares"),
    "a half that is no rule": (replace(SOUND, half="obsrve"), "'obsrve' is none"),
    "a half that pulls": (replace(SOUND, half="project"), "half 'project', which does more than measure"),
    "a half that measures something else": (replace(SOUND, half="observe_rows"), "does not agree in measures, by_rows"),
    "a half that keeps no delta": (replace(LEARNING, half="observe_rows"), "does not agree in tracks"),
    "a half for nothing": (Rule("mine", pulls=True, half="observe"), "neither waits for its measures nor surveys"),
    "squares of rows": (replace(SOUND, by_rows=True), "must measure magnitudes of rows, or squares"),
    "tied tensors": (replace(SOUND, tied=True), "is tied, which is about rows"),
    "learning without a survey": (replace(LEARNING, surveys=""), "must survey the slope and track the delta"),
    "learning without a rule for it": (replace(LEARNING, when_learned=""), "must name the rule of its step once"),
    "learning without a delta": (replace(LEARNING, tracks=False), "must survey the slope and track the delta"),
    "a sign without a survey": (replace(PENALIZING, surveys="", half=""), "must survey the largest row"),
    "a conflict without a penalty": (
        Rule("mine", pulls=False, surveys="conflict", half="keep"),
        "so its penalty must be linear",
    ),
    "a cautious pull that measures": (
        replace(SOUND, cautious=True),
        "is cautious, so it must pull by an α",
    ),
    "a survey without a sign": (replace(PENALIZING, penalty=""), "must survey the largest row"),
    "an unknown measure": (replace(SOUND, measures="cubes"), "has measures='cubes': choose one of"),
    "an unknown state": (replace(LEARNING, learns="radii"), "has learns='radii': choose one of"),
    "an unknown hyper-parameter": (
        replace(SOUND, reads=("temperature",)),
        "reads 'temperature'.*add it to METHOD_HYPER",
    ),
    "a name that is taken": (replace(SOUND, name="spd"), "two rules have the name 'spd'"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_facts_are_refused_by_name(case):
    rule, message = UNSOUND[case]
    with pytest.raises(ValueError, match=rf"(rule '{rule.name}' |two rules).*{message}|{message}"):
        check_rules((*RULES.values(), rule))


@pytest.mark.parametrize("rule", [SOUND, BY_ROWS, LEARNING, PENALIZING], ids=repr)
def test_sound_facts_are_taken(rule):
    assert check_rules((*RULES.values(), rule))["mine"] is rule


def test_methods_and_rules_fit_together():
    named = {rule for method in METHODS.values() for rule in method.all_rules}
    halves = {rule.half for rule in RULES.values() if rule.half} | {rule.pull_half for rule in RULES.values()}
    halves |= {rule.when_learned for rule in RULES.values() if rule.when_learned}
    assert named | halves == set(RULES), "a rule is of no use, or is missing"
    assert {rule.learns for rule in RULES.values()} - {""} == set(LEARNED)


@pytest.mark.parametrize("key", METHOD_HYPER)
def test_every_number_that_a_rule_reads_arrives_alone(key):
    """Also one of a pair of betas. What the rule does not read is 0, so that no tensor is read for it."""
    group = {"method": "ftp", "strength": 2.0, "radius": 3.0, "k": 0.5, "radius_lr": 4.0, "radius_betas": (0.25, 0.75)}
    for base in (ADAMW, SGD, NO_STEP):
        own = {**dict.fromkeys(base.own, 1.0), "betas": (0.9, 0.99)}
        values = hyper_of({**own, **group}, base, GroupSpec(Rule("mine", pulls=True, reads=(key,))))
        assert [name for name in METHOD_HYPER if values[name]] == [key]


@pytest.mark.parametrize("table", ["DECIDE", "LEARN"])
def test_a_rule_without_its_function_is_refused(table, monkeypatch):
    monkeypatch.delitem(getattr(decide, table), "ftp")
    with pytest.raises(ValueError, match=r"rule 'ftp' has no function in step/decide\.py"):
        decide.check_functions()


@pytest.mark.parametrize("table", ["FUNCTIONS", "LEARN"])
def test_a_rule_without_its_device_function_is_refused(table, monkeypatch):
    pytest.importorskip("triton")
    from robustft_kernels.triton_kernels import decide

    monkeypatch.delitem(getattr(decide, table), "ftp")
    with pytest.raises(ValueError, match=r"rule 'ftp' .* no function in triton_kernels/decide\.py"):
        decide.check_functions()
