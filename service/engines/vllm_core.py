"""vLLM's asynchronous engine as the service sees it: opened, asked, watched, killed.

vLLM blocks while it starts, and its own part in this process takes its time for every prompt. So it has a thread with
an event loop of its own, and the service's loop only ever waits for it.
"""

import asyncio
import itertools
import math
import multiprocessing
import os
import signal
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, TypeVar

import psutil

from service.engines.protocol import EngineUnavailableError, EngineUsage, JobFailedError
from service.engines.silence import Silence
from service.engines.vllm_config import CoreConfig
from service.engines.vllm_prompts import MixedPrompt
from service.engines.vllm_worker import SERVICE_PID

HOLD_S = 5.0  # how long prompts wait at most for the prefix cache to be dropped
RETRY_S = 0.02  # between two tries to drop it
ENGINE_CORE = "EngineCore"  # how vLLM's names for its processes begin

# vLLM takes these from the environment alone. Fresh interpreters, for a fork would share torch's threads and locks; no
# reports on its use to its makers; and its own log only where something is wrong.
ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

Value = TypeVar("Value")


class VllmCore:
    """One run of vLLM, from its start to its end."""

    def __init__(self, config: CoreConfig, forward_limit_s: float) -> None:
        self._config = config
        self._silence = Silence(forward_limit_s, self.abort)
        self._llm: Any = None
        self._sampling: Any = None
        self._vocabulary = 0
        self._processes: list[BaseProcess] = []
        self._family: set[psutil.Process] = set()
        self._others = set(_engine_cores())  # of engines that run already
        self._ids = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()
        self._closing = False
        self._hold_s = min(HOLD_S, forward_limit_s / 2)  # a core that is only asked to forget does not hang
        self._admits = asyncio.Event()  # unset while prompts wait for the prefix cache to be dropped
        self._admits.set()
        self._forgetting: asyncio.Task[None] | None = None
        self.sent_tokens = 0  # of prompts that were answered
        self.cached_tokens = 0  # found in the prefix cache so far; trunks shorter than a block never are
        self.killed_because = ""

    @property
    def pids(self) -> list[int]:
        """The process ids of the engine cores."""
        return [process.pid for process in self._processes if process.pid is not None]

    async def open(self, warm_up: Sequence[MixedPrompt]) -> None:
        """Start vLLM, load the model and score the prompts: the first take longer than any later ones.

        Raises:
            Exception: whatever vLLM raises where it cannot.
        """
        await self._there(self._open())
        self._processes = [process for process in _engine_cores() if process not in self._others]
        self._meet_family()
        await self._there(self._ask_all(warm_up))

    async def ask(self, prompts: Sequence[MixedPrompt]) -> list[float]:
        """Return `log p(Yes) - log p(No)` behind each prompt; a core that is silent for too long is killed.

        Raises:
            JobFailedError: vLLM refuses a prompt, or its answer is not finite.
            EngineUnavailableError: the engine core is gone.
        """
        self._silence.began()
        answered = False
        try:
            logits = await self._there(self._ask_all(prompts))
            answered = True
        finally:
            self._silence.ended(answered=answered)
        return logits

    def usage(self) -> EngineUsage:
        """Return the tokens computed and found; vLLM tells neither its forwards nor its cache's bytes here."""
        return EngineUsage(tokens=self.sent_tokens - self.cached_tokens, tokens_cached=self.cached_tokens)

    def forget(self) -> None:
        """Drop vLLM's prefix cache as soon as no prompt uses a block of it; prompts that come meanwhile wait."""
        self._loop.call_soon_threadsafe(self._begin_to_forget)

    async def death(self) -> None:
        """Return when an engine core has ended."""
        loop = asyncio.get_running_loop()
        died = loop.create_future()

        def tell() -> None:
            if not died.done():
                died.set_result(None)

        for process in self._processes:
            loop.add_reader(process.sentinel, tell)
        try:
            await died
        finally:
            for process in self._processes:
                loop.remove_reader(process.sentinel)

    def _run(self) -> None:
        """Be vLLM's thread. What it starts inherits its signal mask.

        Ctrl-C and a service manager's SIGTERM reach the whole group; the server drains first, and then kills vLLM.
        """
        # Python starts this process of its own with the first child, and takes the mask off this thread after it.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        self._loop.run_forever()

    def abort(self, reason: str) -> None:
        """Kill the engine cores; `death` then returns."""
        self.killed_because = reason
        self._kill()

    async def close(self) -> None:
        """Kill what runs and free everything."""
        self._closing = True
        await asyncio.shield(asyncio.to_thread(self._free))

    def _kill(self) -> None:
        self._meet_family()
        for process in self._family:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _meet_family(self) -> None:
        """Learn of the engine cores and their workers: one that hangs would outlive a core that is killed alone."""
        for core in _engine_cores():
            if core not in self._others:
                with suppress(psutil.NoSuchProcess):
                    process = psutil.Process(core.pid)
                    self._family.update([process, *process.children(recursive=True)])

    def _free(self) -> None:
        shut_down = asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop)
        # While vLLM starts its thread is busy, and its engine core may only be about to be there.
        while not wait([shut_down], timeout=0.1).done:
            self._kill()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _there(self, work: Coroutine[Any, Any, Value]) -> Value:
        """Run a coroutine in vLLM's loop; cancelled here, it is cancelled there."""
        future: Future[Value] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return await asyncio.wrap_future(future)

    async def _open(self) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ[SERVICE_PID] = str(os.getpid())
        # An extra: imported where it is used, and nowhere when the engine is another.
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.async_llm import AsyncLLM

        if self._closing:
            raise EngineUnavailableError("closed while vLLM was imported")
        answers = self._config.answers
        # `allowed_token_ids` with `logprobs=2` would give the two likeliest of all tokens instead.
        self._sampling = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=[answers.yes, answers.no],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        args = AsyncEngineArgs(**self._config.engine_args(on_cpu=current_platform.is_cpu()))
        self._llm = AsyncLLM.from_engine_args(args)
        self._vocabulary = int(self._llm.model_config.get_vocab_size())

    def _begin_to_forget(self) -> None:
        if self._forgetting is None or self._forgetting.done():  # else the try that succeeds drops everything
            self._admits.clear()
            self._forgetting = self._loop.create_task(self._forget())

    async def _forget(self) -> None:
        """Try until vLLM says that the cache is dropped: it drops nothing while a prompt uses a block.

        Prompts may go on after `_hold_s`, so that one that never ends holds up no others.
        """
        began = self._loop.time()
        try:
            while not await self._llm.reset_prefix_cache():
                if self._loop.time() - began > self._hold_s:
                    self._admits.set()
                await asyncio.sleep(RETRY_S)
        except Exception:  # the engine core is gone, its cache with it, and `death` tells
            pass
        finally:
            self._admits.set()

    async def _ask_all(self, prompts: Sequence[MixedPrompt]) -> list[float]:
        try:
            async with asyncio.TaskGroup() as group:  # one that fails takes the job's others with it
                tasks = [group.create_task(self._ask(prompt)) for prompt in prompts]
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(self, prompt: MixedPrompt) -> float:
        from vllm.inputs import embeds_input
        from vllm.v1.engine.exceptions import EngineDeadError

        if max(prompt.token_ids) >= self._vocabulary:  # without a tokenizer vLLM does not look, and its core dies of it
            raise JobFailedError(f"token id {max(prompt.token_ids)}, but the vocabulary has {self._vocabulary}")
        mixed = embeds_input(
            prompt_embeds=prompt.embeds_TD,
            prompt_token_ids=prompt.token_ids,
            is_token_ids=prompt.is_token,
            cache_salt=prompt.cache_salt,
        )
        output: Any = None
        await self._admits.wait()
        try:
            async for one in self._llm.generate(mixed, self._sampling, str(next(self._ids))):
                output = one
        except EngineDeadError as error:
            raise EngineUnavailableError("vLLM's engine core stopped") from error
        except Exception as error:
            reason = error.__cause__ or error
            raise JobFailedError(f"{type(reason).__name__}: {reason}") from error
        return self._difference(output)

    def _difference(self, output: Any) -> float:
        answers = self._config.answers
        if output is None or not output.outputs or not output.outputs[0].logprobs:
            raise JobFailedError("vLLM ended a prompt without an answer")
        self.sent_tokens += len(output.prompt_token_ids or ())
        self.cached_tokens += output.num_cached_tokens or 0
        of = output.outputs[0].logprobs[0]
        difference = of[answers.yes].logprob - of[answers.no].logprob
        if not math.isfinite(difference):
            raise JobFailedError("the score is not finite")
        return float(difference)

    async def _shut_down(self) -> None:
        self._kill()
        if self._llm is not None:
            self._llm.shutdown(timeout=0)
            self._llm = None
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*others, return_exceptions=True)


def _engine_cores() -> list[BaseProcess]:
    """Return the engine cores of this process, those that still load included."""
    return [process for process in multiprocessing.active_children() if process.name.startswith(ENGINE_CORE)]
