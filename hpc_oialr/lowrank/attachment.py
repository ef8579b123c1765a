"""Hooks that tell a controller what happens to the model and the optimizers it changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

_MARK = "_oialr_attachment"


class Attachment:
    """Hooks of one controller on its model, on the owners of its layers and on its optimizers.

    They call the controller's ``before_forward``, ``before_load``, ``before_optimizer_load`` and
    ``after_optimizer_load``. It is held weakly, and not at all by copies and pickles of the model.
    """

    __slots__ = ("__weakref__", "_controller", "_handles")

    def __init__(self, controller: Any = None) -> None:
        self._controller = None if controller is None else weakref.ref(controller)
        self._handles: list[RemovableHandle] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        return Attachment()

    def __reduce__(self) -> tuple[type[Attachment], tuple[()]]:
        return Attachment, ()

    @property
    def controller(self) -> Any:
        """The controller; None in copies of the model, and when it is gone."""
        return None if self._controller is None else self._controller()

    def tie(self, model: nn.Module, owners: Iterable[nn.Module], optimizers: Iterable[Any]) -> None:
        """Register the hooks in place of older ones.

        ``optimizers`` are wrappers and those inside them: ZeroRedundancyOptimizer loads without the inner one's hooks.
        """
        untie(model)
        self._handles = [model.register_forward_pre_hook(self._before_forward)]
        for module in {id(m): m for m in [model, *owners]}.values():
            self.cover(module)
        for optimizer in optimizers:
            if "_optimizer_load_state_dict_post_hooks" not in vars(optimizer):
                continue  # no optimizer of torch's, or, as Accelerate's, never initialised as one
            self._handles += [
                optimizer.register_load_state_dict_pre_hook(self._before_optimizer_load),
                optimizer.register_load_state_dict_post_hook(self._after_optimizer_load),
            ]

    def cover(self, module: nn.Module) -> None:
        """Call the controller before anything is loaded into ``module``."""
        self._handles.append(module.register_load_state_dict_pre_hook(self._before_load))
        setattr(module, _MARK, self)

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        # Not there for compiled code.
        if not torch.compiler.is_compiling() and (controller := self.controller) is not None:
            controller.before_forward()

    def _before_load(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *_: Any) -> None:
        if (controller := self.controller) is not None:
            assign = bool(metadata.get("assign_to_params_buffers"))
            controller.before_load(module, state, prefix, assign=assign)

    def _before_optimizer_load(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        if (controller := self.controller) is not None:
            controller.before_optimizer_load(optimizer, state)

    def _after_optimizer_load(self, optimizer: Optimizer) -> None:
        if (controller := self.controller) is not None:
            controller.after_optimizer_load(optimizer)


class LayerHook:
    """A method of a controller's as a layer's hook, held weakly; copies and pickles of the layer do nothing."""

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> Any:
        """Call the method, if its object is still there."""
        method = None if self._method is None else self._method()
        return None if method is None else method(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerHook:
        return LayerHook()

    def __reduce__(self) -> tuple[type[LayerHook], tuple[()]]:
        return LayerHook, ()


def attached(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """The controllers that are tied to modules of ``model``, with those modules and their names."""
    for name, module in model.named_modules():
        controller = controller_of(module)
        if controller is not None:
            yield name, module, controller


def controller_of(module: nn.Module) -> Any:
    """The controller that is tied to this very module."""
    mark = module.__dict__.get(_MARK)
    return None if mark is None else mark.controller


def cover_child(parent: nn.Module, child: nn.Module) -> None:
    """Extend the hooks of ``parent``, if it has a controller, to a new child that holds one of its weights."""
    if controller_of(parent) is not None:
        parent.__dict__[_MARK].cover(child)


def untie(model: nn.Module) -> None:
    """Remove all hooks of controllers from the model, its modules and their optimizers."""
    for module in model.modules():
        mark = module.__dict__.pop(_MARK, None)
        if mark is None:
            continue
        for handle in mark._handles:
            handle.remove()
        mark._handles.clear()
        # A copy's hooks belong to no handle.
        kinds = (module._forward_pre_hooks, module._forward_hooks, module._load_state_dict_pre_hooks)
        for hooks in kinds:
            for key, hook in list(hooks.items()):
                owner = getattr(getattr(hook, "hook", hook), "__self__", hook)
                if isinstance(owner, (Attachment, LayerHook)):
                    del hooks[key]
