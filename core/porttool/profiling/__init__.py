"""Where the time of an engine goes: one trace, one table, and the roofline beside both."""

from porttool.profiling.run import Profile, ProfileShape, profile

__all__ = ["Profile", "ProfileShape", "profile"]
