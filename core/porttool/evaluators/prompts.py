"""From an article to the token ids that both sides are given."""

from __future__ import annotations

from dataclasses import dataclass

from porttool.config import PromptTemplate
from porttool.errors import UsageError
from porttool.evaluators.dataset import Article
from porttool.text import Tokenizer, fill_template


@dataclass(frozen=True)
class Recipe:
    """How an article is put to the model.

    Without a template: article and `suffix`, white space stripped at both ends, " n't" joined to
    the word before it, and of the ids the last `max_input_len`, so that the suffix stays. With
    one: the template around `instruction` and the article, whose end is cut off if need be.
    """

    suffix: str
    instruction: str
    template: PromptTemplate | None
    max_input_len: int


def encode_articles(
    articles: list[Article], tokenizer: Tokenizer, recipe: Recipe
) -> list[list[int]]:
    """Return the token ids of every article's prompt; one without any is a UsageError."""
    encode = encode_instruction if recipe.template else encode_suffixed
    return [require_ids(article, encode(article, tokenizer, recipe)) for article in articles]


def require_ids(article: Article, ids: list[int]) -> list[int]:
    """Return the ids, of which there must be one."""
    if not ids:
        raise UsageError(
            f"the tokenizer gives no token for the article {article.id!r}; leave it out, or name "
            "the model's own with --tokenizer"
        )
    return ids


def encode_suffixed(article: Article, tokenizer: Tokenizer, recipe: Recipe) -> list[int]:
    """Encode article and suffix; keep the last ids."""
    text = (article.text + recipe.suffix).strip().replace(" n't", "n't")
    return tokenizer.encode(text)[-recipe.max_input_len :]


def encode_instruction(article: Article, tokenizer: Tokenizer, recipe: Recipe) -> list[int]:
    """Encode the filled template; cut the article's end until it fits."""
    ids = require_ids(article, tokenizer.encode(article.text))
    while ids:
        prompt = fill_template(recipe.template, recipe.instruction, tokenizer.decode(ids))
        encoded = tokenizer.encode(prompt)
        excess = len(encoded) - recipe.max_input_len
        if excess <= 0:
            return encoded
        ids = ids[:-excess]
    raise UsageError(
        f"the instruction template alone is longer than {recipe.max_input_len} tokens; "
        "allow a larger max_input_len"
    )
