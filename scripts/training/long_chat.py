"""Short questions for train_long.py: training must not change the original model's answers to them."""

from __future__ import annotations

import random

_TOPICS = """the water cycle|photosynthesis|how bread is made|why the sky is blue|the moon|good sleep|public libraries
|bicycles|volcanoes|recycling|friendship|learning a language|gravity|tea|the internet|bees|saving money|chess|trees
|a healthy breakfast|the seasons|music|whales|the Roman Empire|vaccines|batteries|writing a letter|deserts|maps|cats
|electricity|swimming|the human heart|rainbows|cooking rice|time zones|glass|gardening|telescopes|kindness"""
_PATTERNS = (
    "Explain {topic} in two sentences.",
    "What should a child know about {topic}?",
    "Write a short poem about {topic}.",
    "Give me three facts about {topic}.",
    "Why does {topic} matter?",
    "Write a short story that has to do with {topic}.",
    "List five words that belong to {topic}.",
    "Tell me something interesting about {topic}.",
    "How would you introduce {topic} to a friend?",
    "Ask me a question about {topic}, then answer it.",
)
_COUNTRIES = """Japan|Egypt|Spain|Canada|Kenya|Poland|Brazil|Turkey|Norway|Peru|India|Greece|Cuba|Ghana|Italy|Chile
|Vietnam|Sweden|Portugal|Mexico"""
_PHRASES = """thank you|where is the station|I am hungry|see you tomorrow|the book is on the table|good luck
|how much is this|my name is Anna|it is raining|I like music"""
_LANGUAGES = ("French", "German", "Italian", "Portuguese")
_WORDS = """patience|orbit|harvest|loyal|ancient|whisper|courage|market|fragile|compass|shelter|rapid|honest|tunnel
|bargain|curious|drought|echo|frost|gentle"""
_TASKS = """reverses a string|adds up the numbers of a list|counts the vowels of a word|says whether a number is even
|finds the smallest item of a list|joins words with commas|squares a number|removes duplicates from a list
|converts Celsius to Fahrenheit|checks whether a word is a palindrome"""
_THINGS = (
    "a cat|a boat|a coffee shop|a band|a small town|a blog about trains|a running club|a robot|a dragon|a book shop"
)
_MORE_PATTERNS = (
    ("What is the capital of {}?", _COUNTRIES),
    ("In which continent is {}?", _COUNTRIES),
    ("Name a city in {}.", _COUNTRIES),
    ("What does the word '{}' mean?", _WORDS),
    ("Use the word '{}' in a sentence.", _WORDS),
    ("What is the opposite of '{}'?", _WORDS),
    ("Write a Python function that {}.", _TASKS),
    ("Write a JavaScript function that {}.", _TASKS),
    ("Suggest a name for {}.", _THINGS),
    ("Describe {} in one sentence.", _THINGS),
)
_ALONE = """Hello!|Hi there, how are you?|What can you do?|Are you a person?|Good evening.|Thanks for your help!
|Tell me a joke.|What day comes after Monday?|How many legs does a spider have?|What colour is grass?
|Which is larger, the sun or the moon?
|Who wrote Romeo and Juliet?|What do bees make?|How many minutes are in an hour?|What is the boiling point of water?
|Which animal says moo?|What is the largest ocean?|How do I boil an egg?|How do I tie a tie?|How do I make pancakes?
|Help me plan a birthday party.|Give me a tip for an exam.|What should I cook tonight?|Can you recommend a hobby?"""
TEST_PROMPTS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "How do I make an omelette?",
    "What is 7 plus 5?",
    "Give me a name for a small bakery.",
    "Translate 'good morning' into Spanish.",
    "Write a Python function that returns the larger of two numbers.",
    "Hello! Who are you?",
    "Why do leaves fall in autumn?",
    "Who painted the Mona Lisa?",
    "My friend is sad. What could I say?",
    "Sort these words by length: pear, fig, banana.",
    "Continue the story: The old lighthouse had been dark for years, until",
    "What is the difference between a lake and a river?",
    "List three things to pack for a hike.",
    "Is it safe to eat raw potatoes?",
)
"""Asked in the evaluation; none of them is trained on."""


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.replace("\n", "").split("|")]


def chat_prompts(count: int) -> list[str]:
    """`count` different questions in a fixed order, as many as there are at most; none is of `TEST_PROMPTS`."""
    topics = _split(_TOPICS)
    prompts = [pattern.format(topic=topic) for topic in topics for pattern in _PATTERNS]
    prompts += [pattern.format(word) for pattern, pool in _MORE_PATTERNS for word in _split(pool)]
    prompts += [f"Translate '{text}' into {language}." for text in _split(_PHRASES) for language in _LANGUAGES]
    rng = random.Random("chat prompts")
    sums = {(rng.randint(2, 60), rng.choice(("plus", "minus", "times")), rng.randint(2, 30)) for _ in range(40)}
    prompts += [f"What is {a} {sign} {b}?" for a, sign, b in sorted(sums - {(7, "plus", 5)})]
    prompts += _split(_ALONE)
    rng.shuffle(prompts)
    return prompts[:count]
