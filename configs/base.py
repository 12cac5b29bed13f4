"""Every setting with its default. The other files in this folder say only what differs.

    python -m gt_jax.train --config=configs/gf_mh.py --config.optim.lr=3e-4

Any field can be overridden on the command line as above. None means "as the preset says".
"""

from ml_collections import config_dict


def group(**fields):
    return config_dict.ConfigDict(fields)


def get_config():
    return group(
        seed=0,  # initial weights, order of the text, dropout and samples all follow from it
        model=group(
            preset="gf-mh",  # `python -m gt_jax.models` lists them all
            # A model to go on from, as `gt_jax.load` takes it: the run then has its weights,
            # architecture and tokenizer, whatever preset and data.tokenizer say.
            init_from=config_dict.placeholder(str),
            # Of a hybrid's blocks: "rwkv+mamba", or two alike, "rwkv+rwkv" or "mamba+mamba".
            branches=config_dict.placeholder(str),
            branch=config_dict.placeholder(str),  # "official" RWKV-6, or "legacy"
            legacy_wkv=config_dict.placeholder(str),  # the legacy branch's: a, b1, b2 or c
            fusion=config_dict.placeholder(str),  # how the two branches are joined: "gf", "hy", ...
            # Weight that a gated fusion gives RWKV at the start, between 0 and 1. At step 0 the
            # update is all Mamba's in any case: official RWKV-6's output projection starts at zero.
            # (HY normalises that zero output, so its first gradient is large; optim.clip clips it.)
            gate_init=config_dict.placeholder(float),
            dim=config_dict.placeholder(int),  # width of the residual stream
            layers=config_dict.placeholder(int),
            heads=config_dict.placeholder(int),  # RWKV (or attention) heads; must divide dim
            state_size=config_dict.placeholder(int),  # Mamba-2 state channels per head
            max_positions=config_dict.placeholder(int),  # longest text of a GPT
            tie_embeddings=config_dict.placeholder(bool),  # output head shares the embedding
            feed_forward=config_dict.placeholder(bool),  # behind the mixers of a block, or none
            init=config_dict.placeholder(str),  # "official", "normal" or "blinkdl"
            dtype="auto",  # of the computation: bfloat16 on GPU and TPU, float32 on CPU
            impl="auto",  # of the recurrences: "auto", "mosaic", "chunked" or "reference"
            rwkv_dropout_start=0.0,  # chance that a block drops its RWKV branch, at step 0 ...
            rwkv_dropout_end=0.0,  # ... and at the last step, linear in between
            # What the backward pass recomputes instead of storing: "none", "dots" (all but the
            # results of dense layers and kernels) or "full" blocks. JAX 0.10 undoes it on CPUs.
            remat="none",
        ),
        data=group(
            source="shakespeare",  # "shakespeare", "shakespeare-all", a file, a folder, "tfds:NAME"
            field="text",  # the text field of JSONL lines and TFDS examples
            tokenizer="char",  # "char", "char97" (32 reserved ids first) or "sentencepiece"
            vocab_size=4096,  # of a SentencePiece tokenizer; characters need none
            order="windows",  # shuffled windows, or "tracks" that continue from batch to batch
            split="contiguous",  # last part validates; "tracks": the last part of each track
            validation_fraction=0.1,  # of the text; data sets with their own split keep it
        ),
        optim=group(
            lr=4e-3,  # peak learning rate of AdamW; the best of a sweep for gf_mh (README)
            min_lr_ratio=0.1,  # the cosine ends at this share of the peak
            warmup_steps=50,  # linear; step 0 already moves
            weight_decay=0.1,  # on weight matrices alone, never on embeddings, gates or decays
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            clip=1.0,  # global gradient norm; 0 turns clipping off
            lr_multipliers=group(rwkv=1.0, mamba=1.0, gate=1.0),  # by part of the model
            grad_accumulation=1,  # microbatches per step; the gradient stays the full batch's
        ),
        train=group(
            steps=500,
            max_minutes=0.0,  # stop after so long, for the same command to go on; 0 for no limit
            batch_size=64,  # rows per step over all devices and microbatches
            seq_len=64,  # tokens per row
            carry_state=False,  # begin each row with the state the last batch ended in ("tracks")
            eval_every=100,  # steps between evaluations; 0 for none before the end
            eval_tokens=0,  # validation tokens per evaluation; 0 for the whole split
            patience=0,  # stop after so many evaluations without a new best; 0 for never
            max_nonfinite=10,  # stop after so many NaN or infinite steps in a row (each is skipped)
            sample_every=0,  # steps between text samples; 0 for one at the end
            sample_prompt="",  # what a sample continues; empty: the start of the validation text
            sample_tokens=256,  # length of a sample; 0 for none at all
        ),
        checkpoint=group(
            every=250,  # steps; the best and the last are saved in any case; 0 for only those
            keep=2,  # latest checkpoints kept, besides the best
        ),
        parallel=group(
            mode="jit",  # "jit" over a device mesh, or "pmap"; both compute the same
        ),
        log=group(
            every=10,  # steps between lines of metrics.jsonl and of the screen
            tensorboard=True,  # also write event files under tensorboard/
        ),
    )
