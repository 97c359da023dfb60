"""Score the demo model on held-out articles, beside damaged copies of it and cheap baselines.

One thread is the default: with two on a busy machine OpenMP's waiting threads spin, and the same
work takes many times as long (``OMP_WAIT_POLICY=PASSIVE`` in the environment prevents it).

python examples/demo/score.py --log examples/demo/training_log.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from train import MAX_OUTPUT, N_POSITIONS, prompt_of
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
)

HERE = Path(__file__).parent
NEW_TOKENS = 60
BATCH_SIZE = 8
TIMED_ARTICLES = 50
LOGIT_PROMPTS = 32
KINDS = ("rouge1", "rouge2", "rougeL")


def load_model(folder: Path, **changes: str) -> GPT2LMHeadModel:
    """The model in float32, with ``changes`` to its configuration."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes).eval()


def untrained(folder: Path) -> GPT2LMHeadModel:
    """A model of the same shape with the weights that training begins with."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(load_model(folder).config).eval()


def scrambled(folder: Path, layer: int = 1) -> GPT2LMHeadModel:
    """The model with the entries of every matrix of one layer shuffled."""
    model = load_model(folder)
    random = torch.Generator().manual_seed(0)
    for weight in model.transformer.h[layer].parameters():
        if weight.ndim > 1:
            order = torch.randperm(weight.numel(), generator=random)
            weight.data = weight.data.flatten()[order].view_as(weight)
    return model


def noisy(folder: Path, share: float) -> GPT2LMHeadModel:
    """The model with Gaussian noise of ``share`` of each matrix's standard deviation added."""
    model = load_model(folder)
    random = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            noise = torch.randn(weight.shape, generator=random)
            weight.data += share * weight.data.std() * noise
    return model


def erf_gelu(folder: Path) -> GPT2LMHeadModel:
    """The model with the exact GELU in place of the tanh one it was trained with."""
    return load_model(folder, activation_function="gelu")


def encode_prompts(tokenizer: GPT2TokenizerFast, articles: Sequence[str]) -> list[list[int]]:
    """Token ids of the prompts, truncated on the left to leave room for the output."""
    texts = [prompt_of(article) for article in articles]
    encoded: list[list[int]] = tokenizer(texts, verbose=False).input_ids
    return [ids[-(N_POSITIONS - MAX_OUTPUT) :] for ids in encoded]


def pad_batches(prompts: Sequence[list[int]], pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of ids and masks, both [batch, seq], padded on the left."""
    for start in range(0, len(prompts), BATCH_SIZE):
        rows = prompts[start : start + BATCH_SIZE]
        seq = max(map(len, rows))
        ids = torch.tensor([[pad] * (seq - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (seq - len(row)) + [1] * len(row) for row in rows])
        yield ids, mask


@torch.no_grad()
def summarize(model: GPT2LMHeadModel, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The greedy continuations, without the padding behind the end of text."""
    end = model.config.eos_token_id
    results = []
    for ids, mask in pad_batches(prompts, end):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=end,
        )
        for row in output[:, ids.shape[1] :].tolist():
            results.append(row[: row.index(end) + 1] if end in row else row)
    return results


@torch.no_grad()
def last_logits(model: GPT2LMHeadModel, prompts: Sequence[list[int]]) -> Tensor:
    """The logits behind each of the first prompts, one at a time: [prompts, vocabulary]."""
    rows = [model(torch.tensor([ids])).logits[0, -1] for ids in prompts[:LOGIT_PROMPTS]]
    return torch.stack(rows)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F scores in percent."""
    scorer = RougeScorer(list(KINDS), use_stemmer=False)
    pairs = zip(references, predictions, strict=True)
    scores = [scorer.score(reference, prediction) for reference, prediction in pairs]
    return {
        kind: round(100 * sum(score[kind].fmeasure for score in scores) / len(scores), 2)
        for kind in KINDS
    }


def score_models(
    models: dict[str, Callable[[], GPT2LMHeadModel]],
    prompts: Sequence[list[int]],
    references: Sequence[str],
    tokenizer: GPT2TokenizerFast,
) -> dict[str, dict[str, float]]:
    """Scores of every model; the first is the one that the others are compared with."""
    results: dict[str, dict[str, float]] = {}
    first_outputs: list[list[int]] = []
    first_logits = torch.empty(0)
    for name, make in models.items():
        model = make()
        outputs, logits = summarize(model, prompts), last_logits(model, prompts)
        if not first_outputs:
            first_outputs, first_logits = outputs, logits
        texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
        end = model.config.eos_token_id
        pairs = list(zip(outputs, first_outputs, strict=True))
        results[name] = {
            **rouge(texts, references),
            "ended_percent": round(100 * sum(row[-1] == end for row in outputs) / len(outputs), 1),
            "same_output_percent": round(100 * sum(a == b for a, b in pairs) / len(pairs), 1),
            "max_logit_difference": round((logits - first_logits).abs().max().item(), 5),
        }
        print(name, json.dumps(results[name]), flush=True)
    return results


def score_baselines(rows: Sequence[dict[str, str]]) -> dict[str, dict[str, float]]:
    """Scores of two answers that need no model."""
    references = [row["highlights"] for row in rows]
    strangers = [*references[1:], references[0]]
    openings = [" ".join(row["article"].split()[:28]) for row in rows]
    return {
        "summary_of_another_article": rouge(strangers, references),
        "first_28_words_of_the_article": rouge(openings, references),
    }


def measure_seconds(model: GPT2LMHeadModel, prompts: Sequence[list[int]]) -> float:
    """Seconds to summarise the first articles."""
    start = time.perf_counter()
    summarize(model, prompts[:TIMED_ARTICLES])
    return round(time.perf_counter() - start, 2)


def main() -> None:
    """Score everything and put the result into the training log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=HERE / "gpt2-news")
    parser.add_argument("--articles", type=Path, default=HERE / "articles.jsonl")
    parser.add_argument("--log", type=Path, help="training log to which the scores are added")
    parser.add_argument("--threads", type=int, default=1, help="more make a small model slower")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [json.loads(line) for line in args.articles.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = encode_prompts(tokenizer, [row["article"] for row in rows])
    models: dict[str, Callable[[], GPT2LMHeadModel]] = {
        "trained": lambda: load_model(args.model),
        "untrained": lambda: untrained(args.model),
        "one_layer_scrambled": lambda: scrambled(args.model),
        "noise_2_percent": lambda: noisy(args.model, 0.02),
        "noise_10_percent": lambda: noisy(args.model, 0.1),
        "erf_gelu": lambda: erf_gelu(args.model),
    }
    references = [row["highlights"] for row in rows]
    lengths = sorted(map(len, prompts))
    result: dict[str, Any] = {
        "articles": len(rows),
        "new_tokens": NEW_TOKENS,
        "prompt_tokens": {"least": lengths[0], "median": lengths[len(lengths) // 2]},
        "prompts_truncated": lengths.count(N_POSITIONS - MAX_OUTPUT),
        "threads": args.threads,
        "seconds_for_50_articles": measure_seconds(load_model(args.model), prompts),
        "models": score_models(models, prompts, references, tokenizer),
        "baselines": score_baselines(rows),
    }
    print(json.dumps(result, indent=1))
    if args.log:
        log = json.loads(args.log.read_text(encoding="utf-8"))
        args.log.write_text(json.dumps({**log, "scores": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
