"""`ReversibleAdjoint` computes the gradient that `RecursiveCheckpointAdjoint` does.

Relative to the largest entry of each gradient, up to 1e-10 in float64: this leaves five
digits for rounding, which a backward pass over tens of steps of well-conditioned
problems does not use up. See `agreement.py` for the cases.
"""

import itertools as it

import pytest

from .agreement import CASES, compare, pairs, SOLVERS


# What is compiled here takes most of the time of the whole suite. So the quick part of
# it is every case with one of those solvers that are quick to compile, which take
# turns; and one case with every other solver, but for those that differ from others
# only by their tableau, or by what is wrapped.
_like_others = {
    "Ruth3",
    "ForestRuth",
    "HalfSolver(Bosh3)",
    "HalfSolver(VelocityVerlet)",
    "Dopri5",
    "Dopri8",
    "EES25",
    "EES27",
    "GaussLegendre4",
    "UReversible(Midpoint)",
    "UReversible(Ralston)",
    "UReversible(Bosh3)",
    "UReversible(Tsit5)",
    "UReversible(Dopri5)",
    "UReversible(Dopri8)",
}
_with_every_solver = "save t0+ts+t1, max_steps reached"
_quick_to_compile = (
    "SemiImplicitEuler",
    "LeapfrogMidpoint",
    "AsynchronousLeapfrog",
    "ReversibleHeun",
    "Heun",
    "UReversible(Euler)",
    "HalfSolver(ReversibleHeun)",
    "Tsit5",
    "UReversible(Heun)",
)


def _quick_pairs():
    for case, solver in pairs(case=_with_every_solver):
        if solver not in _like_others | set(_quick_to_compile):
            yield case, solver
    turns = it.cycle(_quick_to_compile)
    for case in CASES.values():
        if not case.is_quick:
            continue
        if case.quick_solver is not None:
            yield case.name, case.quick_solver
            continue
        for solver in it.islice(turns, len(_quick_to_compile)):
            if case.suits(SOLVERS[solver]):
                yield case.name, solver
                break


_quick = set(_quick_pairs())


@pytest.mark.parametrize(
    "case, solver",
    [
        pytest.param(*pair, marks=() if pair in _quick else pytest.mark.slow)
        for pair in pairs()
    ],
)
def test_agreement(case, solver):
    value_error, grad_error = compare(CASES[case], SOLVERS[solver])
    assert value_error <= CASES[case].tolerance
    assert grad_error <= CASES[case].tolerance


def test_quick_pairs_cover_everything():
    quick_cases = {case.name for case in CASES.values() if case.is_quick}
    assert {case for case, _ in _quick} == quick_cases | {_with_every_solver}
    assert {solver for _, solver in _quick} == set(SOLVERS) - _like_others
