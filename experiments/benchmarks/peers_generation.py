"""Speed of transformers' Mamba2ForCausalLM; generation.py --peers runs this.

    python -m experiments.benchmarks.peers_generation 1 16 64 256 --parameters=154000000

Random weights in bfloat16, as wide as configs/gf_mh_base.py (768, state 128, a vocabulary of 16384,
tied) and as deep as the number of parameters asks for. Prints a JSON line per batch size: tokens
per second of `generate` without sampling, the median ± half the range of several calls after a
first, each continuing prompts of 16 tokens; the allocator's peak.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

DIM, STATE, HEAD, VOCAB = 768, 128, 64, 16384


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("batches", nargs="+", type=int)
    parser.add_argument("--parameters", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(options.parameters).to(device, torch.bfloat16).eval()
    size = sum(z.numel() for z in model.parameters())
    who = f"transformers {size / 1e6:.0f} M"
    for batch in options.batches:
        prompt = torch.randint(VOCAB, (batch, 16), device=device)
        seconds = measure(model, prompt, options.tokens, options.repeats)
        rates = [batch * options.tokens / s for s in seconds]
        row = {"who": who, "batch": batch, "parameters": size}
        row |= {"tokens_per_second": statistics.median(rates)}
        row |= {"spread": (max(rates) - min(rates)) / 2}
        row |= {"ms": 1e3 * statistics.median(seconds) / options.tokens}
        row |= {"peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None}
        print(json.dumps(row), flush=True)


def make_model(parameters):
    """The model with the number of layers that comes nearest to so many parameters."""

    def build(layers):
        return Mamba2ForCausalLM(
            Mamba2Config(
                hidden_size=DIM,
                state_size=STATE,
                head_dim=HEAD,
                num_heads=2 * DIM // HEAD,
                expand=2,
                n_groups=1,
                num_hidden_layers=layers,
                vocab_size=VOCAB,
                tie_word_embeddings=True,
            )
        )

    with torch.device("meta"):  # counted, not made
        sizes = [sum(z.numel() for z in build(layers).parameters()) for layers in (1, 2)]
    return build(max(1, 1 + round((parameters - sizes[0]) / (sizes[1] - sizes[0]))))


def measure(model, prompt, tokens, repeats):
    """Seconds of several calls that add so many tokens to every prompt."""
    exactly = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    seconds = []
    for _ in range(repeats + 1):
        if prompt.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.inference_mode():
            text = model.generate(prompt, **exactly, pad_token_id=0, use_cache=True)
        if prompt.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        assert text.shape[1] == prompt.shape[1] + tokens
    return seconds[1:]


if __name__ == "__main__":
    main()
