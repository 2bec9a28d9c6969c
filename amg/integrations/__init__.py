"""The only place that knows diffusers' pipelines: `protect` and `unprotect`."""

from amg.integrations.protect import protect, unprotect

__all__ = ["protect", "unprotect"]
