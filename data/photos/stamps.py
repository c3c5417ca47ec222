"""The things of ``photo-scenes``: photographic cut-outs of Debian's package ``tuxpaint-stamps-default``, and their names.

This project holds the list, and none of the pictures, which are under GPL-2 and lie where the package puts them.
"""

from functools import cache
from pathlib import Path

from PIL import Image

from vlm_distill_cache.common.errors import DataError

STAMPS = Path("/usr/share/tuxpaint/stamps")  # of every Debian and Ubuntu
PACKAGE = "tuxpaint-stamps-default"
MOST_PIXELS = 160  # a side that is kept of a cut-out: twice the largest that is drawn
GROUPS = 11  # nouns of one group meet in held-out pictures only; a noun's group is its place in the list modulo this

_BIRDS = "animals/birds"
_MAMMALS = "animals/mammals"
_THINGS: tuple[tuple[str, ...], ...] = (  # a noun and its cut-outs
    ("owl", f"{_BIRDS}/owl"),
    ("penguin", f"{_BIRDS}/penguin", f"{_BIRDS}/magellanic_penguin", f"{_BIRDS}/little-penguin"),
    ("duck", f"{_BIRDS}/duck"),
    ("ostrich", f"{_BIRDS}/ostrich"),
    ("flamingo", f"{_BIRDS}/pink_flamingo"),
    ("rooster", f"{_BIRDS}/rooster"),
    ("toucan", f"{_BIRDS}/tucan"),
    ("pigeon", f"{_BIRDS}/pigeon"),
    ("parrot", f"{_BIRDS}/adelaide-rosella", f"{_BIRDS}/rainbow-lorikeet"),
    ("frog", "animals/amphibians/frog", "animals/amphibians/frog-1"),
    ("gorilla", f"{_MAMMALS}/apes/gorilla"),
    ("dolphin", f"{_MAMMALS}/aquatic/dolphin"),
    ("whale", f"{_MAMMALS}/aquatic/whale"),
    ("bear", f"{_MAMMALS}/bears/bear", f"{_MAMMALS}/bears/european-bear"),
    ("bison", f"{_MAMMALS}/bovines/bison"),
    ("cow", f"{_MAMMALS}/bovines/cow", f"{_MAMMALS}/bovines/cow_white"),
    ("goat", f"{_MAMMALS}/bovines/goat"),
    ("sheep", f"{_MAMMALS}/bovines/sheep"),
    ("camel", f"{_MAMMALS}/camel/camel", f"{_MAMMALS}/camel/dromedary"),
    ("lion", f"{_MAMMALS}/cats/lion-2", f"{_MAMMALS}/cats/lion"),
    ("tiger", f"{_MAMMALS}/cats/tiger", f"{_MAMMALS}/cats/tiger_sumatran"),
    ("deer", f"{_MAMMALS}/deer/deer", f"{_MAMMALS}/deer/wapiti", f"{_MAMMALS}/deer/doe"),
    ("dog", f"{_MAMMALS}/dogs/dog", f"{_MAMMALS}/dogs/dingo"),
    ("fox", f"{_MAMMALS}/dogs/fox"),
    ("elephant", f"{_MAMMALS}/elephant"),
    ("donkey", f"{_MAMMALS}/equines/donkey", f"{_MAMMALS}/equines/donkey_eating"),
    ("horse", f"{_MAMMALS}/equines/horse"),
    ("zebra", f"{_MAMMALS}/equines/zebra"),
    ("giraffe", f"{_MAMMALS}/giraffe"),
    ("pig", f"{_MAMMALS}/pig", f"{_MAMMALS}/pig_golden", f"{_MAMMALS}/pig_golden2"),
    ("rabbit", f"{_MAMMALS}/rodents/rabbit-2", f"{_MAMMALS}/rabbit_little"),
    ("squirrel", f"{_MAMMALS}/rodents/squirrel"),
    ("kangaroo", "animals/marsupials/kangaroo"),
    ("koala", "animals/marsupials/koala"),
    ("strawberry", "food/fruit/Strawberry2"),
    ("lemon", "food/fruit/lemon"),
    ("orange", "food/fruit/mandarine", "food/fruit/orange_seville"),
    ("broccoli", "food/vegetables/broccoli"),
    ("mushroom", "plants/mushrooms/cep-1", "plants/mushrooms/cep"),
    ("pepper", "food/vegetables/yellowpepper"),
    ("camera", "hobbies/camera_35mm"),
    ("trumpet", "hobbies/music/brass/trumpet"),
    ("drum", "hobbies/music/percussion/drum_tomtom_floor"),
    ("guitar", "hobbies/music/string/guitar_classical", "hobbies/music/string/guitar2"),
    ("violin", "hobbies/music/string/violin"),
    ("lightbulb", "household/Lightbulb"),
    ("mug", "household/dishes/mug"),
    ("kettle", "household/kettle"),
    ("toilet", "household/toilet"),
    ("hammer", "household/tools/hammer"),
    ("rose", "plants/flowers/rose"),
    ("daffodil", "plants/flowers/daffodil"),
    ("pinecone", "plants/trees/pinecone"),
    ("moon", "space/moon/moon_full"),
    ("globe", "space/planets/3_earth"),
    ("basketball", "sports/basketball"),
    ("trophy", "sports/trophy_cup"),
    ("mailbox", "town/usps_mailbox"),
    ("car", "vehicles/auto/sedan", "vehicles/auto/beetle"),
    ("truck", "vehicles/auto/truck"),
    ("tricycle", "vehicles/cycle/pink_tricycle"),
    ("balloon", "vehicles/flight/balloon360"),
    ("airplane", "vehicles/flight/planes/747"),
    ("bus", "vehicles/masstransit/green_korean_bus"),
    ("firetruck", "vehicles/emergency/firetruck"),
    ("wheel", "vehicles/wheel_tractor"),
)
CUT_OUTS: dict[str, tuple[str, ...]] = {noun: stems for noun, *stems in _THINGS}  # type: ignore[misc]
NOUNS = tuple(CUT_OUTS)
GROUP_OF = {noun: place % GROUPS for place, noun in enumerate(NOUNS)}
MEMBERS = tuple(NOUNS[group::GROUPS] for group in range(GROUPS))


def check_installed() -> None:
    """Refuse to go on without the cut-outs.

    Raises:
        DataError: Naming what installs them.
    """
    missing = [stem for stems in CUT_OUTS.values() for stem in stems if not (STAMPS / f"{stem}.png").is_file()]
    if missing:
        raise DataError(
            f"photo-scenes: {len(missing)} photographs are missing, the first of them {STAMPS / missing[0]}.png; they come "
            f"with a package of Debian and Ubuntu: sudo apt-get install {PACKAGE}"
        )


@cache
def cut_out(stem: str) -> Image.Image:
    """A thing without its margins: RGBA, at most `MOST_PIXELS` a side, colours weighted by their alpha.

    Raises:
        DataError: If the file is gone or no picture.
    """
    try:
        with Image.open(STAMPS / f"{stem}.png") as file:
            picture = file.convert("RGBA")
    except OSError as error:
        raise DataError(
            f"photo-scenes: {STAMPS / stem}.png cannot be read ({error}); sudo apt-get install --reinstall {PACKAGE}"
        ) from error
    picture = picture.crop(picture.getchannel("A").getbbox())
    picture.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
    return picture
