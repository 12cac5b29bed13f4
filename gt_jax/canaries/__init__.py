"""Behaviours worth watching as a language model grows: canaries C1 to C6, and checks of its state.

A canary is a choice between four endings of a prompt: the model must give the right one the highest
likelihood. So even a small model has a score, chance is 25 %, and no judge is needed. Where the
right ending is one word, `said` is the share of prompts whose greedy continuation begins with that
word: far harder, with a chance of about zero.
"""

import math
from collections.abc import Callable
from random import Random
from typing import NamedTuple

import jax
import numpy as np

from gt_jax.canaries import texts
from gt_jax.data.base import Tokenizer
from gt_jax.errors import InputError
from gt_jax.models import LanguageModel, Params, count_parameters
from gt_jax.models.roles import RoleState
from gt_jax.scoring import continue_greedily, part, score

_LONG = 2000  # tokens over which C2a spreads its facts


class Canary(NamedTuple):
    """A behaviour.

    Attributes:
        about: what it is, in a few words.
        make: a function of `gt_jax.canaries.texts`.
        variants: how many paraphrases `make` knows.
        distance: sentences or turns between what is said and what is asked; None: _LONG tokens.
        threshold: percent right to have it.
        said: whether the greedy continuation is looked at too.
    """

    about: str
    make: Callable
    variants: int
    distance: int | None
    threshold: int
    said: bool = True


CANARIES = {
    "C1a": Canary("recalls a fact at once", texts.recall, 4, 0, 95),
    "C1b3": Canary("after 3 sentences", texts.recall, 4, 3, 85),
    "C1b": Canary("after 5 sentences", texts.recall, 4, 5, 85),
    "C1c": Canary("after 10 sentences", texts.recall, 4, 10, 70),
    "C1d": Canary("two facts after 5 sentences", texts.recall_of_two, 4, 5, 80),
    "C2a": Canary("combines 3 facts over 2000 tokens", texts.combine, 3, None, 75),
    "C2b": Canary("infers what is not said", texts.infer, 4, 3, 60),
    "C3a": Canary("keeps a preference over 7 turns", texts.prefer, 3, 7, 90),
    "C3b": Canary("resolves pronouns", texts.resolve, 3, 0, 80),
    "C3c": Canary("takes a correction", texts.correct, 3, 2, 85),
    "C4a": Canary("keeps a format", texts.keep_format, 3, 0, 90, said=False),
    "C4b": Canary("keeps a tone", texts.keep_tone, 4, 0, 80, said=False),
    "C4c": Canary("keeps three rules", texts.keep_rules, 3, 0, 70, said=False),
    "C5a": Canary("has a persona", texts.persona, 3, 0, 85),
    "C5b": Canary("keeps it for 6 turns", texts.persona, 3, 6, 80),
    "C5c": Canary("keeps it when contradicted", texts.contradicted_persona, 3, 2, 75),
    "C6a": Canary("returns to a conversation", texts.return_to, 3, 4, 90),
    "C6b": Canary("tells two users apart", texts.separate, 3, 2, 85),
}
_STANDARD = ("C1a", "C1b", "C1c", "C2a", "C3a", "C3b", "C4a", "C4b", "C5a", "C5b", "C6a")
SUITES = {
    "tiny": ("C1a", "C1b3"),
    "minimal": ("C1a", "C1b", "C4a", "C5a"),
    "standard": _STANDARD,
    "extended": (*_STANDARD, "C1d", "C2b", "C3c", "C4c", "C5c", "C6b"),
}
# Average percent a suite must reach, by the number of parameters a model has about.
REQUIRED = {
    3_500_000: {"minimal": 85},
    8_000_000: {"minimal": 90, "standard": 80},
    30_000_000: {"minimal": 90, "standard": 85, "extended": 75},
    125_000_000: {"minimal": 90, "standard": 90, "extended": 85},
}
_BANDS = ((90, "strong"), (70, "sound"), (50, "weak"), (0, "absent"))
_STOP = 50  # percent: a category below this fails the whole suite


