"""Load by locust, on a service that already runs: `python -m locust -f loadtests/locustfile.py --bundle B --headless`.

`--loop closed` (the default): users wait for each answer and then think. `--loop open`: arrivals come by a Poisson
process of `--rate` a second whether or not earlier ones were answered; locust's own constant_throughput is not that,
because a user that waits for an answer sends nothing. Both end by themselves after `--seconds` or `--most` requests.
429, 503 and 504 are rows of their own and no failures: they are what a full service should say.
"""

import itertools
import random
import time
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Group
from locust import FastHttpUser, events, task
from locust.exception import StopUser

from loadtests.arrivals import MOST_REQUESTS
from loadtests.records import REFUSALS
from loadtests.server import ServerError, require_loopback
from loadtests.workload import Ask, Catalogue, Workload

POOL = 4096
GRACE_S = 30.0
JSON = {"content-type": "application/json"}


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """Add this file's options to locust's command line; each is an environment variable too."""
    add = parser.add_argument
    add("--bundle", env_var="LOAD_BUNDLE", default="bundles/demo", help="whose users and items to ask for")
    add("--loop", env_var="LOAD_LOOP", choices=("closed", "open"), default="closed", help="see the file's first lines")
    add("--rate", env_var="LOAD_RATE", type=float, default=10.0, help="open loop: arrivals a second of all users")
    add("--think", env_var="LOAD_THINK", type=float, default=0.1, help="closed loop: mean seconds between requests")
    add("--seconds", env_var="LOAD_SECONDS", type=float, default=60.0, help="the test ends after this long")
    add("--most", env_var="LOAD_MOST", type=int, default=100_000, help="the test ends after this many requests")
    add("--seed", env_var="LOAD_SEED", type=int, default=0, help="seed of requests and arrivals")


@events.init.add_listener
def prepare(environment: Any, **_: Any) -> None:
    """Check where the load would go, and make the requests before the clock runs."""
    options = environment.parsed_options
    environment.host = environment.host or ScoringUser.host
    try:
        require_loopback(environment.host)
        if not 0 < options.most <= MOST_REQUESTS or options.rate <= 0 or options.think < 0:
            raise ServerError(f"--most is 1 to {MOST_REQUESTS}, --rate over 0, --think at least 0")
        environment.asks = Workload(Catalogue.read(Path(options.bundle)), seed=options.seed).asks(POOL)
    except (ServerError, OSError) as error:
        raise SystemExit(f"locustfile: {error}") from error
    environment.numbers = itertools.count()
    environment.streams = itertools.count()
    environment.under_way = Group()


@events.test_start.add_listener
def bound(environment: Any, **_: Any) -> None:
    """End the test after its seconds, however it was started."""
    gevent.spawn_later(environment.parsed_options.seconds, environment.runner.quit)


@events.test_stop.add_listener
def wait_for_answers(environment: Any, **_: Any) -> None:
    """Wait for what an open loop has sent: left out, the slowest answers would be missing."""
    environment.under_way.join(GRACE_S)


class ScoringUser(FastHttpUser):
    """Sends the workload's requests in the chosen loop."""

    host = "http://127.0.0.1:8000"
    # Requests under way of one user. An open loop that waited for a free connection would be a closed one.
    concurrency = 100_000

    def on_start(self) -> None:
        """Take this user's own stream of random numbers."""
        options = self.environment.parsed_options
        self._open = options.loop == "open"
        self._random = random.Random(f"{options.seed}/{next(self.environment.streams)}")
        self._due = time.monotonic()

    def wait_time(self) -> float:
        """Return the seconds until the next request."""
        options = self.environment.parsed_options
        if not self._open:
            return self._random.expovariate(1 / options.think) if options.think else 0.0
        # Poisson processes add up to one. The schedule is absolute: a late arrival does not move those after it.
        users = max(1, self.environment.runner.target_user_count)
        self._due += self._random.expovariate(options.rate / users)
        return max(0.0, self._due - time.monotonic())

    @task
    def ask(self) -> None:
        """Send one request, or in an open loop have it sent."""
        number = next(self.environment.numbers)
        if number >= self.environment.parsed_options.most:
            gevent.spawn(self.environment.runner.quit)  # it stops this user too, so not from within it
            raise StopUser
        request = self.environment.asks[number % len(self.environment.asks)]
        if self._open:
            self.environment.under_way.spawn(self._send, request, self._due)
        else:
            self._send(request, time.monotonic())

    def _send(self, ask: Ask, due: float) -> None:
        name = f"{ask.path} of {ask.candidates}"
        with self.client.post(ask.path, data=ask.body, headers=JSON, name=name, catch_response=True) as response:
            # From the scheduled arrival, not from when this greenlet had its turn.
            response.request_meta["response_time"] = 1000 * (time.monotonic() - due)
            if response.status_code in REFUSALS:
                response.request_meta["name"] = f"{ask.path} {response.status_code}"
                response.success()
