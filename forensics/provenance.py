"""
What an image file says of itself: C2PA manifests, EXIF, XMP and IPTC tags, text that generators write.

Anyone can write or remove these: they are claims of the file, told beside a verdict and never mixed into it.
"""

import codecs
import os
import re
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import ParseError, fromstring
from PIL import ExifTags, Image, IptcImagePlugin

from ..files_protoleak import printable
from ..image_files_protoleak import PNG, UNREAD_TEXTS, png_chunks
from ..image_processing_protoleak import MAX_PIXELS, open_container
from ..pipeline_protoleak import CAMERA, GENERATED
from .content_credentials import credentials_in_words, read_manifests, validity_in_words
from .generation import parse_settings, settings_in_words

EXIF_TAGS = ("Software", "Make", "Model", "DateTime", "Artist", "ImageDescription", "ProcessingSoftware")
# keys of text chunks: AUTOMATIC1111 and forks, ComfyUI, InvokeAI, NovelAI, Draw Things, and the general ones
GENERATOR_TEXTS = ("parameters", "prompt", "workflow", "invokeai_metadata", "sd-metadata", "Dream", "Comment")
TEXTS = (*GENERATOR_TEXTS, "Software", "Source", "Description", "Title", "Author", "generation_data")
TEXTS += (UNREAD_TEXTS,)
XMP_TAGS = (
    "CreatorTool", "DigitalSourceType", "Software", "softwareAgent", "Credit", "AISystemUsed", "UserComment",
    "AIPromptInformation", "provenance",
)  # fmt: skip
TITLES = {"exif": "EXIF", "xmp": "XMP", "iptc": "IPTC", "text": "text"}
IPTC_TAGS = {(2, 65): "OriginatingProgram", (2, 110): "Credit", (2, 115): "Source"}
SOURCE_TYPES = {  # cv.iptc.org/newscodes/digitalsourcetype: what it means, and the origin that it claims
    "trainedAlgorithmicMedia": ("created by a generative model", GENERATED),
    "compositeWithTrainedAlgorithmicMedia": ("edited with a generative model", GENERATED),
    "compositeSynthetic": ("composed of parts, some of them synthetic", GENERATED),
    "algorithmicMedia": ("created by an algorithm", GENERATED),
    "dataDrivenMedia": ("made of data", None),
    "digitalCapture": ("taken by a digital camera", CAMERA),
    "computationalCapture": ("taken by a digital camera, of several frames", CAMERA),
    "negativeFilm": ("digitised from a negative", CAMERA),
    "positiveFilm": ("digitised from a slide", CAMERA),
    "print": ("digitised from a print", CAMERA),
    "humanEdits": ("a photograph edited by a person", CAMERA),
    "minorHumanEdits": ("a photograph with small edits by a person", CAMERA),
    "compositeCapture": ("composed of photographs", CAMERA),
    "composite": ("composed of parts", None),
    "algorithmicallyEnhanced": ("enhanced by an algorithm", None),
    "digitalCreation": ("drawn by a person with software", None),
    "digitalArt": ("drawn by a person with software", None),
    "virtualRecording": ("recorded in a virtual scene", None),
    "screenCapture": ("a screenshot", None),
}
DEVICE = ("Make", "Model")
SOFTWARE_TAGS = ("Software", "ProcessingSoftware", "CreatorTool", "softwareAgent", "AISystemUsed")
SOFTWARE_TAGS += ("OriginatingProgram",)
CREDIT_TAGS = ("Credit", "Source")  # free text, in which a name alone tells little
GENERATORS = re.compile(  # names that software of generators gives itself
    r"midjourney|dall[·. -]?e\b|stable ?diffusion|sdxl|firefly|\bimagen\b|google ai|meta ai|imagined with ai"
    r"|ideogram|leonardo\.?ai|novelai|invokeai|comfyui|automatic1111|fooocus|draw things|easy diffusion"
    r"|swarmui|\bflux\b|craiyon|nightcafe|recraft|\bgrok\b|gemini|bing image creator|openai|gpt-?image"
    r"|chatgpt|seedream",
    re.IGNORECASE,
)
CREDITS = re.compile(
    r"\b(made|edited|created|generated|imagined) (with|by|using) .*\bAI\b|^stable diffusion|^midjourney",
    re.IGNORECASE,
)
JOB = re.compile(r"\bJob ID: [0-9a-f]{8}-[0-9a-f-]{27}", re.IGNORECASE)  # as Midjourney ends a description
LONGEST = 500  # characters of a text that is told
LARGEST_XMP = 1_000_000  # bytes; one of single tags takes 2 seconds
MOST_ELEMENTS = 50_000  # of XMP that are looked at


