"""What the measures of published benchmarks mean, a sentence each; told by their names."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# The first that is found in a measure's name, before its subset; all of them that are found in the second table.
_WHAT = (
    (r"(first|second)_image", "Share of items where this picture prefers its own caption."),
    (r"(first|second)_caption", "Share of items where this caption prefers its own picture."),
    (r"(first|second)_positive", "Share of items where this right caption scores above the wrong one."),
    (r"yes_caption", "Share of right captions that are said to fit: P(yes) above one half."),
    (r"yes_foil", "Share of wrong captions that are said not to fit: P(yes) of one half at most."),
    (r"group", "Share of items where all pictures get their captions and all captions their pictures."),
    (r"text", "Share of items where each picture prefers its own caption."),
    (r"image", "Share of items where each caption prefers its own picture."),
    (r"itt", "Share of items where both right captions score above the wrong one."),
    (r"tot", "Share of items where the two right captions are held for the more alike, without the picture."),
    (r"letters?_both|both_right", "Share of pairs that are right in both orders; a constant letter has 0."),
    (r"letters?_right", "Share of right letters where the right caption stands at this place."),
    (r"letter_bias", "Share of answers A less share of answers B, over both orders; 0 is without bias."),
    (r"bias", "Answers of the first option less those of the others' share; 0 is without bias."),
    (r"letter", "Share of right letters, over all orders that are asked."),
    (r"unparsed", "Share of answers in which nothing that was asked for was found; they count as wrong."),
    (r"yes_share|yes_rate|share", "Share of questions that are answered with yes, right or wrong."),
    (r"precision", "Of what was called so, the share that is."),
    (r"recall", "Of what is so, the share that was called so."),
    (r"f1", "Harmonic mean of precision and recall."),
    (r"acc(uracy)?_?plus|acc\+", "Share of pictures of which both questions are right."),
    (r"score|perception|cognition", "Sum over tasks of accuracy and accuracy of pairs, each up to 100."),
    (r"circular", "Share of questions that are right in all rotations of their options."),
    (r"vanilla", "Share of questions that are right as they are written, options in one order."),
    (r"anls", "Likeness of letters to the nearest right answer, less than half alike counts 0; mean over questions."),
    (r"relaxed", "Share of right answers; numbers may be 5 % off."),
    (r"distribution", "How far the answers' distribution is from the true one, chi-square; 0 is the same."),
    (r"consistency|set|pairs?(_|$)", "Share of groups of questions that belong together of which all are right."),
    (r"valid", "Share of answers that are of the sort that was asked for."),
    (r"plausib", "Share of answers that make sense in the world."),
    (r"likelihood", "Share of items where what is right is more likely than what is wrong, by the sum of log-probabilities."),
    (r"acc|exact|match|yes", "Share of right answers."),
)  # fmt: skip
_HOW = (
    (r"per_token", "By the mean over tokens, as the sum favours the shorter text."),
    (r"_yes$|^yes", 'By P("Yes") against P("No") as the answer to whether the two fit.'),
)
_KIND = "One subset alone, counted as the whole."


def explain_measures(measures: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The legend of some measures by heading; subsets of a measure have one entry."""
    found: dict[str, str] = {}
    for measure in measures:
        base, _, subset = measure["name"].partition("/")
        if subset:
            found.setdefault("subsets", _KIND)
            continue
        what = next((said for pattern, said in _WHAT if re.search(pattern, base.lower())), "Mean over items.")
        how = [said for pattern, said in _HOW if re.search(pattern, base.lower())]
        better = {True: "More is better.", False: "Less is better."}.get(
            measure["gains"], "Neither more nor less is better."
        )
        found[measure["heading"]] = " ".join([what, *how, better])
    return found
