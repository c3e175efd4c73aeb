"""``flash-attn-det info``: versions, constants, instruction sets and settings, as plain text."""

from __future__ import annotations

import argparse

from flash_attn_det.commands import machine


def run(arguments: argparse.Namespace) -> int:
    """The command. Prints one fact per line and returns 0."""
    facts = {name: value for device in machine.devices(None) for name, value in machine.facts(device).items()}
    for name, value in facts.items():
        print(f"{name}: {value}")
    return 0
