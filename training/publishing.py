"""A trained checkpoint on the Hub: whether it can go there is asked before training, and nothing is lost."""

import shlex

from huggingface_hub import HfApi

from ..checkpoint_protoleak import upload_checkpoint


def prepare_repository(repo_id: str, private: bool) -> None:
    """
    Make the repository, unless there is one.

    Raises:
        OSError: the id is none, it can't be reached, or it isn't one's own; the message tells what to do.
    """
    hub = HfApi()
    try:
        who = hub.whoami()
        own = [who["name"], *(organisation["name"] for organisation in who.get("orgs", []))]
        if "/" in repo_id and repo_id.split("/")[0] not in own:
            raise PermissionError(f"{who['name']} can write to {', '.join(own)}")
        hub.create_repo(repo_id, private=private, exist_ok=True)
    except Exception as error:  # no token, no network, a misspelt id: each of a kind of its own
        raise OSError(
            f"nothing could be pushed to {repo_id!r}: {error}; log in with `hf auth login`, name a "
            f"repository like you/your-model, or train without --push_to_hub"
        ) from error


def publish(folder: str, repo_id: str, private: bool) -> None:
    """
    Upload a checkpoint.

    Raises:
        OSError: it failed; the message has the folder, which is whole, and the command to upload it.
    """
    try:
        upload_checkpoint(folder, repo_id, private)
    except Exception as error:  # as above
        command = ["hf", "upload", repo_id, folder, ".", *(["--private"] if private else [])]
        raise OSError(
            f"the checkpoint is in {folder}, but could not be uploaded: {error}; do it with\n"
            f"  {shlex.join(command)}"
        ) from error
