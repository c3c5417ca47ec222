"""What each number of a page means, in a sentence or two."""

from collections.abc import Iterable

from vlm_distill_cache.stage2_student.scores.metrics import Score
from vlm_distill_cache.stage2_student.scores.results import Row

INTERVAL = (
    "In brackets: the 95 % interval. The items were drawn again with replacement, 2000 times, and 95 % of the means lie in it. "
    "It tells what other items of this kind could have given, not what another training would. Items that are all alike give an "
    "interval without width, which is no certainty: of N such items up to 3 in N others may differ. Where they are all alike, or "
    "fewer than 10, N stands behind it; it counts the items (or pictures with all their questions, where these are drawn together) "
    "that the score is about, as those answered with yes for precision."
)
GAIN = (
    "What a student scores more than the baseline on the same items, in the same unit; items are resampled in pairs. An "
    "interval that does not hold 0 is a difference that these items show."
)
PAIRED = (
    "What a model scores more than the first one on the items that both were asked, in the same unit; they are resampled in "
    "pairs. Coloured where the interval does not hold 0."
)
COST = {
    "parameters": "Numbers in the model that is used, all parts together.",
    "weights on disk": "Size of the files that hold them.",
    "training steps": "Optimizer steps of all phases together.",
    "training time": "Seconds in those steps, on the machine of the training; loading and scoring are not in it.",
    "cache": "What the teacher left: samples, and bytes on disk. It is made once, for any number of students.",
}
FLIPS = {
    "both": "Items that both students answer right.",
    "won": "Items that the distilled student answers better than the baseline.",
    "lost": "Items that the baseline answers better than the distilled student.",
    "neither": "Items on which both are equally wrong, or a tie.",
    "nats": "log p(right caption) - log p(wrong caption), given the picture: above 0 the right one is the more likely.",
}
TAUGHT = {
    "answer in the data": "What the cache was made with, and students were trained on.",
    "teacher, word by word": "At each place of that answer, what the teacher held for most likely to come next. Where that is "
    "another word than the answer's, the teacher would have gone on otherwise.",
    "teacher's own answer": "The teacher wrote it; students were trained on it.",
    "on the picture": "Share of the word's attention that lies on the picture, mean over heads and the compared layers; the "
    "rest lies on the text.",
    "cosine": "How alike the student's map and the teacher's are on the teacher's grid: 1 the same places, 0 no place in common.",
    "next": "The teacher's most likely tokens at the word's first place, with their probabilities.",
}
CURVES = (
    "Each loss before its weight, as docs/method.md defines it; total is their weighted sum, which is what is minimised. "
    "Trailing means over a fortieth of the run. Dashed: another phase begins, with other losses."
)
ON_THE_WAY = (
    "The headline scores at every so many steps (evaluation.every), by the code of `distill evaluate`, on fewer items and by "
    "default on the split validation: they tell how a training went, and are not to be compared with those above."
)
SEEN_ALONE = (
    "It is taken on the cells that a student's fed visual tokens see, so it rises as fewer are fed: compare it among students "
    "that feed as many."
)
ALL_KEPT = (
    "fewer visual tokens are fed than there are places to keep: all of the gaze lies on those, wherever it goes, and no shift "
    "could be seen."
)
_CHOICE = "Share of caption pairs where the right caption is chosen"
_SCORES = {
    "likelihood": f"{_CHOICE}: log p(caption | picture), summed over its tokens, is higher than the wrong one's. 50 is chance.",
    "questions": "Share of short answers, generated greedily, that equal the expected one but for case, articles and punctuation.",
    "teacher/top1": "Share of answer tokens where the model's most likely token is the teacher's, on cached samples.",
    "likelihood_per_token": f"{_CHOICE} by the mean over its tokens; the sum favours the shorter caption.",
    "letters/mean": f"{_CHOICE} by naming its letter, (A) or (B), asked in both orders. 50 is chance.",
    "letters/right_first": "The same where the right caption is (A): a model that always says A has 100.",
    "letters/right_second": "The same where the right caption is (B).",
    "letters/both_right": "Share of pairs that are right in both orders; 25 is chance, and a model that always says A has 0.",
    "letters/likelihood": "The letter by log p(A) against log p(B) of the first token, whatever would be generated.",
    "letters/bias": "Answers A less answers B, as a share of all; 0 is without bias, since each is right once.",
    "letters/unparsed": "Share of answers in which no single letter was found.",
    "teacher/kl": "Mean divergence of the model's next-token distribution from the teacher's, in nats an answer token; 0 is equal.",
    "attention/cosine": "Likeness of the model's and the teacher's attention of answer tokens on the picture; 1 is the same.",
    "attention/kl": "Divergence between the two, in nats an answer token; 0 is the same.",
}
_KIND = "The same for the items of one kind alone; a score above the kinds is their mean, each counting alike."


def explain(rows: Iterable[Row]) -> dict[str, str]:
    """The legend of a table's rows, by their headings."""
    found = {}
    for row in rows:
        if row.name in _SCORES:
            found[row.heading] = _SCORES[row.name]
        elif row.name:
            found[f"{row.name.partition('/')[0]}, by kind"] = _KIND
    return found


def verdict(gain: Score, *, more_is_better: bool = True) -> str:
    """The colour of a difference: none where its interval holds 0."""
    if gain.low <= 0 <= gain.high:
        return ""
    return "good" if (gain.value > 0) is more_is_better else "bad"
