"""Everything vlprune puts on a model, kept so that it comes off together, in reverse order, whatever happened."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

_ABSENT = object()


class HookSet:
    """Hooks and instance-level method wrappers that are removed together."""

    def __init__(self) -> None:
        self._undo = ExitStack()

    def before(self, module: nn.Module, hook: Callable[..., Any], *, first: bool = False) -> None:
        """Run ``hook(module, args, kwargs)`` before the module; it may return new ``(args, kwargs)``."""
        self._undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first).remove)

    def after(self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False, first: bool = False) -> None:
        """Run ``hook(module, args, kwargs, output)`` after it; ``always``: also when the module raised."""
        handle = module.register_forward_hook(hook, with_kwargs=True, always_call=always, prepend=first)
        self._undo.callback(handle.remove)

    def wrap(self, obj: Any, name: str, around: Callable[..., Any]) -> None:
        """Replace the method ``obj.name`` on this instance by ``around(original, *args, **kwargs)``."""
        original = getattr(obj, name)
        previous = vars(obj).get(name, _ABSENT)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        wrapped.__wrapped__ = original  # type: ignore[attr-defined]
        object.__setattr__(obj, name, wrapped)

        def undo() -> None:
            if previous is _ABSENT:
                vars(obj).pop(name, None)
            else:
                object.__setattr__(obj, name, previous)

        self._undo.callback(undo)

    def put(self, obj: Any, name: str, value: Any) -> None:
        """Set the attribute ``obj.name`` on this instance, which has it already."""
        previous = getattr(obj, name)
        setattr(obj, name, value)
        self._undo.callback(setattr, obj, name, previous)

    def remove(self) -> None:
        """Take everything off; calling it again does nothing."""
        self._undo.close()
