"""Names, their exact parameter counts, and one-line errors for impossible configurations."""

import dataclasses
import json

import pytest

from gt_jax.errors import InputError
from gt_jax.models import (
    ALIASES,
    PRESETS,
    ModelConfig,
    confined_to_device,
    count_parameters,
    make_config,
    make_model,
)
from gt_jax.models.__main__ import main, rows

# With the legacy branch: preset -> vocabulary -> parameters, as the reference repository counts.
LEGACY_TOTALS = {
    "tiny": {97: 474_264, 10_000: 1_108_056, 16_000: 1_492_056},
    "hy": {97: 3_585_376, 10_000: 4_852_960, 16_000: 5_620_960},
    "gf": {97: 3_583_336, 10_000: 4_850_920, 16_000: 5_618_920},
    "gf-mh": {97: 3_583_336, 10_000: 4_850_920, 16_000: 5_618_920},
    "gf-rh": {97: 3_583_336, 10_000: 4_850_920, 16_000: 5_618_920},
    "gf-xm": {97: 3_583_336, 10_000: 4_850_920, 16_000: 5_618_920},
    "gf-xr": {97: 3_583_336, 10_000: 4_850_920, 16_000: 5_618_920},
    "ws": {97: 3_581_288, 10_000: 4_848_872, 16_000: 5_616_872},
    "rf": {97: 3_712_352, 10_000: 4_979_936, 16_000: 5_747_936},
    "cp": {97: 3_843_424, 10_000: 5_111_008, 16_000: 5_879_008},
    "hgf": {97: 3_844_448, 10_000: 5_112_032, 16_000: 5_880_032},
    "hgf-mh": {97: 3_844_448, 10_000: 5_112_032, 16_000: 5_880_032},
    "hgf-rh": {97: 3_844_448, 10_000: 5_112_032, 16_000: 5_880_032},
    "gru": {97: 4_769_136, 10_000: 6_036_720, 16_000: 6_804_720},
    "medium": {97: 7_931_416, 10_000: 9_832_792, 16_000: 10_984_792},
    "hy-192x12": {97: 11_892_312, 16_000: 14_945_688},
    "gpt2": {97: 3_760_704, 10_000: 5_662_080, 16_000: 6_814_080},
    "gpt2-3m": {97: 932_224, 10_000: 2_199_808, 16_000: 2_967_808},
    "gpt2-8m": {97: 8_162_048, 10_000: 10_697_216, 16_000: 12_233_216},
    "rwkv6": {16_000: 5_631_120},
    "gpt1": {16_000: 4_370_832},
}
WITHOUT_EMBEDDING = {
    "tiny": 468_056,
    "hy": 3_572_960,
    "gf-mh": 3_570_920,
    "ws": 3_568_872,
    "rf": 3_699_936,
    "cp": 3_831_008,
    "hgf": 3_832_032,
    "gru": 4_756_720,
    "medium": 7_912_792,
    "hy-192x12": 11_873_688,
    "gpt2": 3_742_080,
    "rwkv6": 3_327_120,
}


@pytest.mark.parametrize("name", LEGACY_TOTALS)
def test_legacy_counts_match_the_reference(name):
    largest = max(LEGACY_TOTALS[name])
    config = make_config(name, vocab_size=largest, branch="legacy")
    total = count_parameters(config)["total"]
    for vocab_size, expected in LEGACY_TOTALS[name].items():  # the head is tied: one row per id
        assert total - (largest - vocab_size) * config.dim == expected
    if name in WITHOUT_EMBEDDING:
        assert total - largest * config.dim == WITHOUT_EMBEDDING[name]


def test_the_mixer_without_its_block_matches_the_notebook():
    config = make_config("rwkv6", vocab_size=16_000, branch="legacy", legacy_wkv="c")
    assert count_parameters(config)["total"] == 4_299_408


def test_counts_by_part():
    counts = count_parameters(make_config("gf-mh", vocab_size=97, branch="legacy"))
    assert counts == {
        "embedding": 97 * 128,
        "rwkv": 8 * 197_376,
        "mamba": 8 * 117_388,
        "ffn": 8 * 131_072,
        "fusion": 8 * 257,
        "norms": 8 * 256 + 128,
        "total": 3_583_336,
    }


def test_official_branch_counts():
    d = 128
    counts = count_parameters(make_config("gf-mh", vocab_size=97))
    assert counts["rwkv"] == 8 * (5 * d**2 + 458 * d)
    assert counts["total"] == 3_128_680


def test_two_alike_branches_count_twice():
    count = lambda **fields: count_parameters(make_config("gf-mh", vocab_size=97, **fields))
    hybrid, rwkv, mamba = count(), count(branches="rwkv+rwkv"), count(branches="mamba+mamba")
    assert "mamba" not in rwkv and "rwkv" not in mamba
    assert (rwkv["rwkv"], mamba["mamba"]) == (2 * hybrid["rwkv"], 2 * hybrid["mamba"])
    for part in ("embedding", "fusion", "ffn", "norms"):
        assert rwkv[part] == mamba[part] == hybrid[part]


