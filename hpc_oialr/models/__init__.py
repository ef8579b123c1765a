"""Models as typed settings; each builds a stock transformers class from its config, nothing downloaded."""

from hpc_oialr.models.base import ModelConfig
from hpc_oialr.models.pretrained import PretrainedClassifier
from hpc_oialr.models.resnet import ResNet, ResNetRS
from hpc_oialr.models.transformer import GPT2, Autoformer, Llama, ViT

__all__ = ["GPT2", "Autoformer", "Llama", "ModelConfig", "PretrainedClassifier", "ResNet", "ResNetRS", "ViT"]
