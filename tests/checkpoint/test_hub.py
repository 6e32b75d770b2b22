"""Names to folders and back, with a hub made of functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from genlip_mlx.checkpoint.errors import CheckpointError, HubError
from genlip_mlx.checkpoint.hub import check_upload, resolve, upload
from genlip_mlx.config import ConfigError

from .conftest import Folder


class Answer:
    """As much of an HTTP answer as the hub's errors look at."""

    request = None

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}


def hub_error(kind: Any) -> BaseException:
    more = {"response": Answer()} if issubclass(kind, errors.HfHubHTTPError) else {}
    error: BaseException = kind("first line\nsecond line", **more)
    return error


def test_a_folder_is_itself(tiny: Folder) -> None:
    assert resolve(tiny.path) == tiny.path
    assert resolve(str(tiny.path)) == tiny.path
    with pytest.raises(CheckpointError, match="tiny-224: a local folder has no revision 'main'; leave it out"):
        resolve(tiny.path, "main")


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/no/such/folder", "a/b/c", "me/has space"])
def test_neither_a_folder_nor_a_repo_id(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name}: no such folder, and not a hub repo id"):
        resolve(name)


def test_a_file_is_not_a_folder(tiny: Folder) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a file; give the folder that holds it"):
        resolve(tiny.path / "model.safetensors")


@pytest.mark.parametrize("pickled", [False, True])
def test_a_repo_is_downloaded_without_what_is_not_needed(
    tiny: Folder, monkeypatch: pytest.MonkeyPatch, pickled: bool
) -> None:
    calls: list[dict[str, Any]] = []
    if pickled:
        (tiny.path / "model.safetensors").unlink()

    def download(repo: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        return str(tiny.path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("me/model", "v2") == tiny.path
    assert {(call["repo"], call["revision"], *call["ignore_patterns"]) for call in calls} == {("me/model", "v2", "*/*")}
    small, *weights = [call["allow_patterns"] for call in calls]
    assert "*.json" in small
    assert not {"*.safetensors", "*.bin"} & set(small)
    assert [("*.safetensors" in patterns, "*.bin" in patterns) for patterns in weights] == (
        [(True, False), (False, True)] if pickled else [(True, False)]
    )


def test_another_model_s_weights_are_not_downloaded(tiny: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    tiny.config(model_type="llama")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: calls.append(1) or str(tiny.path))
    with pytest.raises(ConfigError, match="me/model: model_type is 'llama'; this package runs 'genlip' only"):
        resolve("me/model")
    assert len(calls) == 1


FAILURES = [
    (errors.RepositoryNotFoundError, "me/model: no such folder here and no such repo on the hub"),
    (errors.GatedRepoError, "me/model: gated; ask for access on its page"),
    (errors.RevisionNotFoundError, "me/model: has no revision 'v2'"),
    (errors.LocalEntryNotFoundError, "me/model: .* the hub cannot be reached"),
    (errors.OfflineModeIsEnabled, "me/model: .* the hub cannot be reached"),
    (errors.HFValidationError, "me/model: not a hub repo id: first line"),
    (errors.HfHubHTTPError, "me/model: the hub failed: first line"),
    (ConnectionError, "me/model: the hub failed: first line"),
]


@pytest.mark.parametrize(("kind", "message"), FAILURES, ids=[kind.__name__ for kind, _ in FAILURES])
def test_each_failure_of_the_hub_is_one_line(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], message: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(HubError, match=message) as error:
        resolve("me/model", "v2")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(HubError, match="the model is saved in out"):
        upload(Path("out"), "me/model")


def test_an_upload_creates_the_repo_and_sends_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo, exist_ok: calls.append(("create", repo, exist_ok))
    )
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "upload_folder",
        lambda self, repo_id, folder_path, commit_message: calls.append(("upload", repo_id, folder_path)),
    )
    upload(Path("out"), "me/model")
    assert calls == [("create", "me/model", True), ("upload", "me/model", "out")]


def test_an_upload_needs_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(HubError, match="me/model: cannot upload without a login; run `hf auth login`"):
        check_upload("me/model")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    check_upload("me/model")
