from typing import ClassVar, TypeAlias

from equinox.internal import ω
from jaxtyping import PyTree

from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, VF, Y
from .._evaluate_where import evaluate_where
from .._solution import RESULTS
from .._term import AbstractTerm
from .splitting import AbstractSplitting, time_inside


_ErrorEstimate: TypeAlias = None
# The vector field of the second term at the end of the step before.
_SolverState: TypeAlias = VF


class VelocityVerlet(AbstractSplitting):
    r"""Velocity Verlet method, which is also called leapfrog, or kick--drift--kick.

    Symplectic, symmetric method of 2nd order, for a pair of states each of which drives
    the other. The form of the equations is that of [`diffrax.AbstractSplitting`][],
    with any dependence on time. Does not support adaptive step sizing. Uses 1st order
    local linear interpolation for dense/ts output. One step, with a tilde for the
    middle of it, is

    $$\tilde v = v_0 + \frac{h}{2} g(t_0, q_0), \quad
    q_1 = q_0 + h f(\tilde t, \tilde v), \quad
    v_1 = \tilde v + \frac{h}{2} g(t_1, q_1).$$

    Evaluates each of the two terms once for each step: the vector field with which a
    step ends is the solver state, and the next one starts with it. (Unless there is a
    jump in between, after which it is evaluated anew.)

    Stable for $h \omega < 2.000$, with $\omega$ the frequency of a harmonic oscillator:
    for the same work, no splitting takes larger steps.

    Algebraically reversible: `backward_step` subtracts the three increments in the
    opposite order. It is exact up to rounding, for any number and size of steps.

    Best at large steps, where the error need not be small, as
    [`diffrax.PositionVerlet`][] is, which is the same with the two halves exchanged: it
    evaluates the first term once more, and carries no state. Also what most codes for
    molecular dynamics use, and so what to compare with them. For small errors, use a
    method of higher order, such as [`diffrax.BlanesMoan4`][]. Not for systems with
    damping.

    ??? cite "Reference"

        ```bibtex
        @article{swope1982computer,
            author={Swope, William C. and Andersen, Hans C. and Berens, Peter H. and
                    Wilson, Kent R.},
            title={{A} computer simulation method for the calculation of equilibrium
                   constants for the formation of physical clusters of molecules:
                   {A}pplication to small water clusters},
            journal={The Journal of Chemical Physics},
            volume={76},
            number={1},
            pages={637--649},
            year={1982},
        }
        ```
    """

    coefficients: ClassVar[tuple[float, ...]] = (0, 1 / 2, 1, 1 / 2)
    # By term. `step` evaluates the second one at its end, and `backward_step` at its
    # start, which is the end of the step before.
    shared_evaluations = ((0,), (None,))  # pyright: ignore
    carried_evaluations = ((None,), (0,))

    def order(self, terms: PyTree[AbstractTerm]) -> int:
        del terms
        return 2

    def init(
        self,
        terms: tuple[AbstractTerm, AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: tuple[Y, Y],
        args: Args,
    ) -> _SolverState:
        del t1
        return terms[1].vf(t0, y0[0], args)

    def step(
        self,
        terms: tuple[AbstractTerm, AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: tuple[Y, Y],
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[tuple[Y, Y], _ErrorEstimate, DenseInfo, _SolverState, RESULTS]:
        drift, kick = terms
        q0, v0 = y0
        control1, control2 = _controls(terms, t0, t1)

        vf0 = evaluate_where(made_jump, lambda: kick.vf(t0, q0, args), solver_state)
        vhalf = (v0**ω + kick.prod(vf0, control2) ** ω).ω
        thalf = time_inside(t0, t1, 0.5)
        q1 = (q0**ω + drift.vf_prod(thalf, vhalf, args, control1) ** ω).ω
        vf1 = kick.vf(t1, q1, args)
        v1 = (vhalf**ω + kick.prod(vf1, control2) ** ω).ω

        y1 = (q1, v1)
        return y1, None, dict(y0=y0, y1=y1), vf1, RESULTS.successful

    def backward_step(
        self,
        terms: tuple[AbstractTerm, AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: tuple[Y, Y],
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[tuple[Y, Y], DenseInfo, _SolverState]:
        del made_jump
        drift, kick = terms
        q1, v1 = y1
        control1, control2 = _controls(terms, t0, t1)

        vhalf = (v1**ω - kick.prod(solver_state, control2) ** ω).ω
        thalf = time_inside(t0, t1, 0.5)
        q0 = (q1**ω - drift.vf_prod(thalf, vhalf, args, control1) ** ω).ω
        vf0 = kick.vf(t0, q0, args)
        v0 = (vhalf**ω - kick.prod(vf0, control2) ** ω).ω

        y0 = (q0, v0)
        return y0, dict(y0=y0, y1=y1), vf0

    def restore_state(
        self,
        terms: tuple[AbstractTerm, AbstractTerm],
        t1: RealScalarLike,
        y1: tuple[Y, Y],
        args: Args,
        solver_state: _SolverState,
        recorded: PyTree,
        made_jump: BoolScalarLike,
    ) -> _SolverState:
        del recorded
        # Undoing a step across a jump leaves us with the vector field after the jump.
        return evaluate_where(
            made_jump, lambda: terms[1].vf(t1, y1[0], args), solver_state
        )


VelocityVerlet.__init__.__doc__ = """**Arguments:** None"""


def _controls(
    terms: tuple[AbstractTerm, AbstractTerm], t0: RealScalarLike, t1: RealScalarLike
) -> tuple[PyTree, PyTree]:
    """The first one over the step, and half of the second one."""
    drift, kick = terms
    return drift.contr(t0, t1), (0.5 * kick.contr(t0, t1) ** ω).ω
