"""The CUDA kernels against the reference, run by a host stand-in for CUDA (tests/simt) or by a GPU.

All op tests run on them with ``pytest --backend simt`` (or ``simt-race``, ``simt-sanitize``,
``ptxsim``, ``ptxsim-90``, ``cuda``); here is a table that reaches every kernel for every type.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import op_testing
import pytest
import torch
from op_testing import ROUTINGS, Case, assert_results_close, check
from simt import build, plugin

import adapter_ext
from adapter_ext import ops, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRAINING: dict[str, Any] = {
    "training": True,
    "dropout": 0.3,
    "stochastic_depth": 0.4,
    "l2_lambda": "tensor",
}
# Name → shape and bottlenecks. Widths in whole vectors and not; bottlenecks of several blocks;
# rows of several tiles and several ranges.
SHAPES: dict[str, dict[str, Any]] = {
    "few": {"shape": (5, 70), "bottlenecks": (3, 9)},
    "wide": {"shape": (6, 520), "bottlenecks": (8, 5, 8)},
    "deep": {"shape": (20, 40), "bottlenecks": (70, 130)},
    "many": {"shape": (300, 33), "bottlenecks": (7,)},
    "aligned": {"shape": (2, 70, 64), "bottlenecks": (16, 64)},
}


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_norm_position = pytest.mark.parametrize("norm_position", ["pre", "post"])


def _on_gpu(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--backend") == "cuda")


def _needs_gpu(request: pytest.FixtureRequest, reason: str) -> None:
    if not _on_gpu(request):
        pytest.skip(reason)


def _simulator(
    request: pytest.FixtureRequest,
    multiprocessors: int,
    shared_kib: int = 99,
    other_seed: int = 0,
) -> plugin.Simulator:
    """The simulator that --backend names; skips the test where there is none."""
    if _on_gpu(request):
        pytest.skip("chooses the number of multiprocessors, of which a GPU has as many as it has")
    if build.missing("plain") is not None:
        pytest.skip("g++ is missing")
    backend, seed, block_order = map(
        request.config.getoption, ("--backend", "--simt-seed", "--simt-block-order")
    )
    return plugin.Simulator(
        "simt" if backend == "native" else backend,
        seed + other_seed,
        block_order,
        multiprocessors,
        shared_kib,
    )


@pytest.fixture(params=["busy", "idle"])
def multiprocessors(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """The ops run on the simulator, or on the GPU; how many multiprocessors that has.

    With few of them, small problems have tiles enough to fill them. Shared memory is that of the
    GPUs with the least, and that of an H100, which has room for more buffers in large tiles.
    """
    if _on_gpu(request) and request.param == "busy":
        yield torch.cuda.get_device_properties().multi_processor_count
        return
    count, *settings = (4, 99, 0) if request.param == "busy" else (1, 227, 1)
    simulator = _simulator(request, count, *settings)
    for name, op in plugin.simulated_ops().items():
        monkeypatch.setattr(ops, name, op)
    monkeypatch.setattr(op_testing, "tensor_cores", True)
    yield count
    errors = simulator.errors()
    simulator.clear()
    assert errors is None


# Widths that are cases of their own where shared memory is that of an H100. They take long.
OF_LARGE_MEMORY = (1024, 1280)


def _skip_without_large_memory(hidden_size: int, multiprocessors: int) -> None:
    if hidden_size in OF_LARGE_MEMORY and multiprocessors == 4:
        pytest.skip("rows this wide need the shared memory of an H100")


@pytest.mark.usefixtures("multiprocessors")
class TestKernels:
    @pytest.mark.parametrize("shape", SHAPES)
    @every_norm_position
    @every_dtype
    def test_training(self, dtype: torch.dtype, norm_position: str, shape: str) -> None:
        check(
            Case(**SHAPES[shape], dtype=dtype, options={"norm_position": norm_position, **TRAINING})
        )

    @every_norm_position
    @every_dtype
    def test_plain(self, dtype: torch.dtype, norm_position: str) -> None:
        check(Case(**SHAPES["aligned"], dtype=dtype, options={"norm_position": norm_position}))

    # Rows of whole blocks of columns have ways of their own, and so have some of their options;
    # shared memory has room for the rows of a tile or has not.
    @pytest.mark.parametrize(
        ("hidden_size", "bottleneck", "options"),
        [
            (80, 16, TRAINING),
            (192, 40, {}),
            (1216, 16, {}),
            (128, 70, {"training": True}),
            (
                320,
                64,
                {
                    "training": True,
                    "dropout": 0.3,
                    "stochastic_depth": 0.4,
                    "stochastic_depth_mode": "sample",
                },
            ),
            (1024, 24, {"residual": False}),
        ],
        ids=["ragged", "resident", "wide", "deep", "dropout", "result"],
    )
    @every_norm_position
    @every_dtype
    def test_large_tiles(
        self,
        dtype: torch.dtype,
        norm_position: str,
        hidden_size: int,
        bottleneck: int,
        options: dict[str, Any],
        multiprocessors: int,
    ) -> None:
        """Rows enough for a tile of 64 on each multiprocessor."""
        _skip_without_large_memory(hidden_size, multiprocessors)
        check(
            Case(
                shape=(75 * multiprocessors, hidden_size),
                bottlenecks=(bottleneck,),
                routing="one",
                dtype=dtype,
                options={"norm_position": norm_position, **options},
            )
        )

    @pytest.mark.parametrize("stacked", [False, True])
    @every_dtype
    def test_large_tiles_of_several_adapters(
        self, dtype: torch.dtype, stacked: bool, multiprocessors: int
    ) -> None:
        """Some rows have none."""
        check(
            Case(
                shape=(180 * multiprocessors, 128),
                bottlenecks=(24, 24) if stacked else (16, 40),
                stacked=stacked,
                routing="untouched",
                dtype=dtype,
            )
        )

    @every_norm_position
    def test_sums_over_ranges_of_rows_with_a_long_bottleneck(self, norm_position: str) -> None:
        """They were written beyond their place: on a GPU, to pointers of the adapter."""
        options = {"norm_position": norm_position}
        check(Case(shape=(600, 40), bottlenecks=(120,), routing="one", options=options))

    @pytest.mark.parametrize(("hidden_size", "bottleneck"), [(300, 20), (320, 24), (1280, 8)])
    @every_norm_position
    @every_dtype
    def test_a_row_has_the_same_bits_in_every_batch(
        self,
        dtype: torch.dtype,
        norm_position: str,
        hidden_size: int,
        bottleneck: int,
        multiprocessors: int,
    ) -> None:
        """Alone, among few others (decode, tiles of 16 rows) and among many (tiles of 64)."""
        _skip_without_large_memory(hidden_size, multiprocessors)
        call = Case(
            shape=(75 * multiprocessors, hidden_size),
            bottlenecks=(bottleneck,),
            routing="none",
            dtype=dtype,
            options={"norm_position": norm_position},
        ).build()

        def y_and_dx(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
            x = call.x.detach()[:rows].requires_grad_()
            y = dataclasses.replace(call, x=x).forward()[0]
            return y.detach(), torch.autograd.grad(y, x, call.dy[:rows])[0]

        y, dx = y_and_dx(len(call.x))
        for rows in (1, 70):
            some_y, some_dx = y_and_dx(rows)
            assert torch.equal(some_y, y[:rows]), rows
            assert torch.equal(some_dx, dx[:rows]), rows

    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_routing(self, routing: str) -> None:
        bottlenecks = (5,) if routing == "none" else (5, 1, 8)
        check(Case(routing=routing, bottlenecks=bottlenecks))
        check(Case(routing=routing, bottlenecks=bottlenecks, options=TRAINING))

    @pytest.mark.parametrize("activation", op_testing.ACTIVATIONS)
    def test_activation(self, activation: str) -> None:
        check(Case(dtype=torch.float64, options={"activation": activation}))

    @pytest.mark.parametrize("mode", ["call", "sample"])
    def test_stochastic_depth_mode(self, mode: str) -> None:
        check(Case(shape=(9, 4, 20), options={**TRAINING, "stochastic_depth_mode": mode}))

    @every_dtype
    def test_float32_weights(self, dtype: torch.dtype) -> None:
        check(Case(**SHAPES["few"], dtype=dtype, weight_dtype=torch.float32))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_float32_weights_rounded(self, dtype: torch.dtype) -> None:
        """What autocast asks for, with x of 16 bits and weights of float32."""
        check(
            Case(
                **SHAPES["few"],
                dtype=dtype,
                weight_dtype=torch.float32,
                options={"compute_dtype": dtype},
            )
        )

    @pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16], ids=str)
    @every_dtype
    def test_compute_dtype(self, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        check(Case(**SHAPES["few"], dtype=dtype, options={"compute_dtype": compute_dtype}))

    def test_stacked(self) -> None:
        check(Case(bottlenecks=(6, 6, 6), stacked=True, options=TRAINING))

    @pytest.mark.parametrize("adapters", [40, 340, 388])
    def test_more_adapters_than_launch_parameters_hold(self, adapters: int) -> None:
        """And more than are searched all together."""
        check(Case(shape=(50, 24), bottlenecks=(3, 1, 2, 4) * (adapters // 4)))

    def test_return_result(self) -> None:
        check(Case(options={"residual": False}))

    @pytest.mark.parametrize("samples", [0, 1, 33, 3000])
    @pytest.mark.parametrize("num_adapters", [1, 5, 100])
    def test_route(self, num_adapters: int, samples: int) -> None:
        ids = torch.randint(-1, num_adapters, (samples,))
        routing, expected = adapter_ext.route(ids, num_adapters), reference.route(ids, num_adapters)
        assert torch.equal(routing.order, expected.order)
        assert torch.equal(routing.offsets, expected.offsets)


def test_ids_out_of_range_fail_an_assertion(request: pytest.FixtureRequest) -> None:
    simulator = _simulator(request, 4)
    route = plugin.simulated_ops()["_route"]
    for ids in ([0, 3], [-2, 0], [2**62, 1]):
        with pytest.raises(RuntimeError, match="assert"):
            route(torch.tensor(ids), 3)
        simulator.clear()


def test_a_row_has_the_same_bits_on_any_number_of_multiprocessors(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode kernels, whole tiles of 16 rows and of 64 agree, and those by parts of wide rows."""
    for dtype, norm_position, hidden_size, bottleneck, shared_kib in (
        *itertools.product(DTYPES, ("pre", "post"), (600,), (20,), (99,)),
        *itertools.product(DTYPES[2:], ("pre",), (2176,), (8,), (227,)),
    ):
        case = Case(
            shape=(70, hidden_size),
            bottlenecks=(bottleneck,),
            dtype=dtype,
            options={"norm_position": norm_position},
        )
        call = case.build()
        outputs = []
        for multiprocessors, rows in ((100, 70), (4, 70), (1, 70), (100, 1)):
            simulator = _simulator(request, multiprocessors, shared_kib)
            monkeypatch.setattr(ops, "_inference", plugin.simulated_ops()["_inference"])
            with torch.no_grad():
                some = dataclasses.replace(call, x=call.x[:rows], routing=None)
                outputs.append(some.forward()[0])
            assert simulator.errors() is None
        for other in outputs[1:]:
            assert torch.equal(outputs[0][: len(other)], other), case


