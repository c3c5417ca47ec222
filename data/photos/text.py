"""What is said and asked about scenes of photographs, and the twin of each: a picture where the other text is true.

A twin is the same scene on the same ground with the least change that makes the other of two captions, or another
answer, the true one. Both are scored, so every caption is right once and wrong once, and every question has two answers: a
model that never looks has half of the captions right and at most half of the answers, whatever it knows of language.

A relation holds by strict order of columns or rows, as in `data.shapes.text`.

Source:
    The kinds of hard negatives: SugarCrepe (arXiv:2306.14610), section 4; two pictures for two captions: Winoground
    (arXiv:2204.03162). What differs: attributes are sizes, and ``add_*`` adds to both captions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vlm_distill_cache.data.photos.scene import GRID, SIZES, PhotoScene, Thing, in_place_of

RELATIONS = ("left of", "right of", "above", "below")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
_OTHER = dict(zip(SIZES, reversed(SIZES), strict=True))

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Twins:
    """Two texts, and the scene that the second one is true of; the first is true of the scene that it was made from.

    Attributes:
        first: A caption, or the answer to ``question``.
        second: The twin's.
        scene: The twin.
        question: Of both; empty: they are captions.
    """

    first: str
    second: str
    scene: PhotoScene
    question: str = ""


Rule = Callable[[PhotoScene, np.random.Generator, bool], Twins | None]


def relation_holds(first: Thing, relation: str, second: Thing) -> bool:
    """Tell whether ``first relation second`` is true, by strict order of columns or rows."""
    if relation in ("right of", "below"):
        first, second = second, first
    return first.column < second.column if relation in ("left of", "right of") else first.row < second.row


def true_relations(first: Thing, second: Thing) -> list[str]:
    """The relations that hold, one or two."""
    return [relation for relation in RELATIONS if relation_holds(first, relation, second)]


def cell_name(cell: int) -> str:
    """``top left`` to ``bottom right``."""
    return f"{ROWS[cell // GRID]} {COLUMNS[cell % GRID]}"


def a(noun: str) -> str:
    """A noun, or a size and a noun, with its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _pick(items: Sequence[T], generator: np.random.Generator) -> T:
    return items[int(generator.integers(len(items)))]


def _two(scene: PhotoScene, generator: np.random.Generator) -> tuple[int, int]:
    """Places of two things, in any order."""
    first, second, *_ = generator.permutation(len(scene.things)).tolist()
    return first, second


def _listed(nouns: Sequence[str]) -> str:
    return " and ".join(a(noun) for noun in nouns)


def _exchanged(scene: PhotoScene, first: int, second: int, *names: str) -> PhotoScene:
    """The scene with properties of two things exchanged."""
    one, other = ({name: getattr(scene.things[place], name) for name in names} for place in (first, second))
    return scene.changed(first, **other).changed(second, **one)


# Captions for training ----------------------------------------------------------------------------


def list_caption(scene: PhotoScene, generator: np.random.Generator) -> str:
    """Name all things, most of them with their size."""
    named = [scene.things[place] for place in generator.permutation(len(scene.things)).tolist()]
    return _listed([_named(thing, generator, 0.7) for thing in named])


def relation_caption(scene: PhotoScene, generator: np.random.Generator) -> str:
    """Relate two things, some of them with their size."""
    first, second = (scene.things[place] for place in _two(scene, generator))
    relation = _pick(true_relations(first, second), generator)
    return f"{a(_named(first, generator, 0.3))} {relation} {a(_named(second, generator, 0.3))}"


def _named(thing: Thing, generator: np.random.Generator, share: float) -> str:
    return f"{thing.size} {thing.noun}" if generator.random() < share else thing.noun


# Two captions, each true of one of two scenes -----------------------------------------------------


