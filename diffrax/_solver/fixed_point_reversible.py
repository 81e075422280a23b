from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from equinox.internal import ω
from jaxtyping import PyTree

from .._custom_types import (
    AbstractBrownianIncrement,
    AbstractSpaceTimeTimeLevyArea,
    Args,
    BoolScalarLike,
    Control,
    DenseInfo,
    RealScalarLike,
    VF,
    Y,
)
from .._invert_step import invert_step
from .._known_controls import is_single_term, TermWithControl
from .._local_interpolation import AbstractLocalInterpolation
from .._solution import RESULTS
from .._term import AbstractTerm
from .base import (
    AbstractReversibleSolver,
    AbstractSolver,
    AbstractWrappedSolver,
)
from .implicit_euler import ImplicitEuler
from .reversible import _combine, _negative, _stages
from .runge_kutta import AbstractERK, AbstractRungeKutta, ButcherTableau


def is_plain_erk(solver: AbstractSolver) -> bool:
    """Whether this is an explicit Runge--Kutta method whose steps are those of a single
    Butcher tableau."""
    return (
        issubclass(type(solver), AbstractERK)
        and isinstance(solver.tableau, ButcherTableau)  # pyright: ignore
        and type(solver).step is AbstractRungeKutta.step
        and type(solver).init is AbstractRungeKutta.init
    )


