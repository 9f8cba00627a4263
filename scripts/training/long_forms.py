"""More words, forms and lists for training on long texts, added to those of longrun/lab/long_words.py.

None of it is a test's: the six forms of `long_words.TEST_FORMS`, their phrasings and names, the needle sweep's form and
the quality comparison's entries ("The code of NAME is: KEY.") stand nowhere here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longrun.lab import long_words as words
from longrun.lab.long_words import Form


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES: tuple[str, ...] = (
    *words.TRAIN_NAMES,
    *_words("""Adnan Aisha Alma Amina Anders Anouk Arturo Aylin Bastian Bettina Bianca Bjarne Boris Brigitta Camila
    Cesar Corinna Cyrus Damian Daria Dario Dorota Eduardo Elena Elias Emil Enrique Erik Ernesto Eva Felipe
    Florian Frieda Gerard Gianna Gloria Gustavo Heidi Henrik Ida Irina Isaac Isabel Ismail Ivana Jakob
    Jasmin Johan Jonas Josefa Kaspar Katrin Konstantin Larissa Lena Leonor Levent Lidia Livia Lukas Manfred
    Marcel Margarida Marina Mario Marta Melanie Mikhail Mohamed Monika Nathalie Nestor Nina Norbert Olga
    Otto Pascal Paula Pavel Pedro Ramona Raul Ricardo Rita Robin Romy Sabine Salim Sandra Sasha Sergei
    Silvia Simone Stefan Stella Susanna Sylvain Tanja Tatiana Theresa Trudy Victor Viola Wilma Wolfgang
    Xenia Yannick Yvette Yvonne"""),
)
SURNAMES: tuple[str, ...] = (
    *words.SURNAMES,
    *_words("""Abdullah Aguilar Baker Barbieri Blom Brandt Cabral Campos Carver Chandra Chen Cruz Dahl Dekker Diallo
    Dubois Egger Engel Falk Ferreira Fontaine Frost Gallo Ghosh Gomez Graf Grant Hakimi Hassan Holm Huber
    Iqbal Jimenez Johansson Joshi Kamara Keller Khan Klein Koch Kowalski Kumar Lang Leclerc Lind Maier
    Marino Martins Mensah Meyer Molina Moser Mwangi Nagy Navarro Nguyen Nilsen Nowak Oliveira Osei Park
    Pavlov Perez Popov Ramos Rao Reyes Ribeiro Richter Rivera Romano Roth Ruiz Russo Salazar Santos Schulz
    Shah Sharma Simon Soto Stein Strand Sultan Tran Turner Usman Vidal Vogel Volkov Winter Wolf Yamamoto
    Yang Zimmer"""),
)

MORE_FORMS: tuple[Form, ...] = (
    Form(
        "access code", "person", "code",
        (
            'login("{subject}", token="{value}")',
            "{subject} types {value} to unlock the terminal.",
            "Access for {subject} was granted under {value}.",
            '"{value}" is the token that {subject} was issued.',
        ),
        ("Which token unlocks the terminal for {subject}?", "What token was issued to {subject}?"),
        ("The token of {subject} is {value}.", "{subject} uses {value}.", "{value}"),
    ),
    Form(
        "setting", "identifier", "code",
        ("setenv {subject} {value}", '{subject}: "{value}"', "option {subject}='{value}'", "--{subject} {value}"),
        ("What is the option {subject} set to?", "Which value has the setting {subject}?"),
        ("The option {subject} is set to {value}.", "{subject} is {value}", "{value}"),
    ),
    Form(
        "parcel", "code", "city",
        (
            "Parcel {subject} was delivered to {value}.",
            "Tracking {subject}: arrived in {value}",
            "The parcel with the label {subject} is on its way to {value}.",
        ),
        ("Where does the parcel {subject} go?", "To which city was parcel {subject} sent?"),
        ("The parcel {subject} goes to {value}.", "{value}", "It was sent to {value}."),
    ),
    Form(
        "train", "city and number", "city",
        (
            "The train {subject} ends in {value}.",
            "Passengers of {subject} leave the train in {value}.",
            "{subject} now terminates at {value}.",
        ),
        ("Where does the train {subject} end?", "What is the last stop of {subject}?"),
        ("The train {subject} ends in {value}.", "Its last stop is {value}.", "{value}"),
    ),
    Form(
        "gift", "person", "colour and thing",
        (
            "{subject} inherited a {value} from an aunt.",
            "At the fair {subject} sold a {value}.",
            "A {value} is all that {subject} took along.",
        ),
        ("Which thing did {subject} have in the story?", "What object is {subject} connected with?"),
        ("It was a {value}.", "{subject} had a {value}.", "A {value}."),
    ),
    Form(
        "wedding", "two people", "date",
        (
            "{subject} were married on {value}.",
            "The wedding of {subject} was on {value}.",
            "{value}: wedding of {subject}",
        ),
        ("When were {subject} married?", "On what date was the wedding of {subject}?"),
        ("{subject} were married on {value}.", "The wedding was on {value}.", "{value}"),
    ),
    Form(
        "room", "person", "short code",
        (
            "{subject} sleeps in room {value}.",
            "Guests looking for {subject} should knock at room {value}.",
            "Room {value} is reserved for {subject}.",
        ),
        ("In which room does {subject} sleep?", "Which room is reserved for {subject}?"),
        ("{subject} sleeps in room {value}.", "Room {value}.", "{value}"),
    ),
    Form(
        "job", "person", "job",
        (
            "{subject} earns a living as a {value}.",
            "For years {subject} worked as a {value}.",
            "They needed a {value}, and so they asked {subject}.",
        ),
        ("What is the job of {subject}?", "As what did {subject} work?"),
        ("{subject} works as a {value}.", "{subject} is a {value}.", "{value}"),
    ),
    Form(
        "temperature", "place name", "decimal",
        (
            "In {subject} {value} degrees were measured.",
            "sensor at {subject}: {value} C",
            "The thermometer of {subject} showed {value} degrees.",
        ),
        ("How many degrees were measured in {subject}?", "What did the thermometer of {subject} show?"),
        ("In {subject} {value} degrees were measured.", "{value} degrees.", "It showed {value}."),
    ),
    Form(
        "hash", "slug", "hex",
        ("{subject}  {value}", "checksum of {subject}: {value}", "sha({subject}) = {value}"),
        ("What is the checksum of {subject}?", "Which hash belongs to {subject}?"),
        ("The checksum of {subject} is {value}", "{value}"),
    ),
    Form(
        "port", "host", "digits",
        ("{subject} listens on port {value}", "ssh -p {value} {subject}", "tcp {subject}:{value} open"),
        ("On which port does {subject} listen?", "What port is open on {subject}?"),
        ("{subject} listens on port {value}", "Port {value}", "{value}"),
    ),
    Form(
        "author", "title", "person",
        (
            'The book "{subject}" was written by {value}.',
            '{value} is the author of "{subject}".',
            '"{subject}" ({value}) is out of print.',
        ),
        ('Who wrote "{subject}"?', 'Who is the author of the book "{subject}"?'),
        ('"{subject}" was written by {value}.', "The author is {value}.", "{value}"),
    ),
)  # fmt: skip
TRAIN_FORMS: tuple[Form, ...] = (*words.TRAIN_FORMS, *MORE_FORMS)
NUMBER_FORMS = ("pass key", "secret number", "key and value", "constant in code", "port")
"""Their value is a plain number: the hardest to copy exactly."""
CODE_FORMS = ("JSON code", "log line", "access code", "setting")
"""Their value is capital letters and a number, whose tokens are others in quotes or after a sign than after a space."""
JOBS: tuple[str, ...] = (
    _words("""baker beekeeper blacksmith bookbinder bricklayer carpenter cartographer chemist clockmaker
    cook dentist diver electrician farmer fisher florist gardener glazier goldsmith hatter judge librarian locksmith
    mason midwife miller nurse painter pharmacist pilot plumber potter printer roofer sailor shepherd surveyor tailor
    teacher translator vet weaver welder""")
)

ATTRIBUTES: tuple[tuple[str, str], ...] = (
    ("badge", "digits"), ("extension", "digits"), ("account", "digits"), ("score", "digits"), ("token", "code"),
    ("ticket", "code"), ("desk", "short code"), ("town", "city"), ("balance", "price"), ("phone", "phone"),
    ("deadline", "date"), ("job", "job"), ("mascot", "colour and animal"), ("checksum", "hex"),
)  # fmt: skip
"""What a list tells of each of its subjects, and the kind of value it is."""
LIST_SUBJECTS: tuple[str, ...] = ("person", "person", "person", "slug", "host", "identifier", "code")
LIST_QUESTIONS: tuple[str, ...] = (
    "What is the {attribute} of {subject}?",
    "Which {attribute} is listed for {subject}?",
    "Look up {subject}: what {attribute} is given?",
    "Give the {attribute} of {subject}.",
)
LIST_ANSWERS: tuple[str, ...] = (
    "The {attribute} of {subject} is {value}.",
    "{value}",
    "{subject}: {value}",
    "{attribute}: {value}",
)

Row = tuple[str, Sequence[tuple[str, str]]]
"""A subject, and each of its attributes with the value."""


@dataclass(frozen=True)
class ListFormat:
    """How a list is written: what stands before and after its rows, and a row (with its line end).

    Attributes:
        before, after: from the names of the attributes.
        row: from a row and its number.
        most: attributes that a row can hold.
    """

    name: str
    before: Callable[[Sequence[str]], str]
    row: Callable[[Row, int], str]
    after: str = ""
    most: int = 3


def _nothing(_: Sequence[str]) -> str:
    return ""


def _heading(separator: str, pattern: str = "{}\n") -> Callable[[Sequence[str]], str]:
    """Before the rows: "name" and the attributes' names."""
    return lambda names: pattern.format(separator.join(["name", *names]))


