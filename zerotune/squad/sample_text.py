"""What the articles of squad_sample.py are about: kinds of subjects, their facts, the words for them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """A relation: the kind of its value, sentences that state it ({v}) and questions that ask for it, of a subject.

    {It} and {it} are the subject in a sentence (its name, its noun or a pronoun), {s} its name."""

    value: str
    sentences: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """What an article can be about: the nouns of such subjects (of people: of their trades), openings, and facts."""

    nouns: tuple[str, ...]
    openings: tuple[str, ...]
    facts: tuple[Fact, ...]
    is_person: bool = False


def _items(text: str) -> tuple[str, ...]:
    return tuple(" ".join(item.split()) for item in text.split(","))


VALUES = {
    "year": tuple(str(year) for year in range(1712, 1990, 6)),
    "person": tuple(
        f"{first} {last}"
        for first in _items("Agnes, Martin, Clara, Henrik, Ruth, Tobias, Elin, Oscar, Nora, Felix, Ida, Simon")
        for last in _items("Calder, Moss, Lindqvist, Tarrant, Oakes, Brandt, Kerr, Voss, Hale, Sorley, Pym, Rook")
    ),
    "place": _items(
        """Selby, Ostra, Kelmar, Dunmore, Vardal, Tilney, Morwen, Askern, Ravel, Loxton, Brera, Halden, Corvo,
        Ellis Bay, Penrow, Stavel, Wexcombe, Arden, Fenwick, Ruan"""
    ),
    "material": _items("granite, brick, oak, limestone, iron, slate, marble, sandstone, concrete, pine, copper, glass"),
    "colour": _items("white, red, green, yellow, grey, blue, black, orange, brown, purple"),
    "size": tuple(f"{number} metres" for number in (9, 14, 22, 31, 40, 57, 63, 78, 95)),
    "distance": tuple(f"{number} miles" for number in (8, 12, 25, 34, 46, 51, 69, 72, 88)),
    "count": _items("six, seven, eleven, twelve, fifteen, nineteen, twenty, thirty, forty, sixty, eighty, ninety"),
    "goods": _items("coal, salt, timber, wool, tea, barley, apples, cheese, glassware, paper, wine, rope"),
    "animal": _items("trout, herons, otters, eels, owls, bats, geese, salmon, foxes, swans, hares, falcons"),
    "month": _items("January, March, April, May, June, July, August, September, October, November"),
    "tool": _items(
        "violin, telescope, printing press, pocket compass, cello, loom, plough, steam pump, flute, sextant"
    ),
}

BUILDING = Kind(
    _items("Bridge, Lighthouse, Mill, Library, Station, Observatory, Theatre, Granary"),
    ("{S} is a {noun} near {place}.", "{S} stands on a hill above {place}.", "{S} is one of the oldest in the county."),
    (
        Fact(
            "person",
            ("{It} was designed by {v}.", "The plans for {it} were drawn by {v}.", "Its architect was {v}."),
            ("Who designed {s}?", "Who was the architect of {s}?", "By whom was {s} designed?"),
        ),
        Fact(
            "person",
            ("{It} belongs to {v}.", "Since the war {it} has been owned by {v}.", "The present owner is {v}."),
            ("Who owns {s}?", "Who is the owner of {s}?", "To whom does {s} belong?"),
        ),
        Fact(
            "year",
            ("{It} was built in {v}.", "Building was completed in {v}.", "{It} opened to the public in {v}."),
            ("When was {s} built?", "In which year was {s} completed?", "When did {s} open?"),
        ),
        Fact(
            "year",
            ("{It} was damaged by fire in {v}.", "A fire in {v} destroyed part of the roof.", "Fire broke out in {v}."),
            ("When was {s} damaged by fire?", "In which year did fire break out at {s}?"),
        ),
        Fact(
            "material",
            ("{It} is made of {v}.", "The walls are of {v}.", "{It} was constructed from local {v}."),
            ("What is {s} made of?", "Which material was used for {s}?", "From what was {s} constructed?"),
        ),
        Fact(
            "size",
            ("{It} is {v} high.", "{It} reaches a height of {v}.", "Its height is {v}."),
            ("How high is {s}?", "What is the height of {s}?"),
        ),
        Fact(
            "colour",
            ("{It} is painted {v}.", "Its doors are painted {v}.", "Visitors know {it} by its {v} doors."),
            ("What colour are the doors of {s}?", "In which colour is {s} painted?"),
        ),
    ),
)
SHIP = Kind(
    _items("Ferry, Schooner, Trawler, Steamer"),
    ("{S} is a {noun} from {place}.", "{S} sailed out of {place} for a generation.", "{S} was a well known {noun}."),
    (
        Fact(
            "year",
            ("{It} was launched in {v}.", "The launch took place in {v}.", "{It} first put to sea in {v}."),
            ("When was {s} launched?", "In which year did {s} first put to sea?"),
        ),
        Fact(
            "year",
            ("{It} sank in {v}.", "{It} was lost in a storm in {v}.", "A storm in {v} sent {it} to the bottom."),
            ("When did {s} sink?", "In which year was {s} lost?"),
        ),
        Fact(
            "person",
            ("Her first captain was {v}.", "{It} was commanded by {v}.", "{v} was the captain for years."),
            ("Who was the captain of {s}?", "Who commanded {s}?"),
        ),
        Fact(
            "goods",
            ("{It} carried {v}.", "Her usual cargo was {v}.", "Most of her trade was in {v}."),
            ("What did {s} carry?", "What was the cargo of {s}?"),
        ),
        Fact(
            "count",
            ("{It} had a crew of {v}.", "{v} sailors made up the crew.", "The crew numbered {v}."),
            ("How many sailors did {s} have?", "How large was the crew of {s}?"),
        ),
        Fact(
            "size",
            ("{It} measured {v} from end to end.", "Her length was {v}.", "{It} was {v} long."),
            ("How long was {s}?", "What was the length of {s}?"),
        ),
    ),
)
WATER = Kind(
    _items("River, Canal, Brook, Lake"),
    ("{S} is a {noun} in the west.", "{S} lies between two ranges of hills.", "{S} gave its name to the county."),
    (
        Fact(
            "place",
            ("{It} rises near {v}.", "Its source is close to {v}.", "{It} begins at {v}."),
            ("Where does {s} rise?", "Where is the source of {s}?", "Where does {s} begin?"),
        ),
        Fact(
            "place",
            ("{It} meets the sea at {v}.", "Its mouth is at {v}.", "{It} ends at {v}."),
            ("Where does {s} meet the sea?", "Where is the mouth of {s}?"),
        ),
        Fact(
            "distance",
            ("{It} is {v} long.", "From end to end {it} measures {v}.", "Its length is {v}."),
            ("How long is {s}?", "What is the length of {s}?"),
        ),
        Fact(
            "animal",
            ("{It} is known for its {v}.", "Its banks are home to {v}.", "Many come to see the {v}."),
            ("Which animals is {s} known for?", "What lives on the banks of {s}?"),
        ),
        Fact(
            "person",
            ("{It} was first mapped by {v}.", "{v} drew the first map of {it}.", "The first survey was made by {v}."),
            ("Who first mapped {s}?", "Who made the first survey of {s}?"),
        ),
        Fact(
            "year",
            ("{It} last froze in {v}.", "In {v} {it} froze from bank to bank.", "The hard winter of {v} froze {it}."),
            ("When did {s} freeze?", "In which year did {s} last freeze?"),
        ),
    ),
)
FESTIVAL = Kind(
    _items("Fair, Festival, Regatta, Market"),
    ("{S} is held every year.", "{S} draws visitors from abroad.", "{S} is the best known of its kind."),
    (
        Fact(
            "month",
            ("{It} takes place in {v}.", "{It} opens in {v}.", "The date is the first Sunday in {v}."),
            ("In which month does {s} take place?", "When in the year is {s} held?"),
        ),
        Fact(
            "person",
            ("{It} was founded by {v}.", "The founder was {v}.", "{v} began {it} with a few friends."),
            ("Who founded {s}?", "Who was the founder of {s}?"),
        ),
        Fact(
            "year",
            ("{It} was first held in {v}.", "{It} dates from {v}.", "The first one took place in {v}."),
            ("When was {s} first held?", "From which year does {s} date?"),
        ),
        Fact(
            "goods",
            ("{It} is famous for its {v}.", "Most stalls sell {v}.", "People come to buy {v}."),
            ("What is sold at {s}?", "What is {s} famous for?"),
        ),
        Fact(
            "count",
            ("{It} lasts {v} days.", "{v} days pass before it closes.", "{It} goes on for {v} days."),
            ("How many days does {s} last?", "For how many days does {s} go on?"),
        ),
    ),
)
PERSON = Kind(
    _items("painter, botanist, engineer, composer, astronomer, printer"),
    ("{S} was a {noun}.", "{S} was a {noun} of great patience.", "{S} is remembered as a {noun}."),
    (
        Fact(
            "place",
            ("{It} was born in {v}.", "The family came from {v}.", "{It} grew up in {v}."),
            ("Where was {s} born?", "Where did {s} grow up?", "Where did the family of {s} come from?"),
        ),
        Fact(
            "place",
            ("{It} worked in {v}.", "Most of the work was done in {v}.", "{It} had a workshop in {v}."),
            ("Where did {s} work?", "Where was the workshop of {s}?"),
        ),
        Fact(
            "year",
            ("{It} died in {v}.", "A fever ended this life in {v}.", "{It} was buried in {v}."),
            ("When did {s} die?", "In which year was {s} buried?"),
        ),
        Fact(
            "person",
            ("{It} was a pupil of {v}.", "Lessons with {v} came first.", "{It} learned the trade from {v}."),
            ("Who taught {s}?", "Whose pupil was {s}?", "From whom did {s} learn the trade?"),
        ),
        Fact(
            "tool",
            ("{It} owned a {v}.", "{It} never travelled without a {v}.", "A {v} was among the few belongings."),
            ("What did {s} own?", "What did {s} never travel without?"),
        ),
        Fact(
            "count",
            ("{It} had {v} students.", "{It} taught {v} students.", "In all {v} students came."),
            ("How many students did {s} have?", "How many students did {s} teach?"),
        ),
    ),
    is_person=True,
)
KINDS = (BUILDING, SHIP, WATER, FESTIVAL, PERSON)
BEGINNINGS = _items("Har, Brent, Ol, Wes, Mar, Stan, Kirk, Thorn, Ash, Dun, El, Rad, Fal, Gren, Hol, Lin")
ENDINGS = _items("wick, ford, ley, mere, ton, dale, by, stead, combe, well, more, den")
