"""Doctor: what this machine can run, and what is missing with its install line (`moe doctor`).

Nothing heavy is imported and nothing is fetched: versions come from the metadata of installed distributions,
their limits from that of moe-train itself. Each expert backend is tried on a small case against `naive`.
"""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import distributed

from moe_kernels.backends import BACKENDS, ExpertsBackend, resolve_backend

GIB = 1024**3
DISTRIBUTION = "moe-train"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing looked at. A `problem` keeps the quickstart recipe from running; a `note` does not."""

    part: str
    state: Literal["ok", "note", "problem"]
    found: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A distribution we use: what for, and whether the quickstart recipe needs it."""

    name: str
    use: str
    is_needed: bool = False
    remedy: str = ""  # where `pip install NAME` is not the way


PACKAGES = (
    Package(name="deepspeed", use="the training engine", is_needed=True),
    Package(name="numpy", use="tokens on disk", is_needed=True),
    Package(name="tokenizers", use="training a tokenizer", is_needed=True),
    Package(name="transformers", use="tokenizers and checkpoints of Hugging Face", is_needed=True),
    Package(name="pyarrow", use="text in parquet files", is_needed=True),
    Package(name="safetensors", use="checkpoints", is_needed=True),
    Package(name="pydantic", use="recipes as JSON", is_needed=True),
    Package(name="tyro", use="recipes on the command line", is_needed=True),
    Package(name="matplotlib", use="charts as PNG", is_needed=True),
    Package(name="triton", use="expert kernels on GPUs"),
    Package(name="wandb", use="metrics in Weights & Biases"),
    Package(name="datasets", use="text in Hugging Face dataset folders"),
    Package(name="lm_eval", use="moe eval --lm-eval", remedy='pip install "moe-train[lm-eval]"'),
    Package(
        name="megablocks",
        use="the backend of that name",
        remedy="asks for torch <2.7.1: in an environment of its own, pip install --no-deps megablocks",
    ),
)


def diagnose() -> list[Finding]:
    """Return what was found on this machine, in the order it is shown."""
    pins = version_limits()
    findings = [_python(), _self(pins), _torch(pins), _cpu(), *_gpus(), _process_groups()]
    findings += [check_package(package, pins.get(package.name), installed(package.name)) for package in PACKAGES]
    findings += [*_backends(), _disk(Path.cwd()), _memory()]
    return findings


