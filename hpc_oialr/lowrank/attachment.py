"""What ties a module to the controller that changes its layers, and lets it go again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

_MARK = "_oialr_attachment"


class Attached(Protocol):
    """What a controller is told."""

    def before_forward(self) -> None:
        """Its model is about to be called."""


class Attachment:
    """Hooks of one controller on its model and on the owners of its layers.

    They hold the controller weakly. Copies and pickles of the model are tied to nothing.
    """

    __slots__ = ("__weakref__", "_controller")

    def __init__(self, controller: Attached | None = None) -> None:
        self._controller = None if controller is None else weakref.ref(controller)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        return Attachment()

    def __reduce__(self) -> tuple[type[Attachment], tuple[()]]:
        return Attachment, ()

    @property
    def controller(self) -> Attached | None:
        """The controller; None in copies of the model, and when it is gone."""
        return None if self._controller is None else self._controller()

    def tie(self, model: nn.Module, owners: list[nn.Module]) -> None:
        """Put the hooks on; those of a controller that is gone are taken off."""
        untie(model)
        model.register_forward_pre_hook(self.before_forward)
        for module in {id(m): m for m in [model, *owners]}.values():
            setattr(module, _MARK, self)

    def before_forward(self, module: nn.Module, inputs: Any) -> None:
        """A forward pre-hook; not there for compiled code."""
        if torch.compiler.is_compiling():
            return
        controller = self.controller
        if controller is not None:
            controller.before_forward()


def attached(model: nn.Module) -> Iterator[tuple[str, Attached]]:
    """The controllers that are tied to modules of ``model``, with those modules' names."""
    for name, module in model.named_modules():
        mark = module.__dict__.get(_MARK)
        if mark is not None and mark.controller is not None:
            yield name, mark.controller


def untie(model: nn.Module) -> None:
    """Take every attachment off the model and its modules."""
    for module in model.modules():
        if module.__dict__.pop(_MARK, None) is not None:
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Attachment):
                    del module._forward_pre_hooks[key]
