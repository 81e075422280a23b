import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar, TYPE_CHECKING, TypeAlias

from equinox.internal import ω

from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, VF, Y
from .._local_interpolation import LocalLinearInterpolation
from .._solution import RESULTS
from .._term import AbstractTerm
from .base import AbstractReversibleSolver


if TYPE_CHECKING:
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar

_ErrorEstimate: TypeAlias = None
_SolverState: TypeAlias = None


class AbstractSplitting(AbstractReversibleSolver):
    r"""Base class for splitting methods, which are also called compositions, and which
    for Hamiltonian systems are symplectic. They solve a pair of equations each of which
    drives the other,

    $$\frac{\mathrm{d}q}{\mathrm{d}t} = f(t, v), \qquad
    \frac{\mathrm{d}v}{\mathrm{d}t} = g(t, q),$$

    with `terms` a pair of terms, of $f$ and of $g$, and `y0` the pair of $q$ and $v$,
    as
    for [`diffrax.SemiImplicitEuler`][]. So they are for separable Hamiltonian systems,
    and, with $f(t, v) = v$, for equations $q'' = g(t, q)$ of second order.

    A step moves one half at a time, by turns:

    $$q \leftarrow q + a_1 h f(t, v), \quad v \leftarrow v + b_1 h g(t, q), \quad
    q \leftarrow q + a_2 h f(t, v), \quad \ldots$$

    Each half has its own time. The $t$ of $g$ is $t_0$ plus that part of the step by
    which $q$ has been moved, and the $t$ of $f$ goes with $v$ in the same way. This is
    the method applied to the pair of $q$ and the time of $g$, and of $v$ and the time
    of $f$, which drive each other as well and are autonomous: so order and
    symplecticity are the same whether or not $f$ and $g$ depend on time. Some methods
    have negative coefficients, so that times and states are evaluated that lie outside
    of the step.

    If there are controls other than time then their increments over the whole step are
    divided in the same proportions, as explicit Runge--Kutta methods do.

    The steps have to be of a constant size for energy not to drift. There is no error
    estimate. (For adaptive steps all the same, wrap the method in
    [`diffrax.HalfSolver`][].) Uses 1st order local linear interpolation for dense/ts
    output: for output as accurate as the steps, save at the ends of steps.

    Algebraically reversible: `backward_step` subtracts what `step` has added, in the
    opposite order, with the same evaluations. It is exact up to rounding, for any
    number and size of steps.

    **Subclassing.** Define the class attribute `coefficients` and the method `order`.
    The coefficients are $(a_1, b_1, a_2, \ldots)$, of any length. Those that are zero
    are skipped, so that a method may start with $v$. If they read the same in both
    directions then the method is symmetric: a step and then a step of the opposite size
    is the identity. Each half has to be moved by the whole step, or `ValueError` is
    raised.

    !!! example

        ```python
        import diffrax
        import jax.numpy as jnp


        class KickDriftKick(diffrax.AbstractSplitting):
            coefficients = (0, 1 / 2, 1, 1 / 2)

            def order(self, terms):
                return 2


        sol = diffrax.diffeqsolve(
            (
                diffrax.ODETerm(lambda t, v, args: v),
                diffrax.ODETerm(lambda t, q, args: -jnp.sin(q)),
            ),
            KickDriftKick(),
            t0=0,
            t1=10,
            dt0=0.01,
            y0=(jnp.array(1.0), jnp.array(0.0)),
            adjoint=diffrax.ReversibleAdjoint(),
        )
        q, v = sol.ys
        energy = v**2 / 2 - jnp.cos(q)
        assert jnp.allclose(energy, -jnp.cos(1.0), rtol=1e-4)
        ```
    """

    coefficients: AbstractClassVar[tuple[int | float, ...]]

    term_structure: ClassVar = (AbstractTerm, AbstractTerm)
    interpolation_cls: ClassVar[Callable[..., LocalLinearInterpolation]] = (
        LocalLinearInterpolation
    )

    def __check_init__(self):
        for half in (0, 1):
            moved = sum(self.coefficients[half::2])
            if abs(moved - 1) > 1e-8:
                name = type(self).__name__
                raise ValueError(
                    f"Must have `sum({name}.coefficients[{half}::2]) == 1`, for the "
                    f"{'second' if half else 'first'} half of `y` to be moved by the "
                    f"whole step, but it is {moved}."
                )

    @property
    def shared_evaluations(self) -> tuple[tuple[int, ...], ...]:
        # `backward_step` makes the evaluations of `step` in the opposite order.
        halves = [half for half, _, _ in _moves(self.coefficients)]
        return tuple(tuple(reversed(range(halves.count(half)))) for half in (0, 1))

    def init(
        self,
        terms: tuple[AbstractTerm, AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: tuple[Y, Y],
        args: Args,
    ) -> _SolverState:
        return None

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
        del solver_state, made_jump
        y: Any = list(y0)
        for half, increment in self.shears(terms, t0, t1, args):
            y[half] = (y[half] ** ω + increment(y) ** ω).ω
        y1 = tuple(y)
        return y1, None, dict(y0=y0, y1=y1), None, RESULTS.successful

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
        del solver_state, made_jump
        y: Any = list(y1)
        for half, increment in reversed(self.shears(terms, t0, t1, args)):
            y[half] = (y[half] ** ω - increment(y) ** ω).ω
        y0 = tuple(y)
        return y0, dict(y0=y0, y1=y1), None

    def shears(
        self,
        terms: tuple[AbstractTerm, AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        args: Args,
    ) -> list[tuple[int, Callable]]:
        controls = [term.contr(t0, t1) for term in terms]

        def shear(half, size, time):
            def increment(y):
                control = (size * controls[half] ** ω).ω
                t = time_inside(t0, t1, time)
                return terms[half].vf_prod(t, y[1 - half], args, control)

            return half, increment

        return [shear(*move) for move in _moves(self.coefficients)]

    def func(
        self,
        terms: tuple[AbstractTerm, AbstractTerm],
        t0: RealScalarLike,
        y0: tuple[Y, Y],
        args: Args,
    ) -> VF:
        term_1, term_2 = terms
        y0_1, y0_2 = y0
        return term_1.vf(t0, y0_2, args), term_2.vf(t0, y0_1, args)


@ft.cache
def _moves(
    coefficients: tuple[int | float, ...],
) -> tuple[tuple[int, float, float], ...]:
    """For each evaluation: which half it moves, by how much of the step, and by how
    much of it the other half has been moved, which is where in the step to evaluate."""
    moved = [0.0, 0.0]
    out = []
    for i, size in enumerate(coefficients):
        half = i % 2
        if size != 0:
            out.append((half, float(size), moved[1 - half]))
        moved[half] += size
        # Exactly at an end of the step, if it is meant to be.
        if abs(moved[half] - round(moved[half])) < 1e-14:
            moved[half] = float(round(moved[half]))
    return tuple(out)


def time_inside(t0: RealScalarLike, t1: RealScalarLike, time: float) -> RealScalarLike:
    """That after a part of the step."""
    if time == 0:
        return t0
    # No floating point error
    if time == 1:
        return t1
    return t0 + time * (t1 - t0)
