"""Short questions for train_long.py: what the original model answers to them is what training must not change."""

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
TEST_PROMPTS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "How do I make an omelette?",
    "What is 7 plus 5?",
    "Give me a name for a small bakery.",
    "Translate 'good morning' into Spanish.",
    "Write a Python function that returns the larger of two numbers.",
    "Hello! Who are you?",
)
"""Asked in the evaluation; none of them is trained on."""


def chat_prompts(count: int) -> list[str]:
    """`count` different questions in a fixed order, as many as there are at most."""
    topics = [topic.strip() for topic in _TOPICS.replace("\n", "").split("|")]
    prompts = [pattern.format(topic=topic) for topic in topics for pattern in _PATTERNS]
    random.Random("chat prompts").shuffle(prompts)
    return prompts[:count]
