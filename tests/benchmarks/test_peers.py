"""What the benchmark of backends does with the implementations of others, as far as a CPU shows.

The packages that run on GPUs alone are stood in for by what their sources say of arguments, layouts and results.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moe_kernels.backends import BACKENDS
from moe_kernels.testing import Case, assert_close, make_case, run, run_reference

SIZES = {"T": 12, "D": 16, "F": 8, "E": 5, "K": 3}
ON_CUDA = ("transformers_sonicmoe", "sonicmoe", "sonicmoe_few", "sonicmoe_one", "scattermoe", "liger")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Return a function that imports a script as if its folder were the current one."""
    pytest.importorskip("tyro")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """Return a function that puts a module of that name and content in the place of a package."""

    def put(name: str, **content: object) -> None:
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def request(peers: ModuleType, device: str, dtype: torch.dtype = torch.bfloat16, **sizes: int):
    return peers.Request(**{**SIZES, **sizes}, dtype=dtype, device=torch.device(device))


def grouped(x_ND: Tensor, weight_EOD: Tensor, end_E: list[int]) -> Tensor:
    """Return the product of every row, sorted by expert, with the weights of its expert."""
    starts = [0, *end_E[:-1]]
    return torch.cat([x_ND[a:b] @ w_OD.T for a, b, w_OD in zip(starts, end_E, weight_EOD, strict=True)])


