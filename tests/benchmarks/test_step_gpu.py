"""The benchmark of a step on a GPU: what it counts, how it reads a profile, and that all of it runs."""

import csv
import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Return a function that imports a script as if its folder were the current one."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_flops_of_a_step_are_those_of_the_matrices_and_of_causal_attention(load) -> None:
    bench = load("bench_step_gpu")
    config = bench.make_config(bench.Options(layers=3))
    width, expert, experts, top_k, vocab, length = 2048, 1024, 64, 8, 50304, 4096
    layer = 4 * width * width + experts * width + top_k * 3 * width * expert
    # query by key and score by value, 2 * width each; of length * length pairs half are seen
    attention = 3 * 4 * width * length * length / 2
    by_hand = 3 * (2 * length * (3 * layer + width * vocab) + attention)
    assert bench.step_flops(config, sequences=1, length=length) == pytest.approx(by_hand, rel=1e-6)
    assert bench.step_flops(config, sequences=4, length=length) == pytest.approx(4 * by_hand, rel=1e-6)


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("experts_fwd_up_kernel", "experts: products"),
        ("grouped_matmul_bwd_weight_kernel", "experts: products"),
        ("void cutlass::device_kernel<...GemmUniversal<cutlass::gemm::GroupProblemShape<...>>>", "experts: products"),
        ("scan_kernel", "experts: rows and sums"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>", "attention core"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention core"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNN", "dense products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "dense products"),
        ("cutlass_80_simt_sgemm_128x64_8x5_tn_align1", "router and sorting"),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize64x64x8", "router and sorting"),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<...>", "router and sorting"),
        ("void at::native::multi_tensor_apply_kernel<..., FusedAdamMathFunctor<float, 4>>", "optimizer and norm"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float, NormTwoOps<float>>>", "optimizer and norm"),
        ("void cunn_SoftMaxForward<4, float, float, float, LogSoftMaxForwardEpilogue>", "norms, softmax, loss"),
        ("void at::native::vectorized_elementwise_kernel<4, direct_copy_kernel_cuda>", "elementwise, copies, sums"),
        ("Memcpy DtoD (Device -> Device)", "elementwise, copies, sums"),
        ("something_new", "other"),
    ],
)
def test_a_kernel_is_told_by_its_name(load, kernel: str, part: str) -> None:
    assert load("step_profile").part_of(kernel) == part


def event(category: str, name: str, start: float, duration: float) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


def test_a_profile_gives_each_kernel_its_phase_and_counts_overlapping_ones_once_as_busy(load) -> None:
    step_profile = load("step_profile")
    events = [
        event("user_annotation", "phase: backward", 5000, 4000),
        event("gpu_user_annotation", "phase: update", 0, 9000),
        event("cpu_op", "aten::mm", 0, 9000),
        event("kernel", "nvjet", 0, 1000),
        event("kernel", "nvjet", 6000, 2000),
        event("gpu_memcpy", "Memcpy", 7000, 2000),
    ]
    # two steps: half of everything is that of one
    found = step_profile.read_trace({"traceEvents": events}, categories=step_profile.GPU_CATEGORIES, num_steps=2)
    assert found.busy_ms_per_step == pytest.approx((1 + 3) / 2)
    times = {(kernel.part, kernel.phase): kernel.ms_per_step for kernel in found.kernels}
    assert times == {
        ("dense products", "forward"): 0.5,
        ("dense products", "backward"): 1.0,
        ("elementwise, copies, sums", "backward"): 1.0,
    }
    stamp = {
        "date": "",
        "commit": "",
        "device": "",
        "driver": "",
        "torch": "",
        "triton": "",
        "layers": 1,
        "micro_batches": 1,
        "sequences": 1,
        "length": 1,
        "contender": "ours",
    }
    rows = step_profile.part_rows(found, step_ms=5.0, **stamp)
    assert [(row.part, row.ms_per_step, row.percent_of_step) for row in rows if row.part == "GPU idle"] == [
        ("GPU idle", 3.0, 60.0)
    ]


def test_the_cost_of_the_balance_is_that_of_steps_of_the_same_round(load) -> None:
    times = {None: [100.0, 200.0, 100.0], 0.01: [101.0, 204.0, 110.0]}
    assert load("bench_step_gpu").cost_of_balance(times) == {0.01: pytest.approx(2.0)}


def test_the_whole_of_it_runs_on_a_toy(load, tmp_path: Path) -> None:
    bench: ModuleType = load("bench_step_gpu")
    command = ["bench_step_gpu.py", "--tiny", "--rounds", "2", "--warmup", "1", "--profiled", "1"]
    result = subprocess.run(
        [sys.executable, *command, "--machine", "toy", "--results", str(tmp_path)],
        cwd=BENCHMARKS,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    with (tmp_path / "step_gpu_toy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in dataclasses.fields(bench.Row)]
    kinds = [(row["contender"], row["balance_coefficient"]) for row in rows]
    ours = [("ours", ""), ("ours", "0.0"), ("ours", "0.01")]
    assert kinds == [*ours, ("transformers grouped_mm", "")]
    parts = load("step_profile").read_rows(tmp_path / "step_parts_toy.csv")
    assert {(row.contender, row.phase) for row in parts} == {
        (contender, phase) for contender in ("ours", kinds[-1][0]) for phase in ("forward", "backward", "update", "")
    }
    assert (tmp_path / "step_toy.svg").stat().st_size > 1000
