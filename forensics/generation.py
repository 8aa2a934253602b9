"""Settings that image generators write into a file's texts: tool, model, sampler, steps, seed."""

import json
import re
from collections.abc import Iterator
from typing import Any

SETTINGS = ("model", "sampler", "steps", "seed", "guidance", "prompt")
NAMES = {  # how tools call a setting, in lower case with underscores
    "model": (
        "model", "model_name", "base_model", "basemodel", "model_weights", "use_stable_diffusion_model",
        "ckpt_name", "unet_name", "sd_model",
    ),
    "sampler": ("sampler", "sampler_name", "samplername", "scheduler"),
    "steps": ("steps", "num_inference_steps"),
    "seed": ("seed", "noise_seed"),
    "guidance": ("cfg_scale", "cfgscale", "guidance_scale", "scale", "cfg", "guidance"),
    "prompt": ("prompt", "positive_prompt", "c"),
}  # fmt: skip
COMFY = {  # of a node's inputs in ComfyUI
    "model": ("ckpt_name", "unet_name"),
    "sampler": ("sampler_name",),
    "steps": ("steps",),
    "seed": ("seed", "noise_seed"),
    "guidance": ("cfg", "guidance"),
}
KSAMPLER = ("seed", None, "steps", "cfg", "sampler_name")  # the first widgets of that node in a workflow
WEIGHTS = (".safetensors", ".ckpt", ".gguf", ".sft", ".pth")
FIELD = re.compile(r'([A-Za-z][\w /-]*):\s*("(?:\\.|[^"\\])*"|[^,\n]*)(?:,|$)', re.MULTILINE)
DREAM = {"s": "steps", "S": "seed", "A": "sampler", "C": "guidance"}  # switches of InvokeAI's old line
UNNAMED = "a generator that gives no name"
LONGEST = 4_000_000  # characters of a text that is looked into
Settings = dict[str, str]


def parse_settings(texts: dict[str, str], tags: dict[str, str]) -> Settings | None:
    """
    What a generator's own texts say of how the image was made.

    Args:
        texts: Keyword to text, as in PNG chunks.
        tags: Tag to text, of EXIF and XMP.

    Returns:
        `tool`, and of `SETTINGS` those that are told, as text; several values are joined by " + ". `None`
        where no text is a generator's.
    """
    for key, text in (texts | tags).items():
        if settings := _of_text(key, text[:LONGEST]):
            return settings
    return _named(UNNAMED, texts)  # as Easy Diffusion writes them


def settings_in_words(settings: Settings) -> str:
    """The tool and its settings, without the prompt."""
    told = [f"{name} {settings[name]}" for name in SETTINGS[:-1] if name in settings]
    return f"{settings['tool']}: {', '.join(told)}" if told else settings["tool"]


def _of_text(key: str, text: str) -> Settings | None:
    head, _, rest = text.partition(":")
    if head in ("prompt", "workflow") and rest.lstrip().startswith("{"):  # ComfyUI, in tags of EXIF
        text = rest
    if text.lstrip().startswith("{"):
        try:
            return _of_json(key, json.loads(text))
        except (ValueError, RecursionError):
            return None
    if re.search(r"\bSteps: \d", text):
        return _of_parameters(text)
    switches = re.findall(r"\s-([sSAC]) ?([\w.]+)", text) if key == "Dream" else []
    return {"tool": "InvokeAI"} | {DREAM[name]: value for name, value in switches} if switches else None


def _of_parameters(text: str) -> Settings:
    """Prompt, "Negative prompt: ...", and a line of "Name: value" with commas, that begins with the steps."""
    start = text.rindex("Steps: ")
    fields = {name.strip(): value.strip().strip('"') for name, value in FIELD.findall(text[start:])}
    prompt = text[:start].split("Negative prompt:")[0].strip()
    model = fields.get("Model") or (f"hash {fields['Model hash']}" if "Model hash" in fields else "")
    told = {
        "model": model,
        "sampler": " ".join(filter(None, (fields.get("Sampler"), fields.get("Schedule type")))),
        "steps": fields.get("Steps", ""),
        "seed": fields.get("Seed", ""),
        "guidance": fields.get("CFG scale", ""),
        "prompt": prompt,
    }
    tool = "Stable Diffusion web UI or alike"
    return {"tool": tool} | {name: value for name, value in told.items() if value}


def _of_json(key: str, value: Any) -> Settings | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("nodes"), list):
        return _of_nodes(list(_workflow_inputs(value["nodes"])))
    nodes = {name: node for name, node in value.items() if isinstance(node, dict) and "class_type" in node}
    if nodes:
        inputs = [node["inputs"] for node in nodes.values() if isinstance(node.get("inputs"), dict)]
        return _of_nodes(inputs) | _positive_prompt(nodes, inputs)
    if isinstance(value.get("sui_image_params"), dict):
        return _named("SwarmUI", value["sui_image_params"])
    tool = {"invokeai_metadata": "InvokeAI", "sd-metadata": "InvokeAI", "Comment": "NovelAI or alike"}
    image = value.get("image") if isinstance(value.get("image"), dict) else {}  # older InvokeAI nests them
    return _named(tool.get(key, UNNAMED), value | image)


def _named(tool: str, values: dict[str, Any]) -> Settings | None:
    """Settings by the names that tools give them; none where fewer than two are told, or a prompt alone."""
    by_name = {str(name).lower().replace(" ", "_"): value for name, value in values.items()}
    told = {}
    for setting, names in NAMES.items():
        found = [_scalar(by_name[name]) for name in names if name in by_name]
        if found and found[0]:
            told[setting] = found[0]
    return {"tool": tool} | told if len(told.keys() - {"prompt"}) >= 2 else None


def _scalar(value: Any) -> str:
    """Text or number as text; of an object its name."""
    if isinstance(value, dict):
        value = next((value[name] for name in ("name", "model_name", "label") if name in value), None)
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def _of_nodes(inputs: list[dict[str, Any]]) -> Settings:
    told = {}
    for setting, names in COMFY.items():
        values = dict.fromkeys(_scalar(node[name]) for node in inputs for name in names if name in node)
        told[setting] = " + ".join(list(filter(None, values))[:4])
    return {"tool": "ComfyUI"} | {name: value for name, value in told.items() if value}


def _positive_prompt(nodes: dict[str, Any], inputs: list[dict[str, Any]]) -> Settings:
    """The text of the node that a sampler's input `positive` leads to."""
    for node in inputs:
        link = node.get("positive")
        target = nodes.get(str(link[0]), {}) if isinstance(link, list) and link else {}
        source = target.get("inputs")
        if isinstance(source, dict) and isinstance(source.get("text"), str):
            return {"prompt": source["text"]}
    return {}


def _workflow_inputs(nodes: list[Any]) -> Iterator[dict[str, Any]]:
    """As inputs, what a workflow tells by place alone: samplers' first widgets, and names of weights."""
    for node in nodes:
        values = node.get("widgets_values") if isinstance(node, dict) else None
        if not isinstance(values, list):
            continue
        if node.get("type") == "KSampler":
            yield {name: value for name, value in zip(KSAMPLER, values, strict=False) if name}
        if "Loader" in str(node.get("type")):
            yield from ({"ckpt_name": v} for v in values if isinstance(v, str) and v.endswith(WEIGHTS))


__all__ = ["parse_settings", "settings_in_words"]
