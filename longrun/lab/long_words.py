"""Words and sentences of the facts that long training texts hide, written for this project.

`TRAIN` forms and names are what a model is taught with; `TEST` forms, phrasings and names are never seen in training.
The needle sweep's own form ("The magic number of ...") and its names stand in neither: a sweep is a test as well.
A statement, a question and an answer are templates over `{subject}` and `{value}`; an answer ends in the value and
what closes the sentence, so that everything before the value can be given and the value asked for.
"""

from __future__ import annotations

from dataclasses import dataclass


def _words(text: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(separator))


TRAIN_NAMES: tuple[str, ...] = (
    _words("""Aarav Abena Adaeze Aiko Akira Alejandra Amara Anaya Andrei Anika Anton Asha Astrid Babak Bao
    Beatriz Berit Bogdan Bruna Carlos Carmen Chidi Chiara Chloe Cormac Dagny Dalia Darius Deepa Diego Dimitri
    Dinah Ebba Efua Eira Elif Emeka Enzo Esperanza Fatima Fergus Fiona Fumiko Gaston Giulia Goran Greta Gudrun
    Hadiya Hamza Hana Haruki Hiroshi Ibrahim Idris Ilse Imani Ines Iona Isamu Ivan Jarek Javier Jelena Jomo Jorge
    Juma Kaito Kamala Karim Katya Keiko Kenji Khadija Kofi Kwame Laila Lars Leila Leticia Liam Linh Lorenzo Luca
    Lucia Maeve Magda Malik Manuel Marek Mariam Mateo Mei Mila Milos Minh Moira Nadia Naveen Neema Niamh Nikolai
    Noor Nuria Obi Olena Omar Orla Pablo Paolo Petra Pilar Priya Quan Rafael Rania Ravi Renata Rohan Rosa Ruslan
    Sakura Salma Samir Sanjay Saoirse Selim Sigrid Sofia Soren Stellan Sunita Svetlana Tadeo Takeshi Tamar Tariq
    Teresa Thandi Tomas Tuan Uma Vasily Vera Viggo Wanjiru Wei Xiomara Yara Yasmin Yusuf Zainab Zara Zoltan""")
)
TEST_NAMES: tuple[str, ...] = (
    _words("""Agnieszka Alasdair Amadou Anselm Aurelia Balthazar Bashir Birgit Casimir Chukwudi Delphine Dragana
    Eamon Eleni Ezequiel Fabiola Farid Giancarlo Gunnar Halima Hendrika Ignacio Ilona Jacinta Joaquin Kasimira
    Kerstin Lakshmi Leocadia Makena Marisol Mbali Nasrin Ndidi Oksana Oluwaseun Parvati Piotr Rashida Rosalva
    Seamus Shirin Sinead Tatsuya Thorvald Ulrike Valentina Vikram Wendelin Wojciech Ximena Yevgeny Zephyrine
    Zubaida""")
)
SURNAMES: tuple[str, ...] = (
    _words("""Abbasi Achterberg Adler Almeida Andersen Aoki Banerjee Barros Becker Bergstrom Bianchi Boateng
    Castillo Cho Costa Dang Delacroix Demir Dlamini Duarte Eriksen Farouk Ferrari Fischer Garcia Gupta Haddad
    Hansen Horvat Ivanov Jansen Kaplan Kimura Kovacs Kruger Larsen Lindholm Lopez Mancini Mbeki Mendoza Moreau
    Nakamura Novak Okafor Olsen Ortega Pereira Petrov Quispe Rossi Sato Schmidt Silva Singh Sorensen Suzuki
    Takahashi Tanaka Torres Ueda Vargas Virtanen Wagner Watanabe Weber Yamada Yilmaz Zhang Zielinski""")
)
THINGS: tuple[str, ...] = (
    _words("""accordion almanac amulet astrolabe backpack barometer binoculars bookend bracelet calculator
    candlestick cello chessboard compass corkscrew diary drum easel envelope figurine flashlight flute frying-pan
    globe harmonica hourglass inkwell kaleidoscope kite lantern locket loom magnifier mandolin marble microscope
    music-box notebook opal padlock paintbrush passport pendant perfume pocketknife postcard protractor puppet
    quilt raincoat ribbon ruby saddle sapphire saxophone scarf sextant sketchbook spinning-wheel stapler stopwatch
    tambourine teapot telescope thermos thimble trophy trumpet typewriter ukulele umbrella vase violin
    walking-stick watch whistle yo-yo zither""")
)
PLACES: tuple[str, ...] = _words(
    """under the old bridge|behind the bakery|in the hollow oak|beneath the third stair|in the attic|inside the piano
    |behind the waterfall|in the garden shed|under the doormat|in the bell tower|beside the well|in the greenhouse
    |on top of the wardrobe|in the wine cellar|under a loose floorboard|in the boathouse|behind the library
    |in the glove box|at the railway station|in the clock case|under the chapel altar|in the lighthouse
    |behind the mirror|in a flower pot|in the barn|in the museum cloakroom|under the pier|in locker nine
    |beside the fountain|in the laundry room|in the school gym|behind the oven|inside the sofa|near the old mill
    """,
    "|",
)
CITIES: tuple[str, ...] = (
    _words("""Accra Almaty Antwerp Baku Bergen Bogota Brno Busan Cairo Cork Cusco Dakar Davao Denver Dresden
    Durban Essen Fez Genoa Ghent Graz Hanoi Hobart Izmir Jaipur Kobe Kyoto Lagos Leeds Lima Lodz Lyon Malaga
    Manila Minsk Mombasa Nantes Nairobi Odessa Oslo Perth Porto Quito Recife Riga Rosario Salta Seville Split
    Surat Tallinn Tampere Toledo Tunis Turin Utrecht Valencia Varna Vilnius Windhoek Yerevan Zagreb""")
)
COLOURS = _words("amber beige black blue bronze copper coral crimson green grey indigo ivory lilac maroon olive")
ANIMALS = _words("badger crane dolphin falcon gecko heron ibis jackal koala lemur marten otter panda raven seal")
MONTHS = _words("January February March April May June July August September October November December")


