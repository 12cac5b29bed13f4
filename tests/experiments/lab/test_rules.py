"""Verdicts follow from numbers by their rules."""

import pytest

from experiments.lab import claims, rules
from experiments.lab.statistics import compare, estimate


def a_result(measures=None, quick=False):
    return {"measures": measures or {}, "quick": quick}


def pairs(losses, at):
    return {f"{pair['a']} - {pair['b']} at {at}": pair for pair in compare(losses)}


def verdict_of(claim_id, found):
    (verdict,) = [v for claim, v in claims.judge_all(found) if claim.id == claim_id]
    return verdict


def losses(gain, spread=1):
    """HY and GF over five seeds, GF better by `gain`; differences have sd 0.01 times the spread."""
    noise = (0.01, -0.01, 0.0, 0.01, -0.01)
    return {"HY": [1.6] * 5, "GF": [1.6 - gain + spread * e for e in noise]}


@pytest.mark.parametrize(
    ("at_reference", "at_best", "spread", "verdict"),
    [
        (0.05, 0.05, 1, "reproduced"),
        (0.0, 0.05, 1, "reproduced"),
        (0.05, -0.05, 1, "refuted"),
        (0.05, 0.0, 1, "artefact"),  # 0 ± 0.012 leaves out 0.025
        (0.02, 0.005, 1, "refuted"),  # 0.005 ± 0.012 leaves out half of 0.071, not of 0.02
        (0.0, 0.0, 1, "refuted"),
        (0.05, 0.0, 4, "undecided"),  # 0 ± 0.05 leaves out neither
        (0.0, 0.0, 4, "undecided"),
    ],
)
def test_a_variant_is_better_by_its_rule(at_reference, at_best, spread, verdict):
    measures = pairs(losses(at_reference), "3e-4") | pairs(losses(at_best, spread), "best")
    found = verdict_of("gf-hy", {"fusion": a_result(measures)})
    assert found.verdict == verdict
    assert found.ours.startswith("GF − HY, best rates: ")
    assert f"{-at_best:+.3f} ± {0.01242 * spread:.3f}".replace("-", "−") in found.ours


def test_undecided_claims_say_how_many_seeds_would_decide_them():
    """0 ± 0.05 of 5 pairs with sd 0.04 leaves out 0.0355 from 8 on: t 2.365 x 0.04 / 8**0.5."""
    found = {"fusion": a_result(pairs(losses(0.0, 4), "best"))}
    assert verdict_of("gf-hy", found).takes.startswith("8 seeds in place of 5, if mean and")
    on_an_end = {"training speed GPT-2 / GF-MH": estimate([2.5, 3.5, 3.0])}
    verdict = verdict_of("gpt2-speed", {"throughput": a_result(on_an_end)})
    assert verdict.takes.startswith("more than 1000 seeds")
    assert not verdict_of("gf-hy", {"fusion": a_result(pairs(losses(0.0), "best"))}).takes


def test_original_branch_alone_makes_an_artefact():
    fair = pairs(losses(0.0), "3e-4") | pairs(losses(0.0, 4), "best")
    found = {"fusion": a_result(fair)}
    assert verdict_of("gf-hy", found).verdict == "undecided"
    found["fusion-legacy"] = a_result(pairs(losses(0.12), "3e-4"))
    verdict = verdict_of("gf-hy", found)
    assert verdict.verdict == "artefact" and verdict.because.startswith("gone with RWKV-6")


@pytest.mark.parametrize(("gain", "said"), [(0.02, "in its direction: half of"), (0.05, "")])
def test_a_reproduced_difference_says_where_it_is_much_smaller(gain, said):
    """0.02 ± 0.012 leaves out half of 0.071, and 0.05 ± 0.012 does not."""
    found = {"fusion": a_result(pairs(losses(gain), "best"))}
    verdict = verdict_of("gf-hy", found)
    assert verdict.verdict == "reproduced"
    assert verdict.because.startswith(said) and bool(verdict.because) == bool(said)


