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
    AbstractSplitting as AbstractSplitting,
    AsynchronousLeapfrog as AsynchronousLeapfrog,
    BitExact as BitExact,
    BlanesMoan4 as BlanesMoan4,
    BlanesMoan6 as BlanesMoan6,
    BlanesMoanRKN6 as BlanesMoanRKN6,
    EES25 as EES25,
    EES27 as EES27,
    FixedPointReversible as FixedPointReversible,
    ForestRuth as ForestRuth,
    GaussLegendre4 as GaussLegendre4,
    ImplicitMidpoint as ImplicitMidpoint,
    KahanLi6 as KahanLi6,
    KahanLi8 as KahanLi8,
    PEFRL as PEFRL,
    PositionVerlet as PositionVerlet,
    Ruth3 as Ruth3,
    Suzuki4 as Suzuki4,
    UReversible as UReversible,
    VelocityVerlet as VelocityVerlet,
)
