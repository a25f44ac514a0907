"""Compiling captured kernel launches for a GPU that is not there, and reading what the compiler says about them.

A launcher is run on CPU tensors with Triton's launch replaced: each launch is bound and specialised by Triton's own
code for the target (divisibility by 16, ones, integer widths), compiled, and not run. So what is measured is what a
GPU would get, and no signature is written twice. Works with Triton 3.6 to 3.9.
"""

import io
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise SystemExit("TRITON_INTERPRET is set: kernels then are interpreted, not compiled; unset it")
# ptxas speaks (spills, C7512) only while it compiles, never out of Triton's cache.
os.environ["TRITON_ALWAYS_COMPILE"] = "1"
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
# What Triton up to 3.9 does unasked; said aloud, 3.9 does not warn.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

TRITON: str = triton.__version__


@dataclass(frozen=True)
class Processor:
    """What one SM (or CU) can hold. From the CUDA programming guide, table of compute capabilities; AMD CDNA3 ISA."""

    target: GPUTarget
    shared: int  # bytes
    threads: int
    ctas: int
    registers: int = 65536


PROCESSORS = {
    "sm_80": Processor(GPUTarget("cuda", 80, 32), 164 << 10, 2048, 32),
    "sm_89": Processor(GPUTarget("cuda", 89, 32), 100 << 10, 1536, 24),
    "sm_90": Processor(GPUTarget("cuda", 90, 32), 228 << 10, 2048, 32),
    "sm_100": Processor(GPUTarget("cuda", 100, 32), 228 << 10, 2048, 32),
    "sm_120": Processor(GPUTarget("cuda", 120, 32), 100 << 10, 1536, 24),
    "gfx942": Processor(GPUTarget("hip", "gfx942", 64), 64 << 10, 2048, 32, registers=4 * 512 * 64),
}


@dataclass(frozen=True)
class Measured:
    """One kernel on one architecture. spills: bytes on NVIDIA, registers on AMD. registers, per thread, count AMD's
    vector and accumulator registers. mma: matrix instructions of any kind; wgmma: the asynchronous ones among them
    (sm_90), or tcgen05 (sm_100). serialized: ptxas warning C7512, each wgmma waits for the one before."""

    kernel: str
    arch: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    ctas: int
    mma: int
    wgmma: int
    serialized: bool


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments it was launched with, options (num_warps, ...) among the keywords."""

    kernel: Any  # a JITFunction; Triton's own types hide what is read here
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.replace("dkv", "fused" if self.kwargs.get("FUSED") else "dkv")


@contextmanager
def captured_launches() -> Iterator[list[Launch]]:
    """Within it no kernel runs; the list receives the launches."""
    launches: list[Launch] = []

    def run(kernel: jit.JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(kernel, args, kwargs))

    original = jit.JITFunction.run
    jit.JITFunction.run = run  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        jit.JITFunction.run = original


def launches_of(launcher: Callable[[], object]) -> list[Launch]:
    """What `launcher` launches, each kernel with each set of options once. Its outputs stay uninitialised."""
    with captured_launches() as launches:
        launcher()
    return list({launch.name: launch for launch in launches}.values())


def measure(launch: Launch, arch: str, **options: Any) -> Measured:
    """Compile a launch; options (num_warps, num_stages, maxnreg, constexprs by name) override the launch's own.

    Raises what Triton raises where the kernel does not compile.
    """
    compiled, log = _compile(launch, PROCESSORS[arch].target, options)
    metadata = compiled.metadata
    read = _read_amd if PROCESSORS[arch].target.backend == "hip" else _read_nvidia
    registers, spills, mma, wgmma = read(compiled, log)
    tensor_memory = getattr(metadata, "tmem_size", None) or 0
    return Measured(
        kernel=launch.name,
        arch=arch,
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        registers=registers,
        spills=spills,
        shared=metadata.shared,
        ctas=_ctas(PROCESSORS[arch], metadata.num_warps, registers, metadata.shared, tensor_memory),
        mma=mma,
        wgmma=wgmma,
        serialized="C7512" in log or "are serialized" in log,
    )


def _compile(launch: Launch, target: GPUTarget, options: dict[str, Any]) -> tuple[Any, str]:
    backend: Any = make_backend(target)
    kernel, kwargs = launch.kernel, launch.kwargs | options
    binder: Any = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, parsed = binder(*launch.args, **kwargs)
    parsed, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, parsed)
    source: Any = ASTSource(kernel, signature, constexprs, attrs)
    log = io.StringIO()
    with redirect_stdout(log):
        compiled = triton.compile(source, target=target, options=parsed.__dict__)
    return compiled, log.getvalue()


def _read_nvidia(compiled: Any, log: str) -> tuple[int, int, int, int]:
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    sass = _disassembled(compiled.asm["cubin"])
    wgmma = len(re.findall(r"\b(?:[HQIB]GMMA|UTC[A-Z]*MMA)\b", sass))
    return registers, spills, wgmma + len(re.findall(r"\b[HQIO]MMA\b", sass)), wgmma


def _disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def _read_amd(compiled: Any, log: str) -> tuple[int, int, int, int]:
    assembly = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1])

    # .vgpr_count is of the unified file: it counts the accumulator registers too
    mma = len(re.findall(r"\bv_mfma_", assembly))
    return field("vgpr_count"), field("vgpr_spill_count") + field("sgpr_spill_count"), mma, 0


def _ctas(processor: Processor, warps: int, registers: int, shared: int, tensor_memory: int) -> int:
    """How many run at once on one SM: by registers (given out per warp, 256 or, on AMD, 512 at a time), shared memory
    (1 KB of it is the system's, per CTA), threads, and tensor memory (512 columns)."""
    amd = processor.target.backend == "hip"
    unit = 512 if amd else 256
    lanes = processor.target.warp_size
    per_warp = -(-max(registers, 1) * lanes // unit) * unit
    limits = [
        processor.ctas,
        processor.threads // (warps * lanes),
        # warps are dealt to the four schedulers, each with a quarter of the registers
        processor.registers // 4 // per_warp * 4 // warps,
        processor.shared // (shared + (0 if amd else 1024)) if shared or not amd else processor.ctas,
        512 // tensor_memory if tensor_memory else processor.ctas,
    ]
    return min(limits)
