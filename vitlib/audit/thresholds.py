"""Numbers that decide, each with what it was chosen by: part of every report.

docs/audit.md has the measurements. The photos that a threshold was chosen on are not those that
benchmarks/RESULTS.md reports.
"""

from __future__ import annotations

from vitlib.audit import alignment, duplicates, labels, quality, rarity


def describe_thresholds() -> dict[str, str]:
    """Describe each threshold and its evidence.

    Returns:
        A sentence by the name of what it decides.
    """
    return {
        "near duplicate": (
            f"largest mean squared difference of brightness in any of {alignment.CELLS} x "
            f"{alignment.CELLS} cells of the overlap at most {duplicates.MAX_DIFFERENCE} "
            f"({duplicates.TINY_DIFFERENCE} below {duplicates.TINY_SIDE} pixels a side) of its "
            f"variance, correlation at least {duplicates.MIN_CORRELATION}. Chosen on planted "
            "copies of 128 photos (no two different ones are below 0.1) and of 700 silhouettes "
            "of 28 pixels"
        ),
        "pair to compare": (
            f"perceptual hashes of at most {duplicates.HASH_RADIUS} different bits of 63, of the "
            f"photo or its mirror image, and up to {duplicates.NEIGHBOURS} neighbours by whitened "
            "embeddings, fewer in large sets"
        ),
        "label suspect": (
            "off the diagonal of the confident joint: the out-of-fold probability of another class "
            "reaches the mean of its own photos (1911.00068). Or more than half of the photo's "
            "duplicates have another label"
        ),
        "label rank": (
            f"mean of the margins of logistic regression (C = 1/sqrt(photos), {labels.FOLDS} "
            f"folds, duplicates in one fold) and of {labels.NEIGHBOURS} neighbours"
        ),
        "outlier": (
            f"mean cosine distance to {rarity.NEIGHBOURS} neighbours more than {rarity.FLAGGED} "
            "deviations above the median, by the median absolute deviation (Iglewicz and Hoaglin "
            "1993)"
        ),
        "blank": "no channel's standard deviation reaches 2 of 255, in a copy of 64 pixels",
        "tiny": (f"shorter side below {quality.TINY} pixels and half of the set's median"),
        "extreme shape": (
            f"sides of more than {quality.LONG:g} to 1, and {quality.LONG_SHARE:g} times the set's "
            "median"
        ),
        "grey among colour": (
            f"99 % of pixels have channels within {quality.GREY_CHROMA:g} of 255, as less than "
            f"{quality.RARE:.0%} of the photos have; or the reverse"
        ),
    }
