"""The rows of the training benchmark: support tickets and their departments, made by a seeded generator."""

import random
from collections.abc import Callable

from tunesmith.demo import EXAMPLES

Row = tuple[str, str]
"""An input and its output."""

TUTORIAL: list[Row] = EXAMPLES

_NAMES = ("Ada", "Benedikt", "Chioma", "Dariusz", "Eun-ji", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Keiko")
_CITIES = ("Lisbon", "Gdansk", "Lagos", "Oslo", "Busan", "Graz", "Quito", "Turin", "Leeds", "Perth", "Osaka")
_THINGS = ("desk lamp", "rain jacket", "steel kettle", "phone case", "garden chair", "bike pump", "wool scarf")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_TROUBLES = {
    "billing": (
        "was charged {price} twice for one {thing} and wants the second payment back",
        "got an invoice over {price} for the {thing} although the shop had promised a discount",
    ),
    "shipping": (
        "has waited for the {thing} since {day} and the tracking page shows no change",
        "says the parcel with the {thing} was left with a neighbour who has moved away",
    ),
    "returns": (
        "wants to send the {thing} back as it is too small and asks for a label before {day}",
        "received a {thing} with a crack and would like to exchange it for a whole one",
    ),
    "account access": (
        "can no longer sign in since {day} and the mail that resets the password does not come",
        "asks to change the address and to delete the old order of a {thing} from the profile",
    ),
    "customer praise": (
        "writes that the {thing} arrived on {day}, looks lovely, and was worth every cent of {price}",
        "thanks the team for the friendly help with the {thing} on {day} afternoon",
    ),
}


def tickets(count: int, seed: int = 0) -> list[Row]:
    """Return inputs of about 40 tokens, prompt included, and outputs of 2 or 3, their end included."""
    draw = random.Random(seed)
    return [_ticket(draw, number) for number in range(count)]


def long_tickets(count: int, tokens: int, length: Callable[[str, str], int], seed: int = 0) -> list[Row]:
    """Return rows of many tickets, whose outputs name all departments: as many as fit in so many tokens.

    Args:
        count: How many rows.
        tokens: What none is longer than.
        length: Tells how many tokens a row with this input and output has.
        seed: Of the generator.
    """
    draw = random.Random(seed)
    rows: list[Row] = []
    for _ in range(count):
        text, output = _ticket(draw, 0)
        for number in range(1, tokens):
            ticket, department = _ticket(draw, number)
            if length(longer := f"{text}\n{ticket}", more := f"{output}, {department}") > tokens:
                break
            text, output = longer, more
        rows.append((text, output))
    return rows


def _ticket(draw: random.Random, number: int) -> Row:
    department = draw.choice([*_TROUBLES])
    trouble = draw.choice(_TROUBLES[department]).format(
        thing=draw.choice(_THINGS),
        day=draw.choice(_DAYS),
        price=f"{draw.randrange(5, 90)}.{draw.choice(('00', '50', '99'))} euros",
    )
    who, hour = f"{draw.choice(_NAMES)} in {draw.choice(_CITIES)}", draw.randrange(8, 18)
    return f"Ticket {number}, {who}, {hour} o'clock: {trouble}.", department
