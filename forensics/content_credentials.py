"""C2PA manifests of a file: all of the chain from the active one through its ingredients, and what fails."""

import io
import json
from collections.abc import Iterator
from typing import Any

MOST = 50  # manifests of a file that are told
PROBLEMS = {  # the specification's codes of failures, by their beginning, as what they mean
    "assertion.dataHash": "content changed after signing",
    "assertion.bmffHash": "content changed after signing",
    "assertion.boxesHash": "content changed after signing",
    "assertion.collectionHash": "content changed after signing",
    "claimSignature.outsideValidity": "signed outside the certificate's time",
    "claimSignature": "signature broken",
    "signingCredential.expired": "certificate expired",
    "signingCredential.ocsp.revoked": "certificate revoked",
    "signingCredential.revoked": "certificate revoked",
    "timeStamp": "time stamp not valid",
    "assertion.hashedURI": "manifest changed after signing",
    "assertion.missing": "manifest changed after signing",
    "ingredient.manifest": "an earlier manifest changed after signing",
    "ingredient.claimSignature": "an earlier manifest changed after signing",
    "signingCredential.untrusted": "issuer not trusted",
    "signingCredential": "certificate not fit for signing",
}
OF_CERTIFICATE = {  # of an untouched file too
    "certificate expired", "issuer not trusted", "certificate revoked", "certificate not fit for signing",
}  # fmt: skip
MIME_TYPES = {"image/mpo": "image/jpeg"}  # what c2pa calls by another name


def read_manifests(content: bytes, mime_type: str) -> dict[str, Any] | None:
    """
    The manifests in a file's content. Nothing is fetched: one that is kept elsewhere is not read.

    Returns:
        `None` without a manifest; a `note`, where c2pa-python (extra `provenance`) isn't installed or
        couldn't read it; or
        - state: of validation, as the library tells it: "Valid", "Trusted" or "Invalid";
        - problems: what failed, in words, see `PROBLEMS`; other codes as they are. "Issuer not trusted" is
          on no list of trusted ones, of which the library brings none;
        - manifests: from the active one to the ingredients', each with `claim_generator`, `relationship` to
          the one before ("parentOf", ...), `title`, `issuer` and `time` of the signature, `actions`, `agents`
          (software that they name), and `source_types`.
    """
    if b"c2pa" not in content:
        return None
    try:
        import c2pa
    except ImportError:
        return {"note": "there is a manifest; install protoleak[provenance] to read it"}
    try:
        context = c2pa.Context.from_dict({"verify": {"remote_manifest_fetch": False}})
        stream, kind = io.BytesIO(content), MIME_TYPES.get(mime_type, mime_type)
        with context, c2pa.Reader(kind, stream, context=context) as reader:
            return tell_store(json.loads(reader.json()))
    except Exception as error:  # noqa: BLE001 (a damaged or hostile manifest may break the reader anywhere)
        if str(error).startswith("Remote"):
            return {"note": f"the manifest is kept elsewhere and was not fetched ({error})"}
        return {"note": f"there is a manifest, but it can't be read: {error}"}


def tell_store(store: dict[str, Any]) -> dict[str, Any]:
    """What [`read_manifests`] returns, from what c2pa's reader gives as JSON."""
    codes = [status["code"] for status in store.get("validation_status") or []]
    return {
        "state": store.get("validation_state", "not validated"),
        "problems": list(dict.fromkeys(map(_problem, codes))),
        "manifests": [_manifest(*link) for link in _chain(store)],
    }


def credentials_in_words(credentials: dict[str, Any]) -> list[str]:
    """A line on whether it holds, and one a manifest, from the active one back to the first."""
    if "note" in credentials:
        return [f"C2PA: {credentials['note']}"]
    return [f"C2PA: {validity_in_words(credentials)}", *map(_in_words, credentials["manifests"])]


def validity_in_words(credentials: dict[str, Any]) -> str:
    """Whether content and signature hold, and what fails, the gravest first."""
    problems = credentials["problems"]
    order = list(dict.fromkeys(PROBLEMS.values()))
    told = sorted(problems, key=lambda problem: order.index(problem) if problem in order else -1)
    holds = [] if set(problems) - OF_CERTIFICATE else ["content and signature hold"]
    return ", but ".join(filter(None, [*holds, " and ".join(told)]))


def _problem(code: str) -> str:
    return next((words for start, words in PROBLEMS.items() if code.startswith(start)), code)


def _chain(store: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str | None]]:
    """
    The active manifest, then those of ingredients, breadth first, each once, with its relationship to the one
    that names it, such as "parentOf".
    """
    waiting, seen = [(store["active_manifest"], None)], set()
    while waiting and len(seen) < MOST:
        label, relationship = waiting.pop(0)
        manifest = store["manifests"].get(label)
        if label in seen or manifest is None:
            continue
        seen.add(label)
        yield manifest, relationship
        for ingredient in manifest.get("ingredients") or []:
            waiting.append((ingredient.get("active_manifest"), ingredient.get("relationship", "inputTo")))


def _manifest(manifest: dict[str, Any], relationship: str | None) -> dict[str, Any]:
    actions = [
        action
        for assertion in manifest.get("assertions") or []
        if assertion["label"].startswith("c2pa.actions")
        for action in assertion["data"]["actions"]
    ][:100]
    generators = manifest.get("claim_generator_info") or [{}]
    signature = manifest.get("signature_info") or {}
    named = [action.get("softwareAgent") for action in actions]
    agents = [agent.get("name") if isinstance(agent, dict) else agent for agent in named]
    types = [
        action["digitalSourceType"].rsplit("/", 1)[-1] for action in actions if "digitalSourceType" in action
    ]
    return {
        "claim_generator": manifest.get("claim_generator") or generators[0].get("name", "unnamed"),
        "relationship": relationship,
        "title": manifest.get("title", ""),
        "issuer": signature.get("issuer", "nobody"),
        "time": signature.get("time"),
        "actions": list(dict.fromkeys(action["action"].removeprefix("c2pa.") for action in actions)),
        "agents": list(dict.fromkeys(filter(None, agents))),
        "source_types": list(dict.fromkeys(types)),
    }


def _in_words(manifest: dict[str, Any]) -> str:
    by = " with ".join(filter(None, [manifest["claim_generator"], ", ".join(manifest["agents"])]))
    told = ", ".join(manifest["actions"] + manifest["source_types"]) or "no actions"
    when = f" at {manifest['time']}" if manifest["time"] else ""
    of = f" of an ingredient ({manifest['relationship']})" if manifest["relationship"] else ""
    return f"C2PA manifest{of} by {by}, signed by {manifest['issuer']}{when}: {told}"


__all__ = ["credentials_in_words", "read_manifests", "tell_store", "validity_in_words"]
