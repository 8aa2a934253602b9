"""What a file says of itself, as the tools write it, and where that contradicts the verdict."""

import io
import json
import struct
import time
import zlib

import pytest
from PIL import Image, PngImagePlugin
from protoleak.cli import format_row
from protoleak.forensics.provenance import contradiction, read_provenance, summarise_provenance
from protoleak.forensics.rendering import render
from protoleak.forensics.report import Examiner

PARAMETERS = (
    "a cat, "
    * 200
    + "masterpiece\nNegative prompt: ugly, bad\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, "
    "CFG scale: 7, Seed: 1234567890123, Size: 512x512, Model hash: 6ce0161689, Model: dream: v8, "
    'Lora hashes: "x: 1, Model: not this", Version: v1.10.0'
)
OF_PARAMETERS = {
    "model": "dream: v8", "sampler": "DPM++ 2M Karras", "steps": "20", "seed": "1234567890123",
    "guidance": "7",
}  # fmt: skip
GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 8566257, "steps": 20, "cfg": 8, "sampler_name": "euler", "model": ["4", 0],
            "positive": ["6", 0], "negative": ["7", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.safetensors"}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "ugly", "clip": ["4", 1]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a bottle", "clip": ["4", 1]}},
}  # fmt: skip
WORKFLOW = {
    "nodes": [
        {"type": "KSampler", "widgets_values": [8566257, "randomize", 20, 8, "euler", "normal", 1]},
        {"type": "CheckpointLoaderSimple", "widgets_values": ["v1-5.safetensors"]},
        {"type": "SaveImage", "widgets_values": None},
    ]
}
OF_GRAPH = {
    "model": "v1-5.safetensors",
    "sampler": "euler",
    "steps": "20",
    "seed": "8566257",
    "guidance": "8",
}
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def encoded(photo, format: str = "PNG", texts: dict[str, str] | None = None, **options) -> bytes:
    """A file's content, with these PNG texts."""
    content = io.BytesIO()
    if texts:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for key, text in texts.items():
            options["pnginfo"].add_text(key, text)
    photo.save(content, format, **options)
    return content.getvalue()


