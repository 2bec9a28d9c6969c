"""The network as CUDA graphs: what the host would launch kernel by kernel is replayed in one go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg.guidance.predict import mapped
from amg.pipelines.denoiser import weights_of
from amg.pipelines.supported import network_of

WARM = 2  # calls of a form before it is captured: what is compiled or chosen at first use is there then
KEPT = 16  # forms that are kept captured
PLAIN = (type(None), bool, int, float, str, torch.dtype)
Replay = Callable[[], Tensor]


class Captured(NamedTuple):
    """`replay()` returns the output for what the tensors `held` hold; `given`: what was last copied there."""

    held: list[Tensor]
    given: list[Tensor]
    replay: Replay


class Graphs:
    """A network whose calls are replayed from CUDA graphs, one graph for each form of call.

    It is called as the network is: (sample, t, **conditions) -> raw output, a tensor of its own. A form is
    the shapes, dtypes and structure of the arguments, their values that are no tensors, and the modes of
    autocast and inference; it is captured at its third call, and of more than `KEPT` the least recently used
    goes. Where gradients are recorded, or an argument is an object that cannot be told from another, the
    network itself runs. A tensor that is given again, the same object, is not copied again: nobody may write
    to it.
    What the network reads besides its arguments (weights, scales of adapters) is read where it was: a network
    whose weights moved wants new `Graphs`. Errors: RuntimeError for a network that cannot be captured.
    """

    def __init__(self, network: Callable[..., Tensor], capture: Callable[[Replay], Replay] | None = None):
        self.network = network
        self._capture = capture or Capture()
        self._forms = OrderedDict[Hashable, int | Captured]()

    def __call__(self, sample: Tensor, t: Any, **conditions: Any) -> Tensor:
        arguments = {**conditions, "sample": sample, "t": t}
        if torch.is_grad_enabled() or (form := _form(arguments)) is None:
            return self.network(sample, t, **conditions)
        key = (form, _modes(sample.device.type))
        found = self._forms.pop(key, 0)
        if isinstance(found, int) and found < WARM:
            self._forms[key] = found + 1
            return self.network(sample, t, **conditions)
        if isinstance(found, int):
            found = self._captured(arguments)
        self._forms[key] = found
        self._forget()
        for at, (held, tensor) in enumerate(zip(found.held, _tensors(arguments), strict=True)):
            if found.given[at] is not tensor:
                held.copy_(tensor)
                found.given[at] = tensor
        return found.replay().clone()

    @property
    def captured(self) -> int:
        """How many forms are captured now."""
        return sum(isinstance(found, Captured) for found in self._forms.values())

    def _captured(self, arguments: Mapping[str, Any]) -> Captured:
        copies = mapped(torch.clone, arguments)
        held = [*_tensors(copies)]
        sample, t = copies.pop("sample"), copies.pop("t")
        return Captured(held, [*held], self._capture(lambda: self.network(sample, t, **copies)))

    def _forget(self) -> None:
        for key in [*self._forms][:-KEPT]:
            del self._forms[key]


class Capture:
    """Captures calls in CUDA graphs that share one pool of memory: no two are replayed at a time, and what a
    replay leaves behind is copied before the next one."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Replay) -> Replay:
        graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()  # a weight that was cast before would not be cast by a replay
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                output = call()
        except Exception as error:
            raise RuntimeError(
                "`cuda_graphs` must be False for this network, which cannot be captured (it moves weights, "
                f"or reads values on the host): {error}"
            ) from error
        finally:
            torch.clear_autocast_cache()  # what was cast inside is the graph's

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def require_capturable(pipe: Any) -> None:
    """ValueError for a pipeline whose network does more than compute on one GPU."""
    network = network_of(pipe)
    device = pipe._execution_device
    if device.type != "cuda":
        raise ValueError(
            f"`cuda_graphs` must be False off a CUDA device, got True for a pipeline on {device}"
        )
    offloaded = next((name for name, part in network.named_modules() if hasattr(part, "_hf_hook")), None)
    if offloaded is not None or weights_of(network)[1].type != "cuda":
        raise ValueError(
            "`cuda_graphs` must be False for a network that is offloaded, as its weights move in every call"
        )


def weights_held(network: Any) -> Hashable:
    """Where a network's weights lie, how its adapters scale, what it was compiled to: what a captured graph
    holds on to."""
    if not isinstance(network, torch.nn.Module):
        return None
    scales = tuple(
        (name, *sorted(module.scaling.items()))
        for name, module in network.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    )
    tensors = (*network.parameters(), *network.buffers())
    compiled = id(getattr(network, "_compiled_call_impl", None))
    return hash((tuple(tensor.data_ptr() for tensor in tensors), str(scales), compiled))


def _form(value: Any) -> Hashable:
    """What two calls that one graph serves have in common; None where that cannot be told."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, Mapping):
        value = tuple(part for name in sorted(value) for part in (name, value[name]))
    if isinstance(value, (list, tuple)):
        parts = tuple("none" if one is None else _form(one) for one in value)
        return None if None in parts else (type(value), *parts)
    return (type(value), value) if isinstance(value, PLAIN) else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for name in sorted(value):
            yield from _tensors(value[name])
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


def _modes(device: str) -> Hashable:
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return autocast, torch.is_inference_mode_enabled()
