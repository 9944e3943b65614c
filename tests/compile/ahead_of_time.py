"""Compile what a launcher would launch, for a GPU that is not there, and read what the compiler says."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass
class Recorder:
    """Stands in for a jit function and keeps the arguments of its launches."""

    kernel: JITFunction
    launches: list[tuple[tuple, dict]] = field(default_factory=list)

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def compile_launch(
    kernel: JITFunction, args: tuple, kwargs: dict, target: GPUTarget
) -> triton.compiler.CompiledKernel:
    """Compile one recorded launch, specialised as Triton itself would specialise it."""
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, debug=False, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def resources(compiled: triton.compiler.CompiledKernel) -> dict[str, int]:
    """Return registers and bytes of stack and local memory (spills) a thread, and bytes of shared memory."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # noqa: E731
        return {
            "registers": number("vgpr_count"),
            "spilled": number("private_segment_fixed_size"),
            "shared": compiled.metadata.shared,
        }
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    number = lambda name: int(re.search(rf"{name}:(\d+)", text).group(1))  # noqa: E731
    return {
        "registers": number("REG"),
        "spilled": number("STACK") + number("LOCAL"),
        "shared": compiled.metadata.shared,
    }
