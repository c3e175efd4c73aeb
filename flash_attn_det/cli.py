"""The ``flash-attn-det`` command line: verify what holds here, audit it, fuzz it, time it, or print its settings."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from .commands import CannotRun, markdown

RICH_MISSING = (
    "flash-attn-det {command} prints its tables with the package 'rich', which is not installed: "
    "pip install 'flash-attn-det[cli]'"
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; each sub-command stores its name in ``command``."""
    parser = argparse.ArgumentParser(prog="flash-attn-det", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    verify = commands.add_parser(
        "verify", help="compare bits, accuracy, time and memory on this machine; exit code 1 when anything fails"
    )
    _add_device(verify, "default: the CPU, and the GPU if there is one")
    _add_markdown(verify)

    audit = commands.add_parser(
        "audit", help="compute sampled rows of attention again on the CPU, bit by bit; exit code 1 when any differs"
    )
    _add_device(audit, "default: the GPU if there is one, else the CPU")
    audit.add_argument("--rows", type=_positive, default=1000, metavar="N", help="rows of each case (default: 1000)")
    audit.add_argument("--seed", type=int, default=0, metavar="N", help="of the inputs and of the sample (default: 0)")

    fuzz = commands.add_parser(
        "fuzz", help="compare random calls on a GPU with their emulation on the CPU; exit code 1 when a bit differs"
    )
    _add_device(fuzz, "default: the GPU if there is one, else the CPU against its own scalar code")
    fuzz.add_argument(
        "--rows", type=_count, default=100_000, metavar="N", help="rows to compare, as in 1e7 (default: 1e5)"
    )
    fuzz.add_argument("--seed", type=int, default=0, metavar="N", help="of the calls (default: 0)")
    fuzz.add_argument("--first", type=int, default=0, metavar="N", help="the call to begin with (default: 0)")
    fuzz.add_argument("--backward", action="store_true", help="also the gradients")
    fuzz.add_argument("--threads", type=_positive, metavar="N", help="that emulate (default: one for each core)")

    bench = commands.add_parser("bench", help="time, accuracy and memory beside other attentions")
    _add_device(bench, "default: the GPU if there is one, else the CPU")
    size = bench.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few cases, in about a minute")
    size.add_argument(
        "--full", action="store_true", help="CPU: also the cases of more than 0.6 TFLOP, which take an hour"
    )
    bench.add_argument(
        "--only",
        choices=("prefill", "decode", "paged", "few", "short", "fork", "split", "backward"),
        nargs="+",
        help="some of the groups; the CPU has prefill, decode and backward",
    )
    bench.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="one of the dtypes")
    bench.add_argument(
        "--threads", type=_positive, nargs="+", metavar="N", help="CPU: thread counts to run with (default: 1 2)"
    )
    bench.add_argument(
        "--flex", action="store_true", help="GPU: also FlexAttention, which is compiled for each case (minutes)"
    )
    bench.add_argument("--csv", type=Path, metavar="FILE", help="also write every figure as CSV")
    bench.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="also draw the figures; needs matplotlib: pip install 'flash-attn-det[bench]'",
    )
    _add_markdown(bench)

    commands.add_parser("info", help="versions, constants, instruction sets and settings")
    return parser


def _add_device(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help=f"where to run ({default})")


def _add_markdown(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--markdown",
        nargs="?",
        const="VERIFIED_RESULTS.md",
        type=_report,
        metavar="FILE",
        help="also write the results into this device's section of a markdown report (default: VERIFIED_RESULTS.md)",
    )


def _report(text: str) -> Path:
    refusal = markdown.refusal(Path(text))
    if refusal is not None:
        raise argparse.ArgumentTypeError(refusal)
    return Path(text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _count(text: str) -> int:
    try:
        return _positive(str(int(float(text))))
    except OverflowError:
        raise argparse.ArgumentTypeError(f"{text} is not a number of rows") from None


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 fine, 1 a check failed, 2 the command cannot run as asked."""
    arguments = build_parser().parse_args(argv)
    try:
        command = importlib.import_module(f"flash_attn_det.commands.{arguments.command}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "rich":
            raise
        print(RICH_MISSING.format(command=arguments.command), file=sys.stderr)
        return 2
    try:
        return command.run(arguments)
    except CannotRun as error:
        print(f"flash-attn-det {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
