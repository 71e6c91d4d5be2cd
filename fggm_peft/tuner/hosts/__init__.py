"""Effects of other libraries on layers: sharding, offloading and quantization."""
