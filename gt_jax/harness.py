"""Run the tasks of lm-evaluation-harness on any checkpoint.

    pip install -e ".[harness]"
    python -m gt_jax.harness --model gt_jax --model_args checkpoint=runs/finch --tasks piqa

All arguments are the harness's own. From Python: `register()`, then its simple_evaluate.
"""

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gt_jax import checkpoint, cli
from gt_jax.data.base import Tokenizer
from gt_jax.data.chat_templates import render_chat
from gt_jax.data.hugging_face import HuggingFaceTokenizer
from gt_jax.errors import InputError
from gt_jax.scoring import continue_greedily, part, score, windows

_MAX_TOKENS = 256  # generated where a task does not say
_MOST_ROWS = 64  # side by side, where the batch size is found out
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # first counts
_USUAL = ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>", "</s>")  # begin texts


class Adapter:
    """The harness's three kinds of request; each method takes a list of requests with `.args`.

    Encoding, scoring and decoding follow the harness's own HFLM, so that results are comparable.
    """

    def __init__(
        self,
        checkpoint_path: str | Path,
        *,
        batch_size: int | str = 8,
        max_batch_size: int = _MOST_ROWS,
        progress: Callable | None = None,
    ):
        """Args:
        checkpoint_path: of a run's workdir or one checkpoint.
        batch_size: rows side by side; "auto" for max_batch_size, or half of it, again and
            again, where the device's memory is too small.
        max_batch_size: for "auto"; more rows than 64 only make single calls larger.
        progress: a class like tqdm's; None shows nothing.
        """
        self._model, self._params, self._tokenizer = checkpoint.load(checkpoint_path, say=cli.note)
        self._halves = batch_size == "auto"
        self._batch_size = max_batch_size if self._halves else int(batch_size)
        self._progress = progress
        self._start = start_id(self._tokenizer)
        self._start_text = self._tokenizer.decode([self._start])
        self._name = str(checkpoint_path).replace("/", "__")

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log p in nats, whether greedy) of each (context, continuation); (0, True) of nothing."""
        pairs = [self._encode_pair(*request.args) for request in requests]
        with self._bar("loglikelihood", len(pairs), disable_tqdm) as advance:
            scores = iter(self._score([pair for pair in pairs if len(pair[1])], advance))
            advance(sum(not len(continuation) for _, continuation in pairs))
        answers = []
        for _context, continuation in pairs:
            if len(continuation):
                found = next(scores)
                answers.append((float(found.log_probs.sum()), found.greedy))
            else:
                answers.append((0.0, True))
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """log p in nats of each (text,) after the start token.

        Recurrent models carry their state to its end, where HFLM reads windows of 2048 tokens;
        attention models read disjoint windows, the last one full.
        """
        texts = [np.array([self._start, *self._encode(r.args[0])], np.int32) for r in requests]
        size = self._model.config.position_limit or max(map(len, texts), default=1)
        pairs = [windows([ids], seq_len=size, stride=size) for ids in texts]
        every = [pair for of_text in pairs for pair in of_text]
        with self._bar("loglikelihood_rolling", len(every), disable_tqdm) as advance:
            scores = iter(self._score(every, advance))
        return [float(sum(next(scores).log_probs.sum() for _ in of_text)) for of_text in pairs]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each (context, settings), without the string that ended it.

        Raises:
            InputError: the settings ask for sampling, or for no token.
        """
        texts: list = [None] * len(requests)
        prompts = [self._encode(request.args[0]) for request in requests]
        prompts = [ids if len(ids) else np.array([self._start], np.int32) for ids in prompts]
        limits = [_limit(request.args[1], len(ids)) for request, ids in zip(requests, prompts)]
        all_stops = [_stops(request.args[1]) for request in requests]
        with self._bar("generate_until", len(requests), disable_tqdm) as advance:
            for limit in sorted(set(limits)):
                rows = [i for i, other in enumerate(limits) if other == limit]
                stops = [all_stops[i] for i in rows]
                found = self._in_batches(
                    continue_greedily,
                    [prompts[i] for i in rows],
                    advance,
                    max_tokens=limit,
                    done=lambda row, ids, stops=stops: self._cut(ids, stops[row])[1],
                )
                for i, ids, stop in zip(rows, found, stops):
                    texts[i] = self._cut(ids, stop)[0]
        return texts

    @property
    def tokenizer_name(self) -> str:
        """A name that differs between checkpoints, for the harness's caches."""
        return self._name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template of dialogues; None where none is asked for."""
        if not chat_template:
            return None
        template = getattr(self._tokenizer, "chat_template", None)
        if template is None:
            raise InputError("--apply_chat_template: the tokenizer of this model has no template")
        return template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A dialogue, a list of {"role": ..., "content": ...}, as the text that a model reads.

        Without the prompt for an answer, the last message is what the model shall continue.
        """
        return render_chat(
            self._tokenizer,
            chat_history,
            add_generation_prompt,
            continue_final=not add_generation_prompt,
        )

    def _score(self, pairs, advance):
        return self._in_batches(score, pairs, advance)

    def _in_batches(self, function, texts, advance, **options):
        """function(model, params, texts) in batches, smaller ones once memory is too small."""
        while True:
            told = []  # rows that the bar has shown
            try:
                return function(
                    self._model,
                    self._params,
                    texts,
                    batch_size=self._batch_size,
                    on_batch=lambda rows, told=told: (told.append(rows), advance(rows)),
                    **options,
                )
            except (jax.errors.JaxRuntimeError, MemoryError) as error:
                full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
                if not (self._halves and full and self._batch_size > 1):
                    raise
                self._batch_size = max(min(self._batch_size, len(texts)) // 2, 1)
                advance(-sum(told))  # they are done again
                print(f"memory is full: batch_size is {self._batch_size} now", file=sys.stderr)

    @contextlib.contextmanager
    def _bar(self, kind, total, hidden) -> Iterator[Callable[[int], Any]]:
        """A progress bar; gives the function that advances it."""
        if self._progress is None:
            yield lambda rows: None
            return
        with self._progress(total=total, disable=hidden, desc=f"Running {kind} requests") as bar:
            yield bar.update

    def _encode(self, text):
        """[n] ids with those that the tokenizer puts around a text, unless it begins with one."""
        if not isinstance(self._tokenizer, HuggingFaceTokenizer):
            return self._tokenizer.encode(text)
        begun = bool(self._start_text) and text.startswith(self._start_text)
        return self._tokenizer.encode(text, special=not begun)

    def _encode_pair(self, context, continuation):
        """The ids [m >= 1] and [n] of both; spaces at the end of the context go with the second."""
        start = np.array([self._start], np.int32)
        if context == "":
            ids = self._tokenizer.encode(continuation)
            return (start, ids[1:] if ids[:1].tolist() == [self._start] else ids)
        bare = context.rstrip()
        whole, before = self._encode(context + continuation), self._encode(bare)
        after = whole[len(before) :]
        if not len(before):
            return start, after
        if len(after) or bare == context + continuation:
            return before, after
        before, after = part(before, whole)  # One token has the end of both.
        return (before, after) if len(before) else (start, after)

    def _cut(self, ids, stops) -> tuple[str, bool]:
        """The text up to its first end, and whether it has an end."""
        ends = [n for n, i in enumerate(ids) if i in self._tokenizer.stop_ids]
        ids = ids[: ends[0]] if ends else ids
        if isinstance(self._tokenizer, HuggingFaceTokenizer):
            text = whole = self._tokenizer.decode(ids, special=False)
            if self._tokenizer.eos_id is not None:
                stops = [*stops, self._tokenizer.decode([self._tokenizer.eos_id])]
        else:
            text = whole = self._tokenizer.decode(ids)
        for stop in filter(None, stops):
            text = text.split(stop)[0]
        return text, bool(ends) or text != whole


def start_id(tokenizer: Tokenizer) -> int:
    """The token to put before a text.

    A published model has a token for the beginning or end of a text; others take a newline, and
    where the vocabulary has none, what their tokenizer names for the beginning or the end.

    Raises:
        InputError: the tokenizer has none of these.
    """
    candidates = []
    if tokenizer.kind in ("rwkv-world", "huggingface", "ids"):
        candidates = [tokenizer.special.bos, *tokenizer.start_ids, tokenizer.eos_id]
    if isinstance(tokenizer, HuggingFaceTokenizer):  # perhaps a tokenizer.json that names none
        candidates += map(tokenizer.token_id, _USUAL)
    for i in candidates:
        if i is not None:
            return int(i)
    for mark in ("<|endoftext|>", "\n"):
        try:
            ids = tokenizer.encode_after(mark, "")
        except InputError:  # a character tokenizer without this one
            continue
        if len(ids) == 1 and tokenizer.decode(ids) == mark:  # not the id of all unknown text
            return int(ids[0])
    if named := [i for i in (tokenizer.special.bos, tokenizer.eos_id) if i is not None]:
        return int(named[0])
    raise InputError(
        f"the tokenizer of this model ({tokenizer.kind}) has no token for the beginning or the "
        "end of a text and none for a newline; convert the model with --tokenizer=FILE"
    )


@functools.cache  # The harness refuses a name that it knows.
def register() -> type:
    """Make the harness know `model="gt_jax"`; returns the class, a subclass of its LM.

    Raises:
        InputError: the harness is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
        from tqdm import tqdm
    except ImportError as error:
        raise InputError(f"the harness is missing ({error}): pip install lm-eval") from error

    class GtJax(Adapter, LM):
        def __init__(
            self,
            *,
            batch_size: Any = 8,
            max_batch_size: Any = None,
            device: Any = None,
            **model_args: Any,
        ):
            if list(model_args) != ["checkpoint"]:
                raise InputError(f"--model_args must be checkpoint=PATH alone, not {model_args}")
            rows = "auto" if re.fullmatch(r"auto(:[\d.]+)?", str(batch_size)) else batch_size
            for name, value in (("batch_size", rows), ("max_batch_size", max_batch_size)):
                fine = str(value).isdecimal() and int(value) >= 1
                if not fine and value not in ("auto", None):
                    raise InputError(
                        f"--{name}={value} must be auto, or a number of rows from 1 on"
                    )
            LM.__init__(self)
            Adapter.__init__(
                self,
                str(model_args["checkpoint"]),
                batch_size=8 if rows is None else rows,
                max_batch_size=int(max_batch_size or _MOST_ROWS),
                progress=tqdm,
            )

    return register_model("gt_jax")(GtJax)


def _stops(settings) -> list[str]:
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(s, str | None) for s in until):
        raise InputError(f"until={until!r} must be strings; correct the task or --gen_kwargs")
    return [stop for stop in until if stop]


def _limit(settings, prompt_length) -> int:
    """How many tokens to generate at most; refuses what is not greedy."""
    if settings.get("num_beams") not in (None, 1):
        raise InputError(
            f"num_beams={settings['num_beams']} is not supported; run with --gen_kwargs num_beams=1"
        )
    sampled, temperature = settings.get("do_sample"), settings.get("temperature")
    if sampled is None:
        sampled = bool(temperature)
    if sampled and (temperature is None or _number("temperature", temperature, float) > 0):
        raise InputError("this adapter generates greedily; run with --gen_kwargs do_sample=False")
    if settings.get("max_length") is not None:  # of prompt and continuation
        name = "max_length"
        limit = _number(name, settings[name], int) - prompt_length
    else:
        given = [name for name in _LIMITS if settings.get(name) is not None]
        name = given[0] if given else _LIMITS[0]
        limit = _number(name, settings[name], int) if given else _MAX_TOKENS
    if limit < 1:
        raise InputError(
            f"{name}={settings[name]} leaves no token to generate after a prompt of "
            f"{prompt_length}; raise it"
        )
    return limit


def _number(name, value, kind):
    """value as a number of a kind; a text may hold it, as on the command line."""
    try:
        number = kind(value)
        if number == float(value):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    wanted = "a whole number" if kind is int else "a number"
    raise InputError(f"{name}={value!r} must be {wanted}; correct the task or --gen_kwargs")


def main(argv: list[str]) -> None:
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    cli.run(main)
