"""The cheapest faithful autoencoder: pixels in patches."""

import torch
from diffusers import AutoencoderDC

LATENTS = 12  # values of a patch of 2x2 pixels in three colours
LEVEL = 1e3  # of the decoder's constant channels, beside which its normalisation changes nothing
SHIFT = 2.0  # keeps what its rectifier sees positive


@torch.no_grad()
def make_patch_autoencoder() -> AutoencoderDC:
    """
    An autoencoder of diffusers whose 12 latents are the values of a patch of 2x2 pixels: its convolutions are
    set by hand, the first and the last to the identity. It loses nothing (decoded pixels in [-1, 1] are off
    by less than 1e-4), has nothing to learn, and encoding costs next to nothing.
    """
    vae = AutoencoderDC(
        in_channels=3, latent_channels=LATENTS, attention_head_dim=3, scaling_factor=1.0,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(3, LATENTS), decoder_block_out_channels=(3, 2 * LATENTS),
        encoder_layers_per_block=(0, 0), decoder_layers_per_block=(0, 0),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        downsample_block_type="pixel_unshuffle", upsample_block_type="pixel_shuffle",
        decoder_in_shortcut=False,
    )  # fmt: skip
    for parameter in vae.parameters():
        parameter.zero_()
    _set_identity(vae.encoder.conv_in.conv.weight)  # its pixels are then unshuffled; conv_out is a shortcut
    decoder, level = vae.decoder, LEVEL / 2**0.5  # root mean square of all channels
    _set_identity(decoder.conv_in.weight)
    decoder.conv_in.bias[:LATENTS], decoder.conv_in.bias[LATENTS:] = SHIFT, LEVEL
    decoder.norm_out.weight.fill_(1)
    _set_identity(decoder.conv_out.conv.weight, level)
    decoder.conv_out.conv.bias.fill_(-SHIFT)
    return vae.eval()


def _set_identity(weight: torch.Tensor, scale: float = 1.0) -> None:
    """Of a 3x3 convolution's weights (out, in, 3, 3), for as many channels as it has of both."""
    for channel in range(min(weight.shape[:2])):
        weight[channel, channel, 1, 1] = scale
