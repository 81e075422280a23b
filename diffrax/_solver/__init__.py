from ._upstream_init import *  # noqa: F403
from .base import AbstractReversibleSolver as AbstractReversibleSolver
from .reversible import UReversible as UReversible
