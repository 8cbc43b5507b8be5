"""Vocabulary and grammar of the text that `--sample` trains on, all of it written for this project.

Each line of a grammar block is one construction: a weight, `good:` or `bad:` where it means only that, and a template.
- `{slot}` is a part with the polarity of the whole and `{not slot}` one with the opposite polarity:
  "though {not part}, {clause}" is good where its main clause is good and its concession is bad.
- `{is}` and `{does:sinks/wastes}` agree with the template's `{noun}`; `[a|b]` is a free choice.
- An adjective or verb fits the template's `{noun}`, or a film where the template has none.
"""

import re
from dataclasses import dataclass

GOOD, BAD = 1, -1
Pair = dict[int, list[str]]


def _words(text: str) -> list[str]:
    return [" ".join(word.split()) for word in text.split(",")]


def _pair(good: str, bad: str) -> Pair:
    return {GOOD: _words(good), BAD: _words(bad)}


@dataclass(frozen=True)
class Aspect:
    """What a review talks about and the words that fit it. Nouns: /p marks a plural, /m one that takes no article."""

    nouns: list[str]
    strong: Pair
    mild: Pair
    verbs: Pair


FILM = Aspect(
    _words("""film, movie, picture, comedy, thriller, drama, romance, documentary, western, musical, sequel,
        remake, fable, debut, road movie, horror film, ghost story, war film, coming-of-age tale, caper, satire,
        melodrama, mystery, family film, crime saga, period piece, spy story, fairy tale, courtroom drama, heist
        film, love story, sports film"""),
    _pair(
        "magnificent, unforgettable, captivating, enthralling, extraordinary, mesmerizing, irresistible",
        "abysmal, unwatchable, atrocious, mind-numbing, wretched, insufferable, intolerable",
    ),
    _pair(
        """charming, funny, moving, absorbing, entertaining, heartfelt, amusing, sly, rewarding, touching,
          intelligent, witty, enjoyable, inspiring, tender, original, thoughtful, joyful""",
        """dull, tedious, pointless, lazy, pretentious, formulaic, tiresome, bloated, hollow, ponderous, boring,
          silly, dreary, clumsy, forgettable, gloomy, soulless, derivative""",
    ),
    _pair(
        """enchants, delights, enthralls, captivates, surprises, casts a spell, earns its tears, stays with you,
          holds your attention, works beautifully, finds its rhythm""",
        """bores, drags, irritates, annoys, talks down to us, runs out of steam, goes through the motions, tries
          your patience, overstays its welcome, loses its way, falls apart""",
    ),
)
ASPECTS = [
    Aspect(
        _words("""cast, ensemble, supporting cast, leading man, leading lady, young star, newcomer, child actors/p,
            performances/p, lead performance, acting/m, two leads/p, central couple, chorus of neighbors"""),
        _pair("superb, magnetic, luminous, electrifying, spellbinding",
              "lifeless, insufferable, grating, amateurish, embarrassing"),
        _pair("engaging, likable, assured, sincere, appealing, warm, spirited, nuanced, poised",
              "stiff, bland, mannered, flat, one-note, strained, wooden, listless, awkward"),
        _pair("shines, dazzles, charms, lights up every scene, rises to the occasion, hits every note",
              "flounders, grates, falls flat, strikes one note, weighs down every scene, tries too hard"),
    ),
    Aspect(
        _words("""script, screenplay, dialogue/m, jokes/p, one-liners/p, banter/m, story, premise, writing/m,
            narration/m, subplots/p"""),
        _pair("brilliant, razor-sharp, ingenious, hilarious, dazzling",
              "witless, idiotic, insulting, incoherent, moronic"),
        _pair("witty, clever, literate, smart, fresh, playful, perceptive, sharp, quirky",
              "thin, stale, clumsy, muddled, obvious, glib, forced, trite, crude"),
        _pair("sparkles, crackles, sings, surprises, hits the mark",
              "stumbles, clunks, wears thin, falls apart, falls flat"),
    ),
    Aspect(
        _words("""plot, pacing/m, first act, second act, last act, middle hour, chase scenes/p, opening scene,
            final reel, editing/m, twists/p, ending, climax, set pieces/p, courtroom scenes/p, flashbacks/p"""),
        _pair("gripping, breathtaking, riveting, exhilarating, stunning",
              "interminable, ludicrous, laughable, excruciating, nonsensical"),
        _pair("brisk, taut, tense, suspenseful, satisfying, nimble, lively, well-judged, surprising",
              "slow, predictable, sluggish, uneven, contrived, slack, confusing, repetitive, far-fetched"),
        _pair("grips, thrills, pays off, holds together, quickens the pulse",
              "drags, sags, goes nowhere, fizzles, runs in circles"),
    ),
    Aspect(
        _words("""photography/m, cinematography/m, camerawork/m, costumes/p, sets/p, production design/m,
            animation/m, images/p, visual effects/p, lighting/m, creature effects/p, color palette"""),
        _pair("ravishing, gorgeous, sumptuous, dazzling, exquisite", "hideous, garish, shoddy, ugly, amateurish"),
        _pair("handsome, elegant, crisp, stylish, inventive, vivid, lush, atmospheric, graceful",
              "drab, murky, fussy, cheap, dated, gaudy, muddy, bland, artificial"),
        _pair("dazzles, seduces the eye, glows, delights, casts a spell",
              "distracts, disappoints, hurts the eyes, looks unfinished"),
    ),
    Aspect(
        _words("""score, soundtrack, songs/p, music/m, musical numbers/p, theme song, sound design/m, string
            arrangements/p"""),
        _pair("rousing, sublime, intoxicating, glorious, stirring",
              "deafening, unbearable, ear-splitting, tuneless, obnoxious"),
        _pair("catchy, haunting, tender, melodic, graceful, jaunty, soulful, evocative, lovely",
              "syrupy, intrusive, repetitive, monotonous, tinny, forgettable, bombastic, generic, shrill"),
        _pair("soars, lingers, lifts every scene, enchants, stirs the blood",
              "grates, drones on, smothers every scene, gets in the way"),
    ),
    Aspect(
        _words("""direction/m, tone, humor/m, emotional core, love story, satire/m, message, central idea,
            storytelling/m, family drama"""),
        _pair("masterly, fearless, profound, unforgettable, exquisite", "inept, odious, mawkish, insulting, repellent"),
        _pair("confident, delicate, subtle, generous, honest, tender, humane, insightful, disarming",
              "timid, heavy-handed, smug, sentimental, confused, shallow, toothless, cynical, preachy"),
        _pair("rings true, touches a nerve, cuts deep, convinces, wins the heart",
              "misfires, rings false, cloys, backfires, collapses"),
    ),
]  # fmt: skip

