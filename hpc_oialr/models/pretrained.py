"""A pretrained model of transformers with a new head, to be fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc_oialr.data.base import Batch
from hpc_oialr.data.fetch import cache_root, describe
from hpc_oialr.errors import ConfigError, ModelError
from hpc_oialr.finetune import SARA, FineTuning
from hpc_oialr.models.base import ModelConfig, prepare_transformers

DEFAULT = "minilm"


@dataclass(kw_only=True)
class PretrainedClassifier(ModelConfig):
    """A classifier of texts, ``transformers.AutoModelForSequenceClassification``, from a local folder.

    Its head, the modules outside of the pretrained part and those that the folder has no weights for, is new and always
    trained.

    Parameters
    ----------
    path
        Folder with ``config.json`` and weights, as transformers saves them; not given: the fetched model ``minilm``.
    classes
        Labels.
    method
        What else is trained: ``Full``, ``HeadOnly``, ``SARA`` or ``MoSARA``.
    """

    path: str | None = None
    classes: int = 2
    method: FineTuning = field(default_factory=SARA)

    def __post_init__(self) -> None:
        self.check_at_least(2, "classes")

    def build(self, example: Batch) -> nn.Module:
        """The model, changed by the method; the new head is initialised from torch's global generator."""
        self.require_input(example, "input_ids", "text")
        model, head = self.pretrained()
        self.method.apply(model, head)
        return model

    def folder(self) -> Path:
        """The folder that is read."""
        return cache_root() / DEFAULT if self.path is None else Path(self.path)

    def pretrained(self) -> tuple[nn.Module, set[str]]:
        """The pretrained model with a new head, in fp32, and the names of the head's modules.

        ConfigError if the folder holds no such model.
        """
        probe = torch.empty(0)
        if type(probe) is not torch.Tensor or probe.is_meta:
            rule = "needs the values of its weights, which a plan without data does not have"
            raise ConfigError("class_path", type(self).__name__, rule)
        prepare_transformers()
        from transformers import AutoModelForSequenceClassification

        folder = self.folder()
        if not folder.is_dir():
            fix = describe(DEFAULT).fix if self.path is None else "Name a folder with config.json and the weights."
            raise ConfigError("path", self.path, f"there is no folder {folder}", fix=fix)
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                str(folder),
                num_labels=self.classes,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # a head of other labels is replaced
                output_loading_info=True,
            )
        except Exception as error:  # of many kinds, by the files that are wrong
            cause = " ".join(str(error).split())[:200]
            raise ModelError(f"{folder} is no model that transformers can load as a classifier ({cause}).") from error
        return model.float(), _head(model, report)


def _head(model: Any, report: dict[str, Any]) -> set[str]:
    """Children outside of the pretrained part, and modules whose weights are new."""
    outside = {name for name, child in model.named_children() if any(True for _ in child.parameters())}
    outside -= {model.base_model_prefix}
    return outside | {key.rpartition(".")[0] for key in report["missing_keys"]}
