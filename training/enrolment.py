"""One more generator for a checkpoint, from a handful of its images, without training."""

import shlex
from pathlib import Path

import torch

from ..explanation_protoleak import keep_thumbnails
from ..files_protoleak import whole_folder
from ..image_processing_protoleak import ProtoLeakImageProcessor
from ..modeling_protoleak import ProtoLeakForImageAttribution
from .arguments import hub_id, public_name
from .card import HubFacts, write_card
from .checks import note_enrolled

PARTS = ("embeddings", "gates", "statistics")


@torch.no_grad()
def write_enrolled(
    checkpoint: str, name: str, files: list[Path], output_dir: str | Path, thumbnails: bool = False
) -> list[str]:
    """
    Write a new checkpoint that also knows `name`, and return its classes.

    Args:
        checkpoint (`str`): Folder or Hub id of the one to extend, which stays as it is.
        name (`str`): What to call the generator.
        files (`list[Path]`): At least 2 images by it.
        output_dir: A new or empty folder.
        thumbnails (`bool`): Whether small pictures of these images are kept, for reports.

    Raises:
        ValueError: the folder holds something, images can't be read, which it names, or as
            [`ProtoLeakForImageAttribution.enroll`].
    """
    target = Path(output_dir)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; name a new folder, so that nothing is overwritten")
    model = ProtoLeakForImageAttribution.from_pretrained(checkpoint)
    if model.detector is not None:
        model.detector.check_new(name)  # before any image is read
    processor = ProtoLeakImageProcessor.from_pretrained(checkpoint)
    model.check_processor(processor)
    outputs, sizes, errors = [], [], []
    for file in files:
        try:
            image = processor.open(file)
        except (OSError, ValueError) as error:
            errors.append(str(error))
            continue
        if not errors:
            outputs.append(model(processor(image)["pixel_values"], return_dict=True))
            sizes.append(image.size)
    if errors:
        unread = f"{len(errors)} of {len(files)} images can't be read; leave them out"
        raise ValueError("\n".join([f"{unread}:", *errors]))
    parts = [part for part in PARTS if part in outputs[0]]  # an output has no keys of what is None
    model.enroll(name, {part: torch.cat([output[part] for output in outputs]) for part in parts})
    if thumbnails:
        first = len(model.detector.train_["labels"]) - len(files)  # of the new among the training images
        keep_thumbnails(model, lambda i: files[i - first] if i >= first else None)
    note_enrolled(model, name, sizes)
    with whole_folder(target) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    base = public_name(checkpoint)
    origin = f"{name} was enrolled in {base} from {len(files)} images, without training."
    command = shlex.join(
        ["protoleak", "enroll", name, "IMAGES", "--model", base, "--output_dir", target.name]
    )
    write_card(target, model, origin, command, hub=HubFacts(base_model=hub_id(checkpoint)))
    return model.detector.labels
