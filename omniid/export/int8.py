"""Weights in int8 for CPUs: onnxruntime's dynamic quantisation, which rounds activations as they come.

Every output of a product has its own scale. Values take 7 of the 8 bits: without VNNI instructions the sums of full ones
overflow 16 bits.
"""

import logging
from pathlib import Path

from omniid.export.onnx import LARGEST_IN_ONE_FILE, require
from omniid.export.parity import size_of


def quantize(path: str | Path, target: str | Path) -> None:
    """Writes the fp32 graph at `path` with the weights of its matrix products in int8 to `target`."""
    require("onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises on preparing graphs that torch's exporter has prepared already
    try:
        quantize_dynamic(
            str(path),
            str(target),
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=size_of(path) > 4 * LARGEST_IN_ONE_FILE,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logger.setLevel(level)
