"""What becomes of a gradient that cannot be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree

from ._custom_types import RealScalarLike, Y
from ._reverse_pass import Worst
from ._reverse_step import filter_inexact, ReverseStep


def refuse_drift(grads: PyTree, worst: Worst, step: ReverseStep, y1: Y) -> PyTree:
    """Returns `grads`. If the certificate has fewer than half of the digits: raises an
    error at run time, or makes them NaN, or lets them pass."""
    closed = step.closed
    if closed.on_failure == "ignore":
        return grads
    has_drifted = worst.missed > step.too_much()
    # A solve that failed has told so itself. Its gradients are not finite either.
    for y in jtu.tree_leaves(filter_inexact(y1)):
        has_drifted &= jnp.all(jnp.isfinite(y))
    if closed.on_failure == "raise":
        at = step.record.read(worst.lost, step.num_steps).t0
        fraction = (at - closed.t0) / (closed.t1 - closed.t0)
        index = _Messages.choose(worst.missed * step.tolerance(), fraction)
        messages = _Messages(
            closed.name,
            closed.checkpoints,
            _is_float64(y1),
            closed.reversal.is_exact,
        )
        zero = jnp.zeros((), jnp.result_type(float))
        zero = eqx.internal.branched_error_if(zero, has_drifted, index, messages)
        # Each of them depends on the check, without being passed through it, which
        # would take a copy.
        return jtu.tree_map(
            lambda g: g + zero.astype(g.dtype) if eqx.is_inexact_array(g) else g, grads
        )
    return jtu.tree_map(
        lambda g: jnp.where(has_drifted, jnp.nan, g) if eqx.is_inexact_array(g) else g,
        grads,
    )


def _is_float64(y: Y) -> bool:
    dtypes = [jnp.finfo(x.dtype).dtype for x in jtu.tree_leaves(filter_inexact(y))]
    return all(dtype == jnp.float64 for dtype in dtypes)


@dataclass(frozen=True)
class _Messages(Sequence):
    """An error message for each number that `choose` returns. (The message of an error
    at run time has to be chosen by an integer.)"""

    name: str
    checkpoints: int
    is_float64: bool
    is_exact: bool

    @staticmethod
    def choose(missed: RealScalarLike, fraction: RealScalarLike) -> Int[Array, ""]:
        """The larger, the more is `missed`: in a batch it is the largest that is
        chosen."""
        # Tenths of a power of ten: -200 to 200. NaN and infinity are the largest.
        size = jnp.round(10 * jnp.log10(missed))
        size = jnp.where(jnp.isfinite(size), jnp.clip(size, -200, 199), 200)
        percent = jnp.clip(jnp.round(100 * fraction), 0, 100)
        return 101 * (size + 200).astype(int) + percent.astype(int)

    def __len__(self) -> int:
        return 401 * 101

    def __getitem__(self, index):
        size, percent = divmod(index, 101)
        how, why, remedy = self._of_bits() if self.is_exact else self._of_drift(size)
        return (
            f"Cannot compute the gradient using `adjoint={self.name}(checkpoints="
            f"{self.checkpoints})`: going back over the steps of the solver did not "
            f"lead to where it had started from, {how}, "
            f"{percent}% of the way from `t0` to `t1`: {why}. Consider storing some "
            f"states (`adjoint={self.name}()`), {remedy}; or "
            'using `adjoint=RecursiveCheckpointAdjoint()` instead. (`on_failure="nan"` '
            "makes only the gradients of those members of a batch NaN that are "
            "concerned.)"
        )

    def _of_drift(self, size: int) -> tuple[str, str, str]:
        how = "with NaN or infinity on the way"
        if size < 400:
            how = f"by a relative error of {10 ** (size / 10 - 20):.0e}"
        float64 = "" if self.is_float64 else "using float64, "
        return (
            how,
            "rounding errors have piled up, or a step could not be undone",
            f"making fewer steps, {float64}a solver that is stable for this problem "
            "or, for `UReversible`, a `coupling_parameter` nearer to one",
        )

    def _of_bits(self) -> tuple[str, str, str]:
        return (
            "to the very bits",
            "the vector field has returned NaN, or other bits at the same point in the "
            "program that undoes a step than in the one that made it",
            "or compiling with `jax_disable_most_optimizations` off, if it is on",
        )
