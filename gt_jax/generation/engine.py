"""Many requests share a few slots of a batch; one call of the device draws many tokens.

A finished request leaves its slot to the next one. Prefill of long prompts alternates with
decoding, one chunk at a time. The prompt alone decides its chunks, so a request gives the same bits
whichever other requests run beside it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from numpy.typing import ArrayLike

from gt_jax.data.base import Tokenizer
from gt_jax.finite import check_computed
from gt_jax.generation.checks import check_whole
from gt_jax.generation.contexts import (
    PREFILL_CHUNKS,
    Context,
    next_chunk,
    prefill_chunk,
    start_prefill,
)
from gt_jax.generation.prompt_scores import (
    likeliest_of,
    read_chunk,
    scores_of,
    start_reading,
    tokens_left,
)
from gt_jax.generation.requests import Completion, Delta, Failure, Request, check_request
from gt_jax.generation.slots import (
    Drawn,
    advance,
    empty_slots,
    fill_slot,
    one_slot,
    rows_of_batch,
)
from gt_jax.generation.text import TextOut
from gt_jax.generation.weights import prepare_weights
from gt_jax.models import LanguageModel, Params

ROWS, MAX_ROWS = 8, 65536
TURN = PREFILL_CHUNKS[-1]  # most prompt tokens that are prefilled between two bursts of decoding


def complete(
    model: LanguageModel,
    params: Params,
    requests: Iterable[Request],
    *,
    tokenizer: Tokenizer | None = None,
    rows: int = ROWS,
    on_delta: Callable[[Delta], None] | None = None,
) -> list[Completion]:
    """Completions in the order of the requests; `on_delta` sees each delta as it comes.

    Arguments and errors as in `stream`.
    """
    requests = list(requests)
    deltas = [[] for _ in requests]
    for delta in stream(model, params, requests, tokenizer=tokenizer, rows=rows):
        deltas[delta.index].append(delta)
        if on_delta is not None:
            on_delta(delta)
    return [
        Completion(
            [token for delta in mine for token in delta.tokens],
            [value for delta in mine for value in delta.log_probabilities],
            "".join(delta.text for delta in mine),
            mine[-1].reason,
            [likeliest for delta in mine for likeliest in delta.top],
            mine[0].prompt,
        )
        for mine in deltas
    ]


def generate(
    model: LanguageModel, params: Params, prompt: ArrayLike | Context, **settings: Any
) -> Iterator[int]:
    """Token ids that continue one prompt, as they come.

    Args:
        model, params: from `gt_jax.load`.
        prompt: [T] ids, at least one, or a Context.
        **settings: max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed and
            stop_ids of a Request.

    Raises:
        InputError: at once, if the prompt is empty or a setting is out of its range.
    """
    deltas = stream(model, params, [Request(prompt, **settings)], rows=1)
    return (token for delta in deltas for token in delta.tokens)


def stream(
    model: LanguageModel,
    params: Params,
    requests: Iterable[Request],
    *,
    tokenizer: Tokenizer | None = None,
    rows: int = ROWS,
) -> Iterator[Delta]:
    """Complete requests and yield the delta of each request after every burst.

    Args:
        model, params: from `gt_jax.load`.
        requests: any number.
        tokenizer: makes text; needed for stop strings.
        rows: requests under way at once. Results may differ between numbers of rows by float32
            rounding: matrix products of other batch sizes round differently.

    Raises:
        InputError: at once, if rows or a request is impossible for this model.
    """
    requests = list(requests)
    rows = check_whole("rows", rows, 1, MAX_ROWS)
    for request in requests:
        check_request(model, request, tokenizer)
    return _raise_failures(
        run_queue(model, params, deque(enumerate(requests)), tokenizer=tokenizer, rows=rows)
    )


def _raise_failures(news):
    for delta in news:
        if isinstance(delta, Failure):
            raise delta.error
        yield delta


def run_queue(
    model: LanguageModel,
    params: Params,
    queue: deque[tuple[int, Request]],
    *,
    tokenizer: Tokenizer | None = None,
    rows: int = ROWS,
    wanted: Callable[[int], bool] = lambda index: True,
) -> Iterator[Delta | Failure]:
    """Like `stream`, for a queue to which another thread may add while it is worked through.

    Args:
        queue: (index, request) pairs, each request a checked one; emptied.
        wanted: whether a client still waits for the request of an index. A request without a
            client gives up its slot before the next burst.

    Returns:
        An iterator that ends when the queue is empty and every request is done. An error of one
        request ends that request with a Failure. An error of the step that all rows share ends
        every request that was drawing; the others continue.
    """
    weights = prepare_weights(model, params, rows_of_batch(rows))
    slots = empty_slots(model, params, rows_of_batch(rows))
    jobs = {}  # row -> _Job
    turns = deque()  # rows whose prompt is not yet in their slot
    while queue or jobs:
        jobs = {row: job for row, job in jobs.items() if wanted(job.index)}
        failures = []
        for row in sorted(set(range(rows)) - set(jobs))[: len(queue)]:
            index, request = queue.popleft()
            if wanted(index):
                try:
                    jobs[row] = _Job(model, params, index, request, tokenizer)
                    turns.append(row)
                except Exception as error:
                    failures.append(Failure(index, error))
        turns = [row for row in dict.fromkeys(turns) if row in jobs and not jobs[row].draws]
        turns = deque(sorted(turns, key=lambda row: jobs[row].next_chunk() > 0))
        slots = _take_turns(model, params, slots, jobs, turns, failures)
        yield from failures
        drawing = {row: job for row, job in jobs.items() if job.draws}
        if not drawing:
            continue
        narrows = any(job.request.narrows for job in drawing.values())
        names = any(job.request.top_logprobs for job in drawing.values())
        try:
            slots, drawn = advance(model, weights, slots, narrows=narrows, names_likeliest=names)
            drawn = jax.device_get(drawn)  # [BURST, rows] each
        except Exception as error:
            slots = empty_slots(model, params, rows_of_batch(rows))  # the old ones were donated
            for row, job in drawing.items():
                del jobs[row]
                yield Failure(job.index, error)
            continue
        for row, job in drawing.items():
            drew = drawn.tokens[:, row] >= 0
            if drew.any():
                news = job.take(Drawn(*(x[drew, row] for x in drawn)))
                if isinstance(news, Failure) or news.reason:
                    del jobs[row]
                yield news


def _take_turns(model, params, slots, jobs, turns, failures):
    """Read at most TURN tokens of the prompts of `turns`, a chunk of each in turn, and fill slots.

    Returns:
        The slots. Rows that draw now leave `turns`; those that failed leave `jobs` too.
    """
    read, whole = 0, []
    while turns:
        row, job = turns[0], jobs[turns[0]]
        _share_prefill(job, jobs.values())
        size = job.next_chunk()
        if read and size and read + size > TURN:
            break
        turns.popleft()
        if size:
            try:
                job.read(model, params)
            except Exception as error:
                failures.append(Failure(jobs.pop(row).index, error))
                continue
            read += size
        (turns if job.next_chunk() else whole).append(row)
    for row in whole:
        job = jobs[row]
        try:
            # Wait here for errors of the device, while they belong to this request alone.
            jax.block_until_ready(job.context.state)
            slots = fill_slot(slots, row, one_slot(job.request, job.context))
            job.draws = True
        except Exception as error:
            failures.append(Failure(jobs.pop(row).index, error))
    return slots


def _share_prefill(job, jobs):
    """Take what another request for the same prompt has already read of it."""
    same = [other.context for other in jobs if other.text == job.text]
    job.context = min(same, key=lambda context: len(context.waiting))


class _Job:
    """The host's side of a request in a slot: the prompt, the tokens left to draw, and the text.

    draws: whether the prompt is in the slot.
    """

    def __init__(self, model, params, index, request, tokenizer):
        self.index, self.request, self.draws = index, request, False
        self.context = request.prompt
        self.text = id(self.context)  # equal for equal texts
        if not isinstance(self.context, Context):
            self.text = self.context.tobytes()
            self.context = start_prefill(model, params, self.context)
        self.reading: Any = None  # of the prompt's scores
        if request.prompt_logprobs:
            self.reading = start_reading(model, params, request.prompt)
        self.left = request.max_tokens
        prompt = request.prompt  # TextOut sees its end, which may cut a character in two.
        before = prompt.waiting if isinstance(prompt, Context) else prompt[-PREFILL_CHUNKS[0] :]
        self.out = tokenizer and TextOut(tokenizer, before, request.stop)

    def next_chunk(self):
        """Tokens of the next call of the model before this request can draw; 0 for none."""
        return next_chunk(self.context) or (self.reading and tokens_left(self.reading)) or 0

    def read(self, model, params):
        if next_chunk(self.context):
            self.context = prefill_chunk(model, params, self.context)
        else:
            self.reading = read_chunk(model, params, self.reading)

    def take(self, drawn):
        """The Delta of a Drawn of this row alone; a Failure if it is of NaN, or cannot be text."""
        tokens, log_probabilities = drawn.tokens.tolist(), drawn.log_probabilities.tolist()
        top, prompt, reading = self.request.top_logprobs, None, self.reading
        ends = [n for n, token in enumerate(tokens) if token in self.request.stop_ids]
        used = ends[0] if ends else len(tokens)
        self.left -= used
        reason = "stop" if ends else "length" if self.left == 0 else None
        text = ""
        try:
            check_computed(log_probabilities)
            if self.out:
                text, used = self.out.add(tokens[:used])
                reason = "stop" if self.out.stopped else reason
                text += self.out.end() if reason else ""
            if reading:
                prompt, self.reading = scores_of(reading, top), None
        except Exception as error:
            return Failure(self.index, error)
        named = []
        if top:
            named = likeliest_of(drawn.top_ids[:used, :top], drawn.top_values[:used, :top])
        return Delta(
            self.index,
            tokens[:used],
            log_probabilities[:used],
            text,
            reason,
            named,
            prompt,
        )
