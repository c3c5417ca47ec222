"""What the measures of published benchmarks mean, a sentence each; told by their names."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# What a measure of one metric means that others call alike; looked for in "METRIC MEASURE".
_OF_METRIC = (
    (r"^pope (p_yes_)?yes$", "Share of questions that are answered with yes, right or wrong; yes is right for half of POPE's."),
    (r"^pope .*precision", "Of the questions answered with yes, the share where yes is right."),
    (r"^pope .*recall", "Of the questions where yes is right, the share answered with yes."),
    (r"^pope unparsed", "Share of answers that say neither yes nor no; as POPE's script has it, they count as yes, or as no if "
     "they hold no or not."),
    (r"^mme .*(perception|cognition)", "Sum over these tasks of acc and acc+, each up to 100."),
    (r"^mme .*acc\+", "Share of pictures of which all questions are right."),
    (r"^mme .*acc", "Share of right answers, all tasks together."),
    (r"^hallusionbench p_yes_aacc", "Share of right answers."),
    (r"^hallusionbench .*aacc", "Share of right answers. An answer that is neither yes nor no is wrong: no GPT judges."),
    (r"^hallusionbench .*facc", "Share of figures about which all questions are right."),
    (r"^hallusionbench .*qacc", "Share of questions that are right about all of their figures."),
    (r"^hallusionbench .*easy", "Share of questions that are right about their figures as they are, or about none."),
    (r"^hallusionbench .*hard", "Share of questions that are right about figures that somebody has altered."),
    (r"^\w*(vqa|vizwiz)_accuracy unanswerable", "Of answering that a question cannot be answered: "),
    (r"^relaxed_accuracy accuracy", "Share of right answers; numbers may be 5 % off."),
    (r"^circular accuracy", "Share of right answers to each question as it is asked, with its options in their own order."),
    (r"^(choices|circular) likelihood", "Share of right answers where the answer is the option whose letter is the likeliest."),
    (r"^whats-up accuracy", "Share of pictures that give the right one of their captions the highest score."),
    (r"^whats-up pairs", "Share of pairs of pictures, the same things the other way round, of which both are right."),
    (r"^whats-up sets", "Share of sets of pictures, the same things in all places, of which all are right."),
    (r"^nlvr .*consistency", "Share of statements that are judged rightly of all their pictures."),
    (r"vqaeval", "The same as VQAEval counts it: where all people agree, answers are compared as they stand."),
    (r"^\w*(vqa|vizwiz)_accuracy accuracy", "Of the people who were asked, three who gave the answer make it right, fewer a third "
     "each; the mean over leaving out each of them, and over questions."),
)  # fmt: skip
# The first that is found in a measure's name, before its subset; all of them that are found in the second table.
_WHAT = (
    (r"(first|second)_image", "Share of items where this picture prefers its own caption."),
    (r"(first|second)_caption", "Share of items where this caption prefers its own picture."),
    (r"(first|second)_positive", "Share of items where this right caption scores above the wrong one."),
    (r"yes_caption", "Share of right captions that are said to fit: P(yes) above one half."),
    (r"yes_foil", "Share of wrong captions that are said not to fit: P(yes) of one half at most."),
    (r"^yes$", "Share of items where what is right gets a higher P(yes) than what is wrong."),
    (r"group", "Share of items where all pictures get their captions and all captions their pictures."),
    (r"text", "Share of items where each picture prefers its own caption."),
    (r"image", "Share of items where each caption prefers its own picture."),
    (r"itt", "Share of items where both right captions score above the wrong one."),
    (r"tot", "Share of items where the two right captions are held for the more alike, without the picture."),
    (r"letters?_both|both_right", "Share of pairs that are right in both orders; a constant letter has 0."),
    (r"letters?_right", "Share of right letters where the right caption stands at this place."),
    (r"letter_bias", "Share of answers A less share of answers B, over both orders; 0 is without bias."),
    (r"bias", "Share of A among the answers that name one option, less the share where A is right (subsets: the other letters); "
     "0 is without bias."),
    (r"letter", "Share of right letters, over all orders that are asked."),
    (r"unparsed", "Share of answers in which nothing that was asked for was found; they count as wrong."),
    (r"precision", "Of what was called so, the share that is."),
    (r"recall", "Of what is so, the share that was called so."),
    (r"f1", "Harmonic mean of precision and recall."),
    (r"circular", "Share of questions that are right in all rotations of their options."),
    (r"anls", "Likeness of letters to the nearest right answer, less than half alike counts 0; mean over questions."),
    (r"distribution", "How far the answers' distribution is from the true one, chi-square; 0 is the same."),
    (r"consistency|set|pairs?(_|$)", "Share of groups of questions that belong together of which all are right."),
    (r"valid", "Share of answers that are of the sort that was asked for."),
    (r"plausib", "Share of answers that make sense in the world."),
    (r"^option_likelihood", "Share of questions whose right option is the likeliest, by the sum of log-probabilities."),
    (r"likelihood", "Share of items where what is right is more likely than all that is wrong, by the sum of log-probabilities."),
    (r"acc", "Share of right answers."),
)  # fmt: skip
# What is added, looked for in "METRIC MEASURE", too.
_HOW = (
    (r" option_likelihood", "Of the options' texts, after the question without options."),
    (r" circular_likelihood", "By the likeliest letter."),
    (r"per_token", "By the mean over tokens, as the sum favours the shorter text."),
    (r" p_yes_", 'The answer is yes where P("Yes") is above P("No").'),
    (r"unanswerable_f1", "harmonic mean of precision and recall."),
    (r"unanswerable_precision", "the share of such answers that are right."),
    (r"unanswerable_recall", "the share of such questions that are answered so."),
    (
        r"(?<! p)(?<! p_yes)_yes$|^(?!pope )\S* yes(_|$)",
        'By P("Yes") against P("No") as the answer to whether the two fit.',
    ),
)
UNKNOWN = "Mean over items."
_KIND = "One subset alone, counted as the whole."


def explain_measures(measures: Iterable[Mapping[str, Any]], metric: str = "") -> dict[str, str]:
    """The legend of some measures of one metric by heading; subsets of a measure have one entry."""
    found: dict[str, str] = {}
    for measure in measures:
        base, _, subset = measure["name"].partition("/")
        if subset:
            found.setdefault("subsets", _KIND)
            continue
        name = f"{metric} {base}".lower()
        own = next((said for pattern, said in _OF_METRIC if re.search(pattern, name)), None)
        what = own or next((said for pattern, said in _WHAT if re.search(pattern, base.lower())), UNKNOWN)
        how = [said for pattern, said in _HOW if re.search(pattern, name)]
        better = {True: "More is better.", False: "Less is better."}.get(
            measure["gains"], "Neither more nor less is better."
        )
        if (parts := measure.get("mean_of", 0)) > 1:
            how.append(f"Counted in each of {parts} subsets, of which this is the unweighted mean.")
        found[measure["heading"]] = " ".join(part.strip() for part in (what, *how, better))
    return found