def swap_obj(scene: PhotoScene, generator: np.random.Generator, held_out: bool) -> Twins:
    """Exchange the two things of a relation."""
    first, second = _two(scene, generator)
    one, other = scene.things[first], scene.things[second]
    relation = _pick(true_relations(one, other), generator)
    return Twins(
        first=f"{a(one.noun)} {relation} {a(other.noun)}", second=f"{a(other.noun)} {relation} {a(one.noun)}",
        scene=_exchanged(scene, first, second, "cell", "shift"),
    )  # fmt: skip


def replace_rel(scene: PhotoScene, generator: np.random.Generator, held_out: bool) -> Twins | None:
    """Replace a relation by one that does not hold; in the twin the first thing is where it does."""
    first, second = _two(scene, generator)
    one, other = scene.things[first], scene.things[second]
    true = true_relations(one, other)
    right = _pick(true, generator)
    wrong = _pick([relation for relation in RELATIONS if relation not in true], generator)
    cells = []
    for cell in scene.free_cells:
        moved = scene.changed(first, cell=cell).things[first]
        if relation_holds(moved, wrong, other) and not relation_holds(moved, right, other):
            cells.append(cell)
    if not cells:
        return None
    return Twins(
        first=f"{a(one.noun)} {right} {a(other.noun)}", second=f"{a(one.noun)} {wrong} {a(other.noun)}",
        scene=scene.changed(first, cell=_pick(cells, generator)),
    )  # fmt: skip


def _replaced(scene: PhotoScene, generator: np.random.Generator, held_out: bool, named: int) -> Twins | None:
    """Name so many things, and replace the last of them by one that is absent."""
    if len(scene.things) < named:
        return None
    places = generator.permutation(len(scene.things))[:named].tolist()
    nouns = [scene.things[place].noun for place in places]
    other = _pick(in_place_of(scene, places[-1], held_out=held_out), generator)
    where = named - 1 if named == 3 else int(generator.integers(named))  # an addition stands behind
    nouns.insert(where, nouns.pop())
    changed = [*nouns[:where], other, *nouns[where + 1 :]]
    return Twins(first=_listed(nouns), second=_listed(changed), scene=scene.changed(places[-1], noun=other))


def replace_obj(scene: PhotoScene, generator: np.random.Generator, held_out: bool) -> Twins | None:
    """Replace one of two things."""
    return _replaced(scene, generator, held_out, 2)


def add_obj(scene: PhotoScene, generator: np.random.Generator, held_out: bool) -> Twins | None:
    """Add a third thing: one that is there, or one that is not."""
    return _replaced(scene, generator, held_out, 3)


def swap_att(scene: PhotoScene, generator: np.random.Generator, held_out: bool) -> Twins | None:
    """Exchange the sizes of two things."""
    first, second = _two(scene, generator)
    one, other = scene.things[first], scene.things[second]
    if one.size == other.size:
        return None
    return Twins(
        first=_listed([f"{one.size} {one.noun}", f"{other.size} {other.noun}"]),
        second=_listed([f"{other.size} {one.noun}", f"{one.size} {other.noun}"]),
        scene=_exchanged(scene, first, second, "size"),
    )


def _resized(scene: PhotoScene, generator: np.random.Generator, *, others: bool) -> Twins:
    """Two things, the size of one of them said rightly or wrongly; also the other's, rightly."""
    places = _two(scene, generator)
    which = int(generator.integers(2))
    captions = []
    for wrong in (False, True):
        nouns = []
        for number, place in enumerate(places):
            thing = scene.things[place]
            size = _OTHER[thing.size] if wrong and number == which else thing.size
            nouns.append(f"{size} {thing.noun}" if others or number == which else thing.noun)
        captions.append(_listed(nouns))
    place = places[which]
    return Twins(
        first=captions[0],
        second=captions[1],
        scene=scene.changed(place, size=_OTHER[scene.things[place].size]),
    )


def replace_att(scene: PhotoScene, generator: np.random.Generator, held_out: bool) -> Twins:
    """Replace one of two sizes."""
    return _resized(scene, generator, others=True)


def add_att(scene: PhotoScene, generator: np.random.Generator, held_out: bool) -> Twins:
    """Add a size: the true one, or the other one."""
    return _resized(scene, generator, others=False)


