"""Titles of works that do not exist: the words of a genre, and names that are each made up once."""

import numpy as np


class Genre:
    """The words that give a genre away in a title."""

    def __init__(self, name: str, adjectives: str, nouns: str) -> None:
        self.name = name
        self.adjectives = adjectives.split()
        self.nouns = nouns.split()


# No word stands in two genres: a title's words tell its genre to a reader and to a model.
GENRES = (
    Genre(
        "sea",
        "Crimson Drowned Salted Windward Stormbound Tidal",
        "Harbor Lighthouse Captain Anchor Reef Voyage Mariner Schooner",
    ),
    Genre(
        "space",
        "Orbital Lunar Stellar Weightless Galactic Solar",
        "Comet Starship Nebula Android Planet Eclipse Signal Satellite",
    ),
    Genre(
        "western",
        "Dusty Lonesome Rawhide Untamed Sunburnt Outlawed",
        "Saddle Canyon Sheriff Mustang Prairie Revolver Stagecoach Rancher",
    ),
    Genre(
        "romance",
        "Tender Unspoken Velvet Longing Rosy Beloved",
        "Letters Wedding Kiss Sweetheart Bouquet Waltz Promise Valentine",
    ),
    Genre(
        "horror",
        "Haunted Bloodless Cursed Screaming Buried Unholy",
        "Crypt Phantom Coffin Asylum Vampire Séance Graveyard Nightmare",
    ),
    Genre(
        "crime",
        "Forged Crooked Silent Guilty Perfect Hidden",
        "Alibi Detective Heist Witness Verdict Informant Ransom Burglar",
    ),
    Genre(
        "fantasy",
        "Enchanted Dragonborn Runic Moonlit Elven Thousandfold",
        "Sorcerer Throne Amulet Griffin Prophecy Kingdom Spellbook Unicorn",
    ),
    Genre(
        "comedy",
        "Clumsy Hilarious Overbooked Wobbly Absurd Cheerful",
        "Dentist Neighbours Honeymoon Babysitter Sandwich Clown Landlord Karaoke",
    ),
)

_ONSETS = ("B", "Br", "C", "D", "Dr", "F", "G", "H", "J", "K", "L", "M", "N", "P", "R", "S", "T", "V", "W", "Z")
_VOWELS = ("a", "e", "i", "o", "u", "ae", "ia")
_MIDDLES = ("l", "r", "n", "m", "v", "d", "th", "s", "nd", "rl", "ss", "lv")
_ENDINGS = ("a", "en", "or", "is", "o", "ith", "une", "el", "ar", "ys", "ow", "ade")
_FIRST_YEAR, _LAST_YEAR = 1950, 2020


def invent_titles(genre_of_item: np.ndarray, rng: np.random.Generator) -> list[str]:
    """Return one unique title an item, as in "The Crimson Harbor of Velmora (1987)".

    Every title holds at least one word of its genre, and most hold a name that hardly any other title has: as in
    a real catalogue, the words that predict taste are among words that predict nothing.
    """
    taken: set[str] = set()
    return [_invent(GENRES[genre], rng, taken) for genre in genre_of_item]


def _invent(genre: Genre, rng: np.random.Generator, taken: set[str]) -> str:
    year = rng.integers(_FIRST_YEAR, _LAST_YEAR, endpoint=True)
    while True:
        adjective, noun, name = rng.choice(genre.adjectives), rng.choice(genre.nouns), _name(rng)
        forms = (
            f"The {adjective} {noun} of {name}",
            f"{name} and the {adjective} {noun}",
            f"The {noun} of {name}",
            f"{adjective} {name}",
            f"The {adjective} {noun}",
        )
        title = f"{rng.choice(forms)} ({year})"
        if title not in taken:
            taken.add(title)
            return title


def _name(rng: np.random.Generator) -> str:
    sounds = [rng.choice(part) for part in (_ONSETS, _VOWELS, _MIDDLES, _VOWELS, _MIDDLES, _ENDINGS)]
    # Two lengths of name, so that they do not all share one rhythm.
    return "".join(sounds if rng.random() < 0.5 else [*sounds[:3], sounds[5]])