def test_too_wide(request: pytest.FixtureRequest) -> None:
    """Kernels count columns in 32 bits."""
    _simulator(request, 4)
    x = torch.zeros(1, 2**24, dtype=torch.bfloat16)
    weights = op_testing.make_weights([1], 2**24, dtype=torch.bfloat16)
    arguments = adapter_ext.ops.raw_forward_arguments(x, weights, None)
    with pytest.raises(RuntimeError, match=r"linear_adapter: x: expected D .* got 16777216 and 1"):
        plugin.simulated_ops()["_inference"](*arguments)


@every_norm_position
def test_tf32(norm_position: str, request: pytest.FixtureRequest, matmul_settings: Any) -> None:
    """Products of float32 by tensor cores, where torch allows it."""
    _needs_gpu(request, "TF32 is for CUDA tensors alone")
    matmul_settings.fp32_precision = "tf32"
    for shape in SHAPES.values():
        call = Case(**shape, options={"norm_position": norm_position, **TRAINING}).build()
        expected = call.upcast().results(reference.linear_adapter)
        # TF32 has as many significant bits as float16.
        assert_results_close(call.results(), expected, torch.float16)


@pytest.mark.parametrize("adapters", [1, 3, 40])
def test_cuda_graph(adapters: int, request: pytest.FixtureRequest) -> None:
    """A captured forward and backward run on what their inputs hold when they are replayed."""
    _needs_gpu(request, "there is no GPU")
    call = Case(shape=(50, 24), bottlenecks=(4,) * adapters, options=TRAINING).build()
    call.results()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.results()
    with torch.no_grad():
        call.x.add_(1.0)
    graph.replay()
    expected = call.results()
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


def test_a_replayed_function_keeps_what_its_kernels_read(request: pytest.FixtureRequest) -> None:
    """The routing was gone, and other tensors had its place."""
    _needs_gpu(request, "there is no GPU")
    measure = pytest.importorskip("benchmarks.measure")
    call = Case(shape=(50, 24), bottlenecks=(4, 4)).build()

    def forward_of_a_routing() -> Callable[[], torch.Tensor]:
        routing = adapter_ext.route(torch.randint(2, (50,)), 2)
        return lambda: dataclasses.replace(call, routing=routing).forward()[0].detach()

    with torch.no_grad():
        replay = measure.replayed(forward_of_a_routing())
        expected = replay().clone()
        others = [torch.full((50,), 2**40) for _ in range(100)]
        assert torch.equal(replay(), expected)
    assert len(others) == 100
