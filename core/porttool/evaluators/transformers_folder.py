"""A Hugging Face folder as transformers loads it: config and model, and whose model it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from porttool.config import ModelConfig
from porttool.errors import SourceError, UsageError, importing, require_extra
from porttool.huggingface import read_config
from porttool.sources.json_file import read_json
from porttool.weights import listing

DIMENSIONS = {
    "vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}  # fmt: skip
"""transformers' names, which every config of its has → ours."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, log and warnings, and put them back afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Load something of transformers quietly; what it refuses becomes a SourceError with `path`."""
    import torch
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet():
            yield
    except torch.OutOfMemoryError:
        raise
    except (
        OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError,
        StrictDataclassError,
    ) as error:  # fmt: skip
        said = " ".join(str(error).split())
        raise SourceError(f"{path}: transformers cannot load it: {said}") from error


def load_config(folder: Path) -> Any:
    """Load a folder's config in transformers, which must be there: no hub is asked."""
    require_extra("reference", "transformers")
    with importing("reference", "transformers"):
        import transformers
        from transformers import AutoConfig
    if not folder.exists():
        raise UsageError(f"{folder}: there is no such folder; correct --hf-model")
    file = folder / "config.json"
    if not file.is_file():
        raise UsageError(
            f"{folder}: there is no config.json; name a Hugging Face folder with --hf-model"
        )
    kind = read_config(folder).get("model_type")
    if isinstance(kind, str) and kind not in transformers.CONFIG_MAPPING:
        raise UsageError(
            f"{file}: transformers {transformers.__version__} has no model of type {kind!r}; name "
            "with --hf-model a folder of the same weights in a layout that it has"
        )
    with loading(file):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def require_same_shape(folder: Path, config: ModelConfig) -> None:
    """Refuse to set a model of other dimensions beside an engine."""
    theirs = load_config(folder)
    wrong = [
        f"{theirs_name} {getattr(theirs, theirs_name, None)}, not {getattr(config, ours)}"
        for theirs_name, ours in DIMENSIONS.items()
        if getattr(theirs, theirs_name, None) != getattr(config, ours)
    ]
    if wrong:
        raise UsageError(f"{folder} is not the engine's model: it has {'; '.join(wrong)}")


def load_model(folder: Path, dtype: Any) -> Any:
    """Load a folder's model in evaluation mode; SourceError unless every weight was found."""
    load_config(folder)  # what is wrong with it is said of its file
    from transformers import AutoModelForCausalLM, GenerationConfig

    with loading(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=False,
            local_files_only=True,
        )  # fmt: skip
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            names = listing(sorted(map(str, info[problem])))
            raise SourceError(f"{folder}: transformers reports {problem}: {names}")
    model.generation_config = GenerationConfig()
    return model.eval().requires_grad_(False)


def end_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids at which transformers itself ends a text of a folder's model.

    What no token can have is left out: a published config may name another vocabulary's.
    """
    config = load_config(folder)
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    with loading(folder):
        if file.is_file():
            found = GenerationConfig.from_dict(read_json(file))
        else:
            found = GenerationConfig.from_model_config(config)
    eos = found.eos_token_id
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return tuple(i for i in ids if 0 <= i < config.vocab_size)