PAIR_KINDS: dict[str, Rule] = {
    "swap_att": swap_att,
    "swap_obj": swap_obj,
    "replace_att": replace_att,
    "replace_obj": replace_obj,
    "replace_rel": replace_rel,
    "add_obj": add_obj,
    "add_att": add_att,
}


# Questions, each with its answers to both scenes --------------------------------------------------


def where_question(scene: PhotoScene, generator: np.random.Generator, held_out: bool) -> Twins:
    """Which of the nine cells a thing is in; in the twin it is in another one."""
    place = int(generator.integers(len(scene.things)))
    thing, cell = scene.things[place], _pick(scene.free_cells, generator)
    return Twins(
        question=f"where is the {thing.noun}", first=cell_name(thing.cell), second=cell_name(cell),
        scene=scene.changed(place, cell=cell),
    )  # fmt: skip


def relation_question(scene: PhotoScene, generator: np.random.Generator, held_out: bool) -> Twins | None:
    """The only thing left of / right of / above / below another; in the twin something else is there."""
    anchor = _pick(scene.things, generator)
    relation = _pick(RELATIONS, generator)
    found = [place for place, thing in enumerate(scene.things) if relation_holds(thing, relation, anchor)]
    if len(found) != 1:
        return None
    other = _pick(in_place_of(scene, found[0], held_out=held_out), generator)
    return Twins(
        question=f"what is {relation} the {anchor.noun}", first=scene.things[found[0]].noun, second=other,
        scene=scene.changed(found[0], noun=other),
    )  # fmt: skip


def count_question(scene: PhotoScene, generator: np.random.Generator, held_out: bool) -> Twins | None:
    """How many things there are, or how many small or large ones; in the twin one is gone, or of the other size."""
    if generator.random() < 0.3:
        if len(scene.things) < 3:
            return None
        gone = int(generator.integers(3))
        rest = tuple(thing for place, thing in enumerate(scene.things) if place != gone)
        return Twins(question="how many things are there", first="3", second="2", scene=PhotoScene(things=rest))
    size, place = _pick(SIZES, generator), int(generator.integers(len(scene.things)))
    twin = scene.changed(place, size=_OTHER[scene.things[place].size])
    first, second = (str(sum(thing.size == size for thing in one.things)) for one in (scene, twin))
    return Twins(question=f"how many {size} things are there", first=first, second=second, scene=twin)


def size_question(scene: PhotoScene, generator: np.random.Generator, held_out: bool) -> Twins:
    """Small or large."""
    place = int(generator.integers(len(scene.things)))
    thing = scene.things[place]
    other = _OTHER[thing.size]
    return Twins(
        question=f"what size is the {thing.noun}",
        first=thing.size,
        second=other,
        scene=scene.changed(place, size=other),
    )


def yes_no_question(scene: PhotoScene, generator: np.random.Generator, held_out: bool) -> Twins:
    """Whether a thing is there, or a relation holds: yes of one scene, no of its twin, which of them by a coin."""
    swap = generator.random() < 0.5
    if generator.random() < 0.5:
        place = int(generator.integers(len(scene.things)))
        other = _pick(in_place_of(scene, place, held_out=held_out), generator)
        twin = scene.changed(place, noun=other)
        question = f"is there {a(other if swap else scene.things[place].noun)}"
    else:
        first, second = _two(scene, generator)
        one, other_thing = scene.things[first], scene.things[second]
        relation = _pick(true_relations(one, other_thing), generator)
        names = (other_thing.noun, one.noun) if swap else (one.noun, other_thing.noun)
        question = f"is the {names[0]} {relation} the {names[1]}"
        twin = _exchanged(scene, first, second, "cell", "shift")
    answers = ("no", "yes") if swap else ("yes", "no")
    return Twins(question=question, first=answers[0], second=answers[1], scene=twin)


QUESTION_KINDS: dict[str, Rule] = {
    "where": where_question,
    "relation": relation_question,
    "count": count_question,
    "size": size_question,
    "yes_no": yes_no_question,
}
