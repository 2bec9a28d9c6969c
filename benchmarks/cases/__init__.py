"""The problems that are timed: one file a kernel, each building `protocol.Case`s."""
