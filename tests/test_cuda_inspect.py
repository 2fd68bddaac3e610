"""What benchmarks.cuda_inspect reads in machine code, and what it refuses."""

from __future__ import annotations

import dataclasses
import shutil
import sys

import pytest
from simt import build
from simt.build import REPOSITORY

sys.path.append(str(REPOSITORY))  # benchmarks/ is not installed

from benchmarks import cuda_inspect, cuda_launches
from benchmarks.cuda_inspect import Kernel
from benchmarks.cuda_launches import MACHINES, Launch

ROWS_NAME = (
    "_ZN11adapter_ext4cuda20backward_rows_kernelI13__nv_bfloat16NS0_10TensorCoreIS2_EENS0_5Shape"
    "ILi64ELi256EEEEEvNS0_14BackwardParamsE"
)
VECTORS_NAME = "_ZN11adapter_ext4cuda14vectors_kernelI13__nv_bfloat16fEEvNS0_14BackwardParamsE"
RESOURCES = f"""
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {ROWS_NAME}:
  REG:120 STACK:0 SHARED:0 LOCAL:0 CONSTANT[2]:272 CONSTANT[0]:4152 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_120
compressed

Fatbin elf code:
================
arch = sm_120

Resource usage:
 Common:
  GLOBAL:0
 Function {VECTORS_NAME}:
  REG:48 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:4152 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = f"""
\tcode for sm_80
\t.target\tsm_80

\t\tFunction : {ROWS_NAME}
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;  /* 0x38417fae */
                                                                           /* 0x078e00ff */
        /*0010*/               @P0 STG.E.64 [R2.64], R4 ;  /* 0x38417fae */
        /*0020*/               @P0 BRA 0x10 ;  /* 0x38417fae */
        /*3f00*/                   LDG.E.U16 R3, [R2.64] ;  /* 0x38417fae */
        /*3f10*/              @!P1 LDGSTS.E.BYPASS.128 [R65], [R56.64], P2 ;  /* 0x38417fae */
        /*3f20*/                   LDG.E.64 R2, [R2.64] ;  /* 0x38417fae */
       /*13f30*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;  /* 0x38417fae */
       /*13f40*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;  /* 0x38417fae */
       /*13f50*/              @UP0 STG.E.128 [R2.64], R4 ;  /* 0x38417fae */
       /*13f60*/              @!P0 BRA 0x3f10 ;  /* 0x38417fae */
       /*13f70*/                   BRA 0x13f70;  /* 0x38417fae */
\t\t..........

\tcode for sm_120
\t\tFunction : {VECTORS_NAME}
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x38417fae */
        /*0010*/                   STL.64 [R1], R4 ;  /* 0x38417fae */
