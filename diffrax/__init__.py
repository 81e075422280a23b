try:
    from ._upstream_init import *  # noqa: F403
    from ._upstream_init import (
        __version__ as __version__,
        AbstractDiscreteTerminatingEvent as AbstractDiscreteTerminatingEvent,
        DiscreteTerminatingEvent as DiscreteTerminatingEvent,
        SteadyStateEvent as SteadyStateEvent,
    )
except ModuleNotFoundError as e:
    if e.name != f"{__name__}._upstream_init":
        raise
    raise ImportError(
        "This is a bare checkout, which holds only a part of `diffrax`: run "
        "`pip install -e .` (or `pip install .`) in it first."
    ) from None

from ._adjoint import ReversibleAdjoint as ReversibleAdjoint
from ._reversal_report import (
    reversal_report as reversal_report,
    ReversalReport as ReversalReport,
)
from ._solver import (
    AbstractReversibleSolver as AbstractReversibleSolver,
    BitExact as BitExact,
    FixedPointReversible as FixedPointReversible,
    UReversible as UReversible,
)
