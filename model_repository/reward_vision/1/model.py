"""Triton's entry point for `reward_vision`; everything happens in `triward_server`."""

import triton_python_backend_utils as pb_utils

from triward_server.backend.onnx_runner import VisionBackend


class TritonPythonModel:
    def initialize(self, args):
        self._backend = VisionBackend(args, pb_utils)

    def execute(self, requests):
        return self._backend.execute(requests)
