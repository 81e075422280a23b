from . import _solver
from ._adjoint import ReversibleAdjoint
from ._solver import (
    _upstream_init,
    AbstractERK,
    BitExact,
    Euler,
    FixedPointReversible,
    UReversible,
)
from ._upstream_autocitation import *  # noqa: F403
from ._upstream_autocitation import (
    _parse_reference as _parse_reference,
    _parse_reference_multi as _parse_reference_multi,
    citation as citation,
    citation_rules as citation_rules,
)


# The rules themselves are only to be found in the list.
[_cite_solver] = [rule for rule in citation_rules if rule.__name__ == "_solvers"]

# Those that wrap another solver have rules of their own.
_added = {
    cls
    for name, cls in vars(_solver).items()
    if isinstance(cls, type) and name not in vars(_upstream_init)
} - {BitExact, FixedPointReversible, UReversible}


def _added_solver(solver):
    if type(solver) in _added:
        name = type(solver).__name__
        return f"""
% You are using the {name} solver, which was introduced in:
""" + "\n\n".join(_parse_reference_multi(type(solver)))


citation_rules.append(_added_solver)


def _cite_wrapped(solver, saveat):
    found = _cite_solver(solver, saveat)
    return _added_solver(solver) if found is None else found


def _reversible_solver(solver, saveat=None):
    if type(solver) is UReversible:
        wrapped = _cite_wrapped(solver.solver, saveat)
        return (
            r"""
% You are using a reversible solver (`UReversible`), the construction of which was
% introduced in:
"""
            + _parse_reference(UReversible)
            + ("" if wrapped is None else "\n\n" + wrapped.strip())
        )


citation_rules.append(_reversible_solver)


@citation_rules.append
def _bit_exact_solver(solver, saveat=None):
    if type(solver) is BitExact:
        wrapped = solver.solver
        if issubclass(type(wrapped), (AbstractERK, Euler)):
            wrapped = UReversible(wrapped)  # The pair that it is coupled to.
        cite = _reversible_solver if type(wrapped) is UReversible else _cite_wrapped
        found = cite(wrapped, saveat)
        return (
            r"""
% You are using a solver that recovers every bit (`BitExact`). This was introduced in:
"""
            + "\n\n".join(_parse_reference_multi(BitExact))
            + ("" if found is None else "\n\n" + found.strip())
        )


@citation_rules.append
def _fixed_point_reversible_solver(solver, saveat=None):
    if type(solver) is FixedPointReversible:
        return _cite_wrapped(solver.solver, saveat)


@citation_rules.append
def _reversible_adjoint(adjoint):
    if type(adjoint) is ReversibleAdjoint:
        return r"""
% You are backpropagating by undoing the steps of a reversible solver
% (`ReversibleAdjoint`). This was introduced for SDEs, and for explicit Runge--Kutta
% methods, in:
""" + _parse_reference(ReversibleAdjoint)