def with_comment(comment: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    return exif


# --- settings of generators ---------------------------------------------------------------------------------


COMMENTS = {
    "big endian": b"UNICODE\0" + PARAMETERS.encode("utf-16-be"),
    "little endian": b"UNICODE\0" + PARAMETERS.encode("utf-16-le"),
    "with a mark": b"UNICODE\0" + PARAMETERS.encode("utf-16"),
    "ascii": b"ASCII\0\0\0" + PARAMETERS.encode(),
    "undefined": bytes(8) + PARAMETERS.encode(),
    "bare": PARAMETERS.encode(),
}


@pytest.mark.parametrize("comment", COMMENTS.values(), ids=COMMENTS)
@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_parameters_in_the_user_comment_of_exif(photo, format, comment):
    """As web UIs write them into JPEG and WebP; the settings stand behind a prompt of 1,400 characters."""
    claims = read_provenance(encoded(photo, format, exif=with_comment(comment)))
    assert OF_PARAMETERS.items() <= claims["settings"].items()
    assert claims["settings"]["prompt"].startswith("a cat, a cat")
    assert claims["claim"]["origin"] == "generated"
    first = summarise_provenance(claims)[0]
    assert "model dream: v8, sampler DPM++ 2M Karras, steps 20, seed 1234567890123" in first


TEXTS = {  # what tools write into PNG, and what is told of it
    "web UI": ({"parameters": PARAMETERS}, OF_PARAMETERS | {"tool": "Stable Diffusion web UI or alike"}),
    "ComfyUI": (
        {"prompt": json.dumps(GRAPH), "workflow": json.dumps(WORKFLOW)},
        OF_GRAPH | {"tool": "ComfyUI", "prompt": "a bottle"},
    ),
    "ComfyUI's workflow alone": ({"workflow": json.dumps(WORKFLOW)}, OF_GRAPH | {"tool": "ComfyUI"}),
    "SwarmUI": (
        {"parameters": json.dumps({"sui_image_params": {"model": "sdxl", "seed": 5, "steps": 4}})},
        {"tool": "SwarmUI", "model": "sdxl", "seed": "5", "steps": "4"},
    ),
    "InvokeAI": (
        {"invokeai_metadata": json.dumps({"model": {"name": "sdxl"}, "seed": 5, "scheduler": "euler"})},
        {"tool": "InvokeAI", "model": "sdxl", "seed": "5", "sampler": "euler"},
    ),
    "InvokeAI, older": (
        {"sd-metadata": json.dumps({"model_weights": "sd-1.4", "image": {"steps": 50, "sampler": "k_lms"}})},
        {"tool": "InvokeAI", "model": "sd-1.4", "steps": "50", "sampler": "k_lms"},
    ),
    "InvokeAI, oldest": (
        {"Dream": '"a cat" -s 50 -S 123 -W 512 -H 512 -C 7.5 -A k_lms'},
        {"tool": "InvokeAI", "steps": "50", "seed": "123", "guidance": "7.5", "sampler": "k_lms"},
    ),
    "NovelAI": (
        {"Software": "NovelAI", "Comment": json.dumps({"steps": 28, "sampler": "k_euler", "seed": 4})},
        {"steps": "28", "sampler": "k_euler", "seed": "4"},
    ),
    "Easy Diffusion": (
        {"use_stable_diffusion_model": "sd-v1-4", "seed": "5", "num_inference_steps": "25"},
        {"model": "sd-v1-4", "seed": "5", "steps": "25"},
    ),
}


@pytest.mark.parametrize(("texts", "expected"), TEXTS.values(), ids=TEXTS)
def test_settings_in_the_texts_of_png(photo, texts, expected):
    claims = read_provenance(encoded(photo, texts=texts))
    assert expected.items() <= claims["settings"].items()
    assert claims["claim"]["origin"] == "generated"
    for name in ("model", "sampler", "steps", "seed"):
        assert expected.get(name, "") in claims["claim"]["words"]
    json.dumps(claims)


def test_a_graph_of_comfyui_in_the_tags_of_the_camera_is_no_camera(photo):
    """So it stands in WebP: the graph as Model, the workflow as Make."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = f"workflow:{json.dumps(WORKFLOW)}", f"prompt:{json.dumps(GRAPH)}"
    claims = read_provenance(encoded(photo, "WEBP", exif=exif))
    assert OF_GRAPH.items() <= claims["settings"].items()
    assert claims["claim"]["origin"] == "generated"


def test_texts_behind_the_pixels_are_read(photo):
    """Some tools append them; the pixels need not be decoded for that."""
    content = encoded(photo)
    text = b"tEXtparameters\0" + PARAMETERS.encode()
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    claims = read_provenance(content[:-12] + chunk + content[-12:])
    assert OF_PARAMETERS.items() <= claims["settings"].items()
    assert read_provenance(content[:-12] + chunk[:20])["settings"] is None


def test_a_text_too_large_to_be_read_is_a_claim_by_its_key(photo):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "{" + " " * 2_000_000 + "}", zip=True)
    claims = read_provenance(encoded(photo, pnginfo=info))
    assert claims["text"] == {"texts not read": "workflow"}
    assert claims["claim"] == {"origin": "generated", "words": "text 'workflow', as generators write it"}


HOSTILE = {
    "deep": {"prompt": "[" * 100_000},
    "deep object": {"prompt": '{"a":' * 50_000},
    "types": {
        "prompt": json.dumps({"3": {"class_type": 5, "inputs": {"seed": [], "ckpt_name": {"name": []}}}})
    },
    "links": {"prompt": json.dumps({"3": {"class_type": "K", "inputs": {"positive": [["x"]]}}, "a": 5})},
    "nodes": {"workflow": json.dumps({"nodes": [5, {"type": "KSampler", "widgets_values": "abc"}, {}]})},
    "a large number": {"prompt": '{"nodes": ' + "9" * 5000 + "}"},
    "quotes": {"parameters": "Steps: 2" + ', a: "\\' * 20_000},
}


@pytest.mark.parametrize("texts", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_do_no_harm(photo, texts):
    began = time.process_time()
    claims = read_provenance(encoded(photo, texts=texts))
    assert time.process_time() - began < 2
    assert claims["claim"]["origin"] == "generated"  # its keys are those that generators write


# --- tags ---------------------------------------------------------------------------------------------------


def test_software_tags_are_told_and_others_not(photo):
    exif = Image.Exif()
    exif[0x0131] = "Some Editor 1.0"
    content = encoded(photo, texts={"unrelated": "not told", "parameters": "a cat\nin two lines"}, exif=exif)
    claims = read_provenance(content)
    assert claims["text"] == {"parameters": "a cat in two lines"}
    assert claims["exif"] == {"Software": "Some Editor 1.0"}
    assert claims["c2pa"] is None
    assert "EXIF Software: Some Editor 1.0" in summarise_provenance(claims)


def packet(attributes: str = "", elements: str = "", before: str = "") -> bytes:
    return f"""{before}<x:xmpmeta xmlns:x="adobe:ns:meta/">
    <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description {attributes}
    xmlns:ext="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    >{elements}</rdf:Description></rdf:RDF></x:xmpmeta>""".encode()


PACKETS = {
    "double quotes": packet(f'ext:DigitalSourceType="{SOURCE_TYPE}"'),
    "single quotes and spaces": packet(f"ext:DigitalSourceType = '{SOURCE_TYPE}'"),
    "element": packet("", f"<ext:DigitalSourceType>\n{SOURCE_TYPE}\n</ext:DigitalSourceType>"),
    "resource": packet("", f"<ext:DigitalSourceType rdf:resource='{SOURCE_TYPE}'/>"),
    "list": packet(
        "",
        f"<ext:DigitalSourceType><rdf:Bag><rdf:li>{SOURCE_TYPE}</rdf:li></rdf:Bag></ext:DigitalSourceType>",
    ),
    "another prefix": packet(f'ext:DigitalSourceType="{SOURCE_TYPE}"')
    .replace(b"ext:", b"q:")
    .replace(b":ext", b":q"),
    "references": packet(f'ext:DigitalSourceType="{SOURCE_TYPE.replace("t", "&#116;")}"'),
    "zeros behind": packet(f'ext:DigitalSourceType="{SOURCE_TYPE}"') + bytes(40),
    "utf-16": packet(f'ext:DigitalSourceType="{SOURCE_TYPE}"').decode().encode("utf-16"),
}


@pytest.mark.parametrize("xmp", PACKETS.values(), ids=PACKETS)
@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_the_digital_source_type_of_xmp_in_every_notation(photo, format, xmp):
    claims = read_provenance(encoded(photo, format, xmp=xmp))
    assert claims["source_types"] == ["trainedAlgorithmicMedia"]
    assert claims["claim"]["origin"] == "generated"
    assert "created by a generative model" in summarise_provenance(claims)[0]


def test_xmp_of_png_and_tiff(photo):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", PACKETS["resource"].decode())
    assert read_provenance(encoded(photo, pnginfo=info))["source_types"] == ["trainedAlgorithmicMedia"]
    content = encoded(photo, "TIFF", tiffinfo={700: PACKETS["resource"]})
    assert read_provenance(content)["source_types"] == ["trainedAlgorithmicMedia"]


HOSTILE_PACKETS = {
    "entity": packet(
        'xmp:CreatorTool="&e;"', before='<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>'
    ),
    "bomb": packet('xmp:CreatorTool="&b;"', before='<!DOCTYPE x [<!ENTITY a "xx"><!ENTITY b "&a;&a;">]>'),
    "cut": PACKETS["element"][:-30],
    "no xml": b"DigitalSourceType='trainedAlgorithmicMedia'",
    "encoding": b"<?xml version='1.0' encoding='no-such'?><a/>",
    "large": packet("", "<a/>" * 300_000),
}


@pytest.mark.parametrize("xmp", HOSTILE_PACKETS.values(), ids=HOSTILE_PACKETS)
def test_hostile_xmp_is_told_as_damaged(photo, xmp):
    claims = read_provenance(encoded(photo, "WEBP", xmp=xmp))
    assert set(claims["xmp"]) == {"damaged"}
    assert "root:" not in str(claims)


def test_deep_xmp_is_read_in_time(photo):
    began = time.process_time()
    nested = packet("", "<xmp:Credit>" * 30_000 + "Made with Google AI" + "</xmp:Credit>" * 30_000)
    assert read_provenance(encoded(photo, "WEBP", xmp=nested))["xmp"]["Credit"] == "Made with Google AI"
    assert time.process_time() - began < 4


NAMED = {
    "Midjourney": (
        encoded,
        {"texts": {"Description": "a cat --v 6 Job ID: 12345678-abcd-1234-1234-123456789012"}},
    ),
    "Google": (encoded, {"format": "JPEG", "xmp": packet('xmp:Credit="Made with Google AI"')}),
    "Firefly": (encoded, {"format": "JPEG", "xmp": packet('xmp:CreatorTool="Adobe Firefly"')}),
}


@pytest.mark.parametrize(("make", "options"), NAMED.values(), ids=NAMED)
def test_a_generator_is_known_by_name(photo, make, options):
    assert read_provenance(make(photo, **options))["claim"]["origin"] == "generated"


@pytest.mark.parametrize("credit", ["Gemini Observatory", "OpenAI handout", "Flux Photo Agency"])
def test_a_credit_that_has_a_generators_name_in_it_claims_nothing(photo, credit):
    assert read_provenance(encoded(photo, "JPEG", xmp=packet(f'xmp:Credit="{credit}"')))["claim"] is None


def test_a_camera_is_claimed_by_its_tags_or_its_source_type(photo):
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "Maker", "Camera 5"
    exif.get_ifd(0x8769)[0x9286] = bytes(8) + b"\xff\xfe\x01\x80" * 40  # bytes of the maker's own
    claims = read_provenance(encoded(photo, "JPEG", exif=exif))
    assert claims["claim"] == {"origin": "camera", "words": "EXIF names the device Maker Camera 5"}
    assert set(claims["exif"]) == {"Make", "Model"}
    capture = PACKETS["element"].replace(b"trainedAlgorithmicMedia", b"digitalCapture")
    assert read_provenance(encoded(photo, "JPEG", xmp=capture))["claim"]["origin"] == "camera"
    both = read_provenance(encoded(photo, "JPEG", exif=exif, xmp=PACKETS["element"]))
    assert both["claim"]["origin"] == "generated"


def test_a_claim_outside_a_container_is_not_read(photo):
    claims = read_provenance(encoded(photo) + b"parameters: a cat, Software: Midjourney")
    assert claims["text"] == claims["exif"] == claims["xmp"] == {}
    assert claims["claim"] is None
    with pytest.raises(OSError, match="not an image"):
        read_provenance(b"parameters: a cat")


# --- beside the verdict -------------------------------------------------------------------------------------


GENERATED, CAMERA = (
    {"claim": {"origin": "generated", "words": "w"}},
    {"claim": {"origin": "camera", "words": "w"}},
)


def test_a_contradiction_is_one_of_camera_and_generated():
    assert "a generator made it" in contradiction("camera", GENERATED)
    assert "a camera took it" in contradiction("generated", CAMERA)
    for origin, claims in (
        ("camera", CAMERA), ("generated", GENERATED), ("can't tell", GENERATED), (None, GENERATED),
        ("camera", {"claim": None}), ("camera", None),
    ):  # fmt: skip
        assert contradiction(origin, claims) is None


def test_a_contradiction_is_said_first_in_every_place(checkpoint, photo, tmp_path, monkeypatch):
    """A file whose settings name a generator, and a model that calls it a camera's."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(photo, "JPEG", exif=with_comment(COMMENTS["big endian"])))
    monkeypatch.setattr("protoleak.pipeline_protoleak._origin", lambda *levels: "camera")
    examiner = Examiner(str(checkpoint))
    examined, (attributed,) = examiner.examine(path), examiner.attributor.records([path])
    assert examined["contradiction"] == attributed["contradiction"]
    sentence = "the file itself claims that a generator made it, which contradicts the verdict"
    row = format_row(examined)
    assert row.index(sentence) < row.index("dream: v8") < row.index("a camera (")
    page = render(examiner, [examined])
    overview = page[page.index("<table") :]  # above it stands how many are called what
    assert overview.index(sentence) < overview.index("a camera")
