"""Every error that the server raises on purpose.

    TriwardError
    ├── InvalidRequest      the caller's input cannot be scored        INVALID_ARGUMENT
    ├── Unavailable         no room for the request now                UNAVAILABLE
    ├── NonFiniteScore      the model answered NaN or infinity         INTERNAL
    ├── Cancelled           the caller is gone                         CANCELLED
    ├── ForwardError        the forward pass itself failed             INTERNAL
    │   └── DeviceFault     the GPU's context is dead                  the process ends
    ├── ContractMismatch    the caller speaks another wire contract    UNIMPLEMENTED
    ├── ConfigError         a model parameter or flag is wrong         at load or export
    ├── CheckpointError     the weights are not the model's            at load or export
    └── LaunchError         tritonserver cannot be started or died     at launch
        └── Unhealthy       it runs, but does not score                while serving

The first six answer single requests; the code beside each is the gRPC status its caller sees.
"""

from __future__ import annotations

from typing import ClassVar


class TriwardError(Exception):
    """Base of all errors raised on purpose; `code` is the gRPC status name a caller sees."""

    code: ClassVar[str] = "INTERNAL"


class InvalidRequest(TriwardError):
    """The request cannot be scored as it is; the message names the field, the value and the limit.

    Args:
        field: where in the request, for example `messages[0].content[1]`.
        problem: what is wrong there, with the value and the limit.
    """

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class Unavailable(TriwardError):
    """The server has no room for this request at present."""

    code = "UNAVAILABLE"


class NonFiniteScore(TriwardError):
    """The model produced NaN or infinity for a conversation, which is never a reward."""


class Cancelled(TriwardError):
    """The caller gave up, so what was left of its request was not computed."""

    code = "CANCELLED"


class ForwardError(TriwardError):
    """The forward pass raised; the request may be fine, the server is not."""


# What `serve` looks for in the log of a process that ended itself.
DEVICE_FAULT = "the device faulted, and nothing runs on it any more"


class DeviceFault(ForwardError):
    """A kernel failed in a way that ends the GPU's context: whatever follows fails too.

    It answers no request. The process that holds the context ends, and whoever runs it starts anew.
    """

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"{DEVICE_FAULT}: {type(cause).__name__}: {cause}")


class ContractMismatch(TriwardError):
    """The caller's tensors mean something else than this server's."""

    code = "UNIMPLEMENTED"


class ConfigError(TriwardError):
    """A parameter of a model's configuration, or a flag at export, has a wrong value."""


class CheckpointError(TriwardError):
    """A checkpoint's files do not hold exactly the tensors that its configuration asks for."""


class LaunchError(TriwardError):
    """`tritonserver` cannot be found or started, or it stopped by itself."""


class Unhealthy(LaunchError):
    """The server runs but no longer scores, or scores something else; it must be restarted."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an allocation failed: Python's, numpy's, or torch's on any device.

    For the CPU torch raises a plain RuntimeError. Torch is not imported here: commands need errors.
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
        # An allocation that CUDA's runtime makes for itself; the context survives it.
        or (_is_accelerators(error) and "out of memory" in str(error))
    )


def is_device_fault(error: BaseException) -> bool:
    """Return True if the device's context is dead: `torch.AcceleratorError`, or our word for it."""
    return isinstance(error, DeviceFault) or (
        _is_accelerators(error) and not is_out_of_memory(error)
    )


def _is_accelerators(error: BaseException) -> bool:
    return any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)
