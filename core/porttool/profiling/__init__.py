"""Where the time of an engine goes: one trace, one table, and the roofline beside both."""

from porttool.profiling.run import Profile, ProfileShape, profile, run_unrecorded

__all__ = ["Profile", "ProfileShape", "profile", "run_unrecorded"]