def run(
    model: LanguageModel,
    params: Params,
    tokenizer: Tokenizer,
    *,
    suite: str,
    items: int = 20,
    batch_size: int = 8,
    say: Callable[[str], None] = lambda line: None,
) -> dict:
    """Score a model.

    Args:
        model, params, tokenizer: from `gt_jax.load`. Attention models see as much of the end of a
            prompt as they have positions.
        suite: a key of SUITES.
        items: prompts per canary, spread over its paraphrases; the same ones for every model.
        batch_size: prompts read side by side.
        say: gets a line before each canary, as a suite can take minutes.

    Returns:
        What JSON can hold: suite, parameters, items, state {S0 to S4: {about, passed, found}},
        canaries {id: {about, score, said, threshold, band, passed}} in percent, categories
        {C1: average, ...}, average, required (None if nothing is), passed, reason.

    Raises:
        InputError: the tokenizer cannot write the prompts.
    """
    state = check_state(model, params)
    canaries = {}
    for number, name in enumerate(SUITES[suite], 1):
        canary = CANARIES[name]
        say(f"canary {number} of {len(SUITES[suite])}: {name}, {canary.about}")
        prompts = make_items(name, items, tokenizer)
        right, said = _measure(model, params, tokenizer, prompts, batch_size, canary.said)
        canaries[name] = {
            "about": canary.about,
            "score": right,
            "said": said,
            "threshold": canary.threshold,
            "band": next(band for least, band in _BANDS if right >= least),
            "passed": right >= canary.threshold,
        }
    categories = {name[:2]: [] for name in canaries}
    for name, result in canaries.items():
        categories[name[:2]].append(result["score"])
    categories = {name: float(np.mean(scores)) for name, scores in categories.items()}
    parameters = count_parameters(model.config)["total"]
    result = {
        "suite": suite,
        "parameters": parameters,
        "items": items,
        "state": state,
        "canaries": canaries,
        "categories": categories,
        "average": float(np.mean([result["score"] for result in canaries.values()])),
        "required": required_average(suite, parameters),
    }
    reason = _shortfall(result)
    return result | {"passed": reason is None, "reason": reason}


def make_items(name: str, items: int, tokenizer: Tokenizer) -> list[texts.Item]:
    """The prompts of a canary; `tokenizer` only sets how many sentences _LONG tokens are."""
    canary, distance = CANARIES[name], CANARIES[name].distance
    if distance is None:
        sample = texts.filler(Random(0), 100)
        distance = math.ceil(_LONG / len(_encode(tokenizer, sample)) * 100)
    rngs = [Random(f"{name} {i}") for i in range(items)]
    return [canary.make(rng, i % canary.variants, distance) for i, rng in enumerate(rngs)]


def required_average(suite: str, parameters: int) -> int | None:
    """Percent that a suite asks of a model of this size, None if it asks none."""
    size = min(REQUIRED, key=lambda size: abs(math.log(size / parameters)))
    return REQUIRED[size].get(suite)


def check_state(model: LanguageModel, params: Params) -> dict:
    """S0 to S4: whether the recurrent state is there, bounded, and moved by what is read.

    Every block is checked by itself, and so is each branch of a hybrid.

    Returns:
        {id: {about, passed, found}}; empty for attention models, which have no recurrent state.
    """
    if model.config.position_limit is not None:
        return {}
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, (2, 64), dtype=np.int32)
    read = jax.jit(lambda ids: model.apply({"params": params}, ids)[1])  # the state
    first, again = (_by_branch(read(tokens)) for _ in range(2))
    empty = _by_branch(model.init_state(2))

    vectors = [block for blocks in first.values() for block in blocks]  # [2, n] each
    norms = np.concatenate([np.linalg.norm(block, axis=-1) for block in vectors])
    change = min(np.linalg.norm(block[0] - block[1]) for block in vectors)
    repeated = max(np.abs(one - two).max() for b in first for one, two in zip(first[b], again[b]))
    variances = {b: float(np.mean([x.var() for x in blocks])) for b, blocks in first.items()}
    same = jax.tree.map(np.shape, first) == jax.tree.map(np.shape, empty)
    bounded = bool(np.isfinite(norms).all() and norms.min() > 1e-3 and norms.max() < 1e3)
    spread = ", ".join(f"{b} {variance:.3g}" for b, variance in variances.items())
    checks = (
        (
            "is there, with its shape",
            same,
            f"{len(vectors)} in {len(first[next(iter(first))])} blocks",
        ),
        ("norm in 0.001 to 1000", bounded, f"{norms.min():.3g} to {norms.max():.3g}"),
        ("differs by more than 0.01 for other text", bool(change > 1e-2), f"{change:.3g}"),
        ("is within 1e-5 for the same text", bool(repeated < 1e-5), f"{repeated:.3g}"),
        ("varies by more than 1e-6", min(variances.values()) > 1e-6, spread),
    )
    return {
        f"S{i}": {"about": about, "passed": passed, "found": found}
        for i, (about, passed, found) in enumerate(checks)
    }