@dataclass(frozen=True)
class Form:
    """One kind of fact.

    Attributes:
        name: how results call it.
        subject, value: kinds that `longrun.lab.long_tasks` draws from.
        statements: sentences (or lines of code, or records) that stand in the text; `{value}` at least once.
        questions: what is asked at the end; `{subject}` alone.
        answers: what is answered; they end in the value and punctuation.
    """

    name: str
    subject: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


TRAIN_FORMS: tuple[Form, ...] = (
    Form(
        "pass key", "place name", "digits",
        (
            "The pass key for {subject} is {value}. Remember it. {value} is the pass key.",
            "Important: to enter {subject} you need the pass key {value}.",
            "Do not forget that {subject} opens only with the pass key {value}.",
            "There is a pass key for {subject}. It is {value}.",
        ),
        (
            "What is the pass key for {subject}?",
            "Which pass key opens {subject}?",
            "The text mentions a pass key for {subject}. What is it?",
        ),
        ("The pass key for {subject} is {value}.", "The pass key is {value}.", "{value}"),
    ),
    Form(
        "secret number", "person", "digits",
        (
            "{subject}'s secret number is {value}.",
            "The secret number of {subject} is {value}.",
            "Few people know that {subject} has the secret number {value}.",
            "Note: secret number of {subject}: {value}",
        ),
        (
            "What is {subject}'s secret number?",
            "What is the secret number of {subject}?",
            "Tell me the secret number that belongs to {subject}.",
        ),
        ("The secret number of {subject} is {value}.", "{subject}'s secret number is {value}.", "{value}"),
    ),
    Form(
        "JSON code", "slug", "code",
        (
            '{{"id": "{subject}", "code": "{value}"}}',
            '{{"code": "{value}", "id": "{subject}", "valid": true}}',
            '"{subject}": {{"code": "{value}", "active": false}},',
        ),
        (
            'Which code does the JSON record with id "{subject}" hold?',
            "What code does {subject} have in the JSON data?",
            "Find the record {subject} and give its code.",
        ),
        ("The record {subject} holds the code {value}", "{value}", "{subject}: {value}"),
    ),
    Form(
        "key and value", "slug", "digits",
        ("{subject} = {value}", "{subject}: {value}", "* {subject} -> {value}", "set {subject} to {value}"),
        (
            "What is the value of {subject}?",
            "Which value is given for {subject}?",
            "Look up {subject} and give its value.",
        ),
        ("The value of {subject} is {value}.", "{value}", "{subject} = {value}"),
    ),
    Form(
        "hiding place", "person and thing", "hiding place",
        (
            "{subject_0} hid the {subject_1} {value}.",
            "When nobody looked, {subject_0} put the {subject_1} {value}.",
            "It was {subject_0} who left the {subject_1} {value}.",
        ),
        (
            "Where did {subject_0} hide the {subject_1}?",
            "Where is the {subject_1} that {subject_0} put away?",
            "Where was the {subject_1} left by {subject_0}?",
        ),
        ("{subject_0} hid the {subject_1} {value}.", "The {subject_1} is {value}.", "It is {value}."),
    ),
    Form(
        "who hid it", "colour and thing", "person",
        (
            "The {subject} was hidden by {value}.",
            "{value} was the one who hid the {subject}.",
            "The {subject} disappeared, and {value} had taken it.",
        ),
        ("Who hid the {subject}?", "Who made the {subject} disappear?", "Which person took the {subject}?"),
        ("The {subject} was hidden by {value}.", "It was {value}.", "{value}"),
    ),
    Form(
        "favourite", "person", "colour and animal",
        (
            "{subject}'s favourite animal is the {value}.",
            "Of all animals, {subject} likes the {value} best.",
            "The {value} is the animal that {subject} loves most.",
        ),
        ("What is {subject}'s favourite animal?", "Which animal does {subject} like best?"),
        ("{subject}'s favourite animal is the {value}.", "It is the {value}."),
    ),
    Form(
        "letter date", "person", "date",
        (
            "Letter from {subject}, {value}. My dear friend, all is well here.",
            "{value}\n\nDear all,\nI am writing to say that I arrived safely.\nYours, {subject}",
            "The letter that {subject} wrote is dated {value}.",
        ),
        ("What date does {subject}'s letter bear?", "When did {subject} write the letter?"),
        ("The letter of {subject} is dated {value}.", "{subject} wrote it on {value}.", "{value}"),
    ),
    Form(
        "log line", "host", "code",
        (
            "[info] host {subject} reported status {value}",
            "12:40:07 {subject} kernel: fault {value}",
            "{subject} - - status={value} retry=0",
        ),
        ("Which status did the host {subject} report?", "What was logged for {subject}?"),
        ("The host {subject} reported {value}", "{subject} reported {value}", "{value}"),
    ),
    Form(
        "constant in code", "identifier", "digits",
        (
            "{subject} = {value}",
            "#define {subject} {value}",
            "const int {subject} = {value};",
            "def {subject}():\n    return {value}",
        ),
        ("In the code, which value does {subject} have?", "What number belongs to {subject} in the source code?"),
        ("{subject} is {value}.", "{value}", "The value of {subject} is {value}."),
    ),
    Form(
        "phone number", "person", "phone",
        (
            "You can reach {subject} at {value}.",
            "Phone number of {subject}: {value}",
            "If anything goes wrong, call {subject} on {value}.",
        ),
        ("What is the phone number of {subject}?", "How can I reach {subject} by phone?"),
        ("The phone number of {subject} is {value}.", "You can call {value}.", "{value}"),
    ),
    Form(
        "price", "colour and thing", "price",
        ("The {subject} costs {value} dollars.", "Price of the {subject}: {value} dollars.",
         "Someone paid {value} dollars for the {subject}."),
        ("How much does the {subject} cost?", "What is the price of the {subject}?"),
        ("The {subject} costs {value} dollars.", "{value} dollars."),
    ),
    Form(
        "city", "person", "city",
        ("{subject} moved to {value} last spring.", "These days {subject} lives in {value}.",
         "The new home of {subject} is in {value}."),
        ("In which city does {subject} live?", "Where did {subject} move to?"),
        ("{subject} lives in {value}.", "{subject} moved to {value}.", "{value}"),
    ),
    Form(
        "meeting", "person", "date and time",
        ("The meeting with {subject} takes place on {value}.", "Remember: appointment with {subject}, {value}.",
         "{subject} will be waiting on {value}."),
        ("When is the meeting with {subject}?", "When will {subject} be waiting?"),
        ("The meeting with {subject} is on {value}.", "On {value}."),
    ),
    Form(
        "whose number", "digits", "person",
        ("The number {subject} belongs to {value}.", "{value} is registered under number {subject}."),
        ("To whom does the number {subject} belong?", "Who is registered under number {subject}?"),
        ("The number {subject} belongs to {value}.", "{value}"),
    ),
)  # fmt: skip

