"""`Book`: which strategies of which rounds are asked, screened, evaluated and told.

No threads, no I/O: what `unicuco.search.drive` knows, and what follows from it. What this module
does not know: where evaluations run, and how they are recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from unicuco.search.screening import Screening
from unicuco.types import Ask, Outcome

# A strategy and the fidelity it is judged at: what has one record.
_Identity = tuple[str, int | None]
# A round, and a place in it: one strategy, or the alternatives of which one is judged on all text.
_Place = tuple[int, int]


class Book:
    """What is known of a run.

    Args:
        asks: recorded ones, by round and position, in each round alternatives first.
        results: recorded ones.
        num_evaluations: places to ask in all.
        lag: what ``ask(k)`` depends on: rounds up to k - lag.
        screening: chooses among alternatives; none: there are none.
    """

    def __init__(
        self,
        asks: Iterable[Ask],
        results: Iterable[tuple[Ask, Outcome]],
        num_evaluations: int,
        lag: int,
        screening: Screening | None = None,
    ) -> None:
        self._lag = lag
        self._screening = screening
        self.rounds: list[list[Ask]] = []  # as the search asked them
        self.num_evaluations = num_evaluations
        self.num_asked = 0  # places
        self.num_told = 0
        self.num_done = 0
        self.is_exhausted = False
        self.outcomes: dict[_Identity, Outcome] = {}
        self._promoted: list[list[Ask]] = []
        self._round_of: dict[_Identity, int] = {}
        self._places: list[set[_Place]] = []
        self._screened: dict[_Place, list[Ask]] = {}  # alternatives of which none is chosen yet
        self._touched: list[_Place] = []
        for ask in asks:
            self._add(ask)
        self.record(list(results))

    def is_short(self, round_size: int) -> bool:
        """Say whether the last round was cut short by an earlier, smaller total."""
        has_room = self.num_asked < self.num_evaluations
        return has_room and bool(self.rounds) and len(self._places[-1]) < round_size

    def may_ask(self, round_: int) -> bool:
        """Say whether a round is wanted, and what it depends on is told."""
        wanted = not self.is_exhausted and self.num_asked < self.num_evaluations
        return wanted and round_ <= self.num_told + self._lag - 1

    def accept(self, round_: int, asks: Sequence[Ask]) -> list[Ask]:
        """Take what is new of a round's asks, up to the total; return what to evaluate.

        A strategy that an earlier round asked at the same fidelity is dropped: it has its record.
        Of a round that is there in part, the rest is new, provided that the search asks the
        recorded part again.
        """
        assert all(ask.round == round_ for ask in asks), "a search numbers its asks"
        recorded = self.rounds[round_] if round_ < len(self.rounds) else []
        distinct = {_identity(ask): ask for ask in asks}
        fresh = [ask for key, ask in distinct.items() if self._round_of.get(key, round_) == round_]
        if fresh[: len(recorded)] != recorded:
            return []
        new = self._within_total(fresh[len(recorded) :])
        for ask in new:
            self._add(ask)
        self.is_exhausted = not new and not recorded
        return new

    def record(self, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Take outcomes."""
        for ask, outcome in results:
            self.outcomes[_identity(ask)] = outcome
            if self._is_screened(ask):
                self._touched.append(self._place(ask))
            else:
                self.num_done += 1

    def promote(self) -> list[Ask]:
        """Take and return what screening chose, of all alternatives that are judged by now."""
        chosen: list[Ask] = []
        for place in dict.fromkeys(self._touched):
            asks = self._screened.get(place, [])
            if not asks or any(_identity(ask) not in self.outcomes for ask in asks):
                continue
            assert self._screening is not None, "else nothing is screened"
            ask = self._screening.choose([(ask, self.outcomes[_identity(ask)]) for ask in asks])
            if ask is None or _identity(ask) in self._round_of:
                del self._screened[place]
                self.num_done += 1
            else:
                self._add(ask)
                chosen.append(ask)
        self._touched.clear()
        return chosen

    def unfinished(self) -> list[Ask]:
        """Return the asks without an outcome, in order."""
        return [
            ask
            for k in range(len(self.rounds))
            for ask in self._asks(k)
            if _identity(ask) not in self.outcomes
        ]

    def next_results(self) -> list[tuple[Ask, Outcome]] | None:
        """Return the next round to tell, in ask order; none while outcomes are missing."""
        if self.num_told >= len(self.rounds):
            return None
        asks = self._asks(self.num_told)
        if not all(_identity(ask) in self.outcomes for ask in asks):
            return None
        if any(round_ == self.num_told for round_, _ in self._screened):
            return None
        return [(ask, self.outcomes[_identity(ask)]) for ask in asks]

    def _asks(self, round_: int) -> list[Ask]:
        """Return a round's asks: the search's own, then those promoted, by place."""
        promoted = sorted(self._promoted[round_], key=lambda ask: ask.position)
        return [*self.rounds[round_], *promoted]

    def _add(self, ask: Ask) -> None:
        for _ in range(ask.round + 1 - len(self.rounds)):
            self.rounds.append([])
            self._promoted.append([])
            self._places.append(set())
        place = self._place(ask)
        if self._is_screened(ask):
            self._screened.setdefault(place, []).append(ask)
        is_promoted = ask.tokens is None and self._screened.pop(place, None) is not None
        (self._promoted if is_promoted else self.rounds)[ask.round].append(ask)
        self.num_asked += place not in self._places[ask.round]
        self._places[ask.round].add(place)
        self._round_of[_identity(ask)] = ask.round

    def _within_total(self, asks: Sequence[Ask]) -> list[Ask]:
        """Return the first of a round's new asks, of as many places as there is room for."""
        places = list(dict.fromkeys(map(self._place, asks)))
        kept = set(places[: self.num_evaluations - self.num_asked])
        return [ask for ask in asks if self._place(ask) in kept]

    def _place(self, ask: Ask) -> _Place:
        if self._screening is None:
            return ask.round, ask.position
        return ask.round, self._screening.place(ask)

    def _is_screened(self, ask: Ask) -> bool:
        return self._screening is not None and ask.tokens is not None


def _identity(ask: Ask) -> _Identity:
    return ask.strategy.key, ask.tokens