def test_peers_for_gpus_say_why_they_are_left_out(load, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = load("peers")
    for name in ON_CUDA:
        assert peers.PEERS[name][0](request(peers, "cpu")) == "runs on CUDA"
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    for name in ON_CUDA[1:]:
        assert peers.PEERS[name][0](request(peers, "cuda")) == "not installed"
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    refuse = peers.PEERS["sonicmoe"][0]
    assert "bfloat16" in refuse(request(peers, "cuda", torch.float32))
    assert "multiples of 8" in refuse(request(peers, "cuda", F=12))
    assert "9.0 and up" in refuse(request(peers, "cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert refuse(request(peers, "cuda")) is None
    assert peers.PEERS["sonicmoe_few"][0](request(peers, "cuda")) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    assert refuse(request(peers, "cuda")) is None
    assert "Hopper" in peers.PEERS["sonicmoe_few"][0](request(peers, "cuda"))


def sonicmoe_as_its_source_says(install) -> SimpleNamespace:
    """Install SonicMoE's functions in plain PyTorch, and return quack's tuners."""

    def sort(index_TK: Tensor, E: int, count_E, first_E1, token_N, row_N, place_N) -> None:
        assert index_TK.dtype == torch.int32 and index_TK.is_contiguous()
        index_N = index_TK.flatten()
        order_N = index_N.argsort(stable=True)
        count_E.copy_(torch.bincount(index_N, minlength=E))
        first_E1[0] = 0
        first_E1[1:] = count_E.cumsum(0)
        token_N.copy_(order_N // index_TK.shape[1])
        row_N.copy_(order_N)
        place_N[order_N] = torch.arange(len(order_N), dtype=torch.int32)

    def up(x_TD, w_2FDE, b, first_E1, N, K, token_N, row_N, place_N, offsets, varies, act, infers, concatenated):
        assert b is None and offsets is None and not varies and act == "swiglu" and not infers and concatenated
        assert w_2FDE.permute(2, 0, 1).is_contiguous() and len(row_N) == N == x_TD.shape[0] * K
        h_NH = grouped(x_TD[token_N], w_2FDE.permute(2, 0, 1), first_E1[1:].tolist())
        gate_NF, up_NF = h_NH.chunk(2, dim=1)
        return functional.silu(gate_NF) * up_NF, h_NH

    def down(a_NF, h_NH, w_DFE, b, score_TK, first_E1, T, K, token_N, row_N, place_N, offsets, varies, act):
        assert b is None and offsets is None and not varies and act == "swiglu" and h_NH.shape[1] == 2 * a_NF.shape[1]
        assert w_DFE.permute(2, 0, 1).is_contiguous() and score_TK.dtype == torch.float32
        y_ND = grouped(a_NF, w_DFE.permute(2, 0, 1), first_E1[1:].tolist())[place_N]
        return (y_ND.view(T, K, -1) * score_TK[..., None]).sum(1)

    def tile(tile_m: int, tile_n: int, pingpong: bool, cluster_m: int, swap_ab: bool, device_capacity: int):
        config = SimpleNamespace(**{**locals(), "cluster_n": 3 - cluster_m})
        return SimpleNamespace(kwargs={"config": config})

    options = [
        (128, 192, True, 2, False),
        (128, 192, True, 1, False),
        (128, 192, True, 2, True),
        (64, 64, True, 2, False),
    ]
    tuners = SimpleNamespace(
        **{
            name: SimpleNamespace(configs=[tile(*o, c) for o in options for c in (9, 10)], cache={"shape": "choice"})
            for name in ("gemm_tuned", "gemm_gated_tuned", "gemm_dgated_tuned")
        }
    )
    install("quack", gemm_interface=tuners)
    install("sonicmoe")
    install("sonicmoe.enums", ActivationType=SimpleNamespace(SWIGLU="swiglu"))
    functions = {"_UpProjection": SimpleNamespace(apply=up), "_DownProjection": SimpleNamespace(apply=down)}
    install("sonicmoe.functional", **functions)
    install("sonicmoe.functional.triton_kernels", TC_topk_router_metadata_triton=sort)
    return tuners


def scattermoe_as_its_source_says(install) -> None:
    def flatten_sort_count(expert_idxs: Tensor, num_experts: int):
        sorted_N, order_N = expert_idxs.flatten().sort(stable=True)
        return sorted_N, order_N, torch.bincount(sorted_N, minlength=num_experts).cumsum(0)

    def parallel_linear(
        inputs, expert_weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets,
        expert_biases=None, gates=None, grouped_in=False, grouped_out=False,
    ):  # fmt: skip
        x_ND = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
        y_NO = grouped(x_ND, expert_weights.permute(0, 2, 1), expert_offsets.tolist())
        if grouped_out:
            return y_NO
        y_NO = torch.zeros_like(y_NO).index_copy(0, sorted_scattered_idxs, y_NO)
        return (gates[:, None] @ y_NO.view(*gates.shape, -1))[:, 0]  # refuses another dtype

    install("scattermoe")
    install("scattermoe.parallel_experts", flatten_sort_count=flatten_sort_count, parallel_linear=parallel_linear)


def liger_as_its_source_says(install) -> None:
    def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        assert top_k_index.dtype == torch.int32 and top_k_weights.dtype == x.dtype
        T, K = top_k_index.shape
        token_N = torch.arange(T).repeat_interleave(K)
        return BACKENDS["naive"](
            x, token_N, top_k_index.flatten().long(), top_k_weights.flatten(), gate_up_proj, down_proj, fan_out=K
        )

    install("liger_kernel")
    install("liger_kernel.ops", LigerFusedMoEFunction=SimpleNamespace(apply=apply))


def small_case() -> Case:
    return make_case(**SIZES)


@pytest.mark.parametrize(
    ("name", "stand_in"),
    [
        ("sonicmoe", sonicmoe_as_its_source_says),
        ("sonicmoe_few", sonicmoe_as_its_source_says),
        ("scattermoe", scattermoe_as_its_source_says),
        ("liger", liger_as_its_source_says),
    ],
)
def test_adapters_give_their_peers_what_these_take(load, install, name: str, stand_in) -> None:
    peers = load("peers")
    stand_in(install)
    peer = peers.PEERS[name][1](request(peers, "cpu", torch.float32))
    case = small_case()
    assert_close(run(peer, case), run_reference(case), tolerance=3e-6)


def test_few_tiles_are_taken_from_the_tuners_and_given_back(load, install) -> None:
    peers = load("peers")
    tuners = sonicmoe_as_its_source_says(install)
    peers.PEERS["sonicmoe_few"][1](request(peers, "cpu"))
    for tuner in vars(tuners).values():
        config = tuner.configs[0].kwargs["config"]
        assert len(tuner.configs) == 1 and config.device_capacity == 9 and config.cluster_m == 2 and not config.swap_ab
        assert not tuner.cache
    peers.PEERS["sonicmoe"][1](request(peers, "cpu"))
    assert all(len(tuner.configs) == 8 for tuner in vars(tuners).values())


def test_what_a_tuner_will_try_is_compiled_first_and_a_failure_there_is_not_its_end(load) -> None:
    peers = load("peers")
    autotuner = pytest.importorskip("triton.runtime.autotuner")
    active_mode = importlib.import_module("triton.runtime._async_compile").active_mode
    tuner = autotuner.Autotuner.__new__(autotuner.Autotuner)
    tuner.configs = [SimpleNamespace(all_kwargs=lambda block=block: {"BLOCK": block}) for block in (16, 32)]
    tuner.early_config_prune = tuner.perf_model = None
    tuner.nargs = {"x_ptr": "x"}
    calls = []

    def compile_only(*arguments: object, **options: object) -> None:
        assert active_mode.get() is not None
        calls.append((arguments, options))
        if options["BLOCK"] == 32:
            raise RuntimeError("too large")

    tuner.fn = SimpleNamespace(run=compile_only)
    launch = {"grid": (1,), "warmup": False}
    with peers.compiling_in_parallel(torch.device("cuda")):
        assert tuner.prune_configs(launch) == tuner.configs
    assert calls == [(("x",), {"grid": (1,), "warmup": True, "BLOCK": block}) for block in (16, 32)]
    assert active_mode.get() is None
    assert tuner.prune_configs(launch) == tuner.configs and len(calls) == 2


def test_bench_checks_and_times_what_runs_here(load, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("bench_backends")

    def spoil(*arguments: object, **options: object) -> Tensor:
        return 1.1 * BACKENDS["naive"](*arguments, **options)

    monkeypatch.setitem(bench.PEERS, "liger", (lambda _: None, lambda _: spoil))
    options = bench.Options(rounds=2, backends=("naive", "segments", "liger", "scattermoe"))
    rows, skipped = bench.bench(bench.Layer(**SIZES), "fp32", "random", options)
    assert [(row.backend, row.mode) for row in rows] == [
        (name, mode) for name in ("naive", "segments", "dense") for mode in ("forward", "backward")
    ]
    assert all(row.percent_of_least is None and row.peak_mib is None and row.p50_ms >= 0 for row in rows)
    assert all((row.saved_mib is None) == (row.backend == "dense") for row in rows)
    assert skipped["scattermoe"] == "runs on CUDA" and skipped["liger"].startswith("AssertionError: y_TD: RMS ratio")


def test_every_backward_pass_on_cuda_has_its_own_forward_pass_and_lines_come_as_they_are_measured(
    load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = load("bench_backends")
    recorded: list[object] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            recorded.append(self)

        def elapsed_time(self, other: object) -> float:
            return float(recorded.index(other) - recorded.index(self))

    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(load("cuda_timing"), "FLUSHED_BYTES", 8)
    monkeypatch.setitem(bench.PEERS, "liger", (lambda _: None, lambda _: None))
    calls = []

    def counted(*arguments: object, **options: object) -> Tensor:
        calls.append(1)
        return BACKENDS["naive"](*arguments, **options)

    def broken(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no kernel\nat all")

    skipped: dict[str, str] = {}
    running = iter([("mine", counted), ("liger", broken)])
    measured = bench.measure_on_cuda(running, small_case(), bench.Options(repeat_ms=14, device="cuda"), skipped)
    assert list(measured) == ["mine"] and skipped == {"liger": "RuntimeError: no kernel"}
    assert measured["mine"].times == 7 * [{"forward": 1.0, "backward": 1.0}]
    assert measured["mine"].saved_mib is not None and measured["mine"].peak_mib == 0
    assert len(calls) == load("cuda_timing").WARMUP_PASSES + 7 + 2  # saved bytes and the peak
    assert "mine                     forward 1.000 ms, backward 1.000 ms, 7 passes" in capsys.readouterr().out


def test_bench_names_the_contenders_it_knows(load) -> None:
    bench = load("bench_backends")
    with pytest.raises(ValueError, match="no contender is called mine; known are .*naive.*sonicmoe_one"):
        bench.bench(bench.Layer(**SIZES), "fp32", "random", bench.Options(backends=("naive", "mine")))
