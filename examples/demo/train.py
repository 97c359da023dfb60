"""Train the demo model: a small GPT-2 with its own byte-level BPE that summarises generated news.

The text is what ``porttool summarize`` gives to a model: the article and " TL;DR:", and behind it
the highlights and the end of text. The shipped model took 26 seconds of preparation and 71
of training on one NVIDIA H200 (training_log.json); a CPU does it too, much more slowly.

    python examples/demo/train.py --output gpt2-news --log training_log.json
    python examples/demo/score.py --model gpt2-news --log training_log.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import torch
from generate_news import Article, Split, numbers_of, write_article
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel

END_OF_TEXT = "<|endoftext|>"
N_POSITIONS = 512
MAX_OUTPUT = 100
TOKENIZER_ARTICLES = 20_000
ARTICLE_WEIGHT = 0.2
"""Weight of an article's token in the loss; one of its summary counts 1."""


@dataclass(frozen=True)
class Example:
    """Token ids [seq] of prompt, summary and end of text; the prompt's length."""

    ids: Tensor
    prompt_length: int


@dataclass(frozen=True)
class Plan:
    """What one training run does; written to the log as it is."""

    steps: int
    seed: int
    batch_size: int
    train_articles: int
    vocab_size: int
    d_model: int
    n_layer: int
    n_head: int
    learning_rate: float


DEFAULT = Plan(
    steps=5000,
    seed=0,
    batch_size=128,
    train_articles=300_000,
    vocab_size=2048,
    d_model=128,
    n_layer=4,
    n_head=4,
    learning_rate=2e-3,
)


def prompt_of(article: str) -> str:
    """The prompt of an article; it ends with ``TL;DR:``."""
    return f"{article} TL;DR: ".strip().replace(" n't", "n't")


def write_articles(split: Split, count: int, seed: int) -> list[Article]:
    """The first ``count`` articles of ``split``, written by all processors."""
    numbers = islice(numbers_of(split), count)
    with ProcessPoolExecutor() as pool:
        return list(pool.map(partial(write_article, seed=seed), numbers, chunksize=2000))


def train_tokenizer(articles: Sequence[Article], vocab_size: int) -> Tokenizer:
    """A byte-level BPE like GPT-2's: 256 bytes, merges, and the end of text as the last id."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    texts = (f"{prompt_of(row.article)} {row.highlights}" for row in articles)
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    vocab = {**model["vocab"], END_OF_TEXT: vocab_size - 1}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = ByteLevelProcessor(trim_offsets=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the four tokenizer files of a GPT-2 folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": N_POSITIONS,
        "tokenizer_class": "GPT2Tokenizer",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def encode(tokenizer: Tokenizer, articles: Sequence[Article]) -> list[Example]:
    """Token ids, prompts truncated on the left as the evaluator does it."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    prompts = tokenizer.encode_batch_fast([prompt_of(row.article) for row in articles])
    summaries = tokenizer.encode_batch_fast([f" {row.highlights}" for row in articles])
    limit = N_POSITIONS - MAX_OUTPUT
    return [
        Example(torch.tensor([*prompt.ids[-limit:], *summary.ids, end]), len(prompt.ids[-limit:]))
        for prompt, summary in zip(prompts, summaries, strict=True)
    ]


def chunks(places: list[int], size: int) -> list[list[int]]:
    """``places`` in pieces of ``size``; the last may be shorter."""
    return [places[start : start + size] for start in range(0, len(places), size)]


def draw_batches(
    examples: Sequence[Example], batch_size: int, random: Random
) -> Iterator[list[Example]]:
    """Batches without end; those of one batch are about equally long, to save padding."""
    while True:
        order = random.sample(range(len(examples)), len(examples))
        for group in chunks(order, 32 * batch_size):
            by_length = sorted(group, key=lambda place: len(examples[place].ids))
            batches = chunks(by_length, batch_size)
            random.shuffle(batches)
            yield from ([examples[place] for place in rows] for rows in batches)


def collate(examples: Sequence[Example], device: str) -> tuple[Tensor, Tensor]:
    """Token ids and loss weights, both [batch, seq]; padding on the right has weight 0."""
    ids = pad_sequence([example.ids for example in examples], batch_first=True)
    lengths = torch.tensor([len(example.ids) for example in examples])[:, None]  # [batch, 1]
    prompts = torch.tensor([example.prompt_length for example in examples])[:, None]  # [batch, 1]
    position = torch.arange(ids.shape[1])  # [seq]
    weights = torch.where(position < prompts, ARTICLE_WEIGHT, (position < lengths).float())
    return ids.to(device), weights.to(device)


