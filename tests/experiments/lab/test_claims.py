"""Claims are judged by the figures that were published."""

import re

import pytest

from experiments.lab import claims, measures
from experiments.lab.statistics import estimate


def test_published_differences_that_rules_halve_are_those_of_the_claims_text():
    """Each rule's number is one that the claim's published figures or a difference of them say."""
    judged = [claim for claim in claims.CLAIMS if "half of the published one, " in claim.rule]
    assert len(judged) == 13
    for claim in judged:
        by = float(re.search(r"published one, ([\d.]+);", claim.rule)[1])
        said = [float(x) for x in re.findall(r"\d+\.\d+", claim.published)]
        ways = {round(abs(x - y), 3) for x in said for y in said} | set(said)
        ways |= {round(x / 100 * y, 3) for x in said for y in said}  # x per cent
        assert by in ways, claim.id


@pytest.mark.parametrize(
    ("name", "long", "short"),
    [
        ("gpt2-parity", claims.LONG_RATIO, measures.GPT2_RATIO_SUBWORDS),
        ("long-context", claims.LONG_CONTEXT, measures.LONG_CONTEXT),
    ],
)
def test_a_claim_is_judged_by_the_long_comparison_where_it_was_made(name, long, short):
    def verdict(**values):
        found = {
            m.result: {"quick": False, "measures": {m.name: estimate(values[m.result])}}
            for m in (long, short)
            if m.result in values
        }
        return next(v.verdict for claim, v in claims.judge_all(found) if claim.id == name)

    near, far = [1.0, 1.001, 1.002], [1.3, 1.301, 1.302]
    assert verdict(**{short.result: near}) == "reproduced"
    assert verdict(**{short.result: near, long.result: far}) == "refuted"
    assert verdict(**{short.result: far, long.result: near}) == "reproduced"