def read_provenance(
    source: str | os.PathLike | bytes, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> dict[str, Any]:
    """
    The claims of an image file, read only inside a container that Pillow accepts.

    Args:
        source: Path, or the file's content.
        max_pixels (`int`): Larger images are refused.
        name (`str`, *optional*): What errors call it.

    Returns:
        `dict` of plain values, texts cut to 500 characters, with
        - format: of the container, such as "PNG";
        - claim: see [`claimed_origin`];
        - settings: see [`parse_settings`];
        - source_types: IPTC's digital source types, of XMP and of every C2PA manifest, by their last part;
        - c2pa: see [`read_manifests`];
        - exif, xmp, iptc, text: tag to text, those tags alone that tell software, camera or prompt.

    Raises:
        OSError, ValueError: as [`open_image`], the pixels are not decoded.
    """
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    name = name or ("bytes" if isinstance(source, bytes) else str(source))
    with open_container(_with_texts_first(content), name, max_pixels) as image:
        texts = _texts_of(image)
        parts = {"exif": _exif(image), "xmp": _xmp(image), "iptc": _iptc(image)}
        parts["text"] = {key: texts[key] for key in TEXTS if key in texts}
        credentials = read_manifests(content, Image.MIME.get(image.format or "", ""))
        tags = parts["xmp"] | {tag: text for tag, text in parts["exif"].items() if tag not in DEVICE}
        claims = {
            "format": image.format,
            "settings": parse_settings(texts, tags),
            "source_types": _source_types(parts["xmp"], credentials),
            "c2pa": credentials,
            **parts,
        }
    return _plain({"claim": claimed_origin(claims)} | claims)


def claimed_origin(claims: dict[str, Any]) -> dict[str, str] | None:
    """
    What a file's claims come to: `origin`, "generated" or "camera", and the `words` of the claim that tells
    it. A claim of a generator goes before that of a camera, whose tags a tool may have copied. `None` where
    nothing tells.
    """
    told = {SOURCE_TYPES.get(name, (None, None))[1]: name for name in reversed(claims["source_types"])}
    if GENERATED in told:
        return {"origin": GENERATED, "words": _source_type_in_words(told[GENERATED], claims["c2pa"])}
    if claims["settings"]:
        return {"origin": GENERATED, "words": f"made with {settings_in_words(claims['settings'])}"}
    if words := _generator_named(claims):
        return {"origin": GENERATED, "words": words}
    if CAMERA in told:
        return {"origin": CAMERA, "words": _source_type_in_words(told[CAMERA], claims["c2pa"])}
    if all(tag in claims["exif"] for tag in DEVICE):
        words = f"EXIF names the device {' '.join(claims['exif'][tag] for tag in DEVICE)}"
        return {"origin": CAMERA, "words": words}
    return None


def contradiction(origin: str | None, claims: dict[str, Any] | None) -> str | None:
    """Where a file's claim and the verdict's origin can't both be true, that in words; else `None`."""
    claim = claims and claims["claim"]
    if not claim or {origin, claim["origin"]} != {CAMERA, GENERATED}:
        return None
    says = "a generator made it" if claim["origin"] == GENERATED else "a camera took it"
    return f"the file itself claims that {says}, which contradicts the verdict: {claim['words']}"


def summarise_provenance(claims: dict[str, Any]) -> list[str]:
    """The claims as sentences, one a claim, those of origin first."""
    lines = [claims["claim"]["words"]] if claims["claim"] else []
    settings = claims["settings"] or {}
    lines += [f"prompt: {settings['prompt']}"] if "prompt" in settings else []
    lines += [settings_in_words(settings)] if settings and claims["source_types"] else []
    for name in claims["source_types"]:
        meaning = SOURCE_TYPES.get(name, ("not a type that is known here",))[0]
        lines += [] if any(name in line for line in lines) else [f"digital source type {name}: {meaning}"]
    lines += credentials_in_words(claims["c2pa"]) if claims["c2pa"] else []
    for part, title in TITLES.items():
        lines += [f"{title} {tag}: {value}" for tag, value in claims[part].items()]
    return lines or ["the file makes no claim of its origin"]


def _source_type_in_words(name: str, credentials: dict[str, Any] | None) -> str:
    """What it means, and, unless XMP alone tells it, who signed it, and whether that holds."""
    meaning = f"{SOURCE_TYPES[name][0]} (digital source type {name}"
    for manifest in (credentials or {}).get("manifests", ()):
        if name in manifest["source_types"]:
            of = " of an ingredient" if manifest["relationship"] else ""
            return f"{meaning}{of}), C2PA {_signed(manifest, credentials)}"
    return f"{meaning})"


def _signed(manifest: dict[str, Any], credentials: dict[str, Any]) -> str:
    return f"signed by {manifest['issuer']}: {validity_in_words(credentials)}"


def _generator_named(claims: dict[str, Any]) -> str | None:
    """The claim whose software is a generator."""
    for manifest in (claims["c2pa"] or {}).get("manifests", ()):
        for name in (manifest["claim_generator"], *manifest["agents"]):
            if GENERATORS.search(name):
                return f"C2PA names {name}, {_signed(manifest, claims['c2pa'])}"
    for part in ("exif", "xmp", "iptc", "text"):
        for tag, value in claims[part].items():
            if _names_generator(tag, value):
                return f"{TITLES[part]} {tag} is {value}"
    keys = {*claims["text"], *claims["text"].get(UNREAD_TEXTS, "").split(", ")}
    marks = [key for key in GENERATOR_TEXTS[:-1] if key in keys]
    return f"text {marks[0]!r}, as generators write it" if marks else None


def _names_generator(tag: str, value: str) -> bool:
    if tag in SOFTWARE_TAGS:
        return GENERATORS.search(value) is not None
    return JOB.search(value) is not None or (tag in CREDIT_TAGS and CREDITS.search(value) is not None)


def _source_types(xmp: dict[str, str], credentials: dict[str, Any] | None) -> list[str]:
    manifests = (credentials or {}).get("manifests", ())
    names = [name for manifest in manifests for name in manifest["source_types"]]
    names += [name.rsplit("/", 1)[-1] for name in xmp.get("DigitalSourceType", "").split("; ") if name]
    return list(dict.fromkeys(names))


def _plain(value: Any) -> Any:
    """Texts on one line and cut, inside of anything."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return _shorten(value) if isinstance(value, str) else value


def _shorten(text: str) -> str:
    text = printable(re.sub(r"[\x00-\x1f\x7f]+", " ", text).strip())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


# --- parts of a file ----------------------------------------------------------------------------------------


def _with_texts_first(content: bytes) -> bytes:
    """
    A PNG with the texts that stand behind its pixels moved before them, where Pillow reads them without the
    pixels. Those with a wrong check sum stay, as the pixels are no less good for them.
    """
    start = content.find(b"IDAT") - 4
    if not content.startswith(PNG) or start < 0:
        return content
    texts, others, place = [], [], start
    for begin, end, kind in png_chunks(content):
        is_text = begin > start and kind in (b"tEXt", b"zTXt", b"iTXt", b"eXIf")
        if is_text and zlib.crc32(content[begin + 4 : end - 4]).to_bytes(4, "big") == content[end - 4 : end]:
            texts.append(content[begin:end])
            others.append(content[place:begin])
            place = end
    return b"".join([content[:start], *texts, *others, content[place:]]) if texts else content


def _exif(image: Image.Image) -> dict[str, str]:
    try:
        tags = Image.Image.getexif(image)  # that of PNG decodes the pixels, to find what is now before them
        named = {ExifTags.TAGS.get(tag, str(tag)): value for tag, value in tags.items()}
        comment = tags.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, "")
    except Exception as error:  # noqa: BLE001 (Pillow raises many kinds for damaged EXIF)
        return {"damaged": f"{type(error).__name__}: {error}"}
    told = {tag: _decoded(named[tag]) for tag in EXIF_TAGS if tag in named}
    comment = _user_comment(comment)
    told |= {} if "\ufffd" in comment else {"UserComment": comment}  # cameras keep bytes of their own there
    # ComfyUI writes its graphs where the camera stands
    graphs = {tag for tag, value in told.items() if re.match(r"(prompt|workflow):\s*{", value)}
    moved = {f"{tag} (ComfyUI)" if tag in graphs else tag: value for tag, value in told.items()}
    return {tag: value for tag, value in moved.items() if value}


def _user_comment(comment: Any) -> str:
    """
    EXIF 2.32, 4.6.5: eight bytes name the character code. That of Unicode has no byte order; the one that
    gives more letters of ASCII is taken.
    """
    if not isinstance(comment, bytes):
        return str(comment)
    code, text = comment[:8], comment[8:]
    if code.startswith(b"UNICODE"):
        both = [text.decode(name, "replace") for name in ("utf-16-be", "utf-16-le")]
        return max(both, key=lambda decoded: sum(character < "\x80" for character in decoded)).strip(
            "\ufeff\0 "
        )
    named = code in (b"ASCII\0\0\0", b"JIS\0\0\0\0\0", bytes(8))
    return _decoded(text if named else comment).strip("\0 ")


def _decoded(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _xmp(image: Image.Image) -> dict[str, str]:
    """Values of attributes, elements, lists and resources by the tag's local name, several joined by "; "."""
    packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    packet = packet if isinstance(packet, bytes) else str(packet).encode()
    if not packet.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        packet = packet.strip(b"\0 \r\n\t")
    if not packet:
        return {}
    if len(packet) > LARGEST_XMP:
        return {"damaged": f"{len(packet)} bytes, more than {LARGEST_XMP}"}
    try:
        root = fromstring(packet, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError, LookupError) as error:
        return {"damaged": f"{type(error).__name__}: {error}"}
    told: dict[str, dict[str, None]] = {}
    for element in islice(root.iter(), MOST_ELEMENTS):
        for name, value in _values(element):
            if name in XMP_TAGS and value.strip():
                told.setdefault(name, {})[value.strip()] = None
    return {name: "; ".join(told[name]) for name in XMP_TAGS if name in told}


def _values(element: Any) -> list[tuple[str, str]]:
    """Local names and values that an element of XMP tells: its attributes, and its text, list or resource."""
    attributes = [(_local(name), value) for name, value in element.attrib.items()]
    if _local(element.tag) not in XMP_TAGS:
        return attributes
    texts = [element.text or "", *(item.text or "" for item in element.findall("*/*"))]
    texts += [value for name, value in attributes if name == "resource"]
    return attributes + [(_local(element.tag), text) for text in texts]


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _iptc(image: Image.Image) -> dict[str, str]:
    try:
        told = IptcImagePlugin.getiptcinfo(image) or {}
    except Exception as error:  # noqa: BLE001 (as of EXIF)
        return {"damaged": f"{type(error).__name__}: {error}"}
    return {name: _decoded(told[tag]) for tag, name in IPTC_TAGS.items() if tag in told}


def _texts_of(image: Image.Image) -> dict[str, str]:
    texts = {str(key): text for key, text in image.info.items() if isinstance(text, str)}
    if "comment" in image.info:  # as Pillow calls that of JPEG and GIF
        texts["Comment"] = _decoded(image.info["comment"])
    return texts


__all__ = ["claimed_origin", "contradiction", "read_provenance", "summarise_provenance"]
