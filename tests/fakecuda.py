"""Inductor's code for 7B's layers on an H100 that is not there: `python -m tests.fakecuda`.

Prints, for each row-wise half of both kinds of layer, how many Triton kernels it has and how many
matrix products. Layers are traced with fake CUDA tensors; what asks the driver is answered here,
and generated code is counted, not compiled. In a process of its own, because torch remembers what
it has been told about the device.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget

from triward_server.engine.decoder import DecoderConfig, DecoderLayer, Rope
from triward_server.engine.vision import Tower, VisionBlock

ROWS = 1309
CUDA = torch.device("cuda:0")
H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    total_memory=80 * 2**30, shared_memory_per_block_optin=232448, L2_cache_size=50 * 2**20,
)  # fmt: skip
DRIVER = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))

# Qwen2.5-VL-7B's, the vision tower's inner width as it is loaded.
DECODER = DecoderConfig(
    vocab_size=152_064, positions=128_000, hidden=3584, inner=18_944, heads=28, kv_heads=4,
    head_dim=128, eps=1e-6, rope=Rope((1.0,) * 64, 1.0, (16, 24, 24)), windows=(None,),
    qkv_bias=True, qk_norm=False, activation="silu", norm_offset=0.0, sandwich=False,
    embedding_scale=1.0, scale=128**-0.5, softcap=None, media_rank=0,
)  # fmt: skip
TOWER = Tower(32, 1280, 3456, 16, 3584, 14, 2, 112, (7, 15, 23, 31), 10_000.0)
TEXT, IMAGE = ((3584,), (64,), (64,)), ((1280,), (40,), (40,))  # residual stream, cosines, sines


class Generated(Exception):
    """The code is there; what would compile it is left out."""


@contextmanager
def device() -> Iterator[None]:
    """Answer for the driver."""
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: H100,
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "is_current_stream_capturing": lambda: False,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
    }
    properties = staticmethod(lambda *_: H100)
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        for interface in (CudaInterface, CudaInterface.Worker):
            stack.enter_context(patch.object(interface, "get_device_properties", properties))
        capability = staticmethod(lambda *_: 90)
        stack.enter_context(patch.object(CudaInterface, "get_compute_capability", capability))
        stack.enter_context(patch.object(triton.runtime.driver, "_active", DRIVER))
        # Patterns that are found by tracing attention on the real device; a half has none of it.
        for passes in ("joint_graph", "post_grad"):
            name = f"torch._inductor.fx_passes.{passes}.lazy_init"
            stack.enter_context(patch(name, lambda *_: None))
        settings = {"compile_threads": 1, "fx_graph_cache": False, "pattern_matcher": False}
        stack.enter_context(config.patch(settings))
        yield


def generate(layer: torch.nn.Module, half: str, *inputs: torch.Tensor) -> str:
    """Return the code of a compiled half, as `RewardModel.compile_layers` asks for it."""
    source: list[str] = []
    codegen = GraphLowering.codegen

    def keep(graph: GraphLowering) -> Any:
        wrapper, _ = codegen(graph)
        source.append(wrapper.value)
        raise Generated

    function = torch.compile(getattr(type(layer), half), dynamic=True, fullgraph=True)
    with patch.object(GraphLowering, "codegen", keep), torch.inference_mode():
        try:
            function(layer, *inputs)
        except torch._inductor.exc.InductorError as error:
            if not isinstance(error.inner_exception, Generated):
                raise
    [code] = source
    ast.parse(code)
    return code


def main() -> None:
    """Print the counts as JSON."""
    counts: dict[str, dict[str, int]] = {}
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), device():
        decoder, vision = loaded(DecoderLayer(DECODER, None)), loaded(VisionBlock(TOWER))
        for layer, half, shapes, dtype in (
            (decoder, "before", TEXT, torch.float32),
            (decoder, "queries", TEXT, torch.float32),
            (decoder, "keys_and_values", TEXT, torch.float32),
            (decoder, "after_", ((3584,), (28, 128)), torch.bfloat16),
            (vision, "before", IMAGE, torch.float32),
            (vision, "after_", ((1280,), (16, 80)), torch.bfloat16),
        ):
            dtypes = [torch.float32, *[dtype] * (len(shapes) - 1)]
            inputs = [
                torch.empty(ROWS, *shape, dtype=each, device=CUDA)
                for shape, each in zip(shapes, dtypes, strict=True)
            ]
            code = generate(layer, half, *inputs)
            counts[f"{type(layer).__name__}.{half}"] = {
                "kernels": len(re.findall(r"^def triton_", code, re.MULTILINE)),
                "products": len(re.findall(r"extern_kernels\.(?:add)?mm\(", code)),
            }
    print(json.dumps(counts))


def loaded(layer: torch.nn.Module) -> torch.nn.Module:
    """Give a layer fake weights in bfloat16 on the GPU."""
    state = {
        name: torch.empty(tensor.shape, dtype=torch.bfloat16, device=CUDA)
        for name, tensor in layer.state_dict().items()
    }
    layer.load_state_dict(state, assign=True)
    return layer.requires_grad_(False).eval()


if __name__ == "__main__":
    main()
