from itertools import islice, pairwise

from hypothesis import given
from hypothesis import strategies as st

from chanscale.config import FitConfig
from chanscale.schedule import plan_epochs, stage_budgets

lengths = st.tuples(st.integers(1, 9), st.integers(0, 9))


@given(lengths)
def test_without_a_tolerance_there_is_one_stage(length):
    scale, refine = length
    plan = list(plan_epochs(FitConfig(scale_epochs=scale, refine_epochs=refine, budget=0.8)))
    assert [moment.epoch for moment in plan] == list(range(scale + refine))
    assert [moment.phase for moment in plan] == ["scale"] * scale + ["refine"] * refine
    assert {(moment.stage, moment.budget) for moment in plan} == {(0, 0.8)}


@given(lengths)
def test_each_stage_opens_once_and_ends_once_and_so_do_its_phases(length):
    scale, refine = length
    config = FitConfig(scale_epochs=scale, refine_epochs=refine, tolerance=0.01)
    plan = list(islice(plan_epochs(config), 60))
    assert [moment.epoch for moment in plan] == list(range(60))
    for before, after in pairwise(plan):
        assert before.ends_stage == after.opens_stage == (after.stage == before.stage + 1)
        assert before.ends_phase == (after.index == 0)
        assert (before.index + 1 == before.length) == before.ends_phase
        if not before.ends_stage:
            assert (after.phase, after.index) in ((before.phase, before.index + 1), ("refine", 0))
    assert plan[0].opens_stage


def test_stages_after_the_first_take_half_the_epochs_rounded_up():
    config = FitConfig(scale_epochs=5, refine_epochs=4, tolerance=0.01)
    plan = list(islice(plan_epochs(config), 9 + 5 + 5))
    assert [(m.stage, m.phase) for m in plan[9:14]] == [(1, "scale")] * 3 + [(1, "refine")] * 2
    assert [m.stage for m in plan[14:]] == [2] * 5
    assert {m.length for m in plan if m.stage > 0 and m.phase == "scale"} == {3}


def test_each_stage_leaves_half_of_what_the_one_before_left():
    assert list(stage_budgets(FitConfig(budget=0.9))) == [0.9]
    budgets = list(islice(stage_budgets(FitConfig(budget=0.9, tolerance=0.0)), 20))
    left = [1 - budget for budget in budgets]
    assert all(abs(after - before / 2) < 1e-12 for before, after in pairwise(left))
    assert all(budget < 1 for budget in budgets)
