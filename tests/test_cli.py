"""The command line: what it takes and refuses, and the report that it writes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flash_attn_det as fad
from flash_attn_det import cli
from flash_attn_det.commands import (
    cases,
    machine,
    markdown,
)

WITHOUT_RICH = """
import sys
sys.modules["rich"] = None
from flash_attn_det.cli import main
sys.exit(main(sys.argv[1:]))
"""


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (parsers,) = (a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return parsers.choices


def test_markdown_default_file():
    assert cli.build_parser().parse_args(["verify", "--markdown"]).markdown == Path("VERIFIED_RESULTS.md")
    assert cli.build_parser().parse_args(["verify"]).markdown is None


def test_sections_are_replaced_and_leave_each_other_alone(tmp_path: Path):
    target = tmp_path / "results.md"
    for title, body in (("NVIDIA GPU", "old\n## Bits\n"), ("CPU", "## Bits\n\n| a |\n"), ("NVIDIA GPU", "new\n")):
        markdown.write_section(target, title, body)
    introduction = f"# Verified results\n\n{markdown.INTRODUCTION}\n"
    assert target.read_text() == f"{introduction}\n# CPU\n\n## Bits\n\n| a |\n\n# NVIDIA GPU\n\nnew\n"


def test_sections_of_others_stay():
    text = markdown.with_section("# Verified results\n\nold\n\n# Something else\n\nkept\n", "CPU", "new")
    assert text.endswith("# CPU\n\nnew\n\n# Something else\n\nkept\n")
    assert "old" not in text
    assert markdown.with_section(text, "CPU", "new") == text


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_markdown_refuses_files_of_another_kind(command: str, tmp_path: Path, capsys):
    (tmp_path / "README.md").write_text("# flash_attn_det\n")
    for target, message in (
        (tmp_path / "README.md", "exists and is no report"),
        (tmp_path / "missing" / "results.md", "is not a folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--markdown", str(target)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "# flash_attn_det\n"


@pytest.mark.parametrize("command", ["verify", "audit", "fuzz", "bench"])
def test_gpu_that_is_not_there(command: str, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([command, "--device", "cuda"]) == 2
    printed = capsys.readouterr()
    assert printed.err == (
        f"flash-attn-det {command}: --device cuda needs a CUDA GPU that torch can use: "
        "torch.cuda.is_available() is False\n"
    )
    assert printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--flex"], "--flex says nothing about --device cpu"),
        (["--device", "cuda", "--threads", "1"], "--threads says nothing about --device cuda"),
        (["--device", "cuda", "--full"], "--full says nothing about --device cuda"),
        (
            ["--device", "cpu", "--only", "few", "split"],
            "no case is left: --device cpu has the groups prefill, decode",
        ),
        (["--device", "cuda", "--only", "fork", "--dtype", "float32"], "no case is left: --device cuda has the groups"),
    ],
)
def test_bench_refuses_what_the_device_does_not_have(arguments, message, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_groups_of_the_command_line_are_those_of_the_cases():
    (action,) = (action for action in subcommands()["bench"]._actions if action.dest == "only")
    assert list(action.choices) == list(cases.GROUPS)


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--quick", "--full"], ["--only", "training"]])
def test_bench_refuses(arguments: list[str], capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_info_names_versions_and_constants(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"flash_attn_det: {fad.__version__}" in printed
    assert f"torch: {torch.__version__}" in printed
    assert "MMA_BLOCK_KV 128" in printed


@pytest.mark.parametrize("command", ["verify", "fuzz", "bench"])
def test_without_rich_says_what_to_install(command: str):
    result = subprocess.run([sys.executable, "-c", WITHOUT_RICH, command], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "pip install 'flash-attn-det[cli]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_info_needs_no_rich():
    code = (
        "import sys; sys.modules['rich'] = None; from flash_attn_det.cli import main; raise SystemExit(main(['info']))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_other_missing_modules_are_not_blamed_on_rich(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flash_attn_det.commands.info", None)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["info"])


def test_commands_take_the_parser_s_result():
    """cli finds commands by name, so each must exist and have run()."""
    assert set(subcommands()) == {"verify", "audit", "fuzz", "bench", "info"}


def test_commit_of_a_copy_is_told_by_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FLASH_ATTN_DET_COMMIT", raising=False)
    assert "FLASH_ATTN_DET_COMMIT" not in machine.commit()
    monkeypatch.setenv("FLASH_ATTN_DET_COMMIT", "0123456789ab")
    assert machine.facts("cpu")["commit"] == "0123456789ab, as FLASH_ATTN_DET_COMMIT says"
