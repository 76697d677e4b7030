"""How long requests wait: queues with one or several servers, by published approximations.

Requests arrive at random (Poisson) and are computed first come, first served. The mean wait is
Allen's and Cunneen's approximation (A. O. Allen, "Probability, Statistics, and Queueing Theory",
2nd edition, 1990, section 5.3.3): Erlang's wait with exponential service times, times half the sum
of the squared coefficients of variation of arrivals (1) and of service times. For one server it is
exact (Pollaczek and Khinchin). The tail is taken as exponential with that mean, as it is for
exponential service times; `tests/sizing/test_queueing.py` compares both with a simulation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Queue:
    """One queue and what empties it.

    Attributes:
        rate: requests that arrive in a second.
        seconds: mean time that one takes a server.
        variation: of that time, standard deviation over mean.
        servers: that take from the queue.
    """

    rate: float
    seconds: float
    variation: float
    servers: int = 1

    @property
    def utilisation(self) -> float:
        """Share of the servers' time that is asked for; from 1 on the queue grows without end."""
        return self.rate * self.seconds / self.servers

    @property
    def waiting_share(self) -> float:
        """Share of requests that wait at all (Erlang's C formula)."""
        load, n = self.rate * self.seconds, self.servers
        if self.utilisation >= 1:
            return 1.0
        blocked = 1.0  # Erlang's B, by its recursion in the number of servers
        for k in range(1, n + 1):
            blocked = load * blocked / (k + load * blocked)
        return blocked / (1 - self.utilisation * (1 - blocked))

    @property
    def mean_wait(self) -> float:
        """Mean seconds from arrival until a server begins, of all requests."""
        if self.utilisation >= 1:
            return math.inf
        erlang = self.waiting_share * self.seconds / (self.servers * (1 - self.utilisation))
        return erlang * (1 + self.variation**2) / 2

    def wait(self, share: float) -> float:
        """Seconds within which that share of requests has begun."""
        late = self.waiting_share
        if late <= 1 - share:
            return 0.0
        return self.mean_wait / late * math.log(late / (1 - share))

    def answer(self, share: float) -> float:
        """Seconds within which that share of requests is answered.

        A server takes all that wait as one batch and answers them together. So a request also waits
        for those that came while it waited, whose work is `servers` x `utilisation` times that
        wait, at most. What the wait and its own time have over their means is taken as
        independent: the squares add up.
        """
        if self.utilisation >= 1:
            return math.inf
        longer = 1 + self.servers * self.utilisation
        wait, own = longer * self.wait(share), self.seconds * self._longest(share)
        mean = longer * self.mean_wait + self.seconds
        return mean + math.hypot(max(0.0, wait - longer * self.mean_wait), own - self.seconds)

    def _longest(self, share: float) -> float:
        """Return a service time that so many do not exceed, over the mean; as of a gamma.

        By Cornish and Fisher (1938): z + (z^2 - 1) / 6 x skewness, which is twice the variation.
        """
        z = NormalDist().inv_cdf(share)
        return 1 + self.variation * (z + (z**2 - 1) / 3 * self.variation)
