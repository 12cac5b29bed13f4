"""Run the tasks of lm-evaluation-harness on any checkpoint.

    pip install -e ".[harness]"
    python -m gt_jax.harness --model gt_jax --model_args checkpoint=runs/finch --tasks piqa

All arguments are the harness's own. From Python: `register()`, then its simple_evaluate.
"""

import functools

import numpy as np

from gt_jax import checkpoint, cli
from gt_jax.errors import InputError
from gt_jax.scoring import continue_greedily, part, position_limit, score, windows

_MAX_TOKENS = 256  # generated where a task does not say


class Adapter:
    """The harness's three questions, each a method of a list of requests with `.args`."""

    def __init__(self, checkpoint_path, *, batch_size=8):
        self._model, self._params, self._tokenizer = checkpoint.load(checkpoint_path)
        self._batch_size = batch_size
        self._start = start_id(self._tokenizer)

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """(log p in nats, whether greedy) of each (context, continuation)."""
        scores = self._score([self._encode_pair(*request.args) for request in requests])
        return [(float(s.log_probs.sum()), s.greedy) for s in scores]

    def loglikelihood_rolling(self, requests) -> list[float]:
        """log p in nats of each (text,) after the start token.

        Recurrent models carry their state to its end; attention models read disjoint windows, the
        last one full.
        """
        texts = [self._encode(self._start, request.args[0]) for request in requests]
        size = position_limit(self._model) or max(map(len, texts))
        pairs = [windows([ids], seq_len=size, stride=size) for ids in texts]
        scores = iter(self._score([pair for of_text in pairs for pair in of_text]))
        return [float(sum(next(scores).log_probs.sum() for _ in of_text)) for of_text in pairs]

    def generate_until(self, requests) -> list[str]:
        """The greedy continuation of each (context, settings), without the string that ended it.

        Raises:
            InputError: the settings ask for sampling.
        """
        texts: list = [None] * len(requests)
        for limit in {_max_tokens(request) for request in requests}:
            rows = [i for i, request in enumerate(requests) if _max_tokens(request) == limit]
            stops = [_stops(requests[i]) for i in rows]
            prompts = [self._encode(None, requests[i].args[0]) for i in rows]
            found = continue_greedily(
                self._model,
                self._params,
                prompts,
                max_tokens=limit,
                done=lambda row, ids, stops=stops: self._cut(ids, stops[row])[1],
                batch_size=self._batch_size,
            )
            for i, ids, stop in zip(rows, found, stops):
                texts[i] = self._cut(ids, stop)[0]
        return texts

    def _score(self, pairs):
        return score(self._model, self._params, pairs, batch_size=self._batch_size)

    def _encode(self, start, text):
        """[n] ids, after `start` if it is given or there would be none."""
        ids = self._tokenizer.encode(text)
        if start is None and len(ids):
            return ids
        return np.concatenate([[self._start], ids]).astype(np.int32)

    def _encode_pair(self, context, continuation):
        whole = self._encode(self._start, context + continuation)
        before = self._encode(self._start, context)
        before, after = part(before, whole)
        return before[1 if len(before) > 1 else 0 :], after  # Only an empty context needs a start.

    def _cut(self, ids, stops) -> tuple[str, bool]:
        """The text before whatever ends it first, and whether anything does."""
        ended = self._tokenizer.eos_id in ids
        text = self._tokenizer.decode(ids[: ids.index(self._tokenizer.eos_id)] if ended else ids)
        found = [text.find(stop) for stop in stops if stop in text]
        return text[: min(found, default=len(text))], ended or bool(found)


def start_id(tokenizer) -> int:
    """The token that stands before a text: end-of-text for published models, else a newline.

    Raises:
        InputError: the tokenizer has neither.
    """
    if tokenizer.kind == "rwkv-world":
        return tokenizer.eos_id
    for mark in ("<|endoftext|>", "\n"):
        try:
            ids = tokenizer.encode(mark)
        except InputError:
            continue  # a character tokenizer without this one
        if len(ids) == 1:
            return int(ids[0])
    raise InputError(
        f"the tokenizer of this model ({tokenizer.kind}) has no token for the end of a text and "
        "none for a newline; convert the model with --tokenizer=FILE"
    )


@functools.cache  # The harness refuses a name that it knows.
def register():
    """Make the harness know `model="gt_jax"`; returns the class, a subclass of its LM.

    Raises:
        InputError: the harness is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise InputError(f"the harness is missing ({error}): pip install lm-eval") from error

    class GtJax(Adapter, LM):
        def __init__(self, *, batch_size=8, max_batch_size=None, device=None, **model_args):
            if list(model_args) != ["checkpoint"]:
                raise InputError(f"--model_args must be checkpoint=PATH alone, not {model_args}")
            if not str(batch_size).isdecimal() or int(batch_size) < 1:
                raise InputError(f"--batch_size={batch_size} must be a number of rows, 1 or more")
            LM.__init__(self)
            Adapter.__init__(self, str(model_args["checkpoint"]), batch_size=int(batch_size))

    return register_model("gt_jax")(GtJax)


def _stops(request) -> list[str]:
    until = request.args[1].get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _max_tokens(request) -> int:
    settings = request.args[1]
    if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
        raise InputError("this adapter generates greedily; run with --gen_kwargs do_sample=False")
    return int(settings.get("max_gen_toks", _MAX_TOKENS))


def main(argv):
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    cli.run(main)
