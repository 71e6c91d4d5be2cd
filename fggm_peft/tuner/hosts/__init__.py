"""Effects of other libraries on layers: sharding, offloading and quantization."""

from .bitsandbytes import four_bit_layers_as_they_are

__all__ = ["four_bit_layers_as_they_are"]
