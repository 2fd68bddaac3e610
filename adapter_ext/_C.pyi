"""Facts of the build of adapter_ext, and hooks for tests and benchmarks."""

version: str
torch_version: str
compiler: str
cuda_compiler: str
cuda_archs: list[str]
build_type: str

def compiled_cpu_capabilities() -> list[str]: ...
def cpu_capability() -> str: ...
def fma_loop(iterations: int) -> float: ...
