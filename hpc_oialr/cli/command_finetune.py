"""Fine-tune a pretrained model: all of it, its head, or by SARA or Mo-SARA."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Column

from hpc_oialr.cli import command_train
from hpc_oialr.cli.console import console, is_main, new_table
from hpc_oialr.errors import ConfigError, OIALRError
from hpc_oialr.exit_codes import FINISHED

EXAMPLES = """  oialr data fetch minilm                                          (BERT, 22.7 million parameters)
  oialr finetune finetune_bert --method SARA --model.method.threshold 0.03
  oialr finetune finetune_bert --method MoSARA --base FOLDER --data.path TEXTS --data.classes "[a, b]" --model.classes 2
  torchrun --nproc-per-node 2 -m hpc_oialr finetune finetune_bert --engine FSDP
  oialr export RUN --format lora                                   (SARA as an adapter of PEFT)

Trains as oialr train does, with the same options and run folder, then lists the adapted layers: r, trained parameters,
and for Mo-SARA the share of the tokens' gates of each expert."""
ENGINES = ("DDP", "FSDP")


def add(parser: argparse.ArgumentParser) -> None:
    command_train.add(parser)
    option = parser.add_argument
    option("--method", metavar="NAME", help="Full, HeadOnly, SARA or MoSARA; short for --model.method")
    option("--base", metavar="FOLDER", type=Path, help="the pretrained model; short for --model.path")


def run(arguments: argparse.Namespace) -> int:
    """Train, then print the tables; see :mod:`hpc_oialr.exit_codes` for what it returns."""
    from hpc_oialr.models import PretrainedClassifier

    given = {"--model.method": arguments.method, "--model.path": arguments.base and str(arguments.base)}
    words = [word for name, value in given.items() if value is not None for word in (name, value)]
    loaded = command_train.load(arguments, [*words, *arguments.settings])
    if loaded is None:
        return FINISHED
    config = loaded.config
    if not isinstance(config.model, PretrainedClassifier):
        raise OIALRError(
            f"{arguments.recipe} has model {type(config.model).__name__}, which starts from random weights; oialr "
            "finetune needs PretrainedClassifier, as in the recipe finetune_bert. Use oialr train."
        )
    if (engine := type(config.engine).__name__) not in ENGINES:
        raise ConfigError("engine", engine, f"must be one of {', '.join(ENGINES)} to fine-tune")
    result = command_train.start(arguments, loaded)
    code = command_train.finish(result)
    if code == FINISHED and is_main():
        _show_adapters(result.folder)
    return code


def _show_adapters(folder: Path) -> None:
    from hpc_oialr.finetune import adapters, expert_load
    from hpc_oialr.serve.trained import load_model

    model = load_model(folder)
    if not (layers := adapters(model)):
        return
    loads = expert_load(model)
    experts = ["experts' load"] if loads else []
    table = new_table("adapted layers", Column("layer"), "weight", "r", "trained", *experts)
    for name, layer in layers.items():
        trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        load = [" ".join(f"{share:.2f}" for share in loads[name].tolist())] if loads else []
        table.add_row(name, f"{layer.out_features} x {layer.in_features}", str(layer.r), f"{trained:,}", *load)
    console().print(table)