TEST_FORMS: tuple[Form, ...] = (
    Form(
        "locker combination", "person", "digits",
        ("The combination of {subject}'s locker at the pool is {value}.",),
        ("Which combination opens {subject}'s locker?",),
        ("{subject}'s locker opens with the combination {value}.",),
    ),
    Form(
        "environment variable", "identifier", "code",
        ('export {subject}="{value}"',),
        ("To what is the environment variable {subject} set?",),
        ("The environment variable {subject} is set to {value}",),
    ),
    Form(
        "table row", "slug", "digits",
        ("| {subject} | in stock | {value} |",),
        ("Which number stands in the table row of {subject}?",),
        ("The row of {subject} holds the number {value}",),
    ),
    Form(
        "ship's harbour", "ship", "city",
        ("At dawn the ship {subject} dropped anchor off {value}.",),
        ("Off which port did the {subject} drop anchor?",),
        ("The {subject} dropped anchor off {value}.",),
    ),
    Form(
        "birthday", "person", "date",
        ("{subject} was born on {value}, on a night without a moon.",),
        ("On which day was {subject} born?",),
        ("{subject} was born on {value}.",),
    ),
    Form(
        "bicycle", "person", "colour and thing",
        ("For winning the race, {subject} was given a {value}.",),
        ("What was {subject} given for winning the race?",),
        ("For winning the race {subject} was given a {value}.",),
    ),
)  # fmt: skip

