"""The conformance suite: the promises of `tensorkv.store.KVStore` as checks, for every kind of store.

The author of a kind of store writes a `StoreMaker` for it and runs

    @pytest.mark.parametrize("case", applicable(MAKER), ids=lambda case: case.name)
    def test_conformance(case):
        case.run(MAKER)

    @pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
    def test_bad_input(bad):
        bad.run(MAKER)

The suite needs no test framework: a check raises AssertionError.
"""

from __future__ import annotations

from tensorkv.testing import (  # noqa: F401  (importing them registers their checks)
    checks_agreement,
    checks_alone,
    checks_calls,
    checks_numbers,
    checks_policies,
    checks_rounds,
    checks_state,
    checks_updaters,
    checks_values,
)
from tensorkv.testing.bad_inputs import BAD_INPUTS, BadInput
from tensorkv.testing.suite import CHECKS, Case, Check, StoreMaker

__all__ = ["BAD_INPUTS", "CHECKS", "BadInput", "Case", "Check", "StoreMaker", "applicable"]


def applicable(maker: StoreMaker) -> list[Case]:
    """Return the checks that the stores of `maker` must pass, each with a number of workers."""
    return [
        Case(check, workers)
        for check in CHECKS
        if check.suits(maker)
        for workers in check.workers
        if workers <= maker.max_workers
    ]
