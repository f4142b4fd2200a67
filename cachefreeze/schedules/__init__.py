"""Freeze schedules: pure decisions about which leading blocks are frozen and at which rate the others train."""

from cachefreeze.schedules.base import Clock, Decision, Ladder, Schedule
from cachefreeze.schedules.fixed import AllButLast, GradualUnfreezing
from cachefreeze.schedules.freezeout import FreezeOut
from cachefreeze.schedules.gradient_change import GradientChange
from cachefreeze.schedules.plasticity import Plasticity
from cachefreeze.schedules.stages import Stage, Stages
from cachefreeze.schedules.timeline import Timeline, advice, timeline
from cachefreeze.schedules.zero_rate import FreezeAtZeroLR

__all__ = [
    "AllButLast",
    "Clock",
    "Decision",
    "FreezeAtZeroLR",
    "FreezeOut",
    "GradientChange",
    "GradualUnfreezing",
    "Ladder",
    "Plasticity",
    "Schedule",
    "Stage",
    "Stages",
    "Timeline",
    "advice",
    "timeline",
]