def weighted_loss(model: GPT2LMHeadModel, ids: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of the next-token losses. Right padding needs no mask: it comes later."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.is_cuda):
        logits = model(input_ids=ids, use_cache=False).logits  # [batch, seq, vocabulary]
    losses = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    weight = weights[:, 1:].flatten()
    return (losses * weight).sum() / weight.sum()


def make_model(plan: Plan) -> GPT2LMHeadModel:
    """An untrained GPT-2 of the planned shape."""
    torch.manual_seed(plan.seed)
    config = GPT2Config(
        vocab_size=plan.vocab_size,
        n_positions=N_POSITIONS,
        n_embd=plan.d_model,
        n_layer=plan.n_layer,
        n_head=plan.n_head,
        activation_function="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=plan.vocab_size - 1,
        eos_token_id=plan.vocab_size - 1,
    )
    return GPT2LMHeadModel(config)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 2 % of the steps, then half a cosine down to 1 % of the peak."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def make_optimizer(
    model: GPT2LMHeadModel, plan: Plan
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW that decays matrices only, and its schedule."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)
    factor = partial(learning_rate_factor, steps=plan.steps)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def summary_loss(model: GPT2LMHeadModel, examples: Sequence[Example], device: str) -> float:
    """The mean loss of the summaries' tokens, in nats."""
    ids, weights = collate(examples, device)
    return weighted_loss(model, ids, (weights == 1.0).float()).item()


def train(
    model: GPT2LMHeadModel, data: dict[str, list[Example]], plan: Plan, device: str
) -> list[dict[str, float]]:
    """Train in place and return the loss curve."""
    model.to(device).train()
    optimizer, schedule = make_optimizer(model, plan)
    batches = draw_batches(data["train"], plan.batch_size, Random(plan.seed))
    curve = []
    start = time.perf_counter()
    for step, rows in enumerate(islice(batches, plan.steps), start=1):
        loss = weighted_loss(model, *collate(rows, device))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, plan.steps // 50) == 0 or step == plan.steps:
            held_out = summary_loss(model, data["validation"], device)
            seconds = time.perf_counter() - start
            curve.append(
                {
                    "step": step,
                    "train_loss": round(loss.item(), 4),
                    "validation_summary_loss": round(held_out, 4),
                    "seconds": round(seconds, 1),
                }
            )
            print(json.dumps(curve[-1]), flush=True)
    return curve


def device_name(device: str) -> str:
    """What the training ran on."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {platform.machine()}"


def save_model(model: GPT2LMHeadModel, folder: Path) -> None:
    """Write the weights in float32 as safetensors, with the configuration."""
    model.to("cpu", torch.float32).eval()
    model.save_pretrained(folder)


def make_parser() -> argparse.ArgumentParser:
    """The command line; the defaults are those of the shipped model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--log", type=Path, help="JSON file for plan, loss curve and seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in Plan.__annotations__.items():
        kind = float if default == "float" else int
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=getattr(DEFAULT, name)
        )
    return parser


def main() -> None:
    """Write the articles, train the tokenizer, train the model, save all."""
    args = make_parser().parse_args()
    plan = Plan(**{name: getattr(args, name) for name in Plan.__annotations__})
    start = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    articles = write_articles("train", plan.train_articles, plan.seed)
    tokenizer = train_tokenizer(articles[:TOKENIZER_ARTICLES], plan.vocab_size)
    save_tokenizer(tokenizer, args.output)
    held_out = write_articles("validation", 256, plan.seed)
    data = {"train": encode(tokenizer, articles), "validation": encode(tokenizer, held_out)}
    prepared = time.perf_counter() - start
    model = make_model(plan)
    curve = train(model, data, plan, args.device)
    save_model(model, args.output)
    if args.log:
        log = {
            "plan": asdict(plan),
            "device": device_name(args.device),
            "parameters": model.num_parameters(),
            "seconds_to_prepare": round(prepared, 1),
            "seconds_to_train": curve[-1]["seconds"],
            "curve": curve,
        }
        args.log.write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
