from __future__ import annotations

import os
import pickle
import zipfile

import pytest
import torch

from porttool.errors import SourceError
from porttool.sources.torch_file import open_torch_file, require_safe_torch

TENSORS = {
    "a": torch.randn(300, 40),
    "b": torch.randn(5).to(torch.bfloat16),
    "view": torch.randn(6, 5)[1:4].t(),
    "scalar": torch.tensor(2.5),
}


class Payload:
    """Creates a file when it is unpickled by a reader that runs what it reads."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_torch_wrote(tmp_path, zipped):
    path = tmp_path / "m.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    file = open_torch_file(path)
    assert file.infos().keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert file.infos()[name].shape == tuple(tensor.shape)
        for _ in range(2):  # pages that were given back are read again
            assert file.load(name).equal(tensor)
            assert file.load(name).dtype == tensor.dtype


def test_what_is_loaded_belongs_to_the_caller(weights):
    before = weights.read_bytes()
    file = open_torch_file(weights)
    file.load("a").zero_()
    assert file.load("a").equal(TENSORS["a"])
    assert weights.read_bytes() == before


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_is_not_run(tmp_path, zipped):
    path, trace = tmp_path / "evil.bin", tmp_path / "it_ran"
    torch.save(
        {"a": torch.ones(2), "b": Payload(trace)}, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(SourceError, match=r"evil\.bin: refused.*its pickle wants more than tens"):
        open_torch_file(path)
    assert not trace.exists()


def test_a_bare_pickle_with_code_in_it_is_not_run(tmp_path):
    path, trace = tmp_path / "evil.bin", tmp_path / "it_ran"
    path.write_bytes(pickle.dumps(Payload(trace)))
    with pytest.raises(SourceError, match=r"evil\.bin: (refused|cannot be read)"):
        open_torch_file(path)
    assert not trace.exists()


def test_the_payload_would_have_run(tmp_path):
    """The trap is live: python's own reader springs it."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "it_ran"))).close()
    assert (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 0.95, 0.999])
def test_a_truncated_file(weights, keep):
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(SourceError, match=r"pytorch_model\.bin: .*(truncated|damaged)"):
        open_torch_file(weights)


@pytest.mark.parametrize(
    "content",
    [b"not a pickle at all", b"\x80\x02N.", b"\x80\x04]\x94.", b"\x00" * 4096, b"PK\x05\x06"],
)
def test_not_a_torch_file(tmp_path, content):
    path = tmp_path / "m.bin"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"m\.bin"):
        open_torch_file(path)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ([torch.ones(1)], "holds list, not a dictionary of tensors"),
        (torch.ones(1), "holds Tensor, not a dictionary of tensors"),
        ({"a": 5}, "'a' is int, not a tensor"),
        ({"model": {"a": torch.ones(1)}}, "'model' is dict, not a tensor"),
        ({3: torch.ones(1)}, "3 is Tensor, not a tensor"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is not a plain dense tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
def test_what_is_not_a_flat_dictionary_of_tensors(tmp_path, tree, said):
    torch.save(tree, tmp_path / "m.bin")
    with pytest.raises(SourceError) as caught:
        open_torch_file(tmp_path / "m.bin")
    assert said in str(caught.value)


def rezip(path, target, *, compress=False, twice=False):
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", method) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
        if twice:
            name = next(i.filename for i in old.infolist() if i.filename.endswith("/data/0"))
            with pytest.warns(UserWarning, match="Duplicate name"):
                new.writestr(name, old.read(name))
    return target


def test_a_compressed_archive(tmp_path, weights):
    path = rezip(weights, tmp_path / "m.bin", compress=True)
    with pytest.raises(SourceError, match=r"m\.bin: the entry '.*' is compressed"):
        open_torch_file(path)


def test_an_archive_with_an_entry_twice(tmp_path, weights):
    path = rezip(weights, tmp_path / "m.bin", twice=True)
    with pytest.raises(SourceError, match=r"m\.bin: the archive holds an entry twice"):
        open_torch_file(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_short_after_it_was_opened(tmp_path, legacy):
    """A touch of a page that is no longer there would end the process."""
    tensors = {name: torch.randn(300, 400) for name in "ab"}
    tensors["turned"] = torch.randn(300, 400).t()
    path = tmp_path / "m.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    file = open_torch_file(path)
    for name, tensor in tensors.items():
        assert file.load(name).equal(tensor)
    os.truncate(path, 4096)
    for name in tensors:
        with pytest.raises(SourceError, match=r"m\.bin: ended early; it is truncated or changed"):
            file.load(name)


def test_a_missing_file(tmp_path):
    with pytest.raises(SourceError, match=r"gone\.bin: the file is missing"):
        open_torch_file(tmp_path / "gone.bin")


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cu117", "2.6.0a0+git1"])
def test_an_unsafe_torch_is_refused(version):
    with pytest.raises(SourceError, match=rf"needs torch 2\.10 or newer, this is {version[:3]}"):
        require_safe_torch(version)


def test_a_safe_torch_is_not(tmp_path):
    require_safe_torch("2.10.0+cpu")
    require_safe_torch("3.0.0")
