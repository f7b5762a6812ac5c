"""The `ceg` command. Exit status: 0 done, 1 a run failed, 2 bad input, 130 interrupted.

Each subcommand is a parser with `run=function(arguments) -> exit status`; heavy modules are
imported inside those functions, so that `ceg --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ceg_model.progress import Progress

DATA = "data/stdlib"
RUNS = "runs"
# Each of them has add_subcommands(subparsers) and imports what it needs when it runs.
EXTENSIONS = (
    "ceg_model.bench_commands",
    "ceg_model.tune",
    "ceg_model.study.commands",
    "ceg_model.study.outside",
)


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `ceg ... | head`
        sys.stderr.close()
        return 0
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if arguments.traceback:
            raise
        print(f"ceg: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ceg",
        description="GPT kernels, and the study that tells hardware gain from algorithmic gain.",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_info(subparsers)
    _add_train(subparsers)
    _add_data(subparsers)
    for name in EXTENSIONS:
        importlib.import_module(name).add_subcommands(subparsers)
    return parser


def _add_info(subparsers: Any) -> None:
    info = subparsers.add_parser(
        "info", help="what is built, which backends there are, the roofs of this machine"
    )
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.add_argument("--no-roofs", action="store_true", help="do not measure the machine")
    info.add_argument("--refresh", action="store_true", help="measure the roofs again")
    info.add_argument(
        "--kernels", nargs="?", const="all", metavar="TARGETS",
        help="instead: compile every Triton kernel for these GPUs (sm_90,gfx942; default: all "
        "known) and say what became of it; needs none of them. Exit status 1: one spills",
    )  # fmt: skip
    info.set_defaults(run=_info)


def _add_train(subparsers: Any) -> None:
    train = subparsers.add_parser(
        "train",
        help="train one model; the same command goes on where it stopped",
        description="Train the model that CONFIG describes. Also under torchrun: "
        "torchrun --nproc-per-node 8 -m ceg_model.cli train CONFIG",
    )
    train.add_argument(
        "config",
        metavar="CONFIG",
        help="a .json or .toml file with the sections model and train, or a preset's name",
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a field, e.g. --set train.lr=1e-3 --set norm=rms_norm",
    )
    train.add_argument(
        "--data", metavar="DIR", help=f"token shards (default: {DATA}, made when it is not there)"
    )
    train.add_argument("--out", default=RUNS, metavar="DIR", help="runs go to DIR/<id>")
    train.add_argument(
        "--log-to", metavar="LOGGER",
        help="tensorboard, wandb or trackio gets a copy of each row (log_to of the section train)",
    )  # fmt: skip
    train.add_argument("--json", action="store_true", help="print result.json")
    train.set_defaults(run=_train)


def _add_data(subparsers: Any) -> None:
    data = subparsers.add_parser("data", help="prepare training data")
    commands = data.add_subparsers(required=True, metavar="COMMAND")
    prepare = commands.add_parser(
        "prepare",
        help="text -> token shards",
        description="Turn text files and folders, tables (Parquet, JSON lines, CSV) or a Hugging "
        "Face data set into token shards. Without any: the standard library's own sources.",
    )
    prepare.add_argument("sources", nargs="*", metavar="SOURCE", help="file or folder")
    prepare.add_argument("--out", metavar="DIR", help=f"new folder (default, built-in: {DATA})")
    prepare.add_argument("--hf", metavar="NAME[:SPLIT]", help="a Hugging Face data set")
    prepare.add_argument("--hf-config", metavar="NAME", help="which of its configurations")
    prepare.add_argument("--text-field", default="text", metavar="NAME", help="column of tables")
    prepare.add_argument("--tokenizer", default="byte", choices=("byte", "gpt2"))
    prepare.add_argument("--val-fraction", type=float, default=0.05, metavar="FRACTION")
    prepare.add_argument(
        "--document-bytes",
        type=int,
        default=1 << 16,
        metavar="N",
        help="a file above 16 N bytes is cut at paragraphs into documents of N (default: 65536)",
    )
    prepare.add_argument("--json", action="store_true", help="print the manifest")
    prepare.set_defaults(run=_prepare)


def _info(arguments: argparse.Namespace) -> int:
    if arguments.kernels is not None:
        from ceg_model.kernel_table import run

        return run(arguments.kernels, as_json=arguments.json)

    from ceg_model import machine

    found = machine.info(roofs=not arguments.no_roofs, refresh=arguments.refresh)
    print(json.dumps(found, indent=2) if arguments.json else machine.describe(found))
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from ceg_model.config import GPTConfig
    from ceg_model.loggers import check
    from ceg_model.presets import load_config
    from ceg_model.train_config import TrainConfig

    # before torch is loaded: a mistake here is answered at once
    model_fields, train_fields = load_config(arguments.config, arguments.set)
    if arguments.log_to is not None:
        train_fields["log_to"] = arguments.log_to
    train_config = TrainConfig.from_dict(train_fields)
    check(train_config.log_to)

    from ceg_model.data import TokenData
    from ceg_model.run_id import run_id
    from ceg_model.train import train

    first = os.environ.get("RANK", "0") == "0"  # torchrun's protocol
    with Progress("train", quiet=not first) as progress, _stop_request() as stop:
        folder = arguments.data or _built_in_data(progress)
        data = TokenData(folder)
        model_config = GPTConfig.from_dict({"vocab_size": data.vocab_size, **model_fields})
        run_dir = Path(arguments.out) / run_id(model_config, train_config, data.hash)
        result = train(
            model_config,
            train_config,
            folder,
            run_dir,
            progress=progress,
            stop_at=stop,
            note=progress.note,
        )
    if result["status"] == "stopped":
        raise KeyboardInterrupt
    if first:
        print(json.dumps(result, indent=2) if arguments.json else _summary(result, run_dir))
    return 1 if result["status"] == "failed" else 0


@contextmanager
def _stop_request() -> Iterator[Callable[[], bool]]:
    """A function that tells whether Ctrl-C or SIGTERM came, so that training can save and stop.

    The second Ctrl-C interrupts at once; nothing but the steps since the last checkpoint is lost.
    """
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _built_in_data(progress: Progress) -> str:
    from ceg_model import data

    if not Path(DATA).exists():
        progress.note(f"preparing the built-in data in {DATA}")
        data.prepare(data.Request(), DATA)
    return DATA


def _summary(result: dict[str, Any], run_dir: Path) -> str:
    if result["status"] == "failed":
        return f"failed: {result['reason']}\n{run_dir}"
    return (
        f"eval loss {result['eval_loss']:.4f} nats/token, {result['bits_per_byte']:.4f} bits/byte "
        f"after {result['steps']} steps, {result['tokens']} tokens, "
        f"{result['model_flops']:.4g} model FLOP, {result['train_s']:.1f} s\n{run_dir}"
    )


def _prepare(arguments: argparse.Namespace) -> int:
    from ceg_model import data

    built_in = not arguments.sources and not arguments.hf
    if arguments.out is None and not built_in:
        raise ValueError("--out must name the new folder when there is a source, got none")
    request = data.Request(
        sources=tuple(arguments.sources),
        hf=arguments.hf,
        hf_config=arguments.hf_config,
        text_field=arguments.text_field,
        tokenizer=arguments.tokenizer,
        val_fraction=arguments.val_fraction,
        document_bytes=arguments.document_bytes,
    )
    out = arguments.out or (DATA if arguments.tokenizer == "byte" else f"{DATA}-gpt2")
    with Progress("prepare") as progress:
        manifest = data.prepare(request, out, progress)
    if arguments.json:
        print(json.dumps(manifest, indent=2))
    else:
        skipped = ", ".join(f"{n} {why}" for why, n in manifest["skipped"].items()) or "none"
        print(
            f"{out}: {manifest['n_train']} training and {manifest['n_val']} validation tokens "
            f"({manifest['tokenizer']}, {manifest['bytes_per_token']:.3f} bytes/token), "
            f"documents {manifest['documents']}, skipped {skipped}, hash {manifest['hash'][:16]}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