def run_doctor(console: Console | None = None) -> int:
    """Print the findings as a table. Returns the exit code: 0 if the quickstart can run here, else 1."""
    console = console or Console()
    findings = diagnose()
    table = Table(box=None, pad_edge=False, show_header=False)
    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    for finding in findings:
        # Text, because rich would read the brackets of an install line as markup
        found = Text(finding.found)
        if finding.remedy:
            found.append(f"\n-> {finding.remedy}", style="cyan")
        table.add_row(Text(finding.state, style=styles[finding.state]), Text(finding.part), found)
    console.print(table)
    problems = [finding.part for finding in findings if finding.state == "problem"]
    if problems:
        console.print(Text(f"\nThe quickstart cannot run here yet: {', '.join(problems)}", style="bold red"))
    else:
        console.print(Text("\nThe quickstart can run here: python recipes/quickstart.py", style="green"))
    return 1 if problems else 0


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def version_limits() -> dict[str, Requirement]:
    """Return what moe-train asks for on this platform, extras included; empty if it is not installed."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    asked = [Requirement(line) for line in lines]
    return {pin.name: pin for pin in asked if pin.marker is None or pin.marker.evaluate({"extra": "datasets"})}


def check_package(package: Package, pin: Requirement | None, version: str | None) -> Finding:
    """Return the finding on one distribution from the limits on its version and the installed version."""
    limits = f"{package.name}{pin.specifier}" if pin else package.name
    install = package.remedy or f'pip install "{limits}"'
    if version is None:
        state = "problem" if package.is_needed else "note"
        return Finding(part=package.name, state=state, found=f"not installed ({package.use})", remedy=install)
    if pin and not pin.specifier.contains(version, prereleases=True):
        found = f"{version}, outside the tested {pin.specifier}"
        return Finding(part=package.name, state="note", found=found, remedy=install)
    return Finding(part=package.name, state="ok", found=version)


def _python() -> Finding:
    return Finding(part="python", state="ok", found=f"{sys.version.split()[0]} on {sys.platform}, {sys.executable}")


def _self(pins: dict[str, Requirement]) -> Finding:
    version = installed(DISTRIBUTION)
    if version is None or not pins:
        remedy = 'in the repository: pip install -e ".[dev]"'
        return Finding(part=DISTRIBUTION, state="note", found="not installed: versions not checked", remedy=remedy)
    return Finding(part=DISTRIBUTION, state="ok", found=version)


def _torch(pins: dict[str, Requirement]) -> Finding:
    version = check_package(Package(name="torch", use="everything"), pins.get("torch"), torch.__version__)
    cuda, rocm = torch.version.cuda, torch.version.hip
    build = f"built for CUDA {cuda}" if cuda else f"built for ROCm {rocm}" if rocm else "CPU build"
    return Finding(part="torch", state=version.state, found=f"{version.found}; {build}", remedy=version.remedy)


def _cpu() -> Finding:
    threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch of our range
    if not capabilities:
        return Finding(part="cpu", state="ok", found=threads)
    bf16 = [name for name in ("amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16") if capabilities.get(name)]
    speed = f"bf16 by {', '.join(bf16)}" if bf16 else "no bf16 instructions: train in fp32"
    return Finding(part="cpu", state="ok", found=f"{threads}, {speed} ({capabilities.get('cpu_name', 'unnamed')})")


def _gpus() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            found = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
            yield Finding(part=f"gpu {index}", state="ok", found=found)
    elif shutil.which("nvidia-smi") and torch.version.cuda is None:
        remedy = 'pip install --force-reinstall "torch==2.13.0" from an index that has the build with CUDA'
        yield Finding(part="gpu", state="note", found="nvidia-smi is here, torch is a CPU build", remedy=remedy)
    else:
        yield Finding(part="gpu", state="ok", found="none that torch can use; the CPU it is")


def _process_groups() -> Finding:
    if not distributed.is_available():
        remedy = "install a build of torch with torch.distributed"
        return Finding(part="processes", state="problem", found="torch.distributed is missing", remedy=remedy)
    has = {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()}
    found = ", ".join(f"{name} {'yes' if is_there else 'no'}" for name, is_there in has.items())
    needed = "nccl" if torch.cuda.is_available() else "gloo"
    if not has[needed]:
        remedy = f"install a build of torch with {needed}"
        return Finding(part="processes", state="problem", found=found, remedy=remedy)
    return Finding(part="processes", state="ok", found=found)


def _backends() -> Iterator[Finding]:
    devices = [torch.device(kind) for kind in ("cpu", "cuda") if kind == "cpu" or torch.cuda.is_available()]
    defaults = set()
    for device in devices:
        try:
            chosen, _ = resolve_backend("auto", device, torch.float32)
        except ValueError as error:
            yield Finding(part=f"auto on {device}", state="problem", found=str(error))
        else:
            defaults.add(chosen)
            yield Finding(part=f"auto on {device}", state="ok", found=f"{chosen}, the default for {device}")
    for name in BACKENDS:
        yield _backend(name, devices, is_default=name in defaults)


def _backend(name: str, devices: list[torch.device], *, is_default: bool) -> Finding:
    works, refusals, failures = [], [], []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            where = f"{device} {str(dtype).removeprefix('torch.')}"
            if refusal := BACKENDS[name].refusal(device=device, dtype=dtype):
                refusals.append(f"{where}: {refusal}")
            elif failure := _trial(BACKENDS[name], device, dtype):
                failures.append(f"{where}: {failure}")
            else:
                works.append(where)
    state = "problem" if failures and is_default else "note" if failures or not works else "ok"
    found = [f"agrees with naive on {', '.join(works)}"] if works else ["cannot run here"]
    return Finding(part=f"backend {name}", state=state, found="; ".join(found + failures), remedy="; ".join(refusals))


def _trial(backend: ExpertsBackend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None if the backend gives the answer of `naive` on a small case, else what went wrong."""
    draw = torch.Generator().manual_seed(0)
    x_TD = torch.randn(8, 32, generator=draw).to(device, dtype)
    gate_up_E2FD = torch.randn(4, 128, 32, generator=draw).to(device, dtype)
    down_EDF = torch.randn(4, 32, 64, generator=draw).to(device, dtype)
    token_N = torch.arange(8, device=device).repeat_interleave(2)
    expert_N = torch.tensor([0, 1, 0, 3], device=device).repeat(4)  # the third expert gets nothing
    weight_N = torch.rand(16, generator=draw).to(device)
    case = (x_TD, token_N, expert_N, weight_N, gate_up_E2FD, down_EDF)
    try:
        y_TD = backend(*case, fan_out=2).float()
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises is the finding
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    expected_TD = BACKENDS["naive"](*case, fan_out=2).float()
    error = ((y_TD - expected_TD).norm() / expected_TD.norm()).item()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    return None if error <= tolerance else f"differs from naive by {error:.1e} (limit {tolerance:.0e})"


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / GIB
    return _amount("disk", free, f"{free:.1f} GiB free for runs/ and data/ in {folder}")


def _memory() -> Finding:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return Finding(part="memory", state="ok", found="not known on this system")
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    free = kib["MemAvailable"] / 1024**2
    return _amount("memory", free, f"{free:.1f} GiB free of {kib['MemTotal'] / 1024**2:.1f}")


def _amount(part: str, free_gib: float, found: str) -> Finding:
    # importing torch and DeepSpeed takes 0.25 GiB, a checkpoint of 10 M parameters with its moments 0.12 GiB:
    # below 1 GiB there is no room for both, from 2 GiB on there is room to spare
    state = "problem" if free_gib < 1 else "note" if free_gib < 2 else "ok"
    remedy = "" if state == "ok" else "the quickstart wants 2 GiB"
    return Finding(part=part, state=state, found=found, remedy=remedy)