class FixedPointReversible(AbstractReversibleSolver, AbstractWrappedSolver):
    r"""Undoes the steps of any one-step method numerically: finds the $y_0$ from which
    a step leads to $y_1$, by a fixed-point iteration.

    Going forward this is the wrapped solver itself, to the bit. With $\Phi_h$ a step of
    it, going backward starts from the guess $y_0 = \Phi_{-h}(y_1)$, which is off by no
    more than the local error of the method, and corrects it by

    $$y_0 \leftarrow y_0 + \Phi_{-h}(y_1) - \Phi_{-h}(\Phi_h(y_0))$$

    until $\Phi_h(y_0)$ is within 16 units of rounding of $y_1$, for each leaf of `y`
    relative to its largest entry; or until two rounds have not halved the distance.

    This is what [`diffrax.ReversibleAdjoint`][] uses for solvers that are not
    reversible. There is rarely a need to name it.

    **What is reversed, and how well.** A step is undone up to rounding, provided that
    it is small enough for the iteration to converge: usually if the step size times the
    Lipschitz constant of the vector field is below one half or so. Steps at tight
    tolerances need no correction or one. As the equation $\Phi_h(y_0) = y_1$ may have
    other roots if steps are large, that the iteration converges proves nothing there.
    Going back over many steps multiplies rounding if the dynamics backward in time are
    unstable, which is the case wherever solutions approach each other. This is why
    [`diffrax.ReversibleAdjoint`][] stores states, and checks against them.

    !!! example

        ```python
        import diffrax
        import jax.numpy as jnp

        solver = diffrax.FixedPointReversible(diffrax.Heun())
        terms = diffrax.ODETerm(lambda t, y, args: jnp.sin(y))
        t0, t1, y0 = 0.0, 0.1, jnp.array([1.0, 2.0])
        y1, *_ = solver.step(terms, t0, t1, y0, None, None, made_jump=False)
        back, *_ = solver.backward_step(terms, t0, t1, y1, None, None, made_jump=False)
        assert jnp.allclose(back, y0, rtol=1e-5)
        ```

    !!! warning "When not to use this"

        For stiff problems, and for explicit methods near the limit of their stability,
        going back takes many corrections or is impossible.

    The solver state of a first-same-as-last Runge--Kutta method comes back from
    `backward_step` as one that holds the vector field at `y0`. So it does for the first
    step of a solve, which had been given one that did not.
    """

    solver: AbstractSolver
    max_corrections: int = 16

    def __check_init__(self):
        name = type(self.solver).__name__
        if isinstance(self.solver, type):
            name = self.solver.__name__
            raise ValueError(
                f"Cannot use `FixedPointReversible({name})`: pass an instance of the "
                f"method, `FixedPointReversible({name}())`."
            )
        if isinstance(self.solver, AbstractReversibleSolver):
            raise ValueError(
                f"Cannot use `FixedPointReversible({name}())`: `{name}` is reversible "
                "by itself."
            )
        if not isinstance(self.max_corrections, int) or self.max_corrections < 0:
            raise ValueError(
                "`max_corrections` in `FixedPointReversible(solver, max_corrections="
                f"...)` must be a non-negative integer, but got {self.max_corrections}."
            )

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self) -> Callable[..., AbstractLocalInterpolation]:  # pyright: ignore
        return self.solver.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    @property
    def scan_kind(self):
        # Of the wrapped solver, where `DirectAdjoint` and `ForwardMode` set it.
        return getattr(self.solver, "scan_kind", "lax")

    @property
    def root_finder(self):
        # Of an implicit method, for `diffeqsolve` to set its tolerances.
        return self.solver.root_finder  # pyright: ignore

    def order(self, terms: PyTree[AbstractTerm]) -> int | None:
        return self.solver.order(terms)

    def strong_order(self, terms: PyTree[AbstractTerm]) -> RealScalarLike | None:
        return self.solver.strong_order(terms)

    def error_order(self, terms: PyTree[AbstractTerm]) -> RealScalarLike | None:
        return self.solver.error_order(terms)

    def init(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> Any:
        solver_state = self.solver.init(terms, t0, t1, y0, args)
        if solver_state is not None and not is_plain_erk(self.solver):
            name = type(self.solver).__name__
            raise ValueError(
                f"Cannot use `FixedPointReversible({name}())`: the state that `{name}` "
                "carries from one step to the next cannot be reconstructed. Consider "
                f"using `solver={name}()` itself, with `adjoint=ReversibleAdjoint()`, "
                "which stores states instead."
            )
        return solver_state

    def func(
        self, terms: PyTree[AbstractTerm], t0: RealScalarLike, y0: Y, args: Args
    ) -> VF:
        return self.solver.func(terms, t0, y0, args)

    def step(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: Any,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y | None, DenseInfo, Any, RESULTS]:
        return self.solver.step(terms, t0, t1, y0, args, solver_state, made_jump)

    def backward_step(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: Any,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, DenseInfo, Any]:
        del solver_state
        unrolled = UnrolledSolver(self.solver)
        fresh = self.solver.init(terms, t0, t1, y1, args)

        def step(y0):
            return unrolled.step(terms, t0, t1, y0, args, fresh, made_jump)

        def end(y0):
            y1, _, _ = step(y0)
            return y1

        def step_back(y):
            vf = unrolled.vf(terms, t1, y, args)
            return unrolled.step_back(terms, t0, t1, y, args, vf)

        inverted = invert_step(end, step_back, y1, self.max_corrections)
        eps = [float(jnp.finfo(x.dtype).eps) for x in jtu.tree_leaves(y1)]
        y0 = eqx.error_if(
            inverted.y0,
            # As much as `ReversibleAdjoint` tolerates.
            ~(inverted.error <= max(eps, default=1.0) ** (-1 / 3)),
            "`FixedPointReversible(...).backward_step` could not undo a step: none of "
            "the starts that it tried leads to `y1`. Consider making smaller steps.",
        )
        _, dense_info, vf0 = step(y0)
        if fresh is None:
            solver_state = None
        else:
            solver_state = jnp.array(False), vf0
        return y0, dense_info, solver_state


FixedPointReversible.__init__.__doc__ = """**Arguments:**

- `solver`: The solver to wrap: any explicit Runge--Kutta method, or any other that
    carries nothing but `y` from one step to the next (`Euler`, `EulerHeun`, the
    Milstein methods, the stochastic Runge--Kutta methods, `ImplicitEuler`).
- `max_corrections`: How often to correct the first guess at most.

**Raises:**

`ValueError` if `solver` is already reversible, or (when solving) if it carries a state
that cannot be reconstructed. `backward_step` raises an error at run time if it finds no
start that leads to where the step ended, up to a third of the digits. (In that case
[`diffrax.ReversibleAdjoint`][] makes the step again.)
"""


class UnrolledSolver(eqx.Module):
    """The steps of a solver in the form in which going backward needs them: without
    error estimates, and with the first evaluation of a step within reach, which is also
    the first one of going back from there."""

    solver: AbstractSolver

    def vf(
        self, terms: PyTree[AbstractTerm], t: RealScalarLike, y: Y, args: Args
    ) -> VF | None:
        """What both the step that starts at `(t, y)` and the step back from there
        evaluate first. `None` if there is no such thing."""
        if not is_plain_erk(self.solver):
            return None
        assert isinstance(terms, AbstractTerm)
        if terms.is_vf_expensive(t, t, y, args):
            return None
        return terms.vf(t, y, args)

    def step(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: Any,
        made_jump: BoolScalarLike,
        has_output: BoolScalarLike = True,
    ) -> tuple[Y, DenseInfo, VF | None]:
        """The step of the solver, up to rounding. Returns `y1`, `dense_info` (which
        need not be right if `has_output=False`) and `vf` at `(t0, y0)`."""
        if not is_plain_erk(self.solver):
            y1, _, dense_info, _, _ = self.solver.step(
                terms, t0, t1, y0, args, solver_state, made_jump
            )
            return y1, dense_info, None
        assert isinstance(terms, AbstractTerm)
        tableau = self._tableau
        control = terms.contr(t0, t1)
        vf0 = self.vf(terms, t0, y0, args)
        used_vf0 = vf0
        if solver_state is not None:
            first_step, given = solver_state
            evaluate = first_step | made_jump
            used_vf0 = jtu.tree_map(lambda a, b: jnp.where(evaluate, a, b), vf0, given)
        k = self._stages(terms, t0, t1, y0, args, control, used_vf0)
        y1 = (y0**ω + _combine(tableau.b_sol, k) ** ω).ω
        if tableau.fsal:
            # The last stage takes part in the interpolation alone.
            last = lax.cond(
                eqxi.unvmap_any(has_output),
                lambda: terms.vf_prod(t1, y1, args, control),
                lambda: jtu.tree_map(jnp.zeros_like, k[0]),
            )
            k = [*k, last]
        stacked = jtu.tree_map(lambda *x: jnp.stack(x), *k)
        return y1, dict(y0=y0, y1=y1, k=stacked), vf0

    def step_back(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        vf1: VF | None,
    ) -> Y:
        """A step over the same interval backward in time, which leads to `y0` up to
        the local error of the method."""
        if is_plain_erk(self.solver):
            assert isinstance(terms, AbstractTerm)
            control = _negative(terms.contr(t0, t1))
            k = self._stages(terms, t1, t0, y1, args, control, vf1)
            return (y1**ω + _combine(self._tableau.b_sol, k) ** ω).ω
        if type(self.solver) is ImplicitEuler:
            # The inverse in closed form, but for the error of the nonlinear solve.
            assert isinstance(terms, AbstractTerm)
            control = terms.contr(t0, t1)
            return (y1**ω - terms.vf_prod(t1, y1, args, control) ** ω).ω
        backward: Any = jtu.tree_map(
            lambda x: _BackwardTerm(x) if is_single_term(x) else x,
            terms,
            is_leaf=is_single_term,
        )
        y0, *_ = self.solver.step(backward, t1, t0, y1, args, None, made_jump=True)
        return y0

    @property
    def _tableau(self) -> ButcherTableau:
        assert isinstance(self.solver, AbstractERK)
        assert isinstance(self.solver.tableau, ButcherTableau)
        return self.solver.tableau

    def _stages(self, terms, t0, t1, y0, args, control, vf0):
        k0 = None if vf0 is None else terms.prod(vf0, control)
        return _stages(self._tableau, terms, t0, t1, y0, args, control, k0)


class _BackwardTerm(TermWithControl):
    """A term over intervals that are passed through backward: its control is the
    negative of what it is forward, so that it need not be defined for `t1 < t0`."""

    def contr(self, t0, t1, **kwargs):
        return jtu.tree_map(
            _reverse_control,
            self.wrapped.contr(t1, t0, **kwargs),
            is_leaf=_is_increment,
        )


def _is_increment(x: Any) -> bool:
    return isinstance(x, AbstractBrownianIncrement)


def _reverse_control(x: Any) -> Control:
    # Of a path that is passed through backward, the increments change sign, and so does
    # its space-time-time Lévy area; its space-time Lévy area does not.
    if not _is_increment(x):
        return -x
    x = eqx.tree_at(lambda x: (x.dt, x.W), x, replace_fn=_negative)
    if isinstance(x, AbstractSpaceTimeTimeLevyArea):
        x = eqx.tree_at(lambda x: x.K, x, replace_fn=_negative)
    return x
