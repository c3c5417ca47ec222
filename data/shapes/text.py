"""What can be said about a scene: captions, questions, and captions that are almost true.

All functions are pure: a scene and a generator in, text out, or None where the scene does not allow
that kind. A caption is true when every object it names is there and, in a relation caption, the
first lies strictly left of / right of / above / below the second by column or row. Wrong captions
are false by that reading, have the words and length of the right one, and both sides are drawn from
the same distribution as far as the kind allows, so that text alone tells nothing.

Source:
    The kinds of hard negatives: SugarCrepe (arXiv:2306.14610), section 4. What differs: in SugarCrepe
    ``add_*`` lengthens only the wrong caption, which a language prior sees; here both captions get
    an addition, and only one of the additions is true.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from vlm_distill_cache.data.shapes.scene import COLORS, SHAPES, SIZES, Scene, SceneObject

RELATIONS = ("left of", "right of", "above", "below")
CAPTION_QUESTIONS = ("", "describe the image")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}

T = TypeVar("T")
Pair = tuple[str, str]  # (question, answer) or (right caption, wrong caption)
Rule = Callable[[Scene, np.random.Generator], Pair | None]


def relation_holds(first: SceneObject, relation: str, second: SceneObject) -> bool:
    """Tell whether ``first relation second`` is true, by strict order of columns or rows."""
    if relation in ("right of", "below"):
        first, second = second, first
    return first.column < second.column if relation in ("left of", "right of") else first.row < second.row


def _pick(items: Sequence[T], generator: np.random.Generator) -> T:
    return items[int(generator.integers(len(items)))]


def _shuffled(scene: Scene, generator: np.random.Generator) -> list[SceneObject]:
    return [scene.objects[i] for i in generator.permutation(len(scene.objects)).tolist()]


def _true_relations(first: SceneObject, second: SceneObject) -> list[str]:
    return [relation for relation in RELATIONS if relation_holds(first, relation, second)]


def _listed(*nouns: str) -> str:
    return " and ".join(f"a {noun}" for noun in nouns)


def _absent(scene: Scene) -> list[str]:
    nouns = scene.nouns
    return [f"{color} {shape}" for color in COLORS for shape in SHAPES if f"{color} {shape}" not in nouns]


# Captions ---------------------------------------------------------------------------------------


def list_caption(scene: Scene, generator: np.random.Generator) -> str:
    """Name two or three objects, one of them sometimes with its size."""
    things = _shuffled(scene, generator)[: 3 if generator.random() < 0.3 else 2]
    nouns = [thing.noun for thing in things]
    if len(things) == 2 and generator.random() < 0.7:
        sized = int(generator.integers(2))
        nouns[sized] = f"{things[sized].size} {nouns[sized]}"
    return _listed(*nouns)


def relation_caption(scene: Scene, generator: np.random.Generator) -> str:
    """Relate two objects by one of the relations that hold."""
    first, second = _shuffled(scene, generator)[:2]
    return f"a {first.noun} {_pick(_true_relations(first, second), generator)} a {second.noun}"


# Questions: one rule a kind, each returns (question, answer) ------------------------------------


def location_question(scene: Scene, generator: np.random.Generator) -> Pair:
    """Where a named object is: ``c2 r4`` is the second column, fourth row."""
    thing = _pick(scene.objects, generator)
    return f"where is the {thing.noun}", thing.cell_name


def attribute_question(scene: Scene, generator: np.random.Generator) -> Pair | None:
    """The colour of the only circle, or the shape of the only red object."""
    ask_color = generator.random() < 0.5
    for thing in _shuffled(scene, generator):
        key = thing.shape if ask_color else thing.color
        if sum(key in (other.shape, other.color) for other in scene.objects) == 1:
            if ask_color:
                return f"what color is the {thing.shape}", thing.color
            return f"what shape is the {thing.color} object", thing.shape
    return None


def size_question(scene: Scene, generator: np.random.Generator) -> Pair:
    """Small or large."""
    thing = _pick(scene.objects, generator)
    return f"what size is the {thing.noun}", thing.size


def relation_question(scene: Scene, generator: np.random.Generator) -> Pair | None:
    """Colour or shape of the only object that lies left of / above / ... a named one."""
    anchor, relation = _pick(scene.objects, generator), _pick(RELATIONS, generator)
    found = [thing for thing in scene.objects if relation_holds(thing, relation, anchor)]
    if len(found) != 1:
        return None
    if generator.random() < 0.5:
        return f"what color is the object {relation} the {anchor.noun}", found[0].color
    return f"what shape is the object {relation} the {anchor.noun}", found[0].shape


def side_question(scene: Scene, generator: np.random.Generator) -> Pair | None:
    """Which of two opposite sides one object is on."""
    first, second = _shuffled(scene, generator)[:2]
    if generator.random() < 0.5:
        if first.column == second.column:
            return None
        answer = "left" if first.column < second.column else "right"
        return f"is the {first.noun} left or right of the {second.noun}", answer
    if first.row == second.row:
        return None
    return (
        f"is the {first.noun} above or below the {second.noun}",
        "above" if first.row < second.row else "below",
    )


def count_question(scene: Scene, generator: np.random.Generator) -> Pair:
    """How many objects, of any kind, of one colour or of one shape; 0 is a possible answer."""
    kind = generator.random()
    if kind < 0.3:
        return "how many objects are there", str(len(scene.objects))
    thing = _pick(scene.objects, generator)
    if kind < 0.65:
        color = thing.color if generator.random() < 0.75 else _pick(COLORS, generator)
        return f"how many {color} objects are there", str(sum(o.color == color for o in scene.objects))
    shape = thing.shape if generator.random() < 0.75 else _pick(SHAPES, generator)
    return f"how many {PLURALS[shape]} are there", str(sum(o.shape == shape for o in scene.objects))


def yes_no_question(scene: Scene, generator: np.random.Generator) -> Pair:
    """Existence or relation; half the answers are yes, and a no is nearly true where it can be."""
    truth = generator.random() < 0.5
    if generator.random() < 0.5:
        things = _shuffled(scene, generator)
        if truth:
            return f"is there a {things[0].noun}", "yes"
        crossed = f"{things[0].color} {things[1].shape}"  # both words are true of the picture
        noun = crossed if crossed not in scene.nouns else _pick(_absent(scene), generator)
        return f"is there a {noun}", "no"
    first, second = _shuffled(scene, generator)[:2]
    relation = _pick([r for r in RELATIONS if relation_holds(first, r, second) == truth], generator)
    return f"is the {first.noun} {relation} the {second.noun}", "yes" if truth else "no"


QUESTION_KINDS: dict[str, Rule] = {
    "attribute": attribute_question,
    "relation": relation_question,
    "side": side_question,
    "count": count_question,
    "size": size_question,
    "yes_no": yes_no_question,
    "location": location_question,
}


# Two captions, one true: each returns (right, wrong) ---------------------------------------------


def swap_att(scene: Scene, generator: np.random.Generator) -> Pair | None:
    """Exchange the colours of two objects."""
    first, second = _shuffled(scene, generator)[:2]
    if first.color == second.color or first.shape == second.shape:
        return None
    swapped = (f"{second.color} {first.shape}", f"{first.color} {second.shape}")
    if scene.nouns.intersection(swapped):  # stricter than needed: nothing of the wrong caption is true
        return None
    return _listed(first.noun, second.noun), _listed(*swapped)


def swap_obj(scene: Scene, generator: np.random.Generator) -> Pair:
    """Exchange the two objects of a relation."""
    first, second = _shuffled(scene, generator)[:2]
    relation = _pick(_true_relations(first, second), generator)
    return f"a {first.noun} {relation} a {second.noun}", f"a {second.noun} {relation} a {first.noun}"


def _replace(scene: Scene, generator: np.random.Generator, rename: Callable[[SceneObject], list[str]]) -> Pair | None:
    """Rename one of two listed objects to something that is absent."""
    things = _shuffled(scene, generator)[:2]
    place = int(generator.integers(2))
    choices = [noun for noun in rename(things[place]) if noun not in scene.nouns]
    if not choices:
        return None
    nouns = [thing.noun for thing in things]
    right = _listed(*nouns)
    nouns[place] = _pick(choices, generator)
    return right, _listed(*nouns)


def replace_att(scene: Scene, generator: np.random.Generator) -> Pair | None:
    """Replace one colour."""
    return _replace(scene, generator, lambda thing: [f"{color} {thing.shape}" for color in COLORS])


def replace_obj(scene: Scene, generator: np.random.Generator) -> Pair | None:
    """Replace one shape."""
    return _replace(scene, generator, lambda thing: [f"{thing.color} {shape}" for shape in SHAPES])


def replace_rel(scene: Scene, generator: np.random.Generator) -> Pair:
    """Replace a relation by one that does not hold."""
    first, second = _shuffled(scene, generator)[:2]
    true = _true_relations(first, second)
    right = _pick(true, generator)
    wrong = _pick([relation for relation in RELATIONS if relation not in true], generator)
    return f"a {first.noun} {right} a {second.noun}", f"a {first.noun} {wrong} a {second.noun}"


def add_obj(scene: Scene, generator: np.random.Generator) -> Pair | None:
    """Add a third object: one that is there, or one that is not."""
    things = _shuffled(scene, generator)
    if len(things) < 3:
        return None
    base = [thing.noun for thing in things[:2]]
    return _listed(*base, things[2].noun), _listed(*base, _pick(_absent(scene), generator))


def add_att(scene: Scene, generator: np.random.Generator) -> Pair:
    """Add a size: the true one, or the other one."""
    things = _shuffled(scene, generator)[:2]
    place = int(generator.integers(2))
    captions = []
    for size in sorted(SIZES, key=lambda size: size != things[place].size):  # the true one first
        nouns = [thing.noun for thing in things]
        nouns[place] = f"{size} {nouns[place]}"
        captions.append(_listed(*nouns))
    return captions[0], captions[1]


PAIR_KINDS: dict[str, Rule] = {
    "swap_att": swap_att,
    "swap_obj": swap_obj,
    "replace_att": replace_att,
    "replace_obj": replace_obj,
    "replace_rel": replace_rel,
    "add_obj": add_obj,
    "add_att": add_att,
}
