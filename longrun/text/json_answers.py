"""Answers that are JSON of a schema: which tokens may come next, by llguidance's grammars over a model's vocabulary."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from longrun.errors import InputError, LongrunError, quoted, shortened

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerBase

_OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"(\n {0,40}| )",  # between two parts; without a bound a small model may never end them
    "lenient": False,
    "coerce_one_of": False,
}
_KINDS = ("text", "json_object", "json_schema")
_KEYS = {"text": {"type"}, "json_object": {"type"}, "json_schema": {"type", "json_schema"}}
_SCHEMA_KEYS = {"name", "description", "schema", "strict"}


def response_schema(response_format: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The JSON schema that OpenAI's `response_format` asks for; None where any text will do.

    Raises:
        InputError: it is none.
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind not in _KINDS:
        raise InputError(f"response_format {quoted(response_format)} has none of the types {', '.join(_KINDS)}")
    form = response_format.get("json_schema", {})
    unknown = [*(response_format.keys() - _KEYS[kind])]
    if kind == "json_schema" and isinstance(form, Mapping):
        unknown += form.keys() - _SCHEMA_KEYS
    if unknown:
        raise InputError(f"response_format has no {quoted(unknown[0])} in type {kind}: leave it out")
    if kind != "json_schema":
        return None if kind == "text" else {"type": "object"}
    schema = form.get("schema") if isinstance(form, Mapping) else None
    if not isinstance(schema, dict):
        raise InputError(
            'response_format needs a schema: send {"type": "json_schema", "json_schema": {"schema": {...}}}'
        )
    return schema


class JsonAnswers:
    """Makes the rules of JSON answers for one tokenizer; takes a second for a large vocabulary.

    Args:
        vocab_size: of the model.
        end_ids: what ends an answer.

    Raises:
        LongrunError: llguidance is not installed.
        InputError: it does not know this kind of tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_ids: Collection[int]) -> None:
        try:
            import llguidance.hf
        except ModuleNotFoundError:
            raise LongrunError(
                "answers of a form need the package llguidance: install it with pip install 'longrun[serve]'"
            ) from None
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, vocab_size, sorted(end_ids))  # type: ignore[arg-type]
        except ValueError as error:
            raise InputError(
                f"this model's tokenizer is of a kind that llguidance does not know ({_line(error)}): leave "
                f"response_format out"
            ) from None

    def rule(self, schema: Mapping[str, Any]) -> JsonRule:
        """The rule of one answer, a `TokenRule`.

        Raises:
            InputError: it is no JSON schema, or asks for what llguidance does not support.
        """
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_OPTIONS)
        except ValueError as error:
            raise _not_followed(error) from None
        failed, told = LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        if failed:
            raise _not_followed(told[0])
        return JsonRule(LLMatcher(self._tokenizer, grammar, log_level=0))


class JsonRule:
    """See `TokenRule`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        return self._matcher.is_stopped()

    def allowed(self) -> bytes:
        allowed = self._matcher.compute_bitmask()
        self._check()
        return allowed

    def take(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _not_followed(self._matcher.get_error().partition("<state>")[0])


def _not_followed(why: object) -> InputError:
    return InputError(f"the schema cannot be followed ({_line(why)}): send another schema")


def _line(text: object) -> str:
    return shortened(" ".join(str(text).split()), 300)