@pytest.mark.parametrize("name", ["gf", "rwkv6", "mamba2", "gpt2", "gpt1"])
def test_position_limit_is_the_length_of_the_position_table(name):
    config = make_config(name, vocab_size=97, layers=1)
    table = count_parameters(config).get("positions", 0)  # recurrent models have none
    assert config.position_limit == (table // config.dim or None)


def test_names_ignore_case_and_have_aliases():
    assert make_config("GF-MH", vocab_size=97) == make_config("gf-mh", vocab_size=97)
    assert make_config("8M", vocab_size=97) == make_config("medium", vocab_size=97)
    assert set(ALIASES.values()) <= set(PRESETS)


def test_overrides_and_nones():
    config = make_config("gf-mh", vocab_size=97, layers=3, dim=None, dtype="bfloat16")
    assert (config.layers, config.dim, config.gate_init, config.dtype) == (3, 128, 0.3, "bfloat16")
    assert make_config("gf-mh", vocab_size=97, fusion="cp").gate_init is None


@pytest.mark.parametrize(
    "preset, overrides, message",
    [
        ("gf-hm", {}, "model.preset='gf-hm' must be one of .*did you mean 'gf"),
        ("gf", {"layer": 2}, "model.layer is not a field; did you mean 'layers'"),
        ("gf", {"dim": 130}, "model.dim=130 must be a multiple of model.heads=4"),
        ("gf", {"dim": 144}, "model.dim=144 must be a multiple of 32"),
        ("mamba2", {"dim": 144}, "model.dim=144 must be a multiple of 32"),
        ("gf", {"layers": 0}, "model.layers=0 must be at least 1"),
        ("gf", {"heads": 4.0}, "model.heads=4.0 must be a whole number"),
        ("gf", {"gate_init": 1.0}, "model.gate_init=1.0 must lie between 0 and 1"),
        ("rf", {"gate_init": 0.3}, "model.gate_init=0.3 has no meaning for model.fusion='rf'"),
        ("gf", {"branch": "offical"}, "model.branch='offical' .*did you mean 'official'"),
        ("gf", {"legacy_wkv": "d"}, "model.legacy_wkv='d' must be one of a, b1, b2, c"),
        ("gf", {"init": "xavier"}, "model.init='xavier' must be one of official, normal, blinkdl"),
        ("gf", {"dtype": "float16"}, "model.dtype='float16' .*did you mean"),
        ("gf", {"architecture": "gpt3"}, "model.architecture='gpt3' .*did you mean 'gpt2'"),
        ("gf", {"remat": "yes"}, "model.remat='yes' must be one of none, dots, full"),
        ("gf", {"branches": "rwkv+mama"}, "model.branches='rwkv.mama' .*did you mean 'rwkv.mamba'"),
        ("gf", {"fusion": "hfg"}, "model.fusion='hfg' must be one of .*did you mean 'hgf'"),
    ],
)
def test_impossible_configurations_name_field_value_and_fix(preset, overrides, message):
    with pytest.raises(InputError, match=message) as error:
        make_model(make_config(preset, vocab_size=97, **overrides))
    assert "\n" not in str(error.value)


def test_config_survives_json():
    config = make_config("gf-mh", vocab_size=97)
    assert ModelConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_table_lists_presets_with_their_counts(capsys, monkeypatch):
    some = {name: PRESETS[name] for name in ("tiny", "gf-mh", "gpt2-3m")}
    monkeypatch.setattr("gt_jax.models.__main__.PRESETS", some)
    monkeypatch.setenv("COLUMNS", "200")
    main()
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith("preset")
    assert [line.split()[0].rstrip(",") for line in lines] == list(some)
    for number in ("gf", "128", "97", "3,128,680", "3,583,336", "12,416"):
        assert number in lines[1]


@pytest.mark.parametrize(("columns", "tables"), [(80, 3), (120, 2), (200, 1)])
def test_table_fits_the_terminal_and_loses_nothing(capsys, monkeypatch, columns, tables):
    names = ("tiny", "twin-debate", "medium", "gf-mh-1b", "gpt2")
    some = {name: PRESETS[name] for name in names}
    monkeypatch.setattr("gt_jax.models.__main__.PRESETS", some)
    monkeypatch.setenv("COLUMNS", str(columns))
    main()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns
    parts = printed.split("\n\n")
    assert len(parts) == tables
    for part in parts:
        begins = [line.split()[0].rstrip(",") for line in part.splitlines() if line[:1] != " "]
        assert begins == ["preset", *names]
    for row in rows():
        for cell in row:
            assert " ".join(cell.split()) in " ".join(printed.split())


def test_help_fits_80_columns(capsys):
    main(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("preset", "changes", "reason"),
    [
        ("gf-mh", {}, None),
        ("rwkv6", {}, None),
        ("mamba2", {}, None),
        ("gpt2", {}, "attention reads every token before"),
        ("gru", {}, "model.fusion=gru keeps a state"),
        ("gf-mh", {"branch": "legacy", "legacy_wkv": "b2"}, "model.legacy_wkv=b2 sums"),
    ],
)
def test_what_devices_cannot_share_the_tokens_of_says_why(preset, changes, reason):
    found = confined_to_device(make_config(preset, vocab_size=16, **changes))
    assert (found is None) if reason is None else found.startswith(reason)
