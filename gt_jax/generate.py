"""Continue a prompt with a trained model.

    python -m gt_jax.generate --checkpoint=runs/gf_mh --prompt="ROMEO:" --max_tokens=300

The prompt is read in parallel; after it each token costs the same however long the text has grown,
because all the model remembers is its recurrent state.
"""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from gt_jax import cli
from gt_jax.errors import InputError


def generate(
    model, params, prompt, *, max_tokens: int, temperature=1.0, top_k=0, top_p=1.0, seed=0
) -> Iterator[int]:
    """Sample token ids that continue a prompt, one at a time.

    Args:
        model, params: from `gt_jax.load`.
        prompt: [T] ids, at least one.
        max_tokens: how many ids to yield.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens; 0 for all.
        top_p: sample among the likeliest tokens that together reach this probability, in (0, 1].
        seed: same seed, same text.

    Raises:
        InputError: the prompt is empty or a setting is out of its range.
    """
    if len(prompt) == 0:
        raise InputError("--prompt is empty; give it at least one character")
    for name, value, ok in (
        ("max_tokens", max_tokens, max_tokens >= 1),
        ("temperature", temperature, temperature >= 0),
        ("top_k", top_k, top_k >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
    ):
        if not ok:
            wanted = {"max_tokens": "at least 1", "top_p": "above 0, at most 1"}
            raise InputError(f"--{name}={value} must be {wanted.get(name, '0 or more')}")
    config = model.config
    if "gpt" in config.architecture and len(prompt) + max_tokens > config.max_positions:
        raise InputError(
            f"--max_tokens={max_tokens} after a prompt of {len(prompt)} tokens exceeds the "
            f"{config.max_positions} positions of this model; ask for fewer"
        )
    return _generate(model, params, prompt, max_tokens, temperature, top_k, top_p, seed)


def _generate(model, params, prompt, max_tokens, temperature, top_k, top_p, seed):
    advance = functools.partial(_advance, model, top_k=top_k, temperature=temperature, top_p=top_p)
    key = jax.random.key(seed)
    tokens = jnp.asarray(prompt, jnp.int32)[None]  # [1, T]
    token, state = advance(params, tokens, None, jax.random.fold_in(key, 0))
    for n in range(1, max_tokens):
        ready = token
        token, state = advance(params, token[:, None], state, jax.random.fold_in(key, n))
        yield int(ready[0])  # Read while the device works on the next one.
    yield int(token[0])


@functools.partial(jax.jit, static_argnames=("model", "top_k"))
def _advance(model, params, tokens, state, key, *, temperature, top_k, top_p):
    """Read tokens [B, T] after `state`; returns the sampled next token [B] and the new state."""
    output = model.apply({"params": params}, tokens, state)
    logits = output.logits[:, -1]  # [B, vocab]
    return sample(key, logits, temperature=temperature, top_k=top_k, top_p=top_p), output.state


def sample(key, logits, *, temperature=1.0, top_k: int = 0, top_p=1.0):
    """One token per row: [B, vocab] float32 logits -> [B] int32. Settings as in `generate`."""
    cut = keep_top_p(keep_top_k(logits / jnp.maximum(temperature, 1e-6), top_k), top_p)
    drawn = jax.random.categorical(key, cut)
    return jnp.where(temperature == 0, jnp.argmax(logits, -1), drawn).astype(jnp.int32)


def keep_top_k(logits, k: int):
    """Logits below the k-th largest of their row become -inf; k = 0 or k >= vocab keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits, p):
    """Logits outside the smallest set of likeliest tokens with probability p become -inf."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered)
    before = jnp.cumsum(probabilities, -1) - probabilities  # of all likelier tokens
    smallest = jnp.min(jnp.where(before < p, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def encode_prompt(tokenizer, text: str, name: str) -> np.ndarray:
    """Token ids [T] of a prompt; InputError naming the characters the vocabulary lacks."""
    try:
        ids = tokenizer.encode(text)
    except InputError as error:
        raise InputError(f"{name}={text!r}: {error}") from error
    unknown = sorted(set(text) - set(tokenizer.decode(ids)))
    if unknown and tokenizer.kind.startswith("char"):
        raise InputError(f"{name}={text!r} has characters outside the vocabulary: {unknown}")
    return ids


def stream(tokenizer, prompt, tokens: Iterable[int]) -> Iterator[str]:
    """The text each new token adds, held back while a character is still incomplete."""
    ids = list(prompt)
    shown = tokenizer.decode(ids)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text


def main(argv):
    flags = cli.new_flags()
    define = functools.partial(absl_flags.DEFINE_string, flag_values=flags)
    define("checkpoint", None, "A run's workdir, or one checkpoint folder.")
    define("prompt", None, "Text to continue.")
    absl_flags.DEFINE_integer("max_tokens", 256, "Tokens to add.", flag_values=flags)
    absl_flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token.", flag_values=flags)
    absl_flags.DEFINE_integer("top_k", 0, "Among the k likeliest; 0: all.", flag_values=flags)
    absl_flags.DEFINE_float("top_p", 1.0, "Among this much probability.", flag_values=flags)
    absl_flags.DEFINE_integer("seed", 0, "Same seed, same text.", flag_values=flags)
    if not cli.parse(flags, argv, usage=__doc__, required=("checkpoint", "prompt")):
        return

    from gt_jax.training.checkpoint import load

    model, params, tokenizer = load(flags.checkpoint)
    prompt = encode_prompt(tokenizer, flags.prompt, "--prompt")
    tokens = generate(
        model,
        params,
        prompt,
        max_tokens=flags.max_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        seed=flags.seed,
    )
    print(flags.prompt, end="", flush=True)
    for text in stream(tokenizer, prompt, tokens):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    cli.run(main)