def test_a_single_seed_at_the_best_rates_leaves_a_claim_undecided():
    one = {name: values[:1] for name, values in losses(0.0).items()}
    found = {
        "fusion": a_result(pairs(one, "best")),
        "fusion-legacy": a_result(pairs(losses(0.12), "3e-4")),
    }
    verdict = verdict_of("gf-hy", found)
    assert (verdict.verdict, verdict.because) == ("undecided", "a single seed has no interval")


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([4.0, 4.1, 3.9], "reproduced"),
        ([1.6, 1.7, 1.6], "refuted"),
        ([2.5, 3.5, 3.0], "undecided"),
        ([4.0], "undecided"),
    ],
)
def test_a_figure_is_judged_by_its_interval(values, verdict):
    found = {"training speed GPT-2 / GF-MH": estimate(values)}
    found = {"throughput": a_result(found)}
    assert verdict_of("gpt2-speed", found).verdict == verdict


@pytest.mark.parametrize(
    ("theirs", "fair", "verdict"),
    [
        ([0.001, 0.002, 0.001], [0.3, 0.31, 0.3], "artefact"),
        ([0.2, 0.21, 0.2], [0.3, 0.31, 0.3], "refuted"),
        ([0.001, 0.002, 0.001], [0.002, 0.002, 0.003], "reproduced"),
        ([0.2, 0.21, 0.2], [0.002, 0.02, 0.01], "undecided"),
    ],
)
def test_a_figure_of_unfair_conditions_is_an_artefact(theirs, fair, verdict):
    measures = {
        "Mamba share, published": estimate(theirs),
        "Mamba share, trained": estimate(fair),
    }
    assert verdict_of("mamba-share", {"paradox": a_result(measures)}).verdict == verdict


@pytest.mark.parametrize(
    ("kept", "theirs", "verdict"),
    [
        (("attractor",) * 2, None, "reproduced"),
        (("none",) * 2, None, "refuted"),
        (("none",) * 2, ("none", "attractor"), "refuted"),
        (("none",) * 2, ("attractor",) * 2, "artefact"),
        (("attractor", "none"), ("attractor",) * 2, "undecided"),
    ],
)
def test_attractor_must_show_at_both_rates(kept, theirs, verdict):
    """And is an artefact if it shows with the original's branch alone."""

    def result(name, found):
        measures = {f"attractor at {rate}": each for rate, each in zip((3e-4, 3e-3), found)}
        kept = {f"gate spread kept at {rate}": estimate([0.1, 0.2]) for rate in (3e-4, 3e-3)}
        return {name: a_result(measures | kept)}

    found = result("ratio", kept) | (result("ratio-legacy", theirs) if theirs else {})
    assert verdict_of("attractor", found).verdict == verdict


@pytest.mark.parametrize(
    ("learnt", "score", "verdict"),
    [
        ((1.0, 0.9, 1.0), (100, 100, 100), "reproduced"),
        ((1.0, 0.9, 1.0), (10, 20, 10), "refuted"),
        ((1.0, 0.1, 1.0), (100, 0, 100), "undecided"),  # one did not learn to answer
        ((0.1, 0.1, 0.1), (0, 0, 0), "undecided"),
    ],
)
def test_what_was_not_learnt_is_not_forgotten(learnt, score, verdict):
    measures = {"fact GF-MH, turn 5": estimate(learnt)}
    measures |= {"state persistence GF-MH": estimate(score)}
    found = {"persistence": a_result(measures)}
    assert verdict_of("state-persistence", found).verdict == verdict


def test_size_is_counted():
    verdict = verdict_of("gpt2-size", {})
    assert verdict.verdict == "artefact" and "5,618,920 against 6,814,080" in verdict.ours


def test_what_is_not_measured_is_undecided():
    quick = a_result(pairs(losses(0.05), "best"), quick=True)
    for found, because in (
        ({}, "not measured: there is no result fusion"),
        ({"fusion": a_result()}, 'not measured: fusion has no "HY - GF at best"'),
        ({"fusion": quick}, "not measured: fusion is from a trial run"),
    ):
        verdict = verdict_of("gf-hy", found)
        assert verdict.verdict == "undecided" and verdict.because == because
    for claim, verdict in claims.judge_all({}):
        assert verdict.verdict in rules.VERDICTS
        assert claim.rule and claim.source and (verdict.because or not claim.results)
    assert len({claim.id for claim in claims.CLAIMS}) == len(claims.CLAIMS)
