"""Weights in fewer bits, written as other programs write them."""

from pathlib import Path

import pytest
from torch import nn


def gguf_file(place: Path, model: nn.Module) -> Path:
    """A denoiser in blocks of 8 bits, as llama.cpp's format has them, under diffusers' names."""
    gguf = pytest.importorskip("gguf", reason="reading .gguf needs the extra 'quantize'")
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(place, "diffusers")
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place
