"""Make questions about rendered scenes from templates, with answers derived from a scene's states and events.

To add a template:
1. Write a function that takes a `Scene` and yields each (question, answer) of the new form that the scene determines,
   as `_colour_of_kind` does; or reuse one, such as `_at` or `_count`.
2. Add a `Template` with a new name to `_ALL`, and all possible answers as `choices` if it may be multiple choice.
3. If some scenes cannot answer it, add an `UNANSWERABLE` template with the same words, as `_of_absent` does.
4. Work out an answer by hand for each new template, and add it to `EXPECTED` in tests/test_scenes.py.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import combinations, permutations
from operator import attrgetter

from firstsight.core.params import TEMPLATE_TYPES
from firstsight.scenes.scene import (
    COLOURS,
    HANDS,
    KINDS,
    PASS,
    PICK,
    PLACES,
    PUSH,
    PUT,
    SWAP,
    TABLE,
    Event,
    Scene,
    State,
    Thing,
)

HELD, POSITION, COLOUR, COUNT, COMPARISON, PRESENCE, CHANGE, ORDER, UNANSWERABLE = TEMPLATE_TYPES
IMAGE, CLIP = False, True
CANNOT_TELL, NOTHING = "cannot tell", "nothing"
NUMBERS = ("zero", "one", "two", "three", "four", "five")
MOST_OPTIONS = 4

Pairs = Iterator[tuple[str, str]]
_FIRST, _LAST = attrgetter("first"), attrgetter("last")


@dataclass(frozen=True)
class Template:
    """Define a form of question.

    `pairs` yields (question, answer) for every question of this form that a scene determines. `clip` says whether it is
    about clips or images. If there are `choices`, it may be asked as multiple choice with options sampled from them.
    """

    name: str
    question_type: str
    clip: bool
    pairs: Callable[[Scene], Pairs]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """Hold a question made from a template; `answer` is the answer's text, not a letter, even if there are options."""

    template: Template
    question: str
    answer: str
    options: tuple[str, ...]


