from ._upstream_init import *  # noqa: F403
from .asynchronous_leapfrog import AsynchronousLeapfrog as AsynchronousLeapfrog
from .base import AbstractReversibleSolver as AbstractReversibleSolver
from .bit_exact import BitExact as BitExact
from .compositions import (
    BlanesMoan4 as BlanesMoan4,
    BlanesMoan6 as BlanesMoan6,
    BlanesMoanRKN6 as BlanesMoanRKN6,
    ForestRuth as ForestRuth,
    KahanLi6 as KahanLi6,
    KahanLi8 as KahanLi8,
    PEFRL as PEFRL,
    PositionVerlet as PositionVerlet,
    Ruth3 as Ruth3,
    Suzuki4 as Suzuki4,
)
from .ees import EES25 as EES25, EES27 as EES27
from .fixed_point_reversible import FixedPointReversible as FixedPointReversible
from .gauss_legendre import (
    GaussLegendre4 as GaussLegendre4,
    ImplicitMidpoint as ImplicitMidpoint,
)
from .reversible import UReversible as UReversible
from .splitting import AbstractSplitting as AbstractSplitting
from .velocity_verlet import VelocityVerlet as VelocityVerlet
