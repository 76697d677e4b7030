"""Triton's entry point for `reward_preprocess`; everything happens in `triward_server`."""

import triton_python_backend_utils as pb_utils

from triward_server.backend.triton_io import PreprocessBackend


class TritonPythonModel:
    def initialize(self, args):
        self._backend = PreprocessBackend(args, pb_utils)

    def execute(self, requests):
        return self._backend.execute(requests)

    def finalize(self):
        self._backend.finalize()
