"""First-person scenes whose truth is known, as data: what is where, and what is done with it.

A scene is what a person looking down at a table sees: two hands reaching in from below, each holding an object or
nothing, and three places on the table, each with an object or nothing. An image shows one such state; a clip goes
through up to four of them, and what leads from one to the next is an event. Answers are read off these states and
events (`firstsight.scenes.templates`), and pictures drawn from them (`firstsight.scenes.rendering`): neither knows of
the other.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

KINDS = ("cup", "book", "bottle", "ball", "phone", "pan")
COLOURS = ("red", "green", "blue", "yellow")
HANDS = ("left hand", "right hand")
TABLE = ("left side", "front", "right side")
PLACES = HANDS + TABLE
# What can be done, as it is told afterwards.
PICK, PUT, PUSH, PASS, SWAP = VERBS = ("picked up", "put down", "pushed", "passed", "swapped")

# Qwen2-VL merges frames in pairs, so a state is on show for one pair, and is seen as a picture of it would be.
FRAMES_A_STATE = 2

_FILLED = 0.6
_STILL = 0.12


@dataclass(frozen=True)
class Thing:
    """An object: its kind and its colour, by name."""

    kind: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class State:
    """What lies where. Every one of `PLACES` is a key; None marks an empty place. No two things share a kind."""

    things: Mapping[str, Thing | None]

    def __getitem__(self, place: str) -> Thing | None:
        return self.things[place]

    def present(self) -> dict[str, Thing]:
        """The places that are not empty, with what is there."""
        return {place: thing for place, thing in self.things.items() if thing}

    def place_of(self, kind: str) -> str | None:
        """Where the thing of this kind is; None if there is none."""
        return next((place for place, thing in self.present().items() if thing.kind == kind), None)

    def absent(self) -> list[str]:
        """The kinds that are not there."""
        return [kind for kind in KINDS if self.place_of(kind) is None]


@dataclass(frozen=True)
class Move:
    thing: Thing
    origin: str
    goal: str


@dataclass(frozen=True)
class Event:
    """Something done: one thing moved to an empty place, or two that change places (`SWAP`)."""

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
    """An image of one state, or a clip: its first state and the events that follow."""

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
        """What is done with the thing of this kind."""
        return tuple(event for event in self.events if kind in event.kinds)


def sample_scene(rng: random.Random, clip_fraction: float, max_clip_frames: int) -> Scene:
    """An image, or with probability `clip_fraction` a clip of at most `max_clip_frames` frames."""
    if rng.random() >= clip_fraction:
        return Scene(_sample_state(rng))
    most = max_clip_frames // FRAMES_A_STATE - 1
    count = 0 if rng.random() < _STILL else rng.randint(1, most)
    while True:
        first = _sample_state(rng)
        if (events := _sample_events(first, rng, count)) is not None:
            return Scene(first, events, clip=True)


def _sample_state(rng: random.Random) -> State:
    """Each place is filled with the same probability; kinds differ, so that "the cup" names one thing."""
    kinds = rng.sample(KINDS, len(PLACES))
    colours = rng.choices(COLOURS, k=len(PLACES))
    filled = [rng.random() < _FILLED for _ in PLACES]
    rows = zip(PLACES, kinds, colours, filled, strict=True)
    return State({place: Thing(kind, colour) if full else None for place, kind, colour, full in rows})


def _sample_events(state: State, rng: random.Random, count: int) -> tuple[Event, ...] | None:
    """So many events, drawn evenly over what can be done, none undoing the one before; None if they run out."""
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
    empty = [place for place in PLACES if not state[place]]
    for origin, thing in state.present().items():
        for goal in empty:
            yield Event((Move(thing, origin, goal),))
    left, right = (state[hand] for hand in HANDS)
    if left and right:
        yield Event((Move(left, *HANDS), Move(right, *reversed(HANDS))))


def describe(state: State) -> str:
    """A state in words, in a fixed order of places: the dense answer from which a model learns to see."""
    return ", ".join(f"{place} {thing or 'nothing'}" for place, thing in state.things.items())


def inventory(state: State) -> str:
    """Every kind, in a fixed order, with its colour and place or none: the dense answer that teaches to search."""
    found = {thing.kind: f"{thing.colour} {place}" for place, thing in state.present().items()}
    return ", ".join(f"{kind} {found.get(kind, 'none')}" for kind in KINDS)


def narrate(scene: Scene) -> str:
    """All events in words, in order: the dense answer that teaches to see what happens."""
    told = [
        f"{event.verb} {move.thing} from {move.origin} to {move.goal}" for event in scene.events for move in event.moves
    ]
    return ", then ".join(told) or "nothing"
