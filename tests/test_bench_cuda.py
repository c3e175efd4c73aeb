"""flash-attn-det bench on a GPU, as far as it needs none; and with one."""

from __future__ import annotations

import csv
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_tools import CEILINGS, CUDA_BACKWARD, CUDA_DECODE, CUDA_PACKED, CUDA_PAGED, CUDA_SMALL, figures, results

import flash_attn_det as fad
from flash_attn_det import cli
from flash_attn_det.commands import (
    bench_cuda,
    cases,
    contest,
    contest_backward,
    machine,
    measure,
    pages,
    peers,
    plot,
    tables,
)
from flash_attn_det.commands.figures import Result, reasons

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_cuda_cases_cover_every_group():
    everything = cases.cuda_cases()
    assert list(dict.fromkeys(case.kind for case in everything)) == list(cases.GROUPS)
    assert len(set(everything)) == len(everything)
    assert all(case.replay == (case.kind in ("decode", "paged", "few")) for case in everything)
    assert {case.kind for case in everything if case.quick} == set(cases.GROUPS)
    by_kind = {kind: [case for case in everything if case.kind == kind] for kind in cases.GROUPS}
    assert {(c.D, c.causal) for c in by_kind["prefill"] if c.dtype == "float32"} == {
        (D, causal) for D in (64, 128, 256) for causal in (False, True)
    }
    assert {(c.Sq, c.Sk) for c in by_kind["few"]} == {
        (Sq, Sk) for Sq in (4, 16, 64, 128, 512, 2048) for Sk in (16384, 32768)
    }
    assert all(case.Sq == 1 for case in by_kind["decode"])
    (packed,) = (case for case in everything if case.packed)
    assert len(packed.packed) == packed.B == 64
    assert min(packed.packed) >= 128
    assert max(packed.packed) == packed.Sk <= 4096
    assert all((case.page_size > 0) == (case.kind == "paged") for case in everything)
    assert {case.page_size for case in by_kind["paged"]} == {1, 16, 64}
    (limited,) = (case for case in everything if case.memory_limit)
    assert (limited.B, limited.Sq, limited.Hq, limited.D, limited.dtype) == (4, 2048, 32, 64, "float16")
    assert limited.memory_limit == 34 << 20