INTRODUCTIONS: tuple[str, ...] = (
    "Here is a long text. Questions about it follow.\n\n",
    "Read the following text carefully. Some facts are hidden in it.\n\n",
    "",
    "Please read this and answer my questions afterwards.\n\n",
    "Document:\n\n",
)
TEST_INTRODUCTION = "Below you find a collection of documents. Afterwards I will ask about details.\n\n"
QUESTION_LEADS: tuple[str, ...] = ("", "", "Question: ", "According to the text: ", "From the text above: ")
ORDER_QUESTIONS: tuple[str, ...] = (
    "Who is mentioned first in the text, {a} or {b}?",
    "Which of the two comes first in the text: {a} or {b}?",
)
LIST_STATEMENTS: tuple[str, ...] = (
    "On the way {subject} bought a {value}.",
    "{subject} bought a {value} at the market.",
    "Later {subject} came home with a {value}.",
)
LIST_QUESTIONS: tuple[str, ...] = (
    "List everything that {subject} bought, in the order of the text.",
    "What did {subject} buy? Name all of it in order.",
)
ASSIGN_STATEMENTS: tuple[str, ...] = ("{subject} = {value}", "{subject} := {value}", "let {subject} = {value};")
ASSIGN_QUESTIONS: tuple[str, ...] = (
    "The variable {subject} is assigned more than once. What is its last value?",
    "What is the final value of {subject}?",
)
QUOTE_QUESTIONS: tuple[str, ...] = (
    'Quote the passage of the text that begins with "{start}".',
    'How does the text go on after "{start}"? Quote it, beginning with these words.',
)
