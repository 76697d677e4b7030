"""Triton's entry point for `reward_draining`; everything happens in `triward_server`."""

import triton_python_backend_utils as pb_utils

from triward_server.backend.draining import DrainingBackend


class TritonPythonModel:
    def initialize(self, args):
        self._backend = DrainingBackend(pb_utils)

    def execute(self, requests):
        return self._backend.execute(requests)
