"""Write a run's model for its next user: safetensors, ONNX, a LoRA adapter, a Hub folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpc_oialr.cli.console import add_out, add_run, show

FORMATS = {
    "dense": "loads into the stock class",
    "lowrank": "U, S and Vh of every layer",
    "factored": "two factors a layer, for hpc_oialr.load_factored",
    "pt2": "for torch.export.load",
    "onnx": "for ONNX Runtime",
    "lora": "a PEFT adapter of the difference to --base",
    "hub": "dense and factored with a model card",
}
EXAMPLES = """  oialr export runs/first --format dense
  oialr export runs/first --format factored --step 500 --out my_model
  oialr export runs/first --format onnx --weights dense
  oialr export runs/tuned --format lora --base pretrained --lora-r 16

formats:
""" + "\n".join(f"  {name:<10}{meaning}" for name, meaning in FORMATS.items())


def add(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    option = parser.add_argument
    option("--format", choices=tuple(FORMATS), default="dense", help="see below (default: dense)")
    option("--step", type=int, metavar="N", help="checkpoint to take; default the last")
    explained = "what pt2 and onnx compute with (default: factored)"
    option("--weights", choices=("factored", "dense"), default="factored", help=explained)
    option("--base", metavar="FOLDER", type=Path, help="lora: the base model, as transformers saves it")
    option("--lora-r", type=int, metavar="N", help="lora: largest r; default as large as it takes to be exact")
    add_out(parser, "DIR", "folder to write; default RUN/export/FORMAT")


def run(arguments: argparse.Namespace) -> None:
    """Print how far outputs differ, and the folder."""
    from hpc_oialr.serve.export import DESCRIPTION, Options, export
    from hpc_oialr.system_errors import read_json

    given = {name: getattr(arguments, name) for name in ("out", "step", "force")}
    options = Options(weights=arguments.weights, base=arguments.base, r=arguments.lora_r)
    folder = export(arguments.folder, arguments.format, options=options, **given)
    written = read_json(folder / DESCRIPTION)
    if written.get("truncation_error"):
        show(f"largest truncation error of a layer's difference: {written['truncation_error']:.2e} (Frobenius norm)")
    if difference := written.get("difference"):
        show(
            f"largest difference of outputs from the trained model's: {difference['absolute']:.2e}, "
            f"{difference['relative']:.1e} of the largest output ({difference['samples']} random inputs)"
        )
    if note := written.get("note"):
        show(f"note: {note}")
    show(folder)
