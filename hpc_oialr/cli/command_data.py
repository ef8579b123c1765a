"""Fetch data sets, pack images, tokenize text, verify, make tiny ones."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpc_oialr.cli.console import add_command, add_force, show

EXAMPLES = """  oialr data fetch fashion-mnist
  oialr data fetch fashion-mnist --data-dir /scratch/data
  oialr data pack /data/imagenet /scratch/imagenet-shards --processes 8
  srun -n 64 oialr data pack /data/imagenet /scratch/imagenet-shards
  oialr data tokenize /data/text /scratch/tokens --tokenizer /models/gpt2 --processes 8
  oialr data verify /scratch/imagenet-shards
  oialr data sample imagenet samples/imagenet"""


def add(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    summary = "fetch a data set once, checked by its checksums"
    fetch = add_command(actions, "fetch", run_fetch, summary=summary, examples=EXAMPLES)
    fetch.add_argument("name", metavar="NAME", help="name of the data set, e.g. fashion-mnist")
    fetch.add_argument("--data-dir", type=Path, metavar="DIR", help="folder that has it, or where to put it")
    add_force(fetch)
    summary = "pack images into tar shards; the same call goes on after a kill"
    pack = add_command(actions, "pack", run_pack, summary=summary, examples=EXAMPLES)
    explained = "folder of part/CLASS/*.jpg, tars of these, WebDataset tars, or CIFAR-10's binary files"
    _add_folders(pack, explained)
    explained = "images of a shard; default: %(default)s"
    pack.add_argument("--per-shard", type=int, default=2500, metavar="N", help=explained)
    _add_processes(pack)
    pack.add_argument("--verify", action="store_true", help="read all shards again at the end")
    summary = "write token files of text; the same call goes on after a kill"
    tokens = add_command(actions, "tokenize", run_tokenize, summary=summary, examples=EXAMPLES)
    explained = 'folder of text and .jsonl files, or such files; of each line of a .jsonl its "text"'
    _add_folders(tokens, explained)
    explained = "a Hugging Face tokenizer"
    tokens.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER", help=explained)
    explained = "names of files to take from folders; default: *.txt *.rst *.md *.py *.jsonl"
    tokens.add_argument("--patterns", nargs="+", metavar="PATTERN", help=explained)
    for part, share in (("validation", 0.05), ("test", 0.0)):
        explained = f"share of the {part} documents; default: %(default)s"
        tokens.add_argument(f"--{part}", type=float, default=share, metavar="SHARE", help=explained)
    explained = "text of a file; default: %(default)s"
    tokens.add_argument("--shard-mib", type=float, default=64, metavar="MIB", help=explained)
    _add_processes(tokens)
    tokens.add_argument("--verify", action="store_true", help="read all files again at the end")
    summary = "compare packed images or token files with their checksums"
    verify = add_command(actions, "verify", run_verify, summary=summary, examples=EXAMPLES)
    verify.add_argument("folder", type=Path, metavar="DST", help="folder that pack or tokenize wrote")
    explained = "remove damaged files, so that pack or tokenize writes them anew"
    verify.add_argument("--discard", action="store_true", help=explained)
    _add_processes(verify)
    summary = "make a tiny stand-in of a data set's form, for smoke runs only"
    sample = add_command(actions, "sample", run_sample, summary=summary, examples=EXAMPLES)
    sample.add_argument("name", metavar="NAME", help="imagenet, cifar-10 or ettm2")
    sample.add_argument("folder", metavar="DIR", type=Path, help="new folder, or one with this sample")


def _add_folders(parser: argparse.ArgumentParser, sources: str) -> None:
    parser.add_argument("sources", type=Path, nargs="+", metavar="SRC", help=sources)
    parser.add_argument("folder", type=Path, metavar="DST", help="new folder, or one that was begun")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    explained = "processes of each rank; default: %(default)s"
    parser.add_argument("--processes", type=int, default=1, metavar="N", help=explained)


def run_pack(arguments: argparse.Namespace) -> None:
    from hpc_oialr.data import pack

    done = pack(
        arguments.sources,
        arguments.folder,
        per_shard=arguments.per_shard,
        processes=arguments.processes,
        verify=arguments.verify,
    )
    if done:
        show(arguments.folder)


def run_tokenize(arguments: argparse.Namespace) -> None:
    from hpc_oialr.data.shard_files import read_index
    from hpc_oialr.data.token_files import PATTERNS, tokenize

    done = tokenize(
        arguments.sources,
        arguments.folder,
        arguments.tokenizer,
        patterns=arguments.patterns or PATTERNS,
        validation=arguments.validation,
        test=arguments.test,
        shard_mib=arguments.shard_mib,
        processes=arguments.processes,
        verify=arguments.verify,
    )
    if done:
        index = read_index(arguments.folder)
        show(
            f"{arguments.folder}: {sum(index['tokens'].values()):,} tokens of {index['bytes_per_token']:g} bytes each. "
            f"--data TokenFiles --data.path {arguments.folder} --model.vocabulary {index['vocabulary']} "
            f"--task.bytes_per_token {index['bytes_per_token']:g}"
        )


def run_verify(arguments: argparse.Namespace) -> None:
    from hpc_oialr.data.shard_files import read_index, verify_files

    index = read_index(arguments.folder)
    size = verify_files(arguments.folder, index, processes=arguments.processes, discard=arguments.discard)
    show(f"{arguments.folder}: {len(index['files'])} files, {size / 2**20:.1f} MiB, undamaged")


def run_sample(arguments: argparse.Namespace) -> None:
    from hpc_oialr.data import write_sample

    show(write_sample(arguments.name, arguments.folder))


def run_fetch(arguments: argparse.Namespace) -> None:
    from hpc_oialr.data import fetch

    show(fetch(arguments.name, arguments.data_dir, force=arguments.force))
