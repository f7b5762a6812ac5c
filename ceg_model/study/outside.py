"""The subcommands that need no study of ours: `ceg paper`."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_subcommands(subparsers: Any) -> None:
    _add_paper(subparsers)


def _add_paper(subparsers: Any) -> None:
    paper = subparsers.add_parser(
        "paper", help="the published gains (arXiv 2505.04075) taken apart into algorithm and speed"
    )
    paper.add_argument("--json", action="store_true", help="print one JSON object")
    paper.add_argument("--markdown", action="store_true", help="print the tables of docs/paper.md")
    paper.set_defaults(run=_paper)


def _paper(arguments: argparse.Namespace) -> int:
    from ceg_model.study import paper, paper_page

    if arguments.json:
        print(json.dumps(paper.taken_apart(), indent=2, allow_nan=False))
    elif arguments.markdown:
        print(paper_page.markdown())
    else:
        paper_page.show()
    return 0