class Draw:
    """Draw questions so that types, the templates of a type and the answers of a template are equally frequent.

    The type, template and answer used least so far come first, as far as the scenes allow, so a scene's questions
    depend on the scenes before it. An answer that more than half of a template's questions have is not drawn, so that
    guessing the most frequent answer scores low; unanswerable questions have only one answer and are exempt.

    Args:
        types: the question types that are drawn.
    """

    def __init__(self, types: Collection[str] = TEMPLATE_TYPES) -> None:
        self._among = [template for template in TEMPLATES.values() if template.question_type in types]
        self._types: Counter[str] = Counter()
        self._templates: Counter[str] = Counter()
        self._answers: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def questions(self, scene: Scene, rng: random.Random, count: int, option_fraction: float) -> list[Drawn]:
        """Return up to `count` questions of different templates, multiple choice with probability `option_fraction`."""
        waiting = [template for template in self._among if template.clip == scene.clip]
        rng.shuffle(waiting)
        drawn: list[Drawn] = []
        while waiting and len(drawn) < count:
            template = min(waiting, key=lambda one: (self._types[one.question_type], self._templates[one.name]))
            waiting.remove(template)
            if found := self._pair(template, scene, rng):
                self._types[template.question_type] += 1
                self._templates[template.name] += 1
                self._answers[template.name][found[1]] += 1
                drawn.append(Drawn(template, *found, _options(template, found[1], rng, option_fraction)))
        return drawn

    def _pair(self, template: Template, scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        given = self._answers[template.name]
        pairs = list(template.pairs(scene))
        if template.question_type != UNANSWERABLE:
            pairs = [pair for pair in pairs if 2 * given[pair[1]] <= given.total()]
        least = min((given[answer] for _, answer in pairs), default=0)
        pairs = [pair for pair in pairs if given[pair[1]] == least]
        return rng.choice(pairs) if pairs else None


def _options(template: Template, answer: str, rng: random.Random, fraction: float) -> tuple[str, ...]:
    if not template.choices or rng.random() >= fraction:
        return ()
    others = [choice for choice in template.choices if choice != answer]
    options = [answer, *rng.sample(others, min(rng.randint(1, MOST_OPTIONS - 1), len(others)))]
    rng.shuffle(options)
    return tuple(options)


def template_of(record_id: str) -> str:
    """Return the template's name from a record's id: held-left for scene-000123-held-left."""
    return record_id.split("-", 2)[2]


# Held object and position, in images.


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def _kind(thing: Thing | None) -> str:
    return thing.kind if thing else NOTHING


def _where(place: str) -> str:
    """Return a place as a question words it, such as "in your left hand"."""
    if place in HANDS:
        return f"in your {place}"
    return "in front of you" if place == "front" else f"on the {place} of the table"


def _at(place: str) -> Callable[[Scene], Pairs]:
    """Ask which object is at a place."""

    def pairs(scene: Scene) -> Pairs:
        yield f"What is {_where(place)}?", _kind(scene.first[place])

    return pairs


def _holding(scene: Scene) -> Pairs:
    for kind in KINDS:
        yield f"Do you hold a {kind}?", _yes(scene.first.place_of(kind) in HANDS)


def _which_hand(scene: Scene) -> Pairs:
    for place, thing in scene.first.present().items():
        yield f"Which hand holds the {thing.kind}?", place if place in HANDS else "neither"


def _what_else(scene: Scene) -> Pairs:
    for hand, other in permutations(HANDS):
        if thing := scene.first[hand]:
            yield f"What else do you hold besides the {thing.kind}?", _kind(scene.first[other])


def _empty_hand(scene: Scene) -> Pairs:
    for hand in HANDS:
        yield f"Is your {hand} empty?", _yes(not scene.first[hand])


def _location(scene: Scene) -> Pairs:
    for place, thing in scene.first.present().items():
        yield f"Where is the {thing.kind}?", place


def _side(scene: Scene) -> Pairs:
    for place, thing in scene.first.present().items():
        if place != "front":
            yield f"Is the {thing.kind} on your left or on your right?", place.split()[0]


def _hand_or_table(scene: Scene) -> Pairs:
    for place, thing in scene.first.present().items():
        yield f"Is the {thing.kind} in your hand or on the table?", "hand" if place in HANDS else "table"


def _neighbour(side: str, places: tuple[str, ...], neighbours: tuple[str, ...]) -> Callable[[Scene], Pairs]:
    """Ask what is next to an object on the table, for each of `places` and its neighbour on that side."""

    def pairs(scene: Scene) -> Pairs:
        for place, neighbour in zip(places, neighbours, strict=True):
            if thing := scene.first[place]:
                yield f"What is just {side} of the {thing.kind} on the table?", _kind(scene.first[neighbour])

    return pairs


def _lies_there(scene: Scene) -> Pairs:
    for place in TABLE:
        for thing in scene.first.present().values():
            yield f"Is the {thing.kind} {_where(place)}?", _yes(scene.first[place] == thing)


# Colour, count, comparison and presence, in images.


def _colour_of_kind(scene: Scene) -> Pairs:
    for thing in scene.first.present().values():
        yield f"What colour is the {thing.kind}?", thing.colour


def _colour_at(place: str) -> Callable[[Scene], Pairs]:
    def pairs(scene: Scene) -> Pairs:
        if thing := scene.first[place]:
            yield f"What colour is the thing {_where(place)}?", thing.colour

    return pairs


def _only(colour: str, state: State) -> Thing | None:
    """Return the object of this colour if there is exactly one, else None."""
    found = [thing for thing in state.present().values() if thing.colour == colour]
    return found[0] if len(found) == 1 else None


def _which_is_coloured(scene: Scene) -> Pairs:
    for colour in COLOURS:
        if thing := _only(colour, scene.first):
            yield f"Which thing is {colour}?", thing.kind


def _is_coloured(scene: Scene) -> Pairs:
    for thing in scene.first.present().values():
        for colour in COLOURS:
            yield f"Is the {thing.kind} {colour}?", _yes(thing.colour == colour)


def _count(question: str, places: tuple[str, ...]) -> Callable[[Scene], Pairs]:
    def pairs(scene: Scene) -> Pairs:
        yield question, NUMBERS[_filled(scene.first, places)]

    return pairs


def _filled(state: State, places: tuple[str, ...]) -> int:
    return sum(state[place] is not None for place in places)


def _count_empty_hands(scene: Scene) -> Pairs:
    yield "How many of your hands are empty?", NUMBERS[len(HANDS) - _filled(scene.first, HANDS)]


def _coloured(state: State, colour: str) -> int:
    return sum(thing.colour == colour for thing in state.present().values())


def _count_coloured(scene: Scene) -> Pairs:
    for colour in COLOURS:
        yield f"How many {colour} things can you see?", NUMBERS[_coloured(scene.first, colour)]


def _more(first: int, second: int, names: tuple[str, str]) -> str:
    return "same" if first == second else names[first < second]


def _hands_or_table(scene: Scene) -> Pairs:
    counts = _filled(scene.first, HANDS), _filled(scene.first, TABLE)
    yield "Are there more things in your hands or on the table?", _more(*counts, ("hands", "table"))


def _left_or_right(scene: Scene) -> Pairs:
    left, right = (_filled(scene.first, (f"{side} hand", f"{side} side")) for side in ("left", "right"))
    yield "Are there more things on your left or on your right?", _more(left, right, ("left", "right"))


def _more_coloured(scene: Scene) -> Pairs:
    for pair in permutations(COLOURS, 2):
        first, second = (_coloured(scene.first, colour) for colour in pair)
        yield "Are there more {} or more {} things?".format(*pair), _more(first, second, pair)


def _same_colour(scene: Scene) -> Pairs:
    for one, other in permutations(scene.first.present().values(), 2):
        yield f"Are the {one.kind} and the {other.kind} of the same colour?", _yes(one.colour == other.colour)


def _matching(scene: Scene) -> Pairs:
    things = list(scene.first.present().values())
    for thing in things:
        found = [other.kind for other in things if other != thing and other.colour == thing.colour]
        if len(found) < 2:
            yield f"What has the same colour as the {thing.kind}?", found[0] if found else NOTHING


def _column(place: str) -> int:
    return ("left", "front", "right").index(place.split()[0])


def _further_left(scene: Scene) -> Pairs:
    for (place, thing), (elsewhere, other) in permutations(scene.first.present().items(), 2):
        if _column(place) != _column(elsewhere):
            left = thing if _column(place) < _column(elsewhere) else other
            yield f"Which is further left, the {thing.kind} or the {other.kind}?", left.kind


def _see_thing(scene: Scene) -> Pairs:
    things = set(scene.first.present().values())
    for kind in KINDS:
        for colour in COLOURS:
            thing = Thing(kind, colour)
            # Without things of which neither kind nor colour is there: these are too easy to deny.
            if thing in things or kind not in scene.first.absent() or _coloured(scene.first, colour):
                yield f"Do you see a {thing}?", _yes(thing in things)


def _see_kind(scene: Scene) -> Pairs:
    for kind in KINDS:
        yield f"Is there a {kind}?", _yes(kind not in scene.first.absent())


def _see_colour(scene: Scene) -> Pairs:
    for colour in COLOURS:
        yield f"Is anything {colour}?", _yes(bool(_coloured(scene.first, colour)))


def _on_table(scene: Scene) -> Pairs:
    for kind in KINDS:
        yield f"Is there a {kind} on the table?", _yes(scene.first.place_of(kind) in TABLE)


def _place_filled(scene: Scene) -> Pairs:
    for place in TABLE:
        yield f"Is there anything {_where(place)}?", _yes(scene.first[place] is not None)


# What changed, in clips.


def _told(event: Event) -> str:
    if event.verb == SWAP:
        return "swapped hands"
    return f"{event.verb} the {event.moves[0].thing.kind}"


def _changed(scene: Scene) -> Pairs:
    yield "Did anything change?", _yes(bool(scene.events))


def _what_moved(scene: Scene) -> Pairs:
    moved = {kind for event in scene.events for kind in event.kinds}
    if len(moved) <= 1:
        yield "What did you move?", moved.pop() if moved else NOTHING


def _did_move(scene: Scene) -> Pairs:
    for thing in scene.first.present().values():
        yield f"Did the {thing.kind} move?", _yes(bool(scene.events_of(thing.kind)))


def _moved_where(state: Callable[[Scene], State], question: str) -> Callable[[Scene], Pairs]:
    """Ask where an object that moved was in that state of the clip."""

    def pairs(scene: Scene) -> Pairs:
        for thing in scene.first.present().values():
            if scene.events_of(thing.kind) and (place := state(scene).place_of(thing.kind)):
                yield question.format(thing.kind), place

    return pairs


# What was done with one object, as in "you picked it up".
_DONE_WITH = {PICK: "picked it up", PUT: "put it down", PUSH: "pushed it", PASS: "passed it", SWAP: "swapped it"}


def _done_with(scene: Scene) -> Pairs:
    for thing in scene.first.present().values():
        events = scene.events_of(thing.kind)
        if len(events) <= 1:
            yield f"What did you do with the {thing.kind}?", _DONE_WITH[events[0].verb] if events else NOTHING


def _done(verb: str, question: str) -> Callable[[Scene], Pairs]:
    """Ask which object was picked up, or put down."""

    def pairs(scene: Scene) -> Pairs:
        found = [event.kinds[0] for event in scene.events if event.verb == verb]
        if len(found) <= 1:
            yield question, found[0] if found else NOTHING

    return pairs


def _hand_used(scene: Scene) -> Pairs:
    for event in scene.events:
        (move, *_), kind = event.moves, event.kinds[0]
        if event.verb in (PICK, PUT) and len([one for one in scene.events_of(kind) if one.verb == event.verb]) == 1:
            hand = move.goal if event.verb == PICK else move.origin
            yield f"With which hand did you {'pick up' if event.verb == PICK else 'put down'} the {kind}?", hand


def _more_held(scene: Scene) -> Pairs:
    counts = _filled(scene.last, HANDS), _filled(scene.first, HANDS)
    yield "Do you hold more or fewer things at the end?", _more(*counts, ("more", "fewer"))


def _colour_moved(scene: Scene) -> Pairs:
    moved = {move.thing for event in scene.events for move in event.moves}
    if len(moved) == 1:
        yield "What colour is the thing that you moved?", moved.pop().colour


# Order of events, in clips.


def _then_at(state: Callable[[Scene], State], places: tuple[str, ...], question: str) -> Callable[[Scene], Pairs]:
    """Ask which object was at each of `places` in that state of the clip."""

    def pairs(scene: Scene) -> Pairs:
        for place in places:
            yield question.format(_where(place)), _kind(state(scene)[place])

    return pairs


def _singly(scene: Scene) -> bool:
    """Return whether there are two or more events and each moves a single object, a different one each time."""
    kinds = [kind for event in scene.events for kind in event.kinds]
    return len(scene.events) > 1 and len(kinds) == len(set(kinds)) == len(scene.events)


def _moved_nth(number: int, question: str) -> Callable[[Scene], Pairs]:
    def pairs(scene: Scene) -> Pairs:
        if _singly(scene):
            yield question, scene.events[number].kinds[0]

    return pairs


def _did_nth(number: int, question: str) -> Callable[[Scene], Pairs]:
    def pairs(scene: Scene) -> Pairs:
        if len(scene.events) > 1:
            yield question, _told(scene.events[number])

    return pairs


def _moved_sooner(scene: Scene) -> Pairs:
    if _singly(scene):
        for first, second in combinations([event.kinds[0] for event in scene.events], 2):
            yield f"Which did you move first, the {first} or the {second}?", first
            yield f"Which did you move first, the {second} or the {first}?", first


def _moved_before(scene: Scene) -> Pairs:
    if _singly(scene):
        for first, second in combinations([event.kinds[0] for event in scene.events], 2):
            yield f"Did you move the {first} before the {second}?", "yes"
            yield f"Did you move the {second} before the {first}?", "no"


def _count_moved(scene: Scene) -> Pairs:
    if not any(event.verb == SWAP for event in scene.events):
        moved = {kind for event in scene.events for kind in event.kinds}
        yield "How many things did you move?", NUMBERS[len(moved)]


# Unanswerable questions: about absent objects, in the words of questions about present ones, or about what no image
# shows.


def _of_absent(*questions: str) -> Callable[[Scene], Pairs]:
    def pairs(scene: Scene) -> Pairs:
        for kind in scene.first.absent():
            for question in questions:
                yield question.format(kind), CANNOT_TELL

    return pairs


def _of_present(*questions: str) -> Callable[[Scene], Pairs]:
    def pairs(scene: Scene) -> Pairs:
        for thing in scene.first.present().values():
            for question in questions:
                yield question.format(thing.kind), CANNOT_TELL

    return pairs


def _out_of_sight(*questions: str) -> Callable[[Scene], Pairs]:
    def pairs(scene: Scene) -> Pairs:
        for question in questions:
            yield question, CANNOT_TELL

    return pairs


def _colour_of_nothing(scene: Scene) -> Pairs:
    for place in PLACES:
        if not scene.first[place]:
            yield f"What colour is the thing {_where(place)}?", CANNOT_TELL


def _compared_with_absent(scene: Scene) -> Pairs:
    for thing in scene.first.present().values():
        for kind in scene.first.absent():
            for pair in permutations((thing.kind, kind)):
                yield "Are the {} and the {} of the same colour?".format(*pair), CANNOT_TELL
                yield "Which is further left, the {} or the {}?".format(*pair), CANNOT_TELL


def _never_done(scene: Scene) -> Pairs:
    for kind in scene.first.absent():
        yield f"What did you do with the {kind}?", CANNOT_TELL
        yield f"Where did the {kind} go?", CANNOT_TELL


_THINGS = (*KINDS, NOTHING)
_ACTS = ("swapped hands", *(f"{verb} the {kind}" for verb in (PICK, PUT, PUSH, PASS) for kind in KINDS))

_ALL = (
    Template("held-left", HELD, IMAGE, _at("left hand"), _THINGS),
    Template("held-right", HELD, IMAGE, _at("right hand"), _THINGS),
    Template("holding", HELD, IMAGE, _holding),
    Template("which-hand", HELD, IMAGE, _which_hand, (*HANDS, "neither")),
    Template("what-else", HELD, IMAGE, _what_else, _THINGS),
    Template("empty-hand", HELD, IMAGE, _empty_hand),
    Template("at-left", POSITION, IMAGE, _at("left side"), _THINGS),
    Template("at-front", POSITION, IMAGE, _at("front"), _THINGS),
    Template("at-right", POSITION, IMAGE, _at("right side"), _THINGS),
    Template("location", POSITION, IMAGE, _location, PLACES),
    Template("left-or-right", POSITION, IMAGE, _side),
    Template("hand-or-table", POSITION, IMAGE, _hand_or_table),
    Template("neighbour-right", POSITION, IMAGE, _neighbour("right", TABLE[:-1], TABLE[1:]), _THINGS),
    Template("neighbour-left", POSITION, IMAGE, _neighbour("left", TABLE[1:], TABLE[:-1]), _THINGS),
    Template("lies-there", POSITION, IMAGE, _lies_there),
    Template("colour-of-kind", COLOUR, IMAGE, _colour_of_kind, COLOURS),
    Template("colour-left-hand", COLOUR, IMAGE, _colour_at("left hand"), COLOURS),
    Template("colour-right-hand", COLOUR, IMAGE, _colour_at("right hand"), COLOURS),
    Template("colour-left", COLOUR, IMAGE, _colour_at("left side"), COLOURS),
    Template("colour-front", COLOUR, IMAGE, _colour_at("front"), COLOURS),
    Template("colour-right", COLOUR, IMAGE, _colour_at("right side"), COLOURS),
    Template("which-is-coloured", COLOUR, IMAGE, _which_is_coloured, KINDS),
    Template("is-coloured", COLOUR, IMAGE, _is_coloured),
    Template("count-table", COUNT, IMAGE, _count("How many things are on the table?", TABLE), NUMBERS[:4]),
    Template("count-held", COUNT, IMAGE, _count("How many things do you hold?", HANDS), NUMBERS[:3]),
    Template("count-all", COUNT, IMAGE, _count("How many things can you see?", PLACES), NUMBERS),
    Template("count-empty-hands", COUNT, IMAGE, _count_empty_hands, NUMBERS[:3]),
    Template("count-coloured", COUNT, IMAGE, _count_coloured, NUMBERS),
    Template("more-hands-table", COMPARISON, IMAGE, _hands_or_table),
    Template("more-left-right", COMPARISON, IMAGE, _left_or_right),
    Template("more-coloured", COMPARISON, IMAGE, _more_coloured),
    Template("same-colour", COMPARISON, IMAGE, _same_colour),
    Template("matching", COMPARISON, IMAGE, _matching, _THINGS),
    Template("further-left", COMPARISON, IMAGE, _further_left),
    Template("see-thing", PRESENCE, IMAGE, _see_thing),
    Template("see-kind", PRESENCE, IMAGE, _see_kind),
    Template("see-colour", PRESENCE, IMAGE, _see_colour),
    Template("on-table", PRESENCE, IMAGE, _on_table),
    Template("place-filled", PRESENCE, IMAGE, _place_filled),
    Template("absent-colour", UNANSWERABLE, IMAGE, _of_absent("What colour is the {}?", "Is the {} red?")),
    Template("absent-location", UNANSWERABLE, IMAGE, _of_absent("Where is the {}?")),
    Template("absent-side", UNANSWERABLE, IMAGE, _of_absent("Is the {} on your left or on your right?")),
    Template("absent-place", UNANSWERABLE, IMAGE, _of_absent("Is the {} in your hand or on the table?")),
    Template("absent-compared", UNANSWERABLE, IMAGE, _compared_with_absent),
    Template("colour-of-nothing", UNANSWERABLE, IMAGE, _colour_of_nothing),
    Template("out-of-sight", UNANSWERABLE, IMAGE, _out_of_sight("What is behind you?", "What is under the table?")),
    Template("owner", UNANSWERABLE, IMAGE, _of_present("Who owns the {}?", "How old is the {}?")),
    Template("changed", CHANGE, CLIP, _changed),
    Template("what-moved", CHANGE, CLIP, _what_moved, _THINGS),
    Template("did-move", CHANGE, CLIP, _did_move),
    Template("moved-to", CHANGE, CLIP, _moved_where(_LAST, "Where did the {} go?"), PLACES),
    Template("moved-from", CHANGE, CLIP, _moved_where(_FIRST, "Where did the {} come from?"), PLACES),
    Template("done-with", CHANGE, CLIP, _done_with, (*_DONE_WITH.values(), NOTHING)),
    Template("picked-up", CHANGE, CLIP, _done(PICK, "What did you pick up?"), _THINGS),
    Template("put-down", CHANGE, CLIP, _done(PUT, "What did you put down?"), _THINGS),
    Template("hand-used", CHANGE, CLIP, _hand_used, HANDS),
    Template("more-held", CHANGE, CLIP, _more_held),
    Template("colour-moved", CHANGE, CLIP, _colour_moved, COLOURS),
    Template("first-moved", ORDER, CLIP, _moved_nth(0, "What did you move first?"), KINDS),
    Template("last-moved", ORDER, CLIP, _moved_nth(-1, "What did you move last?"), KINDS),
    Template("first-act", ORDER, CLIP, _did_nth(0, "What did you do first?"), _ACTS),
    Template("last-act", ORDER, CLIP, _did_nth(-1, "What did you do last?"), _ACTS),
    Template("moved-sooner", ORDER, CLIP, _moved_sooner),
    Template("moved-before", ORDER, CLIP, _moved_before),
    Template("count-moved", CHANGE, CLIP, _count_moved, NUMBERS[:4]),
    Template("held-at-first", ORDER, CLIP, _then_at(_FIRST, HANDS, "What was {} at first?"), _THINGS),
    Template("held-at-end", ORDER, CLIP, _then_at(_LAST, HANDS, "What was {} at the end?"), _THINGS),
    Template("lay-at-first", ORDER, CLIP, _then_at(_FIRST, TABLE, "What was {} at first?"), _THINGS),
    Template("lay-at-end", ORDER, CLIP, _then_at(_LAST, TABLE, "What was {} at the end?"), _THINGS),
    Template("absent-moved", UNANSWERABLE, CLIP, _never_done),
    Template("next", UNANSWERABLE, CLIP, _out_of_sight("What will you do next?", "Who is with you?")),
)
TEMPLATES = {template.name: template for template in _ALL}
