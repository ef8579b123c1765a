"""How a forward pass computes: on which device, in which precision, images in which memory format."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpc_oialr.data import ArrayDataset, Batch
from hpc_oialr.train.bf16_params import cast_parameters

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
INPUTS = {"bf16-params": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Passes:
    """The same in training, evaluation and for a model that was loaded.

    ``precision`` is that of the run's settings; ``casts_itself``: the engine gives parameters in that precision anyway.
    """

    device: torch.device
    precision: str
    channels_last: bool = False
    casts_itself: bool = False

    def autocast(self) -> torch.autocast:
        """Autocast to bf16 or fp16; no effect in other precisions."""
        dtype = AUTOCAST.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def casts(self, module: nn.Module) -> AbstractContextManager[None]:
        """bf16 copies in the place of the parameters, where the precision asks for it and the engine does not do it."""
        if self.precision != "bf16-params" or self.casts_itself:
            return nullcontext()
        return cast_parameters(module, torch.bfloat16)

    def place(self, batch: Batch, dataset: ArrayDataset) -> Batch:
        """A batch of a data set as the model sees it: on the device and finished there.

        Floating-point values have the dtype of the passes, if that is not fp32 or autocast's.
        """
        moved = dataset.finish({key: value.to(self.device, non_blocking=True) for key, value in batch.items()})
        for key, value in moved.items() if self.channels_last else ():
            if is_image(value):
                # Convolutions take on the format of their input, whatever that of the weight. By a copy: images of one
                # channel count as being in both formats, and would pass as they are.
                moved[key] = torch.empty_like(value, memory_format=torch.channels_last).copy_(value)
        dtype = INPUTS.get(self.precision)
        if dtype is None:
            return moved
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in moved.items()}


def is_image(tensor: Tensor) -> bool:
    """Whether these are images, B x channels x height x width."""
    return tensor.dim() == 4 and tensor.is_floating_point()