def _plain(pattern: str, separator: str = "") -> Callable[[Row, int], str]:
    """A row: `{s}` the subject, `{v}` all values."""
    return lambda row, _: pattern.format(s=row[0], v=separator.join(value for _, value in row[1]))


def _named(pattern: str, each: str, separator: str = "") -> Callable[[Row, int], str]:
    """A row: `{s}` the subject, `{v}` all attributes as `each` writes them, `{t}` a time that rises with the row."""

    def row(row: Row, number: int) -> str:
        clock = f"{number // 3600 % 24:02}:{number // 60 % 60:02}:{number % 60:02}"
        attributes = separator.join(each.format(name=name, value=value) for name, value in row[1])
        return pattern.format(s=row[0], v=attributes, t=clock)

    return row


def _json_record(row: Row, _: int) -> str:
    return f" {json.dumps({'name': row[0], **dict(row[1])})},\n"


def _python_tuple(row: Row, _: int) -> str:
    return f"    {(row[0], *(value for _, value in row[1]))!r},\n"


LIST_FORMATS: tuple[ListFormat, ...] = (
    ListFormat("lines", _heading(", "), _plain("{s}: {v}\n", ", ")),
    ListFormat("equals", _nothing, _plain("{s} = {v}\n"), most=1),
    ListFormat("arrows", _heading(" -> ", "# {}\n"), _plain("{s} -> {v}\n"), most=1),
    ListFormat("tabs", _heading("\t"), _plain("{s}\t{v}\n", "\t")),
    ListFormat("csv", _heading(","), _plain("{s},{v}\n", ",")),
    ListFormat("quoted csv", _heading('";"', '"{}"\n'), _plain('"{s}";"{v}"\n', '";"')),
    ListFormat("JSON records", lambda _: "[\n", _json_record, "]\n"),
    ListFormat("JSON object", lambda names: f'{{"{names[0]}": {{\n', _plain('  "{s}": "{v}",\n'), "}}\n", most=1),
    ListFormat("Python dict", lambda names: f"{names[0].upper()} = {{\n", _plain("    '{s}': '{v}',\n"), "}\n", most=1),
    ListFormat("Python tuples", lambda _: "ROWS = [\n", _python_tuple, "]\n"),
    ListFormat("table", _heading(" | ", "| {} |\n"), _plain("| {s} | {v} |\n", " | ")),
    ListFormat("log", _nothing, _named("[{t}] {s} {v}\n", "{name}='{value}'", " ")),
    ListFormat("plain log", _nothing, _named("{t} INFO {s} {v}\n", "{name} {value}", ", ")),
    ListFormat("records", _nothing, _named("[{s}]\n{v}", "{name} = {value}\n")),
    ListFormat("YAML", lambda _: "people:\n", _named("- id: {s}\n{v}", "  {name}: {value}\n")),
    ListFormat("SQL", _nothing, _plain("INSERT INTO t VALUES ('{s}', '{v}');\n", "', '")),
    ListFormat("HTML", lambda _: "<table>\n", _named("<tr><td>{s}</td>{v}</tr>\n", "<td>{value}</td>"), "</table>\n"),
    ListFormat("sentences", _nothing, _named("{s} has {v}.\n", "the {name} {value}", " and ")),
)