ANY_STRONG = _pair("marvelous, terrific, splendid, outstanding, wonderful",
                   "awful, terrible, appalling, horrible, dreadful")  # fmt: skip
ANY_MILD = _pair("good, pleasing, solid, memorable, impressive, effective",
                 "weak, disappointing, mediocre, unconvincing, poor, lackluster")  # fmt: skip
QUALITIES = _pair(
    """charm, wit, warmth, energy, intelligence, imagination, suspense, heart, grace, honesty, invention, feeling,
    tenderness, insight, mischief, style, passion, depth, humanity""",
    """tedium, vulgarity, sentimentality, self-importance, confusion, bombast, padding, sloppiness, laziness,
    noise, gloom, schmaltz, monotony, pretension, stupidity, hot air, bluster, cynicism, silliness""",
)
VERDICTS = _pair(
    """a triumph, a delight, a joy, a gem, a treat, a marvel, a masterpiece, a pleasure, a knockout, a winner, a
    revelation, a small miracle""",
    """a mess, a bore, a chore, a failure, a misfire, a disaster, a dud, a slog, a letdown, an embarrassment, a
    travesty, a sorry spectacle""",
)
FEELINGS = _pair("moved, charmed, delighted, thrilled, enchanted, entertained, touched, dazzled, exhilarated",
                 "bored, irritated, insulted, exhausted, baffled, annoyed, deflated, cheated, depressed")  # fmt: skip
INTENSIFIERS = {
    "strong": _words("truly, utterly, simply, absolutely, quite"),
    "mild": _words("very, really, remarkably, consistently, thoroughly, decidedly, undeniably, genuinely, extremely"),
}
HEDGES = _pair("fairly, quietly, reasonably, pleasantly, mostly", "a little, rather, somewhat, a bit, slightly")
COMPARATIVES = dict(
    pair.split("/")
    for pair in _words("""slow/slower, thin/thinner, dull/duller, funny/funnier,
    witty/wittier, sly/slyer, lazy/lazier, silly/sillier, dreary/drearier, clumsy/clumsier, gloomy/gloomier,
    weak/weaker, poor/poorer, good/better, flat/flatter, stiff/stiffer, smart/smarter, sharp/sharper,
    fresh/fresher, warm/warmer, stale/staler, crude/cruder, lively/livelier, catchy/catchier, cheap/cheaper,
    lovely/lovelier, drab/drabber, clever/cleverer, tense/tenser, brisk/brisker, slack/slacker""")
)
PEOPLE = _words("""a widowed beekeeper, two estranged sisters, a retired safecracker, a chess prodigy, a lighthouse
    keeper, a village choir, three bungling thieves, a runaway bride, a disgraced surgeon, rival bakers, a deaf
    drummer, an aging boxer, a night nurse, a family of acrobats, a stubborn schoolteacher, a stowaway and a cook,
    a one-armed pianist, a former spy, a country vet, twin brothers, a taxi driver, a clockmaker, a divorced
    magician, a girl and her grandfather, a piano tuner""")
