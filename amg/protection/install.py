"""How a call of a protected pipeline reaches into its loop, and out of it again: a hook on its network and a
wrapper around its scheduler's step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from amg.extras import needed

HOOKS = needed("diffusers.hooks", "`amg.protect`")
NAME = "anti-memorization guidance"
MARK = "_amg_hook"  # of a wrapped step: the hook of its call


class CallHook(HOOKS.ModelHook):  # type: ignore[misc, name-defined]
    """On the network during one call of a pipeline; for the thread of that call alone, so that a `Sampler` of
    the same network goes on beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.thread, self.live = threading.get_ident(), True

    @property
    def elsewhere(self) -> bool:
        """Whether the network was called by somebody else."""
        return threading.get_ident() != self.thread


@contextmanager
def installed(
    network: Any, hook: CallHook, scheduler: Any, wrap: Callable[[Callable[..., Any]], Any]
) -> Iterator[None]:
    """`hook` on a network (None: none) and `wrap(scheduler.step)` in the place of the step, both taken away
    again whatever happens, and whenever; so is what an interrupted call left.

    Raises RuntimeError within another call.
    """
    for found in (_hook_on(network), getattr(vars(scheduler).get("step"), MARK, None)):
        if found is not None and found.live:
            raise RuntimeError(
                "`pipe` must not be called from within a call of itself (a callback), nor must another "
                "protected pipeline that shares its network or scheduler"
            )
    take_away(network)
    own = vars(scheduler).get("step")  # that somebody put there
    own = None if hasattr(own, MARK) else own
    try:
        if network is not None:
            HOOKS.HookRegistry.check_if_exists_or_initialize(network).register_hook(hook, NAME)
        vars(scheduler).pop("step", None)
        wrapped = wrap(scheduler.step if own is None else own)
        setattr(wrapped, MARK, hook)
        scheduler.step = wrapped
        yield
    finally:
        hook.live = False
        try:
            vars(scheduler).pop("step", None)
            if own is not None:
                scheduler.step = own
        finally:
            take_away(network)


def take_away(network: Any) -> None:
    """Take a hook of ours off a network, where one was left on it that is not at work."""
    hook = _hook_on(network)
    if hook is not None and not hook.live:
        network._diffusers_hook.remove_hook(NAME, recurse=False)


def _hook_on(network: Any) -> Any:
    registry = getattr(network, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(NAME)
