"""Networks: the identity encoder, its decoders and the adapter for FLUX."""
