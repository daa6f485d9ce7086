"""What ratings do to one call: its thresholds, a prompt that is blocked, an answer that is cut off."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from tunesmith import protos
from tunesmith.caller import Caller
from tunesmith.errors import InvalidArgument
from tunesmith.safety.base import CATEGORIES, HARM, Probabilities, Rater, category

_TAKEN = (*CATEGORIES, category("CIVIC_INTEGRITY"))  # the last is taken and has no rating, as Google's is
_NEVER = protos.SafetyRating.HIGH + 1
_FROM = {
    "BLOCK_LOW_AND_ABOVE": protos.SafetyRating.LOW,
    "BLOCK_MEDIUM_AND_ABOVE": protos.SafetyRating.MEDIUM,
    "BLOCK_ONLY_HIGH": protos.SafetyRating.HIGH,
    "BLOCK_NONE": _NEVER,
    "OFF": _NEVER,
}
"""From which probability on each threshold blocks."""
_THRESHOLDS = {
    least: protos.SafetySetting.HarmBlockThreshold.Value(name) for name, least in _FROM.items() if least < _NEVER
}
LATEST = 1_000  # characters of an answer that is under way that are rated again and again

Ratings = list[protos.SafetyRating]


class Safety:
    """The rater of a server, and what it blocks when a request does not say.

    Args:
        rater: None to rate nothing.
        threshold: A `SafetySetting.HarmBlockThreshold` by name.
    """

    def __init__(self, rater: Rater | None = None, threshold: str = "BLOCK_NONE") -> None:
        self._rater, self._threshold = rater, _FROM[threshold]

    def guard(
        self,
        settings: Iterable[protos.SafetySetting],
        question: str,
        caller: Caller,
        path: str,
        unrated: Sequence[int] = (),
    ) -> "Guard | None":
        """Return the guard of one call; None when nothing is rated.

        Args:
            settings: What the request says.
            question: The prompt's text.
            caller: Who asks.
            path: Where the settings stand in the request, for errors.
            unrated: Categories that are taken besides, and have no rating.

        Raises:
            InvalidArgument: A category is set twice, or has no rating.
        """
        chosen = dict.fromkeys(CATEGORIES, self._threshold) | _thresholds(
            settings, self._threshold, path, (*_TAKEN, *unrated)
        )
        return None if self._rater is None else Guard(self._rater, chosen, question, caller)


class Guard:
    """Rates one call's prompt and its candidates.

    Args:
        rater: Says how likely harm is.
        blocked_from: By category, from which probability on it is blocked.
        question: The prompt's text, which is rated at once.
        caller: Who asks.

    Attributes:
        feedback: What is to be said of the prompt.
    """

    def __init__(self, rater: Rater, blocked_from: dict[int, int], question: str, caller: Caller) -> None:
        self._rater, self._blocked_from = rater, blocked_from
        self._question, self._caller = question, caller
        self._may_block = any(least < _NEVER for least in blocked_from.values())
        self._answers: dict[int, _Answer] = {}
        ratings = self._ratings(rater.rate(question, None, caller))
        self.feedback = protos.GenerateContentResponse.PromptFeedback(safety_ratings=ratings)
        if any(rating.blocked for rating in ratings):
            self.feedback.block_reason = protos.GenerateContentResponse.PromptFeedback.SAFETY

    @property
    def blocks_prompt(self) -> bool:
        """Whether the prompt gets no answer."""
        return bool(self.feedback.block_reason)

    def rated(self, text: str) -> Ratings:
        """Return the ratings of a whole answer."""
        return self._ratings(self._rater.rate(text, self._question, self._caller))

    def feedback_on(self, ratings: Iterable[protos.SafetyRating]) -> list[protos.SafetyFeedback]:
        """Return the ratings that block, each with the threshold that has it so."""
        return [
            protos.SafetyFeedback(
                rating=rating,
                setting=protos.SafetySetting(
                    category=rating.category, threshold=_THRESHOLDS[self._blocked_from[rating.category]]
                ),
            )
            for rating in ratings
            if rating.blocked
        ]

    def watched(
        self, responses: Generator[protos.GenerateContentResponse], count: int
    ) -> Iterator[protos.GenerateContentResponse]:
        """Yield an answer's pieces with ratings; the one that is blocked ends its candidate, without its content.

        Args:
            responses: The pieces, one candidate each.
            count: How many candidates there are; once all have ended, nothing more is asked for.
        """
        with closing(responses):
            for response in responses:
                (candidate,) = response.candidates
                first = not self._answers
                answer = self._answers.setdefault(candidate.index, _Answer())
                if answer.ended:
                    continue
                self._judge(candidate, answer)
                if first or candidate.finish_reason:
                    response.prompt_feedback.CopyFrom(self.feedback)
                yield response
                answer.ended = bool(candidate.finish_reason)
                if sum(one.ended for one in self._answers.values()) == count:
                    return

    def _judge(self, candidate: protos.Candidate, answer: "_Answer") -> None:
        """Put ratings on a piece of an answer, and take its content when it is blocked."""
        answer.text += "".join(part.text for part in candidate.content.parts)
        due = self._may_block and len(answer.text) - answer.rated >= self._rater.every
        if due or candidate.finish_reason:
            self._rate(answer, whole=bool(candidate.finish_reason))
        candidate.safety_ratings.extend(answer.ratings)
        if answer.blocked:
            index = candidate.index
            candidate.Clear()
            candidate.index, candidate.finish_reason = index, protos.Candidate.SAFETY
            candidate.safety_ratings.extend(answer.ratings)

    def _rate(self, answer: "_Answer", whole: bool) -> None:
        text = answer.text if whole else answer.text[-LATEST:]
        now = self._rater.rate(text, self._question, self._caller)
        answer.worst = tuple(map(max, answer.worst, now)) if answer.worst else now
        answer.ratings, answer.rated = self._ratings(answer.worst), len(answer.text)

    def _ratings(self, probabilities: Probabilities) -> Ratings:
        return [
            protos.SafetyRating(
                category=rated, probability=probability, blocked=probability >= self._blocked_from[rated]
            )
            for rated, probability in zip(CATEGORIES, probabilities, strict=True)
        ]


@dataclass
class _Answer:
    """A candidate so far; `rated` characters of its text have been rated, and nothing follows one that ended."""

    text: str = ""
    rated: int = 0
    ended: bool = False
    worst: Probabilities = ()
    ratings: Ratings = field(default_factory=list)

    @property
    def blocked(self) -> bool:
        return any(rating.blocked for rating in self.ratings)


def _thresholds(
    settings: Iterable[protos.SafetySetting], unspecified: int, path: str, taken: Sequence[int]
) -> dict[int, int]:
    names = protos.SafetySetting.DESCRIPTOR.enum_types_by_name["HarmBlockThreshold"].values_by_number
    chosen: dict[int, int] = {}
    wrong = []
    for number, setting in enumerate(settings):
        if setting.category not in taken:
            allowed = ", ".join(HARM.values_by_number[one].name for one in taken)
            wrong.append((f"{path}[{number}].category", f"must be one of {allowed}"))
        elif setting.category in chosen:
            wrong.append((f"{path}[{number}].category", "is set twice: give one threshold for each category"))
        elif setting.threshold not in names:
            wrong.append((f"{path}[{number}].threshold", f"{setting.threshold} is not a threshold"))
        else:
            chosen[setting.category] = _FROM.get(names[setting.threshold].name, unspecified)
    if wrong:
        raise InvalidArgument.at(wrong)
    return chosen
