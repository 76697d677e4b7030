"""Linear layers on a CPU: which library computes them, and that it computes the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine import test_engine
from tests.engine.test_fake_cuda import Calls
from triward_server.engine import layers
from triward_server.engine.layers import Linear, linear
from triward_server.engine.scoring import Scorer

ONEDNN = "mkldnn._linear_pointwise.default"
MISSING = pytest.mark.skipif(not layers._ONEDNN, reason="torch has oneDNN on x86 alone")


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [64, 640])
def test_a_layer_computes_its_product(rows: int, bias: bool, width: int) -> None:
    """Whole, and some of its outputs, whose weights are a slice of the matrix."""
    torch.manual_seed(0)
    x = torch.randn(rows, width)
    with torch.inference_mode():
        layer = Linear(width, width, bias=bias)
        exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
        torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)
        part = layer.part(x, slice(16, width - 16)).double()
    torch.testing.assert_close(part, exact[:, 16:-16], rtol=1e-5, atol=1e-5)


@MISSING
@torch.inference_mode()
def test_float32_on_a_cpu_takes_onednn() -> None:
    layer, x = Linear(512, 512, True), torch.randn(3, 512)
    with Calls() as calls:
        layer(x)
    assert calls.names[ONEDNN] == 1
    with Calls() as calls:
        Linear(8, 4, True)(torch.randn(3, 8))
    assert not calls.names[ONEDNN], "a small matrix gains nothing"
    with Calls() as calls:
        linear(x.bfloat16(), layer.weight.bfloat16())
    assert not calls.names[ONEDNN], "torch takes it by itself there"


@MISSING
def test_deterministic_scores_by_onednn(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_ONEDNN_WEIGHTS", 0)  # all matrices of the tiny model
    exact = Scorer(checkpoint, replace(test_engine.CPU, deterministic=True))
    test_engine.test_deterministic_scores_do_not_depend_on_company(exact)
    test_engine.test_a_deterministic_score_does_not_depend_on_its_twin(exact)


@torch.inference_mode()
def test_a_graph_has_torchs_own_operator() -> None:
    """ONNX and Inductor know that one."""
    graph = torch.export.export(Linear(512, 512, True).eval(), (torch.randn(3, 512),)).graph
    names = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert names == {"aten.linear.default"}
