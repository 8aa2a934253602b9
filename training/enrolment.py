"""One more generator for a checkpoint, from a handful of its images, without training."""

from pathlib import Path

import torch

from ..explanation_protoleak import keep_thumbnails
from ..files_protoleak import whole_folder
from ..image_processing_protoleak import ProtoLeakImageProcessor
from ..modeling_protoleak import ProtoLeakForImageAttribution
from .card import write_card

PARTS = ("embeddings", "gates", "statistics")


@torch.no_grad()
def write_enrolled(checkpoint: str, name: str, files: list[Path], output_dir: str | Path) -> list[str]:
    """
    Write a new checkpoint that also knows `name`, and return its classes.

    Args:
        checkpoint (`str`): Folder or Hub id of the one to extend, which stays as it is.
        name (`str`): What to call the generator.
        files (`list[Path]`): At least 2 images by it.
        output_dir: A new or empty folder.

    Raises:
        ValueError: the folder holds something, or as [`ProtoLeakForImageAttribution.enroll`].
    """
    target = Path(output_dir)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; name a new folder, so that nothing is overwritten")
    model = ProtoLeakForImageAttribution.from_pretrained(checkpoint)
    processor = ProtoLeakImageProcessor.from_pretrained(checkpoint)
    outputs = [model(processor(file)["pixel_values"], return_dict=True) for file in files]
    parts = [part for part in PARTS if part in outputs[0]]  # an output has no keys of what is None
    model.enroll(name, {part: torch.cat([output[part] for output in outputs]) for part in parts})
    first = len(model.detector.train_["labels"]) - len(files)  # of the new among the training images
    keep_thumbnails(model, lambda i: files[i - first] if i >= first else None)
    with whole_folder(target) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    origin = f"{name} was enrolled in {checkpoint} from {len(files)} images, without training."
    command = f"protoleak enroll {name} IMAGES --model {checkpoint} --output_dir {target}"
    write_card(target, model, origin, command)
    return model.detector.labels
