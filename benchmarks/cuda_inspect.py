"""``python -m benchmarks cuda-inspect``: what nvcc made of the CUDA kernels, without a GPU.

Reads the machine code in the built CUDA library, prints a table of it, and says what is wrong:
local memory (registers that were spilled to it, too), no tensor cores where products are theirs, no
accesses of 16 bytes where rows are moved, registers for too few threads. ``--check`` compares with
the table in docs/cuda.md as well: the kernels must be those that it has, with no fewer blocks on a
multiprocessor. ``--write`` writes that table.

Blocks follow from registers, threads and shared memory of a launch with D = 1024, r = 64 and a pre
norm (:mod:`benchmarks.cuda_launches`). Needs cuobjdump and nvdisasm, on PATH or from the extra
``[inspect]``. Exits with 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from adapter_ext import _library
from benchmarks import cuda_launches, measure
from benchmarks.cuda_launches import MACHINES, Launch, Machine

PAGE = cuda_launches.REPOSITORY / "docs" / "cuda.md"
BEGIN, END = "<!-- benchmarks.cuda_inspect -->\n", "\n<!-- end -->"

LOCAL = ("LDL", "STL")
LOADS = ("LDG", "LD", "LDGSTS")  # from global memory; LD: or from where an address says
STORES = ("STG", "ST")
WIDE = "128"  # bits

# The kernels that multiply tiles.
PRODUCTS = (
    "forward_kernel",
    "forward_parts_kernel",
    "forward_down_kernel",
    "forward_up_kernel",
    "backward_rows_kernel",
    "backward_columns_kernel",
)
# The kernels that write rows where they multiply; all of PRODUCTS read rows and weights there.
WRITES_ROWS = (
    "forward_kernel",
    "forward_parts_kernel",
    "forward_up_kernel",
    "backward_columns_kernel",
)
# Threads of a multiprocessor that the kernels with products must have registers for: two blocks of
# 256, or four of 128. Half of that for float64, or where shared memory has room for one block of
# 256, and of small tiles by parts for two of 128 at most. kResident and kPartsResident in csrc/cuda
# ask nvcc for it.
LEAST_THREADS, HALF_OF_THEM = 512, 256
ONE_LARGE_TILE = 120  # architectures from this one on


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The machine code of a kernel for one architecture.

    Attributes:
        name: as C++ has it, with template arguments and parameters.
        arch: the architecture, 80 for sm_80.
        registers: of a thread.
        local_memory: of a thread in bytes, its stack included.
        instructions: how many there are of each.
        in_main_loops: of those, how many are in loops that multiply.
    """

    name: str
    arch: int
    registers: int
    local_memory: int
    instructions: Mapping[str, int]
    in_main_loops: Mapping[str, int]

    @property
    def function(self) -> str:
        """The name alone."""
        match = re.search(r"(\w+)(<|\()", self.name.replace("(anonymous namespace)", ""))
        assert match is not None, self.name
        return match[1]

    @property
    def arguments(self) -> list[str]:
        """Template arguments, without namespaces."""
        match = re.search(r"<(.*)>\(", self.name)
        text = match[1].replace("adapter_ext::cuda::", "") if match else ""
        parts = [""]
        for i, letter in enumerate(text):
            outside = text.count("<", 0, i) == text.count(">", 0, i)
            if letter == "," and outside:
                parts.append("")
            else:
                parts[-1] += letter
        return [part.strip() for part in parts if part]

    @property
    def tile(self) -> str:
        """Rows of a tile, where a kernel has such an argument."""
        shapes = [re.match(r"Shape<(\d+),", argument) for argument in self.arguments]
        return next((shape[1] for shape in shapes if shape), "")

    @property
    def types(self) -> str:
        """The types of x and of the operands of products."""
        names = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "double": "fp64"}
        types = [a for a in self.arguments if not a.startswith("Shape")]
        inner = [re.sub(r"\w+<(.*)>", r"\1", argument) for argument in types]
        return " by ".join(dict.fromkeys(names.get(t, t.upper()) for t in inner))

    @property
    def tensor_cores(self) -> bool:
        """Whether its products are theirs."""
        return any(argument.startswith(("TensorCore", "Tf32")) for argument in self.arguments)

    @property
    def key(self) -> tuple[str, str, str]:
        """What the table names it by."""
        return self.function, self.tile, self.types

    def blocks_by_registers(self, threads: int, machine: Machine) -> int:
        """Blocks that a multiprocessor has registers for: warps get 256 at a time."""
        of_warp = -(-self.registers * 32 // 256) * 256
        warps = machine.registers // of_warp // 4 * 4  # in four parts
        return warps // -(-threads // 32)

    def blocks(self, launch: Launch, machine: Machine) -> int:
        """Blocks of a launch that are resident on a multiprocessor."""
        shared = -(-launch.shared // 128) * 128 + 1024  # of which CUDA has 1024 bytes
        return min(
            self.blocks_by_registers(launch.threads, machine),
            machine.shared_memory * 1024 // shared,
            machine.threads // launch.threads,
            machine.blocks,
        )


def count(instructions: Mapping[str, int], opcodes: Iterable[str], modifier: str = "") -> int:
    """How many instructions there are of some kinds, all or those with a modifier."""
    split = ((name.split("."), number) for name, number in instructions.items())
    return sum(
        number
        for (opcode, *modifiers), number in split
        if opcode in opcodes and (not modifier or modifier in modifiers)
    )


Launches = Mapping[int, Mapping[str, Launch]]
"""By architecture and kernel."""


class _Code:
    """The instructions of a function, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.places: dict[int, int] = {}  # by address
        self.jumps: list[tuple[int, int]] = []  # from an instruction to an address

    def add(self, address: int, name: str, operands: str) -> None:
        if name.startswith("BRA") and (target := _TARGET.search(operands)):
            self.jumps.append((len(self.names), int(target[1], 16)))
        self.places[address] = len(self.names)
        self.names.append(name)

    def in_main_loops(self) -> collections.Counter[str]:
        """Those between a jump back and where it goes, if there is a product between them."""
        opcodes = [name.partition(".")[0] for name in self.names]
        products = {"HMMA"} if "HMMA" in opcodes else {"FFMA", "DFMA"}
        before = list(itertools.accumulate((o in products for o in opcodes), initial=0))
        inside = [0] * (len(opcodes) + 1)
        for end, target in self.jumps:
            begin = self.places.get(target, end)
            if begin < end and before[begin] < before[end]:
                inside[begin] += 1
                inside[end] -= 1
        depths = itertools.accumulate(inside)
        return collections.Counter(itertools.compress(self.names, depths))


def parse(resources: Iterable[str], code: Iterable[str]) -> list[Kernel]:
    """The kernels in a file, from the lines that cuobjdump prints.

    Args:
        resources: with ``-res-usage``.
        code: with ``-sass``.
    """
    arch, mangled = 0, ""
    functions: dict[tuple[int, str], _Code] = {}
    for line in code:
        if match := _INSTRUCTION.match(line):
            functions[arch, mangled].add(int(match[1], 16), match[2], match[3])
        elif match := _CODE_ARCH.match(line):
            arch = int(match[1])
        elif match := _CODE_FUNCTION.match(line):
            mangled = match[1]
            functions[arch, mangled] = _Code()
    used: dict[tuple[int, str], dict[str, int]] = {}
    for line in resources:
        if match := _RESOURCES_ARCH.match(line):
            arch = int(match[1])
        elif match := _RESOURCES_FUNCTION.match(line):
            mangled = match[1]
        elif line.startswith("  REG:"):
            used[arch, mangled] = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)}
    if used.keys() != functions.keys():
        raise RuntimeError("expected kernels with both resources and instructions")
    names = cuda_launches.demangled(name for _, name in used)
    return [
        Kernel(
            name,
            key[0],
            registers=use["REG"],
            local_memory=use["STACK"] + use["LOCAL"],
            instructions=collections.Counter(functions[key].names),
            in_main_loops=functions[key].in_main_loops(),
        )
        for name, (key, use) in zip(names, used.items(), strict=True)
    ]


_CODE_ARCH = re.compile(r"\s+code for sm_(\d+)")
_CODE_FUNCTION = re.compile(r"\s+Function : (\S+)")
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
_RESOURCES_ARCH = re.compile(r"arch = sm_(\d+)")
_RESOURCES_FUNCTION = re.compile(r" Function (\S+):")


def inspect(files: Sequence[pathlib.Path]) -> list[Kernel]:
    """The kernels in libraries or object files, each once for an architecture."""
    folders = [str(pathlib.Path(entry) / "nvidia" / "cu13" / "bin") for entry in sys.path]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    tools = {tool: shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm", "c++filt")}
    if absent := [tool for tool, where in tools.items() if where is None]:
        sys.exit(
            f"benchmarks.cuda_inspect: needs {', '.join(absent)}, "
            "of binutils and of `pip install '.[inspect]'`"
        )

    def lines(option: str, file: pathlib.Path) -> Iterator[str]:
        command = [str(tools["cuobjdump"]), option, str(file)]
        environment = {**os.environ, "PATH": path}  # it calls nvdisasm
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
            assert run.stdout is not None
            yield from run.stdout
        if run.returncode != 0:
            sys.exit(f"benchmarks.cuda_inspect: {' '.join(command)} exits with {run.returncode}")

    found: dict[tuple[str, int], Kernel] = {}
    for file in files:
        for kernel in parse(lines("-res-usage", file), lines("-sass", file)):
            found.setdefault((kernel.name, kernel.arch), kernel)
    return sorted(found.values(), key=lambda kernel: (*kernel.key, kernel.arch))


def problems(kernel: Kernel, launch: Launch | None) -> list[str]:
    """What is wrong with a kernel, if anything.

    Args:
        kernel: the kernel.
        launch: how it is launched on the machine of its architecture, None where no call does.
    """
    wrong = []
    local = count(kernel.instructions, LOCAL)
    if kernel.local_memory or local:
        wrong.append(f"{kernel.local_memory} bytes of local memory, {local} accesses to it")
    if kernel.function in PRODUCTS:
        if kernel.tensor_cores and not count(kernel.instructions, ["HMMA"]):
            wrong.append("no HMMA: its products are for tensor cores")
        if not count(kernel.in_main_loops, LOADS, WIDE):
            wrong.append("no loads of 16 bytes from global memory in loops that multiply")
    if kernel.function in WRITES_ROWS and not count(kernel.in_main_loops, STORES, WIDE):
        wrong.append("no stores of 16 bytes to global memory in loops that multiply")
    if launch is None:
        wrong.append("benchmarks.cuda_launches has no call that launches it")
    elif kernel.function in PRODUCTS:
        machine = MACHINES[kernel.arch]
        threads = kernel.blocks_by_registers(launch.threads, machine) * launch.threads
        few = launch.threads == HALF_OF_THEM or (
            kernel.function == "forward_parts_kernel" and launch.threads < HALF_OF_THEM
        )
        alone = kernel.arch >= ONE_LARGE_TILE and few
        least = HALF_OF_THEM if alone or kernel.types == "fp64" else LEAST_THREADS
        if threads < least:
            wrong.append(f"{kernel.registers} registers are for {threads} threads, not {least}")
    return [f"{kernel.name}, sm_{kernel.arch}: {reason}" for reason in wrong]


HEADER = ("kernel", "tile", "type", "threads", "registers", "shared KiB", "blocks")
COUNTS = ("HMMA", "16-byte loads", "stores")


def table(kernels: Sequence[Kernel], launches: Launches) -> str:
    """The kernels in Markdown; where cells have several numbers, one for each architecture."""
    archs = sorted({kernel.arch for kernel in kernels})
    names = " / ".join(f"sm_{arch} ({MACHINES[arch].name})" for arch in archs)
    rows = []
    for key, group in itertools.groupby(kernels, lambda kernel: kernel.key):
        same = list(group)
        pairs = [(k, launches[k.arch][k.name]) for k in same if k.name in launches[k.arch]]

        def joined(values: Iterable[object]) -> str:
            return " / ".join(map(str, values))

        rows.append(
            [
                *key,
                joined(dict.fromkeys(launch.threads for _, launch in pairs)),
                joined(kernel.registers for kernel in same),
                joined(f"{launch.shared / 1024:.1f}" for _, launch in pairs),
                joined(kernel.blocks(launch, MACHINES[kernel.arch]) for kernel, launch in pairs),
                str(min(count(kernel.instructions, ["HMMA"]) for kernel in same)),
                str(min(count(kernel.in_main_loops, LOADS, WIDE) for kernel in same)),
                str(min(count(kernel.in_main_loops, STORES, WIDE) for kernel in same)),
            ]
        )
    return f"Several numbers: {names}\n\n{measure.markdown_table([*HEADER, *COUNTS], rows)}"


def documented_blocks(page: str) -> dict[tuple[str, str, str], dict[int, int]]:
    """The blocks in the table on a page, by kernel, tile and type, and by architecture."""
    first, _, *lines = page.partition(BEGIN)[2].partition(END)[0].splitlines() or [""] * 4
    archs = [int(arch) for arch in re.findall(r"sm_(\d+)", first)]
    column = HEADER.index("blocks")
    documented = {}
    for cells in ([cell.strip() for cell in line.split("|")[1:]] for line in lines[2:]):
        blocks = [int(number) for number in cells[column].split("/")]
        documented[cells[0], cells[1], cells[2]] = dict(zip(archs, blocks, strict=True))
    return documented


def differences(
    kernels: Sequence[Kernel],
    launches: Launches,
    documented: Mapping[tuple[str, str, str], Mapping[int, int]],
) -> list[str]:
    """Where the kernels are others than documented, or have fewer blocks on a multiprocessor."""
    keys = {kernel.key for kernel in kernels}
    wrong = [f"{' '.join(key)}: not in {PAGE.name}" for key in sorted(keys - documented.keys())]
    wrong += [f"{' '.join(key)}: only in {PAGE.name}" for key in sorted(documented.keys() - keys)]
    for kernel in kernels:
        launch = launches[kernel.arch].get(kernel.name)
        expected = documented.get(kernel.key, {}).get(kernel.arch)
        if launch is None or expected is None:
            continue
        machine = MACHINES[kernel.arch]
        blocks = kernel.blocks(launch, machine)
        if blocks < expected:
            wrong.append(
                f"{kernel.name}, sm_{kernel.arch}: {blocks} blocks on a multiprocessor of "
                f"{machine.name}, {PAGE.name} says {expected}"
            )
    return wrong


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table and what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks cuda-inspect", description=__doc__)
    parser.add_argument(
        "files", nargs="*", type=pathlib.Path, help="default: the installed library"
    )
    parser.add_argument("--check", action="store_true", help=f"compare with docs/{PAGE.name} too")
    parser.add_argument("--write", action="store_true", help=f"write the table in docs/{PAGE.name}")
    options = parser.parse_args(arguments)
    files = options.files or [_library.CPU_LIBRARY.with_name("libadapter_ext_cuda.so")]
    if absent := [str(file) for file in files if not file.exists()]:
        sys.exit(f"benchmarks.cuda_inspect: not there: {', '.join(absent)}")
    kernels = inspect(files)
    archs = sorted({kernel.arch for kernel in kernels})
    if others := [arch for arch in archs if arch not in MACHINES]:
        sys.exit(
            f"benchmarks.cuda_inspect: expected architectures of {list(MACHINES)}, got {others}"
        )
    launches = {arch: cuda_launches.record(MACHINES[arch]) for arch in archs}
    text = table(kernels, launches)
    print(text)
    wrong = []
    for kernel in kernels:
        wrong += problems(kernel, launches[kernel.arch].get(kernel.name))
    page = PAGE.read_text(encoding="utf-8")
    if options.write:
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(before + BEGIN + text + END + rest.partition(END)[2], encoding="utf-8")
    elif options.check:
        wrong += differences(kernels, launches, documented_blocks(page))
    if wrong:
        print("\nWRONG:", *wrong, sep="\n  ")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