"""


def parsed() -> list[Kernel]:
    return cuda_inspect.parse(RESOURCES.splitlines(), CODE.splitlines())


LOOP = {"LDGSTS.E.BYPASS.128": 1, "LDG.E.64": 1, "HMMA.16816.F32.BF16": 2, "STG.E.128": 1}
ROWS = Kernel(
    "void adapter_ext::cuda::backward_rows_kernel<__nv_bfloat16, adapter_ext::cuda::TensorCore"
    "<__nv_bfloat16>, adapter_ext::cuda::Shape<64, 256> >(adapter_ext::cuda::BackwardParams)",
    80,
    registers=120,
    local_memory=0,
    instructions={**LOOP, "IMAD.MOV.U32": 1, "LDG.E.U16": 1, "STG.E.64": 1, "BRA": 3},
    in_main_loops=LOOP,
)
LAUNCH = Launch(threads=256, shared=64 * 1024)


def renamed(kernel: Kernel, old: str, new: str) -> Kernel:
    return dataclasses.replace(kernel, name=kernel.name.replace(old, new))


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is missing")
def test_parse() -> None:
    rows, vectors = parsed()
    assert rows == ROWS
    assert vectors.arch == 120
    assert vectors.registers == 48
    assert vectors.local_memory == 24
    assert vectors.instructions == {"LDG.E.128": 1, "STL.64": 1}
    assert not vectors.in_main_loops
    assert vectors.key == ("vectors_kernel", "", "bf16 by fp32")


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is missing")
def test_parse_of_one_without_the_other() -> None:
    with pytest.raises(RuntimeError, match="expected kernels with both"):
        cuda_inspect.parse(RESOURCES.splitlines(), [])


@pytest.mark.parametrize(
    ("name", "key", "tensor_cores"),
    [
        (ROWS.name, ("backward_rows_kernel", "64", "bf16"), True),
        ("void n::k<float, n::Tf32>(n::P)", ("k", "", "fp32 by TF32"), True),
        ("void n::k<double, n::MultiplyAdd<double> >(n::P)", ("k", "", "fp64"), False),
        ("void n::k<__half, n::MultiplyAdd<float> >(n::P)", ("k", "", "fp16 by fp32"), False),
        ("void n::aux_kernel<float>(n::P)", ("aux_kernel", "", "fp32"), False),
        ("n::(anonymous namespace)::scan_kernel(n::P)", ("scan_kernel", "", ""), False),
    ],
)
def test_names(name: str, key: tuple[str, str, str], tensor_cores: bool) -> None:
    kernel = dataclasses.replace(ROWS, name=name.replace("n::", "adapter_ext::cuda::"))
    assert kernel.key == key
    assert kernel.tensor_cores == tensor_cores


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "arch", "blocks"),
    [
        (128, 256, 0, 80, 2),
        (129, 256, 0, 80, 1),  # registers come in eights
        (120, 256, 0, 80, 2),
        (128, 128, 0, 80, 4),
        (104, 128, 0, 80, 4),  # 19 warps, of which four parts have 16
        (32, 32, 0, 80, 32),  # no more blocks than that
        (32, 256, 0, 80, 8),
        (32, 1024, 0, 120, 1),  # of 1536 threads
        (32, 256, 40 * 1024, 80, 4),  # 164 KiB
        (32, 256, 40 * 1024, 90, 5),  # 228 KiB
        (32, 256, 41 * 1024 + 1, 80, 3),
        (32, 256, 99 * 1024, 120, 1),
    ],
)
def test_blocks(registers: int, threads: int, shared: int, arch: int, blocks: int) -> None:
    kernel = dataclasses.replace(ROWS, registers=registers, arch=arch)
    assert kernel.blocks(Launch(threads, shared), MACHINES[arch]) == blocks


COLUMNS = renamed(ROWS, "rows_kernel", "columns_kernel")


def without(opcode: str, instead: str = "NOP", kernel: Kernel = ROWS) -> Kernel:
    """The kernel with another instruction in its main loops; elsewhere there still is one."""
    loops = dict(kernel.in_main_loops)
    loops[instead] = loops.get(instead, 0) + loops.pop(opcode)
    everywhere = {**loops, opcode: 0 if opcode.startswith("HMMA") else 1}
    return dataclasses.replace(kernel, instructions=everywhere, in_main_loops=loops)


def test_what_is_right() -> None:
    assert not cuda_inspect.problems(ROWS, LAUNCH)
    assert not cuda_inspect.problems(COLUMNS, LAUNCH)
    assert not cuda_inspect.problems(without("STG.E.128", "STG.E.64"), LAUNCH)
    scalar = renamed(
        without("HMMA.16816.F32.BF16"), "TensorCore<__nv_bfloat16>", "MultiplyAdd<float>"
    )
    assert not cuda_inspect.problems(scalar, LAUNCH)
    half = dataclasses.replace(
        renamed(without("HMMA.16816.F32.BF16"), "__nv_bfloat16", "double"), registers=255
    )
    half = renamed(half, "TensorCore", "MultiplyAdd")
    assert not cuda_inspect.problems(half, Launch(128, 0))
    other = renamed(without("HMMA.16816.F32.BF16"), "backward_rows", "backward_ranges")
    assert not cuda_inspect.problems(other, LAUNCH)


@pytest.mark.parametrize(
    ("kernel", "launch", "reason"),
    [
        (dataclasses.replace(ROWS, local_memory=8), LAUNCH, "8 bytes of local memory, 0 accesses"),
        (
            dataclasses.replace(ROWS, instructions={**ROWS.instructions, "LDL.LU": 3, "STL.64": 4}),
            LAUNCH,
            "0 bytes of local memory, 7 accesses",
        ),
        (without("HMMA.16816.F32.BF16"), LAUNCH, "no HMMA"),
        (
            renamed(without("HMMA.16816.F32.BF16", "HFMA2"), "TensorCore<__nv_bfloat16>", "Tf32"),
            LAUNCH,
            "no HMMA",
        ),
        (without("LDGSTS.E.BYPASS.128", "LDG.E.64"), LAUNCH, "no loads of 16 bytes"),
        (without("LDGSTS.E.BYPASS.128", "LDS.128"), LAUNCH, "no loads of 16 bytes"),
        (without("STG.E.128", "STG.E.64", COLUMNS), LAUNCH, "no stores of 16 bytes"),
        (without("STG.E.128", "STS.128", COLUMNS), LAUNCH, "no stores of 16 bytes"),
        (dataclasses.replace(ROWS, registers=136), LAUNCH, "136 registers are for 256 threads"),
        (ROWS, None, "benchmarks.cuda_launches has no call"),
    ],
)
def test_what_is_refused(kernel: Kernel, launch: Launch | None, reason: str) -> None:
    (problem,) = cuda_inspect.problems(kernel, launch)
    assert problem.startswith(f"{kernel.name}, sm_80: {reason}")


@pytest.mark.parametrize(
    ("name", "arch", "refused"),
    [
        ("forward_parts_kernel", 120, False),  # shared memory has room for two blocks at most
        ("forward_parts_kernel", 90, True),
        ("backward_rows_kernel", 120, True),
    ],
)
def test_registers_of_small_tiles(name: str, arch: int, refused: bool) -> None:
    kernel = dataclasses.replace(
        renamed(ROWS, "backward_rows_kernel", name), registers=156, arch=arch
    )
    problems = cuda_inspect.problems(kernel, Launch(128, 0))
    assert any("156 registers are for 384 threads" in problem for problem in problems) == refused


def test_table_and_what_differs_from_it() -> None:
    hopper = dataclasses.replace(ROWS, arch=90, registers=100)
    kernels = [ROWS, hopper]
    launches = {80: {ROWS.name: LAUNCH}, 90: {ROWS.name: LAUNCH}}
    text = cuda_inspect.table(kernels, launches)
    first, _, header, *_ = text.splitlines()
    assert first == "Several numbers: sm_80 (A100) / sm_90 (H100)"
    assert header.startswith("| kernel | tile | type | threads | registers | shared")
    row = "| backward_rows_kernel | 64 | bf16 | 256 | 120 / 100 | 64.0 / 64.0 | 2 / 2 | 2 | 1 | 1 |"
    assert text.splitlines()[4:] == [row]
    page = f"before\n\n{cuda_inspect.BEGIN}{text}{cuda_inspect.END}\n| no | 64 | part | of it |\n"
    documented = cuda_inspect.documented_blocks(page)
    assert documented == {ROWS.key: {80: 2, 90: 2}}
    assert not cuda_inspect.differences(kernels, launches, documented)
    assert not cuda_inspect.differences([hopper], launches, documented)

    more = cuda_inspect.differences(kernels, launches, {ROWS.key: {80: 1, 90: 3}})
    assert more == [f"{ROWS.name}, sm_90: 2 blocks on a multiprocessor of H100, cuda.md says 3"]
    (missing,) = cuda_inspect.differences(kernels, launches, {})
    assert missing == "backward_rows_kernel 64 bf16: not in cuda.md"
    (gone,) = cuda_inspect.differences([], launches, documented)
    assert gone == "backward_rows_kernel 64 bf16: only in cuda.md"


def test_without_the_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool, path: tool if tool == "c++filt" else None)
    with pytest.raises(SystemExit, match="needs cuobjdump, nvdisasm, of binutils"):
        cuda_inspect.inspect([])


def test_the_page_has_the_table() -> None:
    documented = cuda_inspect.documented_blocks(cuda_inspect.PAGE.read_text(encoding="utf-8"))
    assert {key[0] for key in documented} >= {*cuda_inspect.PRODUCTS, *cuda_inspect.WRITES_ROWS}
    assert all({80, 120} <= blocks.keys() for blocks in documented.values())


@pytest.mark.skipif(build.missing("plain") is not None, reason=build.missing("plain") or "")
def test_recorded_launches(request: pytest.FixtureRequest) -> None:
    """The launchers choose tiles and shared memory for each machine; nothing is run."""
    if request.config.getoption("--backend") != "native":
        pytest.skip("a process has one stand-in, with its own settings")
    launches = {arch: cuda_launches.record(machine) for arch, machine in MACHINES.items()}
    assert all(recorded.keys() == launches[80].keys() for recorded in launches.values())
    for name, launch in launches[80].items():
        assert 32 <= launch.threads <= 1024, name
        assert 0 <= launch.shared <= 163 * 1024, name
    assert launches[90][ROWS.name].threads == 256
    tile = ROWS.name.replace("backward_rows", "forward").replace("Backward", "Forward")
    tile = tile.replace("64, 256", "64, 512")
    assert launches[90][tile].threads == 512
    tile = tile.replace("64, 512", "16, 128")
    assert launches[90][tile].threads == 128
    assert launches[90][tile].shared > launches[120][tile].shared  # more of x has room
