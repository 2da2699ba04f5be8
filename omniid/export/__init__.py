"""Encoder, identity adapter and FLUX transformer as ONNX graphs and TensorRT engines, each with proof that it gives the same."""
