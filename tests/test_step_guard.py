"""Which steps are dropped: the rule, its history, and what a resume needs of it."""

import math

import pytest

from step_guard import MINIMUM, WINDOW, StepGuard


def accepted(guard, steps, *, loss=2.0, norm=1.0):
    for _ in range(steps):
        guard.loss, guard.norm = loss, norm
        guard.accept()


def test_nothing_but_non_finite_steps_is_dropped_before_there_is_a_history():
    guard = StepGuard(norm_factor=10, loss_factor=2)
    accepted(guard, MINIMUM - 1)
    assert guard.judge(100.0, 100.0) is None
    for loss, norm in ((math.nan, 1.0), (2.0, math.inf), (math.inf, math.nan)):
        assert guard.judge(loss, norm) == "non-finite loss or gradient"


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (2.0, 10.0, None),
        (4.0, 1.0, None),
        (2.0, 10.1, "gradient norm 10.1 is more than 10 times 1, the median of the last 16"),
        (4.1, 1.0, "loss 4.1 is more than 2 times 2, the median of the last 16"),
        (0.1, 0.01, None),
    ],
)
def test_spikes_are_judged_by_the_median(loss, norm, reason):
    guard = StepGuard(norm_factor=10, loss_factor=2)
    accepted(guard, MINIMUM)
    assert guard.judge(loss, norm) == reason


def test_zero_turns_a_rule_off():
    guard = StepGuard(norm_factor=0, loss_factor=0)
    accepted(guard, MINIMUM)
    assert guard.judge(1e9, 1e9) is None and guard.judge(math.nan, 1.0)


def test_the_history_forgets_and_can_be_carried_over():
    guard = StepGuard(norm_factor=10, loss_factor=2)
    accepted(guard, 1000, norm=1.0)
    accepted(guard, WINDOW // 2 + 1, norm=50.0)  # now the median itself
    assert guard.judge(2.0, 100.0) is None
    resumed = StepGuard(norm_factor=10, loss_factor=2, losses=list(guard.losses), norms=list(guard.norms))
    assert (resumed.losses, resumed.norms) == (guard.losses, guard.norms) and len(guard.norms) == WINDOW
    for norm in (100.0, 501.0):
        assert resumed.judge(2.0, norm) == guard.judge(2.0, norm)
