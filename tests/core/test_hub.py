"""What is fetched of a repository, and what is said of one that cannot be had."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from porttool import hub
from porttool.errors import SourceError, UsageError

TOKENIZER = {"config.json", "generation_config.json", "vocab.json", "merges.txt"}
BELOW = {"onnx/config.json", "onnx/model.onnx", "runs/events.bin", "coreml/weights.bin"}
OTHER = {"tf_model.h5", "flax_model.msgpack", "64.tflite", "rust_model.ot", ".gitattributes"}
SHARDS = {f"pytorch_model-{i:05}-of-00002.bin" for i in (1, 2)}
SAFE_SHARDS = {f"model-{i:05}-of-00002.safetensors" for i in (1, 2)}
REPOSITORIES = {
    "gpt2": ({"pytorch_model.bin"}, {"model.safetensors"}),
    "camel-5b-hf": (set(), {*SHARDS, "pytorch_model.bin.index.json"}),
    "starcoder": (SHARDS, {*SAFE_SHARDS, "model.safetensors.index.json"}),
    "GPT-2B-001": (set(), {"GPT-2B-001_bf16_tp1.nemo"}),
    "an adapter": (set(), {"adapter_config.json", "adapter_model.bin"}),
}
"""What repositories hold: weights that would not be read, and those that are."""


def transport_error() -> Exception:
    """An error of the client under the hub's library, which is no OSError in its newer versions."""
    client = next(error for error in HfHubHTTPError.__mro__ if error.__name__ == "HTTPError")
    return client("timed out")


def refusal(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    return kind("403 Client Error.\nmore", response=Mock(headers={}, request=Mock()))


@pytest.fixture
def snapshot(monkeypatch, tmp_path):
    """Stands for the download; tells which of a repository's files it was asked for."""
    fetch = Mock(return_value=str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return fetch


def publish(monkeypatch, names) -> None:
    listed = [SimpleNamespace(rfilename=name) for name in sorted(names)]
    info = Mock(return_value=SimpleNamespace(siblings=listed))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)


@pytest.mark.parametrize(("spare", "needed"), REPOSITORIES.values(), ids=REPOSITORIES)
def test_of_weights_that_are_there_twice_those_are_fetched_that_are_read(
    monkeypatch, snapshot, spare, needed
):
    names = TOKENIZER | BELOW | OTHER | spare | needed
    publish(monkeypatch, names)
    hub.fetch("owner/name")
    asked = snapshot.call_args.kwargs
    assert asked.pop("revision") is None
    assert set(filter_repo_objects(names, **asked)) == TOKENIZER | needed


@pytest.mark.parametrize("cached", [False, True])
def test_a_revision_is_asked_for_wherever_files_are(monkeypatch, snapshot, tmp_path, cached):
    publish(monkeypatch, {"config.json", "model.safetensors"})
    info, found = huggingface_hub.HfApi.model_info, Mock(return_value=str(tmp_path / "config.json"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", found)
    info.side_effect = transport_error() if cached else None
    hub.resolve_source("owner/name@v1.0", None)
    assert snapshot.call_args.args == ("owner/name",)
    for asked in (snapshot, info, *([found] if cached else [])):
        assert asked.call_args.kwargs["revision"] == "v1.0"


def test_without_the_hub_what_was_fetched_counts(monkeypatch, snapshot, tmp_path):
    """The library holds a cached folder to the patterns: all of them, and it is incomplete."""
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", Mock(side_effect=transport_error()))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    found = Mock(return_value=str(tmp_path / "config.json"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", found)
    hub.fetch("owner/name")
    assert "*.bin" in snapshot.call_args.kwargs["ignore_patterns"]
    found.return_value = None
    hub.fetch("owner/name")
    assert "*.bin" not in snapshot.call_args.kwargs["ignore_patterns"]


def test_of_several_archives_none_is_fetched(monkeypatch, snapshot):
    publish(monkeypatch, {"gpt5B_fp16_tp2.nemo", "gpt5B_bf16_tp2.nemo"})
    with pytest.raises(UsageError) as caught:
        hub.fetch("owner/gpt-5B")
    assert "several archives (gpt5B_bf16_tp2.nemo, gpt5B_fp16_tp2.nemo)" in str(caught.value)
    assert "hf download owner/gpt-5B gpt5B_bf16_tp2.nemo" in str(caught.value)
    snapshot.assert_not_called()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (transport_error(), "(timed out); run it again where there is a connection, what was "),
        (refusal(GatedRepoError), "(403 Client Error.); accept its terms on its page there, and"),
        (refusal(RepositoryNotFoundError), "if the name is right, it is private: log in with"),
        (refusal(RevisionNotFoundError), "'v1.0' is no branch, tag or commit of it"),
        (OSError(""), "(OSError); run it again where there is a connection"),
    ],
)
def test_what_the_hub_does_not_give(monkeypatch, snapshot, error, said):
    publish(monkeypatch, {"config.json"})
    snapshot.side_effect = error
    with pytest.raises(SourceError) as caught:
        hub.fetch("owner/name@v1.0")
    assert said in str(caught.value)
