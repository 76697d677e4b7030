"""Triton's entry point for `reward_forward`; everything happens in `triward_server`."""

import triton_python_backend_utils as pb_utils

from triward_server.backend.triton_io import ForwardBackend


class TritonPythonModel:
    def initialize(self, args):
        self._backend = ForwardBackend(args, pb_utils)

    def execute(self, requests):
        return self._backend.execute(requests)

    def finalize(self):
        self._backend.finalize()
