"""``torch.compile`` of a whole model, or of each of its repeated blocks."""

from __future__ import annotations

from torch import nn

from hpc_oialr.errors import ConfigError


def compile_model(model: nn.Module, regions: str, *, backend: str = "inductor") -> None:
    """Compile ``model`` in place: "blocks" one by one, or the whole "model" at once; nothing if "off".

    Blocks of equal shapes share compiled code, so that a set of shapes is compiled once, not once a block.
    ConfigError if the model has no list of blocks.
    """
    if regions == "blocks":
        for block in repeated_blocks(model):
            block.compile(backend=backend, dynamic=False)
    elif regions == "model":
        model.compile(backend=backend)


def repeated_blocks(model: nn.Module) -> nn.ModuleList:
    """The longest list of modules in the model: a transformer's blocks, a ResNet's stages."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        rule = f"needs a model with a ModuleList of blocks, and {type(model).__name__} has none"
        raise ConfigError("compile", "blocks", rule, fix='Set it to "model".')
    return max(lists, key=len)
