"""Facts of the build of adapter_ext, and what Python code needs for speed."""

from torch import Tensor, nn

from adapter_ext.snapshot import Snapshot

version: str
torch_version: str
compiler: str
cuda_compiler: str
cuda_archs: list[str]
build_type: str

def compiled_cpu_capabilities() -> list[str]: ...
def supported_cpu_capabilities() -> list[str]: ...
def cpu_capability() -> str: ...
def fma_loop(iterations: int) -> float: ...
def read_parameters(modules: list[nn.Module], snapshots: list[Snapshot]) -> list[Tensor] | None: ...
