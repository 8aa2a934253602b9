"""
What an image file says of itself: C2PA manifest, EXIF and XMP software tags, text that generators write.

Anyone can write or remove these: they are claims of the file, told beside a verdict and never mixed into it.
"""

import io
import json
import os
import re
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from ..image_files_protoleak import UNREAD_TEXTS
from ..image_processing_protoleak import MAX_PIXELS, open_container

EXIF_TAGS = ("Software", "Make", "Model", "DateTime", "Artist", "ImageDescription", "ProcessingSoftware")
# keys of text chunks: AUTOMATIC1111 and forks, ComfyUI, InvokeAI, NovelAI, Draw Things, and the general ones
GENERATOR_TEXTS = ("parameters", "prompt", "workflow", "invokeai_metadata", "sd-metadata", "Dream", "Comment")
TEXTS = (
    *GENERATOR_TEXTS,
    "Software",
    "Source",
    "Description",
    "Title",
    "Author",
    "generation_data",
    UNREAD_TEXTS,
)
XMP_TAGS = ("CreatorTool", "DigitalSourceType", "Software", "Credit", "AISystemUsed")
LONGEST = 500


def read_provenance(source: str | os.PathLike | bytes, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """
    The claims of an image file, read only inside a container that Pillow accepts.

    Args:
        source: Path, or the file's content.
        max_pixels (`int`): Larger images are refused.

    Returns:
        `dict` of plain values with
        - format: of the container, such as "PNG";
        - exif, xmp, text: tag to text, those tags alone that tell software, camera or prompt, each cut to 500
          characters;
        - c2pa: the active manifest's `claim_generator`, `title`, `issuer`, `actions` and `state` of
          validation ("Valid" or "Trusted" if the signature holds), `None` without a manifest, or a `note`
          where c2pa-python (extra `provenance`) isn't installed or couldn't read it.

    Raises:
        OSError, ValueError: as [`open_image`], the pixels are not decoded.
    """
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    name = "bytes" if isinstance(source, bytes) else str(source)
    with open_container(content, name, max_pixels) as image:
        return {
            "format": image.format,
            "exif": _exif(image),
            "xmp": _xmp(image),
            "text": _text(image),
            "c2pa": _c2pa(content, Image.MIME.get(image.format or "", "")),
        }


def summarise_provenance(claims: dict[str, Any]) -> list[str]:
    """The claims as sentences, one a claim."""
    lines = []
    manifest = claims["c2pa"]
    if manifest and "note" in manifest:
        lines.append(f"C2PA: {manifest['note']}")
    elif manifest:
        actions = ", ".join(manifest["actions"]) or "no actions"
        lines.append(
            f"C2PA manifest by {manifest['claim_generator']}, signed by {manifest['issuer']} "
            f"({manifest['state']}): {actions}"
        )
    for part in ("exif", "xmp", "text"):
        title = {"exif": "EXIF", "xmp": "XMP", "text": "text"}[part]
        lines += [f"{title} {tag}: {value}" for tag, value in claims[part].items()]
    return lines or ["the file makes no claim of its origin"]


def _shorten(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    text = re.sub(r"[\x00-\x1f\x7f]+", " ", text).strip()
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _exif(image: Image.Image) -> dict[str, str]:
    try:
        tags = image.getexif()
        named = {ExifTags.TAGS.get(tag, str(tag)): value for tag, value in tags.items()}
    except Exception as error:  # noqa: BLE001 (Pillow raises many kinds for damaged EXIF)
        return {"damaged": _shorten(f"{type(error).__name__}: {error}")}
    return {tag: _shorten(named[tag]) for tag in EXIF_TAGS if tag in named}


def _xmp(image: Image.Image) -> dict[str, str]:
    """By pattern: an XML parser would follow what a hostile packet declares."""
    packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    text = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else str(packet)
    tags = {}
    for tag in XMP_TAGS:
        match = re.search(rf"\b{tag}(?:=\"([^\"<]{{1,2000}})\"|>([^<]{{1,2000}})<)", text[:1_000_000])
        if match:
            tags[tag] = _shorten(match[1] or match[2])
    return tags


def _text(image: Image.Image) -> dict[str, str]:
    texts = dict(image.info)
    if "comment" in texts:  # as Pillow calls that of JPEG and GIF
        texts["Comment"] = texts["comment"]
    return {key: _shorten(texts[key]) for key in TEXTS if isinstance(texts.get(key), bytes | str)}


def _c2pa(content: bytes, mime_type: str) -> dict[str, Any] | None:
    if b"c2pa" not in content:
        return None
    try:
        import c2pa
    except ImportError:
        return {"note": "there is a manifest; install protoleak[provenance] to read it"}
    try:
        with c2pa.Reader(mime_type, io.BytesIO(content)) as reader:
            return _manifest(json.loads(reader.json()))
    except Exception as error:  # noqa: BLE001 (a damaged or hostile manifest may break the reader anywhere)
        return {"note": _shorten(f"there is a manifest, but it can't be read: {error}")}


def _manifest(store: dict[str, Any]) -> dict[str, Any]:
    """What a manifest store's active manifest says."""
    manifest = store["manifests"][store["active_manifest"]]
    actions = [
        action.get("digitalSourceType", action["action"]).rsplit("/", 1)[-1]
        for assertion in manifest.get("assertions", [])
        if assertion["label"].startswith("c2pa.actions")
        for action in assertion["data"]["actions"]
    ]
    generators = manifest.get("claim_generator_info") or [{}]
    return {
        "claim_generator": _shorten(manifest.get("claim_generator") or generators[0].get("name", "unnamed")),
        "title": _shorten(manifest.get("title", "")),
        "issuer": _shorten((manifest.get("signature_info") or {}).get("issuer", "nobody")),
        "actions": [_shorten(action) for action in actions][:20],
        "state": _shorten(store.get("validation_state", "not validated")),
    }


__all__ = ["read_provenance", "summarise_provenance"]
