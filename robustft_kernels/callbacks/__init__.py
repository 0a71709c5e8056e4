"""Callbacks for trainers: learned radii, telemetry, WiSE-FT. There is a module for each library."""

from .shared import hold_out

__all__ = ["hold_out"]
