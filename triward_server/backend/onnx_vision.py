"""Media -> embeddings through Triton's model `reward_vision`, from inside `reward_forward`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .. import schema
from ..engine.checkpoint import load_cut
from ..engine.towers import Cut
from ..errors import ForwardError
from ..schema import Grid, UInt8Array
from .onnx_inputs import graph_inputs


def remote_tower(checkpoint: Path, pb_utils: Any, model: str, version: str) -> RemoteTower:
    """Return the tower of a checkpoint that is served as `model`; raises `CheckpointError`."""
    cut, width = load_cut(checkpoint)
    return RemoteTower(pb_utils, model, version, cut, width)


class RemoteTower:
    """A vision tower that is another model of the same server; an `Encoder`.

    Args:
        pb_utils: Triton's module; a call is possible inside `execute` alone.
        model: the name of the other model.
        version: of its versions, the one with the same weights.
        cut: how the checkpoint cuts media.
        width: of an embedding.
    """

    def __init__(self, pb_utils: Any, model: str, version: str, cut: Cut, width: int) -> None:
        self._pb = pb_utils
        self._model = model
        self._version = version
        self._cut = cut
        self._width = width

    def __call__(self, media: Sequence[UInt8Array], grids: Sequence[Grid]) -> Tensor:
        """Embeddings float32 [M, width] of images and videos, wherever the model left them.

        Raises:
            ForwardError: the model is not loaded, has failed, or is another checkpoint's.
        """
        arrays = graph_inputs(media, grids, self._cut)
        request = self._pb.InferenceRequest(
            model_name=self._model,
            model_version=int(self._version),
            requested_output_names=[schema.EMBEDDINGS.name],
            inputs=[self._pb.Tensor(spec.name, array) for spec, array in arrays.items()],
        )
        try:
            response = request.exec()
        except self._pb.TritonModelException as error:
            raise self._failed(str(error)) from None
        if response.has_error():
            raise self._failed(response.error().message())
        output = self._pb.get_output_tensor_by_name(response, schema.EMBEDDINGS.name)
        # A copy: the response's memory is Triton's.
        embeddings: Tensor = from_dlpack(output.to_dlpack()).clone()
        expected = (len(arrays[schema.PATCHES]) // self._cut.merge_size**2, self._width)
        if embeddings.shape != expected:
            raise self._failed(f"it gave {list(embeddings.shape)} values, not {list(expected)}")
        return embeddings

    def _failed(self, reason: str) -> ForwardError:
        return ForwardError(f"the vision step {self._model}, version {self._version}: {reason}")
