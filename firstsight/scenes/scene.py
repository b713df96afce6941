"""Define and sample first-person scenes as data: which object is where, and what happens to it.

A scene is what a person looking down at a table sees: two hands reaching in from below, each holding an object or
nothing, and three places on the table, each with an object or nothing. An image shows one such state. A clip shows
one or more states in order, and an event leads from one to the next. Answers are derived from states and events
(`firstsight.scenes.templates`), and frames are drawn from them (`firstsight.scenes.rendering`); these two modules do
not depend on each other.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

KINDS = ("cup", "book", "bottle", "ball", "phone", "pan")
COLOURS = ("red", "green", "blue", "yellow")
HANDS = ("left hand", "right hand")
TABLE = ("left side", "front", "right side")
PLACES = HANDS + TABLE
# The kinds of event, in the past tense.
PICK, PUT, PUSH, PASS, SWAP = VERBS = ("picked up", "put down", "pushed", "passed", "swapped")

# Qwen2-VL merges frames in pairs, so each state is shown for one pair, which the model reads like an image.
FRAMES_A_STATE = 2

# The probability that a place holds an object, and that a clip has no event.
_FILLED = 0.6
_STILL = 0.12


@dataclass(frozen=True)
class Thing:
    """Name an object by its kind and its colour."""

    kind: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class State:
    """Hold the object at each of `PLACES`; None marks an empty place. No two objects share a kind."""

    things: Mapping[str, Thing | None]

    def __getitem__(self, place: str) -> Thing | None:
        return self.things[place]

    def present(self) -> dict[str, Thing]:
        """Return the places that are not empty, with their objects."""
        return {place: thing for place, thing in self.things.items() if thing}

    def place_of(self, kind: str) -> str | None:
        """Return the place of the object of this kind; None if there is none."""
        return next((place for place, thing in self.present().items() if thing.kind == kind), None)

    def absent(self) -> list[str]:
        """Return the kinds of which there is no object."""
        return [kind for kind in KINDS if self.place_of(kind) is None]


@dataclass(frozen=True)
class Move:
    """Describe an object's move from one place to another."""

    thing: Thing
    origin: str
    goal: str


@dataclass(frozen=True)
class Event:
    """Describe an event: one object moved to an empty place, or two objects that change places (`SWAP`)."""

    moves: tuple[Move, ...]

    @property
    def verb(self) -> str:
        if len(self.moves) == 2:
            return SWAP
        from_hand, to_hand = (place in HANDS for place in (self.moves[0].origin, self.moves[0].goal))
        return {(False, True): PICK, (True, False): PUT, (False, False): PUSH, (True, True): PASS}[from_hand, to_hand]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(move.thing.kind for move in self.moves)

    def after(self, state: State) -> State:
        emptied = {move.origin: None for move in self.moves}
        return State(dict(state.things) | emptied | {move.goal: move.thing for move in self.moves})


@dataclass(frozen=True)
class Scene:
    """Hold a first state and the events that follow: a clip, or an image of the first state alone."""

    first: State
    events: tuple[Event, ...] = ()
    clip: bool = False

    @property
    def states(self) -> tuple[State, ...]:
        states = [self.first]
        for event in self.events:
            states.append(event.after(states[-1]))
        return tuple(states)

    @property
    def last(self) -> State:
        return self.states[-1]

    def events_of(self, kind: str) -> tuple[Event, ...]:
        """Return the events that involve the object of this kind."""
        return tuple(event for event in self.events if kind in event.kinds)


def sample_scene(rng: random.Random, clip_fraction: float, max_clip_frames: int) -> Scene:
    """Return a random image or, with probability `clip_fraction`, a clip of at most `max_clip_frames` frames."""
    if rng.random() >= clip_fraction:
        return Scene(_sample_state(rng))
    most = max_clip_frames // FRAMES_A_STATE - 1
    count = 0 if rng.random() < _STILL else rng.randint(1, most)
    while True:
        first = _sample_state(rng)
        if (events := _sample_events(first, rng, count)) is not None:
            return Scene(first, events, clip=True)


def _sample_state(rng: random.Random) -> State:
    """Fill each place with the same probability; the kinds differ, so that "the cup" names one object."""
    kinds = rng.sample(KINDS, len(PLACES))
    colours = rng.choices(COLOURS, k=len(PLACES))
    filled = [rng.random() < _FILLED for _ in PLACES]
    rows = zip(PLACES, kinds, colours, filled, strict=True)
    return State({place: Thing(kind, colour) if full else None for place, kind, colour, full in rows})


def _sample_events(state: State, rng: random.Random, count: int) -> tuple[Event, ...] | None:
    """Return `count` events, evenly over verbs, none moving an object of the one before; None if none is possible."""
    events: list[Event] = []
    for _ in range(count):
        touched = events[-1].kinds if events else ()
        possible = [event for event in _possible(state) if not set(event.kinds) & set(touched)]
        if not possible:
            return None
        verb = rng.choice([verb for verb in VERBS if any(event.verb == verb for event in possible)])
        events.append(rng.choice([event for event in possible if event.verb == verb]))
        state = events[-1].after(state)
    return tuple(events)


def _possible(state: State) -> Iterator[Event]:
    """Yield every event that can happen next."""
    empty = [place for place in PLACES if not state[place]]
    for origin, thing in state.present().items():
        for goal in empty:
            yield Event((Move(thing, origin, goal),))
    left, right = (state[hand] for hand in HANDS)
    if left and right:
        yield Event((Move(left, *HANDS), Move(right, *reversed(HANDS))))


def describe(state: State) -> str:
    """Return a state in words, in a fixed order of places: a dense answer that teaches a model to see."""
    return ", ".join(f"{place} {thing or 'nothing'}" for place, thing in state.things.items())


def inventory(state: State) -> str:
    """Return each kind, in a fixed order, with colour and place or "none": a dense answer that teaches to search."""
    found = {thing.kind: f"{thing.colour} {place}" for place, thing in state.present().items()}
    return ", ".join(f"{kind} {found.get(kind, 'none')}" for kind in KINDS)


def narrate(scene: Scene) -> str:
    """Return all events in words, in order: a dense answer that teaches to see what happens."""
    told = [
        f"{event.verb} {move.thing} from {move.origin} to {move.goal}" for event in scene.events for move in event.moves
    ]
    return ", then ".join(told) or "nothing"
