"""What is asked of the replicas, and what one request of it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..schema import MAX_BATCH_SIZE
from .models import Subject
from .request import (
    Footing,
    RequestShape,
    alike,
    at_least,
    count,
    micro_batches,
)

# As much as the pixels: what a client sends that has no file but a picture in memory.
ENCODED_BYTES = 3.0  # of a pixel as it is sent
_TEXT_BYTES = 8  # of a token, as text and as ids
_MOST_CONVERSATIONS = 4096  # of the batch whose passes are looked at


@dataclass(frozen=True)
class Demand:
    """What callers ask, and how long they wait.

    Attributes:
        rate: requests a second at the peak, of all callers.
        shape: of a request.
        variation: of requests' costs, standard deviation over mean.
        timeout: seconds after which a caller gives up.
        p99: seconds within which 99 of 100 requests must be answered.
        utilisation: of a replica, at most.
        devices: of one replica, which share its queue.
    """

    rate: float
    shape: RequestShape
    variation: float
    timeout: float
    p99: float
    utilisation: float
    devices: int

    def check(self) -> None:
        """Raise `ConfigError` for a value that makes no sense, by its flag."""
        shape = self.shape
        at_least("--requests-per-second", self.rate, 1e-6, 1e6)
        at_least("--prompt-tokens", shape.prompt_tokens, 0)
        at_least("--response-tokens", shape.response_tokens, 1)
        at_least("--responses", shape.responses, 1)
        at_least("--images", shape.images, 0)
        at_least("--image-size", min(shape.image_size), 1)
        at_least("--repeat-share", shape.repeat_share, 0, 1)
        at_least("--variation", self.variation, 0, 10)
        at_least("--timeout", self.timeout, 0.001)
        at_least("--p99", self.p99, 0.001, self.timeout)
        at_least("--utilisation", self.utilisation, 0.01, 0.95)
        at_least("--gpus-per-replica", self.devices, 1, MAX_BATCH_SIZE)


@dataclass(frozen=True)
class RequestWork:
    """What one request takes, on average, of one device.

    Attributes:
        footing: of its shape.
        flops: by the engine's planner.
        seconds: of a device.
        variation: of the seconds, standard deviation over mean.
        held: bytes while it waits: its images as they are sent and as the model reads them, text.
        image: pixels of an image as it is sent; 0: there is none.
        single: bytes of a pass over its longest conversation alone.
        largest: bytes of the largest pass of a full batch.
        tokens: of that pass.
    """

    footing: Footing
    flops: float
    seconds: float
    variation: float
    held: int
    image: int
    single: float
    largest: float
    tokens: int


def work_of(subject: Subject, demand: Demand, place: Footing, rate: float) -> RequestWork:
    """Price a request with the engine's planner.

    Args:
        subject: the model.
        demand: with the shape.
        place: of the shape.
        rate: FLOP/s of one device.
    """
    shape, geometry, cost = demand.shape, subject.geometry, subject.cost
    shares = {False: 1 - shape.repeat_share, True: shape.repeat_share}
    each = {seen: count(alike(shape, place, geometry, 1, seen)).flops(cost) for seen in shares}
    flops = sum(shares[seen] * each[seen] for seen in shares)
    square = sum(shares[seen] * each[seen] ** 2 for seen in shares) * (1 + demand.variation**2)
    requests = max(1, min(MAX_BATCH_SIZE, _MOST_CONVERSATIONS // shape.responses))
    passes = micro_batches(alike(shape, place, geometry, requests), cost, subject.forward)
    tokens, largest = max(passes, key=lambda each: each[1])
    one = alike(replace(shape, responses=1), place, geometry, 1)
    ((_, single),) = micro_batches(one, cost, subject.forward)
    image = shape.image_size[0] * shape.image_size[1] if shape.images else 0
    return RequestWork(
        footing=place,
        flops=flops,
        seconds=flops / rate,
        variation=math.sqrt(max(0.0, square / flops**2 - 1)),
        held=_held(shape, place, image),
        image=image,
        single=single,
        largest=largest,
        tokens=int(tokens),
    )


def _held(shape: RequestShape, place: Footing, image: int) -> int:
    text = _TEXT_BYTES * (place.total - place.image_tokens)
    return math.ceil(shape.images * image * ENCODED_BYTES) + place.pixels + text