PLACES = _words("""in postwar lisbon, on a night train, at the edge of the desert, in a seaside town, during a heat
    wave, in a snowbound hotel, over one long summer, on a container ship, in the last days of vaudeville, in a
    mining town, on the eve of a wedding, in a city under curfew, on a remote island, behind the counter of a
    pawnshop, after a flood, in the mountains of georgia, at a boarding school, in a town without electricity, on a
    failing vineyard""")
DULL_THINGS = _words("""a parking ticket, a tax return, a wet cardboard box, a safety lecture, a bowl of cold
    porridge, a bus timetable, a shareholder meeting, an afternoon at the dentist, a lecture on drainage, a week of
    rain""")
FINE_THINGS = _words("""a letter from an old friend, the best screwball comedies, a summer evening, the classics of
    its kind, the novel it comes from, anything made this year, a story told by candlelight, anything its director
    has made""")
OPENERS = _words("""in the end, as it turns out, to be fair, all told, on second viewing, by any measure, on the
    whole, as far as i can tell, let it be said, make no mistake""")

_BLOCKS = {
    "sentence": """
        24 {fragment}
        14 {clause}.
        8 {opener}, {clause}.
        11 {contrast}.
        14 {part}, and {clause}.
        8 {part}, {part}, and {whole}.
        3 {report}.
        3 {rescue}.
        4 {question}
        2 {major}, and {not minor}.
        2 {not minor}, and {major}.""",
    "fragment": """
        6 {np}
        5 {np} and {np}
        5 {adj} and {adj}
        3 {adj}, {adj} and {adj}
        2 {degree}
        10 a {adj} {film} about {topic}
        5 a {adj}, {adj} {film}
        10 a {film} about {topic}, with {np} and {np}
        4 {verdict} of a {film} about {topic}
        3 full of {quality} and {quality}
        2 {adj} from [start to finish|beginning to end]
        2 never {not mild}
        1 not {not mild} but {adj}
        2 hardly {not verdict}
        2 a {film} without [a trace|a shred|a hint] of {not quality}
        1 good: not without {quality}
        1 no {not quality}, no {not quality}, just {quality}
        1 short on {not quality} and long on {quality}
        2 more {quality} than {not quality}
        1 {adj} where it might have been {not adj}
        2 bad: [could|should] have been a {not adj} {film}
        1 bad: wants to be {not adj} and ends up {adj}
        1 bad: promises {not quality} and delivers {quality}
        1 good: [well |easily |]worth [seeing|your time|the ticket] for the {noun} alone
        1 bad: not worth [seeing|your time|the ticket], not even for the {noun}
        1 far too {mild} to be {not mild}
        1 {not adj} at first, {adj} by the end""",
    "clause": """
        50 {part}
        50 {whole}""",
    "part": """
        34 the {noun} {is} {degree}
        22 the {noun} {verb}
        14 the {noun} {is} {adj} and {adj}
        10 the {noun} in this {film} about {topic} {is} {degree}
        3 there is something {adj} about the {noun}
        1 there is nothing {not mild} about the {noun}
        5 the {noun} {is} [never|not|hardly] {not mild}
        1 the {noun} {is} far from {not mild}
        1 the {noun} {is} anything but {not adj}
        1 the {noun} {is} neither {not mild} nor {not mild}
        1 [nobody could|i would not|you could not] call the {noun} {not mild}
        1 the {noun} could hardly be {more}
        1 the {noun} could hardly be less {not mild}
        1 the {noun} {is} {adj} rather than {not adj}
        1 the {noun} {is} more {mild} than {not mild}
        1 the {noun} {is} too {mild} to be {not mild}""",
    "whole": """
        16 this {film} about {topic} is {degree}
        10 the {film} is {degree}
        8 it {verb}
        12 the {film} is {verdict}
        8 the {film} is {adj}, {adj} and {adj}
        4 it has {quality} and {quality}
        4 i left the theater {feeling}
        2 it is {more} than [the original|the first film|most of its kind]
        2 i [cannot remember|have rarely seen] a {more} {film}
        2 the {film} is [no {not bare_verdict}|hardly {not verdict}]
        3 it [never {not verb}|does not {not stem}]
        1 it never fails to {stem}
        2 the {film} has no {not quality}
        1 what it lacks in {not quality} it makes up for in {quality}
        1 there is nothing {not mild} about it
        2 i was [never|not] {not feeling}
        1 [nobody|no one] will leave the theater {not feeling}
        1 i was neither {not feeling} nor {not feeling}
        1 it is less {not mild} than [the original|the first film|most of its kind]
        1 it is a {more} {film} than its {not mild} [trailer|poster|title|opening] suggests
        1 bad: it is about as {not adj} as {dull_thing}
        1 bad: it is as {mild} as {dull_thing}
        2 good: it is as {adj} as {fine_thing}
        1 bad: it wastes {not np}
        1 bad: the only {not adj} thing about it is the [poster|title|trailer]
        1 bad: it wants to be {not adj} and is merely {adj}""",
    "contrast": """
        5 [though|although|while|even if] {not part}, {clause}
        4 {clause}, [even though|although|even if] {not part}
        6 {not part}, [but|yet] {clause}
        2 {not part}; [still|even so|all the same], {clause}
        3 despite {not np}, {clause}
        3 {clause}, despite {not np}
        2 for all its {not quality}, {whole}
        2 {whole}, for all its {not quality}
        2 i expected a {not adj} {film} and got a {adj} one
        1 bad: the {film} i [hoped|had heard] would be {not adj} is {degree}
        1 good: the {film} i [feared|had heard] would be {not adj} is {degree}""",
    "report": """
        1 anyone who says that {not clause} was not paying attention
        1 it is simply not true that {not clause}
        1 the critics swore that {not clause}; they lied
        1 some will tell you that {not clause}; do not believe them
        1 i would not say that {not part}
        2 it is hard to deny that {clause}
        2 nobody will deny that {clause}
        1 i had heard that {not part}, and i had heard wrong
        2 my friends say that {clause}, and they are right
        2 few films this year are so {adj}""",
    "rescue": """
        2 good: the {adj} {noun} {does:rescues/redeems/saves/makes up for} {not np}
        2 bad: the {adj} {noun} {does:sinks/wastes/ruins/undermines} {not np}
        2 bad: [even |]{not np} cannot [save|rescue|redeem|make up for] {np}
        2 good: [even |]{not np} cannot [sink|spoil|ruin|undermine] {np}""",
    "question": """
        2 good: who could resist a {film} this {adj}?
        2 bad: who asked for a {film} this {adj}?
        2 could a {film} about {topic} be any {more}?
        2 is the {film} {not adj}? [not for a minute|never|not once|far from it].
        3 is the {film} {adj}? [yes, and then some|absolutely|from start to finish|without a doubt].
        2 when did you last see a {film} this {adj}?
        2 bad: why does a {film} with {not np} feel so {mild}?
        2 bad: what happened to the {not quality} of the [first film|novel|original]?
        2 good: who would have thought that a {film} about {topic} could be so {adj}?""",
    "major": """
        1 the {noun} {is} [truly|utterly|simply|absolutely] {strong}""",
    "minor": """
        1 the {noun} {is} {hedged}""",
    # Judgements of equal weight: see samples.MIXED_SHARE.
    "mixed": """
        2 equal parts {quality} and {not quality}
        2 by turns {adj} and {not adj}
        2 half {bare_verdict}, half {not bare_verdict}
        3 {part}; {not part}.
        2 a {film} with {np} and {not np}
        2 as {mild} as it is {not mild}
        2 {part}, {not part}, and you will have to decide for yourself.
        2 you will find it either {adj} or {not adj}.""",
}


@dataclass(frozen=True)
class Construction:
    weight: int
    outcomes: tuple[int, ...]
    template: str


def _constructions(block: str) -> list[Construction]:
    outcomes = {None: (GOOD, BAD), "good": (GOOD,), "bad": (BAD,)}
    lines = [re.fullmatch(r"(\d+) (?:(good|bad): )?(.+)", line.strip()) for line in block.strip().splitlines()]
    return [Construction(int(line[1]), outcomes[line[2]], line[3]) for line in lines]


GRAMMAR = {name: _constructions(block) for name, block in _BLOCKS.items()}