def describe(result: dict) -> str:
    """The table for people."""
    lines = [
        f"{name:5} state {check['about']:45} {check['found']:>28}  {_verdict(check['passed'])}"
        for name, check in result["state"].items()
    ]
    lines.append(f"{'':5} {'':35} {'right':>6} {'said':>6} {'needs':>6}")
    for name, row in result["canaries"].items():
        said = "" if row["said"] is None else f"{row['said']:.0f} %"
        lines.append(
            f"{name:5} {row['about']:35} {row['score']:4.0f} % {said:>6} {row['threshold']:4} %"
            f"  {row['band']:7} {_verdict(row['passed'])}"
        )
    lines.append(
        f"suite {result['suite']}: average {result['average']:.0f} % (chance 25 %) of "
        f"{result['items']} prompts a canary: {result['reason'] or 'passed'}"
    )
    return "\n".join(lines)


def _verdict(passed):
    return "passed" if passed else "failed"


def _shortfall(result) -> str | None:
    """The first reason why a model does not pass, None if it does."""
    for name, check in result["state"].items():
        if not check["passed"]:
            return f"failed, {name} must hold"
    for name, average in result["categories"].items():
        if average < _STOP:
            return f"failed, {name} at {average:.0f} % is below {_STOP} %"
    required = result["required"]
    if required is not None:
        short = result["average"] < required
        return f"failed, models of this size need {required} %" if short else None
    missed = [name for name, row in result["canaries"].items() if not row["passed"]]
    return f"failed, {', '.join(missed)} below the threshold" if missed else None


def _measure(model, params, tokenizer, prompts, batch_size, look_at_said):
    """(percent of right choices, percent of continuations that begin right or None)."""
    pairs, groups = [], []
    for item in prompts:
        endings = (item.right, *item.wrong)
        groups.append(range(len(pairs), len(pairs) + len(endings)))
        pairs += [_encode_pair(tokenizer, item.prompt, ending) for ending in endings]
    scores = [float(s.log_probs.sum()) for s in score(model, params, pairs, batch_size=batch_size)]
    # A tie is not right: nor is a model whose log-probabilities are not numbers.
    right = [scores[g[0]] > max(scores[i] for i in g[1:]) for g in groups]
    if not look_at_said:
        return 100 * float(np.mean(right)), None
    contexts = [_encode(tokenizer, item.prompt) for item in prompts]
    longest = max(len(pairs[group[0]][1]) for group in groups)
    found = continue_greedily(
        model, params, contexts, max_tokens=longest + 1, batch_size=batch_size
    )
    answers = [tokenizer.decode(ids).lstrip() for ids in found]  # Some keep the first space.
    said = [text.startswith(item.right.lstrip()) for text, item in zip(answers, prompts)]
    return 100 * float(np.mean(right)), 100 * float(np.mean(said))


def _encode_pair(tokenizer, prompt, ending):
    return part(_encode(tokenizer, prompt), _encode(tokenizer, prompt + ending))


def _encode(tokenizer, text):
    try:
        return tokenizer.encode(text)
    except InputError as error:
        raise InputError(f"the canaries' English cannot be written: {error}") from error


def _by_branch(state) -> dict[str, list[np.ndarray]]:
    """{branch: per block [B, n] float64}, the whole state of each flattened."""
    blocks = [block for block in jax.device_get(state) if not isinstance(block, RoleState)]

    def flat(tree):
        leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
        return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)

    if hasattr(blocks[0], "mamba"):
        return {name: [flat(getattr(b, name)) for b in blocks] for name in ("rwkv", "mamba")}
    return {"state": [flat(block) for block in blocks]}
