"""Claims are judged by the figures that were published."""

import re

from experiments.lab import claims


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
