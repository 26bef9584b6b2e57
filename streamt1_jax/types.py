"""Axis letters and array aliases, one legend for the whole repository.

F latent frames        T pixel frames         f latent frames of one chunk (3)
C latent channels (16) h, w latent height and width     H, W pixel height and width
L layers               N heads                D head size        M model width (dim)
S tokens of one latent frame, (h/2)*(w/2)     P prompt tokens (512)
B beams kept           K candidates per beam  n any batch
"""

from typing import TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

# Made by NumPy on the host or traced by JAX: batches of training data are both, one after the other.
HostOrDevice: TypeAlias = jax.Array | np.ndarray

Latents: TypeAlias = Float[Array, "F C h w"]
Chunk: TypeAlias = Float[Array, "f C h w"]
Frames: TypeAlias = Float[Array, "T H W 3"]
FramesU8: TypeAlias = UInt8[Array, "T H W 3"]
PromptEmbeds: TypeAlias = Float[Array, "P text_dim"]
Seed: TypeAlias = UInt32[Array, ""]
Scalar: TypeAlias = Float[Array, ""]
Count: TypeAlias = Int[Array, ""]
Flag: TypeAlias = Bool[Array, ""]