def test_work_of_a_packed_case():
    pairs = sum(n * (n + 1) // 2 for n in (70, 1, 33))
    assert CUDA_PACKED.flop == 4 * 2 * pairs * 16
    assert CUDA_PACKED.kv_bytes == 2 * (70 + 1 + 33) * 2 * 16 * 4
    assert CUDA_PACKED.starts() == [0, 70, 71, 104]
    assert CUDA_PACKED.shape == "B 3, L 1 to 70, H 2, D 16, causal"
    assert [x.shape for x in CUDA_PACKED.tensors("cpu")] == [(104, 2, 16)] * 3


def test_pages_hold_the_keys_of_the_case():
    q, k, v = CUDA_PAGED.tensors("cpu")
    pool = pages.pool(CUDA_PAGED, k, v)
    assert CUDA_PAGED.shape == f"{CUDA_DECODE.shape}, pages of 16"
    assert pool.k.shape == pool.v.shape == (2 * 19, 16, 2, 16)
    assert pool.block_table.flatten().sort().values.tolist() == list(range(38))
    assert pool.block_table.flatten().tolist() != list(range(38))
    for x, paged in ((k, pool.k), (v, pool.v)):
        assert torch.equal(paged[pool.block_table].flatten(1, 2)[:, :300], x)
    want = pages.one_buffer(CUDA_PAGED, q, k, v).call()
    assert torch.equal(pages.ours(CUDA_PAGED, q, k, v).call(), want)
    assert torch.equal(peers.OURS.prepare(CUDA_PAGED, q, k, v).call(), want)


class Wrapper:
    """FlashInfer's, as far as the benchmark knows it."""

    def __init__(self, workspace, layout, use_tensor_cores):
        assert (workspace.dtype, layout) == (torch.uint8, "NHD")
        self.planned = {"use_tensor_cores": use_tensor_cores}

    def plan(self, starts, pages, last, *shape, **options):
        self.planned |= {"starts": starts, "pages": pages, "last": last, "shape": shape, **options}

    def run(self, q, caches):
        table, last = self.planned["pages"].view(len(q), -1), self.planned["last"]
        used = (table.shape[1] - 1) * self.planned["shape"][-1] + last
        return fad.attn_with_kvcache(q[:, None], *caches, cache_seqlens=used, block_table=table)[:, 0]


def test_flashinfer_is_given_the_pages_of_the_case(monkeypatch: pytest.MonkeyPatch):
    wrappers = []

    class Package:
        @staticmethod
        def BatchDecodeWithPagedKVCacheWrapper(*arguments, **keywords):
            wrappers.append(Wrapper(*arguments, **keywords))
            return wrappers[-1]

    monkeypatch.setattr(pages.importlib, "import_module", lambda name: Package)
    q, k, v = CUDA_PAGED.tensors("cpu")
    for tensor_cores, split_size in ((False, None), (True, None), (True, 1024)):
        prepared = pages.flashinfer(tensor_cores, split_size)(CUDA_PAGED, q, k, v)
        planned = wrappers[-1].planned
        assert planned["use_tensor_cores"] == tensor_cores
        assert planned.get("fixed_split_size") == (64 if split_size else None)
        assert planned["starts"].tolist() == [0, 19, 38]
        assert planned["last"].tolist() == [12, 12]
        assert planned["shape"] == (4, 2, 16, 16)
        assert torch.equal(prepared.rows(prepared.call()), fad.attn(q, k, v))


@pytest.mark.parametrize("case", [CUDA_SMALL, CUDA_DECODE, CUDA_PACKED], ids=lambda case: case.kind)
def test_contest_compares_the_rows_that_it_names_with_float64(case: cases.CudaCase):
    q, k, v = case.tensors("cpu")
    starts = torch.tensor(case.starts(), dtype=torch.int32)
    call = (
        (lambda q: fad.attn_varlen(q, k, v, starts, starts, causal=True))
        if case.packed
        else (lambda q: fad.attn(q, k, v, causal=case.causal))
    )
    expected = contest.exact(case, q, k, v)
    rows = sum(part.stop - part.start for _, _, part in contest.checked(case))
    assert expected.shape == (rows, case.D)
    assert contest.error(case, call(q), expected) < 0.01
    assert contest.error(case, call(-q), expected) > 0.01
    assert contest.error(case, call(q) * float("nan"), expected) != 0.0


def test_contest_drops_what_is_not_accurate():
    result = Result(CUDA_SMALL, ["ours", "FA2", "TF32"])
    result.figures = {"ours": figures(1, 1e-3), "FA2": figures(1, 2e-3), "TF32": figures(1, float("nan"))}
    contest._drop_inaccurate(result, torch.full((4, 16), 0.01))
    assert list(result.figures) == ["ours", "FA2"]
    assert result.missing["TF32"].startswith("not accurate, not timed: largest error nan")
    result.figures = {"ours": figures(1, 0.5), "FA2": figures(1, 2e-3)}
    contest._drop_inaccurate(result, torch.full((4, 16), 0.01))
    assert list(result.figures) == ["FA2"]
    assert result.failures == [f"{CUDA_SMALL.name}: not accurate, not timed: largest error 5.0e-01 against float64"]


def test_contest_wants_gradients_as_near_as_those_of_flash_attention():
    near, far, nothing = (1e-3, 1e-3, 1e-3), (1e-3, 1e-3, 1.3e-3), (1e-3, float("nan"), 1e-3)
    for ours, fa2, cudnn, left in (
        (near, near, far, ["ours", "FA2", "cuDNN"]),
        (far, near, near, ["FA2", "cuDNN"]),
        (nothing, near, near, ["FA2", "cuDNN"]),
        (near, nothing, near, ["ours", "cuDNN"]),
        (near, near, nothing, ["ours", "FA2"]),
    ):
        result = Result(CUDA_BACKWARD, ["ours", "FA2", "cuDNN"])
        errors = {"ours": ours, "FA2": fa2, "cuDNN": cudnn}
        result.figures = {name: figures(1, max(found)) for name, found in errors.items()}
        contest_backward.drop_inaccurate(result, errors)
        assert list(result.figures) == left
        assert bool(result.failures) == ("ours" not in left)
    assert result.missing["cuDNN"].startswith("not accurate, not timed: dk has a relative error of nan")


@pytest.mark.parametrize("ours", [(1e-3,) * 3, (0.5,) * 3])
def test_contest_of_gradients_without_others(ours):
    result = Result(CUDA_BACKWARD, ["ours"], {"ours": figures(1)})
    contest_backward.drop_inaccurate(result, {"ours": ours})
    assert bool(result.figures) == (ours[0] < 0.01)


def test_backwards_are_sent_to_their_own_contest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(contest, "measure_case", lambda case, peers, seconds: Result(case, [str(seconds)]))
    monkeypatch.setattr(contest_backward, "measure_case", lambda case, peers, seconds: Result(case, ["backward"]))
    found = contest.measure_cases([CUDA_SMALL, CUDA_BACKWARD], [], 1.0, lambda text: None)
    assert [result.libraries for result in found] == [["1.0"], ["backward"]]


def test_memory_of_backwards_is_shown():
    *_, memory = tables.grids(
        [Result(CUDA_BACKWARD, ["ours", "FA2"], {"ours": figures(2), "FA2": figures(1)})], CEILINGS
    )
    assert memory.rows == [[f"backward, {CUDA_BACKWARD.shape}, bfloat16", "1.0 MiB", "1.0 MiB", "-"]]


def test_tables_of_the_gpu_benchmark():
    prefill, decode, fork, memory = tables.grids(results(), CEILINGS)
    assert prefill.title == "Prefill, bfloat16"
    peers_columns = ["FA2", "ours/FA2", "cuDNN", "ours/cuDNN"]
    assert prefill.columns == ["case", "ours", "our rate", "of ceiling", *peers_columns, "our error", "others' error"]
    (row,) = prefill.rows
    rate = CUDA_SMALL.kv_bytes / 3e-6 / 1e9  # so small a case is bound by reading K and V
    share = CUDA_SMALL.kv_bytes / 3e12 / 3e-6
    assert row[:4] == [CUDA_SMALL.shape, "3.0 us", f"{rate:.0f} GB/s", f"{share:.0%}"]
    assert row[5:] == ["1.50", "-", "-", "1.0e-03", "2.0e-03"]
    assert decode.rows[0][1:5] == ["0.1 MiB, in L2", "-", "-", "-"]
    assert decode.rows[0][6] == "-"
    assert decode.rows[1][-4:] == ["-", "-", "1.0e-03", "-"]
    assert fork.rows[0][0] == CUDA_SMALL.shape
    assert memory.rows == [[f"{CUDA_SMALL.shape}, bfloat16", "2.0 MiB", "1.0 MiB", "1.0 MiB"]]
    for grid in (prefill, decode, fork, memory):
        assert all(len(row) == len(grid.columns) for row in grid.rows)


def test_rate_has_the_unit_of_the_longer_floor():
    prefill, decode = cases.cuda_cases()[0], replace(CUDA_DECODE, Sk=100_000)
    assert CEILINGS.rate(prefill, 1e-3) == (prefill.flop / 1e9, "TFLOP/s")
    assert CEILINGS.rate(decode, 1e-3) == (decode.kv_bytes / 1e6, "GB/s")
    assert CEILINGS.floor(prefill) == prefill.flop / 800e12
    assert CEILINGS.floor(replace(prefill, dtype="float32")) == prefill.flop / 50e12


def test_reasons_are_told_once_and_failures_apart():
    assert reasons(results()) == [
        f"cuDNN has no figures for {CUDA_SMALL.name}: no",
        f"FA2 has no figures for {replace(CUDA_DECODE, Sk=301).name}: a",
    ]
    failures = [failure for result in results() for failure in result.failures]
    assert failures == [
        f"{CUDA_DECODE.name}: not today",
        f"{replace(CUDA_SMALL, kind='fork').name}: adds 2.0 MiB, expected at most 1.0 MiB",
    ]


def test_gpu_figures_as_csv(tmp_path: Path):
    bench_cuda.write_csv(tmp_path / "figures.csv", results())
    with (tmp_path / "figures.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["library"] for line in lines] == [
        "ours",
        "FA2",
        "cuDNN",
        "ours",
        "FA2",
        "ours",
        "FA2",
        "cuDNN",
        "ours",
        "FA2",
    ]
    assert float(lines[1]["ours_over_this"]) == pytest.approx(1.5)
    assert (lines[2]["seconds"], lines[2]["missing"]) == ("", "no")


def test_gpu_figures_as_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    plot.draw(tmp_path / "figures.png", results())
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_gpu_benchmark_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    """The whole command with figures that are made up: tables, reasons, failures, files, exit code."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "facts", lambda device: {"GPU": device})
    monkeypatch.setattr(tables, "measure_ceilings", lambda chosen: CEILINGS)
    monkeypatch.setattr(contest, "measure_cases", lambda chosen, peers, seconds, progress: results())
    target = tmp_path / "results.md"
    assert cli.main(["bench", "--csv", str(tmp_path / "figures.csv"), "--markdown", str(target)]) == 1
    printed, written = capsys.readouterr().out, target.read_text()
    for text in (printed, written):
        assert "Prefill, bfloat16" in text
        assert "device copy: 3.00 TB/s" in text
        assert f"cuDNN has no figures for {CUDA_SMALL.name}: no" in text
    assert f"FAILED {CUDA_DECODE.name}: not today" in printed
    assert "# NVIDIA GPU benchmark\n\nWritten by `flash-attn-det bench --markdown` on" in written
    assert "**Something failed.**" in written
    assert (tmp_path / "figures.csv").exists()


def test_peers_are_those_that_run_the_case():
    for case in cases.cuda_cases():
        known = contest_backward.peers() if case.kind == "backward" else peers.peers(flex=True)
        names = [peer.name for peer in known if peer.runs(case)]
        assert names, case.name
        assert ("FA2" in names) == (case.dtype != "float32" and case.kind not in ("split", "paged") and not case.packed)
        assert ("efficient" in names) == (case.dtype == "float32")
        assert ("one split" in names) == (case.kind == "split")
        assert ("varlen_attn" in names) == bool(case.packed)
        assert ("one buffer" in names) == (case.kind == "paged")
    assert "FlexAttention" not in [peer.name for peer in peers.peers(flex=False)]


@pytest.mark.parametrize("Hk", [1, 2, 4])
def test_peer_without_grouped_heads_gets_copies_of_keys(Hk: int):
    def prepare(case, q, k, v):
        assert case.Hk == case.Hq == k.shape[-2] == v.shape[-2]
        return peers.Prepared(lambda: fad.attn(q, k, v, causal=case.causal))

    case = replace(CUDA_SMALL, Hk=Hk, dtype="float32")
    q, k, v = case.tensors("cpu")
    assert torch.equal(peers._ungrouped(prepare)(case, q, k, v).call(), fad.attn(q, k, v, causal=True))


def test_packages_are_peers_where_they_are_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object() if name == "flashinfer" else None)
    installed = peers.peers(flex=False)[len(peers._BUILT_IN) :]
    names = {case.kind: [peer.name for peer in installed if peer.runs(case)] for case in (CUDA_SMALL, CUDA_PAGED)}
    assert names == {
        "prefill": ["FlashInfer"],
        "paged": ["FlashInfer", "FlashInfer tensor cores", "FlashInfer fixed split"],
    }


def test_refusal_is_one_line_with_the_warnings_that_explain_it():
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for text in ("Too wide. (Triggered internally at a.cpp:1.)", "Too wide. (Triggered internally at b.cpp:2.)"):
            warnings.warn(text, UserWarning, stacklevel=1)
    assert peers.refused(RuntimeError("No kernel.\nMore."), warned) == "No kernel.; Too wide."
    assert peers.refused(NotImplementedError(), []) == "NotImplementedError"


@needs_gpu
@pytest.mark.parametrize(
    "case",
    [CUDA_SMALL, replace(CUDA_SMALL, dtype="float32"), CUDA_DECODE, CUDA_PAGED, replace(CUDA_PACKED, dtype="bfloat16")],
    ids=lambda c: f"{c.kind} {c.dtype}",
)
def test_gpu_case_is_timed_and_gives_its_memory_back(case: cases.CudaCase):
    contest.measure_case(case, peers.peers(flex=False), 0.01)  # what libraries keep for good
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    result = contest.measure_case(case, peers.peers(flex=False), 0.01)
    assert torch.cuda.memory_allocated() == before
    assert result.failures == []
    assert len(result.figures) >= 2
    for figure in result.figures.values():
        assert 1e-7 < figure.seconds < 1
        assert figure.extra_bytes > 0


@needs_gpu
def test_gpu_peer_that_raises_is_explained():
    def prepare(case, q, k, v):
        raise RuntimeError("not for this case")

    broken = peers.Peer("broken", lambda case: True, prepare)
    result = contest.measure_case(replace(CUDA_SMALL, dtype="float32"), [broken], 0.01)
    assert result.missing == {"broken": "not for this case"}
    assert list(result.figures) == ["ours"]


@needs_gpu
def test_gpu_times_and_memory():
    x = torch.zeros(1 << 26, device="cuda")
    long, short = measure.cuda_medians([lambda: x.add(1), lambda: x[: 1 << 20].add(1)], 0.05)
    replayed, _ = measure.replay_medians([lambda: x.add(1), lambda: x[: 1 << 20].add(1)], 0.05)
    assert 0 < short < long
    assert replayed == pytest.approx(long, rel=0.5)
    assert measure.cuda_peak_extra_bytes(lambda: x.add(1)) == x.nbytes


@needs_gpu
def test_gpu_facts_and_ceilings():
    facts = machine.facts("cuda")
    assert torch.cuda.get_device_name() in facts["GPU"]
    assert "multiprocessors" in facts["GPU"]
    assert re.match(r"\d+\.\d+|unknown", facts["driver"])
    assert machine.copy_bandwidth() > 1e10
    assert machine.matmul_flops(torch.bfloat16) > machine.matmul_flops(torch.float32) > 1e11


@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gpu_backward_is_timed_and_gives_its_memory_back(dtype: str):
    case = replace(CUDA_BACKWARD, dtype=dtype)
    contest_backward.measure_case(case, contest_backward.peers(), 0.01)  # what libraries keep for good
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    result = contest_backward.measure_case(case, contest_backward.peers(), 0.01)
    assert torch.cuda.memory_allocated() == before
    assert result.failures == []
    assert len(result.figures) >= 2
    assert not torch.are_deterministic_algorithms_enabled()
    for found in result.figures.values():
        assert 1e-7 < found.seconds < 1
        assert 0 < found.error < 1e-2
        assert found.extra_bytes > 0
